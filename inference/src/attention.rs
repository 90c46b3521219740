//! Causal attention with grouped key and value heads: softmax(q · key / √head_dim), summed piece by piece of the keys.
//!
//! Each piece of 256 keys makes a partial result (its greatest score, the sum of its weights, the weighted sum of its values);
//! partial results are merged from the first piece to the last (Milakov and Gimelshein 2018; Dao et al. 2022). The pieces depend on
//! positions alone, so a token's result has the same bits in a prefill, in a decode step and in any batch.

use crate::engine::Part;
use crate::kernels::math::{exp, exp_and_sum, per_instruction_set, rms_scale};
use crate::kv_cache::{BLOCK, KvCache, PIECE};
use crate::pool::Pool;
use crate::rope::Rotation;

/// Tokens of a sequence that one task takes together, so that they share a look at the keys.
pub(crate) const TOKENS: usize = 8;
/// Query vectors that share one pass over a block of keys.
const QUERIES: usize = 8;

/// The shape of attention in a model.
#[expect(clippy::struct_field_names, reason = "the field's standard words")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
}

impl Heads {
    fn group(self) -> usize {
        self.heads / self.kv_heads
    }

    fn padded(self) -> usize {
        self.head_dim.next_multiple_of(BLOCK)
    }

    /// Numbers of all queries of a token.
    pub(crate) fn query_width(self) -> usize {
        self.heads * self.head_dim
    }

    /// Numbers of a partial result of one query head: values, greatest score, sum of weights.
    fn partial(self) -> usize {
        self.padded() + BLOCK
    }
}

/// What a task does: some tokens of one sequence, for one key and value head, over some pieces.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Task {
    part: usize,
    /// Rows of the batch.
    first: usize,
    tokens: usize,
    kv_head: usize,
    /// Pieces from here …
    pieces_from: usize,
    /// … up to here.
    pieces_to: usize,
    /// Where its partial results begin, in query vectors.
    place: usize,
}

