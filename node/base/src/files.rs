//! The small files of a data directory: lines of text, replaced as a whole.

use std::fs;
use std::path::{Path, PathBuf};

use store::RealDisk;
use store::disk::{read_file, replace_file};

use crate::failure::{Failure, Kind, io_failure};
use crate::output::note;

/// Longest of the small files, in bytes.
pub const SMALL_FILE_BYTES_MAX: u64 = 4 << 20;

/// A directory with small files in it.
#[derive(Clone, Debug)]
pub struct Files {
    root: PathBuf,
}

impl Files {
    /// The files in a directory that is there.
    pub fn of(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// Where they are.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// Keeps other processes from changing the small files until the guard is dropped.
    pub fn exclusive(&self) -> Result<fs::File, Failure> {
        let path = self.root.join("edit-lock");
        let lock = fs::File::create(&path).and_then(|file| file.lock().map(|()| file));
        lock.map_err(|error| io_failure("lock", &path, &error))
    }

    /// A whole file, of at most `bytes_max`; none when it is not there.
    pub fn read(&self, name: &str, bytes_max: u64) -> Result<Option<Vec<u8>>, Failure> {
        let path = self.root.join(name);
        read_file(&path, bytes_max).map_err(|error| io_failure("read", &path, &error))
    }

    /// The lines of a file, without comments; none when it is not there.
    pub fn lines(&self, name: &str) -> Result<Vec<String>, Failure> {
        let bytes = self.read(name, SMALL_FILE_BYTES_MAX)?.unwrap_or_default();
        let path = self.root.join(name);
        let text = String::from_utf8(bytes).map_err(|_| Failure::new(Kind::Integrity, format!("{} is not UTF-8", path.display())))?;
        Ok(text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned).collect())
    }

    /// Replaces a file by lines.
    pub fn set_lines(&self, name: &str, lines: impl Iterator<Item = String>) -> Result<(), Failure> {
        let text: String = lines.map(|line| line + "\n").collect();
        self.write(name, text.as_bytes())
    }

    /// Replaces a file.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), Failure> {
        let path = self.root.join(name);
        replace_file(&RealDisk, &path, bytes).map_err(|error| io_failure("write", &path, &error))
    }
}

/// Keeps a copy of a file that is damaged, and says so, before something writes over it: what can still be read of it is its owner's.
pub fn keep_damaged(path: &Path, why: &str) {
    let mut name = path.as_os_str().to_owned();
    name.push(".damaged");
    let kept = match fs::copy(path, &name) {
        Ok(_) => format!("a copy is kept in {}", Path::new(&name).display()),
        Err(error) => format!("no copy can be kept: {error}"),
    };
    note(&format!("warning: {} is damaged: {why}; {kept}", path.display()));
}
