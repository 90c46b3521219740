//! Which experts a request used, and where they were; by what the engine noted of a pass.

use std::collections::BTreeSet;

use inference::activation_log::ActivationLog;
use inference::experts::{Experts, ServedFrom};
use net::PeerId;
use serde::Serialize;

use crate::places::Places;

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
pub struct Tally {
    used: Vec<bool>,
    pub first: Whereabouts,
    /// Who sent or ran some of them.
    pub peers: BTreeSet<PeerId>,
}

impl Tally {
    pub fn new(experts: usize) -> Self {
        Self { used: vec![false; experts], first: Whereabouts::default(), peers: BTreeSet::new() }
    }

    /// Notes a use of the expert at `place`.
    pub fn add(&mut self, place: usize, source: ServedFrom) {
        if !std::mem::replace(&mut self.used[place], true) {
            self.first.add(source);
        }
    }
}

/// Goes through the uses that a pass has logged: for each, the row of the pass, the expert's place, and where it was.
pub(crate) fn uses(log: &ActivationLog, places: &Places, experts: &Experts, mut each: impl FnMut(usize, usize, ServedFrom)) {
    let (mut layer, mut row) = (None, 0);
    for entry in log.entries() {
        // The rows of one layer stand together, in order.
        row = if layer == Some(entry.layer) { row + 1 } else { 0 };
        layer = Some(entry.layer);
        for choice in entry.choices {
            if let Some(place) = places.place(entry.layer, choice.expert) {
                each(row, place, experts.served_from(place));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expert_counts_once_and_where_it_first_was() {
        let mut tally = Tally::new(3);
        for (place, source) in
            [(0, ServedFrom::Disk), (0, ServedFrom::Memory), (2, ServedFrom::Remote), (1, ServedFrom::Fetched), (2, ServedFrom::Fetched)]
        {
            tally.add(place, source);
        }
        assert_eq!(tally.first, Whereabouts { ram: 0, disk: 1, remote: 1, fetched: 1 });
        assert_eq!(tally.first.all(), 3);
    }
}
