//! Packed kernels for processors with AVX-512 and its integer dot product (VNNI): a lane for each row of a panel.

#![expect(unsafe_code, reason = "instructions, and weights read by pointer")]
#![allow(clippy::wildcard_imports, reason = "a module of instructions")]
#![expect(clippy::needless_range_loop, reason = "tokens index registers, and words beside them")]

use std::arch::x86_64::*;

use protocol::precision::{BLOCK_SCALE_BYTES, PANEL_ROWS};

use super::packed::{Q2_WEIGHTS, Q3_HIGH, Q3_WEIGHTS, Q6_HIGH};
use super::{Activations, Kernels, NUMBER_WORDS, Panels, Results, shares};

pub(super) static KERNELS: Kernels = Kernels {
    name: "avx512-vnni",
    available,
    q8,
    q6: by_blocks::<Q6_BLOCK>,
    q4,
    q3: by_blocks::<Q3_BLOCK>,
    q2: by_blocks::<Q2_BLOCK>,
    near: NEAR,
};

pub(super) fn available() -> bool {
    let wide = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl");
    wide && is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("f16c")
}

pub(super) const Q4_BLOCK: usize = BLOCK_SCALE_BYTES + 256;
pub(super) const Q8_BLOCK: usize = BLOCK_SCALE_BYTES + 512;
pub(super) const Q6_BLOCK: usize = BLOCK_SCALE_BYTES + 384;
pub(super) const Q3_BLOCK: usize = PANEL_ROWS + 192;
pub(super) const Q2_BLOCK: usize = PANEL_ROWS + 128;

/// Tokens whose sums and results fit in the registers.
const TOKENS_MAX: usize = 12;

/// Two thirds of the nearest cache of the first processors of this kind.
const NEAR: usize = 20 << 10;

type Some = unsafe fn(*const u8, usize, Activations, *mut [f32; PANEL_ROWS]);
const Q4: [Some; TOKENS_MAX] = [
    q4_of::<1>,
    q4_of::<2>,
    q4_of::<3>,
    q4_of::<4>,
    q4_of::<5>,
    q4_of::<6>,
    q4_of::<7>,
    q4_of::<8>,
    q4_of::<9>,
    q4_of::<10>,
    q4_of::<11>,
    q4_of::<12>,
];
const Q8: [Some; TOKENS_MAX] = [
    q8_of::<1>,
    q8_of::<2>,
    q8_of::<3>,
    q8_of::<4>,
    q8_of::<5>,
    q8_of::<6>,
    q8_of::<7>,
    q8_of::<8>,
    q8_of::<9>,
    q8_of::<10>,
    q8_of::<11>,
    q8_of::<12>,
];

/// # Safety
/// See [`Kernel`](super::Kernel).
pub(super) unsafe fn q4(w: Panels, x: Activations, y: Results) {
    for (number, panel) in w.each() {
        for (first, count) in shares(x.tokens, TOKENS_MAX) {
            // SAFETY: the caller's promise.
            unsafe { Q4[count - 1](panel, w.groups, x.from(first), y.at(number, first)) };
        }
    }
}

/// # Safety
/// See [`Kernel`](super::Kernel).
pub(super) unsafe fn q8(w: Panels, x: Activations, y: Results) {
    for (number, panel) in w.each() {
        for (first, count) in shares(x.tokens, TOKENS_MAX) {
            // SAFETY: the caller's promise.
            unsafe { Q8[count - 1](panel, w.groups, x.from(first), y.at(number, first)) };
        }
    }
}

/// Asks for weights that will be wanted soon. With few tokens a kernel waits for memory alone, and processors do not look beyond a page.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn prefetch(block: *const u8, bytes: usize) {
    const AHEAD: usize = 2048;
    for line in (0..bytes).step_by(64) {
        _mm_prefetch::<_MM_HINT_T0>(block.wrapping_add(AHEAD + line).cast());
    }
}

