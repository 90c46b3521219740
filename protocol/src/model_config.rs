//! A model's shape in one normal form: names and meanings are those of `config.json`, spellings are gone.
//!
//! Knows which tensors such a model has. Does not read JSON: `inference` does.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use crate::expert_blob::{ExpertShape, SIDE_MAX};
use crate::manifest::ExpertSlot;
use crate::precision::Precision;

/// The text path of a Qwen3-MoE, of a Qwen3-Omni thinker, or of a Mixtral.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Tokens that have an embedding.
    pub vocab_size: u32,
    /// Length of the vectors that pass from layer to layer.
    pub hidden_size: u32,
    /// Transformer layers.
    pub num_hidden_layers: u32,
    /// Query heads.
    pub num_attention_heads: u32,
    /// Key and value heads; each serves as many query heads.
    pub num_key_value_heads: u32,
    /// Length of a head's vectors; heads × head_dim need not be hidden_size.
    pub head_dim: u32,
    /// Routed experts of each MoE layer.
    pub num_experts: u32,
    /// How many of them a token uses.
    pub num_experts_per_tok: u32,
    /// Length of the vectors inside an expert.
    pub moe_intermediate_size: u32,
    /// The same inside the feed-forward network of a dense layer; 0 when there is none.
    pub intermediate_size: u32,
    /// Layers without experts, ascending (`mlp_only_layers` and `decoder_sparse_step`, normalised).
    pub dense_layers: Vec<u32>,
    /// Whether each head's queries and keys are normed.
    pub qk_norm: bool,
    /// Whether the weights of the chosen experts are scaled to sum to 1.
    pub norm_topk_prob: bool,
    /// RoPE's base.
    pub rope_theta: f64,
    /// Frequency pairs for time, height and width, interleaved; nothing for plain RoPE.
    pub mrope_section: Option<[u32; 3]>,
    /// Added to a mean square before its root.
    pub rms_norm_eps: f64,
    /// Whether the head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Longest context the model was made for, in tokens.
    pub max_position_embeddings: u32,
}

/// A tensor of the trunk that a model must have.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TensorSpec {
    /// Its name in a text-only checkpoint.
    pub name: String,
    /// Its shape, outermost first.
    pub shape: Vec<u64>,
    /// Whether it may be packed: matrices may, routers may not.
    pub packable: bool,
}

impl TensorSpec {
    /// Rows and columns; a vector is one row.
    pub fn sides(&self) -> (usize, usize) {
        match self.shape[..] {
            [rows, columns] => (rows as usize, columns as usize),
            _ => (1, self.shape.iter().product::<u64>() as usize),
        }
    }

    /// Bytes of this tensor at `precision`; nothing where it cannot be written so.
    pub fn bytes(&self, precision: Precision) -> Option<u64> {
        let (rows, columns) = self.sides();
        (self.packable || !precision.is_packed()).then(|| precision.matrix_bytes(rows, columns) as u64)
    }
}

/// A value in a configuration that makes no sense or is beyond a limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value}: {rule}")]
pub struct ConfigError {
    /// The field's name in `config.json`.
    pub field: &'static str,
    /// The value, as text.
    pub value: String,
    /// What it must be.
    pub rule: String,
}

impl ModelConfig {
    /// Checks every field against its limits, so that no product of sizes overflows later.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let side = 1..=SIDE_MAX as u32;
        let fields: [(&'static str, u32, RangeInclusive<u32>); 11] = [
            ("vocab_size", self.vocab_size, 1..=1 << 22),
            ("hidden_size", self.hidden_size, side.clone()),
            ("num_hidden_layers", self.num_hidden_layers, 1..=1024),
            ("num_attention_heads", self.num_attention_heads, 1..=1024),
            ("num_key_value_heads", self.num_key_value_heads, 1..=1024),
            ("head_dim", self.head_dim, 2..=1024),
            ("num_experts", self.num_experts, 1..=4096),
            ("num_experts_per_tok", self.num_experts_per_tok, 1..=self.num_experts.max(1)),
            ("moe_intermediate_size", self.moe_intermediate_size, side.clone()),
            ("intermediate_size", self.intermediate_size, 0..=*side.end()),
            ("max_position_embeddings", self.max_position_embeddings, 1..=1 << 24),
        ];
        let error = |field, value: String, rule: &str| Err(ConfigError { field, value, rule: rule.to_owned() });
        for (field, value, range) in fields {
            if !range.contains(&value) {
                return error(field, value.to_string(), &format!("must be {} to {}", range.start(), range.end()));
            }
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return error("num_key_value_heads", self.num_key_value_heads.to_string(), "must divide num_attention_heads");
        }
        if !self.head_dim.is_multiple_of(2) {
            return error("head_dim", self.head_dim.to_string(), "must be even");
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 1.0) {
            return error("rope_theta", self.rope_theta.to_string(), "must be a number above 1");
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0 && self.rms_norm_eps < 1.0) {
            return error("rms_norm_eps", self.rms_norm_eps.to_string(), "must be a number from 0 to 1");
        }
        if let Some(section) = self.mrope_section
            && section.iter().map(|&s| u64::from(s)).sum::<u64>() != u64::from(self.head_dim / 2)
        {
            return error("mrope_section", format!("{section:?}"), "must sum to half of head_dim");
        }
        let ascending = self.dense_layers.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || self.dense_layers.last().is_some_and(|&layer| layer >= self.num_hidden_layers) {
            return error("mlp_only_layers", format!("{:?}", self.dense_layers), "must name layers that exist, once each");
        }
        if self.dense_layers.is_empty() != (self.intermediate_size == 0) {
            return error("intermediate_size", self.intermediate_size.to_string(), "must be 0 just when no layer is dense");
        }
        Ok(())
    }

