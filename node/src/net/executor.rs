//! Runs experts for peers that this node works for: their activations in, results and a signed receipt out.
//!
//! One thread computes, whoever asks; a request waits in a short queue or is told that the node is busy. Streams of several peers take
//! turns, since each has one request under way.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc as std_mpsc};
use std::time::Duration;

use futures::{AsyncReadExt, AsyncWriteExt, StreamExt};
use inference::aligned::AlignedBytes;
use inference::expert::Expert;
use inference::expert_runner::ExpertRunner;
use inference::kernels::Kernels;
use libp2p::{Stream, StreamProtocol};
use protocol::execute::{
    self, Answer, EXECUTE_PROTOCOL, ExecuteRequest, REQUEST_HEAD_BYTES, Receipt, ReceiptResult, Refusal, RequestHead, row_bytes,
};
use protocol::expert_blob::ExpertShape;
use protocol::message::STREAM_ACK;
use protocol::{ContentHash, NodeKey};
use store::BlobStore;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tracing::{debug, warn};

use crate::clock::now_ms;
use crate::failure::{Failure, Kind};
use crate::net::allowed::AllowedPeers;
use crate::net::network::Network;

/// Streams of all peers together.
const STREAMS_MAX: usize = 32;
/// Requests that wait for the thread that computes.
const QUEUE_MAX: usize = 16;
/// Experts that wait to be read ahead.
const FORETOLD_MAX: usize = 64;
/// Shapes of experts that memory to compute is kept for.
const SHAPES_MAX: usize = 8;
const IDLE_TIMEOUT: Duration = Duration::from_secs(600);
/// For the body of a request, and for writing one answer: a peer that is slower is let go.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(30);

/// How a node works for others.
pub(crate) struct ExecutorOptions {
    pub(crate) key: NodeKey,
    /// For whom.
    pub(crate) works_for: AllowedPeers,
    pub(crate) threads: usize,
    pub(crate) kernels: &'static Kernels,
    /// Bytes of experts that stay in memory.
    pub(crate) bytes_max: Arc<AtomicU64>,
}

struct Work {
    request: ExecuteRequest,
    answers: mpsc::Sender<(Answer, Vec<u8>)>,
}

/// Accepts streams until the network ends.
pub(crate) fn start(store: Arc<BlobStore>, options: ExecutorOptions, network: &Network) -> Result<(), Failure> {
    let accepted = network.streams.clone().accept(StreamProtocol::new(EXECUTE_PROTOCOL));
    let mut incoming = accepted.map_err(|error| Failure::new(Kind::Other, format!("cannot accept streams: {error}")))?;
    let (queue, work) = std_mpsc::sync_channel(QUEUE_MAX);
    let works_for = options.works_for.clone();
    let experts = Arc::new(HotExperts::new(store, Arc::clone(&options.bytes_max)));
    let (foretold, ahead) = std_mpsc::sync_channel(FORETOLD_MAX);
    let reading = Arc::clone(&experts);
    std::thread::spawn(move || ahead.into_iter().for_each(|hash| drop(reading.get(hash))));
    let mut worker = Worker { experts, runners: HashMap::new(), options };
    std::thread::spawn(move || work.into_iter().for_each(|work| worker.work(work)));
    let room = Arc::new(Semaphore::new(STREAMS_MAX));
    tokio::spawn(async move {
        while let Some((peer, stream)) = incoming.next().await {
            let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
                warn!(%peer, "refused an execute stream: {STREAMS_MAX} are open");
                continue;
            };
            let (queue, foretold, allowed) = (queue.clone(), foretold.clone(), works_for.includes(&peer));
            tokio::spawn(async move {
                let _held = permit;
                let end = serve(stream, allowed, &queue, &foretold).await;
                debug!(%peer, reason = ?end.err(), "execute stream ended");
            });
        }
    });
    Ok(())
}

