//! The feed-forward half of a layer: routed experts, or one dense network.

use crate::activation_log::{ActivationLog, TokenPlace};
use crate::experts::{Experts, ExpertsError, Present};
use crate::kernels::math::{add_weighted, sigmoid};
use crate::kernels::{Forms, Kernels, Operand, PANELS_MAX, Rows, TILE_MAX, Tile, Vector, panels_at_a_time, project, tiles};
use crate::layer_inputs::LayerInputs;
use crate::model::{DenseWeights, LayerFeedForward, Model, SharedWeights};
use crate::moments::{LayerMoments, push_weighted};
use crate::pool::Pool;
use crate::router::{Choice, route};
use crate::swiglu::gate_and_up;
use crate::weights::Weight;
use crate::work_sizes::WorkSizes;
use protocol::decoder::Router;
use protocol::precision::PANEL_ROWS;
use protocol::profile::Modality;
use protocol::{Decoder, ExpertSlot};

/// Experts of a prefill that are in use at a time.
const WAVE: usize = 32;
/// Tokens of a pass, at most, whose next experts are guessed: more want most of them anyway.
pub(crate) const LOOKING_AHEAD: usize = 4;
/// Tokens that are routed by a thread at a time.
const ROUTED: usize = 16;

/// The memory that this half works in.
#[derive(Debug)]
pub(crate) struct MoeWork {
    /// All tokens, for the router, for the experts, or for a dense network.
    tokens: Operand,
    logits: Rows,
    scratch: Vec<Scratch>, // by thread
    choices: Vec<Choice>,  // (tokens, k)
    /// Tokens by expert, ascending, each with its weight.
    assigned: Vec<(u32, f32)>,
    /// Where each expert's begin in `assigned`; one more at the end.
    starts: Vec<u32>,
    wanted: Vec<u32>,
    /// What the next layer will probably want.
    prefetch: Vec<u32>,
    present: Vec<Option<Present>>,
    jobs: Vec<Job>,
    tiles: Vec<Tile>,
    operand: Operand,
    middle: Vec<f32>,
    middle_operand: Operand,
    /// What the shared expert makes of all tokens, and how much of it each takes; no room where there is none.
    shared_out: Rows,
    shared_weight: Rows,
    shared_weights: Vec<(u32, f32)>,
}

/// What a thread needs to work.
#[derive(Debug)]
struct Scratch {
    probabilities: Vec<f32>,
    /// Products of some panels with a tile.
    results: Vec<f32>,
}

impl Scratch {
    const RESULTS: usize = PANELS_MAX * TILE_MAX * PANEL_ROWS;

    fn new(experts: usize) -> Self {
        Self { probabilities: vec![0.0; experts], results: vec![0.0; Self::RESULTS] }
    }
}

/// An expert of a wave, and its share of the buffers.
#[derive(Clone, Copy, Debug)]
struct Job {
    /// Its rows among those of the wave.
    first: usize,
    rows: usize,
    /// Its tiles.
    tiles_from: usize,
    tiles_to: usize,
}

impl MoeWork {
    pub(crate) fn new(sizes: &WorkSizes) -> Self {
        let (assigned, middle) = (sizes.assigned, Self::middle(sizes));
        Self {
            tokens: Operand::with_capacity(sizes.rows(), sizes.hidden(), sizes.trunk_forms().or(sizes.expert_forms)),
            logits: Rows::with_capacity(sizes.rows(), sizes.experts),
            scratch: (0..sizes.threads()).map(|_| Scratch::new(sizes.experts)).collect(),
            choices: vec![Choice::default(); assigned],
            assigned: vec![(0, 0.0); assigned],
            starts: vec![0; sizes.experts + 1],
            wanted: Vec::with_capacity(sizes.experts),
            prefetch: Vec::with_capacity(sizes.experts),
            present: Vec::with_capacity(WAVE),
            jobs: Vec::with_capacity(WAVE),
            tiles: Vec::with_capacity(assigned),
            operand: Operand::with_capacity(assigned, sizes.hidden(), sizes.expert_forms),
            middle: vec![0.0; middle],
            middle_operand: Operand::for_either(Self::middle_shapes(sizes)),
            shared_out: Rows::with_capacity(if sizes.shared { sizes.rows() } else { 0 }, sizes.hidden()),
            shared_weight: Rows::with_capacity(if sizes.shared { sizes.rows() } else { 0 }, 1),
            shared_weights: Vec::with_capacity(if sizes.shared { sizes.rows() } else { 0 }),
        }
    }

