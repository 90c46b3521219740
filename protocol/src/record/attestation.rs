//! What one node says it has seen of another. Losing one may make a reader more careful, and never less.

use serde::{Deserialize, Serialize};

use super::head::{Record, RecordHead};
use crate::envelope::Domain;
use crate::hash::ContentHash;
use crate::identity::NodeId;

/// Most pieces of evidence that one attestation names.
pub const EVIDENCE_MAX: usize = 16;
const DAY_MS: u64 = 86_400_000;

/// How often a node tells what it has seen of others, in a network of so many nodes: seldom where many do.
pub fn attest_every_ms(nodes: usize) -> u64 {
    const MIN_MS: u64 = 10 * 60_000;
    const NODES_AT_MIN: u64 = 10;
    (MIN_MS * nodes as u64 / NODES_AT_MIN).clamp(MIN_MS, DAY_MS / 2)
}

/// In what a peer is trusted: good work in one says nothing of another.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
#[repr(u8)]
pub enum Facet {
    /// The bytes that it sends are those that were asked for.
    Bytes = 0,
    /// The results that it computes are right.
    Execution = 1,
    /// What it says of experts holds when it is measured again.
    Profile = 2,
}

impl Facet {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Bytes, Self::Execution, Self::Profile];

    /// What people call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bytes => "bytes",
            Self::Execution => "execution",
            Self::Profile => "profile",
        }
    }
}

impl TryFrom<u8> for Facet {
    type Error = &'static str;

    fn try_from(number: u8) -> Result<Self, Self::Error> {
        Self::ALL.into_iter().find(|facet| *facet as u8 == number).ok_or("no such facet")
    }
}

impl From<Facet> for u8 {
    fn from(facet: Facet) -> Self {
        facet as Self
    }
}

/// A signed claim by an issuer about a subject.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Attestation {
    /// Version, issuer, sequence and times.
    pub head: RecordHead,
    /// About whom.
    pub subject: NodeId,
    /// In what.
    pub facet: Facet,
    /// Of what was seen, the beginning …
    pub from_ms: u64,
    /// … and the end.
    pub until_ms: u64,
    /// Times that it was good.
    pub good: u32,
    /// Times that it was not.
    pub bad: u32,
    /// Hashes of evidence that others can run again.
    pub evidence: Vec<ContentHash>,
}

impl Record for Attestation {
    const DOMAIN: Domain = Domain::Attestation;
    const ENVELOPE_BYTES_MAX: usize = 4 << 10;
    const LIFE_MS_MAX: u64 = 7 * DAY_MS;

    fn head(&self) -> &RecordHead {
        &self.head
    }

    fn is_within_limits(&self) -> bool {
        self.subject != self.head.node
            && self.from_ms <= self.until_ms
            && self.until_ms <= self.head.issued_ms
            && self.evidence.len() <= EVIDENCE_MAX
    }
}
