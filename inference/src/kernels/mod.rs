//! Matrix products whose bits depend on nothing but their operands: no batch, thread, cache or instruction set changes them.
//!
//! Vectors of many tokens lie **panel by panel**: 16 numbers of the first token, 16 of the second, …, then the next 16 of each. So a
//! panel of 16 rows of a matrix makes one contiguous piece of a product, and every sum has a lane of its own.
//! `docs/expert-function.md` defines the packed products, `plain` the others.

pub(crate) mod math;
mod packed;
mod plain;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(test)]
mod tests;

use protocol::Precision;
use protocol::precision::{GROUP_COLUMNS, PANEL_ROWS};

use crate::pool::Pool;

pub(crate) use packed::{pack, weights_of_row};
pub(crate) use plain::dot;

/// Tokens that any kernel multiplies with a panel at a time, at most.
pub(crate) const TILE_MAX: usize = 16;
/// Results of a panel for some tokens.
pub(crate) type TileOut = [[f32; PANEL_ROWS]; TILE_MAX];

/// Words (of 32 bits) that a token's group of activations takes in a tile: 8 of quantised numbers, the scale, the sum.
pub(crate) const GROUP_WORDS: usize = GROUP_COLUMNS / 4 + 2;

/// Multiplies a panel of packed weights, `groups` groups wide, with a tile of activations.
///
/// # Safety
/// `panel` has `groups` blocks, `tile` has groups × tokens × [`GROUP_WORDS`] words, and the processor has the kernel's instructions.
pub(crate) type PanelKernel = unsafe fn(panel: *const u8, groups: usize, tile: *const u32, out: &mut TileOut);

/// The packed kernels of one instruction set.
pub struct Kernels {
    /// The name that people see.
    pub name: &'static str,
    available: fn() -> bool,
    /// By number of tokens less one, as many as a tile may have.
    q4: &'static [PanelKernel],
    q8: &'static [PanelKernel],
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} kernels", self.name)
    }
}

impl Kernels {
    /// Every set of kernels that this processor can run, the fastest first.
    pub fn available() -> impl Iterator<Item = &'static Self> {
        #[cfg(target_arch = "x86_64")]
        const ALL: &[&Kernels] = &[&avx512::KERNELS, &avx2::KERNELS, &packed::KERNELS];
        #[cfg(target_arch = "aarch64")]
        const ALL: &[&Kernels] = &[&neon::KERNELS, &packed::KERNELS];
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        const ALL: &[&Kernels] = &[&packed::KERNELS];
        ALL.iter().copied().filter(|kernels| (kernels.available)())
    }

    /// The fastest.
    pub fn best() -> &'static Self {
        Self::available().next().expect("the scalar kernels run everywhere")
    }

    /// Those of a name, if this processor can run them.
    pub fn named(name: &str) -> Option<&'static Self> {
        Self::available().find(|kernels| kernels.name == name)
    }

    /// Tokens of a tile.
    pub(crate) fn tile_rows(&self) -> usize {
        self.q4.len()
    }
}

/// Vectors of some tokens, panel by panel: (panels, tokens, 16). Numbers beyond the width are 0.
#[derive(Debug, Default)]
pub(crate) struct Rows {
    data: Vec<f32>,
    tokens: usize,
    width: usize,
}

impl Rows {
    /// Room for `tokens` vectors of `width` numbers.
    pub(crate) fn with_capacity(tokens: usize, width: usize) -> Self {
        Self { data: vec![0.0; tokens * width.next_multiple_of(PANEL_ROWS)], tokens: 0, width }
    }

    /// Bytes that this room takes.
    pub(crate) fn bytes(tokens: usize, width: usize) -> u64 {
        (tokens * width.next_multiple_of(PANEL_ROWS) * 4) as u64
    }

    /// Now holds `tokens` vectors; what they are is undefined until written.
    pub(crate) fn resize(&mut self, tokens: usize) {
        self.tokens = tokens;
        assert!(self.panels() * self.panel_length() <= self.data.len(), "no more tokens than there is room for");
    }

    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    pub(crate) fn panels(&self) -> usize {
        self.width.div_ceil(PANEL_ROWS)
    }

    /// Numbers of one panel.
    pub(crate) fn panel_length(&self) -> usize {
        self.tokens * PANEL_ROWS
    }

    pub(crate) fn data(&self) -> &[f32] {
        &self.data[..self.panels() * self.panel_length()]
    }

    pub(crate) fn data_mut(&mut self) -> &mut [f32] {
        let length = self.panels() * self.panel_length();
        &mut self.data[..length]
    }

    /// Copies a token's vector out, or its part from panel `first` on.
    pub(crate) fn copy_token(&self, token: usize, first: usize, out: &mut [f32]) {
        let panel = self.panel_length();
        for (i, out) in out.chunks_mut(PANEL_ROWS).enumerate() {
            out.copy_from_slice(&self.data[(first + i) * panel + token * PANEL_ROWS..][..out.len()]);
        }
    }