    /// Prepares for a pass through the layers of a model.
    pub(crate) fn begin(&mut self, decoder: &Decoder) {
        self.logits.reshape(0, decoder.experts() as usize);
        self.shared_out.reshape(0, decoder.hidden_size as usize);
    }

    /// What the middle of a layer's networks is: that of the experts, and that of a dense or shared one.
    fn middle_shapes(sizes: &WorkSizes) -> [(usize, usize, Forms); 2] {
        [(sizes.assigned, sizes.intermediate, sizes.expert_forms), (sizes.rows(), sizes.dense, sizes.trunk_forms())]
    }

    fn middle(sizes: &WorkSizes) -> usize {
        let padded = |width: usize| width.next_multiple_of(PANEL_ROWS);
        (sizes.assigned * padded(sizes.intermediate)).max(sizes.rows() * padded(sizes.dense))
    }

    /// Bytes that all this takes.
    pub(crate) fn bytes(sizes: &WorkSizes) -> u64 {
        let rows = Operand::bytes(sizes.rows(), sizes.hidden(), sizes.trunk_forms().or(sizes.expert_forms))
            + Rows::bytes(sizes.rows(), sizes.experts);
        let routing = (sizes.assigned * 24 + sizes.experts * 16) as u64;
        let experts =
            Operand::bytes(sizes.assigned, sizes.hidden(), sizes.expert_forms) + Operand::bytes_for_either(Self::middle_shapes(sizes));
        let scratch = (sizes.threads() * (sizes.experts + Scratch::RESULTS) * 4) as u64;
        let shared = if sizes.shared {
            Rows::bytes(sizes.rows(), sizes.hidden()) + Rows::bytes(sizes.rows(), 1) + 8 * sizes.rows() as u64
        } else {
            0
        };
        rows + routing + experts + scratch + shared + 4 * Self::middle(sizes) as u64
    }
}

/// Each row's token and its place.
pub(crate) type TokenPlaces<'a> = &'a dyn Fn(usize) -> TokenPlace;

/// An expert whose results are left out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LeftOut {
    /// Which.
    pub slot: ExpertSlot,
    /// For tokens of this modality alone, or for all.
    pub modality: Option<Modality>,
}

impl From<ExpertSlot> for LeftOut {
    fn from(slot: ExpertSlot) -> Self {
        Self { slot, modality: None }
    }
}

/// Who watches a pass, or interferes with it.
pub(crate) struct Watch<'a> {
    /// Where routing is noted down.
    pub(crate) log: Option<(&'a mut ActivationLog, TokenPlaces<'a>)>,
    /// Experts whose results are left out.
    pub(crate) left_out: &'a [LeftOut],
    /// By modality: results with less weight are left out, too.
    pub(crate) weight_min: [f32; 3],
    /// What each row stands for.
    pub(crate) modalities: &'a [Modality],
    /// Where what goes through the experts is summed up.
    pub(crate) moments: Option<&'a mut LayerMoments>,
}