/// The first T tokens of `x`, whose groups are of `x.tokens`.
///
/// # Safety
/// See [`Kernel`](super::Kernel).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
unsafe fn q4_of<const T: usize>(panel: *const u8, groups: usize, x: Activations, out: *mut [f32; PANEL_ROWS]) {
    let low = _mm512_set1_epi8(15);
    // SAFETY: room for T tokens' results, by the caller's promise.
    let mut y: [_; T] = std::array::from_fn(|t| unsafe { _mm512_loadu_ps(out.add(t).cast()) });
    for g in 0..groups {
        // SAFETY: within the panel and the tile, by the caller's promise.
        unsafe {
            let block = panel.add(g * Q4_BLOCK);
            if T < 4 {
                prefetch(block, Q4_BLOCK);
            }
            let (numbers, scales, excess) = x.group(g);
            // Weights are stored with 8 added: 8 times the sum of the activations is too much.
            let mut n: [_; T] = std::array::from_fn(|t| _mm512_set1_epi32(*excess.add(t)));
            let mut m = [_mm512_setzero_si512(); T];
            for j in 0..4 {
                let both = _mm512_loadu_si512(block.add(BLOCK_SCALE_BYTES + 64 * j).cast());
                let first = _mm512_and_si512(both, low);
                let second = _mm512_and_si512(_mm512_srli_epi16::<4>(both), low);
                for t in 0..T {
                    n[t] = _mm512_dpbusd_epi32(n[t], first, _mm512_set1_epi32(*numbers.add(t * NUMBER_WORDS + j)));
                }
                for t in 0..T {
                    let activations = _mm512_set1_epi32(*numbers.add(t * NUMBER_WORDS + 4 + j));
                    // A token alone has no neighbours to hide the latency behind: a second sum does it.
                    if T < 4 {
                        m[t] = _mm512_dpbusd_epi32(m[t], second, activations);
                    } else {
                        n[t] = _mm512_dpbusd_epi32(n[t], second, activations);
                    }
                }
            }
            let of_rows = _mm512_cvtph_ps(_mm256_loadu_si256(block.cast()));
            for t in 0..T {
                let sum = if T < 4 { _mm512_add_epi32(n[t], m[t]) } else { n[t] };
                let scale = _mm512_mul_ps(of_rows, _mm512_set1_ps(*scales.add(t)));
                y[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, y[t]);
            }
        }
    }
    for t in 0..T {
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(out.add(t).cast(), y[t]) };
    }
}

/// The first T tokens of `x`, whose groups are of `x.tokens`.
///
/// # Safety
/// See [`Kernel`](super::Kernel).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
unsafe fn q8_of<const T: usize>(panel: *const u8, groups: usize, x: Activations, out: *mut [f32; PANEL_ROWS]) {
    // SAFETY: room for T tokens' results, by the caller's promise.
    let mut y: [_; T] = std::array::from_fn(|t| unsafe { _mm512_loadu_ps(out.add(t).cast()) });
    for g in 0..groups {
        // SAFETY: within the panel and the tile, by the caller's promise.
        unsafe {
            let block = panel.add(g * Q8_BLOCK);
            if T < 4 {
                prefetch(block, Q8_BLOCK);
            }
            let (numbers, scales, excess) = x.group(g);
            // Weights are stored with 128 added, which is 16 times 8.
            let mut n: [_; T] = std::array::from_fn(|t| _mm512_slli_epi32::<4>(_mm512_set1_epi32(*excess.add(t))));
            let mut m = [_mm512_setzero_si512(); T];
            for j in 0..8 {
                let weights = _mm512_loadu_si512(block.add(BLOCK_SCALE_BYTES + 64 * j).cast());
                for t in 0..T {
                    let activations = _mm512_set1_epi32(*numbers.add(t * NUMBER_WORDS + j));
                    if T < 4 && j % 2 == 1 {
                        m[t] = _mm512_dpbusd_epi32(m[t], weights, activations);
                    } else {
                        n[t] = _mm512_dpbusd_epi32(n[t], weights, activations);
                    }
                }
            }
            let of_rows = _mm512_cvtph_ps(_mm256_loadu_si256(block.cast()));
            for t in 0..T {
                let sum = if T < 4 { _mm512_add_epi32(n[t], m[t]) } else { n[t] };
                let scale = _mm512_mul_ps(of_rows, _mm512_set1_ps(*scales.add(t)));
                y[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, y[t]);
            }
        }
    }
    for t in 0..T {
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(out.add(t).cast(), y[t]) };
    }
}

