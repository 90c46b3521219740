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

/// Opens a stream and waits for the peer to take it on; a stream that nobody accepted in time is silently gone.
pub(super) async fn open(peer: PeerId, mut streams: libp2p_stream::Control, protocol: &'static str) -> io::Result<Stream> {
    let mut last = io::ErrorKind::TimedOut.into();
    for _ in 0..OPEN_ATTEMPTS {
        match timeout(OPEN_TIMEOUT, open_once(peer, &mut streams, protocol)).await {
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

async fn open_once(peer: PeerId, streams: &mut libp2p_stream::Control, protocol: &'static str) -> io::Result<Stream> {
    let mut stream = streams.open_stream(peer, StreamProtocol::new(protocol)).await.map_err(|error| io::Error::other(error.to_string()))?;
    let mut ack = [0];
    stream.read_exact(&mut ack).await?;
    if ack == [STREAM_ACK] { Ok(stream) } else { Err(io::Error::other("the peer speaks another protocol")) }
}
