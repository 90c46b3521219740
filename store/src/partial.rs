//! Blobs whose groups arrive one by one, from whomever, and whose arrival may be broken off and taken up again.
//!
//! In `incoming/` lie the blob's file, of full length from the beginning, and beside it a log: the hashes of its groups, then the
//! number of each group once it is there. Nothing is written that does not match its hash, and what the log says is there is
//! verified when it is taken up again; so the log need not be durable, and a torn end of it costs a group.
//!
//! The finished blob is not hashed once more as a whole. Every byte of the file belongs to one group; each group was compared,
//! by this process, with a list that folds to the blob's hash, in memory before it was written or on the disk when it was taken
//! up; no group is written twice; and a write that the disk did not carry out is reported by the sync before the rename.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use protocol::BlobRef;
use protocol::group_hashes::{GroupCheck, GroupHashes, group_count, group_length, group_offset};
use tracing::warn;

use crate::arriving::{Partials, file_path, log_path};
use crate::blob_store::{BlobStore, PutOutcome};
use crate::disk::{Disk, DiskFile};
use crate::error::{StoreError, io_error};
use crate::quota::Reservation;

const MAGIC: &[u8; 4] = b"CFPG";
/// Magic, length of the blob; then 32 bytes a group, then 4 bytes a group that is there.
const HEAD_BYTES: u64 = 4 + 8;

/// A blob on its way into the store, group by group. Dropped before [`finish`](Self::finish), it leaves what has arrived.
pub struct PartialBlob {
    store: Arc<BlobStore>,
    blob: BlobRef,
    file: Box<dyn DiskFile>,
    state: Mutex<State>,
}

struct State {
    hashes: Option<GroupHashes>,
    log: Option<Box<dyn DiskFile>>,
    log_end: u64,
    here: BTreeSet<u32>,
    reservation: Option<Reservation>,
    finished: bool,
}

impl BlobStore {
    /// Begins or takes up the arrival of a blob, one at a time for each: room for all of it is set aside before the first byte.
    pub fn partial(self: &Arc<Self>, blob: BlobRef) -> Result<PartialBlob, StoreError> {
        let left_over = match self.partials().0.insert(blob.hash, None) {
            Some(None) => return Err(StoreError::Arriving { hash: blob.hash }),
            Some(Some(reservation)) => Some(reservation),
            None => None,
        };
        let opened = self.open_partial(blob, left_over);
        if opened.is_err() {
            self.partials().0.remove(&blob.hash);
        }
        opened
    }

    fn open_partial(self: &Arc<Self>, blob: BlobRef, left_over: Option<Reservation>) -> Result<PartialBlob, StoreError> {
        let taken_up = left_over.and_then(|reservation| Some((self.take_up(blob)?, reservation)));
        let (file, state) = match taken_up {
            Some(((file, state), reservation)) => (file, State { reservation: Some(reservation), ..state }),
            None => self.begin(blob)?,
        };
        Ok(PartialBlob { store: Arc::clone(self), blob, file, state: Mutex::new(state) })
    }

    fn begin(&self, blob: BlobRef) -> Result<(Box<dyn DiskFile>, State), StoreError> {
        let incoming = self.root.join("incoming");
        let reservation = self.reserve(blob.length)?;
        self.check_space(blob.length)?;
        let path = file_path(&incoming, &blob.hash);
        for stale in [&path, &log_path(&incoming, &blob.hash)] {
            remove(&*self.disk, stale)?;
        }
        let file = self.disk.create_new(&path).map_err(|source| io_error("create", &path, source))?;
        if let Err(source) = file.allocate(blob.length) {
            let _ = self.disk.remove(&path);
            return Err(io_error("make room in", &path, source));
        }
        let state = State {
            hashes: GroupHashes::of_single(blob),
            log: None,
            log_end: 0,
            here: BTreeSet::new(),
            reservation: Some(reservation),
            finished: false,
        };
        Ok((file, state))
    }

    /// Opens what an earlier time left of a blob, and verifies it; nothing when it cannot be read.
    fn take_up(&self, blob: BlobRef) -> Option<(Box<dyn DiskFile>, State)> {
        let incoming = self.root.join("incoming");
        let file = self.disk.open_writable(&file_path(&incoming, &blob.hash)).ok()?;
        let log = self.disk.open_writable(&log_path(&incoming, &blob.hash)).ok()?;
        if file.length().ok()? != blob.length {
            return None;
        }
        let (hashes, claimed, log_end) = read_log(&*log, blob).ok()??;
        let mut buffer = vec![0; group_length(blob.length, 0) as usize];
        let mut is_here = |group: &u32| {
            let part = &mut buffer[..group_length(blob.length, *group) as usize];
            let read = file.read_exact_at(part, group_offset(*group));
            read.is_ok() && hashes.check(*group).is_some_and(|check| check.matches(part))
        };
        let here: BTreeSet<_> = claimed.into_iter().filter(|group| is_here(group)).collect();
        Some((file, State { hashes: Some(hashes), log: Some(log), log_end, here, reservation: None, finished: false }))
    }

    /// Gives up one of the blobs whose arrival was broken off; says whether there was any.
    pub(crate) fn drop_idle_partial(&self) -> Result<bool, StoreError> {
        let mut partials = self.partials();
        let Some(hash) = partials.0.iter().find(|(_, reservation)| reservation.is_some()).map(|(hash, _)| *hash) else {
            return Ok(false);
        };
        let incoming = self.root.join("incoming");
        remove(&*self.disk, &log_path(&incoming, &hash))?;
        remove(&*self.disk, &file_path(&incoming, &hash))?;
        partials.0.remove(&hash);
        Ok(true)
    }

