//! How many records a sender, or a signer, may have sent lately.

use std::collections::HashMap;
use std::hash::Hash;

/// Senders, or signers, that are told apart; beyond that, those that were quiet for longest are forgotten.
pub const RATED_MAX: usize = 4096;

/// An allowance: so many at once, and so many a second after that.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Allowance {
    /// At once.
    pub burst: u32,
    /// A second.
    pub per_second: u32,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    thousandths: u64,
    filled_ms: u64,
}

/// Token buckets, one for each of those who send.
#[derive(Debug)]
pub struct RateLimits<K> {
    allowance: Allowance,
    buckets: HashMap<K, Bucket>,
}

impl<K: Hash + Eq + Copy> RateLimits<K> {
    /// Everybody's bucket is full.
    pub fn new(allowance: Allowance) -> Self {
        Self { allowance, buckets: HashMap::new() }
    }

    /// Takes one for `who`; says whether there was one.
    pub fn take(&mut self, now_ms: u64, who: K) -> bool {
        let most = u64::from(self.allowance.burst) * 1000;
        if self.buckets.len() >= RATED_MAX && !self.buckets.contains_key(&who) {
            self.forget(now_ms);
        }
        let bucket = self.buckets.entry(who).or_insert(Bucket { thousandths: most, filled_ms: now_ms });
        let came = now_ms.saturating_sub(bucket.filled_ms).saturating_mul(u64::from(self.allowance.per_second));
        *bucket = Bucket { thousandths: bucket.thousandths.saturating_add(came).min(most), filled_ms: now_ms };
        let enough = bucket.thousandths >= 1000;
        if enough {
            bucket.thousandths -= 1000;
        }
        enough
    }

    /// Forgets those whose buckets are full again, and if that are too few, the half that was quiet for longest.
    fn forget(&mut self, now_ms: u64) {
        let full_ms = u64::from(self.allowance.burst) * 1000 / u64::from(self.allowance.per_second.max(1)) + 1;
        self.buckets.retain(|_, bucket| now_ms.saturating_sub(bucket.filled_ms) < full_ms);
        if self.buckets.len() >= RATED_MAX {
            let mut times: Vec<_> = self.buckets.values().map(|bucket| bucket.filled_ms).collect();
            times.sort_unstable();
            let median = times[times.len() / 2];
            let mut left = RATED_MAX / 2;
            self.buckets.retain(|_, bucket| bucket.filled_ms >= median && left.checked_sub(1).inspect(|now| left = *now).is_some());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_so_many_a_second() {
        let mut rates = RateLimits::new(Allowance { burst: 5, per_second: 2 });
        assert_eq!((0..10).filter(|_| rates.take(1000, 'a')).count(), 5);
        assert!(rates.take(1000, 'b'), "each has its own");
        assert!(!rates.take(1499, 'a') && rates.take(1500, 'a'));
        assert_eq!((0..100).filter(|i| rates.take(2000 + i * 100, 'a')).count(), 20);
        assert!(!rates.take(0, 'a') && rates.take(u64::MAX - 1, 'c'), "clocks may jump");
    }

    #[test]
    fn those_who_come_in_crowds_are_bounded() {
        let mut rates = RateLimits::new(Allowance { burst: 1, per_second: 1 });
        for who in 0..3 * RATED_MAX {
            rates.take(5, who);
            assert!(rates.buckets.len() <= RATED_MAX);
        }
    }
}
