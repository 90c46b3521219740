//! Keys and values of the tokens seen so far, by layer, in pieces that are added as a sequence grows.
//!
//! Keys lie 16 tokens to a block, number by number, so that scores have a lane for each key; values lie token by token.

use std::fmt;
use std::str::FromStr;

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use protocol::Decoder;

use crate::kernels::math::{per_instruction_set, widen_f16};

/// Tokens of a piece; attention sums piece by piece.
pub(crate) const PIECE: usize = 256;
/// Tokens of a block.
pub(crate) const BLOCK: usize = 16;
/// Numbers that share a scale at `q8`.
const GROUP: usize = 32;

/// The number format of keys and values.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum KvPrecision {
    /// As computed.
    F32,
    /// IEEE 754 half.
    #[default]
    F16,
    /// Integers of 8 bits, with a scale for each 32 of them.
    Q8,
}

impl KvPrecision {
    const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Q8];

    /// The word people type.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Q8 => "q8",
        }
    }
}

impl fmt::Display for KvPrecision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for KvPrecision {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|p| p.name() == text)
            .ok_or_else(|| format!("unknown precision of keys and values {text} (known: f32, f16, q8)"))
    }
}

/// What attention looks back on.
#[derive(Debug)]
pub(crate) struct KvCache {
    layers: Vec<Vec<Piece>>,
    shape: Shape,
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    precision: KvPrecision,
    heads: usize,
    head_dim: usize,
    padded: usize, // head_dim in whole vectors
}

#[derive(Debug)]
struct Piece {
    keys: Numbers,   // (heads, blocks, padded head_dim, 16)
    values: Numbers, // (heads, tokens, padded head_dim)
}

