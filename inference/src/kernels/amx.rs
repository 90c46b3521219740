//! Packed kernels for processors with AMX: a group of 16 tokens by 16 rows is one instruction.
//!
//! Tile registers hold exact sums of products of one group; scales are applied to them as everywhere, by AVX-512. A few tokens are
//! better off with VNNI.
//!
//! Compilers that we support have neither the instructions nor the question whether a processor has them: assembly, `cpuid` and a
//! system call stand in.

#![expect(unsafe_code, reason = "instructions, and weights read by pointer")]
#![allow(clippy::wildcard_imports, reason = "a module of instructions")]
#![expect(clippy::needless_range_loop, reason = "tokens index registers, and words beside them")]

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::sync::LazyLock;

use protocol::precision::{BLOCK_SCALE_BYTES, GROUP_COLUMNS, PANEL_ROWS};

use super::avx512::{self, Q2_BLOCK, Q3_BLOCK, Q4_BLOCK, Q6_BLOCK, Q8_BLOCK};
use super::{Activations, Kernels, NUMBER_WORDS, Panels, Results, shares};

pub(super) static KERNELS: Kernels = Kernels {
    name: "amx-int8",
    available: || *AVAILABLE,
    q8,
    q6: by_blocks::<Q6_BLOCK>,
    q4,
    q3: by_blocks::<Q3_BLOCK>,
    q2: by_blocks::<Q2_BLOCK>,
    near: 24 << 10,
};

/// Tokens of a tile register.
const TOKENS_MAX: usize = 16;
/// Fewer tokens than this are left to VNNI.
const TOKENS_MIN: usize = 4;
/// Groups whose weights are unpacked at a time: 16 KiB, which stay in the nearest cache.
const GROUPS: usize = 16;
/// Tile registers of sums.
const SUMS: usize = 4;
/// Bytes of a group's unpacked weights: 8 rows of a tile register.
const UNPACKED: usize = PANEL_ROWS * GROUP_COLUMNS;

/// AMX-TILE and AMX-INT8 in EDX of leaf 7.
const CPUID_WANTED: u32 = 1 << 24 | 1 << 25;
// Linux's system call by which a process asks for the state of tile registers.
const ARCH_PRCTL: u64 = 158;
const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
const XFEATURE_XTILEDATA: u64 = 18;

#[repr(align(64))]
struct Aligned<T>(T);

/// Whether processor and operating system let this process use tile registers. Asking is what makes the latter do so.
static AVAILABLE: LazyLock<bool> = LazyLock::new(|| {
    let instructions = avx512::available() && is_x86_feature_detected!("gfni") && __cpuid_count(7, 0).edx & CPUID_WANTED == CPUID_WANTED;
    if !instructions {
        return false;
    }
    let result: i64;
    // SAFETY: a system call that touches no memory of ours.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
});

/// # Safety
/// See [`Kernel`](super::Kernel).
unsafe fn q4(w: Panels, x: Activations, y: Results) {
    // SAFETY: the caller's promise.
    unsafe { if x.tokens < TOKENS_MIN { avx512::q4(w, x, y) } else { by_tiles::<Q4_BLOCK>(w, x, y) } }
}

/// # Safety
/// See [`Kernel`](super::Kernel).
unsafe fn q8(w: Panels, x: Activations, y: Results) {
    // SAFETY: the caller's promise.
    unsafe { if x.tokens < TOKENS_MIN { avx512::q8(w, x, y) } else { by_tiles::<Q8_BLOCK>(w, x, y) } }
}

/// # Safety
/// See [`Kernel`](super::Kernel).
unsafe fn by_blocks<const BLOCK: usize>(w: Panels, x: Activations, y: Results) {
    // SAFETY: the caller's promise.
    unsafe { if x.tokens < TOKENS_MIN { avx512::by_blocks::<BLOCK>(w, x, y) } else { by_tiles::<BLOCK>(w, x, y) } }
}

/// Unpacked weights of some groups.
type Unpacked = Aligned<[MaybeUninit<u8>; GROUPS * UNPACKED]>;
type OfTokens = unsafe fn(*const u8, &Unpacked, (usize, u32), Activations, *mut [f32; PANEL_ROWS], (*const u8, usize));

/// The functions for 1 to 16 tokens.
const fn of_each<const BLOCK: usize>() -> [OfTokens; TOKENS_MAX] {
    [
        of_tokens::<1, BLOCK>,
        of_tokens::<2, BLOCK>,
        of_tokens::<3, BLOCK>,
        of_tokens::<4, BLOCK>,
        of_tokens::<5, BLOCK>,
        of_tokens::<6, BLOCK>,
        of_tokens::<7, BLOCK>,
        of_tokens::<8, BLOCK>,
        of_tokens::<9, BLOCK>,
        of_tokens::<10, BLOCK>,
        of_tokens::<11, BLOCK>,
        of_tokens::<12, BLOCK>,
        of_tokens::<13, BLOCK>,
        of_tokens::<14, BLOCK>,
        of_tokens::<15, BLOCK>,
        of_tokens::<16, BLOCK>,
    ]
}

