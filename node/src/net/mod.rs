//! The network. libp2p is named nowhere else but for addresses and keys.

pub(crate) mod fetcher;
pub(crate) mod link;
pub(crate) mod provider;
pub(crate) mod swarm;

use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId};
use protocol::NodeId;

/// The libp2p name of a node: its key, in libp2p's wrapping.
pub(crate) fn peer_id(node: NodeId) -> Option<PeerId> {
    let key = libp2p::identity::ed25519::PublicKey::try_from_bytes(node.as_bytes()).ok()?;
    Some(libp2p::identity::PublicKey::from(key).to_peer_id())
}

/// Reads an address: a multiaddr, or HOST:PORT for TCP.
pub(crate) fn parse_address(text: &str) -> Result<Multiaddr, String> {
    if text.starts_with('/') {
        return text.parse().map_err(|error| format!("{text:?} is not an address: {error}"));
    }
    let (host, port) = text.rsplit_once(':').ok_or_else(|| format!("{text:?} is not an address: write HOST:PORT or /ip4/…/tcp/…"))?;
    let port: u16 = port.parse().map_err(|_| format!("{text:?}: {port:?} is not a port"))?;
    let host = match host.trim_matches(['[', ']']).parse::<std::net::IpAddr>() {
        Ok(ip) => Multiaddr::from(ip),
        Err(_) => Multiaddr::empty().with(Protocol::Dns(host.to_owned().into())),
    };
    Ok(host.with(Protocol::Tcp(port)))
}

/// Says whether an address is plain TCP, which bulk prefers: it is twice as fast as QUIC on a long link.
pub(crate) fn is_tcp(address: &Multiaddr) -> bool {
    address.iter().any(|part| matches!(part, Protocol::Tcp(_)))
}
