//! The network as the rest of the node sees it: how it is started, what is known of peers, and a handle to tell it things.

use std::time::Duration;

use base::clock::{instant, now_ms};
use libp2p::{Multiaddr, PeerId};
use protocol::trust::{Facet, Outcome, score};
use protocol::{ModelId, NodeKey};
use tokio::sync::{mpsc, oneshot, watch};

use super::address::node_id;
use super::friends::Friends;
use super::group::GroupKey;
use crate::records::{RecordKind, SharedRecords};

/// How long a node that leaves waits for its connections to end.
pub(super) const LEAVE_PATIENCE: Duration = Duration::from_millis(500);
const LEAVE_PAUSE: Duration = Duration::from_millis(2);

/// What a node's network is made of.
pub struct NetworkOptions<'a> {
    pub key: &'a NodeKey,
    /// Where to listen; nothing for a one-shot command.
    pub listen: Vec<Multiaddr>,
    /// Peers to stay connected to.
    pub peers: Vec<Multiaddr>,
    /// Peers to try once, in this order.
    pub book: Vec<Multiaddr>,
    /// Whether to look for peers by multicast.
    pub mdns: bool,
    /// The closed group to be in; none is everybody's.
    pub group: Option<GroupKey>,
    /// Bytes of memory beyond which the process makes no more connections.
    pub memory_max: u64,
    pub role: NodeRole,
    /// What peers have signed and what is thought of them.
    pub records: SharedRecords,
    /// Peers that the user named, besides `peers`.
    pub friends: Vec<PeerId>,
}

/// What a node is to others.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NodeRole {
    /// Asks, and goes again.
    Guest,
    /// Serves these models, and tells where others are.
    Host { models: Vec<ModelId>, relay: Relay },
}

/// Whether a host lends its address to nodes that have none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Relay {
    Yes,
    No,
}

pub use super::peers::{AddressSource, Met, Peers};

/// A handle on the running network. When the last one is dropped, the network ends.
#[derive(Clone)]
pub struct Network {
    pub local: PeerId,
    pub streams: libp2p_stream::Control,
    pub peers: watch::Receiver<Peers>,
    pub records: SharedRecords,
    /// Peers whose places others cannot take.
    pub(super) friends: Friends,
    pub(super) commands: mpsc::Sender<Command>,
}

/// What the task that drives the swarm is told.
pub(super) enum Command {
    Drop(PeerId),
    Admit(PeerId),
    LookFor(ModelId, oneshot::Sender<()>),
    Stay(Vec<Multiaddr>),
    Offer(Vec<ModelId>),
    Tell(RecordKind, Vec<u8>, oneshot::Sender<bool>),
    Leave(oneshot::Sender<()>),
}

impl Network {
    /// Notes what was seen of a peer.
    pub fn observe(&self, peer: PeerId, facet: Facet, outcome: Outcome) {
        if let Some(node) = node_id(peer).filter(|_| peer != self.local) {
            self.records.observe(node, facet, outcome);
        }
    }

    /// How far a peer is trusted with bytes, from what was seen and what others say: for the order in which peers are asked.
    pub fn trust_in_bytes(&self, peer: PeerId) -> f64 {
        node_id(peer).map_or(0.0, |node| self.records.lock().ordering(now_ms(), &node, Facet::Bytes))
    }

    /// Whether more speaks against a peer's bytes than for them: it is asked last.
    pub(crate) fn is_doubted(&self, peer: PeerId) -> bool {
        self.trust_in_bytes(peer) < score(0.0, 0.0)
    }

    /// Disconnects a peer that cannot be trusted with bytes, and keeps it away.
    pub async fn drop_peer(&self, peer: PeerId) {
        let _ = self.commands.send(Command::Drop(peer)).await;
    }

    /// Lets a peer in again that was kept away.
    pub async fn admit(&self, peer: PeerId) {
        let _ = self.commands.send(Command::Admit(peer)).await;
    }

    /// Tells hosts a record of this node's own; says whether anybody was there to hear it.
    pub async fn tell_record(&self, kind: RecordKind, bytes: Vec<u8>) -> bool {
        let (told, wait) = oneshot::channel();
        self.commands.send(Command::Tell(kind, bytes, told)).await.is_ok() && wait.await.unwrap_or(false)
    }

    /// Ends all connections in order, so that peers turn to others at once; returns when they are ended, or after half a second.
    pub async fn leave(&self) {
        let (left, wait) = oneshot::channel();
        if self.commands.send(Command::Leave(left)).await.is_ok() {
            let _ = wait.await;
        }
    }

    /// The same, for a thread that drives no tasks.
    pub fn leave_blocking(&self) {
        let (left, mut wait) = oneshot::channel();
        let until = instant() + LEAVE_PATIENCE;
        if self.commands.try_send(Command::Leave(left)).is_ok() {
            while instant() < until && matches!(wait.try_recv(), Err(oneshot::error::TryRecvError::Empty)) {
                std::thread::sleep(LEAVE_PAUSE);
            }
        }
    }

    /// Stays connected to a peer at one of these addresses, as to one that the user named at the start.
    pub async fn stay_with(&self, addresses: Vec<Multiaddr>) {
        let _ = self.commands.send(Command::Stay(addresses)).await;
    }

    /// Tells others that these models are served here; it replaces what was told before.
    pub async fn offer(&self, models: Vec<ModelId>) {
        let _ = self.commands.send(Command::Offer(models)).await;
    }

    /// Begins to look for peers who have a model, by asking those who are connected. Once this returns, it has begun.
    pub async fn look_for(&self, model: ModelId) {
        let (begun, wait) = oneshot::channel();
        if self.commands.send(Command::LookFor(model, begun)).await.is_ok() {
            let _ = wait.await;
        }
    }
}
