//! The seam through which the engine asks for experts it does not hold. Whoever implements it decides where they come from.

use protocol::{BlobRef, ExpertSlot};

use crate::aligned::AlignedBytes;

/// An expert that a layer needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExpertRequest {
    /// Where it stands in the model.
    pub slot: ExpertSlot,
    /// Its bytes.
    pub blob: BlobRef,
}

/// Where an expert's bytes came from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// This node's own store.
    Disk,
    /// A peer, while the model waited.
    Peer,
}

/// Takes an expert's bytes as they arrive; they are verified there once more.
pub type Deliver<'a> = &'a mut dyn FnMut(ExpertSlot, AlignedBytes, Origin) -> Result<(), SourceError>;

/// Gets experts.
pub trait ExpertSource: Send {
    /// Hands each of `requests` to `deliver`, in any order, or says why it cannot.
    fn fetch(&mut self, requests: &[ExpertRequest], deliver: Deliver<'_>) -> Result<(), SourceError>;
}

/// Why experts could not be had. The engine passes it on; what it means is known to who made the source.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct SourceError(pub Box<dyn std::error::Error + Send + Sync>);
