//! Grouped-query attention: projections, norms of queries and keys, positions, keys and values, and what comes of them.

use protocol::Decoder;
use protocol::decoder::{Gqa, QkNorm, QkvBias};
use protocol::tensors::LayerTensor;

use super::attention::{self, Heads};
use super::rope::{Position, RopeFrequencies, Rotation};
use super::{MixerInput, Share};
use crate::kernels::math::{add, rms_scale};
use crate::kernels::{Forms, Operand, Rows, Vector, project};
use crate::weights::{LoadError, TrunkReader, Weight};
use protocol::precision::PANEL_ROWS;

/// Rows whose queries and keys a thread turns by their positions at a time.
const TURNED: usize = 16;

/// A layer's weights.
#[derive(Debug)]
pub(crate) struct GqaWeights {
    q_proj: Weight,                // (heads × head_dim, hidden_size)
    k_proj: Weight,                // (kv_heads × head_dim, hidden_size)
    v_proj: Weight,                // (kv_heads × head_dim, hidden_size)
    o_proj: Weight,                // (hidden_size, heads × head_dim)
    norms: Norms,                  // of queries and keys
    biases: Option<[Vec<f32>; 3]>, // of queries, keys and values
}

/// How queries and keys are normed.
#[derive(Debug)]
enum Norms {
    None,
    /// (head_dim) each
    PerHead([Vec<f32>; 2]),
    /// (heads × head_dim), (kv_heads × head_dim)
    AllHeads([Vec<f32>; 2]),
}

impl GqaWeights {
    pub(crate) fn read<E: std::error::Error>(shape: &Gqa, reader: &mut TrunkReader<'_, E>, layer: u32) -> Result<Self, LoadError<E>> {
        let [q_proj, k_proj, v_proj, o_proj] =
            [LayerTensor::Query, LayerTensor::Key, LayerTensor::Value, LayerTensor::Output].map(|tensor| reader.of_layer(layer, tensor));
        let mut vectors = |tensors: [LayerTensor; 2]| -> Result<[Vec<f32>; 2], LoadError<E>> {
            let [query, key] = tensors.map(|tensor| reader.of_layer(layer, tensor));
            Ok([query?.vector(), key?.vector()])
        };
        let norms = [LayerTensor::QueryNorm, LayerTensor::KeyNorm];
        let norms = match shape.qk_norm {
            QkNorm::None => Norms::None,
            QkNorm::PerHead => Norms::PerHead(vectors(norms)?),
            QkNorm::AllHeads => Norms::AllHeads(vectors(norms)?),
        };
        let biases = match shape.bias {
            QkvBias::None => None,
            QkvBias::Each => {
                let [query, key] = vectors([LayerTensor::QueryBias, LayerTensor::KeyBias])?;
                Some([query, key, reader.of_layer(layer, LayerTensor::ValueBias)?.vector()])
            }
        };
        Ok(Self { q_proj: q_proj?, k_proj: k_proj?, v_proj: v_proj?, o_proj: o_proj?, norms, biases })
    }
}

/// The memory that attention works in, and what the rows of a pass share in all layers.
#[derive(Debug)]
pub(crate) struct GqaWork {
    heads: Heads,
    eps: f32,
    rope: RopeFrequencies,
    qkv: Rows,
    operand: Operand,
    rotations: Vec<Rotation>,
    tasks: Vec<attention::AttentionTask>,
    turned: Vec<f32>, // (rows, heads × head_dim + kv_heads × head_dim): queries and keys with their positions
    mixed: Vec<f32>,  // (rows, heads × head_dim)
    partials: Vec<f32>,
    scratch: Vec<attention::Scratch>,
    values: Vec<f32>,
}

/// Sizes of the buffers: what they are made of, and what they are counted by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GqaSizes {
    pub(crate) rows: usize,
    pub(crate) threads: usize,
    pub(crate) context: usize,
    pub(crate) hidden: usize,
    pub(crate) forms: Forms,
    heads: Heads,
}

impl GqaSizes {
    pub(crate) fn new(decoder: &Decoder, (rows, threads, context): (usize, usize, usize), forms: Forms) -> Self {
        Self { rows, threads, context, hidden: decoder.hidden_size as usize, forms, heads: heads(decoder.attention()) }
    }

    fn kv_width(&self) -> usize {
        self.heads.kv_heads * self.heads.head_dim
    }

    fn qkv(&self) -> usize {
        let panels = |width: usize| width.next_multiple_of(PANEL_ROWS);
        panels(self.heads.query_width()) + 2 * panels(self.kv_width())
    }

    fn widest(&self) -> usize {
        self.hidden.max(self.heads.query_width())
    }

    fn partials(&self) -> usize {
        attention::partial_numbers_max(self.rows, self.context, self.heads)
    }

    /// Bytes of all buffers.
    pub(crate) fn bytes(&self) -> u64 {
        let numbers = self.rows * (2 * self.heads.query_width() + self.kv_width() + self.heads.head_dim) + self.partials();
        let scratch = self.threads as u64 * attention::Scratch::bytes(self.heads);
        Rows::bytes(self.rows, self.qkv()) + 4 * numbers as u64 + scratch + Operand::bytes(self.rows, self.widest(), self.forms)
    }
}

