//! What all records begin with, and what makes a kind of record.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::envelope::Domain;
use crate::identity::NodeId;

/// The version of records that this program knows.
pub const RECORD_VERSION: u16 = 1;
/// How far clocks may differ.
pub const SKEW_MS: u64 = 10 * 60_000;
/// The sequence number that takes a profile back.
pub const SEQ_REVOKED: u64 = u64::MAX;

/// What all records begin with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct RecordHead {
    /// Of the record's form.
    pub version: u16,
    /// Whose statement it is: the signer's.
    pub node: NodeId,
    /// The higher counts.
    pub seq: u64,
    /// When it was signed, in milliseconds since 1970.
    pub issued_ms: u64,
    /// From when on it says nothing any more.
    pub expires_ms: u64,
}

impl RecordHead {
    /// The head of a record by `node` that lives for `life_ms` from now on. `last_seq` is the last that it used, if it knows.
    pub fn new(node: NodeId, now_ms: u64, life_ms: u64, last_seq: Option<u64>) -> Self {
        // By the clock, so that a node that lost everything but its key is ahead of what it said before.
        let seq = last_seq.map_or(now_ms, |last| now_ms.max(last.saturating_add(1))).min(SEQ_REVOKED - 1);
        Self { version: RECORD_VERSION, node, seq, issued_ms: now_ms, expires_ms: now_ms.saturating_add(life_ms) }
    }
}

/// A kind of record.
pub trait Record: Serialize + DeserializeOwned {
    /// What its signature is for.
    const DOMAIN: Domain;
    /// Most bytes of an envelope around it.
    const ENVELOPE_BYTES_MAX: usize;
    /// How long it lives at most.
    const LIFE_MS_MAX: u64;

    /// What it begins with.
    fn head(&self) -> &RecordHead;

    /// Whether what follows is within its limits.
    fn is_within_limits(&self) -> bool;
}
