//! Brings together the experts that a layer needs, from memory or from the source, and counts where they were.

use std::collections::VecDeque;
use std::sync::Arc;

use protocol::expert_blob::ExpertBlobError;
use protocol::{ExpertSlot, ModelManifest};

use crate::aligned::AlignedBytes;
use crate::cache_policy::PolicyKind;
use crate::expert::Expert;
use crate::expert_cache::ExpertCache;
use crate::expert_runner::ExpertResults;
use crate::expert_source::{Arrival, Brought, ExpertRequest, ExpertSource, Gain, LayerInputs, Origin, SourceError};
use crate::worth::Worth;

/// Where the experts of a run were when the model first needed each of them, and how often they had to be brought.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ExpertUse {
    /// Distinct slots that were needed.
    pub needed: usize,
    /// In memory already.
    pub ram: usize,
    /// In this node's store.
    pub disk: usize,
    /// Brought from a peer while the model waited.
    pub fetched: usize,
    /// Bytes of those.
    pub bytes_fetched: u64,
    /// Run at a peer.
    pub remote: usize,
    /// Uses of an expert that were run at peers, each time counted.
    pub remote_uses: u64,
    /// Rows of activations that experts at peers worked on, each time counted.
    pub remote_rows: u64,
    /// Experts that came into memory because they ran elsewhere often.
    pub moved_in: u64,
    /// Uses of an expert by a layer, each time counted.
    pub uses: u64,
    /// Those that memory could serve.
    pub hits: u64,
    /// Bytes read from the store for the others.
    pub bytes_read: u64,
    /// Experts that were asked for before their layer's turn, …
    pub foreseen: u64,
    /// … and how many of them the layer then wanted.
    pub foreseen_used: u64,
    /// Experts of which peers were told before their layer's turn, …
    pub foretold: u64,
    /// … and how many of them the layer then had to ask for.
    pub foretold_used: u64,
}

/// Where an expert was when a layer wanted it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Whence {
    /// In memory.
    #[default]
    Memory,
    /// In this node's store.
    Disk,
    /// At a peer, which ran it.
    Remote,
    /// At a peer, which sent it.
    Fetched,
}

impl Whence {
    /// Whether it was on this node.
    pub fn is_here(self) -> bool {
        matches!(self, Self::Memory | Self::Disk)
    }
}

/// Guesses on their way at a time, at most.
const GUESSES_MAX: usize = 16;
/// After so many guesses, looking ahead ends unless half of them were right.
const GUESSES_TRIED: u64 = 256;
/// Experts that move in at a time.
const MOVES_MAX: usize = 2;

/// How guesses fared.
#[derive(Clone, Copy, Debug, Default)]
struct Guesses {
    tried: u64,
    right: u64,
}

impl Guesses {
    fn pay(self) -> bool {
        self.tried < GUESSES_TRIED || 2 * self.right >= self.tried
    }
}

/// An expert that a layer needs, or what it would make of the layer's rows.
#[derive(Clone, Debug)]
pub(crate) enum Present {
    /// It is in memory.
    Here(Arc<Expert>),
    /// It has run elsewhere.
    Computed(Arc<ExpertResults>),
}

/// Whether an expert has been asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Coming {
    /// It has not, or it came and was used.
    No,
    /// On its way on a guess.
    Guessed,
    /// It came on a guess, and has not been used.
    Foreseen,
    /// On its way, and the layer at work waits for it.
    Wanted,
}

/// Memory and source of experts, for one model.
pub struct Experts {
    manifest: Arc<ModelManifest>,
    cache: ExpertCache,
    source: Box<dyn ExpertSource>,
    usage: ExpertUse,
    seen: Vec<bool>,
    /// By slot, where it was when it was last wanted.
    whence: Vec<Whence>,
    /// By layer, the number of its first slot; dense layers have none.
    first_slots: Vec<usize>,
    /// By slot.
    coming: Vec<Coming>,
    /// Requested and not yet received.
    outstanding: usize,
    /// Of those, guesses.
    guesses: usize,
    /// Whether anything was missing in this pass, and in the one before.
    missed: [bool; 2],
    /// Guesses at what to read, and at what to tell peers of.
    near: Guesses,
    far: Guesses,
    /// By slot, whether peers were told that it will be wanted.
    told: Vec<bool>,
    worth: Worth,
    /// Whether what is missing may run elsewhere: then memory is for what is used most, and else for what was used last.
    elsewhere: bool,
    /// Slots of experts that somebody waited for and that are used less than others: forgotten first, the oldest in front.
    passing: VecDeque<usize>,
    /// By slot, whether the weights are on their way while it runs elsewhere.
    moving: Vec<bool>,
    moves: usize,
}

