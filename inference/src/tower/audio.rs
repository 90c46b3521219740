//! Qwen3-Omni's audio tower: the log-mel spectrum of one clip to rows.

use std::ops::Range;

use protocol::tensors::{Affine, AudioTensor, BlockTensor, TensorRole};
use protocol::towers::{Audio, CONVOLUTIONS};
use protocol::{ModelManifest, PartKind};

use super::attention::TowerHeads;
use super::layer::{Buffers, Layer};
use super::linear::{LayerNorm, Linear, LinearWork, gelu, work_bytes};
use super::{TowerRows, TowerWatch, reader};
use crate::machine::Machine;
use crate::weights::{LoadError, ReadTensor, TrunkReader};

const EPS: f32 = 1e-5;
/// The longest wave of the sinusoids, in turns of 2π.
const SINUSOID_BASE: f64 = 10_000.0;
const KERNEL: usize = 3;

/// An audio tower in memory.
#[derive(Debug)]
pub struct AudioTower {
    shape: Audio,
    convolutions: Vec<Linear>, // of (channels before × 3 × 3) numbers each
    rows: Linear,
    layers: Vec<Block>,
    final_norm: LayerNorm,
    up: Linear,
    down: Linear,
}

#[derive(Debug)]
struct Block {
    query_key_value: [Linear; 3],
    layer: Layer,
}

/// Rows that `frames` frames of a spectrum become: those of whole chunks and of the rest, each halved three times.
pub fn rows_of_frames(frames: usize, chunk: usize) -> usize {
    let of = |frames: usize| (0..CONVOLUTIONS).fold(frames, |frames, _| frames.div_ceil(2));
    frames / chunk * of(chunk) + of(frames % chunk)
}

impl AudioTower {
    /// Loads the audio tower of a model.
    ///
    /// # Panics
    /// When the model has none.
    pub fn load<E: std::error::Error>(manifest: &ModelManifest, read: ReadTensor<'_, E>) -> Result<Self, LoadError<E>> {
        let shape = manifest.audio().expect("the model has an audio tower").clone();
        let mut reader = reader(manifest.part(PartKind::Audio).expect("the model has the part"), read);
        let role = |tensor: fn(Affine) -> AudioTensor| move |part| TensorRole::Audio(tensor(part));
        let convolution = |number| Linear::read(&mut reader, |part| TensorRole::Audio(AudioTensor::Convolution(number, part)));
        let convolutions = (0..CONVOLUTIONS).map(convolution).collect::<Result<_, _>>()?;
        let rows = Linear::without_bias(&mut reader, TensorRole::Audio(AudioTensor::Rows))?;
        let layers = (0..shape.layers).map(|layer| Block::read(&mut reader, layer)).collect::<Result<_, _>>()?;
        Ok(Self {
            convolutions,
            rows,
            layers,
            final_norm: LayerNorm::read(&mut reader, role(AudioTensor::FinalNorm), EPS)?,
            up: Linear::read(&mut reader, role(AudioTensor::Up))?,
            down: Linear::read(&mut reader, role(AudioTensor::Down))?,
            shape,
        })
    }

    /// Bytes that [`run`](Self::run) takes at most for a spectrum of `frames` frames. Its result is included.
    pub fn work_bytes(shape: &Audio, frames: usize) -> u64 {
        let [hidden, width, channels, bands, chunk, out] =
            [shape.hidden_size, shape.width, shape.channels, shape.bands, shape.chunk, shape.out].map(|side| side as usize);
        let rows = rows_of_frames(frames, chunk);
        let passing = rows * (2 * hidden + out); // as they pass from layer to layer, and what is made of them
        // A quarter of the first image's places, with all channels, and a sixteenth of them with what each is made of.
        let image = bands * chunk.min(frames);
        let convolving = image + 2 * image.div_ceil(4) * channels + image.div_ceil(16) * channels * KERNEL * KERNEL;
        let numbers = passing + convolving + Buffers::numbers(rows, hidden, width);
        4 * numbers as u64 + work_bytes(Self::widest(shape), &[channels, hidden, 3 * hidden, width, out])
    }

