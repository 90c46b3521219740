//! Qwen3-Omni's vision tower: patches of one picture, or of pairs of frames of one video, to rows.

use std::ops::Range;

use protocol::tensors::{BlockTensor, MergerTensor, TensorRole, VisionTensor};
use protocol::towers::Vision;
use protocol::{ModelManifest, PartKind};

use super::attention::TowerHeads;
use super::layer::{Buffers, Layer};
use super::linear::{LayerNorm, Linear, LinearWork, add_rows, gelu, gelu_tanh, work_bytes};
use super::{TowerRows, TowerWatch, reader};
use crate::machine::Machine;
use crate::weights::{LoadError, ReadTensor, TrunkReader, Weight};

const EPS: f32 = 1e-6;
/// The base of the frequencies of rows and columns.
const ROPE_BASE: f32 = 10_000.0;

/// A vision tower in memory.
#[derive(Debug)]
pub struct VisionTower {
    shape: Vision,
    patch: Linear,
    positions: Weight, // (side × side, hidden_size)
    blocks: Vec<Block>,
    merger: Merger,
    deepstack: Vec<Merger>,
}

#[derive(Debug)]
struct Block {
    qkv: Linear,
    layer: Layer,
}

/// Four neighbouring rows to one.
#[derive(Debug)]
struct Merger {
    norm: LayerNorm,
    up: Linear,
    down: Linear,
}

/// Patches of a picture or of a video, as `media` makes them.
#[derive(Clone, PartialEq, Debug)]
pub struct Patches {
    /// (time × height × width, channels × frames × patch × patch), square of four by square of four.
    pub numbers: Vec<f32>,
    /// Patches in time, down and to the right.
    pub grid: [usize; 3],
}

impl Patches {
    /// Rows that they become.
    pub fn rows(&self) -> usize {
        self.grid.iter().product::<usize>() / 4
    }
}

impl VisionTower {
    /// Loads the vision tower of a model.
    ///
    /// # Panics
    /// When the model has none.
    pub fn load<E: std::error::Error>(manifest: &ModelManifest, read: ReadTensor<'_, E>) -> Result<Self, LoadError<E>> {
        let shape = manifest.vision().expect("the model has a vision tower").clone();
        let mut reader = reader(manifest.part(PartKind::Vision).expect("the model has the part"), read);
        let patch = Linear::read(&mut reader, |part| TensorRole::Vision(VisionTensor::Patch(part)))?;
        let positions = reader.tensor(TensorRole::Vision(VisionTensor::Positions))?;
        let blocks = (0..shape.layers).map(|block| Block::read(&mut reader, block)).collect::<Result<_, _>>()?;
        let merger = Merger::read(&mut reader, VisionTensor::Merger)?;
        let deepstack =
            (0..shape.deepstack.len() as u32).map(|number| Merger::read(&mut reader, |tensor| VisionTensor::Deepstack(number, tensor)));
        Ok(Self { patch, positions, blocks, merger, deepstack: deepstack.collect::<Result<_, _>>()?, shape })
    }

    /// Bytes that [`run`](Self::run) takes at most for `patches` patches. Its result is included.
    pub fn work_bytes(shape: &Vision, patches: usize) -> u64 {
        let [hidden, width, merged, out] = [shape.hidden_size, shape.width, shape.merged(), shape.out].map(|side| side as usize);
        let rows = patches * (hidden + hidden / shape.heads as usize); // the rows themselves, and their positions
        let merging = patches.div_ceil(4) * (merged + out * (1 + shape.deepstack.len()));
        let numbers = rows + merging + Buffers::numbers(patches, hidden, width);
        4 * numbers as u64 + work_bytes(Self::widest(shape), &[hidden, 3 * hidden, width, merged, out])
    }

    /// The most columns of a matrix.
    fn widest(shape: &Vision) -> usize {
        shape.patch_numbers().max(shape.merged()).max(shape.width) as usize
    }

