//! The bytes of an expert: a 64-byte header, then `gate_proj`, `up_proj` and `down_proj`, each plane 64-byte aligned.
//!
//! The same on disk, on the wire and in memory; `docs/expert-format.md` draws it. Does not compute with them.

use std::ops::Range;

use crate::precision::Precision;

/// Bytes of the header, and the alignment of every plane.
pub const HEADER_BYTES: usize = 64;

/// Bytes of the header that say something; the others are 0.
const HEADER_USED: usize = 20;
const MAGIC: [u8; 4] = *b"CFXP";
const VERSION: u16 = 1;
const ACTIVATION_SILU: u8 = 0;
/// Largest side of an expert's matrices that this program handles.
pub const SIDE_MAX: usize = 1 << 17;

/// The shape of an expert and how its weights are written: everything that its header says.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ExpertShape {
    /// Number format of the weights.
    pub precision: Precision,
    /// Length of the vectors that go in and come out.
    pub hidden_size: usize,
    /// Length of the vectors between.
    pub intermediate_size: usize,
}

/// Why bytes are not an expert.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExpertBlobError {
    /// Not an expert at all.
    #[error("not an expert blob (no CFXP header)")]
    Magic,
    /// A format that this program does not know.
    #[error("expert blob has {what} {found}, which this program does not know")]
    Unknown {
        /// The field.
        what: &'static str,
        /// Its value.
        found: u32,
    },
    /// A valid header for another shape than wanted.
    #[error("expert blob is {found:?}, expected {expected:?}")]
    Shape {
        /// What the header says.
        found: ExpertShape,
        /// What the manifest says.
        expected: ExpertShape,
    },
    /// Shorter or longer than its header says.
    #[error("expert blob has {found} bytes, its header says {expected}")]
    Length {
        /// Bytes there are.
        found: usize,
        /// Bytes there should be.
        expected: usize,
    },
}

impl ExpertShape {
    /// Bytes of `gate_proj`, `up_proj` and `down_proj`, without padding.
    const fn plane_bytes(&self) -> [usize; 3] {
        let [gate, up, down] = self.precision.of_planes();
        [
            gate.matrix_bytes(self.intermediate_size, self.hidden_size),
            up.matrix_bytes(self.intermediate_size, self.hidden_size),
            down.matrix_bytes(self.hidden_size, self.intermediate_size),
        ]
    }

    /// Where `gate_proj`, `up_proj` and `down_proj` lie in the blob.
    pub const fn planes(&self) -> [Range<usize>; 3] {
        let [gate, up, down] = self.plane_bytes();
        let a = HEADER_BYTES;
        let b = a + gate.next_multiple_of(HEADER_BYTES);
        let c = b + up.next_multiple_of(HEADER_BYTES);
        [a..a + gate, b..b + up, c..c + down]
    }

    /// Bytes of the whole blob; the last plane is padded as the others are.
    pub const fn blob_bytes(&self) -> usize {
        let [_, _, down] = self.planes();
        down.end.next_multiple_of(HEADER_BYTES)
    }

