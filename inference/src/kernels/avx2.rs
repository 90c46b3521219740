//! Packed kernels for processors with AVX2: eight rows of a panel to a register.

#![expect(unsafe_code, reason = "instructions, and weights read by pointer")]
#![allow(clippy::wildcard_imports, reason = "a module of instructions")]
#![expect(clippy::needless_range_loop, reason = "tokens index registers, and words beside them")]

use std::arch::x86_64::*;

use protocol::precision::BLOCK_SCALE_BYTES;

use super::{GROUP_WORDS, Kernels, PanelKernel, TileOut};

pub(super) static KERNELS: Kernels = Kernels {
    name: "avx2",
    available: || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c"),
    q4: &[q4::<1>, q4::<2>, q4::<3>, q4::<4>] as &[PanelKernel],
    q8: &[q8::<1>, q8::<2>, q8::<3>, q8::<4>] as &[PanelKernel],
};

const Q4_BLOCK: usize = BLOCK_SCALE_BYTES + 256;
const Q8_BLOCK: usize = BLOCK_SCALE_BYTES + 512;

/// # Safety
/// See [`PanelKernel`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q4<const T: usize>(panel: *const u8, groups: usize, tile: *const u32, out: &mut TileOut) {
    let low = _mm256_set1_epi8(15);
    let ones = _mm256_set1_epi16(1);
    for half in 0..2 {
        let mut y = [_mm256_setzero_ps(); T];
        for g in 0..groups {
            // SAFETY: within the panel and the tile, by the caller's promise.
            unsafe {
                let block = panel.add(g * Q4_BLOCK);
                let group = tile.add(g * T * GROUP_WORDS);
                // Eight sums of two products of at most 15 × 127 each stay below 2¹⁵.
                let mut pairs = [_mm256_setzero_si256(); T];
                for j in 0..4 {
                    let both = _mm256_loadu_si256(block.add(BLOCK_SCALE_BYTES + 64 * j + 32 * half).cast());
                    let first = _mm256_and_si256(both, low);
                    let second = _mm256_and_si256(_mm256_srli_epi16::<4>(both), low);
                    for t in 0..T {
                        let one = _mm256_maddubs_epi16(first, _mm256_set1_epi32(*group.add(j * T + t) as i32));
                        let other = _mm256_maddubs_epi16(second, _mm256_set1_epi32(*group.add((4 + j) * T + t) as i32));
                        pairs[t] = _mm256_add_epi16(pairs[t], _mm256_add_epi16(one, other));
                    }
                }
                let scales = _mm256_cvtph_ps(_mm_loadu_si128(block.add(16 * half).cast()));
                for t in 0..T {
                    let excess = _mm256_set1_epi32(-8 * (*group.add(9 * T + t) as i32));
                    let sum = _mm256_add_epi32(_mm256_madd_epi16(pairs[t], ones), excess);
                    let scale = _mm256_mul_ps(scales, _mm256_set1_ps(f32::from_bits(*group.add(8 * T + t))));
                    y[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, y[t]);
                }
            }
        }
        for (out, y) in out.iter_mut().zip(y) {
            // SAFETY: 8 numbers of 16.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(8 * half), y) };
        }
    }
}

/// # Safety
/// See [`PanelKernel`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q8<const T: usize>(panel: *const u8, groups: usize, tile: *const u32, out: &mut TileOut) {
    let sign = _mm256_set1_epi8(-128);
    let ones = _mm256_set1_epi16(1);
    for half in 0..2 {
        let mut y = [_mm256_setzero_ps(); T];
        for g in 0..groups {
            // SAFETY: within the panel and the tile, by the caller's promise.
            unsafe {
                let block = panel.add(g * Q8_BLOCK);
                let group = tile.add(g * T * GROUP_WORDS);
                let mut n = [_mm256_setzero_si256(); T];
                for j in 0..8 {
                    let stored = _mm256_loadu_si256(block.add(BLOCK_SCALE_BYTES + 64 * j + 32 * half).cast());
                    // The instruction takes one side unsigned: magnitudes, with their signs moved to the activations. Two products of
                    // at most 128 × 127 stay below 2¹⁵.
                    let weights = _mm256_xor_si256(stored, sign);
                    let magnitudes = _mm256_abs_epi8(weights);
                    for t in 0..T {
                        let signed = _mm256_sign_epi8(_mm256_set1_epi32(*group.add(j * T + t) as i32), weights);
                        let pairs = _mm256_maddubs_epi16(magnitudes, signed);
                        n[t] = _mm256_add_epi32(n[t], _mm256_madd_epi16(pairs, ones));
                    }
                }
                let scales = _mm256_cvtph_ps(_mm_loadu_si128(block.add(16 * half).cast()));
                for t in 0..T {
                    let scale = _mm256_mul_ps(scales, _mm256_set1_ps(f32::from_bits(*group.add(8 * T + t))));
                    y[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(n[t]), scale, y[t]);
                }
            }
        }
        for (out, y) in out.iter_mut().zip(y) {
            // SAFETY: 8 numbers of 16.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(8 * half), y) };
        }
    }
}
