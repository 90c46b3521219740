//! Matrix products whose bits depend on nothing but their operands: no batch, thread, cache or instruction set changes them.
//!
//! Vectors of many tokens lie **panel by panel**, as `rows` says. So a panel of 16 rows of a matrix makes one contiguous piece of a product,
//! and every sum has a lane of its own.
//! `docs/expert-function.md` defines the packed products, `plain` the others.

pub(crate) mod math;
mod packed;
mod packing;
mod plain;
mod rows;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(test)]
pub(crate) mod tests;

use std::ops::Range;

use protocol::Precision;
use protocol::precision::{GROUP_COLUMNS, PANEL_ROWS};

use crate::aligned::Words;
use crate::pool::Pool;

pub(crate) use packed::weights_of_row;
pub(crate) use packing::{Compensation, pack};
pub(crate) use plain::dot;
pub(crate) use rows::{Rows, Vector};

/// Tokens of a tile, at most: a matrix is read once for as many.
pub(crate) const TILE_MAX: usize = 48;
/// Panels that are multiplied with a tile at a time, at most.
pub(crate) const PANELS_MAX: usize = 4;

/// Words (of 32 bits) that a token's group of activations takes in a tile: 8 of quantised numbers, the scale, the excess.
pub(crate) const GROUP_WORDS: usize = NUMBER_WORDS + 2;
/// Words of quantised numbers.
const NUMBER_WORDS: usize = GROUP_COLUMNS / 4;
/// Quantised activations of a tile, from some group on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Activations {
    /// (groups, tokens, 8 words of four numbers each)
    numbers: *const i32,
    /// (groups, tokens)
    scales: *const f32,
    /// (groups, tokens): −8 times the sum of a group's numbers, since 4-bit weights are stored with 8 added.
    excess: *const i32,
    tokens: usize,
}

#[expect(unsafe_code, reason = "kernels read by pointer")]
impl Activations {
    /// The same without the first `first` tokens of each group, which stay as far apart.
    ///
    /// # Safety
    /// There are more tokens than that.
    unsafe fn from(self, first: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            Self {
                numbers: self.numbers.add(first * NUMBER_WORDS),
                scales: self.scales.add(first),
                excess: self.excess.add(first),
                tokens: self.tokens,
            }
        }
    }

    /// Where group `g` begins.
    ///
    /// # Safety
    /// There are more groups than that.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
    unsafe fn group(self, g: usize) -> (*const i32, *const f32, *const i32) {
        let place = g * self.tokens;
        // SAFETY: the caller's promise.
        unsafe { (self.numbers.add(place * NUMBER_WORDS), self.scales.add(place), self.excess.add(place)) }
    }
}

/// Some panels of packed weights, or the part of them that belongs to some groups.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Panels {
    first: *const u8,
    /// Bytes from one panel to the next.
    stride: usize,
    count: usize,
    groups: usize,
    /// The bits of what 8-bit scales count from.
    unit: u32,
}

impl Panels {
    /// Where the panels begin, each with its number.
    #[inline]
    fn each(self) -> impl Iterator<Item = (usize, *const u8)> {
        (0..self.count).map(move |i| (i, self.first.wrapping_add(i * self.stride)))
    }
}

/// Where results go: (panels, tokens, 16).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Results {
    first: *mut [f32; PANEL_ROWS],
    /// Rows of 16 from one panel to the next.
    stride: usize,
}

impl Results {
    /// Those of a panel, from some token on.
    #[inline]
    fn at(self, panel: usize, token: usize) -> *mut [f32; PANEL_ROWS] {
        self.first.wrapping_add(panel * self.stride + token)
    }
}

/// Adds the products of some panels with a tile to the results, group after group.
///
/// # Safety
/// There are as many groups of activations as of weights, results for all panels and tokens, and the processor has the instructions.
pub(crate) type Kernel = unsafe fn(Panels, Activations, Results);

/// The packed kernels of one instruction set.
pub struct Kernels {
    /// The name that people see.
    pub name: &'static str,
    available: fn() -> bool,
    q8: Kernel,
    q6: Kernel,
    q4: Kernel,
    q3: Kernel,
    q2: Kernel,
    /// Bytes of a tile that are multiplied with all panels before its next columns are, so that they stay in the nearest cache.
    near: usize,
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} kernels", self.name)
    }
}

impl Kernels {
    /// Every set of kernels that this processor can run, the fastest first.
    pub fn available() -> impl Iterator<Item = &'static Self> {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        const ALL: &[&Kernels] = &[&amx::KERNELS, &avx512::KERNELS, &avx2::KERNELS, &packed::KERNELS];
        #[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
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