/// Keys or values as they are stored.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Stored<'a> {
    F32(&'a [f32]),
    F16(&'a [u16]),
}

#[derive(Debug)]
enum Numbers {
    F32(Vec<f32>),
    F16(Vec<u16>),
    Q8 { numbers: Vec<i8>, scales: Vec<f32> },
}

impl KvCache {
    pub(crate) fn new(decoder: &Decoder, precision: KvPrecision) -> Self {
        let attention = decoder.attention();
        let head_dim = attention.head_dim as usize;
        let shape = Shape { precision, heads: attention.kv_heads as usize, head_dim, padded: head_dim.next_multiple_of(BLOCK) };
        Self { layers: (0..decoder.layers()).map(|_| Vec::new()).collect(), shape }
    }

    /// Bytes that `tokens` tokens take.
    pub(crate) fn bytes(decoder: &Decoder, precision: KvPrecision, tokens: usize) -> u64 {
        let attention = decoder.attention();
        let padded = (attention.head_dim as usize).next_multiple_of(BLOCK);
        let one = match precision {
            KvPrecision::F32 => 4 * padded,
            KvPrecision::F16 => 2 * padded,
            KvPrecision::Q8 => padded + 4 * padded.div_ceil(GROUP),
        };
        let per_token = decoder.layers() as usize * attention.kv_heads as usize * 2 * one;
        (per_token * tokens.next_multiple_of(PIECE)) as u64
    }

    /// Bytes of the pieces there are.
    pub(crate) fn allocated_bytes(&self) -> u64 {
        let bytes = |numbers: &Numbers| match numbers {
            Numbers::F32(all) => 4 * all.len(),
            Numbers::F16(all) => 2 * all.len(),
            Numbers::Q8 { numbers, scales } => numbers.len() + 4 * scales.len(),
        };
        self.layers.iter().flatten().map(|piece| (bytes(&piece.keys) + bytes(&piece.values)) as u64).sum()
    }

    /// Makes room for `tokens` tokens in all.
    pub(crate) fn reserve(&mut self, tokens: usize) {
        let Shape { precision, heads, padded, .. } = self.shape;
        let numbers = || {
            let count = heads * PIECE * padded;
            match precision {
                KvPrecision::F32 => Numbers::F32(vec![0.0; count]),
                KvPrecision::F16 => Numbers::F16(vec![0; count]),
                KvPrecision::Q8 => Numbers::Q8 { numbers: vec![0; count], scales: vec![0.0; heads * PIECE * padded.div_ceil(GROUP)] },
            }
        };
        for layer in &mut self.layers {
            while layer.len() * PIECE < tokens {
                layer.push(Piece { keys: numbers(), values: numbers() });
            }
        }
    }

    /// Puts the key and value of the token at `position`, each (heads × head_dim); there must be room.
    pub(crate) fn put(&mut self, layer: usize, position: usize, key: &[f32], value: &[f32]) {
        let Shape { head_dim, padded, .. } = self.shape;
        let piece = &mut self.layers[layer][position / PIECE];
        let (token, groups) = (position % PIECE, padded.div_ceil(GROUP));
        let (block, lane) = (token / BLOCK, token % BLOCK);
        for (head, (key, value)) in key.chunks_exact(head_dim).zip(value.chunks_exact(head_dim)).enumerate() {
            let keys_at = (head * PIECE / BLOCK + block) * padded * BLOCK;
            let values_at = (head * PIECE + token) * padded;
            match &mut piece.keys {
                Numbers::F32(all) => {
                    for (i, &x) in key.iter().enumerate() {
                        all[keys_at + i * BLOCK + lane] = x;
                    }
                }
                Numbers::F16(all) => {
                    let mut halves = [f16::ZERO; GROUP];
                    for (g, group) in key.chunks(GROUP).enumerate() {
                        halves[..group.len()].convert_from_f32_slice(group);
                        for (i, half) in halves[..group.len()].iter().enumerate() {
                            all[keys_at + (g * GROUP + i) * BLOCK + lane] = half.to_bits();
                        }
                    }
                }
                Numbers::Q8 { numbers, scales } => {
                    let scales_at = (head * PIECE / BLOCK + block) * groups * BLOCK;
                    for (g, group) in key.chunks(GROUP).enumerate() {
                        let (scale, inverse) = scale_of(group);
                        scales[scales_at + g * BLOCK + lane] = scale;
                        for (i, &x) in group.iter().enumerate() {
                            numbers[keys_at + (g * GROUP + i) * BLOCK + lane] = (x * inverse).round_ties_even() as i8;
                        }
                    }
                }
            }
            match &mut piece.values {
                Numbers::F32(all) => all[values_at..][..head_dim].copy_from_slice(value),
                Numbers::F16(all) => all[values_at..][..head_dim].reinterpret_cast_mut::<f16>().convert_from_f32_slice(value),
                Numbers::Q8 { numbers, scales } => {
                    for (g, group) in value.chunks(GROUP).enumerate() {
                        let (scale, inverse) = scale_of(group);
                        scales[(head * PIECE + token) * groups + g] = scale;
                        for (i, &x) in group.iter().enumerate() {
                            numbers[values_at + g * GROUP + i] = (x * inverse).round_ties_even() as i8;
                        }
                    }
                }
            }
        }
    }

    /// The keys of a piece for one head, (blocks, padded head_dim, 16), as they are stored; none where they must be scaled first.
    pub(crate) fn keys(&self, layer: usize, piece: usize, head: usize) -> Option<Stored<'_>> {
        self.layers[layer][piece].keys.of_head(head, self.shape)
    }

    /// The values of a piece for one head, (256, padded head_dim), as they are stored; none where they must be scaled first.
    pub(crate) fn values(&self, layer: usize, piece: usize, head: usize) -> Option<Stored<'_>> {
        self.layers[layer][piece].values.of_head(head, self.shape)
    }

    /// Writes the keys of a block of a piece for one head: (padded head_dim, 16).
    pub(crate) fn widen_keys(&self, layer: usize, piece: usize, head: usize, block: usize, out: &mut [f32]) {
        let Shape { padded, .. } = self.shape;
        let place = (head * PIECE / BLOCK + block) * padded * BLOCK;
        match &self.layers[layer][piece].keys {
            Numbers::F32(all) => out.copy_from_slice(&all[place..][..padded * BLOCK]),
            Numbers::F16(all) => widen_f16(&all[place..][..padded * BLOCK], out),
            Numbers::Q8 { numbers, scales } => {
                let groups = padded.div_ceil(GROUP);
                let scales = &scales[(head * PIECE / BLOCK + block) * groups * BLOCK..][..groups * BLOCK];
                scale_lanes(&numbers[place..][..padded * BLOCK], scales, out);
            }
        }
    }

    /// Writes the values of a block of a piece for one head: (16, padded head_dim).
    pub(crate) fn widen_values(&self, layer: usize, piece: usize, head: usize, block: usize, out: &mut [f32]) {
        let Shape { padded, .. } = self.shape;
        let token = head * PIECE + block * BLOCK;
        match &self.layers[layer][piece].values {
            Numbers::F32(all) => out.copy_from_slice(&all[token * padded..][..padded * BLOCK]),
            Numbers::F16(all) => widen_f16(&all[token * padded..][..padded * BLOCK], out),
            Numbers::Q8 { numbers, scales } => {
                let groups = padded.div_ceil(GROUP);
                scale_rows(&numbers[token * padded..][..padded * BLOCK], &scales[token * groups..][..groups * BLOCK], padded, out);
            }
        }
    }
}

