//! What this node holds of signed records, and what it thinks of its peers.

pub mod files;
mod frames;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base::clock::now_ms;
use base::failure::{Failure, Kind};

use protocol::record::book::{Known, RecordBook};
use protocol::record::rate::{Allowance, RateLimits};
use protocol::record::{Attestation, Facet, NodeRecord, ProfileHead, Record, Refused, Verified};
use protocol::trust::{Outcome, RATER_MIN, Ruling, TrustBook, Voice, score};
use protocol::{ContentHash, ModelId, NodeId};
use tracing::warn;

use self::files::RecordFiles;
use self::frames::RECORDS_BYTES_MAX;
pub use self::frames::{RecordKind, frames};

/// Most bytes of records that are told to one who comes.
pub const TOLD_BYTES_MAX: u64 = 1 << 20;
/// What one peer may hand on, and what one signer may say.
const OF_SENDER: Allowance = Allowance { burst: 200, per_second: 20 };
const OF_SIGNER: Allowance = Allowance { burst: 64, per_second: 2 };
/// What all signers together may say of whom nothing was known: crowds of new keys must not take what everybody hands on.
const OF_STRANGERS: Allowance = Allowance { burst: 100, per_second: 5 };
/// The same when peers are asked what they hold: of each, and of all together.
const OF_TELLER: Allowance = Allowance { burst: 500, per_second: 1 };
const OF_ALL_TELLERS: Allowance = Allowance { burst: 2000, per_second: 2 };
/// Records that one peer may tell when it is asked what it holds.
const CAUGHT_UP_MAX: usize = 2000;
/// How often what has expired is looked for.
const EXPIRE_EVERY_MS: u64 = 60_000;
/// Domains of bodies of which it is remembered what came of measuring them again.
const CHECKED_MAX: usize = 4096;
/// Nodes of which it is remembered that their records were not of this time.
const DATED_MAX: usize = 256;
/// Kinds of observations that wait to be written down; what was proven wrong does not wait.
const UNSAVED_MAX: usize = 256;

/// Records and opinions.
#[derive(Debug)]
pub struct Records {
    pub book: RecordBook,
    pub trust: TrustBook,
    models: BTreeSet<ModelId>,
    probes: BTreeSet<ContentHash>,
    senders: RateLimits<NodeId>,
    signers: RateLimits<NodeId>,
    strangers: RateLimits<()>,
    tellers: RateLimits<NodeId>,
    told: RateLimits<()>,
    /// What was seen in this process, to be added to what is on the disk: when last, and how often.
    seen: BTreeMap<(NodeId, Facet, Outcome), (u64, u32)>,
    /// This node.
    own: NodeId,
    expired_ms: u64,
    /// Of nodes whose newest record was refused for its date: how far that is ahead of this node's clock, in milliseconds.
    dated: BTreeMap<NodeId, i64>,
    /// Whether another node has signed something with this node's key.
    pub key_is_elsewhere: bool,
    pub counts: GossipCounts,
}

/// What has been gossiped.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct GossipCounts {
    pub taken: u64,
    pub ignored: u64,
    pub refused: u64,
    /// Of those ignored, the ones that are not of this time.
    pub(crate) misdated: u64,
    pub(crate) over_rate: u64,
    pub(crate) bytes_in: u64,
    pub(crate) bytes_out: u64,
}

/// Records that several parts of a node share.
#[derive(Clone, Debug)]
pub struct SharedRecords {
    records: Arc<Mutex<Records>>,
    files: RecordFiles,
}

impl SharedRecords {
    /// What is on the disk, for the node `own`; its records may be of `models` and `probes`.
    pub fn load(files: RecordFiles, own: NodeId, models: BTreeSet<ModelId>, probes: BTreeSet<ContentHash>) -> Result<Self, Failure> {
        let mut records = Records {
            book: RecordBook::default(),
            trust: files.trust()?,
            models,
            probes,
            senders: RateLimits::new(OF_SENDER),
            signers: RateLimits::new(OF_SIGNER),
            strangers: RateLimits::new(OF_STRANGERS),
            tellers: RateLimits::new(OF_TELLER),
            told: RateLimits::new(OF_ALL_TELLERS),
            seen: BTreeMap::new(),
            own,
            expired_ms: 0,
            dated: BTreeMap::new(),
            key_is_elsewhere: false,
            counts: GossipCounts::default(),
        };
        let now_ms = now_ms();
        for (kind, bytes) in files.records()? {
            // What has expired meanwhile is let go.
            let _ = records.open(now_ms, kind, bytes, Checked::Before);
        }
        Ok(Self { records: Arc::new(Mutex::new(records)), files })
    }

