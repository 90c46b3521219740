//! The side that has: who is sent what next, so that nobody is starved and nobody can take what all share.
//!
//! A few peers at a time are sent groups, in turns of so many bytes; each has its own queue, the urgent first. What a peer does
//! not read stops only that peer. A blob is opened, and so verified, before anything of it is sent.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use super::Urgency;
use super::upload_events::{Sent, UploadAction, UploadEvent};
use super::wire::{CHANGES_MAX, ToProvider};
use crate::group_hashes::{group_count, group_length};
use crate::hash::{ContentHash, ModelId};

/// Most open requests of one peer.
pub const REQUESTS_MAX: u32 = 1024;
/// Models that one peer follows.
const FOLLOWS_MAX: usize = 16;
/// Bytes handed over for one peer and not yet sent.
pub const SENDING_BYTES_MAX: u64 = 512 << 10;
/// Peers that are sent groups at the same time, among those that have taken some …
const SLOTS: usize = 4;
/// … and among those of whom that is not known yet, lest a crowd that reads nothing keep others waiting.
const TRIALS: usize = 4;
/// Bytes that a peer has taken once we know that it reads: more than lie in buffers and windows on the way.
const KNOWN_BYTES: u64 = 1 << 20;
/// Bytes that a peer is sent before it is another's turn.
const TURN_BYTES: u64 = 2 << 20;
/// Blobs that are kept open, so that each is verified once and not for each of its groups.
pub const OPEN_BLOBS_MAX: usize = 64;
/// Blobs that are being opened at the same time: it takes a disk and a processor.
const OPENING_MAX: usize = 4;
/// A peer that takes nothing for this long loses its slot until it does …
const STUCK_MS: u64 = 500;
/// … and after this long is hung up on.
const HANG_UP_MS: u64 = 18_000;
/// How often a peer hears that its turn will come.
const WAIT_MS: u64 = 400;
const RETRY_MS: u32 = 1000;

/// The state of all uploads.
#[derive(Debug)]
pub struct Uploads<P> {
    peers: BTreeMap<P, Peer>,
    blobs: HashMap<ContentHash, Blob>,
    /// Every blob of which something is in a queue. It is in `blobs` or in `to_open`.
    requested: HashMap<ContentHash, Requested<P>>,
    /// Blobs to open, in the order of asking.
    to_open: BTreeMap<u64, ContentHash>,
    next_place: u64,
    slots: Vec<Slot<P>>,
    waiting: VecDeque<P>, // peers with something to send and no slot
    bucket: Option<Bucket>,
    uses: u64,
    actions: Vec<UploadAction<P>>,
}

/// A place in a peer's queue: the urgent first, then by the request's id.
type QueueKey = (Urgency, u32);

/// Who asks for something of a blob, and where in their queues it is.
#[derive(Debug)]
struct Requested<P> {
    by: BTreeMap<P, BTreeSet<QueueKey>>,
    /// Where it is in `to_open`.
    place: Option<u64>,
}

#[derive(Debug)]
struct Peer {
    queue: BTreeMap<QueueKey, Wish>,
    follows: BTreeMap<u32, ModelId>,
    sending_bytes: u64,
    taken_bytes: u64,
    /// When it last took something, or began to be sent to.
    took_ms: u64,
    told_ms: u64, // when it last heard from us
}

impl Peer {
    /// Whether it takes nothing of what it was sent.
    fn is_stuck(&self, now_ms: u64) -> bool {
        self.sending_bytes > 0 && now_ms.saturating_sub(self.took_ms) >= STUCK_MS
    }

    fn is_known(&self) -> bool {
        self.taken_bytes >= KNOWN_BYTES
    }
}

