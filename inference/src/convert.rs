//! Weights from one number format to another, the same bytes on every machine.

use half::{bf16, f16};
use protocol::expert_blob::{ExpertShape, HEADER_BYTES};
use protocol::tensors::TensorSpec;
use protocol::{PartKind, Precision};

use crate::kernels::{Compensation, pack, weights_of_row};

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

    /// What a user gets who says this of a model: errors in what every token goes through cost more than in experts, so a trunk keeps 6 bits.
    pub fn usual(precision: Precision) -> Self {
        let trunk = match precision {
            Precision::Q4 | Precision::Q3 | Precision::Q2 => Precision::Q6,
            other => other,
        };
        Self { experts: Some(precision), trunk: Some(trunk) }
    }

    /// Towers are never narrower than q8, and what speaks stays as it is: what less does to them has not been measured.
    pub(crate) fn of_tensor(self, part: PartKind, spec: &TensorSpec, own: Precision) -> Precision {
        let trunk = self.trunk.filter(|_| spec.packable);
        match part {
            PartKind::Text => trunk.unwrap_or(own),
            PartKind::Vision | PartKind::Audio => {
                trunk.map_or(own, |precision| if precision.is_packed() { Precision::Q8 } else { precision })
            }
            PartKind::Talker | PartKind::CodePredictor | PartKind::CodeToWave => own,
        }
    }
}

/// Rewrites a matrix of (rows, columns): to the nearest even where plain weights become narrower, else by
/// [packing](crate::kernels) them.
pub fn convert_matrix(source: &[u8], from: Precision, to: Precision, sides: (usize, usize)) -> Vec<u8> {
    convert_compensated(source, from, to, sides, None)
}

/// The same, with what rounding does made good where weights are packed.
pub(crate) fn convert_compensated(
    source: &[u8],
    from: Precision,
    to: Precision,
    (rows, columns): (usize, usize),
    compensation: Option<&Compensation>,
) -> Vec<u8> {
    let mut out = vec![0; to.matrix_bytes(rows, columns)];
    convert_into(source, from, &mut out, to, (rows, columns), compensation);
    out
}

/// Makes the blob of an expert from its three planes, each in its own format.
pub fn convert_expert(planes: [(&[u8], Precision); 3], shape: ExpertShape) -> Vec<u8> {
    convert_expert_compensated(planes, shape, [None; 2])
}

/// The same, with what rounding does made good where weights are packed: by what goes into the expert, and by what goes into `down_proj`.
pub(crate) fn convert_expert_compensated(
    planes: [(&[u8], Precision); 3],
    shape: ExpertShape,
    [inputs, middle]: [Option<&Compensation>; 2],
) -> Vec<u8> {
    let mut blob = vec![0; shape.blob_bytes()];
    blob[..HEADER_BYTES].copy_from_slice(&shape.header());
    let ExpertShape { precision, hidden_size, intermediate_size } = shape;
    let sides = [(intermediate_size, hidden_size), (intermediate_size, hidden_size), (hidden_size, intermediate_size)];
    let planes = planes.into_iter().zip(shape.planes().into_iter().zip(precision.of_planes())).zip(sides).zip([inputs, inputs, middle]);
    for ((((source, from), (place, to)), sides), compensation) in planes {
        convert_into(source, from, &mut blob[place], to, sides, compensation);
    }
    blob
}

fn convert_into(
    source: &[u8],
    from: Precision,
    out: &mut [u8],
    to: Precision,
    (rows, columns): (usize, usize),
    compensation: Option<&Compensation>,
) {
    if from == to {
        return out.copy_from_slice(source);
    }
    if to.is_packed() {
        return pack(to, rows, columns, out, compensation, |row, values| read_row(source, from, columns, row, values));
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
