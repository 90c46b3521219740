//! A decoder's trunk in memory, verified against its manifest. Experts are not part of it: see [`crate::experts`].

use std::sync::Arc;

use protocol::decoder::{FeedForward as FeedForwardShape, Head, Mixer as MixerShape, SharedExpert};
use protocol::tensors::{LayerTensor, TensorRole};
use protocol::{Decoder, ModelManifest, PartKind};

use crate::kernels::Forms;
use crate::kernels::math::rms_scale;
use crate::mixer::gqa::GqaWeights;
use crate::weights::{LoadError, ReadTensor, TrunkReader, Weight};

/// Everything of a decoder but its experts.
#[derive(Debug)]
pub struct Model {
    /// What the model is made of.
    pub manifest: Arc<ModelManifest>,
    pub(crate) part: PartKind,
    pub(crate) embedding: Weight, // (vocab_size, hidden_size)
    pub(crate) layers: Vec<LayerWeights>,
    pub(crate) final_norm: Vec<f32>, // (hidden_size)
    head: Option<Weight>,            // (vocab_size, hidden_size); nothing when tied
    /// The forms of vectors that the experts take.
    pub(crate) expert_forms: Forms,
}

/// The trunk's part of one layer.
#[derive(Debug)]
pub(crate) struct LayerWeights {
    pub(crate) mixer_norm: Vec<f32>, // (hidden_size)
    pub(crate) mixer: MixerWeights,
    pub(crate) feed_forward_norm: Vec<f32>, // (hidden_size)
    pub(crate) feed_forward: LayerFeedForward,
}

/// The half that looks at other tokens.
#[derive(Debug)]
pub(crate) enum MixerWeights {
    Gqa(GqaWeights),
}

/// The half that looks at one token.
#[derive(Debug)]
pub(crate) enum LayerFeedForward {
    Dense(DenseWeights),
    Moe {
        router: Weight, // (experts, hidden_size)
        shared: Option<SharedWeights>,
    },
}

/// One network.
#[derive(Debug)]
pub(crate) struct DenseWeights {
    pub(crate) gate: Weight, // (width, hidden_size)
    pub(crate) up: Weight,   // (width, hidden_size)
    pub(crate) down: Weight, // (hidden_size, width)
}

/// An expert that every token uses.
#[derive(Debug)]
pub(crate) struct SharedWeights {
    pub(crate) network: DenseWeights,
    /// How much of it a token takes, (1, hidden_size).
    pub(crate) weight: Weight,
}

impl Model {
    /// The rows of a layer's router, (experts, hidden_size); nothing where the layer has none.
    pub fn router(&self, layer: u32) -> Option<Vec<Vec<f32>>> {
        let LayerFeedForward::Moe { router, .. } = &self.layers.get(layer as usize)?.feed_forward else { return None };
        let row = |row| {
            let mut out = vec![0.0; router.columns()];
            router.view().row(row, &mut out);
            out
        };
        Some((0..router.rows).map(row).collect())
    }

