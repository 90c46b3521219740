//! Packed kernels for processors with AVX2: eight rows of a panel to a register.

#![expect(unsafe_code, reason = "instructions, and weights read by pointer")]
#![allow(clippy::wildcard_imports, reason = "a module of instructions")]
#![expect(clippy::needless_range_loop, reason = "tokens index registers, and words beside them")]

use std::arch::x86_64::*;

use protocol::precision::{BLOCK_SCALE_BYTES, PANEL_ROWS};

use super::packed::{Q2_WEIGHTS, Q3_HIGH, Q3_WEIGHTS, Q6_HIGH};
use super::{Activations, Kernels, NUMBER_WORDS, Panels, Results, shares};

pub(super) static KERNELS: Kernels = Kernels {
    name: "avx2",
    available: || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c"),
    q8,
    q6: by_blocks::<Q6_BLOCK>,
    q4,
    q3: by_blocks::<Q3_BLOCK>,
    q2: by_blocks::<Q2_BLOCK>,
    near: 20 << 10,
};

const Q4_BLOCK: usize = BLOCK_SCALE_BYTES + 256;
const Q8_BLOCK: usize = BLOCK_SCALE_BYTES + 512;
const Q6_BLOCK: usize = BLOCK_SCALE_BYTES + 384;
const Q3_BLOCK: usize = PANEL_ROWS + 192;
const Q2_BLOCK: usize = PANEL_ROWS + 128;

/// Tokens whose sums and results fit in the registers.
const TOKENS_MAX: usize = 4;

/// # Safety
/// See [`Kernel`](super::Kernel).
unsafe fn q4(w: Panels, x: Activations, y: Results) {
    for (number, panel) in w.each() {
        for (first, count) in shares(x.tokens, TOKENS_MAX) {
            // SAFETY: the caller's promise.
            unsafe { [q4_of::<1>, q4_of::<2>, q4_of::<3>, q4_of::<4>][count - 1](panel, w.groups, x.from(first), y.at(number, first)) };
        }
    }
}

/// # Safety
/// See [`Kernel`](super::Kernel).
unsafe fn q8(w: Panels, x: Activations, y: Results) {
    for (number, panel) in w.each() {
        for (first, count) in shares(x.tokens, TOKENS_MAX) {
            // SAFETY: the caller's promise.
            unsafe { [q8_of::<1>, q8_of::<2>, q8_of::<3>, q8_of::<4>][count - 1](panel, w.groups, x.from(first), y.at(number, first)) };
        }
    }
}

/// The first T tokens of `x`, whose groups are of `x.tokens`.
///
/// # Safety
/// See [`Kernel`](super::Kernel).
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q4_of<const T: usize>(panel: *const u8, groups: usize, x: Activations, out: *mut [f32; PANEL_ROWS]) {
    let low = _mm256_set1_epi8(15);
    let ones = _mm256_set1_epi16(1);
    for half in 0..2 {
        // SAFETY: room for T tokens' results, by the caller's promise.
        let mut y: [_; T] = std::array::from_fn(|t| unsafe { _mm256_loadu_ps(out.add(t).cast::<f32>().add(8 * half)) });
        for g in 0..groups {
            // SAFETY: within the panel and the tile, by the caller's promise.
            unsafe {
                let block = panel.add(g * Q4_BLOCK);
                let (numbers, scales, excess) = x.group(g);
                // Eight sums of two products of at most 15 × 127 each stay below 2¹⁵.
                let mut pairs = [_mm256_setzero_si256(); T];
                for j in 0..4 {
                    let both = _mm256_loadu_si256(block.add(BLOCK_SCALE_BYTES + 64 * j + 32 * half).cast());
                    let first = _mm256_and_si256(both, low);
                    let second = _mm256_and_si256(_mm256_srli_epi16::<4>(both), low);
                    for t in 0..T {
                        let one = _mm256_maddubs_epi16(first, _mm256_set1_epi32(*numbers.add(t * NUMBER_WORDS + j)));
                        let other = _mm256_maddubs_epi16(second, _mm256_set1_epi32(*numbers.add(t * NUMBER_WORDS + 4 + j)));
                        pairs[t] = _mm256_add_epi16(pairs[t], _mm256_add_epi16(one, other));
                    }
                }
                let of_rows = _mm256_cvtph_ps(_mm_loadu_si128(block.add(16 * half).cast()));
                for t in 0..T {
                    let excess = _mm256_set1_epi32(*excess.add(t));
                    let sum = _mm256_add_epi32(_mm256_madd_epi16(pairs[t], ones), excess);
                    let scale = _mm256_mul_ps(of_rows, _mm256_set1_ps(*scales.add(t)));
                    y[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, y[t]);
                }
            }
        }
        for t in 0..T {
            // SAFETY: as above.
            unsafe { _mm256_storeu_ps(out.add(t).cast::<f32>().add(8 * half), y[t]) };
        }
    }
}

