//! Attention of towers in f32.

use std::ops::Range;

use super::{Of, PIECE, Projected, Task, TowerHeads};
use crate::kernels::math::exp_and_sum;
use crate::mixer::attention::{add_values_of_queries, finish, merge, scores_of_blocks};
use crate::mixer::kv_cache::{BLOCK, Stored};

/// Queries that share a look at a piece of keys and values.
pub(super) const QUERIES: usize = 256;
/// Tokens whose values stay in the nearest cache while all queries take them.
const TOKENS: usize = 64;
/// Query vectors that share one pass over a block of keys.
const EIGHT: usize = 8;

/// What a thread needs to work.
pub(super) struct Scratch {
    queries: Vec<f32>, // (queries ÷ 8, head_dim, 8)
    scores: Vec<f32>,  // (queries, 256)
    keys: Vec<f32>,    // (blocks, head_dim, 16)
    values: Vec<f32>,  // (256, padded)
    piece: Vec<f32>,   // partial results of a piece
    state: Vec<f32>,   // of all pieces so far
}

impl Scratch {
    pub(super) fn new(heads: TowerHeads) -> Self {
        Self {
            queries: vec![0.0; QUERIES * heads.head_dim],
            scores: vec![0.0; QUERIES * PIECE],
            keys: vec![0.0; PIECE * heads.head_dim],
            values: vec![0.0; PIECE * heads.padded()],
            piece: vec![0.0; QUERIES * heads.partial()],
            state: vec![0.0; QUERIES * heads.partial()],
        }
    }
}

pub(super) fn one_task(qkv: Projected<'_>, segment: &Range<usize>, task: &Task, scratch: &mut Scratch, out: &mut [f32]) {
    let heads = qkv.heads;
    let (head_dim, padded, partial, queries) = (heads.head_dim, heads.padded(), heads.partial(), task.rows.len());
    let scale = 1.0 / (head_dim as f32).sqrt();
    for (number, row) in task.rows.clone().enumerate() {
        let eight = &mut scratch.queries[number / EIGHT * EIGHT * head_dim..][..EIGHT * head_dim];
        let into = eight.as_chunks_mut::<EIGHT>().0.iter_mut();
        into.zip(qkv.vector(row, Of::Queries, task.head)).for_each(|(into, from)| into[number % EIGHT] = from * scale);
    }
    for (number, first) in segment.clone().step_by(PIECE).enumerate() {
        let count = PIECE.min(segment.end - first);
        for i in 0..count {
            let block = &mut scratch.keys[i / BLOCK * BLOCK * head_dim..][..BLOCK * head_dim];
            let into = block.as_chunks_mut::<BLOCK>().0.iter_mut();
            into.zip(qkv.vector(first + i, Of::Keys, task.head)).for_each(|(into, from)| into[i % BLOCK] = *from);
            scratch.values[i * padded..][..head_dim].copy_from_slice(qkv.vector(first + i, Of::Values, task.head));
        }
        let results = if number == 0 { &mut scratch.state } else { &mut scratch.piece };
        let results = &mut results[..queries * partial];
        for block in (0..count.div_ceil(BLOCK)).step_by(2) {
            let pair = Stored::F32(&scratch.keys[block * BLOCK * head_dim..]);
            let eights = scratch.queries.chunks_exact(EIGHT * head_dim).take(queries.div_ceil(EIGHT));
            for (queries, scores) in eights.zip(scratch.scores.chunks_exact_mut(EIGHT * PIECE)) {
                scores_of_blocks(queries, pair, head_dim, None, &mut scores[block * BLOCK..]);
            }
        }
        for (out, scores) in results.chunks_exact_mut(partial).zip(scratch.scores.chunks_exact_mut(PIECE)) {
            out.fill(0.0);
            (out[padded], out[padded + 1]) = exp_and_sum(&mut scores[..count]);
        }
        let counts = &[count; QUERIES][..queries];
        for first in (0..count).step_by(TOKENS) {
            let values = Stored::F32(&scratch.values[first * padded..]);
            add_values_of_queries(&scratch.scores, counts, first..count.min(first + TOKENS), (values, None), (padded, partial), results);
        }
        if number > 0 {
            let states = scratch.state.chunks_exact_mut(partial).zip(scratch.piece.chunks_exact(partial)).take(queries);
            states.for_each(|(state, piece)| merge(state, piece, padded));
        }
    }
    for (out, state) in out.chunks_exact_mut(head_dim).zip(scratch.state.chunks_exact(partial)) {
        finish(std::iter::once(state), padded, out);
    }
}
