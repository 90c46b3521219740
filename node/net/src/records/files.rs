//! Records and opinions on the disk.
//!
//! ```text
//! records  envelopes as they came, in frames: kind, length, bytes. Losing it loses time, and what is newest
//! trust    what was seen of peers: key, facet, good, bad, of that proven wrong, times of good and bad, when. One a line
//! rulings  what the user has decided: ban KEY or allow KEY. One a line
//! checked  bodies of profiles that were measured again: key, hash, domain, and true or false. One a line
//! seq      the last sequence number that this node has used
//! ```

use base::failure::{Failure, Kind};
use base::files::{Files, keep_damaged};
use protocol::NodeId;
use protocol::record::Facet;
use protocol::trust::{Ruling, Tally, TrustBook};

use super::frames::{RECORDS_BYTES_MAX, RecordKind, frames};

const TRUST_BYTES_MAX: u64 = 4 << 20;

/// The files that hold records and opinions.
#[derive(Clone, Debug)]
pub struct RecordFiles {
    pub(super) files: Files,
}

impl RecordFiles {
    /// In a data directory.
    pub fn new(files: Files) -> Self {
        Self { files }
    }

    pub(super) fn records(&self) -> Result<Vec<(RecordKind, Vec<u8>)>, Failure> {
        let bytes = self.files.read("records", RECORDS_BYTES_MAX)?.unwrap_or_default();
        let (frames, read) = frames(&bytes);
        if read < bytes.len() {
            keep_damaged(&self.files.path().join("records"), "its end makes no sense; records come again from peers");
        }
        Ok(frames)
    }

    pub(super) fn set_records(&self, bytes: &[u8]) -> Result<(), Failure> {
        self.files.write("records", bytes)
    }

    /// What was seen of peers, and what the user has decided.
    pub fn trust(&self) -> Result<TrustBook, Failure> {
        let read = |name: &str| {
            let bytes = self.files.read(name, TRUST_BYTES_MAX)?.unwrap_or_default();
            Ok::<_, Failure>(String::from_utf8_lossy(&bytes).into_owned())
        };
        let mut trust = TrustBook::default();
        let (seen, mut damaged) = (read("trust")?, 0);
        for line in seen.lines() {
            match parse_tally(line) {
                Some((peer, facet, tally)) => trust.restore(peer, facet, tally),
                None => damaged += 1,
            }
        }
        if damaged > 0 {
            keep_damaged(
                &self.files.path().join("trust"),
                &format!("{damaged} of its lines cannot be read: what was seen of some peers is lost"),
            );
        }
        for line in read("rulings")?.lines() {
            let ruling = line.split_once(' ').and_then(|(word, key)| Some((ruling_of(word)?, key.trim().parse().ok()?)));
            // Whom the user has banned must not slip in because a file is damaged.
            let (ruling, peer) = ruling.ok_or_else(|| {
                let path = self.files.path().join("rulings");
                Failure::new(
                    Kind::Integrity,
                    format!("{}: {line:?} is not `ban KEY` or `allow KEY`; correct or remove the line", path.display()),
                )
            })?;
            trust.rule(peer, Some(ruling));
        }
        Ok(trust)
    }

    pub(super) fn set_trust(&self, trust: &TrustBook) -> Result<(), Failure> {
        self.files.set_lines("trust", trust.tallies().map(|(peer, facet, tally)| tally_line(peer, facet, tally)))
    }

    /// Writes down what the user has decided.
    pub fn set_rulings(&self, trust: &TrustBook) -> Result<(), Failure> {
        let word = |ruling: &Ruling| if *ruling == Ruling::Banned { "ban" } else { "allow" };
        self.files.set_lines("rulings", trust.rulings().iter().map(|(peer, ruling)| format!("{} {peer}", word(ruling))))
    }

    /// The last sequence number that this node has used, if it knows.
    pub fn last_seq(&self) -> Result<Option<u64>, Failure> {
        let bytes = self.files.read("seq", 100)?;
        Ok(bytes.and_then(|bytes| String::from_utf8(bytes).ok()?.trim().parse().ok()))
    }

    /// Notes a sequence number, before anybody sees it.
    pub fn set_last_seq(&self, seq: u64) -> Result<(), Failure> {
        self.files.set_lines("seq", std::iter::once(seq.to_string()))
    }
}

fn ruling_of(word: &str) -> Option<Ruling> {
    match word {
        "ban" => Some(Ruling::Banned),
        "allow" => Some(Ruling::Allowed),
        _ => None,
    }
}

fn tally_line(peer: NodeId, facet: Facet, tally: &Tally) -> String {
    let Tally { good, bad, wrong, seen, at_ms } = tally;
    format!("{peer} {} {good} {bad} {wrong} {} {} {at_ms}", facet.name(), seen.0, seen.1)
}

fn parse_tally(line: &str) -> Option<(NodeId, Facet, Tally)> {
    let fields: Vec<_> = line.split_ascii_whitespace().collect();
    let [peer, facet, good, bad, wrong, seen_good, seen_bad, at_ms] = fields[..] else { return None };
    let facet = Facet::ALL.into_iter().find(|known| known.name() == facet)?;
    let weight = |text: &str| text.parse::<f64>().ok().filter(|weight| (0.0..1e9).contains(weight));
    let seen = (seen_good.parse().ok()?, seen_bad.parse().ok()?);
    let tally = Tally { good: weight(good)?, bad: weight(bad)?, wrong: weight(wrong)?, seen, at_ms: at_ms.parse().ok()? };
    Some((peer.parse().ok()?, facet, tally))
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::NodeKey;

    #[test]
    fn what_was_seen_is_written_and_read() {
        let key = NodeKey::from_secret(&[1; 32]).id();
        let tally = Tally { good: 3.25, bad: 0.5, wrong: 0.25, seen: (7, 1), at_ms: 99 };
        assert_eq!(parse_tally(&tally_line(key, Facet::Execution, &tally)), Some((key, Facet::Execution, tally)));
        for bad in ["", "x", "ed25519:00 bytes 1 1 1 1 1 1", &format!("{key} bytes NaN 1 1 1 1 1"), &format!("{key} bytes 1 1 1 1 1 1 1")] {
            assert_eq!(parse_tally(bad), None, "{bad}");
        }
    }
}
