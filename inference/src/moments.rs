//! Second moments of what a layer's matrices are multiplied with, and what makes good what rounding does to them.
//!
//! Summed in f64 in the order of the text: the same bits on every machine.

use protocol::ExpertSlot;
use rayon::prelude::*;

use crate::kernels::math::per_instruction_set;
use crate::kernels::{Compensation, Rows, Vector};

/// The sum of x·xᵀ over vectors x of `columns` numbers.
#[derive(Clone, Debug)]
pub(crate) struct Moments {
    columns: usize,
    /// The upper triangle, row by row; empty as long as nothing was added.
    sums: Vec<f64>,
}

impl Moments {
    pub(crate) fn new(columns: usize) -> Self {
        Self { columns, sums: Vec::new() }
    }

    /// Adds vectors, (n, columns), by as many threads as there are, or by this one.
    pub(crate) fn add(&mut self, rows: &[f64], alone: bool) {
        let columns = self.columns;
        self.sums.resize(columns * (columns + 1) / 2, 0.0);
        let mut lines = Vec::with_capacity(columns);
        let mut rest = &mut self.sums[..];
        for i in 0..columns {
            let (line, later) = rest.split_at_mut(columns - i);
            lines.push((i, line));
            rest = later;
        }
        let add = |(i, line): (usize, &mut [f64])| add_products(line, rows, columns, i);
        if alone { lines.into_iter().for_each(add) } else { lines.into_par_iter().with_min_len(16).for_each(add) }
    }

    pub(crate) fn compensation(&self) -> Option<Compensation> {
        if self.sums.is_empty() { None } else { Compensation::new(&self.sums, self.columns) }
    }
}

per_instruction_set! {
    /// Adds to `line` the products of number `i` of each row with the numbers from there on.
    fn add_products(line: &mut [f64], rows: &[f64], columns: usize, i: usize) -> (), add_products_body
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn add_products_body(line: &mut [f64], rows: &[f64], columns: usize, i: usize) {
    for row in rows.chunks_exact(columns) {
        let x = row[i];
        line.iter_mut().zip(&row[i..]).for_each(|(sum, y)| *sum += x * y);
    }
}

/// What goes through the matrices of a layer.
#[derive(Debug)]
pub(crate) struct LayerMoments {
    mixer_input: Moments,
    mixer_output: Moments,
    expert_inputs: Vec<Moments>,
    expert_middles: Vec<Moments>,
}

impl LayerMoments {
    /// `experts` is how many the layer has. Its input has `hidden` numbers, what attention mixes `mixed`, and the middle of an expert `middle`.
    pub(crate) fn new(experts: usize, [hidden, mixed, middle]: [usize; 3]) -> Self {
        Self {
            mixer_input: Moments::new(hidden),
            mixer_output: Moments::new(mixed),
            expert_inputs: vec![Moments::new(hidden); experts],
            expert_middles: vec![Moments::new(middle); experts],
        }
    }

    /// Takes in what queries, keys and values are made of.
    pub(crate) fn add_mixer_input(&mut self, x: &Rows) {
        self.mixer_input.add(&rows_of(x), false);
    }

    /// Takes in what attention mixed, (rows, columns).
    pub(crate) fn add_mixer_output(&mut self, mixed: &[f32]) {
        let mixed: Vec<f64> = mixed.iter().map(|&x| f64::from(x)).collect();
        self.mixer_output.add(&mixed, false);
    }

    /// Takes in what some experts were given, and what it became: `of` writes both for an expert's rows, each times its weight.
    pub(crate) fn add_experts(&mut self, experts: &[u32], of: impl Fn(usize, &mut Vec<f64>, &mut Vec<f64>) + Sync) {
        let (inputs, middles) = (&mut self.expert_inputs, &mut self.expert_middles);
        let mut both: Vec<_> = inputs.iter_mut().zip(middles).collect();
        both.par_iter_mut().enumerate().for_each(|(expert, (inputs, middles))| {
            let Ok(job) = experts.binary_search(&(expert as u32)) else { return };
            let (mut input, mut middle) = (Vec::new(), Vec::new());
            of(job, &mut input, &mut middle);
            inputs.add(&input, true);
            middles.add(&middle, true);
        });
    }
}

fn rows_of(x: &Rows) -> Vec<f64> {
    let mut row = vec![0.0; x.width()];
    let mut rows = Vec::with_capacity(x.tokens() * x.width());
    for token in 0..x.tokens() {
        x.copy_token(token, 0, &mut row);
        rows.extend(row.iter().map(|&x| f64::from(x)));
    }
    rows
}

/// Appends a vector's numbers, each times `weight`.
pub(crate) fn push_weighted(vector: Vector<'_>, columns: usize, weight: f32, out: &mut Vec<f64>) {
    let mut row = vec![0.0; columns];
    vector.copy_to(&mut row);
    out.extend(row.iter().map(|&x| f64::from(x) * f64::from(weight)));
}

/// What makes good what rounding does to a layer's matrices.
#[derive(Debug)]
pub(crate) struct LayerCompensation {
    moments: LayerMoments,
    /// For queries, keys and values.
    pub(crate) mixer_input: Option<Compensation>,
    /// For what makes attention's output of them.
    pub(crate) mixer_output: Option<Compensation>,
}

impl From<LayerMoments> for LayerCompensation {
    fn from(moments: LayerMoments) -> Self {
        let (mixer_input, mixer_output) = (moments.mixer_input.compensation(), moments.mixer_output.compensation());
        Self { moments, mixer_input, mixer_output }
    }
}

impl LayerCompensation {
    /// For an expert's `gate_proj` and `up_proj`, and for its `down_proj`; none where the text never led to it.
    pub(crate) fn of_expert(&self, slot: ExpertSlot) -> [Option<Compensation>; 2] {
        let of = |moments: &[Moments]| moments.get(slot.expert as usize).and_then(Moments::compensation);
        [of(&self.moments.expert_inputs), of(&self.moments.expert_middles)]
    }
}

#[cfg(test)]
mod tests {
    use protocol::Precision;

    use super::*;
    use crate::kernels::pack;
    use crate::kernels::tests::Vectors;

    #[test]
    fn compensated_weights_are_those_of_the_vectors() {
        let vectors = Vectors::of("low_precisions");
        let ((_, columns), (rows, _)) = (vectors.sides("compensated.vectors"), vectors.sides("compensated.weights"));
        let x: Vec<f64> = vectors.floats("compensated.vectors").iter().map(|&x| f64::from(x)).collect();
        let weights = vectors.floats("compensated.weights");
        for piece in [1, 7, 48] {
            let mut moments = Moments::new(columns);
            x.chunks(piece * columns).for_each(|x| moments.add(x, piece == 7));
            let compensation = moments.compensation().expect("something came in");
            for precision in [Precision::Q8, Precision::Q6, Precision::Q4, Precision::Q3, Precision::Q2] {
                let mut plane = vec![0; precision.matrix_bytes(rows, columns)];
                pack(precision, rows, columns, &mut plane, Some(&compensation), |row, out| {
                    out.copy_from_slice(&weights[row * columns..][..columns]);
                });
                assert!(plane == vectors.bytes(&format!("compensated.{precision}.plane")), "{precision}, {piece} at a time");
            }
        }
    }

    #[test]
    fn without_inputs_nothing_is_made_good() {
        let mut moments = Moments::new(3);
        assert!(moments.compensation().is_none());
        moments.add(&[0.0; 6], true);
        assert!(moments.compensation().is_none());
        moments.add(&[f64::NAN, 1.0, 2.0], true);
        assert!(moments.compensation().is_none());
    }
}
