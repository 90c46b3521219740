//! Bytes that start on a 64-byte border, so that weights are multiplied where they lie.

use std::fmt;

/// A buffer of fixed length, aligned to 64 bytes.
#[derive(Clone)]
pub struct AlignedBytes {
    lines: Vec<Line>,
    length: usize,
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

// SAFETY: 64 plain bytes without padding; any bit pattern is one.
#[expect(unsafe_code, reason = "bytemuck's derive would bring a macro crate for two empty impls")]
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above.
#[expect(unsafe_code, reason = "bytemuck's derive would bring a macro crate for two empty impls")]
unsafe impl bytemuck::Pod for Line {}

impl AlignedBytes {
    /// A buffer of zeros.
    pub fn zeroed(length: usize) -> Self {
        Self { lines: vec![Line([0; 64]); length.div_ceil(64)], length }
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
        &bytemuck::cast_slice(&self.lines)[..self.length]
    }
}

impl std::ops::DerefMut for AlignedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.length]
    }
}

impl fmt::Debug for AlignedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} aligned bytes", self.length)
    }
}
