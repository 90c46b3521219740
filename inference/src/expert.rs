//! An expert: a SwiGLU feed-forward network, multiplied in the bytes it was verified in.

use protocol::BlobRef;
use protocol::expert_blob::{ExpertBlobError, ExpertShape};

use crate::aligned::AlignedBytes;
use crate::kernels::{Matrix, matmul, silu_times};

/// A verified expert. There is no other way to make one than from bytes that match their hash.
#[derive(Debug)]
pub struct Expert {
    bytes: AlignedBytes,
    shape: ExpertShape,
}

/// Bytes that are not the expert that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExpertError {
    /// They do not match the hash in the manifest.
    #[error("expert bytes do not match {0:?}")]
    WrongBytes(BlobRef),
    /// They match, and the manifest names something that is no expert of this model.
    #[error(transparent)]
    Blob(#[from] ExpertBlobError),
}

impl Expert {
    /// Verifies `bytes` against the manifest's hash and against the model's shape.
    pub fn verify(bytes: AlignedBytes, blob: BlobRef, expected: ExpertShape) -> Result<Self, ExpertError> {
        if !blob.matches(&bytes) {
            return Err(ExpertError::WrongBytes(blob));
        }
        let shape = ExpertShape::of_blob(&bytes)?;
        if shape != expected {
            return Err(ExpertBlobError::Shape { found: shape, expected }.into());
        }
        Ok(Self { bytes, shape })
    }

    /// Bytes that it takes in memory.
    pub fn bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Returns down(silu(gate(x)) × up(x)) for every row of `x`, (rows, hidden_size).
    pub fn forward(&self, x: &[f32]) -> Vec<f32> {
        let ExpertShape { precision, hidden_size, intermediate_size } = self.shape;
        let [gate_proj, up_proj, down_proj] = self.shape.planes();
        let matrix = |place, rows, columns| Matrix::new(&self.bytes[place], precision, rows, columns);
        let mut middle = matmul(matrix(gate_proj, intermediate_size, hidden_size), x); // (rows, intermediate_size)
        let up = matmul(matrix(up_proj, intermediate_size, hidden_size), x); // (rows, intermediate_size)
        silu_times(&mut middle, &up);
        matmul(matrix(down_proj, hidden_size, intermediate_size), &middle)
    }
}
