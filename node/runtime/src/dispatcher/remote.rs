//! Experts that run at peers: which peers can be asked, what is under way with each, what that costs.
//!
//! Does not decide which expert goes where, and does not judge results but for their form: see `choice` and `auditor`.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::sync::mpsc as std_mpsc;
use std::time::{Duration, Instant};

use base::clock::instant;
use base::output::note;
use inference::expert_runner::ExpertResults;
use inference::expert_source::LayerInputs;
use net::PeerId;
use net::allowed::AllowedPeers;
use net::execute_link::{self, ORDERS_MAX, Order, Owed, Told};
use net::network::Network;
use protocol::execute::{self, EXPERTS_MAX, ExecuteRequest, NONCE_BYTES, RESULT_BYTES_MAX, Refusal, Task, USES_MAX, row_bytes};
use protocol::trust::{Facet, Outcome};
use protocol::{BlobRef, ContentHash, ExpertSlot};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::auditor::{Audit, Auditor};
use super::blame::Blamer;
use super::choice::Cost;
use super::event::SourceEvent;
use super::report::SharedReport;

/// What a peer is thought to cost before it has been measured, in milliseconds.
const COST_FIRST: Cost = Cost { start: 1.0, each: 0.3 };
/// An answer is late after so many times what it should take, and not before some time.
const LATE: f64 = 4.0;
const LATE_MIN: Duration = Duration::from_millis(50);
/// So late that any other way will do.
const VERY_LATE: Duration = Duration::from_secs(1);
/// After a stream broke, the peer is left alone for this long, and longer each time.
const PAUSE_FIRST: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// After so long, a peer may have forgotten what it had in memory.
const WARM_FOR: Duration = Duration::from_secs(60);
/// A busy peer is left alone for this long.
const BUSY_PAUSE: Duration = Duration::from_millis(20);
/// A peer that lacked an expert, or would not run any, is asked again after this long: it may have it, or be willing, by then.
const LACKS_FOR: Duration = Duration::from_secs(60);
const REFUSES_FOR: Duration = Duration::from_secs(60);

/// Rows of a layer, as they travel, and which of them each expert works on.
#[derive(Debug, Default)]
pub(super) struct LayerRows {
    hidden_size: usize,
    bytes: Vec<u8>,
    of: HashMap<u32, Vec<u16>>,
}

impl LayerRows {
    /// Takes the rows of some experts of a layer.
    pub(super) fn of(inputs: &LayerInputs<'_>, experts: impl Iterator<Item = u32> + Clone, hidden_size: usize) -> Self {
        let mut used: Vec<u32> = experts.clone().flat_map(|expert| inputs.rows_of(expert)).collect();
        used.sort_unstable();
        used.dedup();
        let mut bytes = Vec::with_capacity(used.len() * row_bytes(hidden_size));
        used.iter().for_each(|&row| inputs.write_row(row, &mut bytes));
        let place = |row: u32| used.binary_search(&row).expect("all rows are among those used") as u16;
        let of = experts.map(|expert| (expert, inputs.rows_of(expert).map(place).collect())).collect();
        Self { hidden_size, bytes, of }
    }

    /// How many rows an expert works on.
    pub(super) fn count(&self, expert: u32) -> u64 {
        self.of.get(&expert).map_or(0, |rows| rows.len() as u64)
    }
}

/// Peers that run experts for us.
pub(super) struct Remote {
    network: Network,
    runtime: Handle,
    allowed: AllowedPeers,
    report: SharedReport,
    auditor: Auditor,
    happening: std_mpsc::SyncSender<(u64, SourceEvent)>,
    blamer: Blamer,
    links: BTreeMap<PeerId, Link>,
    peers: BTreeMap<PeerId, KnownPeer>,
    flights: BTreeMap<u64, Flight>,
    next_number: u64,
    /// Hashes under it are secret: which results are audited is for nobody to foresee.
    secret: RandomState,
}

/// A stream to a peer, and what the peer owes on it.
struct Link {
    orders: mpsc::Sender<Order>,
    owed: Owed,
}

/// What we know of a peer.
struct KnownPeer {
    cost: Cost,
    /// Experts that it said it lacks, and when.
    lacks: HashMap<ContentHash, Instant>,
    pause: Duration,
    not_before: Option<Instant>,
    /// Since when it says that it will not run anything for us.
    refuses: Option<Instant>,
    /// Experts that it ran or was told of since a while: it has them in memory, as likely as not.
    warm: HashSet<ContentHash>,
    warm_since: Instant,
}