impl std::fmt::Debug for Experts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "experts of {} slots, {:?}", self.seen.len(), self.cache)
    }
}

/// Why a layer did not get its experts.
#[derive(Debug, thiserror::Error)]
pub enum ExpertsError {
    /// The source could not bring them.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// What came is no expert of this model.
    #[error("{slot}")]
    Expert {
        /// What was asked for.
        slot: ExpertSlot,
        /// What is wrong with what came.
        source: ExpertBlobError,
    },
    /// Which experts to run cannot be told.
    #[error("the router of layer {layer} makes what is no number; the model's weights are damaged")]
    Router {
        /// The layer.
        layer: u32,
    },
}

impl Experts {
    /// Experts of the model of `manifest`, of which `bytes_max` bytes may stay in memory.
    pub fn new(manifest: Arc<ModelManifest>, bytes_max: u64, policy: PolicyKind, source: Box<dyn ExpertSource>) -> Self {
        let config = &manifest.config;
        let mut slots = 0;
        let first_slots = (0..config.num_hidden_layers)
            .map(|layer| {
                let first = slots;
                slots += if config.is_moe(layer) { config.num_experts as usize } else { 0 };
                first
            })
            .collect();
        let bytes = config.expert_shape(manifest.expert_precision).blob_bytes();
        let cache = ExpertCache::new(slots, bytes, bytes_max, policy);
        Self {
            cache,
            source,
            usage: ExpertUse::default(),
            seen: vec![false; slots],
            whence: vec![Whence::default(); slots],
            first_slots,
            coming: vec![Coming::No; slots],
            outstanding: 0,
            guesses: 0,
            missed: [false; 2],
            near: Guesses::default(),
            far: Guesses::default(),
            told: vec![false; slots],
            worth: Worth::new(slots),
            elsewhere: false,
            passing: VecDeque::new(),
            moving: vec![false; slots],
            moves: 0,
            manifest,
        }
    }

    /// What has been counted since the last [`start_counting`](Self::start_counting).
    pub fn usage(&self) -> ExpertUse {
        self.usage
    }

    /// Starts a new count; what is in memory stays there.
    pub fn start_counting(&mut self) {
        self.usage = ExpertUse::default();
        self.seen.fill(false);
    }

    /// Where the expert at a place was when a layer last wanted it; the places are those of the model's slots, layer by layer.
    pub fn whence(&self, place: usize) -> Whence {
        self.whence[place]
    }

    /// Whether the expert at a place is in memory.
    pub fn is_in_memory(&self, place: usize) -> bool {
        self.cache.contains(place)
    }

    /// Bytes of experts in memory.
    pub fn bytes(&self) -> u64 {
        self.cache.bytes()
    }

    /// Experts that may be in use at a time without exceeding the limit.
    pub(crate) fn capacity(&self) -> usize {
        self.cache.capacity()
    }

    /// Notes that a pass through the layers begins.
    pub(crate) fn begin_pass(&mut self) {
        self.missed = [false, self.missed[0]];
    }

    /// Whether a guess at what later layers will want is of use: something was missing lately, and guesses have been good so far.
    pub(crate) fn looks_ahead(&self) -> bool {
        self.missed.contains(&true) && (self.near.pay() || self.far.pay())
    }

    /// Begins to bring those of `experts`, which `layer` will probably want, that are near and not in memory, and tells peers of the others.
    pub(crate) fn foresee(&mut self, layer: u32, experts: &[u32]) {
        let mut far = Vec::new();
        for &expert in experts {
            let number = self.first_slots[layer as usize] + expert as usize;
            let slot = ExpertSlot { layer, expert };
            let blob = self.manifest.expert(slot).expect("the router chooses among the layer's experts");
            if self.cache.contains(number) || matches!(self.coming[number], Coming::Guessed | Coming::Wanted) {
                continue;
            }
            if !self.source.is_near(&blob) {
                if self.far.pay() && !std::mem::replace(&mut self.told[number], true) {
                    far.push(blob);
                }
                continue;
            }
            if !self.near.pay() || self.guesses >= GUESSES_MAX.min(self.cache.capacity() / 4) {
                continue;
            }
            self.coming[number] = Coming::Guessed;
            self.guesses += 1;
            self.outstanding += 1;
            self.usage.foreseen += 1;
            self.near.tried += 1;
            let buffer = self.buffer();
            self.source.foresee(vec![ExpertRequest { slot, blob, buffer }]);
        }
        if !far.is_empty() {
            self.usage.foretold += far.len() as u64;
            self.far.tried += far.len() as u64;
            self.source.foretell(&far);
        }
    }