    pub fn lock(&self) -> MutexGuard<'_, Records> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what was seen of a peer. What was proven wrong is on the disk before anything else happens.
    pub fn observe(&self, peer: NodeId, facet: Facet, outcome: Outcome) {
        let waiting = self.lock().observe(now_ms(), peer, facet, outcome);
        if (outcome.is_proof() || waiting > UNSAVED_MAX)
            && let Err(failure) = self.save_trust()
        {
            warn!(%failure, "what was seen of peers is not written down yet");
        }
    }

    /// Writes down what was seen, added to what others have written meanwhile.
    pub fn save_trust(&self) -> Result<(), Failure> {
        if self.lock().seen.is_empty() {
            return Ok(());
        }
        let _editing = self.files.files.exclusive()?;
        let mut trust = self.files.trust()?;
        let seen = std::mem::take(&mut self.lock().seen);
        for (&(peer, facet, outcome), &(at_ms, times)) in &seen {
            trust.observe_often(at_ms, peer, facet, outcome, times);
        }
        let saved = self.files.set_trust(&trust);
        if saved.is_err() {
            self.lock().put_back(seen);
        }
        saved
    }

    /// What came of measuring again what a node says in a body of a domain, if that was done. What is false in one is believed in none.
    pub fn was_true(&self, node: NodeId, body: ContentHash, domain: &str) -> Result<Option<bool>, Failure> {
        let lines = self.files.files.lines("checked")?;
        let found: Vec<_> = lines.iter().filter_map(|line| line.strip_prefix(&format!("{node} {body} "))).collect();
        let is_false = found.iter().any(|line| line.ends_with(" false"));
        Ok(if is_false { Some(false) } else { found.contains(&format!("{domain} true").as_str()).then_some(true) })
    }

    /// Notes what came of it; says whether that is news of the body. To say a thing twice proves it once.
    pub fn note_checked(&self, node: NodeId, body: ContentHash, domain: &str, is_true: bool) -> Result<bool, Failure> {
        let _editing = self.files.files.exclusive()?;
        let mut checked = self.files.files.lines("checked")?;
        let known = |line: &&String| line.starts_with(&format!("{node} {body} "));
        let is_news = if is_true {
            !checked.iter().any(|line| known(&line))
        } else {
            !checked.iter().any(|line| known(&line) && line.ends_with(" false"))
        };
        let line = format!("{node} {body} {domain} {is_true}");
        if !checked.contains(&line) {
            checked.push(line);
            let from = checked.len().saturating_sub(CHECKED_MAX);
            self.files.files.set_lines("checked", checked.into_iter().skip(from))?;
        }
        Ok(is_news)
    }

    /// Takes over what is on the disk: other commands have seen more, and the user may have decided something.
    pub fn reload_trust(&self) -> Result<(), Failure> {
        self.save_trust()?;
        let trust = self.files.trust()?;
        let mut records = self.lock();
        records.trust = trust;
        let unsaved: Vec<_> = records.seen.iter().map(|(about, seen)| (*about, *seen)).collect();
        for ((peer, facet, outcome), (at_ms, times)) in unsaved {
            records.trust.observe_often(at_ms, peer, facet, outcome, times);
        }
        Ok(())
    }

    /// Writes the records down.
    pub fn save_records(&self) -> Result<(), Failure> {
        let bytes = self.lock().to_bytes(RECORDS_BYTES_MAX as usize);
        self.files.set_records(&bytes)
    }

