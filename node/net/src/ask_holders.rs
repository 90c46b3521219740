//! Asking who has which blobs of a model, without fetching any.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use base::failure::Failure;
use libp2p::PeerId;
use protocol::{BlobRef, ModelId};
use tokio::time::Instant;

use super::fetcher::{Fetcher, Round, TICK};

/// How long to wait for peers to say what they have, before it is decided what is rare.
const RARITY_WAIT: Duration = Duration::from_secs(3);

impl Fetcher {
    /// Sorts blobs of a model by how few of the peers say they have them; leaves out what nobody has. Waits until all have said.
    pub async fn rarest_first(&mut self, model: ModelId, blobs: Vec<BlobRef>) -> Result<Vec<BlobRef>, Failure> {
        self.hear_haves(model).await?;
        Ok(self.machine.rarest_first(blobs))
    }

    /// Who says that he has each of some blobs of a model. Waits until all have said.
    pub async fn holders(&mut self, model: ModelId, blobs: &[BlobRef]) -> Result<Vec<Vec<PeerId>>, Failure> {
        self.hear_haves(model).await?;
        Ok(blobs.iter().map(|blob| self.machine.holders(&blob.hash)).collect())
    }

    async fn hear_haves(&mut self, model: ModelId) -> Result<(), Failure> {
        let mut round = Round::new(Vec::new(), HashMap::new(), self.arrived.load(Ordering::Relaxed));
        let until = Instant::now() + self.timeout.min(RARITY_WAIT);
        loop {
            self.mind_links(&mut round)?;
            let linked = !self.links.is_empty() && self.links.keys().all(|peer| self.machine.knows(peer));
            let left = until.saturating_duration_since(Instant::now());
            if linked && self.machine.all_have_said(&model) || left.is_zero() {
                return Ok(());
            }
            if let Ok(Some(heard)) = tokio::time::timeout(left.min(TICK), self.heard.1.recv()).await {
                self.on_heard(&mut round, heard)?;
            }
        }
    }
}
