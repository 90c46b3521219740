//! Attention in which all rows of a segment see one another, computed piece by piece of the keys: no matrix of rows by rows is ever there.
//!
//! Pieces of 256 keys are merged from first to last as in a decoder's attention, so that no number of threads changes a bit.

use std::ops::Range;

use crate::kernels::math::exp_and_sum;
use crate::mixer::attention::{add_values_of_queries, finish, merge, scores_of_blocks};
use crate::mixer::kv_cache::{BLOCK, PIECE, Stored};
use crate::pool::Pool;

/// Queries that share a look at a piece of keys and values.
const QUERIES: usize = 256;
/// Tokens whose values stay in the nearest cache while all queries take them.
const TOKENS: usize = 64;
/// Query vectors that share one pass over a block of keys.
const EIGHT: usize = 8;

/// Heads of a tower.
#[derive(Clone, Copy, Debug)]
pub(super) struct TowerHeads {
    pub(super) heads: usize,
    pub(super) head_dim: usize,
}

impl TowerHeads {
    pub(super) fn width(self) -> usize {
        self.heads * self.head_dim
    }

    fn padded(self) -> usize {
        self.head_dim.next_multiple_of(BLOCK)
    }

    /// Numbers of a query's partial result: values, greatest score, sum of weights.
    fn partial(self) -> usize {
        self.padded() + BLOCK
    }
}

/// What a thread needs to work.
struct Scratch {
    queries: Vec<f32>, // (queries ÷ 8, head_dim, 8)
    scores: Vec<f32>,  // (queries, 256)
    keys: Vec<f32>,    // (blocks, head_dim, 16)
    values: Vec<f32>,  // (256, padded)
    piece: Vec<f32>,   // partial results of a piece
    state: Vec<f32>,   // of all pieces so far
}

impl Scratch {
    fn new(heads: TowerHeads) -> Self {
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

/// Some queries of a head in a segment.
struct Task {
    segment: Range<usize>,
    head: usize,
    first: usize,
    count: usize,
}

/// softmax(q · kᵀ ÷ √head_dim) · v within each segment. `qkv` is (rows, 3 × width): queries, keys, values; `out` becomes (rows, width).
pub(super) fn attend(pool: &mut Pool, heads: TowerHeads, qkv: &[f32], segments: &[Range<usize>], by_head: &mut [f32], out: &mut [f32]) {
    let (width, head_dim) = (heads.width(), heads.head_dim);
    let mut tasks = Vec::new();
    for segment in segments {
        for head in 0..heads.heads {
            tasks.extend(segment.clone().step_by(QUERIES).map(|first| Task {
                segment: segment.clone(),
                head,
                first,
                count: QUERIES.min(segment.end - first),
            }));
        }
    }
    // By segment, by head, by row: so each task writes one run of numbers.
    let place =
        |segment: &Range<usize>, head: usize, row: usize| segment.start * width + (head * segment.len() + row - segment.start) * head_dim;
    let range = |task: usize| {
        let Task { segment, head, first, count } = &tasks[task];
        let start = place(segment, *head, *first);
        start..start + count * head_dim
    };
    let mut scratch: Vec<_> = (0..pool.threads()).map(|_| Scratch::new(heads)).collect();
    pool.parts_with(by_head, tasks.len(), range, &mut scratch, |task, scratch, out| one_task(heads, qkv, &tasks[task], scratch, out));
    let by_head = &*by_head;
    for segment in segments {
        let rows = &mut out[segment.start * width..segment.end * width];
        pool.chunks(rows, 16 * width, |chunk, _, out| {
            for (i, out) in out.chunks_exact_mut(width).enumerate() {
                let row = segment.start + chunk * 16 + i;
                let heads = out.chunks_exact_mut(head_dim).enumerate();
                heads.for_each(|(head, out)| out.copy_from_slice(&by_head[place(segment, head, row)..][..head_dim]));
            }
        });
    }
}

fn one_task(heads: TowerHeads, qkv: &[f32], task: &Task, scratch: &mut Scratch, out: &mut [f32]) {
    let (width, head_dim, padded, partial) = (heads.width(), heads.head_dim, heads.padded(), heads.partial());
    let part = |row: usize, which: usize| &qkv[row * 3 * width + which * width + task.head * head_dim..][..head_dim];
    let scale = 1.0 / (head_dim as f32).sqrt();
    for number in 0..task.count {
        let eight = &mut scratch.queries[number / EIGHT * EIGHT * head_dim..][..EIGHT * head_dim];
        let into = eight.as_chunks_mut::<EIGHT>().0.iter_mut();
        into.zip(part(task.first + number, 0)).for_each(|(into, from)| into[number % EIGHT] = from * scale);
    }
    for (number, first) in task.segment.clone().step_by(PIECE).enumerate() {
        let count = PIECE.min(task.segment.end - first);
        for i in 0..count {
            let block = &mut scratch.keys[i / BLOCK * BLOCK * head_dim..][..BLOCK * head_dim];
            let into = block.as_chunks_mut::<BLOCK>().0.iter_mut();
            into.zip(part(first + i, 1)).for_each(|(into, from)| into[i % BLOCK] = *from);
            scratch.values[i * padded..][..head_dim].copy_from_slice(part(first + i, 2));
        }
        let results = if number == 0 { &mut scratch.state } else { &mut scratch.piece };
        let results = &mut results[..task.count * partial];
        for block in (0..count.div_ceil(BLOCK)).step_by(2) {
            let pair = Stored::F32(&scratch.keys[block * BLOCK * head_dim..]);
            let eights = scratch.queries.chunks_exact(EIGHT * head_dim).take(task.count.div_ceil(EIGHT));
            for (queries, scores) in eights.zip(scratch.scores.chunks_exact_mut(EIGHT * PIECE)) {
                scores_of_blocks(queries, pair, head_dim, None, &mut scores[block * BLOCK..]);
            }
        }
        for (out, scores) in results.chunks_exact_mut(partial).zip(scratch.scores.chunks_exact_mut(PIECE)) {
            out.fill(0.0);
            (out[padded], out[padded + 1]) = exp_and_sum(&mut scores[..count]);
        }
        let counts = &[count; QUERIES][..task.count];
        for first in (0..count).step_by(TOKENS) {
            let values = Stored::F32(&scratch.values[first * padded..]);
            add_values_of_queries(&scratch.scores, counts, first..count.min(first + TOKENS), (values, None), (padded, partial), results);
        }
        if number > 0 {
            let states = scratch.state.chunks_exact_mut(partial).zip(scratch.piece.chunks_exact(partial)).take(task.count);
            states.for_each(|(state, piece)| merge(state, piece, padded));
        }
    }
    for (out, state) in out.chunks_exact_mut(head_dim).zip(scratch.state.chunks_exact(partial)) {
        finish(std::iter::once(state), padded, out);
    }
}
