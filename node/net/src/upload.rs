//! Serves blobs by group to whoever asks: drives `protocol::exchange` with streams, files and a clock.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use base::clock::now_ms;
use futures::io::{ReadHalf, WriteHalf};
use futures::{AsyncReadExt, AsyncWriteExt, StreamExt};
use libp2p::{PeerId, Stream, StreamProtocol};
use protocol::exchange::upload_events::{Sent, UploadAction, UploadEvent};
use protocol::exchange::uploads::{REQUESTS_MAX, Uploads};
use protocol::exchange::wire::{EXCHANGE_PROTOCOL, HEAD_BYTES, MessageHead};
use protocol::exchange::{Bitfield, FromProvider, ToProvider};
use protocol::{ContentHash, ModelId};
use store::{BlobReader, BlobStore};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, timeout};
use tracing::{debug, warn};

use crate::network::Peers;
use crate::offered::Provider;
use crate::stream_slots::{StreamSlot, StreamSlots};

const HAPPENED_MAX: usize = 256;
/// Messages that wait to be written to one peer: an answer to each of its requests.
const OUTGOING_MAX: usize = 2 * REQUESTS_MAX as usize;
const TICK: Duration = Duration::from_millis(100);
/// Who opens a stream wants something; while others are quicker to send it, that may take a while.
const FIRST_TIMEOUT: Duration = Duration::from_secs(30);
const IDLE_TIMEOUT: Duration = Duration::from_secs(600);

/// A stream, by the order of coming: a peer may have several.
type StreamNumber = u64;

enum Happened {
    Requested(StreamNumber, ToProvider),
    Ended(StreamNumber, String),
    Sent(StreamNumber, u64),
    Opened(ContentHash, Option<Arc<BlobReader>>),
    /// A group can no longer be read: its blob is opened anew, and so verified anew, before anything more of it is sent.
    Damaged(ContentHash),
    Model(StreamNumber, u32, ModelId, Option<Arc<Vec<ContentHash>>>),
}

/// What is written to a peer: a message, or one that takes a read first.
enum Outgoing {
    Ready(FromProvider<Vec<u8>>, u64),
    Group { id: u32, hash: ContentHash, length: u64, read: JoinHandle<io::Result<Option<Vec<u8>>>> },
}

struct Serving {
    provider: Arc<Provider>,
    slots: StreamSlots,
    machine: Uploads<StreamNumber>,
    began: Instant,
    streams: HashMap<StreamNumber, Served>,
    next_stream: StreamNumber,
    open: HashMap<ContentHash, Arc<BlobReader>>,
    followed: HashMap<ModelId, (Arc<Vec<ContentHash>>, Bitfield)>,
    generation: u64,
    happened: mpsc::Sender<Happened>,
}

/// One stream; its tasks end with it.
struct Served {
    outgoing: mpsc::Sender<Outgoing>,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Served {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Serves until the network ends.
pub(super) async fn serve(
    provider: Arc<Provider>,
    mut incoming: libp2p_stream::IncomingStreams,
    slots: StreamSlots,
    peers: watch::Receiver<Peers>,
    bytes_per_second_max: Option<u64>,
) {
    let (happened, mut happenings) = mpsc::channel(HAPPENED_MAX);
    let generation = provider.store.generation();
    let mut serving = Serving {
        provider,
        slots,
        machine: Uploads::new(bytes_per_second_max),
        began: Instant::now(),
        streams: HashMap::new(),
        next_stream: 0,
        open: HashMap::new(),
        followed: HashMap::new(),
        generation,
        happened,
    };
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            // The queue behind `incoming` has no room: take each stream off at once and decide afterwards.
            stream = incoming.next() => match stream {
                // A relay gives way to little, and somebody else pays for it.
                Some((peer, _)) if peers.borrow().relayed.contains(&peer) => warn!(%peer, "refused a stream through a relay"),
                Some((peer, stream)) => serving.begin(peer, stream),
                None => return,
            },
            Some(happened) = happenings.recv() => serving.on_happened(happened),
            _ = tick.tick(), if !serving.streams.is_empty() => {
                serving.tell_changes();
                serving.tell(UploadEvent::Tick);
            }
        }
    }
}

/// The protocol that is served here.
pub(super) fn protocol() -> StreamProtocol {
    StreamProtocol::new(EXCHANGE_PROTOCOL)
}

