//! The blob directory: one file a blob, named by its hash.
//!
//! A blob is written beside, made durable, then renamed into place; so a name is there only with all of its bytes.
//! Bytes are compared with their hash when they enter and again when they are read: disks rot.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use protocol::group_hashes::{GroupHashes, WrongGroups, group_count, group_length, group_offset, hash_group};
use protocol::{BlobRef, ContentHash};
use tracing::warn;

use crate::arriving::Partials;
use crate::disk::{Disk, DiskFile};
use crate::error::{StoreError, io_error, list};
use crate::index::{Index, IndexEntry};
use crate::quota::{Quota, Reservation};

/// Left free on a disk: this, or a twentieth of a smaller one.
const SPARE_BYTES: u64 = 2 << 30;

/// A file with its length.
type OpenFile = (Box<dyn DiskFile>, u64);

/// A store of blobs in one directory. Shared by threads; one process at a time (see [`crate::lock`]).
pub struct BlobStore {
    pub(crate) disk: Box<dyn Disk>,
    pub(crate) root: PathBuf,
    index: Index,
    /// Blobs whose files are being put into place, removed or set aside: one thread at a time for each, and others go on.
    moving: Mutex<HashSet<ContentHash>>,
    /// Told whenever one of them is where it belongs.
    moved: Condvar,
    /// Directories of blobs whose own names are durable, by their two digits.
    durable_dirs: [AtomicBool; 256],
    pub(crate) quota: Quota,
    next_temporary: AtomicU64,
    /// Grows with every blob that comes or goes.
    generation: AtomicU64,
    pub(crate) partials: Mutex<Partials>,
}

/// Whether a blob is new to the store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PutOutcome {
    /// It was written.
    Written,
    /// It was there.
    Present,
}

/// Counts of a store.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StoreStat {
    /// Blobs.
    pub blobs: u64,
    /// Their bytes, and those set aside for blobs on their way.
    pub bytes: u64,
    /// The quota in bytes.
    pub bytes_max: u64,
    /// Blobs that were found damaged and moved aside.
    pub quarantined: u64,
    /// Blobs that have not been verified since they were found here.
    pub unverified: u64,
    /// When the longest unverified of the others was verified, in milliseconds since 1970.
    pub oldest_verified_at_ms: u64,
    /// Bytes that the filesystem has left.
    pub disk_free_bytes: u64,
}

impl BlobStore {
    /// Opens the store under `root`, creating it where needed, and brings its index in line with the files.
    pub fn open(disk: Box<dyn Disk>, root: &Path, bytes_max: u64) -> Result<Self, StoreError> {
        let root = root.to_owned();
        for name in ["blobs", "incoming", "quarantine"] {
            let path = root.join(name);
            disk.create_dir_all(&path).map_err(|source| io_error("create", &path, source))?;
        }
        disk.sync_dir(&root).map_err(|source| io_error("sync", &root, source))?;
        let mut on_disk = BTreeMap::new();
        for prefix in 0..=u8::MAX {
            let dir = root.join("blobs").join(protocol::hash::to_hex(&[prefix]));
            let files = match disk.list(&dir) {
                Ok(files) => files,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(io_error("list", &dir, source)),
            };
            for (path, length) in files {
                match blob_name(&path) {
                    Some(hash) if *hash.as_bytes().first().expect("a hash has bytes") == prefix => drop(on_disk.insert(hash, length)),
                    _ => warn!(path = %path.display(), "a file that is not a blob lies among the blobs; left alone"),
                }
            }
        }
        let index = Index::open(&root.join("index"), &on_disk);
        let quota = Quota::new(on_disk.values().sum(), bytes_max);
        let partials = Mutex::new(Partials::find(&*disk, &root.join("incoming"), &quota)?);
        let (next_temporary, generation) = (AtomicU64::new(0), AtomicU64::new(0));
        Ok(Self {
            disk,
            root,
            index,
            moving: Mutex::default(),
            moved: Condvar::new(),
            durable_dirs: std::array::from_fn(|_| AtomicBool::new(false)),
            quota,
            next_temporary,
            generation,
            partials,
        })
    }

    /// Says whether the store has `hash`, as far as it knows: a read may still find it damaged.
    pub fn contains(&self, hash: &ContentHash) -> bool {
        self.index.get(hash).is_some()
    }

    /// The length of a blob.
    pub fn length(&self, hash: &ContentHash) -> Option<u64> {
        self.index.get(hash).map(|entry| entry.length)
    }

