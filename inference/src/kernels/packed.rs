//! Packed weights and activations: how they lie, and the kernel that any processor can run.
//!
//! `docs/expert-function.md` is the definition; every other kernel gives the same bits as the one here.

use half::f16;
use protocol::Precision;
use protocol::precision::{BLOCK_SCALE_BYTES, GROUP_COLUMNS, PANEL_ROWS};

use super::math::{ROUNDING, per_instruction_set};
use super::{Activations, GROUP_WORDS, Kernels, NUMBER_WORDS, Panels, Results, TILE_MAX, Vector};

/// Added to a 4-bit weight, so that it is never negative.
pub(super) const Q4_BIAS: i32 = 8;
/// Added to a 6-bit weight.
pub(super) const Q6_BIAS: i32 = 32;
/// What codes of 3 bits stand for.
pub(super) const Q3_WEIGHTS: [i8; 8] = [-127, -76, -44, -18, 8, 34, 65, 106];
/// What codes of 2 bits stand for.
pub(super) const Q2_WEIGHTS: [i8; 4] = [-127, -44, 18, 90];
/// Where a block's upper bits begin, behind its scales.
pub(super) const Q6_HIGH: usize = PANEL_ROWS * GROUP_COLUMNS / 2;
pub(super) const Q3_HIGH: usize = PANEL_ROWS * GROUP_COLUMNS / 4;
/// Largest quantised activation.
const INT8_MAX: f32 = 127.0;
/// Groups of activations below this are taken for zero: 2⁻¹⁰⁰.
const ACTIVATION_MIN: f32 = f32::from_bits((127 - 100) << 23);

/// The kernels that any processor can run.
pub(super) static KERNELS: Kernels = Kernels {
    name: "scalar",
    available: || true,
    q8: scalar::<Q8>,
    q6: scalar::<Q6>,
    q4: scalar::<Q4>,
    q3: scalar::<Q3>,
    q2: scalar::<Q2>,
    near: usize::MAX,
};

/// How a weight lies in a block, and what it stands for.
pub(super) trait Packing {
    const PRECISION: Precision;
    /// Whether scales have 8 bits.
    const HAS_SHORT_SCALES: bool = Self::PRECISION.head_bytes() > 0;
    const BLOCK_BYTES: usize = Self::PRECISION.block_bytes().expect("a packed precision");
    /// What is stored for `row` and `column` of a block.
    fn code(block: &[u8], row: usize, column: usize) -> u8;
    /// Writes what is to be stored for `row`.
    fn set_row(block: &mut [u8], row: usize, codes: &[u8; GROUP_COLUMNS]);
    /// The integer that a code stands for.
    fn weight(code: u8) -> i32;

    /// The scale of a row; those of 8 bits count from `unit`.
    fn scale(block: &[u8], row: usize, unit: u32) -> f32 {
        if Self::HAS_SHORT_SCALES {
            return short_scale(block[row], unit);
        }
        f16::from_le_bytes([block[2 * row], block[2 * row + 1]]).to_f32()
    }

    /// Writes it.
    fn set_scale(block: &mut [u8], row: usize, scale: f32, unit: u32) {
        if Self::HAS_SHORT_SCALES {
            block[row] = to_short_scale(scale, unit);
        } else {
            block[2 * row..][..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
        }
    }

    /// What is read back where this scale is written.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
    fn stored(scale: f32, unit: u32) -> f32 {
        if Self::HAS_SHORT_SCALES { short_scale(to_short_scale(scale, unit), unit) } else { f16::from_f32(scale).to_f32() }
    }
}

pub(super) struct Q8;
pub(super) struct Q6;
pub(super) struct Q4;
pub(super) struct Q3;
pub(super) struct Q2;

/// Where the word of a row's four columns stands in a plane of bytes.
fn place(row: usize, column: usize) -> usize {
    column / 4 * 4 * PANEL_ROWS + 4 * row + column % 4
}

/// The byte and the shift of a column's half byte: columns 16 and on take the upper halves.
fn half_place(row: usize, column: usize) -> (usize, usize) {
    (place(row, column % 16), column / 16 * 4)
}

/// The byte and the shift of a column's two bits: in each half of the columns, four and four take the next bits.
fn pair_place(row: usize, column: usize) -> (usize, usize) {
    (column / 16 * 4 * PANEL_ROWS + 4 * row + column % 4, column % 16 / 4 * 2)
}

/// The byte and the shift of a column's single bit.
fn bit_place(row: usize, column: usize) -> (usize, usize) {
    (4 * row + column % 4, column / 4)
}

/// Writes a row's half bytes.
#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn set_halves(plane: &mut [u8], row: usize, codes: &[u8; GROUP_COLUMNS]) {
    let (low, high) = codes.split_at(GROUP_COLUMNS / 2);
    let fours = plane.chunks_exact_mut(4 * PANEL_ROWS).zip(low.chunks_exact(4)).zip(high.chunks_exact(4));
    for ((four, low), high) in fours {
        four[4 * row..4 * row + 4].iter_mut().zip(low).zip(high).for_each(|((byte, low), high)| *byte = low | high << 4);
    }
}

