//! Everybody that was seen, and what follows: who is listened to, and in which order peers are asked.

use std::collections::BTreeMap;

use super::tally::{Outcome, Tally, score};
use crate::identity::NodeId;
use crate::record::Facet;

/// Peers with at least this score, from what this node has seen itself, are listened to.
pub const RATER_MIN: f64 = 0.5;

/// Peers of whom observations are kept; of those beyond, the ones of whom least was seen are forgotten.
pub const PEERS_MAX: usize = 4096;
/// What one rater's word adds at most …
pub const RATER_GOOD_MAX: f64 = 2.0;
/// … and what all raters together do.
pub const HEARSAY_MAX: f64 = 5.0;
/// Who vouches for more than so many is believed the less of each: fronts vouch for crowds.
pub const SUBJECTS_FULL: u32 = 16;

/// What the user has decided about a peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ruling {
    /// It is not talked to.
    Banned,
    /// It is used whatever its score.
    Allowed,
}

/// What this node has seen of its peers.
#[derive(Clone, Debug, Default)]
pub struct TrustBook {
    tallies: BTreeMap<(NodeId, Facet), Tally>,
    rulings: BTreeMap<NodeId, Ruling>,
}

/// What a peer says of another, as far as it is signed and holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Voice {
    /// Who says it.
    pub rater: NodeId,
    /// Times that it was good, it says, …
    pub good: u32,
    /// … and times that it was not.
    pub bad: u32,
    /// Peers of whom the rater says that they were good at it.
    pub subjects: u32,
    /// Raters of the same operator or neighbourhood count once.
    pub kin: u64,
}

/// A score with all that makes it.
#[derive(Clone, PartialEq, Debug)]
pub struct Opinion {
    /// What was seen.
    pub tally: Tally,
    /// The score from that alone: it opens gates.
    pub first_hand: f64,
    /// What others say, and what each adds; the others are not listened to.
    pub hearsay: Vec<(Voice, f64)>,
    /// What hearsay adds to the good work, all in all.
    pub hearsay_good: f64,
    /// The score with hearsay: it orders candidates, and does nothing else.
    pub ordering: f64,
}

impl TrustBook {
    /// Notes what was seen of a peer.
    pub fn observe(&mut self, now_ms: u64, peer: NodeId, facet: Facet, outcome: Outcome) {
        self.tallies.entry((peer, facet)).or_default().observe(now_ms, outcome);
        if self.tallies.len() > PEERS_MAX * Facet::ALL.len() {
            let weight = |tally: &Tally| tally.at(now_ms).good + tally.at(now_ms).bad;
            let least = self.tallies.iter().min_by(|a, b| weight(a.1).total_cmp(&weight(b.1))).map(|(about, _)| *about);
            least.and_then(|about| self.tallies.remove(&about));
        }
    }

    /// Notes the same several times.
    pub fn observe_often(&mut self, now_ms: u64, peer: NodeId, facet: Facet, outcome: Outcome, times: u32) {
        // More than the cap of good work adds nothing but to the count of what was seen.
        let each = times.min(super::tally::GOOD_MAX as u32 + 1);
        (0..each).for_each(|_| self.observe(now_ms, peer, facet, outcome));
        if let Some(tally) = self.tallies.get_mut(&(peer, facet)) {
            let seen = if outcome == Outcome::Good { &mut tally.seen.0 } else { &mut tally.seen.1 };
            *seen = seen.saturating_add(times - each);
        }
    }

    /// Puts back what was kept.
    pub fn restore(&mut self, peer: NodeId, facet: Facet, tally: Tally) {
        if self.tallies.len() < PEERS_MAX * Facet::ALL.len() {
            self.tallies.insert((peer, facet), tally);
        }
    }

    /// What was seen of a peer.
    pub fn tally(&self, peer: &NodeId, facet: Facet) -> Tally {
        self.tallies.get(&(*peer, facet)).copied().unwrap_or_default()
    }

    /// Everything that was seen.
    pub fn tallies(&self) -> impl Iterator<Item = (NodeId, Facet, &Tally)> {
        self.tallies.iter().map(|((peer, facet), tally)| (*peer, *facet, tally))
    }

    /// Decides about a peer, or takes that back.
    pub fn rule(&mut self, peer: NodeId, ruling: Option<Ruling>) {
        match ruling {
            Some(ruling) => drop(self.rulings.insert(peer, ruling)),
            None => drop(self.rulings.remove(&peer)),
        }
    }

    /// What the user has decided about peers.
    pub fn rulings(&self) -> &BTreeMap<NodeId, Ruling> {
        &self.rulings
    }

    /// A peer's score from what was seen alone.
    pub fn first_hand(&self, now_ms: u64, peer: &NodeId, facet: Facet) -> f64 {
        self.tally(peer, facet).score(now_ms)
    }

    /// A peer's score with all that makes it. `voices` are what others say of it in this facet.
    pub fn opinion(&self, now_ms: u64, peer: &NodeId, facet: Facet, voices: &[Voice]) -> Opinion {
        let tally = self.tally(peer, facet).at(now_ms);
        // Of those who belong together, the one that adds most is heard.
        let mut by_kin: BTreeMap<u64, (Voice, f64)> = BTreeMap::new();
        for voice in voices.iter().filter(|voice| voice.rater != *peer) {
            let rater = self.first_hand(now_ms, &voice.rater, facet);
            if rater < RATER_MIN || self.rulings.get(&voice.rater) == Some(&Ruling::Banned) {
                continue;
            }
            let (good, bad) = (f64::from(voice.good), f64::from(voice.bad));
            let diluted = f64::from(SUBJECTS_FULL) / f64::from(voice.subjects.max(SUBJECTS_FULL));
            let adds = rater * rater * good * (RATER_GOOD_MAX / (good + bad).max(1.0)).min(1.0) * diluted;
            let heard = by_kin.entry(voice.kin).or_insert((*voice, adds));
            if adds > heard.1 {
                *heard = (*voice, adds);
            }
        }
        let hearsay: Vec<_> = by_kin.into_values().collect();
        let hearsay_good = hearsay.iter().map(|(_, adds)| adds).fold(0.0, |sum, adds| sum + adds).min(HEARSAY_MAX);
        let first_hand = score(tally.good, tally.bad);
        Opinion { tally, first_hand, hearsay, hearsay_good, ordering: score(tally.good + hearsay_good, tally.bad) }
    }

    /// Whether a peer is not to be talked to: the user has said so, or more was proven wrong of its bytes or results than was right. What is
    /// claimed falsely of experts only makes claims count for nothing.
    pub fn is_unwelcome(&self, now_ms: u64, peer: &NodeId) -> bool {
        match self.rulings.get(peer) {
            Some(Ruling::Banned) => true,
            Some(Ruling::Allowed) => false,
            None => Facet::ALL.iter().any(|facet| {
                let Tally { good, wrong, .. } = self.tally(peer, *facet).at(now_ms);
                *facet != Facet::Profile && wrong >= Outcome::WrongBytes.penalty() / 2.0 && wrong > good
            }),
        }
    }
}