    fn of(&self, precision: Precision) -> Kernel {
        match precision {
            Precision::Q6 => self.q6,
            Precision::Q4 => self.q4,
            Precision::Q3 => self.q3,
            Precision::Q2 => self.q2,
            _ => self.q8,
        }
    }

    /// Those of a name, if this processor can run them.
    pub fn named(name: &str) -> Option<&'static Self> {
        Self::available().find(|kernels| kernels.name == name)
    }
}

/// Some of the rows of an operand that are multiplied together: [`TILE_MAX`] at most.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Tile {
    pub(crate) first: usize,
    pub(crate) rows: usize,
}

/// Cuts `rows` rows from `first` on into as few tiles as there must be, of about the same number of rows.
pub(crate) fn tiles(first: usize, rows: usize) -> impl Iterator<Item = Tile> {
    shares(rows, TILE_MAX).map(move |(from, rows)| Tile { first: first + from, rows })
}

/// Cuts `all` into as few shares of at most `most` as there must be, of about the same size: where each begins, and its size.
fn shares(all: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = all.div_ceil(most);
    (0..count).map(move |i| (i * all / count, (i + 1) * all / count - i * all / count))
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
    /// For each tile: numbers, scales, excesses, as [`Activations`] says.
    words: Words,
    /// (rows, columns)
    plain: Vec<f32>,
    groups: usize,
    columns: usize,
}

impl Operand {
    /// Room for `rows` vectors of up to `columns` numbers.
    pub(crate) fn with_capacity(rows: usize, columns: usize, forms: Forms) -> Self {
        Self::for_either([(rows, columns, forms); 2])
    }

    /// Bytes that this room takes.
    pub(crate) fn bytes(rows: usize, columns: usize, forms: Forms) -> u64 {
        Self::bytes_for_either([(rows, columns, forms); 2])
    }

    /// Room that is enough for each of two shapes: (vectors, numbers of a vector, forms).
    pub(crate) fn for_either(shapes: [(usize, usize, Forms); 2]) -> Self {
        let (words, plain) = Self::room_for_either(shapes);
        Self { words: Words::new(words), plain: vec![0.0; plain], groups: 0, columns: 0 }
    }

    /// Bytes that this room takes.
    pub(crate) fn bytes_for_either(shapes: [(usize, usize, Forms); 2]) -> u64 {
        let (words, plain) = Self::room_for_either(shapes);
        4 * (words + plain) as u64
    }

    fn room_for_either(shapes: [(usize, usize, Forms); 2]) -> (usize, usize) {
        let [one, other] = shapes.map(|(rows, columns, forms)| Self::room(rows, columns, forms));
        (one.0.max(other.0), one.1.max(other.1))
    }

    fn room(rows: usize, columns: usize, forms: Forms) -> (usize, usize) {
        let words = if forms.packed { rows * columns.div_ceil(GROUP_COLUMNS) * GROUP_WORDS } else { 0 };
        (words, if forms.plain { rows * columns } else { 0 })
    }