/// Writes a row's pairs of bits.
#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn set_pairs(plane: &mut [u8], row: usize, codes: &[u8; GROUP_COLUMNS]) {
    for (bytes, codes) in plane.chunks_exact_mut(4 * PANEL_ROWS).zip(codes.as_chunks::<{ GROUP_COLUMNS / 2 }>().0) {
        for (i, byte) in bytes[4 * row..4 * row + 4].iter_mut().enumerate() {
            *byte = codes[i] | codes[4 + i] << 2 | codes[8 + i] << 4 | codes[12 + i] << 6;
        }
    }
}

/// What a scale of 8 bits is: sign, exponent of 4 bits from `unit` on, 3 bits behind the point; 0 where all but the sign are 0.
fn short_scale(stored: u8, unit: u32) -> f32 {
    let magnitude = u32::from(stored & 127) << 20;
    if magnitude == 0 { 0.0 } else { f32::from_bits((magnitude + unit) | u32::from(stored >> 7) << 31) }
}

/// The nearest scale of 8 bits, ties to even.
#[inline]
fn to_short_scale(scale: f32, unit: u32) -> u8 {
    let bits = scale.to_bits();
    let above = i64::from(bits & 0x7fff_ffff) - i64::from(unit);
    let rounded = (above + 0x7_ffff + (above >> 20 & 1)) >> 20;
    if rounded < 1 { 0 } else { rounded.min(127) as u8 | (bits >> 31 << 7) as u8 }
}

impl Packing for Q8 {
    const PRECISION: Precision = Precision::Q8;

    fn code(block: &[u8], row: usize, column: usize) -> u8 {
        block[BLOCK_SCALE_BYTES + place(row, column)]
    }

    fn set_row(block: &mut [u8], row: usize, codes: &[u8; GROUP_COLUMNS]) {
        let fours = block[BLOCK_SCALE_BYTES..].chunks_exact_mut(4 * PANEL_ROWS).zip(codes.as_chunks::<4>().0);
        fours.for_each(|(four, codes)| *four[4 * row..].first_chunk_mut().expect("a row has four there") = *codes);
    }

    fn weight(code: u8) -> i32 {
        i32::from(code) - 128
    }
}

impl Packing for Q6 {
    const PRECISION: Precision = Precision::Q6;

    fn code(block: &[u8], row: usize, column: usize) -> u8 {
        let ((low, low_shift), (high, high_shift)) = (half_place(row, column), pair_place(row, column));
        let codes = &block[BLOCK_SCALE_BYTES..];
        codes[low] >> low_shift & 15 | (codes[Q6_HIGH + high] >> high_shift & 3) << 4
    }

    fn set_row(block: &mut [u8], row: usize, codes: &[u8; GROUP_COLUMNS]) {
        let (low, high) = block[BLOCK_SCALE_BYTES..].split_at_mut(Q6_HIGH);
        set_halves(low, row, &codes.map(|code| code & 15));
        set_pairs(high, row, &codes.map(|code| code >> 4));
    }

    fn weight(code: u8) -> i32 {
        i32::from(code) - Q6_BIAS
    }
}

impl Packing for Q4 {
    const PRECISION: Precision = Precision::Q4;

    fn code(block: &[u8], row: usize, column: usize) -> u8 {
        let (byte, shift) = half_place(row, column);
        block[BLOCK_SCALE_BYTES + byte] >> shift & 15
    }

    fn set_row(block: &mut [u8], row: usize, codes: &[u8; GROUP_COLUMNS]) {
        set_halves(&mut block[BLOCK_SCALE_BYTES..], row, codes);
    }

    fn weight(code: u8) -> i32 {
        i32::from(code) - Q4_BIAS
    }
}

impl Packing for Q3 {
    const PRECISION: Precision = Precision::Q3;

