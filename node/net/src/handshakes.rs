//! Connections that come in and have not yet proven who they are: a place and a time of their own. When too many are under way, the oldest of
//! the neighbourhood with the most gives way: one that proves itself takes milliseconds, one that only holds a place grows old.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::{AbortHandle, AbortRegistration, Abortable};
use libp2p::core::muxing::StreamMuxerBox;
use libp2p::core::transport::{Boxed, DialOpts, ListenerId, TransportError, TransportEvent};
use libp2p::{Multiaddr, PeerId, Transport};

use super::address::{Neighbourhood, ip_of, neighbourhood};

/// Handshakes of incoming connections that may be under way.
const PENDING_MAX: usize = 256;
/// For one: over a slow and distant line it takes some round trips.
const PENDING_TIMEOUT: Duration = Duration::from_secs(3);

type Authenticated = (PeerId, StreamMuxerBox);
type Upgrade = Pin<Box<dyn Future<Output = io::Result<Authenticated>> + Send>>;

/// A transport whose incoming handshakes are bounded in number and time.
pub(super) struct BoundedHandshakes {
    inner: Boxed<Authenticated>,
    pending: Pending,
}

impl BoundedHandshakes {
    pub(super) fn new(inner: Boxed<Authenticated>) -> Self {
        Self { inner, pending: Pending::default() }
    }
}

impl Transport for BoundedHandshakes {
    type Output = Authenticated;
    type Error = io::Error;
    type ListenerUpgrade = Upgrade;
    type Dial = <Boxed<Authenticated> as Transport>::Dial;

    fn listen_on(&mut self, id: ListenerId, address: Multiaddr) -> Result<(), TransportError<io::Error>> {
        self.inner.listen_on(id, address)
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        self.inner.remove_listener(id)
    }

    fn dial(&mut self, address: Multiaddr, options: DialOpts) -> Result<Self::Dial, TransportError<io::Error>> {
        self.inner.dial(address, options)
    }

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<TransportEvent<Upgrade, io::Error>> {
        let pending = self.pending.clone();
        Pin::new(&mut self.inner).poll(context).map(|event| {
            let from = if let TransportEvent::Incoming { send_back_addr, .. } = &event { ip_of(send_back_addr) } else { None };
            event.map_upgrade(|upgrade| {
                let (place, abort) = pending.begin(from.map(neighbourhood));
                let bounded = async move {
                    let _held = place;
                    match tokio::time::timeout(PENDING_TIMEOUT, Abortable::new(upgrade, abort)).await {
                        Ok(Ok(proven)) => proven,
                        Ok(Err(_)) => Err(io::Error::other("others needed its place")),
                        Err(_) => Err(io::ErrorKind::TimedOut.into()),
                    }
                };
                Box::pin(bounded) as Upgrade
            })
        })
    }
}

/// Handshakes that are under way.
#[derive(Clone, Default)]
struct Pending(Arc<Mutex<PendingHandshakes>>);

#[derive(Default)]
struct PendingHandshakes {
    next: u64,
    /// By number, so by age.
    by_number: BTreeMap<u64, (Option<Neighbourhood>, AbortHandle)>,
}

/// A handshake's place; given back when dropped.
struct PendingPlace {
    pending: Pending,
    number: u64,
}

impl Pending {
    /// Begins a handshake; breaks another off if there are too many.
    fn begin(&self, from: Option<Neighbourhood>) -> (PendingPlace, AbortRegistration) {
        let mut pending = self.lock();
        if pending.by_number.len() >= PENDING_MAX
            && let Some(number) = pending.to_break_off()
            && let Some((_, handle)) = pending.by_number.remove(&number)
        {
            handle.abort();
        }
        pending.next += 1;
        let number = pending.next;
        let (handle, registration) = AbortHandle::new_pair();
        pending.by_number.insert(number, (from, handle));
        (PendingPlace { pending: self.clone(), number }, registration)
    }

    fn lock(&self) -> MutexGuard<'_, PendingHandshakes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PendingHandshakes {
    /// The oldest of the neighbourhood that has the most.
    fn to_break_off(&self) -> Option<u64> {
        let mut counts: HashMap<Option<Neighbourhood>, usize> = HashMap::new();
        self.by_number.values().for_each(|(from, _)| *counts.entry(*from).or_default() += 1);
        let most = counts.values().copied().max()?;
        self.by_number.iter().find(|(_, (from, _))| counts.get(from) == Some(&most)).map(|(number, _)| *number)
    }
}

impl Drop for PendingPlace {
    fn drop(&mut self) {
        self.pending.lock().by_number.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn when_too_many_are_under_way_the_oldest_of_the_fullest_neighbourhood_gives_way() {
        let (pending, near, far) = (Pending::default(), Neighbourhood::V4([127, 0, 0]), Neighbourhood::V4([203, 0, 113]));
        let first = pending.begin(Some(near));
        let many: Vec<_> = (1..PENDING_MAX).map(|_| pending.begin(Some(far))).collect();
        assert!(pending.lock().by_number.values().all(|(_, handle)| !handle.is_aborted()));
        let next = pending.begin(Some(near));
        assert_eq!(pending.lock().by_number.len(), PENDING_MAX);
        assert!(!pending.lock().by_number.contains_key(&many[0].0.number));
        assert!(pending.lock().by_number.contains_key(&first.0.number) && pending.lock().by_number.contains_key(&next.0.number));
        drop((first, many, next));
        assert!(pending.lock().by_number.is_empty());
    }
}
