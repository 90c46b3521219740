//! Reads every blob and compares it with its hash, the longest unread first.

use protocol::ContentHash;

use crate::blob_store::BlobStore;
use crate::error::StoreError;

/// What a scrub found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ScrubReport {
    /// Blobs that were read.
    pub verified: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Blobs that were damaged; they are in the quarantine now.
    pub damaged: Vec<ContentHash>,
    /// Blobs that the filesystem would not read, with its reason; they stay where they are.
    pub unreadable: Vec<(ContentHash, String)>,
}

/// Verifies all blobs. `on_progress` is told the bytes read so far and answers whether to go on.
pub fn scrub(store: &BlobStore, mut now_ms: impl FnMut() -> u64, mut on_progress: impl FnMut(u64) -> bool) -> ScrubReport {
    let mut report = ScrubReport::default();
    for (hash, entry) in store.by_age() {
        match store.reader(&hash, now_ms()) {
            Ok(Some(_)) => report.verified += 1,
            Ok(None) | Err(StoreError::Damaged { .. }) => report.damaged.push(hash),
            Err(error) => report.unreadable.push((hash, error.to_string())),
        }
        report.bytes += entry.length;
        if !on_progress(report.bytes) {
            break;
        }
    }
    store.flush();
    report
}
