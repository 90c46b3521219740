//! Packed kernels for processors with AVX-512 and its integer dot product (VNNI): a lane for each row of a panel.

#![expect(unsafe_code, reason = "instructions, and weights read by pointer")]
#![allow(clippy::wildcard_imports, reason = "a module of instructions")]
#![expect(clippy::needless_range_loop, reason = "tokens index registers, and words beside them")]

use std::arch::x86_64::*;

use protocol::precision::BLOCK_SCALE_BYTES;

use super::{GROUP_WORDS, Kernels, PanelKernel, TileOut};

pub(super) static KERNELS: Kernels = Kernels {
    name: "avx512-vnni",
    available: || {
        let wide = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl");
        wide && is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("f16c")
    },
    q4: &[q4::<1>, q4::<2>, q4::<3>, q4::<4>, q4::<5>, q4::<6>, q4::<7>, q4::<8>, q4::<9>, q4::<10>, q4::<11>, q4::<12>]
        as &[PanelKernel],
    q8: &[q8::<1>, q8::<2>, q8::<3>, q8::<4>, q8::<5>, q8::<6>, q8::<7>, q8::<8>, q8::<9>, q8::<10>, q8::<11>, q8::<12>]
        as &[PanelKernel],
};

const Q4_BLOCK: usize = BLOCK_SCALE_BYTES + 256;
const Q8_BLOCK: usize = BLOCK_SCALE_BYTES + 512;

/// # Safety
/// See [`PanelKernel`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
unsafe fn q4<const T: usize>(panel: *const u8, groups: usize, tile: *const u32, out: &mut TileOut) {
    let low = _mm512_set1_epi8(15);
    let mut y = [_mm512_setzero_ps(); T];
    for g in 0..groups {
        // SAFETY: within the panel and the tile, by the caller's promise.
        unsafe {
            let block = panel.add(g * Q4_BLOCK);
            let group = tile.add(g * T * GROUP_WORDS);
            // Weights are stored with 8 added: 8 times the sum of the activations is too much.
            let mut n = [_mm512_setzero_si512(); T];
            for t in 0..T {
                n[t] = _mm512_set1_epi32(-8 * (*group.add(9 * T + t) as i32));
            }
            let mut m = [_mm512_setzero_si512(); T];
            for j in 0..4 {
                let both = _mm512_loadu_si512(block.add(BLOCK_SCALE_BYTES + 64 * j).cast());
                let first = _mm512_and_si512(both, low);
                let second = _mm512_and_si512(_mm512_srli_epi16::<4>(both), low);
                for t in 0..T {
                    n[t] = _mm512_dpbusd_epi32(n[t], first, _mm512_set1_epi32(*group.add(j * T + t) as i32));
                }
                for t in 0..T {
                    let activations = _mm512_set1_epi32(*group.add((4 + j) * T + t) as i32);
                    // A token alone has no neighbours to hide the latency behind: a second sum does it.
                    if T < 4 {
                        m[t] = _mm512_dpbusd_epi32(m[t], second, activations);
                    } else {
                        n[t] = _mm512_dpbusd_epi32(n[t], second, activations);
                    }
                }
            }
            let scales = _mm512_cvtph_ps(_mm256_loadu_si256(block.cast()));
            for t in 0..T {
                let sum = if T < 4 { _mm512_add_epi32(n[t], m[t]) } else { n[t] };
                let scale = _mm512_mul_ps(scales, _mm512_set1_ps(f32::from_bits(*group.add(8 * T + t))));
                y[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, y[t]);
            }
        }
    }
    for (out, y) in out.iter_mut().zip(y) {
        // SAFETY: 16 numbers.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), y) };
    }
}

/// # Safety
/// See [`PanelKernel`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
unsafe fn q8<const T: usize>(panel: *const u8, groups: usize, tile: *const u32, out: &mut TileOut) {
    let mut y = [_mm512_setzero_ps(); T];
    for g in 0..groups {
        // SAFETY: within the panel and the tile, by the caller's promise.
        unsafe {
            let block = panel.add(g * Q8_BLOCK);
            let group = tile.add(g * T * GROUP_WORDS);
            let mut n = [_mm512_setzero_si512(); T];
            for t in 0..T {
                n[t] = _mm512_set1_epi32(-128 * (*group.add(9 * T + t) as i32));
            }
            let mut m = [_mm512_setzero_si512(); T];
            for j in 0..8 {
                let weights = _mm512_loadu_si512(block.add(BLOCK_SCALE_BYTES + 64 * j).cast());
                for t in 0..T {
                    let activations = _mm512_set1_epi32(*group.add(j * T + t) as i32);
                    if T < 4 && j % 2 == 1 {
                        m[t] = _mm512_dpbusd_epi32(m[t], weights, activations);
                    } else {
                        n[t] = _mm512_dpbusd_epi32(n[t], weights, activations);
                    }
                }
            }
            let scales = _mm512_cvtph_ps(_mm256_loadu_si256(block.cast()));
            for t in 0..T {
                let sum = if T < 4 { _mm512_add_epi32(n[t], m[t]) } else { n[t] };
                let scale = _mm512_mul_ps(scales, _mm512_set1_ps(f32::from_bits(*group.add(8 * T + t))));
                y[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, y[t]);
            }
        }
    }
    for (out, y) in out.iter_mut().zip(y) {
        // SAFETY: 16 numbers.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), y) };
    }
}