/// Blocks are of `BLOCK` bytes, which tells their precision.
///
/// # Safety
/// See [`Kernel`](super::Kernel).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,gfni")]
unsafe fn by_tiles<const BLOCK: usize>(w: Panels, x: Activations, y: Results) {
    let mut weights: Unpacked = Aligned([MaybeUninit::uninit(); GROUPS * UNPACKED]);
    let most = x.tokens.div_ceil(x.tokens.div_ceil(TOKENS_MAX));
    // SAFETY: this thread's tile registers are ours from here to the release.
    unsafe { configure(most) };
    for (number, panel) in w.each() {
        for first in (0..w.groups).step_by(GROUPS) {
            let count = GROUPS.min(w.groups - first);
            // What will be unpacked next, as far as can be told here.
            let next = if first + count < w.groups {
                panel.wrapping_add((first + count) * BLOCK)
            } else if number + 1 < w.count || w.stride == w.groups * BLOCK {
                w.first.wrapping_add((number + 1) * w.stride)
            } else {
                w.first.wrapping_add(w.groups * BLOCK)
            };
            // SAFETY: within the panel, the activations and the results, by the caller's promise.
            unsafe {
                let panel = panel.add(first * BLOCK);
                unpack::<BLOCK>(panel, count, &mut weights);
                let x = x.from(first * x.tokens);
                let parts = x.tokens.div_ceil(TOKENS_MAX);
                for (part, (token, tokens)) in shares(x.tokens, TOKENS_MAX).enumerate() {
                    let next = next.wrapping_add(part * count / parts * BLOCK);
                    (const { of_each::<BLOCK>() })[tokens - 1](
                        panel,
                        &weights,
                        (count, w.unit),
                        x.from(token),
                        y.at(number, token),
                        (next, count / parts),
                    );
                }
            }
        }
    }
    // SAFETY: as above.
    unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
}

/// Sets up tile registers: sums (0 to 3) and activations (4, 5) of `tokens` rows, weights (6, 7) of 8.
#[inline]
unsafe fn configure(tokens: usize) {
    let mut config = Aligned([0u8; 64]);
    config.0[0] = 1; // the only palette
    for register in 0..8 {
        let (rows, bytes) = [(tokens, 64), (tokens, 32), (8, 64)][usize::from(register >= SUMS) + usize::from(register >= SUMS + 2)];
        config.0[16 + 2 * register] = bytes;
        config.0[48 + register] = rows as u8;
    }
    // SAFETY: a valid configuration; nothing else uses tile registers.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(readonly, nostack, preserves_flags)) };
}

/// Writes the weights of some blocks as signed bytes, 8 × 64 a group, as tile registers take them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,gfni")]
unsafe fn unpack<const BLOCK: usize>(panel: *const u8, groups: usize, weights: &mut Unpacked) {
    // Bits 0 to 2 of a half, then its bit 3 from there on; flipped, that is the half less 8.
    const FLIP: i32 = 0b1111_1000;
    let low = _mm512_set1_epi64(0x0102_0408_0808_0808);
    let high = _mm512_set1_epi64(0x1020_4080_8080_8080_u64 as i64);
    let tables = avx512::tables::<BLOCK>(true);
    for g in 0..groups {
        // SAFETY: within the panel by the caller's promise, and within the weights.
        unsafe {
            let out = weights.0.as_mut_ptr().add(g * UNPACKED);
            if BLOCK != Q4_BLOCK && BLOCK != Q8_BLOCK {
                let added = _mm512_set1_epi8(if BLOCK == Q6_BLOCK { 32 } else { 0 });
                for (j, weights) in avx512::weights::<BLOCK>(panel.add(g * BLOCK), &tables).into_iter().enumerate() {
                    _mm512_store_si512(out.add(64 * j).cast(), _mm512_sub_epi8(weights, added));
                }
                continue;
            }
            let block = panel.add(g * BLOCK + BLOCK_SCALE_BYTES);
            if BLOCK == Q4_BLOCK {
                for j in 0..4 {
                    let both = _mm512_loadu_si512(block.add(64 * j).cast());
                    _mm512_store_si512(out.add(64 * j).cast(), _mm512_gf2p8affine_epi64_epi8::<FLIP>(both, low));
                    _mm512_store_si512(out.add(64 * (4 + j)).cast(), _mm512_gf2p8affine_epi64_epi8::<FLIP>(both, high));
                }
            } else {
                for j in 0..8 {
                    let biased = _mm512_loadu_si512(block.add(64 * j).cast());
                    _mm512_store_si512(out.add(64 * j).cast(), _mm512_xor_si512(biased, _mm512_set1_epi8(-128)));
                }
            }
        }
    }
}

