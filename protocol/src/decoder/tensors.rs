//! A decoder's tensors: what each is for, and what a model must have of it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::precision::Precision;

/// What a tensor of a decoder is for. Numbers on disk and wire follow from the order; new members go to the end.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum TensorRole {
    /// (vocab_size, hidden_size)
    Embedding,
    /// (hidden_size)
    FinalNorm,
    /// (vocab_size, hidden_size)
    Head,
    /// A tensor of a layer.
    Layer(u32, LayerTensor),
}

/// What a layer's tensor is for. Numbers on disk and wire follow from the order; new members go to the end.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum LayerTensor {
    /// The norm before the mixer, (hidden_size).
    MixerNorm,
    /// (heads × head_dim, hidden_size)
    Query,
    /// (kv_heads × head_dim, hidden_size)
    Key,
    /// (kv_heads × head_dim, hidden_size)
    Value,
    /// (hidden_size, heads × head_dim)
    Output,
    /// (head_dim), or (heads × head_dim).
    QueryNorm,
    /// (head_dim), or (kv_heads × head_dim).
    KeyNorm,
    /// (heads × head_dim)
    QueryBias,
    /// (kv_heads × head_dim)
    KeyBias,
    /// (kv_heads × head_dim)
    ValueBias,
    /// The norm before the feed-forward half, (hidden_size).
    FeedForwardNorm,
    /// (experts, hidden_size)
    Router,
    /// A dense network's, (width, hidden_size).
    Gate,
    /// A dense network's, (width, hidden_size).
    Up,
    /// A dense network's, (hidden_size, width).
    Down,
    /// The shared expert's, (width, hidden_size).
    SharedGate,
    /// The shared expert's, (width, hidden_size).
    SharedUp,
    /// The shared expert's, (hidden_size, width).
    SharedDown,
    /// How much of the shared expert a token takes, (1, hidden_size).
    SharedWeight,
}

impl LayerTensor {
    /// What most published checkpoints call it within its layer.
    const fn usual_name(self) -> &'static str {
        match self {
            Self::MixerNorm => "input_layernorm.weight",
            Self::Query => "self_attn.q_proj.weight",
            Self::Key => "self_attn.k_proj.weight",
            Self::Value => "self_attn.v_proj.weight",
            Self::Output => "self_attn.o_proj.weight",
            Self::QueryNorm => "self_attn.q_norm.weight",
            Self::KeyNorm => "self_attn.k_norm.weight",
            Self::QueryBias => "self_attn.q_proj.bias",
            Self::KeyBias => "self_attn.k_proj.bias",
            Self::ValueBias => "self_attn.v_proj.bias",
            Self::FeedForwardNorm => "post_attention_layernorm.weight",
            Self::Router => "mlp.gate.weight",
            Self::Gate => "mlp.gate_proj.weight",
            Self::Up => "mlp.up_proj.weight",
            Self::Down => "mlp.down_proj.weight",
            Self::SharedGate => "mlp.shared_expert.gate_proj.weight",
            Self::SharedUp => "mlp.shared_expert.up_proj.weight",
            Self::SharedDown => "mlp.shared_expert.down_proj.weight",
            Self::SharedWeight => "mlp.shared_expert_gate.weight",
        }
    }
}

impl fmt::Display for TensorRole {
    /// What most published checkpoints call it. Manifests of version 2 have these names in them, so they never change.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedding => f.write_str("model.embed_tokens.weight"),
            Self::FinalNorm => f.write_str("model.norm.weight"),
            Self::Head => f.write_str("lm_head.weight"),
            Self::Layer(layer, tensor) => write!(f, "model.layers.{layer}.{}", tensor.usual_name()),
        }
    }
}

/// A tensor that a model must have.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TensorSpec {
    /// What it is for.
    pub role: TensorRole,
    /// Its shape, outermost first.
    pub shape: Vec<u64>,
    /// Whether it may be packed: matrices may, but not those that choose or weigh experts.
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
