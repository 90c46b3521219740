//! A decoder's trunk in memory, verified against its manifest. Experts are not part of it: see [`crate::experts`].

use std::collections::HashMap;
use std::sync::Arc;

use protocol::decoder::{FeedForward as FeedForwardShape, Head, LayerTensor, Mixer as MixerShape, SharedExpert, TensorRole};
use protocol::manifest::TrunkTensor;
use protocol::{BlobRef, Decoder, ModelManifest, PartKind, Precision};

use crate::aligned::AlignedBytes;
use crate::kernels::{Forms, Matrix};
use crate::mixer::gqa::GqaWeights;

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

/// A matrix of the trunk.
#[derive(Debug)]
pub(crate) struct Weight {
    bytes: Arc<AlignedBytes>,
    precision: Precision,
    rows: usize,
    columns: usize,
}

/// The trunk's part of one layer.
#[derive(Debug)]
pub(crate) struct LayerWeights {
    pub(crate) mixer_norm: Vec<f32>, // (hidden_size)
    pub(crate) mixer: MixerWeights,
    pub(crate) feed_forward_norm: Vec<f32>, // (hidden_size)
    pub(crate) feed_forward: FeedForward,
}

/// The half that looks at other tokens.
#[derive(Debug)]
pub(crate) enum MixerWeights {
    Gqa(GqaWeights),
}

/// The half that looks at one token.
#[derive(Debug)]
pub(crate) enum FeedForward {
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

/// Why a trunk was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError<E: std::error::Error + 'static> {
    /// A tensor could not be had.
    #[error("cannot load {tensor}")]
    Read {
        /// Which.
        tensor: TensorRole,
        /// Why not.
        source: E,
    },
    /// A tensor's bytes are not those of the manifest.
    #[error("bytes of {0} do not match the manifest")]
    WrongBytes(TensorRole),
}

/// Gets the bytes of a blob; models that share a tensor share them.
pub type ReadTensor<'a, E> = &'a mut dyn FnMut(BlobRef) -> Result<Arc<AlignedBytes>, E>;

/// Reads tensors by what they are for.
pub(crate) struct TrunkReader<'a, E> {
    tensors: HashMap<TensorRole, (&'a TrunkTensor, (usize, usize))>,
    read: ReadTensor<'a, E>,
}

impl<E: std::error::Error> TrunkReader<'_, E> {
    pub(crate) fn of_layer(&mut self, layer: u32, tensor: LayerTensor) -> Result<Weight, LoadError<E>> {
        self.tensor(TensorRole::Layer(layer, tensor))
    }

    fn tensor(&mut self, role: TensorRole) -> Result<Weight, LoadError<E>> {
        let (tensor, (rows, columns)) = self.tensors[&role]; // a manifest that was checked has every tensor of its decoder
        let bytes = (self.read)(tensor.blob).map_err(|source| LoadError::Read { tensor: role, source })?;
        if !tensor.blob.matches(&bytes) {
            return Err(LoadError::WrongBytes(role));
        }
        Ok(Weight { bytes, precision: tensor.precision, rows, columns })
    }

    fn network(&mut self, layer: u32, tensors: [LayerTensor; 3]) -> Result<DenseWeights, LoadError<E>> {
        let [gate, up, down] = tensors.map(|tensor| self.of_layer(layer, tensor));
        Ok(DenseWeights { gate: gate?, up: up?, down: down? })
    }
}

impl Model {
    /// Loads the trunk of a part.
    ///
    /// # Panics
    /// When the model has no such part.
    pub fn load<E: std::error::Error>(manifest: Arc<ModelManifest>, kind: PartKind, read: ReadTensor<'_, E>) -> Result<Self, LoadError<E>> {
        let part = manifest.part(kind).expect("the model has the part");
        let decoder = part.decoder();
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
                    FeedForwardShape::Dense { .. } => {
                        FeedForward::Dense(reader.network(layer, [LayerTensor::Gate, LayerTensor::Up, LayerTensor::Down])?)
                    }
                    FeedForwardShape::Moe(moe) => {
                        let router = reader.of_layer(layer, LayerTensor::Router)?;
                        let shared = match moe.shared {
                            SharedExpert::None => None,
                            SharedExpert::Gated { .. } => Some(SharedWeights {
                                network: reader
                                    .network(layer, [LayerTensor::SharedGate, LayerTensor::SharedUp, LayerTensor::SharedDown])?,
                                weight: reader.of_layer(layer, LayerTensor::SharedWeight)?,
                            }),
                        };
                        FeedForward::Moe { router, shared }
                    }
                },
            });
        }
        let final_norm = reader.tensor(TensorRole::FinalNorm)?.vector();
        let head = match decoder.head {
            Head::Own => Some(reader.tensor(TensorRole::Head)?),
            Head::Embedding => None,
        };
        let expert_forms = expert_forms(&manifest, kind);
        Ok(Self { part: kind, embedding, layers, final_norm, head, expert_forms, manifest })
    }

    /// Its shape.
    pub fn decoder(&self) -> &Decoder {
        self.manifest.part(self.part).expect("it was loaded from it").decoder()
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

    pub(crate) fn eps(&self) -> f32 {
        self.decoder().final_norm.eps() as f32
    }
}

/// The forms of vectors that a part's experts take.
pub(crate) fn expert_forms(manifest: &ModelManifest, part: PartKind) -> Forms {
    let experts = manifest.part(part).map(|part| &part.experts[..]).unwrap_or_default();
    experts.iter().fold(Forms::default(), |forms, expert| forms.or(Forms::of(expert.precision)))
}

impl Weight {
    pub(crate) fn view(&self) -> Matrix<'_> {
        Matrix::new(&self.bytes, self.precision, self.rows, self.columns)
    }

    pub(crate) fn vector(&self) -> Vec<f32> {
        let mut vector = vec![0.0; self.columns];
        self.view().row(0, &mut vector);
        vector
    }
}

impl DenseWeights {
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