/// A request under way.
struct Flight {
    peer: PeerId,
    slots: Vec<(ExpertSlot, BlobRef)>,
    request: ExecuteRequest,
    open: BTreeSet<usize>,
    rows: u64,
    sent: Instant,
    late: Instant,
    first: Option<(Instant, u64)>, // when, and for how many rows
    last: Instant,                 // when the latest result came
    given_up: Option<Lateness>,
    audits: Vec<(usize, Vec<u8>)>,
}

/// How late an answer is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Lateness {
    /// Another peer or the disk may be tried.
    Late,
    /// Any way will do.
    VeryLate,
}

/// What an answer means for experts.
pub(super) enum Came {
    /// One's results, which are used if they are still wanted.
    Results {
        number: u64,
        task: usize,
        slot: ExpertSlot,
        results: ExpertResults,
        bytes: Vec<u8>,
    },
    /// These must be placed anew.
    Replace(Vec<ExpertSlot>),
    Nothing,
}

impl Remote {
    pub(super) fn new(
        network: Network,
        runtime: Handle,
        allowed: AllowedPeers,
        report: SharedReport,
        auditor: Auditor,
        happening: std_mpsc::SyncSender<(u64, SourceEvent)>,
    ) -> Self {
        let blamer = Blamer { network: network.clone(), runtime: runtime.clone(), report: report.clone() };
        Self {
            network,
            runtime,
            allowed,
            report,
            auditor,
            blamer,
            happening,
            links: BTreeMap::new(),
            peers: BTreeMap::new(),
            flights: BTreeMap::new(),
            next_number: 0,
            secret: RandomState::new(),
        }
    }

    /// Peers that can be asked now, each with its cost and the rows that it works on.
    pub(super) fn ready(&mut self) -> Vec<(PeerId, Cost, u64)> {
        let now = instant();
        let connected = self.network.peers.borrow().connected.clone();
        let dropped = self.report.lock().dropped.clone();
        self.links.retain(|peer, link| connected.contains(peer) && !dropped.contains_key(peer) && !link.orders.is_closed());
        let mut ready = Vec::new();
        for peer in connected.into_iter().filter(|peer| self.allowed.includes(peer) && !dropped.contains_key(peer)) {
            let known = self.peers.entry(peer).or_insert_with(KnownPeer::new);
            if known.refuses_at(now) || known.not_before.is_some_and(|at| at > now) {
                continue;
            }
            let busy = self.flights.values().filter(|flight| flight.peer == peer).map(|flight| flight.rows).sum();
            ready.push((peer, known.cost, busy));
        }
        ready
    }

    /// Whether a peer is known to lack an expert.
    pub(super) fn lacks(&self, peer: PeerId, expert: &ContentHash) -> bool {
        self.peers.get(&peer).is_some_and(|known| known.lacks_at(instant(), expert))
    }

    /// Whether a peer can run an expert on a row in less than so many milliseconds.
    pub(super) fn is_nearer(&self, milliseconds: f64, expert: &ContentHash) -> bool {
        self.links.keys().filter(|peer| !self.lacks(**peer, expert)).any(|peer| {
            let known = self.peers.get(peer).filter(|known| !known.refuses_at(instant()));
            known.is_some_and(|known| known.cost.of(1) < milliseconds)
        })
    }

    /// Tells the quickest peer of experts that it will probably be asked to run.
    pub(super) fn hint(&mut self, blobs: &[BlobRef]) {
        let ready = self.ready();
        let Some((peer, ..)) = ready.into_iter().min_by(|(_, a, _), (_, b, _)| a.start.total_cmp(&b.start)) else { return };
        let Some(known) = self.peers.get_mut(&peer) else { return };
        if known.warm_since.elapsed() > WARM_FOR {
            (known.warm, known.warm_since) = (HashSet::new(), instant());
        }
        let now = instant();
        let cold = |hash: &ContentHash| !known.lacks_at(now, hash) && known.warm.insert(*hash);
        let hashes: Vec<_> = blobs.iter().map(|blob| blob.hash).filter(cold).take(EXPERTS_MAX).collect();
        if !hashes.is_empty() {
            let order = Order { number: 0, frame: execute::hint(&hashes), lengths: Vec::new() };
            let _ = self.link(peer).orders.try_send(order); // nothing is lost with it
        }
    }

