//! A model in other number formats, made of its own blobs.

use std::sync::atomic::{AtomicU64, Ordering};

use protocol::manifest::{PackedBlob, Part, TrunkTensor};
use protocol::tensors::{LayerTensor, TensorRole, TensorSpec};
use protocol::{BlobRef, ExpertSlot, ModelManifest, PartKind, Precision};
use rayon::prelude::*;

use crate::calibration::{Calibration, CalibrationError};
use crate::checkpoint::import::{BlobSink, ImportError};
use crate::convert::{Target, convert_compensated, convert_expert_compensated};
use crate::kernels::Compensation;
use crate::moments::LayerCompensation;

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
    /// The text that was to calibrate could not be led through the model.
    #[error(transparent)]
    Calibration(#[from] CalibrationError),
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
/// with the same target gives, unless a `calibration` makes good what rounding does to its text part.
pub fn requantize<E: Send>(
    manifest: &ModelManifest,
    target: Target,
    calibration: Option<Calibration<'_>>,
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
    requantize_each(manifest, &precisions, calibration, read, sink)
}

/// The same, with a precision for each tensor and expert. What is packed already cannot change.
pub fn requantize_each<E: Send>(
    manifest: &ModelManifest,
    precisions: &Precisions<'_>,
    mut calibration: Option<Calibration<'_>>,
    read: &(dyn Fn(BlobRef) -> Result<Vec<u8>, E> + Sync),
    sink: &dyn BlobSink,
) -> Result<ModelManifest, RequantizeError<E>> {
    let conversion = Conversion { precisions, read, sink, done: AtomicU64::new(0) };
    let convert = |part: &Part| match &mut calibration {
        Some(calibration) if part.kind == PartKind::Text => conversion.calibrated(part, calibration),
        _ => {
            let mut made = part.clone();
            conversion.convert(part, &mut made, &Compensations::None, |_| true, |_| true)?;
            Ok(made)
        }
    };
    let parts = manifest.parts.iter().map(convert).collect::<Result<_, RequantizeError<E>>>()?;
    let made = ModelManifest { parts, ..manifest.clone() };
    if made == *manifest {
        return Err(RequantizeError::Same);
    }
    Ok(ModelManifest { parent: Some(manifest.parent.unwrap_or(manifest.id())), ..made }.checked().map_err(ImportError::from)?)
}

/// What makes good what rounding does to some tensors and experts.
enum Compensations {
    None,
    Layer(LayerCompensation),
    Head(Option<Compensation>),
}

impl Compensations {
    fn of_tensor(&self, role: TensorRole) -> Option<&Compensation> {
        match (self, role) {
            (Self::Layer(layer), TensorRole::Layer(_, LayerTensor::Query | LayerTensor::Key | LayerTensor::Value)) => {
                layer.mixer_input.as_ref()
            }
            (Self::Layer(layer), TensorRole::Layer(_, LayerTensor::Output)) => layer.mixer_output.as_ref(),
            (Self::Head(head), _) => head.as_ref(),
            _ => None,
        }
    }

    fn of_expert(&self, slot: ExpertSlot) -> [Option<Compensation>; 2] {
        if let Self::Layer(layer) = self { layer.of_expert(slot) } else { [None, None] }
    }
}

/// A conversion under way.
struct Conversion<'a, E> {
    precisions: &'a Precisions<'a>,
    read: &'a (dyn Fn(BlobRef) -> Result<Vec<u8>, E> + Sync),
    sink: &'a dyn BlobSink,
    /// Bytes of source.
    done: AtomicU64,
}

impl<E: Send> Conversion<'_, E> {
    /// Converts a part layer by layer, then its head, then what no text goes through.
    fn calibrated(&self, part: &Part, calibration: &mut Calibration<'_>) -> Result<Part, RequantizeError<E>> {
        let mut made = part.clone();
        for number in 0..part.config.decoder().map_or(0, protocol::Decoder::layers) {
            let layer = Compensations::Layer(calibration.next_layer(|| self.sink.progress(self.done.load(Ordering::Relaxed)))?);
            let of_layer = |role| matches!(role, TensorRole::Layer(layer, _) if layer == number);
            self.convert(part, &mut made, &layer, of_layer, |slot| slot.layer == number)?;
        }
        // A tied embedding makes the logits, too.
        let has_head = part.trunk.iter().any(|tensor| tensor.role == TensorRole::Head);
        let head = if has_head { TensorRole::Head } else { TensorRole::Embedding };
        self.convert(part, &mut made, &Compensations::Head(calibration.head()), |role| role == head, |_| false)?;
        let is_rest = |role| role != head && !matches!(role, TensorRole::Layer(..));
        self.convert(part, &mut made, &Compensations::None, is_rest, |_| false)?;
        Ok(made)
    }

    /// Converts some of the tensors and experts of `part` into `made`, which began as its copy.
    fn convert(
        &self,
        part: &Part,
        made: &mut Part,
        compensations: &Compensations,
        tensors: impl Fn(TensorRole) -> bool + Sync,
        experts: impl Fn(ExpertSlot) -> bool + Sync,
    ) -> Result<(), RequantizeError<E>> {
        let specs = part.config.tensors();
        let trunk: Vec<_> = part.trunk.iter().zip(&mut made.trunk).zip(&specs).collect();
        trunk.into_par_iter().filter(|((tensor, _), _)| tensors(tensor.role)).try_for_each(|((tensor, made), spec)| {
            let to = (self.precisions.tensor)(part.kind, spec, tensor.precision);
            if to == tensor.precision {
                return Ok::<_, RequantizeError<E>>(());
            }
            unpacked(tensor.precision)?;
            let bytes = (self.read)(tensor.blob).map_err(|error| RequantizeError::Read(tensor.role.to_string(), error))?;
            let compensation = compensations.of_tensor(tensor.role);
            let blob = self.put(tensor.blob, &convert_compensated(&bytes, tensor.precision, to, spec.sides(), compensation))?;
            *made = TrunkTensor { precision: to, blob, ..tensor.clone() };
            Ok(())
        })?;
        let slots: Vec<_> = part.slots().zip(&part.experts).zip(&mut made.experts).collect();
        slots.into_par_iter().filter(|((slot, _), _)| experts(*slot)).try_for_each(|((slot, expert), made)| {
            let precision = (self.precisions.expert)(slot, expert.precision);
            if precision == expert.precision {
                return Ok(());
            }
            unpacked(expert.precision)?;
            let (from, to) = (part.expert_shape(expert.precision), part.expert_shape(precision));
            let bytes = (self.read)(expert.blob).map_err(|error| RequantizeError::Read(slot.to_string(), error))?;
            let planes = from.planes().map(|plane| (&bytes[plane], from.precision));
            let compensations = compensations.of_expert(slot);
            let blob = convert_expert_compensated(planes, to, compensations.each_ref().map(Option::as_ref));
            *made = PackedBlob { precision, blob: self.put(expert.blob, &blob)? };
            Ok(())
        })
    }

    fn put(&self, source: BlobRef, bytes: &[u8]) -> Result<BlobRef, RequantizeError<E>> {
        let blob = self.sink.put(bytes).map_err(ImportError::Sink)?;
        let so_far = self.done.fetch_add(source.length, Ordering::Relaxed) + source.length;
        if self.sink.progress(so_far) { Ok(blob) } else { Err(RequantizeError::Import(ImportError::Interrupted)) }
    }
}

fn unpacked<E>(precision: Precision) -> Result<(), RequantizeError<E>> {
    if precision.is_packed() { Err(RequantizeError::Packed(precision)) } else { Ok(()) }
}
