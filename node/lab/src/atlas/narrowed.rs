//! A model some of whose experts have less precision, for as long as it is measured.

use std::sync::{Arc, Mutex, PoisonError};

use base::clock::now_ms;
use base::failure::{Failure, Kind};
use inference::checkpoint::import::BlobSink;
use inference::requantize::{Precisions, requantize_each};
use protocol::{BlobRef, ContentHash, ExpertSlot, Precision};
use runtime::data_dir::LocalModel;
use store::{BlobStore, PutOutcome};

/// A model that was made of another. What only it needs leaves the store with it.
pub(super) struct Narrowed {
    pub(super) model: LocalModel,
    store: Arc<BlobStore>,
    new: Vec<ContentHash>,
}

struct Sink<'a> {
    store: &'a BlobStore,
    new: Mutex<Vec<ContentHash>>,
}

impl BlobSink for Sink<'_> {
    fn put(&self, bytes: &[u8]) -> Result<BlobRef, String> {
        let (blob, outcome) = self.store.put(bytes, now_ms()).map_err(|error| error.to_string())?;
        if outcome != PutOutcome::Present {
            self.new.lock().unwrap_or_else(PoisonError::into_inner).push(blob.hash);
        }
        Ok(blob)
    }

    fn progress(&self, _: u64) -> bool {
        !base::clock::interrupted()
    }
}

impl Narrowed {
    /// The model with `precision` for the experts that are `chosen`.
    pub(super) fn new(
        store: &Arc<BlobStore>,
        found: &LocalModel,
        precision: Precision,
        chosen: impl Fn(ExpertSlot) -> bool + Sync,
    ) -> Result<Self, Failure> {
        let sink = Sink { store, new: Mutex::default() };
        let read = |blob: BlobRef| -> Result<Vec<u8>, Failure> {
            let gone = || Failure::new(Kind::NotFound, format!("{} is not in the store: pull the whole model first", blob.hash));
            store.read(&blob.hash, now_ms())?.ok_or_else(gone)
        };
        let precisions =
            Precisions { tensor: &|_, _, precision| precision, expert: &|slot, own| if chosen(slot) { precision } else { own } };
        let made = requantize_each(&found.manifest, &precisions, None, &read, &sink);
        let new = sink.new.into_inner().unwrap_or_else(PoisonError::into_inner);
        // What was put so far goes, whatever came of it.
        let mut narrowed = Self { model: found.clone(), store: Arc::clone(store), new };
        let manifest = made?;
        narrowed.model = LocalModel { id: manifest.id(), manifest: Arc::new(manifest), ..found.clone() };
        Ok(narrowed)
    }
}

impl Drop for Narrowed {
    fn drop(&mut self) {
        self.new.iter().for_each(|hash| drop(self.store.remove(hash)));
    }
}
