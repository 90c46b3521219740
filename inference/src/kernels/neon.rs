//! Packed kernels for 64-bit Arm processors with the integer dot product (SDOT): four rows of a panel to a register.

#![expect(unsafe_code, reason = "instructions, and weights read by pointer")]
#![allow(clippy::wildcard_imports, reason = "a module of instructions")]
#![expect(clippy::needless_range_loop, reason = "tokens index registers, and words beside them")]

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};

use protocol::precision::{BLOCK_SCALE_BYTES, PANEL_ROWS};

use super::packed::{Q2_WEIGHTS, Q3_HIGH, Q3_WEIGHTS, Q6_HIGH};
use super::{Activations, Kernels, NUMBER_WORDS, Panels, Results, shares};

pub(super) static KERNELS: Kernels = Kernels {
    name: "neon-dotprod",
    available: || is_aarch64_feature_detected!("dotprod"),
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
/// Rows of a register.
const LANES: usize = 4;
/// Tokens whose sums and results fit in the registers, more or less.
const TOKENS_MAX: usize = 8;

type OfTokens = unsafe fn(*const u8, usize, Activations, *mut [f32; PANEL_ROWS]);
// Few tokens take a whole panel in one pass, so that memory is read evenly; many take it in two, to have enough registers.
const Q4: [OfTokens; TOKENS_MAX] =
    [q4_of::<1, 4>, q4_of::<2, 4>, q4_of::<3, 4>, q4_of::<4, 4>, q4_of::<5, 2>, q4_of::<6, 2>, q4_of::<7, 2>, q4_of::<8, 2>];
const Q8: [OfTokens; TOKENS_MAX] =
    [q8_of::<1, 4>, q8_of::<2, 4>, q8_of::<3, 4>, q8_of::<4, 4>, q8_of::<5, 2>, q8_of::<6, 2>, q8_of::<7, 2>, q8_of::<8, 2>];

/// # Safety
/// See [`Kernel`](super::Kernel).
unsafe fn q4(w: Panels, x: Activations, y: Results) {
    for (number, panel) in w.each() {
        for (first, count) in shares(x.tokens, TOKENS_MAX) {
            // SAFETY: the caller's promise.
            unsafe { Q4[count - 1](panel, w.groups, x.from(first), y.at(number, first)) };
        }
    }
}

/// # Safety
/// See [`Kernel`](super::Kernel).
unsafe fn q8(w: Panels, x: Activations, y: Results) {
    for (number, panel) in w.each() {
        for (first, count) in shares(x.tokens, TOKENS_MAX) {
            // SAFETY: the caller's promise.
            unsafe { Q8[count - 1](panel, w.groups, x.from(first), y.at(number, first)) };
        }
    }
}

/// The first T tokens of `x`, whose groups are of `x.tokens`, R registers of rows at a time.
///
/// # Safety
/// See [`Kernel`](super::Kernel).
#[target_feature(enable = "neon,dotprod")]
unsafe fn q4_of<const T: usize, const R: usize>(panel: *const u8, groups: usize, x: Activations, out: *mut [f32; PANEL_ROWS]) {
    let low = vdupq_n_u8(15);
    for first in (0..PANEL_ROWS).step_by(R * LANES) {
        // SAFETY: room for T tokens' results, by the caller's promise.
        let mut y: [[_; R]; T] = unsafe { load(out, first) };
        for g in 0..groups {
            // SAFETY: within the panel and the tile, by the caller's promise.
            unsafe {
                let block = panel.add(g * Q4_BLOCK);
                let (numbers, scales, excess) = x.group(g);
                // Weights are stored with 8 added: 8 times the sum of the activations is too much.
                let mut n = [[vdupq_n_s32(0); R]; T];
                for t in 0..T {
                    n[t] = [vdupq_n_s32(*excess.add(t)); R];
                }
                macro_rules! words {
                    ($($j:literal),*) => {$(
                        let weights = block.add(BLOCK_SCALE_BYTES + 64 * $j + 4 * first);
                        let (mut one, mut other) = ([vdupq_n_s8(0); R], [vdupq_n_s8(0); R]);
                        for r in 0..R {
                            let both = vld1q_u8(weights.add(16 * r));
                            one[r] = vreinterpretq_s8_u8(vandq_u8(both, low));
                            other[r] = vreinterpretq_s8_u8(vshrq_n_u8::<4>(both));
                        }
                        add_products::<T, R, $j>(&mut n, one, numbers);
                        add_products::<T, R, $j>(&mut n, other, numbers.add(4));
                    )*};
                }
                words!(0, 1, 2, 3);
                add_scaled(&mut y, n, block.add(2 * first), scales);
            }
        }
        // SAFETY: as above.
        unsafe { store(y, first, out) };
    }
}

/// The first T tokens of `x`, whose groups are of `x.tokens`, R registers of rows at a time.
///
/// # Safety
/// See [`Kernel`](super::Kernel).
#[target_feature(enable = "neon,dotprod")]
unsafe fn q8_of<const T: usize, const R: usize>(panel: *const u8, groups: usize, x: Activations, out: *mut [f32; PANEL_ROWS]) {
    let sign = vdupq_n_u8(0x80);
    for first in (0..PANEL_ROWS).step_by(R * LANES) {
        // SAFETY: room for T tokens' results, by the caller's promise.
        let mut y: [[_; R]; T] = unsafe { load(out, first) };
        for g in 0..groups {
            // SAFETY: within the panel and the tile, by the caller's promise.
            unsafe {
                let block = panel.add(g * Q8_BLOCK);
                let (numbers, scales, _) = x.group(g);
                let mut n = [[vdupq_n_s32(0); R]; T];
                macro_rules! words {
                    ($($j:literal),*) => {$(
                        for half in 0..2 {
                            let stored = block.add(BLOCK_SCALE_BYTES + 64 * (4 * half + $j) + 4 * first);
                            let mut weights = [vdupq_n_s8(0); R];
                            for r in 0..R {
                                weights[r] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(stored.add(16 * r)), sign));
                            }
                            add_products::<T, R, $j>(&mut n, weights, numbers.add(4 * half));
                        }
                    )*};
                }
                words!(0, 1, 2, 3);
                add_scaled(&mut y, n, block.add(2 * first), scales);
            }
        }
        // SAFETY: as above.
        unsafe { store(y, first, out) };
    }
}

