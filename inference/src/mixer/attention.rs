//! Causal attention with grouped key and value heads: softmax(q · key / √head_dim), summed piece by piece of the keys.
//!
//! Each piece of 256 keys makes a partial result (its greatest score, the sum of its weights, the weighted sum of its values);
//! partial results are merged from the first piece to the last (Milakov and Gimelshein 2018; Dao et al. 2022). The pieces depend on
//! positions alone, so a token's result has the same bits in a prefill, in a decode step and in any batch.

use std::ops::Range;

use super::Share;
use super::kv_cache::{BLOCK, KvCache, PIECE, Stored};
#[cfg(target_arch = "x86_64")]
use crate::kernels::avx512;
#[cfg(target_arch = "x86_64")]
use crate::kernels::math::{Vectors, vectors};
use crate::kernels::math::{exp, exp_and_sum, per_instruction_set};
use crate::pool::Pool;

/// Tokens of a sequence that one task takes together, so that they share a look at the keys.
pub(crate) const TOKENS: usize = 8;
/// Query vectors that share one pass over a block of keys.
const QUERIES: usize = 8;

/// Results that share a look at the values.
const TOGETHER: usize = 4;

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

    /// Numbers of all keys of a token.
    pub(crate) fn kv_width(self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Numbers of a partial result of one query head: values, greatest score, sum of weights.
    fn partial(self) -> usize {
        self.padded() + BLOCK
    }
}

/// What a task does: some tokens of one sequence, for one key and value head, over some pieces.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionTask {
    share: usize,
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
pub(crate) fn plan(shares: &[Share<'_>], heads: Heads, tasks: &mut Vec<AttentionTask>) {
    tasks.clear();
    let mut place = 0;
    for (number, share) in shares.iter().enumerate() {
        for first in (0..share.rows).step_by(TOKENS) {
            let tokens = TOKENS.min(share.rows - first);
            let pieces = (share.past + first + tokens).div_ceil(PIECE);
            let apart = share.rows < TOKENS && pieces > 1;
            for kv_head in 0..heads.kv_heads {
                for piece in 0..if apart { pieces } else { 1 } {
                    let (pieces_from, pieces_to) = if apart { (piece, piece + 1) } else { (0, pieces) };
                    tasks.push(AttentionTask { share: number, first: share.first + first, tokens, kv_head, pieces_from, pieces_to, place });
                    place += tokens * heads.group();
                }
            }
        }
    }
}

/// Numbers that the partial results of `tasks` take.
pub(crate) fn partial_numbers(tasks: &[AttentionTask], heads: Heads) -> usize {
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
    queries: Vec<f32>, // (queries ÷ 8, head_dim, 8)
    scores: Vec<f32>,  // (queries, 256)
    block: Vec<f32>,   // keys of twice 16 tokens, or values of 16
    piece: Vec<f32>,   // the partial result of a piece
    counts: Vec<usize>,
}

/// Sizes of what a thread needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ScratchSizes {
    /// Query vectors of a task, at most, in whole eights.
    queries: usize,
    /// Numbers of a head, in whole blocks.
    pub(crate) padded: usize,
}

impl ScratchSizes {
    pub(crate) fn new(heads: Heads) -> Self {
        Self { queries: (TOKENS * heads.group()).next_multiple_of(QUERIES), padded: heads.padded() }
    }

    pub(crate) fn max(self, other: Self) -> Self {
        Self { queries: self.queries.max(other.queries), padded: self.padded.max(other.padded) }
    }

    pub(crate) fn bytes(self) -> u64 {
        let Self { queries, padded } = self;
        ((queries * (padded + PIECE + padded + BLOCK + 2) + 2 * BLOCK * padded) * 4) as u64
    }
}

impl Scratch {
    pub(crate) fn new(sizes: ScratchSizes) -> Self {
        let ScratchSizes { queries, padded } = sizes;
        Self {
            queries: vec![0.0; queries * padded],
            scores: vec![0.0; queries * PIECE],
            block: vec![0.0; 2 * BLOCK * padded],
            piece: vec![0.0; queries * (padded + BLOCK)],
            counts: vec![0; queries],
        }
    }
}

