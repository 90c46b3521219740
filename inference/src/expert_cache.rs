//! Experts in memory, bounded in bytes. Which goes first is the policy's to say; what a layer is using stays.

use std::sync::Arc;

use crate::aligned::AlignedBytes;
use crate::cache_policy::{CachePolicy, PolicyKind};
use crate::expert::Expert;

/// A cache of experts of one size, by number of their slot. It may forget any that is not in use.
#[derive(Debug)]
pub struct ExpertCache {
    slots: Vec<Option<Arc<Expert>>>,
    capacity: usize, // experts
    expert_bytes: usize,
    /// Buffers in the cache, empty or on their way here.
    buffers: usize,
    spare: Vec<AlignedBytes>,
    policy: Box<dyn CachePolicy>,
}

impl ExpertCache {
    /// An empty cache of at most `bytes_max` bytes, for experts of `expert_bytes` bytes in `slots` slots.
    pub fn new(slots: usize, expert_bytes: usize, bytes_max: u64, policy: PolicyKind) -> Self {
        let capacity = usize::try_from(bytes_max / expert_bytes as u64).unwrap_or(usize::MAX).min(slots);
        let policy = policy.build(slots, capacity.max(1));
        Self { slots: vec![None; slots], capacity, expert_bytes, buffers: 0, spare: Vec::with_capacity(capacity), policy }
    }

    /// The expert in `slot`, if it is here; it counts as used.
    pub fn get(&mut self, slot: usize) -> Option<Arc<Expert>> {
        let expert = self.slots[slot].as_ref()?;
        self.policy.hit(slot);
        Some(Arc::clone(expert))
    }

    /// Whether the expert in `slot` is here; it does not count as used.
    pub fn contains(&self, slot: usize) -> bool {
        self.slots[slot].is_some()
    }

    /// Whether one more fits without any being forgotten, and without memory that is lent to requests again and again.
    pub fn has_room(&self) -> bool {
        self.buffers < self.capacity
    }

    /// Whether there is memory that came back unused.
    pub fn has_spare(&self) -> bool {
        !self.spare.is_empty()
    }

    /// The slots of experts that may be forgotten.
    pub fn idle(&self) -> impl Iterator<Item = usize> {
        (0..self.slots.len()).filter(|&slot| self.is_idle(slot))
    }

    /// Whether there is an expert in `slot` that may be forgotten.
    pub fn is_idle(&self, slot: usize) -> bool {
        !is_in_use(&self.slots, slot)
    }

    /// The memory of an expert that is idle, which is forgotten.
    pub fn take_from(&mut self, slot: usize) -> Option<AlignedBytes> {
        self.evict(|other| other != slot)
    }

    /// Memory for an expert: unused, or of one that is forgotten for it; beyond the limit when all are in use.
    pub fn buffer(&mut self) -> AlignedBytes {
        if let Some(buffer) = self.spare.pop() {
            return buffer;
        }
        if self.buffers >= self.capacity
            && let Some(buffer) = self.evict(|_| false)
        {
            return buffer;
        }
        self.buffers += 1;
        AlignedBytes::zeroed(self.expert_bytes)
    }

    /// Puts an expert in whose memory came from [`buffer`](Self::buffer).
    pub fn insert(&mut self, slot: usize, expert: Arc<Expert>) {
        // What was asked for beyond the limit is used and not kept.
        while self.buffers > self.capacity {
            self.buffers -= 1;
            if self.spare.pop().is_none() && self.evict(|_| false).is_none() {
                return;
            }
        }
        if self.slots[slot].is_none() {
            self.policy.insert(slot);
        }
        self.slots[slot] = Some(expert);
    }

    /// Takes memory back that no expert came to fill.
    pub fn give_back(&mut self, buffer: AlignedBytes) {
        self.spare.push(buffer);
    }

    /// Notes that memory from [`buffer`](Self::buffer) will not come back.
    pub fn lost(&mut self) {
        self.buffers -= 1;
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        (self.buffers * self.expert_bytes) as u64
    }

    /// Experts that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    fn evict(&mut self, pinned: impl Fn(usize) -> bool) -> Option<AlignedBytes> {
        let slots = &self.slots;
        let slot = self.policy.evict(&|slot| is_in_use(slots, slot) || pinned(slot))?;
        let expert = Arc::into_inner(self.slots[slot].take()?)?;
        Some(expert.into_bytes())
    }
}

/// Whether whoever took an expert out of the cache still has it.
fn is_in_use(slots: &[Option<Arc<Expert>>], slot: usize) -> bool {
    slots[slot].as_ref().is_none_or(|expert| Arc::strong_count(expert) > 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use protocol::Precision;
    use protocol::expert_blob::ExpertShape;

    const SHAPE: ExpertShape = ExpertShape { precision: Precision::F32, hidden_size: 4, intermediate_size: 4 };

    fn filled(cache: &mut ExpertCache) -> Arc<Expert> {
        let mut buffer = cache.buffer();
        buffer[..64].copy_from_slice(&SHAPE.header());
        Arc::new(Expert::from_verified(buffer, SHAPE).expect("it has its own header"))
    }

    #[test]
    fn forgets_the_least_recently_used_but_not_what_is_in_use() {
        let one = SHAPE.blob_bytes() as u64;
        let mut cache = ExpertCache::new(10, one as usize, 2 * one + 5, PolicyKind::Lru);
        for slot in [1, 2] {
            let expert = filled(&mut cache);
            cache.insert(slot, expert);
        }
        drop(cache.get(1));
        let expert = filled(&mut cache);
        cache.insert(3, expert);
        assert!(cache.get(2).is_none() && cache.get(3).is_some());
        let held = cache.get(1).expect("it was used last but one");
        let expert = filled(&mut cache);
        cache.insert(4, expert);
        assert!(cache.get(1).is_some() && cache.get(3).is_none());
        drop(held);
        assert_eq!(cache.bytes(), 2 * one);
    }

    proptest! {
        #[test]
        fn never_holds_more_than_its_limit_when_nothing_is_in_use(
            slots in proptest::collection::vec(0usize..20, 1..200),
            capacity in 0u64..6,
            kind in 0usize..PolicyKind::ALL.len(),
        ) {
            let one = SHAPE.blob_bytes() as u64;
            let mut cache = ExpertCache::new(20, one as usize, capacity * one, PolicyKind::ALL[kind]);
            for slot in slots {
                if cache.get(slot).is_none() {
                    let expert = filled(&mut cache);
                    cache.insert(slot, expert);
                }
                prop_assert!(cache.bytes() <= capacity.max(1) * one);
                prop_assert!(cache.slots.iter().flatten().count() as u64 <= capacity);
            }
        }
    }
}
