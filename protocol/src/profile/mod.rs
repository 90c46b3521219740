//! What experts are good at, as counts: the body of a profile. Counts add up, intervals follow from them, and none is no number.

pub mod lift;
mod probes;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

pub use self::probes::{DOMAINS_MAX, PROBE_BYTES_MAX, PROBES_MAX, Probe, ProbeMedium, ProbePart, ProbeSet, ProbeSetError};
use crate::hash::{ContentHash, ModelId};
use crate::manifest::ExpertSlot;
use crate::record::is_domain_name;

/// Most bytes of an encoded body.
pub const BODY_BYTES_MAX: usize = 8 << 20;
/// Most experts that are named as used together with one.
pub const COACTIVE_MAX: usize = 8;
/// Gate mass is counted in parts of this.
pub const GATE_UNIT: u64 = 1 << 16;
/// The version of a body about text alone, …
const TEXT_VERSION: u16 = 1;
/// … and of one about other modalities, too.
const BODY_VERSION: u16 = 2;

/// Kinds of input that tokens stand for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
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

    /// The one of a name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|modality| modality.name() == name)
    }
}

impl Serialize for Modality {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u8(*self as u8)
    }
}

impl<'de> Deserialize<'de> for Modality {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = u8::deserialize(deserializer)?;
        Self::ALL.get(usize::from(number)).copied().ok_or_else(|| serde::de::Error::custom("no modality has that number"))
    }
}

/// What a node has counted of a model's experts on a probe set.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProfileBody {
    /// The model.
    pub model: ModelId,
    /// The probe set's hash.
    pub probes: ContentHash,
    /// The probe set's domains, one for each modality of its tokens, ascending by name and modality.
    pub domains: Vec<DomainTotal>,
    /// Every routed expert, in the order of layers and experts.
    pub experts: Vec<ExpertCounts>,
}

/// A body as it is written: domains differ by version.
#[derive(Serialize, Deserialize)]
struct WrittenBody<D> {
    version: u16,
    model: ModelId,
    probes: ContentHash,
    domains: Vec<D>,
    experts: Vec<ExpertCounts>,
}

/// What was read of a domain's tokens of one modality. Of probe p, n_p tokens were read.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DomainTotal {
    /// The domain's name.
    pub name: String,
    /// What the tokens stand for.
    pub modality: Modality,
    /// Probes.
    pub probes: u32,
    /// Σ n_p
    pub tokens: u64,
    /// Σ n_p²
    pub square_tokens: u64,
}

/// The same in version 1, which is about text alone.
#[derive(Serialize, Deserialize)]
struct TextTotal {
    name: String,
    probes: u32,
    tokens: u64,
    square_tokens: u64,
}

impl From<TextTotal> for DomainTotal {
    fn from(TextTotal { name, probes, tokens, square_tokens }: TextTotal) -> Self {
        Self { name, modality: Modality::Text, probes, tokens, square_tokens }
    }
}

