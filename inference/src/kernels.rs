//! Matrix products in f32 with one order of summation, whatever the batch, the threads or the instruction set.
//!
//! A row's products go to 16 lanes, element i to lane i mod 16, each lane summing upwards by separate multiplication and
//! addition; then the lanes are added pairwise. Nothing here may reorder that: every result in the engine depends on it.
//! This is the seam for the packed integer kernels.

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use protocol::Precision;
use rayon::prelude::*;

const LANES: usize = 16;
/// Tokens that share one pass over a row of weights.
const TOKENS: usize = 4;
/// Rows that a thread takes at a time.
const ROWS: usize = 32;
/// Below this many multiplications, handing work to other threads costs more than it saves.
const PARALLEL_MULTIPLICATIONS_MIN: usize = 1 << 17;

/// A matrix of weights, (rows, columns), in the bytes it came in.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    bytes: &'a [u8],
    precision: Precision,
    rows: usize,
    columns: usize,
}

impl<'a> Matrix<'a> {
    /// Wraps `bytes`, which must be aligned for their format and of the right length.
    pub(crate) fn new(bytes: &'a [u8], precision: Precision, rows: usize, columns: usize) -> Self {
        assert_eq!(bytes.len(), rows * columns * precision.bytes(), "a matrix has all its bytes");
        Self { bytes, precision, rows, columns }
    }

    /// Writes row `row` as f32.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        let bytes = self.row_bytes(row);
        match self.precision {
            Precision::F32 => out.copy_from_slice(bytemuck::cast_slice(bytes)),
            Precision::Bf16 => out.iter_mut().zip(bytemuck::cast_slice::<u8, u16>(bytes)).for_each(|(o, &w)| *o = widen(w)),
            Precision::F16 => bytemuck::cast_slice::<u8, u16>(bytes).reinterpret_cast::<half::f16>().convert_to_f32_slice(out),
        }
    }

    fn row_bytes(&self, row: usize) -> &'a [u8] {
        let stride = self.columns * self.precision.bytes();
        &self.bytes[row * stride..][..stride]
    }
}

fn widen(bf16: u16) -> f32 {
    f32::from_bits(u32::from(bf16) << 16)
}

/// Returns x · wᵀ: `x` is (tokens, columns), the result (tokens, rows).
pub(crate) fn matmul(w: Matrix<'_>, x: &[f32]) -> Vec<f32> {
    let tokens = x.len() / w.columns;
    assert_eq!(x.len(), tokens * w.columns, "vectors are as long as the matrix has columns");
    // By rows first: each thread then writes to a piece of its own.
    let mut by_row = vec![0.0; w.rows * tokens];
    let rows = |(chunk, out): (usize, &mut [f32])| {
        let mut row = vec![0.0; w.columns];
        for (i, out) in out.chunks_exact_mut(tokens).enumerate() {
            row_times_tokens(w, chunk * ROWS + i, x, &mut row, out);
        }
    };
    if tokens == 0 {
        return by_row;
    }
    if w.rows * w.columns * tokens < PARALLEL_MULTIPLICATIONS_MIN {
        by_row.chunks_mut(ROWS * tokens).enumerate().for_each(rows);
    } else {
        by_row.par_chunks_mut(ROWS * tokens).enumerate().for_each(rows);
    }
    if tokens == 1 {
        return by_row;
    }
    let mut by_token = vec![0.0; by_row.len()];
    for (row, values) in by_row.chunks_exact(tokens).enumerate() {
        values.iter().enumerate().for_each(|(token, &value)| by_token[token * w.rows + row] = value);
    }
    by_token
}

fn row_times_tokens(w: Matrix<'_>, row: usize, x: &[f32], scratch: &mut [f32], out: &mut [f32]) {
    // A token alone: converting while multiplying saves a pass. The values multiplied are the same either way.
    if let ([out], Precision::Bf16) = (&mut *out, w.precision) {
        *out = dot_bf16(bytemuck::cast_slice(w.row_bytes(row)), x);
        return;
    }
    let weights: &[f32] = if w.precision == Precision::F32 {
        bytemuck::cast_slice(w.row_bytes(row))
    } else {
        w.row(row, scratch);
        scratch
    };
    let mut groups = out.chunks_exact_mut(TOKENS);
    let mut x = x.chunks_exact(w.columns);
    for group in &mut groups {
        let vectors = [(); TOKENS].map(|()| x.next().expect("as many vectors as results"));
        group.copy_from_slice(&dots(weights, vectors));
    }
    for (out, x) in groups.into_remainder().iter_mut().zip(x) {
        *out = dot(weights, x);
    }
}

/// Returns the inner product of two vectors in the order described above.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    dots(a, [b])[0]
}

