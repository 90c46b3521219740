//! Whose places strangers cannot take: peers that the user named, and, after them, peers that ask for something and are answered.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Instant;

use libp2p::PeerId;
use protocol::trust::Ruling;

use super::address::node_id;
use crate::records::SharedRecords;

/// Shared by everything that gives out places: connections and streams of each protocol.
#[derive(Clone)]
pub(crate) struct Friends(Arc<Shared>);

struct Shared {
    named: RwLock<BTreeSet<PeerId>>,
    records: SharedRecords,
    /// When each connected peer last asked for something.
    active: Mutex<HashMap<PeerId, Instant>>,
}

impl Friends {
    /// Peers that the user named at the start; `peers allow` makes more of them at any time.
    pub(crate) fn new(named: impl IntoIterator<Item = PeerId>, records: SharedRecords) -> Self {
        Self(Arc::new(Shared { named: RwLock::new(named.into_iter().collect()), records, active: Mutex::default() }))
    }

    /// One more that the user named.
    pub(crate) fn name(&self, peer: PeerId) {
        self.0.named.write().unwrap_or_else(PoisonError::into_inner).insert(peer);
    }

    /// Whether the user named a peer, or allows it.
    pub(crate) fn includes(&self, peer: &PeerId) -> bool {
        let named = self.0.named.read().unwrap_or_else(PoisonError::into_inner).contains(peer);
        named || node_id(*peer).is_some_and(|node| self.0.records.lock().trust.rulings().get(&node) == Some(&Ruling::Allowed))
    }

    /// Notes that a peer asked for something.
    pub(crate) fn note_active(&self, peer: PeerId, now: Instant) {
        self.0.active.lock().unwrap_or_else(PoisonError::into_inner).insert(peer, now);
    }

    /// When a peer last asked for something since it is connected.
    pub(crate) fn last_active(&self, peer: &PeerId) -> Option<Instant> {
        self.0.active.lock().unwrap_or_else(PoisonError::into_inner).get(peer).copied()
    }

    /// Forgets a peer that has gone.
    pub(crate) fn forget(&self, peer: &PeerId) {
        self.0.active.lock().unwrap_or_else(PoisonError::into_inner).remove(peer);
    }
}