    /// Copies a token's vector in.
    pub(crate) fn set_token(&mut self, token: usize, values: &[f32]) {
        let panel = self.panel_length();
        for (i, values) in values.chunks(PANEL_ROWS).enumerate() {
            let place = &mut self.data[i * panel + token * PANEL_ROWS..][..PANEL_ROWS];
            place[..values.len()].copy_from_slice(values);
            place[values.len()..].fill(0.0);
        }
    }
}

/// Some of the rows of an operand that a kernel takes in at a time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Tile {
    pub(crate) first: usize,
    pub(crate) rows: usize,
}

/// Cuts `rows` rows from `first` on into as few tiles as there must be, of about the same number of rows.
pub(crate) fn tiles(first: usize, rows: usize, tile_rows: usize) -> impl Iterator<Item = Tile> {
    let count = rows.div_ceil(tile_rows);
    (0..count).map(move |i| {
        let (from, to) = (i * rows / count, (i + 1) * rows / count);
        Tile { first: first + from, rows: to - from }
    })
}

/// In which forms vectors are needed: by plain matrices, by packed ones, or both.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Forms {
    pub(crate) plain: bool,
    pub(crate) packed: bool,
}

impl Forms {
    /// The form that matrices of a precision take.
    pub(crate) fn of(precision: Precision) -> Self {
        Self { plain: !precision.is_packed(), packed: precision.is_packed() }
    }

    /// The forms that either takes.
    pub(crate) fn or(self, other: Self) -> Self {
        Self { plain: self.plain || other.plain, packed: self.packed || other.packed }
    }
}

/// Vectors ready to be multiplied: quantised, tile by tile, for packed matrices; row by row for plain ones.
#[derive(Debug, Default)]
pub(crate) struct Operand {
    /// For each tile: (groups, [8 words × rows of numbers, rows of scales, rows of sums]).
    words: Vec<u32>,
    /// (rows, columns)
    plain: Vec<f32>,
    groups: usize,
    columns: usize,
}

impl Operand {
    /// Room for `rows` vectors of up to `columns` numbers.
    pub(crate) fn with_capacity(rows: usize, columns: usize, forms: Forms) -> Self {
        let (words, plain) = Self::room(rows, columns, forms);
        Self { words: vec![0; words], plain: vec![0.0; plain], groups: 0, columns: 0 }
    }

    /// Bytes that this room takes.
    pub(crate) fn bytes(rows: usize, columns: usize, forms: Forms) -> u64 {
        let (words, plain) = Self::room(rows, columns, forms);
        4 * (words + plain) as u64
    }

    fn room(rows: usize, columns: usize, forms: Forms) -> (usize, usize) {
        let words = if forms.packed { rows * columns.div_ceil(GROUP_COLUMNS) * GROUP_WORDS } else { 0 };
        (words, if forms.plain { rows * columns } else { 0 })
    }

    /// Takes in vectors of `columns` numbers, in the forms that are asked for: row i of the operand becomes `source(i)`.
    pub(crate) fn fill<'a>(
        &mut self,
        pool: &mut Pool,
        columns: usize,
        forms: Forms,
        tiles: &[Tile],
        source: impl Fn(usize) -> Vector<'a> + Sync,
    ) {
        (self.columns, self.groups) = (columns, columns.div_ceil(GROUP_COLUMNS));
        let range = |tile: usize, row: usize| tiles[tile].first * row..(tiles[tile].first + tiles[tile].rows) * row;
        if forms.packed {
            let groups = self.groups;
            pool.parts(
                &mut self.words,
                tiles.len(),
                |tile| range(tile, groups * GROUP_WORDS),
                |tile, _, words| {
                    packed::quantise(groups, tiles[tile].rows, words, |i| source(tiles[tile].first + i));
                },
            );
        }
        if forms.plain {
            pool.parts(
                &mut self.plain,
                tiles.len(),
                |tile| range(tile, columns),
                |tile, _, out| {
                    for (i, row) in out.chunks_exact_mut(columns).enumerate() {
                        source(tiles[tile].first + i).copy_to(row);
                    }
                },
            );
        }
    }
}

/// A token's vector, panel by panel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vector<'a> {
    data: &'a [f32],
    stride: usize,
}

impl<'a> Vector<'a> {
    /// The vector of `token` in `data`, which holds panels of `tokens` tokens, from panel `first` on.
    pub(crate) fn of(data: &'a [f32], tokens: usize, first: usize, token: usize) -> Self {
        Self { data: &data[(first * tokens + token) * PANEL_ROWS..], stride: tokens * PANEL_ROWS }
    }

    /// A vector that stands alone.
    pub(crate) fn alone(data: &'a [f32]) -> Self {
        Self { data, stride: PANEL_ROWS }
    }

