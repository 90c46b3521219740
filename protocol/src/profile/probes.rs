//! Probe sets: short texts, and questions about pictures, sounds and videos with their answers, by domain; addressed by hash.

use std::collections::BTreeMap;

use serde::Serialize;

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

/// What the hash of a set with questions begins with.
const QUESTIONS: &str = "confrere-probes/v2";
/// Most parts of a question.
const PROBE_PARTS_MAX: usize = 16;

/// What a model is given to read.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub enum Probe {
    /// A text.
    Text(String),
    /// A question, in its parts, and its answer.
    Question(Vec<ProbePart>, String),
}

/// A part of a question.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub enum ProbePart {
    /// Words.
    Text(String),
    /// A file of a kind, by its hash; of a video, frames a thousand seconds, and its sound: none, its own, or another file's.
    Medium(ProbeMedium),
}

/// A file that a question is about.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub enum ProbeMedium {
    /// A picture.
    Image(ContentHash),
    /// A sound.
    Audio(ContentHash),
    /// A video, its frames in a thousand seconds, and the file of its sound, which may be the same.
    Video(ContentHash, u32, Option<ContentHash>),
}

/// Probes by domain.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProbeSet {
    domains: BTreeMap<String, Vec<Probe>>,
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
    /// A question without parts or an answer, or with too many parts.
    #[error("question {number} of domain {domain} needs an answer and 1 to {PROBE_PARTS_MAX} parts")]
    Question {
        /// In which domain.
        domain: String,
        /// Which, counted from 1.
        number: usize,
    },
}

impl ProbeSet {
    /// Reads the texts of domains, by name: probes stand between lines of `%%`.
    pub fn from_texts<'a>(texts: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self, ProbeSetError> {
        Self::new(texts.into_iter().map(|(name, text)| (name.to_owned(), split(text))))
    }

    /// A set of probes by domain.
    pub fn new(domains: impl IntoIterator<Item = (String, Vec<Probe>)>) -> Result<Self, ProbeSetError> {
        let domains: BTreeMap<_, _> = domains.into_iter().collect();
        if let Some(name) = domains.keys().find(|name| !is_domain_name(name)) {
            return Err(ProbeSetError::Name(name.clone()));
        }
        if domains.is_empty() || domains.len() > DOMAINS_MAX {
            return Err(ProbeSetError::Domains(domains.len()));
        }
        for (domain, probes) in &domains {
            if probes.is_empty() || probes.len() > PROBES_MAX {
                return Err(ProbeSetError::Probes { domain: domain.clone(), count: probes.len() });
            }
            (1..).zip(probes).try_for_each(|(number, probe)| probe.check(domain, number))?;
        }
        Ok(Self { domains })
    }

    /// Domains and their probes, ascending by name.
    pub fn domains(&self) -> &BTreeMap<String, Vec<Probe>> {
        &self.domains
    }

    /// What the set is known by.
    pub fn hash(&self) -> ContentHash {
        // As before there were questions.
        let of_domain = |(name, probes): (&String, &Vec<Probe>)| {
            let texts: Option<Vec<_>> = probes.iter().map(|probe| probe.text().map(str::to_owned)).collect();
            Some((name.clone(), texts?))
        };
        let texts: Option<BTreeMap<_, _>> = self.domains.iter().map(of_domain).collect();
        let bytes = texts.map_or_else(|| crate::codec::to_bytes(&(QUESTIONS, &self.domains)), |texts| crate::codec::to_bytes(&texts));
        ContentHash::of(&bytes)
    }
}

impl Probe {
    /// The text, where it is one.
    pub fn text(&self) -> Option<&str> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }

    fn check(&self, domain: &str, number: usize) -> Result<(), ProbeSetError> {
        let words = |part: &ProbePart| if let ProbePart::Text(text) = part { text.len() } else { 0 };
        let bytes = match self {
            Self::Text(text) => text.len(),
            Self::Question(parts, answer) if answer.is_empty() || parts.is_empty() || parts.len() > PROBE_PARTS_MAX => {
                return Err(ProbeSetError::Question { domain: domain.to_owned(), number });
            }
            Self::Question(parts, answer) => answer.len() + parts.iter().map(words).sum::<usize>(),
        };
        let fits = (1..=PROBE_BYTES_MAX).contains(&bytes);
        if fits { Ok(()) } else { Err(ProbeSetError::Length { domain: domain.to_owned(), number, bytes }) }
    }
}

fn split(text: &str) -> Vec<Probe> {
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
    probes.into_iter().map(Probe::Text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_stand_between_lines() {
        let set = ProbeSet::from_texts([("b", "x\ny\n%%\nz\n"), ("a", "one")]).expect("a set");
        let texts = |texts: &[&str]| texts.iter().map(|text| Probe::Text((*text).to_owned())).collect::<Vec<_>>();
        assert_eq!(set.domains()["b"], texts(&["x\ny\n", "z\n"]));
        assert_eq!(set.domains()["a"], texts(&["one\n"]));
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
