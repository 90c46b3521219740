//! Connections of the HTTP API, counted. A new one is always let in: when there are too many, the address that has the most gives one up,
//! first one that never had a whole request answered, then the one that has asked for nothing longest. What is being answered stays.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use base::clock::instant;
use tokio::sync::Notify;

/// Connections at a time, besides those that are being answered.
const CONNECTIONS_MAX: usize = 512;
/// Connections that are being answered: beyond that a new one is as much in the way as an idle one.
const ANSWERED_MAX: usize = 256;

/// The connections there are.
#[derive(Clone, Default)]
pub(super) struct Connections(Arc<Mutex<Open>>);

#[derive(Default)]
struct Open {
    next: u64,
    by_number: HashMap<u64, OpenConnection>,
}

struct OpenConnection {
    address: IpAddr,
    /// Requests that are being answered.
    asking: usize,
    /// Whether one was answered.
    was_answered: bool,
    idle_since: Instant,
    leave: Arc<Notify>,
}

/// A connection's place; given back when dropped.
pub(super) struct ConnectionPlace {
    connections: Connections,
    number: u64,
    leave: Arc<Notify>,
}

/// A request that is being answered.
pub(super) struct Asking(Arc<ConnectionPlace>);

impl Connections {
    /// A place for a new connection.
    pub(super) fn take(&self, address: IpAddr) -> Arc<ConnectionPlace> {
        let mut open = self.lock();
        let (number, leave) = open.take(address, instant());
        Arc::new(ConnectionPlace { connections: self.clone(), number, leave })
    }

    /// Ends a connection that is not being answered: something else has run out.
    pub(super) fn drop_idlest(&self) {
        let mut open = self.lock();
        open.make_room();
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    fn take(&mut self, address: IpAddr, now: Instant) -> (u64, Arc<Notify>) {
        let answered = self.by_number.values().filter(|open| open.asking > 0).count();
        if self.by_number.len() - answered.min(ANSWERED_MAX) >= CONNECTIONS_MAX {
            self.make_room();
        }
        self.next += 1;
        let leave = Arc::new(Notify::new());
        let open = OpenConnection { address, asking: 0, was_answered: false, idle_since: now, leave: Arc::clone(&leave) };
        self.by_number.insert(self.next, open);
        (self.next, leave)
    }

    fn make_room(&mut self) {
        let mut counts: HashMap<IpAddr, usize> = HashMap::new();
        self.by_number.values().for_each(|open| *counts.entry(open.address).or_default() += 1);
        let idle = self.by_number.iter().filter(|(_, open)| open.asking == 0);
        let order = |open: &OpenConnection| (open.was_answered, std::cmp::Reverse(counts[&open.address]), open.idle_since);
        let last = idle.min_by_key(|(_, open)| order(open)).map(|(number, _)| *number);
        if let Some(gone) = last.and_then(|number| self.by_number.remove(&number)) {
            gone.leave.notify_one();
        }
    }
}

impl ConnectionPlace {
    /// Notes that a request has come.
    pub(super) fn ask(self: &Arc<Self>) -> Asking {
        if let Some(open) = self.connections.lock().by_number.get_mut(&self.number) {
            open.asking += 1;
        }
        Asking(Arc::clone(self))
    }

    /// Returns when others need the place.
    pub(super) async fn must_leave(&self) {
        self.leave.notified().await;
    }
}

impl Drop for ConnectionPlace {
    fn drop(&mut self) {
        self.connections.lock().by_number.remove(&self.number);
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        if let Some(open) = self.0.connections.lock().by_number.get_mut(&self.0.number) {
            open.asking -= 1;
            (open.was_answered, open.idle_since) = (true, instant());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    #[test]
    fn a_new_connection_takes_the_place_of_the_one_that_asked_for_nothing_longest() {
        let (mut open, start) = (Open::default(), instant());
        let numbers: Vec<_> = (0..CONNECTIONS_MAX as u64).map(|i| open.take(HERE, start + Duration::from_millis(i)).0).collect();
        let known = open.by_number.get_mut(&numbers[0]).expect("open");
        (known.was_answered, known.asking) = (true, 0);
        open.by_number.get_mut(&numbers[1]).expect("open").asking = 1;
        open.take(HERE, start + Duration::from_secs(9));
        assert_eq!(open.by_number.len(), CONNECTIONS_MAX + 1, "one is being answered, and counts for itself");
        open.take(HERE, start + Duration::from_secs(9));
        assert_eq!(open.by_number.len(), CONNECTIONS_MAX + 1);
        assert!(open.by_number.contains_key(&numbers[0]), "it was answered before");
        assert!(open.by_number.contains_key(&numbers[1]), "it is being answered");
        assert!(!open.by_number.contains_key(&numbers[2]));
    }

    #[test]
    fn the_address_with_the_most_gives_way() {
        let (mut open, start) = (Open::default(), instant());
        let other = IpAddr::from([192, 168, 7, 9]);
        let (lone, _) = open.take(other, start);
        (1..CONNECTIONS_MAX + 100).for_each(|_| drop(open.take(HERE, start + Duration::from_secs(1))));
        assert!(open.by_number.contains_key(&lone) && open.by_number.len() == CONNECTIONS_MAX);
    }
}
