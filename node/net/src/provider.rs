//! What a node offers, and the small things of it: manifests, the list of models, its status. Blobs are served by `upload`.

use std::sync::Arc;
use std::time::Duration;

use base::failure::{Failure, Kind};
use futures::{AsyncReadExt, AsyncWriteExt, StreamExt};
use libp2p::{PeerId, Stream};
use protocol::message::{FETCH_PROTOCOL, FetchAnswer, RANGE_BYTES_MAX, REQUEST_BYTES, Request, STREAM_ACK, Subject};
use tokio::time::timeout;
use tracing::debug;

use crate::network::Network;
use crate::stream_slots::{SlotLimits, StreamSlot, StreamSlots};
use crate::upload;

/// Streams of fetches, and as many of exchanges.
pub(super) const STREAMS: SlotLimits = SlotLimits { strangers: 224, friends: 32, of_one: 8 };
/// Who opens a stream wants something.
const FIRST_TIMEOUT: Duration = Duration::from_secs(10);
const IDLE_TIMEOUT: Duration = Duration::from_secs(600);
/// For one answer of at most [`RANGE_BYTES_MAX`]: a peer that reads more slowly than this is let go.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

pub use super::offered::Provider;

/// Accepts streams until the network ends. No more than `bytes_per_second_max` of blobs go out, if that is given.
pub fn start(provider: Provider, network: &Network, bytes_per_second_max: Option<u64>) -> Result<(), Failure> {
    let accept = |protocol| {
        let accepted = network.streams.clone().accept(protocol);
        accepted.map_err(|error| Failure::new(Kind::Other, format!("cannot accept streams: {error}")))
    };
    let mut incoming = accept(libp2p::StreamProtocol::new(FETCH_PROTOCOL))?;
    let provider = Arc::new(provider);
    let friends = &network.friends;
    let exchanges = StreamSlots::new("an exchange stream", STREAMS, friends.clone());
    let exchange = accept(upload::protocol())?;
    tokio::spawn(upload::serve(Arc::clone(&provider), exchange, exchanges, network.peers.clone(), bytes_per_second_max));
    let slots = StreamSlots::new("a fetch stream", STREAMS, friends.clone());
    tokio::spawn(async move {
        while let Some((peer, stream)) = incoming.next().await {
            // The queue behind `incoming` has no room: take each stream off at once and decide afterwards.
            let Some(slot) = slots.take(peer) else { continue };
            let provider = Arc::clone(&provider);
            tokio::spawn(async move {
                let end = slot.hold(serve(&provider, peer, stream, &slot)).await;
                debug!(%peer, reason = ?end.err(), "stream ended");
            });
        }
    });
    Ok(())
}

async fn serve(provider: &Arc<Provider>, peer: PeerId, mut stream: Stream, slot: &StreamSlot) -> std::io::Result<()> {
    write(&mut stream, &[STREAM_ACK], &[]).await?;
    let mut request = [0; REQUEST_BYTES];
    let mut patience = FIRST_TIMEOUT;
    loop {
        timeout(patience, stream.read_exact(&mut request)).await??;
        patience = IDLE_TIMEOUT;
        slot.note_request();
        let Ok(request) = Request::from_bytes(&request) else {
            write(&mut stream, &FetchAnswer::Refused.to_bytes(), &[]).await?;
            return stream.close().await;
        };
        // Reading a manifest or counting what is here may take a disk's time.
        let answering = Arc::clone(provider);
        let answered = tokio::task::spawn_blocking(move || answer(&answering, &peer, request)).await;
        let (answer, bytes) = answered.map_err(std::io::Error::other)?;
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

fn answer(provider: &Provider, peer: &PeerId, request: Request) -> (FetchAnswer, Vec<u8>) {
    let whole = match request.subject {
        Subject::Manifest(id) => provider.own_status.models.envelope(id),
        Subject::Listing => Some(Arc::new(provider.own_status.models.listing())),
        Subject::Status => Some(Arc::new(provider.own_status.for_peer(peer).to_bytes())),
        Subject::Records => Some(provider.records()),
    };
    let Some(whole) = whole else { return (FetchAnswer::NotHave, Vec::new()) };
    match range(request, whole.len() as u64) {
        Some((answer, length)) => (answer, whole[request.offset as usize..][..length].to_vec()),
        None => (FetchAnswer::Refused, Vec::new()),
    }
}

/// The head of the answer to a request for part of `total` bytes, and how many follow; nothing beyond the end.
fn range(request: Request, total: u64) -> Option<(FetchAnswer, usize)> {
    let left = total.checked_sub(request.offset)?;
    let length = left.min(u64::from(request.length.min(RANGE_BYTES_MAX))) as u32;
    Some((FetchAnswer::Bytes { total, length }, length as usize))
}
