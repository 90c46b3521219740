//! What travels on a `/confrere/fetch/1` stream: framed requests one way, framed answers with raw bytes the other way.
//!
//! Small things that have no hash of their own: manifests and listings; blobs have `exchange`. Answers come in the order of
//! requests. Fixed-width little-endian integers throughout, and every length is checked against its limit before a byte is reserved for it.

use crate::hash::{ContentHash, ModelId};

/// The protocol's name on the wire.
pub const FETCH_PROTOCOL: &str = "/confrere/fetch/1";
/// What a provider writes when it takes a stream on; until it comes, an opener does not know that anybody reads.
pub const STREAM_ACK: u8 = 0x01;
/// Most bytes that one answer carries.
pub const RANGE_BYTES_MAX: u32 = 1 << 20;
/// Bytes of an encoded request.
pub const REQUEST_BYTES: usize = 1 + 32 + 8 + 4;
/// Bytes of an encoded answer, before those it carries.
pub const ANSWER_BYTES: usize = 1 + 8 + 4;
/// Most models that a listing names.
pub const LISTING_MODELS_MAX: usize = 256;
/// Longest local name of a model, in bytes.
pub const MODEL_NAME_BYTES_MAX: usize = 128;

/// What a range is wanted of.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Subject {
    /// The signed manifest of a model.
    Manifest(ModelId),
    /// The models that the provider has, in the form of [`Listing`].
    Listing,
    /// What the provider says of itself, in the form of [`Status`](crate::status::Status).
    Status,
    /// The signed records that the provider holds, in frames: kind (u8), length (u32), envelope.
    Records,
}

/// A request for some bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// Of what.
    pub subject: Subject,
    /// From where.
    pub offset: u64,
    /// How many at most; 1 to [`RANGE_BYTES_MAX`].
    pub length: u32,
}

/// The head of an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FetchAnswer {
    /// `length` bytes follow.
    Bytes {
        /// Length of the whole subject.
        total: u64,
        /// Bytes that follow this head.
        length: u32,
    },
    /// The provider does not have it.
    NotHave,
    /// The request is not one that the provider serves.
    Refused,
}

