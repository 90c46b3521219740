//! Which of the results that peers compute are computed again, and what that says about the peers.
//!
//! A result is chosen after it has come, by a random number that the peer cannot know, whatever way it came: so a peer that lies in a
//! share f of its results is found out after n results with probability 1 − (1 − q·f)ⁿ, q being the share that is audited.
//! Does not compute anything again itself, and keeps no time.

use std::collections::BTreeMap;

/// The share of results that is audited, in millionths.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AuditShare(u32);

impl AuditShare {
    /// One in twenty.
    pub const DEFAULT: Self = Self(50_000);
    const ALL: u32 = 1_000_000;

    /// A share between 0 and 1.
    pub fn of(share: f64) -> Option<Self> {
        (0.0..=1.0).contains(&share).then(|| Self((share * f64::from(Self::ALL)).round() as u32))
    }

    /// The share as a number.
    pub fn share(self) -> f64 {
        f64::from(self.0) / f64::from(Self::ALL)
    }

    /// Whether a result is audited: `random` is secret and uniform.
    fn picks(self, random: u64) -> bool {
        // The high half of the product is uniform below ALL, but for less than one part in 2⁴⁴.
        (u128::from(random) * u128::from(Self::ALL)) >> 64 < u128::from(self.0)
    }
}

/// What came of an audit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// The same bits.
    Same,
    /// Other bits: the peer lied, or its machine is broken.
    Different,
    /// It could not be computed again.
    Unknown,
}

/// One peer's results so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AuditCount {
    /// Results that were used.
    pub used: u64,
    /// Of those, chosen to be audited.
    pub chosen: u64,
    /// Of those, the same bits.
    pub same: u64,
    /// Of those, other bits.
    pub different: u64,
}

/// Keeps account of audits, by peer.
#[derive(Clone, Debug)]
pub struct AuditBook<P> {
    share: AuditShare,
    peers: BTreeMap<P, AuditCount>,
}

impl<P: Ord + Copy> AuditBook<P> {
    /// An empty book.
    pub fn new(share: AuditShare) -> Self {
        Self { share, peers: BTreeMap::new() }
    }

    /// Notes that a result by `peer` is used; says whether it is to be audited. Every result passes here, and once.
    pub fn use_result(&mut self, peer: P, random: u64) -> bool {
        let count = self.peers.entry(peer).or_default();
        count.used += 1;
        let chosen = self.share.picks(random);
        count.chosen += u64::from(chosen);
        chosen
    }

    /// Notes what came of an audit; says whether the peer is still to be asked.
    pub fn conclude(&mut self, peer: P, verdict: Verdict) -> bool {
        let count = self.peers.entry(peer).or_default();
        match verdict {
            Verdict::Same => count.same += 1,
            Verdict::Different => count.different += 1,
            Verdict::Unknown => {}
        }
        count.different == 0
    }

    /// Every peer's count.
    pub fn counts(&self) -> &BTreeMap<P, AuditCount> {
        &self.peers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sebastiano Vigna's splitmix64.
    fn random(state: &mut u64) -> u64 {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Results until a peer that lies in `lies` of 10 is found out.
    fn caught_after(seed: u64, lies: u64) -> u64 {
        let mut state = seed.wrapping_mul(0x2545_f491_4f6c_dd1d);
        let mut book = AuditBook::new(AuditShare::DEFAULT);
        for calls in 1.. {
            let lie = random(&mut state) % 10 < lies;
            if book.use_result(0, random(&mut state)) {
                let verdict = if lie { Verdict::Different } else { Verdict::Same };
                if !book.conclude(0, verdict) {
                    return calls;
                }
            }
        }
        unreachable!("a liar is found in the end")
    }

    /// Rows N15 and R8: of 500 seeds, 98% are within the 99th percentile that the formula gives.
    #[test]
    fn a_liar_is_caught_when_it_should_be() {
        for (lies, within) in [(10, 90), (1, 919)] {
            let in_time = (0..500).filter(|&seed| caught_after(seed, lies) <= within).count();
            assert!(in_time >= 490, "{in_time} of 500 liars of {lies} in 10 were caught within {within} results");
        }
    }

    #[test]
    fn an_honest_peer_stays_and_a_share_of_its_results_is_chosen() {
        let mut state = 5;
        let mut book = AuditBook::new(AuditShare::DEFAULT);
        for _ in 0..20_000 {
            if book.use_result("peer", random(&mut state)) {
                assert!(book.conclude("peer", Verdict::Same));
            }
        }
        let count = book.counts()["peer"];
        assert_eq!((count.used, count.same, count.different), (20_000, count.chosen, 0));
        assert!((900..1100).contains(&count.chosen), "{count:?}");
    }

    #[test]
    fn none_and_all_are_shares_too() {
        for (share, chosen) in [(0.0, 0), (1.0, 100)] {
            let (mut state, share) = (1, AuditShare::of(share).expect("a share"));
            assert_eq!((0..100).filter(|_| share.picks(random(&mut state))).count(), chosen);
        }
        assert!(AuditShare::of(1.1).is_none() && AuditShare::of(f64::NAN).is_none() && AuditShare::of(-0.1).is_none());
    }
}
