//! The messages of an exchange stream and their bytes.
//!
//! Whoever wants something opens a stream and asks; whoever has it answers. Each message is a head of nine bytes, kind, id and
//! length, and a body. The ids are the asker's and grow; an answer has the id of what it answers. Integers are little-endian,
//! and every length is checked against the limit of its kind before a byte is reserved for it.

use super::Urgency;
use super::bitfield::{BITS_MAX, Bitfield};
use crate::group_hashes::{GROUP_BYTES, GROUPS_MAX, GroupHash};
use crate::hash::{ContentHash, ModelId};

/// The protocol's name on the wire.
pub const EXCHANGE_PROTOCOL: &str = "/confrere/exchange/1";
/// Bytes of a message's head.
pub const HEAD_BYTES: usize = 1 + 4 + 4;
/// Most changes that one update tells.
pub const CHANGES_MAX: usize = 256;

const HASH_BYTES: usize = 32;
const SET: u32 = 1 << 31; // in a change: the bit is set now

/// What an asker says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ToProvider {
    /// Asks which blobs of a model there are, now and as that changes.
    Follow {
        /// Names this request.
        id: u32,
        /// The model.
        model: ModelId,
    },
    /// Asks for the hashes of a blob's groups.
    Hashes {
        /// Names this request.
        id: u32,
        /// The blob.
        blob: ContentHash,
    },
    /// Asks for one group of a blob.
    Group {
        /// Names this request.
        id: u32,
        /// What comes first.
        urgency: Urgency,
        /// The blob.
        blob: ContentHash,
        /// Which of its groups.
        group: u32,
    },
    /// Takes a request back; its answer may be on its way already.
    Cancel {
        /// Which request.
        id: u32,
    },
}

/// What a provider says; the bytes of a group are of type `B`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FromProvider<B> {
    /// The first message on a stream: somebody reads it.
    Hello {
        /// Most requests that may be open at a time.
        requests_max: u32,
    },
    /// Which blobs of a model there are: trunk, side files and experts, in the order of the manifest.
    Have {
        /// What this answers.
        id: u32,
        /// A bit for each.
        bits: Bitfield,
    },
    /// What has changed since.
    Update {
        /// The request to follow.
        id: u32,
        /// Blobs that have come (true) or gone.
        changes: Vec<(u32, bool)>,
    },
    /// The hashes of a blob's groups.
    Hashes {
        /// What this answers.
        id: u32,
        /// In the order of the groups.
        hashes: Vec<GroupHash>,
    },
    /// A group.
    Group {
        /// What this answers.
        id: u32,
        /// Its bytes.
        bytes: B,
    },
    /// It is not here.
    NotHave {
        /// What this answers.
        id: u32,
    },
    /// Not now.
    Busy {
        /// What this answers.
        id: u32,
        /// When to ask again.
        retry_ms: u32,
    },
    /// It will come, and takes a while.
    Wait {
        /// What this is about.
        id: u32,
    },
}

/// Bytes that are not a message: the peer speaks something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed {0} on an exchange stream")]
pub struct MalformedExchange(pub &'static str);

/// Which message follows a head.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum MessageKind {
    /// [`ToProvider::Follow`]
    Follow = 1,
    /// [`ToProvider::Hashes`]
    AskHashes = 2,
    /// [`ToProvider::Group`]
    AskGroup = 3,
    /// [`ToProvider::Cancel`]
    Cancel = 4,
    /// [`FromProvider::Hello`]
    Hello = 16,
    /// [`FromProvider::Have`]
    Have = 17,
    /// [`FromProvider::Update`]
    Update = 18,
    /// [`FromProvider::Hashes`]
    Hashes = 19,
    /// [`FromProvider::Group`]
    Group = 20,
    /// [`FromProvider::NotHave`]
    NotHave = 21,
    /// [`FromProvider::Busy`]
    Busy = 22,
    /// [`FromProvider::Wait`]
    Wait = 23,
}

