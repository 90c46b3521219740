//! What travels on a `/confrere/query/1` stream: a question about a model's experts, and an answer that the asker can check.
//!
//! Each is a frame of its length (u32, little-endian) and its canonical encoding. An answer is made of what the node holds signed; what it thinks
//! of it is a hint. After one answer the stream may carry the next question.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::hash::ModelId;
use crate::record::is_domain_name;

/// The protocol's name on the wire.
pub const QUERY_PROTOCOL: &str = "/confrere/query/1";
/// Most bytes of a question.
pub const QUERY_BYTES_MAX: usize = 1 << 10;
/// Most bytes of an answer.
pub const ANSWER_BYTES_MAX: usize = 512 << 10;
/// Most heads of profiles in an answer.
pub const HEADS_MAX: usize = 32;
/// Most attestations in an answer.
pub const ATTESTATIONS_MAX: usize = 64;
/// Most experts that may be asked for.
pub const TOP_MAX: u32 = 1024;

/// Which experts of a model serve a domain?
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Query {
    /// The model.
    pub model: ModelId,
    /// The domain.
    pub domain: String,
    /// How many; 0 for the profiles alone.
    pub top: u32,
}

/// What a node knows of it.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct QueryAnswer {
    /// The domains of its own profile of the model.
    pub domains: Vec<String>,
    /// Its own ranking, best first, as numbers in the order of layers and experts: empty without a profile of the model and domain.
    pub experts: Vec<u32>,
    /// Signed heads of profiles of the model, as it holds them, its own first.
    pub heads: Vec<ByteBuf>,
    /// Signed attestations about those who made them.
    pub attestations: Vec<ByteBuf>,
}

/// Bytes that are no question, or no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed {0} on a query stream")]
pub struct MalformedQuery(pub &'static str);

impl Query {
    /// The frame.
    pub fn to_frame(&self) -> Vec<u8> {
        frame(&crate::codec::to_bytes(self))
    }

    /// Reads what follows the length.
    pub fn from_body(body: &[u8]) -> Result<Self, MalformedQuery> {
        let query: Self = crate::codec::from_bytes(body).map_err(|_| MalformedQuery("question"))?;
        let fine = body.len() <= QUERY_BYTES_MAX && is_domain_name(&query.domain) && query.top <= TOP_MAX;
        if fine { Ok(query) } else { Err(MalformedQuery("question")) }
    }
}

impl QueryAnswer {
    /// The frame; of what would be too much, the end is left out.
    pub fn to_frame(&self) -> Vec<u8> {
        let mut shown = self.clone();
        shown.heads.truncate(HEADS_MAX);
        shown.attestations.truncate(ATTESTATIONS_MAX);
        shown.experts.truncate(TOP_MAX as usize);
        frame(&crate::codec::to_bytes(&shown))
    }

    /// Reads what follows the length.
    pub fn from_body(body: &[u8]) -> Result<Self, MalformedQuery> {
        let answer: Self = crate::codec::from_bytes(body).map_err(|_| MalformedQuery("answer"))?;
        let fine = body.len() <= ANSWER_BYTES_MAX
            && answer.domains.len() <= crate::profile::DOMAINS_MAX
            && answer.domains.iter().all(|name| is_domain_name(name))
            && answer.experts.len() <= TOP_MAX as usize
            && answer.heads.len() <= HEADS_MAX
            && answer.attestations.len() <= ATTESTATIONS_MAX;
        if fine { Ok(answer) } else { Err(MalformedQuery("answer")) }
    }
}

fn frame(body: &[u8]) -> Vec<u8> {
    let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(body);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::ContentHash;
    use crate::record::{NodeRecord, ProfileHead, Record};

    #[test]
    fn a_question_s_bytes_are_frozen() {
        let query = Query { model: ModelId(ContentHash::from_bytes([7; 32])), domain: "code".to_owned(), top: 10 };
        let mut expected = vec![48, 0, 0, 0];
        expected.extend([7; 32]);
        expected.extend([4, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend(b"code");
        expected.extend([10, 0, 0, 0]);
        assert_eq!(query.to_frame(), expected);
        assert_eq!(Query::from_body(&expected[4..]), Ok(query.clone()));
        assert!(Query::from_body(&expected[4..51]).is_err());
        for bad in [Query { domain: "Code".to_owned(), ..query.clone() }, Query { top: TOP_MAX + 1, ..query }] {
            assert!(Query::from_body(&bad.to_frame()[4..]).is_err());
        }
    }

    #[test]
    fn the_fullest_answer_fits_and_more_is_left_out() {
        let head = ByteBuf::from(vec![1; ProfileHead::ENVELOPE_BYTES_MAX]);
        let attestation = ByteBuf::from(vec![1; NodeRecord::ENVELOPE_BYTES_MAX / 2]);
        let answer = QueryAnswer {
            domains: vec!["code".to_owned()],
            experts: vec![7; TOP_MAX as usize + 1],
            heads: vec![head; HEADS_MAX + 1],
            attestations: vec![attestation; ATTESTATIONS_MAX + 1],
        };
        let read = QueryAnswer::from_body(&answer.to_frame()[4..]).expect("within the limits");
        assert_eq!((read.experts.len(), read.heads.len(), read.attestations.len()), (TOP_MAX as usize, HEADS_MAX, ATTESTATIONS_MAX));
        assert!(QueryAnswer::from_body(&[]).is_err());
    }
}
