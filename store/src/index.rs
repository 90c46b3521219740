//! What is known of each blob beside its bytes: its length and when it was last verified.
//!
//! Kept in sled and in memory. Everything in it can be rebuilt from the blob directory, and is, whenever sled cannot be
//! trusted; so no error of sled's is ever an error of the store's.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use protocol::ContentHash;
use tracing::warn;

/// What is known of a blob.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IndexEntry {
    /// Its length in bytes.
    pub length: u64,
    /// When its bytes last matched its hash, in milliseconds since 1970; 0 when that is not known.
    pub verified_at_ms: u64,
}

impl IndexEntry {
    fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.length.to_le_bytes());
        bytes[8..].copy_from_slice(&self.verified_at_ms.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (length, verified_at_ms) = <[u8; 16]>::try_from(bytes).ok()?.split_first_chunk::<8>().map(|(a, b)| (*a, b.to_vec()))?;
        Some(Self { length: u64::from_le_bytes(length), verified_at_ms: u64::from_le_bytes(verified_at_ms.try_into().ok()?) })
    }
}

/// The index of a blob directory. Shared by threads; nobody who looks something up waits for the disk.
#[derive(Debug)]
pub struct Index {
    /// Locked for as long as a look-up takes, never over sled's work.
    entries: RwLock<BTreeMap<ContentHash, IndexEntry>>,
    /// Nothing when sled cannot be used; the entries in memory serve all the same.
    tree: RwLock<Option<sled::Db>>,
}

impl Index {
    /// Opens the index at `path` and makes it agree with `on_disk`, the blobs that are there and their lengths.
    pub fn open(path: &Path, on_disk: &BTreeMap<ContentHash, u64>) -> Self {
        let (tree, known) = match open_tree(path) {
            Some((tree, known)) => (Some(tree), known),
            None => (None, BTreeMap::new()),
        };
        let index = Self { entries: RwLock::default(), tree: RwLock::new(tree) };
        for (&hash, &length) in on_disk {
            match known.get(&hash) {
                Some(entry) if entry.length == length => drop(index.write().insert(hash, *entry)),
                _ => index.insert(hash, IndexEntry { length, verified_at_ms: 0 }),
            }
        }
        for gone in known.keys().filter(|hash| !on_disk.contains_key(hash)) {
            index.forget_in_tree(gone);
        }
        index
    }

    /// What is known of `hash`.
    pub fn get(&self, hash: &ContentHash) -> Option<IndexEntry> {
        self.read().get(hash).copied()
    }

    /// Every blob, by hash, as it is now.
    pub fn entries(&self) -> Vec<(ContentHash, IndexEntry)> {
        self.read().iter().map(|(hash, entry)| (*hash, *entry)).collect()
    }

    /// Enters a blob.
    pub fn insert(&self, hash: ContentHash, entry: IndexEntry) {
        self.write().insert(hash, entry);
        self.in_tree(|tree| tree.insert(hash.as_bytes(), &entry.to_bytes()).map(drop));
    }

    /// Enters what is newly known of a blob, unless it has gone.
    pub fn update(&self, hash: ContentHash, entry: IndexEntry) {
        let here = self.write().get_mut(&hash).map(|known| *known = entry).is_some();
        // If it goes meanwhile, its row stays behind: the next start strikes out rows without a file.
        if here {
            self.in_tree(|tree| tree.insert(hash.as_bytes(), &entry.to_bytes()).map(drop));
        }
    }

    /// Strikes a blob out.
    pub fn remove(&self, hash: &ContentHash) -> Option<IndexEntry> {
        let removed = self.write().remove(hash);
        self.forget_in_tree(hash);
        removed
    }

    /// Makes the entries durable. Losing the latest costs a rebuild, nothing else.
    pub fn flush(&self) {
        self.in_tree(|tree| tree.flush().map(drop));
    }

    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<ContentHash, IndexEntry>> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, BTreeMap<ContentHash, IndexEntry>> {
        self.entries.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget_in_tree(&self, hash: &ContentHash) {
        self.in_tree(|tree| tree.remove(hash.as_bytes()).map(drop));
    }

    /// Does something with sled, which several threads may do at a time: its own locks are enough.
    fn in_tree(&self, action: impl FnOnce(&sled::Db) -> sled::Result<()>) {
        let tree = self.tree.read().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(tree) = tree else { return };
        if let Err(reason) = guarded(|| action(&tree)) {
            warn!(reason, "index cannot be written; it will be rebuilt at the next start");
            *self.tree.write().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }
}

/// Opens sled with a second and a third try: without its snapshots, then anew beside the damaged one, which is removed.
fn open_tree(path: &Path) -> Option<(sled::Db, BTreeMap<ContentHash, IndexEntry>)> {
    let attempts: [fn(&Path); 3] =
        [|_| {}, remove_snapshots, |path| drop(std::fs::remove_dir_all(path).or_else(|_| std::fs::remove_file(path)))];
    for prepare in attempts {
        prepare(path);
        match guarded(|| read_tree(path)) {
            Ok(opened) => return Some(opened),
            Err(reason) => warn!(path = %path.display(), reason, "index cannot be read; rebuilding it from the blobs"),
        }
    }
    None
}

fn read_tree(path: &Path) -> sled::Result<(sled::Db, BTreeMap<ContentHash, IndexEntry>)> {
    let tree = sled::Config::new().path(path).cache_capacity(4 << 20).flush_every_ms(None).open()?;
    let mut known = BTreeMap::new();
    for row in tree.iter() {
        let (key, value) = row?;
        // A row that makes no sense is as good as none: the blob directory fills it in again.
        if let (Ok(key), Some(entry)) = (<[u8; 32]>::try_from(&*key), IndexEntry::from_bytes(&value)) {
            known.insert(ContentHash::from_bytes(key), entry);
        }
    }
    Ok((tree, known))
}

fn remove_snapshots(path: &Path) {
    let Ok(files) = std::fs::read_dir(path) else { return };
    for file in files.flatten().filter(|file| file.file_name().to_string_lossy().starts_with("snap.")) {
        let _ = std::fs::remove_file(file.path());
    }
}

/// Runs something of sled's, which panics on some damage: a panic counts as an error.
fn guarded<T>(action: impl FnOnce() -> sled::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(action)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("sled panicked".to_owned()),
    }
}