#[derive(Clone, Copy, Debug)]
struct Wish {
    hash: ContentHash,
    part: Part,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Part {
    Hashes,
    Group(u32),
}

#[derive(Clone, Copy, Debug)]
enum Blob {
    Opening,
    Open { length: u64, used: u64 },
}

#[derive(Debug)]
struct Slot<P> {
    peer: P,
    left_bytes: u64,
}

/// Bytes that may go out: as many as time has brought, and not much more at once.
#[derive(Debug)]
struct Bucket {
    bytes_per_second: u64,
    bytes: u64,
    filled_ms: u64,
}

impl<P: Copy + Ord> Uploads<P> {
    /// Nobody there; at most `bytes_per_second_max` go out, if that is given.
    pub fn new(bytes_per_second_max: Option<u64>) -> Self {
        let bucket = bytes_per_second_max.map(|rate| Bucket { bytes_per_second: rate.max(1), bytes: 0, filled_ms: 0 });
        let (blobs, requested, to_open) = (HashMap::new(), HashMap::new(), BTreeMap::new());
        let (slots, waiting, actions) = (Vec::new(), VecDeque::new(), Vec::new());
        Self { peers: BTreeMap::new(), blobs, requested, to_open, next_place: 0, slots, waiting, bucket, uses: 0, actions }
    }

    /// Takes an event in and says what to do.
    pub fn handle(&mut self, now_ms: u64, event: UploadEvent<P>) -> Vec<UploadAction<P>> {
        match event {
            UploadEvent::PeerUp { peer } => {
                let (queue, follows) = (BTreeMap::new(), BTreeMap::new());
                let state = Peer { queue, follows, sending_bytes: 0, taken_bytes: 0, took_ms: now_ms, told_ms: now_ms };
                self.peers.insert(peer, state);
            }
            UploadEvent::PeerDown { peer } => self.remove_peer(peer),
            UploadEvent::Received { peer, message } => self.received(now_ms, peer, message),
            UploadEvent::Opened { hash, length } => self.opened(hash, length),
            UploadEvent::Sent { peer, bytes } => {
                if let Some(state) = self.peers.get_mut(&peer) {
                    state.sending_bytes = state.sending_bytes.saturating_sub(bytes);
                    state.taken_bytes += bytes;
                    (state.took_ms, state.told_ms) = (now_ms, now_ms);
                }
            }
            UploadEvent::Changed { model, changes } => self.changed(model, &changes),
            UploadEvent::Tick => self.look_after_peers(now_ms),
        }
        self.open_more(now_ms);
        self.send_all(now_ms);
        std::mem::take(&mut self.actions)
    }

    /// Requests that are open, of all peers.
    pub fn open_requests(&self) -> usize {
        self.peers.values().map(|state| state.queue.len()).sum()
    }

    /// Puts a wish into a peer's queue; one of the same id and urgency makes room.
    fn enqueue(&mut self, peer: P, key: QueueKey, wish: Wish) {
        self.dequeue(peer, key);
        let Some(state) = self.peers.get_mut(&peer) else { return };
        state.queue.insert(key, wish);
        let requested = self.requested.entry(wish.hash).or_insert_with(|| Requested { by: BTreeMap::new(), place: None });
        let is_new = requested.by.is_empty();
        requested.by.entry(peer).or_default().insert(key);
        if is_new && !self.blobs.contains_key(&wish.hash) {
            self.open_later(wish.hash);
        }
    }

    fn dequeue(&mut self, peer: P, key: QueueKey) {
        if let Some(wish) = self.peers.get_mut(&peer).and_then(|state| state.queue.remove(&key)) {
            self.forget_requested(peer, key, wish.hash);
        }
    }

    /// Takes out of `asked` what is no longer in a peer's queue.
    fn forget_requested(&mut self, peer: P, key: QueueKey, hash: ContentHash) {
        let Some(requested) = self.requested.get_mut(&hash) else { return };
        if let Some(keys) = requested.by.get_mut(&peer) {
            keys.remove(&key);
            if keys.is_empty() {
                requested.by.remove(&peer);
            }
        }
        if requested.by.is_empty() {
            if let Some(place) = requested.place {
                self.to_open.remove(&place);
            }
            self.requested.remove(&hash);
        }
    }

