//! How a weight is written.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The number format of weights. The numbers are on disk and on the wire; they never change.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Precision {
    /// IEEE 754 single.
    F32 = 0,
    /// IEEE 754 half.
    F16 = 1,
    /// The upper half of a single.
    Bf16 = 2,
    /// Integers of 8 bits, packed in panels with a scale for each row and group.
    Q8 = 3,
    /// Integers of 4 bits, packed the same way.
    Q4 = 4,
    /// Integers of 6 bits, packed the same way.
    Q6 = 5,
    /// One of eight integers each, packed the same way but for scales of 8 bits.
    Q3 = 6,
    /// One of four integers each, packed as [`Q3`](Self::Q3).
    Q2 = 7,
}

/// Rows of a panel of packed weights.
pub const PANEL_ROWS: usize = 16;
/// Columns of a group: packed weights of a row and group share a scale.
pub const GROUP_COLUMNS: usize = 32;
/// Bytes of the scales that begin a block of packed weights, at q8, q6 and q4: 16 × f16.
pub const BLOCK_SCALE_BYTES: usize = 2 * PANEL_ROWS;
/// Bytes that begin a matrix whose scales have 8 bits: the exponent that they count from, then zeros.
pub const MATRIX_HEAD_BYTES: usize = 64;
/// Largest exponent that 8-bit scales count from: the largest scale is then finite.
pub const SCALE_EXPONENT_MAX: u8 = 239;

impl Precision {
    /// All of them, the widest first.
    pub const ALL: [Self; 8] = [Self::F32, Self::F16, Self::Bf16, Self::Q8, Self::Q6, Self::Q4, Self::Q3, Self::Q2];

    /// Bytes of a single weight, where weights stand alone.
    pub const fn plain_bytes(self) -> Option<usize> {
        match self {
            Self::F32 => Some(4),
            Self::F16 | Self::Bf16 => Some(2),
            Self::Q8 | Self::Q6 | Self::Q4 | Self::Q3 | Self::Q2 => None,
        }
    }

    /// Bytes of a block of 16 rows and 32 columns, where weights are packed.
    pub const fn block_bytes(self) -> Option<usize> {
        match self {
            Self::Q8 => Some(BLOCK_SCALE_BYTES + PANEL_ROWS * GROUP_COLUMNS),
            Self::Q6 => Some(BLOCK_SCALE_BYTES + PANEL_ROWS * GROUP_COLUMNS * 3 / 4),
            Self::Q4 => Some(BLOCK_SCALE_BYTES + PANEL_ROWS * GROUP_COLUMNS / 2),
            Self::Q3 => Some(PANEL_ROWS + PANEL_ROWS * GROUP_COLUMNS * 3 / 8),
            Self::Q2 => Some(PANEL_ROWS + PANEL_ROWS * GROUP_COLUMNS / 4),
            Self::F32 | Self::F16 | Self::Bf16 => None,
        }
    }

    /// Says whether weights are packed in panels.
    pub const fn is_packed(self) -> bool {
        self.block_bytes().is_some()
    }

    /// Columns of a group, 0 where weights have none.
    pub const fn group_columns(self) -> usize {
        if self.is_packed() { GROUP_COLUMNS } else { 0 }
    }

    /// Bytes that stand before a matrix's panels.
    pub const fn head_bytes(self) -> usize {
        match self {
            Self::Q3 | Self::Q2 => MATRIX_HEAD_BYTES,
            _ => 0,
        }
    }

    /// Whether `bytes` begin as a matrix does: where they do not, no [packing](Self::is_packed) has made them.
    pub fn head_is_valid(self, bytes: &[u8]) -> bool {
        match bytes.get(..self.head_bytes()) {
            Some([exponent, zeros @ ..]) => (1..=SCALE_EXPONENT_MAX).contains(exponent) && zeros.iter().all(|&byte| byte == 0),
            Some([]) => true,
            None => false,
        }
    }

    /// Bytes of a matrix.
    pub const fn matrix_bytes(self, rows: usize, columns: usize) -> usize {
        match (self.block_bytes(), self.plain_bytes()) {
            (Some(block), _) => self.head_bytes() + rows.div_ceil(PANEL_ROWS) * columns.div_ceil(GROUP_COLUMNS) * block,
            (None, Some(weight)) => rows * columns * weight,
            (None, None) => 0, // no precision is neither
        }
    }

    /// Precisions of an expert's `gate_proj`, `up_proj` and `down_proj`: errors in the last cost more than in the others together, so it has
    /// the next wider one where bits are few.
    pub const fn of_planes(self) -> [Self; 3] {
        match self {
            Self::Q3 => [Self::Q3, Self::Q3, Self::Q4],
            Self::Q2 => [Self::Q2, Self::Q2, Self::Q3],
            _ => [self; 3],
        }
    }

    /// The word people type.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8 => "q8",
            Self::Q6 => "q6",
            Self::Q4 => "q4",
            Self::Q3 => "q3",
            Self::Q2 => "q2",
        }
    }
}

/// A precision that this program does not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown precision {0} (known: f32, f16, bf16, q8, q6, q4, q3, q2)")]
pub struct UnknownPrecision(String);

impl TryFrom<u8> for Precision {
    type Error = UnknownPrecision;

    fn try_from(number: u8) -> Result<Self, UnknownPrecision> {
        Self::ALL.into_iter().find(|precision| *precision as u8 == number).ok_or_else(|| UnknownPrecision(number.to_string()))
    }
}

impl FromStr for Precision {
    type Err = UnknownPrecision;

    fn from_str(text: &str) -> Result<Self, UnknownPrecision> {
        Self::ALL.into_iter().find(|p| p.name() == text).ok_or_else(|| UnknownPrecision(text.to_owned()))
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for Precision {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u8(*self as u8)
    }
}

impl<'de> Deserialize<'de> for Precision {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::try_from(u8::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}
