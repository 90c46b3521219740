//! Element by element: e^x, SiLU, softmax, RMSNorm. The same bits everywhere; `docs/expert-function.md` defines e^x and SiLU.

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use super::{Rows, dot};
use crate::pool::Pool;
use protocol::precision::PANEL_ROWS;

const LANES: usize = PANEL_ROWS;

/// Compiles one body for each instruction set of x86-64 and picks at run time. All give the same bits: what is rounded, and in
/// which order, is fixed by the body; a fused multiply-add is one only where the body says so.
macro_rules! per_instruction_set {
    ($(#[$doc:meta])* $vis:vis fn $name:ident $(<const $n:ident: usize>)? ($($arg:ident: $type:ty),* $(,)?) -> $ret:ty, $body:ident) => {
        $(#[$doc])*
        $vis fn $name $(<const $n: usize>)? ($($arg: $type),*) -> $ret {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")]
                fn avx512 $(<const $n: usize>)? ($($arg: $type),*) -> $ret { $body $(::<$n>)? ($($arg),*) }
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2 $(<const $n: usize>)? ($($arg: $type),*) -> $ret { $body $(::<$n>)? ($($arg),*) }
                match $crate::kernels::math::vectors() {
                    // SAFETY: the processor has these instructions: that is what the answer says.
                    #[expect(unsafe_code, reason = "calling a function compiled for an instruction set")]
                    $crate::kernels::math::Vectors::Avx512 => return unsafe { avx512 $(::<$n>)? ($($arg),*) },
                    // SAFETY: as above.
                    #[expect(unsafe_code, reason = "calling a function compiled for an instruction set")]
                    $crate::kernels::math::Vectors::Avx2 => return unsafe { avx2 $(::<$n>)? ($($arg),*) },
                    $crate::kernels::math::Vectors::Baseline => {}
                }
            }
            $body $(::<$n>)? ($($arg),*)
        }
    };
}
pub(crate) use per_instruction_set;

/// What this processor offers to code that the compiler vectorises.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Vectors {
    Avx512,
    Avx2,
    Baseline,
}

/// Says which; the standard library remembers what the processor has.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn vectors() -> Vectors {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    let wide = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
    let wide = wide && is_x86_feature_detected!("avx512vl") && is_x86_feature_detected!("avx512dq");
    match (avx2, wide) {
        (true, true) => Vectors::Avx512,
        (true, false) => Vectors::Avx2,
        (false, _) => Vectors::Baseline,
    }
}

const LOG2_E: f32 = f32::from_bits(0x3fb8_aa3b);
const LN_2_HIGH: f32 = f32::from_bits(0x3f31_8000);
const LN_2_LOW: f32 = f32::from_bits(0x395e_8083);

/// 1.5 × 2²³: what is added to it is rounded to an integer.
pub(super) const ROUNDING: f32 = 12_582_912.0;

/// e^x by our own polynomial: Taylor's to the seventh power on ±ln 2 / 2, scaled by a power of two.
#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
pub(crate) fn exp(x: f32) -> f32 {
    let x = if x > -87.0 { x } else { -87.0 };
    let x = if x < 88.0 { x } else { 88.0 };
    // Rounds to the nearest integer, ties to even, which then stands in the lowest bits.
    let rounded = x * LOG2_E + ROUNDING;
    let n = rounded - ROUNDING;
    let r = n.mul_add(-LN_2_HIGH, x);
    let r = n.mul_add(LN_2_LOW, r);
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = r.mul_add(p, c);
    }
    p * f32::from_bits(rounded.to_bits().wrapping_add(127) << 23)
}

/// Writes halves as f32: as many as there is room for.
pub(crate) fn widen_f16(halves: &[u16], out: &mut [f32]) {
    assert_eq!(halves.len(), out.len(), "as many as there is room for");
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut, reason = "only there are some done otherwise"))]
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if vectors() != Vectors::Baseline {
        done = out.len() / 8 * 8;
        // SAFETY: both slices have `done` numbers, a multiple of 8, and the processor has AVX2 and F16C.
        #[expect(unsafe_code, reason = "instructions, and numbers read by pointer")]
        unsafe {
            super::avx2::widen_f16(halves.as_ptr(), out.as_mut_ptr(), done);
        }
    }
    halves[done..].reinterpret_cast::<half::f16>().convert_to_f32_slice(&mut out[done..]);
}

per_instruction_set! {
    /// SwiGLU's middle: silu(gate) × up, element by element (Shazeer 2020), into `gate`.
    pub(crate) fn silu_times(gate: &mut [f32], up: &[f32]) -> (), silu_times_body
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn silu_times_body(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = *g / (1.0 + exp(-*g)) * u;
    }
}

/// 1 ÷ (1 + e^−x).
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

