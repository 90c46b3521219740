//! A trunk's tensors: verified against the manifest, and known by what they are for.

use std::collections::HashMap;
use std::sync::Arc;

use protocol::manifest::TrunkTensor;
use protocol::tensors::{LayerTensor, TensorRole};
use protocol::{BlobRef, Precision};

use crate::aligned::AlignedBytes;
use crate::kernels::Matrix;

/// A matrix of the trunk.
#[derive(Debug)]
pub(crate) struct Weight {
    bytes: Arc<AlignedBytes>,
    precision: Precision,
    pub(crate) rows: usize,
    columns: usize,
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
    pub(crate) tensors: HashMap<TensorRole, (&'a TrunkTensor, (usize, usize))>,
    pub(crate) read: ReadTensor<'a, E>,
}

impl<E: std::error::Error> TrunkReader<'_, E> {
    pub(crate) fn of_layer(&mut self, layer: u32, tensor: LayerTensor) -> Result<Weight, LoadError<E>> {
        self.tensor(TensorRole::Layer(layer, tensor))
    }

    pub(crate) fn tensor(&mut self, role: TensorRole) -> Result<Weight, LoadError<E>> {
        let (tensor, (rows, columns)) = self.tensors[&role]; // a manifest that was checked has every tensor of its decoder
        let bytes = (self.read)(tensor.blob).map_err(|source| LoadError::Read { tensor: role, source })?;
        if !tensor.blob.matches(&bytes) || !tensor.precision.head_is_valid(&bytes) {
            return Err(LoadError::WrongBytes(role));
        }
        Ok(Weight { bytes, precision: tensor.precision, rows, columns })
    }
}

impl Weight {
    pub(crate) fn view(&self) -> Matrix<'_> {
        Matrix::new(&self.bytes, self.precision, self.rows, self.columns)
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    pub(crate) fn vector(&self) -> Vec<f32> {
        let mut vector = vec![0.0; self.columns];
        self.view().row(0, &mut vector);
        vector
    }
}
