//! The seam through which the engine asks for experts it does not hold. Whoever implements it decides where they come from.

use protocol::{BlobRef, ExpertSlot};

use crate::aligned::AlignedBytes;

/// An expert that a layer needs.
#[derive(Debug)]
pub struct ExpertRequest {
    /// Where it stands in the model.
    pub slot: ExpertSlot,
    /// Its bytes.
    pub blob: BlobRef,
    /// As many bytes of memory, to be filled.
    pub buffer: AlignedBytes,
}

/// An expert that has come.
#[derive(Debug)]
pub struct Arrival {
    /// Where it stands in the model.
    pub slot: ExpertSlot,
    /// Its bytes, which the source has matched with the hash that it was asked for.
    pub bytes: AlignedBytes,
    /// Where they were.
    pub origin: Origin,
}

/// Where an expert's bytes came from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// This node's own store.
    Disk,
    /// A peer, while the model waited.
    Peer,
}

/// Gets experts. After an error the engine calls `cancel` and may ask again.
pub trait ExpertSource: Send {
    /// Begins to bring `requests`, and returns at once.
    fn request(&mut self, requests: Vec<ExpertRequest>);

    /// Whether an expert could be brought without asking anybody else.
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
