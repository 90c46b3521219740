//! What a model is made of: every tensor and every expert of its parts by hash, under one id.
//!
//! The id is the hash of the manifest's bytes, so it depends on weights, shape, tokenizer, chat format and defaults,
//! and on nothing else: not on names, paths, times, publishers or how a checkpoint was sharded. So that a model has one id, it is written
//! in the oldest version that can say all of it: 2, or [`VERSION`].

mod v2;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::codec::{self, CodecError};
use crate::decoder::{ConfigError, Decoder};
use crate::envelope::{Domain, EnvelopeError, SignedEnvelope};
use crate::expert_blob::ExpertShape;
use crate::hash::{BlobRef, ContentHash, ModelId};
use crate::identity::NodeKey;
use crate::precision::Precision;
use crate::tensors::{TensorRole, TensorSpec};
use crate::towers::{Audio, CodePredictor, CodeToWave, Talker, Vision};

/// Longest manifest in bytes that is read.
pub const MANIFEST_BYTES_MAX: usize = 16 << 20;
/// Longest tokenizer or chat template, in bytes.
pub const SIDE_FILE_BYTES_MAX: u64 = 64 << 20;
/// Most parts of a model.
pub const PARTS_MAX: usize = 16;
const STRINGS_MAX: usize = 16;
const STRING_BYTES_MAX: usize = 256;

/// What a part of a model does. Numbers on disk and wire follow from the order; new members go to the end.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum PartKind {
    /// Takes in tokens and makes text.
    Text,
    /// Makes rows of pictures and videos.
    Vision,
    /// Makes rows of sound.
    Audio,
    /// Makes the first code of each moment of speech.
    Talker,
    /// Makes the other codes.
    CodePredictor,
    /// Makes sound of codes.
    CodeToWave,
}

impl PartKind {
    /// The word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Vision => "vision",
            Self::Audio => "audio",
            Self::Talker => "talker",
            Self::CodePredictor => "code predictor",
            Self::CodeToWave => "code to wave",
        }
    }
}

impl fmt::Display for PartKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where an expert stands in a model.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ExpertSlot {
    /// The part.
    pub part: PartKind,
    /// The transformer layer of the part.
    pub layer: u32,
    /// Its number within the layer.
    pub expert: u32,
}

impl ExpertSlot {
    /// A place in the part that makes text.
    pub const fn text(layer: u32, expert: u32) -> Self {
        Self { part: PartKind::Text, layer, expert }
    }
}

impl fmt::Display for ExpertSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.part != PartKind::Text {
            write!(f, "{} ", self.part)?;
        }
        write!(f, "layer {} expert {}", self.layer, self.expert)
    }
}

/// What a part is made of. Numbers on disk and wire follow from the order; new members go to the end.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum PartConfig {
    /// Layers of a mixer and a feed-forward half.
    Decoder(Decoder),
    /// A vision tower.
    Vision(Vision),
    /// An audio tower.
    Audio(Audio),
    /// A talker.
    Talker(Talker),
    /// A code predictor.
    CodePredictor(CodePredictor),
    /// A wave decoder.
    CodeToWave(CodeToWave),
}

impl PartConfig {
    /// The decoder that it is or has.
    pub fn decoder(&self) -> Option<&Decoder> {
        match self {
            Self::Decoder(decoder) => Some(decoder),
            Self::Talker(talker) => Some(&talker.decoder),
            Self::CodePredictor(predictor) => Some(&predictor.decoder),
            Self::Vision(_) | Self::Audio(_) | Self::CodeToWave(_) => None,
        }
    }

    /// What a part of this shape does.
    pub const fn kind(&self) -> PartKind {
        match self {
            Self::Decoder(_) => PartKind::Text,
            Self::Vision(_) => PartKind::Vision,
            Self::Audio(_) => PartKind::Audio,
            Self::Talker(_) => PartKind::Talker,
            Self::CodePredictor(_) => PartKind::CodePredictor,
            Self::CodeToWave(_) => PartKind::CodeToWave,
        }
    }