    /// Says whether `layer` has experts.
    pub fn is_moe(&self, layer: u32) -> bool {
        self.dense_layers.binary_search(&layer).is_err()
    }

    /// The layers with experts, ascending.
    pub fn moe_layers(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.num_hidden_layers).filter(|&layer| self.is_moe(layer))
    }

    /// Every place that holds an expert, by layer, then by expert.
    pub fn expert_slots(&self) -> impl Iterator<Item = ExpertSlot> + '_ {
        self.moe_layers().flat_map(|layer| (0..self.num_experts).map(move |expert| ExpertSlot { layer, expert }))
    }

    /// The shape of this model's experts at `precision`.
    pub fn expert_shape(&self, precision: Precision) -> ExpertShape {
        ExpertShape { precision, hidden_size: self.hidden_size as usize, intermediate_size: self.moe_intermediate_size as usize }
    }

    /// The tensors of the trunk, in the order of a manifest: embeddings, layer by layer, final norm, head.
    pub fn trunk_tensors(&self) -> Vec<TensorSpec> {
        let [hidden, vocab, head_dim] = [self.hidden_size, self.vocab_size, self.head_dim].map(u64::from);
        let queries = u64::from(self.num_attention_heads) * head_dim;
        let keys = u64::from(self.num_key_value_heads) * head_dim;
        let (experts, dense) = (u64::from(self.num_experts), u64::from(self.intermediate_size));
        let mut tensors = Vec::new();
        let mut push = |name: String, shape: &[u64]| {
            let packable = shape.len() == 2 && !name.ends_with("mlp.gate.weight");
            tensors.push(TensorSpec { name, shape: shape.to_vec(), packable });
        };
        push("model.embed_tokens.weight".into(), &[vocab, hidden]);
        for layer in 0..self.num_hidden_layers {
            let mut tensor = |name: &str, shape: &[u64]| push(format!("model.layers.{layer}.{name}.weight"), shape);
            tensor("input_layernorm", &[hidden]);
            tensor("self_attn.q_proj", &[queries, hidden]);
            tensor("self_attn.k_proj", &[keys, hidden]);
            tensor("self_attn.v_proj", &[keys, hidden]);
            tensor("self_attn.o_proj", &[hidden, queries]);
            if self.qk_norm {
                tensor("self_attn.q_norm", &[head_dim]);
                tensor("self_attn.k_norm", &[head_dim]);
            }
            tensor("post_attention_layernorm", &[hidden]);
            if self.is_moe(layer) {
                tensor("mlp.gate", &[experts, hidden]);
            } else {
                tensor("mlp.gate_proj", &[dense, hidden]);
                tensor("mlp.up_proj", &[dense, hidden]);
                tensor("mlp.down_proj", &[hidden, dense]);
            }
        }
        push("model.norm.weight".into(), &[hidden]);
        if !self.tie_word_embeddings {
            push("lm_head.weight".into(), &[vocab, hidden]);
        }
        tensors
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn small() -> ModelConfig {
        ModelConfig {
            vocab_size: 32,
            hidden_size: 8,
            num_hidden_layers: 3,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 4,
            num_experts: 4,
            num_experts_per_tok: 2,
            moe_intermediate_size: 6,
            intermediate_size: 10,
            dense_layers: vec![1],
            qk_norm: true,
            norm_topk_prob: true,
            rope_theta: 1e4,
            mrope_section: None,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: true,
            max_position_embeddings: 64,
        }
    }

    #[test]
    fn names_every_slot_and_tensor_once() {
        let config = small();
        assert_eq!(config.validate(), Ok(()));
        assert_eq!(config.expert_slots().count(), 8);
        let mut names: Vec<_> = config.trunk_tensors().into_iter().map(|t| t.name).collect();
        assert_eq!(names.len(), 1 + 9 + 11 + 9 + 1);
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 31);
        assert_eq!(ModelConfig { qk_norm: false, ..config }.trunk_tensors().len(), 31 - 6);
    }

    #[test]
    fn refuses_each_field_beyond_its_limit() {
        type Break = (&'static str, fn(&mut ModelConfig));
        let breaks: [Break; 14] = [
            ("vocab_size", |c| c.vocab_size = 0),
            ("vocab_size", |c| c.vocab_size = u32::MAX),
            ("hidden_size", |c| c.hidden_size = u32::MAX),
            ("num_hidden_layers", |c| c.num_hidden_layers = 1025),
            ("num_key_value_heads", |c| c.num_key_value_heads = 0),
            ("num_key_value_heads", |c| c.num_key_value_heads = 3),
            ("head_dim", |c| c.head_dim = 5),
            ("num_experts", |c| c.num_experts = 0),
            ("num_experts_per_tok", |c| c.num_experts_per_tok = 5),
            ("rope_theta", |c| c.rope_theta = f64::NAN),
            ("rms_norm_eps", |c| c.rms_norm_eps = -1.0),
            ("mrope_section", |c| c.mrope_section = Some([u32::MAX, 2, 1])),
            ("mlp_only_layers", |c| c.dense_layers = vec![3]),
            ("intermediate_size", |c| c.intermediate_size = 0),
        ];
        for (field, change) in breaks {
            let mut config = small();
            change(&mut config);
            assert_eq!(config.validate().expect_err(field).field, field);
        }
    }
}
