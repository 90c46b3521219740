//! Nodes that cannot be reached from outside: a place at a relay where they can be called, and the way from there to a direct
//! connection. Relays carry calls, never bulk.

use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;
use std::time::Duration;

use libp2p::core::transport::ListenerId;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::{Multiaddr, PeerId, dcutr, identify, relay};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::address::{is_relayed, peer_of};
use super::network::{Relay, Role};
use super::swarm::{Dial, SwarmTask};

/// Relays at which a node keeps a place.
const PLACES_MAX: usize = 2;
/// Relays that are known as such.
const RELAYS_MAX: usize = 16;
/// How long others have to say that a node can be reached, before it takes a place at a relay.
const REACHABLE_WAIT: Duration = Duration::from_secs(3);
const PLACE_AGAIN: Duration = Duration::from_secs(10);
/// A guest that is about to be called back opens ports, lets its relays see them, and only then calls.
const PORTS_WAIT: Duration = Duration::from_millis(300);
const SEEN_WAIT: Duration = Duration::from_secs(1);
/// How long it takes two nodes to meet, or to find that they cannot.
const PUNCH_WAIT: Duration = Duration::from_secs(15);

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
    standing: Standing,
    in_group: bool,
    /// Whether somebody has found this node reachable.
    reachable: bool,
    relays: BTreeMap<PeerId, Multiaddr>,
    places: HashMap<ListenerId, PeerId>,
    place_at: Option<Instant>,
    ports: Ports,
    /// Whether a guest was told to call through a relay, and has had ports ever since.
    ports_from_start: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Standing {
    Guest,
    Host,
    Relay,
}

/// A guest's ports, for being called back.
enum Ports {
    None,
    /// Opened; the relays have not seen them yet.
    Opened(Instant),
    Shown(Instant),
}

impl Relaying {
    pub(super) fn new(role: &Role, in_group: bool) -> Self {
        let standing = match role {
            Role::Guest => Standing::Guest,
            Role::Host { relay: Relay::No, .. } => Standing::Host,
            Role::Host { relay: Relay::Yes, .. } => Standing::Relay,
        };
        let (relays, places) = (BTreeMap::new(), HashMap::new());
        Self { standing, in_group, reachable: false, relays, places, place_at: None, ports: Ports::None, ports_from_start: false }
    }

    pub(super) fn is_busy(&self) -> bool {
        self.place_at.is_some()
    }

    /// Any ports, for a guest.
    fn listen_addresses(&self) -> Vec<Multiaddr> {
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
            _ if self.standing != Standing::Guest => true,
            Ports::None | Ports::Opened(_) => self.ports_from_start,
            Ports::Shown(at) => now.duration_since(at) >= SEEN_WAIT,
        }
    }

    fn wants_places(&self) -> bool {
        self.standing == Standing::Host && !self.reachable && self.places.len() < PLACES_MAX
    }
}

impl SwarmTask {
    /// A relay says itself where it is: who makes one of a node answers for its being reachable.
    pub(super) fn on_own_address(&mut self, address: &Multiaddr) {
        if self.relaying.standing == Standing::Relay && !is_relayed(address) {
            self.swarm.add_external_address(address.clone());
        }
        self.on_addresses_changed();
    }

    pub(super) fn on_reachable(&mut self, address: &Multiaddr) {
        if !is_relayed(address) {
            debug!(%address, "can be reached");
            self.relaying.reachable = true;
        }
        self.on_addresses_changed();
    }

    /// Remembers a peer that relays, and may take a place there.
    pub(super) fn on_maybe_relay(&mut self, peer: PeerId, info: &identify::Info) {
        if !info.protocols.contains(&relay::HOP_PROTOCOL_NAME) || self.relaying.relays.len() >= RELAYS_MAX {
            return;
        }
        // Only one that was reached at an address of its own is one for others to call at.
        let Some(met) = self.known.met.get(&peer) else { return };
        if self.relaying.relays.insert(peer, met.address.clone()).is_none() && self.relaying.wants_places() {
            self.relaying.place_at.get_or_insert(Instant::now() + REACHABLE_WAIT);
        }
    }

    pub(super) fn on_listener_closed(&mut self, listener: ListenerId) {
        if self.relaying.places.remove(&listener).is_some() {
            self.relaying.place_at.get_or_insert(Instant::now() + PLACE_AGAIN);
        }
    }

