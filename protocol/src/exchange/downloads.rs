//! The side that wants: its state, and the bookkeeping of what is asked of whom.
//!
//! `answers` takes in what peers say, `slow_peers` finds out who is too slow, `picker` decides what is asked of whom next.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::events::{DownloadAction, DownloadEvent, ExchangeCounts, Fault};
use super::peer_state::{Peer, Requested};
use super::wanted::{Room, WantedBlob, WantedPlace};
use super::wire::ToProvider;
use super::{Draws, Payload, Urgency};
use crate::group_hashes::GroupHashes;
use crate::hash::{BlobRef, ContentHash, ModelId};

pub(super) const BUSY_MAX_MS: u64 = 10_000;
/// Blobs that a peer may claim to have without having them, before it is demoted.
pub(super) const BROKEN_CLAIMS_MAX: u32 = 3;

/// The state of all downloads.
#[derive(Debug)]
pub struct Downloads<P, B> {
    pub(super) peers: BTreeMap<P, Peer>,
    blamed: BTreeSet<P>,
    doubted: BTreeSet<P>,
    pub(super) wanted: HashMap<ContentHash, WantedBlob<P>>,
    /// Blobs that have groups to ask for, the first to be asked for first.
    pub(super) order: BTreeSet<WantedPlace>,
    pub(super) models: BTreeMap<ModelId, Vec<ContentHash>>,
    pub(super) places: HashMap<ContentHash, (ModelId, u32)>,
    pub(super) next_id: u32,
    next_serial: u64,
    pub(super) way_bytes: u64, // asked for, or being verified
    pub(super) ticked_ms: u64,
    draws: Draws,
    pub(super) actions: Vec<DownloadAction<P, B>>,
    pub(super) counts: ExchangeCounts,
}

/// Small groups count as more than they are, so that a limit on bytes is one on requests, too.
pub(super) fn cost_bytes(length: u64) -> u64 {
    const COST_BYTES_MIN: u64 = 64 << 10;
    length.max(COST_BYTES_MIN)
}

impl<P: Copy + Ord, B: Payload> Downloads<P, B> {
    /// Nothing wanted, nobody there. `seed` decides between blobs that are equally rare.
    pub fn new(seed: u64) -> Self {
        Self {
            peers: BTreeMap::new(),
            blamed: BTreeSet::new(),
            doubted: BTreeSet::new(),
            wanted: HashMap::new(),
            order: BTreeSet::new(),
            models: BTreeMap::new(),
            places: HashMap::new(),
            next_id: 1,
            next_serial: 0,
            way_bytes: 0,
            ticked_ms: 0,
            draws: Draws(seed),
            actions: Vec::new(),
            counts: ExchangeCounts::default(),
        }
    }

    /// Takes an event in and says what to do.
    pub fn handle(&mut self, now_ms: u64, event: DownloadEvent<P, B>) -> Vec<DownloadAction<P, B>> {
        match event {
            DownloadEvent::PeerUp { peer, requests_max } => self.peer_up(now_ms, peer, requests_max),
            DownloadEvent::Doubted { peer } => {
                self.doubted.insert(peer);
                if let Some(peer) = self.peers.get_mut(&peer) {
                    peer.doubt(now_ms);
                }
            }
            DownloadEvent::PeerDown { peer } => self.remove_peer(peer),
            DownloadEvent::Follow { model, blobs } => self.follow(model, blobs),
            DownloadEvent::Want { blob, urgency } => self.want(blob, urgency),
            DownloadEvent::Prepared { hash, hashes, here } => self.prepared(hash, hashes, &here),
            DownloadEvent::Unsure { hash } => {
                if let Some(wanted) = self.wanted.get_mut(&hash) {
                    wanted.unsure = true;
                }
            }
            DownloadEvent::Unwant { hash } => self.unwant(hash),
            DownloadEvent::UnwantAll => self.unwant_all(),
            DownloadEvent::Received { peer, message } => self.received(now_ms, peer, message),
            DownloadEvent::Progress { peer, bytes } => {
                if let Some(peer) = self.peers.get_mut(&peer) {
                    peer.pace.progress(now_ms, bytes);
                }
                return std::mem::take(&mut self.actions); // says nothing about what to ask for next
            }
            DownloadEvent::Verified { peer, hash, serial, check } => self.verified(peer, hash, serial, check),
            DownloadEvent::Wrong { peer, hash, serial, check } => self.wrong(peer, hash, serial, check),
            DownloadEvent::Tick => self.look_after_peers(now_ms),
        }
        self.ask_all(now_ms);
        std::mem::take(&mut self.actions)
    }