    fn code(block: &[u8], row: usize, column: usize) -> u8 {
        let ((low, low_shift), (high, high_shift)) = (pair_place(row, column), bit_place(row, column));
        let codes = &block[PANEL_ROWS..];
        codes[low] >> low_shift & 3 | (codes[Q3_HIGH + high] >> high_shift & 1) << 2
    }

    fn set_row(block: &mut [u8], row: usize, codes: &[u8; GROUP_COLUMNS]) {
        let (low, high) = block[PANEL_ROWS..].split_at_mut(Q3_HIGH);
        set_pairs(low, row, &codes.map(|code| code & 3));
        for (i, byte) in high[4 * row..4 * row + 4].iter_mut().enumerate() {
            *byte = codes.iter().skip(i).step_by(4).enumerate().fold(0, |byte, (j, code)| byte | code >> 2 << j);
        }
    }

    fn weight(code: u8) -> i32 {
        i32::from(Q3_WEIGHTS[usize::from(code)])
    }
}

impl Packing for Q2 {
    const PRECISION: Precision = Precision::Q2;

    fn code(block: &[u8], row: usize, column: usize) -> u8 {
        let (byte, shift) = pair_place(row, column);
        block[PANEL_ROWS + byte] >> shift & 3
    }

    fn set_row(block: &mut [u8], row: usize, codes: &[u8; GROUP_COLUMNS]) {
        set_pairs(&mut block[PANEL_ROWS..], row, codes);
    }

    fn weight(code: u8) -> i32 {
        i32::from(Q2_WEIGHTS[usize::from(code)])
    }
}

/// The bits of 2 to the exponent that a matrix's 8-bit scales count from.
pub(super) fn unit_of(precision: Precision, matrix: &[u8]) -> u32 {
    if precision.head_bytes() == 0 { 0 } else { u32::from(matrix[0]) << 23 }
}

/// The definition, as plainly as it can be written.
///
/// # Safety
/// See [`Kernel`](super::Kernel).
#[expect(unsafe_code, reason = "kernels read by pointer")]
unsafe fn scalar<P: Packing>(w: Panels, x: Activations, y: Results) {
    let all = w.groups * x.tokens;
    // SAFETY: the caller's promise.
    let (numbers, scales) =
        unsafe { (std::slice::from_raw_parts(x.numbers.cast::<[i8; GROUP_COLUMNS]>(), all), std::slice::from_raw_parts(x.scales, all)) };
    for (number, panel) in w.each() {
        // SAFETY: the caller's promise.
        let (panel, y) = unsafe {
            (std::slice::from_raw_parts(panel, w.groups * P::BLOCK_BYTES), std::slice::from_raw_parts_mut(y.at(number, 0), x.tokens))
        };
        for (group, block) in panel.chunks_exact(P::BLOCK_BYTES).enumerate() {
            for (token, y) in y.iter_mut().enumerate() {
                let (activations, scale) = (&numbers[group * x.tokens + token], scales[group * x.tokens + token]);
                for (row, y) in y.iter_mut().enumerate() {
                    let products = activations.iter().enumerate().map(|(i, &q)| P::weight(P::code(block, row, i)) * i32::from(q));
                    *y = (products.sum::<i32>() as f32).mul_add(P::scale(block, row, w.unit) * scale, *y);
                }
            }
        }
    }
}

/// Writes row `row` of a packed matrix as f32.
pub(crate) fn weights_of_row(bytes: &[u8], precision: Precision, columns: usize, row: usize, out: &mut [f32]) {
    match precision {
        Precision::Q6 => row_of::<Q6>(bytes, columns, row, out),
        Precision::Q4 => row_of::<Q4>(bytes, columns, row, out),
        Precision::Q3 => row_of::<Q3>(bytes, columns, row, out),
        Precision::Q2 => row_of::<Q2>(bytes, columns, row, out),
        _ => row_of::<Q8>(bytes, columns, row, out),
    }
}

fn row_of<P: Packing>(bytes: &[u8], columns: usize, row: usize, out: &mut [f32]) {
    let (panel_bytes, unit) = (columns.div_ceil(GROUP_COLUMNS) * P::BLOCK_BYTES, unit_of(P::PRECISION, bytes));
    let panel = &bytes[P::PRECISION.head_bytes() + row / PANEL_ROWS * panel_bytes..][..panel_bytes];
    let row = row % PANEL_ROWS;
    for (block, out) in panel.chunks_exact(P::BLOCK_BYTES).zip(out.chunks_mut(GROUP_COLUMNS)) {
        let scale = P::scale(block, row, unit);
        out.iter_mut().enumerate().for_each(|(column, out)| *out = scale * P::weight(P::code(block, row, column)) as f32);
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
