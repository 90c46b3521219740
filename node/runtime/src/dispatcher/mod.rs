//! Where the engine's experts come from: this node's store, or peers, who send their bytes or run them. Each goes the way that is done
//! first by what was measured; a late answer is sought another way too, and the first that comes counts. The tokens are the same.
//!
//! Reading, verifying, fetching and running go on beside the engine's work; what is ready is handed over through one queue.

mod auditor;
mod blame;
mod choice;
mod event;
mod mover;
mod reader;
mod remote;
mod report;
mod saver;
mod waiters;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError, mpsc as std_mpsc};
use std::time::{Duration, Instant};

use base::clock::{instant, interrupted};
use base::failure::{Failure, Kind};
use inference::expert_source::{Arrival, Brought, ExpertRequest, ExpertSource, Gain, LayerInputs, Origin, SourceError};
use inference::kernels::Kernels;
use net::PeerId;
use net::allowed::AllowedPeers;
use net::execute_link::Told;
use net::fetcher::{FetchItem, Fetched};
use net::link::Wanted;
use net::network::Network;
use protocol::audit::AuditShare;
use protocol::{BlobRef, ExpertSlot};
use store::BlobStore;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use self::auditor::{Auditor, AuditorParts};
use self::choice::{Cost, Way, Ways};
pub use self::event::SharedFetcher;
use self::event::{SourceEvent, tell};
use self::mover::{Mover, Quiet, Urgent};
use self::reader::Read;
use self::remote::{Came, Lateness, LayerRows, Remote};
pub use self::report::Waited;
pub use self::report::{RemoteReport, SharedReport};
use self::saver::Saver;
pub use self::waiters::Waiters;
use crate::evidence::Evidence;

const RESULTS_MAX: usize = 8;
/// Each read makes an event, and the end of a fetch another.
const EVENTS_MAX: usize = 2 * reader::READS_MAX;
/// How often a wait looks for Ctrl-C.
const LOOK_UP: Duration = Duration::from_millis(100);
/// What a read, and a fetch, are thought to cost before they have been measured, in milliseconds.
const DISK_FIRST: Cost = Cost { start: 0.0, each: 1.5 };
const FETCH_FIRST: Cost = Cost { start: 5.0, each: 50.0 };

/// Who has sent experts so far, shared with whoever reports it.
pub type Providers = Arc<Mutex<BTreeMap<PeerId, u64>>>;

/// Peers, as a dispatcher uses them.
#[derive(Clone)]
pub(crate) struct DispatcherPeers {
    pub fetcher: SharedFetcher,
    pub network: Network,
    pub runtime: Handle,
}

/// Which experts may run at peers, and how that is checked.
#[derive(Clone, Debug)]
pub struct RemoteOptions {
    /// Peers that may see activations.
    pub execute_at: AllowedPeers,
    /// The share of results that is computed again.
    pub audit: AuditShare,
}

impl Default for RemoteOptions {
    fn default() -> Self {
        Self { execute_at: AllowedPeers::default(), audit: AuditShare::DEFAULT }
    }
}

/// What a dispatcher needs to know of a model and of the user's wishes.
pub(crate) struct DispatcherOptions {
    /// Length of the rows that experts take.
    pub hidden_size: usize,
    /// Whether any expert is packed: others never run at peers.
    pub packed: bool,
    pub kernels: &'static Kernels,
    pub remote: RemoteOptions,
    pub report: SharedReport,
    /// Where evidence against peers goes.
    pub(crate) evidence: Evidence,
    pub(crate) waiters: Waiters,
}

/// The experts of one model.
pub(crate) struct Dispatcher {
    store: Arc<BlobStore>,
    peers: Option<DispatcherPeers>,
    remote: Option<Remote>,
    waiters: Waiters,
    mover: Option<Mover>,
    urgent: Urgent,
    hidden_size: usize,
    saver: Saver,
    providers: Providers,
    report: SharedReport,
    reads: std_mpsc::SyncSender<(u64, Read)>,
    happened: std_mpsc::Receiver<(u64, SourceEvent)>,
    happening: std_mpsc::SyncSender<(u64, SourceEvent)>,
    /// What was asked for before the last `cancel` is of an earlier round, and nobody's.
    round: u64,
    /// Experts that a layer waits for.
    waiting: HashMap<ExpertSlot, Waiting>,
    rows: LayerRows,
    readers: usize,
    reading: usize,
    /// Not in the store, and not asked for yet.
    missing: Vec<ExpertRequest>,
    fetching: Option<Fetching>,
    disk: Cost,
    fetch: Cost,
}

