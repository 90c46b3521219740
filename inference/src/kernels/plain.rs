//! Products with weights that stand alone, in f32, in one order of summation.
//!
//! A row's products go to 16 lanes, element i to lane i mod 16, each lane summing upwards by separate multiplication and
//! addition; then the lanes are added pairwise: 8 to 8, 4 to 4, 2 to 2, 1 to 1.

use std::ops::Range;

use protocol::Precision;
use protocol::precision::PANEL_ROWS;

use super::math::{per_instruction_set, widen_f16};
use super::{Matrix, TILE_MAX};

const LANES: usize = 16;
/// Rows of weights that are multiplied together with several tokens.
const ROWS: usize = 4;
/// Tokens that share a look at them, where there are registers enough.
#[cfg(target_arch = "x86_64")]
const TOKENS: usize = 4;
/// Columns that are widened at a time.
const WIDENED: usize = 512;

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
        Precision::F16 => widen_f16(bytemuck::cast_slice(bytes), out),
        _ => unreachable!("packed weights do not stand alone"),
    }
}

fn widen_bf16(bf16: u16) -> f32 {
    f32::from_bits(u32::from(bf16) << 16)
}

/// Multiplies a panel with some tokens' vectors, (tokens, columns); results are (tokens, 16).
pub(super) fn panel(w: Matrix<'_>, panel: usize, x: &[f32], out: &mut [[f32; PANEL_ROWS]]) {
    let first = panel * PANEL_ROWS;
    let rows = PANEL_ROWS.min(w.rows - first);
    out.iter_mut().for_each(|out| out[rows..].fill(0.0));
    let mut lanes = [[[0.0; LANES]; ROWS]; TILE_MAX];
    let lanes = &mut lanes[..out.len()];
    for from in (0..rows).step_by(ROWS) {
        let rows = ROWS.min(rows - from);
        lanes.fill([[0.0; LANES]; ROWS]);
        add_rows(lanes, w, first + from..first + from + rows, x);
        for (lanes, out) in lanes.iter().zip(&mut *out) {
            out[from..from + rows].iter_mut().zip(lanes).for_each(|(out, lanes)| *out = sum_lanes(*lanes));
        }
    }
}

/// Adds the products of some rows, four at most, with all tokens to their lanes.
fn add_rows(lanes: &mut [[[f32; LANES]; ROWS]], w: Matrix<'_>, rows: Range<usize>, x: &[f32]) {
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut, reason = "only there are some of the columns done otherwise"))]
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if rows.len() == ROWS && super::math::vectors() == super::math::Vectors::Avx512 {
        done = w.columns / LANES * LANES;
        let (groups, rest) = lanes.as_chunks_mut::<TOKENS>();
        let groups_tokens = groups.len() * TOKENS;
        groups.iter_mut().enumerate().for_each(|(i, lanes)| add_four_rows(lanes, w, rows.start, &x[i * TOKENS * w.columns..]));
        rest.iter_mut().enumerate().for_each(|(i, lanes)| {
            add_four_rows(std::array::from_mut(lanes), w, rows.start, &x[(groups_tokens + i) * w.columns..]);
        });
    }
    let mut widened = [0.0; WIDENED];
    for (row, bytes) in rows.map(|row| row_bytes(w, row)).enumerate() {
        for column in (done..w.columns).step_by(WIDENED) {
            let widened = &mut widened[..WIDENED.min(w.columns - column)];
            let bytes_each = w.precision.matrix_bytes(1, 1);
            widen(w.precision, &bytes[column * bytes_each..][..widened.len() * bytes_each], widened);
            for (lanes, x) in lanes.iter_mut().zip(x.chunks_exact(w.columns)) {
                add_products(&mut lanes[row], widened, &x[column..][..widened.len()]);
            }
        }
    }
}

/// Adds the products of four rows with T tokens to their lanes, but for columns beyond the last whole vector.
#[cfg(target_arch = "x86_64")]
fn add_four_rows<const T: usize>(lanes: &mut [[[f32; LANES]; ROWS]; T], w: Matrix<'_>, first: usize, x: &[f32]) {
    let stride = w.precision.matrix_bytes(1, w.columns);
    let weights = (w.bytes[first * stride..][..ROWS * stride].as_ptr(), stride);
    let x: [_; T] = std::array::from_fn(|t| x[t * w.columns..][..w.columns].as_ptr());
    let whole = w.columns / LANES * LANES;
    // SAFETY: slices of that many numbers, on a processor with these instructions.
    #[expect(unsafe_code, reason = "instructions, and numbers read by pointer")]
    unsafe {
        use super::avx512::{BF16, F16, F32, add_products};
        match w.precision {
            Precision::Bf16 => add_products::<T, BF16>(lanes, weights, x, whole),
            Precision::F16 => add_products::<T, F16>(lanes, weights, x, whole),
            _ => add_products::<T, F32>(lanes, weights, x, whole),
        }
    }
}

/// Returns the inner product of two vectors in the order described above.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    add_products(&mut lanes, a, b);
    sum_lanes(lanes)
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
