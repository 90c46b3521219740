//! What a decoder is made of, as data: runs of equal layers, each with a mixer and a feed-forward half, and the tensors that follow.
//!
//! Everything that a model's configuration can vary is a member of an enum here. Members are added at the end and never change, so that an
//! older program refuses a manifest that it cannot run, and an older manifest is read for ever. Does not read `config.json`: `inference` does.

use std::fmt;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use crate::expert_blob::{ExpertShape, SIDE_MAX};
use crate::precision::Precision;
use crate::tensors::{LayerTensor, TensorRole, TensorSpec};

/// Most layers of a decoder.
pub const LAYERS_MAX: u32 = 1024;
/// Most experts of a layer.
pub const EXPERTS_MAX: u32 = 4096;

/// Tokens or rows in, logits out.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Decoder {
    /// Tokens that have an embedding.
    pub vocab_size: u32,
    /// Length of the vectors that pass from layer to layer.
    pub hidden_size: u32,
    /// Longest sequence that the model was made for, in tokens.
    pub context: u32,
    /// How a token becomes a vector.
    pub embedding: Embedding,
    /// The layers, first to last; neighbours that are alike are one run.
    pub runs: Vec<LayerRun>,
    /// The norm behind the last layer.
    pub final_norm: Norm,
    /// What makes logits.
    pub head: Head,
}

/// How a token becomes a vector.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Embedding {
    /// A row of a table.
    Table,
    /// Rows come from elsewhere.
    Elsewhere,
}

/// What makes logits of the last hidden state.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Head {
    /// A matrix of its own.
    Own,
    /// The embedding table.
    Embedding,
    /// Hidden states go elsewhere.
    Elsewhere,
}

/// Layers that are alike.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct LayerRun {
    /// How many.
    pub layers: u32,
    /// The norm before each half.
    pub norm: Norm,
    /// What looks at other tokens.
    pub mixer: Mixer,
    /// What follows it.
    pub feed_forward: FeedForward,
}

/// A norm with a weight for each number.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub enum Norm {
    /// x ÷ √(mean of x² + `eps`) × weight.
    Rms {
        /// Added to the mean square.
        eps: f64,
    },
}

/// The half of a layer that looks at other tokens.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum Mixer {
    /// Softmax attention with grouped heads of keys and values.
    Gqa(Gqa),
}

/// Causal softmax attention in which several query heads share a head of keys and values.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Gqa {
    /// Query heads.
    pub heads: u32,
    /// Heads of keys and values; each serves as many query heads.
    pub kv_heads: u32,
    /// Length of a head's vectors; heads × head_dim need not be hidden_size.
    pub head_dim: u32,
    /// How positions enter.
    pub rope: Rope,
    /// How queries and keys are normed before they are turned.
    pub qk_norm: QkNorm,
    /// Whether queries, keys and values have a bias.
    pub bias: QkvBias,
}

/// How queries and keys are normed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum QkNorm {
    /// Not at all.
    None,
    /// Each head by itself, with weights that all heads share.
    PerHead,
    /// All heads of a token together, each number with a weight of its own.
    AllHeads,
}

/// What is added to queries, keys and values.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum QkvBias {
    /// Nothing.
    None,
    /// A vector for each of the three.
    Each,
}

/// Rotary position embedding: number i of a head turns together with number i + head_dim ÷ 2.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub enum Rope {
    /// One position a token.
    Plain {
        /// The base of the frequencies.
        base: f64,
    },
    /// Positions of time, height and width, whose frequency pairs are interleaved.
    Interleaved {
        /// The base of the frequencies.
        base: f64,
        /// Pairs for time, height and width.
        sections: [u32; 3],
    },
}

/// The half of a layer that looks at one token.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum FeedForward {
    /// One network for all tokens.
    Dense {
        /// Length of the vectors inside.
        width: u32,
        /// What it does there.
        activation: Activation,
    },
    /// Routed experts.
    Moe(Moe),
}

/// What a feed-forward network does inside.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Activation {
    /// down · (silu(gate · x) × (up · x)).
    SwiGlu,
}

/// Routed experts.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Moe {
    /// Experts of a layer.
    pub experts: u32,
    /// How many of them a token uses.
    pub per_token: u32,
    /// Length of the vectors inside an expert.
    pub width: u32,
    /// What experts do there.
    pub activation: Activation,
    /// How experts are chosen and weighed.
    pub router: Router,
    /// An expert that every token uses besides.
    pub shared: SharedExpert,
}

