//! Attention of towers by packed products: keys, and values the other way round, are packed as weights at q8 are; queries, and the
//! weights that scores become, are quantised as activations are. `docs/expert-function.md` defines both, so all kernels give the same bits.

use std::ops::Range;

use protocol::Precision;
use protocol::precision::PANEL_ROWS;

use super::{Of, PIECE, Projected, Task, TowerHeads};
use crate::kernels::math::exp_and_sum;
use crate::kernels::{Forms, Kernels, Matrix, Operand, Rows, TILE_MAX, Tile, Vector, pack, tiles};
use crate::mixer::attention::{finish, merge};
use crate::pool::Pool;

/// Queries that share a look at a piece of keys and values: five tiles.
pub(super) const QUERIES: usize = 5 * TILE_MAX;

/// Keys and values of all heads, packed piece by piece.
#[derive(Default)]
pub(in crate::tower) struct PackedPieces {
    /// (pieces, heads): keys, then values.
    bytes: Vec<u8>,
    /// Bytes of each.
    stride: usize,
    heads: usize,
    /// Rows of each piece.
    pieces: Vec<Range<usize>>,
    /// The first piece of each segment, and the end.
    firsts: Vec<usize>,
}

impl PackedPieces {
    /// Packs the keys and values of some segments.
    pub(super) fn fill(&mut self, pool: &mut Pool, qkv: Projected<'_>, segments: &[Range<usize>]) {
        let head_dim = qkv.heads.head_dim;
        self.heads = qkv.heads.heads;
        self.pieces.clear();
        self.firsts.clear();
        for segment in segments {
            self.firsts.push(self.pieces.len());
            self.pieces.extend(segment.clone().step_by(PIECE).map(|first| first..segment.end.min(first + PIECE)));
        }
        self.firsts.push(self.pieces.len());
        let longest = self.pieces.iter().map(Range::len).max().unwrap_or(0);
        let (keys, values) = sizes(longest, head_dim);
        self.stride = (keys + values).max(1);
        self.bytes.resize(self.pieces.len() * self.heads * self.stride, 0);
        let (pieces, heads) = (&self.pieces, self.heads);
        pool.chunks(&mut self.bytes, self.stride, |number, _, out| {
            let (rows, head) = (&pieces[number / heads], number % heads);
            let (keys, values) = sizes(rows.len(), head_dim);
            pack(Precision::Q8, rows.len(), head_dim, &mut out[..keys], None, |key, out| {
                out.copy_from_slice(qkv.vector(rows.start + key, Of::Keys, head));
            });
            pack(Precision::Q8, head_dim, rows.len(), &mut out[keys..keys + values], None, |number, out| {
                out.iter_mut().zip(rows.clone()).for_each(|(out, row)| *out = qkv.vector(row, Of::Values, head)[number]);
            });
        });
    }

    /// The pieces of a segment: (keys, head_dim) and (head_dim, keys).
    fn of(&self, segment: usize, head: usize, head_dim: usize) -> impl Iterator<Item = (Matrix<'_>, Matrix<'_>)> {
        (self.firsts[segment]..self.firsts[segment + 1]).map(move |piece| {
            let (count, bytes) = (self.pieces[piece].len(), &self.bytes[(piece * self.heads + head) * self.stride..]);
            let (keys, values) = sizes(count, head_dim);
            let keys_matrix = Matrix::new(&bytes[..keys], Precision::Q8, count, head_dim);
            (keys_matrix, Matrix::new(&bytes[keys..keys + values], Precision::Q8, head_dim, count))
        })
    }
}

/// Bytes of a piece's keys and of its values.
fn sizes(count: usize, head_dim: usize) -> (usize, usize) {
    (Precision::Q8.matrix_bytes(count, head_dim), Precision::Q8.matrix_bytes(head_dim, count))
}

/// What a thread needs to work.
pub(super) struct Scratch {
    queries: Operand, // (queries, head_dim)
    scaled: Vec<f32>, // (queries, head_dim)
    scores: Rows,     // of a tile, (tokens, 256)
    lines: Vec<f32>,  // the same, row by row
    weights: Operand, // the same, quantised
    values: Rows,     // of a tile, (tokens, head_dim)
    piece: Vec<f32>,  // a query's partial result of a piece
    state: Vec<f32>,  // partial results of all pieces so far
}

impl Scratch {
    pub(super) fn new(heads: TowerHeads) -> Self {
        let packed = Forms::of(Precision::Q8);
        Self {
            queries: Operand::with_capacity(QUERIES, heads.head_dim, packed),
            scaled: vec![0.0; QUERIES * heads.head_dim],
            scores: Rows::with_capacity(TILE_MAX, PIECE),
            lines: vec![0.0; TILE_MAX * PIECE],
            weights: Operand::with_capacity(TILE_MAX, PIECE, packed),
            values: Rows::with_capacity(TILE_MAX, heads.head_dim),
            piece: vec![0.0; heads.partial()],
            state: vec![0.0; QUERIES * heads.partial()],
        }
    }
}

pub(super) fn one_task(kernels: &Kernels, qkv: Projected<'_>, pieces: &PackedPieces, task: &Task, scratch: &mut Scratch, out: &mut [f32]) {
    let heads = qkv.heads;
    let (head_dim, padded, partial) = (heads.head_dim, heads.padded(), heads.partial());
    let Scratch { queries, scaled, scores, lines, weights, values, piece, state } = scratch;
    let scale = 1.0 / (head_dim as f32).sqrt();
    for (row, out) in task.rows.clone().zip(scaled.chunks_exact_mut(head_dim)) {
        out.iter_mut().zip(qkv.vector(row, Of::Queries, task.head)).for_each(|(out, x)| *out = x * scale);
    }
    let all: Vec<_> = tiles(0, task.rows.len()).collect();
    queries.quantise(head_dim, &all, |row| Vector::alone(&scaled[row * head_dim..][..head_dim]));
    for (number, (piece_keys, piece_values)) in pieces.of(task.segment, task.head, head_dim).enumerate() {
        let count = piece_keys.rows();
        for &tile in &all {
            let alone = Tile { first: 0, rows: tile.rows };
            scores.reshape(tile.rows, count);
            piece_keys.times(kernels, 0..piece_keys.panels(), queries, tile, scores.data_mut(), tile.rows * PANEL_ROWS);
            scores.copy_tokens(0, 0, count, &mut lines[..tile.rows * count], count);
            let mut sums = [(0.0, 0.0); TILE_MAX];
            lines.chunks_exact_mut(count).zip(&mut sums[..tile.rows]).for_each(|(scores, sum)| *sum = exp_and_sum(scores));
            weights.quantise(count, &[alone], |row| Vector::alone(&lines[row * count..][..count]));
            values.reshape(tile.rows, head_dim);
            piece_values.times(kernels, 0..piece_values.panels(), weights, alone, values.data_mut(), tile.rows * PANEL_ROWS);
            let states = state[tile.first * partial..].chunks_exact_mut(partial).take(tile.rows);
            for (row, (state, sum)) in states.zip(sums).enumerate() {
                let into = if number == 0 { &mut *state } else { &mut *piece };
                values.copy_token(row, 0, &mut into[..head_dim]);
                (into[padded], into[padded + 1]) = sum;
                if number > 0 {
                    merge(state, piece, padded);
                }
            }
        }
    }
    for (out, state) in out.chunks_exact_mut(head_dim).zip(state.chunks_exact(partial)) {
        finish(std::iter::once(state), padded, out);
    }
}