async fn serve(
    mut stream: Stream,
    allowed: bool,
    queue: &std_mpsc::SyncSender<Work>,
    foretold: &std_mpsc::SyncSender<ContentHash>,
) -> std::io::Result<()> {
    write(&mut stream, &[STREAM_ACK], &[]).await?;
    loop {
        let mut head = [0; REQUEST_HEAD_BYTES];
        timeout(IDLE_TIMEOUT, stream.read_exact(&mut head)).await??;
        let number = u64::from_le_bytes(*head.first_chunk().expect("a head begins with its number"));
        let head = match RequestHead::from_bytes(&head) {
            Ok(head) if allowed => head,
            refused => {
                let why = if refused.is_ok() { Refusal::NotAllowed } else { Refusal::Malformed };
                write(&mut stream, &Answer::Refused(why).to_bytes(number), &[]).await?;
                return stream.close().await;
            }
        };
        let mut body = vec![0; head.body_bytes()]; // from counts within their limits
        timeout(TRANSFER_TIMEOUT, stream.read_exact(&mut body)).await??;
        if head.foretells() {
            // What does not fit into the queue is read when it is asked for.
            for hash in execute::foretold(&body) {
                let _ = foretold.try_send(hash);
            }
            continue;
        }
        let Ok(request) = ExecuteRequest::from_body(&head, &body) else {
            write(&mut stream, &Answer::Refused(Refusal::Malformed).to_bytes(number), &[]).await?;
            return stream.close().await;
        };
        drop(body);
        // Room for every answer: the thread that computes never waits for a peer that does not read.
        let (answers, mut said) = mpsc::channel(request.tasks.len() + 1);
        if queue.try_send(Work { request, answers }).is_err() {
            write(&mut stream, &Answer::Refused(Refusal::Busy).to_bytes(number), &[]).await?;
            continue;
        }
        while let Some((answer, bytes)) = said.recv().await {
            write(&mut stream, &answer.to_bytes(number), &bytes).await?;
        }
    }
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
    options: ExecutorOptions,
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
                if answers.try_send((Answer::NotHave { task: number }, Vec::new())).is_err() {
                    return;
                }
                continue;
            };
            let shape = expert.shape();
            if !shape.precision.is_packed() || shape.hidden_size != width {
                let _ = answers.try_send((Answer::Refused(Refusal::Unsuitable), Vec::new()));
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
            let answer = Answer::Results { task: number, length: results.len() as u32 };
            if answers.try_send((answer, results)).is_err() {
                return;
            }
            // On a single core, whoever sends it would wait until all is computed.
            std::thread::yield_now();
        }
        let receipt = Receipt::seal(&self.options.key, request.nonce, receipt).as_bytes().to_vec();
        let _ = answers.try_send((Answer::Done { length: receipt.len() as u32 }, receipt));
    }

    fn runner(&mut self, shape: ExpertShape) -> &mut ExpertRunner {
        if self.runners.len() >= SHAPES_MAX && !self.runners.contains_key(&shape) {
            self.runners.clear();
        }
        let (threads, kernels) = (self.options.threads, self.options.kernels);
        self.runners.entry(shape).or_insert_with(|| ExpertRunner::new(shape, threads, kernels))
    }
}

/// Experts in memory, the least recently used forgotten first; others come from the store.
struct HotExperts {
    store: Arc<BlobStore>,
    bytes_max: Arc<AtomicU64>,
    hot: Mutex<Hot>,
    /// Told whenever a read has ended.
    read: Condvar,
}

#[derive(Default)]
struct Hot {
    bytes: u64,
    uses: u64,
    experts: HashMap<ContentHash, (Arc<Expert>, u64)>,
    by_use: BTreeMap<u64, ContentHash>,
    /// Being read: whoever wants one of these waits for it.
    reading: HashSet<ContentHash>,
}

impl HotExperts {
    fn new(store: Arc<BlobStore>, bytes_max: Arc<AtomicU64>) -> Self {
        Self { store, bytes_max, hot: Mutex::default(), read: Condvar::new() }
    }

    /// An expert, if the store has one of that hash.
    fn get(&self, hash: ContentHash) -> Option<Arc<Expert>> {
        let lock = || self.hot.lock().unwrap_or_else(PoisonError::into_inner);
        let mut hot = self.read.wait_while(lock(), |hot| hot.reading.contains(&hash)).unwrap_or_else(PoisonError::into_inner);
        if let Some(expert) = hot.get(hash) {
            return Some(expert);
        }
        hot.reading.insert(hash);
        drop(hot);
        let expert = load(&self.store, hash).map(Arc::new);
        let mut hot = lock();
        hot.reading.remove(&hash);
        if let Some(expert) = &expert {
            hot.insert(hash, Arc::clone(expert), self.bytes_max.load(Ordering::Relaxed));
        }
        drop(hot);
        self.read.notify_all();
        expert
    }
}

impl Hot {
    fn get(&mut self, hash: ContentHash) -> Option<Arc<Expert>> {
        let (expert, used) = self.experts.get_mut(&hash)?;
        self.uses += 1;
        self.by_use.remove(used);
        *used = self.uses;
        self.by_use.insert(self.uses, hash);
        Some(Arc::clone(expert))
    }

    fn insert(&mut self, hash: ContentHash, expert: Arc<Expert>, bytes_max: u64) {
        self.uses += 1;
        self.bytes += expert.bytes();
        self.experts.insert(hash, (expert, self.uses));
        self.by_use.insert(self.uses, hash);
        while self.bytes > bytes_max {
            let Some((_, oldest)) = self.by_use.pop_first() else { break };
            if let Some((gone, _)) = self.experts.remove(&oldest) {
                self.bytes -= gone.bytes();
            }
        }
    }
}

/// Reads and verifies an expert of any shape from the store.
pub(crate) fn load(store: &BlobStore, hash: ContentHash) -> Option<Expert> {
    let length = store.length(&hash)? as usize;
    let mut bytes = AlignedBytes::zeroed(length);
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