    /// Every blob, by hash.
    pub fn list(&self) -> Vec<BlobRef> {
        self.index.entries().into_iter().map(|(hash, entry)| BlobRef { hash, length: entry.length }).collect()
    }

    /// Hashes and writes bytes that we made ourselves.
    pub fn put(&self, bytes: &[u8], now_ms: u64) -> Result<(BlobRef, PutOutcome), StoreError> {
        let blob = BlobRef::of(bytes);
        if self.length(&blob.hash) == Some(blob.length) {
            return Ok((blob, PutOutcome::Present));
        }
        let mut writer = self.writer(blob)?;
        writer.write(bytes)?;
        let outcome = writer.finish(now_ms)?;
        Ok((blob, outcome))
    }

    /// Starts writing a blob whose hash and length are known: room is set aside before the first byte.
    pub fn writer(&self, blob: BlobRef) -> Result<BlobWriter<'_>, StoreError> {
        let reservation = self.reserve(blob.length)?;
        self.check_space(blob.length)?;
        let number = self.next_temporary.fetch_add(1, Ordering::Relaxed);
        let path = self.root.join("incoming").join(format!("{}.{number}", blob.hash.to_hex()));
        let file = self.disk.create_new(&path).map_err(|source| io_error("create", &path, source))?;
        Ok(BlobWriter {
            store: self,
            blob,
            path: Some(path),
            file,
            hasher: blake3::Hasher::new(),
            written: 0,
            reservation: Some(reservation),
        })
    }

    /// Sets room aside, that of blobs whose arrival was broken off and which nobody has taken up if there is no other.
    pub(crate) fn reserve(&self, bytes: u64) -> Result<Reservation, StoreError> {
        loop {
            match self.quota.reserve(bytes) {
                Ok(reservation) => return Ok(reservation),
                Err(left) if !self.drop_idle_partial()? => {
                    return Err(StoreError::QuotaExceeded { wanted: bytes, left, bytes_max: self.quota.bytes_max() });
                }
                Err(_) => {}
            }
        }
    }

    /// Counts bytes that lie beside the blobs against the quota.
    pub fn count_elsewhere(&self, bytes: u64) {
        self.quota.count_elsewhere(bytes);
    }

    /// Bytes that still fit.
    pub fn bytes_left(&self) -> u64 {
        self.quota.left()
    }

    /// A number that grows with every blob that comes or goes.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Refuses to fill the disk to the brim: other programs live on it, and so does the index.
    pub(crate) fn check_space(&self, wanted: u64) -> Result<(), StoreError> {
        let space = self.disk.space(&self.root).map_err(|source| io_error("measure", &self.root, source))?;
        let spare = (space.total / 20).min(SPARE_BYTES);
        // Some filesystems do not say how large they are; they say soon enough when they are full.
        if space.total == 0 || space.free >= wanted.saturating_add(spare) {
            return Ok(());
        }
        Err(StoreError::DiskFull { path: self.root.display().to_string(), source: io::ErrorKind::StorageFull.into() })
    }

    /// Reads a whole blob into a buffer of its length and verifies it. A damaged one goes into quarantine.
    pub fn read_into(&self, hash: &ContentHash, buffer: &mut [u8], now_ms: u64) -> Result<bool, StoreError> {
        let Some((file, length)) = self.open_file(hash)? else { return Ok(false) };
        if buffer.len() as u64 != length {
            // Of a damaged file the length is wrong, too; of a sound one it is the caller's that is.
            self.reader(hash, now_ms)?;
            return Err(StoreError::WrongBytes { expected: *hash, length: buffer.len() as u64, found: length });
        }
        let read = file.read_exact_at(buffer, 0);
        let matches = read.is_ok() && ContentHash::of(buffer) == *hash;
        self.judge(hash, length, read, matches, now_ms)?;
        Ok(true)
    }

    /// The same, in one piece and past the page cache where the filesystem can: `pages` are whole pages, on page borders, that the
    /// blob's `length` bytes fit into.
    pub fn read_pages(&self, hash: &ContentHash, pages: &mut [u8], length: usize, now_ms: u64) -> Result<bool, StoreError> {
        let Some((file, found)) = self.open_as(hash, |disk, path| disk.open_uncached(path))? else { return Ok(false) };
        if length as u64 != found {
            self.reader(hash, now_ms)?;
            return Err(StoreError::WrongBytes { expected: *hash, length: length as u64, found });
        }
        let read = file.read_pages(pages);
        let matches = read.as_ref().is_ok_and(|&read| read == length) && ContentHash::of(&pages[..length]) == *hash;
        self.judge(hash, found, read.map(drop), matches, now_ms)?;
        Ok(true)
    }

    /// Reads a whole blob and verifies it. A damaged one goes into quarantine.
    pub fn read(&self, hash: &ContentHash, now_ms: u64) -> Result<Option<Vec<u8>>, StoreError> {
        let Some(length) = self.length(hash) else { return Ok(None) };
        let mut bytes = vec![0; usize::try_from(length).expect("blobs fit into memory")];
        Ok(self.read_into(hash, &mut bytes, now_ms)?.then_some(bytes))
    }

    /// Opens a blob for reading in ranges. It is verified once, now, without being held in memory.
    pub fn reader(&self, hash: &ContentHash, now_ms: u64) -> Result<Option<BlobReader>, StoreError> {
        let Some((file, length)) = self.open_file(hash)? else { return Ok(None) };
        let (read, groups, matches) = match groups_of(&*file, BlobRef { hash: *hash, length }) {
            Ok(Some(Ok(groups))) => (Ok(()), Some(groups), true),
            Ok(Some(Err(_))) => (Ok(()), None, false),
            Ok(None) => match hash_of(&*file, length) {
                Ok(found) => (Ok(()), None, found == *hash),
                Err(error) => (Err(error), None, false),
            },
            Err(error) => (Err(error), None, false),
        };
        self.judge(hash, length, read, matches, now_ms)?;
        Ok(Some(BlobReader { file, length, groups }))
    }

    /// Removes a blob; says whether it was there.
    pub fn remove(&self, hash: &ContentHash) -> Result<bool, StoreError> {
        let _alone = self.alone(hash);
        let Some(entry) = self.index.get(hash) else { return Ok(false) };
        let path = self.path(hash);
        match self.disk.remove(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(io_error("remove", &path, source)),
        }
        self.index.remove(hash);
        self.quota.release(entry.length);
        self.generation.fetch_add(1, Ordering::Release);
        Ok(true)
    }

    /// Makes the index durable; the blobs are already.
    pub fn flush(&self) {
        self.index.flush();
    }

    /// Counts what is here.
    pub fn stat(&self) -> Result<StoreStat, StoreError> {
        let quarantined = list(&*self.disk, &self.root.join("quarantine"))?.len() as u64;
        let disk_free_bytes = self.disk.space(&self.root).map_err(|source| io_error("measure", &self.root, source))?.free;
        let entries = self.index.entries();
        let (verified, unverified): (Vec<_>, Vec<_>) = entries.iter().map(|(_, entry)| entry.verified_at_ms).partition(|&at| at > 0);
        Ok(StoreStat {
            blobs: (verified.len() + unverified.len()) as u64,
            bytes: self.quota.used(),
            bytes_max: self.quota.bytes_max(),
            quarantined,
            unverified: unverified.len() as u64,
            oldest_verified_at_ms: verified.into_iter().min().unwrap_or(0),
            disk_free_bytes,
        })
    }

    /// Blobs with the time of their last verification, the longest unverified first.
    pub(crate) fn by_age(&self) -> Vec<(ContentHash, IndexEntry)> {
        let mut blobs = self.index.entries();
        blobs.sort_by_key(|(_, entry)| entry.verified_at_ms);
        blobs
    }

    fn path(&self, hash: &ContentHash) -> PathBuf {
        let hex = hash.to_hex();
        self.root.join("blobs").join(&hex[..2]).join(hex)
    }

    fn open_file(&self, hash: &ContentHash) -> Result<Option<OpenFile>, StoreError> {
        self.open_as(hash, |disk, path| disk.open(path))
    }

    fn open_as(
        &self,
        hash: &ContentHash,
        open: impl Fn(&dyn Disk, &Path) -> io::Result<Box<dyn DiskFile>>,
    ) -> Result<Option<OpenFile>, StoreError> {
        let Some(entry) = self.index.get(hash) else { return Ok(None) };
        let path = self.path(hash);
        match open(&*self.disk, &path).and_then(|file| file.length().map(|length| (file, length))) {
            Ok((file, length)) if length == entry.length => Ok(Some((file, length))),
            Ok(_) => {
                self.quarantine(hash)?;
                Err(StoreError::Damaged { hash: *hash })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // Alone: a writer may have put it back since, or somebody is removing it.
                let _alone = self.alone(hash);
                let gone = || self.disk.open(&path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
                if self.index.get(hash).is_some() && gone() {
                    warn!(%hash, "a blob has gone from the disk; struck out of the index");
                    self.strike_out(hash);
                }
                Ok(None)
            }
            Err(source) => Err(io_error("open", &path, source)),
        }
    }

    /// Records a successful verification; puts what failed it into quarantine, unless it could not even be read.
    fn judge(&self, hash: &ContentHash, length: u64, read: io::Result<()>, matches: bool, now_ms: u64) -> Result<(), StoreError> {
        if matches {
            self.index.update(*hash, IndexEntry { length, verified_at_ms: now_ms });
            return Ok(());
        }
        match read {
            Err(source) if source.kind() != io::ErrorKind::UnexpectedEof => Err(io_error("read", &self.path(hash), source)),
            _ => {
                self.quarantine(hash)?;
                Err(StoreError::Damaged { hash: *hash })
            }
        }
    }

    /// Moves a damaged blob aside, unless a sound one has taken its place since it was read.
    fn quarantine(&self, hash: &ContentHash) -> Result<(), StoreError> {
        let path = self.path(hash);
        let _alone = self.alone(hash);
        if self.matches(&path, hash) {
            return Ok(());
        }
        match self.disk.rename(&path, &self.root.join("quarantine").join(hash.to_hex())) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(io_error("quarantine", &path, source)),
        }
        self.strike_out(hash);
        Ok(())
    }

    fn matches(&self, path: &Path, hash: &ContentHash) -> bool {
        let Ok(file) = self.disk.open(path) else { return false };
        let Ok(length) = file.length() else { return false };
        hash_of(&*file, length).is_ok_and(|found| found == *hash)
    }

    fn strike_out(&self, hash: &ContentHash) {
        if let Some(entry) = self.index.remove(hash) {
            self.quota.release(entry.length);
            self.generation.fetch_add(1, Ordering::Release);
        }
    }

    /// Gives a file that was made durable its blob's name, and makes that durable. The file stays where it is if the blob is there.
    pub(crate) fn put_into_place(&self, blob: BlobRef, path: &Path, now_ms: u64) -> Result<PutOutcome, StoreError> {
        let BlobRef { hash, length } = blob;
        let target = self.path(&hash);
        let dir = target.parent().expect("blobs lie in a directory");
        self.disk.create_dir_all(dir).map_err(|source| io_error("create", dir, source))?;
        // Of two writers of one blob the second waits and sees the first. Readers find it absent until its name is durable.
        let _alone = self.alone(&hash);
        match self.index.get(&hash) {
            Some(entry) if entry.length == length => return Ok(PutOutcome::Present),
            Some(_) => self.strike_out(&hash), // a damaged one, which the rename replaces
            None => {}
        }
        self.disk.rename(path, &target).map_err(|source| io_error("rename", path, source))?;
        if let Err(source) = self.sync_dirs(&hash, dir) {
            // Not durable, so not acknowledged: a name that might vanish must not be relied on.
            let _ = self.disk.remove(&target);
            return Err(io_error("sync", dir, source));
        }
        self.index.insert(hash, IndexEntry { length, verified_at_ms: now_ms });
        self.generation.fetch_add(1, Ordering::Release);
        Ok(PutOutcome::Written)
    }

    /// Makes the names in a directory of blobs durable, and its own name, if it is not yet.
    fn sync_dirs(&self, hash: &ContentHash, dir: &Path) -> io::Result<()> {
        let is_durable = &self.durable_dirs[usize::from(hash.as_bytes()[0])];
        self.disk.sync_dir(dir)?;
        if !is_durable.load(Ordering::Acquire) {
            self.disk.sync_dir(&self.root.join("blobs"))?;
            is_durable.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Waits until nobody else moves a blob's file; others wait until the guard is dropped.
    fn alone(&self, hash: &ContentHash) -> Alone<'_> {
        let lock = self.moving.lock().unwrap_or_else(PoisonError::into_inner);
        let mut moving = self.moved.wait_while(lock, |moving| moving.contains(hash)).unwrap_or_else(PoisonError::into_inner);
        moving.insert(*hash);
        Alone { store: self, hash: *hash }
    }

    /// Throws away what was found damaged; returns how many files.
    pub fn clear_quarantine(&self) -> Result<usize, StoreError> {
        let files = list(&*self.disk, &self.root.join("quarantine"))?;
        for (path, _) in &files {
            self.disk.remove(path).map_err(|source| io_error("remove", path, source))?;
        }
        Ok(files.len())
    }
}

