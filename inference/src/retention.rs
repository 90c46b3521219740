//! How often each expert was used lately, to decide which stay in memory where others need not come in: the admission of
//! TinyLFU (Einziger, Friedman, Manes 2017), with a count for every slot, since there are few.

/// Counts by slot, halved now and then, so that what was used long ago weighs little.
#[derive(Debug)]
pub(crate) struct RetentionValue {
    counts: Vec<u16>,
    /// Uses until all counts are halved.
    until_halved: usize,
    /// How often one must have been used to be among those that fit, as last looked up; uses until the next time.
    bar: u16,
    until_looked: usize,
    sorted: Vec<u16>,
}

/// Counts are halved when they are so many on average.
const MEAN_MAX: usize = 16;
/// Uses before an expert that does not displace another is worth having.
const USES_MIN: u16 = 2;

impl RetentionValue {
    /// Nothing used yet.
    pub(crate) fn new(slots: usize) -> Self {
        let counts = vec![0; slots];
        Self { sorted: counts.clone(), counts, until_halved: slots * MEAN_MAX, bar: 0, until_looked: 0 }
    }

    /// Notes a use.
    pub(crate) fn used(&mut self, slot: usize) {
        self.counts[slot] = self.counts[slot].saturating_add(1);
        self.until_looked = self.until_looked.saturating_sub(1);
        self.until_halved = self.until_halved.saturating_sub(1);
        if self.until_halved == 0 {
            self.counts.iter_mut().for_each(|count| *count /= 2);
            self.until_halved = self.counts.len() * MEAN_MAX / 2;
            self.until_looked = 0;
        }
    }

    /// The one of `slots` that was used least.
    pub(crate) fn least(&self, slots: impl Iterator<Item = usize>) -> Option<usize> {
        slots.min_by_key(|&slot| self.counts[slot])
    }

    /// Whether `slot` is worth bringing, for which `leaving` would be forgotten, if any; `capacity` fit. It must be surely among those
    /// that were used most, and `leaving` not: where all are used alike, chance alone must not keep weights coming.
    pub(crate) fn is_worth_bringing(&mut self, slot: usize, leaving: Option<usize>, capacity: usize) -> bool {
        let count = self.counts[slot];
        let Some(leaving) = leaving else { return count >= USES_MIN };
        let bar = self.bar(capacity);
        count > bar + bar / 4 + USES_MIN && self.counts[leaving] <= bar
    }

    /// Whether `slot` is among those that were used most, of which `capacity` fit.
    pub(crate) fn is_high(&mut self, slot: usize, capacity: usize) -> bool {
        self.counts[slot] > self.bar(capacity)
    }

    fn bar(&mut self, capacity: usize) -> u16 {
        if self.until_looked == 0 {
            self.until_looked = self.counts.len();
            self.sorted.copy_from_slice(&self.counts);
            let place = capacity.clamp(1, self.sorted.len()) - 1;
            self.bar = *self.sorted.select_nth_unstable_by_key(place, |&count| std::cmp::Reverse(count)).1;
        }
        self.bar
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used(counts: &[u16]) -> RetentionValue {
        let mut value = RetentionValue::new(counts.len());
        for (slot, &count) in counts.iter().enumerate() {
            (0..count).for_each(|_| value.used(slot));
        }
        value
    }

    #[test]
    fn what_is_surely_among_the_most_used_displaces_what_is_not() {
        let mut value = used(&[1, 9, 2, 3, 0, 0]);
        assert!(!value.is_worth_bringing(0, None, 2), "once is by chance");
        assert!(value.is_worth_bringing(2, None, 2));
        // Two fit: the bar is at 3 uses.
        assert!(value.is_worth_bringing(1, Some(2), 2) && value.is_worth_bringing(1, Some(3), 2));
        assert!(!value.is_worth_bringing(3, Some(2), 2) && !value.is_worth_bringing(1, Some(1), 2));
        assert_eq!((value.least(0..3), value.least(1..2), value.least(0..0)), (Some(0), Some(1), None));
    }

    #[test]
    fn where_all_are_used_alike_nothing_moves() {
        let mut value = used(&[9, 10, 11, 9, 10, 11, 12, 10]);
        assert!((0..8).all(|slot| (0..8).all(|leaving| !value.is_worth_bringing(slot, Some(leaving), 3))));
    }

    #[test]
    fn old_uses_fade() {
        let mut value = RetentionValue::new(2);
        (0..20).for_each(|_| value.used(0));
        (0..44).for_each(|_| value.used(1)); // halved at 32, 48 and 64 uses: at the mean of 16, and whenever it is reached again
        assert_eq!(value.counts, [2, 13]);
    }
}