type OtherOfTokens = unsafe fn(*const u8, usize, u32, Activations, *mut [f32; PANEL_ROWS]);

const fn by_blocks_of_each<const BLOCK: usize>() -> [OtherOfTokens; TOKENS_MAX] {
    [
        by_blocks_of::<1, 4, BLOCK>,
        by_blocks_of::<2, 4, BLOCK>,
        by_blocks_of::<3, 4, BLOCK>,
        by_blocks_of::<4, 4, BLOCK>,
        by_blocks_of::<5, 2, BLOCK>,
        by_blocks_of::<6, 2, BLOCK>,
        by_blocks_of::<7, 2, BLOCK>,
        by_blocks_of::<8, 2, BLOCK>,
    ]
}

/// Blocks are of `BLOCK` bytes, which tells their precision: q6, q3 or q2.
///
/// # Safety
/// See [`Kernel`](super::Kernel).
unsafe fn by_blocks<const BLOCK: usize>(w: Panels, x: Activations, y: Results) {
    for (number, panel) in w.each() {
        for (first, count) in shares(x.tokens, TOKENS_MAX) {
            let of_tokens = (const { by_blocks_of_each::<BLOCK>() })[count - 1];
            // SAFETY: the caller's promise.
            unsafe { of_tokens(panel, w.groups, w.unit, x.from(first), y.at(number, first)) };
        }
    }
}

/// Looks up the weights of word J of four rows from `first` on.
///
/// # Safety
/// The block has `BLOCK` bytes.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn weights<const BLOCK: usize, const J: usize>(block: *const u8, first: usize) -> int8x16_t {
    // SAFETY: the caller's promise.
    unsafe {
        let codes = block.add(if BLOCK == Q6_BLOCK { BLOCK_SCALE_BYTES } else { PANEL_ROWS } + 4 * first);
        let pair = |pairs: uint8x16_t| {
            let moved = match J % 4 {
                0 => pairs,
                1 => vshrq_n_u8::<2>(pairs),
                2 => vshrq_n_u8::<4>(pairs),
                _ => vshrq_n_u8::<6>(pairs),
            };
            vandq_u8(moved, vdupq_n_u8(3))
        };
        if BLOCK == Q6_BLOCK {
            let both = vld1q_u8(codes.add(64 * (J % 4)));
            let low = if J < 4 { vandq_u8(both, vdupq_n_u8(15)) } else { vshrq_n_u8::<4>(both) };
            let high = pair(vld1q_u8(codes.add(Q6_HIGH + 64 * (J / 4))));
            let code = vorrq_u8(low, vshlq_n_u8::<4>(high));
            return vsubq_s8(vreinterpretq_s8_u8(code), vdupq_n_s8(32));
        }
        let low = pair(vld1q_u8(codes.add(64 * (J / 4))));
        let mut table = [0i8; 16];
        if BLOCK == Q2_BLOCK {
            table[..4].copy_from_slice(&Q2_WEIGHTS);
            return vqtbl1q_s8(vld1q_s8(table.as_ptr()), low);
        }
        table[..8].copy_from_slice(&Q3_WEIGHTS);
        let bits = vld1q_u8(codes.add(Q3_HIGH));
        let high = vandq_u8(vshlq_u8(bits, vdupq_n_s8(2 - J as i8)), vdupq_n_u8(4));
        vqtbl1q_s8(vld1q_s8(table.as_ptr()), vorrq_u8(low, high))
    }
}

