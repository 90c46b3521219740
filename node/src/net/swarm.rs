//! The swarm: connections to peers. Who is connected, who is being dialled, who was shown the door.
//!
//! Streams are opened and accepted elsewhere, through the control that this hands out.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use futures::StreamExt;
use libp2p::swarm::dial_opts::DialOpts;
use libp2p::swarm::{ConnectionId, SwarmEvent};
use libp2p::{Multiaddr, PeerId, Swarm, mdns};
use protocol::NodeKey;
use tokio::sync::{mpsc, watch};
use tracing::{debug, info, warn};

use super::address::{is_tcp, peer_of};
use super::behaviour::{Behaviour, BehaviourEvent, Choices};
use super::group::GroupKey;
use super::transport::transport;
use crate::failure::{Failure, Kind};

const COMMANDS_MAX: usize = 64;
const IDLE_TIMEOUT: Duration = Duration::from_secs(600);
const REDIAL_FIRST: Duration = Duration::from_millis(250);
const REDIAL_MAX: Duration = Duration::from_secs(4);

/// What a node's network is made of.
pub(crate) struct NetworkOptions<'a> {
    pub(crate) key: &'a NodeKey,
    /// Where to listen; nothing for a one-shot command.
    pub(crate) listen: Vec<Multiaddr>,
    /// Peers to stay connected to.
    pub(crate) peers: Vec<Multiaddr>,
    /// Whether to look for peers by multicast.
    pub(crate) mdns: bool,
    /// The closed group to be in; none is everybody's.
    pub(crate) group: Option<GroupKey>,
    /// Bytes of memory beyond which the process makes no more connections.
    pub(crate) memory_max: u64,
}

/// What is known of peers at a moment.
#[derive(Clone, Default, Debug)]
pub(crate) struct Peers {
    pub(crate) connected: BTreeSet<PeerId>,
    /// Addresses that are being dialled or will be again, with the last reason why that failed.
    pub(crate) awaited: BTreeMap<Multiaddr, Option<String>>,
    /// Whether others may turn up by themselves.
    pub(crate) may_discover: bool,
    pub(crate) listening: Vec<Multiaddr>,
}

/// A handle on the running network. When the last one is dropped, the network ends.
#[derive(Clone)]
pub(crate) struct Network {
    pub(crate) local: PeerId,
    pub(crate) streams: libp2p_stream::Control,
    pub(crate) peers: watch::Receiver<Peers>,
    commands: mpsc::Sender<Command>,
}

enum Command {
    Drop(PeerId),
}

impl Network {
    /// Starts the network on the current runtime.
    pub(crate) fn start(options: NetworkOptions<'_>) -> Result<Self, Failure> {
        let NetworkOptions { key, listen, peers, mdns, group, memory_max } = options;
        let failed = |error: &dyn std::fmt::Display| Failure::new(Kind::Other, format!("cannot start the network: {error}"));
        let keypair = libp2p::identity::Keypair::ed25519_from_bytes(key.secret()).map_err(|error| failed(&error))?;
        let local = keypair.public().to_peer_id();
        if let Some(address) = listen.iter().chain(&peers).find(|address| group.is_some() && !is_tcp(address)) {
            return Err(Failure::new(Kind::Usage, format!("{address}: a closed group speaks TCP alone")));
        }
        let transport = transport(&keypair, group).map_err(|error| failed(&error))?;
        let behaviour = Behaviour::new(&keypair, &Choices { mdns, memory_max }).map_err(|error| failed(&error))?;
        let config = libp2p::swarm::Config::with_tokio_executor().with_idle_connection_timeout(IDLE_TIMEOUT);
        let mut swarm = Swarm::new(transport, behaviour, local, config);
        for address in listen {
            let listening = swarm.listen_on(address.clone());
            listening.map_err(|error| Failure::of(Kind::Other, &error).about(format_args!("cannot listen on {address}")))?;
        }
        let streams = swarm.behaviour().stream.new_control();
        let (commands, command_queue) = mpsc::channel(COMMANDS_MAX);
        let (publish, seen) = watch::channel(Peers { may_discover: mdns, ..Peers::default() });
        let mut task = SwarmTask { swarm, publish, wanted: HashMap::new(), dials: HashMap::new() };
        peers.iter().for_each(|address| task.want(address));
        tokio::spawn(task.run(command_queue));
        Ok(Self { local, streams, peers: seen, commands })
    }

    /// Disconnects a peer that cannot be trusted with bytes, and keeps it away.
    pub(crate) async fn drop_peer(&self, peer: PeerId) {
        let _ = self.commands.send(Command::Drop(peer)).await;
    }
}

struct SwarmTask {
    swarm: Swarm<Behaviour>,
    publish: watch::Sender<Peers>,
    wanted: HashMap<Multiaddr, Wanted>,
    dials: HashMap<ConnectionId, Multiaddr>,
}

/// A peer that the user named: dialled until it answers, and again when it is lost.
struct Wanted {
    peer: Option<PeerId>, // known from the address, or once it has answered
    redial_at: Option<tokio::time::Instant>,
    pause: Duration,
}

