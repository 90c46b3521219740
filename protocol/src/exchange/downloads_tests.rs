//! Single peers under the eye: who is found slow, who is blamed, what is asked for again.

use super::downloads::Downloads;
use super::events::{DownloadAction, DownloadEvent, Fault};
use super::wire::{FromProvider, ToProvider};
use super::{Bitfield, Urgency};
use crate::group_hashes::{GROUP_BYTES, GroupHashes};
use crate::hash::{ContentHash, ModelId};

type Machine = Downloads<u8, Vec<u8>>;
type Actions = Vec<DownloadAction<u8, Vec<u8>>>;

fn groups(count: u64) -> GroupHashes {
    GroupHashes::of(&vec![7; (count * GROUP_BYTES) as usize])
}

/// A machine with peers that wants a blob for which there is room, and whose hashes are known.
fn machine(peers: &[u8], blob: &GroupHashes, here: &[u32]) -> (Machine, Actions) {
    let mut machine = Machine::new(1);
    let mut actions = Vec::new();
    for &peer in peers {
        actions.extend(machine.handle(0, DownloadEvent::PeerUp { peer, requests_max: 1024 }));
    }
    actions.extend(machine.handle(0, DownloadEvent::Want { blob: blob.blob(), urgency: Urgency::Now }));
    let hash = blob.blob().hash;
    actions.extend(machine.handle(0, DownloadEvent::Prepared { hash, hashes: Some(blob.clone()), here: here.to_vec() }));
    (machine, actions)
}

/// The groups asked of a peer, with the ids of the requests.
fn requested(actions: &Actions, of: u8) -> Vec<(u32, u32)> {
    let one = |action: &DownloadAction<u8, Vec<u8>>| match action {
        DownloadAction::Send { peer, message: ToProvider::Group { id, group, .. } } if *peer == of => Some((*group, *id)),
        _ => None,
    };
    actions.iter().filter_map(one).collect()
}

fn send(machine: &mut Machine, now_ms: u64, peer: u8, id: u32) -> Actions {
    machine.handle(now_ms, DownloadEvent::Received { peer, message: FromProvider::Group { id, bytes: vec![7; GROUP_BYTES as usize] } })
}

/// Somebody says that an honest peer's blob has another length: nobody is blamed, and the peer is not asked again.
#[test]
fn a_length_that_is_hearsay_names_no_liar() {
    for length in [10, GROUP_BYTES, GROUP_BYTES + 1, 3 * GROUP_BYTES, 30 * GROUP_BYTES] {
        let mut machine = Downloads::<u8, Vec<u8>>::new(1);
        let bytes: Vec<u8> = (0..2 * GROUP_BYTES).map(|i| i as u8).collect();
        let truth = GroupHashes::of(&bytes);
        let told = crate::hash::BlobRef { hash: truth.blob().hash, length };
        machine.handle(0, DownloadEvent::PeerUp { peer: 1, requests_max: 100 });
        let mut actions = machine.handle(0, DownloadEvent::Want { blob: told, urgency: Urgency::Now });
        actions.extend(machine.handle(0, DownloadEvent::Unsure { hash: told.hash }));
        actions.extend(machine.handle(0, DownloadEvent::Prepared { hash: told.hash, hashes: None, here: Vec::new() }));
        let mut requested = 0;
        while let Some(action) = actions.pop() {
            if let DownloadAction::Verify { peer, hash, serial, check, .. } = action {
                actions.extend(machine.handle(1, DownloadEvent::Wrong { peer, hash, serial, check }));
                continue;
            }
            let DownloadAction::Send { message, .. } = action else {
                assert!(!matches!(action, DownloadAction::Blame { .. } | DownloadAction::Complete { .. }), "{action:?}");
                continue;
            };
            requested += 1;
            let message = match message {
                ToProvider::Hashes { id, .. } => FromProvider::Hashes { id, hashes: truth.hashes().to_vec() },
                ToProvider::Group { id, group, .. } if u64::from(group) * GROUP_BYTES < bytes.len() as u64 => {
                    FromProvider::Group { id, bytes: bytes[(u64::from(group) * GROUP_BYTES) as usize..][..GROUP_BYTES as usize].to_vec() }
                }
                ToProvider::Group { group, .. } => panic!("a provider hangs up on who asks for group {group}"),
                _ => continue,
            };
            actions.extend(machine.handle(1, DownloadEvent::Received { peer: 1, message }));
        }
        assert!((1..10).contains(&requested) && machine.lacks(&1, &told.hash), "{length}: {requested}");
    }
}

#[test]
fn a_resumed_blob_asks_only_for_what_is_missing() {
    let blob = groups(6);
    let (_, actions) = machine(&[1], &blob, &[0, 2, 5]);
    let groups: Vec<_> = requested(&actions, 1).into_iter().map(|(group, _)| group).collect();
    assert_eq!(groups, [1, 3, 4]);
}

#[test]
fn a_large_blob_is_split_over_its_providers() {
    let (_, actions) = machine(&[1, 2, 3], &groups(9), &[]);
    let shares = [1, 2, 3].map(|peer| requested(&actions, peer).len());
    assert_eq!(shares, [3, 3, 3]);
}

