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

/// What attention is in all layers of a model.
#[derive(Debug)]
pub(crate) struct Attention {
    heads: Heads,
    eps: f32,
    rope: RopeFrequencies,
}

impl Attention {
    pub(crate) fn new(decoder: &Decoder) -> Self {
        let attention = decoder.attention();
        Self { heads: heads(attention), eps: decoder.runs[0].norm.eps() as f32, rope: RopeFrequencies::new(attention) }
    }
}

/// The memory that attention works in, and what the rows of a pass share in all layers.
#[derive(Debug)]
pub(crate) struct GqaWork {
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
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct GqaSizes {
    pub(crate) rows: usize,
    pub(crate) threads: usize,
    pub(crate) hidden: usize,
    pub(crate) forms: Forms,
    /// Numbers of all queries of a row; of all its keys.
    query: usize,
    kv: usize,
    /// Numbers of partial results.
    pub(crate) partials: usize,
    scratch: attention::ScratchSizes,
}

impl GqaSizes {
    pub(crate) fn new(decoder: &Decoder, (rows, threads, context): (usize, usize, usize), forms: Forms) -> Self {
        let (hidden, heads) = (decoder.hidden_size as usize, heads(decoder.attention()));
        Self {
            rows,
            threads,
            hidden,
            forms,
            query: heads.query_width(),
            kv: heads.kv_width(),
            partials: attention::partial_numbers_max(rows, context, heads),
            scratch: attention::ScratchSizes::new(heads),
        }
    }

    /// Sizes that serve both.
    pub(crate) fn max(&self, other: &Self) -> Self {
        Self {
            rows: self.rows.max(other.rows),
            threads: self.threads.max(other.threads),
            hidden: self.hidden.max(other.hidden),
            forms: self.forms.or(other.forms),
            query: self.query.max(other.query),
            kv: self.kv.max(other.kv),
            partials: self.partials.max(other.partials),
            scratch: self.scratch.max(other.scratch),
        }
    }

    /// The same for other numbers of rows and of partial results.
    pub(crate) fn of_rows(&self, rows: usize, partials: usize) -> Self {
        Self { rows, partials, ..*self }
    }

    fn widest(&self) -> usize {
        self.hidden.max(self.query)
    }

    /// Bytes of all buffers.
    pub(crate) fn bytes(&self) -> u64 {
        let numbers = self.rows * (2 * self.query + self.kv + self.scratch.padded) + self.partials;
        let scratch = self.threads as u64 * self.scratch.bytes();
        let qkv = Rows::bytes(self.rows, qkv_width(self.query, self.kv));
        qkv + 4 * numbers as u64 + scratch + Operand::bytes(self.rows, self.widest(), self.forms)
    }
}

/// Numbers of a row's queries, keys and values, each in whole panels.
fn qkv_width(query: usize, kv: usize) -> usize {
    query.next_multiple_of(PANEL_ROWS) + 2 * kv.next_multiple_of(PANEL_ROWS)
}

fn heads(shape: &Gqa) -> Heads {
    Heads { heads: shape.heads as usize, kv_heads: shape.kv_heads as usize, head_dim: shape.head_dim as usize }
}

impl GqaWork {
    pub(crate) fn new(sizes: &GqaSizes) -> Self {
        let GqaSizes { rows, query, kv, .. } = *sizes;
        Self {
            qkv: Rows::with_capacity(rows, qkv_width(query, kv)),
            operand: Operand::with_capacity(rows, sizes.widest(), sizes.forms),
            rotations: vec![Rotation::default(); rows],
            tasks: Vec::new(),
            turned: vec![0.0; rows * (query + kv)],
            mixed: vec![0.0; rows * query],
            partials: Vec::with_capacity(sizes.partials),
            scratch: (0..sizes.threads).map(|_| attention::Scratch::new(sizes.scratch)).collect(),
            values: vec![0.0; TURNED * kv],
        }
    }

    /// What attention mixed of the values of the last layer, (rows, heads × head_dim).
    pub(crate) fn mixed(&self, of: &Attention, rows: usize) -> &[f32] {
        &self.mixed[..rows * of.heads.query_width()]
    }

    /// Prepares for the rows of a pass, each at its position.
    pub(crate) fn begin(&mut self, of: &Attention, shares: &[Share<'_>], positions: &[Position]) {
        self.qkv.reshape(positions.len(), qkv_width(of.heads.query_width(), of.heads.kv_width()));
        attention::plan(shares, of.heads, &mut self.tasks);
        self.rotations.iter_mut().zip(positions).for_each(|(rotation, position)| of.rope.at(*position, rotation));
    }

    /// Writes what attention makes of the input to `out`, (rows, hidden_size).
    pub(crate) fn run(&mut self, of: &Attention, weights: &GqaWeights, input: MixerInput<'_, '_>, out: &mut Rows) {
        let MixerInput { pool, kernels, layer, x, tiles, shares } = input;
        let heads = of.heads;
        let (q, k, v) = (weights.q_proj.view(), weights.k_proj.view(), weights.v_proj.view());
        let (data, rows) = (x.data(), x.tokens());
        let forms = q.forms().or(k.forms()).or(v.forms());
        self.operand.fill(pool, x.width(), forms, tiles, |row| Vector::of(data, rows, 0, row));
        project(pool, kernels, &[q, k, v], &self.operand, tiles, &mut self.qkv);
        let (query, kv) = (heads.query_width(), heads.kv_width());
        let (qkv, rotations, eps) = (&self.qkv, &self.rotations, of.eps);
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
