//! Where the engine's experts come from: this node's store, else its peers. What peers send is kept as long as there is room.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError, mpsc as std_mpsc};

use inference::aligned::AlignedBytes;
use inference::expert_source::{Deliver, ExpertRequest, ExpertSource, Origin, SourceError};
use protocol::BlobRef;
use store::{BlobStore, StoreError};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use crate::clock::{interrupted, now_ms, until_interrupted};
use crate::failure::{Failure, Kind};
use crate::net::PeerId;
use crate::net::fetcher::{Fetched, Fetcher, Want};
use crate::net::link::Wanted;
use crate::output::note;

const RESULTS_MAX: usize = 8;
const SAVES_MAX: usize = 8;

/// A fetcher that several parts of a command use in turn.
pub(crate) type SharedFetcher = Arc<tokio::sync::Mutex<Fetcher>>;

/// The experts of one model.
pub(crate) struct PeerExperts {
    store: Arc<BlobStore>,
    peers: Option<(SharedFetcher, Handle)>,
    saver: Saver,
    providers: Providers,
}

/// Who has sent experts so far, shared with whoever reports it.
pub(crate) type Providers = Arc<Mutex<BTreeSet<PeerId>>>;

impl PeerExperts {
    /// Experts from `store`, and from `peers` if there are any.
    pub(crate) fn new(store: Arc<BlobStore>, peers: Option<(SharedFetcher, Handle)>, providers: Providers) -> Self {
        Self { saver: Saver::start(Arc::clone(&store)), store, peers, providers }
    }

    /// Delivers what the store has; returns the rest.
    fn deliver_from_store(&self, requests: &[ExpertRequest], deliver: Deliver<'_>) -> Result<Vec<ExpertRequest>, SourceError> {
        let mut missing = Vec::new();
        for request in requests {
            let mut bytes = AlignedBytes::zeroed(request.blob.length as usize);
            match self.store.read_into(&request.blob.hash, &mut bytes, now_ms()) {
                Ok(true) => deliver(request.slot, bytes, Origin::Disk)?,
                Ok(false) => missing.push(*request),
                // A disk that cannot read it any more is as good as one that has lost it.
                Err(error @ (StoreError::Damaged { .. } | StoreError::Io { .. })) => {
                    note(&format!("warning: {}: {error}; fetching it again", request.slot));
                    missing.push(*request);
                }
                Err(error) => return Err(source_error(Failure::from(error).about(request.slot))),
            }
        }
        Ok(missing)
    }

    fn deliver_from_peers(&self, requests: &[ExpertRequest], deliver: Deliver<'_>) -> Result<(), SourceError> {
        let Some((fetcher, runtime)) = &self.peers else {
            let names: Vec<_> = requests.iter().map(|request| request.slot.to_string()).collect();
            return Err(source_error(Failure::new(Kind::NoPeers, format!("missing {}: no peer is known (--peer ADDR)", names.join(", ")))));
        };
        let wants = requests.iter().map(|request| Want { wanted: Wanted::Blob(request.blob), name: request.slot.to_string() }).collect();
        let (results, mut arrivals) = mpsc::channel(RESULTS_MAX);
        let fetcher = Arc::clone(fetcher);
        let fetching = runtime.spawn(async move { fetcher.lock().await.fetch(wants, &results).await });
        let next = |arrivals: &mut mpsc::Receiver<Fetched>| {
            runtime.block_on(async {
                tokio::select! {
                    arrival = arrivals.recv() => arrival,
                    () = until_interrupted() => None,
                }
            })
        };
        while let Some(Fetched { index, bytes, peer }) = next(&mut arrivals) {
            let request = requests[index];
            self.providers.lock().unwrap_or_else(PoisonError::into_inner).insert(peer);
            let aligned = AlignedBytes::copy_of(&bytes);
            self.saver.save(request.blob, bytes);
            deliver(request.slot, aligned, Origin::Peer)?;
        }
        if interrupted() {
            fetching.abort();
            return Err(source_error(Failure::interrupted()));
        }
        match runtime.block_on(fetching) {
            Ok(result) => result.map_err(source_error),
            Err(error) => Err(source_error(Failure::new(Kind::Other, error.to_string()))),
        }
    }
}

impl ExpertSource for PeerExperts {
    fn fetch(&mut self, requests: &[ExpertRequest], deliver: Deliver<'_>) -> Result<(), SourceError> {
        let missing = self.deliver_from_store(requests, deliver)?;
        if missing.is_empty() { Ok(()) } else { self.deliver_from_peers(&missing, deliver) }
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
