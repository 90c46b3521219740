//! The policy that evicts the least frequently used.

use super::{CachePolicy, Lists};

/// Evicts the least frequently used, the least recent among equals.
///
/// A slot's count outlives its stay in memory. All counts are halved after every
/// [`HALVE_AFTER`](Self::HALVE_AFTER) × capacity uses, so that yesterday's favourites leave.
#[derive(Debug)]
pub struct Lfu {
    by_use: Lists,   // one list
    by_count: Lists, // a list for each count, by use
    counts: Vec<u8>, // (slots), in memory or not
    uses: u64,
    halve_after: u64,
}

impl Lfu {
    /// Counts stop here.
    pub const COUNT_MAX: u8 = 127;
    /// Uses between two halvings for each slot of the capacity. With 16, LFU is caught by what has passed wherever recency
    /// matters; with 1 it is nearly LRU. Weighed on synthetic routing only.
    pub const HALVE_AFTER: u64 = 4;

    /// A policy for slots below `slots`, of which about `capacity` will be in memory.
    pub fn new(slots: usize, capacity: usize) -> Self {
        Self {
            by_use: Lists::new(slots, 1),
            by_count: Lists::new(slots, usize::from(Self::COUNT_MAX) + 1),
            counts: vec![0; slots],
            uses: 0,
            halve_after: Self::HALVE_AFTER * (capacity.max(1) as u64),
        }
    }

    fn halve(&mut self) {
        for count in &mut self.counts {
            *count /= 2;
        }
        for slot in self.by_use.oldest_first(0) {
            self.by_count.move_to(usize::from(self.counts[slot]), slot);
        }
    }
}

impl CachePolicy for Lfu {
    fn hit(&mut self, slot: usize) {
        if self.by_use.list_of[slot].is_some() {
            self.insert(slot);
        }
    }

    fn insert(&mut self, slot: usize) {
        self.counts[slot] = (self.counts[slot] + 1).min(Self::COUNT_MAX);
        self.by_count.move_to(usize::from(self.counts[slot]), slot);
        self.by_use.move_to(0, slot);
        self.uses += 1;
        if self.uses.is_multiple_of(self.halve_after) {
            self.halve();
        }
    }

    fn evict(&mut self, pinned: &dyn Fn(usize) -> bool) -> Option<usize> {
        let slot = (0..=Self::COUNT_MAX).find_map(|count| self.by_count.oldest_unpinned(usize::from(count), pinned))?;
        self.by_count.remove(slot);
        self.by_use.remove(slot);
        Some(slot)
    }
}