    fn partials(&self) -> MutexGuard<'_, Partials> {
        self.partials.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PartialBlob {
    /// The blob.
    pub fn blob(&self) -> BlobRef {
        self.blob
    }

    /// The groups that are there, and the hashes of all if they are known.
    pub fn here(&self) -> (Option<GroupHashes>, Vec<u32>) {
        let state = self.state();
        (state.hashes.clone(), state.here.iter().copied().collect())
    }

    /// Takes the hashes of the groups: from now on, what arrives outlives this process.
    pub fn set_hashes(&self, hashes: &GroupHashes) -> Result<(), StoreError> {
        let mut state = self.state();
        if hashes.blob() != self.blob || state.log.is_some() {
            return Ok(());
        }
        let path = log_path(&self.store.root.join("incoming"), &self.blob.hash);
        let head = [&MAGIC[..], &self.blob.length.to_le_bytes(), hashes.hashes().as_flattened()].concat();
        let mut log = self.store.disk.create_new(&path).map_err(|source| io_error("create", &path, source))?;
        log.write_all(&head).map_err(|source| io_error("write", &path, source))?;
        (state.log, state.log_end, state.hashes) = (Some(log), head.len() as u64, Some(hashes.clone()));
        Ok(())
    }

    /// Compares a group with its hash and writes it; says whether it was right. One that is wrong is not written.
    pub fn write_group(&self, check: &GroupCheck, bytes: &[u8]) -> Result<bool, StoreError> {
        let expected = self.state().hashes.as_ref().and_then(|hashes| hashes.check(check.group));
        if expected != Some(*check) || !check.matches(bytes) {
            return Ok(false);
        }
        if self.state().here.contains(&check.group) {
            return Ok(true);
        }
        let written = self.file.write_all_at(bytes, group_offset(check.group));
        written.map_err(|source| io_error("write", &self.store.root, source))?;
        let mut state = self.state();
        if state.here.insert(check.group)
            && let Some(log) = &state.log
        {
            let logged = log.write_all_at(&check.group.to_le_bytes(), state.log_end);
            logged.map_err(|source| io_error("write", &self.store.root, source))?;
            state.log_end += 4;
        }
        Ok(true)
    }

    /// Makes the blob durable and puts it into place; refuses while groups are missing. Its log goes when this is dropped.
    pub fn finish(&self, now_ms: u64) -> Result<PutOutcome, StoreError> {
        let BlobRef { hash, length } = self.blob;
        let found = self.state().here.iter().map(|group| group_length(length, *group)).sum();
        if group_count(length).is_none_or(|count| self.state().here.len() != count as usize) {
            return Err(StoreError::WrongBytes { expected: hash, length, found });
        }
        let store = &self.store;
        let incoming = store.root.join("incoming");
        self.file.sync().map_err(|source| io_error("sync", &store.root, source))?;
        let outcome = store.put_into_place(self.blob, &file_path(&incoming, &hash), now_ms)?;
        let mut state = self.state();
        state.finished = true;
        if outcome == PutOutcome::Written
            && let Some(reservation) = state.reservation.take()
        {
            reservation.keep();
        }
        drop(state);
        Ok(outcome)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for PartialBlob {
    /// Leaves what can be taken up again, and nothing else.
    fn drop(&mut self) {
        let hash = self.blob.hash;
        let incoming = self.store.root.join("incoming");
        let mut state = self.state();
        let worth_keeping = !state.finished && state.log.is_some() && !state.here.is_empty();
        let reservation = state.reservation.take();
        drop(state);
        let mut partials = self.store.partials();
        if worth_keeping && reservation.is_some() {
            partials.0.insert(hash, reservation);
            return;
        }
        for path in [log_path(&incoming, &hash), file_path(&incoming, &hash)] {
            if let Err(error) = remove(&*self.store.disk, &path) {
                warn!(%hash, %error, "a file stays in incoming until the next start");
            }
        }
        partials.0.remove(&hash);
    }
}

/// Reads a log: the hashes, the groups that it claims are there, and where it ends; nothing when it is not one of `blob`.
fn read_log(log: &dyn DiskFile, blob: BlobRef) -> io::Result<Option<(GroupHashes, Vec<u32>, u64)>> {
    let Some(count) = group_count(blob.length).map(u64::from) else { return Ok(None) };
    let entries_at = HEAD_BYTES + 32 * count;
    let length = log.length()?;
    // Each group is logged once; what is longer than that is no log of ours.
    if length < entries_at || length > entries_at + 8 * count {
        return Ok(None);
    }
    let mut bytes = vec![0; length as usize];
    log.read_exact_at(&mut bytes, 0)?;
    let (head, entries) = bytes.split_at(entries_at as usize);
    let Some(hashes) = head.strip_prefix(MAGIC).and_then(|head| head.strip_prefix(&blob.length.to_le_bytes())) else { return Ok(None) };
    let Ok(hashes) = GroupHashes::new(blob, hashes.as_chunks().0.to_vec()) else { return Ok(None) };
    // Four bytes at a time: a torn end is written over.
    let (entries, _) = entries.as_chunks::<4>();
    let groups = entries.iter().map(|entry| u32::from_le_bytes(*entry)).filter(|&group| u64::from(group) < count);
    Ok(Some((hashes, groups.collect(), entries_at + 4 * entries.len() as u64)))
}

fn remove(disk: &dyn Disk, path: &Path) -> Result<(), StoreError> {
    match disk.remove(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path, source)),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[path = "partial_tests.rs"]
mod tests;
