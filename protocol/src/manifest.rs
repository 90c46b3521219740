//! What a model is made of: every tensor of the trunk and every expert by hash, under one id.
//!
//! The id is the hash of the manifest's bytes, so it depends on weights, shape, tokenizer, chat format and defaults,
//! and on nothing else: not on names, paths, times, publishers or how a checkpoint was sharded.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::codec::{self, CodecError};
use crate::envelope::{Domain, EnvelopeError, SignedEnvelope};
use crate::hash::{BlobRef, ContentHash, ModelId};
use crate::identity::NodeKey;
use crate::model_config::{ConfigError, ModelConfig};
use crate::precision::Precision;

/// Longest manifest in bytes that is read.
pub const MANIFEST_BYTES_MAX: usize = 16 << 20;
/// Longest tokenizer or chat template, in bytes.
pub const SIDE_FILE_BYTES_MAX: u64 = 64 << 20;
const STRINGS_MAX: usize = 16;
const STRING_BYTES_MAX: usize = 256;

/// Where an expert stands in a model.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct ExpertSlot {
    /// The transformer layer.
    pub layer: u32,
    /// Its number within the layer.
    pub expert: u32,
}

impl fmt::Display for ExpertSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layer {} expert {}", self.layer, self.expert)
    }
}

/// One tensor of the trunk: its plain little-endian bytes, row by row, or its panels.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TrunkTensor {
    /// Its name in a text-only checkpoint.
    pub name: String,
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
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ModelManifest {
    /// The format of this manifest: [`VERSION`].
    pub version: u16,
    /// The model this one was converted from.
    pub parent: Option<ModelId>,
    /// The model's shape.
    pub config: ModelConfig,
    /// `tokenizer.json` as published; without one the model is used by token ids.
    pub tokenizer: Option<BlobRef>,
    /// How a conversation becomes text.
    pub chat: ChatFormat,
    /// Sampling and stop rules.
    pub generation: GenerationDefaults,
    /// All weights but the experts, in the order of [`ModelConfig::trunk_tensors`].
    pub trunk: Vec<TrunkTensor>,
    /// Number format of the experts.
    pub expert_precision: Precision,
    /// The experts, in the order of [`ModelConfig::expert_slots`].
    pub experts: Vec<BlobRef>,
}

