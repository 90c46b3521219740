//! Products with weights that stand alone, in f32, in one order of summation.
//!
//! A row's products go to 16 lanes, element i to lane i mod 16, each lane summing upwards by separate multiplication and
//! addition; then the lanes are added pairwise: 8 to 8, 4 to 4, 2 to 2, 1 to 1.

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use protocol::Precision;
use protocol::precision::PANEL_ROWS;

use super::math::per_instruction_set;
use super::{Matrix, TileOut};

const LANES: usize = 16;
/// Tokens that share one pass over a row of weights.
const TOKENS: usize = 4;
/// Columns of half-precision weights that are widened at a time.
const WIDENED: usize = 1024;

/// Writes row `row` as f32.
pub(super) fn row(w: Matrix<'_>, row: usize, out: &mut [f32]) {
    widen(w.precision, row_bytes(w, row), out);
}

fn row_bytes(w: Matrix<'_>, row: usize) -> &[u8] {
    let stride = w.precision.matrix_bytes(1, w.columns);
    &w.bytes[row * stride..][..stride]
}

fn widen(precision: Precision, bytes: &[u8], out: &mut [f32]) {
    match precision {
        Precision::F32 => out.copy_from_slice(bytemuck::cast_slice(bytes)),
        Precision::Bf16 => out.iter_mut().zip(bytemuck::cast_slice::<u8, u16>(bytes)).for_each(|(o, &w)| *o = widen_bf16(w)),
        Precision::F16 => bytemuck::cast_slice::<u8, u16>(bytes).reinterpret_cast::<half::f16>().convert_to_f32_slice(out),
        Precision::Q8 | Precision::Q4 => unreachable!("packed weights do not stand alone"),
    }
}

fn widen_bf16(bf16: u16) -> f32 {
    f32::from_bits(u32::from(bf16) << 16)
}

/// Multiplies a panel with some tokens' vectors, (tokens, columns).
pub(super) fn panel(w: Matrix<'_>, panel: usize, x: &[f32], out: &mut TileOut) {
    let first = panel * PANEL_ROWS;
    for lane in 0..PANEL_ROWS {
        if first + lane < w.rows {
            row_times_tokens(w, first + lane, x, |token, value| out[token][lane] = value);
        } else {
            out.iter_mut().for_each(|out| out[lane] = 0.0);
        }
    }
}

fn row_times_tokens(w: Matrix<'_>, row: usize, x: &[f32], mut out: impl FnMut(usize, f32)) {
    let bytes = row_bytes(w, row);
    let mut vectors = x.chunks_exact(w.columns).enumerate();
    match w.precision {
        Precision::F32 => {
            let weights: &[f32] = bytemuck::cast_slice(bytes);
            while vectors.len() >= TOKENS {
                let group = [(); TOKENS].map(|()| vectors.next().expect("there are enough"));
                let sums = dots(weights, group.map(|(_, x)| x));
                group.iter().zip(sums).for_each(|((token, _), sum)| out(*token, sum));
            }
            vectors.for_each(|(token, x)| out(token, dot(weights, x)));
        }
        // Widening while multiplying gives the same values as widening before.
        Precision::Bf16 => vectors.for_each(|(token, x)| out(token, dot_bf16(bytemuck::cast_slice(bytes), x))),
        _ => {
            let mut widened = [0.0; WIDENED];
            for (token, x) in vectors {
                let mut lanes = [0.0; LANES];
                for (bytes, x) in bytes.chunks(2 * WIDENED).zip(x.chunks(WIDENED)) {
                    widen(w.precision, bytes, &mut widened[..x.len()]);
                    add_products(&mut lanes, &widened[..x.len()], x);
                }
                out(token, sum_lanes(lanes));
            }
        }
    }
}

/// Returns the inner product of two vectors in the order described above.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    dots(a, [b])[0]
}

per_instruction_set! {
    /// Inner products of one vector with several.
    fn dots<const N: usize>(a: &[f32], b: [&[f32]; N]) -> [f32; N], dots_body
}
per_instruction_set! {
    /// Inner product with a row of bf16.
    fn dot_bf16(a: &[u16], b: &[f32]) -> f32, dot_bf16_body
}
per_instruction_set! {
    /// Adds the products of two vectors to the lanes; the first goes to lane 0.
    fn add_products(lanes: &mut [f32; LANES], a: &[f32], b: &[f32]) -> (), add_products_body
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn add_products_body(lanes: &mut [f32; LANES], a: &[f32], b: &[f32]) {
    let whole = a.len() / LANES * LANES;
    for at in (0..whole).step_by(LANES) {
        for i in 0..LANES {
            lanes[i] += a[at + i] * b[at + i];
        }
    }
    for at in whole..a.len() {
        lanes[at - whole] += a[at] * b[at];
    }
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
            lanes[i] += widen_bf16(a[i]) * b[i];
        }
    }
    for at in whole..a.len() {
        lanes[at - whole] += widen_bf16(a[at]) * b[at];
    }
    sum_lanes(lanes)
}

/// Adds lanes pairwise: 8 and 8, 4 and 4, 2 and 2, 1 and 1.
#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
pub(super) fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}