type OfTokens = unsafe fn(*const u8, usize, u32, Activations, *mut [f32; PANEL_ROWS]);

const fn by_blocks_of_each<const BLOCK: usize>() -> [OfTokens; TOKENS_MAX] {
    [
        by_blocks_of::<1, BLOCK>,
        by_blocks_of::<2, BLOCK>,
        by_blocks_of::<3, BLOCK>,
        by_blocks_of::<4, BLOCK>,
        by_blocks_of::<5, BLOCK>,
        by_blocks_of::<6, BLOCK>,
        by_blocks_of::<7, BLOCK>,
        by_blocks_of::<8, BLOCK>,
        by_blocks_of::<9, BLOCK>,
        by_blocks_of::<10, BLOCK>,
        by_blocks_of::<11, BLOCK>,
        by_blocks_of::<12, BLOCK>,
    ]
}

/// Blocks are of `BLOCK` bytes, which tells their precision: q6, q3 or q2.
///
/// # Safety
/// See [`Kernel`](super::Kernel).
pub(super) unsafe fn by_blocks<const BLOCK: usize>(w: Panels, x: Activations, y: Results) {
    for (number, panel) in w.each() {
        for (first, count) in shares(x.tokens, TOKENS_MAX) {
            let of_tokens = (const { by_blocks_of_each::<BLOCK>() })[count - 1];
            // SAFETY: the caller's promise.
            unsafe { of_tokens(panel, w.groups, w.unit, x.from(first), y.at(number, first)) };
        }
    }
}

/// The scales of a block's rows.
///
/// # Safety
/// It has `BLOCK` bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
pub(super) unsafe fn row_scales<const BLOCK: usize>(block: *const u8, unit: u32) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        if BLOCK != Q3_BLOCK && BLOCK != Q2_BLOCK {
            return _mm512_cvtph_ps(_mm256_loadu_si256(block.cast()));
        }
        let stored = _mm512_cvtepu8_epi32(_mm_loadu_si128(block.cast()));
        let magnitude = _mm512_and_si512(stored, _mm512_set1_epi32(127));
        let value = _mm512_add_epi32(_mm512_slli_epi32::<20>(magnitude), _mm512_set1_epi32(unit as i32));
        let sign = _mm512_slli_epi32::<31>(_mm512_srli_epi32::<7>(stored));
        let is_some = _mm512_test_epi32_mask(magnitude, magnitude);
        _mm512_castsi512_ps(_mm512_maskz_or_epi32(is_some, value, sign))
    }
}

/// 16 bytes, for every fourth of a register.
#[inline]
#[target_feature(enable = "avx512f")]
fn table(of: impl Fn(usize) -> i8) -> __m512i {
    let table: [i8; 16] = std::array::from_fn(of);
    // SAFETY: as many bytes as are read.
    _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(table.as_ptr().cast()) })
}