fn heads(shape: &Gqa) -> Heads {
    Heads { heads: shape.heads as usize, kv_heads: shape.kv_heads as usize, head_dim: shape.head_dim as usize }
}

impl GqaWork {
    pub(crate) fn new(decoder: &Decoder, sizes: &GqaSizes) -> Self {
        let (rows, heads) = (sizes.rows, sizes.heads);
        Self {
            heads,
            eps: decoder.runs[0].norm.eps() as f32,
            rope: RopeFrequencies::new(decoder.attention()),
            qkv: Rows::with_capacity(rows, sizes.qkv()),
            operand: Operand::with_capacity(rows, sizes.widest(), sizes.forms),
            rotations: vec![Rotation::default(); rows],
            tasks: Vec::new(),
            turned: vec![0.0; rows * (heads.query_width() + sizes.kv_width())],
            mixed: vec![0.0; rows * heads.query_width()],
            partials: Vec::with_capacity(sizes.partials()),
            scratch: (0..sizes.threads).map(|_| attention::Scratch::new(heads)).collect(),
            values: vec![0.0; TURNED * sizes.kv_width()],
        }
    }

    /// Prepares for the rows of a pass; `position` says where each stands.
    pub(crate) fn begin(&mut self, shares: &[Share<'_>], rows: usize, position: impl Fn(usize) -> Position) {
        self.qkv.resize(rows);
        attention::plan(shares, self.heads, &mut self.tasks);
        for (row, rotation) in self.rotations[..rows].iter_mut().enumerate() {
            self.rope.at(position(row), rotation);
        }
    }

    /// Writes what attention makes of the input to `out`, (rows, hidden_size).
    pub(crate) fn run(&mut self, weights: &GqaWeights, input: MixerInput<'_, '_>, out: &mut Rows) {
        let MixerInput { pool, kernels, layer, x, tiles, shares } = input;
        let heads = self.heads;
        let (q, k, v) = (weights.q_proj.view(), weights.k_proj.view(), weights.v_proj.view());
        let (data, rows) = (x.data(), x.tokens());
        let forms = q.forms().or(k.forms()).or(v.forms());
        self.operand.fill(pool, x.width(), forms, tiles, |row| Vector::of(data, rows, 0, row));
        project(pool, kernels, &[q, k, v], &self.operand, tiles, &mut self.qkv);
        let (query, kv) = (heads.query_width(), heads.kv_heads * heads.head_dim);
        let (qkv, rotations, eps) = (&self.qkv, &self.rotations, self.eps);
        let width = query + kv;
        pool.chunks(&mut self.turned[..rows * width], TURNED * width, |chunk, _, out| {
            qkv.copy_tokens(chunk * TURNED, 0, query, out, width);
            qkv.copy_tokens(chunk * TURNED, q.panels(), kv, &mut out[query..], width);
            for (i, out) in out.chunks_exact_mut(width).enumerate() {
                let (queries, keys) = out.split_at_mut(query);
                if let Some([query_bias, key_bias, _]) = &weights.biases {
                    add(queries, query_bias);
                    add(keys, key_bias);
                }
                let rotation = &rotations[chunk * TURNED + i];
                weights.norms.apply([queries, keys], heads.head_dim, eps);
                queries.chunks_exact_mut(heads.head_dim).chain(keys.chunks_exact_mut(heads.head_dim)).for_each(|head| rotation.apply(head));
            }
        });
        for share in shares.iter_mut() {
            for from in (0..share.rows).step_by(TURNED) {
                let count = TURNED.min(share.rows - from);
                let values = &mut self.values[..count * kv];
                self.qkv.copy_tokens(share.first + from, q.panels() + k.panels(), kv, values, kv);
                for (i, value) in values.chunks_exact_mut(kv).enumerate() {
                    if let Some([_, _, bias]) = &weights.biases {
                        add(value, bias);
                    }
                    let key = &self.turned[(share.first + from + i) * width + query..][..kv];
                    share.session.cache_mut().put(layer, share.past + from + i, key, value);
                }
            }
        }
        self.partials.resize(attention::partial_numbers(&self.tasks, heads), 0.0);
        let mixed = &mut self.mixed[..rows * query];
        let queries = (&self.turned[..], width);
        attention::attend(pool, heads, layer, shares, &self.tasks, queries, &mut self.partials, &mut self.scratch, mixed);
        let o = weights.o_proj.view();
        let mixed = &self.mixed;
        self.operand.fill(pool, query, o.forms(), tiles, |row| Vector::alone(&mixed[row * query..][..query]));
        project(pool, kernels, &[o], &self.operand, tiles, out);
    }
}

impl Norms {
    fn apply(&self, vectors: [&mut [f32]; 2], head_dim: usize, eps: f32) {
        match self {
            Self::None => {}
            Self::PerHead(weights) => {
                for (vector, weight) in vectors.into_iter().zip(weights) {
                    vector.chunks_exact_mut(head_dim).for_each(|head| norm(head, weight, eps));
                }
            }
            Self::AllHeads(weights) => vectors.into_iter().zip(weights).for_each(|(vector, weight)| norm(vector, weight, eps)),
        }
    }
}

/// x ÷ rms(x) × weight.
fn norm(x: &mut [f32], weight: &[f32], eps: f32) {
    let scale = rms_scale(x, eps);
    x.iter_mut().zip(weight).for_each(|(x, w)| *x = *x * scale * w);
}
