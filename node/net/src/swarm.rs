//! The swarm: connections to peers. Who is connected, who is being dialled, who was shown the door.
//!
//! Streams are opened and accepted elsewhere, through the control that `network` hands out. Finding a model's peers is in `finder`,
//! getting through NATs in `relaying`: both are parts of the one task that drives the swarm.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use base::clock::now_ms;
use base::failure::{Failure, Kind};
use futures::StreamExt;
use libp2p::core::ConnectedPoint;
use libp2p::swarm::dial_opts::DialOpts;
use libp2p::swarm::{ConnectionId, SwarmEvent};
use libp2p::{Multiaddr, PeerId, Swarm, identify, mdns};
use protocol::message::FETCH_PROTOCOL;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};
use tracing::{debug, info, warn};

use super::address::{ip_of, is_relayed, is_tcp, peer_id, peer_of, with_peer};
use super::behaviour::{Behaviour, BehaviourEvent, Choices};
use super::finder::Finder;
use super::friends::Friends;
use super::network::{AddressSource, Command, LEAVE_PATIENCE, Met, Network, NetworkOptions, Peers};
use super::relaying::Relaying;
use super::transport::transport;
use crate::records::SharedRecords;

const COMMANDS_MAX: usize = 64;
const IDLE_TIMEOUT: Duration = Duration::from_secs(600);
const REDIAL_FIRST: Duration = Duration::from_millis(250);
const REDIAL_MAX: Duration = Duration::from_secs(4);
/// How often what is under way is looked at; nothing is, in a node at rest.
const TICK: Duration = Duration::from_millis(100);
/// Peers of the address book that are dialled at once, and again after each pause until all were.
const BOOK_ROUND: usize = 8;
const BOOK_PAUSE: Duration = Duration::from_millis(500);
/// Of the dials that may be under way, these leave some for others.
const BOOK_DIALS_MAX: usize = 24;
/// For frames that say goodbye to get out.
const LAST_FRAMES: Duration = Duration::from_millis(20);
/// Peers whose addresses are remembered.
const MET_MAX: usize = 256;
/// How long a peer may take to say what it speaks.
pub(super) const IDENTIFY_WAIT: Duration = Duration::from_secs(2);

impl Network {
    /// Starts the network on the current runtime.
    pub fn start(options: NetworkOptions<'_>) -> Result<Self, Failure> {
        let NetworkOptions { key, mut listen, peers, book, mdns, group, memory_max, role, records, friends } = options;
        let failed = |error: &dyn fmt::Display| Failure::new(Kind::Other, format!("cannot start the network: {error}"));
        let keypair = libp2p::identity::Keypair::ed25519_from_bytes(key.secret()).map_err(|error| failed(&error))?;
        let local = keypair.public().to_peer_id();
        if let Some(address) = listen.iter().chain(&peers).find(|address| group.is_some() && !is_tcp(address)) {
            return Err(Failure::new(Kind::Usage, format!("{address}: a closed group speaks TCP alone")));
        }
        let mut relaying = Relaying::new(&role, group.is_some());
        if listen.is_empty() && peers.iter().any(is_relayed) {
            listen = relaying.open_from_start();
        }
        let (transport, relay_client) = transport(&keypair, group).map_err(|error| failed(&error))?;
        let friends = Friends::new(friends.into_iter().chain(peers.iter().filter_map(peer_of)), records.clone());
        let choices = Choices { mdns, memory_max, role: &role, friends: &friends };
        let behaviour = Behaviour::new(&keypair, relay_client, &choices).map_err(|error| failed(&error))?;
        let config = libp2p::swarm::Config::with_tokio_executor().with_idle_connection_timeout(IDLE_TIMEOUT);
        let mut swarm = Swarm::new(transport, behaviour, local, config);
        for address in listen {
            let listening = swarm.listen_on(address.clone());
            listening.map_err(|error| {
                let failure = Failure::of(Kind::Other, &error).about(format_args!("cannot listen on {address}"));
                if !failure.message.contains("in use") {
                    return failure;
                }
                Failure::new(Kind::Busy, format!("{}; --listen 0.0.0.0:PORT chooses another port", failure.message))
            })?;
        }
        let streams = swarm.behaviour().stream.new_control();
        let (commands, command_queue) = mpsc::channel(COMMANDS_MAX);
        let known = Peers { may_discover: true, ..Peers::default() };
        let (publish, seen) = watch::channel(known.clone());
        let book = BookDials { waiting: book.into(), under_way: 0, next_round: Instant::now() };
        let mut task = SwarmTask {
            swarm,
            publish,
            known,
            wanted: HashMap::new(),
            named: peers.clone(),
            dials: HashMap::new(),
            contacts: HashMap::new(),
            book,
            finder: Finder::new(&role),
            relaying,
            mdns,
            records: records.clone(),
            noisy: HashMap::new(),
            friends: friends.clone(),
        };
        task.shut_out_unwelcome();
        peers.iter().for_each(|address| task.want(address));
        task.look_around();
        tokio::spawn(task.run(command_queue));
        Ok(Self { local, streams, peers: seen, records, friends, commands })
    }
}

