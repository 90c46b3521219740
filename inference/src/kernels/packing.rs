//! Making packed weights: a scale for each group, and the nearest integers on it.
//!
//! `docs/expert-function.md` is the definition. Where a [`Compensation`] is at hand, what rounding does to a weight is made good by those
//! behind it: the algorithm is GPTQ (Frantar and others, 2022, arXiv 2210.17323), with the scales chosen as it goes; where bits are few,
//! coordinate descent follows.

use protocol::Precision;
use protocol::precision::{GROUP_COLUMNS, PANEL_ROWS, SCALE_EXPONENT_MAX};

use super::math::per_instruction_set;
use super::packed::{Packing, Q2, Q2_WEIGHTS, Q3, Q3_WEIGHTS, Q4, Q4_BIAS, Q6, Q6_BIAS, Q8, unit_of};

/// Largest 8-bit weight that we make.
const Q8_MAX: f32 = 127.0;
/// Candidates for a scale: this many steps to either side of the one that just reaches the largest weight.
const STEPS: i32 = 12;
/// A step of a candidate, in parts of the scale.
const STEP: f32 = 1.0 / 64.0;
/// The same where weights are few, far apart, and cut off more often.
const WIDE_STEP: f32 = 1.0 / 32.0;
/// How much of their mean is added to the moments of each column, so that there is an inverse; more where that does not do.
const DAMPING: [f64; 4] = [0.01, 0.1, 1.0, 10.0];

type Group = [f32; GROUP_COLUMNS];

