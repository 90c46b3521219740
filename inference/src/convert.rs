//! Weights from one number format to another, the same bytes on every machine.

use std::sync::atomic::{AtomicU64, Ordering};

use half::{bf16, f16};
use protocol::decoder::TensorSpec;
use protocol::expert_blob::{ExpertShape, HEADER_BYTES};
use protocol::manifest::{PackedBlob, Part, TrunkTensor};
use protocol::{BlobRef, ModelManifest, Precision};
use rayon::prelude::*;

use crate::checkpoint::import::{BlobSink, ImportError};
use crate::kernels::{pack, weights_of_row};

/// The number formats that a model is converted to; nothing stands for "as it is".
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Target {
    /// Of the experts.
    pub experts: Option<Precision>,
    /// Of the trunk's matrices but the routers.
    pub trunk: Option<Precision>,
}

impl Target {
    /// The same for all.
    pub fn all(precision: Option<Precision>) -> Self {
        Self { experts: precision, trunk: precision }
    }

    pub(crate) fn of_tensor(self, spec: &TensorSpec, own: Precision) -> Precision {
        self.trunk.filter(|_| spec.packable).unwrap_or(own)
    }
}

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
    let done = AtomicU64::new(0);
    let put = |source: BlobRef, bytes: &[u8]| {
        let blob = sink.put(bytes).map_err(ImportError::Sink)?;
        let so_far = done.fetch_add(source.length, Ordering::Relaxed) + source.length;
        if sink.progress(so_far) { Ok(blob) } else { Err(RequantizeError::Import(ImportError::Interrupted)) }
    };
    let convert = |part: &Part| {
        let specs = part.decoder().tensors();
        let tensors: Vec<_> = part.trunk.iter().zip(&specs).collect();
        let trunk = tensors.into_par_iter().map(|(tensor, spec)| {
            let to = target.of_tensor(spec, tensor.precision);
            if to == tensor.precision {
                return Ok(tensor.clone());
            }
            let bytes = read(tensor.blob).map_err(|error| RequantizeError::Read(tensor.role.to_string(), error))?;
            let blob = put(tensor.blob, &convert_matrix(&bytes, tensor.precision, to, spec.sides()))?;
            Ok(TrunkTensor { precision: to, blob, ..tensor.clone() })
        });
        let trunk = trunk.collect::<Result<_, RequantizeError<E>>>()?;
        let slots: Vec<_> = part.slots().zip(&part.experts).collect();
        let experts = slots.into_par_iter().map(|(slot, expert)| {
            let precision = target.experts.unwrap_or(expert.precision);
            if precision == expert.precision {
                return Ok(*expert);
            }
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

/// Rewrites a matrix of (rows, columns): to the nearest even where plain weights become narrower, else by
/// [packing](crate::kernels) them.
pub fn convert_matrix(source: &[u8], from: Precision, to: Precision, (rows, columns): (usize, usize)) -> Vec<u8> {
    let mut out = vec![0; to.matrix_bytes(rows, columns)];
    convert_into(source, from, &mut out, to, (rows, columns));
    out
}

/// Makes the blob of an expert from its three planes, each in its own format.
pub fn convert_expert(planes: [(&[u8], Precision); 3], shape: ExpertShape) -> Vec<u8> {
    let mut blob = vec![0; shape.blob_bytes()];
    blob[..HEADER_BYTES].copy_from_slice(&shape.header());
    let ExpertShape { precision, hidden_size, intermediate_size } = shape;
    let sides = [(intermediate_size, hidden_size), (intermediate_size, hidden_size), (hidden_size, intermediate_size)];
    for (((source, from), place), sides) in planes.into_iter().zip(shape.planes()).zip(sides) {
        convert_into(source, from, &mut blob[place], precision, sides);
    }
    blob
}

fn convert_into(source: &[u8], from: Precision, out: &mut [u8], to: Precision, (rows, columns): (usize, usize)) {
    if from == to {
        return out.copy_from_slice(source);
    }
    if to.is_packed() {
        return pack(to, rows, columns, out, |row, values| read_row(source, from, columns, row, values));
    }
    let mut values = vec![0.0; columns];
    for (row, out) in out.chunks_exact_mut(to.matrix_bytes(1, columns)).enumerate() {
        read_row(source, from, columns, row, &mut values);
        write_row(&values, to, out);
    }
}

/// Reads a row of any format; plain weights need no alignment.
fn read_row(source: &[u8], from: Precision, columns: usize, row: usize, out: &mut [f32]) {
    if from.is_packed() {
        return weights_of_row(source, from, columns, row, out);
    }
    let stride = from.matrix_bytes(1, columns);
    let bytes = &source[row * stride..][..stride];
    match from {
        Precision::F32 => out.iter_mut().zip(bytes.as_chunks().0).for_each(|(out, b)| *out = f32::from_le_bytes(*b)),
        Precision::F16 => out.iter_mut().zip(bytes.as_chunks().0).for_each(|(out, b)| *out = f16::from_le_bytes(*b).to_f32()),
        _ => out.iter_mut().zip(bytes.as_chunks().0).for_each(|(out, b)| *out = bf16::from_le_bytes(*b).to_f32()),
    }
}

fn write_row(values: &[f32], to: Precision, out: &mut [u8]) {
    match to {
        Precision::F32 => out.as_chunks_mut().0.iter_mut().zip(values).for_each(|(out, x)| *out = x.to_le_bytes()),
        Precision::F16 => out.as_chunks_mut().0.iter_mut().zip(values).for_each(|(out, x)| *out = f16::from_f32(*x).to_le_bytes()),
        _ => out.as_chunks_mut().0.iter_mut().zip(values).for_each(|(out, x)| *out = bf16::from_f32(*x).to_le_bytes()),
    }
}