    /// Whether anybody who is there may have a blob that is wanted.
    pub fn may_be_had(&self, hash: &ContentHash) -> bool {
        self.wanted.get(hash).is_some_and(|wanted| self.peers.iter().any(|(peer, state)| self.may_have(peer, state, wanted)))
    }

    /// Whether a peer is known, and known not to have a blob that is wanted.
    pub fn lacks(&self, peer: &P, hash: &ContentHash) -> bool {
        let (Some(state), Some(wanted)) = (self.peers.get(peer), self.wanted.get(hash)) else { return false };
        !self.may_have(peer, state, wanted)
    }

    /// Whether a peer says that it has a blob of a model that is followed; `None` before it has said.
    #[cfg(test)]
    pub(super) fn has_said(&self, peer: &P, hash: &ContentHash) -> Option<bool> {
        let (model, index) = self.places.get(hash)?;
        self.peers.get(peer)?.bitfields.get(model).map(|bits| bits.get(*index))
    }

    /// Blobs that are wanted and not complete.
    pub fn wanted(&self) -> impl Iterator<Item = &ContentHash> {
        self.wanted.keys()
    }

    /// What has come so far.
    pub fn counts(&self) -> ExchangeCounts {
        self.counts
    }

    /// Whether a peer has taken our stream on.
    pub fn knows(&self, peer: &P) -> bool {
        self.peers.contains_key(peer)
    }

    /// Whether every peer has said what it has of a model.
    pub fn all_have_said(&self, model: &ModelId) -> bool {
        self.peers.values().all(|state| state.bitfields.contains_key(model))
    }

    /// Some blobs of models that are followed, those first that the fewest peers say they have; of those that nobody has, none.
    pub fn rarest_first(&mut self, blobs: Vec<BlobRef>) -> Vec<BlobRef> {
        let mut order: Vec<_> = blobs
            .into_iter()
            .filter_map(|blob| {
                let holders = self.holders(&blob.hash).len();
                (holders > 0).then(|| (holders, self.draws.next(), blob))
            })
            .collect();
        order.sort_unstable_by_key(|(holders, draw, _)| (*holders, *draw));
        order.into_iter().map(|(.., blob)| blob).collect()
    }

    /// Who says that he has a blob of a model that is followed.
    pub fn holders(&self, hash: &ContentHash) -> Vec<P> {
        let Some((model, index)) = self.places.get(hash) else { return Vec::new() };
        let has = |state: &Peer| state.bitfields.get(model).is_some_and(|bits| bits.get(*index));
        self.peers.iter().filter(|(_, state)| has(state)).map(|(peer, _)| *peer).collect()
    }

    /// How fast each peer has sent lately, in bytes a second, where that is known.
    pub fn rates(&self) -> impl Iterator<Item = (P, u64)> {
        self.peers.iter().filter_map(|(peer, state)| Some((*peer, state.pace.rate()?)))
    }

    /// Bytes that are asked for or being verified: no more than these can be in memory.
    pub fn way_bytes(&self) -> u64 {
        self.way_bytes
    }

