//! Memory for weights: on page borders, so that they are read there past the page cache and multiplied where they lie.
//!
//! Large buffers share regions that the operating system is asked to back with huge pages: a token touches tens of thousands of small
//! ones, and each miss of the address cache costs as much as many multiplications.

#![expect(unsafe_code, reason = "buffers are disjoint parts of shared regions")]

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::{MmapMut, MmapOptions};

const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;
/// Bytes of a region, but for larger buffers.
const REGION: usize = 64 << 20;
/// Buffers below this get memory of their own.
const SHARED_MIN: usize = 256 << 10;

/// A buffer of fixed length that starts on a page border. Its memory goes back when all buffers of its region are gone.
pub struct AlignedBytes {
    region: Arc<Region>,
    start: usize,
    length: usize,
}

/// Memory that buffers are cut from, each part for one buffer.
struct Region {
    memory: *mut u8,
    // Keeps the memory.
    _map: Option<MmapMut>,
}

// SAFETY: a region is touched through its buffers alone, and these do not overlap.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

/// The region that large buffers are cut from now: where its first free byte is, and where it ends.
static CURRENT: Mutex<Option<(Arc<Region>, usize, usize)>> = Mutex::new(None);

impl Region {
    fn new(bytes: usize) -> Self {
        let mut map = MmapOptions::new().len(bytes).map_anon().expect("memory for weights");
        #[cfg(any(target_os = "linux", target_os = "android"))]
        let _ = map.advise(memmap2::Advice::HugePage); // small pages serve as well, only slower
        Self { memory: map.as_mut_ptr(), _map: Some(map) }
    }
}

impl AlignedBytes {
    /// A buffer of zeros.
    pub fn zeroed(length: usize) -> Self {
        let bytes = length.next_multiple_of(PAGE);
        if bytes == 0 {
            return Self { region: Arc::new(Region { memory: PAGE as *mut u8, _map: None }), start: 0, length };
        }
        if bytes < SHARED_MIN {
            return Self { region: Arc::new(Region::new(bytes)), start: 0, length };
        }
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *current {
            Some((region, free, end)) if *free + bytes <= *end => {
                let start = *free;
                *free += bytes;
                Self { region: Arc::clone(region), start, length }
            }
            _ => {
                // Regions begin and end on borders of huge pages, wherever the map lies.
                let room = bytes.next_multiple_of(HUGE_PAGE).max(REGION);
                let region = Arc::new(Region::new(room + HUGE_PAGE));
                let start = (region.memory as usize).wrapping_neg() % HUGE_PAGE;
                *current = Some((Arc::clone(&region), start + bytes, start + room));
                Self { region, start, length }
            }
        }
    }

    /// A copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut copy = Self::zeroed(bytes.len());
        copy.copy_from_slice(bytes);
        copy
    }

    /// All of its pages: what lies beyond its length is anybody's.
    pub fn whole_pages(&mut self) -> &mut [u8] {
        // SAFETY: this buffer's part of the region is as many whole pages, and nobody else's.
        unsafe { std::slice::from_raw_parts_mut(self.region.memory.add(self.start), self.length.next_multiple_of(PAGE)) }
    }
}

impl std::ops::Deref for AlignedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: as in `whole_pages`.
        unsafe { std::slice::from_raw_parts(self.region.memory.add(self.start), self.length) }
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
}