/// Writes the feed-forward output of layer `number` for `x`, cut into `token_tiles`, to `out`.
#[expect(clippy::too_many_arguments, reason = "an engine's parts, lent one by one")]
pub(crate) fn feed_forward(
    pool: &mut Pool,
    kernels: &Kernels,
    model: &Model,
    number: usize,
    (x, token_tiles): (&Rows, &[Tile]),
    experts: &mut Experts,
    work: &mut MoeWork,
    out: &mut Rows,
    watch: Watch<'_>,
) -> Result<(), ExpertsError> {
    let (data, tokens) = (x.data(), x.tokens());
    match &model.layers[number].feed_forward {
        LayerFeedForward::Dense(weights) => {
            work.tokens.fill(pool, x.width(), weights.forms(), token_tiles, |row| Vector::of(data, tokens, 0, row));
            work.dense(pool, kernels, weights, token_tiles, out);
            Ok(())
        }
        LayerFeedForward::Moe { router, shared } => {
            let router = router.view();
            let forms = router.forms().or(model.expert_forms).or(shared.as_ref().map(SharedWeights::forms).unwrap_or_default());
            work.tokens.fill(pool, x.width(), forms, token_tiles, |row| Vector::of(data, tokens, 0, row));
            work.logits.resize(tokens);
            project(pool, kernels, &[router], &work.tokens, token_tiles, &mut work.logits);
            let left_out = |row: usize, choice: &Choice| {
                let slot = ExpertSlot { part: model.part, layer: number as u32, expert: choice.expert };
                let of_row = |modality| modality == watch.modalities[row];
                choice.weight < watch.weight_min[watch.modalities[row] as usize]
                    || watch.left_out.iter().any(|one| one.slot == slot && one.modality.is_none_or(of_row))
            };
            if work.route(pool, model, tokens, left_out).is_err() {
                return Err(ExpertsError::Router { layer: number as u32 });
            }
            if let Some((log, place)) = watch.log {
                let k = model.decoder().experts_per_token() as usize;
                for (row, choices) in work.choices[..tokens * k].chunks_exact(k).enumerate() {
                    log.record(place(row), number as u32, choices);
                }
            }
            work.mix(pool, kernels, model, number as u32, token_tiles, experts, out, watch.moments.map(|moments| (moments, x)))?;
            if let Some(shared) = shared {
                work.add_shared(pool, kernels, shared, token_tiles, out);
            }
            Ok(())
        }
    }
}

/// Guesses what the layer after `number` will want, by letting its router see what this one sees: `x` is that, as the next would norm it.
pub(crate) fn predict(
    pool: &mut Pool,
    kernels: &Kernels,
    model: &Model,
    number: usize,
    (x, token_tiles): (&Rows, &[Tile]),
    work: &mut MoeWork,
) {
    let [LayerFeedForward::Moe { .. }, LayerFeedForward::Moe { router, .. }] =
        [number, number + 1].map(|layer| &model.layers[layer].feed_forward)
    else {
        return;
    };
    let (router, data, tokens) = (router.view(), x.data(), x.tokens());
    work.tokens.fill(pool, x.width(), router.forms(), token_tiles, |row| Vector::of(data, tokens, 0, row));
    work.logits.resize(tokens);
    project(pool, kernels, &[router], &work.tokens, token_tiles, &mut work.logits);
    // What this guess cannot say, the layer itself will.
    if work.route(pool, model, tokens, |_, _| false).is_ok() {
        std::mem::swap(&mut work.wanted, &mut work.prefetch);
    }
}

/// A router's output that is no number.
struct RouterNotFinite;

impl MoeWork {
    /// Writes what a network makes of the tokens, which have been taken in, to `out`.
    fn dense(&mut self, pool: &mut Pool, kernels: &Kernels, weights: &DenseWeights, token_tiles: &[Tile], out: &mut Rows) {
        let [gate, up, down] = [&weights.gate, &weights.up, &weights.down].map(Weight::view);
        let (panels, tokens) = (gate.panels(), out.tokens());
        let middle = &mut self.middle[..panels * tokens * PANEL_ROWS];
        let operand = &self.tokens;
        let at_a_time = panels_at_a_time(panels, pool.threads());
        pool.chunks_with(middle, at_a_time * tokens * PANEL_ROWS, &mut self.scratch, |chunk, scratch, out| {
            gate_and_up(kernels, [gate, up], (operand, token_tiles), (0, tokens), chunk * at_a_time, &mut scratch.results, out);
        });
        let middle = &self.middle;
        self.middle_operand.fill(pool, weights.width(), down.forms(), token_tiles, |row| Vector::of(middle, tokens, 0, row));
        project(pool, kernels, &[down], &self.middle_operand, token_tiles, out);
    }

