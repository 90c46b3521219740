//! The first half of a feed-forward network.

use protocol::precision::PANEL_ROWS;

use crate::kernels::math::silu_times;
use crate::kernels::{Kernels, Matrix, Operand, PANELS_MAX, Tile};

/// Writes silu(gate) × up for some panels, (panels, rows, 16), of rows that begin at `first` in the operand.
pub(crate) fn gate_and_up(
    kernels: &Kernels,
    [gate, up]: [Matrix<'_>; 2],
    (operand, tiles): (&Operand, &[Tile]),
    (first, rows): (usize, usize),
    first_panel: usize,
    ups: &mut [f32],
    out: &mut [f32],
) {
    let stride = rows * PANEL_ROWS;
    for (number, out) in out.chunks_mut(PANELS_MAX * stride).enumerate() {
        let first_panel = first_panel + number * PANELS_MAX;
        let panels = first_panel..first_panel + out.len() / stride;
        for &tile in tiles {
            let (out, of_panel) = (&mut out[(tile.first - first) * PANEL_ROWS..], tile.rows * PANEL_ROWS);
            gate.times(kernels, panels.clone(), operand, tile, out, stride);
            up.times(kernels, panels.clone(), operand, tile, ups, of_panel);
            for (gates, ups) in out.chunks_mut(stride).zip(ups.chunks_exact(of_panel)) {
                silu_times(&mut gates[..of_panel], ups);
            }
        }
    }
}
