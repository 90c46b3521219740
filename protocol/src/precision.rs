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
}

impl Precision {
    /// Bytes that one weight takes.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The word people type.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

/// A precision that this program does not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown precision {0} (known: f32, f16, bf16)")]
pub struct UnknownPrecision(String);

impl TryFrom<u8> for Precision {
    type Error = UnknownPrecision;

    fn try_from(number: u8) -> Result<Self, UnknownPrecision> {
        match number {
            0 => Ok(Self::F32),
            1 => Ok(Self::F16),
            2 => Ok(Self::Bf16),
            other => Err(UnknownPrecision(other.to_string())),
        }
    }
}

impl FromStr for Precision {
    type Err = UnknownPrecision;

    fn from_str(text: &str) -> Result<Self, UnknownPrecision> {
        [Self::F32, Self::F16, Self::Bf16].into_iter().find(|p| p.name() == text).ok_or_else(|| UnknownPrecision(text.to_owned()))
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
