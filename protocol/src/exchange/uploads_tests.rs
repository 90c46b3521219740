//! Limits, turns, rates, and peers that ask too much or read nothing.

use super::*;

type Peer = u8;

fn hash(byte: u8) -> ContentHash {
    ContentHash::from_bytes([byte; 32])
}

fn group(id: u32, blob: u8, group: u32) -> ToProvider {
    ToProvider::Group { id, urgency: Urgency::Rest, blob: hash(blob), group }
}

const GROUP: u64 = crate::group_hashes::GROUP_BYTES;

/// Asks, and opens at once what is to be opened; returns everything that is to be sent.
fn ask(uploads: &mut Uploads<Peer>, now_ms: u64, peer: Peer, message: ToProvider) -> Vec<UploadAction<Peer>> {
    let mut actions = uploads.handle(now_ms, UploadEvent::Received { peer, message });
    let opened: Vec<_> =
        actions.iter().filter_map(|action| if let UploadAction::Open { hash } = action { Some(*hash) } else { None }).collect();
    for hash in opened {
        actions.extend(uploads.handle(now_ms, UploadEvent::Opened { hash, length: Some(4000 * GROUP) }));
    }
    actions
}

fn groups(actions: &[UploadAction<Peer>], to: Peer) -> u64 {
    let sent = |action: &&UploadAction<Peer>| matches!(action, UploadAction::Send { peer, what: Sent::Group { .. } } if *peer == to);
    actions.iter().filter(sent).count() as u64
}

#[test]
fn what_is_taken_back_leaves_nothing() {
    let mut uploads = Uploads::new(None);
    (0..3).for_each(|peer| drop(uploads.handle(0, UploadEvent::PeerUp { peer })));
    for round in 0..200u32 {
        let (peer, blob) = ((round % 3) as u8, (round % 50) as u8);
        // The second takes the place of the first, and is another blob's.
        uploads.handle(0, UploadEvent::Received { peer, message: group(round, blob, 0) });
        uploads.handle(0, UploadEvent::Received { peer, message: group(round, blob + 1, 0) });
        for (hash, requested) in &uploads.requested {
            let place = requested.place.map(|place| uploads.to_open[&place]);
            assert!(place == Some(*hash) || place.is_none() && uploads.blobs.contains_key(hash), "it is opened, or waits for that");
        }
        let placed = uploads.requested.values().filter(|requested| requested.place.is_some()).count();
        assert_eq!(uploads.to_open.len(), placed, "each waits once");
        if round % 2 == 0 {
            uploads.handle(0, UploadEvent::Received { peer, message: ToProvider::Cancel { id: round } });
        }
    }
    assert_eq!(uploads.open_requests(), 100);
    (0..3).for_each(|peer| drop(uploads.handle(0, UploadEvent::PeerDown { peer })));
    assert!(uploads.requested.is_empty() && uploads.to_open.is_empty());
}

#[test]
fn one_peer_has_1024_requests_and_no_more() {
    let mut uploads = Uploads::new(None);
    uploads.handle(0, UploadEvent::PeerUp { peer: 1 });
    // Nothing is opened, so nothing is sent.
    for id in 1..=REQUESTS_MAX {
        let actions = uploads.handle(0, UploadEvent::Received { peer: 1, message: group(id, 1, id) });
        assert!(actions.iter().all(|action| matches!(action, UploadAction::Open { .. })), "{id}");
    }
    let actions = uploads.handle(0, UploadEvent::Received { peer: 1, message: group(REQUESTS_MAX + 1, 1, 0) });
    assert_eq!(actions, [UploadAction::Send { peer: 1, what: Sent::Busy { id: REQUESTS_MAX + 1, retry_ms: RETRY_MS } }]);
    assert_eq!(uploads.open_requests(), REQUESTS_MAX as usize);
    for id in 2..=REQUESTS_MAX {
        uploads.handle(0, UploadEvent::Received { peer: 1, message: ToProvider::Cancel { id } });
    }
    assert_eq!(uploads.open_requests(), 1);
    uploads.handle(0, UploadEvent::PeerDown { peer: 1 });
    assert_eq!(uploads.open_requests(), 0);
}