/// The format that this program reads and writes.
pub const VERSION: u16 = 2;

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
    #[error("manifest has version {0}, this program knows version {VERSION}")]
    Version(u16),
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

    /// The canonical bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        codec::to_bytes(self)
    }

    /// Reads canonical bytes and checks every part against the shape.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() > MANIFEST_BYTES_MAX {
            return Err(ManifestError::TooLong(bytes.len()));
        }
        // The version comes first: what follows may have changed with it.
        if let Some(&version) = bytes.first_chunk().filter(|version| u16::from_le_bytes(**version) != VERSION) {
            return Err(ManifestError::Version(u16::from_le_bytes(version)));
        }
        let manifest: Self = codec::from_bytes(bytes)?;
        manifest.validate()?;
        Ok(manifest)
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

    /// The expert in `slot`; nothing where the model has no such slot.
    pub fn expert(&self, slot: ExpertSlot) -> Option<BlobRef> {
        if slot.expert >= self.config.num_experts || slot.layer >= self.config.num_hidden_layers || !self.config.is_moe(slot.layer) {
            return None;
        }
        let dense_before = self.config.dense_layers.partition_point(|&layer| layer < slot.layer) as u32;
        let index = (slot.layer - dense_before) * self.config.num_experts + slot.expert;
        self.experts.get(index as usize).copied()
    }

    /// Every blob that belongs to the trunk: its tensors, the tokenizer and the chat template.
    pub fn trunk_blobs(&self) -> impl Iterator<Item = BlobRef> + '_ {
        self.trunk.iter().map(|tensor| tensor.blob).chain(self.tokenizer).chain(self.chat.template)
    }

    /// Every blob, in the order in which bitfields have them: the trunk, then the experts.
    pub fn blobs(&self) -> impl Iterator<Item = BlobRef> + '_ {
        self.trunk_blobs().chain(self.experts.iter().copied())
    }

    /// Bytes of all blobs, each counted once per use.
    pub fn total_bytes(&self) -> u64 {
        self.blobs().map(|blob| blob.length).sum()
    }

    fn validate(&self) -> Result<(), ManifestError> {
        if self.version != VERSION {
            return Err(ManifestError::Version(self.version));
        }
        self.config.validate()?;
        let part = |message: String| Err(ManifestError::Part(message));
        let expected = self.config.trunk_tensors();
        if self.trunk.len() != expected.len() {
            return part(format!("{} trunk tensors, the config makes {}", self.trunk.len(), expected.len()));
        }
        for (tensor, spec) in self.trunk.iter().zip(&expected) {
            let Some(bytes) = spec.bytes(tensor.precision) else {
                return part(format!("trunk tensor {} is {}, which routers and norms never are", tensor.name, tensor.precision));
            };
            if tensor.name != spec.name || tensor.blob.length != bytes {
                return part(format!(
                    "trunk tensor {} of {} bytes stands where {} of {bytes} belongs",
                    tensor.name, tensor.blob.length, spec.name
                ));
            }
        }
        let slots = self.config.moe_layers().count() * self.config.num_experts as usize;
        if self.experts.len() != slots {
            return part(format!("{} experts, the config makes {slots}", self.experts.len()));
        }
        let bytes = self.config.expert_shape(self.expert_precision).blob_bytes() as u64;
        if let Some((slot, blob)) = self.config.expert_slots().zip(&self.experts).find(|(_, blob)| blob.length != bytes) {
            return part(format!("{slot} has {} bytes, its shape makes {bytes}", blob.length));
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model_config::tests::small;
    use proptest::prelude::*;

    fn parts() -> ModelManifest {
        let config = small();
        let blob = |name: &str, length: u64| BlobRef { hash: ContentHash::of(name.as_bytes()), length };
        let trunk = config
            .trunk_tensors()
            .into_iter()
            .map(|spec| TrunkTensor {
                blob: blob(&spec.name, spec.shape.iter().product::<u64>() * 2),
                name: spec.name,
                precision: Precision::Bf16,
            })
            .collect();
        let bytes = config.expert_shape(Precision::F32).blob_bytes() as u64;
        let experts = config.expert_slots().map(|slot| blob(&slot.to_string(), bytes)).collect();
        ModelManifest {
            version: VERSION,
            parent: None,
            config,
            tokenizer: None,
            chat: ChatFormat::default(),
            generation: GenerationDefaults::default(),
            trunk,
            expert_precision: Precision::F32,
            experts,
        }
    }

    fn manifest() -> ModelManifest {
        parts().checked().expect("the parts fit")
    }

    #[test]
    fn finds_each_expert_behind_dense_layers() {
        let manifest = manifest();
        for (slot, blob) in manifest.config.expert_slots().zip(&manifest.experts) {
            assert_eq!(manifest.expert(slot), Some(*blob));
        }
        for (layer, expert) in [(1, 0), (0, 4), (3, 0), (u32::MAX, u32::MAX)] {
            assert_eq!(manifest.expert(ExpertSlot { layer, expert }), None);
        }
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
        let breaks: [Break; 9] = [
            |p| drop(p.trunk.pop()),
            |p| p.trunk.swap(0, 1),
            |p| p.trunk[3].blob.length += 2,
            |p| p.trunk[1].precision = Precision::Q8,
            |p| p.experts.truncate(1),
            |p| p.experts[5].length = u64::MAX,
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
        fn changed_bytes_are_refused_or_another_model(at in any::<prop::sample::Index>(), bit in 0u8..8, cut in any::<prop::sample::Index>()) {
            let manifest = manifest();
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
