//! How bytes get to a peer: TCP and QUIC, or, in a closed group, TCP under the group's key alone.

use std::io;
use std::time::Duration;

use futures::future::Either;
use libp2p::core::StreamMuxer;
use libp2p::core::muxing::StreamMuxerBox;
use libp2p::core::transport::{Boxed, OrTransport};
use libp2p::core::upgrade::Version;
use libp2p::identity::Keypair;
use libp2p::pnet::{PnetConfig, PnetError};
use libp2p::{PeerId, Transport, noise, quic, relay, tcp, yamux};

use super::group::GroupKey;
use super::handshakes::BoundedHandshakes;

/// For connecting, and for proving who one is.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Streams of one connection; of ours a peer needs three or four.
const STREAMS_MAX: usize = 64;

/// The transports of a node, and what makes the circuits through relays; one in a group speaks only under the group's key.
pub(super) fn transport(
    keypair: &Keypair,
    group: Option<GroupKey>,
) -> Result<(Boxed<(PeerId, StreamMuxerBox)>, relay::client::Behaviour), noise::Error> {
    let (transport, relay_client) = unbounded(keypair, group)?;
    Ok((BoundedHandshakes::new(transport).boxed(), relay_client))
}

/// The same, before the handshakes that come in are bounded.
fn unbounded(
    keypair: &Keypair,
    group: Option<GroupKey>,
) -> Result<(Boxed<(PeerId, StreamMuxerBox)>, relay::client::Behaviour), noise::Error> {
    let noise = noise::Config::new(keypair)?;
    let mut yamux = yamux::Config::default();
    yamux.set_max_num_streams(STREAMS_MAX);
    let (circuits, relay_client) = relay::client::new(keypair.public().to_peer_id());
    let circuits = circuits.upgrade(Version::V1Lazy).authenticate(noise.clone()).multiplex(yamux.clone()).timeout(HANDSHAKE_TIMEOUT);
    let tcp = tcp::tokio::Transport::new(tcp::Config::default().nodelay(true));
    if let Some(GroupKey(key)) = group {
        // QUIC has its own encryption with keys that anybody makes: there is no room in it for the group's.
        let closed = tcp.and_then(move |socket, _| async move { PnetConfig::new(key).handshake(socket).await.map_err(into_io) });
        let closed = closed.upgrade(Version::V1Lazy).authenticate(noise).multiplex(yamux).timeout(HANDSHAKE_TIMEOUT);
        return Ok((either(circuits, closed), relay_client));
    }
    let tcp = tcp.upgrade(Version::V1Lazy).authenticate(noise).multiplex(yamux).timeout(HANDSHAKE_TIMEOUT);
    let mut quic = quic::Config::new(keypair);
    quic.max_concurrent_stream_limit = STREAMS_MAX as u32;
    quic.handshake_timeout = HANDSHAKE_TIMEOUT;
    let quic = quic::tokio::Transport::new(quic).map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer)));
    Ok((either(circuits, either(tcp, quic)), relay_client))
}

/// The first transport for the addresses that it takes, the second for all others.
fn either<A, B, M, N>(a: A, b: B) -> Boxed<(PeerId, StreamMuxerBox)>
where
    A: Transport<Output = (PeerId, M)> + Send + Unpin + 'static,
    A::Dial: Send + 'static,
    A::ListenerUpgrade: Send + 'static,
    A::Error: Send + Sync,
    B: Transport<Output = (PeerId, N)> + Send + Unpin + 'static,
    B::Dial: Send + 'static,
    B::ListenerUpgrade: Send + 'static,
    B::Error: Send + Sync,
    M: StreamMuxer + Send + 'static,
    M::Substream: Send + 'static,
    M::Error: Send + Sync + 'static,
    N: StreamMuxer + Send + 'static,
    N::Substream: Send + 'static,
    N::Error: Send + Sync + 'static,
{
    let joined = OrTransport::new(a, b).map(|either, _| match either {
        Either::Left((peer, muxer)) => (peer, StreamMuxerBox::new(muxer)),
        Either::Right((peer, muxer)) => (peer, StreamMuxerBox::new(muxer)),
    });
    joined.boxed()
}

fn into_io(error: PnetError) -> io::Error {
    match error {
        PnetError::HandshakeError(error) | PnetError::IoError(error) => error,
    }
}