    /// Loads the trunk of a part.
    ///
    /// # Panics
    /// When the model has no such part.
    pub fn load<E: std::error::Error>(manifest: Arc<ModelManifest>, kind: PartKind, read: ReadTensor<'_, E>) -> Result<Self, LoadError<E>> {
        let part = manifest.part(kind).expect("the model has the part");
        let decoder = manifest.decoder_of(kind);
        let sides = decoder.tensors();
        let tensors = part.trunk.iter().zip(&sides).map(|(tensor, spec)| (tensor.role, (tensor, spec.sides()))).collect();
        let mut reader = TrunkReader { tensors, read };
        let embedding = reader.tensor(TensorRole::Embedding)?;
        let mut layers = Vec::new();
        for (layer, run) in (0..).zip(decoder.each_layer()) {
            let MixerShape::Gqa(attention) = &run.mixer;
            layers.push(LayerWeights {
                mixer_norm: reader.of_layer(layer, LayerTensor::MixerNorm)?.vector(),
                mixer: MixerWeights::Gqa(GqaWeights::read(attention, &mut reader, layer)?),
                feed_forward_norm: reader.of_layer(layer, LayerTensor::FeedForwardNorm)?.vector(),
                feed_forward: match &run.feed_forward {
                    FeedForwardShape::Dense { .. } => LayerFeedForward::Dense(DenseWeights::read(
                        &mut reader,
                        layer,
                        [LayerTensor::Gate, LayerTensor::Up, LayerTensor::Down],
                    )?),
                    FeedForwardShape::Moe(moe) => {
                        let router = reader.of_layer(layer, LayerTensor::Router)?;
                        let shared = match moe.shared {
                            SharedExpert::None => None,
                            SharedExpert::Gated { .. } => Some(SharedWeights {
                                network: DenseWeights::read(
                                    &mut reader,
                                    layer,
                                    [LayerTensor::SharedGate, LayerTensor::SharedUp, LayerTensor::SharedDown],
                                )?,
                                weight: reader.of_layer(layer, LayerTensor::SharedWeight)?,
                            }),
                        };
                        LayerFeedForward::Moe { router, shared }
                    }
                },
            });
        }
        let final_norm = reader.tensor(TensorRole::FinalNorm)?.vector();
        let head = match decoder.head {
            Head::Own => Some(reader.tensor(TensorRole::Head)?),
            Head::Embedding | Head::Elsewhere => None,
        };
        let expert_forms = expert_forms(&manifest, kind);
        Ok(Self { part: kind, embedding, layers, final_norm, head, expert_forms, manifest })
    }

    /// Its shape.
    pub fn decoder(&self) -> &Decoder {
        self.manifest.decoder_of(self.part)
    }

    /// Longest sequence, prompt and answer together, in tokens.
    pub fn context(&self) -> usize {
        self.decoder().context as usize
    }

    pub(crate) fn head(&self) -> &Weight {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Length of the vectors inside an expert.
    pub(crate) fn expert_width(&self) -> usize {
        self.decoder().moe().map_or(0, |moe| moe.width as usize)
    }

    /// Hidden states behind the last layer, (rows, hidden_size), as the head takes them.
    pub(crate) fn normed(&self, states: &[f32]) -> Vec<f64> {
        let rows = states.chunks_exact(self.final_norm.len());
        let normed = rows.flat_map(|row| {
            let scale = rms_scale(row, self.eps());
            row.iter().zip(&self.final_norm).map(move |(x, weight)| f64::from(x * scale * weight))
        });
        normed.collect()
    }

    pub(crate) fn eps(&self) -> f32 {
        self.decoder().final_norm.eps() as f32
    }
}

/// The forms of vectors that a part's experts take.
pub(crate) fn expert_forms(manifest: &ModelManifest, part: PartKind) -> Forms {
    let experts = manifest.part(part).map(|part| &part.experts[..]).unwrap_or_default();
    experts.iter().fold(Forms::default(), |forms, expert| forms.or(Forms::of(expert.precision)))
}

impl DenseWeights {
    fn read<E: std::error::Error>(reader: &mut TrunkReader<'_, E>, layer: u32, tensors: [LayerTensor; 3]) -> Result<Self, LoadError<E>> {
        let [gate, up, down] = tensors.map(|tensor| reader.of_layer(layer, tensor));
        Ok(Self { gate: gate?, up: up?, down: down? })
    }

    /// The forms of vectors that go in.
    pub(crate) fn forms(&self) -> Forms {
        self.gate.view().forms().or(self.up.view().forms())
    }

    /// Length of the vectors inside.
    pub(crate) fn width(&self) -> usize {
        self.gate.rows
    }
}

impl SharedWeights {
    /// The forms of vectors that go in.
    pub(crate) fn forms(&self) -> Forms {
        self.network.forms().or(self.weight.view().forms())
    }
}