    /// All weights but the experts, in the order of a manifest.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        match self {
            Self::Decoder(decoder) => decoder.tensors(),
            Self::Vision(vision) => vision.tensors(),
            Self::Audio(audio) => audio.tensors(),
            Self::Talker(talker) => talker.tensors(),
            Self::CodePredictor(predictor) => predictor.tensors(),
            Self::CodeToWave(wave) => wave.tensors(),
        }
    }

    /// Every place that holds an expert, by layer, then by expert.
    pub fn slots(&self) -> impl Iterator<Item = ExpertSlot> + '_ {
        let part = self.kind();
        self.decoder().into_iter().flat_map(move |decoder| {
            decoder.moe_layers().flat_map(move |layer| (0..decoder.experts()).map(move |expert| ExpertSlot { part, layer, expert }))
        })
    }

    /// Checks every field against its limits.
    pub fn validate(&self) -> Result<(), ConfigError> {
        match self {
            Self::Decoder(decoder) => decoder.validate(),
            Self::Vision(vision) => vision.validate(),
            Self::Audio(audio) => audio.validate(),
            Self::Talker(talker) => talker.validate(),
            Self::CodePredictor(predictor) => predictor.validate(),
            Self::CodeToWave(wave) => wave.validate(),
        }
    }
}

/// A part of a model: all that it is made of.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Part {
    /// What it does.
    pub kind: PartKind,
    /// Its shape.
    pub config: PartConfig,
    /// All weights but the experts, in the order of [`PartConfig::tensors`].
    pub trunk: Vec<TrunkTensor>,
    /// The experts, layer by layer.
    pub experts: Vec<PackedBlob>,
}

/// One tensor of the trunk: its plain little-endian bytes, row by row, or its panels.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TrunkTensor {
    /// What it is for.
    pub role: TensorRole,
    /// Number format.
    pub precision: Precision,
    /// Its bytes.
    pub blob: BlobRef,
}

/// An expert and how its weights are written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PackedBlob {
    /// Number format.
    pub precision: Precision,
    /// Its bytes.
    pub blob: BlobRef,
}

/// How a conversation becomes text.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ChatFormat {
    /// The checkpoint's own template (Jinja), if it has one.
    pub template: Option<BlobRef>,
    /// What the template calls `bos_token`.
    pub bos_token: Option<String>,
    /// What the template calls `eos_token`.
    pub eos_token: Option<String>,
}

/// What the checkpoint's authors generate with, unless told otherwise.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct GenerationDefaults {
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// Texts that end an answer.
    pub stop_strings: Vec<String>,
    /// 0 takes the likeliest token.
    pub temperature: f32,
    /// Keep this many of the likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the likeliest tokens up to this probability.
    pub top_p: f32,
    /// Divides the logits of tokens already seen; 1 changes nothing.
    pub repetition_penalty: f32,
}

impl Default for GenerationDefaults {
    fn default() -> Self {
        Self { eos_token_ids: Vec::new(), stop_strings: Vec::new(), temperature: 1.0, top_k: 0, top_p: 1.0, repetition_penalty: 1.0 }
    }
}

/// Everything a node must hold to run a model, by hash.
#[derive(Clone, PartialEq, Debug)]
pub struct ModelManifest {
    /// The model this one was converted from.
    pub parent: Option<ModelId>,
    /// The parts, each kind at most once, in the order of [`PartKind`]; the first makes text.
    pub parts: Vec<Part>,
    /// `tokenizer.json` as published; without one the model is used by token ids.
    pub tokenizer: Option<BlobRef>,
    /// How a conversation becomes text.
    pub chat: ChatFormat,
    /// Sampling and stop rules.
    pub generation: GenerationDefaults,
}

/// The newest format that this program reads and writes.
pub const VERSION: u16 = 3;

