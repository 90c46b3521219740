//! Opening streams of our own protocols, so that the opener knows that somebody reads.

use std::io;
use std::time::Duration;

use futures::AsyncReadExt;
use libp2p::{PeerId, Stream, StreamProtocol};
use protocol::message::STREAM_ACK;
use tokio::time::timeout;

/// For opening a stream and hearing that somebody reads it: other peers wait for this one's work meanwhile.
const OPEN_TIMEOUT: Duration = Duration::from_millis(1500);
const OPEN_ATTEMPTS: u32 = 2;
const OPEN_PAUSE: Duration = Duration::from_millis(50);

/// Opens a stream and waits for the peer's `greeting`; a stream that nobody accepted in time is silently gone.
pub(super) async fn open<T, E: From<io::Error>>(
    peer: PeerId,
    mut streams: libp2p_stream::Control,
    protocol: &'static str,
    greeting: impl AsyncFn(&mut Stream) -> Result<T, E>,
) -> Result<(Stream, T), E> {
    let timed_out = || E::from(io::ErrorKind::TimedOut.into());
    let mut last = timed_out();
    for _ in 0..OPEN_ATTEMPTS {
        let attempt = async {
            let opened = streams.open_stream(peer, StreamProtocol::new(protocol)).await;
            let mut stream = opened.map_err(|error| io::Error::other(error.to_string()))?;
            let greeted = greeting(&mut stream).await?;
            Ok((stream, greeted))
        };
        match timeout(OPEN_TIMEOUT, attempt).await {
            Ok(Ok(opened)) => return Ok(opened),
            Ok(Err(error)) => {
                last = error;
                tokio::time::sleep(OPEN_PAUSE).await;
            }
            Err(_) => last = timed_out(),
        }
    }
    Err(last)
}

/// The greeting of the protocols that have no other: one byte.
pub(super) async fn acknowledged(stream: &mut Stream) -> io::Result<()> {
    let mut ack = [0];
    stream.read_exact(&mut ack).await?;
    if ack == [STREAM_ACK] { Ok(()) } else { Err(io::Error::other("the peer speaks another protocol")) }
}
