//! Arrivals that are broken off, taken up, damaged between, and refused.

use std::fs;
use std::sync::atomic::AtomicI64;

use protocol::group_hashes::GROUP_BYTES;

use super::*;
use crate::blob_store::tests::{FaultyDisk, InjectedFault, NOW, PLENTY, files, open};

fn blob(groups: u64) -> (Vec<u8>, GroupHashes) {
    let bytes: Vec<_> = (0..groups * GROUP_BYTES - 100).map(|at| (at * 7 + at / 1000) as u8).collect();
    let hashes = GroupHashes::of(&bytes);
    (bytes, hashes)
}

fn part(bytes: &[u8], group: u32) -> &[u8] {
    let from = group_offset(group) as usize;
    &bytes[from..(from + GROUP_BYTES as usize).min(bytes.len())]
}

fn write(partial: &PartialBlob, bytes: &[u8], hashes: &GroupHashes, group: u32) -> bool {
    partial.write_group(&hashes.check(group).expect("a group"), part(bytes, group)).expect("writable")
}

#[test]
fn groups_in_any_order_make_the_blob() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store = Arc::new(open(dir.path()));
    let (bytes, hashes) = blob(4);
    let partial = store.partial(hashes.blob()).expect("there is room");
    partial.set_hashes(&hashes).expect("writable");
    let before = store.generation();
    for group in [2, 0, 3, 1, 1] {
        assert!(write(&partial, &bytes, &hashes, group));
    }
    assert_eq!(partial.finish(NOW).expect("complete"), PutOutcome::Written);
    drop(partial);
    assert_eq!(store.read(&hashes.blob().hash, NOW).expect("readable"), Some(bytes));
    assert_eq!((files(dir.path(), "incoming").len(), store.quota.used()), (0, hashes.blob().length));
    assert!(store.generation() > before);
}

#[test]
fn a_small_blob_needs_no_list() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store = Arc::new(open(dir.path()));
    for bytes in [&b""[..], b"some bytes"] {
        let hashes = GroupHashes::of(bytes);
        let partial = store.partial(hashes.blob()).expect("there is room");
        assert!(partial.write_group(&hashes.check(0).expect("a group"), bytes).expect("writable"));
        partial.finish(NOW).expect("complete");
        assert_eq!(store.read(&hashes.blob().hash, NOW).expect("readable").as_deref(), Some(bytes));
    }
}

#[test]
fn what_had_arrived_outlives_a_restart_and_its_room_stays_set_aside() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (bytes, hashes) = blob(5);
    for restart in [false, true] {
        let mut store = Arc::new(open(dir.path()));
        let partial = store.partial(hashes.blob()).expect("there is room");
        partial.set_hashes(&hashes).expect("writable");
        assert!(write(&partial, &bytes, &hashes, 1) && write(&partial, &bytes, &hashes, 4));
        drop(partial);
        if restart {
            drop(store);
            store = Arc::new(open(dir.path()));
        }
        assert_eq!(store.quota.used(), hashes.blob().length);
        let partial = store.partial(hashes.blob()).expect("it is taken up");
        assert_eq!(partial.here(), (Some(hashes.clone()), vec![1, 4]));
        for group in [0, 2, 3] {
            assert!(write(&partial, &bytes, &hashes, group));
        }
        partial.finish(NOW).expect("complete");
        assert_eq!(store.read(&hashes.blob().hash, NOW).expect("readable"), Some(bytes.clone()));
        assert!(store.remove(&hashes.blob().hash).expect("removable"));
    }
}

#[test]
fn nothing_wrong_is_written_and_nothing_incomplete_is_finished() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store = Arc::new(open(dir.path()));
    let (mut bytes, hashes) = blob(2);
    let partial = store.partial(hashes.blob()).expect("there is room");
    let check = hashes.check(0).expect("a group");
    assert!(!partial.write_group(&check, part(&bytes, 0)).expect("writable"), "it cannot be verified before the list is known");
    partial.set_hashes(&hashes).expect("writable");
    bytes[5] ^= 1;
    assert!(!partial.write_group(&check, part(&bytes, 0)).expect("writable"));
    let forged = GroupHashes::of(&bytes).check(0).expect("a group");
    assert!(!partial.write_group(&forged, part(&bytes, 0)).expect("writable"), "a check of another list");
    bytes[5] ^= 1;
    assert!(write(&partial, &bytes, &hashes, 1));
    assert!(matches!(partial.finish(NOW), Err(StoreError::WrongBytes { .. })));
    assert!(!store.contains(&hashes.blob().hash));
}

type Damage = fn(&mut Vec<u8>);

