//! How many connections come in from one neighbourhood of the internet, and how fast. Addresses are cheap next to neighbourhoods.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt;
use std::net::IpAddr;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::swarm::{
    ConnectionClosed, ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
    dummy,
};
use libp2p::{Multiaddr, PeerId};

use super::address::{Neighbourhood, ip_of, neighbourhood};
use crate::clock::instant;

/// Connections from one public neighbourhood; one's own network is as full as it is.
const ESTABLISHED_MAX: usize = 8;
/// Attempts from one address: so many at once, and then one more after each pause.
const BURST: u32 = 64;
const PAUSE: Duration = Duration::from_millis(100);
/// Addresses whose attempts are counted. One that was forgotten begins anew.
const COUNTED_MAX: usize = 4096;

/// Refuses a neighbourhood that is too many, and an address that is too fast.
#[derive(Default)]
pub(super) struct Behaviour {
    established: HashMap<ConnectionId, Neighbourhood>,
    attempts: HashMap<IpAddr, Attempts>,
}

/// A bucket that fills by one attempt a pause.
struct Attempts {
    left: u32,
    counted: Instant,
}

/// Why a connection was refused.
#[derive(Debug)]
enum Refused {
    TooMany(Neighbourhood),
    TooFast(IpAddr),
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooMany(neighbourhood) => write!(f, "{ESTABLISHED_MAX} connections are from {neighbourhood} already"),
            Self::TooFast(ip) => write!(f, "{ip} connects too often"),
        }
    }
}

impl std::error::Error for Refused {}

impl Behaviour {
    fn attempt(&mut self, ip: IpAddr, now: Instant) -> Result<(), Refused> {
        if self.attempts.len() >= COUNTED_MAX && !self.attempts.contains_key(&ip) {
            // Whoever has been quiet long enough for a full bucket need not be remembered.
            self.attempts.retain(|_, attempts| now.duration_since(attempts.counted) < PAUSE * BURST);
            if self.attempts.len() >= COUNTED_MAX {
                return Err(Refused::TooFast(ip));
            }
        }
        let attempts = self.attempts.entry(ip).or_insert(Attempts { left: BURST, counted: now });
        let earned = (now.duration_since(attempts.counted).as_millis() / PAUSE.as_millis()) as u32;
        if earned > 0 {
            attempts.left = attempts.left.saturating_add(earned).min(BURST);
            attempts.counted = now;
        }
        attempts.left = attempts.left.checked_sub(1).ok_or(Refused::TooFast(ip))?;
        Ok(())
    }

    fn establish(&mut self, connection: ConnectionId, ip: IpAddr) -> Result<(), Refused> {
        let neighbourhood = neighbourhood(ip);
        if !neighbourhood.is_own() && self.established.values().filter(|other| **other == neighbourhood).count() >= ESTABLISHED_MAX {
            return Err(Refused::TooMany(neighbourhood));
        }
        self.established.insert(connection, neighbourhood);
        Ok(())
    }
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = Infallible;

    fn handle_pending_inbound_connection(&mut self, _: ConnectionId, _: &Multiaddr, remote: &Multiaddr) -> Result<(), ConnectionDenied> {
        // What comes through a relay has no address of its own: the relay has counted it.
        ip_of(remote).map_or(Ok(()), |ip| self.attempt(ip, instant()).map_err(ConnectionDenied::new))
    }

    fn handle_established_inbound_connection(
        &mut self,
        connection: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        if let Some(ip) = ip_of(remote) {
            self.establish(connection, ip).map_err(ConnectionDenied::new)?;
        }
        Ok(dummy::ConnectionHandler)
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(dummy::ConnectionHandler)
    }

    fn on_swarm_event(&mut self, event: FromSwarm) {
        match event {
            FromSwarm::ConnectionClosed(ConnectionClosed { connection_id, .. }) => {
                self.established.remove(&connection_id);
            }
            // Another behaviour may refuse what this one has let in.
            FromSwarm::ListenFailure(failure) => {
                self.established.remove(&failure.connection_id);
            }
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: THandlerOutEvent<Self>) {
        match event {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn a_neighbourhood_has_room_for_eight_and_one_s_own_for_all() {
        let mut crowding = Behaviour::default();
        for i in 0..ESTABLISHED_MAX {
            crowding.establish(ConnectionId::new_unchecked(i), ip(&format!("203.0.113.{i}"))).expect("there is room");
        }
        let next = ConnectionId::new_unchecked(100);
        assert!(crowding.establish(next, ip("203.0.113.200")).is_err());
        assert!(crowding.establish(next, ip("203.0.114.200")).is_ok());
        for i in 200..300 {
            crowding.establish(ConnectionId::new_unchecked(i), ip("192.168.7.9")).expect("the own network is never too many");
        }
        crowding.established.remove(&ConnectionId::new_unchecked(0));
        assert!(crowding.establish(next, ip("203.0.113.200")).is_ok());
    }

    #[test]
    fn an_address_that_is_too_fast_waits() {
        let (mut crowding, start) = (Behaviour::default(), instant());
        (0..BURST).for_each(|_| crowding.attempt(ip("203.0.113.1"), start).expect("a burst is fine"));
        assert!(crowding.attempt(ip("203.0.113.1"), start).is_err());
        assert!(crowding.attempt(ip("203.0.113.1"), start + PAUSE / 2).is_err());
        assert!(crowding.attempt(ip("203.0.113.2"), start).is_ok());
        assert!(crowding.attempt(ip("203.0.113.1"), start + PAUSE).is_ok());
        assert!(crowding.attempt(ip("203.0.113.1"), start + PAUSE).is_err());
    }

    #[test]
    fn addresses_are_counted_up_to_a_limit() {
        let (mut crowding, start) = (Behaviour::default(), instant());
        for i in 0..COUNTED_MAX as u32 {
            crowding.attempt(IpAddr::from((0x0a00_0000 + i).to_be_bytes()), start).expect("there is room");
        }
        assert!(crowding.attempt(ip("203.0.113.1"), start).is_err());
        assert!(crowding.attempt(ip("10.0.0.0"), start).is_ok(), "who is counted goes on");
        assert!(crowding.attempt(ip("203.0.113.1"), start + PAUSE * BURST).is_ok());
        assert!(crowding.attempts.len() <= COUNTED_MAX);
    }
}