    /// Asks `peer` to run some experts on their rows.
    pub(super) fn send(&mut self, peer: PeerId, slots: &[(ExpertSlot, BlobRef)], rows: &LayerRows) {
        let mut rest = slots;
        while !rest.is_empty() {
            // Within the limits of one request.
            let mut uses = 0;
            let fits = |(slot, _): &&(ExpertSlot, BlobRef)| {
                uses += rows.count(slot.expert) as usize;
                uses <= USES_MAX && uses * rows.hidden_size * 4 <= RESULT_BYTES_MAX
            };
            let count = rest.iter().take(EXPERTS_MAX).take_while(fits).count().max(1);
            let (now, later) = rest.split_at(count);
            self.send_one(peer, now, rows);
            rest = later;
        }
    }

    fn send_one(&mut self, peer: PeerId, slots: &[(ExpertSlot, BlobRef)], rows: &LayerRows) {
        let row = row_bytes(rows.hidden_size);
        let mut used: Vec<u16> = slots.iter().flat_map(|(slot, _)| rows.of[&slot.expert].iter().copied()).collect();
        used.sort_unstable();
        used.dedup();
        let bytes = used.iter().flat_map(|&number| &rows.bytes[usize::from(number) * row..][..row]).copied().collect();
        let place = |row: &u16| used.binary_search(row).expect("all rows are among those used") as u16;
        let task =
            |(slot, blob): &(ExpertSlot, BlobRef)| Task { expert: blob.hash, rows: rows.of[&slot.expert].iter().map(place).collect() };
        let number = self.next_number;
        self.next_number += 1;
        if let Some(known) = self.peers.get_mut(&peer) {
            known.warm.extend(slots.iter().map(|(_, blob)| blob.hash));
        }
        let request = ExecuteRequest {
            number,
            nonce: self.nonce(number),
            hidden_size: rows.hidden_size as u32,
            rows: bytes,
            tasks: slots.iter().map(task).collect(),
        };
        let lengths = request.tasks.iter().map(|task| (task.rows.len() * rows.hidden_size * 4) as u32).collect();
        let uses = request.tasks.iter().map(|task| task.rows.len() as u64).sum();
        let now = instant();
        let expected = self.peers.get(&peer).map_or(COST_FIRST, |known| known.cost).of(uses);
        {
            let mut report = self.report.lock();
            report.requests += 1;
            *report.rows_sent.entry(peer).or_default() += used.len() as u64;
        }
        let order = Order { number, frame: request.to_bytes(), lengths };
        let flight = Flight {
            peer,
            slots: slots.to_vec(),
            open: (0..slots.len()).collect(),
            request,
            rows: uses,
            sent: now,
            late: now + Duration::from_secs_f64(expected * LATE / 1e3).max(LATE_MIN),
            first: None,
            last: now,
            given_up: None,
            audits: Vec::new(),
        };
        self.flights.insert(number, flight);
        let sent = self.link(peer).orders.try_send(order);
        if sent.is_err() {
            // Told like a stream that breaks, so that it takes the same way.
            let _ = self
                .happening
                .try_send((0, SourceEvent::Told(peer, now, Told::Broken { reason: "its queue is full".to_owned(), blame: false })));
            self.links.remove(&peer);
        }
    }

    fn link(&mut self, peer: PeerId) -> &Link {
        self.links.entry(peer).or_insert_with(|| {
            let (orders, queue) = mpsc::channel(ORDERS_MAX);
            let (happening, blamer, owed) = (self.happening.clone(), self.blamer.clone(), Owed::default());
            let _in_runtime = self.runtime.enter();
            execute_link::start(peer, self.network.streams.clone(), queue, owed.clone(), move |told| {
                // At once: the engine listens only while it waits for something.
                if let Told::Broken { blame: true, reason } = &told {
                    blamer.blame(peer, &format!("broke the protocol: {reason}"));
                }
                happening.try_send((0, SourceEvent::Told(peer, instant(), told))).is_ok()
            });
            Link { orders, owed }
        })
    }

    /// Sixteen bytes that nobody can foresee.
    fn nonce(&self, number: u64) -> [u8; NONCE_BYTES] {
        let mut nonce = [0; NONCE_BYTES];
        for (half, out) in nonce.chunks_exact_mut(8).enumerate() {
            out.copy_from_slice(&self.secret.hash_one((number, half)).to_le_bytes());
        }
        nonce
    }

