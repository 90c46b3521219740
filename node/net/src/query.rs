//! Questions about experts, asked of peers and answered for them.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base::clock::now_ms;
use base::failure::{Failure, Kind};
use futures::future::join_all;
use futures::{AsyncReadExt, AsyncWriteExt, StreamExt};
use libp2p::{PeerId, Stream, StreamProtocol};
use protocol::message::STREAM_ACK;
use protocol::query::{ANSWER_BYTES_MAX, QUERY_BYTES_MAX, QUERY_PROTOCOL, Query, QueryAnswer};
use protocol::record::rate::{Allowance, RateLimits};
use tokio::time::timeout;
use tracing::debug;

use super::stream;
use super::stream_slots::{SlotLimits, StreamSlot, StreamSlots};
use crate::network::Network;

/// Streams of questions.
const STREAMS: SlotLimits = SlotLimits { strangers: 24, friends: 8, of_one: 2 };
/// Questions that one peer may ask: each takes a ranking.
const OF_PEER: Allowance = Allowance { burst: 20, per_second: 1 };
/// Who opens a stream, or has had an answer, has this long to ask.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(10);
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Answers what peers ask, until the network ends.
pub fn start(network: &Network, answer: impl Fn(&Query) -> QueryAnswer + Send + Sync + 'static) -> Result<(), Failure> {
    let accepted = network.streams.clone().accept(StreamProtocol::new(QUERY_PROTOCOL));
    let mut incoming = accepted.map_err(|error| Failure::new(Kind::Other, format!("cannot accept streams: {error}")))?;
    let (answer, slots) = (Arc::new(answer), StreamSlots::new("a question", STREAMS, network.friends.clone()));
    let rates = Arc::new(Mutex::new(RateLimits::new(OF_PEER)));
    tokio::spawn(async move {
        while let Some((peer, stream)) = incoming.next().await {
            let Some(slot) = slots.take(peer) else { continue };
            let (answer, rates) = (Arc::clone(&answer), Arc::clone(&rates));
            tokio::spawn(async move {
                let may_ask = || rates.lock().unwrap_or_else(PoisonError::into_inner).take(now_ms(), peer);
                let end = slot.hold(serve(stream, &answer, &slot, may_ask)).await;
                debug!(%peer, reason = ?end.err(), "query stream ended");
            });
        }
    });
    Ok(())
}

async fn serve<F: Fn(&Query) -> QueryAnswer + Send + Sync + 'static>(
    mut stream: Stream,
    answer: &Arc<F>,
    slot: &StreamSlot,
    may_ask: impl Fn() -> bool,
) -> io::Result<()> {
    timeout(IDLE_TIMEOUT, write(&mut stream, &[STREAM_ACK])).await??;
    loop {
        let body = timeout(QUESTION_TIMEOUT, read(&mut stream, QUERY_BYTES_MAX)).await??;
        slot.note_request();
        let query = Query::from_body(&body).map_err(io::Error::other)?;
        if !may_ask() {
            return Err(io::Error::other("it asks too much"));
        }
        let answer = Arc::clone(answer);
        let answered = tokio::task::spawn_blocking(move || answer(&query)).await.map_err(io::Error::other)?;
        timeout(IDLE_TIMEOUT, write(&mut stream, &answered.to_frame())).await??;
    }
}

/// Asks all who are connected, each for as long as `patience`; those who do not answer are left out.
pub async fn ask_all(network: &Network, query: &Query, patience: Duration) -> Vec<(PeerId, QueryAnswer)> {
    let connected = network.peers.borrow().connected.clone();
    let ask = |peer| async move {
        match timeout(patience, ask(network, peer, query)).await {
            Ok(Ok(answer)) => Some((peer, answer)),
            Ok(Err(error)) => {
                debug!(%peer, %error, "has no answer");
                None
            }
            Err(_) => None,
        }
    };
    join_all(connected.into_iter().map(ask)).await.into_iter().flatten().collect()
}

async fn ask(network: &Network, peer: PeerId, query: &Query) -> io::Result<QueryAnswer> {
    let (mut stream, ()) = stream::open(peer, network.streams.clone(), QUERY_PROTOCOL, stream::acknowledged).await?;
    write(&mut stream, &query.to_frame()).await?;
    let body = read(&mut stream, ANSWER_BYTES_MAX).await?;
    QueryAnswer::from_body(&body).map_err(io::Error::other)
}

async fn write(stream: &mut Stream, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes).await?;
    stream.flush().await
}

/// Reads a frame. No more is reserved than has come.
async fn read(stream: &mut Stream, bytes_max: usize) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).await?;
    let length = u32::from_le_bytes(length) as usize;
    if length > bytes_max {
        return Err(io::Error::other(format!("a frame of {length} bytes; {bytes_max} is the most")));
    }
    let mut body = Vec::new();
    stream.take(length as u64).read_to_end(&mut body).await?;
    if body.len() == length { Ok(body) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}
