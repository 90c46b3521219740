//! Moves experts in: fetches those that run at peers most often, little by little, so that this node needs its peers less and less.
//!
//! Takes a tenth of the time at most, and nothing while somebody else fetches; ends when the disk's quota does.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use protocol::BlobRef;
use store::BlobStore;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::debug;

use super::SharedFetcher;
use super::report::SharedReport;
use crate::failure::Kind;
use crate::net::fetcher::Want;
use crate::net::link::{Sink, Wanted};

/// After fetching an expert, nothing is fetched for so many times as long as that took, …
const PAUSE: u32 = 9;
/// … and for this long at least.
const PAUSE_MIN: Duration = Duration::from_millis(200);
/// An expert that ran fewer times than this stays where it is.
const RUNS_MIN: u32 = 2;

type Runs = Arc<Mutex<HashMap<BlobRef, u32>>>;

/// Counts what runs at peers, and has it moved in. Ends when dropped; what has arrived of an expert by then is kept for the next time.
pub(super) struct Mover {
    runs: Runs,
    task: JoinHandle<()>,
}

impl Mover {
    pub(super) fn start(store: Arc<BlobStore>, fetcher: SharedFetcher, runtime: &Handle, report: SharedReport) -> Self {
        let runs = Runs::default();
        let task = runtime.spawn(run(Arc::clone(&runs), store, fetcher, report));
        Self { runs, task }
    }

    /// Notes that an expert ran at a peer.
    pub(super) fn ran(&self, blob: BlobRef) {
        *self.runs.lock().unwrap_or_else(PoisonError::into_inner).entry(blob).or_default() += 1;
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(runs: Runs, store: Arc<BlobStore>, fetcher: SharedFetcher, report: SharedReport) {
    let sink = Arc::new(Sink(Arc::clone(&store)));
    loop {
        tokio::time::sleep(PAUSE_MIN).await;
        let Some(blob) = most_wanted(&runs, &store) else { continue };
        let began = Instant::now();
        let Ok(mut fetcher) = fetcher.try_lock() else { continue };
        let (results, _arrivals) = mpsc::channel(1);
        let want = Want { wanted: Wanted::StoredBlob(blob, Arc::clone(&sink)), name: "an expert to move in".to_owned() };
        match fetcher.fetch(vec![want], &results).await {
            Ok(()) => {
                let mut report = report.lock();
                report.moved_in += 1;
                report.bytes_moved_in += blob.length;
            }
            Err(failure) if failure.kind == Kind::Disk => return,
            Err(failure) => debug!(%failure, "an expert could not be moved in"),
        }
        drop(fetcher);
        tokio::time::sleep(began.elapsed() * PAUSE).await;
    }
}

/// The expert that ran most often and is not here; those that are need not be counted any more.
fn most_wanted(runs: &Runs, store: &BlobStore) -> Option<BlobRef> {
    let mut runs = runs.lock().unwrap_or_else(PoisonError::into_inner);
    runs.retain(|blob, _| !store.contains(&blob.hash));
    let (&blob, _) = runs.iter().filter(|(_, runs)| **runs >= RUNS_MIN).max_by_key(|(blob, runs)| (**runs, blob.hash))?;
    Some(blob)
}