    /// Makes rows of patches. `watch` is told steps by name.
    pub fn run(&self, machine: &Machine, patches: &Patches, mut watch: TowerWatch<'_>) -> TowerRows {
        let hidden = self.shape.hidden_size as usize;
        let heads = TowerHeads { heads: self.shape.heads as usize, head_dim: hidden / self.shape.heads as usize };
        let [time, height, width] = patches.grid;
        let rows = time * height * width;
        let places: Vec<_> = places(height, width).collect();
        let mut tell = |name: &str, numbers: &[f32]| {
            if let Some(watch) = &mut watch {
                watch(name, numbers);
            }
        };
        let mut pool = machine.pool();
        let mut work = LinearWork::new(&mut pool, machine.kernels(), Self::widest(&self.shape));
        let mut x = vec![0.0; rows * hidden];
        self.patch.run(&mut work, &patches.numbers, &mut x, |_, _| {});
        tell("patch_embed", &x);
        let table = self.position_rows(&places, height, width);
        x.chunks_exact_mut(table.len()).for_each(|frame| add_rows(work.pool, frame, &table, hidden));
        drop(table);
        tell("block0_in", &x);
        let turns = Turns::new(heads.head_dim, &places);
        let segments: Vec<Range<usize>> = (0..time).map(|frame| frame * height * width..(frame + 1) * height * width).collect();
        let mut buffers = Buffers::new(rows, hidden, self.shape.width as usize);
        let mut deepstack = Vec::new();
        for (number, block) in self.blocks.iter().enumerate() {
            block.run(&mut work, heads, &mut x, &mut buffers, &segments, &turns);
            if number == 0 {
                tell("block0", &x);
            }
            if let Some(at) = self.shape.deepstack.iter().position(|&at| at as usize == number) {
                let merger = &self.deepstack[at];
                merger.norm.run(work.pool, &x, &mut buffers.normed); // four rows together, which lie one behind the other
                let rows = merger.run(&mut work, &buffers.normed);
                tell(&format!("deepstack.{at}"), &rows);
                deepstack.push(rows);
            }
        }
        tell("last_block", &x);
        self.merger.norm.run(work.pool, &x, &mut buffers.normed);
        let rows = self.merger.run(&mut work, &buffers.normed);
        tell("merged", &rows);
        TowerRows { rows, deepstack }
    }

    /// What the table of positions says of each place of a frame, (places, hidden_size): between its four neighbours there.
    fn position_rows(&self, places: &[(usize, usize)], height: usize, width: usize) -> Vec<f32> {
        let (side, hidden) = (self.shape.side as usize, self.shape.hidden_size as usize);
        let table = self.positions.view();
        // The ends of a frame are the ends of the table.
        let taps = |at: usize, all: usize| {
            let place = at as f32 * (side - 1) as f32 / (all.max(2) - 1) as f32;
            let low = place.floor();
            (low as usize, (low as usize + 1).min(side - 1), place - low)
        };
        let mut out = vec![0.0; places.len() * hidden];
        let mut corner = vec![0.0; hidden];
        for (&(row, column), out) in places.iter().zip(out.chunks_exact_mut(hidden)) {
            let ((top, bottom, down), (left, right, along)) = (taps(row, height), taps(column, width));
            let corners = [
                (top, left, (1.0 - down) * (1.0 - along)),
                (top, right, (1.0 - down) * along),
                (bottom, left, down * (1.0 - along)),
                (bottom, right, down * along),
            ];
            for (row, column, share) in corners {
                table.row(row * side + column, &mut corner);
                out.iter_mut().zip(&corner).for_each(|(out, x)| *out += x * share);
            }
        }
        out
    }
}

/// Row and column of each patch of a frame, square of four by square of four.
fn places(height: usize, width: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..height).step_by(2).flat_map(move |row| {
        (0..width).step_by(2).flat_map(move |column| [(row, column), (row, column + 1), (row + 1, column), (row + 1, column + 1)])
    })
}