    /// Returns the header.
    pub fn header(&self) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[0..4].copy_from_slice(&MAGIC);
        header[4..6].copy_from_slice(&VERSION.to_le_bytes());
        header[6] = self.precision as u8;
        header[7] = ACTIVATION_SILU;
        header[8..12].copy_from_slice(&(self.hidden_size as u32).to_le_bytes());
        header[12..16].copy_from_slice(&(self.intermediate_size as u32).to_le_bytes());
        header[16..20].copy_from_slice(&(self.precision.group_columns() as u32).to_le_bytes()); // the rest is 0
        header
    }

    /// Reads the header of a whole blob and checks that the blob is of that shape, to the last padding byte's position.
    pub fn of_blob(blob: &[u8]) -> Result<Self, ExpertBlobError> {
        let header: &[u8; HEADER_BYTES] = blob.first_chunk().ok_or(ExpertBlobError::Magic)?;
        let u32_at = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        if header[0..4] != MAGIC {
            return Err(ExpertBlobError::Magic);
        }
        let unknown = |what, found| ExpertBlobError::Unknown { what, found };
        let version = u16::from_le_bytes([header[4], header[5]]);
        if version != VERSION {
            return Err(unknown("version", u32::from(version)));
        }
        let precision = Precision::try_from(header[6]).map_err(|_| unknown("precision", u32::from(header[6])))?;
        if header[7] != ACTIVATION_SILU {
            return Err(unknown("activation", u32::from(header[7])));
        }
        let (hidden_size, intermediate_size) = (u32_at(8) as usize, u32_at(12) as usize);
        for (what, side) in [("hidden size", hidden_size), ("intermediate size", intermediate_size)] {
            if side == 0 || side > SIDE_MAX {
                return Err(unknown(what, side as u32));
            }
        }
        if u32_at(16) as usize != precision.group_columns() {
            return Err(unknown("group size", u32_at(16)));
        }
        let shape = Self { precision, hidden_size, intermediate_size };
        if blob.len() != shape.blob_bytes() {
            return Err(ExpertBlobError::Length { found: blob.len(), expected: shape.blob_bytes() });
        }
        for (plane, precision) in shape.planes().into_iter().zip(precision.of_planes()) {
            if !precision.head_is_valid(&blob[plane.clone()]) {
                return Err(unknown("a matrix whose scales count from", u32::from(blob[plane.start])));
            }
        }
        // What nothing is kept in is zero: one expert has one hash.
        let [gate, up, down] = shape.planes();
        for unused in [HEADER_USED..HEADER_BYTES, gate.end..up.start, up.end..down.start, down.end..blob.len()] {
            if let Some(byte) = blob[unused].iter().find(|byte| **byte != 0) {
                return Err(unknown("a byte that belongs to nothing", u32::from(*byte)));
            }
        }
        Ok(shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SHAPE: ExpertShape = ExpertShape { precision: Precision::Bf16, hidden_size: 64, intermediate_size: 48 };

    #[test]
    fn header_bytes_are_frozen() {
        let mut expected = [0u8; 64];
        expected[..16].copy_from_slice(b"CFXP\x01\x00\x02\x00\x40\x00\x00\x00\x30\x00\x00\x00");
        assert_eq!(SHAPE.header(), expected);
        assert_eq!(SHAPE.planes(), [64..64 + 6144, 6208..6208 + 6144, 12352..12352 + 6144]);
        assert_eq!(SHAPE.blob_bytes(), 64 + 3 * 6144);
    }

    #[test]
    fn planes_are_aligned_and_padded_when_they_do_not_fill_64_bytes() {
        let shape = ExpertShape { precision: Precision::Bf16, hidden_size: 3, intermediate_size: 5 };
        assert_eq!(shape.planes(), [64..94, 128..158, 192..222]);
        assert_eq!(shape.blob_bytes(), 256);
    }

    #[test]
    fn packed_planes_are_whole_panels_and_groups() {
        let shape = ExpertShape { precision: Precision::Q4, hidden_size: 64, intermediate_size: 48 };
        // 3 panels × 2 groups, and 4 panels × 2 groups, of 288 bytes.
        assert_eq!(shape.planes(), [64..64 + 1728, 1792..1792 + 1728, 3520..3520 + 2304]);
        assert_eq!(shape.blob_bytes(), 5824);
        assert_eq!(shape.header()[..20], *b"CFXP\x01\x00\x04\x00\x40\x00\x00\x00\x30\x00\x00\x00\x20\x00\x00\x00");
        let odd = ExpertShape { precision: Precision::Q8, hidden_size: 7, intermediate_size: 17 };
        assert_eq!(odd.planes(), [64..64 + 1088, 1152..1152 + 1088, 2240..2240 + 544]);
        let mut blob = vec![0; odd.blob_bytes()];
        blob[..64].copy_from_slice(&odd.header());
        assert_eq!(ExpertShape::of_blob(&blob), Ok(odd));
        blob[16] = 0;
        assert!(ExpertShape::of_blob(&blob).is_err());
    }

    #[test]
    fn planes_of_8_bit_scales_begin_with_their_exponent() {
        let shape = ExpertShape { precision: Precision::Q2, hidden_size: 64, intermediate_size: 48 };
        // 64, and 3 panels × 2 groups of 144 bytes, and 4 panels × 2 groups of 208.
        assert_eq!(shape.planes(), [64..64 + 928, 1024..1024 + 928, 1984..1984 + 1728]);
        let mut blob = vec![0; shape.blob_bytes()];
        blob[..64].copy_from_slice(&shape.header());
        assert!(ExpertShape::of_blob(&blob).is_err(), "scales count from 0");
        shape.planes().into_iter().for_each(|plane| blob[plane.start] = 107);
        assert_eq!(ExpertShape::of_blob(&blob), Ok(shape));
        for (at, value) in [(64, 240), (65, 1), (127, 1), (1024, 0), (2047, 1)] {
            let mut bad = blob.clone();
            bad[at] = value;
            assert!(ExpertShape::of_blob(&bad).is_err(), "byte {at} = {value}");
        }
    }

    #[test]
    fn refuses_other_lengths_versions_and_sides() {
        let mut blob = vec![0; SHAPE.blob_bytes()];
        blob[..64].copy_from_slice(&SHAPE.header());
        assert_eq!(ExpertShape::of_blob(&blob), Ok(SHAPE));
        assert!(matches!(ExpertShape::of_blob(&blob[..blob.len() - 1]), Err(ExpertBlobError::Length { .. })));
        assert!(matches!(ExpertShape::of_blob(&blob[..63]), Err(ExpertBlobError::Magic)));
        let padded = ExpertShape { precision: Precision::Bf16, hidden_size: 3, intermediate_size: 5 };
        let mut gaps = vec![0; padded.blob_bytes()];
        gaps[..64].copy_from_slice(&padded.header());
        assert_eq!(ExpertShape::of_blob(&gaps), Ok(padded));
        for at in [20, 63, 94, 127, 158, 191, 222, 255] {
            let mut bad = gaps.clone();
            bad[at] = 1;
            assert!(matches!(ExpertShape::of_blob(&bad), Err(ExpertBlobError::Unknown { .. })), "byte {at}");
        }
        for (at, value) in [(0, 0), (4, 2), (6, 9), (7, 1), (8, 0), (11, 255), (15, 255), (16, 32)] {
            let mut bad = blob.clone();
            bad[at] = value;
            assert!(ExpertShape::of_blob(&bad).is_err(), "byte {at} = {value}");
        }
    }

    proptest! {
        #[test]
        fn accepted_bytes_hold_every_plane(bytes in proptest::collection::vec(any::<u8>(), 64..4000), side in 1u8..6, number in 0u8..8) {
            let mut bytes = bytes;
            bytes[..16].copy_from_slice(&[b'C', b'F', b'X', b'P', 1, 0, number, 0, side, 0, 0, 0, 2, 0, 0, 0]);
            bytes[16..20].copy_from_slice(&[if number < 3 { 0 } else { 32 }, 0, 0, 0]);
            let shape = ExpertShape { precision: Precision::try_from(number).expect("a number"), hidden_size: side as usize, intermediate_size: 2 };
            bytes.resize(shape.blob_bytes().min(bytes.len()), 0);
            bytes[20..64].fill(0);
            if let Ok(shape) = ExpertShape::of_blob(&bytes) {
                prop_assert!(shape.planes().iter().all(|plane| plane.end <= bytes.len()));
            }
        }
    }
}
