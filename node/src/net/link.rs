//! One peer's fetch stream: long-lived, requests pipelined, answers in order.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::io::{ReadHalf, WriteHalf};
use futures::{AsyncReadExt, AsyncWriteExt};
use libp2p::{PeerId, Stream, StreamProtocol};
use protocol::message::{ANSWER_BYTES, Answer, FETCH_PROTOCOL, RANGE_BYTES_MAX, Request, STREAM_ACK, Subject};
use protocol::{BlobRef, ContentHash};
use store::BlobStore;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::debug;

use crate::clock::now_ms;

/// Bytes that are asked for ahead.
const WINDOW_BYTES: u64 = 8 << 20;
/// Jobs that wait for their turn.
pub(crate) const JOBS_MAX: usize = 32;
const ANSWERS_MAX: usize = 4;
/// Progress is noticed by so many bytes.
const PIECE_BYTES: usize = 16 << 10;
/// For opening a stream and hearing that somebody reads it: other peers wait for this one's jobs meanwhile.
const OPEN_TIMEOUT: Duration = Duration::from_millis(1500);
const OPEN_ATTEMPTS: u32 = 2;
const OPEN_PAUSE: Duration = Duration::from_millis(50);
/// Without progress for this long while bytes are owed, the stream counts as broken …
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// … and longer for a large blob, which its provider verifies at this speed or faster before it sends the first byte.
pub(crate) const VERIFY_BYTES_PER_SECOND_MIN: u64 = 50_000_000;

/// Something to fetch, and where it goes.
pub(crate) struct Job {
    /// Never used for another job.
    pub(crate) number: u64,
    pub(crate) wanted: Wanted,
}

/// What to fetch.
#[derive(Clone, Debug)]
pub(crate) enum Wanted {
    /// A blob that fits into memory.
    Blob(BlobRef),
    /// A blob that goes straight to the store.
    StoredBlob(BlobRef, Arc<Sink>),
    /// A manifest or listing of at most so many bytes; whether it is the right one is for the asker to judge.
    Unhashed(Subject, u64),
}

/// The store, as a link needs it.
pub(crate) struct Sink(pub(crate) Arc<BlobStore>);

impl std::fmt::Debug for Sink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the store")
    }
}

impl Wanted {
    fn subject(&self) -> Subject {
        match self {
            Self::Blob(blob) | Self::StoredBlob(blob, _) => Subject::Blob(blob.hash),
            Self::Unhashed(subject, _) => *subject,
        }
    }

    /// Its length, where that is known beforehand.
    pub(crate) fn length(&self) -> Option<u64> {
        match self {
            Self::Blob(blob) | Self::StoredBlob(blob, _) => Some(blob.length),
            Self::Unhashed(..) => None,
        }
    }
}

/// How a job ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// Its bytes, verified if it has a hash; empty when they went to the store.
    Done(Vec<u8>),
    /// The peer does not have it.
    NotHave,
    /// The peer sent something else: its fault, and a reason to part.
    WrongBytes(String),
    /// The stream broke: the job is as good as new.
    Broken(String),
    /// Our own store could not take it.
    Store(store::StoreError),
}

/// The end of a job, told to the fetcher.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) peer: PeerId,
    pub(crate) number: u64,
    pub(crate) outcome: Outcome,
}

/// Starts a link to `peer`. It ends when `jobs` is closed or the stream breaks; every job is answered in any case.
pub(crate) fn start(
    peer: PeerId,
    streams: libp2p_stream::Control,
    jobs: mpsc::Receiver<Job>,
    finished: mpsc::Sender<Finished>,
    total_received: Arc<AtomicU64>, // bytes from all peers, as they come
) {
    tokio::spawn(async move {
        let received = Received { here: Arc::default(), everywhere: total_received };
        let mut link = Link { peer, jobs, finished, received, active: VecDeque::new(), owed: VecDeque::new(), owed_bytes: 0 };
        let reason = match open(peer, streams).await {
            Ok(stream) => link.run(stream).await.err().map_or_else(|| "closed".to_owned(), |error| error.to_string()),
            Err(error) => error.to_string(),
        };
        debug!(%peer, reason, "link ended");
        link.fail_all(&reason).await;
    });
}

