//! The store under faults: every failing call, damaged files, a damaged index, many threads at once.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use proptest::prelude::*;
use protocol::{BlobRef, ContentHash};

use super::*;
use crate::disk::{DiskFile, RealDisk, Space};
use crate::scrub::scrub;

pub(crate) const NOW: u64 = 1_700_000_000_000;
pub(crate) const PLENTY: u64 = 1 << 40;

pub(crate) fn open(root: &Path) -> BlobStore {
    BlobStore::open(Box::new(RealDisk), root, PLENTY).expect("the store opens")
}

fn content(i: usize) -> Vec<u8> {
    format!("blob {i} ").into_bytes().repeat(20 + i % 7)
}

pub(crate) fn files(root: &Path, dir: &str) -> Vec<PathBuf> {
    fn walk(path: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(path).expect("a directory").flatten() {
            if entry.path().is_dir() { walk(&entry.path(), found) } else { found.push(entry.path()) }
        }
    }
    let mut found = Vec::new();
    walk(&root.join(dir), &mut found);
    found
}

#[test]
fn keeps_what_it_acknowledged_over_a_restart() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store = open(dir.path());
    let (blob, outcome) = store.put(b"some bytes", NOW).expect("it fits");
    assert_eq!(outcome, PutOutcome::Written);
    assert_eq!(store.put(b"some bytes", NOW).expect("it is there"), (blob, PutOutcome::Present));
    drop(store);
    let store = open(dir.path());
    assert_eq!(store.read(&blob.hash, NOW).expect("readable").as_deref(), Some(&b"some bytes"[..]));
    assert_eq!(store.stat().expect("counted").bytes, 10);
    assert!(store.remove(&blob.hash).expect("removable"));
    assert!(!store.remove(&blob.hash).expect("removable"));
    assert_eq!((store.read(&blob.hash, NOW).expect("gone"), store.stat().expect("counted").bytes), (None, 0));
}

#[test]
fn refuses_bytes_that_are_not_those_of_the_hash() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store = open(dir.path());
    let blob = BlobRef::of(b"expected");
    for wrong in [&b"Expected"[..], b"expecte", b"expected!", b""] {
        let mut writer = store.writer(blob).expect("there is room");
        let result = writer.write(wrong).and_then(|()| writer.finish(NOW));
        assert!(matches!(result, Err(StoreError::WrongBytes { .. })), "{wrong:?}");
    }
    assert!(!store.contains(&blob.hash));
    assert_eq!((files(dir.path(), "incoming").len(), store.stat().expect("counted").bytes), (0, 0));
}

/// S6: one bit flipped in each of 1,000 blobs.
#[test]
fn scrub_finds_every_flipped_bit() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store = open(dir.path());
    for i in 0..1000 {
        store.put(&content(i), NOW).expect("it fits");
    }
    for (i, path) in files(dir.path(), "blobs").into_iter().enumerate() {
        let mut bytes = fs::read(&path).expect("a blob");
        let at = i * 31 % bytes.len();
        bytes[at] ^= 1 << (i % 8);
        fs::write(&path, bytes).expect("writable");
    }
    let report = scrub(&store, || NOW, |_| true);
    assert_eq!((report.verified, report.damaged.len()), (0, 1000));
    let stat = store.stat().expect("counted");
    assert_eq!((stat.blobs, stat.bytes, stat.quarantined), (0, 0, 1000));
    store.put(&content(5), NOW).expect("a damaged blob can be fetched again");
    assert_eq!(store.read(&ContentHash::of(&content(5)), NOW).expect("readable"), Some(content(5)));
}