    /// The most columns of a matrix.
    fn widest(shape: &Audio) -> usize {
        let patch = shape.channels as usize * KERNEL * KERNEL;
        patch.max(shape.width as usize).max((shape.channels * shape.frequencies()) as usize).max(shape.hidden_size as usize)
    }

    /// Makes rows of a clip's spectrum, (bands, frames). `watch` is told steps by name.
    pub fn run(&self, machine: &Machine, spectrum: &[f32], mut watch: TowerWatch<'_>) -> TowerRows {
        let (bands, hidden, chunk) = (self.shape.bands as usize, self.shape.hidden_size as usize, self.shape.chunk as usize);
        let heads = TowerHeads { heads: self.shape.heads as usize, head_dim: hidden / self.shape.heads as usize };
        let frames = spectrum.len() / bands;
        let watched = watch.is_some();
        let mut tell = |name: &str, numbers: &[f32]| {
            if let Some(watch) = &mut watch {
                watch(name, numbers);
            }
        };
        let mut pool = machine.pool();
        let mut work = LinearWork::new(&mut pool, machine.kernels(), Self::widest(&self.shape));
        // The last chunk is as long as the others, where there are others.
        let padded = frames.min(chunk);
        let mut x = Vec::new();
        let mut convolved = Vec::new(); // for who watches
        let mut memory = Convolving::default();
        for first in (0..frames).step_by(chunk) {
            let here = chunk.min(frames - first);
            let image = room(&mut memory.image, bands * padded);
            image.fill(0.0);
            for (band, image) in image.chunks_exact_mut(padded).enumerate() {
                image[..here].copy_from_slice(&spectrum[band * frames + first..][..here]);
            }
            let rows = self.convolve(&mut work, &mut memory, padded);
            if watched {
                convolved.extend_from_slice(rows);
            }
            let kept = rows_of_frames(here, chunk);
            x.extend_from_slice(&rows[..kept * hidden]);
            let added = x.len() - kept * hidden;
            x[added..].chunks_exact_mut(hidden).enumerate().for_each(|(time, row)| add_sinusoid(time, row));
        }
        tell("conv_out", &convolved);
        drop(convolved);
        tell("layer0_in", &x);
        let rows = x.len() / hidden;
        let window = rows_of_frames(padded, chunk) * (self.shape.window / self.shape.chunk) as usize;
        let segments: Vec<Range<usize>> = (0..rows).step_by(window.max(1)).map(|first| first..rows.min(first + window)).collect();
        drop(memory);
        let mut buffers = Buffers::new(rows, hidden, self.shape.width as usize);
        for (number, layer) in self.layers.iter().enumerate() {
            layer.run(&mut work, heads, &mut x, &mut buffers, &segments);
            if number == 0 {
                tell("layer0", &x);
            }
        }
        tell("last_layer", &x);
        self.final_norm.run(work.pool, &x, &mut buffers.normed);
        tell("ln_post", &buffers.normed);
        self.up.run(&mut work, &buffers.normed, &mut x, |_, out| gelu(out));
        let mut out = vec![0.0; rows * self.down.width()];
        self.down.run(&mut work, &x, &mut out, |_, _| {});
        tell("out", &out);
        TowerRows { rows: out, deepstack: Vec::new() }
    }