    /// Takes in what a peer holds, as it was asked. Says how many were new, or that the peer hands on forgeries.
    pub fn catch_up(&self, teller: NodeId, bytes: &[u8]) -> Result<usize, Refused> {
        let mut new = 0;
        for (kind, envelope) in frames(bytes).0.into_iter().take(CAUGHT_UP_MAX) {
            // One by one: others want the records, too.
            match self.lock().open(now_ms(), kind, envelope, Checked::Told(teller)) {
                Ok(()) => new += 1,
                Err(refused) if refused.is_forgery() => return Err(refused),
                Err(_) => {}
            }
        }
        Ok(new)
    }
}

/// Whether a record was within somebody's allowance when it came.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Checked {
    /// It needs none: it was asked for by name, or is this node's own.
    Before,
    /// It was gossiped.
    Not,
    /// It was told with all that a peer holds.
    Told(NodeId),
}

impl Records {
    /// Notes what was seen of a peer; says how many kinds of observations wait to be written down.
    fn observe(&mut self, now_ms: u64, peer: NodeId, facet: Facet, outcome: Outcome) -> usize {
        self.trust.observe_often(now_ms, peer, facet, outcome, 1);
        let (at_ms, times) = self.seen.entry((peer, facet, outcome)).or_default();
        (*at_ms, *times) = (now_ms, times.saturating_add(1));
        self.seen.len()
    }

    fn put_back(&mut self, seen: BTreeMap<(NodeId, Facet, Outcome), (u64, u32)>) {
        for (about, (at_ms, times)) in seen {
            let entry = self.seen.entry(about).or_default();
            *entry = (entry.0.max(at_ms), entry.1.saturating_add(times));
        }
    }

    /// Whether a peer may hand on one more record now.
    pub(crate) fn is_within_allowance(&mut self, now_ms: u64, sender: NodeId) -> bool {
        let within = self.senders.take(now_ms, sender);
        self.counts.over_rate += u64::from(!within);
        within
    }

    /// A model that heads may be about.
    pub fn know(&mut self, model: ModelId) {
        if self.models.insert(model) {
            let known = Known { models: &|model| self.models.contains(model), probes: &|probes| self.probes.contains(probes) };
            for head in self.book.unpark(&known) {
                let _ = self.book.take_head(head, &known, &|node| best(&self.trust, now_ms(), self.own, node));
            }
        }
    }

    /// Takes in what was handed on.
    pub fn take(&mut self, now_ms: u64, kind: RecordKind, bytes: Vec<u8>) -> Result<(), Refused> {
        self.counts.bytes_in += bytes.len() as u64;
        self.open(now_ms, kind, bytes, Checked::Not)
    }

    /// Takes in what a peer was asked for, or what this node says itself.
    pub fn take_requested(&mut self, now_ms: u64, kind: RecordKind, bytes: Vec<u8>) -> Result<(), Refused> {
        self.open(now_ms, kind, bytes, Checked::Before)
    }

    fn open(&mut self, now_ms: u64, kind: RecordKind, bytes: Vec<u8>, checked: Checked) -> Result<(), Refused> {
        if now_ms.abs_diff(self.expired_ms) >= EXPIRE_EVERY_MS {
            self.book.expire(now_ms);
            self.expired_ms = now_ms;
        }
        let own = self.own;
        let taken = match kind {
            RecordKind::Profile => self.verified::<ProfileHead>(now_ms, bytes, checked).and_then(|head| {
                let Self { book, trust, models, probes, .. } = self;
                let known = Known { models: &|model| models.contains(model), probes: &|set| probes.contains(set) };
                book.take_head(head, &known, &|node| best(trust, now_ms, own, node))
            }),
            RecordKind::Attestation => self.verified::<Attestation>(now_ms, bytes, checked).and_then(|attestation| {
                let trust = &self.trust;
                self.book.take_attestation(attestation, &|node| best(trust, now_ms, own, node))
            }),
            RecordKind::Node => self.verified::<NodeRecord>(now_ms, bytes, checked).and_then(|node| {
                // This node signs its own newest: a newer one that comes from elsewhere was signed by another with the same key.
                let newest = self.book.node(&own).map(|known| known.record().head.seq).filter(|_| node.node() == own);
                self.key_is_elsewhere |= checked != Checked::Before && newest.is_some_and(|newest| newest < node.record().head.seq);
                let trust = &self.trust;
                self.book.take_node(node, &|node| best(trust, now_ms, own, node))
            }),
        };
        // Of a stranger it means nothing that he is two-faced: there are always more keys.
        if let Err(Refused::Equivocation(node)) = taken
            && self.trust.tallies().any(|(peer, ..)| peer == node)
        {
            self.observe(now_ms, node, Facet::Profile, Outcome::WrongResult);
        }
        if let Err(Refused::Times { node, issued_ms }) = taken {
            self.counts.misdated += 1;
            if node != own && (self.dated.len() < DATED_MAX || self.dated.contains_key(&node)) {
                self.dated.insert(node, issued_ms.saturating_sub(now_ms).cast_signed() - now_ms.saturating_sub(issued_ms).cast_signed());
            }
        }
        match &taken {
            Ok(()) => self.counts.taken += 1,
            Err(refused) if refused.is_forgery() => self.counts.refused += 1,
            Err(_) => self.counts.ignored += 1,
        }
        taken
    }