/// The first T tokens of `x`, whose groups are of `x.tokens`.
///
/// # Safety
/// See [`Kernel`](super::Kernel).
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q8_of<const T: usize>(panel: *const u8, groups: usize, x: Activations, out: *mut [f32; PANEL_ROWS]) {
    let sign = _mm256_set1_epi8(-128);
    let ones = _mm256_set1_epi16(1);
    for half in 0..2 {
        // SAFETY: room for T tokens' results, by the caller's promise.
        let mut y: [_; T] = std::array::from_fn(|t| unsafe { _mm256_loadu_ps(out.add(t).cast::<f32>().add(8 * half)) });
        for g in 0..groups {
            // SAFETY: within the panel and the tile, by the caller's promise.
            unsafe {
                let block = panel.add(g * Q8_BLOCK);
                let (numbers, scales, _) = x.group(g);
                let mut n = [_mm256_setzero_si256(); T];
                for j in 0..8 {
                    let stored = _mm256_loadu_si256(block.add(BLOCK_SCALE_BYTES + 64 * j + 32 * half).cast());
                    // The instruction takes one side unsigned: magnitudes, with their signs moved to the activations. Two products of
                    // at most 128 × 127 stay below 2¹⁵.
                    let weights = _mm256_xor_si256(stored, sign);
                    let magnitudes = _mm256_abs_epi8(weights);
                    for t in 0..T {
                        let signed = _mm256_sign_epi8(_mm256_set1_epi32(*numbers.add(t * NUMBER_WORDS + j)), weights);
                        let pairs = _mm256_maddubs_epi16(magnitudes, signed);
                        n[t] = _mm256_add_epi32(n[t], _mm256_madd_epi16(pairs, ones));
                    }
                }
                let of_rows = _mm256_cvtph_ps(_mm_loadu_si128(block.add(16 * half).cast()));
                for t in 0..T {
                    let scale = _mm256_mul_ps(of_rows, _mm256_set1_ps(*scales.add(t)));
                    y[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(n[t]), scale, y[t]);
                }
            }
        }
        for t in 0..T {
            // SAFETY: as above.
            unsafe { _mm256_storeu_ps(out.add(t).cast::<f32>().add(8 * half), y[t]) };
        }
    }
}

/// Blocks are of `BLOCK` bytes, which tells their precision: q6, q3 or q2.
///
/// # Safety
/// See [`Kernel`](super::Kernel).
unsafe fn by_blocks<const BLOCK: usize>(w: Panels, x: Activations, y: Results) {
    let of_tokens = [by_blocks_of::<1, BLOCK>, by_blocks_of::<2, BLOCK>, by_blocks_of::<3, BLOCK>, by_blocks_of::<4, BLOCK>];
    for (number, panel) in w.each() {
        for (first, count) in shares(x.tokens, TOKENS_MAX) {
            // SAFETY: the caller's promise.
            unsafe { of_tokens[count - 1](panel, w.groups, w.unit, x.from(first), y.at(number, first)) };
        }
    }
}

/// The scales of eight of a block's rows.
///
/// # Safety
/// It has `BLOCK` bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn row_scales<const BLOCK: usize>(block: *const u8, half: usize, unit: u32) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        if BLOCK == Q6_BLOCK {
            return _mm256_cvtph_ps(_mm_loadu_si128(block.add(16 * half).cast()));
        }
        let stored = _mm256_cvtepu8_epi32(_mm_loadl_epi64(block.add(8 * half).cast()));
        let magnitude = _mm256_and_si256(stored, _mm256_set1_epi32(127));
        let value = _mm256_add_epi32(_mm256_slli_epi32::<20>(magnitude), _mm256_set1_epi32(unit as i32));
        let sign = _mm256_slli_epi32::<31>(_mm256_srli_epi32::<7>(stored));
        let is_none = _mm256_cmpeq_epi32(magnitude, _mm256_setzero_si256());
        _mm256_castsi256_ps(_mm256_andnot_si256(is_none, _mm256_or_si256(value, sign)))
    }
}

/// 16 bytes, twice.
#[inline]
#[target_feature(enable = "avx2")]
fn table(of: impl Fn(usize) -> i8) -> __m256i {
    let table: [i8; 16] = std::array::from_fn(of);
    // SAFETY: as many bytes as are read.
    _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(table.as_ptr().cast()) })
}

