//! Attacks on opinions, in networks of hundreds of nodes that have shared a model over the real `exchange`, with liars among them. Seeded; the
//! figures are those of `trust_holds_against…` with `--nocapture`, and `CONFRERE_WORLDS=100` runs more worlds.

use std::collections::{BTreeMap, BTreeSet};

use super::tally::{Outcome, score};
use super::{EXECUTION_GATE, Facet, TrustBook, Voice};
use crate::exchange::sim::{key, seen};
use crate::hash::{BlobRef, ContentHash, ModelId};
use crate::identity::{NodeId, NodeKey};
use crate::record::{Attestation, DomainSummary, NodeRecord, ProfileHead, Record, RecordHead, Verified};

const NODES: u32 = 200;
const TOP: usize = 10;
const NOW_MS: u64 = 400_000;

/// A network that has worked for a while, as one of its honest nodes sees it.
struct World {
    books: Vec<(TrustBook, bool)>,
    /// What everybody says of everybody; liars say the best of each other.
    voices: BTreeMap<NodeId, Vec<Voice>>,
}

fn voice(rater: NodeId, good: u32, bad: u32) -> Voice {
    Voice { rater, good, bad, subjects: 1, kin: u64::from_le_bytes(rater.as_bytes()[..8].try_into().expect("eight bytes")) }
}

impl World {
    fn new(seed: u64) -> Self {
        let books = seen(seed, NODES, 20);
        let mut voices: BTreeMap<NodeId, Vec<Voice>> = BTreeMap::new();
        for (number, (book, honest)) in books.iter().enumerate().filter(|(_, (_, honest))| *honest) {
            debug_assert!(honest);
            let subjects = book.tallies().filter(|(.., tally)| tally.good.round() > 0.0).count() as u32;
            for (subject, _, tally) in book.tallies() {
                let voice = voice(key(number as u32), tally.good.round() as u32, tally.bad.round() as u32);
                voices.entry(subject).or_default().push(Voice { subjects, ..voice });
            }
        }
        Self { books, voices }
    }

    /// Honest nodes, who have fetched something from others.
    fn honest(&self) -> impl Iterator<Item = (u32, &TrustBook)> {
        let all = self.books.iter().enumerate().filter(|(_, (book, honest))| *honest && book.tallies().count() > 0);
        all.map(|(number, (book, _))| (number as u32, book))
    }

    fn ordering(&self, book: &TrustBook, peer: &NodeId) -> f64 {
        book.opinion(NOW_MS, peer, Facet::Bytes, self.voices.get(peer).map_or(&[], Vec::as_slice)).ordering
    }

    /// Of the ten that each honest node would ask first, among all nodes and `more`, how many are `bad`; the worst score that one of those has.
    fn bad_in_top(&self, more: &[NodeId], bad: &BTreeSet<NodeId>) -> (f64, f64) {
        let (mut count, mut places, mut highest) = (0, 0, 0.0f64);
        for (own, book) in self.honest() {
            let peers = (0..NODES).filter(|&node| node != own).map(key).chain(more.iter().copied());
            let mut order: Vec<_> = peers.map(|peer| (self.ordering(book, &peer), peer)).collect();
            order.sort_by(|a, b| b.0.total_cmp(&a.0));
            count += order.iter().take(TOP).filter(|(_, peer)| bad.contains(peer)).count();
            places += TOP;
            highest = order.iter().filter(|(_, peer)| bad.contains(peer)).map(|(score, _)| *score).fold(highest, f64::max);
        }
        (count as f64 / places as f64, highest)
    }
}

fn strangers(from: u32, count: u32) -> Vec<NodeId> {
    (from..from + count).map(key).collect()
}

fn worlds() -> u64 {
    std::env::var("CONFRERE_WORLDS").ok().and_then(|worlds| worlds.parse().ok()).unwrap_or(10)
}

