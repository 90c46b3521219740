//! Packed weights: how they lie, how they are made, and the kernel that any processor can run.
//!
//! `docs/expert-function.md` is the definition; every other kernel gives the same bits as the one here.

use half::f16;
use protocol::Precision;
use protocol::precision::{BLOCK_SCALE_BYTES, GROUP_COLUMNS, PANEL_ROWS};

use super::math::{ROUNDING, per_instruction_set};
use super::{Activations, GROUP_WORDS, Kernels, NUMBER_WORDS, Panels, Results, TILE_MAX, Vector};

/// Added to a 4-bit weight, so that it is never negative.
pub(super) const Q4_BIAS: i32 = 8;
/// Added to an 8-bit weight.
pub(super) const Q8_BIAS: i32 = 128;
/// Largest quantised activation, and largest 8-bit weight that we make.
const INT8_MAX: f32 = 127.0;
/// Groups of activations below this are taken for zero: 2⁻¹⁰⁰.
const ACTIVATION_MIN: f32 = f32::from_bits((127 - 100) << 23);

/// The kernels that any processor can run.
pub(super) static KERNELS: Kernels = Kernels { name: "scalar", available: || true, q4: scalar::<Q4>, q8: scalar::<Q8>, near: usize::MAX };

/// Where a weight stands in a block.
trait Packing {
    const PRECISION: Precision;
    const BIAS: i32;
    /// The biased weight of `row` and `column` of a block.
    fn weight(block: &[u8], row: usize, column: usize) -> i32;
    /// Turns weights into integers on a scale.
    fn quantise(x: &[f32; GROUP_COLUMNS]) -> (f16, [f32; GROUP_COLUMNS]);
    /// Writes the biased weights of a row of a block.
    fn set_row(block: &mut [u8], row: usize, weights: &[u8; GROUP_COLUMNS]);
}

struct Q4;
struct Q8;

impl Packing for Q4 {
    const PRECISION: Precision = Precision::Q4;
    const BIAS: i32 = Q4_BIAS;

    #[inline(always)]
    #[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
    fn quantise(x: &[f32; GROUP_COLUMNS]) -> (f16, [f32; GROUP_COLUMNS]) {
        quantise_q4(x)
    }

    fn weight(block: &[u8], row: usize, column: usize) -> i32 {
        let (half, column) = (column / 16, column % 16);
        let byte = block[BLOCK_SCALE_BYTES + column / 4 * 4 * PANEL_ROWS + 4 * row + column % 4];
        i32::from(byte >> (4 * half) & 15)
    }

    fn set_row(block: &mut [u8], row: usize, weights: &[u8; GROUP_COLUMNS]) {
        let (low, high) = weights.split_at(GROUP_COLUMNS / 2);
        let fours = block[BLOCK_SCALE_BYTES..].chunks_exact_mut(4 * PANEL_ROWS).zip(low.chunks_exact(4)).zip(high.chunks_exact(4));
        for ((four, low), high) in fours {
            four[4 * row..4 * row + 4].iter_mut().zip(low).zip(high).for_each(|((byte, low), high)| *byte = low | high << 4);
        }
    }
}

impl Packing for Q8 {
    const PRECISION: Precision = Precision::Q8;
    const BIAS: i32 = Q8_BIAS;

    #[inline(always)]
    #[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
    fn quantise(x: &[f32; GROUP_COLUMNS]) -> (f16, [f32; GROUP_COLUMNS]) {
        quantise_q8(x)
    }

    fn weight(block: &[u8], row: usize, column: usize) -> i32 {
        i32::from(block[BLOCK_SCALE_BYTES + column / 4 * 4 * PANEL_ROWS + 4 * row + column % 4])
    }

    fn set_row(block: &mut [u8], row: usize, weights: &[u8; GROUP_COLUMNS]) {
        let fours = block[BLOCK_SCALE_BYTES..].chunks_exact_mut(4 * PANEL_ROWS).zip(weights.as_chunks::<4>().0);
        fours.for_each(|(four, weights)| *four[4 * row..].first_chunk_mut().expect("a row has four there") = *weights);
    }
}

fn scale_of(block: &[u8], row: usize) -> f32 {
    f16::from_le_bytes([block[2 * row], block[2 * row + 1]]).to_f32()
}