/// The right to move a blob's file.
struct Alone<'a> {
    store: &'a BlobStore,
    hash: ContentHash,
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.store.moving.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.hash);
        self.store.moved.notify_all();
    }
}

/// A blob on its way into the store. Dropped before [`finish`](Self::finish), it leaves nothing behind.
pub struct BlobWriter<'a> {
    store: &'a BlobStore,
    blob: BlobRef,
    path: Option<PathBuf>, // nothing once renamed
    file: Box<dyn DiskFile>,
    hasher: blake3::Hasher,
    written: u64,
    reservation: Option<Reservation>,
}

impl BlobWriter<'_> {
    /// Appends bytes; refuses to go beyond the promised length.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.written += bytes.len() as u64;
        if self.written > self.blob.length {
            return Err(self.wrong_bytes());
        }
        self.hasher.update(bytes);
        self.file.write_all(bytes).map_err(|source| io_error("write", &self.store.root, source))
    }

    /// Verifies, makes durable and puts into place: when this returns, the blob stays.
    pub fn finish(mut self, now_ms: u64) -> Result<PutOutcome, StoreError> {
        if self.written != self.blob.length || self.hasher.finalize().as_bytes() != self.blob.hash.as_bytes() {
            return Err(self.wrong_bytes());
        }
        self.file.sync().map_err(|source| io_error("sync", &self.store.root, source))?;
        let path = self.path.as_ref().expect("set until renamed");
        let outcome = self.store.put_into_place(self.blob, path, now_ms)?;
        if outcome == PutOutcome::Written {
            self.path = None;
            if let Some(reservation) = self.reservation.take() {
                reservation.keep();
            }
        }
        Ok(outcome)
    }

    fn wrong_bytes(&self) -> StoreError {
        StoreError::WrongBytes { expected: self.blob.hash, length: self.blob.length, found: self.written }
    }
}

