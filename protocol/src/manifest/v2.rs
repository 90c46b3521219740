//! Manifests of version 2: one decoder, one precision for all experts, tensors by their usual names. What they can say is written so for
//! ever, since a model's id is the hash of its manifest's bytes.

use serde::{Deserialize, Serialize};

use super::{ChatFormat, GenerationDefaults, ManifestError, ModelManifest, PackedBlob, Part, PartConfig, PartKind, TrunkTensor};
use crate::codec;
use crate::decoder::{
    Activation, Decoder, Embedding, FeedForward, Gqa, Head, LAYERS_MAX, LayerRun, Mixer, Moe, Norm, QkNorm, QkvBias, Rope, Router,
    SharedExpert,
};
use crate::hash::{BlobRef, ModelId};
use crate::plain_text::plain_line;
use crate::precision::Precision;

/// The version that such manifests begin with.
pub(super) const VERSION: u16 = 2;

#[derive(Serialize, Deserialize)]
struct Manifest {
    version: u16,
    parent: Option<ModelId>,
    config: Config,
    tokenizer: Option<BlobRef>,
    chat: ChatFormat,
    generation: GenerationDefaults,
    trunk: Vec<NamedTensor>,
    expert_precision: Precision,
    experts: Vec<BlobRef>,
}

#[derive(Serialize, Deserialize)]
struct NamedTensor {
    name: String,
    precision: Precision,
    blob: BlobRef,
}

/// The text path of a Qwen3-MoE, of a Qwen3-Omni thinker, or of a Mixtral; names and meanings are those of `config.json`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
struct Config {
    vocab_size: u32,
    hidden_size: u32,
    num_hidden_layers: u32,
    num_attention_heads: u32,
    num_key_value_heads: u32,
    head_dim: u32,
    num_experts: u32,
    num_experts_per_tok: u32,
    moe_intermediate_size: u32,
    /// 0 when no layer is dense.
    intermediate_size: u32,
    /// Layers without experts, ascending.
    dense_layers: Vec<u32>,
    qk_norm: bool,
    norm_topk_prob: bool,
    rope_theta: f64,
    mrope_section: Option<[u32; 3]>,
    rms_norm_eps: f64,
    tie_word_embeddings: bool,
    max_position_embeddings: u32,
}

impl Config {
    /// The configuration of `decoder`, if one of version 2 says all of it.
    fn of(decoder: &Decoder) -> Option<Self> {
        let moe = decoder.moe()?;
        let first = decoder.runs.first()?;
        let Mixer::Gqa(attention) = &first.mixer;
        let (rope_theta, mrope_section) = match attention.rope {
            Rope::Plain { base } => (base, None),
            Rope::Interleaved { base, sections } => (base, Some(sections)),
        };
        let Router::Softmax { normalise } = moe.router;
        let dense_width = decoder.runs.iter().find_map(|run| match run.feed_forward {
            FeedForward::Dense { width, .. } => Some(width),
            FeedForward::Moe(_) => None,
        });
        let config = Self {
            vocab_size: decoder.vocab_size,
            hidden_size: decoder.hidden_size,
            num_hidden_layers: decoder.layers(),
            num_attention_heads: attention.heads,
            num_key_value_heads: attention.kv_heads,
            head_dim: attention.head_dim,
            num_experts: moe.experts,
            num_experts_per_tok: moe.per_token,
            moe_intermediate_size: moe.width,
            intermediate_size: dense_width.unwrap_or(0),
            dense_layers: (0..decoder.layers()).filter(|&layer| !decoder.is_moe(layer)).collect(),
            qk_norm: attention.qk_norm == QkNorm::PerHead,
            norm_topk_prob: normalise,
            rope_theta,
            mrope_section,
            rms_norm_eps: first.norm.eps(),
            tie_word_embeddings: decoder.head == Head::Embedding,
            max_position_embeddings: decoder.context,
        };
        // Whatever else the decoder has, it is lost on the way there and back.
        config.decoder().is_ok_and(|back| back == *decoder).then_some(config)
    }

