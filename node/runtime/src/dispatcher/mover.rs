//! Fetches for which nobody waits: weights of experts that run at peers often, and of those whose results are audited. They take a part
//! of the time, one group at a time, and make way for whatever somebody waits for.

use std::sync::{Arc, mpsc as std_mpsc};

use inference::expert_source::{ExpertRequest, Gain};
use net::fetcher::{FetchItem, Fetched};
use net::link::Wanted;
use protocol::BlobRef;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::debug;

use super::event::{SharedFetcher, SourceEvent, tell};

/// Experts that wait to be moved in.
const MOVES_MAX: usize = 4;
/// After fetching an expert, nothing is fetched for so many times as long as that took.
const PAUSE_DISPLACING: f64 = 19.0;
const PAUSE_FILLING: f64 = 0.5;

/// A fetcher, for those who are not in a hurry.
#[derive(Clone)]
pub(super) struct Quiet {
    pub(super) fetcher: SharedFetcher,
    /// How many fetches somebody waits for.
    pub(super) waited_for: watch::Receiver<usize>,
}

impl Quiet {
    /// Fetches a blob when nobody is in a hurry; begun again where it was broken off when somebody was. `None` when it cannot be had.
    pub(super) async fn bring(&mut self, blob: BlobRef, name: &str) -> Option<Fetched> {
        loop {
            self.waited_for.wait_for(|waiting| *waiting == 0).await.ok()?;
            tokio::select! {
                biased;
                Ok(_) = self.waited_for.wait_for(|waiting| *waiting > 0) => {}
                fetched = fetch(&self.fetcher, blob, name) => return fetched,
            }
        }
    }
}

async fn fetch(fetcher: &SharedFetcher, blob: BlobRef, name: &str) -> Option<Fetched> {
    let mut fetcher = fetcher.lock().await;
    let (results, mut arrivals) = mpsc::channel(1);
    let want = FetchItem { wanted: Wanted::SpareBlob(blob), name: name.to_owned() };
    if let Err(failure) = fetcher.fetch(vec![want], &results).await {
        debug!(%failure, name, "not fetched");
    }
    arrivals.try_recv().ok()
}

/// An expert to move in, for a round.
struct Move {
    round: u64,
    request: ExpertRequest,
    gain: Gain,
}

/// Moves experts in. Ends when dropped; what has come of an expert by then is lost with it.
pub(super) struct Mover {
    queue: mpsc::Sender<Move>,
    task: JoinHandle<()>,
}

impl Mover {
    pub(super) fn start(quiet: Quiet, runtime: &Handle, happening: std_mpsc::SyncSender<(u64, SourceEvent)>) -> Self {
        let (queue, moves) = mpsc::channel(MOVES_MAX);
        let task = runtime.spawn(run(quiet, moves, happening));
        Self { queue, task }
    }

    /// Brings an expert, which is told in an event of this round; gives the request back when there is too much to do.
    pub(super) fn bring(&self, round: u64, request: ExpertRequest, gain: Gain) -> Result<(), ExpertRequest> {
        self.queue.try_send(Move { round, request, gain }).map_err(|error| error.into_inner().request)
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(mut quiet: Quiet, mut moves: mpsc::Receiver<Move>, happening: std_mpsc::SyncSender<(u64, SourceEvent)>) {
    while let Some(Move { round, request, gain }) = moves.recv().await {
        let began = Instant::now();
        let fetched = quiet.bring(request.blob, "an expert to move in").await;
        tell(&happening, round, SourceEvent::MovedIn(request, fetched)).await;
        let pause = if gain == Gain::Fills { PAUSE_FILLING } else { PAUSE_DISPLACING };
        tokio::time::sleep(began.elapsed().mul_f64(pause)).await;
    }
}

/// Fetches that somebody waits for, counted.
#[derive(Clone)]
pub(super) struct Urgent(Arc<watch::Sender<usize>>);

impl Urgent {
    pub(super) fn new() -> (Self, watch::Receiver<usize>) {
        let (sender, receiver) = watch::channel(0);
        (Self(Arc::new(sender)), receiver)
    }

    /// Counts as one until it is dropped.
    pub(super) fn begin(&self) -> Urgently {
        self.0.send_modify(|waiting| *waiting += 1);
        Urgently(Arc::clone(&self.0))
    }
}

/// Somebody waits.
pub(super) struct Urgently(Arc<watch::Sender<usize>>);

impl Drop for Urgently {
    fn drop(&mut self) {
        self.0.send_modify(|waiting| *waiting -= 1);
    }
}