/// What the task of a network owns.
pub(super) struct SwarmTask {
    pub(super) swarm: Swarm<Behaviour>,
    publish: watch::Sender<Peers>,
    /// What is published as soon as an event has been dealt with: nobody sees anything half done.
    pub(super) known: Peers,
    wanted: HashMap<Multiaddr, Wanted>,
    /// Addresses that the user named, whether they are wanted now or not.
    named: Vec<Multiaddr>,
    pub(super) dials: HashMap<ConnectionId, Dial>,
    pub(super) contacts: HashMap<PeerId, Contact>,
    book: BookDials,
    pub(super) finder: Finder,
    pub(super) relaying: Relaying,
    mdns: bool,
    pub(super) records: SharedRecords,
    /// Peers whose gossip is not heard until then.
    pub(super) noisy: HashMap<PeerId, Instant>,
    friends: Friends,
}

/// A peer that the user named: dialled until it answers, and again when it is lost.
struct Wanted {
    peer: Option<PeerId>, // known from the address, or once it has answered
    redial_at: Option<Instant>,
    pause: Duration,
}

/// Whose dial it is.
#[derive(Clone)]
pub(super) enum Dial {
    Wanted(Multiaddr),
    Book(Multiaddr),
    Found,
    Local,
    /// One more connection to a relay.
    Relay,
}

struct BookDials {
    waiting: VecDeque<Multiaddr>,
    under_way: usize,
    next_round: Instant,
}

/// A connected peer.
pub(super) struct Contact {
    /// How each connection goes; nothing for one through a relay.
    pub(super) connections: HashMap<ConnectionId, Option<Multiaddr>>,
    /// Whether it has said what it speaks, or will not.
    pub(super) identified: bool,
    pub(super) since: Instant,
    /// Whether the NATs between did not let it be met directly.
    pub(super) unmet: bool,
}

impl Contact {
    pub(super) fn is_direct(&self) -> bool {
        self.connections.values().any(Option::is_some)
    }

    /// Where it is, unless that is behind a relay.
    pub(super) fn ip(&self) -> Option<IpAddr> {
        self.connections.values().flatten().find_map(ip_of)
    }
}