/// The first T tokens of `x`, whose groups are of `x.tokens`; tile registers have T rows, or one more. Asks for some blocks that will be
/// wanted next.
///
/// # Safety
/// See [`Kernel`](super::Kernel). A row of activations beyond the last can be read.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
unsafe fn of_tokens<const T: usize, const BLOCK: usize>(
    panel: *const u8,
    weights: &Unpacked,
    (groups, unit): (usize, u32),
    x: Activations,
    out: *mut [f32; PANEL_ROWS],
    (next, next_blocks): (*const u8, usize),
) {
    let mut sums: MaybeUninit<Aligned<[[[i32; PANEL_ROWS]; TOKENS_MAX]; SUMS]>> = MaybeUninit::uninit();
    let sums: *mut [[i32; PANEL_ROWS]; TOKENS_MAX] = sums.as_mut_ptr().cast();
    // Group g goes to register g mod 4, and from there to that many sums.
    let start = |g: usize, register: usize| {
        if g < groups {
            // SAFETY: within the panel and the tile, by the caller's promise.
            unsafe { multiply(register, x.group(g).0, weights.0.as_ptr().add(g * UNPACKED).cast()) }
        }
    };
    let keep = |g: usize, register: usize| {
        if g < groups {
            // SAFETY: there are as many sums as registers.
            unsafe { store(register, sums.add(register).cast()) }
        }
    };
    start(0, 0);
    start(1, 1);
    start(2, 2);
    keep(0, 0);
    // SAFETY: room for T tokens' results, by the caller's promise.
    let mut y: [_; T] = std::array::from_fn(|t| unsafe { _mm512_loadu_ps(out.add(t).cast()) });
    let mut g = 0;
    'groups: loop {
        macro_rules! group {
            ($register:literal) => {
                if g == groups {
                    break 'groups;
                }
                // Each waits long for what was before: products are begun three groups ahead, and written down one ahead.
                start(g + 3, ($register + 3) % SUMS);
                keep(g + 1, ($register + 1) % SUMS);
                if g < next_blocks {
                    for line in (0..BLOCK).step_by(64) {
                        _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(g * BLOCK + line).cast());
                    }
                }
                // SAFETY: within the panel and the tile, by the caller's promise.
                unsafe {
                    let (_, scales, _) = x.group(g);
                    let sums: *const [i32; PANEL_ROWS] = sums.add($register).cast();
                    let of_rows = avx512::row_scales::<BLOCK>(panel.add(g * BLOCK), unit);
                    for t in 0..T {
                        let scale = _mm512_mul_ps(of_rows, _mm512_set1_ps(*scales.add(t)));
                        let n = _mm512_cvtepi32_ps(_mm512_load_si512(sums.add(t).cast()));
                        y[t] = _mm512_fmadd_ps(n, scale, y[t]);
                    }
                }
                g += 1;
            };
        }
        group!(0);
        group!(1);
        group!(2);
        group!(3);
    }
    for t in 0..T {
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(out.add(t).cast(), y[t]) };
    }
}

/// Sets register `sums`, below [`SUMS`], to the sums of a group's products, (tokens, 16).
#[inline(always)]
unsafe fn multiply(sums: usize, numbers: *const i32, weights: *const u8) {
    macro_rules! with {
        ($sums:literal, $numbers:literal, $weights:literal) => {
            asm!(
                concat!("tileloadd ", $numbers, ", [{numbers} + {half}]"),
                concat!("tileloadd ", $weights, ", [{weights} + {whole}]"),
                concat!("tilezero ", $sums),
                concat!("tdpbssd ", $sums, ", ", $numbers, ", ", $weights),
                numbers = in(reg) numbers,
                weights = in(reg) weights,
                half = in(reg) 4 * NUMBER_WORDS,
                whole = in(reg) 64usize,
                options(readonly, nostack, preserves_flags),
            )
        };
    }
    // SAFETY: tile registers are set up, and the places as large as they say.
    unsafe {
        match sums {
            0 => with!("tmm0", "tmm4", "tmm6"),
            1 => with!("tmm1", "tmm5", "tmm7"),
            2 => with!("tmm2", "tmm4", "tmm6"),
            _ => with!("tmm3", "tmm5", "tmm7"),
        }
    }
}

/// Writes register `from` down.
#[inline(always)]
unsafe fn store(from: usize, sums: *mut i32) {
    macro_rules! with {
        ($from:literal) => {
            asm!(
                concat!("tilestored [{sums} + {whole}], ", $from),
                sums = in(reg) sums,
                whole = in(reg) 64usize,
                options(nostack, preserves_flags),
            )
        };
    }
    // SAFETY: tile registers are set up, and the place as large as they say.
    unsafe {
        match from {
            0 => with!("tmm0"),
            1 => with!("tmm1"),
            2 => with!("tmm2"),
            _ => with!("tmm3"),
        }
    }
}