    /// Takes places at relays when that is due.
    pub(super) fn relay(&mut self, now: Instant) {
        if self.relaying.place_at.is_none_or(|at| at > now) {
            return;
        }
        self.relaying.place_at = None;
        for (relay, address) in self.relaying.relays.clone() {
            let has_place = self.relaying.places.values().any(|place| *place == relay);
            if !self.relaying.wants_places() || has_place || !self.contacts.contains_key(&relay) {
                continue;
            }
            info!(%relay, "this node cannot be reached from outside: taking a place at a relay");
            match self.swarm.listen_on(address.with(Protocol::P2pCircuit)) {
                Ok(listener) => {
                    self.relaying.places.insert(listener, relay);
                }
                Err(error) => debug!(%relay, %error, "cannot take a place at a relay"),
            }
        }
    }

    /// Makes a guest ready to be called back by somebody behind a NAT; says whether it is.
    pub(super) fn prepare_to_punch(&mut self, addresses: &[Multiaddr], now: Instant) -> bool {
        if self.relaying.is_ready_to_punch(now) {
            return true;
        }
        match self.relaying.ports {
            Ports::None => {
                for address in self.relaying.listen_addresses() {
                    if let Err(error) = self.swarm.listen_on(address) {
                        debug!(%error, "cannot open a port");
                    }
                }
                self.relaying.ports = Ports::Opened(now);
                false
            }
            Ports::Opened(at) if now.duration_since(at) < PORTS_WAIT => false,
            Ports::Opened(_) => {
                // Connections that come from the new ports: the relays see what the NAT makes of those, and tell.
                for address in addresses.iter().filter(|address| is_relayed(address)) {
                    let direct: Multiaddr = address.iter().take_while(|part| *part != Protocol::P2pCircuit).collect();
                    let Some(relay) = peer_of(&direct) else { continue };
                    let options = DialOpts::peer_id(relay).condition(PeerCondition::Always).addresses(vec![direct]);
                    self.dial(options.build(), Dial::Relay);
                }
                self.relaying.ports = Ports::Shown(now);
                false
            }
            Ports::Shown(_) => self.relaying.is_ready_to_punch(now),
        }
    }

    /// Says so when somebody was called through a relay and did not come.
    pub(super) fn give_up_punching(&mut self, now: Instant) {
        if self.relaying.standing != Standing::Guest {
            return;
        }
        for (peer, contact) in &mut self.contacts {
            if !contact.is_direct() && !contact.unmet && now.duration_since(contact.since) >= PUNCH_WAIT {
                contact.unmet = true;
                warn!(%peer, "no direct connection through the NATs, and relays carry no experts");
            }
        }
    }

    /// Says whether somebody who was called through a relay may still come directly.
    pub(super) fn is_punching(&self, now: Instant) -> bool {
        self.contacts.values().any(|contact| !contact.is_direct() && !contact.unmet && now.duration_since(contact.since) < PUNCH_WAIT)
    }

    pub(super) fn on_punched(&mut self, event: &dcutr::Event) {
        let peer = event.remote_peer_id;
        match &event.result {
            Ok(_) => info!(%peer, "met through the NATs"),
            Err(error) => {
                warn!(%peer, %error, "no direct connection through the NATs, and relays carry no experts");
                if let Some(contact) = self.contacts.get_mut(&peer) {
                    contact.unmet = true;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_opens_no_quic_port() {
        let listen = |in_group| Relaying::new(&Role::Guest, in_group).listen_addresses().len();
        assert_eq!((listen(true), listen(false)), (1, 2));
    }

    #[test]
    fn only_a_host_that_nobody_reaches_takes_places() {
        let host = |relay| Relaying::new(&Role::Host { models: Vec::new(), relay }, false);
        assert!(host(Relay::No).wants_places());
        assert!(!host(Relay::Yes).wants_places());
        assert!(!Relaying::new(&Role::Guest, false).wants_places());
        let mut reached = host(Relay::No);
        reached.reachable = true;
        assert!(!reached.wants_places());
        let mut placed = host(Relay::No);
        placed.places = (0..PLACES_MAX).map(|_| (ListenerId::next(), PeerId::random())).collect();
        assert!(!placed.wants_places());
    }
}
