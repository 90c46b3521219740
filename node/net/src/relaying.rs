//! Nodes that cannot be reached from outside: a place at a relay where they can be called, and the way from there to a direct
//! connection. Relays carry calls, never bulk.

use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;
use std::time::Duration;

use libp2p::core::transport::ListenerId;
use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId, relay};
use tokio::time::Instant;

use super::network::{NodeRole, Relay};

/// Relays at which a node keeps a place.
const PLACES_MAX: usize = 2;
const SEEN_WAIT: Duration = Duration::from_secs(1);

const RESERVATIONS_MAX: usize = 64;
const RESERVATIONS_PER_PEER_MAX: usize = 2;
const CIRCUITS_MAX: usize = 16;
const CIRCUITS_PER_PEER_MAX: usize = 4;
const CIRCUIT_BYTES_MAX: u64 = 128 << 10;
const CIRCUIT_TIME_MAX: Duration = Duration::from_secs(120);

/// What a relay gives to others; its rates are libp2p's own, by peer and by address.
pub(super) fn relay_limits() -> relay::Config {
    relay::Config {
        max_reservations: RESERVATIONS_MAX,
        max_reservations_per_peer: RESERVATIONS_PER_PEER_MAX,
        max_circuits: CIRCUITS_MAX,
        max_circuits_per_peer: CIRCUITS_PER_PEER_MAX,
        max_circuit_bytes: CIRCUIT_BYTES_MAX,
        max_circuit_duration: CIRCUIT_TIME_MAX,
        ..relay::Config::default()
    }
}

/// What a node knows of relays and of its own reachability.
pub(super) struct Relaying {
    pub(super) state: RelayState,
    pub(super) in_group: bool,
    /// Whether somebody has found this node reachable.
    pub(super) reachable: bool,
    pub(super) relays: BTreeMap<PeerId, Multiaddr>,
    pub(super) places: HashMap<ListenerId, PeerId>,
    pub(super) place_at: Option<Instant>,
    pub(super) ports: Ports,
    /// Whether a guest was told to call through a relay, and has had ports ever since.
    pub(super) ports_from_start: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum RelayState {
    Guest,
    Host,
    Relay,
}

/// A guest's ports, for being called back.
pub(super) enum Ports {
    None,
    /// Opened; the relays have not seen them yet.
    Opened(Instant),
    Shown(Instant),
}

impl Relaying {
    pub(super) fn new(role: &NodeRole, in_group: bool) -> Self {
        let state = match role {
            NodeRole::Guest => RelayState::Guest,
            NodeRole::Host { relay: Relay::No, .. } => RelayState::Host,
            NodeRole::Host { relay: Relay::Yes, .. } => RelayState::Relay,
        };
        let (relays, places) = (BTreeMap::new(), HashMap::new());
        Self { state, in_group, reachable: false, relays, places, place_at: None, ports: Ports::None, ports_from_start: false }
    }

    pub(super) fn is_busy(&self) -> bool {
        self.place_at.is_some()
    }

    /// Any ports, for a guest.
    pub(super) fn listen_addresses(&self) -> Vec<Multiaddr> {
        let any = Multiaddr::from(Ipv4Addr::UNSPECIFIED);
        let mut addresses = vec![any.clone().with(Protocol::Tcp(0))];
        if !self.in_group {
            addresses.push(any.with(Protocol::Udp(0)).with(Protocol::QuicV1));
        }
        addresses
    }

    /// The ports of a guest that was told to call through a relay.
    pub(super) fn open_from_start(&mut self) -> Vec<Multiaddr> {
        self.ports_from_start = true;
        self.listen_addresses()
    }

    /// Says whether the relays know how to call this node back; a host's ports they have seen when it took its place.
    pub(super) fn is_ready_to_punch(&self, now: Instant) -> bool {
        match self.ports {
            _ if self.state != RelayState::Guest => true,
            Ports::None | Ports::Opened(_) => self.ports_from_start,
            Ports::Shown(at) => now.duration_since(at) >= SEEN_WAIT,
        }
    }

    pub(super) fn wants_places(&self) -> bool {
        self.state == RelayState::Host && !self.reachable && self.places.len() < PLACES_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_opens_no_quic_port() {
        let listen = |in_group| Relaying::new(&NodeRole::Guest, in_group).listen_addresses().len();
        assert_eq!((listen(true), listen(false)), (1, 2));
    }

    #[test]
    fn only_a_host_that_nobody_reaches_takes_places() {
        let host = |relay| Relaying::new(&NodeRole::Host { models: Vec::new(), relay }, false);
        assert!(host(Relay::No).wants_places());
        assert!(!host(Relay::Yes).wants_places());
        assert!(!Relaying::new(&NodeRole::Guest, false).wants_places());
        let mut reached = host(Relay::No);
        reached.reachable = true;
        assert!(!reached.wants_places());
        let mut placed = host(Relay::No);
        placed.places = (0..PLACES_MAX).map(|_| (ListenerId::next(), PeerId::random())).collect();
        assert!(!placed.wants_places());
    }
}
