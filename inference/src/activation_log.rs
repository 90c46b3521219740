//! Which experts each token used, of the newest forward passes. Stays on this node: routing traces reveal text.

use protocol::profile::Modality;

use crate::cache_policy::Trace;
use crate::router::Choice;

/// Entries that a log keeps unless told otherwise: one for each token and layer.
pub const ENTRIES_DEFAULT: usize = 1 << 16;

/// The routing of tokens and layers, in order of computation. The oldest goes when it is full.
#[derive(Debug)]
pub struct ActivationLog {
    entries_max: usize,
    heads: Vec<Head>,
    /// As many for each head as a token has experts.
    choices: Vec<Choice>,
    /// Where the oldest entry is, once the log is full.
    oldest: usize,
    forgotten: u64,
    /// What the tokens that come are of.
    pub label: Label,
}

/// What tokens are of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Label {
    /// The number of their domain in a probe set, where that is known.
    pub domain: Option<u16>,
    /// What they stand for.
    pub modality: Modality,
}

#[derive(Clone, Copy, Debug)]
struct Head {
    position: u32,
    token: u32,
    layer: u32,
    label: Label,
}

/// One token's routing in one layer.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Activation<'a> {
    /// The token's place in the sequence.
    pub position: usize,
    /// The token.
    pub token: u32,
    /// The transformer layer.
    pub layer: u32,
    /// What the token is of.
    pub label: Label,
    /// Its experts, likeliest first.
    pub choices: &'a [Choice],
}

impl Default for ActivationLog {
    fn default() -> Self {
        Self::new(ENTRIES_DEFAULT)
    }
}

impl ActivationLog {
    /// An empty log that keeps the newest `entries_max` entries.
    pub fn new(entries_max: usize) -> Self {
        Self {
            entries_max: entries_max.max(1),
            heads: Vec::new(),
            choices: Vec::new(),
            oldest: 0,
            forgotten: 0,
            label: Label { domain: None, modality: Modality::Text },
        }
    }

    /// Everything that is kept, the oldest first.
    pub fn entries(&self) -> impl Iterator<Item = Activation<'_>> {
        let k = self.choices.len() / self.heads.len().max(1);
        (0..self.heads.len()).map(move |number| {
            let at = (self.oldest + number) % self.heads.len();
            let Head { position, token, layer, label } = self.heads[at];
            Activation { position: position as usize, token, layer, label, choices: &self.choices[at * k..][..k] }
        })
    }

    /// Entries that had to go.
    pub fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        (self.oldest, self.forgotten) = (0, 0);
        self.heads.clear();
        self.choices.clear();
    }

    /// The experts that each layer used in each pass, as a trace for the simulation of caches.
    pub fn trace(&self, layers: u32, experts: u32) -> Trace {
        let mut trace = Trace::new(layers, experts).expect("a model's shape is within a trace's limits");
        // Entries of one pass and layer stand together, with positions ascending.
        let entries: Vec<_> = self.entries().collect();
        for pass in entries.chunk_by(|a, b| a.layer == b.layer && a.position < b.position) {
            let mut used: Vec<u32> = pass.iter().flat_map(|entry| entry.choices).map(|choice| choice.expert).collect();
            used.sort_unstable();
            used.dedup();
            trace.push(pass[0].layer, &used).expect("experts of the model, ascending");
        }
        trace
    }

    pub(crate) fn record(&mut self, (position, token): (usize, u32), layer: u32, choices: &[Choice]) {
        let head = Head { position: position as u32, token, layer, label: self.label };
        if self.heads.len() < self.entries_max {
            self.heads.push(head);
            self.choices.extend_from_slice(choices);
            return;
        }
        self.heads[self.oldest] = head;
        self.choices[self.oldest * choices.len()..][..choices.len()].copy_from_slice(choices);
        self.oldest = (self.oldest + 1) % self.entries_max;
        self.forgotten += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_newest_and_counts_what_had_to_go() {
        let mut log = ActivationLog::new(3);
        for token in 0..5u32 {
            let choices = [0, 1].map(|i| Choice { expert: 2 * token + i, weight: 0.5 });
            log.record((token as usize, 100 + token), 7, &choices);
            assert!(log.heads.len() <= 3 && log.choices.len() <= 6);
        }
        let kept: Vec<_> = log.entries().map(|entry| (entry.position, entry.token, entry.layer, entry.choices[1].expert)).collect();
        assert_eq!(kept, [(2, 102, 7, 5), (3, 103, 7, 7), (4, 104, 7, 9)]);
        assert_eq!(log.forgotten(), 2);
        log.clear();
        assert_eq!((log.entries().count(), log.forgotten()), (0, 0));
    }
}
