//! How often each expert of a model was used in answers on this node. Counts alone: what was asked cannot be told from them.

use base::failure::{Failure, io_failure};
use base::files::keep_damaged;
use inference::activation_log::ActivationLog;
use protocol::ModelId;
use protocol::profile::Modality;
use store::RealDisk;
use store::disk::{read_file, replace_file};
use tracing::warn;

use crate::data_dir::{DataDir, LocalModel};
use crate::places::ExpertIndex;

const BYTES_MAX: u64 = 1 << 20;

/// Uses of an expert, by [`Modality`] of the tokens.
pub type Uses = [u64; 3];

impl DataDir {
    /// Uses of each expert of a model that has so many, in the order of layers and experts; zeros when nothing is known.
    pub fn usage(&self, model: ModelId, experts: usize) -> Result<Vec<Uses>, Failure> {
        let path = self.path().join("usage").join(model.to_string());
        let bytes = read_file(&path, BYTES_MAX).map_err(|error| io_failure("read", &path, &error))?;
        let Some(bytes) = bytes else { return Ok(vec![Uses::default(); experts]) };
        // All uses of each expert, of those the ones by images, and the ones by sounds; the last two are not there in files of earlier versions.
        let counts: Vec<u64> = protocol::codec::from_bytes(&bytes).unwrap_or_else(|error| {
            keep_damaged(&path, &format!("{error}; uses of experts are counted anew"));
            Vec::new()
        });
        let count = |column: usize, expert: usize| counts.get(column * experts + expert).copied().unwrap_or(0);
        let of = |expert: usize| {
            let [all, image, audio] = [0, 1, 2].map(|column| count(column, expert));
            [all.saturating_sub(image).saturating_sub(audio), image, audio]
        };
        Ok((0..experts).map(of).collect())
    }

    /// Adds what a log holds.
    pub fn add_usage(&self, found: &LocalModel, log: &ActivationLog) -> Result<(), Failure> {
        let places = ExpertIndex::of(found.manifest.decoder());
        let mut uses = vec![Uses::default(); places.count()];
        for entry in log.entries() {
            let used = entry.choices.iter().filter_map(|choice| places.place(entry.layer, choice.expert));
            used.for_each(|place| uses[place][entry.modality as usize] += 1);
        }
        if log.forgotten() > 0 {
            warn!(forgotten = log.forgotten(), "of a long answer, the newest uses are counted");
        }
        self.add_uses(found, &uses)
    }

    /// Adds uses of each expert.
    pub(crate) fn add_uses(&self, found: &LocalModel, more: &[Uses]) -> Result<(), Failure> {
        let mut uses = self.usage(found.id, more.len())?;
        uses.iter_mut().flatten().zip(more.iter().flatten()).for_each(|(uses, more)| *uses += more);
        let column = |modality: Modality| uses.iter().map(move |uses| uses[modality as usize]);
        let columns: Vec<u64> =
            uses.iter().map(|uses| uses.iter().sum()).chain(column(Modality::Image)).chain(column(Modality::Audio)).collect();
        let dir = self.path().join("usage");
        std::fs::create_dir_all(&dir).map_err(|error| io_failure("create", &dir, &error))?;
        let path = dir.join(found.id.to_string());
        replace_file(&RealDisk, &path, &protocol::codec::to_bytes(&columns)).map_err(|error| io_failure("write", &path, &error))
    }
}

#[cfg(test)]
mod tests {
    use protocol::ContentHash;

    use super::*;

    #[test]
    fn a_damaged_file_is_kept_and_not_taken_for_an_empty_one() {
        let root = tempfile::tempdir().expect("a directory");
        let dir = DataDir::open(root.path()).expect("a data directory");
        let model = ModelId(ContentHash::of(b"model"));
        assert_eq!(dir.usage(model, 2).expect("nothing yet"), [[0; 3]; 2]);
        let path = root.path().join("usage").join(model.to_string());
        std::fs::create_dir_all(root.path().join("usage")).expect("made");
        let whole = protocol::codec::to_bytes(&vec![3_u64, 4]);
        std::fs::write(&path, &whole).expect("written");
        assert_eq!(dir.usage(model, 2).expect("as earlier versions wrote it"), [[3, 0, 0], [4, 0, 0]]);
        std::fs::write(&path, &whole[..whole.len() - 1]).expect("written");
        assert_eq!(dir.usage(model, 2).expect("counted anew"), [[0; 3]; 2]);
        let kept = std::fs::read(path.with_extension("damaged"));
        assert_eq!(kept.expect("a copy"), whole[..whole.len() - 1]);
    }
}
