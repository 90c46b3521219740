//! Where the engine's experts come from: this node's store, else its peers. What peers send is kept as long as there is room.
//!
//! Reading, verifying and fetching go on beside the engine's work; what is ready is handed over through one queue.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError, mpsc as std_mpsc};
use std::time::Duration;

use inference::expert_source::{Arrival, ExpertRequest, ExpertSource, Origin, SourceError};
use protocol::BlobRef;
use store::{BlobStore, StoreError};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::clock::{interrupted, now_ms};
use crate::failure::{Failure, Kind};
use crate::net::PeerId;
use crate::net::fetcher::{Fetched, Fetcher, Want};
use crate::net::link::Wanted;
use crate::output::note;

const RESULTS_MAX: usize = 8;
const SAVES_MAX: usize = 8;
/// The engine asks for a few experts at a time, never for more than a layer has.
const READS_MAX: usize = 4096;
/// Each of them makes an event, and the end of a fetch another.
const EVENTS_MAX: usize = 2 * READS_MAX;
/// Threads that read and verify: while one hashes, another's read is under way.
const READERS: usize = 2;
/// How often a wait looks for Ctrl-C.
const LOOK_UP: Duration = Duration::from_millis(100);

/// A fetcher that several parts of a command use in turn.
pub(crate) type SharedFetcher = Arc<tokio::sync::Mutex<Fetcher>>;

/// Who has sent experts so far, shared with whoever reports it.
pub(crate) type Providers = Arc<Mutex<BTreeSet<PeerId>>>;

/// The experts of one model.
pub(crate) struct PeerExperts {
    store: Arc<BlobStore>,
    peers: Option<(SharedFetcher, Handle)>,
    saver: Saver,
    providers: Providers,
    reads: std_mpsc::SyncSender<(u64, ExpertRequest)>,
    happened: std_mpsc::Receiver<(u64, Event)>,
    happening: std_mpsc::SyncSender<(u64, Event)>,
    /// What was asked for before the last `cancel` is of an earlier round, and nobody's.
    round: u64,
    reading: usize,
    /// Not in the store, and not asked for yet.
    missing: Vec<ExpertRequest>,
    fetching: Option<Fetching>,
}

/// Experts on their way from peers.
struct Fetching {
    task: JoinHandle<()>,
    requests: Vec<Option<ExpertRequest>>,
}

enum Event {
    /// Read and verified.
    Read(ExpertRequest),
    /// The store has it no more.
    Missing(ExpertRequest),
    /// It cannot be read, and no peer would help.
    Failed(Failure),
    /// A peer has sent it.
    Fetched(Fetched),
    /// The peers have sent all, or this is why not.
    FetchEnded(Result<(), Failure>),
}

impl PeerExperts {
    /// Experts from `store`, and from `peers` if there are any.
    pub(crate) fn new(store: Arc<BlobStore>, peers: Option<(SharedFetcher, Handle)>, providers: Providers) -> Self {
        let (reads, queue) = std_mpsc::sync_channel(READS_MAX);
        let (happening, happened) = std_mpsc::sync_channel(EVENTS_MAX);
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..READERS {
            let (queue, happening, store) = (Arc::clone(&queue), happening.clone(), Arc::clone(&store));
            std::thread::spawn(move || {
                // Ends when the sender is dropped.
                while let Ok((round, request)) = { queue.lock().unwrap_or_else(PoisonError::into_inner).recv() } {
                    if happening.send((round, read(&store, request))).is_err() {
                        break;
                    }
                }
            });
        }
        let saver = Saver::start(Arc::clone(&store));
        Self { store, peers, saver, providers, reads, happened, happening, round: 0, reading: 0, missing: Vec::new(), fetching: None }
    }

    /// Asks the peers for what the store lacks.
    fn fetch_missing(&mut self) -> Result<(), SourceError> {
        let requests = std::mem::take(&mut self.missing);
        let Some((fetcher, runtime)) = &self.peers else {
            let names: Vec<_> = requests.iter().map(|request| request.slot.to_string()).collect();
            return Err(source_error(Failure::new(Kind::NoPeers, format!("missing {}: no peer is known (--peer ADDR)", names.join(", ")))));
        };
        let wants = requests.iter().map(|request| Want { wanted: Wanted::Blob(request.blob), name: request.slot.to_string() }).collect();
        let (fetcher, happening, round) = (Arc::clone(fetcher), self.happening.clone(), self.round);
        let task = runtime.spawn(async move {
            let (results, mut arrivals) = mpsc::channel(RESULTS_MAX);
            let mut fetcher = fetcher.lock().await;
            let fetch = async {
                let result = fetcher.fetch(wants, &results).await;
                drop(results);
                result
            };
            let forward = async {
                while let Some(fetched) = arrivals.recv().await {
                    let _ = happening.send((round, Event::Fetched(fetched)));
                }
            };
            let (result, ()) = tokio::join!(fetch, forward);
            let _ = happening.send((round, Event::FetchEnded(result)));
        });
        self.fetching = Some(Fetching { task, requests: requests.into_iter().map(Some).collect() });
        Ok(())
    }

