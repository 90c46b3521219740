//! Gets blobs from whichever peers have them: drives `protocol::exchange` with links, threads and a clock.
//!
//! What is asked of whom is decided there, when to give up in `give_up`; here it is done, call by call.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc as std_mpsc};
use std::time::Duration;

use base::clock::now_ms;
use base::failure::{Failure, Kind};
use libp2p::PeerId;
use protocol::exchange::{DownloadAction, DownloadEvent, Downloads};
use protocol::group_hashes::group_count;
use protocol::trust::{Facet, Outcome};
use protocol::{BlobRef, ContentHash, ModelManifest};
use store::{BlobStore, PartialBlob, PutOutcome, StoreError};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;
use tracing::{debug, warn};

use crate::assembly::{Assembled, Assembly, WORK_MAX, Work, start_verifiers};
use crate::link::{Heard, Link, LinkEvent};
use crate::network::Network;
use crate::progress::{Listed, SharedTransfer, Transfer};
use crate::wanted::Wanted;

const HEARD_MAX: usize = 16;
const PREPARED_MAX: usize = 64;
const FINISHED_MAX: usize = 64;
/// Blobs that are made durable at the same time.
const FINISHING_MAX: usize = 4;
/// Blobs that wait for whoever asked for them.
const READY_MAX: usize = 4;
/// Memory for what had come when fetches were broken off.
const KEPT_BYTES_MAX: usize = 64 << 20;
pub(super) const TICK: Duration = Duration::from_millis(protocol::exchange::events::TICK_MS);
/// A blob's arrival that was broken off a moment ago has this long to come to its end.
const ARRIVING_PAUSE: Duration = Duration::from_millis(20);
const ARRIVING_ATTEMPTS: u32 = 100;
const PAUSE_FIRST: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// After so many broken streams in a row, a peer is not counted on any more.
pub(super) const BREAKS_MAX: u32 = 8;
/// Of no blob that is wanted.
const NO_SERIAL: u64 = 0;

/// A thing that came, and from whom.
#[derive(Debug)]
pub struct Fetched {
    /// Which of those asked for.
    pub index: usize,
    /// Its bytes, verified; empty when they went to the store.
    pub bytes: Vec<u8>,
    /// Who sent the last of it.
    pub peer: PeerId,
}

/// Something to fetch and what to call it in an error.
#[derive(Clone, Debug)]
pub struct FetchItem {
    pub wanted: Wanted,
    pub name: String,
}

/// How fast peers have sent, in bytes a second, as last seen; shared with the address book.
pub type PeerRates = Arc<Mutex<BTreeMap<PeerId, u64>>>;

/// Fetches from the peers of one network.
pub struct Fetcher {
    pub(super) network: Network,
    pub(super) timeout: Duration,
    pub(super) machine: Downloads<PeerId, Vec<u8>>,
    began: Instant,
    pub(super) links: BTreeMap<PeerId, Link>,
    next_link: u64,
    pub(super) heard: (mpsc::Sender<Heard>, mpsc::Receiver<Heard>),
    work: std_mpsc::SyncSender<Work>,
    done: mpsc::Receiver<Assembled>,
    prepared: (mpsc::Sender<Prepared>, mpsc::Receiver<Prepared>),
    finished: (mpsc::Sender<Finished>, mpsc::Receiver<Finished>),
    finishing: Arc<Semaphore>,
    assemblies: HashMap<ContentHash, Arc<Assembly>>,
    /// Blobs whose length is what somebody said.
    told: HashSet<ContentHash>,
    /// What had come when a fetch was broken off; the oldest goes first.
    kept: VecDeque<(ContentHash, Arc<Assembly>)>,
    pub(super) arrived: Arc<AtomicU64>, // bytes of blobs from all peers, as they come
    rates: PeerRates,
    progress: SharedTransfer,
    round: u64,
    /// Peers whose streams broke since they last brought something: asked after a pause.
    pub(super) unsteady: HashMap<PeerId, Unsteady>,
    pub(super) liars: BTreeMap<PeerId, String>,
}

