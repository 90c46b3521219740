//! Gets manifests and blobs from whichever peers have them: spreads the work, goes elsewhere when one fails, drops liars.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use libp2p::PeerId;
use protocol::message::Subject;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{debug, warn};

use crate::failure::{Failure, Kind};
use crate::net::link::{self, Finished, JOBS_MAX, Job, Outcome, VERIFY_BYTES_PER_SECOND_MIN, Wanted};
use crate::net::swarm::Network;

const FINISHED_MAX: usize = 16;
const TICK: Duration = Duration::from_millis(100);
/// How long to look for another publisher's signature when one is not trusted.
const SECOND_OPINION: Duration = Duration::from_secs(2);
const PAUSE_FIRST: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// After so many broken streams, a thing is no longer asked of the peer whose streams they were.
const BREAKS_MAX: u32 = 8;
/// Names listed in an error; the others are counted.
const NAMES_SHOWN_MAX: usize = 8;

/// A thing that came, and from whom.
#[derive(Debug)]
pub(crate) struct Fetched {
    /// Which of those asked for.
    pub(crate) index: usize,
    /// Its bytes, verified if it has a hash; empty when they went to the store.
    pub(crate) bytes: Vec<u8>,
    pub(crate) peer: PeerId,
}

/// Something to fetch and what to call it in an error.
#[derive(Clone, Debug)]
pub(crate) struct Want {
    pub(crate) wanted: Wanted,
    pub(crate) name: String,
}

/// Fetches from the peers of one network.
pub(crate) struct Fetcher {
    network: Network,
    timeout: Duration,
    links: BTreeMap<PeerId, mpsc::Sender<Job>>,
    received: Arc<AtomicU64>, // bytes from all peers, as they come
    finished: (mpsc::Sender<Finished>, mpsc::Receiver<Finished>),
    next_number: u64,
    /// Peers whose streams broke since they last brought something: asked when no other can help, and after a pause.
    unsteady: HashMap<PeerId, Unsteady>,
    liars: BTreeMap<PeerId, String>,
}

#[derive(Clone, Copy)]
struct Unsteady {
    breaks: u32,
    until: Instant,
}

/// The state of one call.
struct Round {
    wants: Vec<Want>,
    waiting: VecDeque<usize>,
    running: HashMap<u64, (usize, PeerId)>,
    refused: Vec<HashSet<PeerId>>,         // by want: who does not have it
    breaks: HashMap<(usize, PeerId), u32>, // by want and peer: streams that broke under it
    left: usize,
    last_progress: Instant,
    patience: Duration,
    received: u64,
    last_break: Option<String>,
}

impl Fetcher {
    /// A fetcher that gives up after `timeout` without progress.
    pub(crate) fn new(network: Network, timeout: Duration) -> Self {
        Self {
            network,
            timeout,
            links: BTreeMap::new(),
            received: Arc::default(),
            finished: mpsc::channel(FINISHED_MAX),
            next_number: 0,
            unsteady: HashMap::new(),
            liars: BTreeMap::new(),
        }
    }

    /// Fetches everything in `wants` and sends each to `results` as it comes.
    pub(crate) async fn fetch(&mut self, wants: Vec<Want>, results: &mpsc::Sender<Fetched>) -> Result<(), Failure> {
        self.fetch_except(wants, &HashSet::new(), self.timeout, results).await
    }

    /// The same, without asking some peers, and with another patience.
    async fn fetch_except(
        &mut self,
        wants: Vec<Want>,
        except: &HashSet<PeerId>,
        patience: Duration,
        results: &mpsc::Sender<Fetched>,
    ) -> Result<(), Failure> {
        let now = Instant::now();
        let mut round = Round {
            waiting: (0..wants.len()).collect(),
            refused: vec![except.clone(); wants.len()],
            breaks: HashMap::new(),
            left: wants.len(),
            wants,
            running: HashMap::new(),
            patience,
            last_progress: now,
            received: self.received(),
            last_break: None,
        };
        let result = self.rounds(&mut round, results).await;
        // Jobs of a round that failed must not be taken for those of the next: their links go with them.
        for (_, peer) in round.running.values() {
            self.links.remove(peer);
        }
        result
    }