/// S7: whatever is done to files, the store opens and never hands out other bytes.
#[test]
fn detects_every_kind_of_damaged_file() {
    type Damage = fn(&Path, &Path);
    let kinds: [(&str, Damage); 6] = [
        ("truncated", |a, _| fs::write(a, &fs::read(a).expect("a blob")[1..]).expect("writable")),
        ("emptied", |a, _| fs::write(a, b"").expect("writable")),
        ("padded", |a, _| fs::write(a, [&fs::read(a).expect("a blob")[..], b"\0"].concat()).expect("writable")),
        ("swapped", |a, b| {
            let (x, y) = (fs::read(a).expect("a blob"), fs::read(b).expect("a blob"));
            fs::write(a, y).and_then(|()| fs::write(b, x)).expect("writable");
        }),
        ("removed", |a, _| fs::remove_file(a).expect("removable")),
        ("directory removed", |a, _| fs::remove_dir_all(a.parent().expect("a directory")).expect("removable")),
    ];
    for reopened in [false, true] {
        for (kind, damage) in kinds {
            let dir = tempfile::tempdir().expect("a temporary directory");
            let mut store = open(dir.path());
            let [a, b] = [1, 8].map(|i| store.put(&content(i), NOW).expect("it fits").0);
            damage(&store.path(&a.hash), &store.path(&b.hash));
            if reopened {
                drop(store);
                store = open(dir.path());
            }
            for blob in [a, b] {
                // Once by the length that the caller expects, as the engine reads, and once by whatever is there.
                let mut buffer = vec![0; blob.length as usize];
                match store.read_into(&blob.hash, &mut buffer, NOW) {
                    Ok(true) => assert!(blob.matches(&buffer), "{kind}"),
                    Ok(false) | Err(StoreError::Damaged { .. }) => {}
                    Err(error) => panic!("{kind}: {error}"),
                }
                match store.read(&blob.hash, NOW) {
                    Ok(Some(bytes)) => assert!(blob.matches(&bytes), "{kind}"),
                    Ok(None) | Err(StoreError::Damaged { .. }) => {}
                    Err(error) => panic!("{kind}: {error}"),
                }
            }
            assert!(!store.contains(&a.hash), "{kind} went unnoticed");
            store.put(&content(1), NOW).expect("it can be written again");
            assert_eq!(store.read(&a.hash, NOW).expect("readable"), Some(content(1)), "{kind}");
        }
    }
}

/// S8: the index deleted, cut short or overwritten; the listing stays what the blobs are.
#[test]
fn rebuilds_a_deleted_truncated_or_overwritten_index() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store = open(dir.path());
    for i in 0..300 {
        store.put(&content(i), NOW).expect("it fits");
    }
    let listing = store.list();
    store.flush();
    drop(store);
    let damages: [fn(&Path); 5] = [
        |_| {},
        |index| fs::remove_dir_all(index).expect("removable"),
        |index| each_file(index, |bytes| bytes.truncate(bytes.len() / 2)),
        |index| each_file(index, |bytes| (0..4096.min(bytes.len())).for_each(|i| bytes[i] = (i * 37) as u8)),
        |index| {
            fs::remove_dir_all(index).expect("removable");
            fs::write(index, b"a file where a directory should be").expect("writable");
        },
    ];
    for (i, damage) in damages.into_iter().enumerate() {
        damage(&dir.path().join("index"));
        let store = open(dir.path());
        assert_eq!(store.list(), listing, "damage {i}");
        assert_eq!(store.read(&listing[7].hash, NOW).expect("readable").map(|bytes| BlobRef::of(&bytes)), Some(listing[7]));
        store.flush();
    }
}

/// S8: ten thousand blobs without an index.
#[test]
fn lists_ten_thousand_blobs_again_without_an_index() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    drop(open(dir.path()));
    let blobs: std::collections::BTreeSet<_> = (0..10_000).map(|i| BlobRef::of(&content(i)).hash).collect();
    for i in 0..10_000 {
        // Written past the store: ten thousand durable writes would measure the disk.
        let hex = ContentHash::of(&content(i)).to_hex();
        let prefix = dir.path().join("blobs").join(&hex[..2]);
        fs::create_dir_all(&prefix).and_then(|()| fs::write(prefix.join(hex), content(i))).expect("writable");
    }
    fs::remove_dir_all(dir.path().join("index")).expect("removable");
    let store = open(dir.path());
    let listed: std::collections::BTreeSet<_> = store.list().into_iter().map(|blob| blob.hash).collect();
    assert!(listed == blobs);
    assert_eq!(store.stat().expect("counted").unverified, 10_000);
}

fn each_file(dir: &Path, change: impl Fn(&mut Vec<u8>)) {
    for entry in fs::read_dir(dir).expect("a directory").flatten().filter(|entry| entry.path().is_file()) {
        let mut bytes = fs::read(entry.path()).expect("readable");
        change(&mut bytes);
        fs::write(entry.path(), bytes).expect("writable");
    }
}

