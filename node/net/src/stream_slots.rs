//! Slots for the streams of one protocol. Friends have their own; strangers share the rest, and when it is full the stranger with the most
//! streams gives one up to a newcomer: first one on which nothing was ever asked, then the one that has been quiet longest.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base::clock::instant;
use libp2p::PeerId;
use tokio::sync::Notify;
use tracing::warn;

use super::friends::Friends;

/// A stream that has been quiet for less is in use: it is not given up for another.
const QUIET_MIN: Duration = Duration::from_secs(1);
/// How often the log says that slots are short.
const TOLD_PAUSE: Duration = Duration::from_secs(10);

/// How many slots there are.
#[derive(Clone, Copy, Debug)]
pub(super) struct SlotLimits {
    /// For strangers, all together.
    pub(super) strangers: usize,
    /// For friends, all together, besides.
    pub(super) friends: usize,
    /// For one peer, whoever it is.
    pub(super) of_one: usize,
}

/// The slots of one protocol.
#[derive(Clone)]
pub(super) struct StreamSlots {
    what: &'static str,
    limits: SlotLimits,
    friends: Friends,
    taken: Arc<Mutex<Taken>>,
}

#[derive(Default)]
struct Taken {
    next: u64,
    by_number: HashMap<u64, TakenSlot>,
    told: Option<Instant>,
}

struct TakenSlot {
    peer: PeerId,
    is_friend: bool,
    has_requested: bool,
    quiet_since: Instant,
    leave: Arc<Notify>,
}

/// A stream's slot; given back when dropped.
pub(super) struct StreamSlot {
    slots: StreamSlots,
    number: u64,
    peer: PeerId,
    leave: Arc<Notify>,
}

impl StreamSlots {
    /// Slots for `what`, which the log calls them.
    pub(super) fn new(what: &'static str, limits: SlotLimits, friends: Friends) -> Self {
        Self { what, limits, friends, taken: Arc::default() }
    }

