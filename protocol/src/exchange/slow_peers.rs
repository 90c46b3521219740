//! What becomes of a peer that is too slow.

use std::collections::BTreeSet;

use super::Payload;
use super::downloads::Downloads;
use super::events::{DownloadAction, TICK_MS};
use super::pace::Pulse;
use super::peer_state::Peer;
use crate::hash::ContentHash;

/// How long a provider may say that it works on it, to which comes the time in which it verifies a large blob.
const WAIT_MAX_MS: u64 = 10_000;
const VERIFY_BYTES_PER_MS_MIN: u64 = 50_000;
/// A peer that owes bytes and gives no sign for this long is hung up on.
const HANG_UP_MS: u64 = 5_000;
/// Time without a tick after which it is we who were away.
const AWAY_MS: u64 = 5 * TICK_MS;
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
            if state.requested.is_empty() && state.lists.is_empty() {
                continue;
            }
            let longest = state.requested.values().map(|requested| requested.hash).chain(state.lists.values().copied());
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
                self.actions.push(DownloadAction::HangUp { peer });
            } else if pulse != Pulse::Steady || demoted {
                self.give_to_others(now_ms, peer);
            }
        }
    }

    /// Takes back what another peer may have that is not slow.
    fn give_to_others(&mut self, now_ms: u64, peer: P) {
        let Some(state) = self.peers.get(&peer) else { return };
        let hashes: BTreeSet<_> = state.requested.values().map(|requested| requested.hash).chain(state.lists.values().copied()).collect();
        let others: BTreeSet<_> = hashes.into_iter().filter(|hash| self.another_may_have(now_ms, peer, hash)).collect();
        if others.is_empty() {
            return;
        }
        self.take_back(peer, |requested| others.contains(&requested.hash));
        if let Some(state) = self.peers.get_mut(&peer) {
            state.lists.retain(|_, hash| !others.contains(hash));
        }
        for hash in others {
            if let Some(wanted) = self.wanted.get_mut(&hash) {
                wanted.hashes_requested.remove(&peer);
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