    fn peer_up(&mut self, now_ms: u64, peer: P, requests_max: u32) {
        if self.blamed.contains(&peer) || self.peers.contains_key(&peer) {
            return;
        }
        let mut state = Peer::new(now_ms, requests_max, self.next_id);
        if self.doubted.contains(&peer) {
            state.doubt(now_ms);
        }
        self.peers.insert(peer, state);
        let models: Vec<_> = self.models.keys().copied().collect();
        models.into_iter().for_each(|model| self.ask_what_there_is(peer, model));
        self.order_again();
    }

    /// Forgets a peer; what it owed is asked of others.
    pub(super) fn remove_peer(&mut self, peer: P) {
        let Some(state) = self.peers.remove(&peer) else { return };
        self.way_bytes -= state.requested_bytes;
        for requested in state.requested.values() {
            self.release(peer, *requested);
        }
        for wanted in self.wanted.values_mut() {
            wanted.hashes_requested.remove(&peer);
        }
        self.order_again();
    }

    fn follow(&mut self, model: ModelId, blobs: Vec<ContentHash>) {
        if self.models.contains_key(&model) {
            return;
        }
        for (index, hash) in blobs.iter().enumerate() {
            self.places.entry(*hash).or_insert((model, index as u32));
        }
        self.models.insert(model, blobs);
        let peers: Vec<_> = self.peers.keys().copied().collect();
        peers.into_iter().for_each(|peer| self.ask_what_there_is(peer, model));
    }

    fn ask_what_there_is(&mut self, peer: P, model: ModelId) {
        let id = self.new_id();
        if let Some(state) = self.peers.get_mut(&peer) {
            state.follows.insert(id, model);
            self.actions.push(DownloadAction::Send { peer, message: ToProvider::Follow { id, model } });
        }
    }

    fn want(&mut self, blob: BlobRef, urgency: Urgency) {
        if let Some(wanted) = self.wanted.get_mut(&blob.hash) {
            wanted.urgency = wanted.urgency.min(urgency);
        } else {
            self.next_serial += 1;
            let Some(wanted) = WantedBlob::new(blob, self.next_serial, urgency, self.draws.next()) else { return };
            self.wanted.insert(blob.hash, wanted);
        }
        self.order_one(blob.hash);
    }

    fn unwant(&mut self, hash: ContentHash) {
        let peers: Vec<_> = self.peers.keys().copied().collect();
        for peer in peers {
            self.take_back(peer, |requested| requested.hash == hash);
        }
        self.forget_wanted(hash);
    }

    fn unwant_all(&mut self) {
        let peers: Vec<_> = self.peers.keys().copied().collect();
        for peer in peers {
            self.take_back(peer, |_| true);
        }
        self.wanted.clear();
        self.order.clear();
    }

    fn forget_wanted(&mut self, hash: ContentHash) -> bool {
        let Some(wanted) = self.wanted.remove(&hash) else { return false };
        if let Some(place) = &wanted.placed {
            self.order.remove(place);
        }
        true
    }

    fn prepared(&mut self, hash: ContentHash, hashes: Option<GroupHashes>, here: &[u32]) {
        let Some(wanted) = self.wanted.get_mut(&hash) else { return };
        wanted.ready(hashes, here);
        if wanted.left == 0 {
            self.complete(hash);
        } else {
            self.order_one(hash);
        }
    }

    pub(super) fn complete(&mut self, hash: ContentHash) {
        if self.forget_wanted(hash) {
            self.actions.push(DownloadAction::Complete { hash });
        }
    }

    pub(super) fn blame(&mut self, peer: P, fault: Fault) {
        self.remove_peer(peer);
        if self.blamed.insert(peer) {
            self.actions.push(DownloadAction::Blame { peer, fault });
        }
    }

    pub(super) fn may_have(&self, peer: &P, state: &Peer, wanted: &WantedBlob<P>) -> bool {
        if wanted.refused.contains(peer) {
            return false;
        }
        let place = self.places.get(&wanted.blob.hash);
        place.and_then(|(model, index)| Some(state.bitfields.get(model)?.get(*index))).unwrap_or(true)
    }

