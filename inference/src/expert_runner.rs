//! Runs experts on rows of quantised activations that came from elsewhere: what a node computes for its peers, and computes again to audit
//! what they say. The same bits as the layers of a model make of the same rows (`docs/expert-function.md`).

use protocol::execute::row_bytes;
use protocol::expert_blob::ExpertShape;
use protocol::precision::PANEL_ROWS;

use crate::expert::Expert;
use crate::kernels::{Forms, Kernels, Operand, PANELS_MAX, Rows, TILE_MAX, Tile, Vector, panels_at_a_time, project, tiles};
use crate::pool::Pool;
use crate::swiglu::gate_and_up;

/// Rows that are computed together at most.
const ROWS_AT_A_TIME: usize = TILE_MAX;

/// Threads and memory to run experts of one shape with.
#[derive(Debug)]
pub struct ExpertRunner {
    shape: ExpertShape,
    pool: Pool,
    kernels: &'static Kernels,
    operand: Operand,
    middle: Vec<f32>, // (panels of intermediate_size, rows, 16)
    middle_operand: Operand,
    ups: Vec<Vec<f32>>, // by thread
    out: Rows,          // (rows, hidden_size)
}

impl ExpertRunner {
    /// A runner for experts of `shape`, whose precision must be a packed one.
    pub fn new(shape: ExpertShape, threads: usize, kernels: &'static Kernels) -> Self {
        let ExpertShape { precision, hidden_size, intermediate_size } = shape;
        assert!(precision.is_packed(), "only packed weights have exact bits");
        let (pool, forms) = (Pool::new(threads), Forms::of(precision));
        Self {
            shape,
            kernels,
            operand: Operand::with_capacity(ROWS_AT_A_TIME, hidden_size, forms),
            middle: vec![0.0; ROWS_AT_A_TIME * intermediate_size.next_multiple_of(PANEL_ROWS)],
            middle_operand: Operand::with_capacity(ROWS_AT_A_TIME, intermediate_size, forms),
            ups: vec![vec![0.0; PANELS_MAX * TILE_MAX * PANEL_ROWS]; pool.threads()],
            out: Rows::with_capacity(ROWS_AT_A_TIME, hidden_size),
            pool,
        }
    }

    /// The shape of its experts.
    pub fn shape(&self) -> ExpertShape {
        self.shape
    }

    /// Appends what `expert` makes of `rows`, as they travel, to `results`: rows of `hidden_size` f32, little-endian.
    ///
    /// # Panics
    /// When the expert is of another shape, or a row of another length.
    pub fn run(&mut self, expert: &Expert, rows: &[&[u8]], results: &mut Vec<u8>) {
        assert_eq!(expert.shape(), self.shape, "a runner has memory for experts of one shape");
        let (hidden, intermediate) = (self.shape.hidden_size, self.shape.intermediate_size);
        assert!(rows.iter().all(|row| row.len() == row_bytes(hidden)), "a row has all its bytes");
        let [gate, up, down] = expert.matrices();
        let panels = gate.panels();
        let at_a_time = panels_at_a_time(panels, self.pool.threads());
        for rows in rows.chunks(ROWS_AT_A_TIME) {
            let count = rows.len();
            let tile: [Tile; 1] = std::array::from_fn(|_| tiles(0, count).next().expect("at least one row, at most a tile"));
            self.operand.read_rows(hidden, &tile, |row| rows[row]);
            let (kernels, operand) = (self.kernels, &self.operand);
            let middle = &mut self.middle[..panels * count * PANEL_ROWS];
            self.pool.chunks_with(middle, at_a_time * count * PANEL_ROWS, &mut self.ups, |chunk, ups, out| {
                gate_and_up(kernels, [gate, up], (operand, &tile), (0, count), chunk * at_a_time, ups, out);
            });
            // No more than that: a short last group is filled with zeros, not with what was there before.
            let middle = &self.middle[..panels * count * PANEL_ROWS];
            self.middle_operand.fill(&mut self.pool, intermediate, down.forms(), &tile, |row| Vector::of(middle, count, 0, row));
            self.out.resize(count);
            project(&mut self.pool, self.kernels, &[down], &self.middle_operand, &tile, &mut self.out);
            let start = results.len();
            results.resize(start + count * hidden * 4, 0);
            let mut vector = vec![0.0; hidden];
            for (row, out) in results[start..].chunks_exact_mut(hidden * 4).enumerate() {
                self.out.copy_token(row, 0, &mut vector);
                out.copy_from_slice(bytemuck::cast_slice(&vector)); // little-endian, as the engine requires
            }
        }
    }
}

/// What an expert made of some rows, panel by panel: (panels, rows, 16).
#[derive(Clone, PartialEq, Debug)]
pub struct ExpertResults {
    data: Vec<f32>,
    rows: usize,
}

impl ExpertResults {
    /// Reads rows of `hidden_size` f32 as they travel; `None` when their number is not whole, or one of the numbers is not finite.
    pub fn from_bytes(bytes: &[u8], hidden_size: usize) -> Option<Self> {
        let rows = bytes.len() / (4 * hidden_size);
        if rows == 0 || bytes.len() != rows * 4 * hidden_size {
            return None;
        }
        let mut data = vec![0.0; rows * hidden_size.next_multiple_of(PANEL_ROWS)];
        for (row, bytes) in bytes.chunks_exact(4 * hidden_size).enumerate() {
            for (panel, bytes) in bytes.chunks(4 * PANEL_ROWS).enumerate() {
                let out = &mut data[(panel * rows + row) * PANEL_ROWS..][..bytes.len() / 4];
                out.iter_mut().zip(bytes.as_chunks().0).for_each(|(out, bytes)| *out = f32::from_le_bytes(*bytes));
            }
        }
        data.iter().all(|number| number.is_finite()).then_some(Self { data, rows })
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// All rows of some panels, one panel behind the other.
    pub(crate) fn panels(&self, panels: std::ops::Range<usize>) -> &[f32] {
        &self.data[panels.start * self.rows * PANEL_ROWS..panels.end * self.rows * PANEL_ROWS]
    }
}
