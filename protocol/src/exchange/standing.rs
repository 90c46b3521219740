//! What is known of a peer, and what becomes of one that is too slow.

use std::collections::{BTreeMap, BTreeSet};

use super::Payload;
use super::bitfield::Bitfield;
use super::downloads::{Asked, Downloads};
use super::events::{Action, TICK_MS};
use super::pace::{Pace, Pulse};
use crate::hash::{ContentHash, ModelId};

/// How long a provider may say that it works on it, to which comes the time in which it verifies a large blob.
const WAIT_MAX_MS: u64 = 10_000;
const VERIFY_BYTES_PER_MS_MIN: u64 = 50_000;
/// A peer that owes bytes and gives no sign for this long is hung up on.
const HANG_UP_MS: u64 = 5_000;
/// Time without a tick after which it is we who were away.
const AWAY_MS: u64 = 5 * TICK_MS;
/// A peer that was too slow is not asked for this long, and each time twice as long.
const DEMOTED_FIRST_MS: u64 = 2_000;
const DEMOTED_MAX_MS: u64 = 60_000;

/// A peer that has taken our stream on.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) requests_max: u32,
    pub(super) pace: Pace,
    /// Groups that it owes, by request.
    pub(super) asked: BTreeMap<u32, Asked>,
    pub(super) asked_bytes: u64,
    pub(super) verifying_bytes: u64,
    pub(super) lists: BTreeMap<u32, ContentHash>,
    pub(super) follows: BTreeMap<u32, ModelId>,
    pub(super) haves: BTreeMap<ModelId, Bitfield>,
    pub(super) busy_until_ms: u64,
    pub(super) demoted_until_ms: u64,
    pub(super) demoted_for_ms: u64,
    pub(super) broken_claims: u32,
    /// Bytes that may still come of requests that were taken back.
    pub(super) cancelled_bytes: u64,
    pub(super) begun_ms: Option<u64>, // when the request went out that found it idle
    pub(super) first_id: u32,         // ids before this were not used on this stream
}

impl Peer {
    pub(super) fn new(now_ms: u64, requests_max: u32, first_id: u32) -> Self {
        Self {
            requests_max,
            pace: Pace::new(now_ms),
            asked: BTreeMap::new(),
            asked_bytes: 0,
            verifying_bytes: 0,
            lists: BTreeMap::new(),
            follows: BTreeMap::new(),
            haves: BTreeMap::new(),
            busy_until_ms: 0,
            demoted_until_ms: 0,
            demoted_for_ms: 0,
            broken_claims: 0,
            cancelled_bytes: 0,
            begun_ms: None,
            first_id,
        }
    }

    /// As slow as can be: asked for what nobody else may have, until it shows better.
    pub(super) fn doubt(&mut self, now_ms: u64) {
        self.demoted_for_ms = DEMOTED_MAX_MS;
        self.demoted_until_ms = now_ms + DEMOTED_MAX_MS;
    }

    pub(super) fn demote(&mut self, now_ms: u64) {
        self.demoted_for_ms = (self.demoted_for_ms * 2).clamp(DEMOTED_FIRST_MS, DEMOTED_MAX_MS);
        self.demoted_until_ms = now_ms + self.demoted_for_ms;
    }
}

impl<P: Copy + Ord, B: Payload> Downloads<P, B> {
    /// Finds out who is too slow, and gives what they owe to others.
    pub(super) fn look_after_peers(&mut self, now_ms: u64) {
        let away_ms = now_ms.saturating_sub(std::mem::replace(&mut self.ticked_ms, now_ms));
        if away_ms > AWAY_MS {
            // Nobody listened meanwhile: that they are silent is not their fault.
            self.peers.values_mut().for_each(|state| state.pace.begin(now_ms));
            return;
        }
        let peers: Vec<_> = self.peers.keys().copied().collect();
        for peer in peers {
            let Some(state) = self.peers.get_mut(&peer) else { continue };
            if state.asked.is_empty() && state.lists.is_empty() {
                continue;
            }
            let longest = state.asked.values().map(|asked| asked.hash).chain(state.lists.values().copied());
            let longest = longest.filter_map(|hash| self.wanted.get(&hash)).map(|wanted| wanted.blob.length).max().unwrap_or(0);
            let patience_ms = WAIT_MAX_MS + longest / VERIFY_BYTES_PER_MS_MIN;
            let pulse = state.pace.pulse(now_ms, patience_ms);
            let demoted = state.demoted_until_ms > now_ms;
            if pulse != Pulse::Steady && !demoted {
                state.demote(now_ms);
                self.counts.demotions += 1;
            }
            if pulse == Pulse::Silent && state.pace.silence_ms(now_ms) >= HANG_UP_MS {
                self.remove_peer(peer);
                self.actions.push(Action::HangUp { peer });
            } else if pulse != Pulse::Steady || demoted {
                self.give_to_others(now_ms, peer);
            }
        }
    }

    /// Takes back what another peer may have that is not slow.
    fn give_to_others(&mut self, now_ms: u64, peer: P) {
        let Some(state) = self.peers.get(&peer) else { return };
        let hashes: BTreeSet<_> = state.asked.values().map(|asked| asked.hash).chain(state.lists.values().copied()).collect();
        let others: BTreeSet<_> = hashes.into_iter().filter(|hash| self.another_may_have(now_ms, peer, hash)).collect();
        if others.is_empty() {
            return;
        }
        self.take_back(peer, |asked| others.contains(&asked.hash));
        if let Some(state) = self.peers.get_mut(&peer) {
            state.lists.retain(|_, hash| !others.contains(hash));
        }
        for hash in others {
            if let Some(wanted) = self.wanted.get_mut(&hash) {
                wanted.hashes_asked.remove(&peer);
            }
        }
    }

    /// Whether a peer that is not demoted, other than `peer`, may have a blob.
    pub(super) fn another_may_have(&self, now_ms: u64, peer: P, hash: &ContentHash) -> bool {
        let Some(wanted) = self.wanted.get(hash) else { return false };
        let good = |state: &Peer| state.demoted_until_ms <= now_ms;
        self.peers.iter().any(|(other, state)| *other != peer && good(state) && self.may_have(other, state, wanted))
    }
}
