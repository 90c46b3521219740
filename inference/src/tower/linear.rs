//! What towers are made of: affine maps, norms with a mean, GELU.

use protocol::precision::PANEL_ROWS;
use protocol::tensors::{Affine, TensorRole};

use crate::kernels::math::{add, exp, per_instruction_set};
use crate::kernels::{Forms, Kernels, Matrix, Operand, Rows, Tile, Vector, project, tiles};
use crate::pool::Pool;
use crate::weights::{LoadError, TrunkReader, Weight};

/// Rows that go through a matrix together: memory for products is bounded by it, whatever the size of a picture.
const TOGETHER: usize = 480;
/// Rows that a thread finishes at a time.
const FINISHED: usize = 8;

/// x · wᵀ + b.
#[derive(Debug)]
pub(super) struct Linear {
    weight: Weight,
    bias: Vec<f32>,
    columns: usize,
}

impl Linear {
    /// A matrix and what is added to its products, where there is such a tensor.
    pub(super) fn read<E: std::error::Error>(
        reader: &mut TrunkReader<'_, E>,
        role: impl Fn(Affine) -> TensorRole,
    ) -> Result<Self, LoadError<E>> {
        let bias = reader.tensor(role(Affine::Bias))?.vector();
        Ok(Self { bias, ..Self::without_bias(reader, role(Affine::Weight))? })
    }

    pub(super) fn without_bias<E: std::error::Error>(reader: &mut TrunkReader<'_, E>, role: TensorRole) -> Result<Self, LoadError<E>> {
        let weight = reader.tensor(role)?;
        Ok(Self { columns: weight.columns(), weight, bias: Vec::new() })
    }

    /// Numbers that come out of a row.
    pub(super) fn width(&self) -> usize {
        self.weight.rows
    }

    /// Whether its weights are packed.
    pub(super) fn is_packed(&self) -> bool {
        self.weight.view().forms().packed
    }

    /// Writes what becomes of all rows of `x` to `out`; `after` finishes each row, whose number it is told.
    pub(super) fn run(&self, work: &mut LinearWork<'_>, x: &[f32], out: &mut [f32], after: impl Fn(usize, &mut [f32]) + Sync) {
        Self::run_together([self], work, x, out, after);
    }

    /// The same for maps of the same rows, whose results stand side by side.
    pub(super) fn run_together<const N: usize>(
        maps: [&Self; N],
        work: &mut LinearWork<'_>,
        x: &[f32],
        out: &mut [f32],
        after: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        let (columns, width) = (maps[0].columns, maps.iter().map(|map| map.width()).sum::<usize>());
        let rows = x.len() / columns;
        assert_eq!(out.len(), rows * width, "each row of the input has one of the output");
        let LinearWork { pool, kernels, operand, tile_list, products } = work;
        let matrices = maps.map(|map| map.weight.view());
        let forms = matrices.iter().fold(Forms::default(), |forms, matrix| forms.or(matrix.forms()));
        // Each begins with a panel of its own.
        let padded = matrices.iter().map(Matrix::panels).sum::<usize>() * PANEL_ROWS;
        let at = products.iter().position(|rows| rows.width() == padded).unwrap_or_else(|| {
            products.push(Rows::with_capacity(TOGETHER, padded));
            products.len() - 1
        });
        let products = &mut products[at];
        for first in (0..rows).step_by(TOGETHER) {
            let count = TOGETHER.min(rows - first);
            tile_list.clear();
            tile_list.extend(tiles(0, count));
            operand.fill(pool, columns, forms, tile_list, |row| Vector::alone(&x[(first + row) * columns..][..columns]));
            products.resize(count);
            project(pool, kernels, &matrices, operand, tile_list, products);
            let products = &*products;
            pool.chunks(&mut out[first * width..(first + count) * width], FINISHED * width, |chunk, _, out| {
                let (mut panel, mut at) = (0, 0);
                for (map, matrix) in maps.iter().zip(&matrices) {
                    products.copy_tokens(chunk * FINISHED, panel, map.width(), &mut out[at..], width);
                    out.chunks_exact_mut(width).for_each(|out| add(&mut out[at..at + map.bias.len()], &map.bias));
                    panel += matrix.panels();
                    at += map.width();
                }
                out.chunks_exact_mut(width).enumerate().for_each(|(i, out)| after(first + chunk * FINISHED + i, out));
            });
        }
    }
}

/// Adds `y` to `x`, row by row of `width` numbers.
pub(super) fn add_rows(pool: &mut Pool, x: &mut [f32], y: &[f32], width: usize) {
    let length = 16 * width;
    pool.chunks(x, length, |chunk, _, x| add(x, &y[chunk * length..][..x.len()]));
}

/// The memory that affine maps work in, and what they work with.
pub(super) struct LinearWork<'a> {
    pub(super) pool: &'a mut Pool,
    pub(super) kernels: &'static Kernels,
    operand: Operand,
    tile_list: Vec<Tile>,
    /// One of each width.
    products: Vec<Rows>,
}

