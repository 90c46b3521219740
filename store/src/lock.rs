//! One process a data directory: an advisory lock on a file that names the holder.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};

/// A process that is killed while it starts another one leaves the lock to that for a moment: so often is it tried, and so far apart.
const LEFT_TRIES: u32 = 100;
const LEFT_PAUSE: Duration = Duration::from_millis(20);

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
        let mut tries = 0;
        while let Err(error) = file.try_lock() {
            let TryLockError::WouldBlock = error else { return Err(failed(error.into())) };
            let mut pid = String::new();
            let _ = file.rewind().and_then(|()| (&file).take(20).read_to_string(&mut pid));
            let pid = pid.trim();
            if tries == LEFT_TRIES || !is_gone(pid) {
                let pid = if pid.is_empty() { "?" } else { pid }.to_owned();
                return Err(LockError::Held { dir: dir.display().to_string(), pid });
            }
            tries += 1;
            std::thread::sleep(LEFT_PAUSE);
        }
        // The number is a courtesy to whom we keep out; on a full disk it stays empty and the lock holds all the same.
        let _ = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| writeln!(file, "{}", std::process::id()));
        Ok(Self { _file: file })
    }
}

/// Whether there is no process of that number.
fn is_gone(pid: &str) -> bool {
    let pid = pid.parse().ok().and_then(Pid::from_raw);
    pid.is_some_and(|pid| test_kill_process(pid) == Err(Errno::SRCH))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_for_what_a_killed_process_has_left_behind() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let held = DataDirLock::take(dir.path()).expect("nobody has it");
        let mut gone = std::process::Command::new("true").spawn().expect("a process");
        gone.wait().expect("it ends");
        std::fs::write(dir.path().join("lock"), format!("{}\n", gone.id())).expect("written");
        let waiting = std::thread::spawn({
            let dir = dir.path().to_owned();
            move || DataDirLock::take(&dir).map(drop)
        });
        std::thread::sleep(3 * LEFT_PAUSE);
        drop(held);
        waiting.join().expect("no panic").expect("it was let go");
    }

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