    /// Looks for the experts `wanted` of `layer`: those in memory are put into `present` (in the order wanted), the others are
    /// requested, unless they are on their way. Each must then be received, or all given up by `cancel`.
    pub(crate) fn gather(&mut self, layer: u32, wanted: &[u32], inputs: &LayerInputs<'_>, present: &mut Vec<Option<Present>>) {
        present.clear();
        let mut missing = Vec::new(); // allocates only when something is
        for &expert in wanted {
            let number = self.first_slots[layer as usize] + expert as usize;
            let found = self.cache.get(number);
            self.worth.used(number);
            let told = std::mem::take(&mut self.told[number]);
            self.usage.uses += 1;
            if found.is_some() && self.coming[number] == Coming::Foreseen {
                // In memory, but it had to be brought, as it would have been without looking ahead.
                self.coming[number] = Coming::No;
                self.right();
                self.used(number, Whence::Disk, |usage| usage.disk += 1);
            } else if found.is_some() {
                self.usage.hits += 1;
                self.used(number, Whence::Memory, |usage| usage.ram += 1);
            } else {
                if self.coming[number] == Coming::Guessed {
                    self.guesses -= 1;
                    self.right();
                } else {
                    let slot = ExpertSlot { layer, expert };
                    self.usage.foretold_used += u64::from(told);
                    self.far.right += u64::from(told);
                    missing.push((slot, self.manifest.expert(slot).expect("the router chooses among the layer's experts")));
                }
                self.coming[number] = Coming::Wanted;
                self.missed[0] = true;
            }
            present.push(found.map(Present::Here));
        }
        if !missing.is_empty() {
            self.outstanding += missing.len();
            let requests = missing.into_iter().map(|(slot, blob)| ExpertRequest { slot, blob, buffer: self.buffer() }).collect();
            self.source.request(requests, inputs);
        }
    }

    fn right(&mut self) {
        self.usage.foreseen_used += 1;
        self.near.right += 1;
    }

    /// Waits for one of those that the layer lacks.
    pub(crate) fn receive(&mut self) -> Result<(u32, Present), ExpertsError> {
        loop {
            let Arrival { slot, buffer, brought } = self.source.receive()?;
            let number = self.first_slots[slot.layer as usize] + slot.expert as usize;
            let coming = self.coming[number];
            let present = match brought {
                Brought::MovedIn(origin) => {
                    self.moved_in(slot, number, buffer, origin)?;
                    continue;
                }
                Brought::Weights(origin) => {
                    self.came(number);
                    Present::Here(self.weights(slot, buffer, (origin, coming))?)
                }
                Brought::Results(results) => {
                    self.came(number);
                    self.cache.give_back(buffer);
                    self.elsewhere = true;
                    self.usage.remote_uses += 1;
                    self.usage.remote_rows += results.rows() as u64;
                    self.used(number, Whence::Remote, |usage| usage.remote += 1);
                    self.move_in_if_worth(slot, number);
                    Present::Computed(Arc::new(results))
                }
            };
            if coming == Coming::Wanted {
                return Ok((slot.expert, present));
            }
            self.guesses -= 1;
            self.coming[number] = Coming::Foreseen;
        }
    }

    /// Notes that nothing of an expert is on its way any more.
    fn came(&mut self, number: usize) {
        self.outstanding -= 1;
        self.coming[number] = Coming::No;
    }

