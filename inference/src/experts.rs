//! Brings together the experts that a layer needs, from memory or from the source, and counts where they were.

use std::collections::HashSet;
use std::sync::Arc;

use protocol::{ExpertSlot, ModelManifest};

use crate::expert::{Expert, ExpertError};
use crate::expert_cache::ExpertCache;
use crate::expert_source::{ExpertRequest, ExpertSource, Origin, SourceError};

/// Where the experts of a run were when the model first needed each of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ExpertUse {
    /// Distinct slots that were needed.
    pub needed: usize,
    /// In memory already.
    pub ram: usize,
    /// In this node's store.
    pub disk: usize,
    /// Brought from a peer while the model waited.
    pub fetched: usize,
    /// Bytes of those.
    pub bytes_fetched: u64,
}

/// Memory and source of experts, for one model.
pub struct Experts {
    manifest: Arc<ModelManifest>,
    cache: ExpertCache,
    source: Box<dyn ExpertSource>,
    usage: ExpertUse,
    seen: HashSet<ExpertSlot>,
}

/// Why a layer did not get its experts.
#[derive(Debug, thiserror::Error)]
pub enum ExpertsError {
    /// The source could not bring them.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The source brought something else.
    #[error("{slot}")]
    Expert {
        /// What was asked for.
        slot: ExpertSlot,
        /// What is wrong with what came.
        source: ExpertError,
    },
}

impl Experts {
    /// Experts of the model of `manifest`, of which `bytes_max` bytes may stay in memory.
    pub fn new(manifest: Arc<ModelManifest>, bytes_max: u64, source: Box<dyn ExpertSource>) -> Self {
        Self { manifest, cache: ExpertCache::new(bytes_max), source, usage: ExpertUse::default(), seen: HashSet::new() }
    }

    /// What has been counted since the last [`start_counting`](Self::start_counting).
    pub fn usage(&self) -> ExpertUse {
        self.usage
    }

    /// Starts a new count; what is in memory stays there.
    pub fn start_counting(&mut self) {
        self.usage = ExpertUse::default();
        self.seen.clear();
    }

    /// Gives `compute` every expert of `wanted` in `layer`: first those in memory, then the others as they arrive.
    pub(crate) fn for_each(
        &mut self,
        layer: u32,
        wanted: &[u32],
        mut compute: impl FnMut(&[(u32, Arc<Expert>)]),
    ) -> Result<(), ExpertsError> {
        let mut present = Vec::new();
        let mut missing = Vec::new();
        for &expert in wanted {
            let slot = ExpertSlot { layer, expert };
            if let Some(found) = self.cache.get(slot) {
                if self.seen.insert(slot) {
                    self.usage.needed += 1;
                    self.usage.ram += 1;
                }
                present.push((expert, found));
            } else {
                let blob = self.manifest.expert(slot).expect("the router chooses among the layer's experts");
                missing.push(ExpertRequest { slot, blob });
            }
        }
        compute(&present);
        drop(present);
        if missing.is_empty() {
            return Ok(());
        }
        let shape = self.manifest.config.expert_shape(self.manifest.expert_precision);
        let Self { manifest, cache, source, usage, seen } = self;
        let mut failed = None;
        let mut arrived = 0;
        let result = source.fetch(&missing, &mut |slot, bytes, origin| {
            let blob = manifest.expert(slot).expect("only what was asked for is delivered");
            let expert = match Expert::verify(bytes, blob, shape) {
                Ok(expert) => Arc::new(expert),
                Err(source) => {
                    let text = source.to_string();
                    failed = Some(ExpertsError::Expert { slot, source });
                    return Err(SourceError(text.into()));
                }
            };
            arrived += 1;
            if seen.insert(slot) {
                usage.needed += 1;
                match origin {
                    Origin::Disk => usage.disk += 1,
                    Origin::Peer => {
                        usage.fetched += 1;
                        usage.bytes_fetched += blob.length;
                    }
                }
            }
            cache.insert(slot, Arc::clone(&expert));
            compute(&[(slot.expert, expert)]);
            Ok(())
        });
        if let Some(error) = failed {
            return Err(error);
        }
        result?;
        assert_eq!(arrived, missing.len(), "a source delivers each expert or fails");
        Ok(())
    }
}