/// An expert that a layer waits for.
struct Waiting {
    /// While it runs at peers; gone once its bytes are on their way.
    request: Option<ExpertRequest>,
    /// Peers that were asked to run it.
    requested_from: Vec<PeerId>,
}

/// Experts on their way from peers.
struct Fetching {
    task: JoinHandle<()>,
    requests: Vec<Option<ExpertRequest>>,
    since: Instant,
}

impl Dispatcher {
    /// Experts from `store`, and from `peers` if there are any.
    pub(crate) fn new(store: Arc<BlobStore>, peers: Option<DispatcherPeers>, providers: Providers, options: DispatcherOptions) -> Self {
        let (happening, happened) = std_mpsc::sync_channel(EVENTS_MAX);
        let (reads, readers) = reader::start(&store, &happening);
        let DispatcherOptions { hidden_size, packed, kernels, remote, report, evidence, waiters } = options;
        let runs = packed && !remote.execute_at.is_empty();
        let (urgent, waited_for) = Urgent::new();
        let remote = peers.as_ref().filter(|_| runs).map(|peers| {
            let DispatcherPeers { fetcher, network, runtime } = peers.clone();
            let quiet = Quiet { fetcher, waited_for: waited_for.clone() };
            let mover = Mover::start(quiet.clone(), &runtime, happening.clone());
            let parts = AuditorParts {
                store: Arc::clone(&store),
                network: network.clone(),
                quiet,
                runtime: runtime.clone(),
                report: report.clone(),
                hidden_size,
                kernels,
                evidence,
            };
            (Remote::new(network, runtime, remote.execute_at, report.clone(), Auditor::start(parts), happening.clone()), mover)
        });
        let (remote, mover) = remote.unzip();
        let saver = Saver::start(Arc::clone(&store));
        Self {
            store,
            peers,
            remote,
            mover,
            urgent,
            hidden_size,
            saver,
            providers,
            waiters,
            report,
            reads,
            happened,
            happening,
            round: 0,
            waiting: HashMap::new(),
            rows: LayerRows::default(),
            readers,
            reading: 0,
            missing: Vec::new(),
            fetching: None,
            disk: DISK_FIRST,
            fetch: FETCH_FIRST,
        }
    }

    /// Sends each expert of a layer the way that is done first. `late` says that some peers have been asked and do not answer.
    fn place(&mut self, slots: &[ExpertSlot], late: Option<Lateness>) {
        let fetching = self.missing.len() + self.fetching.as_ref().map_or(0, |fetching| fetching.requests.iter().flatten().count());
        let mut offers = vec![(Way::Disk, self.disk, self.reading as u64)];
        if self.peers.is_some() {
            offers.push((Way::Fetch, self.fetch, fetching as u64));
        }
        if let Some(remote) = &mut self.remote {
            offers.extend(remote.ready().into_iter().map(|(peer, cost, busy)| (Way::Run(peer), cost, busy)));
        }
        let mut ways = Ways::new(offers);
        let mut runs: BTreeMap<PeerId, Vec<(ExpertSlot, BlobRef)>> = BTreeMap::new();
        for &slot in slots {
            let Some(waiting) = self.waiting.get_mut(&slot) else { continue };
            let Some(request) = waiting.request.take() else { continue }; // its bytes are on their way
            let blob = request.blob;
            let here = self.store.contains(&blob.hash);
            let able = |way| match way {
                Way::Disk => here,
                // What is on the disk need not be fetched; and a late answer is still likely to come before a fetch.
                Way::Fetch => !here && late != Some(Lateness::Late),
                Way::Run(peer) => {
                    request.precision.is_packed()
                        && !waiting.requested_from.contains(&peer)
                        && self.remote.as_ref().is_some_and(|remote| !remote.lacks(peer, &blob.hash))
                }
            };
            match ways.choose(self.rows.count(slot.expert), able) {
                Some(Way::Disk) => {
                    self.reading += 1;
                    let _ = self.reads.send((self.round, Read::Wanted(request))); // the readers live as long as this does
                }
                Some(Way::Run(peer)) => {
                    waiting.requested_from.push(peer);
                    waiting.request = Some(request);
                    runs.entry(peer).or_default().push((slot, blob));
                }
                // There is no other way yet, and the answer may still come.
                None if late == Some(Lateness::Late) => waiting.request = Some(request),
                Some(Way::Fetch) | None => self.missing.push(request),
            }
        }
        if late.is_some() && !runs.is_empty() {
            self.report.lock().hedged += 1;
        }
        if let Some(remote) = &mut self.remote {
            runs.iter().for_each(|(&peer, slots)| remote.send(peer, slots, &self.rows));
        }
    }

