//! What was seen of a peer in one facet, and the score that it comes to.
//!
//! A Beta distribution over the share of good work, of which the lower bound counts: an unknown peer has next to nothing, and a new key is of no
//! use to who has spoilt his old one. Good work is forgotten faster than bad, and is capped, so that nobody can save up for a lie.

/// What was seen of a piece of work. Only what was verified is any of these.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Outcome {
    /// It was right.
    Good,
    /// It did not come in time.
    TimedOut,
    /// Bytes that are not those that were asked for: it may be a bad disk.
    WrongBytes,
    /// A result, or a claim, that was proven wrong.
    WrongResult,
}

impl Outcome {
    /// What it adds to the evidence against a peer.
    pub const fn penalty(self) -> f64 {
        match self {
            Self::Good => 0.0,
            Self::TimedOut => 0.5,
            Self::WrongBytes => 2.0,
            Self::WrongResult => 10.0,
        }
    }

    /// Whether it proves that something was wrong, and not just late.
    pub const fn is_proof(self) -> bool {
        matches!(self, Self::WrongBytes | Self::WrongResult)
    }
}

/// Most good work that counts.
pub const GOOD_MAX: f64 = 20.0;
const DAY_MS: f64 = 86_400_000.0;
/// In which time half of the good work is forgotten …
const GOOD_HALF_LIFE_MS: f64 = 7.0 * DAY_MS;
/// … and of the bad.
const BAD_HALF_LIFE_MS: f64 = 30.0 * DAY_MS;
/// Standard deviations below the mean that count: one-sided 95%.
const CAUTION: f64 = 1.64;

/// Evidence as of a time.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Tally {
    /// Good work, fading.
    pub good: f64,
    /// Bad work by its penalties, fading.
    pub bad: f64,
    /// Of that, what was proven wrong and not just late.
    pub wrong: f64,
    /// Pieces of work that were seen, good and bad, which do not fade.
    pub seen: (u32, u32),
    /// When that was so, in milliseconds since 1970.
    pub at_ms: u64,
}

impl Tally {
    /// What is left of it at a time. A clock that went back takes nothing back.
    #[must_use]
    pub fn at(&self, now_ms: u64) -> Self {
        let passed_ms = now_ms.saturating_sub(self.at_ms) as f64;
        let left = |half_life_ms: f64| libm::exp2(-passed_ms / half_life_ms);
        let (good, bad) = (self.good * left(GOOD_HALF_LIFE_MS), self.bad * left(BAD_HALF_LIFE_MS));
        let wrong = self.wrong * left(BAD_HALF_LIFE_MS);
        Self { good, bad, wrong, seen: self.seen, at_ms: self.at_ms.max(now_ms) }
    }

    /// Adds a piece of work.
    pub fn observe(&mut self, now_ms: u64, outcome: Outcome) {
        *self = self.at(now_ms);
        if outcome == Outcome::Good {
            self.good = (self.good + 1.0).min(GOOD_MAX);
            self.seen.0 = self.seen.0.saturating_add(1);
        } else {
            self.bad += outcome.penalty();
            if outcome.is_proof() {
                self.wrong += outcome.penalty();
            }
            self.seen.1 = self.seen.1.saturating_add(1);
        }
    }

    /// The score that it comes to now.
    pub fn score(&self, now_ms: u64) -> f64 {
        let now = self.at(now_ms);
        score(now.good, now.bad)
    }
}

/// The lower bound of the share of good work, given so much good and bad: max(0, m − 1.64 σ) of Beta(1 + good, 1 + bad).
pub fn score(good: f64, bad: f64) -> f64 {
    let (a, b) = (1.0 + good, 1.0 + bad);
    let (sum, mean) = (a + b, a / (a + b));
    let variance = a * b / (sum * sum * (sum + 1.0));
    (mean - CAUTION * variance.sqrt()).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DAY: u64 = DAY_MS as u64;

    fn seen(good: u32, lies: u32) -> Tally {
        let mut tally = Tally::default();
        (0..good).for_each(|_| tally.observe(0, Outcome::Good));
        (0..lies).for_each(|_| tally.observe(0, Outcome::WrongResult));
        tally
    }

    /// The values are those of `tests/vectors/scripts/trust.py`, by NumPy.
    #[test]
    fn scores_are_those_of_the_vectors() {
        let vectors: Vec<serde_json::Value> = serde_json::from_str(include_str!("../../../tests/vectors/trust.json")).expect("JSON");
        for v in &vectors {
            let mut tally = Tally::default();
            for step in v["steps"].as_array().expect("a list") {
                let outcome = match step["outcome"].as_str().expect("a text") {
                    "good" => Outcome::Good,
                    "timed_out" => Outcome::TimedOut,
                    "wrong_bytes" => Outcome::WrongBytes,
                    _ => Outcome::WrongResult,
                };
                tally.observe(step["at_ms"].as_u64().expect("a time"), outcome);
            }
            let (now_ms, expected) = (v["now_ms"].as_u64().expect("a time"), v["score"].as_f64().expect("a number"));
            assert!((tally.score(now_ms) - expected).abs() < 1e-9, "{v}: {}", tally.score(now_ms));
        }
        assert!(vectors.len() >= 12);
    }

    /// R3 and R5: newcomers have next to nothing, seven audits open the gate, one lie shuts it whatever was before.
    #[test]
    fn the_figures_of_the_design() {
        let close = |tally: Tally, score: f64| assert!((tally.score(0) - score).abs() < 0.0006, "{tally:?}: {}", tally.score(0));
        close(seen(0, 0), 0.027);
        close(seen(7, 0), 0.726);
        assert!(seen(6, 0).score(0) < super::super::EXECUTION_GATE);
        close(seen(200, 0), 0.883);
        close(seen(200, 1), 0.521);
        close(seen(200, 2), 0.375);
        let mut lied = seen(200, 1);
        assert!(lied.score(0) <= 0.53);
        for day in 1..=60 {
            (0..20).for_each(|_| lied.observe(day * DAY, Outcome::Good));
            let trusted = lied.score(day * DAY) >= super::super::EXECUTION_GATE;
            assert!(trusted == (day >= 45) || (40..50).contains(&day), "day {day}: {}", lied.score(day * DAY));
        }
    }

    proptest! {
        #[test]
        fn more_bad_never_raises_a_score_and_more_good_never_lowers_it(
            outcomes in proptest::collection::vec((0u64..40 * DAY, 0usize..4), 0..40), more in 1usize..4, at in 0u64..80 * DAY,
        ) {
            let all = [Outcome::Good, Outcome::TimedOut, Outcome::WrongBytes, Outcome::WrongResult];
            let mut tally = Tally::default();
            let mut times: Vec<_> = outcomes;
            times.sort_unstable();
            times.iter().for_each(|&(at, which)| tally.observe(at, all[which]));
            let at = at.max(tally.at_ms);
            let before = tally.score(at);
            let (mut worse, mut better) = (tally, tally);
            worse.observe(at, all[more]);
            better.observe(at, Outcome::Good);
            prop_assert!((0.0..=0.884).contains(&before));
            prop_assert!(worse.score(at) <= before + 1e-12);
            prop_assert!(better.score(at) >= before - 1e-12);
        }

        #[test]
        fn no_clock_makes_it_panic(times in proptest::collection::vec(any::<u64>(), 0..20)) {
            let mut tally = Tally::default();
            for now_ms in times {
                tally.observe(now_ms, Outcome::Good);
                prop_assert!((0.0..=0.884).contains(&tally.score(now_ms)));
            }
        }
    }
}
