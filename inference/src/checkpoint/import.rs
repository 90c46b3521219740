//! Turns a checkpoint into blobs and a manifest, expert by expert, so that memory does not grow with the model.
//!
//! Where blobs go is the caller's: this hands each over once and asks for nothing back but "stored".

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};

use protocol::expert_blob::ExpertShape;
use protocol::manifest::{ChatFormat, ManifestError, PackedBlob, Part, TrunkTensor};
use protocol::tensors::TensorSpec;
use protocol::{BlobRef, ModelManifest, Precision};
use rayon::prelude::*;

use super::{Checkpoint, ExpertTensors, PartTensors, Problems, TensorSource};
use crate::convert::{Target, convert_expert, convert_matrix};

/// Largest magnitude that a weight may have: the largest of f16, beyond anything that training leaves.
pub const WEIGHT_MAGNITUDE_MAX: f32 = 65504.0;

/// Takes blobs in.
pub trait BlobSink: Sync {
    /// Keeps `bytes` under their hash; the text of an error is shown to the user.
    fn put(&self, bytes: &[u8]) -> Result<BlobRef, String>;
    /// Told how many bytes of the checkpoint have been dealt with; answers whether to go on.
    fn progress(&self, bytes_done: u64) -> bool;
}

/// Why an import ended early.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// Weights that no model can have: all of them, by tensor.
    #[error(transparent)]
    Refused(super::CheckpointError),
    /// The sink could not keep a blob.
    #[error("{0}")]
    Sink(String),
    /// The sink said to stop.
    #[error("import was interrupted")]
    Interrupted,
    /// The parts make no valid manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
}

/// Imports `checkpoint`, its weights as they are or converted. Routers and norms keep their format.
pub fn import(checkpoint: &Checkpoint, target: Target, sink: &dyn BlobSink) -> Result<ModelManifest, ImportError> {
    let work = Import { checkpoint, sink, done: AtomicU64::new(0), problems: Mutex::new(Problems::default()) };
    work.check_tied_head();
    let (mut sources, mut parts) = (Vec::new(), Vec::new());
    for tensors in &checkpoint.parts {
        let Converted { source, made } = work.part(tensors, target)?;
        sources.push(source);
        parts.push(made);
    }
    let problems = work.problems.into_inner().unwrap_or_else(PoisonError::into_inner);
    if !problems.is_empty() {
        return Err(ImportError::Refused(super::CheckpointError::Refused(problems)));
    }
    let put = |bytes: &[u8]| sink.put(bytes).map_err(ImportError::Sink);
    let made = ModelManifest {
        parent: None,
        parts,
        tokenizer: checkpoint.tokenizer.as_deref().map(put).transpose()?,
        chat: ChatFormat {
            template: checkpoint.chat_template.as_deref().map(|text| put(text.as_bytes())).transpose()?,
            bos_token: checkpoint.bos_token.clone(),
            eos_token: checkpoint.eos_token.clone(),
        },
        generation: checkpoint.generation.clone(),
    };
    let source = ModelManifest { parts: sources, ..made.clone() };
    let source = source.checked()?;
    if made == source {
        return Ok(source);
    }
    Ok(ModelManifest { parent: Some(source.id()), ..made }.checked()?)
}

struct Import<'a> {
    checkpoint: &'a Checkpoint,
    sink: &'a dyn BlobSink,
    done: AtomicU64,
    problems: Mutex<Problems>,
}

/// What was stored, and what it was made from.
struct Converted<T> {
    source: T,
    made: T,
}

