//! Keeps the newest valid record of each node. Does not judge its truth: see `trust`.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use super::{Attestation, Facet, NodeRecord, ProfileHead, Record, Refused, SEQ_REVOKED, SKEW_MS, Verified};
use crate::hash::{ContentHash, ModelId};
use crate::identity::NodeId;

/// Most profile heads, of all nodes and models.
pub const HEADS_MAX: usize = 8192;
/// Most attestations, of all issuers.
pub const ATTESTATIONS_MAX: usize = 16_384;
/// Most node records.
pub const NODES_MAX: usize = 4096;
/// Most records of one kind by one node.
pub const PER_NODE_MAX: usize = 256;
/// Most heads that wait for their model or their probe set to become known.
pub const PARKED_MAX: usize = 1000;

/// Records by node and by what they are about.
#[derive(Debug, Default)]
pub struct RecordBook {
    heads: Shelf<ModelId, ProfileHead>,
    attestations: Shelf<(NodeId, Facet), Attestation>,
    nodes: Shelf<(), NodeRecord>,
    parked: BTreeMap<(NodeId, ModelId), Verified<ProfileHead>>,
    /// Who has attested what of whom: raters by subject and facet.
    raters: BTreeMap<(NodeId, Facet), BTreeSet<NodeId>>,
}

/// What is known here, for heads: others wait.
pub struct Known<'a> {
    /// Models.
    pub models: &'a dyn Fn(&ModelId) -> bool,
    /// Probe sets.
    pub probes: &'a dyn Fn(&ContentHash) -> bool,
}

/// How much a node is worth keeping: when there is no room, records of the least go.
pub type Priority<'a> = &'a dyn Fn(&NodeId) -> f64;

impl RecordBook {
    /// Takes in a head: checks 10 and 11.
    pub fn take_head(&mut self, head: Verified<ProfileHead>, known: &Known<'_>, priority: Priority<'_>) -> Result<(), Refused> {
        let about = head.record().model;
        if !(known.models)(&about) || !(known.probes)(&head.record().probes) {
            self.park(head);
            return Err(Refused::Unknown);
        }
        self.heads.take(about, head, HEADS_MAX, priority).map(drop)
    }

    /// Takes in an attestation: check 10.
    pub fn take_attestation(&mut self, attestation: Verified<Attestation>, priority: Priority<'_>) -> Result<(), Refused> {
        let (about, rater) = ((attestation.record().subject, attestation.record().facet), attestation.node());
        if self.attestations.take(about, attestation, ATTESTATIONS_MAX, priority)? == Room::Made {
            self.index();
        } else {
            self.raters.entry(about).or_default().insert(rater);
        }
        Ok(())
    }

    /// Takes in a node record: check 10.
    pub fn take_node(&mut self, node: Verified<NodeRecord>, priority: Priority<'_>) -> Result<(), Refused> {
        self.nodes.take((), node, NODES_MAX, priority).map(drop)
    }

    /// Forgets what no longer holds, once nothing older by the same node can hold either.
    pub fn expire(&mut self, now_ms: u64) {
        self.heads.expire(now_ms);
        self.attestations.expire(now_ms);
        self.nodes.expire(now_ms);
        self.parked.retain(|_, head| is_current(head, now_ms));
        self.index();
    }

    fn index(&mut self) {
        self.raters.clear();
        for (rater, theirs) in &self.attestations.by_node {
            for about in theirs.keys() {
                self.raters.entry(*about).or_default().insert(*rater);
            }
        }
    }

    /// Heads that waited and whose model and probe set are known now.
    pub fn unpark(&mut self, known: &Known<'_>) -> Vec<Verified<ProfileHead>> {
        let is_known = |head: &Verified<ProfileHead>| (known.models)(&head.record().model) && (known.probes)(&head.record().probes);
        let ready: Vec<_> = self.parked.iter().filter(|(_, head)| is_known(head)).map(|(about, _)| *about).collect();
        ready.iter().filter_map(|about| self.parked.remove(about)).collect()
    }

    /// The heads that hold now, but for those taken back.
    pub fn heads(&self, now_ms: u64) -> impl Iterator<Item = &Verified<ProfileHead>> {
        self.heads.records().filter(move |head| head.record().head.seq != SEQ_REVOKED && is_current(head, now_ms))
    }

    /// The attestations that hold now.
    pub fn attestations(&self, now_ms: u64) -> impl Iterator<Item = &Verified<Attestation>> {
        self.attestations.records().filter(move |attestation| is_current(attestation, now_ms))
    }

    /// The node records that hold now.
    pub fn nodes(&self, now_ms: u64) -> impl Iterator<Item = &Verified<NodeRecord>> {
        self.nodes.records().filter(move |node| is_current(node, now_ms))
    }

    /// What is attested of a node in a facet.
    pub fn attestations_about(&self, now_ms: u64, subject: &NodeId, facet: Facet) -> impl Iterator<Item = &Verified<Attestation>> {
        let raters = self.raters.get(&(*subject, facet)).into_iter().flatten();
        let about = (*subject, facet);
        let theirs = raters.filter_map(move |rater| self.attestations.by_node.get(rater)?.get(&about));
        theirs.filter(move |one| is_current(one, now_ms))
    }

