//! How bytes get to a peer: TCP and QUIC, or, in a closed group, TCP under the group's key alone.

use std::io;
use std::time::Duration;

use libp2p::core::muxing::StreamMuxerBox;
use libp2p::core::transport::{Boxed, OrTransport};
use libp2p::core::upgrade::Version;
use libp2p::identity::Keypair;
use libp2p::pnet::{PnetConfig, PnetError};
use libp2p::{PeerId, Transport, noise, quic, tcp, yamux};

use super::group::GroupKey;

/// For connecting, and for proving who one is.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Streams of one connection; of ours a peer needs three or four.
const STREAMS_MAX: usize = 64;

/// The transports of a node; one in a group speaks only under the group's key.
pub(super) fn transport(keypair: &Keypair, group: Option<GroupKey>) -> Result<Boxed<(PeerId, StreamMuxerBox)>, noise::Error> {
    let noise = noise::Config::new(keypair)?;
    let mut yamux = yamux::Config::default();
    yamux.set_max_num_streams(STREAMS_MAX);
    let tcp = tcp::tokio::Transport::new(tcp::Config::default().nodelay(true));
    if let Some(GroupKey(key)) = group {
        // QUIC has its own encryption with keys that anybody makes: there is no room in it for the group's.
        let closed = tcp.and_then(move |socket, _| async move { PnetConfig::new(key).handshake(socket).await.map_err(into_io) });
        let closed = closed.upgrade(Version::V1Lazy).authenticate(noise).multiplex(yamux).timeout(HANDSHAKE_TIMEOUT);
        return Ok(closed.boxed());
    }
    let tcp = tcp.upgrade(Version::V1Lazy).authenticate(noise).multiplex(yamux).timeout(HANDSHAKE_TIMEOUT);
    let mut quic = quic::Config::new(keypair);
    quic.max_concurrent_stream_limit = STREAMS_MAX as u32;
    quic.handshake_timeout = HANDSHAKE_TIMEOUT;
    let quic = quic::tokio::Transport::new(quic);
    let both = OrTransport::new(tcp, quic).map(|either, _| match either {
        futures::future::Either::Left((peer, muxer)) => (peer, StreamMuxerBox::new(muxer)),
        futures::future::Either::Right((peer, muxer)) => (peer, StreamMuxerBox::new(muxer)),
    });
    Ok(both.boxed())
}

fn into_io(error: PnetError) -> io::Error {
    match error {
        PnetError::HandshakeError(error) | PnetError::IoError(error) => error,
    }
}