/// A block's weights, 8 × 64: at q6 with 32 added, else what the [`tables`] have.
///
/// # Safety
/// It has `BLOCK` bytes.
#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
pub(super) unsafe fn weights<const BLOCK: usize>(block: *const u8, tables: &[__m512i; 4]) -> [__m512i; 8] {
    // SAFETY: the caller's promise, and the instructions are those of the caller.
    unsafe {
        let mut out = [_mm512_setzero_si512(); 8];
        let low = _mm512_set1_epi8(15);
        if BLOCK == Q6_BLOCK {
            let codes = block.add(BLOCK_SCALE_BYTES);
            let upper = _mm512_set1_epi8(0x30);
            for j in 0..4 {
                let both = _mm512_loadu_si512(codes.add(64 * j).cast());
                out[j] = _mm512_and_si512(both, low);
                out[4 + j] = _mm512_and_si512(_mm512_srli_epi16::<4>(both), low);
            }
            for half in 0..2 {
                let pairs = _mm512_loadu_si512(codes.add(Q6_HIGH + 64 * half).cast());
                let moved = [_mm512_slli_epi16::<4>(pairs), _mm512_slli_epi16::<2>(pairs), pairs, _mm512_srli_epi16::<2>(pairs)];
                for k in 0..4 {
                    // out | (moved & upper)
                    out[4 * half + k] = _mm512_ternarylogic_epi32::<0xf8>(out[4 * half + k], moved[k], upper);
                }
            }
            return out;
        }
        let codes = block.add(PANEL_ROWS);
        let bits = if BLOCK == Q3_BLOCK { _mm512_loadu_si512(codes.add(Q3_HIGH).cast()) } else { _mm512_setzero_si512() };
        for half in 0..2 {
            let pairs = _mm512_loadu_si512(codes.add(64 * half).cast());
            // Two codes to half a byte: a table for the first of them, and one for the second.
            let halves = [_mm512_and_si512(pairs, low), _mm512_and_si512(_mm512_srli_epi16::<4>(pairs), low)];
            for k in 0..4 {
                let (codes, weight) = (halves[k / 2], &mut out[4 * half + k]);
                *weight = _mm512_shuffle_epi8(tables[k % 2], codes);
                if BLOCK == Q3_BLOCK {
                    let high = match 4 * half + k {
                        0 => _mm512_slli_epi16::<7>(bits),
                        1 => _mm512_slli_epi16::<6>(bits),
                        2 => _mm512_slli_epi16::<5>(bits),
                        3 => _mm512_slli_epi16::<4>(bits),
                        4 => _mm512_slli_epi16::<3>(bits),
                        5 => _mm512_slli_epi16::<2>(bits),
                        6 => _mm512_slli_epi16::<1>(bits),
                        _ => bits,
                    };
                    *weight = _mm512_mask_shuffle_epi8(*weight, _mm512_movepi8_mask(high), tables[2 + k % 2], codes);
                }
            }
        }
        out
    }
}

/// What [`weights`] looks codes up in, each weight with 128 added, or as it is.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn tables<const BLOCK: usize>(signed: bool) -> [__m512i; 4] {
    let flip = if signed { 0 } else { -128 };
    if BLOCK == Q3_BLOCK {
        let of = |i: usize| Q3_WEIGHTS[i] ^ flip;
        [table(|i| of(i % 4)), table(|i| of(i / 4)), table(|i| of(4 + i % 4)), table(|i| of(4 + i / 4))]
    } else {
        let of = |i: usize| Q2_WEIGHTS[i] ^ flip;
        [table(|i| of(i % 4)), table(|i| of(i / 4)), _mm512_setzero_si512(), _mm512_setzero_si512()]
    }
}

/// The first T tokens of `x`, whose groups are of `x.tokens`.
///
/// # Safety
/// See [`Kernel`](super::Kernel).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
unsafe fn by_blocks_of<const T: usize, const BLOCK: usize>(
    panel: *const u8,
    groups: usize,
    unit: u32,
    x: Activations,
    out: *mut [f32; PANEL_ROWS],
) {
    let tables = tables::<BLOCK>(false);
    // SAFETY: room for T tokens' results, by the caller's promise.
    let mut y: [_; T] = std::array::from_fn(|t| unsafe { _mm512_loadu_ps(out.add(t).cast()) });
    for g in 0..groups {
        // SAFETY: within the panel and the tile, by the caller's promise.
        unsafe {
            let block = panel.add(g * BLOCK);
            if T < 4 {
                prefetch(block, BLOCK);
            }
            let (numbers, scales, excess) = x.group(g);
            // Weights have 32 or 128 added: 4 or 16 times 8.
            let mut n: [_; T] = std::array::from_fn(|t| {
                let excess = _mm512_set1_epi32(*excess.add(t));
                if BLOCK == Q6_BLOCK { _mm512_slli_epi32::<2>(excess) } else { _mm512_slli_epi32::<4>(excess) }
            });
            let mut m = [_mm512_setzero_si512(); T];
            let weights = weights::<BLOCK>(block, &tables);
            for j in 0..8 {
                for t in 0..T {
                    let activations = _mm512_set1_epi32(*numbers.add(t * NUMBER_WORDS + j));
                    if T < 4 && j % 2 == 1 {
                        m[t] = _mm512_dpbusd_epi32(m[t], weights[j], activations);
                    } else {
                        n[t] = _mm512_dpbusd_epi32(n[t], weights[j], activations);
                    }
                }
            }
            let of_rows = row_scales::<BLOCK>(block, unit);
            for t in 0..T {
                let sum = if T < 4 { _mm512_add_epi32(n[t], m[t]) } else { n[t] };
                let scale = _mm512_mul_ps(of_rows, _mm512_set1_ps(*scales.add(t)));
                y[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, y[t]);
            }
        }
    }
    for t in 0..T {
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(out.add(t).cast(), y[t]) };
    }
}

