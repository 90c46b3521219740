//! Experts in memory, one for a process: by content hash, so that models which share experts share memory, of any size, bounded in bytes.
//! Which goes first is the policy's to say; what somebody is using stays.
//!
//! Buffers count from the moment they are made until they are dropped, wherever they are, so that nothing is forgotten that the process takes.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use protocol::ContentHash;

use crate::aligned::{AlignedBytes, ByteCount};
use crate::cache_policy::{CachePolicy, PolicyKind};
use crate::expert::Expert;

/// Number of an expert in a memory, as long as somebody has announced it or it is there.
pub type ExpertNumber = usize;

/// A handle on the memory.
#[derive(Clone, Debug)]
pub struct ExpertMemory {
    inner: Arc<Mutex<Inner>>,
    count: ByteCount,
}

/// The memory, in one thread's hands.
pub type Locked<'a> = MutexGuard<'a, Inner>;

/// What is in memory. It may forget any expert that is not in use.
#[derive(Debug)]
pub struct Inner {
    bytes_max: u64,
    count: ByteCount,
    numbers: HashMap<ContentHash, ExpertNumber, BuildHasherDefault<FirstBytes>>,
    entries: Vec<Entry>,
    /// Numbers of entries that are nobody's.
    unused: Vec<ExpertNumber>,
    /// Memory that came back and that nothing is in.
    spare: Vec<AlignedBytes>,
    kind: PolicyKind,
    policy: Box<dyn CachePolicy>,
    /// Numbers that the policy was made for.
    room: usize,
}

#[derive(Debug, Default)]
struct Entry {
    hash: Option<ContentHash>,
    /// Models that have announced it.
    announced: usize,
    expert: Option<Arc<Expert>>,
}

impl ExpertMemory {
    /// An empty memory of at most `bytes_max` bytes.
    pub fn new(bytes_max: u64, kind: PolicyKind) -> Self {
        let count = ByteCount::default();
        let inner = Inner {
            bytes_max,
            count: count.clone(),
            numbers: HashMap::default(),
            entries: Vec::new(),
            unused: Vec::new(),
            spare: Vec::new(),
            kind,
            policy: kind.build(0, 1),
            room: 0,
        };
        Self { inner: Arc::new(Mutex::new(inner)), count }
    }

    /// Takes it into this thread's hands, for a moment.
    pub fn lock(&self) -> Locked<'_> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of all experts and of memory set aside for some, in whole pages.
    pub fn bytes(&self) -> u64 {
        self.count.bytes()
    }
}

impl Inner {
    /// Gives an expert a number, or the one it has; to be [released](Self::release) as often as it was announced.
    pub fn announce(&mut self, hash: ContentHash) -> ExpertNumber {
        let number = self.number(hash);
        self.entries[number].announced += 1;
        number
    }

    /// Makes room in the tables for this many more experts. They would grow step by step otherwise.
    pub fn reserve(&mut self, experts: usize) {
        let needed = self.entries.len() + experts.saturating_sub(self.unused.len());
        if needed > self.room {
            self.room = needed.next_power_of_two();
            let mean = self.entries.iter().filter_map(|entry| entry.expert.as_ref()).map(|expert| expert.bytes()).max().unwrap_or(1 << 20);
            let capacity = usize::try_from(self.bytes_max / mean.max(1)).unwrap_or(usize::MAX).clamp(1, self.room);
            let old = std::mem::replace(&mut self.policy, self.kind.build(self.room, capacity));
            // Those that would leave first come in first.
            let mut old = old;
            while let Some(number) = old.evict(&|_| false) {
                self.policy.insert(number);
            }
        }
    }

    fn number(&mut self, hash: ContentHash) -> ExpertNumber {
        if let Some(&number) = self.numbers.get(&hash) {
            return number;
        }
        self.reserve(1);
        let number = self.unused.pop().unwrap_or_else(|| {
            self.entries.push(Entry::default());
            self.entries.len() - 1
        });
        self.entries[number].hash = Some(hash);
        self.numbers.insert(hash, number);
        number
    }

    /// Takes an announcement back. The expert stays until its memory is wanted.
    pub fn release(&mut self, number: ExpertNumber) {
        self.entries[number].announced -= 1;
        self.forget_if_nobodys(number);
    }

    fn forget_if_nobodys(&mut self, number: ExpertNumber) {
        let entry = &mut self.entries[number];
        if entry.announced == 0
            && entry.expert.is_none()
            && let Some(hash) = entry.hash.take()
        {
            self.numbers.remove(&hash);
            self.unused.push(number);
        }
    }

    /// The expert of a number, if it is here; it counts as used.
    pub fn get(&mut self, number: ExpertNumber) -> Option<Arc<Expert>> {
        let expert = self.entries[number].expert.as_ref()?;
        self.policy.hit(number);
        Some(Arc::clone(expert))
    }

