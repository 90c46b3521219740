//! The seam through which the engine asks for experts it does not hold. Whoever implements it decides where they come from.

use protocol::{BlobRef, ExpertSlot, Precision};

use crate::aligned::AlignedBytes;
use crate::expert_runner::ExpertResults;
pub use crate::layer_inputs::LayerInputs;

/// An expert that a layer needs.
#[derive(Debug)]
pub struct ExpertRequest {
    /// Where it stands in the model.
    pub slot: ExpertSlot,
    /// Its bytes.
    pub blob: BlobRef,
    /// Their number format.
    pub precision: Precision,
    /// As many bytes of memory, to be filled.
    pub buffer: AlignedBytes,
}

/// What came of a request.
#[derive(Debug)]
pub struct Arrival {
    /// Where the expert stands in the model.
    pub slot: ExpertSlot,
    /// The request's memory.
    pub buffer: AlignedBytes,
    /// What is in it, or came instead.
    pub brought: Brought,
}

/// What a source brings.
#[derive(Debug)]
pub enum Brought {
    /// The expert, in the request's memory: the source has matched its bytes with the hash that it was asked for.
    Weights(Origin),
    /// What the expert makes of the rows that [`LayerInputs`] gave for it, computed elsewhere. The memory is as it was.
    Results(ExpertResults),
    /// What [`ExpertSource::move_in`] was asked for, in the request's memory; without an origin it could not be had.
    MovedIn(Option<Origin>),
}

/// What is gained by an expert that moves in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Gain {
    /// It fills memory that nothing is in.
    Fills,
    /// Another is forgotten for it, which is used less.
    Displaces,
}

/// Where an expert's bytes came from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// This node's own store.
    Disk,
    /// A peer.
    Peer,
}

/// Gets experts. After an error the engine calls `cancel` and may ask again.
pub trait ExpertSource: Send {
    /// Begins to bring `requests`, which a layer waits for, and returns at once. `inputs` are what the experts will work on: a source may
    /// have that done elsewhere and bring the results.
    fn request(&mut self, requests: Vec<ExpertRequest>, inputs: &LayerInputs<'_>);

    /// Begins to bring the weights of `requests`, which a layer will probably want.
    fn prefetch(&mut self, requests: Vec<ExpertRequest>);

    /// Tells whoever may be asked to run them of experts that a layer will probably want, lest they have to be read first.
    fn hint(&mut self, blobs: &[BlobRef]);

    /// Begins to bring the weights of an expert whose results are brought often. Nobody waits for it: what somebody waits for comes first,
    /// and where it [`displaces`](Gain) another there is no hurry at all.
    fn move_in(&mut self, request: ExpertRequest, gain: Gain);

    /// Whether to bring an expert here ahead of time; others are told of, and run where they are.
    fn is_near(&self, blob: &BlobRef) -> bool;

    /// Waits for the next of those requested to come, in any order.
    fn receive(&mut self) -> Result<Arrival, SourceError>;

    /// Forgets what was requested and has not been received.
    fn cancel(&mut self);
}

/// Why experts could not be had. The engine passes it on; what it means is known to who made the source.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct SourceError(pub Box<dyn std::error::Error + Send + Sync>);
