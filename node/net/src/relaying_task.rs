//! Getting places at relays, and meeting peers directly through their NATs.

use std::time::Duration;

use libp2p::core::transport::ListenerId;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::{Multiaddr, PeerId, dcutr, identify, relay};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::address::{is_relayed, peer_of};
use super::relaying::{Ports, RelayState};
use super::swarm::{Dial, SwarmTask};

/// How long it takes two nodes to meet, or to find that they cannot.
const PUNCH_WAIT: Duration = Duration::from_secs(15);

/// A guest that is about to be called back opens ports, lets its relays see them, and only then calls.
const PORTS_WAIT: Duration = Duration::from_millis(300);
const PLACE_AGAIN: Duration = Duration::from_secs(10);

/// How long others have to say that a node can be reached, before it takes a place at a relay.
const REACHABLE_WAIT: Duration = Duration::from_secs(3);

/// Relays that are known as such.
const RELAYS_MAX: usize = 16;

impl SwarmTask {
    /// A relay says itself where it is: who makes one of a node answers for its being reachable.
    pub(super) fn on_own_address(&mut self, address: &Multiaddr) {
        if self.relaying.state == RelayState::Relay && !is_relayed(address) {
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
        if self.relaying.state != RelayState::Guest {
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
