//! Serves manifests, trunk and experts by hash to whoever asks. A blob is verified when it is opened for serving.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::{AsyncReadExt, AsyncWriteExt, StreamExt};
use libp2p::{PeerId, Stream};
use protocol::message::{Answer, FETCH_PROTOCOL, RANGE_BYTES_MAX, REQUEST_BYTES, Request, STREAM_ACK, Subject};
use protocol::{ContentHash, ModelId};
use store::{BlobReader, BlobStore};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::{debug, warn};

use crate::clock::now_ms;
use crate::failure::{Failure, Kind};
use crate::net::swarm::Network;

const STREAMS_MAX: usize = 256;
const STREAMS_PER_PEER_MAX: usize = 8;
/// Blobs that are kept open for all streams, so that each is verified once and not for each of its ranges.
const OPEN_BLOBS_MAX: usize = 64;
const IDLE_TIMEOUT: Duration = Duration::from_secs(600);
/// For one answer of at most [`RANGE_BYTES_MAX`]: a peer that reads more slowly than this is let go.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// What a node offers.
pub(crate) struct Provider {
    store: Arc<BlobStore>,
    manifests: HashMap<ModelId, Arc<Vec<u8>>>,
    listing: Arc<Vec<u8>>,
    open: Mutex<VecDeque<(ContentHash, Arc<BlobReader>)>>,
}

impl Provider {
    /// Offers the blobs of `store`, some signed manifests and a list of models.
    pub(crate) fn new(store: Arc<BlobStore>, manifests: HashMap<ModelId, Arc<Vec<u8>>>, listing: Vec<u8>) -> Self {
        Self { store, manifests, listing: Arc::new(listing), open: Mutex::default() }
    }

    /// Opens a blob, or finds it open. Two streams that open the same one at once both verify it, and both are right.
    fn reader(&self, hash: ContentHash) -> Option<Arc<BlobReader>> {
        if let Some(found) = self.forget(hash) {
            // To the back: what is in use stays open.
            self.open_blobs().push_back((hash, Arc::clone(&found)));
            return Some(found);
        }
        let reader = match self.store.reader(&hash, now_ms()) {
            Ok(reader) => Arc::new(reader?),
            Err(error) => {
                warn!(%hash, %error, "cannot serve a blob");
                return None;
            }
        };
        let mut open = self.open_blobs();
        if open.len() >= OPEN_BLOBS_MAX {
            open.pop_front();
        }
        open.push_back((hash, Arc::clone(&reader)));
        Some(reader)
    }

    /// Takes a blob out of those that are open.
    fn forget(&self, hash: ContentHash) -> Option<Arc<BlobReader>> {
        let mut open = self.open_blobs();
        let at = open.iter().position(|(open, _)| *open == hash)?;
        open.remove(at).map(|(_, reader)| reader)
    }

    fn open_blobs(&self) -> MutexGuard<'_, VecDeque<(ContentHash, Arc<BlobReader>)>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Accepts streams until the network ends.
pub(crate) fn start(provider: Provider, network: &Network) -> Result<(), Failure> {
    let accepted = network.streams.clone().accept(libp2p::StreamProtocol::new(FETCH_PROTOCOL));
    let mut incoming = accepted.map_err(|error| Failure::new(Kind::Other, format!("cannot accept streams: {error}")))?;
    let provider = Arc::new(provider);
    let room = Arc::new(Semaphore::new(STREAMS_MAX));
    let streams_of: Arc<Mutex<HashMap<PeerId, usize>>> = Arc::default();
    tokio::spawn(async move {
        while let Some((peer, stream)) = incoming.next().await {
            // The queue behind `incoming` has no room: take each stream off at once and decide afterwards.
            let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
                warn!(%peer, "refused a stream: {STREAMS_MAX} are open");
                continue;
            };
            let Some(place) = Place::take(&streams_of, peer) else {
                warn!(%peer, "refused a stream: the peer has {STREAMS_PER_PEER_MAX}");
                continue;
            };
            let provider = Arc::clone(&provider);
            tokio::spawn(async move {
                let _held = (permit, place);
                let end = serve(&provider, stream).await;
                debug!(%peer, reason = ?end.err(), "stream ended");
            });
        }
    });
    Ok(())
}

/// One of a peer's streams; given back when dropped.
struct Place {
    streams_of: Arc<Mutex<HashMap<PeerId, usize>>>,
    peer: PeerId,
}

impl Place {
    fn take(streams_of: &Arc<Mutex<HashMap<PeerId, usize>>>, peer: PeerId) -> Option<Self> {
        let mut counts = streams_of.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(peer).or_default();
        if *count >= STREAMS_PER_PEER_MAX {
            return None;
        }
        *count += 1;
        Some(Self { streams_of: Arc::clone(streams_of), peer })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.streams_of.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.peer);
            }
        }
    }
}

async fn serve(provider: &Arc<Provider>, mut stream: Stream) -> std::io::Result<()> {
    write(&mut stream, &[STREAM_ACK], &[]).await?;
    let mut request = [0; REQUEST_BYTES];
    loop {
        timeout(IDLE_TIMEOUT, stream.read_exact(&mut request)).await??;
        let Ok(request) = Request::from_bytes(&request) else {
            write(&mut stream, &Answer::Refused.to_bytes(), &[]).await?;
            return stream.close().await;
        };
        let (answer, bytes) = answer(provider, request).await;
        write(&mut stream, &answer.to_bytes(), &bytes).await?;
    }
}

async fn write(stream: &mut Stream, head: &[u8], bytes: &[u8]) -> std::io::Result<()> {
    let write = async {
        stream.write_all(head).await?;
        stream.write_all(bytes).await?;
        stream.flush().await
    };
    timeout(WRITE_TIMEOUT, write).await?
}

async fn answer(provider: &Arc<Provider>, request: Request) -> (Answer, Vec<u8>) {
    let whole = match request.subject {
        Subject::Manifest(id) => provider.manifests.get(&id).cloned(),
        Subject::Listing => Some(Arc::clone(&provider.listing)),
        Subject::Blob(hash) => return blob_range(provider, hash, request).await,
    };
    let Some(whole) = whole else { return (Answer::NotHave, Vec::new()) };
    match range(request, whole.len() as u64) {
        Some((answer, length)) => (answer, whole[request.offset as usize..][..length].to_vec()),
        None => (Answer::Refused, Vec::new()),
    }
}

/// The head of the answer to a request for part of `total` bytes, and how many follow; nothing beyond the end.
fn range(request: Request, total: u64) -> Option<(Answer, usize)> {
    let left = total.checked_sub(request.offset)?;
    let length = left.min(u64::from(request.length.min(RANGE_BYTES_MAX))) as u32;
    Some((Answer::Bytes { total, length }, length as usize))
}

async fn blob_range(provider: &Arc<Provider>, hash: ContentHash, request: Request) -> (Answer, Vec<u8>) {
    let provider = Arc::clone(provider);
    let read = tokio::task::spawn_blocking(move || {
        let Some(reader) = provider.reader(hash) else { return (Answer::NotHave, Vec::new()) };
        let Some((answer, length)) = range(request, reader.length()) else { return (Answer::Refused, Vec::new()) };
        let mut bytes = vec![0; length];
        match reader.read_at(&mut bytes, request.offset) {
            Ok(()) => (answer, bytes),
            Err(error) => {
                warn!(%hash, %error, "cannot serve a blob");
                provider.forget(hash); // opened anew, it is verified anew
                (Answer::NotHave, Vec::new())
            }
        }
    });
    read.await.unwrap_or((Answer::NotHave, Vec::new()))
}