    /// Takes in what a peer said `at` a time, which may be some ago: the engine listens when it needs something.
    pub(super) fn hear(&mut self, peer: PeerId, at: Instant, told: Told) -> Came {
        match told {
            Told::Results { number, task, bytes } => {
                let Some(flight) = self.flights.get_mut(&number).filter(|flight| flight.peer == peer) else { return Came::Nothing };
                if !flight.open.remove(&task) {
                    return self.blame(peer, "answered the same thing twice");
                }
                let rows = flight.request.tasks[task].rows.len() as u64;
                flight.first.get_or_insert((at, rows));
                flight.last = at;
                let slot = flight.slots[task].0;
                match ExpertResults::from_bytes(&bytes, flight.request.hidden_size as usize) {
                    Some(results) => Came::Results { number, task, slot, results, bytes },
                    None => self.blame(peer, "sent results that are not finite"),
                }
            }
            Told::NotHave { number, task } => {
                let Some(flight) = self.flights.get_mut(&number).filter(|flight| flight.peer == peer) else { return Came::Nothing };
                let (slot, blob) = flight.slots[task];
                flight.open.remove(&task);
                self.peers.entry(peer).or_insert_with(KnownPeer::new).lacks.insert(blob.hash, instant());
                Came::Replace(vec![slot])
            }
            Told::Done { number, receipt } => self.done(peer, number, &receipt),
            Told::Refused { number, why } => {
                let known = self.peers.entry(peer).or_insert_with(KnownPeer::new);
                if why == Refusal::Busy {
                    known.not_before = Some(instant() + BUSY_PAUSE);
                } else if known.refuses.replace(instant()).is_none() {
                    note(&format!("note: {peer} runs no experts for this node: {why}"));
                }
                let Some(flight) = self.flights.remove(&number) else { return Came::Nothing };
                let slots = flight.open_slots();
                self.audit(flight, None);
                Came::Replace(slots)
            }
            // The link has blamed it where it was to blame.
            Told::Broken { blame: true, .. } => Came::Replace(self.lose_all(peer)),
            Told::Broken { blame: false, .. } => {
                let known = self.peers.entry(peer).or_insert_with(KnownPeer::new);
                known.not_before = Some(instant() + known.pause);
                known.pause = (known.pause * 2).min(PAUSE_MAX);
                Came::Replace(self.lose(peer))
            }
        }
    }

    fn done(&mut self, peer: PeerId, number: u64, receipt: &[u8]) -> Came {
        match self.flights.get(&number) {
            Some(flight) if flight.peer == peer && !flight.open.is_empty() => {
                return self.blame(peer, "signed a receipt for results that it did not send");
            }
            Some(flight) if flight.peer == peer => {}
            _ => return Came::Nothing,
        }
        let Some(flight) = self.flights.remove(&number) else { return Came::Nothing };
        if let (Some((first, rows)), Some(known)) = (flight.first, self.peers.get_mut(&peer)) {
            known.pause = PAUSE_FIRST;
            let each = (flight.rows > rows).then(|| (flight.last - first).as_secs_f64() * 1e3 / (flight.rows - rows) as f64);
            let start = (first - flight.sent).as_secs_f64() * 1e3 - rows as f64 * each.unwrap_or(known.cost.each);
            known.cost.learn(start, each);
        }
        self.audit(flight, Some(receipt));
        Came::Nothing
    }

    /// Hands over those results of a request that are to be audited. One that ended without a receipt is audited all the same.
    fn audit(&self, flight: Flight, receipt: Option<&[u8]>) {
        for (task, output) in flight.audits {
            let (slot, blob) = flight.slots[task];
            let input = flight.request.input(&flight.request.tasks[task]);
            let receipt = receipt.map(<[u8]>::to_vec);
            self.auditor.audit(Audit { peer: flight.peer, slot, blob, nonce: flight.request.nonce, input, output, receipt });
        }
    }

    /// Notes that a result is used: whatever way it came, it passes here, where its audit is decided by chance.
    pub(super) fn used(&mut self, number: u64, task: usize, bytes: Vec<u8>) {
        let Some(flight) = self.flights.get_mut(&number) else { return };
        let random = self.secret.hash_one((number, task, u64::MAX));
        if self.report.lock().book.use_result(flight.peer, random) {
            flight.audits.push((task, bytes));
        }
    }

