//! What answers of peers mean for what is wanted, and who is to blame for them.

use super::Payload;
use super::bitfield::Bitfield;
use super::downloads::{BROKEN_CLAIMS_MAX, BUSY_MAX_MS, Downloads, cost_bytes};
use super::events::{DownloadAction, Fault};
use super::peer_state::Requested;
use super::wanted::Group;
use super::wire::FromProvider;
use crate::group_hashes::{GroupCheck, GroupHash, GroupHashes, group_length};
use crate::hash::ContentHash;

impl<P: Copy + Ord, B: Payload> Downloads<P, B> {
    pub(super) fn received(&mut self, now_ms: u64, peer: P, message: FromProvider<B>) {
        let Some(state) = self.peers.get_mut(&peer) else { return };
        let id = match &message {
            FromProvider::Hello { .. } => return, // the driver has seen the one that counts
            FromProvider::Have { id, .. }
            | FromProvider::Update { id, .. }
            | FromProvider::Hashes { id, .. }
            | FromProvider::Group { id, .. }
            | FromProvider::NotHave { id }
            | FromProvider::Busy { id, .. }
            | FromProvider::Wait { id } => *id,
        };
        if id < state.first_id || id >= self.next_id {
            return self.blame(peer, Fault::Unsolicited);
        }
        if let Some(begun_ms) = state.begun_ms.take_if(|_| !matches!(message, FromProvider::Wait { .. } | FromProvider::Update { .. })) {
            state.pace.answered_after(now_ms.saturating_sub(begun_ms));
        }
        match message {
            FromProvider::Hello { .. } => {}
            FromProvider::Have { id, bits } => self.has(peer, id, bits),
            FromProvider::Update { id, changes } => self.has_changed(peer, id, &changes),
            FromProvider::Hashes { id, hashes } => self.listed(peer, id, hashes),
            FromProvider::Group { id, bytes } => self.group_came(peer, id, bytes),
            FromProvider::NotHave { id } => self.has_not(now_ms, peer, id),
            FromProvider::Busy { id, retry_ms } => {
                state.busy_until_ms = now_ms + u64::from(retry_ms).min(BUSY_MAX_MS);
                if let Some(hash) = state.lists.remove(&id)
                    && let Some(wanted) = self.wanted.get_mut(&hash)
                {
                    wanted.hashes_requested.remove(&peer);
                }
                if let Some(requested) = self.forget_requested(peer, id) {
                    self.release(peer, requested);
                }
            }
            FromProvider::Wait { .. } => state.pace.waits(now_ms),
        }
    }

    fn has(&mut self, peer: P, id: u32, bits: Bitfield) {
        let Some(state) = self.peers.get_mut(&peer) else { return };
        if let Some(model) = state.follows.get(&id) {
            state.bitfields.insert(*model, bits);
            self.order_again();
        }
    }

    fn has_changed(&mut self, peer: P, id: u32, changes: &[(u32, bool)]) {
        let Some(state) = self.peers.get_mut(&peer) else { return };
        let Some(model) = state.follows.get(&id) else { return };
        let (Some(bits), Some(blobs)) = (state.bitfields.get_mut(model), self.models.get(model)) else { return };
        let mut touched = Vec::new();
        for &(index, set) in changes {
            bits.set(index, set);
            if let Some(wanted) = blobs.get(index as usize).and_then(|hash| self.wanted.get_mut(hash)) {
                if set {
                    wanted.refused.remove(&peer);
                }
                touched.push(wanted.blob.hash);
            }
        }
        touched.into_iter().for_each(|hash| self.order_one(hash));
    }

    fn listed(&mut self, peer: P, id: u32, hashes: Vec<GroupHash>) {
        let Some(hash) = self.peers.get_mut(&peer).and_then(|state| state.lists.remove(&id)) else { return };
        let Some(wanted) = self.wanted.get_mut(&hash) else { return };
        wanted.hashes_requested.remove(&peer);
        match GroupHashes::new(wanted.blob, hashes) {
            Ok(hashes) => {
                if wanted.hashes.is_none() {
                    wanted.hashes = Some(hashes.clone());
                    self.actions.push(DownloadAction::Listed { hashes });
                }
            }
            Err(_) if wanted.unsure => {
                wanted.refused.insert(peer);
                self.order_one(hash);
            }
            Err(_) => self.blame(peer, Fault::WrongHashes { hash }),
        }
    }