    /// Adds what the shared expert makes of the tokens, behind all others, each token's times its weight.
    fn add_shared(&mut self, pool: &mut Pool, kernels: &Kernels, shared: &SharedWeights, token_tiles: &[Tile], out: &mut Rows) {
        let tokens = out.tokens();
        self.shared_weight.resize(tokens);
        project(pool, kernels, &[shared.weight.view()], &self.tokens, token_tiles, &mut self.shared_weight);
        let weight = |token: usize| {
            let mut weight = [0.0];
            self.shared_weight.copy_token(token, 0, &mut weight);
            (token as u32, sigmoid(weight[0]))
        };
        self.shared_weights.clear();
        self.shared_weights.extend((0..tokens).map(weight));
        let mut made = std::mem::take(&mut self.shared_out);
        made.resize(tokens);
        self.dense(pool, kernels, &shared.network, token_tiles, &mut made);
        let (weights, stride) = (&self.shared_weights, tokens * PANEL_ROWS);
        let made_panels = made.data();
        pool.chunks(out.data_mut(), stride, |panel, _, out| add_weighted(out, weights, &made_panels[panel * stride..][..stride]));
        self.shared_out = made;
    }

    /// Chooses each token's experts and lists the tokens of each expert; those that are left out weigh nothing. Fails where a router's output is
    /// no number: with such weights, some experts would be chosen all the same.
    fn route(
        &mut self,
        pool: &mut Pool,
        model: &Model,
        tokens: usize,
        left_out: impl Fn(usize, &Choice) -> bool,
    ) -> Result<(), RouterNotFinite> {
        let moe = model.decoder().moe().expect("a router chooses among experts");
        let (k, experts, Router::Softmax { normalise }) = (moe.per_token as usize, moe.experts as usize, moe.router);
        let logits = &self.logits;
        let choices = &mut self.choices[..tokens * k];
        pool.chunks_with(choices, ROUTED * k, &mut self.scratch, |chunk, scratch, choices| {
            for (i, choices) in choices.chunks_exact_mut(k).enumerate() {
                let probabilities = &mut scratch.probabilities[..experts];
                logits.copy_token(chunk * ROUTED + i, 0, probabilities);
                // Asked here: softmax makes some number of what is none.
                let is_finite = probabilities.iter().all(|logit| logit.is_finite());
                route(probabilities, normalise, choices);
                if !is_finite {
                    choices[0].weight = f32::NAN;
                }
            }
        });
        if choices.iter().any(|choice| !choice.weight.is_finite()) {
            return Err(RouterNotFinite);
        }
        // A counting sort keeps tokens in order.
        self.starts.fill(0);
        for choice in &*choices {
            self.starts[choice.expert as usize + 1] += 1;
        }
        self.wanted.clear();
        for expert in 0..experts {
            if self.starts[expert + 1] > 0 {
                self.wanted.push(expert as u32);
            }
            self.starts[expert + 1] += self.starts[expert];
        }
        for (token, choices) in choices.chunks_exact(k).enumerate() {
            for choice in choices {
                let place = &mut self.starts[choice.expert as usize];
                let weight = if left_out(token, choice) { 0.0 } else { choice.weight };
                self.assigned[*place as usize] = (token as u32, weight);
                *place += 1;
            }
        }
        self.starts.copy_within(0..experts, 1);
        self.starts[0] = 0;
        Ok(())
    }