/// A disk on which the n-th call fails: once, or that one and all after it.
pub(crate) struct FaultyDisk {
    pub(crate) countdown: Arc<AtomicI64>,
    pub(crate) fault: InjectedFault,
}

#[derive(Clone, Copy)]
pub(crate) struct InjectedFault {
    pub(crate) kind: io::ErrorKind,
    pub(crate) sticky: bool,
    pub(crate) short_write: bool,
}

struct FaultyFile {
    inner: Box<dyn DiskFile>,
    countdown: Arc<AtomicI64>,
    fault: InjectedFault,
}

fn strike(countdown: &AtomicI64, fault: InjectedFault) -> io::Result<()> {
    let left = countdown.fetch_sub(1, Ordering::SeqCst);
    if left == 0 || (left < 0 && fault.sticky) { Err(fault.kind.into()) } else { Ok(()) }
}

impl Disk for FaultyDisk {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        strike(&self.countdown, self.fault).and_then(|()| RealDisk.create_dir_all(path))
    }
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        strike(&self.countdown, self.fault)?;
        Ok(Box::new(FaultyFile { inner: RealDisk.create_new(path)?, countdown: Arc::clone(&self.countdown), fault: self.fault }))
    }
    fn open_writable(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        strike(&self.countdown, self.fault)?;
        Ok(Box::new(FaultyFile { inner: RealDisk.open_writable(path)?, countdown: Arc::clone(&self.countdown), fault: self.fault }))
    }
    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        strike(&self.countdown, self.fault)?;
        Ok(Box::new(FaultyFile { inner: RealDisk.open(path)?, countdown: Arc::clone(&self.countdown), fault: self.fault }))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        strike(&self.countdown, self.fault).and_then(|()| RealDisk.rename(from, to))
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        strike(&self.countdown, self.fault).and_then(|()| RealDisk.sync_dir(path))
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        strike(&self.countdown, self.fault).and_then(|()| RealDisk.remove(path))
    }
    fn list(&self, path: &Path) -> io::Result<Vec<(PathBuf, u64)>> {
        strike(&self.countdown, self.fault).and_then(|()| RealDisk.list(path))
    }
    fn space(&self, path: &Path) -> io::Result<Space> {
        strike(&self.countdown, self.fault).and_then(|()| RealDisk.space(path))
    }
}

impl DiskFile for FaultyFile {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        strike(&self.countdown, self.fault).or_else(|error| {
            if self.fault.short_write {
                self.inner.write_all(&bytes[..bytes.len() / 2])?;
            }
            Err(error)
        })?;
        self.inner.write_all(bytes)
    }
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        strike(&self.countdown, self.fault).or_else(|error| {
            if self.fault.short_write {
                self.inner.write_all_at(&bytes[..bytes.len() / 2], offset)?;
            }
            Err(error)
        })?;
        self.inner.write_all_at(bytes, offset)
    }
    fn allocate(&self, length: u64) -> io::Result<()> {
        strike(&self.countdown, self.fault).and_then(|()| self.inner.allocate(length))
    }
    fn sync(&self) -> io::Result<()> {
        strike(&self.countdown, self.fault).and_then(|()| self.inner.sync())
    }
    fn length(&self) -> io::Result<u64> {
        strike(&self.countdown, self.fault).and_then(|()| self.inner.length())
    }
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        strike(&self.countdown, self.fault).and_then(|()| self.inner.read_exact_at(buffer, offset))
    }
}

/// A disk on which directories are made durable only once the gate is open.
struct SlowDisk {
    gate: Arc<(std::sync::Mutex<bool>, std::sync::Condvar)>,
}

impl SlowDisk {
    fn wait(&self) {
        let (open, changed) = &*self.gate;
        let _open = changed.wait_while(open.lock().expect("not poisoned"), |open| !*open).expect("not poisoned");
    }
}

impl Disk for SlowDisk {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        RealDisk.create_dir_all(path)
    }
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        RealDisk.create_new(path)
    }
    fn open_writable(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        RealDisk.open_writable(path)
    }
    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        RealDisk.open(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk.rename(from, to)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.wait();
        RealDisk.sync_dir(path)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove(path)
    }
    fn list(&self, path: &Path) -> io::Result<Vec<(PathBuf, u64)>> {
        RealDisk.list(path)
    }
    fn space(&self, path: &Path) -> io::Result<Space> {
        RealDisk.space(path)
    }
}

