//! One blob on its way: which of its groups are missing, asked for, being verified, or here.

use std::collections::{BTreeMap, BTreeSet};

use super::Urgency;
use crate::group_hashes::{GroupHashes, group_count};
use crate::hash::{BlobRef, ContentHash};

/// A blob's place in the order: urgency, then begun or not, then rarity, then by lot, and its name.
pub(super) type WantedPlace = (Urgency, bool, u32, u64, ContentHash);

/// Whether the driver has made room for a blob.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Room {
    /// Nobody has asked it to.
    None,
    /// It is about to.
    Promised,
    /// There is.
    Ready,
}

/// Where a group is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Group<P> {
    Missing,
    Requested(P),
    AskedTwice(P, P),
    Verifying,
    Here,
}

/// A blob that is wanted.
#[derive(Debug)]
pub(super) struct WantedBlob<P> {
    pub(super) blob: BlobRef,
    pub(super) serial: u64, // of a blob that is wanted again, another
    pub(super) urgency: Urgency,
    pub(super) room: Room,
    pub(super) hashes: Option<GroupHashes>,
    /// Peers that were asked for the hashes, by the request.
    pub(super) hashes_requested: BTreeMap<P, u32>,
    pub(super) missing: BTreeSet<u32>,
    pub(super) groups: Vec<Group<P>>,
    pub(super) left: u32, // groups that are not here
    /// Peers that do not have it, whatever they said before.
    pub(super) refused: BTreeSet<P>,
    /// Its length is what somebody said who does not have to know.
    pub(super) unsure: bool,
    pub(super) draw: u64, // between blobs that are equally rare
    /// Where it stands in the order of what to ask for.
    pub(super) placed: Option<WantedPlace>,
}

impl<P: Copy + Ord> WantedBlob<P> {
    /// A blob of which nothing is here; nothing when it is longer than we move.
    pub(super) fn new(blob: BlobRef, serial: u64, urgency: Urgency, draw: u64) -> Option<Self> {
        let count = group_count(blob.length)?;
        Some(Self {
            blob,
            serial,
            urgency,
            room: Room::None,
            hashes: GroupHashes::of_single(blob),
            hashes_requested: BTreeMap::new(),
            missing: (0..count).collect(),
            groups: vec![Group::Missing; count as usize],
            left: count,
            refused: BTreeSet::new(),
            unsure: false,
            draw,
            placed: None,
        })
    }

    /// The driver has made room, and found these groups there from an earlier time.
    pub(super) fn ready(&mut self, hashes: Option<GroupHashes>, here: &[u32]) {
        self.room = Room::Ready;
        if let Some(hashes) = hashes.filter(|hashes| hashes.blob() == self.blob) {
            self.hashes = Some(hashes);
        }
        for &group in here {
            if self.missing.remove(&group) {
                self.arrived(group);
            }
        }
    }

    pub(super) fn group(&self, group: u32) -> Group<P> {
        self.groups.get(group as usize).copied().unwrap_or(Group::Here)
    }

    /// Notes that a group was asked of one more peer.
    pub(super) fn requested(&mut self, group: u32, peer: P) {
        self.missing.remove(&group);
        let slot = &mut self.groups[group as usize];
        *slot = match *slot {
            Group::Requested(first) => Group::AskedTwice(first, peer),
            _ => Group::Requested(peer),
        };
    }

    /// Takes back that a group was asked of `peer`; it is missing unless another was asked, too.
    pub(super) fn release(&mut self, group: u32, peer: P) {
        let slot = &mut self.groups[group as usize];
        *slot = match *slot {
            Group::Requested(first) if first == peer => Group::Missing,
            Group::AskedTwice(first, second) if first == peer => Group::Requested(second),
            Group::AskedTwice(first, second) if second == peer => Group::Requested(first),
            other => other,
        };
        if *slot == Group::Missing {
            self.missing.insert(group);
        }
    }

    pub(super) fn verifying(&mut self, group: u32) {
        self.missing.remove(&group);
        self.groups[group as usize] = Group::Verifying;
    }

    /// A group turned out wrong.
    pub(super) fn wrong(&mut self, group: u32) {
        self.groups[group as usize] = Group::Missing;
        self.missing.insert(group);
    }

    /// A group is here for good.
    pub(super) fn arrived(&mut self, group: u32) {
        self.groups[group as usize] = Group::Here;
        self.left -= 1;
    }

    /// Whether anything of it was asked for yet.
    pub(super) fn is_begun(&self) -> bool {
        self.missing.len() < self.groups.len()
    }
}
