//! One peer's execute stream, as the asker has it: long-lived, several requests under way, answers told as they come.
//!
//! Never shares a stream with bulk. Knows lengths, not meanings: whether results are right is for others to judge.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::PeerId;
use protocol::execute::{ANSWER_HEAD_BYTES, EXECUTE_PROTOCOL, ExecuteAnswer, Refusal};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::debug;

use crate::stream;

/// Requests that wait to be sent.
pub const ORDERS_MAX: usize = 32;
/// For writing one request.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// A peer that owes answers and says nothing for so long has stalled.
const SILENCE_MAX: Duration = Duration::from_secs(5);

/// A request on its way.
#[derive(Debug)]
pub struct Order {
    /// The request's number, used once.
    pub number: u64,
    pub frame: Vec<u8>,
    /// Bytes of results that each task will have; of nothing where no answer comes.
    pub lengths: Vec<u32>,
}

/// What a peer says of a request.
#[derive(Debug)]
pub enum Told {
    /// The results of a task, of the right length.
    Results {
        number: u64,
        task: usize,
        bytes: Vec<u8>,
    },
    NotHave {
        number: u64,
        task: usize,
    },
    /// All is answered; a signed receipt.
    Done {
        number: u64,
        receipt: Vec<u8>,
    },
    Refused {
        number: u64,
        why: Refusal,
    },
    /// The stream is gone, and with it all that was under way. `blame` says that the peer spoke nonsense.
    Broken {
        reason: String,
        blame: bool,
    },
}

/// What a peer owes: for each request, the length of each result that has not come yet.
#[derive(Clone, Debug, Default)]
pub struct Owed(Arc<Mutex<HashMap<u64, OwedAnswers>>>);

#[derive(Debug)]
struct OwedAnswers {
    /// Bytes of each task's results, taken out when it is answered: a second answer is one too many.
    lengths: Vec<Option<u32>>,
    /// Nobody waits for them any more: they are read, since the peer may have sent them, and let go.
    given_up: bool,
}

impl Owed {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, OwedAnswers>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, number: u64, lengths: Vec<u32>) {
        self.lock().insert(number, OwedAnswers { lengths: lengths.into_iter().map(Some).collect(), given_up: false });
    }

    /// From now on nothing is told of a request; what is still to come of it takes no memory.
    pub fn give_up(&self, number: u64) {
        if let Some(owed) = self.lock().get_mut(&number) {
            owed.given_up = true;
        }
    }

    /// Checks an answer's head and takes out what it answers; returns whether somebody waits for it, or nothing if it is not owed.
    fn settle(&self, number: u64, answer: ExecuteAnswer) -> Option<Waits> {
        let mut all = self.lock();
        let owed = all.get_mut(&number)?;
        let waits = if owed.given_up { Waits::Nobody } else { Waits::Engine };
        let mut take = |task: u16, length: Option<u32>| {
            let slot = owed.lengths.get_mut(usize::from(task))?;
            let due = (*slot)?;
            if length.is_some_and(|length| length != due) {
                return None;
            }
            *slot = None;
            Some(waits)
        };
        match answer {
            ExecuteAnswer::Results { task, length } => take(task, Some(length)),
            ExecuteAnswer::NotHave { task } => take(task, None),
            // A receipt is the last of a request, when every task was answered.
            ExecuteAnswer::Done { .. } if owed.lengths.iter().all(Option::is_none) => all.remove(&number).map(|_| waits),
            ExecuteAnswer::Done { .. } => None,
            ExecuteAnswer::Refused(_) => all.remove(&number).map(|_| waits),
        }
    }
}

/// For whom an answer is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Waits {
    Engine,
    Nobody,
}

/// Starts a link to `peer` on the current runtime. It ends when `orders` is closed or the stream breaks, which is told last. `tell` says
/// whether there was room; it never waits. What it has been told and has not been heard is no more than what was asked for.
pub fn start(
    peer: PeerId,
    streams: libp2p_stream::Control,
    orders: mpsc::Receiver<Order>,
    owed: Owed,
    tell: impl Fn(Told) -> bool + Send + Sync + 'static,
) {
    tokio::spawn(async move {
        let (reason, blame) = match stream::open(peer, streams, EXECUTE_PROTOCOL, stream::acknowledged).await {
            Ok((stream, ())) => {
                let (reader, writer) = stream.split();
                let end = tokio::select! {
                    end = read(reader, &owed, &tell) => end,
                    end = write(writer, orders, &owed) => end,
                };
                match end {
                    Ok(()) => ("closed".to_owned(), false),
                    Err(error) => (error.to_string(), error.kind() == io::ErrorKind::InvalidData),
                }
            }
            Err(error) => (error.to_string(), false),
        };
        debug!(%peer, reason, "execute link ended");
        tell(Told::Broken { reason, blame });
    });
}

async fn write<W: AsyncWrite + Unpin>(mut writer: W, mut orders: mpsc::Receiver<Order>, owed: &Owed) -> io::Result<()> {
    while let Some(Order { number, frame, lengths }) = orders.recv().await {
        if !lengths.is_empty() {
            owed.begin(number, lengths);
        }
        timeout(WRITE_TIMEOUT, async {
            writer.write_all(&frame).await?;
            writer.flush().await
        })
        .await??;
    }
    writer.close().await
}

