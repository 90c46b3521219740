//! What is known of peers at a moment.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::{Multiaddr, PeerId};

/// What is known of peers at a moment.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Peers {
    /// Peers to whom there is a direct connection: these alone are asked for bulk.
    pub connected: BTreeSet<PeerId>,
    /// Peers who are reached through a relay only, which carries no bulk.
    pub relayed: BTreeSet<PeerId>,
    /// Addresses that are being dialled or will be again, with the last reason why that failed.
    pub awaited: BTreeMap<Multiaddr, Option<String>>,
    /// Whether others may turn up by themselves.
    pub may_discover: bool,
    pub listening: Vec<Multiaddr>,
    /// Peers that were dialled with success.
    pub met: BTreeMap<PeerId, Met>,
    /// Addresses of the book at which nobody answered.
    pub silent: BTreeSet<Multiaddr>,
    /// Peers that were shown the door.
    pub dropped: BTreeSet<PeerId>,
}

/// Where a peer was reached, and how we came by that.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Met {
    /// With the peer's id.
    pub address: Multiaddr,
    pub source: AddressSource,
    /// Whether it says that it serves.
    pub serves: bool,
}

/// How an address came to us.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AddressSource {
    /// The user named it.
    Named,
    /// It was in the address book.
    Book,
    /// Another peer told of it.
    Found,
    /// It was heard on the local network.
    Local,
}

impl AddressSource {
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Named, Self::Book, Self::Found, Self::Local].into_iter().find(|source| source.to_string() == text)
    }
}

impl fmt::Display for AddressSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Named => "named",
            Self::Book => "book",
            Self::Found => "found",
            Self::Local => "local",
        })
    }
}