/// Which integers a precision has, and which scales.
trait Rounding: Packing {
    /// Those at both ends, from whose scales a search sets out.
    const ENDS: &'static [f32];
    /// Of the search.
    const STEP: f32;
    /// How often all of a row is looked at again where errors are made good: at 4 bits and more that was not worth its time.
    const PASSES: usize;
    /// The nearest integer.
    fn nearest(quotient: f32) -> f32;
    /// What is stored for an integer that [`nearest`](Self::nearest) gave.
    fn code_of(weight: f32) -> u8;
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn whole(quotient: f32, least: f32, most: f32) -> f32 {
    let whole = quotient.round_ties_even();
    let whole = if whole > least { whole } else { least };
    if whole < most { whole } else { most }
}

/// The nearest of some ascending integers; half way between two, the lower.
#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn nearest_of<const N: usize>(quotient: f32, weights: &[i8; N]) -> f32 {
    let mut nearest = f32::from(weights[0]);
    for i in 1..N {
        let middle = f32::midpoint(f32::from(weights[i - 1]), f32::from(weights[i]));
        nearest = if quotient > middle { f32::from(weights[i]) } else { nearest };
    }
    nearest
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn place_of<const N: usize>(weight: f32, weights: &[i8; N]) -> u8 {
    weights.iter().map(|&other| u8::from(weight > f32::from(other))).sum()
}

macro_rules! rounding {
    ($packing:ty, $ends:expr, $step:expr, $passes:expr, $nearest:expr, $code:expr) => {
        impl Rounding for $packing {
            const ENDS: &'static [f32] = &$ends;
            const STEP: f32 = $step;
            const PASSES: usize = $passes;

            #[inline(always)]
            fn nearest(quotient: f32) -> f32 {
                $nearest(quotient)
            }

            #[inline(always)]
            fn code_of(weight: f32) -> u8 {
                $code(weight)
            }
        }
    };
}

rounding!(Q8, [Q8_MAX], 0.0, 0, |q| whole(q, -Q8_MAX, Q8_MAX), |w: f32| (w as i32 + 128) as u8);
rounding!(Q6, [-32.0], STEP, 0, |q| whole(q, -32.0, 31.0), |w: f32| (w as i32 + Q6_BIAS) as u8);
rounding!(Q4, [-8.0], STEP, 0, |q| whole(q, -8.0, 7.0), |w: f32| (w as i32 + Q4_BIAS) as u8);
rounding!(Q3, [Q3_WEIGHTS[0] as f32, Q3_WEIGHTS[7] as f32], WIDE_STEP, 2, |q| nearest_of(q, &Q3_WEIGHTS), |w| place_of(w, &Q3_WEIGHTS));
rounding!(Q2, [Q2_WEIGHTS[0] as f32, Q2_WEIGHTS[3] as f32], WIDE_STEP, 2, |q| nearest_of(q, &Q2_WEIGHTS), |w| place_of(w, &Q2_WEIGHTS));

/// Packs a matrix of finite weights, (rows, columns): `row` writes one of its rows.
pub(crate) fn pack(
    precision: Precision,
    rows: usize,
    columns: usize,
    out: &mut [u8],
    compensation: Option<&Compensation>,
    mut row: impl FnMut(usize, &mut [f32]),
) {
    assert_eq!(out.len(), precision.matrix_bytes(rows, columns), "a packed matrix has all its bytes");
    let groups = columns.div_ceil(GROUP_COLUMNS);
    let mut values = vec![0.0; groups * GROUP_COLUMNS];
    if precision.head_bytes() > 0 {
        let mut largest = 0.0f32;
        for number in 0..rows {
            row(number, &mut values[..columns]);
            largest = values.iter().fold(largest, |largest, x| largest.max(x.abs()));
        }
        out[0] = scale_exponent(largest);
    }
    let unit = unit_of(precision, out);
    let panel_bytes = groups * precision.block_bytes().expect("a packed precision");
    for number in 0..rows.next_multiple_of(PANEL_ROWS) {
        values.fill(0.0);
        if number < rows {
            row(number, &mut values[..columns]);
        }
        let panel = &mut out[precision.head_bytes() + number / PANEL_ROWS * panel_bytes..][..panel_bytes];
        let pack_row = match precision {
            Precision::Q6 => pack_row_q6,
            Precision::Q4 => pack_row_q4,
            Precision::Q3 => pack_row_q3,
            Precision::Q2 => pack_row_q2,
            _ => pack_row_q8,
        };
        pack_row(panel, number % PANEL_ROWS, &mut values, unit, compensation.filter(|_| number < rows));
    }
}

/// What 8-bit scales count from in a matrix whose largest weight is this: 20 powers of two below it.
fn scale_exponent(largest: f32) -> u8 {
    let exponent = (largest.to_bits() >> 23) as u8;
    exponent.saturating_sub(20).clamp(1, SCALE_EXPONENT_MAX)
}

macro_rules! pack_row {
    ($name:ident, $body:ident, $packing:ty) => {
        per_instruction_set! {
            /// Writes a row of a panel.
            fn $name(panel: &mut [u8], row: usize, values: &mut [f32], unit: u32, compensation: Option<&Compensation>) -> (), $body
        }

        #[inline(always)]
        fn $body(panel: &mut [u8], row: usize, values: &mut [f32], unit: u32, compensation: Option<&Compensation>) {
            pack_row::<$packing>(panel, row, values, unit, compensation);
        }
    };
}

pack_row!(pack_row_q8, pack_row_q8_body, Q8);
pack_row!(pack_row_q6, pack_row_q6_body, Q6);
pack_row!(pack_row_q4, pack_row_q4_body, Q4);
pack_row!(pack_row_q3, pack_row_q3_body, Q3);
pack_row!(pack_row_q2, pack_row_q2_body, Q2);

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn pack_row<P: Rounding>(panel: &mut [u8], row: usize, values: &mut [f32], unit: u32, compensation: Option<&Compensation>) {
    let blocks = panel.chunks_exact_mut(P::BLOCK_BYTES);
    let write = |block: &mut [u8], scale: f32, weights: Group| {
        P::set_scale(block, row, scale, unit);
        P::set_row(block, row, &weights.map(P::code_of));
    };
    if let Some(compensation) = compensation {
        let rounded = compensation.round_row::<P>(values, unit);
        blocks.zip(rounded).for_each(|(block, (scale, weights))| write(block, scale, weights));
        return;
    }
    for (block, x) in blocks.zip(values.as_chunks().0) {
        let scale = fit::<P, false>(x, &[1.0; GROUP_COLUMNS], unit);
        write(block, scale, rounded::<P>(x, scale));
    }
}

/// The nearest integers on a scale; on none, those nearest to 0.
#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn rounded<P: Rounding>(x: &Group, scale: f32) -> Group {
    let mut rounded = [P::nearest(0.0); GROUP_COLUMNS];
    if scale != 0.0 {
        for i in 0..GROUP_COLUMNS {
            rounded[i] = P::nearest(x[i] / scale);
        }
    }
    rounded
}