/// Computes the tasks' partial results, then each token's: `queries` is (rows, stride), of which the first numbers are the heads;
/// `mixed` becomes (rows, heads × head_dim).
#[expect(clippy::too_many_arguments, reason = "buffers of the engine, each its own")]
pub(crate) fn attend(
    pool: &mut Pool,
    heads: Heads,
    layer: usize,
    shares: &[Share<'_>],
    tasks: &[AttentionTask],
    (queries, stride): (&[f32], usize),
    partials: &mut [f32],
    scratch: &mut [Scratch],
    mixed: &mut [f32],
) {
    let (partial, threads) = (heads.partial(), pool.threads());
    let range = |task: usize| tasks[task].place * partial..(tasks[task].place + tasks[task].tokens * heads.group()) * partial;
    pool.parts_with(partials, tasks.len(), range, scratch, |number, scratch, out| {
        let task = tasks[number];
        let (first, group, head_dim) = (task.first, heads.group(), heads.head_dim);
        let scale = 1.0 / (head_dim as f32).sqrt();
        for (number, (token, head)) in (0..task.tokens).flat_map(|token| (0..group).map(move |head| (token, head))).enumerate() {
            let from = &queries[(first + token) * stride + (task.kv_head * group + head) * head_dim..][..head_dim];
            let eight = &mut scratch.queries[number / QUERIES * QUERIES * head_dim..][..QUERIES * head_dim];
            let into = eight.as_chunks_mut::<QUERIES>().0;
            into.iter_mut().zip(from).for_each(|(into, from)| into[number % QUERIES] = from * scale);
        }
        let share = &shares[task.share];
        let past = share.past + first - share.first;
        // Tasks are taken one after the other: this one is likely to be followed by that.
        let next = tasks.get(number + threads).and_then(|next| {
            let cache = shares[next.share].session.cache();
            cache.keys(layer, next.pieces_from, next.kv_head)
        });
        for piece in task.pieces_from..task.pieces_to {
            if piece == task.pieces_from {
                one_piece(heads, share.session.cache(), layer, task, (piece, next), past, scratch, None);
                out.copy_from_slice(&scratch.piece[..out.len()]);
            } else {
                one_piece(heads, share.session.cache(), layer, task, (piece, next), past, scratch, Some(&mut *out));
            }
        }
    });
    // Fold what stands apart, and scale by the sum of weights.
    let partials = &*partials;
    let width = heads.query_width();
    let per_row = |row: usize, out: &mut [f32]| {
        let mine = |task: &&AttentionTask| (task.first..task.first + task.tokens).contains(&row);
        let start = tasks.partition_point(|task| task.first + task.tokens <= row);
        for (kv_head, out) in out.chunks_exact_mut(heads.group() * heads.head_dim).enumerate() {
            let pieces = tasks[start..].iter().take_while(mine).filter(|task| task.kv_head == kv_head);
            for (head, out) in out.chunks_exact_mut(heads.head_dim).enumerate() {
                let place = |task: &AttentionTask| (task.place + (row - task.first) * heads.group() + head) * partial;
                finish(pieces.clone().map(|task| &partials[place(task)..][..partial]), heads.padded(), out);
            }
        }
    };
    let rows = mixed.len() / width;
    pool.chunks(&mut mixed[..rows * width], width, |row, _, out| per_row(row, out));
}

/// Computes the partial results of one piece into the scratch, and merges them into `state` if there is one. The keys that will be wanted
/// `next` are asked for meanwhile.
#[expect(clippy::too_many_arguments, reason = "the place of a piece has many sides")]
fn one_piece(
    heads: Heads,
    cache: &KvCache,
    layer: usize,
    task: AttentionTask,
    (piece, next): (usize, Option<Stored<'_>>),
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
    let (keys, values) = (cache.keys(layer, piece, task.kv_head), cache.values(layer, piece, task.kv_head));
    for block in (0..most.div_ceil(BLOCK)).step_by(2) {
        let both = if let Some(keys) = keys.filter(|keys| multiplies(keys, queries)) {
            keys.from(block * BLOCK * padded)
        } else {
            let (one, other) = scratch.block[..2 * BLOCK * padded].split_at_mut(BLOCK * padded);
            cache.widen_keys(layer, piece, task.kv_head, block, one);
            cache.widen_keys(layer, piece, task.kv_head, block + 1, other); // there, if not yet filled
            Stored::F32(&scratch.block)
        };
        let eights = scratch.queries.chunks_exact(QUERIES * heads.head_dim).take(queries.div_ceil(QUERIES));
        let mut values = values.map(|values| values.from(block * BLOCK * padded));
        for (q, scores) in eights.zip(scratch.scores.chunks_exact_mut(QUERIES * PIECE)) {
            scores_of_blocks(q, both, padded, values.take(), &mut scores[block * BLOCK..]); // once is enough
        }
    }
    let results = &mut scratch.piece[..queries * partial];
    for ((out, scores), &count) in results.chunks_exact_mut(partial).zip(scratch.scores.chunks_exact_mut(PIECE)).zip(&scratch.counts) {
        out.fill(0.0);
        if count > 0 {
            (out[padded], out[padded + 1]) = exp_and_sum(&mut scores[..count]);
        }
    }
    if let Some(values) = values.filter(|values| multiplies(values, queries)) {
        add_values_of_queries(&scratch.scores, &scratch.counts[..queries], 0..most, (values, next), (padded, partial), results);
    } else {
        for block in (0..most.div_ceil(BLOCK)).step_by(2) {
            let (one, other) = scratch.block[..2 * BLOCK * padded].split_at_mut(BLOCK * padded);
            cache.widen_values(layer, piece, task.kv_head, block, one);
            cache.widen_values(layer, piece, task.kv_head, block + 1, other);
            let here = block * BLOCK..most.min((block + 2) * BLOCK);
            add_values_of_queries(
                &scratch.scores,
                &scratch.counts[..queries],
                here,
                (Stored::F32(&scratch.block), None),
                (padded, partial),
                results,
            );
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

/// Whether keys and values are multiplied as they are stored, not widened into a buffer first. Few queries gain by that, on processors that
/// widen halves while they load them. Many queries share one widening.
fn multiplies(stored: &Stored<'_>, queries: usize) -> bool {
    match stored {
        Stored::F32(_) => true,
        #[cfg(target_arch = "x86_64")]
        Stored::F16(_) => queries <= 2 * QUERIES && vectors() == Vectors::Avx512,
        #[cfg(not(target_arch = "x86_64"))]
        Stored::F16(_) => false,
    }
}

/// Adds the weighted values of some tokens of a piece, of which `values` begins with the first, to the results of all queries: each has as many
/// as its count says.
pub(crate) fn add_values_of_queries(
    weights: &[f32],
    counts: &[usize],
    tokens: Range<usize>,
    (values, next): (Stored<'_>, Option<Stored<'_>>),
    (width, stride): (usize, usize),
    out: &mut [f32],
) {
    let here = |query: usize| counts[query].clamp(tokens.start, tokens.end) - tokens.start;
    let weights = |query: usize| &weights[query * PIECE + tokens.start..];
    let mut query = 0;
    while query < counts.len() {
        let alike = counts[query..].iter().take(QUERIES).take_while(|&&count| count == counts[query]).count();
        let out = &mut out[query * stride..];
        query += match alike {
            QUERIES => {
                add_values::<QUERIES>(weights(query), here(query), (values, next), width, out, stride);
                QUERIES
            }
            TOGETHER..QUERIES => {
                add_values::<TOGETHER>(weights(query), here(query), (values, next), width, out, stride);
                TOGETHER
            }
            _ => {
                add_values::<1>(weights(query), here(query), (values, next), width, out, stride);
                1
            }
        };
    }
}

/// Scores of 8 queries, (head_dim, 8), with twice 16 keys, (padded head_dim, 16) each; each query's scores are 256 apart.
pub(crate) fn scores_of_blocks(queries: &[f32], keys: Stored<'_>, padded: usize, next: Option<Stored<'_>>, out: &mut [f32]) {
    for n in 0..QUERIES {
        out[n * PIECE..][..2 * BLOCK].fill(0.0);
    }
    add_outer::<QUERIES, 2>(queries.len() / QUERIES, (queries, QUERIES, 1), (keys, BLOCK, padded * BLOCK), next, out, PIECE);
}

/// Adds `count` weighted values, (tokens, width), to N results, in the order of the tokens: weights are 256 apart, results `stride`.
fn add_values<const N: usize>(
    weights: &[f32],
    count: usize,
    (values, next): (Stored<'_>, Option<Stored<'_>>),
    width: usize,
    out: &mut [f32],
    stride: usize,
) {
    let mut at = 0;
    let next = |at: usize| next.map(|next| next.from(at * PIECE));
    // Sixteen sums hide each other's latency, and leave registers for the factors.
    while N <= TOGETHER && at + 4 * BLOCK <= width {
        add_outer::<N, 4>(count, (weights, 1, PIECE), (values.from(at), width, BLOCK), next(at), &mut out[at..], stride);
        at += 4 * BLOCK;
    }
    while at + 2 * BLOCK <= width {
        add_outer::<N, 2>(count, (weights, 1, PIECE), (values.from(at), width, BLOCK), next(at), &mut out[at..], stride);
        at += 2 * BLOCK;
    }
    while at < width {
        add_outer::<N, 1>(count, (weights, 1, PIECE), (values.from(at), width, BLOCK), next(at), &mut out[at..], stride);
        at += BLOCK;
    }
}

/// Adds products of `steps` steps to N results of R × 16 numbers, `stride` apart: in each step, those of a number of `x` for each result
/// with R × 16 numbers of `y`. Numbers of `x` are so far apart from step to step and from result to result, those of `y` from step to step and
/// from one 16 to the next. As many numbers as are read are asked for from where `next` begins.
fn add_outer<const N: usize, const R: usize>(
    steps: usize,
    (x, x_step, x_stride): (&[f32], usize, usize),
    (y, y_step, y_stride): (Stored<'_>, usize, usize),
    next: Option<Stored<'_>>,
    out: &mut [f32],
    stride: usize,
) {
    if steps == 0 {
        return;
    }
    assert!(
        x.len() > (steps - 1) * x_step + (N - 1) * x_stride
            && y.len() >= (steps - 1) * y_step + (R - 1) * y_stride + BLOCK
            && out.len() >= (N - 1) * stride + R * BLOCK,
        "all numbers are there"
    );
    #[cfg(target_arch = "x86_64")]
    if vectors() == Vectors::Avx512 {
        let (x, out) = ((x.as_ptr(), x_step, x_stride), (out.as_mut_ptr(), stride));
        let next = next.map_or(std::ptr::null(), |next| match next {
            Stored::F32(all) => all.as_ptr().cast(),
            Stored::F16(all) => all.as_ptr().cast(),
        });
        // SAFETY: asserted just now, and the processor has the instructions.
        #[expect(unsafe_code, reason = "instructions, and numbers read by pointer")]
        unsafe {
            return match y {
                Stored::F32(y) => avx512::add_outer::<N, R, false>(steps, x, (y.as_ptr().cast(), y_step, y_stride), next, out),
                Stored::F16(y) => avx512::add_outer::<N, R, true>(steps, x, (y.as_ptr().cast(), y_step, y_stride), next, out),
            };
        }
    }
    let Stored::F32(y) = y else { unreachable!("halves are widened first where they cannot be multiplied") };
    for n in 0..N {
        for r in 0..R {
            let out = &mut out[n * stride + r * BLOCK..][..BLOCK];
            add_scaled(steps, (&x[n * x_stride..], x_step), (&y[r * y_stride..], y_step), out);
        }
    }
}

per_instruction_set! {
    /// The same for one result of 16 numbers.
    fn add_scaled(steps: usize, x: (&[f32], usize), y: (&[f32], usize), out: &mut [f32]) -> (), add_scaled_body
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn add_scaled_body(steps: usize, (x, x_step): (&[f32], usize), (y, y_step): (&[f32], usize), out: &mut [f32]) {
    let out: &mut [f32; BLOCK] = out.first_chunk_mut().expect("there is room for 16");
    let mut sums = *out;
    for step in 0..steps {
        let (x, y): (_, &[f32; BLOCK]) = (x[step * x_step], y[step * y_step..].first_chunk().expect("there are as many"));
        for l in 0..BLOCK {
            sums[l] = x.mul_add(y[l], sums[l]);
        }
    }
    *out = sums;
}

per_instruction_set! {
    /// Merges the partial result of a later piece into that of the earlier ones.
    pub(crate) fn merge(state: &mut [f32], piece: &[f32], padded: usize) -> (), merge_body
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
pub(crate) fn finish<'a>(mut pieces: impl Iterator<Item = &'a [f32]>, padded: usize, out: &mut [f32]) {
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