    /// How far the clocks of others are ahead of this node's, in milliseconds, when most of those whose records come here say so: then it is this
    /// one that is wrong.
    pub fn clock_offset_ms(&self) -> Option<i64> {
        let timely = self.book.nodes(now_ms()).filter(|node| node.node() != self.own && !self.dated.contains_key(&node.node())).count();
        if self.dated.len() <= timely {
            return None;
        }
        let mut offsets: Vec<_> = self.dated.values().copied().collect();
        offsets.sort_unstable();
        offsets.get(offsets.len() / 2).copied()
    }

    fn verified<R: Record>(&mut self, now_ms: u64, bytes: Vec<u8>, checked: Checked) -> Result<Verified<R>, Refused> {
        let record = Verified::<R>::open(now_ms, bytes)?;
        let node = record.node();
        self.dated.remove(&node);
        let stranger = !self.book.knows(&node) && best(&self.trust, now_ms, self.own, &node) <= score(0.0, 0.0);
        // After the signature: nobody can use up another's allowance.
        let within = match checked {
            Checked::Before => true,
            Checked::Not => self.signers.take(now_ms, node) && (!stranger || self.strangers.take(now_ms, ())),
            Checked::Told(teller) => !stranger || self.tellers.take(now_ms, teller) && self.told.take(now_ms, ()),
        };
        if !within {
            self.counts.over_rate += 1;
            return Err(Refused::Rate);
        }
        if self.trust.rulings().get(&record.node()) == Some(&Ruling::Banned) {
            return Err(Refused::Full);
        }
        Ok(record)
    }

    /// A peer's score with hearsay, which orders and does nothing else.
    pub fn ordering(&self, now_ms: u64, peer: &NodeId, facet: Facet) -> f64 {
        self.trust.opinion(now_ms, peer, facet, &self.voices(now_ms, peer, facet)).ordering
    }

    /// The same, and this node before all others.
    pub fn ordering_own_first(&self, now_ms: u64, node: &NodeId, facet: Facet) -> f64 {
        if *node == self.own { f64::INFINITY } else { self.ordering(now_ms, node, facet) }
    }

    /// A peer's score from what was seen here, and this node before all others.
    pub fn first_hand(&self, now_ms: u64, node: &NodeId, facet: Facet) -> f64 {
        if *node == self.own { f64::INFINITY } else { self.trust.first_hand(now_ms, node, facet) }
    }

    /// This node.
    pub fn own(&self) -> NodeId {
        self.own
    }

    /// Who is not let in.
    pub fn unwelcome(&self, now_ms: u64) -> BTreeSet<NodeId> {
        let seen = self.trust.tallies().map(|(peer, ..)| peer);
        seen.chain(self.trust.rulings().keys().copied()).filter(|peer| self.trust.is_unwelcome(now_ms, peer)).collect()
    }

