//! Which way an expert is brought: the one that is done first, by measured costs. Pure: no clock, no network.

use std::collections::BTreeMap;

/// A way to come by an expert, or by what it makes of its rows.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Way<P> {
    /// Read it from this node's store.
    Disk,
    /// Have it run at a peer.
    Run(P),
    /// Fetch its bytes from peers.
    Fetch,
}

/// What a way costs, in milliseconds.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Cost {
    /// Until the first result, whatever it is.
    pub start: f64,
    /// For each unit more: an expert that is read or fetched, or a row that an expert works on.
    pub each: f64,
}

impl Cost {
    /// How much a new measurement weighs against all before.
    const NEW: f64 = 0.125;
    /// A single measurement counts as at most so many times what was known: one stall says little about the next call.
    const SURPRISE: f64 = 8.0;

    /// Takes in that `units` units took `start` milliseconds to the first result and `each` for each unit more.
    pub(crate) fn learn(&mut self, start: f64, each: Option<f64>) {
        let blend = |known: &mut f64, new: f64| *known += Self::NEW * (new.min(*known * Self::SURPRISE + 1.0) - *known);
        blend(&mut self.start, start.max(0.0));
        if let Some(each) = each {
            blend(&mut self.each, each.max(0.0));
        }
    }

    /// For so many units.
    pub(crate) fn of(&self, units: u64) -> f64 {
        self.start + self.each * units as f64
    }
}

/// The ways of one moment, and how far each is busy with what was given to it.
#[derive(Debug)]
pub(crate) struct Ways<P> {
    ways: BTreeMap<Way<P>, (Cost, u64)>,
}

impl<P: Copy + Ord> Ways<P> {
    /// Ways with their costs, and the units that each has to do already.
    pub(crate) fn new(ways: impl IntoIterator<Item = (Way<P>, Cost, u64)>) -> Self {
        Self { ways: ways.into_iter().map(|(way, cost, busy)| (way, (cost, busy))).collect() }
    }

    /// The way that is done first with one more expert, which works on `rows` rows, among those that are `able`.
    pub(crate) fn choose(&mut self, rows: u64, able: impl Fn(Way<P>) -> bool) -> Option<Way<P>> {
        let units = |way: Way<P>| if matches!(way, Way::Run(_)) { rows } else { 1 };
        let done = |way: Way<P>, (cost, busy): (Cost, u64)| cost.of(busy + units(way));
        let (&way, _) =
            self.ways.iter().filter(|(way, _)| able(**way)).min_by(|(a, x), (b, y)| done(**a, **x).total_cmp(&done(**b, **y)))?;
        self.ways.get_mut(&way).expect("it was found there").1 += units(way);
        Some(way)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: Cost = Cost { start: 0.0, each: 2.0 };
    const NEAR: Cost = Cost { start: 1.0, each: 0.25 };
    const FAR: Cost = Cost { start: 12.0, each: 0.25 };
    const FETCH: Cost = Cost { start: 1.0, each: 200.0 };

    fn counts(ways: &mut Ways<char>, experts: usize, rows: u64) -> BTreeMap<Way<char>, usize> {
        let mut counts = BTreeMap::new();
        for _ in 0..experts {
            *counts.entry(ways.choose(rows, |_| true).expect("there are ways")).or_default() += 1;
        }
        counts
    }

    #[test]
    fn one_goes_where_it_is_done_first_and_many_are_shared_out() {
        let mut ways = Ways::new([(Way::Disk, DISK, 0), (Way::Run('n'), NEAR, 0), (Way::Fetch, FETCH, 0)]);
        assert_eq!(counts(&mut ways, 1, 1), BTreeMap::from([(Way::Run('n'), 1)]));
        let mut ways = Ways::new([(Way::Disk, DISK, 0), (Way::Run('n'), NEAR, 0), (Way::Fetch, FETCH, 0)]);
        assert_eq!(counts(&mut ways, 8, 1), BTreeMap::from([(Way::Disk, 1), (Way::Run('n'), 7)]));
        // A far peer is no help for one token, and much for a prompt.
        let ways = || Ways::new([(Way::Disk, DISK, 0), (Way::Run('f'), FAR, 0)]);
        assert_eq!(counts(&mut ways(), 4, 1), BTreeMap::from([(Way::Disk, 4)]));
        // Nine reads take 18 ms and 31 runs 19.75 ms; a tenth read would take 20 ms.
        assert_eq!(counts(&mut ways(), 40, 1)[&Way::Disk], 9);
    }

    #[test]
    fn what_a_way_has_to_do_already_counts_and_what_cannot_is_passed_over() {
        let mut ways = Ways::new([(Way::Run('a'), NEAR, 40), (Way::Run('b'), NEAR, 0)]);
        assert_eq!(ways.choose(1, |_| true), Some(Way::Run('b')));
        assert_eq!(ways.choose(1, |way| way != Way::Run('b')), Some(Way::Run('a')));
        assert_eq!(ways.choose(1, |_| false), None);
    }

    #[test]
    fn costs_follow_what_is_measured_and_one_stall_does_not_decide() {
        let mut cost = NEAR;
        cost.learn(2000.0, None);
        assert!(cost.start < 2.2, "{cost:?}");
        for _ in 0..100 {
            cost.learn(5.0, Some(0.5));
        }
        assert!((cost.start - 5.0).abs() < 0.01 && (cost.each - 0.5).abs() < 0.01, "{cost:?}");
    }
}