/// Bytes that are not a request or an answer: the peer speaks something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed {0} on a fetch stream")]
pub struct MalformedFetch(pub &'static str);

impl Request {
    /// The encoding: kind, hash, offset, length.
    pub fn to_bytes(&self) -> [u8; REQUEST_BYTES] {
        let (kind, hash) = match self.subject {
            Subject::Manifest(ModelId(hash)) => (0, hash),
            Subject::Listing => (2, ContentHash::from_bytes([0; 32])),
            Subject::Status => (3, ContentHash::from_bytes([0; 32])),
            Subject::Records => (4, ContentHash::from_bytes([0; 32])),
        };
        let mut bytes = [0; REQUEST_BYTES];
        bytes[0] = kind;
        bytes[1..33].copy_from_slice(hash.as_bytes());
        bytes[33..41].copy_from_slice(&self.offset.to_le_bytes());
        bytes[41..45].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    /// Reads a request.
    pub fn from_bytes(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, MalformedFetch> {
        let malformed = MalformedFetch("request");
        let (hash, rest) = bytes[1..].split_first_chunk::<32>().ok_or(malformed)?;
        let (offset, rest) = rest.split_first_chunk::<8>().ok_or(malformed)?;
        let (length, _) = rest.split_first_chunk::<4>().ok_or(malformed)?;
        let hash = ContentHash::from_bytes(*hash);
        let subject = match bytes[0] {
            0 => Subject::Manifest(ModelId(hash)),
            2 if hash.as_bytes() == &[0; 32] => Subject::Listing,
            3 if hash.as_bytes() == &[0; 32] => Subject::Status,
            4 if hash.as_bytes() == &[0; 32] => Subject::Records,
            _ => return Err(malformed),
        };
        let length = u32::from_le_bytes(*length);
        if length == 0 || length > RANGE_BYTES_MAX {
            return Err(malformed);
        }
        Ok(Self { subject, offset: u64::from_le_bytes(*offset), length })
    }
}

impl FetchAnswer {
    /// The encoding: status, total, length.
    pub fn to_bytes(&self) -> [u8; ANSWER_BYTES] {
        let (status, total, length) = match *self {
            Self::Bytes { total, length } => (0, total, length),
            Self::NotHave => (1, 0, 0),
            Self::Refused => (2, 0, 0),
        };
        let mut bytes = [0; ANSWER_BYTES];
        bytes[0] = status;
        bytes[1..9].copy_from_slice(&total.to_le_bytes());
        bytes[9..13].copy_from_slice(&length.to_le_bytes());
        bytes
    }

    /// Reads an answer's head.
    pub fn from_bytes(bytes: &[u8; ANSWER_BYTES]) -> Result<Self, MalformedFetch> {
        let malformed = MalformedFetch("answer");
        let (total, rest) = bytes[1..].split_first_chunk::<8>().ok_or(malformed)?;
        let (length, _) = rest.split_first_chunk::<4>().ok_or(malformed)?;
        let (total, length) = (u64::from_le_bytes(*total), u32::from_le_bytes(*length));
        match bytes[0] {
            0 if length <= RANGE_BYTES_MAX && u64::from(length) <= total => Ok(Self::Bytes { total, length }),
            1 if (total, length) == (0, 0) => Ok(Self::NotHave),
            2 if (total, length) == (0, 0) => Ok(Self::Refused),
            _ => Err(malformed),
        }
    }
}

/// The models that a provider has, under its own local names.
#[derive(Clone, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Listing {
    /// Name and id of each.
    pub models: Vec<(String, ModelId)>,
}

impl Listing {
    /// Reads a listing from a peer; refuses names that nobody should have to type.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, MalformedFetch> {
        let listing: Self = crate::codec::from_bytes(bytes).map_err(|_| MalformedFetch("listing"))?;
        let fine = listing.models.len() <= LISTING_MODELS_MAX && listing.models.iter().all(|(name, _)| is_model_name(name));
        if fine { Ok(listing) } else { Err(MalformedFetch("listing")) }
    }
}

/// Says whether `name` may name a model: 1 to 128 characters from letters, digits and `-_.:`, none of them leading
/// but a letter or digit. Such a name is also harmless as part of a path.
pub fn is_model_name(name: &str) -> bool {
    name.len() <= MODEL_NAME_BYTES_MAX
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.:".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn request_bytes_are_frozen() {
        let request = Request { subject: Subject::Manifest(ModelId(ContentHash::from_bytes([0xab; 32]))), offset: 0x0102, length: 0x10000 };
        let mut expected = vec![0];
        expected.extend([0xab; 32]);
        expected.extend([2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(request.to_bytes().to_vec(), expected);
    }

    #[test]
    fn limits_hold_at_their_edges() {
        for (length, fine) in [(0, false), (1, true), (RANGE_BYTES_MAX, true), (RANGE_BYTES_MAX + 1, false)] {
            let request = Request { subject: Subject::Listing, offset: 0, length };
            assert_eq!(Request::from_bytes(&request.to_bytes()).is_ok(), fine, "{length}");
            let answer = FetchAnswer::Bytes { total: u64::MAX, length };
            assert_eq!(FetchAnswer::from_bytes(&answer.to_bytes()).is_ok(), length <= RANGE_BYTES_MAX, "{length}");
        }
        assert!(FetchAnswer::from_bytes(&FetchAnswer::Bytes { total: 3, length: 4 }.to_bytes()).is_err());
    }

    #[test]
    fn names_are_harmless() {
        for name in ["qwen", "Qwen3-30B.A3B:q4_0", "7"] {
            assert!(is_model_name(name), "{name}");
        }
        for name in ["", ".", "../x", "a/b", "a\\b", "-x", "a b", "é", "a\0", &"x".repeat(129)] {
            assert!(!is_model_name(name), "{name}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_encodes_to_the_same_bytes(request in any::<[u8; REQUEST_BYTES]>(), answer in any::<[u8; ANSWER_BYTES]>(), kind in 0u8..4) {
            let mut request = request;
            request[0] = kind;
            request[43..].fill(0);
            if let Ok(read) = Request::from_bytes(&request) { prop_assert_eq!(read.to_bytes(), request); }
            let mut answer = answer;
            answer[0] = kind;
            if let Ok(read) = FetchAnswer::from_bytes(&answer) { prop_assert_eq!(read.to_bytes(), answer); }
        }
    }
}