    /// Takes a slot for a stream of `peer`; nothing when it has its share, or when all are in use.
    pub(super) fn take(&self, peer: PeerId) -> Option<StreamSlot> {
        let is_friend = self.friends.includes(&peer);
        let now = instant();
        let mut taken = self.lock();
        let number = taken.take(self.limits, peer, is_friend, now);
        if number.is_none() && taken.told.is_none_or(|at| now.duration_since(at) >= TOLD_PAUSE) {
            taken.told = Some(now);
            warn!(%peer, "refused {}: {} are open, {} at most of one peer", self.what, taken.by_number.len(), self.limits.of_one);
        }
        let leave = Arc::clone(&taken.by_number[&number?].leave);
        Some(StreamSlot { slots: self.clone(), number: number?, peer, leave })
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Taken {
    fn take(&mut self, limits: SlotLimits, peer: PeerId, is_friend: bool, now: Instant) -> Option<u64> {
        let own = self.by_number.values().filter(|slot| slot.peer == peer).count();
        if own >= limits.of_one {
            return None;
        }
        let alike = self.by_number.values().filter(|slot| slot.is_friend == is_friend).count();
        let most = if is_friend { limits.friends } else { limits.strangers };
        if alike >= most {
            // Friends are as many as the user named: beyond their own slots they are treated as strangers are among themselves.
            let number = self.to_give_up(is_friend, own, now)?;
            self.by_number.remove(&number)?.leave.notify_one();
        }
        self.next += 1;
        let slot = TakenSlot { peer, is_friend, has_requested: false, quiet_since: now, leave: Arc::default() };
        self.by_number.insert(self.next, slot);
        Some(self.next)
    }

    /// The slot that goes to a newcomer who has `own` of them.
    fn to_give_up(&self, is_friend: bool, own: usize, now: Instant) -> Option<u64> {
        let mut counts: HashMap<PeerId, usize> = HashMap::new();
        self.by_number.values().filter(|slot| slot.is_friend == is_friend).for_each(|slot| *counts.entry(slot.peer).or_default() += 1);
        let most = counts.values().copied().max()?;
        let shares_less = |slot: &TakenSlot| most > own + 1 && counts.get(&slot.peer) == Some(&most);
        let is_quiet = |slot: &TakenSlot| now.duration_since(slot.quiet_since) >= QUIET_MIN;
        let candidates = self.by_number.iter().filter(|(_, slot)| slot.is_friend == is_friend);
        let candidates = candidates.filter(|(_, slot)| shares_less(slot) || is_quiet(slot));
        candidates.min_by_key(|(_, slot)| (!shares_less(slot), slot.has_requested, slot.quiet_since)).map(|(number, _)| *number)
    }
}

impl StreamSlot {
    /// Notes that something was asked on the stream.
    pub(super) fn note_request(&self) {
        let now = instant();
        self.slots.friends.note_active(self.peer, now);
        if let Some(slot) = self.slots.lock().by_number.get_mut(&self.number) {
            (slot.has_requested, slot.quiet_since) = (true, now);
        }
    }

    /// Does a stream's work until it ends, or somebody else needs its slot.
    pub(super) async fn hold(&self, work: impl Future<Output = std::io::Result<()>>) -> std::io::Result<()> {
        tokio::select! {
            end = work => end,
            () = self.leave.notified() => Err(std::io::Error::other("another peer needs its slot")),
        }
    }
}

impl Drop for StreamSlot {
    fn drop(&mut self) {
        self.slots.lock().by_number.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: SlotLimits = SlotLimits { strangers: 8, friends: 2, of_one: 4 };

    #[test]
    fn one_peer_has_its_share_and_no_more() {
        let (mut taken, peer, now) = (Taken::default(), PeerId::random(), instant());
        (0..4).for_each(|_| assert!(taken.take(LIMITS, peer, false, now).is_some()));
        assert!(taken.take(LIMITS, peer, false, now).is_none());
    }

    #[test]
    fn a_newcomer_gets_a_place_of_the_peer_that_has_most() {
        let (mut taken, now) = (Taken::default(), instant());
        let greedy = PeerId::random();
        (0..4).for_each(|_| assert!(taken.take(LIMITS, greedy, false, now).is_some()));
        (0..4).for_each(|_| assert!(taken.take(LIMITS, PeerId::random(), false, now).is_some()));
        // All in use: the greedy one gives up two, down to one more than the newcomer has.
        for left in [3, 2] {
            assert!(taken.take(LIMITS, PeerId::random(), false, now).is_some());
            assert_eq!(taken.by_number.values().filter(|slot| slot.peer == greedy).count(), left);
            assert_eq!(taken.by_number.len(), 8);
        }
        assert!(taken.take(LIMITS, PeerId::random(), false, now).is_some());
        assert!(taken.take(LIMITS, PeerId::random(), false, now).is_none(), "each has one, and has it since now");
    }

    #[test]
    fn what_has_never_requested_goes_first_and_then_the_quietest() {
        let (mut taken, now) = (Taken::default(), instant());
        let numbers: Vec<_> = (0..8).map(|_| taken.take(LIMITS, PeerId::random(), false, now).expect("room")).collect();
        for (i, number) in numbers.iter().enumerate().filter(|(i, _)| *i != 5) {
            let slot = taken.by_number.get_mut(number).expect("taken");
            (slot.has_requested, slot.quiet_since) = (true, now + Duration::from_millis(i as u64));
        }
        let later = now + QUIET_MIN + Duration::from_millis(1);
        assert!(taken.take(LIMITS, PeerId::random(), false, later).is_some());
        assert!(!taken.by_number.contains_key(&numbers[5]));
        assert!(taken.take(LIMITS, PeerId::random(), false, later).is_some());
        assert!(!taken.by_number.contains_key(&numbers[0]));
    }

    #[test]
    fn friends_have_places_that_strangers_cannot_fill() {
        let (mut taken, now) = (Taken::default(), instant());
        (0..8).for_each(|_| assert!(taken.take(LIMITS, PeerId::random(), false, now).is_some()));
        assert!(taken.take(LIMITS, PeerId::random(), false, now).is_none());
        let friend = PeerId::random();
        assert!(taken.take(LIMITS, friend, true, now).is_some() && taken.take(LIMITS, friend, true, now).is_some());
        assert!(taken.take(LIMITS, PeerId::random(), true, now).is_some(), "friends share among themselves");
        assert!(taken.take(LIMITS, PeerId::random(), true, now).is_none());
        assert_eq!(taken.by_number.len(), 10);
    }
}
