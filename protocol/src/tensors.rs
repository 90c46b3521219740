//! Tensors: what each is for, and what a model must have of it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::precision::Precision;

/// What a tensor of a part is for. Numbers on disk and wire follow from the order; new members go to the end.
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
    /// A tensor of a vision tower.
    Vision(VisionTensor),
    /// A tensor of an audio tower.
    Audio(AudioTensor),
    /// A tensor of what speaks, besides its decoder's.
    Speech(SpeechTensor),
    /// A tensor of a wave decoder.
    Wave(WaveTensor),
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

/// What a vision tower's tensor is for. Numbers on disk and wire follow from the order; new members go to the end.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum VisionTensor {
    /// Patches to rows, (hidden_size, channels, frames, patch, patch).
    Patch(Affine),
    /// A row for each place of a square, (side × side, hidden_size).
    Positions,
    /// A block's, by its number.
    Block(u32, BlockTensor),
    /// Four rows to one, of the last block.
    Merger(MergerTensor),
    /// The same of an earlier block, by its place among those.
    Deepstack(u32, MergerTensor),
}

/// A matrix with what is added to its products, or a norm's weights with what is added.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Affine {
    /// What is multiplied.
    Weight,
    /// What is added.
    Bias,
}

/// What a tensor of a transformer block of a tower is for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum BlockTensor {
    /// The norm before attention, (hidden_size).
    AttentionNorm(Affine),
    /// Queries, keys and values together, (3 × hidden_size, hidden_size).
    QueryKeyValue(Affine),
    /// (hidden_size, hidden_size)
    Query(Affine),
    /// (hidden_size, hidden_size)
    Key(Affine),
    /// (hidden_size, hidden_size)
    Value(Affine),
    /// (hidden_size, hidden_size)
    Output(Affine),
    /// The norm before the feed-forward half, (hidden_size).
    FeedForwardNorm(Affine),
    /// (width, hidden_size)
    Up(Affine),
    /// (hidden_size, width)
    Down(Affine),
}

/// What a tensor that merges neighbouring rows is for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum MergerTensor {
    /// The norm before it.
    Norm(Affine),
    /// (merged, merged)
    Up(Affine),
    /// (out, merged)
    Down(Affine),
}

/// What an audio tower's tensor is for. Numbers on disk and wire follow from the order; new members go to the end.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum AudioTensor {
    /// One of three convolutions, by its number from 0: (channels, channels before, 3, 3).
    Convolution(u32, Affine),
    /// What they make to rows, (hidden_size, channels × frequencies).
    Rows,
    /// A layer's.
    Layer(u32, BlockTensor),
    /// The norm behind the layers, (hidden_size).
    FinalNorm(Affine),
    /// (hidden_size, hidden_size)
    Up(Affine),
    /// (out, hidden_size)
    Down(Affine),
}

/// What a tensor of a talker or of a code predictor is for, besides its decoder's. Numbers on disk and wire follow from the order; new members
/// go to the end.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum SpeechTensor {
    /// Of embeddings of text: (width, thinker's hidden_size).
    TextUp(Affine),
    /// (hidden_size, width)
    TextDown(Affine),
    /// Of hidden states of pictures and sounds: (width, thinker's hidden_size).
    HiddenUp(Affine),
    /// (hidden_size, width)
    HiddenDown(Affine),
    /// Embeddings of codes of a group, (codes, hidden_size).
    CodeEmbedding(u32),
    /// What makes logits of codes of a group, (codes, hidden_size).
    CodeHead(u32),
}

/// What a wave decoder's tensor is for. Numbers on disk and wire follow from the order; new members go to the end.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum WaveTensor {
    /// A row for each code of each book, (books × codes, hidden_size).
    Codes,
    /// A transformer layer's.
    Layer(u32, LayerTensor),
    /// What a layer's attention is multiplied with, (hidden_size).
    AttentionScale(u32),
    /// What a layer's feed-forward half is multiplied with, (hidden_size).
    FeedForwardScale(u32),
    /// The norm behind the layers, (hidden_size).
    FinalNorm,
    /// A step that makes a row several.
    Upsample(u32, UpsampleTensor),
    /// The convolution into the decoder, (width, hidden_size, 7).
    Start(Affine),
    /// A block of the decoder.
    Block(u32, WaveBlockTensor),
    /// The last activation, (channels) each.
    EndSnake(Snake),
    /// The last convolution, (1, channels, 7).
    End(Affine),
}