/// The fields of version 3, in their order.
#[derive(Serialize, Deserialize)]
struct ManifestV3 {
    version: u16,
    parent: Option<ModelId>,
    parts: Vec<Part>,
    tokenizer: Option<BlobRef>,
    chat: ChatFormat,
    generation: GenerationDefaults,
}

/// Why bytes are not the manifest they should be.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Longer than [`MANIFEST_BYTES_MAX`].
    #[error("manifest has {0} bytes, the limit is {MANIFEST_BYTES_MAX}")]
    TooLong(usize),
    /// The envelope around it is not valid.
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    /// Its bytes do not decode.
    #[error("manifest: {0}")]
    Codec(#[from] CodecError),
    /// A valid manifest, of another model.
    #[error("manifest is of model {found}, expected {expected}")]
    OtherModel {
        /// What was asked for.
        expected: ModelId,
        /// What came.
        found: ModelId,
    },
    /// A version that this program does not know.
    #[error("manifest has version {0}, this program knows versions 2 and {VERSION}")]
    Version(u16),
    /// A model that an older version can say, in a newer one: it would have two ids.
    #[error("manifest is written in version {VERSION}, though version 2 can say it")]
    NewerThanNeeded,
    /// A shape that makes no sense.
    #[error("manifest's config: {0}")]
    Config(#[from] ConfigError),
    /// A part that does not fit the shape.
    #[error("manifest: {0}")]
    Part(String),
}

impl ModelManifest {
    /// Returns this manifest if every part fits the shape.
    pub fn checked(self) -> Result<Self, ManifestError> {
        self.validate().map(|()| self)
    }

    /// The canonical bytes, in the oldest version that can say all.
    pub fn to_bytes(&self) -> Vec<u8> {
        v2::to_bytes(self).unwrap_or_else(|| {
            let Self { parent, parts, tokenizer, chat, generation } = self.clone();
            codec::to_bytes(&ManifestV3 { version: VERSION, parent, parts, tokenizer, chat, generation })
        })
    }

    /// Reads canonical bytes and checks every part against the shape.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() > MANIFEST_BYTES_MAX {
            return Err(ManifestError::TooLong(bytes.len()));
        }
        // The version comes first: what follows changes with it.
        match bytes.first_chunk().map(|version| u16::from_le_bytes(*version)) {
            Some(v2::VERSION) => v2::from_bytes(bytes)?.checked(),
            Some(VERSION) | None => {
                let ManifestV3 { parent, parts, tokenizer, chat, generation, .. } = codec::from_bytes(bytes)?;
                let manifest = Self { parent, parts, tokenizer, chat, generation }.checked()?;
                if v2::to_bytes(&manifest).is_some() { Err(ManifestError::NewerThanNeeded) } else { Ok(manifest) }
            }
            Some(other) => Err(ManifestError::Version(other)),
        }
    }

    /// The hash of the canonical bytes.
    pub fn id(&self) -> ModelId {
        ModelId(ContentHash::of(&self.to_bytes()))
    }

    /// Signs this manifest as its publisher.
    pub fn seal(&self, key: &NodeKey) -> SignedEnvelope {
        SignedEnvelope::seal(key, Domain::Manifest, &self.to_bytes())
    }

    /// Opens a signed manifest and checks that it is of model `expected`. Whether its signer is trusted is the caller's to ask.
    pub fn open(expected: ModelId, envelope: Vec<u8>) -> Result<(Self, SignedEnvelope), ManifestError> {
        if envelope.len() > MANIFEST_BYTES_MAX {
            return Err(ManifestError::TooLong(envelope.len()));
        }
        let envelope = SignedEnvelope::open(Domain::Manifest, envelope)?;
        let found = ModelId(ContentHash::of(envelope.payload()));
        if found != expected {
            return Err(ManifestError::OtherModel { expected, found });
        }
        Ok((Self::from_bytes(envelope.payload())?, envelope))
    }

    /// The part of a kind, if the model has one.
    pub fn part(&self, kind: PartKind) -> Option<&Part> {
        self.parts.iter().find(|part| part.kind == kind)
    }

    /// The part that makes text.
    ///
    /// # Panics
    /// When there is none, which no manifest that was [checked](Self::checked) lacks.
    pub fn text(&self) -> &Part {
        self.part(PartKind::Text).expect("a manifest that was checked has a part that makes text")
    }

    /// The decoder of the part that makes text; panics as [`text`](Self::text) does.
    pub fn decoder(&self) -> &Decoder {
        self.decoder_of(PartKind::Text)
    }

    /// The decoder of a part.
    ///
    /// # Panics
    /// When the model has no such part, or the part no decoder.
    pub fn decoder_of(&self, kind: PartKind) -> &Decoder {
        self.part(kind).and_then(Part::decoder).expect("the model has the part, and the part a decoder")
    }

    /// The vision tower, if the model has one.
    pub fn vision(&self) -> Option<&Vision> {
        self.parts.iter().find_map(|part| if let PartConfig::Vision(vision) = &part.config { Some(vision) } else { None })
    }

    /// The audio tower, if the model has one.
    pub fn audio(&self) -> Option<&Audio> {
        self.parts.iter().find_map(|part| if let PartConfig::Audio(audio) = &part.config { Some(audio) } else { None })
    }

    /// The expert in `slot`; nothing where the model has no such slot.
    pub fn expert(&self, slot: ExpertSlot) -> Option<PackedBlob> {
        let part = self.part(slot.part)?;
        let decoder = part.decoder()?;
        if slot.expert >= decoder.experts() || !decoder.is_moe(slot.layer) {
            return None;
        }
        let before = decoder.moe_layers().take_while(|&layer| layer < slot.layer).count();
        part.experts.get(before * decoder.experts() as usize + slot.expert as usize).copied()
    }

    /// Every place that holds an expert, by part, by layer, then by expert, and the expert.
    pub fn experts(&self) -> impl Iterator<Item = (ExpertSlot, PackedBlob)> + '_ {
        self.parts.iter().flat_map(Part::placed_experts)
    }

    /// Every blob that belongs to the trunk: its tensors, the tokenizer and the chat template.
    pub fn trunk_blobs(&self) -> impl Iterator<Item = BlobRef> + '_ {
        let tensors = self.parts.iter().flat_map(|part| &part.trunk).map(|tensor| tensor.blob);
        tensors.chain(self.tokenizer).chain(self.chat.template)
    }

    /// Every blob, in the order in which bitfields have them: the trunk, then the experts.
    pub fn blobs(&self) -> impl Iterator<Item = BlobRef> + '_ {
        self.trunk_blobs().chain(self.expert_blobs())
    }

    /// The bytes of every expert, by part, by layer, then by expert.
    pub fn expert_blobs(&self) -> impl Iterator<Item = BlobRef> + '_ {
        self.parts.iter().flat_map(|part| &part.experts).map(|expert| expert.blob)
    }

    /// How many experts there are.
    pub fn experts_count(&self) -> usize {
        self.parts.iter().map(|part| part.experts.len()).sum()
    }

    /// The number format that most experts have, the wider one where two are as many; f32 where there are none.
    pub fn usual_precision(&self) -> Precision {
        let count = |precision| self.parts.iter().flat_map(|part| &part.experts).filter(|expert| expert.precision == precision).count();
        Precision::ALL.into_iter().rev().max_by_key(|&precision| count(precision)).unwrap_or(Precision::F32)
    }

    /// The number formats of the experts in words: one, or each with how many have it.
    pub fn precision_text(&self) -> String {
        let all: Vec<_> = self.parts.iter().flat_map(|part| &part.experts).map(|expert| expert.precision).collect();
        let count = |precision| all.iter().filter(|&&other| other == precision).count();
        match &Precision::ALL.into_iter().filter(|&precision| count(precision) > 0).collect::<Vec<_>>()[..] {
            [] => "none".to_owned(),
            [one] => one.to_string(),
            several => several.iter().map(|&precision| format!("{precision} × {}", count(precision))).collect::<Vec<_>>().join(", "),
        }
    }

    /// Bytes of all blobs, each counted once per use.
    pub fn total_bytes(&self) -> u64 {
        self.blobs().map(|blob| blob.length).sum()
    }

    fn validate(&self) -> Result<(), ManifestError> {
        let part = |message: String| Err(ManifestError::Part(message));
        if self.parts.is_empty() || self.parts.len() > PARTS_MAX || !self.parts.is_sorted_by(|a, b| a.kind < b.kind) {
            return part(format!("its parts must be 1 to {PARTS_MAX}, in order, each once"));
        }
        if self.parts[0].kind != PartKind::Text {
            return part("no part makes text".to_owned());
        }
        self.parts.iter().try_for_each(Part::validate)?;
        self.check_towers()?;
        if let Some(blob) = self.tokenizer.iter().chain(&self.chat.template).find(|blob| blob.length > SIDE_FILE_BYTES_MAX) {
            return part(format!("tokenizer or template of {} bytes, the limit is {SIDE_FILE_BYTES_MAX}", blob.length));
        }
        let strings = self.generation.stop_strings.iter().chain(&self.chat.bos_token).chain(&self.chat.eos_token);
        if self.generation.stop_strings.len() > STRINGS_MAX || self.generation.eos_token_ids.len() > STRINGS_MAX {
            return part(format!("more than {STRINGS_MAX} stop rules of a kind"));
        }
        if let Some(string) = strings.into_iter().find(|string| string.is_empty() || string.len() > STRING_BYTES_MAX) {
            return part(format!("a token or stop string of {} bytes, 1 to {STRING_BYTES_MAX} are allowed", string.len()));
        }
        let g = &self.generation;
        let sane =
            (0.0..=100.0).contains(&g.temperature) && (0.0..=1.0).contains(&g.top_p) && (0.01..=100.0).contains(&g.repetition_penalty);
        if !sane {
            return part(format!("sampling defaults are out of range: {g:?}"));
        }
        Ok(())
    }
}

