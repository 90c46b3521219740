//! The head of a node's expert profile of a model: small enough to be gossiped, it names the body by hash.

use serde::{Deserialize, Serialize};

use super::head::{Record, RecordHead};
use crate::envelope::Domain;
use crate::hash::{BlobRef, ContentHash, ModelId};

/// Most domains that a head sums up.
pub const SUMMARY_DOMAINS_MAX: usize = 32;
const DOMAIN_NAME_BYTES_MAX: usize = 32;
const HOUR_MS: u64 = 3_600_000;

/// What a node has measured of a model's experts.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ProfileHead {
    /// Version, node, sequence and times.
    pub head: RecordHead,
    /// The model.
    pub model: ModelId,
    /// The probe set's hash.
    pub probes: ContentHash,
    /// Hash of the name of the arithmetic.
    pub build_profile: ContentHash,
    /// The [`ProfileBody`](crate::profile::ProfileBody).
    pub body: BlobRef,
    /// What it comes to, by domain, ascending by name.
    pub summary: Vec<DomainSummary>,
}

/// What a profile says of a domain.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DomainSummary {
    /// The domain's name.
    pub domain: String,
    /// Experts that are called its specialists.
    pub experts: u32,
    /// Trials of all experts in it, …
    pub trials: u64,
    /// … and in how many the expert was found to help.
    pub hits: u64,
}

/// Whether a text may be the name of a domain: 1 to 32 lower-case letters, digits and underscores.
pub fn is_domain_name(name: &str) -> bool {
    let fine = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    (1..=DOMAIN_NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(fine)
}

impl Record for ProfileHead {
    const DOMAIN: Domain = Domain::Profile;
    const ENVELOPE_BYTES_MAX: usize = 10 << 10;
    const LIFE_MS_MAX: u64 = 48 * HOUR_MS;

    fn head(&self) -> &RecordHead {
        &self.head
    }

    fn is_within_limits(&self) -> bool {
        self.summary.len() <= SUMMARY_DOMAINS_MAX
            && self.summary.is_sorted_by(|a, b| a.domain < b.domain)
            && self.summary.iter().all(|of| is_domain_name(&of.domain) && of.hits <= of.trials)
    }
}
