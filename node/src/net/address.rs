//! Addresses of peers: reading what people write, and what parts of one say.

use std::net::{IpAddr, ToSocketAddrs};

use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId};
use protocol::NodeId;

/// The libp2p name of a node: its key, in libp2p's wrapping.
pub(crate) fn peer_id(node: NodeId) -> Option<PeerId> {
    let key = libp2p::identity::ed25519::PublicKey::try_from_bytes(node.as_bytes()).ok()?;
    Some(libp2p::identity::PublicKey::from(key).to_peer_id())
}

/// The key of a node by its libp2p name, which holds it.
pub(crate) fn node_id(peer: PeerId) -> Option<NodeId> {
    let key = libp2p::identity::PublicKey::try_decode_protobuf(peer.as_ref().digest()).ok()?;
    Some(NodeId::from_bytes(key.try_into_ed25519().ok()?.to_bytes()))
}

/// Reads an address: a multiaddr, or HOST:PORT for TCP. Names are looked up here, by the operating system.
pub(crate) fn parse_address(text: &str) -> Result<Multiaddr, String> {
    if text.starts_with('/') {
        let address: Multiaddr = text.parse().map_err(|error| format!("{text:?} is not an address: {error}"))?;
        return address.iter().map(|part| resolve_part(&part)).collect();
    }
    let (host, port) = text.rsplit_once(':').ok_or_else(|| format!("{text:?} is not an address: write HOST:PORT or /ip4/…/tcp/…"))?;
    let port: u16 = port.parse().map_err(|_| format!("{text:?}: {port:?} is not a port"))?;
    Ok(Multiaddr::from(look_up(host.trim_matches(['[', ']']))?).with(Protocol::Tcp(port)))
}

fn resolve_part(part: &Protocol<'_>) -> Result<Protocol<'static>, String> {
    match part {
        Protocol::Dns(host) | Protocol::Dns4(host) | Protocol::Dns6(host) => Ok(look_up(host)?.into()),
        other => Ok(other.clone().acquire()),
    }
}

fn look_up(host: &str) -> Result<IpAddr, String> {
    if let Ok(ip) = host.parse() {
        return Ok(ip);
    }
    let found = (host, 0).to_socket_addrs().map_err(|error| format!("cannot find the host {host:?}: {error}"))?;
    let mut ips: Vec<_> = found.map(|socket| socket.ip()).collect();
    ips.sort_by_key(IpAddr::is_ipv6);
    ips.into_iter().next().ok_or_else(|| format!("the host {host:?} has no address"))
}

/// Where to listen for TEXT: HOST:PORT means both TCP and QUIC there.
pub(crate) fn parse_listen(text: &str) -> Result<Vec<Multiaddr>, String> {
    let address = parse_address(text)?;
    if text.starts_with('/') {
        return Ok(vec![address]);
    }
    let udp: Multiaddr = address.iter().map(|part| if let Protocol::Tcp(port) = part { Protocol::Udp(port) } else { part }).collect();
    Ok(vec![address, udp.with(Protocol::QuicV1)])
}

/// Says whether an address is plain TCP, which bulk prefers: it is twice as fast as QUIC on a long link.
pub(crate) fn is_tcp(address: &Multiaddr) -> bool {
    address.iter().any(|part| matches!(part, Protocol::Tcp(_)))
}

/// Says whether an address leads back to its own machine.
pub(crate) fn is_loopback(address: &Multiaddr) -> bool {
    address.iter().any(|part| match part {
        Protocol::Ip4(ip) => ip.is_loopback(),
        Protocol::Ip6(ip) => ip.is_loopback(),
        _ => false,
    })
}

/// The address with the id of the peer that must answer there.
pub(crate) fn with_peer(address: Multiaddr, peer: PeerId) -> Multiaddr {
    address.with(Protocol::P2p(peer))
}

/// The id of the peer that must answer at an address, if it says so.
pub(crate) fn peer_of(address: &Multiaddr) -> Option<PeerId> {
    address.iter().find_map(|part| if let Protocol::P2p(peer) = part { Some(peer) } else { None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_and_port_listen_on_tcp_and_quic() {
        let listen = |text: &str| parse_listen(text).map(|all| all.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(listen("127.0.0.1:0"), Ok(vec!["/ip4/127.0.0.1/tcp/0".to_owned(), "/ip4/127.0.0.1/udp/0/quic-v1".to_owned()]));
        assert_eq!(listen("[::1]:7").map(|all| all[0].clone()), Ok("/ip6/::1/tcp/7".to_owned()));
        assert_eq!(listen("localhost:7").map(|all| all[0].clone()), Ok("/ip4/127.0.0.1/tcp/7".to_owned()));
        assert_eq!(listen("/dns4/localhost/tcp/7"), Ok(vec!["/ip4/127.0.0.1/tcp/7".to_owned()]));
        assert_eq!(listen("/ip4/127.0.0.1/tcp/0"), Ok(vec!["/ip4/127.0.0.1/tcp/0".to_owned()]));
        for bad in ["", "host", "host:port", "/ip4/999.1.1.1/tcp/1"] {
            assert!(listen(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_node_has_the_peer_id_that_libp2p_gives_its_key() {
        let key = protocol::NodeKey::from_secret(&[5; 32]);
        let keypair = libp2p::identity::Keypair::ed25519_from_bytes([5; 32]).expect("a secret");
        let peer = keypair.public().to_peer_id();
        assert_eq!(peer_id(key.id()), Some(peer));
        assert_eq!(node_id(peer), Some(key.id()));
        let address = with_peer(parse_address("127.0.0.1:7").expect("an address"), peer);
        assert_eq!(peer_of(&address), Some(peer));
    }
}