impl<'a> Stored<'a> {
    /// Those from one on.
    pub(crate) fn from(self, at: usize) -> Stored<'a> {
        match self {
            Self::F32(all) => Self::F32(&all[at..]),
            Self::F16(all) => Self::F16(&all[at..]),
        }
    }

    pub(crate) fn len(self) -> usize {
        match self {
            Self::F32(all) => all.len(),
            Self::F16(all) => all.len(),
        }
    }
}

impl Numbers {
    fn of_head(&self, head: usize, Shape { padded, .. }: Shape) -> Option<Stored<'_>> {
        let here = head * PIECE * padded..(head + 1) * PIECE * padded;
        match self {
            Self::F32(all) => Some(Stored::F32(&all[here])),
            Self::F16(all) => Some(Stored::F16(&all[here])),
            Self::Q8 { .. } => None,
        }
    }
}

/// The scale of a group and its inverse, as for activations.
fn scale_of(group: &[f32]) -> (f32, f32) {
    let magnitude = group.iter().fold(0.0, |max: f32, x| max.max(x.abs()));
    if magnitude < f32::from_bits((127 - 100) << 23) { (0.0, 0.0) } else { (magnitude / 127.0, 127.0 / magnitude) }
}

per_instruction_set! {
    fn scale_lanes(numbers: &[i8], scales: &[f32], out: &mut [f32]) -> (), scale_lanes_body
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn scale_lanes_body(numbers: &[i8], scales: &[f32], out: &mut [f32]) {
    let groups = numbers.chunks(GROUP * BLOCK).zip(out.chunks_mut(GROUP * BLOCK)).zip(scales.as_chunks::<BLOCK>().0);
    for ((numbers, out), scales) in groups {
        for (numbers, out) in numbers.as_chunks::<BLOCK>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
            for i in 0..BLOCK {
                out[i] = f32::from(numbers[i]) * scales[i];
            }
        }
    }
}

per_instruction_set! {
    fn scale_rows(numbers: &[i8], scales: &[f32], padded: usize, out: &mut [f32]) -> (), scale_rows_body
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn scale_rows_body(numbers: &[i8], scales: &[f32], padded: usize, out: &mut [f32]) {
    let rows = numbers.chunks_exact(padded).zip(out.chunks_exact_mut(padded)).zip(scales.chunks_exact(padded.div_ceil(GROUP)));
    for ((numbers, out), scales) in rows {
        for ((numbers, out), scale) in numbers.chunks(GROUP).zip(out.chunks_mut(GROUP)).zip(scales) {
            numbers.iter().zip(out).for_each(|(&n, out)| *out = f32::from(n) * scale);
        }
    }
}