    /// An image of (bands, frames) through the convolutions, each 3 × 3 and of stride 2: (frames ÷ 8, hidden_size).
    fn convolve<'a>(&self, work: &mut LinearWork<'_>, memory: &'a mut Convolving, frames: usize) -> &'a [f32] {
        let Convolving { image, windows, convolved, rows } = memory;
        // Channels last: (height, width, channels).
        let (mut height, mut width, mut channels) = (self.shape.bands as usize, frames, 1);
        for convolution in &self.convolutions {
            let (to_height, to_width) = (height.div_ceil(2), width.div_ceil(2));
            let numbers = channels * KERNEL * KERNEL;
            let windows = room(windows, to_height * to_width * numbers);
            let (from, outside) = (&*image, vec![0.0; channels]);
            work.pool.chunks(windows, to_width * numbers, |row, _, out| {
                for (column, out) in out.chunks_exact_mut(numbers).enumerate() {
                    let seen: [&[f32]; KERNEL * KERNEL] = std::array::from_fn(|place| {
                        // One row and one column of zeros stand before the first.
                        let (y, x) = ((2 * row + place / KERNEL).wrapping_sub(1), (2 * column + place % KERNEL).wrapping_sub(1));
                        if y < height && x < width { &from[(y * width + x) * channels..][..channels] } else { &outside }
                    });
                    for (channel, out) in out.as_chunks_mut::<{ KERNEL * KERNEL }>().0.iter_mut().enumerate() {
                        out.iter_mut().zip(&seen).for_each(|(out, seen)| *out = seen[channel]);
                    }
                }
            });
            let to_channels = convolution.width();
            convolution.run(work, windows, room(convolved, to_height * to_width * to_channels), |_, out| gelu(out));
            std::mem::swap(image, convolved);
            (height, width, channels) = (to_height, to_width, to_channels);
        }
        // A row for each time: channel by channel, its frequencies.
        let rows = room(rows, width * channels * height);
        for (time, row) in rows.chunks_exact_mut(channels * height).enumerate() {
            for (channel, row) in row.chunks_exact_mut(height).enumerate() {
                row.iter_mut().enumerate().for_each(|(frequency, out)| *out = image[(frequency * width + time) * channels + channel]);
            }
        }
        let out = room(convolved, width * self.rows.width());
        self.rows.run(work, rows, out, |_, _| {});
        out
    }
}

/// The memory that convolutions work in.
#[derive(Default)]
struct Convolving {
    image: Vec<f32>,     // what goes in
    windows: Vec<f32>,   // (rows that come out, numbers that each is made of)
    convolved: Vec<f32>, // what comes out
    rows: Vec<f32>,
}

/// The first `count` numbers of a buffer, whatever they are.
fn room(buffer: &mut Vec<f32>, count: usize) -> &mut [f32] {
    buffer.resize(buffer.len().max(count), 0.0);
    &mut buffer[..count]
}

/// Sines, then cosines, of frequencies that fall from 1 to 1 ÷ 10,000 (Vaswani et al. 2017).
fn add_sinusoid(time: usize, row: &mut [f32]) {
    let half = row.len() / 2;
    let step = (SINUSOID_BASE.ln() / (half - 1) as f64) as f32;
    let (sines, cosines) = row.split_at_mut(half);
    for (k, (sine, cosine)) in sines.iter_mut().zip(cosines).enumerate() {
        let angle = time as f32 * libm::expf(-step * k as f32);
        *sine += libm::sinf(angle);
        *cosine += libm::cosf(angle);
    }
}

impl Block {
    fn read<E: std::error::Error>(reader: &mut TrunkReader<'_, E>, layer: u32) -> Result<Self, LoadError<E>> {
        let role = |tensor| TensorRole::Audio(AudioTensor::Layer(layer, tensor));
        let [query, key, value] =
            [BlockTensor::Query, BlockTensor::Key, BlockTensor::Value].map(|tensor| Linear::read(reader, |part| role(tensor(part))));
        Ok(Self { query_key_value: [query?, key?, value?], layer: Layer::read(reader, role, EPS)? })
    }

    fn run(&self, work: &mut LinearWork<'_>, heads: TowerHeads, x: &mut [f32], buffers: &mut Buffers, segments: &[Range<usize>]) {
        let project = |work: &mut LinearWork<'_>, normed: &[f32], wide: &mut [f32]| {
            let [query, key, value] = &self.query_key_value;
            Linear::run_together([query, key, value], work, normed, wide, |_, _| {});
            query.is_packed()
        };
        self.layer.run(work, (heads, segments), x, buffers, project, gelu);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_become_rows_as_published() {
        let expected = [(0, 0), (1, 1), (8, 1), (9, 2), (57, 8), (99, 13), (100, 13), (101, 14), (200, 26), (1235, 161)];
        for (frames, rows) in expected {
            assert_eq!(rows_of_frames(frames, 100), rows, "{frames} frames");
        }
    }
}
