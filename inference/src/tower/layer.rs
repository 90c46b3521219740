//! A layer as both towers have it: attention, then a feed-forward network. How queries, keys and values are made is each tower's own.

use std::ops::Range;

use protocol::tensors::{BlockTensor, TensorRole};

use super::attention::{PackedPieces, TowerHeads, Way, attend};
use super::linear::{LayerNorm, Linear, LinearWork, add_rows};
use crate::weights::{LoadError, TrunkReader};

/// Rows that go through the feed-forward network together: what is inside is wide.
const TOGETHER: usize = 1920;

/// The memory that layers work in, one after the other.
pub(super) struct Buffers {
    pub(super) normed: Vec<f32>, // (rows, hidden_size)
    wide: Vec<f32>,              // (rows, 3 × hidden_size)
    more: Vec<f32>,              // (rows, hidden_size)
    inside: Vec<f32>,            // (rows together, the network's width)
    pieces: PackedPieces,
}

impl Buffers {
    /// Buffers for `rows` rows of `hidden` numbers, and for a network of `width`.
    pub(super) fn new(rows: usize, hidden: usize, width: usize) -> Self {
        Self {
            normed: vec![0.0; rows * hidden],
            wide: vec![0.0; rows * 3 * hidden],
            more: vec![0.0; rows * hidden],
            inside: vec![0.0; rows.min(TOGETHER) * width],
            pieces: PackedPieces::default(),
        }
    }

    /// Numbers of f32 that they have at most.
    pub(super) fn numbers(rows: usize, hidden: usize, width: usize) -> usize {
        const OF_PIECES: usize = 2; // keys and values have a byte and a little for each number
        rows * (5 + OF_PIECES) * hidden + rows.min(TOGETHER) * width
    }
}

/// A layer, but for its projections.
#[derive(Debug)]
pub(super) struct Layer {
    attention_norm: LayerNorm,
    output: Linear,
    feed_forward_norm: LayerNorm,
    up: Linear,
    down: Linear,
}

impl Layer {
    pub(super) fn read<E: std::error::Error>(
        reader: &mut TrunkReader<'_, E>,
        role: impl Fn(BlockTensor) -> TensorRole,
        eps: f32,
    ) -> Result<Self, LoadError<E>> {
        Ok(Self {
            attention_norm: LayerNorm::read(reader, |part| role(BlockTensor::AttentionNorm(part)), eps)?,
            output: Linear::read(reader, |part| role(BlockTensor::Output(part)))?,
            feed_forward_norm: LayerNorm::read(reader, |part| role(BlockTensor::FeedForwardNorm(part)), eps)?,
            up: Linear::read(reader, |part| role(BlockTensor::Up(part)))?,
            down: Linear::read(reader, |part| role(BlockTensor::Down(part)))?,
        })
    }

    /// Takes rows `x`, (rows, hidden_size), through the layer; those of a segment see one another. `project` makes queries, keys and values, (rows, 3 × hidden_size), of normed rows and
    /// says whether its weights are packed; `activation` is the network's.
    pub(super) fn run(
        &self,
        work: &mut LinearWork<'_>,
        (heads, segments): (TowerHeads, &[Range<usize>]),
        x: &mut [f32],
        buffers: &mut Buffers,
        project: impl FnOnce(&mut LinearWork<'_>, &[f32], &mut [f32]) -> bool,
        activation: fn(&mut [f32]),
    ) {
        let hidden = heads.width();
        let Buffers { normed, wide, more, inside, pieces } = buffers;
        self.attention_norm.run(work.pool, x, normed);
        let is_packed = project(work, normed, wide);
        let way = if is_packed { Way::Packed(work.kernels, pieces) } else { Way::Plain };
        attend(work.pool, heads, wide, segments, way, more, normed);
        self.output.run(work, normed, more, |_, _| {});
        add_rows(work.pool, x, more, hidden);
        self.feed_forward_norm.run(work.pool, x, normed);
        for (normed, more) in normed.chunks(TOGETHER * hidden).zip(more.chunks_mut(TOGETHER * hidden)) {
            let inside = &mut inside[..normed.len() / hidden * self.up.width()];
            self.up.run(work, normed, inside, |_, out| activation(out));
            self.down.run(work, inside, more, |_, _| {});
        }
        add_rows(work.pool, x, more, hidden);
    }
}