    /// Takes requests back that a peer has not answered.
    pub(super) fn take_back(&mut self, peer: P, which: impl Fn(&Requested) -> bool) {
        let Some(state) = self.peers.get(&peer) else { return };
        let ids: Vec<_> = state.requested.iter().filter(|(_, requested)| which(requested)).map(|(id, _)| *id).collect();
        for id in ids {
            let Some(requested) = self.forget_requested(peer, id) else { continue };
            if let Some(state) = self.peers.get_mut(&peer) {
                state.cancelled_bytes += requested.length;
            }
            self.release(peer, requested);
            self.actions.push(DownloadAction::Send { peer, message: ToProvider::Cancel { id } });
        }
    }

    pub(super) fn forget_requested(&mut self, peer: P, id: u32) -> Option<Requested> {
        let state = self.peers.get_mut(&peer)?;
        let requested = state.requested.remove(&id)?;
        state.requested_bytes -= cost_bytes(requested.length);
        self.way_bytes -= cost_bytes(requested.length);
        Some(requested)
    }

    /// A group that was asked of `peer` may be asked of others.
    pub(super) fn release(&mut self, peer: P, requested: Requested) {
        if let Some(wanted) = self.wanted.get_mut(&requested.hash) {
            wanted.release(requested.group, peer);
            self.order_one(requested.hash);
        }
    }

    pub(super) fn new_id(&mut self) -> u32 {
        let id = self.next_id;
        self.next_id += 1; // four billion requests are a petabyte
        id
    }

    /// Notes a request for a group.
    pub(super) fn note_requested(&mut self, now_ms: u64, peer: P, id: u32, requested: Requested) {
        let Some(state) = self.peers.get_mut(&peer) else { return };
        if state.requested.is_empty() {
            state.pace.begin(now_ms);
            state.begun_ms = Some(now_ms);
        }
        state.requested.insert(id, requested);
        state.requested_bytes += cost_bytes(requested.length);
        self.way_bytes += cost_bytes(requested.length);
        if let Some(wanted) = self.wanted.get_mut(&requested.hash) {
            self.counts.doubled += u64::from(requested.second);
            wanted.requested(requested.group, peer);
        }
        self.order_one(requested.hash);
    }

    /// Notes a request for a list.
    pub(super) fn note_list_requested(&mut self, peer: P, id: u32, hash: ContentHash) {
        if let (Some(state), Some(wanted)) = (self.peers.get_mut(&peer), self.wanted.get_mut(&hash)) {
            state.lists.insert(id, hash);
            wanted.hashes_requested.insert(peer, id);
        }
    }

    /// Puts a blob into its place in the order, or takes it out when there is nothing to ask for.
    pub(super) fn order_one(&mut self, hash: ContentHash) {
        let Some(wanted) = self.wanted.get(&hash) else { return };
        let rarity = match wanted.urgency {
            Urgency::Now | Urgency::Soon => 0,
            Urgency::Rest => self.peers.iter().filter(|(peer, state)| self.may_have(peer, state, wanted)).count() as u32,
        };
        let to_ask = !wanted.missing.is_empty() || wanted.room != Room::Ready;
        let place = to_ask.then_some((wanted.urgency, !wanted.is_begun(), rarity, wanted.draw, hash));
        if let Some(wanted) = self.wanted.get_mut(&hash)
            && wanted.placed != place
        {
            let before = std::mem::replace(&mut wanted.placed, place);
            if let Some(before) = &before {
                self.order.remove(before);
            }
            self.order.extend(place);
        }
    }

    /// The same for all, after who is there or has what has changed.
    pub(super) fn order_again(&mut self) {
        let hashes: Vec<_> = self.wanted.keys().copied().collect();
        hashes.into_iter().for_each(|hash| self.order_one(hash));
    }
}