    /// Runs each needed expert once, on all of its tokens, and adds results up by expert, ascending, whichever came first.
    #[expect(clippy::too_many_arguments, reason = "an engine's parts, lent one by one")]
    fn mix(
        &mut self,
        pool: &mut Pool,
        kernels: &Kernels,
        model: &Model,
        layer: u32,
        token_tiles: &[Tile],
        experts: &mut Experts,
        out: &mut Rows,
        mut moments: Option<(&mut LayerMoments, &Rows)>,
    ) -> Result<(), ExpertsError> {
        out.data_mut().fill(0.0);
        let wave = WAVE.min(experts.capacity() / 2).max(model.decoder().experts_per_token() as usize);
        for from in (0..self.wanted.len()).step_by(wave) {
            let to = (from + wave).min(self.wanted.len());
            let inputs = LayerInputs { tokens: &self.tokens, token_tiles, assigned: &self.assigned, starts: &self.starts };
            experts.gather(layer, &self.wanted[from..to], &inputs, &mut self.present);
            if !self.prefetch.is_empty() {
                experts.prefetch(layer + 1, &self.prefetch);
                self.prefetch.clear();
            }
            self.take_in(pool, model, (from, to), token_tiles);
            if self.present.iter().any(Option::is_some) {
                self.first_half(pool, kernels, model, None);
            }
            let missing = self.present.iter().filter(|expert| expert.is_none()).count();
            for _ in 0..missing {
                let (number, present) = experts.receive()?;
                let job = self.wanted[from..to].binary_search(&number).expect("only what was asked for comes");
                let here = matches!(present, Present::Here(_));
                self.present[job] = Some(present);
                if here {
                    self.first_half(pool, kernels, model, Some(job));
                }
            }
            if let Some((moments, x)) = &mut moments {
                self.add_moments(model, &self.wanted[from..to], x, moments);
            }
            self.second_half(pool, kernels, model, from, out);
            self.present.clear();
        }
        Ok(())
    }

    /// Gathers the tokens of a wave of experts.
    fn take_in(&mut self, pool: &mut Pool, model: &Model, (from, to): (usize, usize), token_tiles: &[Tile]) {
        self.jobs.clear();
        self.tiles.clear();
        let base = self.starts[self.wanted[from] as usize];
        for &expert in &self.wanted[from..to] {
            let (start, end) = (self.starts[expert as usize], self.starts[expert as usize + 1]);
            let (first, rows, tiles_from) = ((start - base) as usize, (end - start) as usize, self.tiles.len());
            self.tiles.extend(tiles(first, rows));
            self.jobs.push(Job { first, rows, tiles_from, tiles_to: self.tiles.len() });
        }
        let assigned = &self.assigned[base as usize..];
        let source = |row: usize| assigned[row].0 as usize;
        self.operand.gather(pool, &self.tokens, token_tiles, &self.tiles, model.expert_forms, source);
    }

    /// Computes silu(gate) × up for the experts that are present, or for one of them.
    fn first_half(&mut self, pool: &mut Pool, kernels: &Kernels, model: &Model, only: Option<usize>) {
        let panels = model.expert_width().div_ceil(PANEL_ROWS);
        let wanted = only.map_or(0..self.jobs.len(), |job| job..job + 1);
        let count = wanted.len();
        let at_a_time = panels_at_a_time(panels * count, pool.threads()).min(panels);
        let per_job = panels.div_ceil(at_a_time);
        let Self { jobs, present, operand, middle, tiles, scratch, .. } = self;
        let range = |task: usize| {
            let (job, chunk) = (jobs[wanted.start + task / per_job], task % per_job);
            let start = (job.first * panels + chunk * at_a_time * job.rows) * PANEL_ROWS;
            start..(job.first * panels + ((chunk + 1) * at_a_time).min(panels) * job.rows) * PANEL_ROWS
        };
        pool.parts_with(middle, count * per_job, range, scratch, |task, scratch, out| {
            let (number, chunk) = (wanted.start + task / per_job, task % per_job);
            let Some(Present::Here(expert)) = &present[number] else { return };
            let job = jobs[number];
            let [gate, up, _] = expert.matrices();
            let tiles = &tiles[job.tiles_from..job.tiles_to];
            gate_and_up(kernels, [gate, up], (operand, tiles), (job.first, job.rows), chunk * at_a_time, &mut scratch.results, out);
        });
    }