    /// Puts a blob that is asked for at the end of those to open.
    fn open_later(&mut self, hash: ContentHash) {
        let Some(requested) = self.requested.get_mut(&hash) else { return };
        requested.place = Some(self.next_place);
        self.to_open.insert(self.next_place, hash);
        self.next_place += 1;
    }

    /// Whether somebody asks for something of a blob who takes what is sent.
    fn is_wanted(&self, now_ms: u64, hash: &ContentHash) -> bool {
        let is_awake = |peer: &P| self.peers.get(peer).is_some_and(|state| !state.is_stuck(now_ms));
        self.requested.get(hash).is_some_and(|requested| requested.by.keys().any(is_awake))
    }

    fn remove_peer(&mut self, peer: P) {
        if let Some(state) = self.peers.remove(&peer) {
            state.queue.into_iter().for_each(|(key, wish)| self.forget_requested(peer, key, wish.hash));
        }
        self.slots.retain(|slot| slot.peer != peer);
        self.waiting.retain(|waiting| *waiting != peer);
    }

    fn received(&mut self, now_ms: u64, peer: P, message: ToProvider) {
        let Some(state) = self.peers.get_mut(&peer) else { return };
        if state.queue.is_empty() {
            state.told_ms = now_ms;
        }
        let (id, urgency, wish) = match message {
            ToProvider::Follow { id, model } => {
                let what = if state.follows.len() < FOLLOWS_MAX {
                    state.follows.insert(id, model);
                    Sent::Have { id, model }
                } else {
                    Sent::NotHave { id }
                };
                return self.actions.push(UploadAction::Send { peer, what });
            }
            ToProvider::Cancel { id } => {
                let cancelled: Vec<_> = state.queue.keys().filter(|(_, queued)| *queued == id).copied().collect();
                return cancelled.into_iter().for_each(|key| self.dequeue(peer, key));
            }
            // A list is short, and nothing can be verified without it.
            ToProvider::Hashes { id, blob } => (id, Urgency::Now, Wish { hash: blob, part: Part::Hashes }),
            ToProvider::Group { id, urgency, blob, group } => (id, urgency, Wish { hash: blob, part: Part::Group(group) }),
        };
        if state.queue.len() >= REQUESTS_MAX as usize {
            return self.actions.push(UploadAction::Send { peer, what: Sent::Busy { id, retry_ms: RETRY_MS } });
        }
        self.enqueue(peer, (urgency, id), wish);
        if let Some(Blob::Open { length, .. }) = self.blobs.get(&wish.hash).copied() {
            self.check_wishes(peer, wish.hash, length);
        }
    }

    /// Refuses groups that a blob does not have, and takes the peer's turn on.
    fn check_wishes(&mut self, peer: P, hash: ContentHash, length: u64) {
        let Some(keys) = self.requested.get(&hash).and_then(|requested| requested.by.get(&peer)) else { return };
        let Some(state) = self.peers.get(&peer) else { return };
        let count = group_count(length).unwrap_or(0);
        let is_beyond = |key| matches!(state.queue.get(key), Some(Wish { part: Part::Group(group), .. }) if *group >= count);
        if keys.iter().any(is_beyond) {
            self.remove_peer(peer);
            return self.actions.push(UploadAction::HangUp { peer, why: "it asked for a group that the blob does not have" });
        }
        if !self.waiting.contains(&peer) && self.slots.iter().all(|slot| slot.peer != peer) {
            self.waiting.push_back(peer);
        }
    }