    /// Hands over what a peer has sent.
    fn take(&mut self, Fetched { index, bytes, peer }: Fetched) -> Option<Arrival> {
        let mut request = self.fetching.as_mut()?.requests.get_mut(index)?.take()?;
        self.providers.lock().unwrap_or_else(PoisonError::into_inner).insert(peer);
        request.buffer.copy_from_slice(&bytes);
        self.saver.save(request.blob, bytes);
        Some(Arrival { slot: request.slot, bytes: request.buffer, origin: Origin::Peer })
    }
}

fn read(store: &BlobStore, mut request: ExpertRequest) -> Event {
    let length = request.buffer.len();
    match store.read_pages(&request.blob.hash, request.buffer.whole_pages(), length, now_ms()) {
        Ok(true) => Event::Read(request),
        Ok(false) => Event::Missing(request),
        // A disk that cannot read it any more is as good as one that has lost it.
        Err(error @ (StoreError::Damaged { .. } | StoreError::Io { .. })) => {
            note(&format!("warning: {}: {error}; fetching it again", request.slot));
            Event::Missing(request)
        }
        Err(error) => Event::Failed(Failure::from(error).about(request.slot)),
    }
}

impl ExpertSource for PeerExperts {
    fn request(&mut self, requests: Vec<ExpertRequest>) {
        for request in requests {
            if self.store.contains(&request.blob.hash) {
                self.reading += 1;
                let _ = self.reads.send((self.round, request)); // the readers live as long as this does
            } else {
                self.missing.push(request);
            }
        }
    }

    fn is_near(&self, blob: &BlobRef) -> bool {
        self.store.contains(&blob.hash)
    }

    fn receive(&mut self) -> Result<Arrival, SourceError> {
        loop {
            // What peers send can come while the disk reads.
            if self.fetching.is_none() && !self.missing.is_empty() {
                self.fetch_missing()?;
            }
            if self.reading == 0 && self.fetching.is_none() {
                return Err(source_error(Failure::new(Kind::Other, "an expert was awaited that nobody asked for")));
            }
            let event = match self.happened.recv_timeout(LOOK_UP) {
                Ok((round, event)) if round == self.round => event,
                Err(_) if interrupted() => return Err(source_error(Failure::interrupted())),
                Ok(_) | Err(_) => continue,
            };
            match event {
                Event::Read(request) => {
                    self.reading -= 1;
                    return Ok(Arrival { slot: request.slot, bytes: request.buffer, origin: Origin::Disk });
                }
                Event::Missing(request) => {
                    self.reading -= 1;
                    self.missing.push(request);
                }
                Event::Failed(failure) => return Err(source_error(failure)),
                Event::Fetched(fetched) => {
                    if let Some(arrival) = self.take(fetched) {
                        return Ok(arrival);
                    }
                }
                Event::FetchEnded(result) => {
                    self.fetching = None;
                    result.map_err(source_error)?;
                }
            }
        }
    }

    fn cancel(&mut self) {
        self.round += 1;
        self.reading = 0;
        self.missing.clear();
        if let Some(fetching) = self.fetching.take() {
            fetching.task.abort();
        }
    }
}

fn source_error(failure: Failure) -> SourceError {
    SourceError(Box::new(failure))
}

/// Writes to the store beside the model's work: a durable write takes longer than an expert's multiplication.
struct Saver {
    queue: Option<std_mpsc::SyncSender<(BlobRef, Vec<u8>)>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Saver {
    fn start(store: Arc<BlobStore>) -> Self {
        let (queue, saves) = std_mpsc::sync_channel::<(BlobRef, Vec<u8>)>(SAVES_MAX);
        let thread = std::thread::spawn(move || {
            let mut full = false;
            for (blob, bytes) in saves {
                let saved = store.writer(blob).and_then(|mut writer| {
                    writer.write(&bytes)?;
                    writer.finish(now_ms())
                });
                match saved {
                    Ok(_) => {}
                    Err(error) if full => drop(error),
                    Err(error) => {
                        full = true;
                        note(&format!("note: experts that do not fit are used and not kept: {error}"));
                    }
                }
            }
            store.flush();
        });
        Self { queue: Some(queue), thread: Some(thread) }
    }

    fn save(&self, blob: BlobRef, bytes: Vec<u8>) {
        if let Some(queue) = &self.queue {
            let _ = queue.send((blob, bytes));
        }
    }
}

impl Drop for Saver {
    /// Waits until everything that was handed over is on the disk.
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
