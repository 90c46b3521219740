//! Passes of tokens or rows through the layers of a model.
//!
//! All buffers are made once; engines of a machine share those that no result outlasts. A pass takes in rows of one or of several
//! sequences; none changes a bit of another's results.

use std::ops::Range;

use protocol::profile::Modality;
use protocol::{ModelManifest, PartKind};

use crate::activation_log::{ActivationLog, TokenPlace};
use crate::experts::{Experts, ExpertsError};
use crate::kernels::math::{add, norm_rows};
use crate::kernels::{Kernels, Rows, Tile, Vector, project, tiles};
use crate::machine::Machine;
use crate::mixer::gqa::Attention;
use crate::mixer::kv_cache::KvCache;
pub use crate::mixer::kv_cache::KvPrecision;
pub use crate::mixer::rope::Position;
use crate::mixer::{MixerInput, Share};
use crate::model::{MixerWeights, Model};
pub use crate::moe_layer::LeftOut;
use crate::moe_layer::{LOOKING_AHEAD, TokenPlaces, Watch, feed_forward, predict};
use crate::moments::LayerMoments;
use crate::pool::Pool;
use crate::session::Session;
use crate::work::{Work, WorkShare};
pub use crate::work_sizes::LOGITS_TOKENS;
use crate::work_sizes::WorkSizes;

/// Tokens that go through the layers together at most, unless memory is short: changes no bit.
pub const BATCH_TOKENS: usize = 512;

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
            kv: if manifest.usual_precision().is_packed() { KvPrecision::F16 } else { KvPrecision::F32 },
            batch_tokens: BATCH_TOKENS,
            context: manifest.decoder().context as usize,
            kv_tokens: 0,
        }
    }

    /// Sizes of the memory that passes of a part work in.
    fn sizes(&self, manifest: &ModelManifest, part: PartKind) -> WorkSizes {
        WorkSizes::new(manifest, part, (self.batch_tokens, self.threads, self.context))
    }

    /// Bytes of memory to work in that an engine takes on a machine that may have others already.
    pub(crate) fn work_bytes(&self, manifest: &ModelManifest, part: PartKind, machine: Option<&Machine>) -> u64 {
        let sizes = self.sizes(manifest, part);
        Results::bytes(&sizes) + machine.map_or_else(|| Work::bytes(&sizes), |machine| machine.work().more_for(&sizes))
    }
}

/// A model ready to run.
#[derive(Debug)]
pub struct Engine {
    machine: Machine,
    model: Model,
    experts: Experts,
    options: EngineOptions,
    attention: Attention,
    work: WorkShare,
    results: Results,
    /// Where routing is noted down, if it is.
    pub log: Option<ActivationLog>,
    /// Experts whose results are left out, to measure what they are good for. The router does not know; nothing else is changed.
    pub left_out: Vec<LeftOut>,
    /// By [`Modality`]: results of experts that a token of it gives less weight than that are left out, too.
    pub weight_min: [f32; 3],
    /// What goes through the matrices of the layer that passes run, while somebody wants to know.
    pub(crate) moments: Option<LayerMoments>,
}

/// What a pass leaves behind.
#[derive(Debug)]
struct Results {
    x: Rows, // (rows, hidden_size), the residual stream
    logits: Rows,
    /// The rows of the pass whose logits are there, where all are wanted.
    head_first: usize,
    head_count: usize,
    one_x: Vec<f32>,
    one_logits: Vec<f32>,
}

impl Results {
    fn new(sizes: &WorkSizes) -> Self {
        Self {
            x: Rows::with_capacity(sizes.rows(), sizes.hidden()),
            logits: Rows::with_capacity(sizes.head_rows(), sizes.vocab),
            head_first: 0,
            head_count: 0,
            one_x: vec![0.0; sizes.hidden()],
            one_logits: vec![0.0; sizes.vocab],
        }
    }

    fn bytes(sizes: &WorkSizes) -> u64 {
        Rows::bytes(sizes.rows(), sizes.hidden()) + Rows::bytes(sizes.head_rows(), sizes.vocab) + 4 * sizes.vocab as u64
    }
}

