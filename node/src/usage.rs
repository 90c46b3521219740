//! How often each expert of a model was used in answers on this node. Counts alone: what was asked cannot be told from them.

use inference::activation_log::ActivationLog;
use protocol::ModelId;
use store::RealDisk;
use store::disk::{read_file, replace_file};
use tracing::warn;

use crate::data_dir::{DataDir, LocalModel, io_failure};
use crate::failure::Failure;

const BYTES_MAX: u64 = 1 << 20;

impl DataDir {
    /// Uses of each expert, in the order of layers and experts; none when nothing is known.
    pub(crate) fn usage(&self, model: ModelId) -> Result<Vec<u64>, Failure> {
        let path = self.path().join("usage").join(model.to_string());
        let bytes = read_file(&path, BYTES_MAX).map_err(|error| io_failure("read", &path, &error))?;
        Ok(bytes.and_then(|bytes| protocol::codec::from_bytes(&bytes).ok()).unwrap_or_default())
    }

    /// Adds what a log holds.
    pub(crate) fn add_usage(&self, found: &LocalModel, log: &ActivationLog) -> Result<(), Failure> {
        let config = &found.manifest.config;
        let slots: Vec<_> = config.expert_slots().collect();
        let mut uses = self.usage(found.id)?;
        uses.resize(slots.len(), 0);
        let layers: Vec<_> = config.moe_layers().collect();
        for entry in log.entries() {
            let Ok(layer) = layers.binary_search(&entry.layer) else { continue };
            for choice in entry.choices {
                uses[layer * config.num_experts as usize + choice.expert as usize] += 1;
            }
        }
        if log.forgotten() > 0 {
            warn!(forgotten = log.forgotten(), "of a long answer, the newest uses are counted");
        }
        let dir = self.path().join("usage");
        std::fs::create_dir_all(&dir).map_err(|error| io_failure("create", &dir, &error))?;
        let path = dir.join(found.id.to_string());
        replace_file(&RealDisk, &path, &protocol::codec::to_bytes(&uses)).map_err(|error| io_failure("write", &path, &error))
    }
}