    /// The expert of a hash, if it is here; it counts as used.
    pub fn find_expert(&mut self, hash: &ContentHash) -> Option<Arc<Expert>> {
        self.numbers.get(hash).copied().and_then(|number| self.get(number))
    }

    /// Whether the expert of a number is here; it does not count as used.
    pub fn contains(&self, number: ExpertNumber) -> bool {
        self.entries[number].expert.is_some()
    }

    /// Whether the expert of a number is here and may be forgotten.
    pub fn is_idle(&self, number: ExpertNumber) -> bool {
        !is_in_use(&self.entries, number)
    }

    /// Whether `length` bytes fit while every expert stays.
    pub fn has_room(&self, length: usize) -> bool {
        self.count.bytes() + AlignedBytes::taken(length) <= self.bytes_max
    }

    /// Whether there is memory of that length which came back unused.
    pub fn has_spare(&self, length: usize) -> bool {
        self.spare.iter().any(|buffer| buffer.len() == length)
    }

    /// Memory for an expert: unused, or of others that are forgotten for it; beyond the limit when all are in use.
    pub fn buffer(&mut self, length: usize) -> AlignedBytes {
        if let Some(at) = self.spare.iter().position(|buffer| buffer.len() == length) {
            return self.spare.swap_remove(at);
        }
        while !self.has_room(length) {
            // Memory of another length is of no use; of this one, it is taken as it is.
            match self.spare.pop().or_else(|| self.evict(|_| false)) {
                Some(buffer) if buffer.len() == length => return buffer,
                Some(_) => {}
                None => break,
            }
        }
        AlignedBytes::counted(length, &self.count)
    }

    /// Memory of `length` bytes for which the expert of a number is forgotten, if it is idle.
    pub fn buffer_for(&mut self, length: usize, leaving: ExpertNumber) -> AlignedBytes {
        match self.evict(|number| number != leaving) {
            Some(buffer) if buffer.len() == length => buffer,
            _ => self.buffer(length),
        }
    }

    /// Puts an expert in whose memory came from [`buffer`](Self::buffer). Where nothing else can go, it is not kept beyond its use.
    pub fn insert(&mut self, number: ExpertNumber, expert: Arc<Expert>) {
        while self.count.bytes() > self.bytes_max {
            if self.spare.pop().is_none() && self.evict(|_| false).is_none() {
                self.forget_if_nobodys(number);
                return;
            }
        }
        self.policy.insert(number);
        self.entries[number].expert = Some(expert);
    }

    /// The same for an expert that nobody has announced.
    pub fn insert_new(&mut self, hash: ContentHash, expert: Arc<Expert>) {
        let number = self.number(hash);
        self.insert(number, expert);
    }

    /// Takes memory back that no expert came to fill.
    pub fn give_back(&mut self, buffer: AlignedBytes) {
        self.spare.push(buffer);
    }

    /// The most bytes that experts may take.
    pub fn bytes_max(&self) -> u64 {
        self.bytes_max
    }

    /// Sets the most bytes that experts may take; what is beyond goes, but for what is in use.
    pub fn set_bytes_max(&mut self, bytes_max: u64) {
        self.bytes_max = bytes_max;
        while self.count.bytes() > bytes_max && (self.spare.pop().is_some() || self.evict(|_| false).is_some()) {}
    }

    /// Forgets every expert that no model announces any more, but for what is in use.
    pub fn forget_released(&mut self) {
        let announced: Vec<_> = self.entries.iter().map(|entry| entry.announced > 0).collect();
        while self.evict(|number| announced[number]).is_some() {}
    }

    fn evict(&mut self, pinned: impl Fn(ExpertNumber) -> bool) -> Option<AlignedBytes> {
        let entries = &self.entries;
        let number = self.policy.evict(&|number| is_in_use(entries, number) || pinned(number))?;
        let expert = Arc::into_inner(self.entries[number].expert.take()?)?;
        self.forget_if_nobodys(number);
        Some(expert.into_bytes())
    }
}

/// Whether whoever took an expert out of the memory still has it; one that is not here counts as in use.
fn is_in_use(entries: &[Entry], number: ExpertNumber) -> bool {
    entries[number].expert.as_ref().is_none_or(|expert| Arc::strong_count(expert) > 1)
}

/// A content hash is spread well already.
#[derive(Default)]
struct FirstBytes(u64);

impl Hasher for FirstBytes {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        // Of a hash; what else is written, a length, comes before it and does no harm.
        self.0 ^= bytes.first_chunk().map_or(0, |first| u64::from_le_bytes(*first));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use protocol::Precision;
    use protocol::expert_blob::ExpertShape;

