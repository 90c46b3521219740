//! Blobs that are being put together from groups, in memory or in the store, and the threads that verify them.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc as std_mpsc};

use base::threads;
use libp2p::PeerId;
use protocol::group_hashes::group_offset;
use protocol::{BlobRef, ContentHash, GroupCheck, GroupHashes};
use store::{BlobStore, PartialBlob, StoreError};
use tokio::sync::mpsc;

/// Groups that are verified or wait for it: as many as can be on their way, see [`protocol::exchange`].
pub(crate) const WORK_MAX: usize = 1100;
/// While one writes to the disk, the other hashes.
const VERIFIERS: usize = 2;

/// The store, as something to fetch into.
pub struct Sink(pub Arc<BlobStore>);

impl std::fmt::Debug for Sink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the store")
    }
}

/// A blob that is being put together.
pub(crate) enum Assembly {
    /// In memory.
    Memory(Mutex<InMemory>),
    /// On the disk.
    Store(PartialBlob),
}

/// What is there of a blob in memory.
pub(crate) struct InMemory {
    bytes: Vec<u8>,
    hashes: Option<GroupHashes>,
    here: BTreeSet<u32>,
}

/// A group to verify.
pub(crate) struct Work {
    pub(crate) assembly: Arc<Assembly>,
    pub peer: PeerId,
    pub hash: ContentHash,
    pub(crate) serial: u64,
    pub check: GroupCheck,
    pub bytes: Vec<u8>,
}

/// What became of it.
pub(crate) struct Assembled {
    pub peer: PeerId,
    pub hash: ContentHash,
    pub(crate) serial: u64,
    pub check: GroupCheck,
    /// Whether the group was right, or why it could not be kept.
    pub right: Result<bool, StoreError>,
}

impl Assembly {
    /// Room in memory for a blob.
    pub(crate) fn in_memory(blob: BlobRef) -> Self {
        Self::Memory(Mutex::new(InMemory { bytes: vec![0; blob.length as usize], hashes: None, here: BTreeSet::new() }))
    }

    /// What is there: the hashes of the groups, and those that were verified.
    pub(crate) fn here(&self) -> (Option<GroupHashes>, Vec<u32>) {
        match self {
            Self::Memory(memory) => {
                let memory = lock(memory);
                (memory.hashes.clone(), memory.here.iter().copied().collect())
            }
            Self::Store(partial) => partial.here(),
        }
    }

    /// Takes the hashes of the groups.
    pub(crate) fn set_hashes(&self, hashes: GroupHashes) -> Result<(), StoreError> {
        match self {
            Self::Memory(memory) => {
                lock(memory).hashes = Some(hashes);
                Ok(())
            }
            Self::Store(partial) => partial.set_hashes(&hashes),
        }
    }

    /// Takes a group if it is right; says whether it was.
    fn take(&self, check: &GroupCheck, bytes: &[u8]) -> Result<bool, StoreError> {
        match self {
            Self::Memory(memory) => {
                if !check.matches(bytes) {
                    return Ok(false);
                }
                let mut memory = lock(memory);
                let from = group_offset(check.group) as usize;
                memory.bytes[from..from + bytes.len()].copy_from_slice(bytes);
                memory.here.insert(check.group);
                Ok(true)
            }
            Self::Store(partial) => partial.write_group(check, bytes),
        }
    }

    /// The bytes of a complete blob in memory; nothing of one on the disk.
    pub(crate) fn take_bytes(&self) -> Vec<u8> {
        match self {
            Self::Memory(memory) => std::mem::take(&mut lock(memory).bytes),
            Self::Store(_) => Vec::new(),
        }
    }

    /// Bytes of memory that are worth keeping when the fetch is broken off.
    pub(crate) fn kept_bytes(&self) -> usize {
        match self {
            Self::Memory(memory) => {
                let memory = lock(memory);
                if memory.here.is_empty() { 0 } else { memory.bytes.len() }
            }
            Self::Store(_) => 0,
        }
    }
}

fn lock(memory: &Mutex<InMemory>) -> MutexGuard<'_, InMemory> {
    memory.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Work {
    /// Verifies the group and keeps it if it is right.
    pub(crate) fn run(self) -> Assembled {
        let Self { assembly, peer, hash, serial, check, bytes } = self;
        // A fault here fails this blob, not the thread that all fetches need.
        let taken = threads::caught("verifying a group", || assembly.take(&check, &bytes));
        let right = taken.unwrap_or_else(|failure| {
            let (action, path) = ("keep a group of", hash.to_string());
            Err(StoreError::Io { action, path, source: std::io::Error::other(failure) })
        });
        Assembled { peer, hash, serial, check, right }
    }
}

/// Starts the threads that verify; they end when the queue is dropped.
pub(crate) fn start_verifiers(done: &mpsc::Sender<Assembled>) -> std_mpsc::SyncSender<Work> {
    let (queue, works) = std_mpsc::sync_channel::<Work>(WORK_MAX);
    let works = Arc::new(Mutex::new(works));
    for _ in 0..VERIFIERS {
        let (works, done) = (Arc::clone(&works), done.clone());
        threads::watched("verifier", move || {
            while let Ok(work) = { works.lock().unwrap_or_else(PoisonError::into_inner).recv() } {
                if done.blocking_send(work.run()).is_err() {
                    break;
                }
            }
        });
    }
    queue
}