    /// Opens what is asked for, a few at a time; shuts what was not used for the longest time when too many are open. A peer that takes
    /// nothing keeps nothing open, and what it alone asks for comes last.
    fn open_more(&mut self, now_ms: u64) {
        let mut opening = self.blobs.values().filter(|blob| matches!(blob, Blob::Opening)).count();
        if opening >= OPENING_MAX || self.to_open.is_empty() {
            return;
        }
        while opening < OPENING_MAX {
            let first = self.to_open.values().find(|hash| self.is_wanted(now_ms, hash)).or(self.to_open.values().next());
            let Some(&hash) = first else { return };
            if self.blobs.len() >= OPEN_BLOBS_MAX {
                let open = self.blobs.iter().filter_map(|(hash, blob)| match blob {
                    Blob::Open { used, .. } if !self.is_wanted(now_ms, hash) => Some((self.requested.contains_key(hash), *used, *hash)),
                    _ => None,
                });
                let Some((later, _, oldest)) = open.min().filter(|(later, ..)| !later || self.is_wanted(now_ms, &hash)) else {
                    return; // until one of those is sent
                };
                self.blobs.remove(&oldest);
                self.actions.push(UploadAction::Shut { hash: oldest });
                if later {
                    self.open_later(oldest);
                }
            }
            if let Some(place) = self.requested.get_mut(&hash).and_then(|requested| requested.place.take()) {
                self.to_open.remove(&place);
            }
            self.blobs.insert(hash, Blob::Opening);
            self.actions.push(UploadAction::Open { hash });
            opening += 1;
        }
    }

    fn opened(&mut self, hash: ContentHash, length: Option<u64>) {
        let Some(length) = length.filter(|&length| group_count(length).is_some()) else {
            self.blobs.remove(&hash);
            let by = self.requested.get(&hash).map(|requested| requested.by.clone()).unwrap_or_default();
            for (peer, key) in by.into_iter().flat_map(|(peer, keys)| keys.into_iter().map(move |key| (peer, key))) {
                self.dequeue(peer, key);
                self.actions.push(UploadAction::Send { peer, what: Sent::NotHave { id: key.1 } });
            }
            return;
        };
        self.uses += 1;
        self.blobs.insert(hash, Blob::Open { length, used: self.uses });
        let peers: Vec<_> = self.requested.get(&hash).into_iter().flat_map(|requested| requested.by.keys().copied()).collect();
        for peer in peers {
            self.check_wishes(peer, hash, length);
        }
    }

    fn changed(&mut self, model: ModelId, changes: &[(u32, bool)]) {
        for (peer, state) in &self.peers {
            for id in state.follows.iter().filter(|(_, followed)| **followed == model).map(|(id, _)| *id) {
                let parts = changes.chunks(CHANGES_MAX).map(|part| Sent::Update { id, changes: part.to_vec() });
                self.actions.extend(parts.map(|what| UploadAction::Send { peer: *peer, what }));
            }
        }
    }

    fn look_after_peers(&mut self, now_ms: u64) {
        let mut gone = Vec::new();
        for (peer, state) in &mut self.peers {
            if state.sending_bytes > 0 && now_ms.saturating_sub(state.took_ms) >= HANG_UP_MS {
                gone.push(*peer);
            } else if let Some((&(_, id), _)) = state.queue.first_key_value()
                && state.sending_bytes == 0
                && now_ms.saturating_sub(state.told_ms) >= WAIT_MS
            {
                state.told_ms = now_ms;
                self.actions.push(UploadAction::Send { peer: *peer, what: Sent::Wait { id } });
            }
        }
        for peer in gone {
            self.remove_peer(peer);
            self.actions.push(UploadAction::HangUp { peer, why: "it takes nothing" });
        }
    }

    /// Hands out slots in turns, and to each peer with one as much as it may be sent.
    fn send_all(&mut self, now_ms: u64) {
        if let Some(bucket) = &mut self.bucket {
            bucket.fill(now_ms);
        }
        loop {
            self.hand_out_slots(now_ms);
            let slots: Vec<_> = self.slots.iter().map(|slot| slot.peer).collect();
            let mut sent = false;
            for peer in slots {
                sent |= self.send_one(now_ms, peer);
            }
            if !sent {
                return;
            }
        }
    }

