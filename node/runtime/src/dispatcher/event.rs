//! What those who bring experts tell the engine.

use std::sync::{Arc, mpsc as std_mpsc};
use std::time::{Duration, Instant};

use base::failure::Failure;
use inference::expert_source::ExpertRequest;
use net::PeerId;
use net::execute_link::Told;
use net::fetcher::{Fetched, Fetcher};

/// Before a full queue is tried again.
const FULL_PAUSE: Duration = Duration::from_millis(1);

/// A fetcher that several parts of a command use in turn.
pub type SharedFetcher = Arc<tokio::sync::Mutex<Fetcher>>;

/// Something that has come, or will not.
pub(super) enum SourceEvent {
    /// Read and verified, in so many milliseconds.
    Read(ExpertRequest, f64),
    /// The store has it no more.
    Missing(ExpertRequest),
    /// For the time when it is wanted again: as the store had it, or as a peer sent it, or not at all.
    MovedIn(ExpertRequest, Option<Fetched>),
    ReadIn(ExpertRequest, bool),
    /// It cannot be read, and no peer would help.
    Failed(Failure),
    /// A peer has sent it.
    Fetched(Fetched),
    /// The peers have sent all, or this is why not.
    FetchEnded(Result<(), Failure>),
    /// A peer that runs experts has said something, then.
    Told(PeerId, Instant, Told),
}

/// Tells the engine something from an async task. A full queue holds up this task alone, not the thread that others need.
pub(super) async fn tell(happening: &std_mpsc::SyncSender<(u64, SourceEvent)>, round: u64, event: SourceEvent) {
    let mut event = (round, event);
    while let Err(std_mpsc::TrySendError::Full(back)) = happening.try_send(event) {
        event = back;
        tokio::time::sleep(FULL_PAUSE).await;
    }
}
