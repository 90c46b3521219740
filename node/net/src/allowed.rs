//! Peers that the user has chosen for something, by name or all of them.

use std::collections::BTreeSet;
use std::str::FromStr;

use libp2p::PeerId;
use protocol::NodeId;

use crate::address::{parse_address, peer_id, peer_of};

/// A peer that may, or anybody.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Allowed {
    Anybody,
    Peer(PeerId),
}

impl FromStr for Allowed {
    type Err = String;

    /// Reads `any`, a node's key as `confrere id` prints it, a peer id, or an address that ends in one.
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "any" {
            return Ok(Self::Anybody);
        }
        let named = text.parse::<NodeId>().ok().and_then(peer_id).or_else(|| text.parse().ok());
        let in_address = || if text.starts_with('/') { peer_of(&parse_address(text).ok()?) } else { None };
        let peer = named.or_else(in_address);
        peer.map(Self::Peer).ok_or_else(|| format!("{text:?} is no peer: write a key as `confrere id` prints it, a peer id, or any"))
    }
}

/// Which peers may.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct AllowedPeers {
    anybody: bool,
    peers: BTreeSet<PeerId>,
}

impl AllowedPeers {
    /// Those of a list.
    pub fn new(allowed: &[Allowed]) -> Self {
        let peers = allowed.iter().filter_map(|allowed| if let Allowed::Peer(peer) = allowed { Some(*peer) } else { None });
        Self { anybody: allowed.contains(&Allowed::Anybody), peers: peers.collect() }
    }

    /// Whether a peer may.
    pub fn includes(&self, peer: &PeerId) -> bool {
        self.anybody || self.peers.contains(peer)
    }

    /// Those that are named.
    pub fn named(&self) -> impl Iterator<Item = PeerId> {
        self.peers.iter().copied()
    }

    /// Whether nobody may.
    pub fn is_empty(&self) -> bool {
        !self.anybody && self.peers.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_named_by_key_by_id_or_at_the_end_of_an_address() {
        let key = protocol::NodeKey::from_secret(&[5; 32]).id();
        let peer = peer_id(key).expect("a key");
        for text in [key.to_string(), peer.to_string(), format!("/ip4/127.0.0.1/tcp/7/p2p/{peer}")] {
            assert_eq!(text.parse(), Ok(Allowed::Peer(peer)), "{text}");
        }
        assert_eq!("any".parse(), Ok(Allowed::Anybody));
        for text in ["", "all", "127.0.0.1:7", "/ip4/127.0.0.1/tcp/7"] {
            assert!(text.parse::<Allowed>().is_err(), "{text}");
        }
        let some = AllowedPeers::new(&[Allowed::Peer(peer)]);
        assert!(some.includes(&peer) && !some.includes(&PeerId::random()) && !some.is_empty());
        assert!(AllowedPeers::new(&[Allowed::Anybody]).includes(&PeerId::random()) && AllowedPeers::default().is_empty());
    }
}
