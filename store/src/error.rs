//! What the store could not do, and why.

use std::io;
use std::path::{Path, PathBuf};

use protocol::ContentHash;

use crate::disk::Disk;

/// What the store could not do.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The quota is used up.
    #[error("{wanted} more bytes do not fit: {left} bytes are left of the disk quota of {bytes_max}")]
    QuotaExceeded {
        /// Bytes that were to be written.
        wanted: u64,
        /// Bytes that are left.
        left: u64,
        /// The quota.
        bytes_max: u64,
    },
    /// The filesystem is full.
    #[error("no space left on the disk that holds {path}")]
    DiskFull {
        /// The store.
        path: String,
        /// The filesystem's answer.
        source: io::Error,
    },
    /// Bytes came that are not those of the hash.
    #[error("{found} bytes do not match {expected} of {length} bytes")]
    WrongBytes {
        /// The hash that was promised.
        expected: ContentHash,
        /// The length that was promised.
        length: u64,
        /// Bytes that came.
        found: u64,
    },
    /// A blob on disk is no longer what it was; it has been moved to the quarantine.
    #[error("blob {hash} is damaged on disk and was put into quarantine")]
    Damaged {
        /// Which.
        hash: ContentHash,
    },
    /// The blob is arriving already.
    #[error("blob {hash} is arriving already")]
    Arriving {
        /// Which.
        hash: ContentHash,
    },
    /// The filesystem refused.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: String,
        /// Why not.
        source: io::Error,
    },
}

pub(crate) fn list(disk: &dyn Disk, path: &Path) -> Result<Vec<(PathBuf, u64)>, StoreError> {
    disk.list(path).map_err(|source| io_error("list", path, source))
}

pub(crate) fn io_error(action: &'static str, path: &Path, source: io::Error) -> StoreError {
    let path = path.display().to_string();
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StoreError::DiskFull { path, source },
        _ => StoreError::Io { action, path, source },
    }
}
