//! Closed groups: the key that all nodes of one share. Who does not have it gets not one byte that he could read.

use std::fmt;
use std::path::Path;

use base::failure::{Failure, Kind, io_failure};
use base::secret_file;
use libp2p::pnet::PreSharedKey;
use store::disk::read_file;

const KEY_FILE_BYTES_MAX: u64 = 1024;

/// A group's key.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct GroupKey(pub(super) PreSharedKey);

impl GroupKey {
    /// Reads a key file, which nobody but its owner may be able to read.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let unreadable = |error| io_failure("read", path, &error);
        secret_file::check(path)?;
        let bytes = read_file(path, KEY_FILE_BYTES_MAX).map_err(unreadable)?.unwrap_or_default();
        let key = std::str::from_utf8(&bytes).ok().and_then(Self::parse);
        let form = "does not hold a group's key: 64 hexadecimal digits, by themselves or as a swarm key file";
        key.ok_or_else(|| Failure::new(Kind::Usage, format!("{} {form}", path.display())))
    }

    /// A swarm key file as other libp2p programs write it, or the digits alone.
    fn parse(text: &str) -> Option<Self> {
        let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let ([digits] | ["/key/swarm/psk/1.0.0/", "/base16/", digits]) = lines[..] else { return None };
        protocol::hash::from_hex(&digits.to_ascii_lowercase()).map(|key| Self(PreSharedKey::new(key)))
    }

    /// A name for the group that tells nothing about its key.
    pub fn fingerprint(&self) -> String {
        self.0.fingerprint().to_string()
    }
}

impl fmt::Debug for GroupKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "group {}", self.fingerprint())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_a_key_file_give_the_same_key() {
        let digits = "0f".repeat(32);
        let key = GroupKey::parse(&digits).expect("a key");
        for text in [
            format!("{digits}\n"),
            digits.to_uppercase(),
            format!("/key/swarm/psk/1.0.0/\n/base16/\n{digits}\n"),
            format!("/key/swarm/psk/1.0.0/\r\n/base16/\r\n{digits}"),
        ] {
            assert_eq!(GroupKey::parse(&text), Some(key), "{text:?}");
        }
        assert!(!format!("{key:?}").contains(&digits[..16]), "a key does not get into logs");
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let digits = "0f".repeat(32);
        for text in [
            String::new(),
            digits[1..].to_owned(),
            format!("{digits}0"),
            digits.replace('f', "g"),
            format!("{digits}\n{digits}"),
            format!("/key/swarm/psk/1.0.0/\n/base64/\n{digits}"),
            format!("/base16/\n{digits}"),
        ] {
            assert_eq!(GroupKey::parse(&text), None, "{text:?}");
        }
    }
}
