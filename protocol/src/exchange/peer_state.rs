//! What is known of a peer.

use std::collections::BTreeMap;

use super::bitfield::Bitfield;
use super::pace::Pace;
use crate::hash::{ContentHash, ModelId};

/// A peer that was too slow is not asked for this long, and each time twice as long.
const DEMOTED_FIRST_MS: u64 = 2_000;
const DEMOTED_MAX_MS: u64 = 60_000;

/// A group that a peer owes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Requested {
    pub(super) hash: ContentHash,
    pub(super) group: u32,
    pub(super) length: u64,
    pub(super) second: bool, // another was asked before
}

/// A peer that has taken our stream on.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) requests_max: u32,
    pub(super) pace: Pace,
    /// Groups that it owes, by request.
    pub(super) requested: BTreeMap<u32, Requested>,
    pub(super) requested_bytes: u64,
    pub(super) verifying_bytes: u64,
    pub(super) lists: BTreeMap<u32, ContentHash>,
    pub(super) follows: BTreeMap<u32, ModelId>,
    pub(super) bitfields: BTreeMap<ModelId, Bitfield>,
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
            requested: BTreeMap::new(),
            requested_bytes: 0,
            verifying_bytes: 0,
            lists: BTreeMap::new(),
            follows: BTreeMap::new(),
            bitfields: BTreeMap::new(),
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
