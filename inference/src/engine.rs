//! Tokens in, logits out: a model, its experts, its threads, and the memory that a forward pass works in.
//!
//! All buffers are made once. A pass takes in tokens of one or of several sequences; none changes a bit of another's results.

use protocol::manifest::TrunkTensor;
use protocol::{ExpertSlot, ModelConfig, ModelManifest};

use crate::activation_log::ActivationLog;
use crate::attention::{self, Heads, norm_and_rotate};
use crate::experts::{Experts, ExpertsError};
use crate::kernels::math::{add, norm_rows};
use crate::kernels::{Forms, Kernels, Operand, Rows, Tile, Vector, project, tiles};
use crate::kv_cache::{KvCache, KvPrecision};
use crate::model::{LayerWeights, Model};
use crate::moe_layer::{LOOKING_AHEAD, MoeWork, Places, Watch, feed_forward, foresee};
use crate::pool::Pool;
use crate::rope::{Position, Rotation};
use crate::session::Session;

/// Tokens that go through the layers together at most, unless memory is short: changes no bit.
pub const BATCH_TOKENS: usize = 512;
/// Tokens whose logits are computed together.
pub const LOGITS_TOKENS: usize = 16;

/// Tokens whose queries and keys a thread turns by their positions at a time.
const TURNED: usize = 16;

/// How an engine works; nothing here changes a result, but for the precision of keys and values.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Threads that compute.
    pub threads: usize,
    /// Kernels for packed weights.
    pub kernels: &'static Kernels,
    /// Number format of keys and values.
    pub kv: KvPrecision,
    /// Tokens that go through the layers together at most.
    pub batch_tokens: usize,
    /// Tokens of the longest sequence, prompt and answer together.
    pub context: usize,
    /// Tokens of all sequences that there will be at a time, for the plan of memory; at least the context.
    pub kv_tokens: usize,
}

impl EngineOptions {
    /// All cores, the best kernels, and the whole context of the model of `manifest`. Keys and values are halved where weights are packed.
    pub fn for_model(manifest: &ModelManifest) -> Self {
        Self {
            threads: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            kernels: Kernels::best(),
            kv: if manifest.expert_precision.is_packed() { KvPrecision::F16 } else { KvPrecision::F32 },
            batch_tokens: BATCH_TOKENS,
            context: manifest.config.max_position_embeddings as usize,
            kv_tokens: 0,
        }
    }
}

/// A model ready to run.
#[derive(Debug)]
pub struct Engine {
    model: Model,
    experts: Experts,
    pool: Pool,
    options: EngineOptions,
    work: Work,
    /// Where routing is noted down, if it is.
    pub log: Option<ActivationLog>,
    /// Experts whose results are left out, to measure what they are good for. The router does not know; nothing else is changed.
    pub left_out: Vec<ExpertSlot>,
}

/// Some tokens of one sequence.
#[derive(Debug)]
pub struct Sequence<'a> {
    /// What came before.
    pub session: &'a mut Session,
    /// What comes now.
    pub tokens: &'a [u32],
}

/// A sequence's share of a pass.
#[derive(Debug)]
pub(crate) struct Part<'a> {
    pub(crate) session: &'a mut Session,
    pub(crate) tokens: &'a [u32],
    /// Its first row in the batch.
    pub(crate) first: usize,
    /// Tokens taken in before.
    pub(crate) past: usize,
}

/// Why tokens could not be taken in. The sessions are as they were before.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// A token that the model does not have.
    #[error("token {token} is beyond the model's vocabulary of {vocab_size}")]
    Token {
        /// The token's id.
        token: u32,
        /// How many there are.
        vocab_size: u32,
    },
    /// More tokens than there is room for.
    #[error("sequence of {tokens} tokens is longer than the context of {context}")]
    Context {
        /// Tokens there would be.
        tokens: usize,
        /// The most there may be.
        context: usize,
    },
    /// An expert was not to be had.
    #[error(transparent)]
    Experts(#[from] ExpertsError),
}