/// The scale of a group: of some about the one that just reaches the largest weight, each refitted by least squares, that of the least
/// error. Squares count by their `importance`, where WEIGHED.
#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn fit<P: Rounding, const WEIGHED: bool>(x: &Group, importance: &Group, unit: u32) -> f32 {
    if P::STEP == 0.0 {
        let magnitude = x.iter().fold(0.0, |max: f32, x| max.max(x.abs()));
        return P::stored(magnitude / P::ENDS[0], unit);
    }
    let largest = x.iter().fold(0.0, |largest: f32, &x| if x.abs() > largest.abs() { x } else { largest });
    let plain = P::stored(largest / P::ENDS[0], unit);
    if plain == 0.0 {
        return 0.0;
    }
    let mut best: Option<(f32, f32)> = None;
    for end in P::ENDS {
        for step in -STEPS..=STEPS {
            let guess = largest / (end * (1.0 + step as f32 * P::STEP));
            let weights = rounded::<P>(x, guess);
            let mut products = [0.0; GROUP_COLUMNS];
            let mut squares = [0.0; GROUP_COLUMNS];
            for i in 0..GROUP_COLUMNS {
                products[i] = x[i] * weights[i];
                squares[i] = weights[i] * weights[i];
                if WEIGHED {
                    products[i] *= importance[i];
                    squares[i] *= importance[i];
                }
            }
            let (products, squares) = (sum(products), sum(squares));
            if squares.partial_cmp(&0.0) != Some(std::cmp::Ordering::Greater) {
                continue;
            }
            let scale = P::stored(products / squares, unit);
            if scale == 0.0 || !scale.is_finite() {
                continue;
            }
            let weights = rounded::<P>(x, scale);
            let mut errors = [0.0; GROUP_COLUMNS];
            for i in 0..GROUP_COLUMNS {
                let t = x[i] - scale * weights[i];
                errors[i] = t * t;
                if WEIGHED {
                    errors[i] *= importance[i];
                }
            }
            let error = sum(errors);
            if best.is_none_or(|(least, _)| error < least) {
                best = Some((error, scale));
            }
        }
    }
    best.map_or(plain, |(_, scale)| scale)
}

/// Adds 16 to 16, 8 to 8, 4 to 4, 2 to 2, 1 to 1.
#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn sum(mut x: Group) -> f32 {
    let mut half = GROUP_COLUMNS / 2;
    while half > 0 {
        for i in 0..half {
            x[i] += x[i + half];
        }
        half /= 2;
    }
    x[0]
}

/// How an error in one column is made good by the columns behind it, known from what a matrix was multiplied with.
///
/// With second moments H = Σ x·xᵀ, damped, and H⁻¹ = Uᵀ·U, U upper triangular: an error e in column j is made up for best by adding
/// −e ÷ U\[j\]\[j\] × U\[j\]\[k\] to each column k behind it.
#[derive(Debug)]
pub(crate) struct Compensation {
    columns: usize,
    /// U ÷ its diagonal, row by row, each in whole groups, (columns, columns); the diagonal is 1.
    factors: Vec<f32>,
    /// H ÷ the mean of its diagonal, damped, row by row, each in whole groups, (columns, columns).
    moments: Vec<f32>,
    /// 1 ÷ U\[j\]\[j\]², by group, as a share of the largest: how much an error there costs in the end.
    importance: Vec<Group>,
}

