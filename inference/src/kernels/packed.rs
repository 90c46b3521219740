//! Packed weights: how they lie, how they are made, and the kernel that any processor can run.
//!
//! `docs/expert-function.md` is the definition; every other kernel gives the same bits as the one here.

use half::f16;
use protocol::Precision;
use protocol::precision::{BLOCK_SCALE_BYTES, GROUP_COLUMNS, PANEL_ROWS};

use super::math::per_instruction_set;
use super::{GROUP_WORDS, Kernels, PanelKernel, TileOut, Vector};

/// Added to a 4-bit weight, so that it is never negative.
pub(super) const Q4_BIAS: i32 = 8;
/// Added to an 8-bit weight.
pub(super) const Q8_BIAS: i32 = 128;
/// Largest quantised activation, and largest 8-bit weight that we make.
const INT8_MAX: f32 = 127.0;
/// Groups of activations below this are taken for zero: 2⁻¹⁰⁰.
const ACTIVATION_MIN: f32 = f32::from_bits((127 - 100) << 23);
const WORDS: usize = GROUP_COLUMNS / 4;

/// The kernels that any processor can run.
pub(super) static KERNELS: Kernels = Kernels {
    name: "scalar",
    available: || true,
    q4: &[scalar::<1, Q4>, scalar::<2, Q4>, scalar::<3, Q4>, scalar::<4, Q4>] as &[PanelKernel],
    q8: &[scalar::<1, Q8>, scalar::<2, Q8>, scalar::<3, Q8>, scalar::<4, Q8>] as &[PanelKernel],
};

/// Where a weight stands in a block.
trait Packing {
    const PRECISION: Precision;
    const BIAS: i32;
    /// The biased weight of `row` and `column` of a block.
    fn weight(block: &[u8], row: usize, column: usize) -> i32;
    /// Writes a biased weight into a block of zeros.
    fn set(block: &mut [u8], row: usize, column: usize, weight: u8);
}

struct Q4;
struct Q8;

impl Packing for Q4 {
    const PRECISION: Precision = Precision::Q4;
    const BIAS: i32 = Q4_BIAS;

    fn weight(block: &[u8], row: usize, column: usize) -> i32 {
        let (half, column) = (column / 16, column % 16);
        let byte = block[BLOCK_SCALE_BYTES + column / 4 * 4 * PANEL_ROWS + 4 * row + column % 4];
        i32::from(byte >> (4 * half) & 15)
    }

    fn set(block: &mut [u8], row: usize, column: usize, weight: u8) {
        let (half, column) = (column / 16, column % 16);
        block[BLOCK_SCALE_BYTES + column / 4 * 4 * PANEL_ROWS + 4 * row + column % 4] |= weight << (4 * half);
    }
}

impl Packing for Q8 {
    const PRECISION: Precision = Precision::Q8;
    const BIAS: i32 = Q8_BIAS;

    fn weight(block: &[u8], row: usize, column: usize) -> i32 {
        i32::from(block[BLOCK_SCALE_BYTES + column / 4 * 4 * PANEL_ROWS + 4 * row + column % 4])
    }

    fn set(block: &mut [u8], row: usize, column: usize, weight: u8) {
        block[BLOCK_SCALE_BYTES + column / 4 * 4 * PANEL_ROWS + 4 * row + column % 4] = weight;
    }
}

fn scale_of(block: &[u8], row: usize) -> f32 {
    f16::from_le_bytes([block[2 * row], block[2 * row + 1]]).to_f32()
}

/// The definition, as plainly as it can be written.
///
/// # Safety
/// See [`PanelKernel`].
#[expect(unsafe_code, reason = "kernels read by pointer")]
unsafe fn scalar<const TOKENS: usize, P: Packing>(panel: *const u8, groups: usize, tile: *const u32, out: &mut TileOut) {
    let block_bytes = P::PRECISION.block_bytes().expect("a packed precision");
    // SAFETY: the caller's promise.
    let (panel, tile) = unsafe {
        (std::slice::from_raw_parts(panel, groups * block_bytes), std::slice::from_raw_parts(tile, groups * TOKENS * GROUP_WORDS))
    };
    out[..TOKENS].fill([0.0; PANEL_ROWS]);
    for (block, group) in panel.chunks_exact(block_bytes).zip(tile.chunks_exact(TOKENS * GROUP_WORDS)) {
        for (token, out) in out[..TOKENS].iter_mut().enumerate() {
            let scale = f32::from_bits(group[WORDS * TOKENS + token]);
            for (row, out) in out.iter_mut().enumerate() {
                let mut sum = 0;
                for column in 0..GROUP_COLUMNS {
                    let activation = group[column / 4 * TOKENS + token].to_le_bytes()[column % 4] as i8;
                    sum += (P::weight(block, row, column) - P::BIAS) * i32::from(activation);
                }
                *out = (sum as f32).mul_add(scale_of(block, row) * scale, *out);
            }
        }
    }
}