impl Drop for BlobWriter<'_> {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = self.store.disk.remove(path);
        }
    }
}

/// A verified blob, open for reading in ranges.
pub struct BlobReader {
    file: Box<dyn DiskFile>,
    length: u64,
    groups: Option<GroupHashes>, // nothing of a blob too large for it
}

impl BlobReader {
    /// Its length in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The hashes of its groups, which fold to its own.
    pub fn groups(&self) -> Option<&GroupHashes> {
        self.groups.as_ref()
    }

    /// Reads a group and verifies it; nothing when there is none, or when it is no longer what it was.
    pub fn read_group(&self, group: u32) -> io::Result<Option<Vec<u8>>> {
        let Some(check) = self.groups.as_ref().and_then(|groups| groups.check(group)) else { return Ok(None) };
        let mut bytes = vec![0; group_length(self.length, group) as usize];
        self.file.read_exact_at(&mut bytes, group_offset(group))?;
        Ok(check.matches(&bytes).then_some(bytes))
    }

    /// Fills `buffer` from `offset` on.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }
}

/// Hashes the groups of a file, and says whether they are those of `blob`; nothing of one that has too many.
fn groups_of(file: &dyn DiskFile, blob: BlobRef) -> io::Result<Option<Result<GroupHashes, WrongGroups>>> {
    let Some(count) = group_count(blob.length) else { return Ok(None) };
    let mut buffer = vec![0; group_length(blob.length, 0) as usize];
    let mut hashes = Vec::with_capacity(count as usize);
    for group in 0..count {
        let part = &mut buffer[..group_length(blob.length, group) as usize];
        file.read_exact_at(part, group_offset(group))?;
        hashes.push(hash_group(blob.length, group, part));
    }
    Ok(Some(GroupHashes::new(blob, hashes)))
}

/// Hashes a file without holding it in memory.
fn hash_of(file: &dyn DiskFile, length: u64) -> io::Result<ContentHash> {
    const PART_BYTES: u64 = 1 << 20;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; PART_BYTES.min(length) as usize];
    let mut at = 0;
    while at < length {
        let part = &mut buffer[..(length - at).min(PART_BYTES) as usize];
        file.read_exact_at(part, at)?;
        hasher.update(part);
        at += part.len() as u64;
    }
    Ok(ContentHash::from_bytes(*hasher.finalize().as_bytes()))
}

fn blob_name(path: &Path) -> Option<ContentHash> {
    path.file_name()?.to_str()?.parse().ok().filter(|hash: &ContentHash| path.ends_with(hash.to_hex()))
}

#[cfg(test)]
#[path = "blob_store_tests.rs"]
pub(crate) mod tests;