impl Import<'_> {
    fn part(&self, tensors: &PartTensors, target: Target) -> Result<Converted<Part>, ImportError> {
        let kind = tensors.config.kind();
        let specs = tensors.config.tensors();
        let trunk = tensors.trunk.iter().zip(&specs);
        let trunk = trunk.map(|(tensor, spec)| self.trunk_tensor(tensor, spec, target.of_tensor(kind, spec, tensor.precision)));
        let trunk: Vec<_> = trunk.collect::<Result<_, _>>()?;
        let own = tensors.expert_precision;
        let to = target.experts.unwrap_or(own);
        let shape = |precision| tensors.config.decoder().map(|decoder| decoder.expert_shape(precision));
        let (from, to) = (shape(own), shape(to));
        let experts = tensors.experts.par_iter().map(|expert| {
            let (Some(from), Some(to)) = (from, to) else { unreachable!("a part with experts has a decoder") };
            self.expert(expert, from, to)
        });
        let experts: Vec<_> = experts.collect::<Result<_, _>>()?;
        let part = |trunk, experts| Part { kind, config: tensors.config.clone(), trunk, experts };
        Ok(Converted {
            made: part(trunk.iter().map(|tensor| tensor.made.clone()).collect(), experts.iter().map(|expert| expert.made).collect()),
            source: part(
                trunk.into_iter().map(|tensor| tensor.source).collect(),
                experts.into_iter().map(|expert| expert.source).collect(),
            ),
        })
    }

    fn trunk_tensor(&self, tensor: &TensorSource, spec: &TensorSpec, target: Precision) -> Result<Converted<TrunkTensor>, ImportError> {
        let bytes = self.checkpoint.bytes(tensor);
        let entry = |precision, blob| TrunkTensor { role: spec.role, precision, blob };
        // The blob of a refused tensor is never named by a manifest.
        let source = BlobRef::of(bytes);
        let blob = if !self.check(tensor) {
            source
        } else if target == tensor.precision {
            self.sink.put(bytes).map_err(ImportError::Sink)?
        } else {
            let converted = convert_matrix(bytes, tensor.precision, target, spec.sides());
            self.sink.put(&converted).map_err(ImportError::Sink)?
        };
        self.advance(bytes.len())?;
        Ok(Converted { source: entry(tensor.precision, source), made: entry(target, blob) })
    }

    fn expert(&self, expert: &ExpertTensors, from: ExpertShape, to: ExpertShape) -> Result<Converted<PackedBlob>, ImportError> {
        let planes = [&expert.gate_proj, &expert.up_proj, &expert.down_proj];
        let fine = planes.map(|tensor| self.check(tensor)).iter().all(|&fine| fine);
        let source = self.blob(planes, from);
        let source_ref = BlobRef::of(&source);
        let made = if !fine {
            source_ref
        } else if to == from {
            self.sink.put(&source).map_err(ImportError::Sink)?
        } else {
            self.sink.put(&self.blob(planes, to)).map_err(ImportError::Sink)?
        };
        self.advance(planes.iter().map(|tensor| self.checkpoint.bytes(tensor).len()).sum())?;
        let blob = |shape: ExpertShape, blob| PackedBlob { precision: shape.precision, blob };
        Ok(Converted { source: blob(from, source_ref), made: blob(to, made) })
    }

    fn blob(&self, planes: [&TensorSource; 3], shape: ExpertShape) -> Vec<u8> {
        convert_expert(planes.map(|tensor| (self.checkpoint.bytes(tensor), tensor.precision)), shape)
    }

    /// Says whether all weights are finite and within bounds; notes the tensor when not.
    fn check(&self, tensor: &TensorSource) -> bool {
        let bytes = self.checkpoint.bytes(tensor);
        let Some((count, first)) = out_of_bounds(bytes, tensor.precision) else { return true };
        let what = format!(
            "{count} of {} weights are not finite or beyond ±{WEIGHT_MAGNITUDE_MAX}, the first at index {first}",
            bytes.len() / tensor.precision.matrix_bytes(1, 1)
        );
        self.note(tensor, &what);
        false
    }

    fn check_tied_head(&self) {
        if let Some(head) = &self.checkpoint.tied_head
            && self.checkpoint.bytes(head) != self.checkpoint.bytes(&self.checkpoint.parts[0].trunk[0])
        {
            self.note(head, "tie_word_embeddings is true, yet this is not a copy of the embeddings");
        }
    }

    fn note(&self, tensor: &TensorSource, what: &str) {
        let mut problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        problems.add(&tensor.name, what);
    }

    fn advance(&self, bytes: usize) -> Result<(), ImportError> {
        let done = self.done.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        if self.sink.progress(done) { Ok(()) } else { Err(ImportError::Interrupted) }
    }
}

/// Counts the weights that are not finite or too large, and says where the first is.
fn out_of_bounds(bytes: &[u8], precision: Precision) -> Option<(usize, usize)> {
    // Without their sign, floating-point numbers order as their bits do, infinities and NaN last.
    let bad = |i: usize| match precision {
        Precision::F32 => read32(bytes, i) & 0x7fff_ffff > WEIGHT_MAGNITUDE_MAX.to_bits(),
        Precision::Bf16 => read16(bytes, i) & 0x7fff > (WEIGHT_MAGNITUDE_MAX.to_bits() >> 16) as u16,
        Precision::F16 => read16(bytes, i) & 0x7fff >= 0x7c00,
        _ => unreachable!("checkpoints hold plain weights"),
    };
    let weights = bytes.len() / precision.matrix_bytes(1, 1);
    let count = (0..weights).filter(|&i| bad(i)).count();
    (count > 0).then(|| (count, (0..weights).find(|&i| bad(i)).unwrap_or(0)))
}

fn read16(bytes: &[u8], i: usize) -> u16 {
    u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]])
}

fn read32(bytes: &[u8], i: usize) -> u32 {
    u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    #[test]
    fn bounds_hold_at_their_edges_in_every_format() {
        let cases: [(f32, bool); 8] = [
            (0.0, true),
            (-65504.0, true),
            (65505.0, false),
            (1e30, false),
            (f32::NAN, false),
            (f32::INFINITY, false),
            (f32::NEG_INFINITY, false),
            (1e-40, true),
        ];
        for (value, fine) in cases {
            assert_eq!(
                out_of_bounds(&[1f32.to_le_bytes(), value.to_le_bytes()].concat(), Precision::F32),
                (!fine).then_some((1, 1)),
                "{value}"
            );
        }
        for (bits, fine) in [(f16::MAX, true), (f16::MIN, true), (f16::INFINITY, false), (f16::NAN, false)] {
            assert_eq!(out_of_bounds(&bits.to_le_bytes(), Precision::F16).is_none(), fine, "{bits}");
        }
        for (bits, fine) in [(bf16::from_f32(65280.0), true), (bf16::from_f32(65536.0), false), (bf16::NAN, false)] {
            assert_eq!(out_of_bounds(&bits.to_le_bytes(), Precision::Bf16).is_none(), fine, "{bits}");
        }
    }
}