/// How numbers of a plain matrix are stored.
pub(super) const F32: u8 = 0;
pub(super) const BF16: u8 = 1;
pub(super) const F16: u8 = 2;

/// Adds the products of four rows, `width` wide and `stride` bytes apart, with each of T tokens to their lanes, 16 columns at a time: see
/// [`plain`](super::plain). Rows are of [f32](F32), [bf16](BF16) or [f16](F16).
///
/// # Safety
/// All have `width` numbers, which is a multiple of 16; the processor has AVX-512.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn add_products<const T: usize, const STORED: u8>(
    lanes: &mut [[[f32; PANEL_ROWS]; 4]; T],
    (weights, stride): (*const u8, usize),
    x: [*const f32; T],
    width: usize,
) {
    // SAFETY: 16 numbers each, and within the width by the caller's promise.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 4]; T];
        for t in 0..T {
            for r in 0..4 {
                sums[t][r] = _mm512_loadu_ps(lanes[t][r].as_ptr());
            }
        }
        for at in (0..width).step_by(PANEL_ROWS) {
            let mut w = [_mm512_setzero_ps(); 4];
            for r in 0..4 {
                let row = weights.add(r * stride);
                w[r] = match STORED {
                    BF16 => {
                        let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(row.add(2 * at).cast()));
                        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves))
                    }
                    F16 => _mm512_cvtph_ps(_mm256_loadu_si256(row.add(2 * at).cast())),
                    _ => _mm512_loadu_ps(row.add(4 * at).cast()),
                };
                if T == 1 {
                    // The same columns of the next four rows.
                    _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(4 * stride + if STORED == F32 { 4 } else { 2 } * at).cast());
                }
            }
            for t in 0..T {
                let x = _mm512_loadu_ps(x[t].add(at));
                for r in 0..4 {
                    sums[t][r] = _mm512_add_ps(sums[t][r], _mm512_mul_ps(w[r], x));
                }
            }
        }
        for t in 0..T {
            for r in 0..4 {
                _mm512_storeu_ps(lanes[t][r].as_mut_ptr(), sums[t][r]);
            }
        }
    }
}

/// What attention does most: see [`add_outer`](crate::mixer::attention::add_outer). `y` is of f32, or of halves; `next` may be null.
///
/// # Safety
/// All numbers are there, and the processor has AVX-512.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn add_outer<const N: usize, const R: usize, const F16: bool>(
    steps: usize,
    (x, x_step, x_stride): (*const f32, usize, usize),
    (y, y_step, y_stride): (*const u8, usize, usize),
    next: *const u8,
    (out, out_stride): (*mut f32, usize),
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); R]; N];
        for n in 0..N {
            for r in 0..R {
                sums[n][r] = _mm512_loadu_ps(out.add(n * out_stride + r * PANEL_ROWS));
            }
        }
        let read = R * PANEL_ROWS * if F16 { 2 } else { 4 };
        for step in 0..steps {
            // With one look at each number, a kernel waits for memory alone: while it multiplies these, the next ones come.
            if !next.is_null() {
                for line in (0..read).step_by(64) {
                    _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(step * read + line).cast());
                }
            }
            let mut values = [_mm512_setzero_ps(); R];
            for r in 0..R {
                let at = step * y_step + r * y_stride;
                values[r] =
                    if F16 { _mm512_cvtph_ps(_mm256_loadu_si256(y.add(2 * at).cast())) } else { _mm512_loadu_ps(y.add(4 * at).cast()) };
            }
            for n in 0..N {
                let x = _mm512_set1_ps(*x.add(step * x_step + n * x_stride));
                for r in 0..R {
                    sums[n][r] = _mm512_fmadd_ps(x, values[r], sums[n][r]);
                }
            }
        }
        for n in 0..N {
            for r in 0..R {
                _mm512_storeu_ps(out.add(n * out_stride + r * PANEL_ROWS), sums[n][r]);
            }
        }
    }
}
