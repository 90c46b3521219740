//! What running experts at peers came to: who saw how much, what was audited, who was dropped and why.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use net::PeerId;
use protocol::audit::{AuditBook, AuditShare};
use serde_json::{Value, json};

/// A report that several threads add to.
#[derive(Clone, Debug)]
pub struct SharedReport(Arc<Mutex<RemoteReport>>);

/// Times in which the model had nothing to do, by what ended them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Waited {
    pub disk: Duration,
    pub remote: Duration,
    pub fetched: Duration,
}

impl Waited {
    /// What was waited since `earlier`.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        let Self { disk, remote, fetched } = earlier;
        Self {
            disk: self.disk.saturating_sub(disk),
            remote: self.remote.saturating_sub(remote),
            fetched: self.fetched.saturating_sub(fetched),
        }
    }
}

/// What is counted.
#[derive(Clone, Debug)]
pub struct RemoteReport {
    /// Results by peer, and their audits.
    pub book: AuditBook<PeerId>,
    /// Rows of activations that each peer was sent: what it may know of the text.
    pub(crate) rows_sent: BTreeMap<PeerId, u64>,
    pub requests: u64,
    /// Requests of which another way was tried too, because the answer was late.
    pub(crate) hedged: u64,
    /// Requests that a peer did not answer to the end.
    pub broken: u64,
    /// Results that were to be audited and were not, because too many waited.
    pub(crate) audits_skipped: u64,
    /// How long the model waited, and for what.
    pub waited: Waited,
    /// Peers that are no longer asked, with what they did.
    pub dropped: BTreeMap<PeerId, String>,
}

impl SharedReport {
    pub fn new(share: AuditShare) -> Self {
        Self(Arc::new(Mutex::new(RemoteReport {
            book: AuditBook::new(share),
            rows_sent: BTreeMap::new(),
            requests: 0,
            hedged: 0,
            broken: 0,
            audits_skipped: 0,
            waited: Waited::default(),
            dropped: BTreeMap::new(),
        })))
    }

    pub fn lock(&self) -> MutexGuard<'_, RemoteReport> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy of what has been counted so far.
    pub(crate) fn snapshot(&self) -> RemoteReport {
        self.lock().clone()
    }
}

impl RemoteReport {
    /// Peers of whom a result was computed again and was not the same. They are no longer asked.
    pub fn wrong_peers(&self) -> usize {
        self.book.counts().values().filter(|count| count.different > 0).count()
    }

    /// For `--json`.
    pub fn json(&self) -> Value {
        let peers: Vec<_> = self
            .book
            .counts()
            .iter()
            .map(|(peer, count)| {
                json!({"peer": peer.to_string(), "results": count.used, "rows_sent": self.rows_sent.get(peer).copied().unwrap_or(0),
                   "audits": {"chosen": count.chosen, "same": count.same, "different": count.different}})
            })
            .collect();
        let dropped: Vec<_> = self.dropped.iter().map(|(peer, why)| json!({"peer": peer.to_string(), "why": why})).collect();
        json!({"requests": self.requests, "hedged": self.hedged, "broken": self.broken, "audits_skipped": self.audits_skipped, "peers": peers, "dropped": dropped})
    }

    /// For people; nothing when no peer ran anything.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (peer, count) in self.book.counts() {
            let rows = self.rows_sent.get(peer).copied().unwrap_or(0);
            lines.push(format!(
                "[{peer} saw {rows} rows of activations and ran experts {} times; {} of its results were computed again: {} the same, {} not]",
                count.used, count.same + count.different, count.same, count.different
            ));
        }
        lines.extend(self.dropped.iter().map(|(peer, why)| format!("warning: {peer} is no longer asked: it {why}")));
        lines
    }
}
