//! What a node says of itself: what it can do, where it is, which models it has.

use serde::{Deserialize, Serialize};

use super::head::{Record, RecordHead};
use crate::envelope::Domain;
use crate::hash::ModelId;

/// Most addresses of a node.
pub const ADDRESSES_MAX: usize = 16;
/// Most models of a node.
pub const MODELS_MAX: usize = 64;
const ADDRESS_BYTES_MAX: usize = 128;
const HOUR_MS: u64 = 3_600_000;

/// A node's capacity, addresses and models: claims, which steer whom to ask.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Version, node, sequence and times.
    pub head: RecordHead,
    /// Memory for experts.
    pub memory_bytes: u64,
    /// Disk for blobs.
    pub disk_bytes: u64,
    /// Experts that it runs in a second, as it has measured; 0 when it has not.
    pub experts_per_second: u32,
    /// Where it listens.
    pub addresses: Vec<String>,
    /// What it has, whole or in part, ascending.
    pub models: Vec<ModelId>,
}

impl Record for NodeRecord {
    const DOMAIN: Domain = Domain::Node;
    const ENVELOPE_BYTES_MAX: usize = 4 << 10;
    const LIFE_MS_MAX: u64 = 48 * HOUR_MS;

    fn head(&self) -> &RecordHead {
        &self.head
    }

    fn is_within_limits(&self) -> bool {
        let is_address = |text: &String| (1..=ADDRESS_BYTES_MAX).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
        self.addresses.len() <= ADDRESSES_MAX
            && self.addresses.iter().all(is_address)
            && self.models.len() <= MODELS_MAX
            && self.models.is_sorted_by(|a, b| a < b)
    }
}