    /// Its numbers 16 × `panel` and on; those beyond its width are zeros.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
    fn panel_into(&self, panel: usize, out: &mut [f32; PANEL_ROWS]) {
        let Some(rest) = self.data.get(panel * self.stride..) else { return };
        if let Some(whole) = rest.first_chunk() {
            *out = *whole;
        } else {
            out[..rest.len()].copy_from_slice(rest);
        }
    }

    fn copy_to(self, out: &mut [f32]) {
        for (i, out) in out.chunks_mut(PANEL_ROWS).enumerate() {
            out.copy_from_slice(&self.data[i * self.stride..][..out.len()]);
        }
    }
}

/// A matrix of weights, (rows, columns), in the bytes it came in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix<'a> {
    bytes: &'a [u8],
    precision: Precision,
    rows: usize,
    columns: usize,
}

impl<'a> Matrix<'a> {
    /// Wraps `bytes`, which must be aligned for their format and of the right length.
    pub(crate) fn new(bytes: &'a [u8], precision: Precision, rows: usize, columns: usize) -> Self {
        assert_eq!(bytes.len(), precision.matrix_bytes(rows, columns), "a matrix has all its bytes");
        Self { bytes, precision, rows, columns }
    }

    /// Panels of 16 rows; the last may be short.
    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL_ROWS)
    }

    /// The form of vectors that it is multiplied with.
    pub(crate) fn forms(&self) -> Forms {
        Forms::of(self.precision)
    }

    /// Writes row `row` as f32.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        if self.precision.is_packed() {
            weights_of_row(self.bytes, self.precision, self.columns, row, out);
        } else {
            plain::row(*self, row, out);
        }
    }

    /// Multiplies panel `panel` with the rows of `tile`. Rows beyond the matrix come out as 0.
    pub(crate) fn times(&self, kernels: &Kernels, panel: usize, operand: &Operand, tile: Tile, out: &mut TileOut) {
        let Some(block) = self.precision.block_bytes() else {
            return plain::panel(*self, panel, &operand.plain[tile.first * self.columns..][..tile.rows * self.columns], out);
        };
        let groups = operand.groups;
        let bytes = &self.bytes[panel * groups * block..][..groups * block];
        let words = &operand.words[tile.first * groups * GROUP_WORDS..][..tile.rows * groups * GROUP_WORDS];
        let set = if self.precision == Precision::Q4 { kernels.q4 } else { kernels.q8 };
        // SAFETY: both slices have the lengths that the kernel wants, and only kernels that are available are handed out.
        #[expect(unsafe_code, reason = "kernels read by pointer")]
        unsafe {
            set[tile.rows - 1](bytes.as_ptr(), groups, words.as_ptr(), out);
        }
    }

    /// Writes panels `first` and on of the product with all `tiles`, of `tokens` rows in all, to `out`: (panels, tokens, 16).
    pub(crate) fn times_all(&self, kernels: &Kernels, first: usize, operand: &Operand, tiles: &[Tile], tokens: usize, out: &mut [f32]) {
        let mut results = [[0.0; PANEL_ROWS]; TILE_MAX];
        for &tile in tiles {
            for (i, out) in out.chunks_exact_mut(tokens * PANEL_ROWS).enumerate() {
                self.times(kernels, first + i, operand, tile, &mut results);
                out[tile.first * PANEL_ROWS..][..tile.rows * PANEL_ROWS].copy_from_slice(results[..tile.rows].as_flattened());
            }
        }
    }
}

/// Pieces that each thread's share of a matrix is cut into: large enough that memory is read in long runs, small enough that a thread
/// which has lost its core does not hold up the others for long.
const PIECES_A_THREAD: usize = 4;

/// Returns how many panels a thread should take at a time.
pub(crate) fn panels_at_a_time(panels: usize, threads: usize) -> usize {
    panels.div_ceil(PIECES_A_THREAD * threads).max(1)
}

/// x · wᵀ for each of `matrices`: products stand in `out` one behind the other, each in whole panels.
pub(crate) fn project(pool: &mut Pool, kernels: &Kernels, matrices: &[Matrix<'_>], operand: &Operand, tiles: &[Tile], out: &mut Rows) {
    let tokens = out.tokens();
    if tokens == 0 {
        return;
    }
    let at_a_time = panels_at_a_time(out.panels(), pool.threads());
    pool.chunks(out.data_mut(), at_a_time * tokens * PANEL_ROWS, |chunk, _, out| {
        let mut panel = chunk * at_a_time;
        let mut rest = out;
        for matrix in matrices {
            let here = matrix.panels().saturating_sub(panel).min(rest.len() / (tokens * PANEL_ROWS));
            let (now, later) = rest.split_at_mut(here * tokens * PANEL_ROWS);
            if here > 0 {
                matrix.times_all(kernels, panel, operand, tiles, tokens, now);
            }
            panel = (panel + here).saturating_sub(matrix.panels());
            rest = later;
        }
    });
}