#[test]
fn a_silent_peer_is_replaced_within_two_seconds_and_hung_up_on_later() {
    let (mut machine, actions) = machine(&[1, 2], &groups(4), &[]);
    let first = requested(&actions, 1);
    for (_, id) in requested(&actions, 2) {
        send(&mut machine, 10, 2, id);
    }
    let (mut replaced_ms, mut hung_up_ms) = (None, None);
    for now_ms in (100..10_000).step_by(100) {
        let actions = machine.handle(now_ms, DownloadEvent::Tick);
        if requested(&actions, 2).len() == first.len() {
            replaced_ms.get_or_insert(now_ms);
        }
        if actions.contains(&DownloadAction::HangUp { peer: 1 }) {
            hung_up_ms.get_or_insert(now_ms);
        }
    }
    assert!(replaced_ms.is_some_and(|ms| ms <= 2000), "{replaced_ms:?}");
    assert_eq!(hung_up_ms, None, "it owes nothing any more");
}

#[test]
fn the_only_peer_is_hung_up_on_when_it_stays_silent() {
    let (mut machine, _) = machine(&[1], &groups(3), &[]);
    let hung_up_ms =
        (100..10_000).step_by(100).find(|&ms| machine.handle(ms, DownloadEvent::Tick).contains(&DownloadAction::HangUp { peer: 1 }));
    assert_eq!(hung_up_ms, Some(5000));
}

#[test]
fn a_peer_that_drips_is_kept_only_while_nobody_else_has_it() {
    let (mut alone, actions) = machine(&[1], &groups(3), &[]);
    let mine = requested(&actions, 1).len();
    let mut cancelled_ms = None;
    for now_ms in (100..4000).step_by(100) {
        let mut actions = alone.handle(now_ms, DownloadEvent::Progress { peer: 1, bytes: now_ms / 10 });
        actions.extend(alone.handle(now_ms, DownloadEvent::Tick));
        assert!(requested(&actions, 1).is_empty());
    }
    alone.handle(4000, DownloadEvent::PeerUp { peer: 2, requests_max: 1024 });
    for now_ms in (4100..7000).step_by(100) {
        alone.handle(now_ms, DownloadEvent::Progress { peer: 1, bytes: now_ms / 10 });
        let actions = alone.handle(now_ms, DownloadEvent::Tick);
        if requested(&actions, 2).len() == mine {
            cancelled_ms.get_or_insert(now_ms);
        }
    }
    assert!(cancelled_ms.is_some_and(|ms| ms <= 6000), "{cancelled_ms:?}");
}

#[test]
fn a_wrong_group_blames_its_sender_and_is_asked_of_another() {
    let (mut machine, actions) = machine(&[1, 2], &groups(4), &[]);
    let (group, id) = requested(&actions, 1)[0];
    let actions = send(&mut machine, 10, 1, id);
    let [DownloadAction::Verify { peer: 1, hash, serial, check, .. }] = actions[..] else { panic!("{actions:?}") };
    let actions = machine.handle(12, DownloadEvent::Wrong { peer: 1, hash, serial, check });
    assert!(actions.contains(&DownloadAction::Blame { peer: 1, fault: Fault::WrongGroup { hash, group } }));
    assert!(requested(&actions, 2).iter().any(|(again, _)| *again == group));
    assert!(machine.handle(13, DownloadEvent::PeerUp { peer: 1, requests_max: 9 }).is_empty(), "a liar is asked for nothing");
}

#[test]
fn bytes_that_nobody_asked_for_are_never_verified() {
    let (mut machine, actions) = machine(&[1, 2], &groups(2), &[]);
    let (_, id) = requested(&actions, 1)[0];
    send(&mut machine, 10, 1, id);
    let again = send(&mut machine, 11, 1, id);
    assert!(again.contains(&DownloadAction::Blame { peer: 1, fault: Fault::Unsolicited }), "{again:?}");
    let never = send(&mut machine, 12, 2, 4_000_000);
    assert!(never.contains(&DownloadAction::Blame { peer: 2, fault: Fault::Unsolicited }), "{never:?}");
}

#[test]
fn bitfields_say_whom_to_ask_and_updates_change_that() {
    let blob = groups(1);
    let hash = blob.blob().hash;
    let model = ModelId(ContentHash::of(b"m"));
    let mut machine = Machine::new(1);
    machine.handle(0, DownloadEvent::Follow { model, blobs: vec![ContentHash::of(b"other"), hash] });
    let up = machine.handle(0, DownloadEvent::PeerUp { peer: 1, requests_max: 1024 });
    let [DownloadAction::Send { message: ToProvider::Follow { id, .. }, .. }] = up[..] else { panic!("{up:?}") };
    machine.handle(1, DownloadEvent::Received { peer: 1, message: FromProvider::Have { id, bits: Bitfield::new(2) } });
    let actions = machine.handle(1, DownloadEvent::Want { blob: blob.blob(), urgency: Urgency::Now });
    assert!(actions.is_empty() && machine.lacks(&1, &hash) && !machine.may_be_had(&hash));
    let actions = machine.handle(2, DownloadEvent::Received { peer: 1, message: FromProvider::Update { id, changes: vec![(1, true)] } });
    assert_eq!(actions, [DownloadAction::Prepare { blob: blob.blob() }]);
    assert!(machine.may_be_had(&hash));
}

#[test]
fn what_is_wanted_no_more_is_taken_back() {
    let (mut machine, actions) = machine(&[1], &groups(5), &[]);
    let ids: Vec<_> = requested(&actions, 1).into_iter().map(|(_, id)| id).collect();
    let actions = machine.handle(1, DownloadEvent::Unwant { hash: groups(5).blob().hash });
    let cancels: Vec<_> = ids.iter().map(|&id| DownloadAction::Send { peer: 1, message: ToProvider::Cancel { id } }).collect();
    assert_eq!((actions, machine.way_bytes()), (cancels, 0));
    // One may be on its way already.
    assert!(send(&mut machine, 2, 1, ids[0]).is_empty());
}