    async fn rounds(&mut self, round: &mut Round, results: &mpsc::Sender<Fetched>) -> Result<(), Failure> {
        let mut peers = self.network.peers.clone();
        while round.left > 0 {
            self.assign(round).await;
            self.check_hope(round)?;
            tokio::select! {
                finished = self.finished.1.recv() => {
                    let finished = finished.expect("we hold a sender");
                    self.on_finished(round, finished, results).await?;
                }
                changed = peers.changed() => changed.map_err(|_| Failure::new(Kind::Other, "the network has ended"))?,
                () = tokio::time::sleep(TICK) => {}
            }
            let received = self.received();
            if received != round.received {
                (round.received, round.last_progress) = (received, Instant::now());
            }
        }
        Ok(())
    }

    /// Gives waiting wants to the peers with the least to do.
    async fn assign(&mut self, round: &mut Round) {
        let connected = self.network.peers.borrow().connected.clone();
        self.links.retain(|peer, jobs| connected.contains(peer) && !jobs.is_closed());
        let now = Instant::now();
        let ready = |peer: &&PeerId| !self.liars.contains_key(peer) && self.unsteady.get(peer).is_none_or(|unsteady| unsteady.until <= now);
        for &peer in connected.iter().filter(ready) {
            self.links.entry(peer).or_insert_with(|| {
                let (jobs, queue) = mpsc::channel(JOBS_MAX);
                link::start(peer, self.network.streams.clone(), queue, self.finished.0.clone(), Arc::clone(&self.received));
                jobs
            });
        }
        let mut load: BTreeMap<PeerId, usize> = self.links.keys().map(|&peer| (peer, 0)).collect();
        round.running.values().for_each(|(_, peer)| *load.entry(*peer).or_default() += 1);
        for _ in 0..round.waiting.len() {
            let Some(index) = round.waiting.pop_front() else { break };
            let able = load
                .iter_mut()
                .filter(|(peer, jobs)| self.links.contains_key(peer) && **jobs < JOBS_MAX && !round.refused[index].contains(peer));
            let Some((&peer, jobs)) =
                able.min_by_key(|(peer, jobs)| (self.unsteady.get(peer).map_or(0, |unsteady| unsteady.breaks), **jobs))
            else {
                round.waiting.push_back(index);
                continue;
            };
            let number = self.next_number;
            self.next_number += 1;
            let job = Job { number, wanted: round.wants[index].wanted.clone() };
            if self.links[&peer].send(job).await.is_ok() {
                *jobs += 1;
                round.running.insert(number, (index, peer));
            } else {
                round.waiting.push_back(index);
            }
        }
    }

    /// Fails at once when nobody can have what is missing, and after the deadline when somebody might.
    fn check_hope(&self, round: &Round) -> Result<(), Failure> {
        let peers = self.network.peers.borrow();
        let hopeless: Vec<_> = round
            .waiting
            .iter()
            .filter(|&&index| peers.connected.iter().all(|peer| round.refused[index].contains(peer) || self.liars.contains_key(peer)))
            .collect();
        let more_may_come = peers.may_discover || !peers.awaited.is_empty();
        if !hopeless.is_empty() && !more_may_come {
            let names: Vec<_> = hopeless.iter().map(|&&index| round.wants[index].name.as_str()).collect();
            let who = match (peers.connected.is_empty(), self.liars.is_empty()) {
                (true, true) => "no peer is known".to_owned(),
                _ => format!("none of {} connected peers has it", peers.connected.len()),
            };
            return Err(self.missing(&names, &who));
        }
        // A provider verifies a large blob before its first byte, and we make it durable after its last.
        let largest = round.wants.iter().filter_map(|want| want.wanted.length()).max().unwrap_or(0);
        if round.last_progress.elapsed() >= round.patience + Duration::from_secs(largest / VERIFY_BYTES_PER_SECOND_MIN) {
            let names: Vec<_> = round
                .waiting
                .iter()
                .copied()
                .chain(round.running.values().map(|(index, _)| *index))
                .map(|index| round.wants[index].name.as_str())
                .collect();
            let mut who = format!("no progress for {} s", round.patience.as_secs_f32());
            for (address, reason) in &peers.awaited {
                who = format!(
                    "{who}; {address} does not answer{}",
                    reason.as_ref().map_or_else(String::new, |reason| format!(" ({reason})"))
                );
            }
            if let Some(reason) = &round.last_break {
                who = format!("{who}; a stream broke: {reason}");
            }
            return Err(self.missing(&names, &who));
        }
        Ok(())
    }

