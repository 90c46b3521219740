//! Probe sets: short texts by domain, addressed by hash.

use std::collections::BTreeMap;

use crate::hash::ContentHash;
use crate::record::is_domain_name;

/// Most domains of a body.
pub const DOMAINS_MAX: usize = 16;

/// Most probes of a domain.
pub const PROBES_MAX: usize = 4096;
/// Longest probe, in bytes.
pub const PROBE_BYTES_MAX: usize = 64 << 10;
/// Stands alone on a line between two probes.
const BETWEEN: &str = "%%";

/// Short texts by domain.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProbeSet {
    domains: BTreeMap<String, Vec<String>>,
}

/// Why files are not a probe set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProbeSetError {
    /// Too few or too many domains.
    #[error("a probe set has 1 to {DOMAINS_MAX} domains, not {0}")]
    Domains(usize),
    /// A name that no domain can have.
    #[error("{0:?} cannot name a domain: it takes 1 to 32 lower-case letters, digits and _")]
    Name(String),
    /// Too few or too many probes.
    #[error("domain {domain} has {count} probes; 1 to {PROBES_MAX} will do, each between lines of {BETWEEN}")]
    Probes {
        /// In which domain.
        domain: String,
        /// How many.
        count: usize,
    },
    /// An empty probe, or one that is too long.
    #[error("probe {number} of domain {domain} has {bytes} bytes; 1 to {PROBE_BYTES_MAX} will do")]
    Length {
        /// In which domain.
        domain: String,
        /// Which, counted from 1.
        number: usize,
        /// Its length.
        bytes: usize,
    },
}

impl ProbeSet {
    /// Reads the texts of domains, by name: probes stand between lines of `%%`.
    pub fn from_texts<'a>(texts: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self, ProbeSetError> {
        let mut domains = BTreeMap::new();
        for (name, text) in texts {
            if !is_domain_name(name) {
                return Err(ProbeSetError::Name(name.to_owned()));
            }
            domains.insert(name.to_owned(), split(text));
        }
        if domains.is_empty() || domains.len() > DOMAINS_MAX {
            return Err(ProbeSetError::Domains(domains.len()));
        }
        for (domain, probes) in &domains {
            if probes.is_empty() || probes.len() > PROBES_MAX {
                return Err(ProbeSetError::Probes { domain: domain.clone(), count: probes.len() });
            }
            if let Some((number, probe)) = (1..).zip(probes).find(|(_, probe)| probe.is_empty() || probe.len() > PROBE_BYTES_MAX) {
                return Err(ProbeSetError::Length { domain: domain.clone(), number, bytes: probe.len() });
            }
        }
        Ok(Self { domains })
    }

    /// Domains and their probes, ascending by name.
    pub fn domains(&self) -> &BTreeMap<String, Vec<String>> {
        &self.domains
    }

    /// What the set is known by.
    pub fn hash(&self) -> ContentHash {
        ContentHash::of(&crate::codec::to_bytes(&self.domains))
    }
}

fn split(text: &str) -> Vec<String> {
    let mut probes = vec![String::new()];
    for line in text.lines() {
        if line == BETWEEN {
            probes.push(String::new());
        } else {
            let probe = probes.last_mut().expect("it has one from the start");
            probe.push_str(line);
            probe.push('\n');
        }
    }
    probes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_stand_between_lines() {
        let set = ProbeSet::from_texts([("b", "x\ny\n%%\nz\n"), ("a", "one")]).expect("a set");
        assert_eq!(set.domains()["b"], ["x\ny\n", "z\n"]);
        assert_eq!(set.domains()["a"], ["one\n"]);
        let again = ProbeSet::from_texts([("a", "one\n"), ("b", "x\ny\n%%\nz")]).expect("a set");
        assert_eq!(set.hash(), again.hash());
        let other = ProbeSet::from_texts([("a", "one\n"), ("b", "x\n%%\ny\n%%\nz")]).expect("a set");
        assert_ne!(set.hash(), other.hash());
    }

    #[test]
    fn what_is_no_probe_set_is_said() {
        let refused = |texts: &[(&'static str, &'static str)]| ProbeSet::from_texts(texts.iter().copied()).expect_err("it is none");
        assert_eq!(refused(&[]), ProbeSetError::Domains(0));
        assert_eq!(refused(&[("Code", "x")]), ProbeSetError::Name("Code".to_owned()));
        assert_eq!(refused(&[("a", "x\n%%\n")]), ProbeSetError::Length { domain: "a".to_owned(), number: 2, bytes: 0 });
    }
}
