//! A model in other number formats, made of its own blobs.

use std::sync::atomic::{AtomicU64, Ordering};

use protocol::manifest::{PackedBlob, Part, TrunkTensor};
use protocol::tensors::TensorSpec;
use protocol::{BlobRef, ExpertSlot, ModelManifest, PartKind, Precision};
use rayon::prelude::*;

use crate::checkpoint::import::{BlobSink, ImportError};
use crate::convert::{Target, convert_expert, convert_matrix};

/// Why a model was not converted.
#[derive(Debug, thiserror::Error)]
pub enum RequantizeError<E> {
    /// Its weights have lost precision already: what is made of them would not be what others make of the original.
    #[error("this model is {0} already; requantize the model that it was made from")]
    Packed(Precision),
    /// Neither side would change.
    #[error("nothing to do: the model has these precisions already")]
    Same,
    /// A blob could not be read.
    #[error("cannot read {0}")]
    Read(String, #[source] E),
    /// A blob could not be kept, or the sink said to stop.
    #[error(transparent)]
    Import(#[from] ImportError),
}

/// The precision that each tensor and expert is to have, by what it has.
pub struct Precisions<'a> {
    /// Of a trunk's tensor.
    pub tensor: &'a (dyn Fn(PartKind, &TensorSpec, Precision) -> Precision + Sync),
    /// Of an expert.
    pub expert: &'a (dyn Fn(ExpertSlot, Precision) -> Precision + Sync),
}

/// Converts the model of `manifest`, blob by blob; `read` gets the verified bytes of one. Gives the model that an import of the checkpoint
/// with the same target gives.
pub fn requantize<E: Send>(
    manifest: &ModelManifest,
    target: Target,
    read: &(dyn Fn(BlobRef) -> Result<Vec<u8>, E> + Sync),
    sink: &dyn BlobSink,
) -> Result<ModelManifest, RequantizeError<E>> {
    let tensors = manifest.parts.iter().flat_map(|part| &part.trunk).map(|tensor| tensor.precision);
    let experts = manifest.parts.iter().flat_map(|part| &part.experts).map(|expert| expert.precision);
    if let Some(precision) = tensors.chain(experts).find(|precision| precision.is_packed()) {
        return Err(RequantizeError::Packed(precision));
    }
    let precisions = Precisions {
        tensor: &|part, spec, precision| target.of_tensor(part, spec, precision),
        expert: &|_, precision| target.experts.unwrap_or(precision),
    };
    requantize_each(manifest, &precisions, read, sink)
}

/// The same, with a precision for each tensor and expert. What is packed already cannot change.
pub fn requantize_each<E: Send>(
    manifest: &ModelManifest,
    precisions: &Precisions<'_>,
    read: &(dyn Fn(BlobRef) -> Result<Vec<u8>, E> + Sync),
    sink: &dyn BlobSink,
) -> Result<ModelManifest, RequantizeError<E>> {
    let done = AtomicU64::new(0);
    let put = |source: BlobRef, bytes: &[u8]| {
        let blob = sink.put(bytes).map_err(ImportError::Sink)?;
        let so_far = done.fetch_add(source.length, Ordering::Relaxed) + source.length;
        if sink.progress(so_far) { Ok(blob) } else { Err(RequantizeError::Import(ImportError::Interrupted)) }
    };
    let convert = |part: &Part| {
        let specs = part.config.tensors();
        let tensors: Vec<_> = part.trunk.iter().zip(&specs).collect();
        let trunk = tensors.into_par_iter().map(|(tensor, spec)| {
            let to = (precisions.tensor)(part.kind, spec, tensor.precision);
            if to == tensor.precision {
                return Ok(tensor.clone());
            }
            unpacked(tensor.precision)?;
            let bytes = read(tensor.blob).map_err(|error| RequantizeError::Read(tensor.role.to_string(), error))?;
            let blob = put(tensor.blob, &convert_matrix(&bytes, tensor.precision, to, spec.sides()))?;
            Ok(TrunkTensor { precision: to, blob, ..tensor.clone() })
        });
        let trunk = trunk.collect::<Result<_, RequantizeError<E>>>()?;
        let slots: Vec<_> = part.slots().zip(&part.experts).collect();
        let experts = slots.into_par_iter().map(|(slot, expert)| {
            let precision = (precisions.expert)(slot, expert.precision);
            if precision == expert.precision {
                return Ok(*expert);
            }
            unpacked(expert.precision)?;
            let (from, to) = (part.expert_shape(expert.precision), part.expert_shape(precision));
            let bytes = read(expert.blob).map_err(|error| RequantizeError::Read(slot.to_string(), error))?;
            let blob = put(expert.blob, &convert_expert(from.planes().map(|plane| (&bytes[plane], from.precision)), to))?;
            Ok(PackedBlob { precision, blob })
        });
        let experts = experts.collect::<Result<_, RequantizeError<E>>>()?;
        Ok::<_, RequantizeError<E>>(Part { kind: part.kind, config: part.config.clone(), trunk, experts })
    };
    let parts = manifest.parts.iter().map(convert).collect::<Result<_, _>>()?;
    let made = ModelManifest { parts, ..manifest.clone() };
    if made == *manifest {
        return Err(RequantizeError::Same);
    }
    Ok(ModelManifest { parent: Some(manifest.parent.unwrap_or(manifest.id())), ..made }.checked().map_err(ImportError::from)?)
}

fn unpacked<E>(precision: Precision) -> Result<(), RequantizeError<E>> {
    if precision.is_packed() { Err(RequantizeError::Packed(precision)) } else { Ok(()) }
}
