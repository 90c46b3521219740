//! Which experts a request used, and where they were; by what the engine noted of a pass.

use std::collections::BTreeSet;

use inference::activation_log::{ActivationLog, ModalityUses, RoutedToken};
use inference::expert_use::ServedFrom;
use net::PeerId;
use protocol::profile::Modality;
use serde::Serialize;
use serde_json::{Value, json};

/// Uses of experts, by where each was.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Whereabouts {
    pub ram: u64,
    pub disk: u64,
    pub remote: u64,
    pub fetched: u64,
}

impl Whereabouts {
    pub(super) fn add(&mut self, source: ServedFrom) {
        match source {
            ServedFrom::Memory => self.ram += 1,
            ServedFrom::Disk => self.disk += 1,
            ServedFrom::Remote => self.remote += 1,
            ServedFrom::Fetched => self.fetched += 1,
        }
    }

    pub fn all(&self) -> u64 {
        self.ram + self.disk + self.remote + self.fetched
    }
}

/// The distinct experts that one request's tokens used, by where each was when they first did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExpertTally {
    used: Vec<bool>,
    pub first: Whereabouts,
    /// By what the tokens stood for.
    pub by_modality: ModalityUses,
    /// Who sent or ran some of them.
    pub peers: BTreeSet<PeerId>,
}

impl ExpertTally {
    pub fn new(experts: usize) -> Self {
        Self { used: vec![false; experts], first: Whereabouts::default(), by_modality: ModalityUses::default(), peers: BTreeSet::new() }
    }

    /// Notes a use of the expert at `place`.
    pub fn add(&mut self, place: usize, source: ServedFrom) {
        if !std::mem::replace(&mut self.used[place], true) {
            self.first.add(source);
        }
    }
}

/// Goes through what a pass has logged: each entry with its row of the pass.
pub(crate) fn rows(log: &ActivationLog) -> impl Iterator<Item = (usize, RoutedToken<'_>)> {
    let (mut layer, mut row) = (None, 0);
    log.entries().map(move |entry| {
        // The rows of one layer stand together, in order.
        row = if layer == Some(entry.layer) { row + 1 } else { 0 };
        layer = Some(entry.layer);
        (row, entry)
    })
}

/// Tokens and distinct experts by modality, as an answer's figures tell them.
pub fn by_modality_json(uses: &ModalityUses) -> Value {
    let of = |modality: Modality| (modality.name().to_owned(), json!({"tokens": uses.tokens(modality), "experts": uses.experts(modality)}));
    Modality::ALL.into_iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expert_counts_once_and_where_it_first_was() {
        let mut tally = ExpertTally::new(3);
        for (place, source) in
            [(0, ServedFrom::Disk), (0, ServedFrom::Memory), (2, ServedFrom::Remote), (1, ServedFrom::Fetched), (2, ServedFrom::Fetched)]
        {
            tally.add(place, source);
        }
        assert_eq!(tally.first, Whereabouts { ram: 0, disk: 1, remote: 1, fetched: 1 });
        assert_eq!(tally.first.all(), 3);
    }
}