#[derive(Clone, Copy)]
pub(super) struct Unsteady {
    pub(super) breaks: u32,
    pub(super) until: Instant,
}

/// Room for a blob in the store, or why there is none.
struct Prepared {
    round: u64,
    hash: ContentHash,
    room: Result<PartialBlob, StoreError>,
}

/// A blob that was made durable, or why not.
struct Finished {
    round: u64,
    hash: ContentHash,
    outcome: Result<PutOutcome, StoreError>,
}

/// The state of one call.
pub(super) struct Round {
    pub(super) wants: Vec<FetchItem>,
    pub(super) by_hash: HashMap<ContentHash, Vec<usize>>,
    senders: HashMap<ContentHash, PeerId>,
    ready: VecDeque<Fetched>,
    left: usize, // blobs
    pub(super) last_progress: Instant,
    arrived: u64,
    pub(super) last_break: Option<String>,
}

impl Round {
    pub(super) fn new(wants: Vec<FetchItem>, by_hash: HashMap<ContentHash, Vec<usize>>, arrived: u64) -> Self {
        Self {
            left: by_hash.len(),
            by_hash,
            senders: HashMap::new(),
            ready: VecDeque::new(),
            wants,
            last_progress: Instant::now(),
            arrived,
            last_break: None,
        }
    }
}

enum Next {
    Tick,
    Done(Assembled),
    Prepared(Prepared),
    Finished(Finished),
    Heard(Heard),
    PeersChanged,
    Taken,
    NetworkEnded,
}

impl Fetcher {
    /// A fetcher that gives up after `timeout` without progress, and notes how fast peers are in `rates`.
    pub fn new(network: Network, timeout: Duration, rates: PeerRates) -> Self {
        let (done_sender, done) = mpsc::channel(WORK_MAX);
        Self {
            network,
            timeout,
            machine: Downloads::new(now_ms()),
            began: Instant::now(),
            links: BTreeMap::new(),
            next_link: 0,
            heard: mpsc::channel(HEARD_MAX),
            work: start_verifiers(&done_sender),
            done,
            prepared: mpsc::channel(PREPARED_MAX),
            finished: mpsc::channel(FINISHED_MAX),
            finishing: Arc::new(Semaphore::new(FINISHING_MAX)),
            assemblies: HashMap::new(),
            told: HashSet::new(),
            kept: VecDeque::new(),
            arrived: Arc::default(),
            rates,
            progress: SharedTransfer::default(),
            round: 0,
            unsteady: HashMap::new(),
            liars: BTreeMap::new(),
        }
    }

    /// Learns of a model: from then on, peers say which of its blobs they have.
    pub fn follow(&mut self, manifest: &ModelManifest) {
        let blobs = manifest.blobs().map(|blob| blob.hash).collect();
        let actions = self.machine.handle(self.machine_ms(), DownloadEvent::Follow { model: manifest.id(), blobs });
        for action in actions {
            if let DownloadAction::Send { peer, message } = action
                && let Some(link) = self.links.get(&peer)
            {
                let _ = link.say(message); // a link as full as that is about to end
            }
        }
    }

    /// Fetches everything in `wants` and sends each to `results` as it comes.
    pub async fn fetch(&mut self, wants: Vec<FetchItem>, results: &mpsc::Sender<Fetched>) -> Result<(), Failure> {
        self.abandon();
        let mut by_hash: HashMap<_, Vec<_>> = HashMap::new();
        for (index, want) in wants.iter().enumerate() {
            let blob = want.wanted.blob();
            if group_count(blob.length).is_none() {
                return Err(Failure::new(Kind::Refused, format!("{} has {} bytes, more than is moved", want.name, blob.length)));
            }
            by_hash.entry(blob.hash).or_default().push(index);
        }
        let _listed = self.list(&wants, &by_hash);
        let mut round = Round::new(wants, by_hash, self.arrived.load(Ordering::Relaxed));
        let result = self.run(&mut round, results).await;
        self.rates.lock().unwrap_or_else(PoisonError::into_inner).extend(self.machine.rates());
        self.abandon();
        result
    }

