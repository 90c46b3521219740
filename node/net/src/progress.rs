//! What a fetcher has on its way, for whoever looks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};

/// Shared with whoever looks.
pub type SharedTransfer = Arc<Mutex<Option<Transfer>>>;

/// One call's worth of blobs on their way.
#[derive(Clone, Debug)]
pub struct Transfer {
    /// The name of the first, and how many more there are.
    pub name: String,
    pub total: u64,
    pub peers: usize,
    pub(super) before: u64,
    pub(super) arrived: Arc<AtomicU64>,
}

impl Transfer {
    /// For programs.
    pub fn json(&self) -> Value {
        json!({"name": self.name, "bytes": self.bytes(), "total": self.total, "peers": self.peers})
    }

    /// Bytes that have come: of blobs that two peers sent, perhaps more than there are.
    pub fn bytes(&self) -> u64 {
        (self.arrived.load(Ordering::Relaxed) - self.before).min(self.total)
    }
}

/// Takes a transfer off the list, however it ends.
pub(super) struct Listed(SharedTransfer);

impl Drop for Listed {
    fn drop(&mut self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Listed {
    /// Puts a transfer on the list.
    pub(super) fn new(progress: &SharedTransfer, transfer: Transfer) -> Self {
        *progress.lock().unwrap_or_else(PoisonError::into_inner) = Some(transfer);
        Self(Arc::clone(progress))
    }
}