    /// What peers say of another in a facet.
    pub fn voices(&self, now_ms: u64, peer: &NodeId, facet: Facet) -> Vec<Voice> {
        // Crowds of raters who are not listened to cost a look each.
        let heard = |one: &&Verified<Attestation>| self.trust.first_hand(now_ms, &one.node(), facet) >= RATER_MIN;
        let voice = |one: &Verified<Attestation>| {
            let (rater, Attestation { good, bad, .. }) = (one.node(), one.record());
            Voice { rater, good: *good, bad: *bad, subjects: self.book.vouched_for(&rater, facet), kin: self.kin(&rater) }
        };
        self.book.attestations_about(now_ms, peer, facet).filter(heard).map(voice).collect()
    }

    /// Raters of one /24, as they say themselves where they are, count once. On private networks everybody may be in the same.
    fn kin(&self, rater: &NodeId) -> u64 {
        let place = self.book.node(rater).and_then(|node| {
            let mut ips = node
                .record()
                .addresses
                .iter()
                .filter_map(|address| address.strip_prefix("/ip4/")?.split('/').next()?.parse::<Ipv4Addr>().ok());
            ips.find(|ip| !ip.is_loopback() && !ip.is_private() && !ip.is_link_local())
        });
        let hash = place.map_or_else(|| ContentHash::of(rater.as_bytes()), |ip| ContentHash::of(&ip.octets()[..3]));
        u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("eight of 32 bytes"))
    }

    /// All records in frames, up to so many bytes: this node's own first, then those of the nodes that it pays most to remember.
    pub fn to_bytes(&self, bytes_max: usize) -> Vec<u8> {
        let mut nodes: Vec<_> = self.book.signers().into_iter().map(|node| (best(&self.trust, now_ms(), self.own, &node), node)).collect();
        nodes.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut bytes = Vec::new();
        for envelope in nodes.iter().flat_map(|(_, node)| self.book.bytes_of(node)) {
            if bytes.len() + envelope.len() + 5 <= bytes_max {
                bytes.push(kind_of(envelope) as u8);
                bytes.extend((envelope.len() as u32).to_le_bytes());
                bytes.extend(envelope);
            }
        }
        bytes
    }
}

/// A node's best score of any kind: whom it pays to remember, and this node first.
fn best(trust: &TrustBook, now_ms: u64, own: NodeId, node: &NodeId) -> f64 {
    if *node == own {
        return f64::INFINITY;
    }
    Facet::ALL.iter().map(|facet| trust.first_hand(now_ms, node, *facet)).fold(0.0, f64::max)
}

/// What kind of record a valid envelope holds: its payload type says so.
fn kind_of(envelope: &[u8]) -> RecordKind {
    const TYPE_AT: usize = 1 + 32 + 64 + 1;
    match envelope.get(TYPE_AT + "/confrere/".len()) {
        Some(b'p') => RecordKind::Profile,
        Some(b'a') => RecordKind::Attestation,
        _ => RecordKind::Node,
    }
}

/// What a clock that differs from those of others means, for people.
pub fn clock_text(offset_ms: i64) -> String {
    let seconds = offset_ms.unsigned_abs() / 1000;
    let length = match seconds {
        0..=7199 => format!("{} minutes", seconds / 60),
        7200..=172_799 => format!("{} hours", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    };
    let (others, own) = if offset_ms > 0 { ("ahead of", "slow") } else { ("behind", "fast") };
    format!("what peers sign is dated {length} {others} this clock, and is not accepted: this clock is probably {own}")
}

/// What it means that another node runs with the same key, for people.
pub const KEY_ELSEWHERE: &str = "another node runs with the same key: peers take the two for one, and each loses what is meant for the other; give one a data directory of its own";

/// The peer that a user means: a key, or a peer id.
pub fn parse_peer(text: &str) -> Result<NodeId, Failure> {
    let by_id = || text.parse().ok().and_then(crate::address::node_id);
    text.parse().ok().or_else(by_id).ok_or_else(|| {
        Failure::new(
            Kind::Usage,
            format!("{text:?} is no peer: write its key (ed25519:…) as its `confrere id` prints it, or its peer id (12D3Koo…)"),
        )
    })
}