/// A disk may take seconds over a sync: nobody else waits for it, and nothing is said to be there before it is.
#[test]
fn nobody_waits_for_the_disk_that_another_waits_for() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let here = open(dir.path()).put(b"here", NOW).expect("it fits").0;
    let gate = Arc::new((std::sync::Mutex::new(true), std::sync::Condvar::new()));
    let slow = SlowDisk { gate: Arc::clone(&gate) };
    let store = BlobStore::open(Box::new(slow), dir.path(), PLENTY).expect("the store opens");
    *gate.0.lock().expect("not poisoned") = false;
    let coming = BlobRef::of(b"coming");
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..2).map(|_| scope.spawn(|| store.put(b"coming", NOW).expect("it fits").1)).collect();
        let path = store.path(&coming.hash);
        while !path.exists() {
            std::thread::yield_now();
        }
        // Its file has its name, and the name is not durable yet.
        assert!(!store.contains(&coming.hash));
        assert_eq!(store.read(&coming.hash, NOW).expect("readable"), None);
        assert_eq!(store.read(&here.hash, NOW).expect("readable").as_deref(), Some(&b"here"[..]));
        assert!(store.reader(&here.hash, NOW).expect("readable").is_some());
        assert_eq!((store.stat().expect("counted").blobs, store.list().len()), (1, 1));
        store.flush();
        assert!(store.remove(&here.hash).expect("removable"));
        assert!(!writers.iter().any(std::thread::ScopedJoinHandle::is_finished));
        *gate.0.lock().expect("not poisoned") = true;
        gate.1.notify_all();
        let mut outcomes: Vec<_> = writers.into_iter().map(|writer| writer.join().expect("it ends")).collect();
        outcomes.sort_by_key(|outcome| *outcome == PutOutcome::Present);
        assert_eq!(outcomes, [PutOutcome::Written, PutOutcome::Present]);
    });
    assert_eq!(store.read(&coming.hash, NOW).expect("readable").as_deref(), Some(&b"coming"[..]));
}

/// What a workload on a failing disk was told.
#[derive(Default)]
struct Told {
    kept: Vec<usize>,    // put, acknowledged and never removed
    removed: Vec<usize>, // removed, acknowledged
    finished: bool,
}

fn workload(store: &BlobStore, told: &mut Told) -> Result<(), StoreError> {
    for i in 0..3 {
        store.put(&content(i), NOW)?;
        told.kept.push(i);
    }
    store.read(&ContentHash::of(&content(0)), NOW)?;
    told.kept.retain(|&i| i != 1); // in doubt until the removal is acknowledged
    store.remove(&ContentHash::of(&content(1)))?;
    told.removed.push(1);
    store.reader(&ContentHash::of(&content(2)), NOW)?;
    store.put(&content(3), NOW)?;
    told.kept.push(3);
    store.stat()?;
    told.finished = true;
    Ok(())
}

/// S3, and S5 among it: fail the n-th call for every n, in every way; the state is the one before or the one after.
#[test]
fn survives_a_failure_of_every_single_call() {
    let faults = [
        InjectedFault { kind: io::ErrorKind::Other, sticky: false, short_write: false },
        InjectedFault { kind: io::ErrorKind::Other, sticky: true, short_write: false },
        InjectedFault { kind: io::ErrorKind::StorageFull, sticky: false, short_write: true },
        InjectedFault { kind: io::ErrorKind::StorageFull, sticky: true, short_write: true },
        InjectedFault { kind: io::ErrorKind::Interrupted, sticky: false, short_write: false },
    ];
    for fault in faults {
        for n in 0.. {
            let dir = tempfile::tempdir().expect("a temporary directory");
            let disk = FaultyDisk { countdown: Arc::new(AtomicI64::new(n)), fault };
            let mut told = Told::default();
            if let Ok(store) = BlobStore::open(Box::new(disk), dir.path(), PLENTY) {
                let result = workload(&store, &mut told);
                let full = fault.kind == io::ErrorKind::StorageFull;
                assert!(!full || matches!(result, Ok(()) | Err(StoreError::DiskFull { .. })), "call {n}: {result:?}");
            }
            let store = open(dir.path());
            for i in 0..4 {
                let bytes = store.read(&ContentHash::of(&content(i)), NOW).expect("nothing is damaged");
                assert!(bytes.is_none() || bytes == Some(content(i)), "call {n}: blob {i} has other bytes");
                assert!(bytes.is_some() || !told.kept.contains(&i), "call {n}: acknowledged blob {i} is lost");
                assert!(bytes.is_none() || !told.removed.contains(&i), "call {n}: removed blob {i} is back");
            }
            assert_eq!(files(dir.path(), "incoming").len(), 0, "call {n}");
            let bytes: u64 = store.list().iter().map(|blob| blob.length).sum();
            assert_eq!(store.stat().expect("counted").bytes, bytes, "call {n}");
            if told.finished {
                assert!(n > 280, "only {n} calls were made to fail");
                break;
            }
        }
    }
}