    /// Asks the peers for what the store lacks.
    fn fetch_missing(&mut self) -> Result<(), SourceError> {
        let requests = std::mem::take(&mut self.missing);
        let Some(DispatcherPeers { fetcher, runtime, .. }) = &self.peers else {
            let names: Vec<_> = requests.iter().map(|request| request.slot.to_string()).collect();
            return Err(source_error(Failure::new(Kind::NoPeers, format!("missing {}: no peer is known (--peer ADDR)", names.join(", ")))));
        };
        let wants =
            requests.iter().map(|request| FetchItem { wanted: Wanted::Blob(request.blob), name: request.slot.to_string() }).collect();
        let (fetcher, happening, round) = (Arc::clone(fetcher), self.happening.clone(), self.round);
        let urgent = self.urgent.begin();
        let task = runtime.spawn(async move {
            let _urgent = urgent;
            let (results, mut arrivals) = mpsc::channel(RESULTS_MAX);
            let mut fetcher = fetcher.lock().await;
            let fetch = async {
                let result = fetcher.fetch(wants, &results).await;
                drop(results);
                result
            };
            let forward = async {
                while let Some(fetched) = arrivals.recv().await {
                    tell(&happening, round, SourceEvent::Fetched(fetched)).await;
                }
            };
            let (result, ()) = tokio::join!(fetch, forward);
            tell(&happening, round, SourceEvent::FetchEnded(result)).await;
        });
        self.fetching = Some(Fetching { task, requests: requests.into_iter().map(Some).collect(), since: instant() });
        Ok(())
    }

    /// Waits for what comes next.
    fn receive_next(&mut self) -> Result<Arrival, SourceError> {
        loop {
            // What peers send can come while the disk reads.
            if self.fetching.is_none() && !self.missing.is_empty() {
                self.fetch_missing()?;
            }
            let running = self.remote.as_ref().is_some_and(Remote::is_waiting);
            if self.reading == 0 && self.fetching.is_none() && !running {
                return Err(source_error(Failure::new(Kind::Other, "an expert was awaited that nobody asked for")));
            }
            let event = match self.happened.recv_timeout(self.patience()) {
                Ok((round, event)) if round == self.round || matches!(event, SourceEvent::Told(..)) => event,
                Err(_) if interrupted() || self.waiters.is_gone() => return Err(source_error(Failure::interrupted())),
                Ok(_) => continue,
                Err(_) => {
                    self.hedge();
                    continue;
                }
            };
            match event {
                SourceEvent::Read(request, milliseconds) => {
                    self.reading -= 1;
                    self.disk.learn(0.0, Some(milliseconds / self.readers as f64));
                    return Ok(self.weights(request, Origin::Disk));
                }
                SourceEvent::Missing(request) => {
                    self.reading -= 1;
                    self.missing.push(request);
                }
                SourceEvent::ReadIn(request, read) => return Ok(moved_in(request, read.then_some(Origin::Disk))),
                SourceEvent::MovedIn(request, fetched) => return Ok(self.take_in(request, fetched)),
                SourceEvent::Failed(failure) => return Err(source_error(failure)),
                SourceEvent::Fetched(fetched) => {
                    if let Some(arrival) = self.take(fetched) {
                        return Ok(arrival);
                    }
                }
                SourceEvent::FetchEnded(result) => {
                    if let Some(fetching) = self.fetching.take()
                        && result.is_ok()
                    {
                        let milliseconds = (instant() - fetching.since).as_secs_f64() * 1e3;
                        self.fetch.learn(0.0, Some(milliseconds / fetching.requests.len() as f64));
                    }
                    result.map_err(source_error)?;
                }
                SourceEvent::Told(peer, at, told) => {
                    if let Some(arrival) = self.hear(peer, at, told) {
                        return Ok(arrival);
                    }
                }
            }
            self.hedge();
        }
    }

    /// Hands over what a peer has sent.
    fn take(&mut self, Fetched { index, bytes, peer }: Fetched) -> Option<Arrival> {
        let mut request = self.fetching.as_mut()?.requests.get_mut(index)?.take()?;
        *self.providers.lock().unwrap_or_else(PoisonError::into_inner).entry(peer).or_default() += 1;
        request.buffer.copy_from_slice(&bytes);
        self.saver.save(request.blob, bytes);
        Some(self.weights(request, Origin::Peer))
    }

    /// Hands over what a peer has sent of an expert that moves in.
    fn take_in(&mut self, mut request: ExpertRequest, fetched: Option<Fetched>) -> Arrival {
        let origin = fetched.map(|Fetched { bytes, peer, .. }| {
            *self.providers.lock().unwrap_or_else(PoisonError::into_inner).entry(peer).or_default() += 1;
            request.buffer.copy_from_slice(&bytes);
            self.saver.save(request.blob, bytes);
            Origin::Peer
        });
        moved_in(request, origin)
    }