impl Engine {
    /// Puts together a model and its experts.
    pub fn new(model: Model, experts: Experts, options: EngineOptions) -> Self {
        let options = EngineOptions { batch_tokens: options.batch_tokens.clamp(1, options.context.max(1)), ..options };
        let pool = Pool::new(options.threads);
        let work = Work::new(&WorkSizes::new(&model.manifest, &options, pool.threads()));
        Self { model, experts, pool, options, work, log: None, left_out: Vec::new() }
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Its experts.
    pub fn experts(&mut self) -> &mut Experts {
        &mut self.experts
    }

    /// How it works.
    pub fn options(&self) -> &EngineOptions {
        &self.options
    }

    /// Bytes that trunk, experts in memory and working memory take; sequences have their own.
    pub fn bytes(&self) -> u64 {
        let trunk: u64 = self.model.manifest.trunk.iter().map(|tensor| tensor.blob.length).sum();
        let work = WorkSizes::new(&self.model.manifest, &self.options, self.pool.threads()).bytes();
        trunk + work + self.experts.bytes()
    }

    /// An empty sequence.
    pub fn session(&self) -> Session {
        Session::new(&self.model, self.options.kv)
    }

    /// Bytes that the keys and values of a sequence of `tokens` tokens take.
    pub fn session_bytes(&self, tokens: usize) -> u64 {
        KvCache::bytes(&self.model.config, self.options.kv, tokens)
    }

    /// Longest sequence, prompt and answer together, in tokens.
    pub fn context(&self) -> usize {
        self.options.context.min(self.model.context())
    }

    /// Takes in `tokens`; returns the logits after the last, (vocab_size).
    pub fn forward(&mut self, session: &mut Session, tokens: &[u32]) -> Result<&mut [f32], ForwardError> {
        self.check(session, tokens)?;
        let start = session.tokens();
        for tokens in tokens.chunks(self.options.batch_tokens) {
            self.pass(&mut [Sequence { session, tokens }]).inspect_err(|_| session.rewind(start))?;
        }
        let last = self.work.x.tokens() - 1;
        self.head(last, 1);
        Ok(self.logits(0))
    }

    /// Takes in `tokens`; `each` is told the place of each among them and the logits after it.
    pub fn forward_each<E: From<ForwardError>>(
        &mut self,
        session: &mut Session,
        tokens: &[u32],
        mut each: impl FnMut(usize, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.check(session, tokens)?;
        let start = session.tokens();
        let mut place = 0;
        for tokens in tokens.chunks(self.options.batch_tokens) {
            self.pass(&mut [Sequence { session, tokens }]).inspect_err(|_| session.rewind(start))?;
            for first in (0..tokens.len()).step_by(LOGITS_TOKENS) {
                let count = LOGITS_TOKENS.min(tokens.len() - first);
                self.head(first, count);
                for i in 0..count {
                    each(place, self.logits(i))?;
                    place += 1;
                }
            }
        }
        Ok(())
    }

    /// Takes in one token of each sequence, at most [`LOGITS_TOKENS`] sequences; [`logits`](Self::logits) has what follows each.
    pub fn decode(&mut self, sequences: &mut [Sequence<'_>]) -> Result<(), ForwardError> {
        for sequence in &*sequences {
            self.check(sequence.session, sequence.tokens)?;
        }
        assert!(sequences.len() <= LOGITS_TOKENS && sequences.iter().all(|s| s.tokens.len() == 1), "one token of each of a few sequences");
        self.pass(sequences)?;
        self.head(0, sequences.len());
        Ok(())
    }

    /// The logits of the n-th sequence or token that the head was last computed for.
    pub fn logits(&mut self, n: usize) -> &mut [f32] {
        let (vocab, logits) = (self.model.config.vocab_size as usize, &self.work.logits);
        if logits.tokens() == 1 {
            return &mut self.work.logits.data_mut()[..vocab];
        }
        logits.copy_token(n, 0, &mut self.work.one_logits);
        &mut self.work.one_logits
    }

    fn check(&self, session: &Session, tokens: &[u32]) -> Result<(), ForwardError> {
        if let Some(&token) = tokens.iter().find(|&&token| token >= self.model.config.vocab_size) {
            return Err(ForwardError::Token { token, vocab_size: self.model.config.vocab_size });
        }
        let total = session.tokens() + tokens.len();
        if total > self.context() || tokens.is_empty() {
            return Err(ForwardError::Context { tokens: total, context: self.context() });
        }
        Ok(())
    }

    /// Takes tokens through all layers; their final hidden states are then in `work.x`.
    fn pass(&mut self, sequences: &mut [Sequence<'_>]) -> Result<(), ForwardError> {
        let mut parts = Vec::with_capacity(sequences.len());
        let mut rows = 0;
        for Sequence { session, tokens } in sequences {
            let past = session.tokens();
            session.cache_mut().reserve(past + tokens.len());
            parts.push(Part { session, tokens, first: rows, past });
            rows += tokens.len();
        }
        let Self { model, experts, pool, options, work, log, left_out } = self;
        let heads = heads(&model.config);
        work.begin(model, &parts, rows);
        experts.begin_pass();
        for (number, weights) in model.layers.iter().enumerate() {
            norm_rows(pool, &work.x, &weights.input_layernorm, model.eps(), &mut work.scales, &mut work.normed);
            work.attention(pool, options.kernels, model, heads, number, weights, &mut parts);
            add(work.x.data_mut(), work.out.data());
            if let Some(next) = model.layers.get(number + 1)
                && rows <= LOOKING_AHEAD
                && experts.looks_ahead()
            {
                norm_rows(pool, &work.x, &next.post_attention_layernorm, model.eps(), &mut work.scales, &mut work.normed);
                foresee(pool, options.kernels, model, number, (&work.normed, &work.tiles), &mut work.moe);
            }
            norm_rows(pool, &work.x, &weights.post_attention_layernorm, model.eps(), &mut work.scales, &mut work.normed);
            let positions = |row: usize| {
                let part = parts.iter().rfind(|part| part.first <= row).expect("every row is of a part");
                (part.past + row - part.first, part.tokens[row - part.first])
            };
            let result = feed_forward(
                pool,
                options.kernels,
                model,
                number,
                (&work.normed, &work.tiles),
                experts,
                &mut work.moe,
                &mut work.out,
                Watch { log: log.as_mut().map(|log| (log, &positions as Places<'_>)), left_out },
            );
            if let Err(error) = result {
                experts.cancel();
                return Err(error.into());
            }
            add(work.x.data_mut(), work.out.data());
        }
        parts.iter_mut().for_each(|part| part.session.advance(part.tokens.len()));
        Ok(())
    }

    /// Computes the logits after `count` rows of the last pass.
    fn head(&mut self, first: usize, count: usize) {
        let Self { model, pool, options, work, .. } = self;
        let width = model.norm.len();
        let mut tile_list = [Tile { first: 0, rows: 0 }; LOGITS_TOKENS];
        let mut used = 0;
        for tile in tiles(0, count) {
            tile_list[used] = tile;
            used += 1;
        }
        let tile_list = &tile_list[..used];
        work.head_x.resize(count);
        for i in 0..count {
            work.x.copy_token(first + i, 0, &mut work.one_x);
            work.head_x.set_token(i, &work.one_x);
        }
        norm_rows(pool, &work.head_x, &model.norm, model.eps(), &mut work.scales, &mut work.head_normed);
        let head = model.lm_head().view();
        let (data, tokens) = (work.head_normed.data(), work.head_normed.tokens());
        work.operand.fill(pool, width, head.forms(), tile_list, |row| Vector::of(data, tokens, 0, row));
        work.logits.resize(count);
        project(pool, options.kernels, &[head], &work.operand, tile_list, &mut work.logits);
    }
}

fn heads(config: &ModelConfig) -> Heads {
    Heads { heads: config.num_attention_heads as usize, kv_heads: config.num_key_value_heads as usize, head_dim: config.head_dim as usize }
}

/// Sizes of all buffers of an engine: what they are made of, and what they are counted by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WorkSizes {
    rows: usize,
    threads: usize,
    hidden: usize,
    vocab: usize,
    heads: Heads,
    context: usize,
    qkv: usize,
    trunk: Forms,
    pub(crate) assigned: usize,
    pub(crate) experts: usize,
    pub(crate) intermediate: usize,
    pub(crate) dense: usize,
    pub(crate) expert_forms: Forms,
}

impl WorkSizes {
    pub(crate) fn new(manifest: &ModelManifest, options: &EngineOptions, threads: usize) -> Self {
        let config = &manifest.config;
        let heads = heads(config);
        let rows = options.batch_tokens.clamp(1, options.context.max(1)).max(1);
        let per_token = config.num_experts_per_tok as usize;
        let panels = |width: usize| width.next_multiple_of(16);
        let forms = |tensor: &TrunkTensor| Forms::of(tensor.precision);
        Self {
            rows,
            threads,
            hidden: config.hidden_size as usize,
            vocab: config.vocab_size as usize,
            heads,
            context: options.context,
            qkv: panels(heads.query_width()) + 2 * panels(heads.kv_heads * heads.head_dim),
            trunk: manifest.trunk.iter().map(forms).fold(Forms { plain: true, packed: false }, Forms::or),
            assigned: rows * per_token,
            experts: config.num_experts as usize,
            intermediate: config.moe_intermediate_size as usize,
            dense: config.intermediate_size as usize,
            expert_forms: Forms::of(manifest.expert_precision),
        }
    }

    fn widest(&self) -> usize {
        self.hidden.max(self.heads.query_width())
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    pub(crate) fn hidden(&self) -> usize {
        self.hidden
    }

    pub(crate) fn trunk_forms(&self) -> Forms {
        self.trunk
    }

    fn partials(&self) -> usize {
        attention::partial_numbers_max(self.rows, self.context, self.heads)
    }

    /// Bytes of all buffers.
    pub(crate) fn bytes(&self) -> u64 {
        let head_rows = LOGITS_TOKENS.min(self.rows.max(1));
        let rows = 3 * Rows::bytes(self.rows, self.hidden) + Rows::bytes(self.rows, self.qkv) + 2 * Rows::bytes(head_rows, self.hidden);
        let logits = Rows::bytes(head_rows, self.vocab) + 4 * self.vocab as u64;
        let attention = 4 * (self.rows * (2 * self.heads.query_width() + self.kv_width() + self.heads.head_dim) + self.partials()) as u64;
        let scratch = self.threads as u64 * attention::Scratch::bytes(self.heads);
        rows + logits + attention + scratch + Operand::bytes(self.rows, self.widest(), self.trunk) + MoeWork::bytes(self)
    }

    fn kv_width(&self) -> usize {
        self.heads.kv_heads * self.heads.head_dim
    }
}

/// The memory that a pass works in.
#[derive(Debug)]
struct Work {
    x: Rows, // (tokens, hidden_size), the residual stream
    normed: Rows,
    out: Rows,
    qkv: Rows,
    scales: Vec<f32>,
    operand: Operand,
    tiles: Vec<Tile>,
    rotations: Vec<Rotation>,
    tasks: Vec<attention::Task>,
    turned: Vec<f32>, // (tokens, heads × head_dim + kv_heads × head_dim): queries and keys with their positions
    mixed: Vec<f32>,  // (tokens, heads × head_dim)
    partials: Vec<f32>,
    scratch: Vec<attention::Scratch>,
    values: Vec<f32>,
    moe: MoeWork,
    head_x: Rows,
    head_normed: Rows,
    logits: Rows,
    one_x: Vec<f32>,
    one_logits: Vec<f32>,
}

impl Work {
    fn new(sizes: &WorkSizes) -> Self {
        let rows = sizes.rows;
        let head_rows = LOGITS_TOKENS.min(rows);
        Self {
            x: Rows::with_capacity(rows, sizes.hidden),
            normed: Rows::with_capacity(rows, sizes.hidden),
            out: Rows::with_capacity(rows, sizes.hidden),
            qkv: Rows::with_capacity(rows, sizes.qkv),
            scales: Vec::with_capacity(rows),
            operand: Operand::with_capacity(rows, sizes.widest(), sizes.trunk),
            tiles: Vec::with_capacity(rows),
            rotations: vec![Rotation::default(); rows],
            tasks: Vec::new(),
            turned: vec![0.0; rows * (sizes.heads.query_width() + sizes.kv_width())],
            mixed: vec![0.0; rows * sizes.heads.query_width()],
            partials: Vec::with_capacity(sizes.partials()),
            scratch: (0..sizes.threads).map(|_| attention::Scratch::new(sizes.heads)).collect(),
            values: vec![0.0; TURNED * sizes.kv_width()],
            moe: MoeWork::new(sizes),
            head_x: Rows::with_capacity(head_rows, sizes.hidden),
            head_normed: Rows::with_capacity(head_rows, sizes.hidden),
            logits: Rows::with_capacity(head_rows, sizes.vocab),
            one_x: vec![0.0; sizes.hidden],
            one_logits: vec![0.0; sizes.vocab],
        }
    }

    /// Prepares for the tokens of a pass: embeddings, positions, tasks.
    fn begin(&mut self, model: &Model, parts: &[Part<'_>], rows: usize) {
        self.x.resize(rows);
        self.out.resize(rows);
        self.qkv.resize(rows);
        self.tiles.clear();
        self.tiles.extend(tiles(0, rows));
        attention::plan(parts, heads(&model.config), &mut self.tasks);
        for part in parts {
            for (i, &token) in part.tokens.iter().enumerate() {
                model.embed_tokens.view().row(token as usize, &mut self.one_x);
                self.x.set_token(part.first + i, &self.one_x);
                model.rope.at(Position::of_text(part.past + i), &mut self.rotations[part.first + i]);
            }
        }
    }

    /// From `normed` to `out`.
    #[expect(clippy::too_many_arguments, reason = "an engine's parts, lent one by one")]
    fn attention(
        &mut self,
        pool: &mut Pool,
        kernels: &Kernels,
        model: &Model,
        heads: Heads,
        layer: usize,
        weights: &LayerWeights,
        parts: &mut [Part<'_>],
    ) {
        let (q, k, v) = (weights.q_proj.view(), weights.k_proj.view(), weights.v_proj.view());
        let (data, rows) = (self.normed.data(), self.normed.tokens());
        let forms = q.forms().or(k.forms()).or(v.forms());
        self.operand.fill(pool, model.config.hidden_size as usize, forms, &self.tiles, |row| Vector::of(data, rows, 0, row));
        project(pool, kernels, &[q, k, v], &self.operand, &self.tiles, &mut self.qkv);
        let (query, kv) = (heads.query_width(), heads.kv_heads * heads.head_dim);
        let (qkv, rotations, eps) = (&self.qkv, &self.rotations, model.eps());
        let width = query + kv;
        pool.chunks(&mut self.turned[..rows * width], TURNED * width, |chunk, _, out| {
            qkv.copy_tokens(chunk * TURNED, 0, query, out, width);
            qkv.copy_tokens(chunk * TURNED, q.panels(), kv, &mut out[query..], width);
            for (i, out) in out.chunks_exact_mut(width).enumerate() {
                let (queries, keys) = out.split_at_mut(query);
                let rotation = &rotations[chunk * TURNED + i];
                norm_and_rotate(queries, weights.q_norm.as_deref(), heads.head_dim, eps, rotation);
                norm_and_rotate(keys, weights.k_norm.as_deref(), heads.head_dim, eps, rotation);
            }
        });
        for part in parts.iter_mut() {
            for from in (0..part.tokens.len()).step_by(TURNED) {
                let count = TURNED.min(part.tokens.len() - from);
                let values = &mut self.values[..count * kv];
                self.qkv.copy_tokens(part.first + from, q.panels() + k.panels(), kv, values, kv);
                for (i, value) in values.chunks_exact(kv).enumerate() {
                    let key = &self.turned[(part.first + from + i) * width + query..][..kv];
                    part.session.cache_mut().put(layer, part.past + from + i, key, value);
                }
            }
        }
        self.partials.resize(attention::partial_numbers(&self.tasks, heads), 0.0);
        let mixed = &mut self.mixed[..rows * query];
        let queries = (&self.turned[..], width);
        attention::attend(pool, heads, layer, parts, &self.tasks, queries, &mut self.partials, &mut self.scratch, mixed);
        let o = weights.o_proj.view();
        let mixed = &self.mixed;
        self.operand.fill(pool, query, o.forms(), &self.tiles, |row| Vector::alone(&mixed[row * query..][..query]));
        project(pool, kernels, &[o], &self.operand, &self.tiles, &mut self.out);
    }
}
