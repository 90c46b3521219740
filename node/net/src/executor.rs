//! Runs experts for peers that this node works for: their activations in, results and a signed receipt out.
//!
//! One thread computes, whoever asks; a request waits in a short queue or is told that the node is busy. Streams of several peers take
//! turns, since each has one request under way.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc as std_mpsc};
use std::time::Duration;

use base::clock::now_ms;
use base::failure::{Failure, Kind};
use base::threads;
use futures::{AsyncReadExt, AsyncWriteExt, StreamExt};
use inference::aligned::AlignedBytes;
use inference::expert::Expert;
use inference::expert_memory::ExpertMemory;
use inference::expert_runner::ExpertRunner;
use inference::kernels::Kernels;
use libp2p::{PeerId, Stream, StreamProtocol};
use protocol::execute::{
    self, EXECUTE_PROTOCOL, ExecuteAnswer, ExecuteRequest, REQUEST_BYTES_MAX, REQUEST_HEAD_BYTES, RESULT_BYTES_MAX, Receipt, ReceiptResult,
    Refusal, RequestHead, row_bytes,
};
use protocol::expert_blob::ExpertShape;
use protocol::message::STREAM_ACK;
use protocol::{ContentHash, NodeKey};
use store::BlobStore;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::{debug, warn};

use crate::allowed::AllowedPeers;
use crate::byte_budget::ByteBudget;
use crate::network::Network;
use crate::own_models::OwnModels;
use crate::stream_slots::{SlotLimits, StreamSlot, StreamSlots};

/// Streams of peers that this node works for.
const STREAMS: SlotLimits = SlotLimits { strangers: 32, friends: 16, of_one: 4 };
/// Streams of others: each is told so when it asks, and closed.
const REFUSALS: SlotLimits = SlotLimits { strangers: 8, friends: 8, of_one: 1 };
/// Requests that wait for the thread that computes.
const QUEUE_MAX: usize = 16;
/// Experts that wait to be read ahead.
const HINTS_MAX: usize = 64;
/// Shapes of experts that memory to compute is kept for.
const SHAPES_MAX: usize = 8;
/// Bytes of requests and results under way, of all peers: this, or a quarter of what experts may take, but never less than a request.
const UNDER_WAY_BYTES_MAX: usize = 128 << 20;
const UNDER_WAY_BYTES_MIN: usize = RESULT_BYTES_MAX + REQUEST_BYTES_MAX;
/// Who opens a stream, and is not worked for, has this long to ask and be told.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(5);
const FIRST_TIMEOUT: Duration = Duration::from_secs(60);
const IDLE_TIMEOUT: Duration = Duration::from_secs(600);
/// For the body of a request, and for writing one answer: a peer that is slower is let go.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(30);

/// How a node works for others.
pub struct ExecutorOptions {
    pub key: NodeKey,
    /// For whom.
    pub works_for: AllowedPeers,
    pub threads: usize,
    pub kernels: &'static Kernels,
    /// Where experts stay.
    pub memory: ExpertMemory,
    /// Bytes that all may take.
    pub bytes_max: u64,
}

struct Work {
    request: ExecuteRequest,
    answers: mpsc::Sender<(ExecuteAnswer, Vec<u8>)>,
}

/// What streams hand their requests to.
#[derive(Clone)]
struct Desk {
    queue: std_mpsc::SyncSender<Work>,
    hints: std_mpsc::SyncSender<ContentHash>,
    under_way: ByteBudget,
}

/// Accepts streams until the network ends. Only experts of `models` run.
pub fn start(models: Arc<dyn OwnModels>, options: ExecutorOptions, network: &Network) -> Result<(), Failure> {
    let accepted = network.streams.clone().accept(StreamProtocol::new(EXECUTE_PROTOCOL));
    let mut incoming = accepted.map_err(|error| Failure::new(Kind::Other, format!("cannot accept streams: {error}")))?;
    let (queue, work) = std_mpsc::sync_channel(QUEUE_MAX);
    let works_for = options.works_for.clone();
    let under_way = (options.bytes_max / 4).min(UNDER_WAY_BYTES_MAX as u64) as usize;
    let experts = Arc::new(HotExperts::new(models, options.memory.clone()));
    let (hints, ahead) = std_mpsc::sync_channel(HINTS_MAX);
    let reading = Arc::clone(&experts);
    threads::start("executor-reader", ahead, move || {
        let reading = Arc::clone(&reading);
        move |hash| drop(reading.get(hash))
    });
    let options = Arc::new(options);
    threads::start("executor", work, move || {
        let mut worker = Worker { experts: Arc::clone(&experts), runners: HashMap::new(), options: Arc::clone(&options) };
        move |work| worker.work(work)
    });
    let desk = Desk { queue, hints, under_way: ByteBudget::new(under_way.max(UNDER_WAY_BYTES_MIN)) };
    let slots = StreamSlots::new("an execute stream", STREAMS, network.friends.clone());
    let refusals = StreamSlots::new("an execute stream of a peer that this node does not work for", REFUSALS, network.friends.clone());
    tokio::spawn(async move {
        while let Some((peer, stream)) = incoming.next().await {
            let allowed = works_for.includes(&peer);
            let Some(slot) = if allowed { &slots } else { &refusals }.take(peer) else { continue };
            let desk = desk.clone();
            tokio::spawn(async move {
                let end = if allowed {
                    slot.hold(serve(stream, peer, &desk, &slot)).await
                } else {
                    slot.hold(async { timeout(REFUSAL_TIMEOUT, refuse(stream)).await? }).await
                };
                debug!(%peer, reason = ?end.err(), "execute stream ended");
            });
        }
    });
    Ok(())
}

