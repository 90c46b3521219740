//! Finding the peers of a model: each host tells a few others which models it has, and whoever looks for one asks.
//!
//! What is told proves nothing: it says whom to dial, and there are limits to that. There are no values in this table.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroUsize;
use std::time::Duration;

use libp2p::core::Endpoint;
use libp2p::kad::store::{MemoryStore, MemoryStoreConfig, RecordStore};
use libp2p::kad::{self, InboundRequest, ProviderRecord, QueryId, QueryResult, RecordKey};
use libp2p::swarm::dial_opts::DialOpts;
use libp2p::swarm::{ConnectionId, NetworkBehaviour};
use libp2p::{Multiaddr, PeerId, StreamProtocol, identify};
use protocol::ModelId;
use tokio::time::Instant;
use tracing::{debug, info};

use super::address::{is_relayed, is_sane};
use super::network::Role;
use super::swarm::{Contact, Dial, IDENTIFY_WAIT, SwarmTask};

const KAD_PROTOCOL: StreamProtocol = StreamProtocol::new("/confrere/kad/1");
/// Models that a host tells others of, and that it lets one peer tell it of.
const MODELS_PER_PEER_MAX: usize = 64;
/// Models that others may tell a host of, and peers of each.
const MODELS_TOLD_MAX: usize = 1024;
const PROVIDERS_PER_MODEL_MAX: usize = 20;
/// Peers whose tellings are counted.
const TELLERS_MAX: usize = 1024;
/// Hosts whose coming starts a telling or a question; the table has room for more.
const HOSTS_MAX: usize = 256;
/// Addresses that are kept of one peer.
const ADDRESSES_PER_PEER_MAX: usize = 8;
const TELL_AGAIN: Duration = Duration::from_secs(12 * 3600);
const TOLD_FOR: Duration = Duration::from_secs(48 * 3600);
const QUERY_TIMEOUT: Duration = Duration::from_secs(5);
const QUERIES_AT_ONCE: NonZeroUsize = NonZeroUsize::new(3).expect("3 is not 0");
/// After a change: more may come with it. And between two tellings.
const TELL_DELAY: Duration = Duration::from_millis(200);
const TELL_PAUSE: Duration = Duration::from_secs(3);
/// Between two questions: at least, and at most while the model's peers are still wanted.
const ASK_PAUSE: Duration = Duration::from_millis(300);
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// Peers that are dialled because others said that they have the model: in one search, and at once.
const FOUND_MAX: usize = 16;
const FOUND_DIALS_MAX: usize = 3;

/// The table of who has which model.
pub(super) type Table = kad::Behaviour<MemoryStore>;

/// An empty table. Only hosts answer what others ask.
pub(super) fn table(local: PeerId, role: &Role) -> Table {
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
        Role::Guest => kad::Mode::Client,
        Role::Host { .. } => kad::Mode::Server,
    }));
    table
}

/// What is being told and looked for.
pub(super) struct Finder {
    telling: Vec<RecordKey>,
    tell_at: Option<Instant>,
    told_at: Option<Instant>,
    search: Option<Search>,
    /// Peers who answer questions.
    hosts: HashSet<PeerId>,
    /// Which models each peer has told of.
    tellers: HashMap<PeerId, HashSet<RecordKey>>,
}

/// The search for one model's peers.
struct Search {
    key: RecordKey,
    query: Option<QueryId>,
    /// Whether there is somebody who was not asked yet.
    fresh: bool,
    asked_at: Option<Instant>,
    seen: HashSet<PeerId>,
    found: VecDeque<(PeerId, Vec<Multiaddr>)>,
    dialling: usize,
}

