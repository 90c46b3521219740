//! What a tensor of a checkpoint is for. How a family spells names is in [`families`](super::families).

use std::borrow::Cow;
use std::collections::HashMap;

use protocol::decoder::Head;
use protocol::manifest::PartConfig;
use protocol::{Decoder, ExpertSlot, PartKind};

use super::families::{Family, Name};

/// One of the three matrices of an expert. `gate_proj` is SwiGLU's; the router's `mlp.gate` belongs to the trunk.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Projection {
    /// (intermediate_size, hidden_size)
    Gate,
    /// (intermediate_size, hidden_size)
    Up,
    /// (hidden_size, intermediate_size)
    Down,
}

/// What a tensor is for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TensorUse {
    /// The n-th tensor of the n-th part's [`tensors`](PartConfig::tensors).
    Trunk(usize, usize),
    /// One matrix of one expert: transformers 4 and every published checkpoint.
    Expert(ExpertSlot, Projection),
    /// `gate_proj` and `up_proj` of a layer's experts, (experts, 2 × intermediate_size, hidden_size): transformers 5.
    FusedGateUp(PartKind, u32),
    /// `down_proj` of a layer's experts, (experts, hidden_size, intermediate_size).
    FusedDown(PartKind, u32),
    /// The head of a model whose head is its embedding table: must be a copy of that.
    TiedHead,
    /// A part that the text model does not use, left out by rule.
    Skipped(&'static str),
    /// Nothing that a model of this configuration has.
    Unexpected,
}

/// Gives names their roles in a checkpoint of one configuration.
pub struct Names {
    family: &'static Family,
    parts: Vec<PartConfig>,
    trunk: HashMap<(PartKind, String), (usize, usize)>,
}

impl Names {
    /// Prepares for checkpoints of these parts.
    pub fn new(parts: &[PartConfig], family: &'static Family) -> Self {
        let mut trunk = HashMap::new();
        for (number, part) in parts.iter().enumerate() {
            let specs = part.tensors().into_iter().enumerate();
            trunk.extend(specs.map(|(i, spec)| ((part.kind(), spec.role.to_string()), (number, i))));
        }
        Self { family, parts: parts.to_vec(), trunk }
    }

    /// The part that the tensor `name` belongs to and what most families call it there; nothing where it is left out, or no tensor at all.
    pub fn usual<'a>(&self, name: &'a str) -> Option<(PartKind, Cow<'a, str>)> {
        match (self.family.name)(name) {
            Name::Usual(part, name) => Some((part, name)),
            Name::Skipped(_) | Name::Unexpected => None,
        }
    }

    /// The name of a part's tensor in this checkpoint.
    pub fn spell(&self, part: PartKind, usual: &str) -> String {
        (self.family.spell)(part, usual)
    }

    /// Returns what `name` is for.
    pub fn role(&self, name: &str) -> TensorUse {
        let (kind, name) = match (self.family.name)(name) {
            Name::Usual(part, name) => (part, name.into_owned()),
            Name::Skipped(part) => return TensorUse::Skipped(part),
            Name::Unexpected => return TensorUse::Unexpected,
        };
        // The configuration says that the part is not used.
        let Some(part) = self.parts.iter().find(|part| part.kind() == kind) else { return TensorUse::Skipped(kind.name()) };
        let key = (kind, name);
        if let Some(&(number, index)) = self.trunk.get(&key) {
            return TensorUse::Trunk(number, index);
        }
        let (kind, name) = key;
        let Some(decoder) = part.decoder() else { return TensorUse::Unexpected };
        if name == "lm_head.weight" && decoder.head == Head::Embedding {
            return TensorUse::TiedHead;
        }
        expert_role(kind, decoder, &name).unwrap_or(TensorUse::Unexpected)
    }
}

fn expert_role(part: PartKind, decoder: &Decoder, name: &str) -> Option<TensorUse> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once(".mlp.experts.")?;
    let layer = number(layer).filter(|&layer| decoder.is_moe(layer))?;
    match rest {
        "gate_up_proj" => return Some(TensorUse::FusedGateUp(part, layer)),
        "down_proj" => return Some(TensorUse::FusedDown(part, layer)),
        _ => {}
    }
    let (expert, projection) = rest.split_once('.')?;
    let expert = number(expert).filter(|&expert| expert < decoder.experts())?;
    let projection = match projection {
        "gate_proj.weight" => Projection::Gate,
        "up_proj.weight" => Projection::Up,
        "down_proj.weight" => Projection::Down,
        _ => return None,
    };
    Some(TensorUse::Expert(ExpertSlot { part, layer, expert }, projection))
}

/// A decimal number without sign or leading zeros: `01` would be a second name for the same tensor.
fn number(text: &str) -> Option<u32> {
    let number: u32 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}