    /// Where it is told what is on its way.
    pub fn progress(&self) -> SharedTransfer {
        Arc::clone(&self.progress)
    }

    fn list(&self, wants: &[FetchItem], by_hash: &HashMap<ContentHash, Vec<usize>>) -> Listed {
        let first = wants.first().map_or_else(String::new, |want| want.name.clone());
        let more = by_hash.len().saturating_sub(1);
        let transfer = Transfer {
            name: if more > 0 { format!("{first} and {more} more") } else { first },
            total: by_hash.values().map(|indices| wants[indices[0]].wanted.blob().length).sum(),
            peers: self.network.peers.borrow().connected.len(),
            before: self.arrived.load(Ordering::Relaxed),
            arrived: Arc::clone(&self.arrived),
        };
        Listed::new(&self.progress, transfer)
    }

    /// Gives up what is wanted, as after a fetch that nobody waits for any more; what had come is kept.
    fn abandon(&mut self) {
        self.round += 1;
        for action in self.machine.handle(self.machine_ms(), DownloadEvent::UnwantAll) {
            if let DownloadAction::Send { peer, message } = action
                && let Some(link) = self.links.get(&peer)
            {
                let _ = link.say(message); // what comes all the same is surplus
            }
        }
        // What is put together by a length that is hearsay is of no use to anybody else.
        let told = std::mem::take(&mut self.told);
        self.kept.extend(self.assemblies.drain().filter(|(hash, assembly)| assembly.kept_bytes() > 0 && !told.contains(hash)));
        let mut bytes: usize = self.kept.iter().map(|(_, assembly)| assembly.kept_bytes()).sum();
        while bytes > KEPT_BYTES_MAX {
            let Some((_, oldest)) = self.kept.pop_front() else { break };
            bytes -= oldest.kept_bytes();
        }
    }

    async fn run(&mut self, round: &mut Round, results: &mpsc::Sender<Fetched>) -> Result<(), Failure> {
        self.mind_links(round)?;
        let blobs: HashMap<_, _> = round.wants.iter().map(|want| (want.wanted.blob().hash, &want.wanted)).collect();
        let blobs: Vec<_> =
            blobs.into_values().map(|wanted| (wanted.blob(), wanted.urgency(), matches!(wanted, Wanted::ToldBlob(_)))).collect();
        for (blob, urgency, unsure) in blobs {
            self.tell(round, DownloadEvent::Want { blob, urgency })?;
            if unsure {
                self.told.insert(blob.hash);
                self.tell(round, DownloadEvent::Unsure { hash: blob.hash })?;
            }
        }
        let mut peers = self.network.peers.clone();
        let mut next_tick = Instant::now();
        while round.left > 0 || !round.ready.is_empty() {
            // Whoever asked is slower than the network: nothing is read meanwhile.
            let full = round.ready.len() >= READY_MAX;
            let next = tokio::select! {
                biased; // answers that are there count before deadlines; the clock comes first because it looks at both
                () = tokio::time::sleep_until(next_tick) => Next::Tick,
                room = results.reserve(), if !round.ready.is_empty() => {
                    match (room, round.ready.pop_front()) {
                        (Ok(room), Some(fetched)) => room.send(fetched),
                        _ => round.ready.clear(), // nobody listens any more: the caller gave up
                    }
                    Next::Taken
                }
                Some(done) = self.done.recv(), if !full => Next::Done(done),
                Some(finished) = self.finished.1.recv() => Next::Finished(finished),
                Some(prepared) = self.prepared.1.recv() => Next::Prepared(prepared),
                Some(heard) = self.heard.1.recv(), if !full => Next::Heard(heard),
                changed = peers.changed() => if changed.is_ok() { Next::PeersChanged } else { Next::NetworkEnded },
            };
            match next {
                Next::Tick => {
                    next_tick = Instant::now() + TICK;
                    self.on_tick(round)?;
                }
                Next::Taken => round.last_progress = Instant::now(), // a slow taker is not a silent peer
                Next::Done(done) => self.on_done(round, done)?,
                Next::Prepared(prepared) => self.on_prepared(round, prepared)?,
                Next::Finished(Finished { round: number, hash, outcome }) if number == self.round => {
                    outcome?;
                    self.deliver(round, hash, Vec::new());
                }
                Next::Finished(_) => {}
                Next::Heard(heard) => self.on_heard(round, heard)?,
                Next::PeersChanged => self.mind_links(round)?,
                Next::NetworkEnded => return Err(Failure::new(Kind::Other, "the network has ended")),
            }
        }
        Ok(())
    }

