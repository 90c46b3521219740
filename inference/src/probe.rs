//! What a machine allows: how fast its memory is read, how fast a kernel multiplies what lies in the nearest cache, and how many bytes
//! and multiplications a token takes. Time is the caller's.

use protocol::decoder::Head;
use protocol::tensors::TensorRole;
use protocol::{ModelManifest, Precision};

use crate::aligned::AlignedBytes;
use crate::kernels::math::per_instruction_set;
use crate::kernels::{Kernels, Matrix, Operand, PANELS_MAX, Tile, Vector};
use crate::pool::Pool;

/// Bytes that a thread reads at a time.
const PIECE: usize = 864 << 10;

/// Memory that is read as weights are: whole pieces, by all threads.
#[derive(Debug)]
pub struct MemoryProbe {
    buffer: AlignedBytes,
    pool: Pool,
    sums: Vec<u64>,
}

impl MemoryProbe {
    /// `bytes` bytes, to be read by `threads` threads.
    pub fn new(threads: usize, bytes: usize) -> Self {
        let mut buffer = AlignedBytes::zeroed(bytes);
        buffer.iter_mut().step_by(4096).for_each(|byte| *byte = 1); // pages that were never written are all the same one
        Self { sums: vec![0; bytes.div_ceil(PIECE)], buffer, pool: Pool::new(threads) }
    }

    /// Reads all of it; returns the bytes read.
    pub fn read(&mut self) -> u64 {
        let buffer = &self.buffer;
        self.pool.chunks(&mut self.sums, 1, |piece, _, sum| {
            let piece = &buffer[piece * PIECE..buffer.len().min((piece + 1) * PIECE)];
            sum[0] = sum_words(bytemuck::cast_slice(&piece[..piece.len() / 64 * 64]));
        });
        std::hint::black_box(&self.sums);
        buffer.len() as u64
    }
}

per_instruction_set! {
    fn sum_words(words: &[u64]) -> u64, sum_words_body
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn sum_words_body(words: &[u64]) -> u64 {
    words.iter().fold(0, |sum: u64, word| sum.wrapping_add(*word))
}

/// A panel and a tile of tokens that stay in the nearest cache.
#[derive(Debug)]
pub struct KernelProbe {
    kernels: &'static Kernels,
    precision: Precision,
    weights: Vec<u8>,
    operand: Operand,
    pool: Pool,
    results: Vec<[f32; RESULTS]>,
}

const PROBE_COLUMNS: usize = 512;
const PROBE_TILE: Tile = Tile { first: 0, rows: 32 };
const RESULTS: usize = PANELS_MAX * PROBE_TILE.rows * 16;
const REPEATS: usize = 50;

impl KernelProbe {
    /// For packed weights of `precision`.
    pub fn new(kernels: &'static Kernels, precision: Precision, threads: usize) -> Self {
        let mut pool = Pool::new(threads);
        let weights = vec![0x11; precision.matrix_bytes(16 * PANELS_MAX, PROBE_COLUMNS)];
        let x = vec![0.5; PROBE_COLUMNS];
        let matrix = Matrix::new(&weights, precision, 16 * PANELS_MAX, PROBE_COLUMNS);
        let mut operand = Operand::with_capacity(PROBE_TILE.rows, PROBE_COLUMNS, matrix.forms());
        operand.fill(&mut pool, PROBE_COLUMNS, matrix.forms(), &[PROBE_TILE], |_| Vector::alone(&x));
        Self { kernels, precision, weights, operand, pool, results: vec![[0.0; RESULTS]; threads * 4] }
    }

    /// Multiplies for a while; returns the operations (a multiplication and an addition are two).
    pub fn multiply(&mut self) -> u64 {
        let Self { kernels, precision, weights, operand, pool, results } = self;
        let matrix = Matrix::new(weights, *precision, 16 * PANELS_MAX, PROBE_COLUMNS);
        pool.chunks(results, 1, |_, _, out| {
            for _ in 0..REPEATS {
                matrix.times(kernels, 0..PANELS_MAX, operand, PROBE_TILE, &mut out[0], RESULTS / PANELS_MAX);
            }
        });
        (self.results.len() * REPEATS * 2 * 16 * PROBE_COLUMNS * PROBE_TILE.rows * PANELS_MAX) as u64
    }
}

/// What a decode step of one sequence must read and multiply, but for keys and values.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TokenCost {
    /// Bytes of weights.
    pub bytes: u64,
    /// Multiplications by weights.
    pub multiplications: u64,
}

impl TokenCost {
    /// Counts them: all of the trunk but the embeddings (of which one row), and top-k experts of each layer.
    pub fn of(manifest: &ModelManifest) -> Self {
        let (part, decoder) = (manifest.text(), manifest.decoder());
        let (mut bytes, mut multiplications) = (0, 0);
        for (tensor, spec) in part.trunk.iter().zip(&decoder.tensors()) {
            if spec.role != TensorRole::Embedding || decoder.head == Head::Embedding {
                bytes += tensor.blob.length;
                multiplications += if spec.shape.len() > 1 { spec.shape.iter().product() } else { 0 };
            }
        }
        let experts = decoder.moe_layers().count() as u64 * u64::from(decoder.experts_per_token());
        let shape = decoder.expert_shape(Precision::F32);
        // As many bytes as an expert has on average, where precisions are mixed.
        let all: u64 = part.experts.iter().map(|expert| expert.blob.length).sum();
        bytes += experts * all / (part.experts.len() as u64).max(1);
        multiplications += experts * 3 * (shape.hidden_size * shape.intermediate_size) as u64;
        Self { bytes, multiplications }
    }
}