/// How experts are chosen and weighed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Router {
    /// Softmax over all experts, of which the likeliest are taken.
    Softmax {
        /// Whether the weights of those are scaled to sum to 1.
        normalise: bool,
    },
}

/// An expert that every token uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum SharedExpert {
    /// There is none.
    None,
    /// One whose result is multiplied by the sigmoid of a product with the input.
    Gated {
        /// Length of the vectors inside.
        width: u32,
    },
}

/// A value in a configuration that makes no sense or is beyond a limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value}: {rule}")]
pub struct ConfigError {
    /// The field.
    pub field: &'static str,
    /// The value, as text.
    pub value: String,
    /// What it must be.
    pub rule: String,
}

impl ConfigError {
    pub(crate) fn new(field: &'static str, value: impl fmt::Display, rule: impl Into<String>) -> Self {
        Self { field, value: value.to_string(), rule: rule.into() }
    }
}

impl Norm {
    /// What is added to the mean square.
    pub const fn eps(self) -> f64 {
        match self {
            Self::Rms { eps } => eps,
        }
    }

    fn validate(self) -> Result<(), ConfigError> {
        let eps = self.eps();
        if eps.is_finite() && (0.0..1.0).contains(&eps) {
            Ok(())
        } else {
            Err(ConfigError::new("rms_norm_eps", eps, "must be a number from 0 to 1"))
        }
    }
}

impl Rope {
    /// The base of its frequencies.
    pub const fn base(self) -> f64 {
        match self {
            Self::Plain { base } | Self::Interleaved { base, .. } => base,
        }
    }
}

impl Gqa {
    fn validate(&self) -> Result<(), ConfigError> {
        in_range("num_attention_heads", self.heads, 1..=1024)?;
        in_range("num_key_value_heads", self.kv_heads, 1..=1024)?;
        in_range("head_dim", self.head_dim, 2..=1024)?;
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(ConfigError::new("num_key_value_heads", self.kv_heads, "must divide num_attention_heads"));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(ConfigError::new("head_dim", self.head_dim, "must be even"));
        }
        if !(self.rope.base().is_finite() && self.rope.base() > 1.0) {
            return Err(ConfigError::new("rope_theta", self.rope.base(), "must be a number above 1"));
        }
        if let Rope::Interleaved { sections, .. } = self.rope
            && sections.iter().map(|&s| u64::from(s)).sum::<u64>() != u64::from(self.head_dim / 2)
        {
            return Err(ConfigError::new("mrope_section", format!("{sections:?}"), "must sum to half of head_dim"));
        }
        Ok(())
    }
}

impl Moe {
    fn validate(&self) -> Result<(), ConfigError> {
        in_range("num_experts", self.experts, 1..=EXPERTS_MAX)?;
        in_range("num_experts_per_tok", self.per_token, 1..=self.experts)?;
        in_range("moe_intermediate_size", self.width, 1..=SIDE_MAX as u32)?;
        match self.shared {
            SharedExpert::None => Ok(()),
            SharedExpert::Gated { width } => in_range("shared_expert_intermediate_size", width, 1..=SIDE_MAX as u32),
        }
    }
}

fn in_range(field: &'static str, value: u32, range: RangeInclusive<u32>) -> Result<(), ConfigError> {
    if range.contains(&value) {
        Ok(())
    } else {
        Err(ConfigError::new(field, value, format!("must be {} to {}", range.start(), range.end())))
    }
}

