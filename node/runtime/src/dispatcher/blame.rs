//! Parting with a peer that ran experts wrongly or broke the protocol: it is noted, told, and disconnected, from whatever thread finds it.

use base::output::note;
use net::PeerId;
use net::network::Network;
use protocol::trust::{Facet, Outcome};
use tokio::runtime::Handle;

use super::report::SharedReport;

/// What it takes to part with a peer.
#[derive(Clone)]
pub(super) struct Blamer {
    pub(super) network: Network,
    pub(super) runtime: Handle,
    pub(super) report: SharedReport,
}

impl Blamer {
    /// Parts with a peer for `what` it did. Says whether that is news: a peer is blamed once.
    pub(super) fn blame(&self, peer: PeerId, what: &str) -> bool {
        if self.report.lock().dropped.insert(peer, what.to_owned()).is_some() {
            return false;
        }
        note(&format!("warning: {peer} {what}: it is no longer asked"));
        self.network.observe(peer, Facet::Execution, Outcome::WrongResult);
        let network = self.network.clone();
        self.runtime.spawn(async move { network.drop_peer(peer).await });
        true
    }
}