impl SwarmTask {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            let next_redial = self.wanted.values().filter_map(|wanted| wanted.redial_at).min();
            let redial = async {
                match next_redial {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                event = self.swarm.select_next_some() => self.on_event(event),
                command = commands.recv() => match command {
                    Some(Command::Drop(peer)) => self.drop_peer(peer),
                    None => return,
                },
                () = redial => self.redial(),
            }
        }
    }

    fn want(&mut self, address: &Multiaddr) {
        let peer = peer_of(address);
        self.publish.send_modify(|peers| {
            peers.awaited.insert(address.clone(), None);
        });
        self.wanted.insert(address.clone(), Wanted { peer, redial_at: None, pause: REDIAL_FIRST });
        self.dial(address);
    }

    fn dial(&mut self, address: &Multiaddr) {
        let options = DialOpts::unknown_peer_id().address(address.clone()).build();
        self.dials.insert(options.connection_id(), address.clone());
        let id = options.connection_id();
        if let Err(error) = self.swarm.dial(options) {
            self.on_dial_failed(id, &error.to_string());
        }
    }

    fn redial(&mut self) {
        let now = tokio::time::Instant::now();
        let due: Vec<_> =
            self.wanted.iter().filter(|(_, w)| w.redial_at.is_some_and(|at| at <= now)).map(|(address, _)| address.clone()).collect();
        for address in due {
            if let Some(wanted) = self.wanted.get_mut(&address) {
                wanted.redial_at = None;
            }
            self.dial(&address);
        }
    }

    fn on_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::NewListenAddr { address, .. } => {
                debug!(%address, "listening");
                self.publish.send_modify(|peers| peers.listening.push(address));
            }
            SwarmEvent::ListenerClosed { addresses, reason, .. } => {
                warn!(?addresses, ?reason, "no longer listening");
                self.publish.send_modify(|peers| peers.listening.retain(|address| !addresses.contains(address)));
            }
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } => {
                debug!(peer = %peer_id, address = %endpoint.get_remote_address(), "connected");
                let dialled = self.dials.remove(&connection_id);
                if let Some(wanted) = dialled.as_ref().and_then(|address| self.wanted.get_mut(address)) {
                    wanted.peer = Some(peer_id);
                    wanted.pause = REDIAL_FIRST;
                }
                self.publish.send_modify(|peers| {
                    peers.connected.insert(peer_id);
                    dialled.iter().for_each(|address| drop(peers.awaited.remove(address)));
                });
            }
            SwarmEvent::ConnectionClosed { peer_id, num_established: 0, cause, .. } => {
                debug!(peer = %peer_id, ?cause, "disconnected");
                let lost: Vec<_> =
                    self.wanted.iter().filter(|(_, w)| w.peer == Some(peer_id) && w.redial_at.is_none()).map(|(a, _)| a.clone()).collect();
                // First what is awaited, then what is gone: in between nobody may think that no one is left.
                for address in lost {
                    self.redial_later(&address, "the connection was lost");
                }
                self.publish.send_modify(|peers| {
                    peers.connected.remove(&peer_id);
                });
            }
            SwarmEvent::OutgoingConnectionError { connection_id, error, .. } => self.on_dial_failed(connection_id, &error.to_string()),
            SwarmEvent::Behaviour(BehaviourEvent::Mdns(mdns::Event::Discovered(found))) => {
                for (peer, address) in found {
                    if peer != *self.swarm.local_peer_id() && !self.swarm.is_connected(&peer) {
                        info!(%peer, %address, "found on the local network");
                        let options = DialOpts::peer_id(peer).addresses(vec![address]).build();
                        let _ = self.swarm.dial(options); // fails when a dial to this peer is under way already
                    }
                }
            }
            _ => {}
        }
    }

    fn on_dial_failed(&mut self, connection: ConnectionId, reason: &str) {
        if let Some(address) = self.dials.remove(&connection) {
            debug!(%address, reason, "cannot connect");
            self.redial_later(&address, reason);
        }
    }

    fn redial_later(&mut self, address: &Multiaddr, reason: &str) {
        let Some(wanted) = self.wanted.get_mut(address) else { return };
        wanted.redial_at = Some(tokio::time::Instant::now() + wanted.pause);
        wanted.pause = (wanted.pause * 2).min(REDIAL_MAX);
        self.publish.send_modify(|peers| drop(peers.awaited.insert(address.clone(), Some(reason.to_owned()))));
    }

    fn drop_peer(&mut self, peer: PeerId) {
        self.swarm.behaviour_mut().blocked.block_peer(peer);
        let theirs: Vec<_> = self.wanted.iter().filter(|(_, w)| w.peer == Some(peer)).map(|(address, _)| address.clone()).collect();
        self.wanted.retain(|_, wanted| wanted.peer != Some(peer));
        let _ = self.swarm.disconnect_peer_id(peer);
        self.publish.send_modify(|peers| {
            peers.connected.remove(&peer);
            theirs.iter().for_each(|address| drop(peers.awaited.remove(address)));
        });
    }
}
