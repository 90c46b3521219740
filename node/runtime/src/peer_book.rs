//! The address book: peers that were met and useful, to be tried again. Bounded, and not to be filled from one neighbourhood.
//!
//! One line a peer: address, when it was last reached (ms since 1970), how often it brought something, how often it did not
//! answer since, where it came from, and how fast it sent (bytes a second; 0 before that is known). Losing the file loses
//! nothing but time.

use std::collections::{BTreeMap, BTreeSet};

use net::address::{Neighbourhood, ip_of, neighbourhood, peer_of};
use net::peers::{AddressSource, Peers};
use net::{Multiaddr, PeerId};

/// Peers in a book.
pub(crate) const BOOK_MAX: usize = 48;
/// Peers of one /24 that are tried in one run; those whom the user names come on top.
const TRIED_PER_NEIGHBOURHOOD_MAX: usize = 2;
/// Peers of one /24 in the book: as many again, for when those do not answer.
const KEPT_PER_NEIGHBOURHOOD_MAX: usize = 4;
/// One that has been silent so often, and for so long, is left out.
const SILENCES_MAX: u32 = 10;
const SILENCE_MAX_MS: u64 = 7 * 24 * 3600 * 1000;

/// A peer in the book.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    pub peer: PeerId,
    /// A direct one that was dialled with success, with the peer's id.
    pub address: Multiaddr,
    pub seen_ms: u64,
    /// Runs in which it brought bytes that were verified.
    pub served: u32,
    pub silences: u32,
    pub source: AddressSource,
    /// As last seen.
    pub bytes_per_second: Option<u64>,
}

/// What a run has seen of peers, besides whom it reached.
#[derive(Clone, Default, Debug)]
pub struct Learned {
    /// Who has sent what was verified.
    pub useful: BTreeSet<PeerId>,
    /// Who says that it serves.
    pub promising: BTreeSet<PeerId>,
    /// How fast they sent, in bytes a second.
    pub rates: BTreeMap<PeerId, u64>,
}

impl Entry {
    fn neighbourhood(&self) -> Option<Neighbourhood> {
        ip_of(&self.address).map(neighbourhood)
    }

    fn parse(line: &str) -> Option<Self> {
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        // Books of an earlier version say nothing of speed.
        let [address, seen_ms, served, silences, source, ref speed @ ..] = fields[..] else { return None };
        let bytes_per_second = match speed {
            [] => 0,
            [speed] => speed.parse().ok()?,
            _ => return None,
        };
        let address: Multiaddr = address.parse().ok()?;
        let entry = Self {
            peer: peer_of(&address)?,
            address,
            seen_ms: seen_ms.parse().ok()?,
            served: served.parse().ok()?,
            silences: silences.parse().ok()?,
            source: AddressSource::parse(source)?,
            bytes_per_second: Some(bytes_per_second).filter(|&speed| speed > 0),
        };
        entry.neighbourhood().map(|_| entry)
    }

    fn line(&self) -> String {
        let Self { address, seen_ms, served, silences, source, bytes_per_second, .. } = self;
        format!("{address} {seen_ms} {served} {silences} {source} {}", bytes_per_second.unwrap_or(0))
    }
}

/// An address book.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Book {
    entries: BTreeMap<PeerId, Entry>,
}