/// Compiles one body for each instruction set of x86-64 and picks at run time. All give the same bits: multiplication and
/// addition stay separate, and the order is fixed by the lanes.
macro_rules! per_instruction_set {
    ($(#[$doc:meta])* fn $name:ident $(<const $n:ident: usize>)? ($($arg:ident: $type:ty),*) -> $ret:ty, $body:ident) => {
        $(#[$doc])*
        fn $name $(<const $n: usize>)? ($($arg: $type),*) -> $ret {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f")]
                fn avx512 $(<const $n: usize>)? ($($arg: $type),*) -> $ret { $body($($arg),*) }
                #[target_feature(enable = "avx2")]
                fn avx2 $(<const $n: usize>)? ($($arg: $type),*) -> $ret { $body($($arg),*) }
                if is_x86_feature_detected!("avx512f") {
                    // SAFETY: the processor has AVX-512F, asked just now.
                    #[expect(unsafe_code, reason = "calling a function compiled for an instruction set")]
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has AVX2, asked just now.
                    #[expect(unsafe_code, reason = "calling a function compiled for an instruction set")]
                    return unsafe { avx2($($arg),*) };
                }
            }
            $body($($arg),*)
        }
    };
}

per_instruction_set! {
    /// Inner products of one vector with several.
    fn dots<const N: usize>(a: &[f32], b: [&[f32]; N]) -> [f32; N], dots_body
}
per_instruction_set! {
    /// Inner product with a row of bf16.
    fn dot_bf16(a: &[u16], b: &[f32]) -> f32, dot_bf16_body
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn dots_body<const N: usize>(a: &[f32], b: [&[f32]; N]) -> [f32; N] {
    let mut lanes = [[0.0f32; LANES]; N];
    let whole = a.len() / LANES * LANES;
    let b = b.map(|b| &b[..a.len()]);
    for at in (0..whole).step_by(LANES) {
        let a: &[f32; LANES] = a[at..].first_chunk().expect("within whole lanes");
        for (lanes, b) in lanes.iter_mut().zip(&b) {
            let b: &[f32; LANES] = b[at..].first_chunk().expect("within whole lanes");
            for i in 0..LANES {
                lanes[i] += a[i] * b[i];
            }
        }
    }
    for (lanes, b) in lanes.iter_mut().zip(&b) {
        for at in whole..a.len() {
            lanes[at - whole] += a[at] * b[at];
        }
    }
    lanes.map(sum_lanes)
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn dot_bf16_body(a: &[u16], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let whole = a.len() / LANES * LANES;
    let b = &b[..a.len()];
    for at in (0..whole).step_by(LANES) {
        let a: &[u16; LANES] = a[at..].first_chunk().expect("within whole lanes");
        let b: &[f32; LANES] = b[at..].first_chunk().expect("within whole lanes");
        for i in 0..LANES {
            lanes[i] += widen(a[i]) * b[i];
        }
    }
    for at in whole..a.len() {
        lanes[at - whole] += widen(a[at]) * b[at];
    }
    sum_lanes(lanes)
}

/// Adds lanes pairwise: 8 and 8, 4 and 4, 2 and 2, 1 and 1.
#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// Returns x scaled to a root mean square of 1, times `weight`: one row of RMSNorm (Zhang and Sennrich 2019).
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mean_square = dot(x, x) / x.len() as f32;
    let scale = 1.0 / (mean_square + eps).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
}

/// Turns logits into probabilities, in place.
pub(crate) fn softmax(x: &mut [f32]) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for x in x.iter_mut() {
        *x = (*x - max).exp();
        sum += *x;
    }
    for x in x.iter_mut() {
        *x /= sum;
    }
}

/// SwiGLU's middle: silu(gate) × up, element by element (Shazeer 2020).
pub(crate) fn silu_times(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = *g / (1.0 + (-*g).exp()) * u;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aligned::AlignedBytes;
    use proptest::prelude::*;

    /// The order as the module describes it, written down plainly.
    fn plain_dot(a: &[f32], b: &[f32]) -> f32 {
        let mut lanes = [0.0f32; 16];
        for i in 0..a.len() {
            lanes[i % 16] += a[i] * b[i];
        }
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
        }
        lanes[0]
    }

    fn numbers(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        (0..n)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            })
            .collect()
    }

    proptest! {
        #[test]
        fn every_path_keeps_the_order(columns in 1usize..100, rows in 1usize..70, tokens in 1usize..11, seed in any::<u64>()) {
            let x = numbers(tokens * columns, seed);
            for precision in [Precision::F32, Precision::F16, Precision::Bf16] {
                let weights = numbers(rows * columns, seed ^ 1);
                let bytes: Vec<u8> = weights.iter().flat_map(|w| match precision {
                    Precision::F32 => w.to_le_bytes().to_vec(),
                    Precision::F16 => half::f16::from_f32(*w).to_le_bytes().to_vec(),
                    Precision::Bf16 => half::bf16::from_f32(*w).to_le_bytes().to_vec(),
                }).collect();
                let bytes = AlignedBytes::copy_of(&bytes);
                let w = Matrix::new(&bytes, precision, rows, columns);
                let product = matmul(w, &x);
                let mut row = vec![0.0; columns];
                for r in 0..rows {
                    w.row(r, &mut row);
                    for t in 0..tokens {
                        let expected = plain_dot(&row, &x[t * columns..][..columns]);
                        prop_assert_eq!(product[t * rows + r].to_bits(), expected.to_bits(), "{} row {} token {}", precision, r, t);
                    }
                }
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let (rows, columns, tokens) = (300, 257, 5);
        let (w, x) = (numbers(rows * columns, 3), numbers(tokens * columns, 4));
        let bytes = AlignedBytes::copy_of(bytemuck::cast_slice(&w));
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            pool.install(|| matmul(Matrix::new(&bytes, Precision::F32, rows, columns), &x))
        };
        assert!(rows * columns * tokens > PARALLEL_MULTIPLICATIONS_MIN);
        let one = on(1);
        assert!(on(2) == one && on(7) == one);
    }
}
