//! A model's trunk in memory, verified against its manifest. Experts are not part of it: see [`crate::experts`].

use std::sync::Arc;

use protocol::manifest::TrunkTensor;
use protocol::{BlobRef, ModelConfig, ModelManifest, Precision};

use crate::aligned::AlignedBytes;
use crate::kernels::{Forms, Matrix};
use crate::rope::Rope;

/// Everything of a model but its experts.
#[derive(Debug)]
pub struct Model {
    /// What the model is made of.
    pub manifest: Arc<ModelManifest>,
    pub(crate) config: ModelConfig,
    pub(crate) embed_tokens: Weight, // (vocab_size, hidden_size)
    pub(crate) layers: Vec<LayerWeights>,
    pub(crate) norm: Vec<f32>, // (hidden_size)
    lm_head: Option<Weight>,   // (vocab_size, hidden_size); nothing when tied
    pub(crate) rope: Rope,
}

/// A matrix of the trunk.
#[derive(Debug)]
pub(crate) struct Weight {
    bytes: AlignedBytes,
    precision: Precision,
    rows: usize,
    columns: usize,
}

/// The trunk's part of one layer.
#[derive(Debug)]
pub(crate) struct LayerWeights {
    pub(crate) input_layernorm: Vec<f32>,          // (hidden_size)
    pub(crate) q_proj: Weight,                     // (heads × head_dim, hidden_size)
    pub(crate) k_proj: Weight,                     // (kv_heads × head_dim, hidden_size)
    pub(crate) v_proj: Weight,                     // (kv_heads × head_dim, hidden_size)
    pub(crate) o_proj: Weight,                     // (hidden_size, heads × head_dim)
    pub(crate) q_norm: Option<Vec<f32>>,           // (head_dim)
    pub(crate) k_norm: Option<Vec<f32>>,           // (head_dim)
    pub(crate) post_attention_layernorm: Vec<f32>, // (hidden_size)
    pub(crate) feed_forward: FeedForward,
}

/// What follows attention in a layer.
#[derive(Debug)]
pub(crate) enum FeedForward {
    Dense {
        gate_proj: Weight, // (intermediate_size, hidden_size)
        up_proj: Weight,   // (intermediate_size, hidden_size)
        down_proj: Weight, // (hidden_size, intermediate_size)
    },
    Moe {
        router: Weight, // (num_experts, hidden_size)
    },
}

/// Why a trunk was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError<E: std::error::Error + 'static> {
    /// A tensor could not be had.
    #[error("cannot load {tensor}")]
    Read {
        /// Which.
        tensor: String,
        /// Why not.
        source: E,
    },
    /// A tensor's bytes are not those of the manifest.
    #[error("bytes of {0} do not match the manifest")]
    WrongBytes(String),
}

impl Model {
    /// Loads the trunk; `read` gets the bytes of a blob.
    pub fn load<E: std::error::Error>(
        manifest: Arc<ModelManifest>,
        mut read: impl FnMut(BlobRef) -> Result<AlignedBytes, E>,
    ) -> Result<Self, LoadError<E>> {
        let config = manifest.config.clone();
        let specs = config.trunk_tensors();
        // The manifest was checked to hold exactly these tensors, in this order.
        let mut tensors = manifest.trunk.iter().zip(&specs);
        let mut next = || -> Result<Weight, LoadError<E>> {
            let (TrunkTensor { name, precision, blob }, spec) = tensors.next().expect("a manifest has the trunk of its config");
            let bytes = read(*blob).map_err(|source| LoadError::Read { tensor: name.clone(), source })?;
            if !blob.matches(&bytes) {
                return Err(LoadError::WrongBytes(name.clone()));
            }
            let (rows, columns) = spec.sides();
            Ok(Weight { bytes, precision: *precision, rows, columns })
        };
        let embed_tokens = next()?;
        let mut layers = Vec::new();
        for layer in 0..config.num_hidden_layers {
            layers.push(LayerWeights {
                input_layernorm: next()?.vector(),
                q_proj: next()?,
                k_proj: next()?,
                v_proj: next()?,
                o_proj: next()?,
                q_norm: if config.qk_norm { Some(next()?.vector()) } else { None },
                k_norm: if config.qk_norm { Some(next()?.vector()) } else { None },
                post_attention_layernorm: next()?.vector(),
                feed_forward: if config.is_moe(layer) {
                    FeedForward::Moe { router: next()? }
                } else {
                    FeedForward::Dense { gate_proj: next()?, up_proj: next()?, down_proj: next()? }
                },
            });
        }
        let norm = next()?.vector();
        let lm_head = if config.tie_word_embeddings { None } else { Some(next()?) };
        let rope = Rope::new(&config);
        Ok(Self { manifest, config, embed_tokens, layers, norm, lm_head, rope })
    }

    /// Longest sequence, prompt and answer together, in tokens.
    pub fn context(&self) -> usize {
        self.config.max_position_embeddings as usize
    }

    pub(crate) fn lm_head(&self) -> &Weight {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens)
    }

    /// The form of vectors that experts take.
    pub(crate) fn expert_forms(&self) -> Forms {
        Forms::of(self.manifest.expert_precision)
    }

    pub(crate) fn eps(&self) -> f32 {
        self.config.rms_norm_eps as f32
    }
}

impl Weight {
    pub(crate) fn view(&self) -> Matrix<'_> {
        Matrix::new(&self.bytes, self.precision, self.rows, self.columns)
    }

    fn vector(&self) -> Vec<f32> {
        let mut vector = vec![0.0; self.columns];
        self.view().row(0, &mut vector);
        vector
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn tiny_config() -> ModelConfig {
        ModelConfig {
            vocab_size: 16,
            hidden_size: 8,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            head_dim: 8,
            num_experts: 4,
            num_experts_per_tok: 2,
            moe_intermediate_size: 6,
            intermediate_size: 0,
            dense_layers: vec![],
            qk_norm: true,
            norm_topk_prob: true,
            rope_theta: 1e6,
            mrope_section: None,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: true,
            max_position_embeddings: 64,
        }
    }
}