    /// Takes in vectors of `columns` numbers in the packed form, by this thread alone: row i of the operand becomes `source(i)`.
    pub(crate) fn quantise<'a>(&mut self, columns: usize, tiles: &[Tile], source: impl Fn(usize) -> Vector<'a>) {
        (self.columns, self.groups) = (columns, columns.div_ceil(GROUP_COLUMNS));
        for tile in tiles {
            let words = &mut self.words[tile.first * self.groups * GROUP_WORDS..][..tile.rows * self.groups * GROUP_WORDS];
            packed::quantise(self.groups, tile.rows, words, |i| source(tile.first + i));
        }
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

impl Operand {
    /// Takes in rows of another operand, which was filled in `from_tiles`: row i of this one becomes its row `source(i)`.
    pub(crate) fn gather(
        &mut self,
        pool: &mut Pool,
        from: &Self,
        from_tiles: &[Tile],
        tiles: &[Tile],
        forms: Forms,
        source: impl Fn(usize) -> usize + Sync,
    ) {
        (self.columns, self.groups) = (from.columns, from.groups);
        let (groups, columns) = (self.groups, self.columns);
        let range = |tile: usize, row: usize| tiles[tile].first * row..(tiles[tile].first + tiles[tile].rows) * row;
        if forms.packed {
            let place = |row: usize| {
                let row = source(row);
                let tile = from_tiles[from_tiles.partition_point(|tile| tile.first + tile.rows <= row)];
                (&from.words[tile.first * groups * GROUP_WORDS..][..tile.rows * groups * GROUP_WORDS], row - tile.first, tile.rows)
            };
            pool.parts(
                &mut self.words,
                tiles.len(),
                |tile| range(tile, groups * GROUP_WORDS),
                |tile, _, words| packed::gather(groups, tiles[tile].rows, words, |i| place(tiles[tile].first + i)),
            );
        }
        if forms.plain {
            pool.parts(
                &mut self.plain,
                tiles.len(),
                |tile| range(tile, columns),
                |tile, _, out| {
                    for (i, row) in out.chunks_exact_mut(columns).enumerate() {
                        row.copy_from_slice(&from.plain[source(tiles[tile].first + i) * columns..][..columns]);
                    }
                },
            );
        }
    }
}

impl Operand {
    /// Appends a quantised row, as it travels to another node: group by group, the numbers and their scale.
    pub(crate) fn write_row(&self, tiles: &[Tile], row: usize, out: &mut Vec<u8>) {
        let tile = tiles[tiles.partition_point(|tile| tile.first + tile.rows <= row)];
        let words = &self.words[tile.first * self.groups * GROUP_WORDS..][..tile.rows * self.groups * GROUP_WORDS];
        packed::write_row(self.groups, tile.rows, words, row - tile.first, out);
    }

    /// Takes in rows that travelled: row i of the operand becomes `source(i)`. Results are defined only where activations can be what
    /// the rows say, which is checked where they come in.
    pub(crate) fn read_rows<'a>(&mut self, columns: usize, tiles: &[Tile], source: impl Fn(usize) -> &'a [u8]) {
        (self.columns, self.groups) = (columns, columns.div_ceil(GROUP_COLUMNS));
        for tile in tiles {
            let words = &mut self.words[tile.first * self.groups * GROUP_WORDS..][..tile.rows * self.groups * GROUP_WORDS];
            (0..tile.rows).for_each(|row| packed::read_row(self.groups, tile.rows, words, row, source(tile.first + row)));
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

    pub(crate) fn rows(&self) -> usize {
        self.rows
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

    /// Multiplies some panels, [`PANELS_MAX`] at most, with the rows of `tile`: those of a panel go to `out`, (rows, 16), `stride` numbers
    /// after those of the panel before. Rows beyond the matrix come out as 0.
    pub(crate) fn times(&self, kernels: &Kernels, panels: Range<usize>, operand: &Operand, tile: Tile, out: &mut [f32], stride: usize) {
        let Some(block) = self.precision.block_bytes() else {
            let x = &operand.plain[tile.first * self.columns..][..tile.rows * self.columns];
            panels
                .zip(out.chunks_mut(stride))
                .for_each(|(panel, out)| plain::panel(*self, panel, x, out[..tile.rows * PANEL_ROWS].as_chunks_mut().0));
            return;
        };
        let count = panels.len();
        assert!((count - 1) * stride + tile.rows * PANEL_ROWS <= out.len(), "there is room for the results");
        out.chunks_mut(stride).take(count).for_each(|out| out[..tile.rows * PANEL_ROWS].fill(0.0));
        let groups = operand.groups;
        let bytes = &self.bytes[self.precision.head_bytes()..][panels.start * groups * block..panels.end * groups * block];
        let words = &operand.words[tile.first * groups * GROUP_WORDS..][..tile.rows * groups * GROUP_WORDS];
        let (kernel, unit) = (kernels.of(self.precision), packed::unit_of(self.precision, self.bytes));
        let results = Results { first: out.as_mut_ptr().cast(), stride: stride / PANEL_ROWS };
        for (first, here) in shares(groups, (kernels.near / (4 * GROUP_WORDS * tile.rows)).max(1)) {
            let from = |words: &[u32], each: usize| words[each * first * tile.rows..].as_ptr();
            let (scales, excess) = (groups * tile.rows * NUMBER_WORDS, groups * tile.rows * (NUMBER_WORDS + 1));
            let x = Activations {
                numbers: from(words, NUMBER_WORDS).cast(),
                scales: from(&words[scales..], 1).cast(),
                excess: from(&words[excess..], 1).cast(),
                tokens: tile.rows,
            };
            let panels = Panels { first: bytes[first * block..].as_ptr(), stride: groups * block, count, groups: here, unit };
            // SAFETY: all have what the kernel wants, and only kernels that are available are handed out.
            #[expect(unsafe_code, reason = "kernels read by pointer")]
            unsafe {
                kernel(panels, x, results);
            }
        }
    }

    /// Writes panels `first` and on of the product with all `tiles`, of `tokens` rows in all, to `out`: (panels, tokens, 16).
    pub(crate) fn times_all(&self, kernels: &Kernels, first: usize, operand: &Operand, tiles: &[Tile], tokens: usize, out: &mut [f32]) {
        let stride = tokens * PANEL_ROWS;
        for (number, out) in out.chunks_mut(PANELS_MAX * stride).enumerate() {
            let first = first + number * PANELS_MAX;
            let panels = first..first + out.len() / stride;
            for &tile in tiles {
                self.times(kernels, panels.clone(), operand, tile, &mut out[tile.first * PANEL_ROWS..], stride);
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
