//! Which expert leaves memory when another one comes in, judged on recorded traces.
//!
//! Goals: no allocation and no clock once built; the same answers from the same calls; a trace that can be read by people.
//! Non-goals: it holds no weights and counts no bytes (every expert counts as one), and it does not know how experts come
//! into memory.

mod lfu;
mod lru;
mod s3_fifo;
mod simulate;
mod synthetic;
#[cfg(test)]
mod tests;
mod trace;

use std::fmt;
use std::iter::successors;
use std::str::FromStr;

pub use lfu::Lfu;
pub use lru::Lru;
pub use s3_fifo::S3Fifo;
pub use simulate::{Hits, belady, simulate};
pub use synthetic::{Skew, SyntheticRouting, synthetic};
pub use trace::{EXPERTS_MAX, LAYERS_MAX, Trace, TraceError, TraceFault, TraceStep};

/// Keeps account of which slots are in memory and chooses the one that leaves.
///
/// A slot is `layer × experts of a layer + expert`, below the `slots` that the policy was built for; another one panics.
/// None of the calls allocates.
pub trait CachePolicy: Send + fmt::Debug {
    /// A slot in memory was used. One that is not in memory is ignored.
    fn hit(&mut self, slot: usize);

    /// A slot has just been brought into memory, and is used. One that is there already counts as hit.
    fn insert(&mut self, slot: usize);

    /// Takes the slot that is to leave memory out of the account; `None` when all in memory are pinned.
    fn evict(&mut self, pinned: &dyn Fn(usize) -> bool) -> Option<usize>;
}

/// The policies by name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PolicyKind {
    /// [`Lru`].
    Lru,
    /// [`Lfu`].
    Lfu,
    /// [`S3Fifo`].
    S3Fifo,
}

impl PolicyKind {
    /// Each of them.
    pub const ALL: [Self; 3] = [Self::Lru, Self::Lfu, Self::S3Fifo];

    /// What it is called on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::Lfu => "lfu",
            Self::S3Fifo => "s3-fifo",
        }
    }

    /// The policy, with nothing in memory, for slots below `slots`, of which `capacity` fit into memory.
    pub fn build(self, slots: usize, capacity: usize) -> Box<dyn CachePolicy> {
        match self {
            Self::Lru => Box::new(Lru::new(slots)),
            Self::Lfu => Box::new(Lfu::new(slots, capacity)),
            Self::S3Fifo => Box::new(S3Fifo::new(slots, capacity)),
        }
    }
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for PolicyKind {
    type Err = PolicyUnknown;

    fn from_str(name: &str) -> Result<Self, PolicyUnknown> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| PolicyUnknown(name.to_owned()))
    }
}

/// No policy has this name.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is not a cache policy: it is one of {names}", names = PolicyKind::ALL.map(PolicyKind::name).join(", "))]
pub struct PolicyUnknown(pub String);

/// Lists of slots by age, each slot in one of them or in none.
///
/// A list is a ring through its slots and a head, which comes before the oldest and after the newest.
#[derive(Debug)]
struct Lists {
    newer: Vec<usize>,           // (slots + lists): of each slot in a list, then of each list's head
    older: Vec<usize>,           // (slots + lists)
    list_of: Vec<Option<usize>>, // (slots)
    lens: Vec<usize>,            // (lists)
}

impl Lists {
    fn new(slots: usize, lists: usize) -> Self {
        let alone: Vec<usize> = (0..slots + lists).collect();
        Self { newer: alone.clone(), older: alone, list_of: vec![None; slots], lens: vec![0; lists] }
    }

    /// Takes the slot from where it is, if anywhere, to the newest end of a list.
    fn move_to(&mut self, list: usize, slot: usize) {
        self.remove(slot);
        let head = self.list_of.len() + list;
        let newest = self.older[head];
        (self.older[slot], self.newer[slot]) = (newest, head);
        (self.newer[newest], self.older[head]) = (slot, slot);
        self.list_of[slot] = Some(list);
        self.lens[list] += 1;
    }

    fn remove(&mut self, slot: usize) {
        if let Some(list) = self.list_of[slot].take() {
            let (older, newer) = (self.older[slot], self.newer[slot]);
            (self.newer[older], self.older[newer]) = (newer, older);
            self.lens[list] -= 1;
        }
    }

    fn oldest_first(&self, list: usize) -> impl Iterator<Item = usize> {
        let head = self.list_of.len() + list;
        successors(Some(self.newer[head]), |slot| Some(self.newer[*slot])).take_while(move |slot| *slot != head)
    }

    fn oldest_unpinned(&self, list: usize, pinned: &dyn Fn(usize) -> bool) -> Option<usize> {
        self.oldest_first(list).find(|slot| !pinned(*slot))
    }
}
