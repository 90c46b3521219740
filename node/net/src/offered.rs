//! What a node offers to peers, ready to be told.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use base::clock::instant;
use protocol::{ContentHash, ModelId, ModelManifest};
use store::BlobStore;

use super::status::OwnStatus;
use crate::records::TOLD_BYTES_MAX;

/// How old the records may be that are told.
const TOLD_FOR: Duration = Duration::from_secs(1);

/// What a node offers.
pub struct Provider {
    pub(super) store: Arc<BlobStore>,
    pub(super) own_status: OwnStatus,
    /// The records, and when they were put together.
    told: Mutex<Option<(Instant, Arc<Vec<u8>>)>>,
    /// The blobs of each model that somebody has asked about.
    blobs: Mutex<HashMap<ModelId, Arc<Vec<ContentHash>>>>,
}

impl Provider {
    /// Offers the models of a library and the blobs of its store.
    pub fn new(own_status: OwnStatus) -> Self {
        Self { store: Arc::clone(own_status.models.store()), own_status, told: Mutex::default(), blobs: Mutex::default() }
    }

    /// The records that are held, as they were a moment ago: putting them together takes time that others wait for.
    pub(super) fn records(&self) -> Arc<Vec<u8>> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        match &*told {
            Some((at, bytes)) if at.elapsed() < TOLD_FOR => Arc::clone(bytes),
            _ => {
                let bytes = Arc::new(self.own_status.records.lock().to_bytes(TOLD_BYTES_MAX as usize));
                *told = Some((instant(), Arc::clone(&bytes)));
                bytes
            }
        }
    }

    /// The blobs of a model that is offered, in the order in which bitfields have them.
    pub(super) fn blobs_of(&self, model: ModelId) -> Option<Arc<Vec<ContentHash>>> {
        let mut known = self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(blobs) = known.get(&model) {
            return Some(Arc::clone(blobs));
        }
        let (manifest, _) = ModelManifest::open(model, self.own_status.models.envelope(model)?.to_vec()).ok()?;
        let blobs = Arc::new(manifest.blobs().map(|blob| blob.hash).collect());
        known.insert(model, Arc::clone(&blobs));
        Some(blobs)
    }
}