#[test]
fn peers_take_turns_by_bytes() {
    let mut uploads = Uploads::new(None);
    let mut got = [0; 6];
    let mut waiting = Vec::new();
    for peer in 0..6 {
        uploads.handle(0, UploadEvent::PeerUp { peer });
        // The first asks for ten times as much as the others.
        for id in 1..=if peer == 0 { 400 } else { 40 } {
            waiting.extend(ask(&mut uploads, 0, peer, group(id, 1, id)));
        }
    }
    // A network that sends one group a millisecond, whoever's it is.
    for now_ms in 0..120 {
        let Some(at) = waiting.iter().position(|action| matches!(action, UploadAction::Send { what: Sent::Group { .. }, .. })) else {
            break;
        };
        let UploadAction::Send { peer, .. } = waiting.remove(at) else { continue };
        got[usize::from(peer)] += 1;
        waiting.extend(uploads.handle(now_ms, UploadEvent::Sent { peer, bytes: GROUP }));
    }
    assert_eq!(got.iter().sum::<u64>(), 120);
    assert!(got.iter().all(|&got| (12..=28).contains(&got)), "{got:?}");
}

#[test]
fn a_peer_that_reads_nothing_stops_only_itself_and_is_hung_up_on() {
    let mut uploads = Uploads::new(None);
    for peer in 0..100 {
        uploads.handle(0, UploadEvent::PeerUp { peer });
        for id in 1..=20 {
            ask(&mut uploads, 0, peer, group(id, 1, id));
        }
    }
    // All slots are held by peers that read nothing. One that reads has its turn within the time that this takes to be seen.
    let mut actions = Vec::new();
    let mut handed_over = 0;
    let mut gone_ms = BTreeMap::new();
    for now_ms in (0..60_000).step_by(100) {
        actions = uploads.handle(now_ms, UploadEvent::Tick);
        for action in &actions {
            match action {
                UploadAction::Send { what: Sent::Group { length, .. }, .. } => handed_over += length,
                UploadAction::HangUp { peer, .. } => drop(gone_ms.insert(*peer, now_ms)),
                _ => {}
            }
        }
    }
    assert!(actions.is_empty());
    assert_eq!(gone_ms.len(), 100);
    assert!(handed_over <= 100 * SENDING_BYTES_MAX, "{handed_over}");
    let mut uploads = Uploads::new(None);
    let last = TRIALS as Peer;
    for peer in 0..=last {
        uploads.handle(0, UploadEvent::PeerUp { peer });
        for id in 1..=4 {
            ask(&mut uploads, 0, peer, group(id, 1, id));
        }
    }
    assert_eq!(uploads.slots.len(), TRIALS);
    let actions: Vec<_> = (0..=STUCK_MS).step_by(50).flat_map(|now_ms| uploads.handle(now_ms, UploadEvent::Tick)).collect();
    assert_eq!(groups(&actions, last), 2);
}

#[test]
fn a_crowd_that_reads_nothing_takes_no_turn_from_those_who_read() {
    let mut uploads = Uploads::new(None);
    let mut waiting = VecDeque::new();
    for peer in 0..=SLOTS as Peer {
        uploads.handle(0, UploadEvent::PeerUp { peer });
        for id in 1..=40 {
            waiting.extend(ask(&mut uploads, 0, peer, group(id, 1, id)));
        }
    }
    let mut got = [0; SLOTS + 1];
    let mut take = |uploads: &mut Uploads<Peer>, waiting: &mut VecDeque<UploadAction<Peer>>| {
        let Some(UploadAction::Send { peer, .. }) = waiting.pop_front() else { return None };
        got[usize::from(peer)] += 1;
        waiting.extend(uploads.handle(0, UploadEvent::Sent { peer, bytes: GROUP }));
        Some(got.iter().sum::<u32>())
    };
    while take(&mut uploads, &mut waiting) != Some(40) {}
    assert_eq!(uploads.slots.len(), SLOTS, "one of those that are known waits");
    for peer in 100..200 {
        uploads.handle(0, UploadEvent::PeerUp { peer });
        for id in 1..=4 {
            ask(&mut uploads, 0, peer, group(id, 1, id));
        }
    }
    assert_eq!(uploads.slots.len(), SLOTS + TRIALS);
    while take(&mut uploads, &mut waiting).is_some() {}
    assert_eq!(got, [40; SLOTS + 1]);
}

#[test]
fn no_more_goes_out_than_the_limit_allows() {
    let mut uploads = Uploads::new(Some(1_000_000));
    uploads.handle(0, UploadEvent::PeerUp { peer: 1 });
    for id in 1..=100 {
        ask(&mut uploads, 0, 1, group(id, 1, id));
    }
    let mut sent = 0;
    for now_ms in (0..=10_000).step_by(50) {
        let came = groups(&uploads.handle(now_ms, UploadEvent::Tick), 1);
        sent += came;
        for _ in 0..came {
            uploads.handle(now_ms, UploadEvent::Sent { peer: 1, bytes: GROUP });
        }
    }
    assert!((36..=38).contains(&sent), "{sent} groups in ten seconds at a megabyte a second");
}

