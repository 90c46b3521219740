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
    /// Nodes that have said two things under one sequence number.
    equivocators: BTreeSet<NodeId>,
}

/// What is known here, for heads: others wait.
pub struct Known<'a> {
    /// Models.
    pub models: &'a dyn Fn(&ModelId) -> bool,
    /// Probe sets.
    pub probes: &'a dyn Fn(&ContentHash) -> bool,
}

/// How much a node is worth keeping: when there is no room, records of the least go.
pub type Standing<'a> = &'a dyn Fn(&NodeId) -> f64;

impl RecordBook {
    /// Takes in a head: checks 10 and 11.
    pub fn take_head(&mut self, head: Verified<ProfileHead>, known: &Known<'_>, standing: Standing<'_>) -> Result<(), Refused> {
        let about = head.record().model;
        if !(known.models)(&about) || !(known.probes)(&head.record().probes) {
            self.park(head);
            return Err(Refused::Unknown);
        }
        let taken = self.heads.take(about, head, HEADS_MAX, standing);
        self.note(taken)
    }

    /// Takes in an attestation: check 10.
    pub fn take_attestation(&mut self, attestation: Verified<Attestation>, standing: Standing<'_>) -> Result<(), Refused> {
        let about = (attestation.record().subject, attestation.record().facet);
        let taken = self.attestations.take(about, attestation, ATTESTATIONS_MAX, standing);
        self.note(taken)
    }

    /// Takes in a node record: check 10.
    pub fn take_node(&mut self, node: Verified<NodeRecord>, standing: Standing<'_>) -> Result<(), Refused> {
        let taken = self.nodes.take((), node, NODES_MAX, standing);
        self.note(taken)
    }

    /// Forgets what no longer holds, once nothing older by the same node can hold either.
    pub fn expire(&mut self, now_ms: u64) {
        self.heads.expire(now_ms);
        self.attestations.expire(now_ms);
        self.nodes.expire(now_ms);
        self.parked.retain(|_, head| is_current(head, now_ms));
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

    /// Nodes that have said two things under one sequence number.
    pub fn equivocators(&self) -> &BTreeSet<NodeId> {
        &self.equivocators
    }

    /// Everything that is kept, as it came: with those that were taken back, whose older forms must not return.
    pub fn all_bytes(&self) -> impl Iterator<Item = &[u8]> {
        let (heads, nodes) = (self.heads.records().map(Verified::as_bytes), self.nodes.records().map(Verified::as_bytes));
        heads.chain(self.attestations.records().map(Verified::as_bytes)).chain(nodes)
    }

    fn park(&mut self, head: Verified<ProfileHead>) {
        let about = (head.node(), head.record().model);
        let newer = self.parked.get(&about).is_none_or(|parked| parked.record().head.seq < head.record().head.seq);
        if newer && (self.parked.contains_key(&about) || self.parked.len() < PARKED_MAX) {
            self.parked.insert(about, head);
        }
    }

    fn note(&mut self, taken: Result<(), (Refused, NodeId)>) -> Result<(), Refused> {
        taken.map_err(|(refused, node)| {
            if refused == Refused::Equivocation {
                self.equivocators.insert(node);
            }
            refused
        })
    }
}

/// Check 10: whether a sequence number is above the one that is known.
pub(super) fn is_newer(known: u64, new: u64, same_bytes: bool) -> Result<(), Refused> {
    match new.cmp(&known) {
        Ordering::Greater => Ok(()),
        Ordering::Equal if !same_bytes => Err(Refused::Equivocation),
        Ordering::Equal | Ordering::Less => Err(Refused::Seq),
    }
}

fn is_current<R: Record>(record: &Verified<R>, now_ms: u64) -> bool {
    record.record().head().expires_ms.saturating_add(SKEW_MS) >= now_ms
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
    fn take(&mut self, about: A, record: Verified<R>, most: usize, standing: Standing<'_>) -> Result<(), (Refused, NodeId)> {
        let node = record.node();
        let theirs = self.by_node.get(&node);
        if let Some(known) = theirs.and_then(|theirs| theirs.get(&about)) {
            let (old, new) = (known.record().head().seq, record.record().head().seq);
            is_newer(old, new, known.as_bytes() == record.as_bytes()).map_err(|refused| (refused, node))?;
        } else {
            if theirs.is_some_and(|theirs| theirs.len() >= PER_NODE_MAX) {
                return Err((Refused::Full, node));
            }
            if self.count >= most {
                self.make_room(&node, standing).map_err(|refused| (refused, node))?;
            }
            self.count += 1;
        }
        self.by_node.entry(node).or_default().insert(about, record);
        Ok(())
    }

    /// Forgets what the node of the least standing has said, if that is less than `newcomer`'s.
    fn make_room(&mut self, newcomer: &NodeId, standing: Standing<'_>) -> Result<(), Refused> {
        let others = self.by_node.keys().filter(|node| *node != newcomer).map(|node| (standing(node), *node));
        let least = others.min_by(|a, b| a.0.total_cmp(&b.0)).filter(|(least, _)| *least < standing(newcomer)).ok_or(Refused::Full)?;
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
