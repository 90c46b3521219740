//! An expert: a SwiGLU feed-forward network, multiplied in the bytes it was verified in.

use protocol::expert_blob::{ExpertBlobError, ExpertShape};

use crate::aligned::AlignedBytes;
use crate::kernels::Matrix;

/// An expert of a known shape, ready to be multiplied.
#[derive(Debug)]
pub struct Expert {
    bytes: AlignedBytes,
    shape: ExpertShape,
}

impl Expert {
    /// Wraps bytes that the caller has matched with the hash in the manifest, if they are an expert of the model's shape.
    pub fn from_verified(bytes: AlignedBytes, expected: ExpertShape) -> Result<Self, ExpertBlobError> {
        let shape = ExpertShape::of_blob(&bytes)?;
        if shape == expected { Ok(Self { bytes, shape }) } else { Err(ExpertBlobError::Shape { found: shape, expected }) }
    }

    /// Bytes that it takes in memory.
    pub fn bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Its shape.
    pub fn shape(&self) -> ExpertShape {
        self.shape
    }

    /// Gives the memory back.
    pub(crate) fn into_bytes(self) -> AlignedBytes {
        self.bytes
    }

    /// `gate_proj` and `up_proj`, (intermediate_size, hidden_size), and `down_proj`, (hidden_size, intermediate_size).
    pub(crate) fn matrices(&self) -> [Matrix<'_>; 3] {
        let ExpertShape { precision, hidden_size, intermediate_size } = self.shape;
        let ([gate_proj, up_proj, down_proj], [gate, up, down]) = (self.shape.planes(), precision.of_planes());
        [
            Matrix::new(&self.bytes[gate_proj], gate, intermediate_size, hidden_size),
            Matrix::new(&self.bytes[up_proj], up, intermediate_size, hidden_size),
            Matrix::new(&self.bytes[down_proj], down, hidden_size, intermediate_size),
        ]
    }
}