impl Book {
    /// Reads what can be read: a damaged line is a peer less, and no failure.
    pub fn parse<'a>(lines: impl IntoIterator<Item = &'a str>) -> (Self, usize) {
        let (mut book, mut unreadable) = (Self::default(), 0);
        for line in lines {
            match Entry::parse(line) {
                Some(entry) => drop(book.entries.insert(entry.peer, entry)),
                None => unreadable += 1,
            }
        }
        book.shorten();
        (book, unreadable)
    }

    /// The lines of its file.
    pub fn lines(&self) -> impl Iterator<Item = String> {
        self.entries.values().map(Entry::line)
    }

    /// Who is in it, the latest seen first.
    pub fn entries(&self) -> Vec<&Entry> {
        let mut entries: Vec<_> = self.entries.values().collect();
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.seen_ms));
        entries
    }

    /// The addresses to try, in order: of each neighbourhood the best two, those first that were of use before; where that
    /// is equal, chance decides, lest an attacker choose.
    pub fn plan(&self, mut random: impl FnMut() -> u64) -> Vec<Multiaddr> {
        let mut order: Vec<_> = self.entries.values().map(|entry| (rank(entry), random(), entry)).collect();
        order.sort_by_key(|(rank, chance, _)| (std::cmp::Reverse(*rank), *chance));
        let mut tried: BTreeMap<Option<Neighbourhood>, usize> = BTreeMap::new();
        let mut plan = Vec::new();
        for (_, _, entry) in order {
            let count = tried.entry(entry.neighbourhood()).or_default();
            if *count < TRIED_PER_NEIGHBOURHOOD_MAX {
                *count += 1;
                plan.push(entry.address.clone());
            }
        }
        plan
    }

    /// Takes in what a run has seen of peers: whom it reached, who did not answer, who brought something, and who else may.
    pub fn learn(&mut self, peers: &Peers, learned: &Learned, now_ms: u64) {
        let Learned { useful, promising, rates } = learned;
        for (&peer, met) in &peers.met {
            let known = self.entries.get(&peer);
            if known.is_none() && !useful.contains(&peer) && !promising.contains(&peer) {
                continue;
            }
            let source = known.map_or(met.source, |entry| entry.source);
            let served = known.map_or(0, |entry| entry.served).saturating_add(u32::from(useful.contains(&peer)));
            let bytes_per_second = rates.get(&peer).copied().or(known.and_then(|entry| entry.bytes_per_second));
            let address = met.address.clone();
            self.entries.insert(peer, Entry { peer, address, seen_ms: now_ms, served, silences: 0, source, bytes_per_second });
        }
        // When nobody answers it may be us who are offline.
        if !peers.met.is_empty() {
            self.entries.values_mut().filter(|entry| peers.silent.contains(&entry.address)).for_each(|entry| entry.silences += 1);
        }
        self.entries.retain(|peer, entry| {
            let gone = entry.silences >= SILENCES_MAX && now_ms.saturating_sub(entry.seen_ms) > SILENCE_MAX_MS;
            !gone && !peers.dropped.contains(peer)
        });
        self.shorten();
    }

    fn shorten(&mut self) {
        let mut crowds: BTreeMap<Option<Neighbourhood>, usize> = BTreeMap::new();
        let mut order: Vec<_> = self.entries.values().collect();
        order.sort_by_key(|entry| std::cmp::Reverse((rank(entry), entry.seen_ms)));
        let mut kept = BTreeSet::new();
        for entry in order {
            let crowd = crowds.entry(entry.neighbourhood()).or_default();
            *crowd += 1;
            if *crowd <= KEPT_PER_NEIGHBOURHOOD_MAX && kept.len() < BOOK_MAX {
                kept.insert(entry.peer);
            }
        }
        self.entries.retain(|peer, _| kept.contains(peer));
    }
}

