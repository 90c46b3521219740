//! One process a data directory: an advisory lock on a file that names the holder.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::Path;

/// Held as long as this lives; the operating system lets go of it when the process ends, however it ends.
#[derive(Debug)]
pub struct DataDirLock {
    _file: File,
}

/// Why the lock was not to be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has it.
    #[error("data directory {dir} is in use by process {pid}")]
    Held {
        /// The directory.
        dir: String,
        /// The holder, or `?` when it has not written its number yet.
        pid: String,
    },
    /// The lock file cannot be used.
    #[error("cannot lock {path}")]
    Io {
        /// The lock file.
        path: String,
        /// Why.
        source: io::Error,
    },
}

impl DataDirLock {
    /// Takes the lock of `dir`, which must exist.
    pub fn take(dir: &Path) -> Result<Self, LockError> {
        let path = dir.join("lock");
        let failed = |source| LockError::Io { path: path.display().to_string(), source };
        let mut file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                let _ = (&file).take(20).read_to_string(&mut pid);
                let pid = pid.trim();
                let pid = if pid.is_empty() { "?" } else { pid }.to_owned();
                return Err(LockError::Held { dir: dir.display().to_string(), pid });
            }
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        // The number is a courtesy to whom we keep out; on a full disk it stays empty and the lock holds all the same.
        let _ = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| writeln!(file, "{}", std::process::id()));
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_others_out_and_names_the_holder() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let held = DataDirLock::take(dir.path()).expect("nobody has it");
        let error = DataDirLock::take(dir.path()).expect_err("it is held");
        assert!(error.to_string().ends_with(&format!("in use by process {}", std::process::id())), "{error}");
        drop(held);
        DataDirLock::take(dir.path()).expect("it was let go");
    }
}
