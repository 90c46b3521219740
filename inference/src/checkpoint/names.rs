//! What a tensor's name in a published checkpoint means. The only file that knows how checkpoints spell names.

use std::collections::HashMap;

use protocol::{ExpertSlot, ModelConfig};

use crate::config::Family;

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
    /// The n-th tensor of [`ModelConfig::trunk_tensors`].
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
    family: Family,
    config: ModelConfig,
    trunk: HashMap<String, usize>,
}

impl Names {
    /// Prepares for checkpoints of `config`.
    pub fn new(config: &ModelConfig, family: Family) -> Self {
        let trunk = config.trunk_tensors().into_iter().enumerate().map(|(i, spec)| (spec.name, i)).collect();
        Self { family, config: config.clone(), trunk }
    }

    /// Returns what `name` is for.
    pub fn role(&self, name: &str) -> Role {
        if let Some(part) = self.skipped_part(name) {
            return Role::Skipped(part);
        }
        let name = match (self.family, name.strip_prefix("thinker.")) {
            (Family::Omni, Some(rest)) => rest,
            (Family::Omni, None) | (Family::Text | Family::Mixtral | Family::Thinker, Some(_)) => return Role::Unexpected,
            (Family::Text | Family::Mixtral | Family::Thinker, None) => name,
        };
        let own;
        let name = if self.family == Family::Mixtral {
            let Some(name) = from_mixtral(name) else { return Role::Unexpected };
            own = name;
            &own
        } else {
            name
        };
        if let Some(&index) = self.trunk.get(name) {
            return Role::Trunk(index);
        }
        if name == "lm_head.weight" && self.config.tie_word_embeddings {
            return Role::TiedHead;
        }
        self.expert_role(name).unwrap_or(Role::Unexpected)
    }

    fn skipped_part(&self, name: &str) -> Option<&'static str> {
        if name.ends_with("rotary_emb.inv_freq") {
            return Some("RoPE frequencies, which follow from the configuration");
        }
        if matches!(self.family, Family::Text | Family::Mixtral) {
            return None;
        }
        let inner = name.strip_prefix("thinker.").unwrap_or(name);
        let parts = [
            (inner, "visual.", "vision tower"),
            (inner, "audio_tower.", "audio tower"),
            (name, "talker.", "talker"),
            (name, "code2wav.", "code2wav"),
        ];
        let whole = self.family == Family::Omni;
        parts
            .into_iter()
            .find(|(name, prefix, _)| name.starts_with(prefix) && (whole || prefix.ends_with("tower.") || *prefix == "visual."))
            .map(|part| part.2)
    }

    fn expert_role(&self, name: &str) -> Option<Role> {
        let (layer, rest) = name.strip_prefix("model.layers.")?.split_once(".mlp.experts.")?;
        let layer = number(layer).filter(|&layer| layer < self.config.num_hidden_layers && self.config.is_moe(layer))?;
        match rest {
            "gate_up_proj" => return Some(Role::FusedGateUp(layer)),
            "down_proj" => return Some(Role::FusedDown(layer)),
            _ => {}
        }
        let (expert, projection) = rest.split_once('.')?;
        let expert = number(expert).filter(|&expert| expert < self.config.num_experts)?;
        let projection = match projection {
            "gate_proj.weight" => Projection::Gate,
            "up_proj.weight" => Projection::Up,
            "down_proj.weight" => Projection::Down,
            _ => return None,
        };
        Some(Role::Expert(ExpertSlot { layer, expert }, projection))
    }
}

/// Mixtral's word for a tensor in Qwen3-MoE's words; a name in those words is none of Mixtral's.
fn from_mixtral(name: &str) -> Option<String> {
    if name.contains(".mlp.") {
        return None;
    }
    let Some((layer, rest)) = name.split_once(".block_sparse_moe.") else { return Some(name.to_owned()) };
    let rest = match rest.split_once(".w") {
        Some((expert, "1.weight")) => format!("{expert}.gate_proj.weight"),
        Some((expert, "3.weight")) => format!("{expert}.up_proj.weight"),
        Some((expert, "2.weight")) => format!("{expert}.down_proj.weight"),
        _ => rest.to_owned(),
    };
    Some(format!("{layer}.mlp.{rest}"))
}

/// A decimal number without sign or leading zeros: `01` would be a second name for the same tensor.
fn number(text: &str) -> Option<u32> {
    let number: u32 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}