/// Writes row `row` of a packed matrix as f32.
pub(crate) fn weights_of_row(bytes: &[u8], precision: Precision, columns: usize, row: usize, out: &mut [f32]) {
    let block_bytes = precision.block_bytes().expect("a packed precision");
    let groups = columns.div_ceil(GROUP_COLUMNS);
    let panel = &bytes[row / PANEL_ROWS * groups * block_bytes..][..groups * block_bytes];
    let row = row % PANEL_ROWS;
    for (block, out) in panel.chunks_exact(block_bytes).zip(out.chunks_mut(GROUP_COLUMNS)) {
        let scale = scale_of(block, row);
        for (column, out) in out.iter_mut().enumerate() {
            let weight = match precision {
                Precision::Q4 => Q4::weight(block, row, column) - Q4::BIAS,
                _ => Q8::weight(block, row, column) - Q8::BIAS,
            };
            *out = scale * weight as f32;
        }
    }
}

/// Quantises some tokens' vectors into a tile: see [`Operand`](super::Operand).
pub(super) fn quantise<'a>(groups: usize, rows: usize, words: &mut [u32], source: impl Fn(usize) -> Vector<'a>) {
    for token in 0..rows {
        quantise_token(source(token), groups, rows, token, words);
    }
}

per_instruction_set! {
    fn quantise_token(vector: Vector<'_>, groups: usize, rows: usize, token: usize, words: &mut [u32]) -> (), quantise_token_body
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn quantise_token_body(vector: Vector<'_>, groups: usize, rows: usize, token: usize, words: &mut [u32]) {
    for (number, group) in words[..groups * rows * GROUP_WORDS].chunks_exact_mut(rows * GROUP_WORDS).enumerate() {
        let mut x = [0.0; GROUP_COLUMNS];
        for (half, x) in x.as_chunks_mut::<PANEL_ROWS>().0.iter_mut().enumerate() {
            vector.panel_into(2 * number + half, x);
        }
        // The bits of magnitudes order as they do, NaN above all.
        let magnitude = x.iter().fold(0, |max: u32, x| max.max(x.to_bits() & 0x7fff_ffff));
        let magnitude = f32::from_bits(magnitude);
        let (scale, inverse) = if magnitude < ACTIVATION_MIN { (0.0, 0.0) } else { (magnitude / INT8_MAX, INT8_MAX / magnitude) };
        let mut sum = 0;
        let mut bytes = [0i8; GROUP_COLUMNS];
        for (q, x) in bytes.iter_mut().zip(x) {
            let rounded = (x * inverse).round_ties_even();
            // Within ±127 whenever x is finite; otherwise the scale is not, and the vector is refused.
            let integer = rounded as i32;
            *q = integer as i8;
            sum += integer;
        }
        for (i, word) in bytes.as_chunks::<4>().0.iter().enumerate() {
            group[i * rows + token] = u32::from_le_bytes(word.map(|q| q as u8));
        }
        group[WORDS * rows + token] = scale.to_bits();
        group[(WORDS + 1) * rows + token] = sum as u32;
    }
}

/// Packs a matrix of finite weights, (rows, columns): `row` writes one of its rows.
pub(crate) fn pack(precision: Precision, rows: usize, columns: usize, out: &mut [u8], mut row: impl FnMut(usize, &mut [f32])) {
    assert_eq!(out.len(), precision.matrix_bytes(rows, columns), "a packed matrix has all its bytes");
    let block_bytes = precision.block_bytes().expect("a packed precision");
    let groups = columns.div_ceil(GROUP_COLUMNS);
    let mut values = vec![0.0; groups * GROUP_COLUMNS];
    for number in 0..rows.next_multiple_of(PANEL_ROWS) {
        values.fill(0.0);
        if number < rows {
            row(number, &mut values[..columns]);
        }
        let panel = &mut out[number / PANEL_ROWS * groups * block_bytes..][..groups * block_bytes];
        for (block, x) in panel.chunks_exact_mut(block_bytes).zip(values.as_chunks().0) {
            if precision == Precision::Q4 {
                let (scale, weights) = quantise_q4(x);
                set_group::<Q4>(block, number % PANEL_ROWS, scale, &weights);
            } else {
                let (scale, weights) = quantise_q8(x);
                set_group::<Q8>(block, number % PANEL_ROWS, scale, &weights);
            }
        }
    }
}

fn set_group<P: Packing>(block: &mut [u8], row: usize, scale: f16, weights: &[f32; GROUP_COLUMNS]) {
    if row == 0 {
        block.fill(0);
    }
    block[2 * row..][..2].copy_from_slice(&scale.to_le_bytes());
    for (column, &weight) in weights.iter().enumerate() {
        P::set(block, row, column, (weight as i32 + P::BIAS) as u8);
    }
}

/// To the nearest of 255 integers, on a scale rounded first.
fn quantise_q8(x: &[f32; GROUP_COLUMNS]) -> (f16, [f32; GROUP_COLUMNS]) {
    let magnitude = x.iter().fold(0.0, |max: f32, x| max.max(x.abs()));
    let scale = f16::from_f32(magnitude / INT8_MAX);
    if scale == f16::ZERO {
        return (f16::ZERO, [0.0; GROUP_COLUMNS]);
    }
    (scale, nearest(x, scale.to_f32(), -INT8_MAX, INT8_MAX))
}

/// Candidates for the scale: 8 ± this many eighths of the largest weight's step.
const Q4_STEPS: i32 = 12;

per_instruction_set! {
    /// Of 25 scales about the one that just reaches the largest weight, each refitted by least squares, that of the least error.
    fn quantise_q4(x: &[f32; GROUP_COLUMNS]) -> (f16, [f32; GROUP_COLUMNS]), quantise_q4_body
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn quantise_q4_body(x: &[f32; GROUP_COLUMNS]) -> (f16, [f32; GROUP_COLUMNS]) {
    let largest = x.iter().fold(0.0, |largest: f32, &x| if x.abs() > largest.abs() { x } else { largest });
    let plain = f16::from_f32(largest / -8.0);
    if plain == f16::ZERO {
        return (f16::ZERO, [0.0; GROUP_COLUMNS]);
    }
    let mut best: Option<(f32, f16)> = None;
    for step in -Q4_STEPS..=Q4_STEPS {
        let weights = nearest(x, largest / -(8.0 + step as f32 * 0.125), -8.0, 7.0);
        let mut products = [0.0; GROUP_COLUMNS];
        let mut squares = [0.0; GROUP_COLUMNS];
        for i in 0..GROUP_COLUMNS {
            products[i] = x[i] * weights[i];
            squares[i] = weights[i] * weights[i];
        }
        let (products, squares) = (sum(products), sum(squares));
        if squares.partial_cmp(&0.0) != Some(std::cmp::Ordering::Greater) {
            continue;
        }
        let scale = f16::from_f32(products / squares);
        if scale == f16::ZERO || !scale.is_finite() {
            continue;
        }
        let d = scale.to_f32();
        let weights = nearest(x, d, -8.0, 7.0);
        let mut errors = [0.0; GROUP_COLUMNS];
        for i in 0..GROUP_COLUMNS {
            let t = x[i] - d * weights[i];
            errors[i] = t * t;
        }
        let error = sum(errors);
        if best.is_none_or(|(least, _)| error < least) {
            best = Some((error, scale));
        }
    }
    let scale = best.map_or(plain, |(_, scale)| scale);
    (scale, nearest(x, scale.to_f32(), -8.0, 7.0))
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn nearest(x: &[f32; GROUP_COLUMNS], scale: f32, min: f32, max: f32) -> [f32; GROUP_COLUMNS] {
    x.map(|x| {
        let q = (x / scale).round_ties_even();
        let q = if q > min { q } else { min };
        if q < max { q } else { max }
    })
}

/// Adds 16 to 16, 8 to 8, 4 to 4, 2 to 2, 1 to 1.
#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn sum(mut x: [f32; GROUP_COLUMNS]) -> f32 {
    let mut half = GROUP_COLUMNS / 2;
    while half > 0 {
        for i in 0..half {
            x[i] += x[i + half];
        }
        half /= 2;
    }
    x[0]
}