/// Whatever happens to the files between two starts: what is taken up is verified, and the blob is right in the end.
#[test]
fn damage_between_two_starts_costs_groups_and_nothing_else() {
    let (bytes, hashes) = blob(4);
    let damages: [(&str, Damage, &str); 7] = [
        ("a flipped bit in a group", |file| file[7] ^= 1, ".part"),
        ("a file cut short", |file| file.truncate(300), ".part"),
        ("an emptied log", Vec::clear, ".groups"),
        ("a torn log", |log| log.truncate(log.len() - 3), ".groups"),
        ("a list of something else", |log| log[40] ^= 1, ".groups"),
        ("a claim too much", |log| log.extend([3, 0, 0, 0, 200, 0, 0, 0]), ".groups"),
        ("a log that grew", |log| log.extend([0; 1000]), ".groups"),
    ];
    for (name, damage, suffix) in damages {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = Arc::new(open(dir.path()));
        let partial = store.partial(hashes.blob()).expect("there is room");
        partial.set_hashes(&hashes).expect("writable");
        assert!(write(&partial, &bytes, &hashes, 0) && write(&partial, &bytes, &hashes, 2));
        drop(partial);
        drop(store);
        let path = files(dir.path(), "incoming").into_iter().find(|path| path.to_string_lossy().ends_with(suffix)).expect("it is there");
        let mut content = fs::read(&path).expect("readable");
        damage(&mut content);
        fs::write(&path, content).expect("writable");
        let store = Arc::new(open(dir.path()));
        let partial = store.partial(hashes.blob()).expect("there is room");
        let (_, here) = partial.here();
        assert!(here.iter().all(|group| [0, 2].contains(group)), "{name}: {here:?}");
        partial.set_hashes(&hashes).expect("writable");
        for group in (0..4).filter(|group| !here.contains(group)) {
            assert!(write(&partial, &bytes, &hashes, group), "{name}");
        }
        partial.finish(NOW).expect("complete");
        drop(partial);
        assert_eq!(store.read(&hashes.blob().hash, NOW).expect("readable").as_ref(), Some(&bytes), "{name}");
        assert_eq!((files(dir.path(), "incoming").len(), store.quota.used()), (0, hashes.blob().length), "{name}");
    }
}

/// S11: room is set aside before the first byte; what nobody takes up gives way.
#[test]
fn the_quota_holds_and_what_was_broken_off_gives_way() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (bytes, hashes) = blob(2);
    let length = hashes.blob().length;
    let store = Arc::new(BlobStore::open(Box::new(crate::disk::RealDisk), dir.path(), length + 10).expect("the store opens"));
    let partial = store.partial(hashes.blob()).expect("there is room");
    assert!(matches!(store.partial(hashes.blob()), Err(StoreError::Arriving { .. })));
    assert!(matches!(store.put(b"eleven bytes", NOW), Err(StoreError::QuotaExceeded { left: 10, .. })));
    partial.set_hashes(&hashes).expect("writable");
    assert!(write(&partial, &bytes, &hashes, 0));
    drop(partial);
    assert_eq!((store.quota.used(), files(dir.path(), "incoming").len()), (length, 2));
    store.put(b"eleven bytes", NOW).expect("what was broken off gives way");
    assert_eq!((store.quota.used(), files(dir.path(), "incoming").len()), (12, 0));
    drop(store);
    // Left by an earlier process that had more room.
    let (_, more) = blob(3);
    fs::write(file_path(&dir.path().join("incoming"), &more.blob().hash), vec![0; more.blob().length as usize]).expect("writable");
    fs::write(log_path(&dir.path().join("incoming"), &more.blob().hash), b"").expect("writable");
    let store = BlobStore::open(Box::new(crate::disk::RealDisk), dir.path(), length).expect("the store opens");
    assert_eq!((store.quota.used(), files(dir.path(), "incoming").len()), (12, 0));
}

/// S3 for arrivals: whichever call fails, the next start has the blob, or a part that can be completed, or nothing.
#[test]
fn a_failure_of_every_single_call_loses_nothing_that_was_acknowledged() {
    let (bytes, hashes) = blob(3);
    let arrive = |store: &Arc<BlobStore>| -> Result<(), StoreError> {
        let partial = store.partial(hashes.blob())?;
        partial.set_hashes(&hashes)?;
        for group in 0..3 {
            assert!(partial.write_group(&hashes.check(group).expect("a group"), part(&bytes, group))?);
        }
        partial.finish(NOW).map(drop)
    };
    for sticky in [false, true] {
        for n in 0.. {
            let dir = tempfile::tempdir().expect("a temporary directory");
            let countdown = Arc::new(AtomicI64::new(n));
            let fault = InjectedFault { kind: io::ErrorKind::Other, sticky, short_write: true };
            let disk = FaultyDisk { countdown: Arc::clone(&countdown), fault };
            let done = match BlobStore::open(Box::new(disk), dir.path(), PLENTY) {
                Ok(store) => arrive(&Arc::new(store)).is_ok(),
                Err(_) => false,
            };
            let store = Arc::new(open(dir.path()));
            assert!(!done || store.contains(&hashes.blob().hash), "call {n}");
            if !store.contains(&hashes.blob().hash) {
                arrive(&store).unwrap_or_else(|error| panic!("call {n}: {error}"));
            }
            assert_eq!(store.read(&hashes.blob().hash, NOW).expect("readable").as_ref(), Some(&bytes), "call {n}");
            assert_eq!((files(dir.path(), "incoming").len(), store.quota.used()), (0, hashes.blob().length), "call {n}");
            if done && countdown.load(std::sync::atomic::Ordering::SeqCst) >= 0 {
                assert!(n > 270, "only {n} calls were made to fail");
                break;
            }
        }
    }
}
