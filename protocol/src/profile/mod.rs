//! What experts are good at, as counts: the body of a profile. Counts add up, intervals follow from them, and none is no number.

pub mod lift;
mod probes;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

pub use self::probes::{DOMAINS_MAX, PROBE_BYTES_MAX, PROBES_MAX, ProbeSet, ProbeSetError};
use crate::hash::{ContentHash, ModelId};
use crate::manifest::ExpertSlot;
use crate::record::is_domain_name;

/// Most bytes of an encoded body.
pub const BODY_BYTES_MAX: usize = 8 << 20;
/// Most experts that are named as used together with one.
pub const COACTIVE_MAX: usize = 8;
/// Gate mass is counted in parts of this.
pub const GATE_UNIT: u64 = 1 << 16;
const BODY_VERSION: u16 = 1;

/// Kinds of input that tokens stand for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Modality {
    /// Text.
    Text = 0,
    /// Images.
    Image = 1,
    /// Sounds.
    Audio = 2,
}

impl Modality {
    /// All of them, by number.
    pub const ALL: [Self; 3] = [Self::Text, Self::Image, Self::Audio];

    /// Its name in files and on the wire of HTTP.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Image => "image",
            Self::Audio => "audio",
        }
    }
}

/// What a node has counted of a model's experts on a probe set.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ProfileBody {
    version: u16,
    /// The model.
    pub model: ModelId,
    /// The probe set's hash.
    pub probes: ContentHash,
    /// The probe set's domains, ascending by name.
    pub domains: Vec<DomainTotal>,
    /// Every routed expert, in the order of layers and experts.
    pub experts: Vec<ExpertCounts>,
}

/// What was read of a domain. Of probe p, n_p tokens were read.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DomainTotal {
    /// The domain's name.
    pub name: String,
    /// Probes.
    pub probes: u32,
    /// Σ n_p
    pub tokens: u64,
    /// Σ n_p²
    pub square_tokens: u64,
}

/// What an expert did.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ExpertCounts {
    /// Tokens that were routed to it.
    pub tokens: u64,
    /// Of those, by [`Modality`].
    pub modalities: [u64; 3],
    /// By domain, in the order of the body's.
    pub domains: Vec<DomainCounts>,
    /// Experts of its layer that were used for the same tokens most often, and how often.
    pub coactive: Vec<(u32, u32)>,
}

/// What an expert did in a domain. Of probe p, r_p of n_p tokens were routed to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct DomainCounts {
    /// Σ r_p
    pub routed: u32,
    /// The weights that the router gave it there, in parts of [`GATE_UNIT`], each rounded.
    pub gate_mass: u64,
    /// Σ r_p²
    pub square_routed: u32,
    /// Σ r_p·n_p
    pub cross: u32,
    /// Tokens that were computed again without it.
    pub trials: u32,
    /// Of those, tokens that became less likely.
    pub hits: u32,
}

/// Why bytes are not the body of a profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// Too many bytes, or they do not decode.
    #[error("body of the profile does not decode")]
    Malformed,
    /// A version that this program does not know.
    #[error("body of the profile has version {0}, this program knows version {BODY_VERSION}")]
    Version(u16),
    /// About another model, or by other probes.
    #[error("body of the profile is about something else")]
    Other,
    /// Domains or experts that the model or the probe set does not have.
    #[error("body of the profile has another shape than the model: {0}")]
    Shape(&'static str),
    /// Counts that cannot be.
    #[error("counts of {0} in the profile cannot be")]
    Counts(ExpertSlot),
}

impl ProfileBody {
    /// Nothing counted yet.
    pub fn new(model: ModelId, probes: ContentHash, domains: Vec<DomainTotal>, experts: usize) -> Self {
        let counts = ExpertCounts { domains: vec![DomainCounts::default(); domains.len()], ..ExpertCounts::default() };
        Self { version: BODY_VERSION, model, probes, domains, experts: vec![counts; experts] }
    }

    /// The canonical encoding.
    pub fn to_bytes(&self) -> Vec<u8> {
        crate::codec::to_bytes(self)
    }

    /// Reads the body of a profile of a model that has experts in `slots`: check 12, but for the hash.
    pub fn from_bytes(bytes: &[u8], (model, probes): (ModelId, ContentHash), slots: &[ExpertSlot]) -> Result<Self, BodyError> {
        if bytes.len() > BODY_BYTES_MAX {
            return Err(BodyError::Malformed);
        }
        let version = bytes.first_chunk().map_or(BODY_VERSION, |version| u16::from_le_bytes(*version));
        if version != BODY_VERSION {
            return Err(BodyError::Version(version));
        }
        let body: Self = crate::codec::from_bytes(bytes).map_err(|_| BodyError::Malformed)?;
        if (body.model, body.probes) != (model, probes) {
            return Err(BodyError::Other);
        }
        body.check(slots)?;
        Ok(body)
    }

    fn check(&self, slots: &[ExpertSlot]) -> Result<(), BodyError> {
        let names = self.domains.iter().all(|domain| is_domain_name(&domain.name));
        if self.domains.is_empty() || self.domains.len() > DOMAINS_MAX || !names || !self.domains.is_sorted_by(|a, b| a.name < b.name) {
            return Err(BodyError::Shape("domains"));
        }
        if self.experts.len() != slots.len() {
            return Err(BodyError::Shape("number of experts"));
        }
        let experts = slots.iter().map(|slot| slot.expert + 1).max().unwrap_or(0);
        let impossible = slots.iter().zip(&self.experts).find(|(slot, counts)| !self.can_be(**slot, counts, experts));
        impossible.map_or(Ok(()), |(slot, _)| Err(BodyError::Counts(*slot)))
    }

    fn can_be(&self, slot: ExpertSlot, counts: &ExpertCounts, experts: u32) -> bool {
        let in_domain = |(total, of): (&DomainTotal, &DomainCounts)| {
            of.hits <= of.trials
                && of.trials <= of.routed
                && u64::from(of.routed) <= total.tokens
                && of.gate_mass <= u64::from(of.routed) * GATE_UNIT
        };
        let coactive = |(expert, count): &(u32, u32)| *expert < experts && *expert != slot.expert && *count > 0;
        counts.domains.len() == self.domains.len()
            && self.domains.iter().zip(&counts.domains).all(in_domain)
            && sum(counts.domains.iter().map(|of| u64::from(of.routed))) == Some(counts.tokens)
            && sum(counts.modalities.iter().copied()) == Some(counts.tokens)
            && counts.coactive.len() <= COACTIVE_MAX
            && counts.coactive.iter().all(|pair| coactive(pair) && u64::from(pair.1) <= counts.tokens)
            && counts.coactive.is_sorted_by(|a, b| (b.1, a.0) < (a.1, b.0))
            && counts.coactive.iter().map(|(expert, _)| expert).collect::<BTreeSet<_>>().len() == counts.coactive.len()
    }

    /// The number of a domain.
    pub fn domain(&self, name: &str) -> Option<usize> {
        self.domains.iter().position(|domain| domain.name == name)
    }
}

/// A sum, unless it is too large: then it is nobody's count.
fn sum(mut numbers: impl Iterator<Item = u64>) -> Option<u64> {
    numbers.try_fold(0, u64::checked_add)
}