/// Weights of eight of a block's rows, 8 × 32.
///
/// # Safety
/// It has `BLOCK` bytes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn weights<const BLOCK: usize>(block: *const u8, half: usize) -> [__m256i; 8] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut out = [_mm256_setzero_si256(); 8];
        let low = _mm256_set1_epi8(15);
        if BLOCK == Q6_BLOCK {
            let codes = block.add(BLOCK_SCALE_BYTES + 32 * half);
            let (upper, bias) = (_mm256_set1_epi8(0x30), _mm256_set1_epi8(32));
            for j in 0..4 {
                let both = _mm256_loadu_si256(codes.add(64 * j).cast());
                out[j] = _mm256_and_si256(both, low);
                out[4 + j] = _mm256_and_si256(_mm256_srli_epi16::<4>(both), low);
            }
            for i in 0..2 {
                let pairs = _mm256_loadu_si256(codes.add(Q6_HIGH + 64 * i).cast());
                let moved = [_mm256_slli_epi16::<4>(pairs), _mm256_slli_epi16::<2>(pairs), pairs, _mm256_srli_epi16::<2>(pairs)];
                for k in 0..4 {
                    let code = _mm256_or_si256(out[4 * i + k], _mm256_and_si256(moved[k], upper));
                    out[4 * i + k] = _mm256_sub_epi8(code, bias);
                }
            }
            return out;
        }
        let codes = block.add(PANEL_ROWS + 32 * half);
        let is_q3 = BLOCK == Q3_BLOCK;
        let of = |i: usize| if is_q3 { Q3_WEIGHTS[i] } else { Q2_WEIGHTS[i] };
        // Two codes to half a byte: a table for the first of them, and one for the second.
        let tables = [table(|i| of(i % 4)), table(|i| of(i / 4))];
        let upper_tables = if is_q3 { [table(|i| of(4 + i % 4)), table(|i| of(4 + i / 4))] } else { tables };
        let bits = if is_q3 { _mm256_loadu_si256(codes.add(Q3_HIGH).cast()) } else { _mm256_setzero_si256() };
        for i in 0..2 {
            let pairs = _mm256_loadu_si256(codes.add(64 * i).cast());
            let halves = [_mm256_and_si256(pairs, low), _mm256_and_si256(_mm256_srli_epi16::<4>(pairs), low)];
            for k in 0..4 {
                let codes = halves[k / 2];
                let mut weights = _mm256_shuffle_epi8(tables[k % 2], codes);
                if is_q3 {
                    // The bit of each byte that chooses becomes its highest.
                    let high = _mm256_sll_epi16(bits, _mm_cvtsi32_si128((7 - 4 * i - k) as i32));
                    weights = _mm256_blendv_epi8(weights, _mm256_shuffle_epi8(upper_tables[k % 2], codes), high);
                }
                out[4 * i + k] = weights;
            }
        }
        out
    }
}

/// The first T tokens of `x`, whose groups are of `x.tokens`.
///
/// # Safety
/// See [`Kernel`](super::Kernel).
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn by_blocks_of<const T: usize, const BLOCK: usize>(
    panel: *const u8,
    groups: usize,
    unit: u32,
    x: Activations,
    out: *mut [f32; PANEL_ROWS],
) {
    let ones = _mm256_set1_epi16(1);
    for half in 0..2 {
        // SAFETY: room for T tokens' results, by the caller's promise.
        let mut y: [_; T] = std::array::from_fn(|t| unsafe { _mm256_loadu_ps(out.add(t).cast::<f32>().add(8 * half)) });
        for g in 0..groups {
            // SAFETY: within the panel and the tile, by the caller's promise.
            unsafe {
                let block = panel.add(g * BLOCK);
                let (numbers, scales, _) = x.group(g);
                let weights = weights::<BLOCK>(block, half);
                let mut n = [_mm256_setzero_si256(); T];
                for j in 0..8 {
                    // As at q8: magnitudes, with their signs moved to the activations.
                    let magnitudes = _mm256_abs_epi8(weights[j]);
                    for t in 0..T {
                        let signed = _mm256_sign_epi8(_mm256_set1_epi32(*numbers.add(t * NUMBER_WORDS + j)), weights[j]);
                        n[t] = _mm256_add_epi32(n[t], _mm256_madd_epi16(_mm256_maddubs_epi16(magnitudes, signed), ones));
                    }
                }
                let of_rows = row_scales::<BLOCK>(block, half, unit);
                for t in 0..T {
                    let scale = _mm256_mul_ps(of_rows, _mm256_set1_ps(*scales.add(t)));
                    y[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(n[t]), scale, y[t]);
                }
            }
        }
        for t in 0..T {
            // SAFETY: as above.
            unsafe { _mm256_storeu_ps(out.add(t).cast::<f32>().add(8 * half), y[t]) };
        }
    }
}

/// Writes `count` halves as f32.
///
/// # Safety
/// All numbers are there, `count` is a multiple of 8, and the processor has AVX and F16C.
#[target_feature(enable = "avx,f16c")]
pub(crate) unsafe fn widen_f16(numbers: *const u16, out: *mut f32, count: usize) {
    for at in (0..count).step_by(8) {
        // SAFETY: the caller's promise.
        unsafe { _mm256_storeu_ps(out.add(at), _mm256_cvtph_ps(_mm_loadu_si128(numbers.add(at).cast()))) };
    }
}
