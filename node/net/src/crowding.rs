//! How many connections come in from one neighbourhood of the internet, and how fast. Addresses are cheap next to neighbourhoods.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::fmt;
use std::net::IpAddr;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use base::clock::instant;
use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::swarm::{
    CloseConnection, ConnectionClosed, ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent,
    THandlerOutEvent, ToSwarm, dummy,
};
use libp2p::{Multiaddr, PeerId};

use tracing::warn;

use super::address::{Neighbourhood, ip_of, neighbourhood};
use super::friends::Friends;

/// Connections that come in, of strangers and of friends.
const STRANGERS_MAX: usize = 112;
const FRIENDS_MAX: usize = 16;
/// Connections from one public neighbourhood; one's own network is as full as it is.
const OF_NEIGHBOURHOOD_MAX: usize = 8;
/// A stranger that asked for something a shorter time ago keeps its place.
const QUIET_MIN: Duration = Duration::from_secs(2);
/// Attempts from one public address: so many at once, and then one more after each pause.
const PUBLIC_RATE: Rate = Rate { burst: 64, pause: Duration::from_millis(100) };
/// The same of one's own network, where many share an address.
const OWN_RATE: Rate = Rate { burst: 256, pause: Duration::from_millis(10) };
/// Addresses whose attempts are counted. One that was forgotten begins anew.
const COUNTED_MAX: usize = 4096;
/// How often the log says that somebody was refused or had to go.
const TOLD_PAUSE: Duration = Duration::from_secs(10);

/// How often an address may try to connect.
#[derive(Clone, Copy)]
struct Rate {
    burst: u32,
    pause: Duration,
}

impl Rate {
    fn of(ip: IpAddr) -> Self {
        if neighbourhood(ip).is_own() { OWN_RATE } else { PUBLIC_RATE }
    }
}

/// Refuses a neighbourhood that is too many, and an address that is too fast. When strangers have all places, the one that asked for
/// nothing longest makes room for a newcomer; friends have places that strangers cannot take.
pub(super) struct CrowdLimits {
    friends: Friends,
    established: HashMap<ConnectionId, Inbound>,
    /// Connections that make room.
    leaving: VecDeque<(PeerId, ConnectionId)>,
    attempts: HashMap<IpAddr, Attempts>,
    told: Option<Instant>,
}

/// A connection that came in.
struct Inbound {
    peer: PeerId,
    is_friend: bool,
    from: Option<Neighbourhood>,
    since: Instant,
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
    Full,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooMany(neighbourhood) => write!(f, "{OF_NEIGHBOURHOOD_MAX} connections are from {neighbourhood} already"),
            Self::TooFast(ip) => write!(f, "{ip} connects too often"),
            Self::Full => f.write_str("all connections are in use"),
        }
    }
}

impl std::error::Error for Refused {}

impl CrowdLimits {
    pub(super) fn new(friends: Friends) -> Self {
        Self { friends, established: HashMap::new(), leaving: VecDeque::new(), attempts: HashMap::new(), told: None }
    }

    fn attempt(&mut self, ip: IpAddr, now: Instant) -> Result<(), Refused> {
        let Rate { burst, pause } = Rate::of(ip);
        if self.attempts.len() >= COUNTED_MAX && !self.attempts.contains_key(&ip) {
            // Whoever has been quiet long enough for a full bucket need not be remembered.
            let full_after = PUBLIC_RATE.pause * PUBLIC_RATE.burst;
            self.attempts.retain(|_, attempts| now.duration_since(attempts.counted) < full_after);
            if self.attempts.len() >= COUNTED_MAX {
                return Err(Refused::TooFast(ip));
            }
        }
        let attempts = self.attempts.entry(ip).or_insert(Attempts { left: burst, counted: now });
        let earned = (now.duration_since(attempts.counted).as_millis() / pause.as_millis()) as u32;
        if earned > 0 {
            attempts.left = attempts.left.saturating_add(earned).min(burst);
            attempts.counted = now;
        }
        attempts.left = attempts.left.checked_sub(1).ok_or(Refused::TooFast(ip))?;
        Ok(())
    }