/// What a tensor of an upsampling step is for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum UpsampleTensor {
    /// The transposed convolution, (channels, channels, ratio).
    Convolution(Affine),
    /// The convolution channel by channel, (channels, 1, 7).
    Depthwise(Affine),
    /// (channels)
    Norm(Affine),
    /// (4 × channels, channels)
    Up(Affine),
    /// (channels, 4 × channels)
    Down(Affine),
    /// What it is multiplied with, (channels).
    Scale,
}

/// The two vectors of a SnakeBeta activation, (channels) each.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Snake {
    /// The logarithm of the frequency.
    Alpha,
    /// The logarithm of the inverse height.
    Beta,
}

/// What a tensor of a block of a wave decoder is for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum WaveBlockTensor {
    /// The activation before its transposed convolution.
    Snake(Snake),
    /// That convolution, (channels before, channels, 2 × rate).
    Convolution(Affine),
    /// The first activation of a residual unit.
    UnitSnake(u32, Snake),
    /// Its dilated convolution, (channels, channels, 7).
    UnitConvolution(u32, Affine),
    /// Its second activation.
    UnitSecondSnake(u32, Snake),
    /// Its convolution of one step, (channels, channels, 1).
    UnitSecondConvolution(u32, Affine),
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
    /// What most published checkpoints call it within its part. Manifests of version 2 have the names of decoders' tensors in them, so those never
    /// change.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Embedding => f.write_str("model.embed_tokens.weight"),
            Self::FinalNorm => f.write_str("model.norm.weight"),
            Self::Head => f.write_str("lm_head.weight"),
            Self::Layer(layer, tensor) => write!(f, "model.layers.{layer}.{}", tensor.usual_name()),
            Self::Vision(tensor) => tensor.fmt(f),
            Self::Audio(tensor) => tensor.fmt(f),
            Self::Speech(tensor) => tensor.fmt(f),
            Self::Wave(tensor) => tensor.fmt(f),
        }
    }
}

impl fmt::Display for Affine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Weight { "weight" } else { "bias" })
    }
}

impl fmt::Display for Snake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Alpha { "alpha" } else { "beta" })
    }
}

/// As published: `mlp.0` and `mlp.2` stand around an activation.
impl fmt::Display for MergerTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Norm(part) => write!(f, "ln_q.{part}"),
            Self::Up(part) => write!(f, "mlp.0.{part}"),
            Self::Down(part) => write!(f, "mlp.2.{part}"),
        }
    }
}

impl fmt::Display for VisionTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Patch(part) => write!(f, "patch_embed.proj.{part}"),
            Self::Positions => f.write_str("pos_embed.weight"),
            Self::Block(block, tensor) => {
                let (name, part) = match tensor {
                    BlockTensor::AttentionNorm(part) => ("norm1", part),
                    BlockTensor::QueryKeyValue(part) => ("attn.qkv", part),
                    BlockTensor::Query(part) => ("attn.q", part),
                    BlockTensor::Key(part) => ("attn.k", part),
                    BlockTensor::Value(part) => ("attn.v", part),
                    BlockTensor::Output(part) => ("attn.proj", part),
                    BlockTensor::FeedForwardNorm(part) => ("norm2", part),
                    BlockTensor::Up(part) => ("mlp.linear_fc1", part),
                    BlockTensor::Down(part) => ("mlp.linear_fc2", part),
                };
                write!(f, "blocks.{block}.{name}.{part}")
            }
            Self::Merger(tensor) => write!(f, "merger.{tensor}"),
            Self::Deepstack(number, tensor) => write!(f, "merger_list.{number}.{tensor}"),
        }
    }
}

impl fmt::Display for AudioTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Convolution(number, part) => write!(f, "conv2d{}.{part}", number + 1),
            Self::Rows => f.write_str("conv_out.weight"),
            Self::Layer(layer, tensor) => {
                let (name, part) = match tensor {
                    BlockTensor::AttentionNorm(part) => ("self_attn_layer_norm", part),
                    BlockTensor::QueryKeyValue(part) => ("self_attn.qkv", part),
                    BlockTensor::Query(part) => ("self_attn.q_proj", part),
                    BlockTensor::Key(part) => ("self_attn.k_proj", part),
                    BlockTensor::Value(part) => ("self_attn.v_proj", part),
                    BlockTensor::Output(part) => ("self_attn.out_proj", part),
                    BlockTensor::FeedForwardNorm(part) => ("final_layer_norm", part),
                    BlockTensor::Up(part) => ("fc1", part),
                    BlockTensor::Down(part) => ("fc2", part),
                };
                write!(f, "layers.{layer}.{name}.{part}")
            }
            Self::FinalNorm(part) => write!(f, "ln_post.{part}"),
            Self::Up(part) => write!(f, "proj1.{part}"),
            Self::Down(part) => write!(f, "proj2.{part}"),
        }
    }
}