/// The first T tokens of `x`, whose groups are of `x.tokens`, R registers of rows at a time.
///
/// # Safety
/// See [`Kernel`](super::Kernel).
#[target_feature(enable = "neon,dotprod")]
unsafe fn by_blocks_of<const T: usize, const R: usize, const BLOCK: usize>(
    panel: *const u8,
    groups: usize,
    unit: u32,
    x: Activations,
    out: *mut [f32; PANEL_ROWS],
) {
    for first in (0..PANEL_ROWS).step_by(R * LANES) {
        // SAFETY: room for T tokens' results, by the caller's promise.
        let mut y: [[_; R]; T] = unsafe { load(out, first) };
        for g in 0..groups {
            // SAFETY: within the panel and the tile, by the caller's promise.
            unsafe {
                let block = panel.add(g * BLOCK);
                let (numbers, scales, _) = x.group(g);
                let mut n = [[vdupq_n_s32(0); R]; T];
                macro_rules! words {
                    ($($j:literal: $word:literal $from:literal),*) => {$(
                        let mut of_rows = [vdupq_n_s8(0); R];
                        for r in 0..R {
                            of_rows[r] = weights::<BLOCK, $j>(block, first + LANES * r);
                        }
                        add_products::<T, R, $word>(&mut n, of_rows, numbers.add($from));
                    )*};
                }
                words!(0: 0 0, 1: 1 0, 2: 2 0, 3: 3 0, 4: 0 4, 5: 1 4, 6: 2 4, 7: 3 4);
                if BLOCK == Q6_BLOCK {
                    add_scaled(&mut y, n, block.add(2 * first), scales);
                } else {
                    for r in 0..R {
                        let of_rows = short_scales(block.add(first + LANES * r), unit);
                        for t in 0..T {
                            let scale = vmulq_n_f32(of_rows, *scales.add(t));
                            y[t][r] = vfmaq_f32(y[t][r], vcvtq_f32_s32(n[t][r]), scale);
                        }
                    }
                }
            }
        }
        // SAFETY: as above.
        unsafe { store(y, first, out) };
    }
}

/// Four scales of 8 bits.
///
/// # Safety
/// They are there.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn short_scales(stored: *const u8, unit: u32) -> float32x4_t {
    // SAFETY: the caller's promise.
    let stored = unsafe { [0, 1, 2, 3].map(|i| u32::from(*stored.add(i))) };
    // SAFETY: as many numbers as are read.
    let stored = unsafe { vld1q_u32(stored.as_ptr()) };
    let magnitude = vandq_u32(stored, vdupq_n_u32(127));
    let value = vaddq_u32(vshlq_n_u32::<20>(magnitude), vdupq_n_u32(unit));
    let sign = vshlq_n_u32::<31>(vshrq_n_u32::<7>(stored));
    vreinterpretq_f32_u32(vandq_u32(vtstq_u32(magnitude, magnitude), vorrq_u32(value, sign)))
}

/// Adds to each sum the products of its row's four weights with its token's four activations: word J from `numbers` on.
///
/// # Safety
/// `numbers` has four words of each of T tokens.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn add_products<const T: usize, const R: usize, const J: usize>(
    n: &mut [[int32x4_t; R]; T],
    weights: [int8x16_t; R],
    numbers: *const i32,
) {
    for t in 0..T {
        // SAFETY: the caller's promise.
        let four = vreinterpretq_s8_s32(unsafe { vld1q_s32(numbers.add(t * NUMBER_WORDS)) });
        for r in 0..R {
            n[t][r] = dot::<J>(n[t][r], weights[r], four);
        }
    }
}

/// Adds a group's sums to the results: y = fma(n, scale of the row × scale of the token, y).
///
/// # Safety
/// `row_scales` has R × 4 numbers, and `token_scales` T.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn add_scaled<const T: usize, const R: usize>(
    y: &mut [[float32x4_t; R]; T],
    n: [[int32x4_t; R]; T],
    row_scales: *const u8,
    token_scales: *const f32,
) {
    for r in 0..R {
        // SAFETY: the caller's promise.
        let of_rows = widen(unsafe { vld1_u8(row_scales.add(8 * r)) });
        for t in 0..T {
            // SAFETY: the caller's promise.
            let scale = vmulq_n_f32(of_rows, unsafe { *token_scales.add(t) });
            y[t][r] = vfmaq_f32(y[t][r], vcvtq_f32_s32(n[t][r]), scale);
        }
    }
}

/// Rows `first` and on of T tokens' results.
///
/// # Safety
/// They are there.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load<const T: usize, const R: usize>(from: *const [f32; PANEL_ROWS], first: usize) -> [[float32x4_t; R]; T] {
    let mut y = [[vdupq_n_f32(0.0); R]; T];
    for t in 0..T {
        for r in 0..R {
            // SAFETY: the caller's promise.
            y[t][r] = unsafe { vld1q_f32(from.add(t).cast::<f32>().add(first + LANES * r)) };
        }
    }
    y
}

/// # Safety
/// There is room for rows `first` and on of T tokens' results.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn store<const T: usize, const R: usize>(y: [[float32x4_t; R]; T], first: usize, out: *mut [f32; PANEL_ROWS]) {
    for t in 0..T {
        for r in 0..R {
            // SAFETY: the caller's promise.
            unsafe { vst1q_f32(out.add(t).cast::<f32>().add(first + LANES * r), y[t][r]) };
        }
    }
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