    fn weights(&mut self, request: ExpertRequest, origin: Origin) -> Arrival {
        self.waiting.remove(&request.slot);
        Arrival { slot: request.slot, buffer: request.buffer, brought: Brought::Weights(origin) }
    }

    /// Takes in what a peer that runs experts says.
    fn hear(&mut self, peer: PeerId, at: Instant, told: Told) -> Option<Arrival> {
        let remote = self.remote.as_mut()?;
        match remote.hear(peer, at, told) {
            Came::Results { number, task, slot, results, bytes } => {
                // Somebody else may have been faster, or the expert itself is on its way.
                let request = self.waiting.get_mut(&slot)?.request.take()?;
                remote.used(number, task, bytes);
                self.waiting.remove(&slot);
                Some(Arrival { slot, buffer: request.buffer, brought: Brought::Results(results) })
            }
            Came::Replace(slots) => {
                self.place(&slots, None);
                None
            }
            Came::Nothing => None,
        }
    }

    /// Seeks another way to what is late.
    fn hedge(&mut self) {
        let Some(remote) = &mut self.remote else { return };
        for (_, lateness, slots) in remote.late() {
            self.place(&slots, Some(lateness));
        }
    }

    /// How long to wait for an event.
    fn patience(&self) -> Duration {
        let late = self.remote.as_ref().and_then(Remote::next_late);
        late.map_or(LOOK_UP, |late| late.saturating_duration_since(instant()).min(LOOK_UP))
    }
}

impl Drop for Dispatcher {
    /// Nobody waits any more: what was being fetched must not hold up those who end their work.
    fn drop(&mut self) {
        self.cancel();
    }
}

impl ExpertSource for Dispatcher {
    fn request(&mut self, requests: Vec<ExpertRequest>, inputs: &LayerInputs<'_>) {
        if self.remote.is_some() {
            self.rows = LayerRows::of(inputs, requests.iter().map(|request| request.slot.expert), self.hidden_size);
        }
        let slots: Vec<_> = requests.iter().map(|request| request.slot).collect();
        self.waiting
            .extend(requests.into_iter().map(|request| (request.slot, Waiting { request: Some(request), requested_from: Vec::new() })));
        self.place(&slots, None);
    }

    fn prefetch(&mut self, requests: Vec<ExpertRequest>) {
        for request in requests {
            self.reading += 1;
            let _ = self.reads.send((self.round, Read::Wanted(request))); // as in `place`; what is near is in the store
        }
    }

    fn hint(&mut self, blobs: &[BlobRef]) {
        if let Some(remote) = &mut self.remote {
            remote.hint(blobs);
        }
    }

    fn move_in(&mut self, request: ExpertRequest, gain: Gain) {
        if self.store.contains(&request.blob.hash) {
            let _ = self.reads.send((self.round, Read::MovedIn(request)));
            return;
        }
        let refused = match &self.mover {
            Some(mover) => mover.bring(self.round, request, gain).err(),
            None => Some(request),
        };
        if let Some(request) = refused {
            let _ = self.happening.try_send((self.round, SourceEvent::MovedIn(request, None)));
        }
    }

    fn is_near(&self, blob: &BlobRef) -> bool {
        let disk = self.disk.of(1 + self.reading as u64);
        self.store.contains(&blob.hash) && self.remote.as_ref().is_none_or(|remote| !remote.is_nearer(disk, &blob.hash))
    }

    fn receive(&mut self) -> Result<Arrival, SourceError> {
        let since = instant();
        let arrival = self.receive_next()?;
        let (took, mut report) = (instant() - since, self.report.lock());
        match arrival.brought {
            Brought::Weights(Origin::Disk) => report.waited.disk += took,
            Brought::Weights(Origin::Peer) => report.waited.fetched += took,
            // What moves in comes while something else is waited for.
            Brought::Results(_) | Brought::MovedIn(_) => report.waited.remote += took,
        }
        drop(report);
        Ok(arrival)
    }

    fn cancel(&mut self) {
        self.round += 1;
        self.reading = 0;
        self.missing.clear();
        self.waiting.clear();
        if let Some(remote) = &mut self.remote {
            remote.cancel();
        }
        if let Some(fetching) = self.fetching.take() {
            fetching.task.abort();
        }
    }
}

fn moved_in(ExpertRequest { slot, buffer, .. }: ExpertRequest, origin: Option<Origin>) -> Arrival {
    Arrival { slot, buffer, brought: Brought::MovedIn(origin) }
}

fn source_error(failure: Failure) -> SourceError {
    SourceError(Box::new(failure))
}