impl fmt::Display for SpeechTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::TextUp(part) => write!(f, "text_projection.linear_fc1.{part}"),
            Self::TextDown(part) => write!(f, "text_projection.linear_fc2.{part}"),
            Self::HiddenUp(part) => write!(f, "hidden_projection.linear_fc1.{part}"),
            Self::HiddenDown(part) => write!(f, "hidden_projection.linear_fc2.{part}"),
            Self::CodeEmbedding(group) => write!(f, "model.codec_embedding.{group}.weight"),
            Self::CodeHead(group) => write!(f, "lm_head.{group}.weight"),
        }
    }
}

impl fmt::Display for WaveTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Codes => f.write_str("code_embedding.weight"),
            Self::Layer(layer, tensor) => write!(f, "pre_transformer.layers.{layer}.{}", tensor.usual_name()),
            Self::AttentionScale(layer) => write!(f, "pre_transformer.layers.{layer}.self_attn_layer_scale.scale"),
            Self::FeedForwardScale(layer) => write!(f, "pre_transformer.layers.{layer}.mlp_layer_scale.scale"),
            Self::FinalNorm => f.write_str("pre_transformer.norm.weight"),
            Self::Upsample(step, tensor) => {
                let (name, part) = match tensor {
                    UpsampleTensor::Convolution(part) => ("0.conv", part),
                    UpsampleTensor::Depthwise(part) => ("1.dwconv.conv", part),
                    UpsampleTensor::Norm(part) => ("1.norm", part),
                    UpsampleTensor::Up(part) => ("1.pwconv1", part),
                    UpsampleTensor::Down(part) => ("1.pwconv2", part),
                    UpsampleTensor::Scale => return write!(f, "upsample.{step}.1.gamma"),
                };
                write!(f, "upsample.{step}.{name}.{part}")
            }
            Self::Start(part) => write!(f, "decoder.0.conv.{part}"),
            // Blocks stand behind the first convolution, and the residual units of a block behind its activation and its convolution.
            Self::Block(block, tensor) => {
                let block = block + 1;
                match tensor {
                    WaveBlockTensor::Snake(part) => write!(f, "decoder.{block}.block.0.{part}"),
                    WaveBlockTensor::Convolution(part) => write!(f, "decoder.{block}.block.1.conv.{part}"),
                    WaveBlockTensor::UnitSnake(unit, part) => write!(f, "decoder.{block}.block.{}.act1.{part}", unit + 2),
                    WaveBlockTensor::UnitConvolution(unit, part) => write!(f, "decoder.{block}.block.{}.conv1.conv.{part}", unit + 2),
                    WaveBlockTensor::UnitSecondSnake(unit, part) => write!(f, "decoder.{block}.block.{}.act2.{part}", unit + 2),
                    WaveBlockTensor::UnitSecondConvolution(unit, part) => write!(f, "decoder.{block}.block.{}.conv2.conv.{part}", unit + 2),
                }
            }
            Self::EndSnake(part) => write!(f, "decoder.5.{part}"),
            Self::End(part) => write!(f, "decoder.6.conv.{part}"),
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
    /// Rows and columns: a vector is one row, and what has more than two sides has a row for each of the first.
    pub fn sides(&self) -> (usize, usize) {
        match self.shape[..] {
            [] | [_] => (1, self.shape.iter().product::<u64>() as usize),
            [rows, ref rest @ ..] => (rows as usize, rest.iter().product::<u64>() as usize),
        }
    }

    /// Bytes of this tensor at `precision`; nothing where it cannot be written so.
    pub fn bytes(&self, precision: Precision) -> Option<u64> {
        let (rows, columns) = self.sides();
        (self.packable || !precision.is_packed()).then(|| precision.matrix_bytes(rows, columns) as u64)
    }
}