impl Decoder {
    /// Checks every field against its limits, so that no product of sizes overflows later.
    pub fn validate(&self) -> Result<(), ConfigError> {
        in_range("vocab_size", self.vocab_size, 1..=1 << 22)?;
        in_range("hidden_size", self.hidden_size, 1..=SIDE_MAX as u32)?;
        in_range("max_position_embeddings", self.context, 1..=1 << 24)?;
        self.final_norm.validate()?;
        let mut layers = 0_u32;
        let mut moe = None;
        for (number, run) in self.runs.iter().enumerate() {
            layers = layers.saturating_add(run.layers);
            if run.layers == 0 || number > 0 && self.runs[number - 1].is_like(run) {
                return Err(ConfigError::new("layers", format!("run {number}"), "must be 1 or more, and unlike the run before it"));
            }
            run.norm.validate()?;
            let Mixer::Gqa(attention) = &run.mixer;
            attention.validate()?;
            if (&run.mixer, run.norm) != (&self.runs[0].mixer, self.runs[0].norm) {
                return Err(ConfigError::new("layers", format!("run {number}"), "attention and norms must be the same in all layers"));
            }
            match &run.feed_forward {
                FeedForward::Dense { width, .. } => in_range("intermediate_size", *width, 1..=SIDE_MAX as u32)?,
                FeedForward::Moe(experts) => {
                    experts.validate()?;
                    let first = *moe.get_or_insert(experts);
                    if (first.experts, first.per_token, first.width) != (experts.experts, experts.per_token, experts.width) {
                        return Err(ConfigError::new(
                            "num_experts",
                            experts.experts,
                            "experts must be as many and as wide in all layers that have some",
                        ));
                    }
                }
            }
        }
        in_range("num_hidden_layers", layers, 1..=LAYERS_MAX)
    }

    /// Layers.
    pub fn layers(&self) -> u32 {
        self.runs.iter().map(|run| run.layers).sum()
    }

    /// The run of each layer, first to last.
    pub fn each_layer(&self) -> impl Iterator<Item = &LayerRun> {
        self.runs.iter().flat_map(|run| std::iter::repeat_n(run, run.layers as usize))
    }

    /// The run that `layer` belongs to; nothing where there is no such layer.
    pub fn layer(&self, layer: u32) -> Option<&LayerRun> {
        let mut end = 0_u32;
        self.runs.iter().find(|run| {
            end = end.saturating_add(run.layers);
            layer < end
        })
    }

    /// Attention, which is the same in every layer.
    ///
    /// # Panics
    /// Without layers, which no decoder that was validated lacks.
    pub fn attention(&self) -> &Gqa {
        let Mixer::Gqa(attention) = &self.runs.first().expect("a decoder that was validated has layers").mixer;
        attention
    }

    /// The experts, which are as many and as wide in every layer that has some; nothing where no layer has.
    pub fn moe(&self) -> Option<&Moe> {
        self.runs.iter().find_map(|run| match &run.feed_forward {
            FeedForward::Moe(moe) => Some(moe),
            FeedForward::Dense { .. } => None,
        })
    }

    /// Widths of the widest dense network and of the widest shared expert; 0 where there is none.
    pub fn widths_beside_experts(&self) -> (u32, u32) {
        self.runs.iter().fold((0, 0), |(dense, shared), run| match &run.feed_forward {
            FeedForward::Dense { width, .. } => (dense.max(*width), shared),
            FeedForward::Moe(Moe { shared: SharedExpert::Gated { width }, .. }) => (dense, shared.max(*width)),
            FeedForward::Moe(_) => (dense, shared),
        })
    }

    /// Experts of a layer that has some.
    pub fn experts(&self) -> u32 {
        self.moe().map_or(0, |moe| moe.experts)
    }

    /// How many experts a token uses in such a layer.
    pub fn experts_per_token(&self) -> u32 {
        self.moe().map_or(0, |moe| moe.per_token)
    }

    /// Says whether `layer` has experts.
    pub fn is_moe(&self, layer: u32) -> bool {
        self.layer(layer).is_some_and(|run| matches!(run.feed_forward, FeedForward::Moe(_)))
    }

