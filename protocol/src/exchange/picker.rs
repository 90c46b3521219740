//! Which group is asked of which peer: what somebody waits for first, the rarest first otherwise, each peer as fast as it sends.
//!
//! All peers that have a blob draw from its missing groups, so a large one is split between them by their rates. When nothing is
//! missing any more, the last groups that a much slower peer owes are asked of a second one.

use super::downloads::Downloads;
use super::events::DownloadAction;
use super::peer_state::Requested;
use super::wanted::WantedPlace;
use super::wanted::{Group, Room};
use super::wire::ToProvider;
use super::{Payload, Urgency};
use crate::group_hashes::{GROUP_BYTES, group_length};
use crate::hash::ContentHash;

/// Most bytes on their way from all peers, and so in memory.
pub(super) const WAY_BYTES_MAX: u64 = 64 << 20;
/// Blobs for which room is made before their turn.
const ROOM_AHEAD: usize = 4;
/// A longer list of hashes is asked of one peer at a time.
const SHORT_LIST_GROUPS: usize = 2048;
/// Groups that are asked of a second peer near the end, all in all.
const DOUBLED_MAX: usize = 4;
/// A second peer is asked if it would be faster by this factor, and this time.
const DOUBLE_FACTOR: u64 = 2;
const DOUBLE_MS: u64 = 500;

enum Step {
    /// Ask for the hashes first.
    Hashes(ContentHash),
    Group(ContentHash, u32),
    Prepare(ContentHash),
    /// There is nothing for this peer to do, now.
    Nothing,
}

impl<P: Copy + Ord, B: Payload> Downloads<P, B> {
    /// Asks every peer for as much as its window takes.
    pub(super) fn ask_all(&mut self, now_ms: u64) {
        if self.wanted.is_empty() {
            return;
        }
        // In turns, a group each: what is scarce is shared.
        let mut peers: Vec<_> = self.peers.keys().copied().collect();
        while !peers.is_empty() {
            peers.retain(|&peer| self.ask(now_ms, peer));
        }
    }

    /// Asks a peer for one thing; says whether there may be more to ask it for.
    fn ask(&mut self, now_ms: u64, peer: P) -> bool {
        if !self.has_room(now_ms, peer) {
            return false;
        }
        match self.next_step(now_ms, peer) {
            Step::Prepare(hash) => {
                if let Some(wanted) = self.wanted.get_mut(&hash) {
                    wanted.room = Room::Promised;
                    self.actions.push(DownloadAction::Prepare { blob: wanted.blob });
                }
                true
            }
            Step::Hashes(hash) => {
                let id = self.new_id();
                self.note_list_requested(peer, id, hash);
                self.actions.push(DownloadAction::Send { peer, message: ToProvider::Hashes { id, blob: hash } });
                true
            }
            Step::Group(hash, _) if self.is_spared(peer, &hash) => false,
            Step::Group(hash, group) => {
                self.ask_group(now_ms, peer, hash, group, false);
                true
            }
            Step::Nothing => {
                let Some((hash, group)) = self.slowest_group(now_ms, peer) else { return false };
                self.ask_group(now_ms, peer, hash, group, true);
                true
            }
        }
    }

    fn ask_group(&mut self, now_ms: u64, peer: P, hash: ContentHash, group: u32, second: bool) {
        let Some((urgency, length)) = self.wanted.get(&hash).map(|wanted| (wanted.urgency, wanted.blob.length)) else { return };
        let id = self.new_id();
        self.note_requested(now_ms, peer, id, Requested { hash, group, length: group_length(length, group), second });
        self.actions.push(DownloadAction::Send { peer, message: ToProvider::Group { id, urgency, blob: hash, group } });
    }

    /// Whether a blob comes a group at a time, and the peer owes one.
    fn is_spared(&self, peer: P, hash: &ContentHash) -> bool {
        let soon = self.wanted.get(hash).is_some_and(|wanted| wanted.urgency == Urgency::Soon);
        soon && self.peers.get(&peer).is_some_and(|state| !state.requested.is_empty())
    }

    fn has_room(&self, now_ms: u64, peer: P) -> bool {
        let Some(state) = self.peers.get(&peer) else { return false };
        // Among many peers each gets its share of what may be on its way, and two groups at least.
        let share = (WAY_BYTES_MAX / self.peers.len().max(1) as u64).max(2 * GROUP_BYTES);
        let window = state.pace.window_bytes().min(share);
        state.busy_until_ms <= now_ms
            && state.requested.len() < state.requests_max as usize
            && state.requested_bytes + state.verifying_bytes < window
            && self.way_bytes + GROUP_BYTES <= WAY_BYTES_MAX
    }

    fn next_step(&self, now_ms: u64, peer: P) -> Step {
        let Some(state) = self.peers.get(&peer) else { return Step::Nothing };
        let demoted = state.demoted_until_ms > now_ms;
        let mut ahead = 0;
        for place in &self.order {
            let hash = hash_of(place);
            let Some(wanted) = self.wanted.get(&hash) else { continue };
            if !self.may_have(&peer, state, wanted) || demoted && self.another_may_have(now_ms, peer, &hash) {
                continue;
            }
            match wanted.room {
                Room::None if ahead < ROOM_AHEAD => return Step::Prepare(hash),
                Room::None => return Step::Nothing,
                Room::Promised => ahead += 1,
                Room::Ready => {
                    let Some(&group) = wanted.missing.first() else { continue };
                    // Of a blob whose length is hearsay, a group may be beyond the end.
                    if wanted.hashes.is_some() || wanted.hashes_requested.contains_key(&peer) && !wanted.unsure {
                        return Step::Group(hash, group);
                    }
                    let requested = wanted.hashes_requested.contains_key(&peer);
                    if wanted.hashes_requested.is_empty() || wanted.groups.len() <= SHORT_LIST_GROUPS && !requested {
                        return Step::Hashes(hash);
                    }
                }
            }
        }
        Step::Nothing
    }

    /// Finds the group that `peer` would bring much sooner than whoever owes it.
    fn slowest_group(&self, now_ms: u64, peer: P) -> Option<(ContentHash, u32)> {
        let state = self.peers.get(&peer)?;
        if state.demoted_until_ms > now_ms {
            return None;
        }
        let doubled = self.peers.values().flat_map(|state| state.requested.values()).filter(|requested| requested.second).count();
        if doubled >= DOUBLED_MAX || self.order.first().is_some_and(|(urgency, ..)| *urgency == Urgency::Now) {
            return None;
        }
        let mine_ms = state.pace.expected_ms(state.requested_bytes + GROUP_BYTES)?;
        let slow = self.peers.iter().filter(|(other, _)| **other != peer).filter_map(|(_, other)| {
            // What was asked last comes last.
            let last = other.requested.values().rev().find(|requested| self.may_double(peer, requested))?;
            let theirs_ms = other.pace.expected_ms(other.requested_bytes)?;
            (theirs_ms > DOUBLE_FACTOR * mine_ms + DOUBLE_MS).then_some((theirs_ms, last.hash, last.group))
        });
        slow.max_by_key(|(theirs_ms, ..)| *theirs_ms).map(|(_, hash, group)| (hash, group))
    }

    fn may_double(&self, peer: P, requested: &Requested) -> bool {
        let (Some(state), Some(wanted)) = (self.peers.get(&peer), self.wanted.get(&requested.hash)) else { return false };
        let once = matches!(wanted.group(requested.group), Group::Requested(holder) if holder != peer);
        once && wanted.hashes.is_some() && self.may_have(&peer, state, wanted)
    }
}

fn hash_of(place: &WantedPlace) -> ContentHash {
    place.4
}
