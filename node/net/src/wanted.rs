//! What to fetch.

use std::sync::Arc;

use protocol::BlobRef;
use protocol::exchange::Urgency;

use super::assembly::Sink;

/// What to fetch.
#[derive(Clone, Debug)]
pub enum Wanted {
    /// A blob that fits into memory, and for which somebody waits.
    Blob(BlobRef),
    /// The same, but its length is what somebody said.
    ToldBlob(BlobRef),
    /// The same as the first, but nobody waits.
    SpareBlob(BlobRef),
    /// A blob that goes straight to the store.
    StoredBlob(BlobRef, Arc<Sink>),
}

impl Wanted {
    pub(super) fn blob(&self) -> BlobRef {
        match self {
            Self::Blob(blob) | Self::ToldBlob(blob) | Self::SpareBlob(blob) | Self::StoredBlob(blob, _) => *blob,
        }
    }

    pub(super) fn urgency(&self) -> Urgency {
        match self {
            Self::Blob(_) | Self::ToldBlob(_) => Urgency::Now,
            Self::SpareBlob(_) => Urgency::Soon,
            Self::StoredBlob(..) => Urgency::Rest,
        }
    }
}
