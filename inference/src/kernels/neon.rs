//! Packed kernels for 64-bit Arm processors with the integer dot product (SDOT): four rows of a panel to a register.

#![expect(unsafe_code, reason = "instructions, and weights read by pointer")]
#![allow(clippy::wildcard_imports, reason = "a module of instructions")]
#![expect(clippy::needless_range_loop, reason = "tokens index registers, and words beside them")]

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};

use protocol::precision::{BLOCK_SCALE_BYTES, GROUP_COLUMNS, PANEL_ROWS};

use super::{GROUP_WORDS, Kernels, PanelKernel, TileOut};

pub(super) static KERNELS: Kernels = Kernels {
    name: "neon-dotprod",
    available: || is_aarch64_feature_detected!("dotprod"),
    // Few tokens take a whole panel in one pass, so that memory is read evenly; many take it in two, to have enough registers.
    q4: &[q4::<1, 4>, q4::<2, 4>, q4::<3, 4>, q4::<4, 4>, q4::<5, 2>, q4::<6, 2>, q4::<7, 2>, q4::<8, 2>] as &[PanelKernel],
    q8: &[q8::<1, 4>, q8::<2, 4>, q8::<3, 4>, q8::<4, 4>, q8::<5, 2>, q8::<6, 2>, q8::<7, 2>, q8::<8, 2>] as &[PanelKernel],
};

const Q4_BLOCK: usize = BLOCK_SCALE_BYTES + 256;
const Q8_BLOCK: usize = BLOCK_SCALE_BYTES + 512;
/// Rows of a register.
const LANES: usize = 4;
/// Where a group's scales stand, in words a token.
const SCALES: usize = GROUP_COLUMNS / 4;

/// T tokens, R registers of rows at a time.
///
/// # Safety
/// See [`PanelKernel`].
#[target_feature(enable = "neon,dotprod")]
unsafe fn q4<const T: usize, const R: usize>(panel: *const u8, groups: usize, tile: *const u32, out: &mut TileOut) {
    let low = vdupq_n_u8(15);
    for first in (0..PANEL_ROWS).step_by(R * LANES) {
        let mut y = [[vdupq_n_f32(0.0); R]; T];
        for g in 0..groups {
            // SAFETY: within the panel and the tile, by the caller's promise.
            unsafe {
                let block = panel.add(g * Q4_BLOCK);
                let group = tile.add(g * T * GROUP_WORDS);
                // Weights are stored with 8 added: 8 times the sum of the activations is too much.
                let mut n = [[vdupq_n_s32(0); R]; T];
                for t in 0..T {
                    n[t] = [vdupq_n_s32(-8 * (*group.add((SCALES + 1) * T + t) as i32)); R];
                }
                for j in 0..4 {
                    let weights = block.add(BLOCK_SCALE_BYTES + 64 * j + 4 * first);
                    let (mut one, mut other) = ([vdupq_n_s8(0); R], [vdupq_n_s8(0); R]);
                    for r in 0..R {
                        let both = vld1q_u8(weights.add(16 * r));
                        one[r] = vreinterpretq_s8_u8(vandq_u8(both, low));
                        other[r] = vreinterpretq_s8_u8(vshrq_n_u8::<4>(both));
                    }
                    add_products(&mut n, one, group.add(j * T));
                    add_products(&mut n, other, group.add((4 + j) * T));
                }
                add_scaled(&mut y, n, block.add(2 * first), group.add(SCALES * T));
            }
        }
        store(y, first, out);
    }
}

/// T tokens, R registers of rows at a time.
///
/// # Safety
/// See [`PanelKernel`].
#[target_feature(enable = "neon,dotprod")]
unsafe fn q8<const T: usize, const R: usize>(panel: *const u8, groups: usize, tile: *const u32, out: &mut TileOut) {
    let sign = vdupq_n_u8(0x80);
    for first in (0..PANEL_ROWS).step_by(R * LANES) {
        let mut y = [[vdupq_n_f32(0.0); R]; T];
        for g in 0..groups {
            // SAFETY: within the panel and the tile, by the caller's promise.
            unsafe {
                let block = panel.add(g * Q8_BLOCK);
                let group = tile.add(g * T * GROUP_WORDS);
                let mut n = [[vdupq_n_s32(0); R]; T];
                for j in 0..8 {
                    let stored = block.add(BLOCK_SCALE_BYTES + 64 * j + 4 * first);
                    let mut weights = [vdupq_n_s8(0); R];
                    for r in 0..R {
                        weights[r] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(stored.add(16 * r)), sign));
                    }
                    add_products(&mut n, weights, group.add(j * T));
                }
                add_scaled(&mut y, n, block.add(2 * first), group.add(SCALES * T));
            }
        }
        store(y, first, out);
    }
}