    fn on_tick(&mut self, round: &mut Round) -> Result<(), Failure> {
        self.mind_links(round)?;
        let progress: Vec<_> = self.links.iter().map(|(peer, link)| (*peer, link.received())).collect();
        for (peer, bytes) in progress {
            self.tell(round, DownloadEvent::Progress { peer, bytes })?;
        }
        if round.ready.len() < READY_MAX {
            self.tell(round, DownloadEvent::Tick)?;
        }
        let arrived = self.arrived.load(Ordering::Relaxed);
        if arrived != round.arrived {
            (round.arrived, round.last_progress) = (arrived, Instant::now());
        }
        self.check_hope(round)
    }

    fn on_done(&mut self, round: &mut Round, done: Assembled) -> Result<(), Failure> {
        let Assembled { peer, hash, serial, check, right } = done;
        match right {
            Ok(true) => {
                self.unsteady.remove(&peer);
                round.senders.insert(hash, peer);
                self.tell(round, DownloadEvent::Verified { peer, hash, serial, check })
            }
            Ok(false) => self.tell(round, DownloadEvent::Wrong { peer, hash, serial, check }),
            Err(error) => {
                // Wanted no more, it is only counted as no longer on its way.
                self.tell(round, DownloadEvent::Unwant { hash })?;
                self.tell(round, DownloadEvent::Verified { peer, hash, serial, check })?;
                if round.by_hash.contains_key(&hash) { Err(error.into()) } else { Ok(()) }
            }
        }
    }

    fn on_prepared(&mut self, round: &mut Round, prepared: Prepared) -> Result<(), Failure> {
        if prepared.round != self.round {
            return Ok(()); // dropped, it keeps what it has for whoever wants it now
        }
        let assembly = Assembly::Store(prepared.room?);
        let (hashes, here) = assembly.here();
        self.assemblies.insert(prepared.hash, Arc::new(assembly));
        self.tell(round, DownloadEvent::Prepared { hash: prepared.hash, hashes, here })
    }

    pub(super) fn on_heard(&mut self, round: &mut Round, heard: Heard) -> Result<(), Failure> {
        let Heard { peer, link: number, what } = heard;
        let Some(link) = self.links.get(&peer).filter(|link| link.number == number) else { return Ok(()) };
        match what {
            LinkEvent::Up(requests_max) => {
                if self.network.is_doubted(peer) {
                    self.tell(round, DownloadEvent::Doubted { peer })?;
                }
                self.tell(round, DownloadEvent::PeerUp { peer, requests_max })
            }
            LinkEvent::Said(message) => {
                let bytes = link.received();
                self.tell(round, DownloadEvent::Progress { peer, bytes })?;
                self.tell(round, DownloadEvent::Received { peer, message })
            }
            LinkEvent::Ended(reason) => {
                debug!(%peer, reason, "stream broke");
                round.last_break = Some(reason);
                self.hang_up(peer);
                self.tell(round, DownloadEvent::PeerDown { peer })
            }
            LinkEvent::Malformed(malformed) => {
                self.note_liar(peer, format!("sent a {malformed}"));
                self.tell(round, DownloadEvent::PeerDown { peer })
            }
        }
    }

