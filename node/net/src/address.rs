//! Addresses of peers: reading what people write, and what parts of one say.

use std::fmt;
use std::net::{IpAddr, ToSocketAddrs};

use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId};
use protocol::NodeId;

/// The libp2p name of a node: its key, in libp2p's wrapping.
pub fn peer_id(node: NodeId) -> Option<PeerId> {
    let key = libp2p::identity::ed25519::PublicKey::try_from_bytes(node.as_bytes()).ok()?;
    Some(libp2p::identity::PublicKey::from(key).to_peer_id())
}

/// The key of a node by its libp2p name, which holds it.
pub fn node_id(peer: PeerId) -> Option<NodeId> {
    let key = libp2p::identity::PublicKey::try_decode_protobuf(peer.as_ref().digest()).ok()?;
    Some(NodeId::from_bytes(key.try_into_ed25519().ok()?.to_bytes()))
}

/// Reads an address: a multiaddr, or HOST:PORT for TCP. Names are looked up here, by the operating system.
pub fn parse_address(text: &str) -> Result<Multiaddr, String> {
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
pub fn parse_listen(text: &str) -> Result<Vec<Multiaddr>, String> {
    let address = parse_address(text)?;
    if text.starts_with('/') {
        return Ok(vec![address]);
    }
    let udp: Multiaddr = address.iter().map(|part| if let Protocol::Tcp(port) = part { Protocol::Udp(port) } else { part }).collect();
    Ok(vec![address, udp.with(Protocol::QuicV1)])
}

/// Says whether an address is plain TCP, which bulk prefers: it is twice as fast as QUIC on a long link.
pub fn is_tcp(address: &Multiaddr) -> bool {
    address.iter().any(|part| matches!(part, Protocol::Tcp(_)))
}

/// Says whether an address leads back to its own machine.
pub fn is_loopback(address: &Multiaddr) -> bool {
    address.iter().any(|part| match part {
        Protocol::Ip4(ip) => ip.is_loopback(),
        Protocol::Ip6(ip) => ip.is_loopback(),
        _ => false,
    })
}

/// The address with the id of the peer that must answer there.
pub fn with_peer(address: Multiaddr, peer: PeerId) -> Multiaddr {
    address.with(Protocol::P2p(peer))
}

/// The id of the peer that must answer at an address, if it says so.
pub fn peer_of(address: &Multiaddr) -> Option<PeerId> {
    address.iter().find_map(|part| if let Protocol::P2p(peer) = part { Some(peer) } else { None })
}

/// The IP address of the machine at the other end, unless that is reached through a relay.
pub fn ip_of(address: &Multiaddr) -> Option<IpAddr> {
    if is_relayed(address) {
        return None;
    }
    first_ip(address)
}

fn first_ip(address: &Multiaddr) -> Option<IpAddr> {
    match address.iter().next()? {
        Protocol::Ip4(ip) => Some(ip.into()),
        Protocol::Ip6(ip) => Some(ip.to_ipv4_mapped().map_or(ip.into(), IpAddr::from)),
        _ => None,
    }
}

/// Says whether an address leads through a relay.
pub fn is_relayed(address: &Multiaddr) -> bool {
    address.iter().any(|part| part == Protocol::P2pCircuit)
}

/// The part of the internet that an address belongs to: who has one address of it often has many.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Neighbourhood {
    /// A /24.
    V4([u8; 3]),
    /// A /48.
    V6([u16; 3]),
}

impl Neighbourhood {
    /// Says whether it belongs to this machine or to the network around it, which nobody outside can fill.
    pub fn is_own(self) -> bool {
        let ip = match self {
            Self::V4([a, b, c]) => IpAddr::from([a, b, c, 0]),
            Self::V6([a, b, c]) => IpAddr::from([a, b, c, 0, 0, 0, 0, 0]),
        };
        reach(ip) != Reach::World
    }
}

impl fmt::Display for Neighbourhood {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::V4([a, b, c]) => write!(f, "{a}.{b}.{c}.0/24"),
            Self::V6([a, b, c]) => write!(f, "{a:x}:{b:x}:{c:x}::/48"),
        }
    }
}

/// The neighbourhood of an IP address.
pub fn neighbourhood(ip: IpAddr) -> Neighbourhood {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, c, _] = ip.octets();
            Neighbourhood::V4([a, b, c])
        }
        IpAddr::V6(ip) => {
            let [a, b, c, ..] = ip.segments();
            Neighbourhood::V6([a, b, c])
        }
    }
}

/// From where an address leads to the same machine.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Reach {
    Machine,
    Site,
    World,
}

fn reach(ip: IpAddr) -> Reach {
    let (loopback, site) = match ip {
        IpAddr::V4(ip) => {
            let shared = ip.octets()[0] == 100 && ip.octets()[1] & 0xc0 == 64; // a carrier's own, 100.64.0.0/10
            (ip.is_loopback(), ip.is_private() || ip.is_link_local() || shared)
        }
        IpAddr::V6(ip) => (ip.is_loopback(), ip.is_unique_local() || ip.is_unicast_link_local()),
    };
    match (loopback, site) {
        (true, _) => Reach::Machine,
        (_, true) => Reach::Site,
        _ => Reach::World,
    }
}

