//! Attention in which all rows of a segment see one another, computed piece by piece of the keys: no matrix of rows by rows is ever there.
//!
//! Pieces of 256 keys are merged from first to last as in a decoder's attention, so that no number of threads changes a bit.
//! [`plain`] computes in f32, [`packed`] by products of packed weights.

mod packed;
mod plain;

use std::ops::Range;

use crate::kernels::Kernels;
use crate::mixer::kv_cache::{BLOCK, PIECE};
use crate::pool::Pool;

pub(super) use packed::PackedPieces;

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

/// Queries, keys and values of rows: (rows, 3 × width).
#[derive(Clone, Copy)]
struct Projected<'a> {
    numbers: &'a [f32],
    heads: TowerHeads,
}

/// Which of the three.
#[derive(Clone, Copy)]
enum Of {
    Queries = 0,
    Keys = 1,
    Values = 2,
}

impl<'a> Projected<'a> {
    /// A row's vector of a head.
    fn vector(self, row: usize, of: Of, head: usize) -> &'a [f32] {
        let width = self.heads.width();
        &self.numbers[row * 3 * width + of as usize * width + head * self.heads.head_dim..][..self.heads.head_dim]
    }
}

/// Some queries of a head in a segment.
struct Task {
    segment: usize,
    head: usize,
    rows: Range<usize>,
}

/// How attention is computed.
pub(super) enum Way<'a> {
    /// In f32.
    Plain,
    /// By packed products, in this memory.
    Packed(&'static Kernels, &'a mut PackedPieces),
}

/// softmax(q · kᵀ ÷ √head_dim) · v within each segment. `qkv` is (rows, 3 × width): queries, keys, values; `out` becomes (rows, width), and
/// `by_head` is memory of the same size.
pub(super) fn attend(
    pool: &mut Pool,
    heads: TowerHeads,
    qkv: &[f32],
    segments: &[Range<usize>],
    way: Way<'_>,
    by_head: &mut [f32],
    out: &mut [f32],
) {
    let (width, head_dim) = (heads.width(), heads.head_dim);
    let qkv = Projected { numbers: qkv, heads };
    let queries = if matches!(way, Way::Plain) { plain::QUERIES } else { packed::QUERIES };
    let mut tasks = Vec::new();
    for (number, segment) in segments.iter().enumerate() {
        for head in 0..heads.heads {
            let rows = segment.clone().step_by(queries).map(|first| first..segment.end.min(first + queries));
            tasks.extend(rows.map(|rows| Task { segment: number, head, rows }));
        }
    }
    // By segment, by head, by row: so each task writes one run of numbers.
    let place =
        |segment: &Range<usize>, head: usize, row: usize| segment.start * width + (head * segment.len() + row - segment.start) * head_dim;
    let range = |task: usize| {
        let Task { segment, head, rows } = &tasks[task];
        let start = place(&segments[*segment], *head, rows.start);
        start..start + rows.len() * head_dim
    };
    match way {
        Way::Plain => {
            let mut scratch: Vec<_> = (0..pool.threads()).map(|_| plain::Scratch::new(heads)).collect();
            pool.parts_with(by_head, tasks.len(), range, &mut scratch, |task, scratch, out| {
                plain::one_task(qkv, &segments[tasks[task].segment], &tasks[task], scratch, out);
            });
        }
        Way::Packed(kernels, pieces) => {
            pieces.fill(pool, qkv, segments);
            let mut scratch: Vec<_> = (0..pool.threads()).map(|_| packed::Scratch::new(heads)).collect();
            let pieces = &*pieces;
            pool.parts_with(by_head, tasks.len(), range, &mut scratch, |task, scratch, out| {
                packed::one_task(kernels, qkv, pieces, &tasks[task], scratch, out);
            });
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers between −1 and 1 that look like chance.
    fn noise(count: usize) -> Vec<f32> {
        (0..count as u32).map(|i| (i.wrapping_mul(2_654_435_761) ^ i.wrapping_mul(40_503) << 7) as i32 as f32 / i32::MAX as f32).collect()
    }

    #[test]
    fn packed_attention_is_close_to_that_in_f32_and_the_same_by_all_kernels_and_threads() {
        for (heads, head_dim, lengths) in
            [(2, 72, vec![300, 1, 31, 600]), (3, 64, vec![104, 104, 13]), (1, 4, vec![257]), (2, 100, vec![16])]
        {
            let heads = TowerHeads { heads, head_dim };
            let rows: usize = lengths.iter().sum();
            let ends = lengths.iter().scan(0, |end, length| Some(std::mem::replace(end, *end + length) + length));
            let segments: Vec<_> = ends.zip(&lengths).map(|(end, length)| end - length..end).collect();
            let qkv: Vec<_> = noise(rows * 3 * heads.width()).into_iter().map(|x| 3.0 * x).collect();
            let run = |threads: usize, way: Way<'_>| {
                let mut pool = Pool::new(threads);
                let (mut by_head, mut out) = (vec![0.0; rows * heads.width()], vec![0.0; rows * heads.width()]);
                attend(&mut pool, heads, &qkv, &segments, way, &mut by_head, &mut out);
                out
            };
            let expected = run(1, Way::Plain);
            let scalar = Kernels::named("scalar").expect("it runs everywhere");
            let packed = run(1, Way::Packed(scalar, &mut PackedPieces::default()));
            let size = (expected.iter().map(|x| x * x).sum::<f32>() / expected.len() as f32).sqrt();
            let error = (expected.iter().zip(&packed).map(|(a, b)| (a - b) * (a - b)).sum::<f32>() / expected.len() as f32).sqrt();
            assert!(error < 0.03 * size, "heads of {head_dim}: {error} of {size}");
            // One memory for all, as a tower uses it: what an earlier use left there changes nothing.
            let mut pieces = PackedPieces::default();
            for kernels in Kernels::available() {
                for threads in [1, 2] {
                    assert_eq!(run(threads, Way::Packed(kernels, &mut pieces)), packed, "{}", kernels.name);
                }
            }
        }
    }
}