/// Tells a peer that this node does not work for it, once it asks.
async fn refuse(mut stream: Stream) -> std::io::Result<()> {
    write(&mut stream, &[STREAM_ACK], &[]).await?;
    let mut head = [0; REQUEST_HEAD_BYTES];
    stream.read_exact(&mut head).await?;
    let (number, _) = numbered(&head);
    write(&mut stream, &ExecuteAnswer::Refused(Refusal::NotAllowed).to_bytes(number), &[]).await?;
    stream.close().await
}

/// The number of a request, and its head if that makes sense.
fn numbered(head: &[u8; REQUEST_HEAD_BYTES]) -> (u64, Option<RequestHead>) {
    let number = u64::from_le_bytes(*head.first_chunk().expect("a head begins with its number"));
    (number, RequestHead::from_bytes(head).ok())
}

async fn serve(mut stream: Stream, peer: PeerId, desk: &Desk, slot: &StreamSlot) -> std::io::Result<()> {
    write(&mut stream, &[STREAM_ACK], &[]).await?;
    let mut patience = FIRST_TIMEOUT;
    loop {
        let mut head = [0; REQUEST_HEAD_BYTES];
        timeout(patience, stream.read_exact(&mut head)).await??;
        patience = IDLE_TIMEOUT;
        slot.note_request();
        let (number, head) = numbered(&head);
        let Some(head) = head else {
            write(&mut stream, &ExecuteAnswer::Refused(Refusal::Malformed).to_bytes(number), &[]).await?;
            return stream.close().await;
        };
        // Before anything is allocated: what is announced counts until the last answer is written.
        let body_bytes = head.body_bytes();
        let held = desk.under_way.take(peer, body_bytes + head.uses as usize * head.hidden_size as usize * 4);
        if held.is_none() {
            skip(&mut stream, body_bytes).await?;
            if !head.is_hint() {
                write(&mut stream, &ExecuteAnswer::Refused(Refusal::Busy).to_bytes(number), &[]).await?;
            }
            continue;
        }
        let mut body = vec![0; body_bytes];
        timeout(TRANSFER_TIMEOUT, stream.read_exact(&mut body)).await??;
        if head.is_hint() {
            // What does not fit into the queue is read when it is asked for.
            for hash in execute::hinted(&body) {
                let _ = desk.hints.try_send(hash);
            }
            continue;
        }
        let Ok(request) = ExecuteRequest::from_body(&head, &body) else {
            write(&mut stream, &ExecuteAnswer::Refused(Refusal::Malformed).to_bytes(number), &[]).await?;
            return stream.close().await;
        };
        drop(body);
        // Room for every answer: the thread that computes never waits for a peer that does not read.
        let (answers, mut said) = mpsc::channel(request.tasks.len() + 1);
        if desk.queue.try_send(Work { request, answers }).is_err() {
            write(&mut stream, &ExecuteAnswer::Refused(Refusal::Busy).to_bytes(number), &[]).await?;
            continue;
        }
        while let Some((answer, bytes)) = said.recv().await {
            write(&mut stream, &answer.to_bytes(number), &bytes).await?;
        }
        drop(held);
    }
}

/// Reads so many bytes and keeps none.
async fn skip(stream: &mut Stream, bytes: usize) -> std::io::Result<()> {
    let mut rest = stream.take(bytes as u64);
    let skipped = timeout(TRANSFER_TIMEOUT, futures::io::copy(&mut rest, &mut futures::io::sink())).await??;
    if skipped == bytes as u64 { Ok(()) } else { Err(std::io::ErrorKind::UnexpectedEof.into()) }
}

async fn write(stream: &mut Stream, head: &[u8], bytes: &[u8]) -> std::io::Result<()> {
    timeout(TRANSFER_TIMEOUT, async {
        stream.write_all(head).await?;
        stream.write_all(bytes).await?;
        stream.flush().await
    })
    .await?
}

/// The thread that computes.
struct Worker {
    options: Arc<ExecutorOptions>,
    experts: Arc<HotExperts>,
    runners: HashMap<ExpertShape, ExpertRunner>,
}

