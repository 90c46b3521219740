//! What the experts of a layer work on, as whoever brings them sees it.

use crate::kernels::{Operand, Tile};

/// What the experts of a layer work on: rows of activations, and which of them are whose.
#[derive(Debug)]
pub struct LayerInputs<'a> {
    pub(crate) tokens: &'a Operand,
    pub(crate) token_tiles: &'a [Tile],
    pub(crate) assigned: &'a [(u32, f32)],
    pub(crate) starts: &'a [u32],
}

impl LayerInputs<'_> {
    /// Numbers of the rows that an expert works on, ascending.
    pub fn rows_of(&self, expert: u32) -> impl ExactSizeIterator<Item = u32> {
        let (start, end) = (self.starts[expert as usize] as usize, self.starts[expert as usize + 1] as usize);
        self.assigned[start..end].iter().map(|(row, _)| *row)
    }

    /// Appends a row as it travels (see [`protocol::execute`]). Of a layer with packed experts only: others take rows in another form.
    pub fn write_row(&self, row: u32, out: &mut Vec<u8>) {
        self.tokens.write_row(self.token_tiles, row as usize, out);
    }
}