/// What a sequence goes on with.
#[derive(Debug)]
pub struct Piece<'a> {
    /// What came before.
    pub session: &'a mut Session,
    /// What comes now.
    pub input: Input<'a>,
    /// Where each row stands, if not one after the other as text does.
    pub positions: Option<&'a [Position]>,
    /// Rows that stand in place of some of its tokens', ascending.
    pub overlays: &'a [Overlay<'a>],
}

/// Rows made elsewhere, of a picture or a sound, in place of the embeddings of the tokens that keep their places.
#[derive(Clone, Copy, Debug)]
pub struct Overlay<'a> {
    /// What they stand for.
    pub modality: Modality,
    /// Its first row in the piece.
    pub first: usize,
    /// (rows, hidden_size)
    pub rows: &'a [f32],
    /// What is added to the same rows behind each of the first layers, (rows, hidden_size) each.
    pub deepstack: &'a [&'a [f32]],
}

/// Rows of a piece.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// A row for each token: its embedding.
    Tokens(&'a [u32]),
    /// Rows made elsewhere, (rows, hidden_size): embeddings of a picture or a sound, or what earlier layers made of some.
    Rows(&'a [f32]),
}

impl<'a> Piece<'a> {
    /// Tokens of a text.
    pub fn tokens(session: &'a mut Session, tokens: &'a [u32]) -> Self {
        Self { session, input: Input::Tokens(tokens), positions: None, overlays: &[] }
    }
}

/// What a pass is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Want {
    /// Keys and values alone.
    Nothing,
    /// Hidden states after the last layer of the span: [`Engine::row`].
    Rows,
    /// Logits after the last row of each piece, at most [`LOGITS_TOKENS`] pieces: [`Engine::logits`] by piece.
    Last,
    /// Logits after each row of all pieces: [`Engine::logits_of`] by row.
    All,
}