/// Opens a stream and waits for the peer to take it on; a stream that nobody accepted in time is silently gone.
async fn open(peer: PeerId, mut streams: libp2p_stream::Control) -> io::Result<Stream> {
    let mut last = io::ErrorKind::TimedOut.into();
    for _ in 0..OPEN_ATTEMPTS {
        match timeout(OPEN_TIMEOUT, open_once(peer, &mut streams)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => {
                last = error;
                tokio::time::sleep(OPEN_PAUSE).await;
            }
            Err(_) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(last)
}

async fn open_once(peer: PeerId, streams: &mut libp2p_stream::Control) -> io::Result<Stream> {
    let mut stream =
        streams.open_stream(peer, StreamProtocol::new(FETCH_PROTOCOL)).await.map_err(|error| io::Error::other(error.to_string()))?;
    let mut ack = [0];
    stream.read_exact(&mut ack).await?;
    if ack == [STREAM_ACK] { Ok(stream) } else { Err(io::Error::other("the peer speaks another protocol")) }
}

struct Link {
    peer: PeerId,
    jobs: mpsc::Receiver<Job>,
    finished: mpsc::Sender<Finished>,
    received: Received,
    active: VecDeque<Active>,
    owed: VecDeque<Owed>, // ranges asked for, in the order in which answers come
    owed_bytes: u64,
}

/// Counts of bytes received: progress.
#[derive(Clone)]
struct Received {
    here: Arc<AtomicU64>,
    everywhere: Arc<AtomicU64>,
}

impl Received {
    fn add(&self, bytes: usize) {
        self.here.fetch_add(bytes as u64, Ordering::Relaxed);
        self.everywhere.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

struct Active {
    job: Job,
    total: Option<u64>,
    asked: u64,
    got: u64,
    taken: Taken,
}

enum Taken {
    Memory(Vec<u8>),
    /// Pieces for the thread that writes, and its verdict.
    Store(mpsc::Sender<Vec<u8>>, tokio::task::JoinHandle<Result<(), store::StoreError>>),
}

struct Owed {
    number: u64,
    length: u32,
}

impl Link {
    async fn run(&mut self, stream: Stream) -> io::Result<()> {
        let (reader, mut writer) = stream.split();
        let (answers, mut answer_queue) = mpsc::channel(ANSWERS_MAX);
        let _reading = AbortOnDrop(tokio::spawn(read_answers(reader, answers, self.received.clone())));
        let mut quiet_since = (tokio::time::Instant::now(), 0);
        loop {
            self.ask(&mut writer).await?;
            let received = self.received.here.load(Ordering::Relaxed);
            if self.owed.is_empty() || received != quiet_since.1 {
                quiet_since = (tokio::time::Instant::now(), received);
            }
            let verifying = self.active.front().and_then(|active| active.total).unwrap_or(0) / VERIFY_BYTES_PER_SECOND_MIN;
            let quiet = tokio::time::sleep_until(quiet_since.0 + ANSWER_TIMEOUT + Duration::from_secs(verifying));
            tokio::select! {
                biased; // an answer that is there counts before a deadline that has passed
                answer = answer_queue.recv() => {
                    let (answer, bytes) = answer.unwrap_or_else(|| Err(io::ErrorKind::UnexpectedEof.into()))?;
                    self.on_answer(answer, bytes).await?;
                }
                job = self.jobs.recv(), if self.active.len() < JOBS_MAX => match job {
                    Some(job) => self.begin(job),
                    None => return Ok(()),
                },
                () = quiet, if !self.owed.is_empty() => {
                    // Bytes may have come that do not make a whole answer yet.
                    if self.received.here.load(Ordering::Relaxed) == quiet_since.1 {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                }
            }
        }
    }

    fn begin(&mut self, job: Job) {
        let total = job.wanted.length();
        let taken = match &job.wanted {
            Wanted::StoredBlob(blob, sink) => {
                let (pieces, queue) = mpsc::channel(ANSWERS_MAX);
                let (store, blob) = (Arc::clone(&sink.0), *blob);
                Taken::Store(pieces, tokio::task::spawn_blocking(move || write_pieces(&store, blob, queue)))
            }
            Wanted::Blob(_) | Wanted::Unhashed(..) => Taken::Memory(Vec::new()),
        };
        self.active.push_back(Active { job, total, asked: 0, got: 0, taken });
    }

    /// Asks for ranges of the active jobs, in their order, as far as the window allows.
    async fn ask(&mut self, writer: &mut WriteHalf<Stream>) -> io::Result<()> {
        let mut wrote = false;
        for active in &mut self.active {
            // Of what has no known length, one range is asked for until an answer tells it.
            while self.owed_bytes < WINDOW_BYTES && active.total.map_or(active.asked == 0, |total| active.asked < total.max(1)) {
                let left = active.total.map_or(u64::from(RANGE_BYTES_MAX), |total| (total - active.asked).max(1));
                let length = left.min(u64::from(RANGE_BYTES_MAX)) as u32;
                let request = Request { subject: active.job.wanted.subject(), offset: active.asked, length };
                writer.write_all(&request.to_bytes()).await?;
                wrote = true;
                active.asked += u64::from(length);
                self.owed_bytes += u64::from(length);
                self.owed.push_back(Owed { number: active.job.number, length });
            }
        }
        if wrote { writer.flush().await } else { Ok(()) }
    }

    async fn on_answer(&mut self, answer: Answer, bytes: Vec<u8>) -> io::Result<()> {
        let owed = self.owed.pop_front().ok_or_else(|| io::Error::other("the peer answered what nobody asked"))?;
        self.owed_bytes -= u64::from(owed.length);
        let Some(at) = self.active.iter().position(|active| active.job.number == owed.number) else {
            return Ok(()); // the rest of a job that ended early
        };
        let (peer, number, finished) = (self.peer, owed.number, self.finished.clone());
        match self.active[at].take_in(answer, bytes).await {
            Step::More => {}
            Step::Ended(outcome) => {
                self.active.remove(at);
                let _ = finished.send(Finished { peer, number, outcome }).await;
            }
            Step::Complete => {
                let active = self.active.remove(at).expect("it is there: it has just taken an answer in");
                let durable = matches!(active.taken, Taken::Store(..));
                let conclude = async move { finished.send(Finished { peer, number, outcome: active.conclude().await }).await };
                // Making a large blob durable takes a while, and the stream goes on meanwhile. What is in memory
                // waits its turn here, so that no more of it comes than is taken.
                if durable {
                    tokio::spawn(conclude);
                } else {
                    let _ = conclude.await;
                }
            }
        }
        Ok(())
    }

    async fn fail_all(&mut self, reason: &str) {
        self.jobs.close();
        let mut numbers: Vec<_> = self.active.drain(..).map(|active| active.job.number).collect();
        while let Some(job) = self.jobs.recv().await {
            numbers.push(job.number);
        }
        for number in numbers {
            let _ = self.finished.send(Finished { peer: self.peer, number, outcome: Outcome::Broken(reason.to_owned()) }).await;
        }
    }
}

/// What an answer meant for its job.
enum Step {
    More,
    /// All bytes are there.
    Complete,
    Ended(Outcome),
}

impl Active {
    /// Takes one answer in.
    async fn take_in(&mut self, answer: Answer, bytes: Vec<u8>) -> Step {
        let Answer::Bytes { total, .. } = answer else { return Step::Ended(Outcome::NotHave) };
        let limit = match self.job.wanted {
            Wanted::Unhashed(_, limit) => limit,
            Wanted::Blob(blob) | Wanted::StoredBlob(blob, _) => blob.length,
        };
        if total > limit || self.total.is_some_and(|known| known != total) {
            return Step::Ended(Outcome::WrongBytes(format!("says it has {total} bytes of something that has at most {limit}")));
        }
        self.total = Some(total);
        self.asked = self.asked.min(total);
        let expected = (total - self.got).min(u64::from(RANGE_BYTES_MAX));
        if bytes.len() as u64 != expected {
            return Step::Ended(Outcome::WrongBytes(format!("sent {} bytes where {expected} were due", bytes.len())));
        }
        self.got += expected;
        match &mut self.taken {
            Taken::Memory(memory) => memory.extend_from_slice(&bytes),
            Taken::Store(pieces, _) => {
                if pieces.send(bytes).await.is_err() {
                    return Step::Complete; // the writer has given up: its verdict says why
                }
            }
        }
        if self.got < total { Step::More } else { Step::Complete }
    }

    async fn conclude(self) -> Outcome {
        let wrong = |hash: ContentHash| Outcome::WrongBytes(format!("sent bytes that do not match {hash}"));
        match (self.job.wanted, self.taken) {
            (Wanted::Blob(blob), Taken::Memory(bytes)) if !blob.matches(&bytes) => wrong(blob.hash),
            (_, Taken::Memory(bytes)) => Outcome::Done(bytes),
            (_, Taken::Store(pieces, verdict)) => {
                drop(pieces);
                match verdict.await {
                    Ok(Ok(())) => Outcome::Done(Vec::new()),
                    Ok(Err(store::StoreError::WrongBytes { expected, .. })) => wrong(expected),
                    Ok(Err(error)) => Outcome::Store(error),
                    Err(error) => Outcome::Broken(error.to_string()),
                }
            }
        }
    }
}

fn write_pieces(store: &BlobStore, blob: BlobRef, mut pieces: mpsc::Receiver<Vec<u8>>) -> Result<(), store::StoreError> {
    let mut writer = store.writer(blob)?;
    while let Some(piece) = pieces.blocking_recv() {
        writer.write(&piece)?;
    }
    writer.finish(now_ms()).map(drop)
}

async fn read_answers(mut reader: ReadHalf<Stream>, answers: mpsc::Sender<io::Result<(Answer, Vec<u8>)>>, received: Received) {
    loop {
        let answer = read_answer(&mut reader, &received).await;
        let failed = answer.is_err();
        if answers.send(answer).await.is_err() || failed {
            return;
        }
    }
}

async fn read_answer(reader: &mut ReadHalf<Stream>, received: &Received) -> io::Result<(Answer, Vec<u8>)> {
    let mut head = [0; ANSWER_BYTES];
    reader.read_exact(&mut head).await?;
    received.add(ANSWER_BYTES);
    let answer = Answer::from_bytes(&head).map_err(io::Error::other)?;
    let Answer::Bytes { length, .. } = answer else { return Ok((answer, Vec::new())) };
    let mut bytes = vec![0; length as usize]; // at most RANGE_BYTES_MAX, checked by from_bytes
    for piece in bytes.chunks_mut(PIECE_BYTES) {
        reader.read_exact(piece).await?;
        received.add(piece.len());
    }
    Ok((answer, bytes))
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
