//! The network. libp2p is named in here and nowhere else.

pub(crate) mod address;
pub(crate) mod allowed;
pub(crate) mod ask;
mod ask_each;
mod ask_holders;
mod assembly;
mod behaviour;
mod byte_budget;
mod crowding;
pub(crate) mod execute_link;
pub(crate) mod executor;
pub(crate) mod fetcher;
mod finder;
mod finder_task;
pub(crate) mod friends;
mod give_up;
mod gossip;
mod gossip_task;
pub(crate) mod group;
mod handshakes;
pub(crate) mod link;
pub(crate) mod network;
mod offered;
pub(crate) mod peers;
pub(crate) mod progress;
pub(crate) mod provider;
pub(crate) mod query;
mod relaying;
mod relaying_task;
pub(crate) mod status;
mod stream;
mod stream_slots;
mod swarm;
mod transport;
mod upload;
mod wanted;

pub(crate) use libp2p::{Multiaddr, PeerId};

/// What the network's own log says less of: that nobody is known yet is no reason to warn.
pub(crate) const CALM_LOG: &str = "libp2p_kad=error";

/// A new secret key, from the operating system's randomness.
pub(crate) fn new_secret() -> [u8; 32] {
    let key = libp2p::identity::ed25519::Keypair::generate();
    key.secret().as_ref().try_into().expect("an Ed25519 secret has 32 bytes")
}

/// A number that nobody can foresee.
pub(crate) fn random() -> u64 {
    let secret = new_secret();
    u64::from_le_bytes(secret[..8].try_into().expect("8 bytes are 8 bytes"))
}
