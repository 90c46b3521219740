//! One peer's exchange stream, as the side that wants sees it: opened, read and written. What to say is the fetcher's business.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::io::{ReadHalf, WriteHalf};
use futures::{AsyncReadExt, AsyncWriteExt};
use libp2p::{PeerId, Stream};
use protocol::exchange::wire::{EXCHANGE_PROTOCOL, HEAD_BYTES, MalformedExchange, MessageHead, MessageKind};
use protocol::exchange::{FromProvider, ToProvider};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::debug;

pub use super::assembly::Sink;
use super::stream;
pub use super::wanted::Wanted;

/// Messages that wait to be written: all requests that a peer takes, and as many that take them back.
const TO_PEER_MAX: usize = 4096;
/// Progress is noticed by so many bytes.
const PIECE_BYTES: usize = 64 << 10;

/// What a link tells the fetcher.
#[derive(Debug)]
pub(crate) struct Heard {
    pub peer: PeerId,
    /// Which of the peer's links: an older one may still speak when there is a newer.
    pub link: u64,
    pub what: LinkEvent,
}

/// What there is to tell.
#[derive(Debug)]
pub enum LinkEvent {
    /// The peer has taken the stream on, and takes so many requests.
    Up(u32),
    Said(FromProvider<Vec<u8>>),
    /// The stream has ended, with the reason.
    Ended(String),
    /// The peer said what is no message.
    Malformed(MalformedExchange),
}

/// A running link; it ends when this is dropped.
pub struct Link {
    pub number: u64,
    to_peer: mpsc::Sender<ToProvider>,
    received: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Link {
    /// Starts a link; `arrived` counts the bytes of blobs from all peers, as they come.
    pub(crate) fn start(
        peer: PeerId,
        number: u64,
        streams: libp2p_stream::Control,
        heard: mpsc::Sender<Heard>,
        arrived: Arc<AtomicU64>,
    ) -> Self {
        let (to_peer, queue) = mpsc::channel(TO_PEER_MAX);
        let received = Arc::new(AtomicU64::new(0));
        let counts = Counts { here: Arc::clone(&received), arrived };
        let task = tokio::spawn(async move {
            let tell = |what| heard.send(Heard { peer, link: number, what });
            let end = match stream::open(peer, streams, EXCHANGE_PROTOCOL, greeting).await {
                Ok((stream, requests_max)) => {
                    let _ = tell(LinkEvent::Up(requests_max)).await;
                    let (reader, writer) = stream.split();
                    tokio::select! {
                        end = read(reader, &counts, |message| tell(LinkEvent::Said(message))) => end,
                        end = write(writer, queue) => LinkEvent::Ended(end.err().map_or_else(|| "closed".to_owned(), |error| error.to_string())),
                    }
                }
                Err(end) => end,
            };
            debug!(%peer, ?end, "link ended");
            let _ = tell(end).await;
        });
        Self { number, to_peer, received, task }
    }

    /// Says something to the peer; fails when far too much waits to be said.
    pub(crate) fn say(&self, message: ToProvider) -> Result<(), ()> {
        self.to_peer.try_send(message).map_err(drop)
    }

    /// Bytes that have come on this link.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Counts {
    here: Arc<AtomicU64>,
    arrived: Arc<AtomicU64>,
}

impl From<io::Error> for LinkEvent {
    fn from(error: io::Error) -> Self {
        Self::Ended(error.to_string())
    }
}

/// How many requests the peer takes.
async fn greeting(stream: &mut Stream) -> Result<u32, LinkEvent> {
    let mut head = [0; HEAD_BYTES];
    stream.read_exact(&mut head).await?;
    let head = MessageHead::of_answer(&head).map_err(LinkEvent::Malformed)?;
    let mut body = vec![0; head.length as usize]; // within the limit of its kind
    stream.read_exact(&mut body).await?;
    match FromProvider::from_body(head, body).map_err(LinkEvent::Malformed)? {
        FromProvider::Hello { requests_max } => Ok(requests_max),
        _ => Err(LinkEvent::Malformed(MalformedExchange("greeting"))),
    }
}

/// Reads until the stream ends; returns how it did.
async fn read<F: Future<Output = Result<(), mpsc::error::SendError<Heard>>>>(
    mut reader: ReadHalf<Stream>,
    counts: &Counts,
    tell: impl Fn(FromProvider<Vec<u8>>) -> F,
) -> LinkEvent {
    loop {
        match read_message(&mut reader, counts).await {
            Ok(Ok(message)) => {
                if tell(message).await.is_err() {
                    return LinkEvent::Ended("nobody listens".to_owned());
                }
            }
            Ok(Err(malformed)) => return LinkEvent::Malformed(malformed),
            Err(error) => return LinkEvent::Ended(error.to_string()),
        }
    }
}

async fn read_message(reader: &mut ReadHalf<Stream>, counts: &Counts) -> io::Result<Result<FromProvider<Vec<u8>>, MalformedExchange>> {
    let mut head = [0; HEAD_BYTES];
    reader.read_exact(&mut head).await?;
    counts.here.fetch_add(HEAD_BYTES as u64, Ordering::Relaxed);
    let head = match MessageHead::of_answer(&head) {
        Ok(head) => head,
        Err(malformed) => return Ok(Err(malformed)),
    };
    let of_blob = matches!(head.kind, MessageKind::Group | MessageKind::Hashes);
    let mut body = vec![0; head.length as usize]; // within the limit of its kind
    for piece in body.chunks_mut(PIECE_BYTES) {
        reader.read_exact(piece).await?;
        counts.here.fetch_add(piece.len() as u64, Ordering::Relaxed);
        if of_blob {
            counts.arrived.fetch_add(piece.len() as u64, Ordering::Relaxed);
        }
    }
    Ok(FromProvider::from_body(head, body))
}

/// Writes until nobody has anything more to say.
async fn write(mut writer: WriteHalf<Stream>, mut queue: mpsc::Receiver<ToProvider>) -> io::Result<()> {
    while let Some(message) = queue.recv().await {
        let mut bytes = message.to_bytes();
        while let Ok(more) = queue.try_recv() {
            bytes.extend(more.to_bytes());
        }
        writer.write_all(&bytes).await?;
        writer.flush().await?;
    }
    Ok(())
}