/// The head of a message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MessageHead {
    /// What the body is.
    pub kind: MessageKind,
    /// The asker's name for what this is about; zero where there is none.
    pub id: u32,
    /// Bytes of the body, within the limit of its kind.
    pub length: u32,
}

impl TryFrom<u8> for MessageKind {
    type Error = MalformedExchange;

    fn try_from(byte: u8) -> Result<Self, MalformedExchange> {
        use MessageKind::{AskGroup, AskHashes, Busy, Cancel, Follow, Group, Hashes, Have, Hello, NotHave, Update, Wait};
        let all = [Follow, AskHashes, AskGroup, Cancel, Hello, Have, Update, Hashes, Group, NotHave, Busy, Wait];
        all.into_iter().find(|&kind| kind as u8 == byte).ok_or(MalformedExchange("kind"))
    }
}

impl MessageKind {
    /// Most bytes of a body of this kind.
    pub fn bytes_max(self) -> u32 {
        let bytes = match self {
            Self::Cancel | Self::NotHave | Self::Wait => 0,
            Self::Hello | Self::Busy => 4,
            Self::Follow | Self::AskHashes => HASH_BYTES,
            Self::AskGroup => 1 + HASH_BYTES + 4,
            Self::Have => 4 + BITS_MAX.div_ceil(8) as usize,
            Self::Update => 4 * CHANGES_MAX,
            Self::Hashes => HASH_BYTES * GROUPS_MAX as usize,
            Self::Group => GROUP_BYTES as usize,
        };
        bytes as u32
    }

    fn is_from_provider(self) -> bool {
        self as u8 >= Self::Hello as u8
    }
}

impl MessageHead {
    /// The encoding.
    pub fn to_bytes(self) -> [u8; HEAD_BYTES] {
        let mut bytes = [self.kind as u8; HEAD_BYTES];
        bytes[1..5].copy_from_slice(&self.id.to_le_bytes());
        bytes[5..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    /// The head of a group, for whoever writes its bytes without copying them.
    pub fn of_group(id: u32, length: u32) -> Self {
        Self { kind: MessageKind::Group, id, length }
    }

    /// Reads the head of what an asker says.
    pub fn of_request(bytes: &[u8; HEAD_BYTES]) -> Result<Self, MalformedExchange> {
        Self::from_bytes(bytes).filter(|head| !head.kind.is_from_provider()).ok_or(MalformedExchange("request"))
    }

    /// Reads the head of what a provider says.
    pub fn of_answer(bytes: &[u8; HEAD_BYTES]) -> Result<Self, MalformedExchange> {
        Self::from_bytes(bytes).filter(|head| head.kind.is_from_provider()).ok_or(MalformedExchange("answer"))
    }

    fn from_bytes(bytes: &[u8; HEAD_BYTES]) -> Option<Self> {
        let kind = MessageKind::try_from(bytes[0]).ok()?;
        let (id, length) = bytes[1..].split_first_chunk::<4>()?;
        let (id, length) = (u32::from_le_bytes(*id), u32::from_le_bytes(*length.first_chunk()?));
        let named = id != 0 || kind == MessageKind::Hello;
        (named && length <= kind.bytes_max()).then_some(Self { kind, id, length })
    }
}

impl ToProvider {
    /// The encoding, head and body.
    pub fn to_bytes(&self) -> Vec<u8> {
        match *self {
            Self::Follow { id, model: ModelId(hash) } => message(MessageKind::Follow, id, hash.as_bytes()),
            Self::Hashes { id, blob } => message(MessageKind::AskHashes, id, blob.as_bytes()),
            Self::Group { id, urgency, blob, group } => {
                let body = [&[urgency as u8][..], blob.as_bytes(), &group.to_le_bytes()].concat();
                message(MessageKind::AskGroup, id, &body)
            }
            Self::Cancel { id } => message(MessageKind::Cancel, id, &[]),
        }
    }

    /// Reads the message of a head and its body.
    pub fn from_body(head: MessageHead, body: &[u8]) -> Result<Self, MalformedExchange> {
        let malformed = MalformedExchange("request");
        let id = head.id;
        let hash = |bytes: &[u8]| bytes.try_into().map(ContentHash::from_bytes).map_err(|_| malformed);
        match head.kind {
            MessageKind::Follow => Ok(Self::Follow { id, model: ModelId(hash(body)?) }),
            MessageKind::AskHashes => Ok(Self::Hashes { id, blob: hash(body)? }),
            MessageKind::AskGroup => {
                let (urgency, rest) = body.split_first().ok_or(malformed)?;
                let (blob, group) = rest.split_at_checked(HASH_BYTES).ok_or(malformed)?;
                let group = group.try_into().map(u32::from_le_bytes).map_err(|_| malformed)?;
                let urgency = Urgency::try_from(*urgency).map_err(|_| malformed)?;
                Ok(Self::Group { id, urgency, blob: hash(blob)?, group })
            }
            MessageKind::Cancel if body.is_empty() => Ok(Self::Cancel { id }),
            _ => Err(malformed),
        }
    }
}

impl<B: AsRef<[u8]>> FromProvider<B> {
    /// The encoding, head and body.
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Hello { requests_max } => message(MessageKind::Hello, 0, &requests_max.to_le_bytes()),
            Self::Have { id, bits } => message(MessageKind::Have, *id, &bits.to_bytes()),
            Self::Update { id, changes } => {
                let words = changes.iter().flat_map(|&(index, set)| (index | if set { SET } else { 0 }).to_le_bytes());
                message(MessageKind::Update, *id, &words.collect::<Vec<_>>())
            }
            Self::Hashes { id, hashes } => message(MessageKind::Hashes, *id, hashes.as_flattened()),
            Self::Group { id, bytes } => message(MessageKind::Group, *id, bytes.as_ref()),
            Self::NotHave { id } => message(MessageKind::NotHave, *id, &[]),
            Self::Busy { id, retry_ms } => message(MessageKind::Busy, *id, &retry_ms.to_le_bytes()),
            Self::Wait { id } => message(MessageKind::Wait, *id, &[]),
        }
    }
}