    fn establish(&mut self, connection: ConnectionId, peer: PeerId, ip: Option<IpAddr>, now: Instant) -> Result<(), Refused> {
        let is_friend = self.friends.includes(&peer);
        let from = ip.map(neighbourhood);
        if let Some(from) = from.filter(|from| !from.is_own() && !is_friend)
            && self.established.values().filter(|other| other.from == Some(from)).count() >= OF_NEIGHBOURHOOD_MAX
        {
            return Err(Refused::TooMany(from));
        }
        let friends = self.established.values().filter(|other| other.is_friend).count();
        // A friend beyond the friends' own places takes one of the others'.
        if !is_friend || friends >= FRIENDS_MAX {
            let taken = self.established.len() - friends.min(FRIENDS_MAX);
            if taken >= STRANGERS_MAX {
                let leaving = self.to_leave(now).ok_or(Refused::Full)?;
                let gone = self.established.remove(&leaving).expect("it is one of them");
                self.leaving.push_back((gone.peer, leaving));
            }
        }
        self.established.insert(connection, Inbound { peer, is_friend, from, since: now });
        Ok(())
    }

    /// The stranger's connection that was of no use longest.
    fn to_leave(&self, now: Instant) -> Option<ConnectionId> {
        let of_use = |inbound: &Inbound| self.friends.last_active(&inbound.peer);
        let quiet = |inbound: &Inbound| now.duration_since(of_use(inbound).unwrap_or(inbound.since)) >= QUIET_MIN;
        let strangers = self.established.iter().filter(|(_, inbound)| !inbound.is_friend && quiet(inbound));
        strangers.min_by_key(|(_, inbound)| (of_use(inbound), inbound.since)).map(|(connection, _)| *connection)
    }

    /// Says in the log, now and then, that somebody was refused.
    fn refuse(&mut self, refused: Refused, now: Instant) -> ConnectionDenied {
        if self.told.is_none_or(|at| now.duration_since(at) >= TOLD_PAUSE) {
            self.told = Some(now);
            warn!(connections = self.established.len(), "refused a connection: {refused}");
        }
        ConnectionDenied::new(refused)
    }
}

impl NetworkBehaviour for CrowdLimits {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = Infallible;

    fn handle_pending_inbound_connection(&mut self, _: ConnectionId, _: &Multiaddr, remote: &Multiaddr) -> Result<(), ConnectionDenied> {
        // What comes through a relay has no address of its own: the relay has counted it.
        let now = instant();
        ip_of(remote).map_or(Ok(()), |ip| self.attempt(ip, now).map_err(|refused| self.refuse(refused, now)))
    }

