//! Verified experts in memory, bounded in bytes; the least recently used goes first.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use protocol::ExpertSlot;

use crate::expert::Expert;

/// A cache of experts. It may forget any of them at any time; what a layer is using is held by the layer.
#[derive(Debug)]
pub struct ExpertCache {
    bytes_max: u64,
    bytes: u64,
    clock: u64,
    experts: HashMap<ExpertSlot, (Arc<Expert>, u64)>,
    by_use: BTreeMap<u64, ExpertSlot>,
}

impl ExpertCache {
    /// An empty cache of at most `bytes_max` bytes.
    pub fn new(bytes_max: u64) -> Self {
        Self { bytes_max, bytes: 0, clock: 0, experts: HashMap::new(), by_use: BTreeMap::new() }
    }

    /// The expert in `slot`, if it is here; it counts as used.
    pub fn get(&mut self, slot: ExpertSlot) -> Option<Arc<Expert>> {
        self.clock += 1;
        let (expert, used) = self.experts.get_mut(&slot)?;
        self.by_use.remove(used);
        *used = self.clock;
        self.by_use.insert(self.clock, slot);
        Some(Arc::clone(expert))
    }

    /// Puts an expert in, and others out as needed. One that is larger than the whole cache is not kept.
    pub fn insert(&mut self, slot: ExpertSlot, expert: Arc<Expert>) {
        self.remove(slot);
        if expert.bytes() > self.bytes_max {
            return;
        }
        while self.bytes + expert.bytes() > self.bytes_max {
            let Some((_, oldest)) = self.by_use.first_key_value() else { break };
            self.remove(*oldest);
        }
        self.clock += 1;
        self.bytes += expert.bytes();
        self.by_use.insert(self.clock, slot);
        self.experts.insert(slot, (expert, self.clock));
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn remove(&mut self, slot: ExpertSlot) {
        if let Some((expert, used)) = self.experts.remove(&slot) {
            self.by_use.remove(&used);
            self.bytes -= expert.bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aligned::AlignedBytes;
    use proptest::prelude::*;
    use protocol::expert_blob::ExpertShape;
    use protocol::{BlobRef, Precision};

    fn expert(intermediate_size: usize) -> Arc<Expert> {
        let shape = ExpertShape { precision: Precision::F32, hidden_size: 4, intermediate_size };
        let mut bytes = AlignedBytes::zeroed(shape.blob_bytes());
        bytes[..64].copy_from_slice(&shape.header());
        let blob = BlobRef::of(&bytes);
        Arc::new(Expert::verify(bytes, blob, shape).expect("it matches itself"))
    }

    fn slot(expert: u32) -> ExpertSlot {
        ExpertSlot { layer: 0, expert }
    }

    #[test]
    fn forgets_the_least_recently_used() {
        let size = expert(4).bytes();
        let mut cache = ExpertCache::new(2 * size);
        cache.insert(slot(0), expert(4));
        cache.insert(slot(1), expert(4));
        assert!(cache.get(slot(0)).is_some());
        cache.insert(slot(2), expert(4));
        assert!(cache.get(slot(1)).is_none() && cache.get(slot(0)).is_some() && cache.get(slot(2)).is_some());
        assert_eq!(cache.bytes(), 2 * size);
    }

    proptest! {
        #[test]
        fn never_exceeds_its_bytes(bytes_max in 0u64..4000, steps in proptest::collection::vec((0u32..6, 1usize..20), 1..60)) {
            let mut cache = ExpertCache::new(bytes_max);
            for (number, size) in steps {
                cache.insert(slot(number), expert(size));
                cache.get(slot(number / 2));
                prop_assert!(cache.bytes() <= bytes_max);
                prop_assert_eq!(cache.bytes(), cache.experts.values().map(|(e, _)| e.bytes()).sum::<u64>());
                prop_assert_eq!(cache.by_use.len(), cache.experts.len());
            }
        }
    }
}
