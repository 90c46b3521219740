//! Everything that an atlas says, as numbers.

use serde::Serialize;

use super::caches::CacheRow;
use super::counts::{LayerFigures, SpecialistsFound};
use super::routers::RouterFigures;
use super::statistics::{Agreement, Figure};

/// Experts that a domain ranks first, which are left out together.
pub(super) const RANKED_FIRST: usize = 10;

/// A model by its name.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Named {
    pub(super) name: String,
    pub(super) id: String,
}

/// Everything that was measured.
#[derive(Serialize)]
pub(super) struct Atlas {
    pub(super) version: u32,
    pub(super) model: Named,
    pub(super) seed: u64,
    /// Hash of the probes that were read.
    pub(super) probes: String,
    pub(super) domains: Vec<String>,
    /// Those of them that have neither pictures nor sounds.
    pub(super) text_domains: Vec<String>,
    /// Items that were read, and those that changes were tried on: every other of a domain, so that nothing is tried where it was chosen.
    pub(super) items: usize,
    pub(super) items_tried: usize,
    /// What input is sorted by.
    pub(super) labels: Vec<String>,
    pub(super) by_modality: bool,
    pub(super) routers: Vec<RouterFigures>,
    /// How far the routers' clusters agree with the label that each expert serves most.
    pub(super) router_agreement: Agreement,
    /// The same of clusters of experts that are used for the same tokens.
    pub(super) coactive_agreement: Agreement,
    pub(super) layers: Vec<LayerFigures>,
    /// Mean over layers of the mutual information of expert and label, in bits.
    pub(super) information: Figure,
    /// Divergence of domains within a modality, and of modalities.
    pub(super) within_and_between: Option<[Figure; 2]>,
    pub(super) experts: Vec<ExpertRow>,
    pub(super) specialists: Vec<SpecialistsFound>,
    /// Loss of the model as it is by domain, in nats a token that is scored.
    pub(super) losses: Vec<Figure>,
    pub(super) changes: Vec<ChangeRow>,
    /// Text that has no pictures or sounds: the share of its uses of experts that are specialists of those.
    pub(super) foreign_use: Option<Figure>,
    /// A memory for a fifth of the experts, when requests of each label take turns.
    pub(super) caches: Vec<CacheRow>,
    pub(super) untrained: Option<Compared>,
    pub(super) checkpoints: Vec<Compared>,
    pub(super) answers: Vec<Answer>,
}

/// An expert.
#[derive(Clone, Debug, Serialize)]
pub(super) struct ExpertRow {
    pub(super) layer: u32,
    pub(super) expert: u32,
    /// Of all uses of its layer, the share that is its.
    pub(super) use_share: f64,
    /// By label, its share of that label's uses in its layer.
    pub(super) by_label: Vec<f64>,
    pub(super) role: Role,
    /// The label it is a specialist of, with its lift there on the items it was not chosen by: value, and what it surely exceeds.
    pub(super) special: Option<(String, [f64; 2])>,
}

/// What an expert may be called.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Role {
    /// Used twice as often for one label as for all on one half of the items, and surely more often on the other half.
    Specialised,
    /// Its use surely differs by less than twice from the mean, for every label.
    Universal,
    /// Less than a quarter of what it would have if all were used alike.
    RarelyUsed,
    /// Neither can be said.
    Undecided,
}

impl Role {
    pub(super) const ALL: [Self; 4] = [Self::Specialised, Self::Universal, Self::RarelyUsed, Self::Undecided];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Specialised => "specialised",
            Self::Universal => "universal",
            Self::RarelyUsed => "rarely used",
            Self::Undecided => "undecided",
        }
    }
}

/// What came of a change.
#[derive(Clone, Debug, Serialize)]
pub(super) struct ChangeRow {
    pub(super) name: String,
    /// Experts that were left out or narrowed.
    pub(super) experts: usize,
    /// Rise of the loss by domain, in nats a token.
    pub(super) rises: Vec<Figure>,
    /// Of all items together.
    pub(super) rise: Figure,
}

/// Another state of the model, on the same items.
#[derive(Serialize)]
pub(super) struct Compared {
    pub(super) model: Named,
    pub(super) information: Figure,
    pub(super) layers: Vec<LayerFigures>,
    /// Loss by domain, in nats a token.
    pub(super) losses: Vec<Figure>,
}

/// The answer to a question.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Answer {
    pub(super) number: u32,
    pub(super) question: String,
    #[serde(rename = "answer")]
    pub(super) text: String,
    /// What it follows from, each with its numbers.
    pub(super) figures: Vec<(String, String)>,
    /// Names of the pictures that show it.
    pub(super) pictures: Vec<&'static str>,
    pub(super) refuted_by: String,
}