    /// Takes in an expert's weights.
    fn weights(&mut self, slot: ExpertSlot, bytes: AlignedBytes, (origin, coming): (Origin, Coming)) -> Result<Arc<Expert>, ExpertsError> {
        let number = self.first_slots[slot.layer as usize] + slot.expert as usize;
        let length = bytes.len() as u64;
        let expert = self.verified(slot, bytes)?;
        match origin {
            Origin::Disk if coming == Coming::Guessed => self.usage.bytes_read += length,
            Origin::Disk => {
                self.usage.bytes_read += length;
                self.used(number, Whence::Disk, |usage| usage.disk += 1);
            }
            Origin::Peer => self.used(number, Whence::Fetched, |usage| {
                usage.fetched += 1;
                usage.bytes_fetched += length;
            }),
        }
        self.cache.insert(number, Arc::clone(&expert));
        if self.elsewhere && !self.worth.is_high(number, self.cache.capacity()) {
            self.passing.push_back(number);
        }
        Ok(expert)
    }

    fn verified(&mut self, slot: ExpertSlot, bytes: AlignedBytes) -> Result<Arc<Expert>, ExpertsError> {
        let shape = self.manifest.config.expert_shape(self.manifest.expert_precision);
        Expert::from_verified(bytes, shape).map(Arc::new).map_err(|source| {
            self.cache.lost();
            ExpertsError::Expert { slot, source }
        })
    }

    /// Has an expert brought that has just run elsewhere, if it is used more than the one that it would displace.
    fn move_in_if_worth(&mut self, slot: ExpertSlot, number: usize) {
        if self.moving[number] || self.cache.contains(number) || self.moves >= MOVES_MAX.min(self.cache.capacity() / 4) {
            return;
        }
        let leaving = self.leaving();
        if !self.worth.is_worth(number, leaving, self.cache.capacity()) {
            return;
        }
        let (gain, buffer) = match leaving.and_then(|leaving| self.cache.take_from(leaving)) {
            Some(buffer) => (Gain::Displaces, buffer),
            None => (Gain::Fills, self.cache.buffer()),
        };
        let blob = self.manifest.expert(slot).expect("it was asked for before");
        self.moving[number] = true;
        self.moves += 1;
        self.source.move_in(ExpertRequest { slot, blob, buffer }, gain);
    }

    /// The expert that is forgotten for another where memory is for what is used most: one in passing, or the one used least.
    fn leaving(&mut self) -> Option<usize> {
        if self.cache.has_room() {
            return None;
        }
        while let Some(&slot) = self.passing.front() {
            if self.cache.contains(slot) && !self.worth.is_high(slot, self.cache.capacity()) {
                if self.cache.is_idle(slot) {
                    return Some(slot);
                }
                break;
            }
            self.passing.pop_front(); // gone, or come to stay
        }
        self.worth.least(self.cache.idle())
    }

    fn buffer(&mut self) -> AlignedBytes {
        let leaving = if self.elsewhere && !self.cache.has_spare() { self.leaving() } else { None };
        leaving.and_then(|leaving| self.cache.take_from(leaving)).unwrap_or_else(|| self.cache.buffer())
    }

    fn moved_in(&mut self, slot: ExpertSlot, number: usize, bytes: AlignedBytes, origin: Option<Origin>) -> Result<(), ExpertsError> {
        self.moves -= 1;
        self.moving[number] = false;
        let length = bytes.len() as u64;
        match origin {
            Some(origin) if !self.cache.contains(number) => {
                let expert = self.verified(slot, bytes)?;
                self.cache.insert(number, expert);
                self.usage.moved_in += 1;
                match origin {
                    Origin::Disk => self.usage.bytes_read += length,
                    Origin::Peer => self.usage.bytes_fetched += length,
                }
            }
            // It could not be had, or somebody could not wait for it.
            _ => self.cache.give_back(bytes),
        }
        Ok(())
    }

    /// Gives up what was requested and has not come.
    pub(crate) fn cancel(&mut self) {
        self.source.cancel();
        self.coming.fill(Coming::No);
        self.moving.fill(false);
        self.guesses = 0;
        for _ in 0..std::mem::take(&mut self.outstanding) + std::mem::take(&mut self.moves) {
            self.cache.lost();
        }
    }

    /// Notes where a wanted expert was; `count` counts its first use.
    fn used(&mut self, number: usize, whence: Whence, count: impl FnOnce(&mut ExpertUse)) {
        self.whence[number] = whence;
        if !std::mem::replace(&mut self.seen[number], true) {
            self.usage.needed += 1;
            count(&mut self.usage);
        }
    }
}