    const SHAPE: ExpertShape = ExpertShape { precision: Precision::F32, hidden_size: 4, intermediate_size: 4 };
    const LARGE: ExpertShape = ExpertShape { precision: Precision::F32, hidden_size: 64, intermediate_size: 64 };

    fn hash(number: usize) -> ContentHash {
        ContentHash::of(&number.to_le_bytes())
    }

    fn filled(memory: &mut Inner, shape: ExpertShape) -> Arc<Expert> {
        let mut buffer = memory.buffer(shape.blob_bytes());
        buffer[..64].copy_from_slice(&shape.header());
        Arc::new(Expert::from_verified(buffer, shape).expect("it has its own header"))
    }

    fn taken(shape: ExpertShape) -> u64 {
        AlignedBytes::taken(shape.blob_bytes())
    }

    #[test]
    fn forgets_the_least_recently_used_but_not_what_is_in_use() {
        let memory = ExpertMemory::new(2 * taken(SHAPE) + 5, PolicyKind::Lru);
        let mut inner = memory.lock();
        let numbers: Vec<_> = (0..5).map(|n| inner.announce(hash(n))).collect();
        for n in [1, 2] {
            let expert = filled(&mut inner, SHAPE);
            inner.insert(numbers[n], expert);
        }
        drop(inner.get(numbers[1]));
        let expert = filled(&mut inner, SHAPE);
        inner.insert(numbers[3], expert);
        assert!(inner.get(numbers[2]).is_none() && inner.get(numbers[3]).is_some());
        let held = inner.get(numbers[1]).expect("it was used last but one");
        let expert = filled(&mut inner, SHAPE);
        inner.insert(numbers[4], expert);
        assert!(inner.get(numbers[1]).is_some() && inner.get(numbers[3]).is_none());
        drop(held);
        drop(inner);
        assert_eq!(memory.bytes(), 2 * taken(SHAPE));
    }

    #[test]
    fn what_is_used_beyond_the_limit_counts_until_it_is_dropped() {
        let memory = ExpertMemory::new(taken(SHAPE), PolicyKind::Lru);
        let mut inner = memory.lock();
        let numbers = [inner.announce(hash(0)), inner.announce(hash(1))];
        let first = filled(&mut inner, SHAPE);
        inner.insert(numbers[0], Arc::clone(&first));
        let second = filled(&mut inner, LARGE);
        inner.insert(numbers[1], Arc::clone(&second));
        assert!(inner.contains(numbers[0]) && !inner.contains(numbers[1]));
        assert_eq!(memory.count.bytes(), taken(SHAPE) + taken(LARGE));
        drop(second);
        assert_eq!(memory.count.bytes(), taken(SHAPE));
        drop(first);
        inner.set_bytes_max(0);
        assert!(!inner.contains(numbers[0]));
        drop(inner);
        assert_eq!(memory.bytes(), 0);
    }

    #[test]
    fn numbers_are_shared_by_hash_and_used_again() {
        let memory = ExpertMemory::new(10 * taken(SHAPE), PolicyKind::Lru);
        let mut inner = memory.lock();
        let (a, b, other) = (inner.announce(hash(1)), inner.announce(hash(1)), inner.announce(hash(2)));
        assert!(a == b && a != other);
        let expert = filled(&mut inner, SHAPE);
        inner.insert(a, expert);
        inner.release(a);
        inner.release(b);
        assert!(inner.find_expert(&hash(1)).is_some(), "it stays until its memory is wanted");
        inner.forget_released();
        assert!(inner.find_expert(&hash(1)).is_none() && inner.announce(hash(1)) == a);
        let expert = filled(&mut inner, SHAPE);
        inner.insert(a, expert);
        inner.forget_released();
        assert!(inner.get(a).is_some());
        inner.release(a);
        inner.release(other);
        assert!(!inner.numbers.contains_key(&hash(2)));
        assert_eq!(inner.announce(hash(3)), other);
        inner.set_bytes_max(0);
        assert!(!inner.numbers.contains_key(&hash(1)));
    }

    proptest! {
        #[test]
        fn never_holds_more_than_its_limit_when_nothing_is_in_use(
            slots in proptest::collection::vec((0usize..20, any::<bool>()), 1..200),
            capacity in 0u64..8,
            kind in 0usize..PolicyKind::ALL.len(),
        ) {
            let memory = ExpertMemory::new(capacity * taken(LARGE), PolicyKind::ALL[kind]);
            let mut inner = memory.lock();
            for (slot, large) in slots {
                let number = inner.announce(hash(2 * slot + usize::from(large)));
                if inner.get(number).is_none() {
                    let expert = filled(&mut inner, if large { LARGE } else { SHAPE });
                    inner.insert(number, expert);
                }
                inner.release(number);
                prop_assert!(inner.count.bytes() <= capacity * taken(LARGE));
            }
        }
    }
}
