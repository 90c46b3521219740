//! One bit for each blob of a model: who has what, in 768 bytes for 6,144 experts.

/// Most bits of a field: the blobs of the largest model.
pub const BITS_MAX: u32 = 1 << 20;

/// A fixed number of bits.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Bitfield {
    count: u32,
    bytes: Vec<u8>,
}

impl Bitfield {
    /// `count` bits, all clear; `count` is at most [`BITS_MAX`].
    pub fn new(count: u32) -> Self {
        let count = count.min(BITS_MAX);
        Self { count, bytes: vec![0; count.div_ceil(8) as usize] }
    }

    /// How many bits there are.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// How many of them are set.
    pub fn ones(&self) -> u32 {
        self.bytes.iter().map(|byte| byte.count_ones()).sum()
    }

    /// Whether a bit is set; none is beyond the end.
    pub fn get(&self, index: u32) -> bool {
        index < self.count && self.bytes[(index / 8) as usize] >> (index % 8) & 1 == 1
    }

    /// Sets or clears a bit; there is none beyond the end.
    pub fn set(&mut self, index: u32, value: bool) {
        if index < self.count {
            let byte = &mut self.bytes[(index / 8) as usize];
            *byte = *byte & !(1 << (index % 8)) | u8::from(value) << (index % 8);
        }
    }

    /// The encoding: the count, then the bits, the lowest first.
    pub fn to_bytes(&self) -> Vec<u8> {
        [&self.count.to_le_bytes()[..], &self.bytes].concat()
    }

    /// Reads a field of at most [`BITS_MAX`] bits; those that fill up the last byte are clear.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (count, bits) = bytes.split_first_chunk::<4>()?;
        let count = u32::from_le_bytes(*count);
        let filled = count % 8;
        let clear = filled == 0 || bits.last().is_some_and(|last| last >> filled == 0);
        let fine = count <= BITS_MAX && bits.len() == count.div_ceil(8) as usize && clear;
        fine.then(|| Self { count, bytes: bits.to_vec() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bytes_are_frozen() {
        let mut field = Bitfield::new(10);
        field.set(0, true);
        field.set(9, true);
        field.set(10, true);
        assert_eq!(field.to_bytes(), [10, 0, 0, 0, 1, 2]);
        assert_eq!((field.get(9), field.get(8), field.get(10), field.ones()), (true, false, false, 2));
    }

    #[test]
    fn the_limit_holds_at_its_edge() {
        let of = |count: u32| [&count.to_le_bytes()[..], &vec![0; count.div_ceil(8) as usize]].concat();
        assert!(Bitfield::from_bytes(&of(BITS_MAX)).is_some());
        assert!(Bitfield::from_bytes(&of(BITS_MAX + 1)).is_none());
    }

    proptest! {
        #[test]
        fn what_is_accepted_encodes_to_the_same_bytes(count in 0u32..40, bits in proptest::collection::vec(any::<u8>(), 0..6)) {
            let bytes = [&count.to_le_bytes()[..], &bits].concat();
            if let Some(field) = Bitfield::from_bytes(&bytes) { prop_assert_eq!(field.to_bytes(), bytes); }
        }
    }
}
