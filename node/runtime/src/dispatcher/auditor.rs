//! Computes results of peers again and compares, bit for bit, beside the model's work.
//!
//! Weights come from the store, where those that move in arrive by themselves; others are fetched quietly, for a small part of the time,
//! so that an audit does not crowd out the work. A result that differs is kept as evidence, with the receipt that its maker signed.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use base::clock::{instant, interrupted, now_ms, stand_back};
use base::threads;
use inference::aligned::AlignedBytes;
use inference::expert::Expert;
use inference::expert_runner::ExpertRunner;
use inference::kernels::Kernels;
use net::PeerId;
use net::address::node_id;
use net::executor;
use net::network::Network;
use protocol::audit::Verdict;
use protocol::execute::{NONCE_BYTES, Receipt, row_bytes};
use protocol::expert_blob::ExpertShape;
use protocol::hash::to_hex;
use protocol::trust::{Facet, Outcome};
use protocol::{BlobRef, ContentHash, ExpertSlot};
use serde_json::json;
use store::BlobStore;
use tokio::runtime::Handle;
use tracing::{debug, warn};

use super::blame::Blamer;
use super::mover::Quiet;
use super::report::SharedReport;
use crate::evidence::Evidence;

/// Results that wait to be audited; while so many do, more are passed over and counted.
const AUDITS_MAX: usize = 1024;
/// After fetching an expert for an audit, nothing is fetched for so many times as long as that took.
const FETCH_PAUSE: u32 = 19;
/// Weights for an audit may take so long; at the end of a command, audits that can be done at once go on for so long at most.
const END_MAX: Duration = Duration::from_secs(2);

/// A result to compute again.
pub(super) struct Audit {
    pub(super) peer: PeerId,
    pub(super) slot: ExpertSlot,
    pub(super) blob: BlobRef,
    pub(super) nonce: [u8; NONCE_BYTES],
    pub(super) input: Vec<u8>,
    pub(super) output: Vec<u8>,
    /// What the peer signed, unless it was gone before.
    pub(super) receipt: Option<Vec<u8>>,
}

/// The thread that audits, and what waits for it.
pub(super) struct Auditor {
    queue: Option<mpsc::SyncSender<Audit>>,
    report: SharedReport,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// What an auditor works with.
pub(super) struct AuditorParts {
    pub(super) store: Arc<BlobStore>,
    pub(super) network: Network,
    pub(super) quiet: Quiet,
    pub(super) runtime: Handle,
    pub(super) report: SharedReport,
    pub(super) hidden_size: usize,
    pub(super) kernels: &'static Kernels,
    /// Where evidence goes.
    pub(super) evidence: Evidence,
}

impl Auditor {
    pub(super) fn start(parts: AuditorParts) -> Self {
        let (queue, audits) = mpsc::sync_channel(AUDITS_MAX);
        let report = parts.report.clone();
        let thread = threads::watched("auditor", move || {
            stand_back();
            AuditThread { parts, runner: None, fetch_after: instant() }.run(&audits);
        });
        Self { queue: Some(queue), report, thread: Some(thread) }
    }

    pub(super) fn audit(&self, audit: Audit) {
        if let Some(queue) = &self.queue
            && queue.try_send(audit).is_err()
        {
            self.report.lock().audits_skipped += 1;
        }
    }
}

impl Drop for Auditor {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct AuditThread {
    parts: AuditorParts,
    /// For experts of the shape that was audited last.
    runner: Option<ExpertRunner>,
    fetch_after: std::time::Instant,
}

impl AuditThread {
    fn run(&mut self, audits: &mpsc::Receiver<Audit>) {
        let mut later = Vec::new(); // their weights are not here
        let mut end = None;
        loop {
            match audits.recv_timeout(Duration::from_millis(20)) {
                Ok(audit) => later.extend(self.audit_or_skip(audit, None)),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    end.get_or_insert_with(|| instant() + END_MAX);
                }
            }
            if let Some(audit) = later.pop() {
                match self.fetch(audit.blob) {
                    Some(bytes) => drop(self.audit_or_skip(audit, Some(bytes))),
                    None => later.push(audit),
                }
            }
            if later.len() > AUDITS_MAX {
                later.swap_remove(later.len() / 2);
                self.parts.report.lock().audits_skipped += 1;
            }
            if end.is_some_and(|end| later.is_empty() || end <= instant() || interrupted()) {
                self.parts.report.lock().audits_skipped += later.len() as u64;
                return;
            }
        }
    }

    /// The same as [`audit`](Self::audit); a fault in it costs this audit alone.
    fn audit_or_skip(&mut self, audit: Audit, fetched: Option<AlignedBytes>) -> Option<Audit> {
        threads::caught("an audit", || self.audit(audit, fetched)).unwrap_or_else(|failure| {
            warn!(%failure, "an audit is left out");
            self.runner = None;
            self.parts.report.lock().audits_skipped += 1;
            None
        })
    }