impl From<DomainTotal> for TextTotal {
    fn from(DomainTotal { name, probes, tokens, square_tokens, .. }: DomainTotal) -> Self {
        Self { name, probes, tokens, square_tokens }
    }
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
        Self { model, probes, domains, experts: vec![counts; experts] }
    }

    /// The canonical encoding: what is about text alone is written as version 1.
    pub fn to_bytes(&self) -> Vec<u8> {
        let Self { model, probes, domains, experts } = self.clone();
        if self.is_of_text() {
            let domains = domains.into_iter().map(TextTotal::from).collect();
            return crate::codec::to_bytes(&WrittenBody { version: TEXT_VERSION, model, probes, domains, experts });
        }
        crate::codec::to_bytes(&WrittenBody { version: BODY_VERSION, model, probes, domains, experts })
    }

    /// Reads the body of a profile of a model that has experts in `slots`: check 12, but for the hash.
    pub fn from_bytes(bytes: &[u8], (model, probes): (ModelId, ContentHash), slots: &[ExpertSlot]) -> Result<Self, BodyError> {
        if bytes.len() > BODY_BYTES_MAX {
            return Err(BodyError::Malformed);
        }
        let body = match bytes.first_chunk().map_or(BODY_VERSION, |version| u16::from_le_bytes(*version)) {
            TEXT_VERSION => Self::read::<TextTotal>(bytes)?,
            BODY_VERSION => Self::read::<DomainTotal>(bytes)?,
            version => return Err(BodyError::Version(version)),
        };
        if (body.model, body.probes) != (model, probes) {
            return Err(BodyError::Other);
        }
        body.check(slots)?;
        Ok(body)
    }

    fn read<D: Serialize + serde::de::DeserializeOwned + Into<DomainTotal>>(bytes: &[u8]) -> Result<Self, BodyError> {
        let written: WrittenBody<D> = crate::codec::from_bytes(bytes).map_err(|_| BodyError::Malformed)?;
        let WrittenBody { version, model, probes, domains, experts } = written;
        let body = Self { model, probes, domains: domains.into_iter().map(Into::into).collect(), experts };
        // One body, one encoding.
        if body.is_of_text() == (version == TEXT_VERSION) { Ok(body) } else { Err(BodyError::Malformed) }
    }

    fn check(&self, slots: &[ExpertSlot]) -> Result<(), BodyError> {
        let names = self.domains.iter().all(|domain| is_domain_name(&domain.name));
        let ascend = self.domains.is_sorted_by(|a, b| (&a.name, a.modality) < (&b.name, b.modality));
        if self.domains.is_empty() || self.names().len() > DOMAINS_MAX || !names || !ascend {
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
        let of_modality = |modality: Modality| {
            let domains = self.domains.iter().zip(&counts.domains).filter(move |(total, _)| total.modality == modality);
            sum(domains.map(|(_, of)| u64::from(of.routed)))
        };
        let coactive = |(expert, count): &(u32, u32)| *expert < experts && *expert != slot.expert && *count > 0;
        counts.domains.len() == self.domains.len()
            && self.domains.iter().zip(&counts.domains).all(in_domain)
            && sum(counts.domains.iter().map(|of| u64::from(of.routed))) == Some(counts.tokens)
            && sum(counts.modalities.iter().copied()) == Some(counts.tokens)
            && (self.is_of_text()
                || Modality::ALL.into_iter().all(|modality| of_modality(modality) == Some(counts.modalities[modality as usize])))
            && counts.coactive.len() <= COACTIVE_MAX
            && counts.coactive.iter().all(|pair| coactive(pair) && u64::from(pair.1) <= counts.tokens)
            && counts.coactive.is_sorted_by(|a, b| (b.1, a.0) < (a.1, b.0))
            && counts.coactive.iter().map(|(expert, _)| expert).collect::<BTreeSet<_>>().len() == counts.coactive.len()
    }

    /// Whether its domains are of text alone: then version 1 writes it, which says of modalities what it will.
    fn is_of_text(&self) -> bool {
        self.domains.iter().all(|domain| domain.modality == Modality::Text)
    }

    /// The names of its domains, ascending.
    pub fn names(&self) -> BTreeSet<&str> {
        self.domains.iter().map(|domain| domain.name.as_str()).collect()
    }

    /// What people see of the domain of a number: its name, and the modality where it has several.
    pub fn label(&self, number: usize) -> String {
        let of = &self.domains[number];
        let several = self.domains.iter().filter(|other| other.name == of.name).count() > 1;
        if several { format!("{}/{}", of.name, of.modality.name()) } else { of.name.clone() }
    }

    /// The number of a domain: of its tokens that are not text where it has such, and of the more frequent ones.
    pub fn domain(&self, name: &str) -> Option<usize> {
        let named = self.domains.iter().enumerate().filter(|(_, domain)| domain.name == name);
        named.max_by_key(|(number, domain)| (domain.modality != Modality::Text, domain.tokens, std::cmp::Reverse(*number))).map(|(n, _)| n)
    }

    /// The number of a domain's tokens of one modality.
    pub fn domain_of(&self, name: &str, modality: Modality) -> Option<usize> {
        self.domains.iter().position(|domain| domain.name == name && domain.modality == modality)
    }

    /// The same counts with the modalities as domains, by their names: what all domains' tokens of a modality come to.
    #[must_use]
    pub fn by_modality(&self) -> Self {
        let numbers_of = |modality: Modality| (0..self.domains.len()).filter(move |&number| self.domains[number].modality == modality);
        let mut present: Vec<_> = Modality::ALL.into_iter().filter(|&modality| numbers_of(modality).next().is_some()).collect();
        present.sort_by_key(|modality| modality.name());
        let total = |&modality: &Modality| {
            let none = DomainTotal { name: modality.name().to_owned(), modality, probes: 0, tokens: 0, square_tokens: 0 };
            numbers_of(modality).map(|number| &self.domains[number]).fold(none, |all, one| DomainTotal {
                probes: all.probes.saturating_add(one.probes),
                tokens: all.tokens.saturating_add(one.tokens),
                square_tokens: all.square_tokens.saturating_add(one.square_tokens),
                ..all
            })
        };
        let counts = |counts: &ExpertCounts| {
            let of = |&modality: &Modality| numbers_of(modality).map(|number| counts.domains[number]).fold(DomainCounts::default(), plus);
            ExpertCounts { domains: present.iter().map(of).collect(), ..counts.clone() }
        };
        let (domains, experts) = (present.iter().map(total).collect(), self.experts.iter().map(counts).collect());
        Self { model: self.model, probes: self.probes, domains, experts }
    }
}

/// What an expert did in two domains whose probes are different ones.
fn plus(a: DomainCounts, b: DomainCounts) -> DomainCounts {
    DomainCounts {
        routed: a.routed.saturating_add(b.routed),
        gate_mass: a.gate_mass.saturating_add(b.gate_mass),
        square_routed: a.square_routed.saturating_add(b.square_routed),
        cross: a.cross.saturating_add(b.cross),
        trials: a.trials.saturating_add(b.trials),
        hits: a.hits.saturating_add(b.hits),
    }
}

/// A sum, unless it is too large: then it is nobody's count.
fn sum(mut numbers: impl Iterator<Item = u64>) -> Option<u64> {
    numbers.try_fold(0, u64::checked_add)
}
