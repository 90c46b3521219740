//! Bytes of memory that work for peers may take together, and each peer of them. A peer that takes nothing off holds its own share alone.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use libp2p::PeerId;

/// A budget that many streams share.
#[derive(Clone, Debug)]
pub(super) struct ByteBudget {
    max: usize,
    of_one_max: usize,
    taken: Arc<Mutex<HashMap<PeerId, usize>>>,
}

/// Bytes that a peer's work takes until this is dropped.
#[derive(Debug)]
pub(super) struct BytesTaken {
    budget: ByteBudget,
    peer: PeerId,
    bytes: usize,
}

impl ByteBudget {
    /// Of `max` bytes, of which one peer has at most half.
    pub(super) fn new(max: usize) -> Self {
        Self { max, of_one_max: max / 2, taken: Arc::default() }
    }

    /// Takes bytes for a peer's work; nothing when there are not as many, or the peer has its share. The first of a peer's work may be
    /// larger than its share.
    pub(super) fn take(&self, peer: PeerId, bytes: usize) -> Option<BytesTaken> {
        let mut taken = self.lock();
        let (all, own) = (taken.values().sum::<usize>(), taken.get(&peer).copied().unwrap_or(0));
        if all + bytes > self.max || own > 0 && own + bytes > self.of_one_max {
            return None;
        }
        *taken.entry(peer).or_default() += bytes;
        Some(BytesTaken { budget: self.clone(), peer, bytes })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PeerId, usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for BytesTaken {
    fn drop(&mut self) {
        let mut taken = self.budget.lock();
        if let Some(own) = taken.get_mut(&self.peer) {
            *own -= self.bytes;
            if *own == 0 {
                taken.remove(&self.peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_bounded_for_one_and_for_all_and_given_back() {
        let (budget, a, b) = (ByteBudget::new(100), PeerId::random(), PeerId::random());
        let large = budget.take(a, 80).expect("the first may be large");
        assert!(budget.take(a, 1).is_none() && budget.take(b, 21).is_none());
        let rest = budget.take(b, 20).expect("just fits");
        drop(large);
        assert!(budget.take(b, 31).is_none(), "more than half");
        let half = budget.take(b, 30).expect("half");
        drop((rest, half));
        assert!(budget.lock().is_empty());
        assert!(budget.take(a, 101).is_none());
    }
}