impl Serving {
    fn begin(&mut self, peer: PeerId, stream: Stream) {
        let Some(slot) = self.slots.take(peer) else { return };
        self.next_stream += 1;
        let number = self.next_stream;
        let (outgoing, queue) = mpsc::channel(OUTGOING_MAX);
        let (reader, writer) = stream.split();
        let hello = Outgoing::Ready(FromProvider::Hello { requests_max: REQUESTS_MAX }, 0);
        let _ = outgoing.try_send(hello);
        let (reading, writing) = (self.happened.clone(), self.happened.clone());
        let tasks = [
            tokio::spawn(async move {
                let end = slot
                    .hold(read(reader, number, &slot, &reading))
                    .await
                    .err()
                    .map_or_else(|| "closed".to_owned(), |error| error.to_string());
                let _ = reading.send(Happened::Ended(number, end)).await;
            }),
            tokio::spawn(async move {
                if let Err(error) = write(writer, queue, number, &writing).await {
                    let _ = writing.send(Happened::Ended(number, error.to_string())).await;
                }
            }),
        ];
        self.streams.insert(number, Served { outgoing, tasks });
        self.tell(UploadEvent::PeerUp { peer: number });
    }

    fn on_happened(&mut self, happened: Happened) {
        match happened {
            Happened::Requested(stream, message) => {
                if self.streams.contains_key(&stream) {
                    self.tell(UploadEvent::Received { peer: stream, message });
                }
            }
            Happened::Ended(stream, reason) => {
                if self.streams.remove(&stream).is_some() {
                    debug!(stream, reason, "stream ended");
                    self.tell(UploadEvent::PeerDown { peer: stream });
                }
            }
            Happened::Sent(stream, bytes) => self.tell(UploadEvent::Sent { peer: stream, bytes }),
            Happened::Opened(hash, reader) => {
                let length = reader.as_ref().map(|reader| reader.length());
                self.open.extend(reader.map(|reader| (hash, reader)));
                self.tell(UploadEvent::Opened { hash, length });
            }
            Happened::Damaged(hash) => {
                self.open.remove(&hash);
                self.tell(UploadEvent::Opened { hash, length: None });
            }
            Happened::Model(stream, id, model, blobs) => {
                let message = match blobs {
                    Some(blobs) => {
                        let bits = self.followed.entry(model).or_insert_with(|| {
                            let bits = bits_of(&self.provider.store, &blobs);
                            (blobs, bits)
                        });
                        FromProvider::Have { id, bits: bits.1.clone() }
                    }
                    None => FromProvider::NotHave { id },
                };
                self.send(stream, Outgoing::Ready(message, 0));
            }
        }
    }

    /// Tells the machine something, and does what it says.
    fn tell(&mut self, event: UploadEvent<StreamNumber>) {
        let now_ms = self.began.elapsed().as_millis() as u64;
        for action in self.machine.handle(now_ms, event) {
            match action {
                UploadAction::Open { hash } => self.open(hash),
                UploadAction::Shut { hash } => drop(self.open.remove(&hash)),
                UploadAction::Send { peer, what } => self.answer(peer, what),
                UploadAction::HangUp { peer, why } => {
                    debug!(stream = peer, why, "hung up on");
                    self.streams.remove(&peer);
                }
            }
        }
    }

    fn open(&self, hash: ContentHash) {
        let (provider, happened) = (Arc::clone(&self.provider), self.happened.clone());
        tokio::task::spawn_blocking(move || {
            let reader = provider.store.reader(&hash, now_ms()).unwrap_or_else(|error| {
                warn!(%hash, %error, "cannot serve a blob");
                None
            });
            let _ = happened.blocking_send(Happened::Opened(hash, reader.map(Arc::new)));
        });
    }

    fn answer(&mut self, stream: StreamNumber, what: Sent) {
        let message = match what {
            Sent::Have { id, model } => return self.look_up(stream, id, model),
            Sent::Update { id, changes } => FromProvider::Update { id, changes },
            Sent::Hashes { id, hash } => {
                let Some(groups) = self.open.get(&hash).and_then(|reader| reader.groups()) else {
                    return self.send(stream, Outgoing::Ready(FromProvider::NotHave { id }, 0));
                };
                let hashes = groups.hashes().to_vec();
                let bytes = 32 * hashes.len() as u64;
                return self.send(stream, Outgoing::Ready(FromProvider::Hashes { id, hashes }, bytes));
            }
            Sent::Group { id, hash, group, length } => {
                let reader = self.open.get(&hash).cloned();
                let read = tokio::task::spawn_blocking(move || match reader {
                    Some(reader) => reader.read_group(group),
                    None => Ok(None),
                });
                return self.send(stream, Outgoing::Group { id, hash, length, read });
            }
            Sent::NotHave { id } => FromProvider::NotHave { id },
            Sent::Busy { id, retry_ms } => FromProvider::Busy { id, retry_ms },
            Sent::Wait { id } => FromProvider::Wait { id },
        };
        self.send(stream, Outgoing::Ready(message, 0));
    }

