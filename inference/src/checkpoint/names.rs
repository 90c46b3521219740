//! What a tensor of a checkpoint is for. How a family spells names is in [`families`](super::families).

use std::borrow::Cow;
use std::collections::HashMap;

use protocol::decoder::Head;
use protocol::{Decoder, ExpertSlot};

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
pub enum Role {
    /// The n-th tensor of [`Decoder::tensors`].
    Trunk(usize),
    /// One matrix of one expert: transformers 4 and every published checkpoint.
    Expert(ExpertSlot, Projection),
    /// `gate_proj` and `up_proj` of a layer's experts, (experts, 2 × intermediate_size, hidden_size): transformers 5.
    FusedGateUp(u32),
    /// `down_proj` of a layer's experts, (experts, hidden_size, intermediate_size).
    FusedDown(u32),
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
    decoder: Decoder,
    trunk: HashMap<String, usize>,
}

impl Names {
    /// Prepares for checkpoints of `decoder`.
    pub fn new(decoder: &Decoder, family: &'static Family) -> Self {
        let trunk = decoder.tensors().into_iter().enumerate().map(|(i, spec)| (spec.role.to_string(), i)).collect();
        Self { family, decoder: decoder.clone(), trunk }
    }

    /// What most families call the tensor `name`; nothing where it is left out, or no tensor at all.
    pub fn usual<'a>(&self, name: &'a str) -> Option<Cow<'a, str>> {
        match (self.family.name)(name) {
            Name::Usual(name) => Some(name),
            Name::Skipped(_) | Name::Unexpected => None,
        }
    }

    /// Returns what `name` is for.
    pub fn role(&self, name: &str) -> Role {
        let name = match (self.family.name)(name) {
            Name::Usual(name) => name,
            Name::Skipped(part) => return Role::Skipped(part),
            Name::Unexpected => return Role::Unexpected,
        };
        if let Some(&index) = self.trunk.get(&*name) {
            return Role::Trunk(index);
        }
        if name == "lm_head.weight" && self.decoder.head == Head::Embedding {
            return Role::TiedHead;
        }
        self.expert_role(&name).unwrap_or(Role::Unexpected)
    }

    fn expert_role(&self, name: &str) -> Option<Role> {
        let (layer, rest) = name.strip_prefix("model.layers.")?.split_once(".mlp.experts.")?;
        let layer = number(layer).filter(|&layer| self.decoder.is_moe(layer))?;
        match rest {
            "gate_up_proj" => return Some(Role::FusedGateUp(layer)),
            "down_proj" => return Some(Role::FusedDown(layer)),
            _ => {}
        }
        let (expert, projection) = rest.split_once('.')?;
        let expert = number(expert).filter(|&expert| expert < self.decoder.experts())?;
        let projection = match projection {
            "gate_proj.weight" => Projection::Gate,
            "up_proj.weight" => Projection::Up,
            "down_proj.weight" => Projection::Down,
            _ => return None,
        };
        Some(Role::Expert(ExpertSlot::text(layer, expert), projection))
    }
}

/// A decimal number without sign or leading zeros: `01` would be a second name for the same tensor.
fn number(text: &str) -> Option<u32> {
    let number: u32 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}
