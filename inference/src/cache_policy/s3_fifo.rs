//! The policy of three queues, S3-FIFO.

use super::{CachePolicy, Lists};

/// Lets new slots prove themselves in a small queue before they may push others out of the main one.
///
/// S3-FIFO of Yang, Zhang, Qiu, Yue and Rashmi, “FIFO queues are all you need for cache eviction”, SOSP 2023: a small
/// queue of a tenth of the capacity, a main queue in which used slots get another round, and a ghost queue, as long as
/// the main one, of slots that left the small queue unused and go straight to the main one if they come back.
/// It differs in two points: one use in the small queue is enough to be promoted (the paper asks for two), and a pinned
/// slot stays where it is.
#[derive(Debug)]
pub struct S3Fifo {
    queues: Lists,
    uses: Vec<u8>, // (slots): since the slot entered its queue, less its rounds, up to USES_MAX
    small_max: usize,
    main_max: usize,
}

const SMALL: usize = 0;
const MAIN: usize = 1;
const GHOST: usize = 2;

impl S3Fifo {
    /// Uses are counted in two bits.
    pub const USES_MAX: u8 = 3;
    /// The small queue's part of the capacity is one in so many.
    pub const SMALL_PART: usize = 10;
    /// So many uses in the small queue take a slot into the main one.
    pub const USES_TO_PROMOTE: u8 = 1;

    /// A policy for slots below `slots`, of which `capacity` fit into memory.
    pub fn new(slots: usize, capacity: usize) -> Self {
        let small_max = (capacity / Self::SMALL_PART).max(1);
        Self { queues: Lists::new(slots, 3), uses: vec![0; slots], small_max, main_max: capacity.saturating_sub(small_max) }
    }

    fn enter(&mut self, queue: usize, slot: usize) {
        self.queues.move_to(queue, slot);
        self.uses[slot] = 0;
    }

    fn main_has_room(&self) -> bool {
        self.queues.lens[MAIN] <= self.main_max
    }
}

impl CachePolicy for S3Fifo {
    fn hit(&mut self, slot: usize) {
        if let Some(SMALL | MAIN) = self.queues.list_of[slot] {
            self.uses[slot] = (self.uses[slot] + 1).min(Self::USES_MAX);
        }
    }

    fn insert(&mut self, slot: usize) {
        match self.queues.list_of[slot] {
            None => self.enter(SMALL, slot),
            Some(GHOST) => self.enter(MAIN, slot),
            Some(_) => self.hit(slot),
        }
    }

    fn evict(&mut self, pinned: &dyn Fn(usize) -> bool) -> Option<usize> {
        let mut from_small = self.queues.lens[SMALL] >= self.small_max && self.main_has_room();
        // Each slot is promoted once and gets USES_MAX more rounds at most, so this ends.
        loop {
            let small = || self.queues.oldest_unpinned(SMALL, pinned);
            let main = || self.queues.oldest_unpinned(MAIN, pinned);
            let slot = if from_small { small().or_else(main)? } else { main().or_else(small)? };
            let is_small = self.queues.list_of[slot] == Some(SMALL);
            if is_small && self.uses[slot] >= Self::USES_TO_PROMOTE {
                self.enter(MAIN, slot);
                from_small = self.main_has_room();
            } else if is_small {
                self.queues.move_to(GHOST, slot);
                if self.queues.lens[GHOST] > self.main_max
                    && let Some(oldest) = self.queues.oldest_unpinned(GHOST, &|_| false)
                {
                    self.queues.remove(oldest);
                }
                return Some(slot);
            } else if self.uses[slot] > 0 {
                self.uses[slot] -= 1;
                self.queues.move_to(MAIN, slot);
            } else {
                self.queues.remove(slot);
                return Some(slot);
            }
        }
    }
}
