//! Evidence against peers that computed wrongly: what was asked, what came, and the receipt that the peer signed. One file a peer, and a limit of
//! bytes for all: a crowd of liars fills no disk, and none of them wipes out what proves another's lie.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use protocol::ContentHash;
use store::RealDisk;
use store::disk::replace_file;

/// Bytes of all evidence together; the oldest goes first.
const EVIDENCE_BYTES_MAX: u64 = 64 << 20;

/// A directory of evidence.
#[derive(Clone, Debug)]
pub(crate) struct Evidence {
    dir: PathBuf,
}

impl Evidence {
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Keeps evidence against a peer, unless there is some already: the first lie that was proven is enough. Returns where it is.
    pub(crate) fn keep(&self, peer: &str, record: &[u8]) -> io::Result<PathBuf> {
        self.keep_within(peer, record, EVIDENCE_BYTES_MAX)
    }

    fn keep_within(&self, peer: &str, record: &[u8], bytes_max: u64) -> io::Result<PathBuf> {
        // A name from elsewhere is never a path: its hash is.
        let path = self.dir.join(format!("{}.json", ContentHash::of(peer.as_bytes()).to_hex()));
        if path.exists() {
            return Ok(path);
        }
        fs::create_dir_all(&self.dir)?;
        let room = bytes_max.checked_sub(record.len() as u64).ok_or_else(|| io::Error::other("it is larger than all evidence may be"))?;
        let mut files = files_by_age(&self.dir)?;
        let mut bytes: u64 = files.iter().map(|(_, length, _)| length).sum();
        while bytes > room {
            let (_, length, oldest) = files.remove(0);
            fs::remove_file(oldest)?;
            bytes -= length;
        }
        replace_file(&RealDisk, &path, record)?;
        Ok(path)
    }
}

/// When each file was written, its length and where it is, the oldest first.
fn files_by_age(dir: &Path) -> io::Result<Vec<(SystemTime, u64, PathBuf)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.is_file() {
            files.push((metadata.modified()?, metadata.len(), entry.path()));
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_peer_has_one_piece_of_evidence_and_all_together_a_limit() {
        let dir = tempfile::tempdir().expect("a directory");
        let evidence = Evidence::new(dir.path().join("evidence"));
        let keep = |peer: &str, bytes: usize| evidence.keep_within(peer, &vec![b'x'; bytes], 100).expect("kept");
        let first = keep("a", 40);
        assert_eq!(keep("a", 10), first);
        assert_eq!(fs::metadata(&first).expect("there").len(), 40, "the first proof stays");
        std::thread::sleep(std::time::Duration::from_millis(20)); // files are told apart by their times
        let second = keep("b", 60);
        assert!(first.exists() && second.exists(), "exactly the limit");
        keep("../../c", 41);
        assert!(!first.exists() && !second.exists(), "the oldest went until there was room");
        assert_eq!(fs::read_dir(dir.path().join("evidence")).expect("there").count(), 1);
        assert!(evidence.keep_within("d", &[0; 101], 100).is_err());
    }
}
