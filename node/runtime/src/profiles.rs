//! Profiles of models in the data directory: the journal of one in the making, and what is finished.
//!
//! ```text
//! profiles/ID.ABOUT.journal  what was read and tried so far with a probe set, in frames: length, the first 8 bytes of the hash, and a step
//! profiles/ID                the newest finished profile: probe set, arithmetic, body
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::PathBuf;

use base::failure::{Failure, Kind, io_failure};
use inference::profiler::{Reading, Trials};
use protocol::{BlobRef, ContentHash, ModelId};
use serde::{Deserialize, Serialize};
use store::RealDisk;
use store::disk::{read_file, replace_file};

use crate::data_dir::DataDir;

const FRAME_BYTES_MAX: usize = 16 << 20;
const CHECK_BYTES: usize = 8;
const META_BYTES_MAX: u64 = 4096;

/// A finished profile.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Profile {
    pub probes: ContentHash,
    /// Hash of the name of the arithmetic.
    pub arithmetic: ContentHash,
    pub body: BlobRef,
    /// Whether the user wants it told.
    pub published: bool,
}

/// A step towards a profile.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum ProfileStep {
    /// What the following steps are about: a probe set, and an arithmetic.
    Begun(ContentHash, ContentHash),
    Read(Reading),
    Tried(Vec<Trials>),
}

/// The steps that have been taken.
pub struct Journal {
    file: File,
    path: PathBuf,
}

impl Journal {
    /// Opens the journal of a model's profile by a probe set; returns the steps in it. What was being written when the power failed is cut off.
    pub fn open(dir: &DataDir, model: ModelId, probes: ContentHash, arithmetic: ContentHash) -> Result<(Self, Vec<ProfileStep>), Failure> {
        let about = ContentHash::of(&[*probes.as_bytes(), *arithmetic.as_bytes()].concat()).to_hex();
        let path = dir.profiles()?.join(format!("{model}.{}.journal", &about[..16]));
        let failed = |action: &str, error: &io::Error| io_failure(action, &path, error);
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(&path).map_err(|error| failed("open", &error))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(|error| failed("read", &error))?;
        let (mut steps, mut rest) = (Vec::new(), &bytes[..]);
        while let Some((step, after)) = frame(rest) {
            steps.push(step);
            rest = after;
        }
        if !rest.is_empty() {
            file.set_len((bytes.len() - rest.len()) as u64).map_err(|error| failed("cut", &error))?;
        }
        Ok((Self { file, path }, steps))
    }

    /// Begins anew.
    pub fn clear(&mut self) -> Result<(), Failure> {
        self.file.set_len(0).map_err(|error| io_failure("cut", &self.path, &error))
    }

    /// Adds a step.
    pub fn add(&mut self, step: &ProfileStep) -> Result<(), Failure> {
        let bytes = protocol::codec::to_bytes(step);
        let mut framed = (bytes.len() as u32).to_le_bytes().to_vec();
        framed.extend(&ContentHash::of(&bytes).as_bytes()[..CHECK_BYTES]);
        framed.extend(bytes);
        self.file.write_all(&framed).map_err(|error| io_failure("write", &self.path, &error))
    }

    /// Has everything on the disk.
    pub fn sync(&self) -> Result<(), Failure> {
        self.file.sync_data().map_err(|error| io_failure("write", &self.path, &error))
    }
}

/// The first step of some bytes, and what comes after it.
fn frame(bytes: &[u8]) -> Option<(ProfileStep, &[u8])> {
    let (length, rest) = bytes.split_first_chunk()?;
    let (check, rest) = rest.split_first_chunk::<CHECK_BYTES>()?;
    let length = u32::from_le_bytes(*length) as usize;
    let (step, after) = rest.split_at_checked(length).filter(|_| length <= FRAME_BYTES_MAX)?;
    if ContentHash::of(step).as_bytes()[..CHECK_BYTES] != check[..] {
        return None;
    }
    Some((protocol::codec::from_bytes(step).ok()?, after))
}

impl DataDir {
    fn profiles(&self) -> Result<PathBuf, Failure> {
        let path = self.path().join("profiles");
        fs::create_dir_all(&path).map_err(|error| io_failure("create", &path, &error))?;
        Ok(path)
    }

    /// The finished profile of a model, if there is one.
    pub fn profile(&self, model: ModelId) -> Result<Option<Profile>, Failure> {
        let path = self.path().join("profiles").join(model.to_string());
        let bytes = read_file(&path, META_BYTES_MAX).map_err(|error| io_failure("read", &path, &error))?;
        let read = |bytes: Vec<u8>| {
            let damaged = |_| Failure::new(Kind::Integrity, format!("{} is damaged; confrere profile build makes it anew", path.display()));
            protocol::codec::from_bytes(&bytes).map_err(damaged)
        };
        bytes.map(read).transpose()
    }

    /// Keeps a finished profile.
    pub fn set_profile(&self, model: ModelId, profile: &Profile) -> Result<(), Failure> {
        let path = self.profiles()?.join(model.to_string());
        replace_file(&RealDisk, &path, &protocol::codec::to_bytes(profile)).map_err(|error| io_failure("write", &path, &error))
    }

    /// Forgets what was measured of a model, and how often its experts were used.
    pub(crate) fn forget_profile(&self, model: ModelId) {
        let id = model.to_string();
        for file in fs::read_dir(self.path().join("profiles")).into_iter().flatten().flatten() {
            if file.file_name().to_string_lossy().starts_with(&id) {
                let _ = fs::remove_file(file.path()); // nothing but disk is lost with what stays
            }
        }
        let _ = fs::remove_file(self.path().join("usage").join(id));
    }

    /// The models that have a finished profile, whether it can be read or not.
    pub(crate) fn profiled_models(&self) -> Vec<ModelId> {
        let files = fs::read_dir(self.path().join("profiles")).into_iter().flatten().flatten();
        files.filter_map(|file| file.file_name().to_str()?.parse().ok()).collect()
    }

    /// Every finished profile that can be read.
    pub(crate) fn all_profiles(&self) -> Vec<(ModelId, Profile)> {
        self.profiled_models().into_iter().filter_map(|model| Some((model, self.profile(model).ok()??))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_that_was_cut_short_goes_on_from_its_last_whole_step() {
        let root = std::env::temp_dir().join(format!("confrere-journal-{}", std::process::id()));
        let dir = DataDir::open(&root).expect("it is created");
        let (model, probes) = (ModelId(ContentHash::of(b"m")), ContentHash::of(b"probes"));
        let step = |expert| ProfileStep::Tried(vec![Trials { expert, domain: 0, trials: 8, hits: 5 }]);
        let (mut journal, steps) = Journal::open(&dir, model, probes, probes).expect("it opens");
        assert!(steps.is_empty());
        for expert in 0..3 {
            journal.add(&step(expert)).expect("written");
        }
        let path = journal.path.clone();
        let length = fs::metadata(&path).expect("it is there").len();
        for cut in 1..length / 3 {
            journal.file.set_len(length - cut).expect("cut");
            let (mut again, steps) = Journal::open(&dir, model, probes, probes).expect("it opens");
            assert_eq!(steps, [step(0), step(1)], "{cut}");
            again.add(&step(2)).expect("written");
        }
        assert_eq!(Journal::open(&dir, model, probes, probes).expect("it opens").1, [step(0), step(1), step(2)]);
        fs::remove_dir_all(&root).expect("removable");
    }
}