/// Adds to each sum the products of its row's four weights with its token's four activations, a word of `activations`.
///
/// # Safety
/// `activations` has max(T, 2) words, and as many more as make it whole registers if T is above 1.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn add_products<const T: usize, const R: usize>(n: &mut [[int32x4_t; R]; T], weights: [int8x16_t; R], activations: *const u32) {
    for t in (0..T).step_by(LANES) {
        // SAFETY: the caller's promise.
        let four = vreinterpretq_s8_u32(unsafe { words::<T>(activations.add(t)) });
        for r in 0..R {
            n[t][r] = dot::<0>(n[t][r], weights[r], four);
            if t + 1 < T {
                n[t + 1][r] = dot::<1>(n[t + 1][r], weights[r], four);
            }
            if t + 2 < T {
                n[t + 2][r] = dot::<2>(n[t + 2][r], weights[r], four);
            }
            if t + 3 < T {
                n[t + 3][r] = dot::<3>(n[t + 3][r], weights[r], four);
            }
        }
    }
}

/// Adds a group's sums to the results: y = fma(n, scale of the row × scale of the token, y).
///
/// # Safety
/// `row_scales` has R × 4 numbers, and `token_scales` what [`add_products`] wants.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn add_scaled<const T: usize, const R: usize>(
    y: &mut [[float32x4_t; R]; T],
    n: [[int32x4_t; R]; T],
    row_scales: *const u8,
    token_scales: *const u32,
) {
    for r in 0..R {
        // SAFETY: the caller's promise.
        let of_rows = widen(unsafe { vld1_u8(row_scales.add(8 * r)) });
        for t in (0..T).step_by(LANES) {
            // SAFETY: the caller's promise.
            let of_tokens = vreinterpretq_f32_u32(unsafe { words::<T>(token_scales.add(t)) });
            y[t][r] = vfmaq_f32(y[t][r], vcvtq_f32_s32(n[t][r]), vmulq_laneq_f32::<0>(of_rows, of_tokens));
            if t + 1 < T {
                y[t + 1][r] = vfmaq_f32(y[t + 1][r], vcvtq_f32_s32(n[t + 1][r]), vmulq_laneq_f32::<1>(of_rows, of_tokens));
            }
            if t + 2 < T {
                y[t + 2][r] = vfmaq_f32(y[t + 2][r], vcvtq_f32_s32(n[t + 2][r]), vmulq_laneq_f32::<2>(of_rows, of_tokens));
            }
            if t + 3 < T {
                y[t + 3][r] = vfmaq_f32(y[t + 3][r], vcvtq_f32_s32(n[t + 3][r]), vmulq_laneq_f32::<3>(of_rows, of_tokens));
            }
        }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn store<const T: usize, const R: usize>(y: [[float32x4_t; R]; T], first: usize, out: &mut TileOut) {
    for t in 0..T {
        for r in 0..R {
            let place = &mut out[t][first + LANES * r..][..LANES];
            // SAFETY: four numbers.
            unsafe { vst1q_f32(place.as_mut_ptr(), y[t][r]) };
        }
    }
}

/// Words of up to four tokens. Those of a few tokens are followed by others of the same group, which are loaded and not used.
///
/// # Safety
/// Two words can be read if T is 1, otherwise four.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn words<const T: usize>(from: *const u32) -> uint32x4_t {
    // SAFETY: the caller's promise.
    unsafe { if T == 1 { vcombine_u32(vld1_u32(from), vdup_n_u32(0)) } else { vld1q_u32(from) } }
}

/// Adds to each of four sums the products of four weights with the four activations in lane `LANE`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot<const LANE: usize>(mut n: int32x4_t, weights: int8x16_t, activations: int8x16_t) -> int32x4_t {
    // SAFETY: registers only. The intrinsic for it is not stable.
    unsafe {
        asm!(
            "sdot {n:v}.4s, {weights:v}.16b, {activations:v}.4b[{lane}]",
            n = inout(vreg) n,
            weights = in(vreg) weights,
            activations = in(vreg) activations,
            lane = const LANE,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    n
}

/// Four f16 as f32.
#[inline]
#[target_feature(enable = "neon")]
fn widen(halves: uint8x8_t) -> float32x4_t {
    let widened;
    // SAFETY: registers only. The intrinsic for it is younger than our oldest compiler.
    unsafe {
        asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) widened, in(vreg) halves, options(pure, nomem, nostack, preserves_flags));
    }
    widened
}
