//! Memory for weights: on page borders, so that they are read there past the page cache and multiplied where they lie.
//!
//! Large buffers share regions that the operating system is asked to back with huge pages: a token touches tens of thousands of small
//! ones, and each miss of the address cache costs as much as many multiplications. What a buffer leaves free is taken by the next that
//! fits best, and a region without buffers goes back.

#![expect(unsafe_code, reason = "buffers are disjoint parts of shared regions")]

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memmap2::{MmapMut, MmapOptions};

const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;
/// Bytes of a region, but for larger buffers.
const REGION: usize = 64 << 20;
/// Buffers below this get memory of their own.
const SHARED_MIN: usize = 256 << 10;
/// Bytes given back that may stay with the process, to be taken again; beyond, all that is free goes to the operating system.
const FREE_KEPT_MAX: usize = 32 << 20;

/// A count of the bytes that some buffers take, in whole pages, as long as they live.
#[derive(Clone, Default, Debug)]
pub struct ByteCount(Arc<AtomicU64>);

impl ByteCount {
    /// Bytes of the buffers that live.
    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A buffer of fixed length that starts on a page border.
pub struct AlignedBytes {
    memory: *mut u8,
    length: usize,
    owner: Owner,
    counted: Option<ByteCount>,
}

// SAFETY: a buffer's memory is its own until it is dropped.
unsafe impl Send for AlignedBytes {}
// SAFETY: as above; a shared buffer is only read.
unsafe impl Sync for AlignedBytes {}

/// Whose a buffer's memory is.
enum Owner {
    /// There is none.
    Nobody,
    /// The buffer's alone.
    Buffer(#[expect(dead_code, reason = "it keeps the memory")] MmapMut),
    /// A region's.
    Region,
}

/// Memory that buffers are cut from.
struct Region {
    map: MmapMut,
    start: usize,
    end: usize,
    /// Free parts by their addresses, and their lengths; none touches another.
    free: BTreeMap<usize, usize>,
    /// From here on no buffer has ever been, and all is zero.
    fresh: usize,
    buffers: usize,
}

/// All regions, by the addresses at which they begin.
static REGIONS: Mutex<Regions> = Mutex::new(Regions { all: BTreeMap::new(), given_back: 0 });

struct Regions {
    all: BTreeMap<usize, Region>,
    /// Bytes given back since all that is free last went to the operating system.
    given_back: usize,
}

impl Regions {
    fn lock() -> MutexGuard<'static, Self> {
        REGIONS.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cuts off so many bytes; returns where they begin, and how many of them may not be zero.
    fn take(&mut self, bytes: usize) -> (usize, usize) {
        let fits = |region: &Region| region.free.iter().filter(|(_, length)| **length >= bytes).map(|(at, length)| (*length, *at)).min();
        let best = self.all.iter().filter_map(|(start, region)| fits(region).map(|(length, at)| (length, at, *start))).min();
        let (length, at, start) = best.unwrap_or_else(|| self.grow(bytes));
        let region = self.all.get_mut(&start).expect("it has just been found");
        region.free.remove(&at);
        if length > bytes {
            region.free.insert(at + bytes, length - bytes);
        }
        region.buffers += 1;
        let used = region.fresh.saturating_sub(at).min(bytes);
        region.fresh = region.fresh.max(at + bytes);
        (at, used)
    }

    /// A region that is all free, with room for so many bytes.
    fn grow(&mut self, bytes: usize) -> (usize, usize, usize) {
        // Regions begin and end on borders of huge pages, wherever the map lies.
        let room = bytes.next_multiple_of(HUGE_PAGE).max(REGION);
        let (mut map, memory) = map(room + HUGE_PAGE);
        let _ = &mut map;
        let start = memory.next_multiple_of(HUGE_PAGE);
        let region = Region { map, start, end: start + room, free: BTreeMap::from([(start, room)]), fresh: start, buffers: 0 };
        self.all.insert(start, region);
        (room, start, start)
    }

