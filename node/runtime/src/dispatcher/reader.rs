//! Reading experts from the store, and verifying them, beside the engine's work.

use std::sync::{Arc, Mutex, PoisonError, mpsc};

use base::clock::{instant, now_ms};
use base::failure::Failure;
use base::output::note;
use base::threads;
use inference::expert_source::ExpertRequest;
use store::{BlobStore, StoreError};

use super::event::SourceEvent;

/// Threads that read and verify, where there are as many cores: while one hashes, another's read is under way.
const READERS_MAX: usize = 2;
/// The engine asks for a few experts at a time, never for more than a layer has.
pub(super) const READS_MAX: usize = 4096;

/// What is to be read from the store.
pub(super) enum Read {
    /// A layer waits for it, or will.
    Wanted(ExpertRequest),
    /// Nobody does.
    MovedIn(ExpertRequest),
}

/// Starts the threads that read, and says how many there are. They end when the sender is dropped; what they read is told by round.
pub(super) fn start(store: &Arc<BlobStore>, happening: &mpsc::SyncSender<(u64, SourceEvent)>) -> (mpsc::SyncSender<(u64, Read)>, usize) {
    let (reads, queue) = mpsc::sync_channel(READS_MAX);
    let queue = Arc::new(Mutex::new(queue));
    let readers = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(READERS_MAX);
    for _ in 0..readers {
        let (queue, happening, store) = (Arc::clone(&queue), happening.clone(), Arc::clone(store));
        threads::watched("expert-reader", move || {
            while let Ok((round, wish)) = { queue.lock().unwrap_or_else(PoisonError::into_inner).recv() } {
                // The engine waits for an event of each read, also of one that ends in a fault.
                let event = threads::caught("reading an expert", || done(&store, wish)).unwrap_or_else(SourceEvent::Failed);
                if happening.send((round, event)).is_err() {
                    break;
                }
            }
        });
    }
    (reads, readers)
}

/// Reads what is wanted.
fn done(store: &BlobStore, wish: Read) -> SourceEvent {
    match wish {
        Read::Wanted(mut request) => match read(store, &mut request) {
            Ok(Some(milliseconds)) => SourceEvent::Read(request, milliseconds),
            Ok(None) => SourceEvent::Missing(request),
            Err(error) => SourceEvent::Failed(Failure::from(error).about(request.slot)),
        },
        // Who waits for the expert later reads it again, and hears why that cannot be.
        Read::MovedIn(mut request) => {
            let here = matches!(read(store, &mut request), Ok(Some(_)));
            SourceEvent::ReadIn(request, here)
        }
    }
}

/// Fills a request's buffer and says how many milliseconds that took, or `None` if the store has it no more.
fn read(store: &BlobStore, request: &mut ExpertRequest) -> Result<Option<f64>, StoreError> {
    let (length, started) = (request.buffer.len(), instant());
    match store.read_pages(&request.blob.hash, request.buffer.whole_pages(), length, now_ms()) {
        Ok(true) => Ok(Some((instant() - started).as_secs_f64() * 1e3)),
        Ok(false) => Ok(None),
        // A disk that cannot read it any more is as good as one that has lost it.
        Err(error @ (StoreError::Damaged { .. } | StoreError::Io { .. })) => {
            note(&format!("warning: {}: {error}; fetching it again", request.slot));
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