    /// How many nodes a rater calls good in a facet.
    pub fn vouched_for(&self, rater: &NodeId, facet: Facet) -> u32 {
        let theirs = self.attestations.by_node.get(rater).into_iter().flatten();
        theirs.filter(|((_, of), one)| *of == facet && one.record().good > 0).count() as u32
    }

    /// A node's record of itself, whether it holds now or not.
    pub fn node(&self, node: &NodeId) -> Option<&Verified<NodeRecord>> {
        self.nodes.by_node.get(node)?.get(&())
    }

    /// Whether anything that a node has signed is kept.
    pub fn knows(&self, node: &NodeId) -> bool {
        self.nodes.by_node.contains_key(node) || self.heads.by_node.contains_key(node) || self.attestations.by_node.contains_key(node)
    }

    /// All whose records are kept.
    pub fn signers(&self) -> BTreeSet<NodeId> {
        self.nodes.by_node.keys().chain(self.heads.by_node.keys()).chain(self.attestations.by_node.keys()).copied().collect()
    }

    /// Everything that is kept of a node, as it came: with what was taken back, whose older forms must not return.
    pub fn bytes_of(&self, node: &NodeId) -> impl Iterator<Item = &[u8]> {
        let nodes = self.nodes.by_node.get(node).into_iter().flat_map(BTreeMap::values).map(Verified::as_bytes);
        let heads = self.heads.by_node.get(node).into_iter().flat_map(BTreeMap::values).map(Verified::as_bytes);
        let attestations = self.attestations.by_node.get(node).into_iter().flat_map(BTreeMap::values).map(Verified::as_bytes);
        nodes.chain(heads).chain(attestations)
    }

    fn park(&mut self, head: Verified<ProfileHead>) {
        let about = (head.node(), head.record().model);
        let newer = self.parked.get(&about).is_none_or(|parked| parked.record().head.seq < head.record().head.seq);
        if newer && (self.parked.contains_key(&about) || self.parked.len() < PARKED_MAX) {
            self.parked.insert(about, head);
        }
    }
}

/// Check 10: whether a sequence number is above the one that is known.
pub(super) fn is_newer(node: NodeId, known: u64, new: u64, same_bytes: bool) -> Result<(), Refused> {
    match new.cmp(&known) {
        Ordering::Greater => Ok(()),
        Ordering::Equal if !same_bytes => Err(Refused::Equivocation(node)),
        Ordering::Equal | Ordering::Less => Err(Refused::Seq),
    }
}

/// Whether a record holds now by our own clock: one that was taken back by another that expires at once is gone at once.
fn is_current<R: Record>(record: &Verified<R>, now_ms: u64) -> bool {
    record.record().head().expires_ms > now_ms
}

/// Whether somebody else's records had to go.
#[derive(PartialEq, Eq)]
enum Room {
    There,
    Made,
}

/// Records of one kind.
#[derive(Debug)]
struct Shelf<A, R> {
    by_node: BTreeMap<NodeId, BTreeMap<A, Verified<R>>>,
    count: usize,
}

impl<A, R> Default for Shelf<A, R> {
    fn default() -> Self {
        Self { by_node: BTreeMap::new(), count: 0 }
    }
}

impl<A: Ord + Copy, R: Record> Shelf<A, R> {
    fn take(&mut self, about: A, record: Verified<R>, most: usize, priority: Priority<'_>) -> Result<Room, Refused> {
        let node = record.node();
        let mut room = Room::There;
        let theirs = self.by_node.get(&node);
        if let Some(known) = theirs.and_then(|theirs| theirs.get(&about)) {
            let (old, new) = (known.record().head().seq, record.record().head().seq);
            is_newer(node, old, new, known.as_bytes() == record.as_bytes())?;
        } else {
            if theirs.is_some_and(|theirs| theirs.len() >= PER_NODE_MAX) {
                return Err(Refused::Full);
            }
            if self.count >= most {
                self.make_room(&node, priority)?;
                room = Room::Made;
            }
            self.count += 1;
        }
        self.by_node.entry(node).or_default().insert(about, record);
        Ok(room)
    }

    /// Forgets what the node of the least standing has said, if that is less than `newcomer`'s.
    fn make_room(&mut self, newcomer: &NodeId, priority: Priority<'_>) -> Result<(), Refused> {
        let others = self.by_node.keys().filter(|node| *node != newcomer).map(|node| (priority(node), *node));
        let least = others.min_by(|a, b| a.0.total_cmp(&b.0)).filter(|(least, _)| *least < priority(newcomer)).ok_or(Refused::Full)?;
        let gone = self.by_node.remove(&least.1).map_or(0, |theirs| theirs.len());
        self.count -= gone;
        Ok(())
    }

    fn expire(&mut self, now_ms: u64) {
        for theirs in self.by_node.values_mut() {
            theirs.retain(|_, record| record.record().head().issued_ms.saturating_add(R::LIFE_MS_MAX + SKEW_MS) >= now_ms);
        }
        self.by_node.retain(|_, theirs| !theirs.is_empty());
        self.count = self.by_node.values().map(BTreeMap::len).sum();
    }

    fn records(&self) -> impl Iterator<Item = &Verified<R>> {
        self.by_node.values().flat_map(BTreeMap::values)
    }
}
