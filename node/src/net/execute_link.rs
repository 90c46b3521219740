//! One peer's execute stream, as the asker has it: long-lived, several requests under way, answers told as they come.
//!
//! Never shares a stream with bulk. Knows lengths, not meanings: whether results are right is for others to judge.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::io::{ReadHalf, WriteHalf};
use futures::{AsyncReadExt, AsyncWriteExt};
use libp2p::{PeerId, Stream};
use protocol::execute::{ANSWER_HEAD_BYTES, Answer, EXECUTE_PROTOCOL, Refusal};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::debug;

use crate::net::stream;

/// Requests that wait to be sent.
pub(crate) const ORDERS_MAX: usize = 32;
/// For writing one request.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// A peer that owes answers and says nothing for so long has stalled.
const SILENCE_MAX: Duration = Duration::from_secs(5);

/// A request on its way.
#[derive(Debug)]
pub(crate) struct Order {
    /// The request's number, used once.
    pub(crate) number: u64,
    pub(crate) frame: Vec<u8>,
    /// Bytes of results that each task will have; of nothing where no answer comes.
    pub(crate) lengths: Vec<u32>,
}

/// What a peer says of a request.
#[derive(Debug)]
pub(crate) enum Told {
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

type Lengths = Arc<Mutex<HashMap<u64, Vec<u32>>>>;

/// Starts a link to `peer` on the current runtime. It ends when `orders` is closed or the stream breaks, which is told last.
pub(crate) fn start(
    peer: PeerId,
    streams: libp2p_stream::Control,
    orders: mpsc::Receiver<Order>,
    tell: impl Fn(Told) + Send + Sync + 'static,
) {
    tokio::spawn(async move {
        let (reason, blame) = match stream::open(peer, streams, EXECUTE_PROTOCOL, stream::acknowledged).await {
            Ok((stream, ())) => {
                let (reader, writer) = stream.split();
                let lengths = Lengths::default();
                let end = tokio::select! {
                    end = read(reader, &lengths, &tell) => end,
                    end = write(writer, orders, &lengths) => end,
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

async fn write(mut writer: WriteHalf<Stream>, mut orders: mpsc::Receiver<Order>, lengths: &Lengths) -> io::Result<()> {
    while let Some(Order { number, frame, lengths: expected }) = orders.recv().await {
        if !expected.is_empty() {
            lock(lengths).insert(number, expected);
        }
        timeout(WRITE_TIMEOUT, async {
            writer.write_all(&frame).await?;
            writer.flush().await
        })
        .await??;
    }
    writer.close().await
}

async fn read(mut reader: ReadHalf<Stream>, lengths: &Lengths, tell: &impl Fn(Told)) -> io::Result<()> {
    let nonsense = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    loop {
        let mut head = [0; ANSWER_HEAD_BYTES];
        patiently(&mut reader, &mut head, lengths).await?;
        let (number, answer) = Answer::from_bytes(&head).map_err(|error| nonsense(&error.to_string()))?;
        let expected = |task: u16| lock(lengths).get(&number).and_then(|expected| expected.get(usize::from(task)).copied());
        let told = match answer {
            Answer::Results { task, length } if expected(task) == Some(length) => {
                Told::Results { number, task: usize::from(task), bytes: take(&mut reader, length).await? }
            }
            Answer::NotHave { task } if expected(task).is_some() => Told::NotHave { number, task: usize::from(task) },
            Answer::Done { length } if expected(0).is_some() => {
                let receipt = take(&mut reader, length).await?;
                lock(lengths).remove(&number);
                Told::Done { number, receipt }
            }
            Answer::Refused(why) if lock(lengths).remove(&number).is_some() => Told::Refused { number, why },
            _ => return Err(nonsense("the peer answered what nobody asked")),
        };
        tell(told);
    }
}

/// Reads so many bytes; their number has been checked against what was asked for, or a limit.
async fn take(reader: &mut ReadHalf<Stream>, length: u32) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length as usize];
    timeout(SILENCE_MAX, reader.read_exact(&mut bytes)).await??;
    Ok(bytes)
}

/// Fills `bytes`; waits as long as it takes while nothing is owed, and not for long while something is.
async fn patiently(reader: &mut ReadHalf<Stream>, bytes: &mut [u8], lengths: &Lengths) -> io::Result<()> {
    let mut filled = 0;
    let mut waited_before = false;
    while filled < bytes.len() {
        match timeout(SILENCE_MAX, reader.read(&mut bytes[filled..])).await {
            Ok(Ok(0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(Ok(count)) => filled += count,
            Ok(Err(error)) => return Err(error),
            // What is owed may have been asked for just now: one more wait is due.
            Err(_) if lock(lengths).is_empty() && filled == 0 => waited_before = false,
            Err(_) if !waited_before => waited_before = true,
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
        }
    }
    Ok(())
}

fn lock(lengths: &Lengths) -> MutexGuard<'_, HashMap<u64, Vec<u32>>> {
    lengths.lock().unwrap_or_else(PoisonError::into_inner)
}
