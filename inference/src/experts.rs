//! Brings together the experts that a layer needs, from memory or from the source, and counts where they were.

use std::sync::Arc;

use protocol::expert_blob::ExpertBlobError;
use protocol::{ExpertSlot, ModelManifest};

use crate::aligned::AlignedBytes;
use crate::cache_policy::PolicyKind;
use crate::expert::Expert;
use crate::expert_cache::ExpertCache;
use crate::expert_runner::ExpertResults;
use crate::expert_source::{Arrival, Brought, ExpertRequest, ExpertSource, LayerInputs, Origin, SourceError};

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
    /// Rows of activations that experts at peers worked on, each time counted.
    pub remote_rows: u64,
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
}

/// Guesses on their way at a time, at most.
const GUESSES_MAX: usize = 16;
/// After so many guesses, looking ahead ends unless half of them were right.
const GUESSES_TRIED: u64 = 256;

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
    /// Guesses so far, and those that were right.
    tried: [u64; 2],
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
            first_slots,
            coming: vec![Coming::No; slots],
            outstanding: 0,
            guesses: 0,
            missed: [false; 2],
            tried: [0; 2],
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
        let [tried, right] = self.tried;
        self.missed.contains(&true) && (tried < GUESSES_TRIED || 2 * right >= tried)
    }

    /// Begins to bring those of `experts`, which `layer` will probably want, that are near and not in memory.
    pub(crate) fn foresee(&mut self, layer: u32, experts: &[u32]) {
        for &expert in experts {
            let number = self.first_slots[layer as usize] + expert as usize;
            let slot = ExpertSlot { layer, expert };
            let blob = self.manifest.expert(slot).expect("the router chooses among the layer's experts");
            let known = self.cache.contains(number) || matches!(self.coming[number], Coming::Guessed | Coming::Wanted);
            if known || self.guesses >= GUESSES_MAX.min(self.cache.capacity() / 4) || !self.source.is_near(&blob) {
                continue;
            }
            self.coming[number] = Coming::Guessed;
            self.guesses += 1;
            self.outstanding += 1;
            self.usage.foreseen += 1;
            self.tried[0] += 1;
            self.source.foresee(vec![ExpertRequest { slot, blob, buffer: self.cache.buffer() }]);
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
            self.usage.uses += 1;
            if found.is_some() && self.coming[number] == Coming::Foreseen {
                // In memory, but it had to be brought, as it would have been without looking ahead.
                self.coming[number] = Coming::No;
                self.right();
                self.first_use(number, |usage| usage.disk += 1);
            } else if found.is_some() {
                self.usage.hits += 1;
                self.first_use(number, |usage| usage.ram += 1);
            } else {
                if self.coming[number] == Coming::Guessed {
                    self.guesses -= 1;
                    self.right();
                } else {
                    let slot = ExpertSlot { layer, expert };
                    missing.push((slot, self.manifest.expert(slot).expect("the router chooses among the layer's experts")));
                }
                self.coming[number] = Coming::Wanted;
                self.missed[0] = true;
            }
            present.push(found.map(Present::Here));
        }
        if !missing.is_empty() {
            self.outstanding += missing.len();
            let requests = missing.into_iter().map(|(slot, blob)| ExpertRequest { slot, blob, buffer: self.cache.buffer() });
            self.source.request(requests.collect(), inputs);
        }
    }

    fn right(&mut self) {
        self.usage.foreseen_used += 1;
        self.tried[1] += 1;
    }

    /// Waits for one of those that the layer lacks.
    pub(crate) fn receive(&mut self) -> Result<(u32, Present), ExpertsError> {
        loop {
            let Arrival { slot, buffer, brought } = self.source.receive()?;
            self.outstanding -= 1;
            let number = self.first_slots[slot.layer as usize] + slot.expert as usize;
            let coming = std::mem::replace(&mut self.coming[number], Coming::No);
            let present = match brought {
                Brought::Weights(origin) => Present::Here(self.weights(slot, buffer, (origin, coming))?),
                Brought::Results(results) => {
                    self.cache.give_back(buffer);
                    self.usage.remote_rows += results.rows() as u64;
                    self.first_use(number, |usage| usage.remote += 1);
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

    /// Takes in an expert's weights.
    fn weights(&mut self, slot: ExpertSlot, bytes: AlignedBytes, (origin, coming): (Origin, Coming)) -> Result<Arc<Expert>, ExpertsError> {
        let number = self.first_slots[slot.layer as usize] + slot.expert as usize;
        let length = bytes.len() as u64;
        let shape = self.manifest.config.expert_shape(self.manifest.expert_precision);
        let expert = match Expert::from_verified(bytes, shape) {
            Ok(expert) => Arc::new(expert),
            Err(source) => {
                self.cache.lost();
                return Err(ExpertsError::Expert { slot, source });
            }
        };
        match origin {
            Origin::Disk if coming == Coming::Guessed => self.usage.bytes_read += length,
            Origin::Disk => {
                self.usage.bytes_read += length;
                self.first_use(number, |usage| usage.disk += 1);
            }
            Origin::Peer => self.first_use(number, |usage| {
                usage.fetched += 1;
                usage.bytes_fetched += length;
            }),
        }
        self.cache.insert(number, Arc::clone(&expert));
        Ok(expert)
    }

    /// Gives up what was requested and has not come.
    pub(crate) fn cancel(&mut self) {
        self.source.cancel();
        self.coming.fill(Coming::No);
        self.guesses = 0;
        for _ in 0..std::mem::take(&mut self.outstanding) {
            self.cache.lost();
        }
    }

    fn first_use(&mut self, number: usize, count: impl FnOnce(&mut ExpertUse)) {
        if !std::mem::replace(&mut self.seen[number], true) {
            self.usage.needed += 1;
            count(&mut self.usage);
        }
    }
}
