//! Telling others which models are here, asking who has them, and dialling whom that brings.

use std::collections::{BTreeSet, HashSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use libp2p::core::Endpoint;
use libp2p::kad::store::RecordStore;
use libp2p::kad::{self, InboundRequest, ProviderRecord, QueryResult};
use libp2p::swarm::dial_opts::DialOpts;
use libp2p::swarm::{ConnectionId, NetworkBehaviour};
use libp2p::{Multiaddr, PeerId, identify};
use protocol::ModelId;
use tokio::time::Instant;
use tracing::{debug, info};

use super::address::{is_relayed, is_sane};
use super::finder::{KAD_PROTOCOL, Search, TELLERS_MAX, key};
use super::swarm::{Contact, Dial, IDENTIFY_WAIT, SwarmTask};

const FOUND_DIALS_MAX: usize = 3;

/// Peers that are dialled because others said that they have the model: in one search, and at once.
const FOUND_MAX: usize = 16;
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// Between two questions: at least, and at most while the model's peers are still wanted.
const ASK_PAUSE: Duration = Duration::from_millis(300);

/// Addresses that are kept of one peer.
const ADDRESSES_PER_PEER_MAX: usize = 8;

/// Hosts whose coming starts a telling or a question; the table has room for more.
const HOSTS_MAX: usize = 256;

impl SwarmTask {
    /// Begins the search for a model's peers, and ends that for another's.
    pub(super) fn look_for(&mut self, model: ModelId) {
        let key = key(model);
        if self.finder.search.as_ref().is_none_or(|search| search.key != key) {
            let dialling = self.finder.search.as_ref().map_or(0, |search| search.dialling);
            let (seen, found) = (HashSet::new(), VecDeque::new());
            self.finder.search = Some(Search { key, query: None, fresh: true, requested_at: None, seen, found, dialling });
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
        let due = search.requested_at.is_none_or(|requested| now >= requested + pause);
        if hosts_known && due && search.query.is_none() && search.seen.len() < FOUND_MAX {
            (search.fresh, search.requested_at) = (false, Some(now));
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
        let requested: BTreeSet<IpAddr> = self.contacts.values().filter_map(Contact::ip).collect();
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
        let sane = |address: &Multiaddr| requested.iter().any(|&teller| is_sane(address, peer, teller));
        let addresses: BTreeSet<_> = addresses.unwrap_or_default().into_iter().filter(sane).collect();
        let addresses: Vec<_> = addresses.into_iter().take(ADDRESSES_PER_PEER_MAX).collect();
        debug!(%peer, ?addresses, "is said to have the model");
        if !addresses.is_empty() {
            search.found.push_back((peer, addresses));
        }
    }
}