    fn missing(&self, names: &[&str], why: &str) -> Failure {
        let names: BTreeSet<_> = names.iter().collect();
        let shown: Vec<_> = names.iter().take(NAMES_SHOWN_MAX).map(ToString::to_string).collect();
        let more = names.len().saturating_sub(NAMES_SHOWN_MAX);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let mut message = format!("missing {}{more}: {why}", shown.join(", "));
        for (peer, what) in &self.liars {
            message = format!("{message}; {peer} was dropped: it {what}");
        }
        Failure::new(if self.liars.is_empty() { Kind::NoPeers } else { Kind::Integrity }, message)
    }

    async fn on_finished(&mut self, round: &mut Round, finished: Finished, results: &mpsc::Sender<Fetched>) -> Result<(), Failure> {
        let Finished { peer, number, outcome } = finished;
        let Some((index, _)) = round.running.remove(&number) else { return Ok(()) };
        match outcome {
            Outcome::Done(bytes) => {
                round.left -= 1;
                self.unsteady.remove(&peer);
                let _ = results.send(Fetched { index, bytes, peer }).await; // nobody listens any more: the caller gave up
                round.last_progress = Instant::now(); // a slow taker is not a silent peer
                return Ok(());
            }
            Outcome::NotHave => {
                debug!(%peer, what = round.wants[index].name, "does not have it");
                round.refused[index].insert(peer);
            }
            Outcome::WrongBytes(what) => {
                warn!(%peer, what, "dropped");
                self.blame(peer, what).await;
            }
            Outcome::Broken(reason) => {
                debug!(%peer, reason, "stream broke");
                round.last_break = Some(reason);
                self.pause(peer);
                let breaks = round.breaks.entry((index, peer)).or_default();
                *breaks += 1;
                if *breaks > BREAKS_MAX {
                    round.refused[index].insert(peer);
                }
            }
            Outcome::Store(error) => return Err(error.into()),
        }
        round.waiting.push_front(index);
        Ok(())
    }

    /// Leaves a peer alone for a while, longer each time; all jobs of one stream that break together count once.
    fn pause(&mut self, peer: PeerId) {
        let now = Instant::now();
        let unsteady = self.unsteady.entry(peer).or_insert(Unsteady { breaks: 0, until: now });
        if unsteady.until <= now {
            unsteady.until = now + (PAUSE_FIRST * 2u32.pow(unsteady.breaks.min(8))).min(PAUSE_MAX);
            unsteady.breaks += 1;
        }
    }

    /// Drops a peer for good: `what` it did is told to the user.
    pub(crate) async fn blame(&mut self, peer: PeerId, what: String) {
        self.liars.insert(peer, what);
        self.links.remove(&peer);
        self.network.drop_peer(peer).await;
    }

    fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Fetches one small thing that has no hash of its own, and lets `judge` say whether it is right.
    pub(crate) async fn fetch_judged<T>(
        &mut self,
        subject: Subject,
        bytes_max: u64,
        name: &str,
        judge: impl Fn(Vec<u8>) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut passed_over = HashSet::new();
        let mut refusal = None;
        let mut patience = self.timeout;
        loop {
            let (results, mut queue) = mpsc::channel(1);
            let want = Want { wanted: Wanted::Unhashed(subject, bytes_max), name: name.to_owned() };
            if let Err(failure) = self.fetch_except(vec![want], &passed_over, patience, &results).await {
                return Err(refusal.unwrap_or(failure));
            }
            let fetched = queue.try_recv().expect("fetch has sent it");
            match judge(fetched.bytes) {
                // What cannot be what was asked for is the peer's fault; what we do not trust is not, and another may have better.
                Err(failure) if failure.kind == Kind::Integrity => self.blame(fetched.peer, failure.message).await,
                Err(failure) if failure.kind == Kind::Refused => {
                    passed_over.insert(fetched.peer);
                    patience = patience.min(SECOND_OPINION);
                    refusal = Some(failure);
                }
                judged => return judged,
            }
        }
    }
}

impl fmt::Debug for Fetcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "fetcher with {} links", self.links.len())
    }
}