impl Compensation {
    /// Derives it from second moments, the upper triangle row by row. None where nothing went through the matrix, or nothing but what
    /// no number stands for.
    pub(crate) fn new(moments: &[f64], columns: usize) -> Option<Self> {
        assert_eq!(moments.len(), columns * (columns + 1) / 2, "an upper triangle");
        let place = |row: usize, column: usize| row * columns - row * (row + 1) / 2 + column; // column ≥ row
        let mean = (0..columns).map(|i| moments[place(i, i)]).sum::<f64>() / columns as f64;
        if mean.is_nan() || mean <= 0.0 || mean.is_infinite() {
            return None;
        }
        let (damping, inverse_root) =
            DAMPING.iter().find_map(|&damping| Some((damping, inverse_root(moments, columns, damping * mean)?)))?;
        let padded = columns.next_multiple_of(GROUP_COLUMNS);
        let mut factors = vec![0.0; columns * padded];
        let mut damped = vec![0.0; columns * padded];
        let mut importance = vec![[0.0; GROUP_COLUMNS]; padded / GROUP_COLUMNS];
        let least = (0..columns).map(|i| inverse_root[place(i, i)]).fold(f64::INFINITY, f64::min);
        for i in 0..columns {
            let diagonal = inverse_root[place(i, i)];
            for k in i..columns {
                factors[i * padded + k] = (inverse_root[place(i, k)] / diagonal) as f32;
                let moment = moments[place(i, k)] / mean + if i == k { damping } else { 0.0 };
                (damped[i * padded + k], damped[k * padded + i]) = (moment as f32, moment as f32);
            }
            importance[i / GROUP_COLUMNS][i % GROUP_COLUMNS] = ((least / diagonal) * (least / diagonal)) as f32;
        }
        Some(Self { columns, factors, moments: damped, importance })
    }

    /// The scales and integers of a row's groups; `values` change.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
    fn round_row<P: Rounding>(&self, values: &mut [f32], unit: u32) -> Vec<(f32, Group)> {
        let exact = values.to_vec();
        let mut groups = Vec::with_capacity(self.importance.len());
        for (group, importance) in self.importance.iter().enumerate() {
            let first = group * GROUP_COLUMNS;
            let scale = fit::<P, true>(values[first..].first_chunk().expect("groups are whole"), importance, unit);
            groups.push((scale, self.round::<P>(first, scale, values)));
        }
        if P::PASSES > 0 {
            self.refine::<P>(&exact, &mut groups, unit);
        }
        groups
    }

    /// Changes scales and integers, one after the other, wherever that makes the error of the row's products less, given all others:
    /// coordinate descent.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
    fn refine<P: Rounding>(&self, exact: &[f32], groups: &mut [(f32, Group)], unit: u32) {
        let padded = exact.len();
        let moments = |column: usize| &self.moments[column * padded..][..padded];
        let add = |sums: &mut [f32], factor: f32, column: usize| {
            sums.iter_mut().zip(moments(column)).for_each(|(sum, moment)| *sum += factor * moment);
        };
        // Half the slope of the error: how far each column's sum with the moments is from what it should be.
        let mut slope = vec![0.0; padded];
        for column in 0..self.columns {
            let (scale, weights) = groups[column / GROUP_COLUMNS];
            add(&mut slope, exact[column] - scale * weights[column % GROUP_COLUMNS], column);
        }
        let mut spread = vec![0.0; padded];
        for _ in 0..P::PASSES {
            for (group, (scale, weights)) in groups.iter_mut().enumerate().filter(|(_, (scale, _))| *scale != 0.0) {
                let first = group * GROUP_COLUMNS;
                let columns = GROUP_COLUMNS.min(self.columns - first);
                spread.fill(0.0);
                (0..columns).for_each(|i| add(&mut spread, weights[i], first + i));
                let (mut along, mut across) = ([0.0; GROUP_COLUMNS], [0.0; GROUP_COLUMNS]);
                for i in 0..columns {
                    along[i] = weights[i] * slope[first + i];
                    across[i] = weights[i] * spread[first + i];
                }
                let (along, across) = (sum(along), sum(across));
                let better = P::stored(*scale + along / across, unit);
                let change = better - *scale;
                if better != 0.0 && change * (2.0 * along - change * across) > 0.0 {
                    *scale = better;
                    slope.iter_mut().zip(&spread).for_each(|(slope, spread)| *slope -= change * spread);
                }
                for (weight, column) in weights[..columns].iter_mut().zip(first..) {
                    let now = *scale * *weight;
                    let other = P::nearest((now + slope[column] / moments(column)[column]) / *scale);
                    if other.to_bits() != weight.to_bits() {
                        add(&mut slope, now - *scale * other, column);
                        *weight = other;
                    }
                }
            }
        }
    }