/// R1 to R4: sybils that praise each other, fronts that vouch for bad peers, new keys, and slander.
#[test]
fn trust_holds_against_sybils_fronts_new_keys_and_slander() {
    println!("seed  honest who ask  known liars in top 10  sybils in top 10  highest sybil  vouched for in top 10  highest  slander costs");
    for seed in 0..worlds() {
        let mut world = World::new(seed);
        let liars: BTreeSet<_> =
            world.books.iter().enumerate().filter(|(_, (_, honest))| !honest).map(|(number, _)| key(number as u32)).collect();
        let (known, _) = world.bad_in_top(&[], &liars);
        // 1,000 keys that say the best of each other.
        let sybils = strangers(100_000, 1000);
        for (number, sybil) in sybils.iter().enumerate() {
            let praise = (1..=20).map(|step| voice(sybils[(number + step * 37) % sybils.len()], 1000, 0));
            world.voices.insert(*sybil, praise.collect());
        }
        let (sybils_in_top, highest_sybil) = world.bad_in_top(&sybils, &sybils.iter().copied().collect());
        // Twenty that have worked well for many vouch for 200 that never did anything.
        let mut useful: BTreeMap<NodeId, f64> = BTreeMap::new();
        for (_, book) in world.honest() {
            book.tallies().for_each(|(peer, _, tally)| *useful.entry(peer).or_default() += tally.score(NOW_MS));
        }
        let mut fronts: Vec<_> = useful.into_iter().filter(|(peer, _)| !liars.contains(peer)).collect();
        fronts.sort_by(|a, b| b.1.total_cmp(&a.1));
        fronts.truncate(20);
        let vouched = strangers(200_000, 200);
        for bad in &vouched {
            let vouch = |(front, _): &(NodeId, f64)| Voice { subjects: vouched.len() as u32, ..voice(*front, 1000, 0) };
            world.voices.insert(*bad, fronts.iter().map(vouch).collect());
        }
        let (vouched_in_top, highest_vouched) = world.bad_in_top(&vouched, &vouched.iter().copied().collect());
        let gate = |book: &TrustBook| {
            vouched.iter().any(|peer| book.opinion(NOW_MS, peer, Facet::Bytes, &world.voices[peer]).first_hand >= EXECUTION_GATE)
        };
        assert!(!world.honest().any(|(_, book)| gate(book)), "seed {seed}");
        // Twenty raters, the best known of all, say the worst of everybody who is known first-hand.
        let mut most = 0.0f64;
        let mut askers = 0;
        for (_, book) in world.honest() {
            askers += 1;
            for (peer, _, _) in book.tallies().filter(|(peer, ..)| !liars.contains(peer)) {
                let before = book.opinion(NOW_MS, &peer, Facet::Bytes, &[]).ordering;
                let slander: Vec<_> = fronts.iter().map(|(front, _)| voice(*front, 0, 1000)).collect();
                most = most.max(before - book.opinion(NOW_MS, &peer, Facet::Bytes, &slander).ordering);
            }
        }
        println!(
            "{seed:>4} {askers:>15} {known:>22.3} {sybils_in_top:>17.3} {highest_sybil:>14.3} {vouched_in_top:>22.3} {highest_vouched:>8.3} {most:>14.3}"
        );
        assert!(askers >= 100, "seed {seed}: {askers}");
        assert!(known <= 0.01 && sybils_in_top == 0.0 && highest_sybil <= 0.03, "seed {seed}");
        assert!(vouched_in_top <= 0.05 && highest_vouched < EXECUTION_GATE, "seed {seed}");
        assert!(most <= 0.0, "seed {seed}");
        assert!((score(0.0, 0.0)) <= 0.03);
    }
}