impl Finder {
    pub(super) fn new(role: &Role) -> Self {
        let telling = match role {
            Role::Guest => Vec::new(),
            Role::Host { models, .. } => models.iter().take(MODELS_PER_PEER_MAX).map(|&model| key(model)).collect(),
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

    fn tell_soon(&mut self) {
        if self.telling.is_empty() || self.tell_at.is_some() {
            return;
        }
        let soon = Instant::now() + TELL_DELAY;
        self.tell_at = Some(self.told_at.map_or(soon, |told| soon.max(told + TELL_PAUSE)));
    }

    /// Says whether what a peer tells of a model may be kept, and counts it.
    fn admit(&mut self, record: &ProviderRecord) -> bool {
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

fn key(model: ModelId) -> RecordKey {
    RecordKey::new(model.0.as_bytes())
}

impl SwarmTask {
    /// Begins the search for a model's peers, and ends that for another's.
    pub(super) fn look_for(&mut self, model: ModelId) {
        let key = key(model);
        if self.finder.search.as_ref().is_none_or(|search| search.key != key) {
            let dialling = self.finder.search.as_ref().map_or(0, |search| search.dialling);
            let (seen, found) = (HashSet::new(), VecDeque::new());
            self.finder.search = Some(Search { key, query: None, fresh: true, asked_at: None, seen, found, dialling });
        }
    }

    /// Says whether the search may still bring somebody.
    pub(super) fn is_finding(&self, now: Instant) -> bool {
        let Some(search) = &self.finder.search else { return false };
        let silent = |since: Instant| now.duration_since(since) < IDENTIFY_WAIT;
        search.query.is_some()
            || search.dialling > 0
            || !search.found.is_empty()
            || (search.fresh && !self.finder.hosts.is_empty() && search.seen.len() < FOUND_MAX)
            || self.contacts.values().any(|contact| !contact.identified && silent(contact.since))
            || self.is_punching(now)
    }

    /// Tells, asks and dials as far as that is due.
    pub(super) fn find(&mut self, now: Instant) {
        if self.finder.tell_at.is_some_and(|at| at <= now) {
            (self.finder.tell_at, self.finder.told_at) = (None, Some(now));
            for key in self.finder.telling.clone() {
                if let Err(error) = self.swarm.behaviour_mut().kad.start_providing(key) {
                    debug!(%error, "cannot tell of a model");
                }
            }
        }
        let hosts_known = !self.finder.hosts.is_empty();
        let Some(search) = &mut self.finder.search else { return };
        let pause = if search.fresh { ASK_PAUSE } else { ASK_AGAIN };
        let due = search.asked_at.is_none_or(|asked| now >= asked + pause);
        if hosts_known && due && search.query.is_none() && search.seen.len() < FOUND_MAX {
            (search.fresh, search.asked_at) = (false, Some(now));
            search.query = Some(self.swarm.behaviour_mut().kad.get_providers(search.key.clone()));
        }
        while let Some((peer, addresses)) = self.next_found() {
            if self.contacts.contains_key(&peer) || self.known.dropped.contains(&peer) {
                continue;
            }
            let ready = !addresses.iter().any(is_relayed) || self.prepare_to_punch(&addresses, now);
            let Some(search) = &mut self.finder.search else { return };
            if !ready {
                // Once more when there is a port to be reached at.
                search.found.push_front((peer, addresses));
                return;
            }
            info!(%peer, ?addresses, "found");
            search.dialling += 1;
            self.dial(DialOpts::peer_id(peer).addresses(addresses).build(), Dial::Found);
        }
    }

    fn next_found(&mut self) -> Option<(PeerId, Vec<Multiaddr>)> {
        let search = self.finder.search.as_mut().filter(|search| search.dialling < FOUND_DIALS_MAX)?;
        search.found.pop_front()
    }

    pub(super) fn on_found_answered(&mut self) {
        if let Some(search) = &mut self.finder.search {
            search.dialling = search.dialling.saturating_sub(1);
        }
    }

    /// Learns what a peer says of itself.
    pub(super) fn on_introduced(&mut self, peer: PeerId, info: &identify::Info) {
        if !info.protocols.contains(&KAD_PROTOCOL) || self.known.dropped.contains(&peer) {
            return;
        }
        let Some(teller) = self.contacts.get(&peer).and_then(Contact::ip) else { return };
        // Where we have reached it ourselves comes first.
        let dialled = self.known.met.get(&peer).map(|met| met.address.clone());
        let said = info.listen_addrs.iter().filter(|address| is_sane(address, peer, teller)).cloned();
        let addresses: Vec<_> = dialled.into_iter().chain(said).take(ADDRESSES_PER_PEER_MAX).collect();
        if addresses.is_empty() {
            return;
        }
        for address in addresses {
            self.swarm.behaviour_mut().kad.add_address(&peer, address);
        }
        if self.finder.hosts.len() < HOSTS_MAX && self.finder.hosts.insert(peer) {
            self.finder.tell_soon();
            if let Some(search) = &mut self.finder.search {
                search.fresh = true;
            }
        }
    }

    /// There is another address at which this node can be reached: others should know.
    pub(super) fn on_addresses_changed(&mut self) {
        if self.finder.told_at.is_some() {
            self.finder.tell_soon();
        }
    }

    pub(super) fn on_kad(&mut self, event: kad::Event) {
        match event {
            kad::Event::InboundRequest { request: InboundRequest::AddProvider { record: Some(record) } } => self.on_told(record),
            kad::Event::OutboundQueryProgressed { id, result: QueryResult::GetProviders(result), step, .. } => {
                if self.finder.search.as_ref().is_none_or(|search| search.query != Some(id)) {
                    return;
                }
                if let Ok(kad::GetProvidersOk::FoundProviders { providers, .. }) = result {
                    providers.into_iter().for_each(|peer| self.on_found(peer));
                }
                if step.last
                    && let Some(search) = &mut self.finder.search
                {
                    search.query = None;
                }
            }
            _ => {}
        }
    }

    fn on_told(&mut self, mut record: ProviderRecord) {
        let Some(contact) = self.contacts.get(&record.provider) else { return };
        // Who is behind a relay can only be found through one.
        let teller = contact.ip().unwrap_or(IpAddr::V4(Ipv4Addr::BROADCAST));
        record.addresses.retain(|address| is_sane(address, record.provider, teller));
        record.addresses.truncate(ADDRESSES_PER_PEER_MAX);
        if self.finder.tellers.len() >= TELLERS_MAX {
            let contacts = &self.contacts;
            self.finder.tellers.retain(|peer, _| contacts.contains_key(peer));
        }
        if !self.finder.admit(&record) {
            debug!(peer = %record.provider, "tells of too much");
            return;
        }
        if let Err(error) = self.swarm.behaviour_mut().kad.store_mut().add_provider(record) {
            debug!(%error, "no room for what a peer tells");
        }
    }

    fn on_found(&mut self, peer: PeerId) {
        let asked: BTreeSet<IpAddr> = self.contacts.values().filter_map(Contact::ip).collect();
        let addresses = self.swarm.behaviour_mut().kad.handle_pending_outbound_connection(
            ConnectionId::new_unchecked(usize::MAX),
            Some(peer),
            &[],
            Endpoint::Dialer,
        );
        let local = *self.swarm.local_peer_id();
        let Some(search) = &mut self.finder.search else { return };
        if peer == local || search.seen.len() >= FOUND_MAX || !search.seen.insert(peer) {
            return;
        }
        // Any of those who are connected may have said so.
        let sane = |address: &Multiaddr| asked.iter().any(|&teller| is_sane(address, peer, teller));
        let addresses: BTreeSet<_> = addresses.unwrap_or_default().into_iter().filter(sane).collect();
        let addresses: Vec<_> = addresses.into_iter().take(ADDRESSES_PER_PEER_MAX).collect();
        debug!(%peer, ?addresses, "is said to have the model");
        if !addresses.is_empty() {
            search.found.push_back((peer, addresses));
        }
    }
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
        let mut finder = Finder::new(&Role::Guest);
        let peer = PeerId::random();
        (0..MODELS_PER_PEER_MAX as u64).for_each(|i| assert!(finder.admit(&record(peer, i, 32))));
        assert!(!finder.admit(&record(peer, 1000, 32)));
        assert!(finder.admit(&record(peer, 3, 32)), "again is not more");
        assert!(finder.admit(&record(PeerId::random(), 1000, 32)));
        assert!(!finder.admit(&record(PeerId::random(), 1000, 31)), "that is no model");
    }

    #[test]
    fn so_many_peers_tell_and_no_more() {
        let mut finder = Finder::new(&Role::Guest);
        let first = PeerId::random();
        assert!(finder.admit(&record(first, 0, 32)));
        (1..TELLERS_MAX).for_each(|_| assert!(finder.admit(&record(PeerId::random(), 0, 32))));
        assert!(!finder.admit(&record(PeerId::random(), 0, 32)));
        assert!(finder.admit(&record(first, 1, 32)));
    }

    #[test]
    fn a_host_tells_of_so_many_models_and_no_more() {
        let model = |i: u32| ModelId(protocol::ContentHash::of(&i.to_le_bytes()));
        let role = Role::Host { models: (0..100).map(model).collect(), relay: super::super::network::Relay::No };
        assert_eq!(Finder::new(&role).telling.len(), MODELS_PER_PEER_MAX);
    }
}