/// How much a peer is to be preferred: three runs of use count as much as a thousand, which can be had on purpose.
fn rank(entry: &Entry) -> (bool, u32) {
    (entry.silences == 0, entry.served.min(3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use net::network::Met;

    fn entry(ip: &str, served: u32) -> Entry {
        let peer = PeerId::random();
        let address = format!("/ip4/{ip}/tcp/4747/p2p/{peer}").parse().expect("an address");
        Entry { peer, address, seen_ms: 5, served, silences: 0, source: AddressSource::Named, bytes_per_second: None }
    }

    fn book(entries: impl IntoIterator<Item = Entry>) -> Book {
        Book { entries: entries.into_iter().map(|entry| (entry.peer, entry)).collect() }
    }

    /// `SplitMix64`.
    fn random(mut state: u64) -> impl FnMut() -> u64 {
        move || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb)
        }
    }

    #[test]
    fn a_book_reads_what_it_wrote_and_passes_over_the_rest() {
        let fast = Entry { bytes_per_second: Some(7), ..entry("203.0.113.1", 2) };
        let whole = book([fast, entry("10.0.0.1", 0)]);
        let lines: Vec<_> = whole.lines().collect();
        assert_eq!(Book::parse(lines.iter().map(String::as_str)), (whole.clone(), 0));
        let peer = PeerId::random();
        let bad = [
            String::new(),
            "garbage".to_owned(),
            "/ip4/1.2.3.4/tcp/1 1 1 1 named".to_owned(),
            format!("/ip4/1.2.3.4/tcp/1/p2p/{peer} 1 1 1 heard"),
            format!("/ip4/1.2.3.4/tcp/1/p2p/{peer} 1 1 named"),
            format!("/ip4/1.2.3.4/tcp/1/p2p/{peer} 1 1 1 named fast"),
            format!("/ip4/1.2.3.4/tcp/1/p2p/{peer} 1 1 1 named 1 1"),
            format!("/ip4/1.2.3.4/tcp/1/p2p/{peer} 1 -1 1 named"),
            format!("/ip4/1.2.3.4/tcp/1/p2p/{}/p2p-circuit/p2p/{peer} 1 1 1 named", PeerId::random()),
        ];
        let mixed = bad.iter().chain(&lines).map(String::as_str);
        assert_eq!(Book::parse(mixed).0, whole);
        let old = lines.iter().map(|line| line.rsplit_once(' ').expect("fields").0);
        assert_eq!(Book::parse(old).0.entries().len(), 2, "a book without speeds");
    }

    /// N12: of 48 peers 43 are hostile; they come from few neighbourhoods or many, and some have been of use.
    #[test]
    fn in_a_book_that_is_nine_tenths_hostile_the_honest_are_tried_each_time() {
        for seed in 0..100 {
            let honest: Vec<_> = (0..5).map(|i| entry(&format!("198.51.{i}.1"), 1)).collect();
            let many = (0..22).map(|i| entry(&format!("203.0.{}.{i}", seed + i), 3));
            let few = (0..21).map(|i| entry(&format!("192.0.2.{i}"), 3));
            let book = book(honest.iter().cloned().chain(many).chain(few));
            let plan = book.plan(random(seed));
            assert!(honest.iter().all(|entry| plan.contains(&entry.address)), "seed {seed}");
            assert_eq!(plan.iter().filter(|address| address.to_string().contains("/192.0.2.")).count(), 2);
        }
    }

    #[test]
    fn of_equals_in_one_neighbourhood_chance_chooses_and_use_comes_first() {
        let first = |book: &Book, seed| book.plan(random(seed))[0].clone();
        let equal = book((1..4).map(|i| entry(&format!("203.0.113.{i}"), 0)));
        let chosen: BTreeSet<_> = (0..100).map(|seed| first(&equal, seed).to_string()).collect();
        assert_eq!(chosen.len(), 3);
        let useful = entry("203.0.113.9", 1);
        let address = useful.address.clone();
        let unequal = book(equal.entries.into_values().chain([useful]));
        assert!((0..100).all(|seed| first(&unequal, seed) == address));
    }

    #[test]
    fn a_book_never_grows_beyond_its_limits() {
        let mut full = book((0..=255).map(|i| entry(&format!("203.0.{i}.1"), 0)));
        full.shorten();
        assert_eq!(full.entries.len(), BOOK_MAX);
        let mut crowded = book((0..=255).map(|i| entry(&format!("203.0.113.{i}"), 0)).chain([entry("198.51.100.1", 0)]));
        crowded.shorten();
        assert_eq!(crowded.entries.len(), KEPT_PER_NEIGHBOURHOOD_MAX + 1);
    }

    #[test]
    fn the_useful_come_in_the_silent_go_and_the_dropped_go_at_once() {
        let (useful, idle) = (entry("203.0.113.1", 0), entry("203.0.113.2", 0));
        let met = |entry: &Entry| (entry.peer, Met { address: entry.address.clone(), source: AddressSource::Found, serves: true });
        let peers = Peers { met: [met(&useful), met(&idle)].into(), ..Peers::default() };
        let useful_ones = Learned { useful: [useful.peer].into(), rates: [(useful.peer, 9)].into(), ..Learned::default() };
        let (none, mut book) = (Learned::default(), Book::default());
        book.learn(&peers, &useful_ones, 7);
        let expected = Entry { seen_ms: 7, served: 1, source: AddressSource::Found, bytes_per_second: Some(9), ..useful.clone() };
        assert_eq!(book.entries(), [&expected]);
        let silent = Peers { met: [met(&idle)].into(), silent: [useful.address.clone()].into(), ..Peers::default() };
        let day_ms = SILENCE_MAX_MS / 7;
        (1..20).for_each(|day| book.learn(&silent, &none, 7 + day * day_ms / 3));
        assert_eq!(book.entries().len(), 1, "a week has not gone by");
        book.learn(&silent, &none, 8 + SILENCE_MAX_MS);
        assert!(book.entries().is_empty());
        book.learn(&peers, &useful_ones, 7);
        let alone = Peers { silent: [useful.address.clone()].into(), ..Peers::default() };
        (0..20).for_each(|_| book.learn(&alone, &none, u64::MAX));
        assert_eq!(book.entries().len(), 1, "who reaches nobody at all has learned nothing");
        book.learn(&Peers { dropped: [useful.peer].into(), ..Peers::default() }, &none, 9);
        assert!(book.entries().is_empty());
        book.learn(&peers, &Learned { promising: [idle.peer].into(), ..Learned::default() }, 9);
        assert_eq!(book.entries(), [&Entry { seen_ms: 9, source: AddressSource::Found, ..idle.clone() }], "a promise is no service");
    }
}