impl FromProvider<Vec<u8>> {
    /// Reads the message of a head and its body.
    pub fn from_body(head: MessageHead, body: Vec<u8>) -> Result<Self, MalformedExchange> {
        let malformed = MalformedExchange("answer");
        let id = head.id;
        let word = |body: &[u8]| body.try_into().map(u32::from_le_bytes).map_err(|_| malformed);
        match head.kind {
            MessageKind::Hello if id == 0 => Ok(Self::Hello { requests_max: word(&body)? }),
            MessageKind::Have => Ok(Self::Have { id, bits: Bitfield::from_bytes(&body).ok_or(malformed)? }),
            MessageKind::Update => {
                let (words, []) = body.as_chunks::<4>() else { return Err(malformed) };
                let changes = words.iter().map(|word| u32::from_le_bytes(*word)).map(|word| (word & !SET, word & SET != 0));
                Ok(Self::Update { id, changes: changes.collect() })
            }
            MessageKind::Hashes => {
                let (hashes, []) = body.as_chunks::<HASH_BYTES>() else { return Err(malformed) };
                Ok(Self::Hashes { id, hashes: hashes.to_vec() })
            }
            MessageKind::Group => Ok(Self::Group { id, bytes: body }),
            MessageKind::NotHave if body.is_empty() => Ok(Self::NotHave { id }),
            MessageKind::Busy => Ok(Self::Busy { id, retry_ms: word(&body)? }),
            MessageKind::Wait if body.is_empty() => Ok(Self::Wait { id }),
            _ => Err(malformed),
        }
    }
}

fn message(kind: MessageKind, id: u32, body: &[u8]) -> Vec<u8> {
    let head = MessageHead { kind, id, length: body.len() as u32 };
    [&head.to_bytes()[..], body].concat()
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