    /// Queues something for a stream; one that reads none of what it asks for is ended.
    fn send(&mut self, stream: StreamNumber, outgoing: Outgoing) {
        let Some(served) = self.streams.get(&stream) else { return };
        if served.outgoing.try_send(outgoing).is_err() {
            self.streams.remove(&stream);
            let happened = self.happened.clone();
            // The machine is in the middle of something: it hears of it afterwards.
            tokio::spawn(async move { happened.send(Happened::Ended(stream, "it reads nothing".to_owned())).await });
        }
    }

    fn look_up(&self, stream: StreamNumber, id: u32, model: ModelId) {
        let (provider, happened) = (Arc::clone(&self.provider), self.happened.clone());
        tokio::task::spawn_blocking(move || {
            let blobs = provider.blobs_of(model);
            let _ = happened.blocking_send(Happened::Model(stream, id, model, blobs));
        });
    }

    /// Tells those who follow a model what has come or gone.
    fn tell_changes(&mut self) {
        let generation = self.provider.store.generation();
        if generation == self.generation {
            return;
        }
        self.generation = generation;
        let mut changed = Vec::new();
        for (model, (blobs, bits)) in &mut self.followed {
            let now = bits_of(&self.provider.store, blobs);
            let changes: Vec<_> = (0..now.count()).filter(|&i| now.get(i) != bits.get(i)).map(|i| (i, now.get(i))).collect();
            *bits = now;
            changed.push((*model, changes));
        }
        for (model, changes) in changed.into_iter().filter(|(_, changes)| !changes.is_empty()) {
            self.tell(UploadEvent::Changed { model, changes });
        }
    }
}

fn bits_of(store: &BlobStore, blobs: &[ContentHash]) -> Bitfield {
    let mut bits = Bitfield::new(blobs.len() as u32);
    for (index, hash) in blobs.iter().enumerate() {
        bits.set(index as u32, store.contains(hash));
    }
    bits
}

async fn read(mut reader: ReadHalf<Stream>, number: StreamNumber, slot: &StreamSlot, happened: &mpsc::Sender<Happened>) -> io::Result<()> {
    let mut patience = FIRST_TIMEOUT;
    loop {
        let mut head = [0; HEAD_BYTES];
        timeout(patience, reader.read_exact(&mut head)).await??;
        let head = MessageHead::of_request(&head).map_err(io::Error::other)?;
        let mut body = vec![0; head.length as usize]; // within the limit of its kind
        timeout(IDLE_TIMEOUT, reader.read_exact(&mut body)).await??;
        let message = ToProvider::from_body(head, &body).map_err(io::Error::other)?;
        patience = IDLE_TIMEOUT;
        slot.note_request();
        if happened.send(Happened::Requested(number, message)).await.is_err() {
            return Ok(());
        }
    }
}

async fn write(
    mut writer: WriteHalf<Stream>,
    mut queue: mpsc::Receiver<Outgoing>,
    number: StreamNumber,
    happened: &mpsc::Sender<Happened>,
) -> io::Result<()> {
    while let Some(outgoing) = queue.recv().await {
        let (message, sent) = match outgoing {
            Outgoing::Ready(message, sent) => (message, sent),
            Outgoing::Group { id, hash, length, read } => match read.await.unwrap_or_else(|error| Err(io::Error::other(error))) {
                Ok(Some(bytes)) => (FromProvider::Group { id, bytes }, length),
                unreadable => {
                    warn!(%hash, error = ?unreadable.err(), "cannot serve a group");
                    let _ = happened.send(Happened::Damaged(hash)).await;
                    (FromProvider::NotHave { id }, length)
                }
            },
        };
        write_message(&mut writer, message).await?;
        if queue.is_empty() {
            writer.flush().await?;
        }
        if sent > 0 && happened.send(Happened::Sent(number, sent)).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// Writes a message; the bytes of a group are not copied.
async fn write_message(writer: &mut WriteHalf<Stream>, message: FromProvider<Vec<u8>>) -> io::Result<()> {
    match message {
        FromProvider::Group { id, bytes } => {
            writer.write_all(&MessageHead::of_group(id, bytes.len() as u32).to_bytes()).await?;
            writer.write_all(&bytes).await
        }
        other => writer.write_all(&other.to_bytes()).await,
    }
}