    /// Sums up what the experts of a wave, all of them here, were given, and what they made of it.
    fn add_moments(&self, model: &Model, wanted: &[u32], x: &Rows, moments: &mut LayerMoments) {
        let columns = model.expert_width();
        let panels = columns.div_ceil(PANEL_ROWS);
        let base = self.starts[wanted[0] as usize] as usize;
        moments.add_experts(wanted, |job, inputs, middles| {
            let job = self.jobs[job];
            let middle = &self.middle[job.first * panels * PANEL_ROWS..][..job.rows * panels * PANEL_ROWS];
            for (row, &(token, weight)) in self.assigned[base + job.first..][..job.rows].iter().enumerate() {
                push_weighted(Vector::of(x.data(), x.tokens(), 0, token as usize), x.width(), weight, inputs);
                push_weighted(Vector::of(middle, job.rows, 0, row), columns, weight, middles);
            }
        });
    }

    /// Computes down · middle for all experts of a wave, and adds it to `out`, weighted.
    fn second_half(&mut self, pool: &mut Pool, kernels: &Kernels, model: &Model, from: usize, out: &mut Rows) {
        let columns = model.expert_width();
        let panels = columns.div_ceil(PANEL_ROWS);
        let Self { jobs, present, middle, middle_operand, tiles, assigned, wanted, starts, scratch, .. } = self;
        let middle = &middle[..];
        let base = starts[wanted[from] as usize] as usize;
        let assigned = &assigned[base..];
        let job_of = |row: usize| jobs[jobs.partition_point(|job| job.first + job.rows <= row)];
        // Of experts that ran elsewhere, what is in the middle is of no use, and used by nobody.
        middle_operand.fill(pool, columns, model.expert_forms, tiles, |row| {
            let job = job_of(row);
            Vector::of(&middle[job.first * panels * PANEL_ROWS..][..job.rows * panels * PANEL_ROWS], job.rows, 0, row - job.first)
        });
        let tokens = out.tokens();
        let at_a_time = panels_at_a_time(out.panels(), pool.threads());
        let stride = tokens * PANEL_ROWS;
        pool.chunks_with(out.data_mut(), at_a_time * stride, scratch, |chunk, scratch, out| {
            for (job, present) in jobs.iter().zip(&*present) {
                let assigned = &assigned[job.first..][..job.rows];
                for (number, out) in out.chunks_mut(PANELS_MAX * stride).enumerate() {
                    let first = chunk * at_a_time + number * PANELS_MAX;
                    let panels = first..first + out.len() / stride;
                    match present.as_ref().expect("all have come") {
                        Present::Here(expert) => {
                            let [_, _, down] = expert.matrices();
                            for &tile in &tiles[job.tiles_from..job.tiles_to] {
                                let of_panel = tile.rows * PANEL_ROWS;
                                down.times(kernels, panels.clone(), middle_operand, tile, &mut scratch.results, of_panel);
                                let assigned = &assigned[tile.first - job.first..][..tile.rows];
                                for (results, out) in scratch.results.chunks_exact(of_panel).zip(out.chunks_exact_mut(stride)) {
                                    add_weighted(out, assigned, results);
                                }
                            }
                        }
                        Present::Computed(results) => {
                            let results = results.panels(panels).chunks_exact(job.rows * PANEL_ROWS);
                            results.zip(out.chunks_exact_mut(stride)).for_each(|(results, out)| add_weighted(out, assigned, results));
                        }
                    }
                }
            }
        });
    }
}
