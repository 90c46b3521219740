//! What a node says of itself when asked: what it can do and what it holds. Claims, which steer whom to ask first and nothing else;
//! whether a node has a blob or computes truly is seen by the blob's hash and by audits.

use serde::{Deserialize, Serialize};

use crate::hash::ModelId;
use crate::message::{LISTING_MODELS_MAX, MalformedFetch, is_model_name};

/// Most bytes of an encoded status.
pub const STATUS_BYTES_MAX: u64 = 64 << 10;
/// Longest version, in bytes.
const VERSION_BYTES_MAX: usize = 32;

/// A node's own account of itself.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Of the program, such as `0.1.0`.
    pub version: String,
    /// Threads that compute.
    pub threads: u16,
    /// Bytes of memory for experts that it runs for others.
    pub memory_bytes: u64,
    /// Bytes of blobs in its store.
    pub stored_bytes: u64,
    /// Bytes of blobs for which there is room yet.
    pub room_bytes: u64,
    /// Whether it runs experts for whoever asked.
    pub executes: bool,
    /// The models that it serves, whole or in part.
    pub holdings: Vec<Holding>,
}

/// How much of a model a node has.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Holding {
    /// What it calls the model.
    pub name: String,
    /// Which model.
    pub model: ModelId,
    /// Experts that it has, …
    pub experts: u32,
    /// … of so many.
    pub of: u32,
}

impl Status {
    /// The canonical encoding; of holdings beyond the limit nothing is said.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut shown = self.clone();
        shown.holdings.truncate(LISTING_MODELS_MAX);
        crate::codec::to_bytes(&shown)
    }

    /// Reads what a peer says; refuses what could not be shown on a terminal.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, MalformedFetch> {
        let malformed = MalformedFetch("status");
        if bytes.len() as u64 > STATUS_BYTES_MAX {
            return Err(malformed);
        }
        let status: Self = crate::codec::from_bytes(bytes).map_err(|_| malformed)?;
        let plain = status.version.len() <= VERSION_BYTES_MAX && status.version.bytes().all(|byte| byte.is_ascii_graphic());
        let fine = |holding: &Holding| is_model_name(&holding.name) && holding.experts <= holding.of;
        if plain && status.holdings.len() <= LISTING_MODELS_MAX && status.holdings.iter().all(fine) { Ok(status) } else { Err(malformed) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::ContentHash;

    fn status() -> Status {
        let holding = Holding { name: "m".to_owned(), model: ModelId(ContentHash::from_bytes([7; 32])), experts: 3, of: 4 };
        Status {
            version: "0.1.0".to_owned(),
            threads: 2,
            memory_bytes: 1 << 30,
            stored_bytes: 5,
            room_bytes: 6,
            executes: true,
            holdings: vec![holding],
        }
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(Status::from_bytes(&status().to_bytes()), Ok(status()));
        let many = Status { holdings: vec![status().holdings[0].clone(); LISTING_MODELS_MAX + 1], ..status() };
        let read = Status::from_bytes(&many.to_bytes()).expect("shortened");
        assert_eq!(read.holdings.len(), LISTING_MODELS_MAX);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let holding = |name: &str, experts| Holding { name: name.to_owned(), experts, ..status().holdings[0].clone() };
        for bad in [
            Status { version: "\u{1b}[2J".to_owned(), ..status() },
            Status { version: "9".repeat(33), ..status() },
            Status { holdings: vec![holding("m", 5)], ..status() },
            Status { holdings: vec![holding("a\nb", 1)], ..status() },
        ] {
            assert!(Status::from_bytes(&crate::codec::to_bytes(&bad)).is_err(), "{bad:?}");
        }
        let bytes = status().to_bytes();
        assert!((0..bytes.len()).all(|length| Status::from_bytes(&bytes[..length]).is_err()));
    }
}