/// Cosine and sine of every frequency at every place of a frame.
struct Turns {
    pairs: Vec<(f32, f32)>, // (places, head_dim ÷ 2)
    half: usize,
}

impl Turns {
    fn new(head_dim: usize, places: &[(usize, usize)]) -> Self {
        let (half, quarter) = (head_dim / 2, head_dim / 4);
        let frequency = |k: usize| 1.0 / libm::powf(ROPE_BASE, (2 * k) as f32 / half as f32);
        let frequencies: Vec<_> = (0..quarter).map(frequency).collect();
        let turn = |at: usize, frequency: f32| {
            let angle = at as f32 * frequency;
            (libm::cosf(angle), libm::sinf(angle))
        };
        let most = places.iter().map(|&(row, column)| row.max(column)).max().unwrap_or(0);
        let table: Vec<Vec<_>> = (0..=most).map(|at| frequencies.iter().map(|&frequency| turn(at, frequency)).collect()).collect();
        let pairs = places.iter().flat_map(|&(row, column)| table[row].iter().chain(&table[column]).copied()).collect();
        Self { pairs, half }
    }

    /// Turns a head's vector at a place: number i goes with number i + head_dim ÷ 2.
    fn apply(&self, place: usize, head: &mut [f32]) {
        let (low, high) = head.split_at_mut(self.half);
        for ((a, b), &(cos, sin)) in low.iter_mut().zip(high).zip(&self.pairs[place * self.half..]) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }

    fn places(&self) -> usize {
        self.pairs.len() / self.half
    }
}

impl Block {
    fn read<E: std::error::Error>(reader: &mut TrunkReader<'_, E>, block: u32) -> Result<Self, LoadError<E>> {
        let role = |tensor| TensorRole::Vision(VisionTensor::Block(block, tensor));
        let qkv = Linear::read(reader, |part| role(BlockTensor::QueryKeyValue(part)))?;
        Ok(Self { qkv, layer: Layer::read(reader, role, EPS)? })
    }

    fn run(
        &self,
        work: &mut LinearWork<'_>,
        heads: TowerHeads,
        x: &mut [f32],
        buffers: &mut Buffers,
        segments: &[Range<usize>],
        turns: &Turns,
    ) {
        let project = |work: &mut LinearWork<'_>, normed: &[f32], wide: &mut [f32]| {
            self.qkv.run(work, normed, wide, |row, qkv| {
                let queries_and_keys = qkv[..2 * heads.width()].chunks_exact_mut(heads.head_dim);
                queries_and_keys.for_each(|head| turns.apply(row % turns.places(), head));
            });
            self.qkv.is_packed()
        };
        self.layer.run(work, (heads, segments), x, buffers, project, gelu_tanh);
    }
}

impl Merger {
    fn read<E: std::error::Error>(
        reader: &mut TrunkReader<'_, E>,
        tensor: impl Fn(MergerTensor) -> VisionTensor,
    ) -> Result<Self, LoadError<E>> {
        let role = |of: fn(protocol::tensors::Affine) -> MergerTensor| {
            let tensor = &tensor;
            move |part| TensorRole::Vision(tensor(of(part)))
        };
        Ok(Self {
            norm: LayerNorm::read(reader, role(MergerTensor::Norm), EPS)?,
            up: Linear::read(reader, role(MergerTensor::Up))?,
            down: Linear::read(reader, role(MergerTensor::Down))?,
        })
    }

    /// Merges rows that were normed.
    fn run(&self, work: &mut LinearWork<'_>, normed: &[f32]) -> Vec<f32> {
        let merged = self.up.width();
        let rows = normed.len() / merged;
        let mut inside = vec![0.0; rows * merged];
        self.up.run(work, normed, &mut inside, |_, out| gelu(out));
        let mut out = vec![0.0; rows * self.down.width()];
        self.down.run(work, &inside, &mut out, |_, _| {});
        out
    }
}