    /// Experts whose answers are late by now, each told once for each degree, with the peer that was asked.
    pub(super) fn late(&mut self) -> Vec<(PeerId, Lateness, Vec<ExpertSlot>)> {
        let now = instant();
        let mut late = Vec::new();
        for flight in self.flights.values_mut() {
            let degree = if now >= flight.sent + VERY_LATE {
                Lateness::VeryLate
            } else if now >= flight.late {
                Lateness::Late
            } else {
                continue;
            };
            if flight.open.is_empty() || flight.given_up >= Some(degree) {
                continue;
            }
            flight.given_up = Some(degree);
            late.push((flight.peer, degree, flight.open_slots()));
        }
        late
    }

    /// When the next answer will be late.
    pub(super) fn next_late(&self) -> Option<Instant> {
        let of = |flight: &Flight| match flight.given_up {
            None => Some(flight.late),
            Some(Lateness::Late) => Some(flight.sent + VERY_LATE),
            Some(Lateness::VeryLate) => None,
        };
        self.flights.values().filter(|flight| !flight.open.is_empty()).filter_map(of).min()
    }

    /// Whether anything is under way.
    pub(super) fn is_waiting(&self) -> bool {
        self.flights.values().any(|flight| !flight.open.is_empty())
    }

    /// Gives up what is under way: nobody waits for it any more.
    pub(super) fn cancel(&mut self) {
        for (number, flight) in std::mem::take(&mut self.flights) {
            if let Some(link) = self.links.get(&flight.peer) {
                link.owed.give_up(number);
            }
            self.audit(flight, None);
        }
    }

    /// Forgets what was under way with a peer; returns what must be placed anew.
    fn lose(&mut self, peer: PeerId) -> Vec<ExpertSlot> {
        self.links.remove(&peer);
        let lost: Vec<u64> = self.flights.iter().filter(|(_, flight)| flight.peer == peer).map(|(number, _)| *number).collect();
        self.report.lock().broken += lost.len() as u64;
        if !lost.is_empty() {
            self.network.observe(peer, Facet::Execution, Outcome::TimedOut);
        }
        let mut slots = Vec::new();
        for flight in lost.iter().filter_map(|number| self.flights.remove(number)).collect::<Vec<_>>() {
            slots.extend(flight.open_slots());
            self.audit(flight, None);
        }
        slots
    }

    fn blame(&mut self, peer: PeerId, what: &str) -> Came {
        self.blamer.blame(peer, what);
        Came::Replace(self.lose_all(peer))
    }

    /// As [`lose`](Self::lose), but with what it has answered already: what is used by now is no longer waited for.
    fn lose_all(&mut self, peer: PeerId) -> Vec<ExpertSlot> {
        let mut slots: Vec<_> = self.flights.values().filter(|flight| flight.peer == peer).flat_map(Flight::all_slots).collect();
        slots.extend(self.lose(peer));
        slots
    }
}

impl Flight {
    fn open_slots(&self) -> Vec<ExpertSlot> {
        self.open.iter().map(|&task| self.slots[task].0).collect()
    }

    fn all_slots(&self) -> Vec<ExpertSlot> {
        self.slots.iter().map(|(slot, _)| *slot).collect()
    }
}

impl KnownPeer {
    fn new() -> Self {
        Self {
            cost: COST_FIRST,
            lacks: HashMap::new(),
            pause: PAUSE_FIRST,
            not_before: None,
            refuses: None,
            warm: HashSet::new(),
            warm_since: instant(),
        }
    }

    fn lacks_at(&self, now: Instant, expert: &ContentHash) -> bool {
        self.lacks.get(expert).is_some_and(|since| now.duration_since(*since) < LACKS_FOR)
    }

    fn refuses_at(&self, now: Instant) -> bool {
        self.refuses.is_some_and(|since| now.duration_since(since) < REFUSES_FOR)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_asked_again_for_what_it_lacked() {
        let (mut known, expert, now) = (KnownPeer::new(), ContentHash::of(b"expert"), instant());
        assert!(!known.lacks_at(now, &expert) && !known.refuses_at(now));
        known.lacks.insert(expert, now);
        known.refuses = Some(now);
        assert!(known.lacks_at(now + LACKS_FOR.mul_f64(0.99), &expert) && known.refuses_at(now + REFUSES_FOR.mul_f64(0.99)));
        assert!(!known.lacks_at(now + LACKS_FOR, &expert) && !known.refuses_at(now + REFUSES_FOR));
    }
}