    fn decoder(&self) -> Result<Decoder, ManifestError> {
        let refuse = |message: String| Err(ManifestError::Part(message));
        if self.num_hidden_layers > LAYERS_MAX {
            return refuse(format!("{} layers, {LAYERS_MAX} are allowed", self.num_hidden_layers));
        }
        let ascending = self.dense_layers.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || self.dense_layers.last().is_some_and(|&layer| layer >= self.num_hidden_layers) {
            return refuse("its list of dense layers must name layers that exist, once each, ascending".to_owned());
        }
        if self.dense_layers.is_empty() != (self.intermediate_size == 0) {
            return refuse("intermediate_size must be 0 just when no layer is dense".to_owned());
        }
        if self.dense_layers.len() == self.num_hidden_layers as usize {
            return refuse("no layer has experts".to_owned());
        }
        let base = self.rope_theta;
        let norm = Norm::Rms { eps: self.rms_norm_eps };
        let mixer = Mixer::Gqa(Gqa {
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            rope: self.mrope_section.map_or(Rope::Plain { base }, |sections| Rope::Interleaved { base, sections }),
            qk_norm: if self.qk_norm { QkNorm::PerHead } else { QkNorm::None },
            bias: QkvBias::None,
        });
        let activation = Activation::SwiGlu;
        let moe = Moe {
            experts: self.num_experts,
            per_token: self.num_experts_per_tok,
            width: self.moe_intermediate_size,
            activation,
            router: Router::Softmax { normalise: self.norm_topk_prob },
            shared: SharedExpert::None,
        };
        let layer = |layer: u32| {
            let dense = self.dense_layers.binary_search(&layer).is_ok();
            let feed_forward =
                if dense { FeedForward::Dense { width: self.intermediate_size, activation } } else { FeedForward::Moe(moe.clone()) };
            LayerRun { layers: 1, norm, mixer: mixer.clone(), feed_forward }
        };
        Ok(Decoder {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            context: self.max_position_embeddings,
            embedding: Embedding::Table,
            runs: Decoder::runs_of((0..self.num_hidden_layers).map(layer)),
            final_norm: norm,
            head: if self.tie_word_embeddings { Head::Embedding } else { Head::Own },
        })
    }
}

/// The bytes of `manifest`, if a manifest of version 2 says all of it.
pub(super) fn to_bytes(manifest: &ModelManifest) -> Option<Vec<u8>> {
    let [Part { kind: PartKind::Text, config: PartConfig::Decoder(decoder), trunk, experts }] = &manifest.parts[..] else { return None };
    let config = Config::of(decoder)?;
    let expert_precision = experts.first()?.precision;
    if experts.iter().any(|expert| expert.precision != expert_precision) {
        return None;
    }
    Some(codec::to_bytes(&Manifest {
        version: VERSION,
        parent: manifest.parent,
        config,
        tokenizer: manifest.tokenizer,
        chat: manifest.chat.clone(),
        generation: manifest.generation.clone(),
        trunk: trunk
            .iter()
            .map(|tensor| NamedTensor { name: tensor.role.to_string(), precision: tensor.precision, blob: tensor.blob })
            .collect(),
        expert_precision,
        experts: experts.iter().map(|expert| expert.blob).collect(),
    }))
}

/// Reads a manifest of version 2; the parts are not checked against the shape yet.
pub(super) fn from_bytes(bytes: &[u8]) -> Result<ModelManifest, ManifestError> {
    let read: Manifest = codec::from_bytes(bytes)?;
    let decoder = read.config.decoder()?;
    decoder.validate()?;
    let specs = decoder.tensors();
    let mut trunk = Vec::with_capacity(read.trunk.len().min(specs.len()));
    for (number, NamedTensor { name, precision, blob }) in read.trunk.into_iter().enumerate() {
        let Some(role) = specs.get(number).map(|spec| spec.role).filter(|role| role.to_string() == name) else {
            return Err(ManifestError::Part(format!("trunk tensor {number} is {}, which does not belong there", plain_line(&name))));
        };
        trunk.push(TrunkTensor { role, precision, blob });
    }
    let experts = read.experts.into_iter().map(|blob| PackedBlob { precision: read.expert_precision, blob }).collect();
    Ok(ModelManifest {
        parent: read.parent,
        parts: vec![Part { kind: PartKind::Text, config: PartConfig::Decoder(decoder), trunk, experts }],
        tokenizer: read.tokenizer,
        chat: read.chat,
        generation: read.generation,
    })
}