async fn read<R: AsyncRead + Unpin>(mut reader: R, owed: &Owed, tell: &impl Fn(Told) -> bool) -> io::Result<()> {
    let nonsense = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    loop {
        let mut head = [0; ANSWER_HEAD_BYTES];
        patiently(&mut reader, &mut head, owed).await?;
        let (number, answer) = ExecuteAnswer::from_bytes(&head).map_err(|error| nonsense(&error.to_string()))?;
        let waits = owed.settle(number, answer).ok_or_else(|| nonsense("the peer answered what nobody asked, or twice"))?;
        let told = match answer {
            ExecuteAnswer::Results { length, .. } if waits == Waits::Nobody => {
                skip(&mut reader, length).await?;
                continue;
            }
            ExecuteAnswer::Results { task, length } => {
                Told::Results { number, task: usize::from(task), bytes: take(&mut reader, length).await? }
            }
            ExecuteAnswer::NotHave { task } => Told::NotHave { number, task: usize::from(task) },
            ExecuteAnswer::Done { length } => Told::Done { number, receipt: take(&mut reader, length).await? },
            ExecuteAnswer::Refused(why) => Told::Refused { number, why },
        };
        if waits == Waits::Engine && !tell(told) {
            return Err(io::Error::other("more answers wait than the engine hears"));
        }
    }
}

/// Reads so many bytes; their number has been checked against what was asked for, or a limit.
async fn take<R: AsyncRead + Unpin>(reader: &mut R, length: u32) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length as usize];
    timeout(SILENCE_MAX, reader.read_exact(&mut bytes)).await??;
    Ok(bytes)
}

/// Reads so many bytes and keeps none.
async fn skip<R: AsyncRead + Unpin>(reader: &mut R, length: u32) -> io::Result<()> {
    let mut left = reader.take(u64::from(length));
    let skipped = timeout(SILENCE_MAX, futures::io::copy(&mut left, &mut futures::io::sink())).await??;
    if skipped == u64::from(length) { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Fills `bytes`; waits as long as it takes while nothing is owed, and not for long while something is.
async fn patiently<R: AsyncRead + Unpin>(reader: &mut R, bytes: &mut [u8], owed: &Owed) -> io::Result<()> {
    let mut filled = 0;
    let mut waited_before = false;
    while filled < bytes.len() {
        match timeout(SILENCE_MAX, reader.read(&mut bytes[filled..])).await {
            Ok(Ok(0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(Ok(count)) => filled += count,
            Ok(Err(error)) => return Err(error),
            // What is owed may have been asked for just now: one more wait is due.
            Err(_) if owed.lock().is_empty() && filled == 0 => waited_before = false,
            Err(_) if !waited_before => waited_before = true,
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use futures::io::Cursor;

    use super::*;

    /// What a link tells of `answers` to a request of two tasks of 8 bytes, and how it ends.
    async fn hear(answers: Vec<(ExecuteAnswer, usize)>, given_up: bool, room: usize) -> (Vec<Told>, io::Error) {
        let owed = Owed::default();
        owed.begin(7, vec![8, 8]);
        if given_up {
            owed.give_up(7);
        }
        let mut bytes = Vec::new();
        for (answer, length) in answers {
            bytes.extend(answer.to_bytes(7));
            bytes.resize(bytes.len() + length, 1);
        }
        let told = Mutex::new(Vec::new());
        let tell = |one| {
            let mut told = told.lock().expect("one thread");
            told.push(one);
            told.len() <= room
        };
        let end = read(Cursor::new(bytes), &owed, &tell).await.expect_err("the bytes end");
        (told.into_inner().expect("one thread"), end)
    }

    #[tokio::test]
    async fn each_result_is_owed_once() {
        let result = (ExecuteAnswer::Results { task: 0, length: 8 }, 8);
        let not_have = (ExecuteAnswer::NotHave { task: 0 }, 0);
        for twice in [[result, result], [result, not_have], [not_have, result], [not_have, not_have]] {
            let (told, end) = hear(twice.to_vec(), false, 9).await;
            assert_eq!((told.len(), end.kind()), (1, io::ErrorKind::InvalidData));
        }
    }

    #[tokio::test]
    async fn a_receipt_is_for_what_was_answered() {
        let results = [(ExecuteAnswer::Results { task: 0, length: 8 }, 8), (ExecuteAnswer::NotHave { task: 1 }, 0)];
        let done = (ExecuteAnswer::Done { length: 4 }, 4);
        let (told, end) = hear([&results[..], &[done]].concat(), false, 9).await;
        assert_eq!((told.len(), end.kind()), (3, io::ErrorKind::UnexpectedEof));
        for wrong in [vec![done], vec![results[0], done], [&results[..], &[done, done]].concat()] {
            assert_eq!(hear(wrong, false, 9).await.1.kind(), io::ErrorKind::InvalidData);
        }
        let wrong_length = (ExecuteAnswer::Results { task: 0, length: 4 }, 4);
        assert_eq!(hear(vec![wrong_length], false, 9).await.1.kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn what_was_given_up_is_read_and_not_told() {
        let results = [
            (ExecuteAnswer::Results { task: 0, length: 8 }, 8),
            (ExecuteAnswer::Results { task: 1, length: 8 }, 8),
            (ExecuteAnswer::Done { length: 4 }, 4),
        ];
        let (told, end) = hear(results.to_vec(), true, 9).await;
        assert_eq!((told.len(), end.kind()), (0, io::ErrorKind::UnexpectedEof));
    }

    #[tokio::test]
    async fn a_link_that_finds_no_room_breaks_and_never_waits() {
        let results = [(ExecuteAnswer::Results { task: 0, length: 8 }, 8), (ExecuteAnswer::Results { task: 1, length: 8 }, 8)];
        let (told, end) = hear(results.to_vec(), false, 1).await;
        assert_eq!((told.len(), end.kind()), (2, io::ErrorKind::Other));
    }
}