/// Why rows could not be taken in. The sessions are as they were before.
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
    /// Pieces, rows, positions or layers that do not fit each other or the engine.
    #[error("a pass cannot be: {0}")]
    Shape(&'static str),
    /// An expert was not to be had.
    #[error(transparent)]
    Experts(#[from] ExpertsError),
}

impl Engine {
    /// Puts together a model and its experts, to run on `machine`, whose threads and kernels count.
    pub fn new(machine: &Machine, model: Model, experts: Experts, options: EngineOptions) -> Self {
        let (threads, kernels) = (machine.threads(), machine.kernels());
        let batch_tokens = options.batch_tokens.clamp(1, options.context.max(1));
        let options = EngineOptions { threads, kernels, batch_tokens, ..options };
        let sizes = options.sizes(&model.manifest, model.part);
        Self {
            machine: machine.clone(),
            attention: Attention::new(model.decoder()),
            work: machine.work().share(sizes),
            results: Results::new(&sizes),
            model,
            experts,
            options,
            log: None,
            left_out: Vec::new(),
            weight_min: [0.0; 3],
            moments: None,
        }
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

    /// The machine that it runs on.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Bytes of memory for what passes leave behind; what they work in is the [machine's](Machine::work_bytes).
    pub fn results_bytes(&self) -> u64 {
        Results::bytes(&self.options.sizes(&self.model.manifest, self.model.part))
    }

    /// An empty sequence.
    pub fn session(&self) -> Session {
        Session::new(self.model.decoder(), self.options.kv)
    }

    /// Bytes that the keys and values of a sequence of `tokens` tokens take.
    pub fn session_bytes(&self, tokens: usize) -> u64 {
        KvCache::bytes(self.model.decoder(), self.options.kv, tokens)
    }

    /// Longest sequence, prompt and answer together, in tokens.
    pub fn context(&self) -> usize {
        self.options.context.min(self.model.context())
    }

    /// Rows of a pass at most.
    pub fn rows_max(&self) -> usize {
        self.options.batch_tokens
    }

    /// All layers.
    pub fn all_layers(&self) -> Range<u32> {
        0..self.model.decoder().layers()
    }

    /// Takes in `tokens`, pass by pass; returns the logits after the last, (vocab_size).
    pub fn forward(&mut self, session: &mut Session, tokens: &[u32]) -> Result<&mut [f32], ForwardError> {
        self.in_passes(session, tokens, Want::Last, |_, _, _| Ok::<_, ForwardError>(()))?;
        Ok(self.logits(0))
    }

    /// Takes in `tokens`, pass by pass. Calls `each` once a token, with the token's place and the logits after it.
    pub fn forward_each<E: From<ForwardError>>(
        &mut self,
        session: &mut Session,
        tokens: &[u32],
        mut each: impl FnMut(usize, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.in_passes(session, tokens, Want::All, |engine, first, count| {
            (0..count).try_for_each(|row| each(first + row, engine.logits_of(row)))
        })
    }

    /// Takes in `tokens`, pass by pass. Calls `after` once a pass, with the place of its first row and the number of its rows. When a pass
    /// fails, the session is as it was before all of them.
    fn in_passes<E: From<ForwardError>>(
        &mut self,
        session: &mut Session,
        tokens: &[u32],
        want: Want,
        mut after: impl FnMut(&mut Self, usize, usize) -> Result<(), E>,
    ) -> Result<(), E> {
        // All of them before the first: what would fail at the end must not begin.
        self.check(&Piece::tokens(session, tokens))?;
        let (start, layers) = (session.tokens(), self.all_layers());
        let mut first = 0;
        for piece in tokens.chunks(self.options.batch_tokens) {
            let is_last = first + piece.len() == tokens.len();
            let want = if want == Want::Last && !is_last { Want::Nothing } else { want };
            if let Err(error) = self.pass(&mut [Piece::tokens(session, piece)], layers.clone(), want) {
                session.rewind(start);
                return Err(error.into());
            }
            after(self, first, piece.len())?;
            first += piece.len();
        }
        Ok(())
    }

    /// Takes the rows of all pieces through the layers of `span`, at most [`rows_max`](Self::rows_max) of them. Tokens enter at the first
    /// layer; logits come of the last.
    pub fn pass(&mut self, pieces: &mut [Piece<'_>], span: Range<u32>, want: Want) -> Result<(), ForwardError> {
        let layers = self.all_layers();
        let rows: usize = pieces.iter().map(|piece| self.rows_of(&piece.input)).sum();
        if span.is_empty() || span.end > layers.end {
            return Err(ForwardError::Shape("its span names layers that are not there"));
        }
        if rows > self.options.batch_tokens {
            return Err(ForwardError::Shape("more rows than the engine has memory for"));
        }
        if span.start > 0 && pieces.iter().any(|piece| matches!(piece.input, Input::Tokens(_))) {
            return Err(ForwardError::Shape("tokens enter at the first layer"));
        }
        if span.end < layers.end && matches!(want, Want::Last | Want::All) || want == Want::Last && pieces.len() > LOGITS_TOKENS {
            return Err(ForwardError::Shape("logits come of the last layer, for a few pieces at a time"));
        }
        for piece in &*pieces {
            self.check(piece)?;
        }
        self.through(pieces, span, rows)?;
        (self.results.head_first, self.results.head_count) = (0, 0);
        if want == Want::Last {
            let mut end = 0;
            let mut last = [0; LOGITS_TOKENS];
            for (piece, last) in pieces.iter().zip(&mut last) {
                end += self.rows_of(&piece.input);
                *last = end - 1;
            }
            self.head(&last[..pieces.len()]);
        }
        Ok(())
    }

    /// The logits after the last row of the n-th piece of the last pass, which [wanted](Want::Last) them.
    pub fn logits(&mut self, n: usize) -> &mut [f32] {
        let Results { logits, one_logits, .. } = &mut self.results;
        if logits.tokens() == 1 {
            let vocab = one_logits.len();
            return &mut logits.data_mut()[..vocab];
        }
        logits.copy_token(n, 0, one_logits);
        one_logits
    }

    /// The logits after a row of the last pass, which [wanted](Want::All) them. Cheapest row by row, ascending.
    pub fn logits_of(&mut self, row: usize) -> &mut [f32] {
        let Results { x, head_first, head_count, .. } = &self.results;
        if !(*head_first..head_first + head_count).contains(&row) {
            let count = LOGITS_TOKENS.min(x.tokens() - row);
            let rows: [usize; LOGITS_TOKENS] = std::array::from_fn(|i| row + i);
            self.head(&rows[..count]);
            (self.results.head_first, self.results.head_count) = (row, count);
        }
        self.logits(row - self.results.head_first)
    }

    /// The hidden state of a row after the last pass, (hidden_size): not normed where its span ended before the last layer or with it.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        self.results.x.copy_token(row, 0, out);
    }

    fn rows_of(&self, input: &Input<'_>) -> usize {
        match input {
            Input::Tokens(tokens) => tokens.len(),
            Input::Rows(rows) => rows.len() / self.model.decoder().hidden_size as usize,
        }
    }

    fn check(&self, piece: &Piece<'_>) -> Result<(), ForwardError> {
        let decoder = self.model.decoder();
        match piece.input {
            Input::Tokens(tokens) => {
                if let Some(&token) = tokens.iter().find(|&&token| token >= decoder.vocab_size) {
                    return Err(ForwardError::Token { token, vocab_size: decoder.vocab_size });
                }
            }
            Input::Rows(rows) if !rows.len().is_multiple_of(decoder.hidden_size as usize) => {
                return Err(ForwardError::Shape("rows are as long as hidden states"));
            }
            Input::Rows(_) => {}
        }
        let rows = self.rows_of(&piece.input);
        let hidden = decoder.hidden_size as usize;
        for Overlay { first, rows: data, deepstack, .. } in piece.overlays {
            let fits = data.len().is_multiple_of(hidden) && first.saturating_add(data.len() / hidden) <= rows;
            if !fits || deepstack.iter().any(|added| added.len() != data.len()) {
                return Err(ForwardError::Shape("rows that stand in place of others must have their places"));
            }
        }
        if piece.positions.is_some_and(|positions| positions.len() != rows) {
            return Err(ForwardError::Shape("each row has a position, or none has"));
        }
        let total = piece.session.tokens() + rows;
        if total > self.context() || rows == 0 {
            return Err(ForwardError::Context { tokens: total, context: self.context() });
        }
        Ok(())
    }

    /// Takes rows through some layers; their hidden states are then in the results' `x`.
    fn through(&mut self, pieces: &mut [Piece<'_>], span: Range<u32>, rows: usize) -> Result<(), ForwardError> {
        let Self { machine, model, experts, options, attention, work, results, log, left_out, weight_min, moments } = self;
        let Results { x, one_x, .. } = results;
        let hidden = model.decoder().hidden_size as usize;
        x.resize(rows);
        let mut places = Vec::with_capacity(rows);
        let mut shares = Vec::with_capacity(pieces.len());
        let mut tokens = Vec::with_capacity(rows); // 0 where a row is none's
        let mut modalities = vec![Modality::Text; rows];
        let mut first = 0;
        let mut added: Vec<(usize, Overlay<'_>)> = Vec::new(); // with the first row of its piece
        for Piece { session, input, positions, overlays } in pieces.iter_mut() {
            let (past, next) = (session.tokens(), session.next_position());
            let rows = match input {
                Input::Tokens(ids) => {
                    for (row, &token) in (first..).zip(*ids) {
                        model.embedding.view().row(token as usize, one_x);
                        x.set_token(row, one_x);
                    }
                    tokens.extend_from_slice(ids);
                    ids.len()
                }
                Input::Rows(data) => {
                    (first..).zip(data.chunks_exact(hidden)).for_each(|(row, data)| x.set_token(row, data));
                    tokens.resize(tokens.len() + data.len() / hidden, 0);
                    data.len() / hidden
                }
            };
            for overlay in *overlays {
                if span.start == 0 {
                    (first + overlay.first..).zip(overlay.rows.chunks_exact(hidden)).for_each(|(row, data)| x.set_token(row, data));
                }
                modalities[first + overlay.first..][..overlay.rows.len() / hidden].fill(overlay.modality);
                added.push((first, *overlay));
            }
            match positions {
                Some(positions) => places.extend_from_slice(positions),
                None => places.extend((0..rows).map(|i| Position::all(next + i as f32))),
            }
            session.cache_mut().reserve(past + rows);
            shares.push(Share { session, first, rows, past });
            first += rows;
        }
        let mut pool = machine.pool();
        let pool = &mut *pool;
        let work = &mut *work.lock(rows);
        work.begin(model.decoder(), rows);
        work.gqa.begin(attention, &shares, &places);
        experts.begin_pass();
        for number in span.start as usize..span.end as usize {
            let weights = &model.layers[number];
            norm_rows(pool, x, &weights.mixer_norm, model.eps(), &mut work.scales, &mut work.normed);
            let input =
                MixerInput { pool, kernels: options.kernels, layer: number, x: &work.normed, tiles: &work.tiles, shares: &mut shares };
            let MixerWeights::Gqa(mixer) = &weights.mixer;
            work.gqa.run(attention, mixer, input, &mut work.out);
            if let Some(moments) = moments {
                moments.add_mixer_input(&work.normed);
                moments.add_mixer_output(work.gqa.mixed(attention, rows));
            }
            add(x.data_mut(), work.out.data());
            if let Some(next) = model.layers.get(number + 1).filter(|_| number + 1 < span.end as usize)
                && rows <= LOOKING_AHEAD
                && experts.looks_ahead()
            {
                norm_rows(pool, x, &next.feed_forward_norm, model.eps(), &mut work.scales, &mut work.normed);
                predict(pool, options.kernels, model, number, (&work.normed, &work.tiles), &mut work.moe);
            }
            norm_rows(pool, x, &weights.feed_forward_norm, model.eps(), &mut work.scales, &mut work.normed);
            let place = |row: usize| {
                let share = shares.iter().rfind(|share| share.first <= row).expect("every row is of a piece");
                TokenPlace { position: share.past + row - share.first, token: tokens[row], modality: modalities[row] }
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
                Watch {
                    log: log.as_mut().map(|log| (log, &place as TokenPlaces<'_>)),
                    left_out,
                    weight_min: *weight_min,
                    modalities: &modalities,
                    moments: moments.as_mut(),
                },
            );
            if let Err(error) = result {
                experts.cancel();
                return Err(error.into());
            }
            add(x.data_mut(), work.out.data());
            for (first, overlay) in &added {
                let rows = overlay.deepstack.get(number).into_iter().flat_map(|added| added.chunks_exact(hidden));
                (first + overlay.first..).zip(rows).for_each(|(row, added)| x.add_to_token(row, added));
            }
        }
        for piece in pieces {
            let rows = match piece.input {
                Input::Tokens(tokens) => tokens.len(),
                Input::Rows(data) => data.len() / hidden,
            };
            piece.session.advance(rows, piece.positions);
        }
        Ok(())
    }

    /// Computes the logits after some rows of the last pass, [`LOGITS_TOKENS`] at most.
    fn head(&mut self, rows: &[usize]) {
        let Self { machine, model, options, work, results, .. } = self;
        let Results { x, one_x, logits, .. } = results;
        let pool: &mut Pool = &mut machine.pool();
        let work = &mut *work.lock(rows.len());
        work.begin_head(model.decoder(), rows.len());
        let mut tile_list = [Tile { first: 0, rows: 0 }; LOGITS_TOKENS];
        let mut used = 0;
        for tile in tiles(0, rows.len()) {
            tile_list[used] = tile;
            used += 1;
        }
        let tile_list = &tile_list[..used];
        for (i, &row) in rows.iter().enumerate() {
            x.copy_token(row, 0, one_x);
            work.head_x.set_token(i, one_x);
        }
        norm_rows(pool, &work.head_x, &model.final_norm, model.eps(), &mut work.scales, &mut work.head_normed);
        let head = model.head().view();
        let (data, tokens) = (work.head_normed.data(), work.head_normed.tokens());
        work.head_operand.fill(pool, work.head_normed.width(), head.forms(), tile_list, |row| Vector::of(data, tokens, 0, row));
        logits.resize(rows.len());
        project(pool, options.kernels, &[head], &work.head_operand, tile_list, logits);
    }
}