#[test]
fn what_is_not_here_is_refused_and_a_group_beyond_the_end_is_a_fault() {
    let mut uploads = Uploads::new(None);
    uploads.handle(0, UploadEvent::PeerUp { peer: 1 });
    uploads.handle(0, UploadEvent::Received { peer: 1, message: group(1, 1, 0) });
    uploads.handle(0, UploadEvent::Received { peer: 1, message: ToProvider::Hashes { id: 2, blob: hash(1) } });
    let mut refused = uploads.handle(0, UploadEvent::Opened { hash: hash(1), length: None });
    refused.sort_by_key(|action| format!("{action:?}"));
    assert_eq!(refused, [1, 2].map(|id| UploadAction::Send { peer: 1, what: Sent::NotHave { id } }));
    let actions = ask(&mut uploads, 0, 1, group(3, 2, 4000));
    assert!(actions.iter().any(|action| matches!(action, UploadAction::HangUp { peer: 1, .. })), "{actions:?}");
}

#[test]
fn a_list_comes_first_and_urgent_groups_before_others() {
    let mut uploads = Uploads::new(None);
    uploads.handle(0, UploadEvent::PeerUp { peer: 1 });
    for id in 1..=3 {
        uploads.handle(0, UploadEvent::Received { peer: 1, message: group(id, 1, id) });
    }
    let urgent = ToProvider::Group { id: 4, urgency: Urgency::Now, blob: hash(1), group: 9 };
    uploads.handle(0, UploadEvent::Received { peer: 1, message: urgent });
    uploads.handle(0, UploadEvent::Received { peer: 1, message: ToProvider::Hashes { id: 5, blob: hash(1) } });
    let mut order = Vec::new();
    let mut actions = uploads.handle(0, UploadEvent::Opened { hash: hash(1), length: Some(20 * GROUP) });
    while let Some(action) = actions.pop() {
        let UploadAction::Send { what, .. } = action else { continue };
        let (id, bytes) = match what {
            Sent::Group { id, length, .. } => (id, length),
            Sent::Hashes { id, .. } => (id, 32 * 20),
            other => panic!("{other:?}"),
        };
        order.push(id);
        actions.extend(uploads.handle(0, UploadEvent::Sent { peer: 1, bytes }));
        actions.reverse();
    }
    order.sort_unstable();
    assert_eq!(order, [1, 2, 3, 4, 5]);
}

#[test]
fn blobs_are_opened_a_few_at_a_time_and_shut_when_many_are_open() {
    let mut uploads = Uploads::new(None);
    uploads.handle(0, UploadEvent::PeerUp { peer: 1 });
    let mut opened = 0;
    for id in 1..=20 {
        let actions = uploads.handle(0, UploadEvent::Received { peer: 1, message: group(id, id as u8, 0) });
        opened += actions.iter().filter(|action| matches!(action, UploadAction::Open { .. })).count();
    }
    assert_eq!(opened, OPENING_MAX);
    let mut uploads = Uploads::new(None);
    uploads.handle(0, UploadEvent::PeerUp { peer: 1 });
    let mut shut = 0;
    for id in 1..=OPEN_BLOBS_MAX as u32 + 10 {
        let actions = ask(&mut uploads, 0, 1, group(id, id as u8, 0));
        shut += actions.iter().filter(|action| matches!(action, UploadAction::Shut { .. })).count();
        uploads.handle(0, UploadEvent::Sent { peer: 1, bytes: GROUP });
    }
    assert_eq!(shut, 10);
}

#[test]
fn peers_that_read_nothing_keep_no_blob_open_that_others_need() {
    let mut uploads = Uploads::new(None);
    uploads.handle(0, UploadEvent::PeerUp { peer: 1 });
    for blob in 0..=OPEN_BLOBS_MAX as u8 + 10 {
        ask(&mut uploads, 0, 1, group(u32::from(blob) + 1, blob, 0));
    }
    uploads.handle(10, UploadEvent::PeerUp { peer: 2 });
    let mut came = groups(&ask(&mut uploads, 10, 2, group(1, 200, 0)), 2);
    assert_eq!(came, 0, "the first has not been stuck for long enough");
    for now_ms in (100..=2000).step_by(100) {
        let mut actions = uploads.handle(now_ms, UploadEvent::Tick);
        while let Some(UploadAction::Open { hash }) = actions.iter().find(|action| matches!(action, UploadAction::Open { .. })).cloned() {
            actions = uploads.handle(now_ms, UploadEvent::Opened { hash, length: Some(4000 * GROUP) });
            came += groups(&actions, 2);
        }
    }
    assert_eq!(came, 1);
}