/// The definition, as plainly as it can be written.
///
/// # Safety
/// See [`Kernel`](super::Kernel).
#[expect(unsafe_code, reason = "kernels read by pointer")]
unsafe fn scalar<P: Packing>(w: Panels, x: Activations, y: Results) {
    let (block_bytes, all) = (P::PRECISION.block_bytes().expect("a packed precision"), w.groups * x.tokens);
    // SAFETY: the caller's promise.
    let (numbers, scales) =
        unsafe { (std::slice::from_raw_parts(x.numbers.cast::<[i8; GROUP_COLUMNS]>(), all), std::slice::from_raw_parts(x.scales, all)) };
    for (number, panel) in w.each() {
        // SAFETY: the caller's promise.
        let (panel, y) = unsafe {
            (std::slice::from_raw_parts(panel, w.groups * block_bytes), std::slice::from_raw_parts_mut(y.at(number, 0), x.tokens))
        };
        for (group, block) in panel.chunks_exact(block_bytes).enumerate() {
            for (token, y) in y.iter_mut().enumerate() {
                let (activations, scale) = (&numbers[group * x.tokens + token], scales[group * x.tokens + token]);
                for (row, y) in y.iter_mut().enumerate() {
                    let products = activations.iter().enumerate().map(|(i, &q)| (P::weight(block, row, i) - P::BIAS) * i32::from(q));
                    *y = (products.sum::<i32>() as f32).mul_add(scale_of(block, row) * scale, *y);
                }
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
    assert!(rows <= TILE_MAX, "a tile has so many tokens at most");
    let vectors: [_; TILE_MAX] = std::array::from_fn(|row| source(row.min(rows - 1)));
    quantise_rows(groups, &vectors[..rows], words);
}

per_instruction_set! {
    fn quantise_rows(groups: usize, vectors: &[Vector<'_>], words: &mut [u32]) -> (), quantise_rows_body
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn quantise_rows_body(groups: usize, vectors: &[Vector<'_>], words: &mut [u32]) {
    let count = groups * vectors.len();
    let (numbers, rest) = words[..count * GROUP_WORDS].split_at_mut(count * NUMBER_WORDS);
    let (scales, excesses) = rest.split_at_mut(count);
    let numbers = numbers.as_chunks_mut().0;
    let mut x = [0.0; GROUP_COLUMNS];
    // In the order in which vectors lie.
    let alone = vectors.iter().all(Vector::is_alone);
    let (slow, fast) = if alone { (vectors.len(), groups) } else { (groups, vectors.len()) };
    for i in 0..slow {
        for j in 0..fast {
            let (group, row) = if alone { (j, i) } else { (i, j) };
            let at = group * vectors.len() + row;
            vectors[row].group_into(group, &mut x);
            scales[at] = quantise_group(&x, &mut numbers[at]);
        }
    }
    // A loop of its own: summed where they are made, integers leave their vectors one by one.
    numbers.iter().zip(excesses).for_each(|(numbers, excess)| *excess = excess_of(numbers));
}

/// What 4-bit weights, which are taken for [`Q4_BIAS`] too great, make of a group of numbers too much, negative.
#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn excess_of(numbers: &[u32; NUMBER_WORDS]) -> u32 {
    let numbers: [i8; GROUP_COLUMNS] = bytemuck::cast(*numbers);
    let sum: i32 = numbers.iter().map(|&number| i32::from(number)).sum();
    (-Q4_BIAS * sum) as u32
}

/// Copies some tokens' quantised vectors into a tile: `source` says in which words a token is found, as which row of how many.
pub(super) fn gather<'a>(groups: usize, rows: usize, words: &mut [u32], source: impl Fn(usize) -> (&'a [u32], usize, usize)) {
    let (numbers, rest) = words[..groups * rows * GROUP_WORDS].split_at_mut(groups * rows * NUMBER_WORDS);
    let (scales, excesses) = rest.split_at_mut(groups * rows);
    for row in 0..rows {
        let (from, from_row, from_rows) = source(row);
        let (from_numbers, rest) = from.split_at(groups * from_rows * NUMBER_WORDS);
        let (from_scales, from_excesses) = rest.split_at(groups * from_rows);
        let (from_numbers, numbers) = (from_numbers.as_chunks::<NUMBER_WORDS>().0, numbers.as_chunks_mut::<NUMBER_WORDS>().0);
        for group in 0..groups {
            let (from, to) = (group * from_rows + from_row, group * rows + row);
            numbers[to] = from_numbers[from];
            scales[to] = from_scales[from];
            excesses[to] = from_excesses[from];
        }
    }
}

/// Appends row `row` of a tile as it travels: each group's numbers, then its scale.
pub(super) fn write_row(groups: usize, rows: usize, words: &[u32], row: usize, out: &mut Vec<u8>) {
    let (numbers, rest) = words.split_at(groups * rows * NUMBER_WORDS);
    let numbers = numbers.as_chunks::<NUMBER_WORDS>().0;
    for group in 0..groups {
        out.extend_from_slice(bytemuck::cast_slice(&numbers[group * rows + row]));
        out.extend_from_slice(&rest[group * rows + row].to_le_bytes());
    }
}

/// Writes a row that travelled to row `row` of a tile.
pub(super) fn read_row(groups: usize, rows: usize, words: &mut [u32], row: usize, from: &[u8]) {
    let (numbers, rest) = words.split_at_mut(groups * rows * NUMBER_WORDS);
    let (scales, excesses) = rest.split_at_mut(groups * rows);
    let numbers = numbers.as_chunks_mut::<NUMBER_WORDS>().0;
    for (group, from) in from.as_chunks::<{ GROUP_COLUMNS + 4 }>().0.iter().enumerate() {
        let (from, scale) = from.split_first_chunk::<GROUP_COLUMNS>().expect("a group has its numbers");
        numbers[group * rows + row] = bytemuck::cast(*from);
        scales[group * rows + row] = u32::from_le_bytes(scale.try_into().expect("and its scale"));
        excesses[group * rows + row] = excess_of(&numbers[group * rows + row]);
    }
}

/// Quantises one group: returns the bits of its scale.
#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn quantise_group(x: &[f32; GROUP_COLUMNS], words: &mut [u32; NUMBER_WORDS]) -> u32 {
    // The bits of magnitudes order as they do, NaN above all.
    let magnitude = x.iter().fold(0, |max: u32, x| max.max(x.to_bits() & 0x7fff_ffff));
    let magnitude = f32::from_bits(magnitude);
    let (scale, inverse) = if magnitude < ACTIVATION_MIN { (0.0, 0.0) } else { (magnitude / INT8_MAX, INT8_MAX / magnitude) };
    let mut bytes = [0u8; GROUP_COLUMNS];
    for (q, x) in bytes.iter_mut().zip(x) {
        // Rounds to the nearest integer, ties to even, which then stands in the lowest bits. Products are within ±127 whenever x is
        // finite; otherwise the scale is not, and the vector is refused.
        *q = (x * inverse + ROUNDING).to_bits().wrapping_sub(ROUNDING.to_bits()) as u8;
    }
    *words = bytemuck::cast::<_, [u32; NUMBER_WORDS]>(bytes);
    scale.to_bits()
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
        let row = number % PANEL_ROWS;
        if precision == Precision::Q4 { pack_row_q4(panel, row, &values) } else { pack_row_q8(panel, row, &values) }
    }
}

per_instruction_set! {
    /// Writes a row of a panel.
    fn pack_row_q4(panel: &mut [u8], row: usize, values: &[f32]) -> (), pack_row_q4_body
}

per_instruction_set! {
    fn pack_row_q8(panel: &mut [u8], row: usize, values: &[f32]) -> (), pack_row_q8_body
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn pack_row_q4_body(panel: &mut [u8], row: usize, values: &[f32]) {
    pack_row::<Q4>(panel, row, values);
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn pack_row_q8_body(panel: &mut [u8], row: usize, values: &[f32]) {
    pack_row::<Q8>(panel, row, values);
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn pack_row<P: Packing>(panel: &mut [u8], row: usize, values: &[f32]) {
    let block_bytes = P::PRECISION.block_bytes().expect("a packed precision");
    for (block, x) in panel.chunks_exact_mut(block_bytes).zip(values.as_chunks().0) {
        let (scale, weights) = P::quantise(x);
        block[2 * row..][..2].copy_from_slice(&scale.to_le_bytes());
        let mut biased = [0; GROUP_COLUMNS];
        biased.iter_mut().zip(weights).for_each(|(biased, weight)| *biased = (weight as i32 + P::BIAS) as u8);
        P::set_row(block, row, &biased);
    }
}

/// To the nearest of 255 integers, on a scale rounded first.
#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
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

/// Of 25 scales about the one that just reaches the largest weight, each refitted by least squares, that of the least error.
#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn quantise_q4(x: &[f32; GROUP_COLUMNS]) -> (f16, [f32; GROUP_COLUMNS]) {
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
    let mut nearest = [0.0; GROUP_COLUMNS];
    for i in 0..GROUP_COLUMNS {
        let q = (x[i] / scale).round_ties_even();
        let q = if q > min { q } else { min };
        nearest[i] = if q < max { q } else { max };
    }
    nearest
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