/// S9 and S11: writers, readers and evictors on the same hashes; no torn read, the quota holds at every sample.
#[test]
fn many_threads_never_see_a_torn_blob_nor_pass_the_quota() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let contents: Vec<_> = (0..24).map(content).collect();
    let quota = contents.iter().map(|c| c.len() as u64).sum::<u64>() / 2;
    let store = BlobStore::open(Box::new(RealDisk), dir.path(), quota).expect("the store opens");
    let (reads, refusals) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (store, contents, reads, refusals) = (&store, &contents, &reads, &refusals);
            scope.spawn(move || {
                for round in 0..400 {
                    let i = (round * 7 + thread * 5) % contents.len();
                    let hash = ContentHash::of(&contents[i]);
                    match (round + thread) % 3 {
                        0 => match store.put(&contents[i], NOW) {
                            Ok(_) => {}
                            Err(StoreError::QuotaExceeded { .. }) => drop(refusals.fetch_add(1, Ordering::Relaxed)),
                            Err(error) => panic!("{error}"),
                        },
                        1 => {
                            if let Some(bytes) = store.read(&hash, NOW).expect("never damaged") {
                                assert_eq!(bytes, contents[i]);
                                reads.fetch_add(1, Ordering::Relaxed);
                            }
                        }
                        _ => drop(store.remove(&hash).expect("removable")),
                    }
                    assert!(store.quota.used() <= quota);
                }
            });
        }
    });
    assert!(reads.load(Ordering::Relaxed) > 0 && refusals.load(Ordering::Relaxed) > 0, "the test must meet both");
    let on_disk: u64 = files(dir.path(), "blobs").iter().map(|path| fs::metadata(path).expect("a blob").len()).sum();
    assert_eq!(store.quota.used(), on_disk);
    assert_eq!(files(dir.path(), "incoming").len(), 0);
}

#[test]
fn leaves_files_alone_that_are_not_blobs() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let blob = open(dir.path()).put(b"x", NOW).expect("it fits").0;
    let hex = blob.hash.to_hex();
    let misplaced = dir.path().join("blobs").join(if hex.starts_with("00") { "01" } else { "00" });
    fs::create_dir_all(&misplaced).expect("creatable");
    for name in ["README", &hex, &format!("b3:{hex}")] {
        fs::write(misplaced.join(name), b"x").expect("writable");
    }
    assert_eq!(open(dir.path()).list(), [blob]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn any_bytes_round_trip_in_any_pieces(bytes in proptest::collection::vec(any::<u8>(), 0..5000), piece in 1usize..700) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = open(dir.path());
        let blob = BlobRef::of(&bytes);
        let mut writer = store.writer(blob).expect("there is room");
        for part in bytes.chunks(piece) { writer.write(part).expect("within the length"); }
        prop_assert_eq!(writer.finish(NOW).expect("it matches"), PutOutcome::Written);
        prop_assert_eq!(store.read(&blob.hash, NOW).expect("readable"), Some(bytes.clone()));
        let reader = store.reader(&blob.hash, NOW).expect("readable").expect("present");
        let mut middle = vec![0; bytes.len() / 2];
        reader.read_at(&mut middle, (bytes.len() / 4) as u64).expect("within the blob");
        prop_assert_eq!(&middle[..], &bytes[bytes.len() / 4..bytes.len() / 4 + middle.len()]);
    }
}
