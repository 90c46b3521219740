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
    /// Of those, too.
    uses: ModalityUses,
    /// The number of the domain in a probe set of which the tokens are that come, where that is known.
    pub domain: Option<u16>,
}

/// A token in its sequence.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct TokenPlace {
    pub(crate) position: usize,
    pub(crate) token: u32,
    pub(crate) modality: Modality,
}

#[derive(Clone, Copy, Debug)]
struct Head {
    position: u32,
    token: u32,
    layer: u32,
    domain: Option<u16>,
    modality: Modality,
}

/// One token's routing in one layer.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct RoutedToken<'a> {
    /// The token's place in the sequence.
    pub position: usize,
    /// The token.
    pub token: u32,
    /// The transformer layer.
    pub layer: u32,
    /// The number of its domain in a probe set, where that is known.
    pub domain: Option<u16>,
    /// What the token stands for.
    pub modality: Modality,
    /// Its experts, likeliest first.
    pub choices: &'a [Choice],
}

/// Tokens, and the distinct experts that they used, by [`Modality`] of the tokens.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ModalityUses {
    tokens: [u64; 3],
    /// The first layer with experts, by which tokens are counted.
    layer: Option<u32>,
    /// By layer and expert, a bit for each modality.
    used: Vec<Vec<u8>>,
}

impl ModalityUses {
    /// Counts one token's routing in one layer.
    pub fn add(&mut self, layer: u32, modality: Modality, choices: &[Choice]) {
        if *self.layer.get_or_insert(layer) == layer {
            self.tokens[modality as usize] += 1;
        }
        let layer = layer as usize;
        if self.used.len() <= layer {
            self.used.resize_with(layer + 1, Vec::new);
        }
        let used = &mut self.used[layer];
        for choice in choices {
            let expert = choice.expert as usize;
            if used.len() <= expert {
                used.resize(expert + 1, 0);
            }
            used[expert] |= 1 << modality as u8;
        }
    }

    /// Tokens of a modality.
    pub fn tokens(&self, modality: Modality) -> u64 {
        self.tokens[modality as usize]
    }

    /// Distinct experts that they used.
    pub fn experts(&self, modality: Modality) -> u64 {
        self.used.iter().flatten().filter(|used| **used & (1 << modality as u8) != 0).count() as u64
    }

    fn clear(&mut self) {
        self.tokens = [0; 3];
        self.used.iter_mut().for_each(|used| used.fill(0));
    }
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
            uses: ModalityUses::default(),
            domain: None,
        }
    }

    /// Everything that is kept, the oldest first.
    pub fn entries(&self) -> impl Iterator<Item = RoutedToken<'_>> {
        let k = self.choices.len() / self.heads.len().max(1);
        (0..self.heads.len()).map(move |number| {
            let at = (self.oldest + number) % self.heads.len();
            let Head { position, token, layer, domain, modality } = self.heads[at];
            let choices = &self.choices[at * k..][..k];
            RoutedToken { position: position as usize, token, layer, domain, modality, choices }
        })
    }

    /// Entries that had to go.
    pub fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// By modality, what is kept and what had to go.
    pub fn uses(&self) -> &ModalityUses {
        &self.uses
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        (self.oldest, self.forgotten) = (0, 0);
        self.heads.clear();
        self.choices.clear();
        self.uses.clear();
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

    pub(crate) fn record(&mut self, place: TokenPlace, layer: u32, choices: &[Choice]) {
        let TokenPlace { position, token, modality } = place;
        self.uses.add(layer, modality, choices);
        let head = Head { position: position as u32, token, layer, domain: self.domain, modality };
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
            let modality = if token == 1 { Modality::Image } else { Modality::Text };
            log.record(TokenPlace { position: token as usize, token: 100 + token, modality }, 7, &choices);
            assert!(log.heads.len() <= 3 && log.choices.len() <= 6);
        }
        let kept: Vec<_> = log.entries().map(|entry| (entry.position, entry.token, entry.layer, entry.choices[1].expert)).collect();
        assert_eq!(kept, [(2, 102, 7, 5), (3, 103, 7, 7), (4, 104, 7, 9)]);
        assert_eq!(log.forgotten(), 2);
        let uses = |log: &ActivationLog| Modality::ALL.map(|modality| (log.uses().tokens(modality), log.uses().experts(modality)));
        assert_eq!(uses(&log), [(4, 8), (1, 2), (0, 0)], "what had to go is counted");
        log.clear();
        assert_eq!((log.entries().count(), log.forgotten(), uses(&log)), (0, 0, [(0, 0); 3]));
    }
}