    /// Tells the machine something, and does all that it says, whatever fails.
    fn tell(&mut self, round: &mut Round, event: DownloadEvent<PeerId, Vec<u8>>) -> Result<(), Failure> {
        let mut events = VecDeque::from([event]);
        let mut result = Ok(());
        while let Some(event) = events.pop_front() {
            for action in self.machine.handle(self.machine_ms(), event) {
                match action {
                    DownloadAction::Send { peer, message } => {
                        if self.links.get(&peer).is_some_and(|link| link.say(message).is_err()) {
                            self.hang_up(peer);
                            events.push_back(DownloadEvent::PeerDown { peer });
                        }
                    }
                    DownloadAction::Prepare { blob } => events.extend(self.prepare(round, blob)),
                    DownloadAction::Listed { hashes } => {
                        let set = self.assemblies.get(&hashes.blob().hash).map_or(Ok(()), |assembly| assembly.set_hashes(hashes));
                        result = result.and(set.map_err(Failure::from));
                    }
                    DownloadAction::Verify { peer, hash, serial, check, bytes } => {
                        let Some(assembly) = self.assemblies.get(&hash).cloned() else {
                            events.push_back(DownloadEvent::Verified { peer, hash, serial: NO_SERIAL, check });
                            continue;
                        };
                        // There is room for all that can be on its way.
                        if self.work.try_send(Work { assembly, peer, hash, serial, check, bytes }).is_err() {
                            result = result.and(Err(Failure::new(Kind::Other, "the threads that verify have ended")));
                        }
                    }
                    DownloadAction::Complete { hash } => self.complete(round, hash),
                    DownloadAction::Blame { peer, fault } => {
                        warn!(%peer, %fault, "dropped");
                        self.note_liar(peer, fault.to_string());
                    }
                    DownloadAction::HangUp { peer } => {
                        debug!(%peer, "is silent; its stream is given up");
                        round.last_break = Some("it was silent".to_owned());
                        self.network.observe(peer, Facet::Bytes, Outcome::TimedOut);
                        self.hang_up(peer);
                    }
                }
            }
        }
        result
    }

    fn hang_up(&mut self, peer: PeerId) {
        self.links.remove(&peer);
        self.pause(peer);
    }

    /// Makes room for a blob; says at once when there is.
    fn prepare(&mut self, round: &Round, blob: BlobRef) -> Option<DownloadEvent<PeerId, Vec<u8>>> {
        let hash = blob.hash;
        let index = *round.by_hash.get(&hash)?.first()?;
        let sink = match &round.wants.get(index)?.wanted {
            Wanted::StoredBlob(_, sink) => Arc::clone(&sink.0),
            Wanted::Blob(_) | Wanted::ToldBlob(_) | Wanted::SpareBlob(_) => {
                let told = self.told.contains(&hash);
                let kept = self.kept.iter().position(|(kept, _)| *kept == hash && !told).and_then(|at| self.kept.remove(at));
                let assembly = kept.map_or_else(|| Arc::new(Assembly::in_memory(blob)), |(_, assembly)| assembly);
                let (hashes, here) = assembly.here();
                self.assemblies.insert(hash, assembly);
                return Some(DownloadEvent::Prepared { hash, hashes, here });
            }
        };
        let (prepared, number) = (self.prepared.0.clone(), self.round);
        tokio::task::spawn_blocking(move || {
            let _ = prepared.blocking_send(Prepared { round: number, hash, room: make_room(&sink, blob) });
        });
        None
    }