/// Divides a batch into tasks. Where there are few tokens and many keys, each piece is a task of its own.
pub(crate) fn plan(parts: &[Part<'_>], heads: Heads, tasks: &mut Vec<Task>) {
    tasks.clear();
    let mut place = 0;
    for (number, part) in parts.iter().enumerate() {
        for first in (0..part.tokens.len()).step_by(TOKENS) {
            let tokens = TOKENS.min(part.tokens.len() - first);
            let pieces = (part.past + first + tokens).div_ceil(PIECE);
            let apart = part.tokens.len() < TOKENS && pieces > 1;
            for kv_head in 0..heads.kv_heads {
                for piece in 0..if apart { pieces } else { 1 } {
                    let (pieces_from, pieces_to) = if apart { (piece, piece + 1) } else { (0, pieces) };
                    tasks.push(Task { part: number, first: part.first + first, tokens, kv_head, pieces_from, pieces_to, place });
                    place += tokens * heads.group();
                }
            }
        }
    }
}

/// Numbers that the partial results of `tasks` take.
pub(crate) fn partial_numbers(tasks: &[Task], heads: Heads) -> usize {
    tasks.last().map_or(0, |task| task.place + task.tokens * heads.group()) * heads.partial()
}

/// The most numbers that partial results take: a batch of `tokens` tokens that look back on up to `context`.
pub(crate) fn partial_numbers_max(tokens: usize, context: usize, heads: Heads) -> usize {
    let apart = (TOKENS - 1).min(tokens) * context.div_ceil(PIECE);
    (tokens.max(apart)) * heads.heads * heads.partial()
}

/// What a thread needs to work.
#[derive(Debug)]
pub(crate) struct Scratch {
    queries: Vec<f32>, // (queries, head_dim)
    scores: Vec<f32>,  // (queries, 256)
    block: Vec<f32>,   // keys or values of 16 tokens
    piece: Vec<f32>,   // the partial result of a piece
    counts: Vec<usize>,
}

impl Scratch {
    pub(crate) fn new(heads: Heads) -> Self {
        let queries = TOKENS * heads.group();
        Self {
            queries: vec![0.0; queries * heads.head_dim],
            scores: vec![0.0; queries * PIECE],
            block: vec![0.0; BLOCK * heads.padded()],
            piece: vec![0.0; queries * heads.partial()],
            counts: vec![0; queries],
        }
    }

    pub(crate) fn bytes(heads: Heads) -> u64 {
        let queries = TOKENS * heads.group();
        ((queries * (heads.head_dim + PIECE + heads.partial() + 2) + BLOCK * heads.padded()) * 4) as u64
    }
}

/// Norms each head (where the model does) and turns it by its position; `x` is a token's vector of heads.
pub(crate) fn norm_and_rotate(x: &mut [f32], norm: Option<&[f32]>, head_dim: usize, eps: f32, rotation: &Rotation) {
    for head in x.chunks_exact_mut(head_dim) {
        if let Some(norm) = norm {
            let scale = rms_scale(head, eps);
            head.iter_mut().zip(norm).for_each(|(x, w)| *x = *x * scale * w);
        }
        rotation.apply(head);
    }
}

/// Computes the tasks' partial results, then each token's: `queries` is (rows, stride), of which the first numbers are the heads;
/// `mixed` becomes (rows, heads × head_dim).
#[expect(clippy::too_many_arguments, reason = "buffers of the engine, each its own")]
pub(crate) fn attend(
    pool: &mut Pool,
    heads: Heads,
    layer: usize,
    parts: &[Part<'_>],
    tasks: &[Task],
    (queries, stride): (&[f32], usize),
    partials: &mut [f32],
    scratch: &mut [Scratch],
    mixed: &mut [f32],
) {
    let partial = heads.partial();
    let range = |task: usize| tasks[task].place * partial..(tasks[task].place + tasks[task].tokens * heads.group()) * partial;
    pool.parts_with(partials, tasks.len(), range, scratch, |number, scratch, out| {
        let task = tasks[number];
        let (first, group, head_dim) = (task.first, heads.group(), heads.head_dim);
        let scale = 1.0 / (head_dim as f32).sqrt();
        for (token, into) in scratch.queries.chunks_exact_mut(group * head_dim).take(task.tokens).enumerate() {
            let from = &queries[(first + token) * stride + task.kv_head * group * head_dim..][..group * head_dim];
            into.iter_mut().zip(from).for_each(|(into, from)| *into = from * scale);
        }
        let part = &parts[task.part];
        let past = part.past + first - part.first;
        for piece in task.pieces_from..task.pieces_to {
            if piece == task.pieces_from {
                one_piece(heads, part.session.cache(), layer, task, piece, past, scratch, None);
                out.copy_from_slice(&scratch.piece[..out.len()]);
            } else {
                one_piece(heads, part.session.cache(), layer, task, piece, past, scratch, Some(&mut *out));
            }
        }
    });
    // Fold what stands apart, and scale by the sum of weights.
    let partials = &*partials;
    let width = heads.query_width();
    let per_row = |row: usize, out: &mut [f32]| {
        let mine = |task: &&Task| (task.first..task.first + task.tokens).contains(&row);
        let start = tasks.partition_point(|task| task.first + task.tokens <= row);
        for (kv_head, out) in out.chunks_exact_mut(heads.group() * heads.head_dim).enumerate() {
            let pieces = tasks[start..].iter().take_while(mine).filter(|task| task.kv_head == kv_head);
            for (head, out) in out.chunks_exact_mut(heads.head_dim).enumerate() {
                let place = |task: &Task| (task.place + (row - task.first) * heads.group() + head) * partial;
                finish(pieces.clone().map(|task| &partials[place(task)..][..partial]), heads.padded(), out);
            }
        }
    };
    let rows = mixed.len() / width;
    pool.chunks(&mut mixed[..rows * width], width, |row, _, out| per_row(row, out));
}

/// Computes the partial results of one piece into the scratch, and merges them into `state` if there is one.
#[expect(clippy::too_many_arguments, reason = "the place of a piece has many sides")]
fn one_piece(
    heads: Heads,
    cache: &KvCache,
    layer: usize,
    task: Task,
    piece: usize,
    past: usize,
    scratch: &mut Scratch,
    state: Option<&mut [f32]>,
) {
    let (group, padded, partial) = (heads.group(), heads.padded(), heads.partial());
    let queries = task.tokens * group;
    // Query vectors of one token see the same keys: those up to the token itself.
    for (i, count) in scratch.counts[..queries].iter_mut().enumerate() {
        *count = (past + i / group + 1).saturating_sub(piece * PIECE).min(PIECE);
    }
    let most = scratch.counts[queries - 1];
    for block in 0..most.div_ceil(BLOCK) {
        cache.keys(layer, piece, task.kv_head, block, &mut scratch.block);
        let pairs = scratch.queries[..queries * heads.head_dim].chunks(QUERIES * heads.head_dim);
        for (q, scores) in pairs.zip(scratch.scores.chunks_mut(QUERIES * PIECE)) {
            scores_of_block(q, heads.head_dim, &scratch.block, &mut scores[block * BLOCK..]);
        }
    }
    let results = &mut scratch.piece[..queries * partial];
    for ((out, scores), &count) in results.chunks_exact_mut(partial).zip(scratch.scores.chunks_exact_mut(PIECE)).zip(&scratch.counts) {
        out.fill(0.0);
        if count > 0 {
            (out[padded], out[padded + 1]) = exp_and_sum(&mut scores[..count]);
        }
    }
    for block in 0..most.div_ceil(BLOCK) {
        cache.values(layer, piece, task.kv_head, block, &mut scratch.block);
        for ((out, weights), &count) in results.chunks_exact_mut(partial).zip(scratch.scores.chunks_exact(PIECE)).zip(&scratch.counts) {
            let here = count.saturating_sub(block * BLOCK).min(BLOCK);
            add_values(&weights[block * BLOCK..][..here], &scratch.block, &mut out[..padded]);
        }
    }
    if let Some(state) = state {
        for ((state, piece), &count) in state.chunks_exact_mut(partial).zip(results.chunks_exact(partial)).zip(&scratch.counts) {
            if count > 0 {
                merge(state, piece, padded);
            }
        }
    }
}

per_instruction_set! {
    /// Scores of up to 8 queries with 16 keys, (head_dim, 16); each query's scores are 256 apart.
    fn scores_of_block(queries: &[f32], head_dim: usize, keys: &[f32], out: &mut [f32]) -> (), scores_of_block_body
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn scores_of_block_body(queries: &[f32], head_dim: usize, keys: &[f32], out: &mut [f32]) {
    if queries.len() == QUERIES * head_dim {
        some_scores::<QUERIES>(queries, head_dim, keys, out);
    } else {
        for (query, out) in queries.chunks_exact(head_dim).zip(out.chunks_mut(PIECE)) {
            some_scores::<1>(query, head_dim, keys, out);
        }
    }
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn some_scores<const N: usize>(queries: &[f32], head_dim: usize, keys: &[f32], out: &mut [f32]) {
    let queries: [&[f32]; N] = std::array::from_fn(|n| &queries[n * head_dim..][..head_dim]);
    let mut sums = [[0.0f32; BLOCK]; N];
    for (d, keys) in keys.as_chunks::<BLOCK>().0[..head_dim].iter().enumerate() {
        for (sums, query) in sums.iter_mut().zip(&queries) {
            let q = query[d];
            for i in 0..BLOCK {
                sums[i] = q.mul_add(keys[i], sums[i]);
            }
        }
    }
    for (n, sums) in sums.iter().enumerate() {
        out[n * PIECE..][..BLOCK].copy_from_slice(sums);
    }
}

per_instruction_set! {
    /// Adds weighted values, (tokens, width), to `out`, in the order of the tokens.
    fn add_values(weights: &[f32], values: &[f32], out: &mut [f32]) -> (), add_values_body
}

#[inline(always)]
fn add_values_body(weights: &[f32], values: &[f32], out: &mut [f32]) {
    const WIDE: usize = 4 * BLOCK;
    let width = out.len();
    let (wide, rest) = out.as_chunks_mut::<WIDE>();
    let rest_at = wide.len() * WIDE;
    for (i, out) in wide.iter_mut().enumerate() {
        let mut sums = *out;
        for (token, w) in weights.iter().enumerate() {
            let values: &[f32; WIDE] = values[token * width + i * WIDE..].first_chunk().expect("a block has 16 tokens");
            for l in 0..WIDE {
                sums[l] = w.mul_add(values[l], sums[l]);
            }
        }
        *out = sums;
    }
    for (token, w) in weights.iter().enumerate() {
        let values = &values[token * width + rest_at..][..rest.len()];
        rest.iter_mut().zip(values).for_each(|(out, value)| *out = w.mul_add(*value, *out));
    }
}

per_instruction_set! {
    /// Merges the partial result of a later piece into that of the earlier ones.
    fn merge(state: &mut [f32], piece: &[f32], padded: usize) -> (), merge_body
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn merge_body(state: &mut [f32], piece: &[f32], padded: usize) {
    let (old, new) = (state[padded], piece[padded]);
    let max = if new > old { new } else { old };
    let (a, b) = (exp(old - max), exp(new - max));
    state[padded] = max;
    state[padded + 1] = state[padded + 1].mul_add(a, piece[padded + 1] * b);
    for (state, piece) in state[..padded].iter_mut().zip(&piece[..padded]) {
        *state = state.mul_add(a, piece * b);
    }
}

/// Merges pieces in their order and divides by the sum of weights.
fn finish<'a>(mut pieces: impl Iterator<Item = &'a [f32]>, padded: usize, out: &mut [f32]) {
    let Some(first) = pieces.next() else { return };
    let Some(second) = pieces.next() else {
        return out.iter_mut().zip(first).for_each(|(out, x)| *out = x / first[padded + 1]);
    };
    let mut state = [0.0; 2048];
    let state = &mut state[..first.len()];
    state.copy_from_slice(first);
    merge(state, second, padded);
    pieces.for_each(|piece| merge(state, piece, padded));
    out.iter_mut().zip(&state[..padded]).for_each(|(out, x)| *out = x / state[padded + 1]);
}