/// Bytes of that memory, for maps of up to `widest` columns to rows of these widths.
pub(super) fn work_bytes(widest: usize, widths: &[usize]) -> u64 {
    let products: u64 = widths.iter().map(|&width| Rows::bytes(TOGETHER, width)).sum();
    Operand::bytes(TOGETHER, widest, FORMS) + products
}

const FORMS: Forms = Forms { plain: true, packed: true };

impl<'a> LinearWork<'a> {
    /// For maps of up to `widest` columns.
    pub(super) fn new(pool: &'a mut Pool, kernels: &'static Kernels, widest: usize) -> Self {
        let operand = Operand::with_capacity(TOGETHER, widest, FORMS);
        Self { pool, kernels, operand, tile_list: Vec::new(), products: Vec::new() }
    }
}

/// Makes every row have mean 0 and deviation 1, then weighs and shifts its numbers (Ba et al. 2016).
#[derive(Debug)]
pub(super) struct LayerNorm {
    weight: Vec<f32>,
    bias: Vec<f32>,
    eps: f32,
}

impl LayerNorm {
    pub(super) fn read<E: std::error::Error>(
        reader: &mut TrunkReader<'_, E>,
        role: impl Fn(Affine) -> TensorRole,
        eps: f32,
    ) -> Result<Self, LoadError<E>> {
        Ok(Self { weight: reader.tensor(role(Affine::Weight))?.vector(), bias: reader.tensor(role(Affine::Bias))?.vector(), eps })
    }

    /// Norms all rows of `x` into `out`.
    pub(super) fn run(&self, pool: &mut Pool, x: &[f32], out: &mut [f32]) {
        let width = self.weight.len();
        pool.chunks(out, 16 * width, |chunk, _, out| {
            let rows = x[chunk * 16 * width..].chunks_exact(width);
            out.chunks_exact_mut(width).zip(rows).for_each(|(out, x)| norm(x, &self.weight, &self.bias, self.eps, out));
        });
    }
}

per_instruction_set! {
    fn norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) -> (), norm_body
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn norm_body(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let mean = sum_of(x, |x| x) / x.len() as f32;
    let variance = sum_of(x, |x| (x - mean) * (x - mean)) / x.len() as f32;
    let scale = 1.0 / (variance + eps).sqrt();
    for (((out, x), weight), bias) in out.iter_mut().zip(x).zip(weight).zip(bias) {
        *out = (x - mean) * scale * weight + bias;
    }
}

/// Adds up what `number` makes of each, in 16 lanes, then those.
#[inline(always)]
fn sum_of(x: &[f32], number: impl Fn(f32) -> f32) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [0.0; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for x in whole {
        for i in 0..LANES {
            lanes[i] += number(x[i]);
        }
    }
    rest.iter().zip(&mut lanes).for_each(|(x, lane)| *lane += number(*x));
    lanes.iter().sum()
}

per_instruction_set! {
    /// GELU by the tangent (Hendrycks and Gimpel 2016): x ÷ 2 × (1 + tanh(√(2 ÷ π) (x + 0.044715 x³))).
    pub(super) fn gelu_tanh(x: &mut [f32]) -> (), gelu_tanh_body
}

#[inline(always)]
fn gelu_tanh_body(x: &mut [f32]) {
    const TWICE_ROOT: f32 = 1.595_769_2;
    // 1 + tanh(u) = 2 ÷ (1 + e^−2u).
    x.iter_mut().for_each(|x| *x /= 1.0 + exp(-TWICE_ROOT * (*x + 0.044_715 * *x * *x * *x)));
}

per_instruction_set! {
    /// GELU by the error function: x ÷ 2 × (1 + erf(x ÷ √2)).
    pub(super) fn gelu(x: &mut [f32]) -> (), gelu_body
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn gelu_body(x: &mut [f32]) {
    x.iter_mut().for_each(|x| {
        let tail = half_complement(x.abs());
        *x *= if *x > 0.0 { 1.0 - tail } else { tail };
    });
}

/// (1 − erf(x ÷ √2)) ÷ 2 for x ≥ 0, within 7.5e-8 (Abramowitz and Stegun 1964, 7.1.26).
#[inline]
fn half_complement(x: f32) -> f32 {
    let x = x * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / 0.327_591_1_f32.mul_add(x, 1.0);
    let mut p: f32 = 1.061_405_4;
    for c in [-1.453_152_1, 1.421_413_8, -0.284_496_72, 0.254_829_6] {
        p = p.mul_add(t, c);
    }
    0.5 * p * t * exp(-x * x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gelu_is_what_the_error_function_says() {
        for i in -400..400 {
            let x = f64::from(i) / 40.0;
            let expected = x / 2.0 * (1.0 + libm::erf(x / std::f64::consts::SQRT_2));
            let mut found = [x as f32];
            gelu(&mut found);
            assert!((f64::from(found[0]) - expected).abs() < 1e-6, "{x}: {} for {expected}", found[0]);
            let root = (2.0 / std::f64::consts::PI).sqrt();
            let expected = x / 2.0 * (1.0 + (root * (x + 0.044_715 * x * x * x)).tanh());
            let mut found = [x as f32];
            gelu_tanh(&mut found);
            assert!((f64::from(found[0]) - expected).abs() < 2e-6, "{x}: {} for {expected}", found[0]);
        }
    }
}