    /// Hands a blob over of which all groups are here, or has it made durable first.
    fn complete(&mut self, round: &mut Round, hash: ContentHash) {
        let Some(assembly) = self.assemblies.remove(&hash) else { return };
        if matches!(*assembly, Assembly::Memory(_)) {
            return self.deliver(round, hash, assembly.take_bytes());
        }
        let (finished, finishing, number) = (self.finished.0.clone(), Arc::clone(&self.finishing), self.round);
        tokio::spawn(async move {
            let _turn = finishing.acquire_owned().await;
            let finish = tokio::task::spawn_blocking(move || match &*assembly {
                Assembly::Store(partial) => partial.finish(now_ms()),
                Assembly::Memory(_) => Ok(PutOutcome::Present),
            });
            if let Ok(outcome) = finish.await {
                let _ = finished.send(Finished { round: number, hash, outcome }).await;
            }
        });
    }

    fn deliver(&self, round: &mut Round, hash: ContentHash, bytes: Vec<u8>) {
        let peer = round.senders.remove(&hash).unwrap_or(self.network.local);
        // What small thing somebody points to is no service.
        if !self.told.contains(&hash) {
            self.network.observe(peer, Facet::Bytes, Outcome::Good);
        }
        let Some(indices) = round.by_hash.remove(&hash) else { return };
        round.left -= 1;
        round.last_progress = Instant::now();
        if let Some((last, others)) = indices.split_last() {
            round.ready.extend(others.iter().map(|&index| Fetched { index, bytes: bytes.clone(), peer }));
            round.ready.push_back(Fetched { index: *last, bytes, peer });
        }
    }

    /// Starts links to peers that are there, and forgets those of peers that are not.
    pub(super) fn mind_links(&mut self, round: &mut Round) -> Result<(), Failure> {
        let connected = self.network.peers.borrow().connected.clone();
        let gone: Vec<_> = self.links.keys().filter(|peer| !connected.contains(peer)).copied().collect();
        for peer in gone {
            self.links.remove(&peer);
            self.tell(round, DownloadEvent::PeerDown { peer })?;
        }
        let now = Instant::now();
        for peer in connected {
            let resting = self.unsteady.get(&peer).is_some_and(|unsteady| unsteady.until > now);
            if self.links.contains_key(&peer) || self.liars.contains_key(&peer) || resting {
                continue;
            }
            self.next_link += 1;
            let (streams, heard) = (self.network.streams.clone(), self.heard.0.clone());
            self.links.insert(peer, Link::start(peer, self.next_link, streams, heard, Arc::clone(&self.arrived)));
        }
        Ok(())
    }

    /// Leaves a peer alone for a while, longer each time.
    pub(super) fn pause(&mut self, peer: PeerId) {
        let now = Instant::now();
        let unsteady = self.unsteady.entry(peer).or_insert(Unsteady { breaks: 0, until: now });
        unsteady.until = now + (PAUSE_FIRST * 2u32.pow(unsteady.breaks.min(8))).min(PAUSE_MAX);
        unsteady.breaks += 1;
    }

    /// Drops a peer for good: `what` it did is told to the user.
    pub async fn blame(&mut self, peer: PeerId, what: String) {
        self.liars.insert(peer, what);
        self.links.remove(&peer);
        self.network.observe(peer, Facet::Bytes, Outcome::WrongBytes);
        self.network.drop_peer(peer).await;
    }

    /// The same from where nothing may be awaited: an event is dealt with whole or not at all.
    fn note_liar(&mut self, peer: PeerId, what: String) {
        self.liars.insert(peer, what);
        self.links.remove(&peer);
        self.network.observe(peer, Facet::Bytes, Outcome::WrongBytes);
        let network = self.network.clone();
        tokio::spawn(async move { network.drop_peer(peer).await });
    }

    fn machine_ms(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }
}

/// Begins a blob's arrival in the store; one that was broken off a moment ago has to end first.
fn make_room(store: &Arc<BlobStore>, blob: BlobRef) -> Result<PartialBlob, StoreError> {
    for _ in 0..ARRIVING_ATTEMPTS {
        match store.partial(blob) {
            Err(StoreError::Arriving { .. }) => std::thread::sleep(ARRIVING_PAUSE),
            opened => return opened,
        }
    }
    store.partial(blob)
}

impl fmt::Debug for Fetcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "fetcher with {} links", self.links.len())
    }
}