impl ModelManifest {
    /// Checks that what towers make fits the decoder that takes it in.
    fn check_towers(&self) -> Result<(), ManifestError> {
        let decoder = self.decoder();
        let fits = |what: &str, out: u32, tokens: &[u32]| {
            if out != decoder.hidden_size || tokens.iter().any(|&token| token >= decoder.vocab_size) {
                return Err(ManifestError::Part(format!("its {what} makes rows or names tokens that its decoder does not know")));
            }
            Ok(())
        };
        if let Some(vision) = self.vision() {
            fits("vision tower", vision.out, &[vision.image_token, vision.video_token, vision.start_token, vision.end_token])?;
            if vision.deepstack.len() > decoder.layers() as usize {
                return Err(ManifestError::Part("its vision tower makes rows for more layers than there are".to_owned()));
            }
        }
        if let Some(audio) = self.audio() {
            fits("audio tower", audio.out, &[audio.token, audio.start_token, audio.end_token])?;
        }
        Ok(())
    }
}

impl Part {
    /// The decoder that it is or has.
    pub fn decoder(&self) -> Option<&Decoder> {
        self.config.decoder()
    }

    /// Every place that holds an expert, by layer, then by expert.
    pub fn slots(&self) -> impl Iterator<Item = ExpertSlot> + '_ {
        self.config.slots()
    }

    /// The experts with their places, by layer, then by expert.
    pub fn placed_experts(&self) -> impl Iterator<Item = (ExpertSlot, PackedBlob)> + '_ {
        self.slots().zip(self.experts.iter().copied())
    }

    /// The shape of an expert of a number format.
    ///
    /// # Panics
    /// When the part has no decoder, and so no experts.
    pub fn expert_shape(&self, precision: Precision) -> ExpertShape {
        self.decoder().expect("a part with experts has a decoder").expert_shape(precision)
    }

    /// Bytes of the trunk's tensors.
    pub fn trunk_bytes(&self) -> u64 {
        self.trunk.iter().map(|tensor| tensor.blob.length).sum()
    }

    /// Bytes of its largest expert; 0 where there is none.
    pub fn largest_expert(&self) -> u64 {
        self.experts.iter().map(|expert| expert.blob.length).max().unwrap_or(0)
    }

    fn validate(&self) -> Result<(), ManifestError> {
        self.config.validate()?;
        let part = |message: String| Err(ManifestError::Part(message));
        if self.kind != self.config.kind() {
            return part(format!("a part for {} has the shape of one for {}", self.kind, self.config.kind()));
        }
        let expected = self.config.tensors();
        if self.trunk.len() != expected.len() {
            return part(format!("{} trunk tensors, the config makes {}", self.trunk.len(), expected.len()));
        }
        for (tensor, spec) in self.trunk.iter().zip(&expected) {
            let Some(bytes) = spec.bytes(tensor.precision) else {
                return part(format!("trunk tensor {} is {}, which routers and norms never are", tensor.role, tensor.precision));
            };
            if tensor.role != spec.role || tensor.blob.length != bytes {
                return part(format!(
                    "trunk tensor {} of {} bytes stands where {} of {bytes} belongs",
                    tensor.role, tensor.blob.length, spec.role
                ));
            }
        }
        let slots = self.slots().count();
        if self.experts.len() != slots {
            return part(format!("{} experts, the config makes {slots}", self.experts.len()));
        }
        for (slot, expert) in self.slots().zip(&self.experts) {
            let bytes = self.expert_shape(expert.precision).blob_bytes() as u64;
            if expert.blob.length != bytes {
                return part(format!("{slot} has {} bytes, its shape makes {bytes}", expert.blob.length));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::SharedExpert;
    use crate::decoder::tests::small;
    use proptest::prelude::*;

    fn parts_of(decoder: Decoder, precision: impl Fn(ExpertSlot) -> Precision) -> ModelManifest {
        let blob = |name: &str, length: u64| BlobRef { hash: ContentHash::of(name.as_bytes()), length };
        let trunk = decoder.tensors().into_iter().map(|spec| TrunkTensor {
            role: spec.role,
            blob: blob(&spec.role.to_string(), spec.shape.iter().product::<u64>() * 2),
            precision: Precision::Bf16,
        });
        let mut part = Part { kind: PartKind::Text, trunk: trunk.collect(), experts: Vec::new(), config: PartConfig::Decoder(decoder) };
        let expert = |slot: ExpertSlot| {
            let precision = precision(slot);
            PackedBlob { precision, blob: blob(&slot.to_string(), part.expert_shape(precision).blob_bytes() as u64) }
        };
        part.experts = part.slots().map(expert).collect();
        let (chat, generation) = (ChatFormat::default(), GenerationDefaults::default());
        ModelManifest { parent: None, parts: vec![part], tokenizer: None, chat, generation }
    }

    fn parts() -> ModelManifest {
        parts_of(small(), |_| Precision::F32)
    }

    /// What version 2 cannot say.
    fn mixed() -> ModelManifest {
        parts_of(small(), |slot| if slot.expert == 1 { Precision::Q8 } else { Precision::Q4 }).checked().expect("the parts fit")
    }

    fn manifest() -> ModelManifest {
        parts().checked().expect("the parts fit")
    }

    #[test]
    fn finds_each_expert_behind_dense_layers() {
        let manifest = manifest();
        assert_eq!(manifest.experts().count(), 8);
        for (slot, blob) in manifest.experts() {
            assert_eq!(manifest.expert(slot), Some(blob));
        }
        for (layer, expert) in [(1, 0), (0, 4), (3, 0), (u32::MAX, u32::MAX)] {
            assert_eq!(manifest.expert(ExpertSlot::text(layer, expert)), None);
        }
    }

    #[test]
    fn is_written_in_the_oldest_version_that_can_say_it() {
        let version = |manifest: &ModelManifest| {
            let bytes = manifest.to_bytes();
            assert_eq!(ModelManifest::from_bytes(&bytes).as_ref().ok(), Some(manifest));
            u16::from_le_bytes([bytes[0], bytes[1]])
        };
        assert_eq!((version(&manifest()), version(&mixed())), (2, 3));
        let mut decoder = small();
        let crate::decoder::FeedForward::Moe(moe) = &mut decoder.runs[2].feed_forward else { panic!("it has experts") };
        moe.shared = SharedExpert::Gated { width: 3 };
        assert_eq!(version(&parts_of(decoder, |_| Precision::F32).checked().expect("the parts fit")), 3);
        let ModelManifest { parent, parts, tokenizer, chat, generation } = manifest();
        let newer = codec::to_bytes(&ManifestV3 { version: 3, parent, parts, tokenizer, chat, generation });
        assert!(matches!(ModelManifest::from_bytes(&newer), Err(ManifestError::NewerThanNeeded)));
        assert!(matches!(ModelManifest::from_bytes(&[4, 0]), Err(ManifestError::Version(4))));
    }

    #[test]
    fn says_which_precisions_it_has() {
        assert_eq!((manifest().precision_text(), manifest().usual_precision()), ("f32".to_owned(), Precision::F32));
        assert_eq!((mixed().precision_text(), mixed().usual_precision()), ("q8 × 2, q4 × 6".to_owned(), Precision::Q4));
    }

    #[test]
    fn opens_only_the_model_that_was_asked_for() {
        let manifest = manifest();
        let envelope = manifest.seal(&NodeKey::from_secret(&[3; 32])).as_bytes().to_vec();
        assert_eq!(ModelManifest::open(manifest.id(), envelope.clone()).expect("it is this model").0, manifest);
        let other = ModelId(ContentHash::of(b"other"));
        assert!(matches!(ModelManifest::open(other, envelope), Err(ManifestError::OtherModel { .. })));
    }

    #[test]
    fn refuses_parts_that_do_not_fit_the_shape() {
        type Break = fn(&mut ModelManifest);
        let breaks: [Break; 12] = [
            |p| p.parts[0].trunk.truncate(3),
            |p| p.parts[0].trunk.swap(0, 1),
            |p| p.parts[0].trunk[3].blob.length += 2,
            |p| p.parts[0].trunk[1].precision = Precision::Q8,
            |p| p.parts[0].experts.truncate(1),
            |p| p.parts[0].experts[5].blob.length = u64::MAX,
            |p| p.parts[0].experts[5].precision = Precision::Q4,
            |p| p.parts.clear(),
            |p| p.parts.push(p.parts[0].clone()),
            |p| p.tokenizer = Some(BlobRef { hash: ContentHash::of(b""), length: SIDE_FILE_BYTES_MAX + 1 }),
            |p| p.generation.stop_strings = vec![String::new()],
            |p| p.generation.temperature = f32::NAN,
        ];
        for (i, change) in breaks.into_iter().enumerate() {
            let mut parts = parts();
            change(&mut parts);
            assert!(parts.checked().is_err(), "break {i}");
        }
    }

    proptest! {
        #[test]
        fn changed_bytes_are_refused_or_another_model(at in any::<prop::sample::Index>(), bit in 0u8..8, cut in any::<prop::sample::Index>(), new: bool) {
            let manifest = if new { mixed() } else { manifest() };
            let mut bytes = manifest.to_bytes();
            prop_assert!(ModelManifest::from_bytes(&bytes[..cut.index(bytes.len())]).is_err());
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            if let Ok(other) = ModelManifest::from_bytes(&bytes) {
                prop_assert_eq!(other.to_bytes(), bytes);
                prop_assert!(other.id() != manifest.id());
            }
        }
    }
}
