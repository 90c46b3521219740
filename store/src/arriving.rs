//! The blobs that have arrived in part, and their files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use protocol::ContentHash;

use crate::disk::Disk;
use crate::error::{StoreError, io_error, list};
use crate::quota::{Quota, Reservation};

/// The blobs that have arrived in part, with the room that is set aside for them; none for those that are arriving now.
#[derive(Debug, Default)]
pub(crate) struct Partials(pub(crate) BTreeMap<ContentHash, Option<Reservation>>);

impl Partials {
    /// Finds what an earlier process left; removes all that cannot be taken up, or has no room in the quota.
    pub(crate) fn find(disk: &dyn Disk, incoming: &Path, quota: &Quota) -> Result<Self, StoreError> {
        let files: BTreeMap<_, _> = list(disk, incoming)?.into_iter().collect();
        let mut partials = BTreeMap::new();
        for (path, length) in &files {
            let hash = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".part")?.parse::<ContentHash>().ok());
            let Some(hash) = hash.filter(|hash| *path == file_path(incoming, hash)) else { continue };
            if files.contains_key(&log_path(incoming, &hash))
                && let Ok(reservation) = quota.reserve(*length)
            {
                partials.insert(hash, Some(reservation));
            }
        }
        let kept: BTreeSet<_> = partials.keys().flat_map(|hash| [file_path(incoming, hash), log_path(incoming, hash)]).collect();
        for path in files.keys().filter(|path| !kept.contains(*path)) {
            disk.remove(path).map_err(|source| io_error("remove", path, source))?;
        }
        Ok(Self(partials))
    }
}

/// The file of a blob that arrives.
pub(crate) fn file_path(incoming: &Path, hash: &ContentHash) -> PathBuf {
    incoming.join(format!("{}.part", hash.to_hex()))
}

/// Which of its groups are there.
pub(crate) fn log_path(incoming: &Path, hash: &ContentHash) -> PathBuf {
    incoming.join(format!("{}.groups", hash.to_hex()))
}
