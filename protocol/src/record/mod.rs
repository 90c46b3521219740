//! Records: signed, expiring statements of nodes about themselves, what they have measured and each other. `docs/records.md` draws the bytes.
//!
//! Keeps to the order of checks: what is cheap comes first, and nothing is decoded before its signature holds. Whether a record is true,
//! `trust` and replays find out.

mod attestation;
pub mod book;
mod head;
mod node_record;
mod profile_head;
pub mod rate;

pub use self::attestation::{Attestation, EVIDENCE_MAX, Facet, attest_every_ms};
pub use self::head::{RECORD_VERSION, Record, RecordHead, SEQ_REVOKED, SKEW_MS};
pub use self::node_record::{ADDRESSES_MAX, MODELS_MAX, NodeRecord};
pub use self::profile_head::{DomainSummary, ProfileHead, SUMMARY_DOMAINS_MAX, is_domain_name};
use crate::envelope::{EnvelopeError, SignedEnvelope};
use crate::identity::{NodeId, NodeKey};

/// Why an envelope is not a record that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// More bytes than a record of its kind has.
    #[error("record is longer than its kind may be")]
    Length,
    /// Its sender or its signer has sent too much lately.
    #[error("too many records lately")]
    Rate,
    /// Not an envelope of our domain with a signature that holds.
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    /// It does not decode within its limits.
    #[error("record does not decode")]
    Decode,
    /// It decodes, but to what would be written otherwise.
    #[error("record is not in canonical form")]
    NotCanonical,
    /// It is signed by another node than it names.
    #[error("record is signed by another node than it names")]
    Signer,
    /// A version that this program does not know.
    #[error("record has version {0}, this program knows version {RECORD_VERSION}")]
    Version(u16),
    /// From the future, expired, or longer-lived than its kind may be.
    #[error("record does not hold now")]
    Times {
        /// Who signed it.
        node: NodeId,
        /// When it was issued, by that node's clock.
        issued_ms: u64,
    },
    /// Not newer than what is known.
    #[error("record is not newer than what is known")]
    Seq,
    /// The same sequence number as what is known, and other bytes: the signer says two things.
    #[error("{0} has said something else under the same sequence number")]
    Equivocation(NodeId),
    /// About a model or by probes that are not known here.
    #[error("record is about a model or by probes that are not known here")]
    Unknown,
    /// No room, and nothing to give up for it.
    #[error("no room for more records")]
    Full,
}

impl Refused {
    /// Whether whoever handed it on cannot have checked it.
    pub fn is_forgery(self) -> bool {
        match self {
            Self::Length | Self::Envelope(_) | Self::Decode | Self::NotCanonical | Self::Signer => true,
            Self::Rate | Self::Version(_) | Self::Times { .. } | Self::Seq | Self::Equivocation(_) | Self::Unknown | Self::Full => false,
        }
    }
}

/// A record whose signature, form and times have been checked, with the bytes it came in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Verified<R> {
    record: R,
    envelope: SignedEnvelope,
}

impl<R: Record> Verified<R> {
    /// Signs a record of our own.
    pub fn seal(key: &NodeKey, record: R) -> Self {
        let envelope = SignedEnvelope::seal(key, R::DOMAIN, &crate::codec::to_bytes(&record));
        Self { record, envelope }
    }

    /// Checks an envelope, all but its rate and what is known of others: checks 1 and 3 to 9.
    pub fn open(now_ms: u64, bytes: Vec<u8>) -> Result<Self, Refused> {
        if bytes.len() > R::ENVELOPE_BYTES_MAX {
            return Err(Refused::Length);
        }
        let envelope = SignedEnvelope::open(R::DOMAIN, bytes)?;
        let version = envelope.payload().first_chunk().map_or(RECORD_VERSION, |version| u16::from_le_bytes(*version));
        let of_other_version = |refused| if version == RECORD_VERSION { refused } else { Refused::Version(version) };
        let record: R = match crate::codec::from_bytes(envelope.payload()) {
            Ok(record) => record,
            Err(crate::codec::CodecError::NotCanonical) => return Err(of_other_version(Refused::NotCanonical)),
            Err(crate::codec::CodecError::Malformed(_)) => return Err(of_other_version(Refused::Decode)),
        };
        if !record.is_within_limits() {
            return Err(of_other_version(Refused::Decode));
        }
        let head = record.head();
        if head.node != envelope.signer() {
            return Err(Refused::Signer);
        }
        if version != RECORD_VERSION {
            return Err(Refused::Version(version));
        }
        if !holds(head, now_ms, R::LIFE_MS_MAX) {
            return Err(Refused::Times { node: head.node, issued_ms: head.issued_ms });
        }
        Ok(Self { record, envelope })
    }

    /// What it says.
    pub fn record(&self) -> &R {
        &self.record
    }

    /// The bytes it came in.
    pub fn as_bytes(&self) -> &[u8] {
        self.envelope.as_bytes()
    }

    /// Who says it.
    pub fn node(&self) -> NodeId {
        self.envelope.signer()
    }
}

/// Whether a record holds now, give or take how far clocks differ.
fn holds(head: &RecordHead, now_ms: u64, life_ms_max: u64) -> bool {
    head.issued_ms <= now_ms.saturating_add(SKEW_MS)
        && head.expires_ms.saturating_add(SKEW_MS) >= now_ms
        && head.expires_ms.checked_sub(head.issued_ms).is_some_and(|life| life <= life_ms_max)
}

#[cfg(test)]
mod tests;