    /// The layers with experts, ascending.
    pub fn moe_layers(&self) -> impl Iterator<Item = u32> + '_ {
        (0..).zip(self.each_layer()).filter(|(_, run)| matches!(run.feed_forward, FeedForward::Moe(_))).map(|(layer, _)| layer)
    }

    /// The shape of this decoder's experts at `precision`.
    pub fn expert_shape(&self, precision: Precision) -> ExpertShape {
        let width = self.moe().map_or(0, |moe| moe.width);
        ExpertShape { precision, hidden_size: self.hidden_size as usize, intermediate_size: width as usize }
    }

    /// All tensors but the experts, in the order of a manifest: embeddings, layer by layer, final norm, head.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let [hidden, vocab] = [self.hidden_size, self.vocab_size].map(u64::from);
        let mut tensors = Vec::new();
        let mut push = |role: TensorRole, shape: &[u64]| {
            let chooses = matches!(role, TensorRole::Layer(_, LayerTensor::Router | LayerTensor::SharedWeight));
            tensors.push(TensorSpec { role, shape: shape.to_vec(), packable: shape.len() == 2 && !chooses });
        };
        if self.embedding == Embedding::Table {
            push(TensorRole::Embedding, &[vocab, hidden]);
        }
        for (layer, run) in (0..).zip(self.each_layer()) {
            let mut tensor = |tensor, shape: &[u64]| push(TensorRole::Layer(layer, tensor), shape);
            tensor(LayerTensor::MixerNorm, &[hidden]);
            let Mixer::Gqa(attention) = &run.mixer;
            let [heads, kv_heads, head_dim] = [attention.heads, attention.kv_heads, attention.head_dim].map(u64::from);
            let (queries, keys) = (heads * head_dim, kv_heads * head_dim);
            tensor(LayerTensor::Query, &[queries, hidden]);
            tensor(LayerTensor::Key, &[keys, hidden]);
            tensor(LayerTensor::Value, &[keys, hidden]);
            tensor(LayerTensor::Output, &[hidden, queries]);
            let normed = match attention.qk_norm {
                QkNorm::None => None,
                QkNorm::PerHead => Some((head_dim, head_dim)),
                QkNorm::AllHeads => Some((queries, keys)),
            };
            if let Some((query, key)) = normed {
                tensor(LayerTensor::QueryNorm, &[query]);
                tensor(LayerTensor::KeyNorm, &[key]);
            }
            if attention.bias == QkvBias::Each {
                tensor(LayerTensor::QueryBias, &[queries]);
                tensor(LayerTensor::KeyBias, &[keys]);
                tensor(LayerTensor::ValueBias, &[keys]);
            }
            tensor(LayerTensor::FeedForwardNorm, &[hidden]);
            match &run.feed_forward {
                FeedForward::Dense { width, .. } => {
                    let width = u64::from(*width);
                    tensor(LayerTensor::Gate, &[width, hidden]);
                    tensor(LayerTensor::Up, &[width, hidden]);
                    tensor(LayerTensor::Down, &[hidden, width]);
                }
                FeedForward::Moe(moe) => {
                    tensor(LayerTensor::Router, &[u64::from(moe.experts), hidden]);
                    if let SharedExpert::Gated { width } = moe.shared {
                        let width = u64::from(width);
                        tensor(LayerTensor::SharedGate, &[width, hidden]);
                        tensor(LayerTensor::SharedUp, &[width, hidden]);
                        tensor(LayerTensor::SharedDown, &[hidden, width]);
                        tensor(LayerTensor::SharedWeight, &[1, hidden]);
                    }
                }
            }
        }
        push(TensorRole::FinalNorm, &[hidden]);
        if self.head == Head::Own {
            push(TensorRole::Head, &[vocab, hidden]);
        }
        tensors
    }

    /// Puts layers that are alike into one run.
    pub fn runs_of(layers: impl IntoIterator<Item = LayerRun>) -> Vec<LayerRun> {
        layers.into_iter().fold(Vec::new(), |mut runs: Vec<LayerRun>, layer| {
            match runs.last_mut() {
                Some(last) if last.is_like(&layer) => last.layers += layer.layers,
                _ => runs.push(layer),
            }
            runs
        })
    }
}