    /// Takes a part back; a region without buffers goes.
    fn give_back(&mut self, at: usize, bytes: usize) {
        let (&start, region) = self.all.range_mut(..=at).next_back().expect("a buffer lies in its region");
        debug_assert!(at + bytes <= region.end, "a buffer ends in its region");
        region.buffers -= 1;
        if region.buffers == 0 {
            self.all.remove(&start);
            return;
        }
        let (mut from, mut upto) = (at, at + bytes);
        if let Some((&before, &length)) = region.free.range(..at).next_back()
            && before + length == at
        {
            from = before;
        }
        if let Some(after) = region.free.remove(&upto) {
            upto += after;
        }
        region.free.insert(from, upto - from);
        self.given_back += bytes;
        if self.given_back > FREE_KEPT_MAX {
            self.given_back = 0;
            self.all.values().for_each(Region::release_free);
        }
    }
}

impl Region {
    /// Gives the pages of free parts to the operating system; they read as zeros when they are taken again.
    fn release_free(&self) {
        #[cfg(any(target_os = "linux", target_os = "android"))]
        for (&at, &length) in &self.free {
            // Where the map begins, its address is not on the border that regions begin at.
            let begins = self.map.as_ptr().addr();
            // SAFETY: no buffer lies in what is free.
            let _ = unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, at - begins, length) };
        }
        debug_assert!(self.free.range(..self.start).next().is_none(), "what is free lies in its region");
    }
}

/// Zeros from the operating system, and where they begin.
fn map(bytes: usize) -> (MmapMut, usize) {
    let mut map = MmapOptions::new().len(bytes).map_anon().expect("memory for weights");
    #[cfg(any(target_os = "linux", target_os = "android"))]
    let _ = map.advise(memmap2::Advice::HugePage); // small pages serve as well, only slower
    let memory = map.as_mut_ptr().expose_provenance();
    (map, memory)
}

impl AlignedBytes {
    /// A buffer of zeros.
    pub fn zeroed(length: usize) -> Self {
        let bytes = length.next_multiple_of(PAGE);
        let buffer = |memory, owner| Self { memory, length, owner, counted: None };
        if bytes == 0 {
            return buffer(std::ptr::without_provenance_mut(PAGE), Owner::Nobody);
        }
        if bytes < SHARED_MIN {
            let (map, memory) = map(bytes);
            return buffer(std::ptr::with_exposed_provenance_mut(memory), Owner::Buffer(map));
        }
        let (memory, used) = Regions::lock().take(bytes);
        let mut buffer = buffer(std::ptr::with_exposed_provenance_mut(memory), Owner::Region);
        buffer.whole_pages()[..used].fill(0);
        buffer
    }

    /// A buffer of zeros whose whole pages count as long as it lives.
    pub fn counted(length: usize, count: &ByteCount) -> Self {
        count.0.fetch_add(Self::taken(length), Ordering::Relaxed);
        let mut buffer = Self::zeroed(length);
        buffer.counted = Some(count.clone());
        buffer
    }

    /// Bytes that a buffer of a length takes, in whole pages.
    pub const fn taken(length: usize) -> u64 {
        length.next_multiple_of(PAGE) as u64
    }

    /// A copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut copy = Self::zeroed(bytes.len());
        copy.copy_from_slice(bytes);
        copy
    }

    /// All of its pages: what lies beyond its length is anybody's.
    pub fn whole_pages(&mut self) -> &mut [u8] {
        // SAFETY: this buffer's memory is as many whole pages, and nobody else's.
        unsafe { std::slice::from_raw_parts_mut(self.memory, self.length.next_multiple_of(PAGE)) }
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        if matches!(self.owner, Owner::Region) {
            Regions::lock().give_back(self.memory.addr(), self.length.next_multiple_of(PAGE));
        }
        if let Some(count) = &self.counted {
            count.0.fetch_sub(Self::taken(self.length), Ordering::Relaxed);
        }
    }
}

impl std::ops::Deref for AlignedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: as in `whole_pages`.
        unsafe { std::slice::from_raw_parts(self.memory, self.length) }
    }
}

impl std::ops::DerefMut for AlignedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        let length = self.length;
        &mut self.whole_pages()[..length]
    }
}

impl fmt::Debug for AlignedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} aligned bytes", self.length)
    }
}

/// Words of 32 bits that start on a page border.
#[derive(Debug)]
pub(crate) struct Words(AlignedBytes);

impl Words {
    /// Zeros.
    pub(crate) fn new(count: usize) -> Self {
        Self(AlignedBytes::zeroed(4 * count))
    }
}

