//! What a node does on each of its connections, and how many of them it has.

use libp2p::connection_limits::{self, ConnectionLimits};
use libp2p::identity::Keypair;
use libp2p::swarm::NetworkBehaviour;
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::{allow_block_list, autonat, dcutr, identify, mdns, memory_connection_limits, ping, relay};

use super::crowding;
use super::finder::{Table, table};
use super::friends::Friends;
use super::gossip;
use super::network::{NodeRole, Relay};
use super::relaying::relay_limits;

/// Dials under way. How many handshakes come in is bounded in `handshakes`, and how many connections in `crowding`.
const PENDING_OUT_MAX: u32 = 32;
const ESTABLISHED_OUT_MAX: u32 = 64;
const ESTABLISHED_PER_PEER_MAX: u32 = 3;

// The limits stand first: what they refuse, the others never see.
#[derive(NetworkBehaviour)]
pub(super) struct Behaviour {
    pub(super) limits: connection_limits::Behaviour,
    pub(super) memory: memory_connection_limits::Behaviour,
    pub(super) crowding: crowding::CrowdLimits,
    pub(super) blocked: allow_block_list::Behaviour<allow_block_list::BlockedPeers>,
    pub(super) identify: identify::Behaviour,
    pub(super) ping: ping::Behaviour,
    pub(super) mdns: Toggle<mdns::tokio::Behaviour>,
    pub(super) stream: libp2p_stream::Behaviour,
    pub(super) kad: Table,
    /// Records, among hosts.
    pub(super) gossip: Toggle<gossip::GossipBehaviour>,
    /// Asks others whether this node can be reached.
    pub(super) autonat: Toggle<autonat::v2::client::Behaviour>,
    /// Answers others that question.
    pub(super) autonat_server: Toggle<autonat::v2::server::Behaviour>,
    pub(super) relay_client: relay::client::Behaviour,
    pub(super) relay: Toggle<relay::Behaviour>,
    pub(super) dcutr: dcutr::Behaviour,
}

/// What of it can be chosen.
pub(super) struct Choices<'a> {
    pub(super) mdns: bool,
    /// Bytes of memory beyond which the process makes no more connections.
    pub(super) memory_max: u64,
    pub(super) role: &'a NodeRole,
    /// Peers whose places others cannot take.
    pub(super) friends: &'a Friends,
}

impl Behaviour {
    pub(super) fn new(keypair: &Keypair, relay_client: relay::client::Behaviour, choices: &Choices<'_>) -> Result<Self, std::io::Error> {
        let local = keypair.public().to_peer_id();
        let limits = ConnectionLimits::default()
            .with_max_pending_outgoing(Some(PENDING_OUT_MAX))
            .with_max_established_outgoing(Some(ESTABLISHED_OUT_MAX))
            .with_max_established_per_peer(Some(ESTABLISHED_PER_PEER_MAX));
        let mdns = if choices.mdns { Some(mdns::tokio::Behaviour::new(mdns::Config::default(), local)?) } else { None };
        let agent = concat!("confrere/", env!("CARGO_PKG_VERSION")).to_owned();
        let identify = identify::Config::new("/confrere/1".to_owned(), keypair.public()).with_agent_version(agent);
        let (hosts, relays) = match choices.role {
            NodeRole::Guest => (false, false),
            NodeRole::Host { relay, .. } => (true, *relay == Relay::Yes),
        };
        Ok(Self {
            limits: connection_limits::Behaviour::new(limits),
            memory: memory_connection_limits::Behaviour::with_max_bytes(choices.memory_max as usize),
            crowding: crowding::CrowdLimits::new(choices.friends.clone()),
            blocked: allow_block_list::Behaviour::default(),
            identify: identify::Behaviour::new(identify),
            ping: ping::Behaviour::default(),
            mdns: mdns.into(),
            stream: libp2p_stream::Behaviour::new(),
            kad: table(local, choices.role),
            gossip: if hosts { Some(gossip::behaviour()?) } else { None }.into(),
            autonat: hosts.then(autonat::v2::client::Behaviour::default).into(),
            autonat_server: relays.then(autonat::v2::server::Behaviour::default).into(),
            relay_client,
            relay: relays.then(|| relay::Behaviour::new(local, relay_limits())).into(),
            dcutr: dcutr::Behaviour::new(local),
        })
    }
}
