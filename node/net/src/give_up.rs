//! When a fetcher gives up, and how it says why.

use std::collections::BTreeSet;
use std::time::Duration;

use base::failure::{Failure, Kind};
use libp2p::PeerId;
use protocol::ContentHash;

use crate::fetcher::{BREAKS_MAX, Fetcher, Round};

/// A provider verifies a large blob at this speed or faster before it sends the first byte.
const VERIFY_BYTES_PER_SECOND_MIN: u64 = 50_000_000;
/// Names listed in an error; the others are counted.
const NAMES_SHOWN_MAX: usize = 8;

impl Fetcher {
    /// Fails at once when nobody can have what is missing, and after the deadline when somebody might.
    pub(super) fn check_hope(&self, round: &Round) -> Result<(), Failure> {
        let peers = self.network.peers.borrow();
        let name = |hash: &ContentHash| round.by_hash.get(hash).and_then(|indices| Some(round.wants.get(*indices.first()?)?.name.as_str()));
        let is_no_help = |peer: &PeerId, hash: &ContentHash| {
            let broken = self.unsteady.get(peer).is_some_and(|unsteady| unsteady.breaks > BREAKS_MAX);
            self.liars.contains_key(peer) || broken || self.machine.lacks(peer, hash)
        };
        let more_may_come = peers.may_discover || !peers.awaited.is_empty();
        if !more_may_come {
            let hopeless = self.machine.wanted().filter(|hash| peers.connected.iter().all(|peer| is_no_help(peer, hash)));
            let names: BTreeSet<_> = hopeless.filter_map(name).collect();
            if !names.is_empty() {
                return Err(self.missing(&names, &self.who_lacks_it(&peers.connected)));
            }
        }
        // A provider verifies a large blob before its first byte, and we make it durable after its last.
        let largest = round.by_hash.values().filter_map(|indices| round.wants.get(*indices.first()?)).map(|want| want.wanted.blob().length);
        let largest = Duration::from_secs(largest.max().unwrap_or(0) / VERIFY_BYTES_PER_SECOND_MIN);
        if round.last_progress.elapsed() >= self.timeout + largest {
            let names = round.by_hash.keys().filter_map(name).collect();
            return Err(self.missing(&names, &self.why_no_progress(self.timeout, round.last_break.as_deref())));
        }
        Ok(())
    }

    pub(super) fn who_lacks_it(&self, connected: &BTreeSet<PeerId>) -> String {
        match (connected.is_empty(), self.liars.is_empty()) {
            (true, true) => "no peer is known".to_owned(),
            _ => format!("none of {} connected peers has it", connected.len()),
        }
    }

    pub(super) fn why_no_progress(&self, patience: Duration, last_break: Option<&str>) -> String {
        let mut why = format!("no progress for {} s", patience.as_secs_f32());
        for (address, reason) in &self.network.peers.borrow().awaited {
            let reason = reason.as_ref().map_or_else(String::new, |reason| format!(" ({reason})"));
            why = format!("{why}; {address} does not answer{reason}");
        }
        if let Some(reason) = last_break {
            why = format!("{why}; a stream broke: {reason}");
        }
        why
    }

    pub(super) fn missing(&self, names: &BTreeSet<&str>, why: &str) -> Failure {
        let shown: Vec<_> = names.iter().take(NAMES_SHOWN_MAX).copied().collect();
        let more = names.len().saturating_sub(NAMES_SHOWN_MAX);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let mut message = format!("missing {}{more}: {why}", shown.join(", "));
        for (peer, what) in &self.liars {
            message = format!("{message}; {peer} was dropped: it {what}");
        }
        Failure::new(if self.liars.is_empty() { Kind::NoPeers } else { Kind::Integrity }, message)
    }
}