impl SwarmTask {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            let next_redial = self.wanted.values().filter_map(|wanted| wanted.redial_at).min();
            let next_tick = self.is_busy().then(|| Instant::now() + TICK);
            let wake = async {
                match next_redial.into_iter().chain(next_tick).min() {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                event = self.swarm.select_next_some() => self.on_event(event),
                command = commands.recv() => match command {
                    Some(Command::Drop(peer)) => self.drop_peer(peer),
                    Some(Command::Admit(peer)) => self.admit(peer),
                    Some(Command::Tell(kind, bytes, told)) => drop(told.send(self.tell_record(kind, bytes))),
                    Some(Command::Stay(addresses)) => {
                        for address in addresses.iter().filter(|address| !self.named.contains(address)).cloned().collect::<Vec<_>>() {
                            self.want(&address);
                            peer_of(&address).into_iter().for_each(|peer| self.friends.name(peer));
                            self.named.push(address);
                        }
                    }
                    Some(Command::Offer(models)) => self.finder.offer(&models),
                    Some(Command::LookFor(model, begun)) => {
                        self.look_for(model);
                        self.look_around();
                        let _ = begun.send(());
                    }
                    Some(Command::Leave(left)) => {
                        self.leave().await;
                        let _ = left.send(());
                        return;
                    }
                    None => return,
                },
                () = wake => {}
            }
            self.look_around();
        }
    }

    /// Ends all connections, and goes on driving them until that has reached the peers or takes too long: of QUIC, nobody else would tell them.
    async fn leave(&mut self) {
        let peers: Vec<_> = self.swarm.connected_peers().copied().collect();
        for peer in peers {
            let _ = self.swarm.disconnect_peer_id(peer);
        }
        let end = async {
            while self.swarm.network_info().connection_counters().num_established() > 0 {
                self.swarm.select_next_some().await;
            }
            // The last frames are the operating system's to send, from another task.
            let _ = timeout(LAST_FRAMES, async {
                loop {
                    self.swarm.select_next_some().await;
                }
            })
            .await;
        };
        let _ = timeout(LEAVE_PATIENCE, end).await;
    }

    /// Does what is due, and publishes what is known.
    fn look_around(&mut self) {
        let now = Instant::now();
        self.redial(now);
        self.dial_from_book(now);
        self.find(now);
        self.relay(now);
        self.give_up_punching(now);
        self.forgive_noisy(now);
        self.known.may_discover = self.mdns || self.is_dialling_book() || self.is_finding(now);
        self.publish.send_if_modified(|published| {
            let changed = *published != self.known;
            if changed {
                published.clone_from(&self.known);
            }
            changed
        });
    }

    fn is_busy(&self) -> bool {
        self.is_dialling_book() || self.finder.is_busy() || self.relaying.is_busy() || !self.noisy.is_empty()
    }

    fn is_dialling_book(&self) -> bool {
        !self.book.waiting.is_empty() || self.book.under_way > 0
    }

    fn want(&mut self, address: &Multiaddr) {
        let peer = peer_of(address);
        if peer.is_some_and(|peer| self.known.dropped.contains(&peer)) {
            return; // it was shown the door
        }
        self.known.awaited.insert(address.clone(), None);
        self.wanted.insert(address.clone(), Wanted { peer, redial_at: None, pause: REDIAL_FIRST });
        self.dial(DialOpts::unknown_peer_id().address(address.clone()).build(), Dial::Wanted(address.clone()));
    }

    pub(super) fn dial(&mut self, options: DialOpts, whose: Dial) {
        let id = options.connection_id();
        self.dials.insert(id, whose);
        if let Err(error) = self.swarm.dial(options) {
            self.on_dial_failed(id, &error.to_string());
        }
    }

    fn redial(&mut self, now: Instant) {
        let due: Vec<_> =
            self.wanted.iter().filter(|(_, w)| w.redial_at.is_some_and(|at| at <= now)).map(|(address, _)| address.clone()).collect();
        for address in due {
            if let Some(wanted) = self.wanted.get_mut(&address) {
                wanted.redial_at = None;
            }
            self.dial(DialOpts::unknown_peer_id().address(address.clone()).build(), Dial::Wanted(address));
        }
    }

    fn dial_from_book(&mut self, now: Instant) {
        if self.book.waiting.is_empty() || now < self.book.next_round {
            return;
        }
        self.book.next_round = now + BOOK_PAUSE;
        let room = BOOK_ROUND.min(BOOK_DIALS_MAX.saturating_sub(self.book.under_way));
        for _ in 0..room {
            let Some(address) = self.book.waiting.pop_front() else { break };
            let known = peer_of(&address).is_some_and(|peer| self.contacts.contains_key(&peer) || self.known.dropped.contains(&peer));
            if !known {
                self.book.under_way += 1;
                self.dial(DialOpts::unknown_peer_id().address(address.clone()).build(), Dial::Book(address));
            }
        }
    }

    fn on_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::NewListenAddr { address, .. } => {
                debug!(%address, "listening");
                self.on_own_address(&address);
                self.known.listening.push(address);
            }
            SwarmEvent::ListenerClosed { listener_id, addresses, reason } => {
                warn!(?addresses, ?reason, "no longer listening");
                self.known.listening.retain(|address| !addresses.contains(address));
                self.on_listener_closed(listener_id);
            }
            SwarmEvent::ExternalAddrConfirmed { address } => self.on_reachable(&address),
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } => {
                self.on_connected(peer_id, connection_id, &endpoint);
            }
            SwarmEvent::ConnectionClosed { peer_id, connection_id, cause, .. } => {
                debug!(peer = %peer_id, ?cause, "connection closed");
                self.on_connection_closed(peer_id, connection_id);
            }
            SwarmEvent::OutgoingConnectionError { connection_id, peer_id, error } => {
                self.on_dial_failed(connection_id, &error.to_string());
                self.forget_if_dropped(peer_id);
            }
            SwarmEvent::IncomingConnectionError { error, send_back_addr, .. } => debug!(%send_back_addr, %error, "refused a connection"),
            SwarmEvent::Behaviour(BehaviourEvent::Mdns(mdns::Event::Discovered(found))) => {
                for (peer, address) in found {
                    if peer != *self.swarm.local_peer_id() && !self.swarm.is_connected(&peer) {
                        info!(%peer, %address, "found on the local network");
                        // Fails when a dial to this peer is under way already.
                        self.dial(DialOpts::peer_id(peer).addresses(vec![address]).build(), Dial::Local);
                    }
                }
            }
            SwarmEvent::Behaviour(BehaviourEvent::Identify(event)) => self.on_identify(event),
            SwarmEvent::Behaviour(BehaviourEvent::Kad(event)) => self.on_kad(event),
            SwarmEvent::Behaviour(BehaviourEvent::Gossip(event)) => self.on_gossip(event),
            SwarmEvent::Behaviour(BehaviourEvent::Dcutr(event)) => self.on_punched(&event),
            SwarmEvent::Behaviour(BehaviourEvent::Autonat(event)) => {
                debug!(address = %event.tested_addr, server = %event.server, result = ?event.result, "reachability");
            }
            _ => {}
        }
    }

    fn on_connected(&mut self, peer: PeerId, connection: ConnectionId, endpoint: &ConnectedPoint) {
        let address = (!endpoint.is_relayed()).then(|| endpoint.get_remote_address().clone());
        debug!(%peer, address = %endpoint.get_remote_address(), "connected");
        if address.is_none() && !self.relaying.is_ready_to_punch(Instant::now()) {
            // The table dials by itself whom it hears of. A call that comes before the ports were seen leads nowhere.
            self.swarm.close_connection(connection);
            return;
        }
        let fresh = || Contact { connections: HashMap::new(), identified: false, since: Instant::now(), unmet: false };
        let contact = self.contacts.entry(peer).or_insert_with(fresh);
        contact.connections.insert(connection, address.clone());
        let dial = self.dials.remove(&connection);
        let source = match &dial {
            Some(Dial::Wanted(_)) => Some(AddressSource::Named),
            Some(Dial::Book(_)) => Some(AddressSource::Book),
            Some(Dial::Found | Dial::Relay) => Some(AddressSource::Found),
            Some(Dial::Local) => Some(AddressSource::Local),
            // The table dials by itself, too. An address that a NAT opened for this one call is not where a peer is.
            None if endpoint.is_dialer() && contact.connections.values().all(Option::is_some) => Some(AddressSource::Found),
            None => None,
        };
        if let (Some(source), Some(address)) = (source, &address)
            && self.known.met.len() < MET_MAX
        {
            let address = if peer_of(address).is_some() { address.clone() } else { with_peer(address.clone(), peer) };
            self.known.met.entry(peer).or_insert(Met { address, source, serves: false });
        }
        match dial {
            Some(Dial::Wanted(address)) => {
                if let Some(wanted) = self.wanted.get_mut(&address) {
                    wanted.peer = Some(peer);
                    wanted.pause = REDIAL_FIRST;
                }
                self.known.awaited.remove(&address);
            }
            Some(Dial::Book(_)) => self.book.under_way -= 1,
            Some(Dial::Found) => self.on_found_answered(),
            Some(Dial::Local | Dial::Relay) | None => {}
        }
        if address.is_some() {
            // The way through the relay has served its purpose; streams must not happen to take it.
            let detours = self.contacts[&peer].connections.iter().filter(|(_, address)| address.is_none());
            let detours: Vec<_> = detours.map(|(id, _)| *id).collect();
            for id in detours {
                self.swarm.close_connection(id);
            }
        }
        self.place(peer);
    }

    fn on_connection_closed(&mut self, peer: PeerId, connection: ConnectionId) {
        if let Some(contact) = self.contacts.get_mut(&peer) {
            contact.connections.remove(&connection);
            if contact.connections.is_empty() {
                self.contacts.remove(&peer);
            }
        }
        if !self.contacts.contains_key(&peer) {
            let lost: Vec<_> =
                self.wanted.iter().filter(|(_, w)| w.peer == Some(peer) && w.redial_at.is_none()).map(|(a, _)| a.clone()).collect();
            lost.iter().for_each(|address| self.redial_later(address, "the connection was lost"));
        }
        self.place(peer);
    }

    /// Puts a peer where it belongs by its connections.
    fn place(&mut self, peer: PeerId) {
        let (direct, relayed) = self.contacts.get(&peer).map_or((false, false), |contact| (contact.is_direct(), !contact.is_direct()));
        let dropped = self.known.dropped.contains(&peer);
        for (set, belongs) in [(&mut self.known.connected, direct && !dropped), (&mut self.known.relayed, relayed && !dropped)] {
            if belongs {
                set.insert(peer);
            } else {
                set.remove(&peer);
            }
        }
    }

    fn on_identify(&mut self, event: identify::Event) {
        let (peer, info) = match event {
            identify::Event::Received { peer_id, info, .. } => (peer_id, Some(info)),
            identify::Event::Error { peer_id, .. } => (peer_id, None),
            identify::Event::Sent { .. } | identify::Event::Pushed { .. } => return,
        };
        let Some(contact) = self.contacts.get_mut(&peer) else { return };
        contact.identified = true;
        let Some(info) = info else { return };
        if info.protocols.iter().any(|protocol| protocol.as_ref() == FETCH_PROTOCOL)
            && let Some(met) = self.known.met.get_mut(&peer)
        {
            met.serves = true;
        }
        self.on_introduced(peer, &info);
        self.on_maybe_relay(peer, &info);
    }

    fn on_dial_failed(&mut self, connection: ConnectionId, reason: &str) {
        let Some(dial) = self.dials.remove(&connection) else { return };
        match dial {
            Dial::Wanted(address) => {
                debug!(%address, reason, "cannot connect");
                self.redial_later(&address, reason);
            }
            Dial::Book(address) => {
                debug!(%address, reason, "not where the address book has it");
                self.book.under_way -= 1;
                self.known.silent.insert(address);
            }
            Dial::Found => {
                debug!(reason, "who was found cannot be reached");
                self.on_found_answered();
            }
            Dial::Local | Dial::Relay => debug!(reason, "cannot connect"),
        }
    }

    fn redial_later(&mut self, address: &Multiaddr, reason: &str) {
        let Some(wanted) = self.wanted.get_mut(address) else { return };
        wanted.redial_at = Some(Instant::now() + wanted.pause);
        wanted.pause = (wanted.pause * 2).min(REDIAL_MAX);
        self.known.awaited.insert(address.clone(), Some(reason.to_owned()));
    }

    /// Somebody answered at an address who was shown the door: there is nothing to wait for.
    fn forget_if_dropped(&mut self, peer: Option<PeerId>) {
        let Some(peer) = peer.filter(|peer| self.known.dropped.contains(peer)) else { return };
        let theirs: Vec<_> = self.wanted.keys().filter(|address| peer_of(address) == Some(peer)).cloned().collect();
        for address in theirs {
            self.wanted.remove(&address);
            self.known.awaited.remove(&address);
        }
    }

    /// Those whom the user has banned, or of whom only bad was seen, are not let in.
    fn shut_out_unwelcome(&mut self) {
        let unwelcome: Vec<_> = self.records.lock().unwelcome(now_ms()).into_iter().filter_map(peer_id).collect();
        unwelcome.into_iter().for_each(|peer| self.drop_peer(peer));
    }

    fn admit(&mut self, peer: PeerId) {
        self.swarm.behaviour_mut().blocked.unblock_peer(peer);
        self.known.dropped.remove(&peer);
        let named: Vec<_> = self.named.iter().filter(|address| peer_of(address) == Some(peer)).cloned().collect();
        for address in named.into_iter().filter(|address| !self.wanted.contains_key(address)).collect::<Vec<_>>() {
            self.want(&address);
        }
    }

    fn drop_peer(&mut self, peer: PeerId) {
        self.swarm.behaviour_mut().blocked.block_peer(peer);
        self.swarm.behaviour_mut().kad.remove_peer(&peer);
        let theirs: Vec<_> = self.wanted.iter().filter(|(_, w)| w.peer == Some(peer)).map(|(address, _)| address.clone()).collect();
        self.wanted.retain(|_, wanted| wanted.peer != Some(peer));
        let _ = self.swarm.disconnect_peer_id(peer);
        theirs.iter().for_each(|address| drop(self.known.awaited.remove(address)));
        self.known.dropped.insert(peer);
        self.known.met.remove(&peer);
        self.place(peer);
    }
}
