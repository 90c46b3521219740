//! The memory that passes work in: buffers that are made once.

use protocol::Decoder;

use crate::kernels::{Operand, Rows, Tile, tiles};
use crate::mixer::gqa::GqaWork;
use crate::mixer::rope::Position;
use crate::moe_layer::MoeWork;
use crate::work_sizes::WorkSizes;

/// Bytes of all buffers.
pub(crate) fn work_bytes(sizes: &WorkSizes) -> u64 {
    let (hidden, head_rows) = (sizes.hidden(), sizes.head_rows());
    let rows = 3 * Rows::bytes(sizes.rows(), hidden) + 2 * Rows::bytes(head_rows, hidden);
    let logits = Rows::bytes(head_rows, sizes.vocab) + 4 * sizes.vocab as u64;
    let head = Operand::bytes(head_rows, hidden, sizes.trunk_forms());
    rows + logits + head + sizes.gqa.bytes() + MoeWork::bytes(sizes)
}

/// The memory that a pass works in.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) x: Rows, // (rows, hidden_size), the residual stream
    pub(crate) normed: Rows,
    pub(crate) out: Rows,
    pub(crate) scales: Vec<f32>,
    pub(crate) tiles: Vec<Tile>,
    pub(crate) positions: Vec<Position>,
    pub(crate) gqa: GqaWork,
    pub(crate) moe: MoeWork,
    pub(crate) head_x: Rows,
    pub(crate) head_normed: Rows,
    pub(crate) head_operand: Operand,
    pub(crate) logits: Rows,
    /// The rows of the pass whose logits are there, where all are wanted.
    pub(crate) head_first: usize,
    pub(crate) head_count: usize,
    pub(crate) one_x: Vec<f32>,
    pub(crate) one_logits: Vec<f32>,
}

impl Work {
    pub(crate) fn new(decoder: &Decoder, sizes: &WorkSizes) -> Self {
        let (rows, hidden, head_rows) = (sizes.rows(), sizes.hidden(), sizes.head_rows());
        Self {
            x: Rows::with_capacity(rows, hidden),
            normed: Rows::with_capacity(rows, hidden),
            out: Rows::with_capacity(rows, hidden),
            scales: Vec::with_capacity(rows),
            tiles: Vec::with_capacity(rows),
            positions: Vec::with_capacity(rows),
            gqa: GqaWork::new(decoder, &sizes.gqa),
            moe: MoeWork::new(sizes),
            head_x: Rows::with_capacity(head_rows, hidden),
            head_normed: Rows::with_capacity(head_rows, hidden),
            head_operand: Operand::with_capacity(head_rows, hidden, sizes.trunk_forms()),
            logits: Rows::with_capacity(head_rows, sizes.vocab),
            head_first: 0,
            head_count: 0,
            one_x: vec![0.0; hidden],
            one_logits: vec![0.0; sizes.vocab],
        }
    }

    /// Prepares for the rows of a pass.
    pub(crate) fn begin(&mut self, rows: usize) {
        self.x.resize(rows);
        self.out.resize(rows);
        self.tiles.clear();
        self.tiles.extend(tiles(0, rows));
        self.positions.clear();
    }
}
