//! Towers: what makes rows for a decoder of pictures and of sound. `docs/omni.md` defines each step.
//!
//! Towers share the machine's threads and kernels. Their sums have one order, whatever the number of threads.

mod attention;
pub mod audio;
mod layer;
mod linear;
pub mod vision;

use std::collections::HashMap;

use protocol::manifest::Part;

use crate::weights::{ReadTensor, TrunkReader};

/// Reads the tensors of a tower's part.
fn reader<'a, E: std::error::Error>(part: &'a Part, read: ReadTensor<'a, E>) -> TrunkReader<'a, E> {
    let specs = part.config.tensors();
    let tensors: HashMap<_, _> = part.trunk.iter().zip(&specs).map(|(tensor, spec)| (tensor.role, (tensor, spec.sides()))).collect();
    TrunkReader { tensors, read }
}

/// Rows of a picture, a video or a sound, made for a decoder.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct TowerRows {
    /// (rows, the decoder's hidden_size)
    pub rows: Vec<f32>,
    /// What is added to the same rows behind each of the decoder's first layers, (rows, hidden_size) each.
    pub deepstack: Vec<Vec<f32>>,
}

impl TowerRows {
    /// Bytes that they take.
    pub fn bytes(&self) -> usize {
        4 * (self.rows.len() + self.deepstack.iter().map(Vec::len).sum::<usize>())
    }
}

/// What a tower looked like on its way, for comparison with another implementation.
pub type TowerWatch<'a> = Option<&'a mut dyn FnMut(&str, &[f32])>;
