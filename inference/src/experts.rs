//! Brings together the experts that a layer needs, from memory or from the source.

use std::collections::VecDeque;
use std::sync::Arc;

use protocol::decoder::FeedForward;
use protocol::expert_blob::{ExpertBlobError, ExpertShape};
use protocol::manifest::PackedBlob;
use protocol::{BlobRef, ExpertSlot, ModelManifest, PartKind, Precision};

use crate::aligned::AlignedBytes;
use crate::expert::Expert;
use crate::expert_memory::{ExpertMemory, ExpertNumber, Inner};
use crate::expert_runner::ExpertResults;
use crate::expert_source::{Arrival, Brought, ExpertRequest, ExpertSource, Gain, LayerInputs, Origin, SourceError};
use crate::expert_use::{ExpertUse, ServedFrom};
use crate::retention::RetentionValue;

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
    Prefetched,
    /// On its way, and the layer at work waits for it.
    Wanted,
}

/// Memory and source of experts, for one model.
pub struct Experts {
    part: PartKind,
    /// By place: each expert, and its number in memory.
    blobs: Vec<PackedBlob>,
    numbers: Vec<ExpertNumber>,
    /// The shape of each, but for its precision.
    shape: ExpertShape,
    largest: usize,
    memory: ExpertMemory,
    source: Box<dyn ExpertSource>,
    usage: ExpertUse,
    seen: Vec<bool>,
    /// By slot, where it was when it was last wanted.
    served_from: Vec<ServedFrom>,
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
    retention: RetentionValue,
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
        write!(f, "experts of {} slots, {:?}", self.seen.len(), self.memory)
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
    /// Experts of a part of the model of `manifest`, which share `memory` with those of other models.
    ///
    /// # Panics
    /// When the model has no such part.
    pub fn new(manifest: &ModelManifest, part: PartKind, memory: ExpertMemory, source: Box<dyn ExpertSource>) -> Self {
        let of = manifest.part(part).expect("the model has the part");
        let decoder = manifest.decoder_of(part);
        let mut slots = 0;
        let first_slots = decoder.each_layer().map(|run| {
            let first = slots;
            slots += if matches!(run.feed_forward, FeedForward::Moe(_)) { decoder.experts() as usize } else { 0 };
            first
        });
        let first_slots = first_slots.collect();
        let numbers = {
            let mut memory = memory.lock();
            memory.reserve(slots);
            of.experts.iter().map(|expert| memory.announce(expert.blob.hash)).collect()
        };
        Self {
            part,
            blobs: of.experts.clone(),
            numbers,
            shape: decoder.expert_shape(Precision::F32),
            largest: of.largest_expert() as usize,
            memory,
            source,
            usage: ExpertUse::default(),
            seen: vec![false; slots],
            served_from: vec![ServedFrom::default(); slots],
            first_slots,
            coming: vec![Coming::No; slots],
            outstanding: 0,
            guesses: 0,
            missed: [false; 2],
            near: Guesses::default(),
            far: Guesses::default(),
            told: vec![false; slots],
            retention: RetentionValue::new(slots),
            elsewhere: false,
            passing: VecDeque::new(),
            moving: vec![false; slots],
            moves: 0,
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
    pub fn served_from(&self, place: usize) -> ServedFrom {
        self.served_from[place]
    }

    /// Whether the expert at a place is in memory.
    pub fn is_in_memory(&self, place: usize) -> bool {
        self.memory.lock().contains(self.numbers[place])
    }

    /// The memory that they are in.
    pub fn memory(&self) -> &ExpertMemory {
        &self.memory
    }

    /// Experts that may be in use at a time without exceeding the limit, however large they are.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity_of(&self.memory.lock())
    }

    fn capacity_of(&self, memory: &Inner) -> usize {
        usize::try_from(memory.bytes_max() / AlignedBytes::taken(self.largest).max(1)).unwrap_or(usize::MAX).min(self.numbers.len())
    }

    fn place(&self, slot: ExpertSlot) -> usize {
        self.first_slots[slot.layer as usize] + slot.expert as usize
    }

    fn slot(&self, layer: u32, expert: u32) -> ExpertSlot {
        ExpertSlot { part: self.part, layer, expert }
    }

    fn blob(&self, place: usize) -> BlobRef {
        self.blobs[place].blob
    }

    /// Memory for the expert of a place.
    fn buffer(&mut self, memory: &mut Inner, place: usize) -> AlignedBytes {
        let length = self.blob(place).length as usize;
        let leaving = if self.elsewhere && !memory.has_spare(length) { self.leaving(memory, length) } else { None };
        match leaving {
            Some(leaving) => memory.buffer_for(length, self.numbers[leaving]),
            None => memory.buffer(length),
        }
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
    pub(crate) fn prefetch(&mut self, layer: u32, experts: &[u32]) {
        let mut far = Vec::new();
        let memory = self.memory.clone();
        let mut memory = memory.lock();
        for &expert in experts {
            let slot = self.slot(layer, expert);
            let place = self.place(slot);
            let blob = self.blob(place);
            if memory.contains(self.numbers[place]) || matches!(self.coming[place], Coming::Guessed | Coming::Wanted) {
                continue;
            }
            if !self.source.is_near(&blob) {
                if self.far.pay() && !std::mem::replace(&mut self.told[place], true) {
                    far.push(blob);
                }
                continue;
            }
            if !self.near.pay() || self.guesses >= GUESSES_MAX.min(self.capacity_of(&memory) / 4) {
                continue;
            }
            self.coming[place] = Coming::Guessed;
            self.guesses += 1;
            self.outstanding += 1;
            self.usage.prefetched += 1;
            self.near.tried += 1;
            let buffer = self.buffer(&mut memory, place);
            let precision = self.blobs[place].precision;
            self.source.prefetch(vec![ExpertRequest { slot, blob, precision, buffer }]);
        }
        if !far.is_empty() {
            self.usage.hinted += far.len() as u64;
            self.far.tried += far.len() as u64;
            self.source.hint(&far);
        }
    }

    /// Looks for the experts `wanted` of `layer`: those in memory are put into `present` (in the order wanted), the others are
    /// requested, unless they are on their way. Each must then be received, or all given up by `cancel`.
    pub(crate) fn gather(&mut self, layer: u32, wanted: &[u32], inputs: &LayerInputs<'_>, present: &mut Vec<Option<Present>>) {
        present.clear();
        let mut missing = Vec::new(); // allocates only when something is
        let memory = self.memory.clone();
        let mut memory = memory.lock();
        for &expert in wanted {
            let place = self.first_slots[layer as usize] + expert as usize;
            let found = memory.get(self.numbers[place]);
            self.retention.used(place);
            let told = std::mem::take(&mut self.told[place]);
            self.usage.uses += 1;
            if found.is_some() && self.coming[place] == Coming::Prefetched {
                // In memory, but it had to be brought, as it would have been without looking ahead.
                self.coming[place] = Coming::No;
                self.right();
                self.used(place, ServedFrom::Disk, |usage| usage.disk += 1);
            } else if found.is_some() {
                self.usage.hits += 1;
                self.used(place, ServedFrom::Memory, |usage| usage.ram += 1);
            } else {
                if self.coming[place] == Coming::Guessed {
                    self.guesses -= 1;
                    self.right();
                } else {
                    self.usage.hinted_used += u64::from(told);
                    self.far.right += u64::from(told);
                    missing.push(expert);
                }
                self.coming[place] = Coming::Wanted;
                self.missed[0] = true;
            }
            present.push(found.map(Present::Here));
        }
        if !missing.is_empty() {
            self.outstanding += missing.len();
            let request = |expert| {
                let slot = self.slot(layer, expert);
                let place = self.place(slot);
                let PackedBlob { blob, precision } = self.blobs[place];
                ExpertRequest { slot, blob, precision, buffer: self.buffer(&mut memory, place) }
            };
            let requests = missing.into_iter().map(request).collect();
            drop(memory);
            self.source.request(requests, inputs);
        }
    }

    fn right(&mut self) {
        self.usage.prefetched_used += 1;
        self.near.right += 1;
    }

    /// Waits for one of those that the layer lacks.
    pub(crate) fn receive(&mut self) -> Result<(u32, Present), ExpertsError> {
        loop {
            let Arrival { slot, buffer, brought } = self.source.receive()?;
            let place = self.place(slot);
            let coming = self.coming[place];
            let present = match brought {
                Brought::MovedIn(origin) => {
                    self.moved_in(slot, place, buffer, origin)?;
                    continue;
                }
                Brought::Weights(origin) => {
                    self.came(place);
                    Present::Here(self.weights(slot, buffer, (origin, coming))?)
                }
                Brought::Results(results) => {
                    self.came(place);
                    self.memory.lock().give_back(buffer);
                    self.elsewhere = true;
                    self.usage.remote_uses += 1;
                    self.usage.remote_rows += results.rows() as u64;
                    self.used(place, ServedFrom::Remote, |usage| usage.remote += 1);
                    self.move_in_if_worth(slot, place);
                    Present::Computed(Arc::new(results))
                }
            };
            if coming == Coming::Wanted {
                return Ok((slot.expert, present));
            }
            self.guesses -= 1;
            self.coming[place] = Coming::Prefetched;
        }
    }

    /// Notes that nothing of an expert is on its way any more.
    fn came(&mut self, place: usize) {
        self.outstanding -= 1;
        self.coming[place] = Coming::No;
    }

    /// Takes in an expert's weights.
    fn weights(&mut self, slot: ExpertSlot, bytes: AlignedBytes, (origin, coming): (Origin, Coming)) -> Result<Arc<Expert>, ExpertsError> {
        let place = self.place(slot);
        let length = bytes.len() as u64;
        let expert = self.verified(slot, bytes)?;
        match origin {
            Origin::Disk if coming == Coming::Guessed => self.usage.bytes_read += length,
            Origin::Disk => {
                self.usage.bytes_read += length;
                self.used(place, ServedFrom::Disk, |usage| usage.disk += 1);
            }
            Origin::Peer => self.used(place, ServedFrom::Fetched, |usage| {
                usage.fetched += 1;
                usage.bytes_fetched += length;
            }),
        }
        let mut memory = self.memory.lock();
        memory.insert(self.numbers[place], Arc::clone(&expert));
        let capacity = self.capacity_of(&memory);
        drop(memory);
        if self.elsewhere && !self.retention.is_high(place, capacity) {
            self.passing.push_back(place);
        }
        Ok(expert)
    }

    fn verified(&self, slot: ExpertSlot, bytes: AlignedBytes) -> Result<Arc<Expert>, ExpertsError> {
        let shape = ExpertShape { precision: self.blobs[self.place(slot)].precision, ..self.shape };
        Expert::from_verified(bytes, shape).map(Arc::new).map_err(|source| ExpertsError::Expert { slot, source })
    }

    /// Has an expert brought that has just run elsewhere, if it is used more than the one that it would displace.
    fn move_in_if_worth(&mut self, slot: ExpertSlot, place: usize) {
        let memory = self.memory.clone();
        let mut memory = memory.lock();
        let (capacity, length) = (self.capacity_of(&memory), self.blob(place).length as usize);
        if self.moving[place] || memory.contains(self.numbers[place]) || self.moves >= MOVES_MAX.min(capacity / 4) {
            return;
        }
        let leaving = self.leaving(&memory, length);
        if !self.retention.is_worth_bringing(place, leaving, capacity) {
            return;
        }
        let (gain, buffer) = match leaving {
            Some(leaving) => (Gain::Displaces, memory.buffer_for(length, self.numbers[leaving])),
            None => (Gain::Fills, memory.buffer(length)),
        };
        drop(memory);
        self.moving[place] = true;
        self.moves += 1;
        let PackedBlob { blob, precision } = self.blobs[place];
        self.source.move_in(ExpertRequest { slot, blob, precision, buffer }, gain);
    }

    /// The expert that is forgotten for another of `length` bytes where memory is for what is used most: one in passing, or the one used
    /// least.
    fn leaving(&mut self, memory: &Inner, length: usize) -> Option<usize> {
        if memory.has_room(length) {
            return None;
        }
        let capacity = self.capacity_of(memory);
        while let Some(&place) = self.passing.front() {
            if memory.contains(self.numbers[place]) && !self.retention.is_high(place, capacity) {
                if memory.is_idle(self.numbers[place]) {
                    return Some(place);
                }
                break;
            }
            self.passing.pop_front(); // gone, or come to stay
        }
        self.retention.least((0..self.numbers.len()).filter(|&place| memory.is_idle(self.numbers[place])))
    }

    fn moved_in(&mut self, slot: ExpertSlot, place: usize, bytes: AlignedBytes, origin: Option<Origin>) -> Result<(), ExpertsError> {
        self.moves -= 1;
        self.moving[place] = false;
        let length = bytes.len() as u64;
        let is_here = self.memory.lock().contains(self.numbers[place]);
        match origin {
            Some(origin) if !is_here => {
                let expert = self.verified(slot, bytes)?;
                self.memory.lock().insert(self.numbers[place], expert);
                self.usage.moved_in += 1;
                match origin {
                    Origin::Disk => self.usage.bytes_read += length,
                    Origin::Peer => self.usage.bytes_fetched += length,
                }
            }
            // It could not be had, or somebody could not wait for it.
            _ => self.memory.lock().give_back(bytes),
        }
        Ok(())
    }

    /// Gives up what was requested and has not come.
    pub(crate) fn cancel(&mut self) {
        self.source.cancel();
        self.coming.fill(Coming::No);
        self.moving.fill(false);
        (self.guesses, self.outstanding, self.moves) = (0, 0, 0);
    }

    /// Notes where a wanted expert was; `count` counts its first use.
    fn used(&mut self, place: usize, source: ServedFrom, count: impl FnOnce(&mut ExpertUse)) {
        self.served_from[place] = source;
        if !std::mem::replace(&mut self.seen[place], true) {
            self.usage.needed += 1;
            count(&mut self.usage);
        }
    }
}

impl Drop for Experts {
    fn drop(&mut self) {
        self.source.cancel();
        let mut memory = self.memory.lock();
        self.numbers.iter().for_each(|&number| memory.release(number));
    }
}