    /// Audits a result; gives it back when the weights are missing.
    fn audit(&mut self, audit: Audit, fetched: Option<AlignedBytes>) -> Option<Audit> {
        let signed = match signed(&audit) {
            Ok(signed) => signed,
            Err((fault, signed)) => {
                self.accuse(&audit, &fault, signed.as_deref(), None);
                return None;
            }
        };
        let expert = match fetched {
            Some(bytes) => ExpertShape::of_blob(&bytes).and_then(|shape| Expert::from_verified(bytes, shape)).ok(),
            None => match executor::load(&self.parts.store, audit.blob.hash) {
                Some(expert) => Some(expert),
                None => return Some(audit),
            },
        };
        // The hash is the manifest's, and so is the shape; only what is packed runs at peers.
        let fits = |expert: &Expert| expert.shape().precision.is_packed() && expert.shape().hidden_size == self.parts.hidden_size;
        let Some(expert) = expert.filter(fits) else {
            self.parts.report.lock().book.conclude(audit.peer, Verdict::Unknown);
            return None;
        };
        let shape = expert.shape();
        let rows: Vec<&[u8]> = audit.input.chunks_exact(row_bytes(shape.hidden_size)).collect();
        let mut ours = Vec::with_capacity(audit.output.len());
        let runner = self.runner.take().filter(|runner| runner.shape() == shape);
        let mut runner = runner.unwrap_or_else(|| ExpertRunner::new(shape, 1, self.parts.kernels));
        runner.run(&expert, &rows, &mut ours);
        self.runner = Some(runner);
        if ours == audit.output {
            self.parts.report.lock().book.conclude(audit.peer, Verdict::Same);
            self.parts.network.observe(audit.peer, Facet::Execution, Outcome::Good);
        } else {
            self.accuse(&audit, &format!("sent a wrong result for {}", audit.slot), signed.as_deref(), Some(&ours));
        }
        None
    }

    /// Drops a peer. Keeps the evidence where what it signed proves something to others.
    fn accuse(&self, audit: &Audit, what: &str, signed: Option<&[u8]>, ours: Option<&[u8]>) {
        let AuditorParts { report, network, runtime, evidence, .. } = &self.parts;
        let kept = match signed {
            None => "nothing that it signed proves it to others".to_owned(),
            Some(receipt) => {
                let record = json!({
                    "peer": audit.peer.to_string(), "what": what, "layer": audit.slot.layer, "expert": audit.slot.expert,
                    "blob": audit.blob.hash.to_string(), "at_ms": now_ms(), "nonce": to_hex(&audit.nonce), "receipt": to_hex(receipt),
                    "input": to_hex(&audit.input), "output": to_hex(&audit.output),
                    "expected_output_hash": ours.map(|ours| ContentHash::of(ours).to_string()),
                });
                let written = evidence.keep(&audit.peer.to_string(), record.to_string().as_bytes());
                written.map_or_else(
                    |error| format!("the evidence could not be kept: {error}"),
                    |path| format!("evidence in {}", path.display()),
                )
            }
        };
        report.lock().book.conclude(audit.peer, Verdict::Different);
        let blamer = Blamer { network: network.clone(), runtime: runtime.clone(), report: report.clone() };
        blamer.blame(audit.peer, &format!("{what} ({kept})"));
    }

    /// Fetches weights for an audit, if the time for it has come; keeps them where there is room.
    fn fetch(&mut self, blob: BlobRef) -> Option<AlignedBytes> {
        if instant() < self.fetch_after {
            return None;
        }
        let started = instant();
        let (quiet, runtime) = (&mut self.parts.quiet, &self.parts.runtime);
        let bring = async { tokio::time::timeout(END_MAX, quiet.bring(blob, "weights for an audit")).await.ok().flatten() };
        let fetched = runtime.block_on(bring);
        self.fetch_after = instant() + (instant() - started).max(Duration::from_millis(20)) * FETCH_PAUSE;
        let bytes = fetched?.bytes;
        let kept = self.parts.store.writer(blob).and_then(|mut writer| {
            writer.write(&bytes)?;
            writer.finish(now_ms())
        });
        if let Err(error) = kept {
            debug!(%error, "weights for an audit are not kept");
        }
        Some(AlignedBytes::copy_of(&bytes))
    }
}

/// A receipt that the peer signed, if one has come; or what is wrong with it, and the receipt all the same where its signature holds.
type Signed = Result<Option<Vec<u8>>, (String, Option<Vec<u8>>)>;

fn signed(audit: &Audit) -> Signed {
    let Some((node, bytes)) = node_id(audit.peer).zip(audit.receipt.clone()) else { return Ok(None) };
    let receipt = match Receipt::open(node, audit.nonce, bytes.clone()) {
        Ok(receipt) => receipt,
        Err(error) => return Err((format!("sent a receipt that does not hold: {error}"), None)),
    };
    let (input, output) = (ContentHash::of(&audit.input), ContentHash::of(&audit.output));
    let named = receipt.results.iter().any(|result| result.expert == audit.blob.hash && result.input == input && result.output == output);
    if named {
        Ok(Some(bytes))
    } else {
        Err((format!("signed something else than the result that it sent for {}", audit.slot), Some(bytes)))
    }
}
