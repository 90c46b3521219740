//! Getting one small thing that has no hash of its own: asks peer after peer until an answer is judged to be right.

use std::collections::{BTreeSet, HashSet};
use std::time::Duration;

use base::failure::{Failure, Kind};
use libp2p::PeerId;
use protocol::message::Subject;
use tokio::time::Instant;
use tracing::debug;

use crate::ask::{self, Answered};
use crate::fetcher::{BREAKS_MAX, Fetcher, TICK};

/// How long to look for another publisher's signature when one is not trusted.
const SECOND_OPINION: Duration = Duration::from_secs(2);

impl Fetcher {
    /// Fetches one small thing that has no hash of its own, and lets `judge` say whether it is right.
    pub async fn fetch_judged<T>(
        &mut self,
        subject: Subject,
        bytes_max: u64,
        name: &str,
        judge: impl Fn(Vec<u8>) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut passed_over = HashSet::new();
        let mut refusal = None;
        let mut last_break = None;
        let (mut since, mut patience) = (Instant::now(), self.timeout);
        loop {
            let (connected, more_may_come) = {
                let peers = self.network.peers.borrow();
                (peers.connected.clone(), peers.may_discover || !peers.awaited.is_empty())
            };
            let now = Instant::now();
            let in_question = |peer: &&PeerId| !passed_over.contains(*peer) && !self.liars.contains_key(*peer);
            let rested = |peer: &&PeerId| self.unsteady.get(*peer).is_none_or(|unsteady| unsteady.until <= now);
            let none_left = !connected.iter().any(|peer| in_question(&peer));
            if none_left && !more_may_come {
                return Err(refusal.unwrap_or_else(|| self.missing(&BTreeSet::from([name]), &self.who_lacks_it(&connected))));
            }
            let left = patience.saturating_sub(since.elapsed());
            if left.is_zero() {
                let why = self.why_no_progress(patience, last_break.as_deref());
                return Err(refusal.unwrap_or_else(|| self.missing(&BTreeSet::from([name]), &why)));
            }
            let trust = |peer: &&PeerId| self.network.trust_in_bytes(**peer);
            let best = connected.iter().filter(in_question).filter(rested).max_by(|a, b| trust(a).total_cmp(&trust(b)));
            let Some(&peer) = best else {
                let mut peers = self.network.peers.clone();
                let _ = tokio::time::timeout(TICK.min(left), peers.changed()).await;
                continue;
            };
            let requested = ask::ask(peer, self.network.streams.clone(), subject, bytes_max);
            let answered = tokio::time::timeout(left, requested).await;
            match answered.unwrap_or_else(|_| Answered::Broken(std::io::ErrorKind::TimedOut.into())) {
                Answered::Bytes(bytes) => {
                    since = Instant::now();
                    match judge(bytes) {
                        // What cannot be what was asked for is the peer's fault; what we do not trust is not, and another may have better.
                        Err(failure) if failure.kind == Kind::Integrity => self.blame(peer, failure.message).await,
                        Err(failure) if failure.kind == Kind::Refused => {
                            passed_over.insert(peer);
                            patience = patience.min(SECOND_OPINION);
                            refusal = Some(failure);
                        }
                        answered => return answered,
                    }
                }
                Answered::NotHave => drop(passed_over.insert(peer)),
                Answered::Wrong(what) => self.blame(peer, what).await,
                Answered::Broken(error) => {
                    debug!(%peer, %error, "stream broke");
                    last_break = Some(error.to_string());
                    self.pause(peer);
                    if self.unsteady.get(&peer).is_some_and(|unsteady| unsteady.breaks > BREAKS_MAX) {
                        passed_over.insert(peer);
                    }
                }
            }
        }
    }
}
