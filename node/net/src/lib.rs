//! The network. libp2p is named in this crate and in no other.

#![expect(missing_docs, reason = "the crates of the node are public to one another only, and many a name says it all")]

pub mod address;
pub mod allowed;
pub mod ask;
mod ask_each;
mod ask_holders;
mod assembly;
mod behaviour;
mod byte_budget;
mod crowding;
pub mod execute_link;
pub mod executor;
pub mod fetcher;
mod finder;
mod finder_task;
pub mod friends;
mod give_up;
mod gossip;
mod gossip_task;
pub mod group;
mod handshakes;
pub mod link;
pub mod network;
mod offered;
pub mod own_models;
pub mod peers;
pub mod progress;
pub mod provider;
pub mod query;
pub mod records;
mod relaying;
mod relaying_task;
pub mod status;
mod stream;
mod stream_slots;
mod swarm;
mod transport;
mod upload;
mod wanted;

pub use libp2p::{Multiaddr, PeerId};

/// What the network's own log says less of: that nobody is known yet is no reason to warn.
pub const CALM_LOG: &str = "libp2p_kad=error";

/// A new secret key, from the operating system's randomness.
pub fn new_secret() -> [u8; 32] {
    let key = libp2p::identity::ed25519::Keypair::generate();
    key.secret().as_ref().try_into().expect("an Ed25519 secret has 32 bytes")
}

/// A number that nobody can foresee.
pub fn random() -> u64 {
    let secret = new_secret();
    u64::from_le_bytes(secret[..8].try_into().expect("8 bytes are 8 bytes"))
}