impl Worker {
    /// Answers a request; when the peer has gone, the rest is left.
    fn work(&mut self, Work { request, answers }: Work) {
        let width = request.hidden_size as usize;
        let rows: Vec<&[u8]> = request.rows.chunks_exact(row_bytes(width)).collect();
        let mut receipt = Vec::with_capacity(request.tasks.len());
        for (number, task) in request.tasks.iter().enumerate() {
            let number = number as u16;
            let Some(expert) = self.experts.get(task.expert) else {
                if answers.try_send((ExecuteAnswer::NotHave { task: number }, Vec::new())).is_err() {
                    return;
                }
                continue;
            };
            let shape = expert.shape();
            if !shape.precision.is_packed() || shape.hidden_size != width {
                let _ = answers.try_send((ExecuteAnswer::Refused(Refusal::Unsuitable), Vec::new()));
                return;
            }
            let rows: Vec<&[u8]> = task.rows.iter().map(|&row| rows[usize::from(row)]).collect();
            let mut results = Vec::with_capacity(rows.len() * width * 4);
            self.runner(shape).run(&expert, &rows, &mut results);
            receipt.push(ReceiptResult {
                expert: task.expert,
                input: ContentHash::of(&request.input(task)),
                output: ContentHash::of(&results),
            });
            let answer = ExecuteAnswer::Results { task: number, length: results.len() as u32 };
            if answers.try_send((answer, results)).is_err() {
                return;
            }
            // On a single core, whoever sends it would wait until all is computed.
            std::thread::yield_now();
        }
        let receipt = Receipt::seal(&self.options.key, request.nonce, receipt).as_bytes().to_vec();
        let _ = answers.try_send((ExecuteAnswer::Done { length: receipt.len() as u32 }, receipt));
    }

    fn runner(&mut self, shape: ExpertShape) -> &mut ExpertRunner {
        if self.runners.len() >= SHAPES_MAX && !self.runners.contains_key(&shape) {
            self.runners.clear();
        }
        let (threads, kernels) = (self.options.threads, self.options.kernels);
        self.runners.entry(shape).or_insert_with(|| ExpertRunner::new(shape, threads, kernels))
    }
}

/// Experts in memory, which the models that are loaded share; others come from the store.
struct HotExperts {
    models: Arc<dyn OwnModels>,
    memory: ExpertMemory,
    /// Being read: whoever wants one of these waits for it.
    reading: Mutex<HashSet<ContentHash>>,
    /// Told whenever a read has ended.
    read: Condvar,
}

impl HotExperts {
    fn new(models: Arc<dyn OwnModels>, memory: ExpertMemory) -> Self {
        Self { models, memory, reading: Mutex::default(), read: Condvar::new() }
    }

    /// An expert of a model that is here, if the store has it. What else has that hash, a trunk's table say, is not looked at.
    fn get(&self, hash: ContentHash) -> Option<Arc<Expert>> {
        if !self.models.has_expert(&hash) {
            return None;
        }
        let reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let mut reading = self.read.wait_while(reading, |reading| reading.contains(&hash)).unwrap_or_else(PoisonError::into_inner);
        if let Some(expert) = self.memory.lock().find_expert(&hash) {
            return Some(expert);
        }
        let store = self.models.store();
        let length = store.length(&hash)? as usize;
        reading.insert(hash);
        drop(reading);
        let _done = ReadEnds { experts: self, hash };
        // Before it is read: memory for two experts where there is room for one is too much.
        let buffer = self.memory.lock().buffer(length);
        let expert = Arc::new(load_into(store, hash, buffer)?);
        self.memory.lock().insert_new(hash, Arc::clone(&expert));
        Some(expert)
    }
}

/// The end of a read, also of one that failed: others wait for it.
struct ReadEnds<'a> {
    experts: &'a HotExperts,
    hash: ContentHash,
}

impl Drop for ReadEnds<'_> {
    fn drop(&mut self) {
        self.experts.reading.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.hash);
        self.experts.read.notify_all();
    }
}

/// Reads and verifies an expert of any shape from the store.
pub fn load(store: &BlobStore, hash: ContentHash) -> Option<Expert> {
    let length = store.length(&hash)? as usize;
    load_into(store, hash, AlignedBytes::zeroed(length))
}

/// The same, into memory of its length.
fn load_into(store: &BlobStore, hash: ContentHash, mut bytes: AlignedBytes) -> Option<Expert> {
    let length = bytes.len();
    match store.read_pages(&hash, bytes.whole_pages(), length, now_ms()) {
        Ok(true) => {}
        Ok(false) => return None,
        Err(error) => {
            warn!(%hash, %error, "cannot read an expert");
            return None;
        }
    }
    let shape = ExpertShape::of_blob(&bytes).ok()?;
    Expert::from_verified(bytes, shape).ok()
}