/// A word counts when who says it is known; raters of one kind count once; nobody speaks for himself.
#[test]
fn hearsay_is_bounded() {
    let mut book = TrustBook::default();
    let raters: Vec<_> = (0..30).map(key).collect();
    for rater in &raters {
        (0..20).for_each(|_| book.observe(0, *rater, Facet::Bytes, Outcome::Good));
    }
    let subject = key(99);
    let with = |voices: &[Voice]| book.opinion(0, &subject, Facet::Bytes, voices);
    assert!((with(&[voice(raters[0], 1000, 0)]).hearsay_good - 2.0 * 0.883f64.powi(2)).abs() < 0.01);
    let all: Vec<_> = raters.iter().map(|rater| voice(*rater, 1000, 0)).collect();
    assert!((with(&all).hearsay_good - 5.0).abs() < 1e-12 && with(&all).ordering < EXECUTION_GATE);
    let of_many: Vec<_> = all.iter().map(|one| Voice { subjects: 200, ..*one }).collect();
    assert!((with(&of_many[..1]).hearsay_good - 2.0 * 0.883f64.powi(2) * 16.0 / 200.0).abs() < 0.01);
    let one_house: Vec<_> = raters.iter().map(|rater| Voice { kin: 7, ..voice(*rater, 1000, 0) }).collect();
    assert_eq!(with(&one_house).hearsay.len(), 1);
    assert!(with(&[voice(subject, 1000, 0), voice(key(55), 1000, 0)]).hearsay.is_empty());
    assert_eq!(book.opinion(0, &subject, Facet::Execution, &all).hearsay.len(), 0, "good bytes say nothing of results");
}

/// Bytes that gossip costs a node in an hour, from the real sizes of records and meshes of six: at five nodes all are neighbours.
#[test]
fn gossip_costs_little() {
    let key = NodeKey::from_secret(&[1; 32]);
    let hash = ContentHash::of(b"x");
    let head = |life_ms| RecordHead::new(key.id(), 1_790_000_000_000, life_ms, None);
    let addresses = vec!["/ip4/203.0.113.17/tcp/4747".to_owned(), "/ip4/203.0.113.17/udp/4747/quic-v1".to_owned()];
    let node = NodeRecord {
        head: head(NodeRecord::LIFE_MS_MAX),
        memory_bytes: 1 << 33,
        disk_bytes: 1 << 40,
        experts_per_second: 0,
        addresses,
        models: vec![ModelId(hash); 1],
    };
    let summary = (0..9).map(|i| DomainSummary { domain: format!("domain_{i}"), experts: 60, trials: 2000, hits: 1500 }).collect();
    let profile = ProfileHead {
        head: head(ProfileHead::LIFE_MS_MAX),
        model: ModelId(hash),
        probes: hash,
        build_profile: hash,
        body: BlobRef::of(b"x"),
        summary,
    };
    let attestation = Attestation {
        head: head(Attestation::LIFE_MS_MAX),
        subject: NodeKey::from_secret(&[2; 32]).id(),
        facet: Facet::Bytes,
        from_ms: 0,
        until_ms: 1,
        good: 20,
        bad: 0,
        evidence: Vec::new(),
    };
    let bytes = [
        Verified::seal(&key, node).as_bytes().len(),
        Verified::seal(&key, profile).as_bytes().len(),
        Verified::seal(&key, attestation).as_bytes().len(),
    ];
    let mut told = Vec::new();
    for nodes in [5u64, 1000] {
        let degree = 6.min(nodes - 1);
        // A node and a head every twelve hours; of each of up to sixteen peers once an interval that grows with the network.
        let attest_every_h = crate::record::attest_every_ms(nodes as usize) as f64 / 3_600_000.0;
        let per_node = (bytes[0] + bytes[1]) as f64 / 12.0 + bytes[2] as f64 * 16.min(nodes - 1) as f64 / attest_every_h;
        // Each node sends what it has to all its neighbours but the one that it has it from.
        let sent = per_node * nodes as f64 * (degree - 1).max(1) as f64;
        told.push(sent);
        println!(
            "{nodes} nodes: {sent:.0} bytes an hour sent by each, and as many received ({bytes:?} bytes a record of a node, head, attestation)"
        );
    }
    assert!(told[0] < 200_000.0 && told[1] < 10_000_000.0, "{told:?}");
}
