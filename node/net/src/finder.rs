//! Finding the peers of a model: each host tells a few others which models it has, and whoever looks for one asks.
//!
//! What is told proves nothing: it says whom to dial, and there are limits to that. There are no values in this table.

use std::collections::{HashMap, HashSet, VecDeque};
use std::num::NonZeroUsize;
use std::time::Duration;

use libp2p::kad::store::{MemoryStore, MemoryStoreConfig};
use libp2p::kad::{self, ProviderRecord, QueryId, RecordKey};
use libp2p::{Multiaddr, PeerId, StreamProtocol};
use protocol::ModelId;
use tokio::time::Instant;

use super::network::NodeRole;

pub(super) const KAD_PROTOCOL: StreamProtocol = StreamProtocol::new("/confrere/kad/1");
/// Models that a host tells others of, and that it lets one peer tell it of.
const MODELS_PER_PEER_MAX: usize = 64;
/// Models that others may tell a host of, and peers of each.
const MODELS_TOLD_MAX: usize = 1024;
const PROVIDERS_PER_MODEL_MAX: usize = 20;
/// Peers whose tellings are counted.
pub(super) const TELLERS_MAX: usize = 1024;
const TELL_AGAIN: Duration = Duration::from_secs(12 * 3600);
const TOLD_FOR: Duration = Duration::from_secs(48 * 3600);
const QUERY_TIMEOUT: Duration = Duration::from_secs(5);
const QUERIES_AT_ONCE: NonZeroUsize = NonZeroUsize::new(3).expect("3 is not 0");
/// After a change: more may come with it. And between two tellings.
const TELL_DELAY: Duration = Duration::from_millis(200);
const TELL_PAUSE: Duration = Duration::from_secs(3);

/// The table of who has which model.
pub(super) type Table = kad::Behaviour<MemoryStore>;

/// An empty table. Only hosts answer what others ask.
pub(super) fn table(local: PeerId, role: &NodeRole) -> Table {
    let limits = MemoryStoreConfig {
        max_records: 0,
        max_value_bytes: 0,
        max_providers_per_key: PROVIDERS_PER_MODEL_MAX,
        max_provided_keys: MODELS_TOLD_MAX,
    };
    let mut config = kad::Config::new(KAD_PROTOCOL);
    config
        .set_query_timeout(QUERY_TIMEOUT)
        .set_parallelism(QUERIES_AT_ONCE)
        .set_record_filtering(kad::StoreInserts::FilterBoth)
        .set_kbucket_inserts(kad::BucketInserts::Manual)
        .set_replication_interval(None)
        .set_publication_interval(None)
        .set_provider_publication_interval(Some(TELL_AGAIN))
        .set_provider_record_ttl(Some(TOLD_FOR))
        .set_caching(kad::Caching::Disabled);
    let mut table = Table::with_config(local, MemoryStore::with_config(local, limits), config);
    table.set_mode(Some(match role {
        NodeRole::Guest => kad::Mode::Client,
        NodeRole::Host { .. } => kad::Mode::Server,
    }));
    table
}

/// What is being told and looked for.
pub(super) struct Finder {
    pub(super) telling: Vec<RecordKey>,
    pub(super) tell_at: Option<Instant>,
    pub(super) told_at: Option<Instant>,
    pub(super) search: Option<Search>,
    /// Peers who answer questions.
    pub(super) hosts: HashSet<PeerId>,
    /// Which models each peer has told of.
    pub(super) tellers: HashMap<PeerId, HashSet<RecordKey>>,
}

/// The search for one model's peers.
pub(super) struct Search {
    pub(super) key: RecordKey,
    pub(super) query: Option<QueryId>,
    /// Whether there is somebody who was not asked yet.
    pub(super) fresh: bool,
    pub(super) requested_at: Option<Instant>,
    pub(super) seen: HashSet<PeerId>,
    pub(super) found: VecDeque<(PeerId, Vec<Multiaddr>)>,
    pub(super) dialling: usize,
}

impl Finder {
    pub(super) fn new(role: &NodeRole) -> Self {
        let telling = match role {
            NodeRole::Guest => Vec::new(),
            NodeRole::Host { models, .. } => models.iter().take(MODELS_PER_PEER_MAX).map(|&model| key(model)).collect(),
        };
        Self { telling, tell_at: None, told_at: None, search: None, hosts: HashSet::new(), tellers: HashMap::new() }
    }

    /// Tells of other models from now on.
    pub(super) fn offer(&mut self, models: &[ModelId]) {
        self.telling = models.iter().take(MODELS_PER_PEER_MAX).map(|&model| key(model)).collect();
        self.tell_soon();
    }

    pub(super) fn is_busy(&self) -> bool {
        self.search.is_some() || self.tell_at.is_some()
    }

    pub(super) fn tell_soon(&mut self) {
        if self.telling.is_empty() || self.tell_at.is_some() {
            return;
        }
        let soon = Instant::now() + TELL_DELAY;
        self.tell_at = Some(self.told_at.map_or(soon, |told| soon.max(told + TELL_PAUSE)));
    }

    /// Says whether what a peer tells of a model may be kept, and counts it.
    pub(super) fn admit(&mut self, record: &ProviderRecord) -> bool {
        let full = self.tellers.len() >= TELLERS_MAX && !self.tellers.contains_key(&record.provider);
        if record.key.as_ref().len() != 32 || full {
            return false;
        }
        let told = self.tellers.entry(record.provider).or_default();
        if told.len() >= MODELS_PER_PEER_MAX && !told.contains(&record.key) {
            return false;
        }
        told.insert(record.key.clone());
        true
    }
}

pub(super) fn key(model: ModelId) -> RecordKey {
    RecordKey::new(model.0.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(provider: PeerId, number: u64, length: usize) -> ProviderRecord {
        let mut key = vec![0; length];
        key[..8].copy_from_slice(&number.to_le_bytes());
        ProviderRecord::new(key, provider, Vec::new())
    }

    #[test]
    fn a_peer_tells_of_so_many_models_and_no_more() {
        let mut finder = Finder::new(&NodeRole::Guest);
        let peer = PeerId::random();
        (0..MODELS_PER_PEER_MAX as u64).for_each(|i| assert!(finder.admit(&record(peer, i, 32))));
        assert!(!finder.admit(&record(peer, 1000, 32)));
        assert!(finder.admit(&record(peer, 3, 32)), "again is not more");
        assert!(finder.admit(&record(PeerId::random(), 1000, 32)));
        assert!(!finder.admit(&record(PeerId::random(), 1000, 31)), "that is no model");
    }

    #[test]
    fn so_many_peers_tell_and_no_more() {
        let mut finder = Finder::new(&NodeRole::Guest);
        let first = PeerId::random();
        assert!(finder.admit(&record(first, 0, 32)));
        (1..TELLERS_MAX).for_each(|_| assert!(finder.admit(&record(PeerId::random(), 0, 32))));
        assert!(!finder.admit(&record(PeerId::random(), 0, 32)));
        assert!(finder.admit(&record(first, 1, 32)));
    }

    #[test]
    fn a_host_tells_of_so_many_models_and_no_more() {
        let model = |i: u32| ModelId(protocol::ContentHash::of(&i.to_le_bytes()));
        let role = NodeRole::Host { models: (0..100).map(model).collect(), relay: super::super::network::Relay::No };
        assert_eq!(Finder::new(&role).telling.len(), MODELS_PER_PEER_MAX);
    }
}