/// Says whether an address of `peer`, told by one who is at `teller`, may be dialled: one from outside must not send us to
/// machines of our own network, nor anybody to what is no node's address.
pub(crate) fn is_sane(address: &Multiaddr, peer: PeerId, teller: IpAddr) -> bool {
    let mut parts = address.iter();
    let ip = match parts.next() {
        Some(Protocol::Ip4(ip)) => IpAddr::from(ip),
        Some(Protocol::Ip6(ip)) => IpAddr::from(ip),
        _ => return false,
    };
    let nowhere = ip.is_unspecified() || ip.is_multicast() || ip == IpAddr::from([255; 4]);
    if nowhere || reach(ip) < reach(teller) {
        return false;
    }
    let mut next = match (parts.next(), parts.next()) {
        (Some(Protocol::Udp(port)), Some(Protocol::QuicV1)) if port != 0 => parts.next(),
        (Some(Protocol::Tcp(port)), next) if port != 0 => next,
        _ => return false,
    };
    if let Some(Protocol::P2p(relay)) = next
        && relay != peer
    {
        if parts.next() != Some(Protocol::P2pCircuit) {
            return false;
        }
        next = parts.next();
    }
    (next.is_none() || next == Some(Protocol::P2p(peer))) && parts.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_from_outside_do_not_lead_inside() {
        let peer = PeerId::random();
        let relay = PeerId::random();
        let sane = |text: &str, teller: &str| {
            let address: Multiaddr = text.parse().expect("an address");
            is_sane(&address, peer, teller.parse().expect("an address"))
        };
        let near = ["/ip4/127.0.0.1/tcp/1", "/ip4/192.168.1.2/tcp/1", "/ip6/fd00::1/tcp/1", "/ip4/203.0.113.1/tcp/1"];
        for (teller, fine) in [("127.0.0.1", 0), ("::1", 0), ("10.0.0.9", 1), ("fe80::1", 1), ("100.64.1.1", 1), ("203.0.113.7", 3)] {
            for (i, address) in near.iter().enumerate() {
                assert_eq!(sane(address, teller), i >= fine, "{address} told by {teller}");
            }
        }
        for address in [
            "/ip4/203.0.113.1/udp/4747/quic-v1".to_owned(),
            format!("/ip4/203.0.113.1/tcp/1/p2p/{peer}"),
            format!("/ip4/203.0.113.1/tcp/1/p2p/{relay}/p2p-circuit"),
            format!("/ip4/203.0.113.1/udp/1/quic-v1/p2p/{relay}/p2p-circuit/p2p/{peer}"),
        ] {
            assert!(sane(&address, "203.0.113.7"), "{address}");
        }
        for address in [
            "/ip4/0.0.0.0/tcp/1".to_owned(),
            "/ip4/255.255.255.255/tcp/1".to_owned(),
            "/ip4/224.0.0.251/udp/5353/quic-v1".to_owned(),
            "/ip4/203.0.113.1/tcp/0".to_owned(),
            "/ip4/203.0.113.1/udp/1".to_owned(),
            "/ip4/203.0.113.1".to_owned(),
            "/dns4/example.org/tcp/1".to_owned(),
            "/ip4/203.0.113.1/tcp/1/ws".to_owned(),
            format!("/ip4/203.0.113.1/tcp/1/p2p/{relay}"),
            format!("/ip4/203.0.113.1/tcp/1/p2p/{relay}/p2p-circuit/p2p/{relay}"),
            format!("/ip4/203.0.113.1/tcp/1/p2p/{peer}/p2p-circuit"),
        ] {
            assert!(!sane(&address, "127.0.0.1"), "{address}");
        }
    }

    #[test]
    fn neighbourhoods_are_24_and_48_bits_long() {
        let of = |text: &str| neighbourhood(text.parse().expect("an address"));
        assert_eq!(of("203.0.113.1"), of("203.0.113.255"));
        assert_ne!(of("203.0.113.1"), of("203.0.112.1"));
        assert_eq!(of("2001:db8:1::1"), of("2001:db8:1:ffff::1"));
        assert_ne!(of("2001:db8:1::1"), of("2001:db8:2::1"));
        assert_eq!((of("203.0.113.1").to_string(), of("2001:db8:1::1").to_string()), ("203.0.113.0/24".into(), "2001:db8:1::/48".into()));
        let own = ["127.3.2.1", "10.1.2.3", "192.168.0.1", "169.254.3.4", "100.127.0.1", "fd00::1", "fe80::1"];
        assert!(own.iter().all(|ip| of(ip).is_own()));
        assert!(["203.0.113.1", "100.128.0.1", "11.0.0.1", "2001:db8::1"].iter().all(|ip| !of(ip).is_own()));
    }

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