impl Default for Words {
    fn default() -> Self {
        Self::new(0)
    }
}

impl std::ops::Deref for Words {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        bytemuck::cast_slice(&self.0)
    }
}

impl std::ops::DerefMut for Words {
    fn deref_mut(&mut self) -> &mut [u32] {
        bytemuck::cast_slice_mut(&mut self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_apart_zeroed_and_on_page_borders() {
        let lengths = [0, 1, 4096, 5000, SHARED_MIN, 3 << 20, 3 << 20, 70 << 20, 1 << 20];
        let mut buffers: Vec<_> = lengths.iter().map(|&length| AlignedBytes::zeroed(length)).collect();
        for (i, buffer) in buffers.iter_mut().enumerate() {
            assert_eq!((buffer.len(), buffer.as_ptr() as usize % PAGE), (lengths[i], 0));
            assert!(buffer.iter().all(|&byte| byte == 0));
            buffer.whole_pages().fill(i as u8 + 1);
        }
        assert!(buffers.iter().enumerate().all(|(i, buffer)| buffer.iter().all(|&byte| byte == i as u8 + 1)));
    }

    #[test]
    fn buffers_count_as_long_as_they_live() {
        let count = ByteCount::default();
        let (one, other) = (AlignedBytes::counted(5000, &count), AlignedBytes::counted(SHARED_MIN + 1, &count));
        assert_eq!(count.bytes(), 8192 + SHARED_MIN as u64 + 4096);
        drop(one);
        assert_eq!(count.bytes(), AlignedBytes::taken(other.len()));
        drop(other);
        assert_eq!(count.bytes(), 0);
    }

    /// Regions as they would be: no buffers are made.
    #[test]
    fn what_is_given_back_is_taken_again_and_joins_its_neighbours() {
        let mut regions = Regions { all: BTreeMap::new(), given_back: 0 };
        let taken: Vec<_> = (0..16).map(|_| regions.take(4 << 20)).collect();
        assert!(taken.iter().all(|(_, used)| *used == 0) && regions.all.len() == 1, "a region of fresh memory");
        for &(at, _) in taken.iter().step_by(2) {
            regions.give_back(at, 4 << 20);
        }
        // Holes of one size serve buffers of that size, …
        let again: Vec<_> = (0..8).map(|_| regions.take(4 << 20)).collect();
        assert!(again.iter().all(|(_, used)| *used == 4 << 20) && regions.all.len() == 1, "used memory, to be cleared");
        // … and neighbours larger ones.
        regions.give_back(taken[1].0, 4 << 20);
        regions.give_back(taken[3].0, 4 << 20);
        regions.give_back(taken[2].0, 4 << 20);
        assert_eq!(regions.take(12 << 20), (taken[1].0, 12 << 20));
        assert_eq!(regions.all.len(), 1);
    }

    #[test]
    fn a_region_without_buffers_goes() {
        let mut regions = Regions { all: BTreeMap::new(), given_back: 0 };
        let (a, b) = (regions.take(REGION), regions.take(1 << 20));
        assert_eq!(regions.all.len(), 2);
        regions.give_back(a.0, REGION);
        regions.give_back(b.0, 1 << 20);
        assert!(regions.all.is_empty());
    }

    /// A budget that is full, and whose least used buffers go: never much more memory than the budget.
    #[test]
    fn memory_follows_a_budget_at_any_mixture_of_sizes() {
        let mut regions = Regions { all: BTreeMap::new(), given_back: 0 };
        let (mut held, mut bytes, mut state) = (Vec::new(), 0, 1_u64);
        for _ in 0..20_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let length = [600 << 10, 1_200 << 10, 2_400 << 10][(state >> 33) as usize % 3];
            while bytes + length > 256 << 20 {
                let (at, length) = held.swap_remove((state >> 20) as usize % held.len());
                regions.give_back(at, length);
                bytes -= length;
            }
            held.push((regions.take(length).0, length));
            bytes += length;
        }
        let mapped: usize = regions.all.iter().map(|(start, region)| region.end - start).sum();
        assert!(mapped <= (256 << 20) + (256 << 20) / 4 + REGION, "{mapped} bytes for {bytes}");
    }
}