per_instruction_set! {
    /// Replaces each x by e^(x − max) and returns max and the sum, summed in 16 lanes, which are then added pairwise.
    pub(crate) fn exp_and_sum(x: &mut [f32]) -> (f32, f32), exp_and_sum_body
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn exp_and_sum_body(x: &mut [f32]) -> (f32, f32) {
    let mut greatest = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for x in whole {
        for i in 0..LANES {
            greatest[i] = if x[i] > greatest[i] { x[i] } else { greatest[i] };
        }
    }
    let max = greatest.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    let mut lanes = [0.0; LANES];
    let (whole, rest) = x.as_chunks_mut::<LANES>();
    for x in whole {
        for i in 0..LANES {
            x[i] = exp(x[i] - max);
            lanes[i] += x[i];
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *x = exp(*x - max);
        *lane += *x;
    }
    (max, super::plain::sum_lanes(lanes))
}

/// Turns logits into probabilities, in place.
pub(crate) fn softmax(x: &mut [f32]) {
    let (_, sum) = exp_and_sum(x);
    x.iter_mut().for_each(|x| *x /= sum);
}

/// Returns what a vector is multiplied by to have a root mean square of 1 (RMSNorm, Zhang and Sennrich 2019).
pub(crate) fn rms_scale(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

/// Writes x / rms(x) × weight for each token.
pub(crate) fn norm_rows(pool: &mut Pool, x: &Rows, weight: &[f32], eps: f32, scales: &mut Vec<f32>, out: &mut Rows) {
    const TOKENS: usize = 32;
    let (tokens, width) = (x.tokens(), weight.len());
    out.resize(tokens);
    scales.resize(tokens, 0.0);
    let (data, panel) = (x.data(), x.panel_length());
    // A token's sum of squares has a lane for each number of a panel, as a dot product of it with itself has.
    pool.chunks(scales, TOKENS, |chunk, _, scales| {
        let mut lanes = [[0.0; LANES]; TOKENS];
        add_squares(&mut lanes[..scales.len()], data, panel, chunk * TOKENS);
        for (scale, lanes) in scales.iter_mut().zip(lanes) {
            *scale = 1.0 / (super::plain::sum_lanes(lanes) / width as f32 + eps).sqrt();
        }
    });
    let scales = &scales[..];
    pool.chunks(out.data_mut(), (16 * panel).max(1), |chunk, _, out| {
        for (i, out) in out.chunks_exact_mut(panel).enumerate() {
            let number = chunk * 16 + i;
            let mut lane_weights = [0.0; LANES];
            let weights = &weight[number * LANES..width.min((number + 1) * LANES)];
            lane_weights[..weights.len()].copy_from_slice(weights);
            scale_panel(out, &data[number * panel..][..panel], scales, &lane_weights);
        }
    });
}

per_instruction_set! {
    fn add_squares(lanes: &mut [[f32; LANES]], data: &[f32], panel: usize, first: usize) -> (), add_squares_body
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn add_squares_body(lanes: &mut [[f32; LANES]], data: &[f32], panel: usize, first: usize) {
    for values in data.chunks_exact(panel) {
        for (lanes, x) in lanes.iter_mut().zip(values[first * LANES..].as_chunks::<LANES>().0) {
            for i in 0..LANES {
                lanes[i] += x[i] * x[i];
            }
        }
    }
}

per_instruction_set! {
    fn scale_panel(out: &mut [f32], x: &[f32], scales: &[f32], weight: &[f32; LANES]) -> (), scale_panel_body
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn scale_panel_body(out: &mut [f32], x: &[f32], scales: &[f32], weight: &[f32; LANES]) {
    let (out, x) = (out.as_chunks_mut::<LANES>().0, x.as_chunks::<LANES>().0);
    for ((out, x), scale) in out.iter_mut().zip(x).zip(scales) {
        for i in 0..LANES {
            out[i] = x[i] * scale * weight[i];
        }
    }
}

per_instruction_set! {
    /// Adds `y` to `x`.
    pub(crate) fn add(x: &mut [f32], y: &[f32]) -> (), add_body
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn add_body(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

per_instruction_set! {
    /// Adds rows of 16 numbers to those of `out` that `rows` names, each times its weight, by one fused multiply-add a number.
    pub(crate) fn add_weighted(out: &mut [f32], rows: &[(u32, f32)], y: &[f32]) -> (), add_weighted_body
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn add_weighted_body(out: &mut [f32], rows: &[(u32, f32)], y: &[f32]) {
    let out = out.as_chunks_mut::<LANES>().0;
    for (&(row, weight), y) in rows.iter().zip(y.as_chunks::<LANES>().0) {
        let out = &mut out[row as usize];
        for i in 0..LANES {
            out[i] = weight.mul_add(y[i], out[i]);
        }
    }
}