impl LayerRun {
    /// Whether its layers are those of another run, however many they are.
    fn is_like(&self, other: &Self) -> bool {
        (self.norm, &self.mixer, &self.feed_forward) == (other.norm, &other.mixer, &other.feed_forward)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Three layers, the middle one dense.
    pub(crate) fn small() -> Decoder {
        let norm = Norm::Rms { eps: 1e-6 };
        let rope = Rope::Plain { base: 1e4 };
        let mixer = Mixer::Gqa(Gqa { heads: 4, kv_heads: 2, head_dim: 4, rope, qk_norm: QkNorm::PerHead, bias: QkvBias::None });
        let activation = Activation::SwiGlu;
        let router = Router::Softmax { normalise: true };
        let moe = FeedForward::Moe(Moe { experts: 4, per_token: 2, width: 6, activation, router, shared: SharedExpert::None });
        let run = |feed_forward| LayerRun { layers: 1, norm, mixer: mixer.clone(), feed_forward };
        Decoder {
            vocab_size: 32,
            hidden_size: 8,
            context: 64,
            embedding: Embedding::Table,
            runs: vec![run(moe.clone()), run(FeedForward::Dense { width: 10, activation }), run(moe)],
            final_norm: norm,
            head: Head::Embedding,
        }
    }

    fn attention(decoder: &mut Decoder) -> &mut Gqa {
        let Mixer::Gqa(attention) = &mut decoder.runs[0].mixer;
        attention
    }

    fn moe(decoder: &mut Decoder) -> &mut Moe {
        let FeedForward::Moe(moe) = &mut decoder.runs[2].feed_forward else { panic!("it has experts") };
        moe
    }

    #[test]
    fn names_every_layer_and_tensor_once() {
        let decoder = small();
        assert_eq!(decoder.validate(), Ok(()));
        assert_eq!((decoder.layers(), decoder.moe_layers().collect::<Vec<_>>()), (3, vec![0, 2]));
        assert!(decoder.is_moe(2) && !decoder.is_moe(1) && !decoder.is_moe(3) && !decoder.is_moe(u32::MAX));
        let mut names: Vec<_> = decoder.tensors().into_iter().map(|spec| spec.role.to_string()).collect();
        assert_eq!(names.len(), 1 + 9 + 11 + 9 + 1);
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 31);
        let count = |change: fn(&mut Decoder)| {
            let mut decoder = small();
            change(&mut decoder);
            decoder.tensors().len()
        };
        // Of the first layer alone.
        assert_eq!(count(|d| attention(d).qk_norm = QkNorm::None), 31 - 2);
        assert_eq!(count(|d| attention(d).bias = QkvBias::Each), 31 + 3);
        assert_eq!(count(|d| moe(d).shared = SharedExpert::Gated { width: 5 }), 31 + 4);
        assert_eq!(count(|d| d.head = Head::Own), 31 + 1);
    }

    #[test]
    fn layers_that_are_alike_are_one_run() {
        let runs = small().runs;
        let layers = [&runs[0], &runs[0], &runs[1], &runs[0]].map(Clone::clone);
        assert_eq!(Decoder::runs_of(layers).iter().map(|run| run.layers).collect::<Vec<_>>(), [2, 1, 1]);
    }

    #[test]
    fn refuses_each_field_beyond_its_limit() {
        type Break = (&'static str, fn(&mut Decoder));
        let breaks: [Break; 21] = [
            ("vocab_size", |d| d.vocab_size = 0),
            ("vocab_size", |d| d.vocab_size = (1 << 22) + 1),
            ("hidden_size", |d| d.hidden_size = SIDE_MAX as u32 + 1),
            ("max_position_embeddings", |d| d.context = 0),
            ("num_hidden_layers", |d| d.runs[0].layers = LAYERS_MAX - 1),
            ("num_hidden_layers", |d| d.runs[0].layers = u32::MAX),
            ("num_hidden_layers", |d| d.runs.clear()),
            ("layers", |d| d.runs[1].layers = 0),
            ("layers", |d| d.runs[1] = d.runs[0].clone()),
            ("layers", |d| attention(d).qk_norm = QkNorm::None),
            ("num_key_value_heads", |d| attention(d).kv_heads = 0),
            ("num_key_value_heads", |d| attention(d).kv_heads = 3),
            ("head_dim", |d| attention(d).head_dim = 5),
            ("num_experts", |d| moe(d).experts = EXPERTS_MAX + 1),
            ("num_experts", |d| moe(d).experts = 5),
            ("num_experts_per_tok", |d| moe(d).per_token = 5),
            ("shared_expert_intermediate_size", |d| moe(d).shared = SharedExpert::Gated { width: 0 }),
            ("rope_theta", |d| attention(d).rope = Rope::Plain { base: f64::NAN }),
            ("rms_norm_eps", |d| d.final_norm = Norm::Rms { eps: -1.0 }),
            ("mrope_section", |d| attention(d).rope = Rope::Interleaved { base: 1e4, sections: [u32::MAX, 2, 1] }),
            ("intermediate_size", |d| d.runs[1].feed_forward = FeedForward::Dense { width: 0, activation: Activation::SwiGlu }),
        ];
        for (number, (field, change)) in breaks.into_iter().enumerate() {
            let mut decoder = small();
            change(&mut decoder);
            assert_eq!(decoder.validate().expect_err(field).field, field, "break {number}");
        }
        let mut most = small();
        most.runs[0].layers = LAYERS_MAX - 2;
        assert_eq!(most.validate(), Ok(()));
    }
}
