//! The policy that evicts the least recently used.

use super::{CachePolicy, Lists};

/// Evicts the least recently used.
#[derive(Debug)]
pub struct Lru {
    by_use: Lists, // one list
}

impl Lru {
    /// A policy for slots below `slots`.
    pub fn new(slots: usize) -> Self {
        Self { by_use: Lists::new(slots, 1) }
    }
}

impl CachePolicy for Lru {
    fn hit(&mut self, slot: usize) {
        if self.by_use.list_of[slot].is_some() {
            self.insert(slot);
        }
    }

    fn insert(&mut self, slot: usize) {
        self.by_use.move_to(0, slot);
    }

    fn evict(&mut self, pinned: &dyn Fn(usize) -> bool) -> Option<usize> {
        let slot = self.by_use.oldest_unpinned(0, pinned)?;
        self.by_use.remove(slot);
        Some(slot)
    }
}