    fn group_came(&mut self, peer: P, id: u32, bytes: B) {
        let Some(requested) = self.forget_requested(peer, id) else {
            // Taken back too late, or never asked for: only so much can be on its way.
            let Some(state) = self.peers.get_mut(&peer) else { return };
            self.counts.surplus_groups += 1;
            match state.cancelled_bytes.checked_sub(bytes.length()) {
                Some(left) => state.cancelled_bytes = left,
                None => self.blame(peer, Fault::Unsolicited),
            }
            return;
        };
        let Requested { hash, group, length, .. } = requested;
        if bytes.length() != length {
            self.release(peer, requested);
            if let Some(wanted) = self.wanted.get_mut(&hash).filter(|wanted| wanted.unsure) {
                wanted.refused.insert(peer);
                return self.order_one(hash);
            }
            return self.blame(peer, Fault::WrongLength { hash, group, length: bytes.length(), expected: length });
        }
        let Some(wanted) = self.wanted.get_mut(&hash) else { return };
        match (wanted.group(group), wanted.hashes.as_ref().and_then(|hashes| hashes.check(group))) {
            (Group::Here | Group::Verifying, _) => self.counts.surplus_groups += 1,
            // A provider sends the list first. If it could not, this cannot be verified yet.
            (_, None) => self.release(peer, requested),
            (Group::Missing | Group::Requested(_) | Group::AskedTwice(..), Some(check)) => {
                wanted.verifying(group);
                let serial = wanted.serial;
                if let Some(state) = self.peers.get_mut(&peer) {
                    state.verifying_bytes += cost_bytes(length);
                }
                self.way_bytes += cost_bytes(length);
                self.actions.push(DownloadAction::Verify { peer, hash, serial, check, bytes });
            }
        }
    }

    fn has_not(&mut self, now_ms: u64, peer: P, id: u32) {
        let Some(state) = self.peers.get_mut(&peer) else { return };
        if let Some(model) = state.follows.get(&id) {
            // Of this model it has nothing, or does not say: then it is asked for each blob.
            state.bitfields.remove(model);
            return;
        }
        let requested = state.requested.get(&id).map(|requested| requested.hash);
        let Some(hash) = state.lists.remove(&id).or(requested) else { return };
        if let Some((model, index)) = self.places.get(&hash)
            && let Some(bits) = state.bitfields.get_mut(model)
            && bits.get(*index)
        {
            bits.set(*index, false);
            state.broken_claims += 1;
            if state.broken_claims > BROKEN_CLAIMS_MAX {
                state.demote(now_ms);
                self.counts.demotions += 1;
            }
        }
        // The other requests for this blob get the same answer and are no claims of their own.
        self.take_back(peer, |requested| requested.hash == hash);
        if let Some(wanted) = self.wanted.get_mut(&hash) {
            wanted.hashes_requested.remove(&peer);
            wanted.refused.insert(peer);
        }
        self.order_one(hash);
    }

    pub(super) fn verified(&mut self, peer: P, hash: ContentHash, serial: u64, check: GroupCheck) {
        self.end_verifying(peer, check);
        let group = check.group;
        let Some(wanted) = self.wanted.get_mut(&hash).filter(|wanted| wanted.serial == serial) else { return };
        if wanted.group(group) != Group::Verifying {
            return;
        }
        wanted.arrived(group);
        self.counts.groups += 1;
        let complete = wanted.left == 0;
        let others: Vec<_> = self.peers.keys().copied().filter(|&other| other != peer).collect();
        for other in others {
            self.take_back(other, |requested| requested.hash == hash && requested.group == group);
        }
        if complete {
            self.complete(hash);
        }
    }

    pub(super) fn wrong(&mut self, peer: P, hash: ContentHash, serial: u64, check: GroupCheck) {
        self.end_verifying(peer, check);
        if let Some(wanted) = self.wanted.get_mut(&hash).filter(|wanted| wanted.serial == serial) {
            wanted.wrong(check.group);
            let unsure = wanted.unsure;
            if unsure {
                wanted.refused.insert(peer);
            }
            self.order_one(hash);
            if unsure {
                return; // it may be a group of a blob of another length
            }
        }
        self.blame(peer, Fault::WrongGroup { hash, group: check.group });
    }

    fn end_verifying(&mut self, peer: P, check: GroupCheck) {
        let length = cost_bytes(group_length(check.blob_length, check.group));
        self.way_bytes = self.way_bytes.saturating_sub(length);
        // It may be another stream of the same peer by now.
        if let Some(state) = self.peers.get_mut(&peer) {
            state.verifying_bytes = state.verifying_bytes.saturating_sub(length);
        }
    }
}
