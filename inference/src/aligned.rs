//! Bytes that start on a page border: weights are multiplied where they lie, and read there past the page cache.

use std::fmt;

const PAGE: usize = 4096;

/// A buffer of fixed length, aligned to a page.
#[derive(Clone)]
pub struct AlignedBytes {
    pages: Vec<Page>,
    length: usize,
}

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

// SAFETY: plain bytes without padding; any bit pattern is one.
#[expect(unsafe_code, reason = "bytemuck's derive would bring a macro crate for two empty impls")]
unsafe impl bytemuck::Zeroable for Page {}
// SAFETY: as above.
#[expect(unsafe_code, reason = "bytemuck's derive would bring a macro crate for two empty impls")]
unsafe impl bytemuck::Pod for Page {}

impl AlignedBytes {
    /// A buffer of zeros.
    pub fn zeroed(length: usize) -> Self {
        Self { pages: bytemuck::allocation::zeroed_vec(length.div_ceil(PAGE)), length }
    }

    /// All of its pages: what lies beyond its length is anybody's.
    pub fn whole_pages(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.pages)
    }

    /// A copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut copy = Self::zeroed(bytes.len());
        copy.copy_from_slice(bytes);
        copy
    }
}

impl std::ops::Deref for AlignedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.pages)[..self.length]
    }
}

impl std::ops::DerefMut for AlignedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.pages)[..self.length]
    }
}

impl fmt::Debug for AlignedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} aligned bytes", self.length)
    }
}
