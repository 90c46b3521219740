//! Asks one peer for one small thing that has no hash of its own: a manifest, a listing, what the peer says of itself.

use std::io;
use std::time::Duration;

use futures::{AsyncReadExt, AsyncWriteExt};
use libp2p::{PeerId, Stream};
use protocol::message::{ANSWER_BYTES, FETCH_PROTOCOL, FetchAnswer, RANGE_BYTES_MAX, Request, Subject};
use tokio::time::timeout;

use crate::stream;

/// Without progress for this long, the peer counts as silent.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Progress is noticed by so many bytes.
const PIECE_BYTES: usize = 16 << 10;

/// How it ended.
#[derive(Debug)]
pub enum Answered {
    /// All bytes; whether they are right is for the asker to judge.
    Bytes(Vec<u8>),
    /// The peer does not have it.
    NotHave,
    /// The peer sent what cannot be: its fault, and a reason to part.
    Wrong(String),
    /// The stream broke.
    Broken(io::Error),
}

/// Asks `peer` for all of `subject`, which has at most `bytes_max` bytes.
pub async fn ask(peer: PeerId, streams: libp2p_stream::Control, subject: Subject, bytes_max: u64) -> Answered {
    match AskStream::open(peer, streams).await {
        Ok(mut asking) => asking.ask(subject, bytes_max).await.unwrap_or_else(Answered::Broken),
        Err(error) => Answered::Broken(error),
    }
}

/// A stream on which one thing after the other may be asked for.
pub struct AskStream(Stream);

impl AskStream {
    /// Opens it.
    pub async fn open(peer: PeerId, streams: libp2p_stream::Control) -> io::Result<Self> {
        stream::open(peer, streams, FETCH_PROTOCOL, stream::acknowledged).await.map(|(stream, ())| Self(stream))
    }

    /// Asks for all of `subject`.
    pub async fn ask(&mut self, subject: Subject, bytes_max: u64) -> io::Result<Answered> {
        read_all(&mut self.0, subject, bytes_max).await
    }
}

async fn read_all(stream: &mut Stream, subject: Subject, bytes_max: u64) -> io::Result<Answered> {
    let mut bytes: Vec<u8> = Vec::new();
    let mut known = None;
    loop {
        let offset = bytes.len() as u64;
        let request = Request { subject, offset, length: RANGE_BYTES_MAX };
        stream.write_all(&request.to_bytes()).await?;
        stream.flush().await?;
        let mut head = [0; ANSWER_BYTES];
        read_piece(stream, &mut head).await?;
        let FetchAnswer::Bytes { total, length } = FetchAnswer::from_bytes(&head).map_err(io::Error::other)? else {
            return Ok(Answered::NotHave);
        };
        if total > bytes_max || known.is_some_and(|known| known != total) {
            return Ok(Answered::Wrong(format!("says it has {total} bytes of something that has at most {bytes_max}")));
        }
        known = Some(total);
        let expected = (total - offset).min(u64::from(RANGE_BYTES_MAX));
        if u64::from(length) != expected {
            return Ok(Answered::Wrong(format!("sent {length} bytes where {expected} were due")));
        }
        let begin = bytes.len();
        bytes.resize(begin + length as usize, 0);
        for piece in bytes[begin..].chunks_mut(PIECE_BYTES) {
            read_piece(stream, piece).await?;
        }
        if bytes.len() as u64 == total {
            return Ok(Answered::Bytes(bytes));
        }
    }
}

async fn read_piece(stream: &mut Stream, piece: &mut [u8]) -> io::Result<()> {
    timeout(ANSWER_TIMEOUT, stream.read_exact(piece)).await?
}