    fn handle_established_inbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        let now = instant();
        self.establish(connection, peer, ip_of(remote), now).map_err(|refused| self.refuse(refused, now))?;
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
            FromSwarm::ConnectionClosed(ConnectionClosed { peer_id, connection_id, remaining_established, .. }) => {
                self.established.remove(&connection_id);
                if remaining_established == 0 {
                    self.friends.forget(&peer_id);
                }
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
        // Whoever lets a connection in polls again afterwards: nobody need be woken.
        self.leaving.pop_front().map_or(Poll::Pending, |(peer_id, connection)| {
            Poll::Ready(ToSwarm::CloseConnection { peer_id, connection: CloseConnection::One(connection) })
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use base::files::Files;
    use protocol::NodeKey;

    use super::*;
    use crate::records::SharedRecords;
    use crate::records::files::RecordFiles;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    /// A behaviour whose friends are these.
    fn crowding(friends: &[PeerId]) -> (CrowdLimits, tempfile::TempDir) {
        let dir = tempfile::tempdir().expect("a directory");
        let files = RecordFiles::new(Files::of(dir.path()));
        let records =
            SharedRecords::load(files, NodeKey::from_secret(&[9; 32]).id(), BTreeSet::new(), BTreeSet::new()).expect("no records yet");
        (CrowdLimits::new(Friends::new(friends.iter().copied(), records)), dir)
    }

    fn establish(crowding: &mut CrowdLimits, number: usize, from: &str, now: Instant) -> Result<PeerId, Refused> {
        let peer = PeerId::random();
        crowding.establish(ConnectionId::new_unchecked(number), peer, Some(ip(from)), now).map(|()| peer)
    }

    #[test]
    fn a_neighbourhood_has_room_for_eight_and_one_s_own_for_all() {
        let (mut crowding, _dir) = crowding(&[]);
        let now = instant();
        for i in 0..OF_NEIGHBOURHOOD_MAX {
            establish(&mut crowding, i, &format!("203.0.113.{i}"), now).expect("there is room");
        }
        assert!(establish(&mut crowding, 100, "203.0.113.200", now).is_err());
        assert!(establish(&mut crowding, 100, "203.0.114.200", now).is_ok());
        for i in 200..300 {
            establish(&mut crowding, i, "192.168.7.9", now).expect("the own network is never too many");
        }
        crowding.established.remove(&ConnectionId::new_unchecked(0));
        assert!(establish(&mut crowding, 100, "203.0.113.200", now).is_ok());
    }

    #[test]
    fn when_all_places_are_taken_the_stranger_of_least_use_makes_room() {
        let friend = PeerId::random();
        let (mut crowding, _dir) = crowding(&[friend]);
        let start = instant();
        let peers: Vec<_> = (0..STRANGERS_MAX).map(|i| establish(&mut crowding, i, "192.168.7.9", start).expect("there is room")).collect();
        assert!(establish(&mut crowding, 500, "192.168.7.9", start).is_err(), "all came just now");
        crowding.establish(ConnectionId::new_unchecked(501), friend, None, start).expect("a friend has a place");
        let later = start + QUIET_MIN;
        peers.iter().skip(1).for_each(|peer| crowding.friends.note_active(*peer, later));
        assert!(establish(&mut crowding, 502, "192.168.7.9", later).is_ok());
        assert_eq!(crowding.leaving.pop_front(), Some((peers[0], ConnectionId::new_unchecked(0))));
        assert!(establish(&mut crowding, 503, "192.168.7.9", later).is_err(), "all others are of use");
        let much_later = later + QUIET_MIN;
        assert!(establish(&mut crowding, 503, "192.168.7.9", much_later).is_ok());
        assert_ne!(crowding.leaving.pop_front().map(|(peer, _)| peer), Some(friend));
        assert_eq!(crowding.established.len(), STRANGERS_MAX + 1);
    }

    #[test]
    fn friends_beyond_their_own_places_take_the_others() {
        let friends: Vec<_> = (0..=FRIENDS_MAX + STRANGERS_MAX).map(|_| PeerId::random()).collect();
        let (mut crowding, _dir) = crowding(&friends);
        let now = instant();
        for (i, friend) in friends.iter().enumerate() {
            let established = crowding.establish(ConnectionId::new_unchecked(i), *friend, None, now + QUIET_MIN);
            assert_eq!(established.is_ok(), i < FRIENDS_MAX + STRANGERS_MAX, "{i}");
        }
    }

    #[test]
    fn an_address_that_is_too_fast_waits() {
        let ((mut crowding, _dir), start) = (crowding(&[]), instant());
        for (near, other, Rate { burst, pause }) in [("203.0.113.1", "203.0.113.2", PUBLIC_RATE), ("192.168.7.9", "192.168.7.10", OWN_RATE)]
        {
            (0..burst).for_each(|_| crowding.attempt(ip(near), start).expect("a burst is fine"));
            assert!(crowding.attempt(ip(near), start).is_err());
            assert!(crowding.attempt(ip(near), start + pause / 2).is_err());
            assert!(crowding.attempt(ip(other), start).is_ok());
            assert!(crowding.attempt(ip(near), start + pause).is_ok());
            assert!(crowding.attempt(ip(near), start + pause).is_err());
        }
    }

    #[test]
    fn addresses_are_counted_up_to_a_limit() {
        let ((mut crowding, _dir), start) = (crowding(&[]), instant());
        for i in 0..COUNTED_MAX as u32 {
            crowding.attempt(IpAddr::from((0x0a00_0000 + i).to_be_bytes()), start).expect("there is room");
        }
        assert!(crowding.attempt(ip("203.0.113.1"), start).is_err());
        assert!(crowding.attempt(ip("10.0.0.0"), start).is_ok(), "who is counted goes on");
        assert!(crowding.attempt(ip("203.0.113.1"), start + PUBLIC_RATE.pause * PUBLIC_RATE.burst).is_ok());
        assert!(crowding.attempts.len() <= COUNTED_MAX);
    }
}