    fn hand_out_slots(&mut self, now_ms: u64) {
        let mut kept = Vec::new();
        let mut free = [TRIALS, SLOTS]; // of those that are not known, and of those that are
        for slot in std::mem::take(&mut self.slots) {
            let Some(state) = self.peers.get(&slot.peer) else { continue };
            if next_wish(state, &self.blobs).is_none() {
                continue; // when there is something again, it asks again
            }
            let turn_over = slot.left_bytes == 0 && !self.waiting.is_empty();
            let free = &mut free[usize::from(state.is_known())];
            if state.is_stuck(now_ms) || turn_over || *free == 0 {
                self.waiting.push_back(slot.peer);
            } else {
                *free -= 1;
                kept.push(slot);
            }
        }
        self.slots = kept;
        for _ in 0..self.waiting.len() {
            let Some(peer) = self.waiting.pop_front() else { return };
            let Some(state) = self.peers.get(&peer) else { continue };
            if next_wish(state, &self.blobs).is_none() {
                continue;
            }
            let free = &mut free[usize::from(state.is_known())];
            if state.is_stuck(now_ms) || *free == 0 {
                self.waiting.push_back(peer);
            } else {
                *free -= 1;
                self.slots.push(Slot { peer, left_bytes: TURN_BYTES });
            }
        }
    }

    /// Sends a peer the next thing that it asked for; says whether it did.
    fn send_one(&mut self, now_ms: u64, peer: P) -> bool {
        let Some(state) = self.peers.get_mut(&peer) else { return false };
        let Some((key, wish, blob_length)) = next_wish(state, &self.blobs) else { return false };
        let length = match wish.part {
            Part::Hashes => 32 * u64::from(group_count(blob_length).unwrap_or(0)),
            Part::Group(group) => group_length(blob_length, group),
        };
        if state.sending_bytes > 0 && state.sending_bytes + length > SENDING_BYTES_MAX {
            return false;
        }
        if self.bucket.as_mut().is_some_and(|bucket| !bucket.take(length)) {
            return false;
        }
        if state.sending_bytes == 0 {
            state.took_ms = now_ms;
        }
        state.sending_bytes += length;
        self.dequeue(peer, key);
        self.uses += 1;
        self.blobs.insert(wish.hash, Blob::Open { length: blob_length, used: self.uses });
        if let Some(slot) = self.slots.iter_mut().find(|slot| slot.peer == peer) {
            slot.left_bytes = slot.left_bytes.saturating_sub(length);
        }
        let (id, hash) = (key.1, wish.hash);
        let what = match wish.part {
            Part::Hashes => Sent::Hashes { id, hash },
            Part::Group(group) => Sent::Group { id, hash, group, length },
        };
        self.actions.push(UploadAction::Send { peer, what });
        true
    }
}

/// The first thing in a peer's queue whose blob is open, with the blob's length.
fn next_wish(state: &Peer, blobs: &HashMap<ContentHash, Blob>) -> Option<(QueueKey, Wish, u64)> {
    state.queue.iter().find_map(|(key, wish)| match blobs.get(&wish.hash)? {
        Blob::Opening => None,
        Blob::Open { length, .. } => Some((*key, *wish, *length)),
    })
}

impl Bucket {
    fn fill(&mut self, now_ms: u64) {
        let came = now_ms.saturating_sub(self.filled_ms).saturating_mul(self.bytes_per_second) / 1000;
        if came > 0 {
            // A quarter of a second's worth at once, and a turn's at least.
            let most = (self.bytes_per_second / 4).max(SENDING_BYTES_MAX);
            (self.bytes, self.filled_ms) = ((self.bytes + came).min(most), now_ms);
        }
    }

    fn take(&mut self, bytes: u64) -> bool {
        let enough = self.bytes >= bytes;
        if enough {
            self.bytes -= bytes;
        }
        enough
    }
}

#[cfg(test)]
#[path = "uploads_tests.rs"]
mod tests;