    /// Rounds the columns of a group from `first` on, one by one, and corrects all behind each.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
    fn round<P: Rounding>(&self, first: usize, scale: f32, values: &mut [f32]) -> Group {
        let mut rounded = [P::nearest(0.0); GROUP_COLUMNS];
        let padded = values.len();
        for column in first..(first + GROUP_COLUMNS).min(self.columns) {
            let x = values[column];
            let mut error = x;
            if scale != 0.0 {
                let weight = P::nearest(x / scale);
                rounded[column - first] = weight;
                error = x - scale * weight;
            }
            // From the start of the group, so that loops are of whole groups: what stands before the column has been rounded.
            let factors = &self.factors[column * padded..][..padded];
            values[first..].iter_mut().zip(&factors[first..]).for_each(|(value, factor)| *value -= error * factor);
        }
        rounded
    }
}

/// U of (H + `added` × 1)⁻¹ = Uᵀ·U, upper triangles row by row: the inverse of a Cholesky factor, begun at the last column, of H.
/// None where H is not positive.
fn inverse_root(moments: &[f64], columns: usize, added: f64) -> Option<Vec<f64>> {
    let start = |row: usize| row * columns - row * (row + 1) / 2; // `start(row) + column` is the place of a number
    // H = V·Vᵀ, V upper triangular: column by column, the last first. V is kept transposed, so that both loops run along rows.
    let mut v = vec![0.0; columns * columns]; // v[j × columns + i] is V[i][j], i ≤ j
    for j in (0..columns).rev() {
        let mut diagonal = moments[start(j) + j] + added;
        for k in j + 1..columns {
            diagonal -= v[k * columns + j] * v[k * columns + j];
        }
        if diagonal.is_nan() || diagonal <= 0.0 || diagonal.is_infinite() {
            return None;
        }
        let root = diagonal.sqrt();
        let (rows, later) = v.split_at_mut((j + 1) * columns);
        let row = &mut rows[j * columns..][..j];
        row.iter_mut().enumerate().for_each(|(i, value)| *value = moments[start(i) + j]);
        for later in later.chunks_exact(columns) {
            let factor = later[j];
            row.iter_mut().zip(later).for_each(|(value, other)| *value -= factor * other);
        }
        row.iter_mut().for_each(|value| *value /= root);
        rows[j * columns + j] = root;
    }
    // U = V⁻¹, row by row, the last first: U[i][k] = (i = k) − Σ V[i][m] U[m][k], over m in i < m ≤ k, all ÷ V[i][i].
    let mut u = vec![0.0; moments.len()];
    let mut row = vec![0.0; columns];
    for i in (0..columns).rev() {
        row.fill(0.0);
        row[i] = 1.0;
        for m in i + 1..columns {
            let factor = v[m * columns + i];
            row[m..].iter_mut().zip(&u[start(m) + m..][..columns - m]).for_each(|(value, other)| *value -= factor * other);
        }
        let diagonal = v[i * columns + i];
        u[start(i) + i..][..columns - i].iter_mut().zip(&row[i..]).for_each(|(place, value)| *place = value / diagonal);
    }
    Some(u)
}
