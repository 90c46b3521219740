//! What travels on a `/confrere/execute/1` stream: rows of activations and the experts that should run on them one way, their
//! results and a signed receipt the other way.
//!
//! A request without rows asks for nothing: it names experts that will probably be asked for next, lest they have to be read then.
//! Any other names experts by hash and carries each row once, in the form that the expert function takes
//! (`docs/expert-function.md`): group by group, 32 signed bytes and their scale. An expert's results follow as soon as it has run, as
//! rows of f32. Everything is little-endian; every length follows from counts that are checked against their limits first.
//! Does not compute, and does not judge results: see [`audit`](crate::audit).

use crate::envelope::{Domain, EnvelopeError, SignedEnvelope};
use crate::hash::ContentHash;
use crate::identity::{NodeId, NodeKey};
use crate::precision::GROUP_COLUMNS;

/// The protocol's name on the wire.
pub const EXECUTE_PROTOCOL: &str = "/confrere/execute/1";
/// Most rows of activations in a request.
pub const ROWS_MAX: usize = 512;
/// Most experts in a request.
pub const EXPERTS_MAX: usize = 256;
/// Most uses (an expert on a row) in a request.
pub const USES_MAX: usize = 4096;
/// Widest rows.
pub const HIDDEN_MAX: usize = 1 << 14;
/// Most bytes of results that a request may ask for.
pub const RESULT_BYTES_MAX: usize = 64 << 20;
/// Most bytes of a request's body.
pub const REQUEST_BYTES_MAX: usize = ROWS_MAX * row_bytes(HIDDEN_MAX) + EXPERTS_MAX * (32 + 2) + USES_MAX * 2;
/// Bytes of a request's head.
pub const REQUEST_HEAD_BYTES: usize = 8 + NONCE_BYTES + 4 + 2 + 2 + 4;
/// Bytes of an answer's head.
pub const ANSWER_HEAD_BYTES: usize = 8 + 1 + 2 + 4;
/// Most bytes of a receipt's envelope.
pub const RECEIPT_BYTES_MAX: usize = 32 << 10;
/// Bytes that make a request unlike any other.
pub const NONCE_BYTES: usize = 16;
/// What the arithmetic is called: results of two nodes are the same bits when both say this.
pub const EXPERT_FUNCTION: &str = "confrere-expert-function/1";

/// Bytes of a group of activations: its numbers and its scale.
const GROUP_BYTES: usize = GROUP_COLUMNS + 4;

/// Bytes of one row of `hidden_size` activations.
pub const fn row_bytes(hidden_size: usize) -> usize {
    hidden_size.div_ceil(GROUP_COLUMNS) * GROUP_BYTES
}

/// Bytes that are not what they should be on an execute stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed execute {0}")]
pub struct MalformedExecute(pub &'static str);

/// The head of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RequestHead {
    /// The asker's own number for it; answers bear it.
    pub number: u64,
    /// Makes the receipt one for this request only.
    pub nonce: [u8; NONCE_BYTES],
    /// Numbers in a row.
    pub hidden_size: u32,
    /// Rows that follow.
    pub rows: u16,
    /// Experts that follow the rows.
    pub experts: u16,
    /// Uses of all experts together.
    pub uses: u32,
}

impl RequestHead {
    /// Whether it only tells of experts that will probably be asked for; hashes follow, and no answer.
    pub fn is_hint(&self) -> bool {
        self.rows == 0
    }

    /// Bytes that follow the head.
    pub fn body_bytes(&self) -> usize {
        if self.is_hint() {
            return usize::from(self.experts) * 32;
        }
        usize::from(self.rows) * row_bytes(self.hidden_size as usize) + usize::from(self.experts) * (32 + 2) + self.uses as usize * 2
    }

    /// The encoding.
    pub fn to_bytes(&self) -> [u8; REQUEST_HEAD_BYTES] {
        let mut bytes = [0; REQUEST_HEAD_BYTES];
        bytes[..8].copy_from_slice(&self.number.to_le_bytes());
        bytes[8..24].copy_from_slice(&self.nonce);
        bytes[24..28].copy_from_slice(&self.hidden_size.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.rows.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.experts.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.uses.to_le_bytes());
        bytes
    }

    /// Reads a head; refuses one that asks for more than any limit.
    pub fn from_bytes(bytes: &[u8; REQUEST_HEAD_BYTES]) -> Result<Self, MalformedExecute> {
        let mut rest = &bytes[..];
        let head = Self {
            number: u64::from_le_bytes(take(&mut rest)?),
            nonce: take(&mut rest)?,
            hidden_size: u32::from_le_bytes(take(&mut rest)?),
            rows: u16::from_le_bytes(take(&mut rest)?),
            experts: u16::from_le_bytes(take(&mut rest)?),
            uses: u32::from_le_bytes(take(&mut rest)?),
        };
        let (hidden, rows, experts, uses) =
            (head.hidden_size as usize, usize::from(head.rows), usize::from(head.experts), head.uses as usize);
        let is_hint = (hidden, rows, uses) == (0, 0, 0) && (1..=EXPERTS_MAX).contains(&experts);
        let fine = (1..=HIDDEN_MAX).contains(&hidden)
            && (1..=ROWS_MAX).contains(&rows)
            && (1..=EXPERTS_MAX).contains(&experts)
            && (experts..=USES_MAX).contains(&uses)
            && uses * hidden * 4 <= RESULT_BYTES_MAX;
        if fine || is_hint { Ok(head) } else { Err(MalformedExecute("request")) }
    }
}

/// Tells of experts that will probably be asked for: head and hashes.
///
/// # Panics
/// With none, or more than [`EXPERTS_MAX`].
pub fn hint(experts: &[ContentHash]) -> Vec<u8> {
    assert!((1..=EXPERTS_MAX).contains(&experts.len()), "within the limit");
    let head = RequestHead { number: 0, nonce: [0; NONCE_BYTES], hidden_size: 0, rows: 0, experts: experts.len() as u16, uses: 0 };
    let mut bytes = head.to_bytes().to_vec();
    experts.iter().for_each(|expert| bytes.extend(expert.as_bytes()));
    bytes
}

/// Reads the hashes that follow a head that [is_hint](RequestHead::is_hint).
pub fn hinted(body: &[u8]) -> Vec<ContentHash> {
    body.as_chunks::<32>().0.iter().map(|hash| ContentHash::from_bytes(*hash)).collect()
}

/// An expert that should run, and on which rows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Task {
    /// Its bytes.
    pub expert: ContentHash,
    /// Numbers of rows, ascending.
    pub rows: Vec<u16>,
}

/// Rows of activations, and the experts that should run on them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExecuteRequest {
    /// The asker's own number for it.
    pub number: u64,
    /// Makes the receipt one for this request only.
    pub nonce: [u8; NONCE_BYTES],
    /// Numbers in a row.
    pub hidden_size: u32,
    /// All rows, one behind the other, as they travel.
    pub rows: Vec<u8>,
    /// What should be done.
    pub tasks: Vec<Task>,
}

impl ExecuteRequest {
    /// The encoding, head and body.
    ///
    /// # Panics
    /// When it is beyond the limits, which is the asker's to know.
    pub fn to_bytes(&self) -> Vec<u8> {
        let row = row_bytes(self.hidden_size as usize);
        let head = RequestHead {
            number: self.number,
            nonce: self.nonce,
            hidden_size: self.hidden_size,
            rows: u16::try_from(self.rows.len() / row).expect("within the limit"),
            experts: u16::try_from(self.tasks.len()).expect("within the limit"),
            uses: self.tasks.iter().map(|task| task.rows.len() as u32).sum(),
        };
        let mut bytes = Vec::with_capacity(REQUEST_HEAD_BYTES + head.body_bytes());
        bytes.extend(head.to_bytes());
        bytes.extend(&self.rows);
        for task in &self.tasks {
            bytes.extend(task.expert.as_bytes());
            bytes.extend((task.rows.len() as u16).to_le_bytes());
        }
        self.tasks.iter().flat_map(|task| &task.rows).for_each(|row| bytes.extend(row.to_le_bytes()));
        bytes
    }

    /// Reads the body that belongs to `head`.
    pub fn from_body(head: &RequestHead, body: &[u8]) -> Result<Self, MalformedExecute> {
        let malformed = MalformedExecute("request");
        if body.len() != head.body_bytes() {
            return Err(malformed);
        }
        let (rows, mut rest) = body.split_at(usize::from(head.rows) * row_bytes(head.hidden_size as usize));
        if !rows.as_chunks::<GROUP_BYTES>().0.iter().all(is_group) {
            return Err(MalformedExecute("activations"));
        }
        let mut heads = Vec::with_capacity(usize::from(head.experts));
        for _ in 0..head.experts {
            heads.push((ContentHash::from_bytes(take(&mut rest)?), usize::from(u16::from_le_bytes(take(&mut rest)?))));
        }
        if heads.iter().map(|(_, uses)| uses).sum::<usize>() != head.uses as usize || heads.iter().any(|(_, uses)| *uses == 0) {
            return Err(malformed);
        }
        let mut tasks = Vec::with_capacity(heads.len());
        for (expert, uses) in heads {
            let mut numbers = Vec::with_capacity(uses);
            for _ in 0..uses {
                numbers.push(u16::from_le_bytes(take(&mut rest)?));
            }
            if !numbers.is_sorted_by(|a, b| a < b) || numbers.last().is_some_and(|&last| last >= head.rows) {
                return Err(malformed);
            }
            tasks.push(Task { expert, rows: numbers });
        }
        Ok(Self { number: head.number, nonce: head.nonce, hidden_size: head.hidden_size, rows: rows.to_vec(), tasks })
    }

    /// The rows that a task works on, one behind the other: its input, as receipts name it.
    pub fn input(&self, task: &Task) -> Vec<u8> {
        let row = row_bytes(self.hidden_size as usize);
        task.rows.iter().flat_map(|&number| &self.rows[usize::from(number) * row..][..row]).copied().collect()
    }
}

/// Whether bytes are a group of activations that the expert function can have made: no number is −128, and the scale is finite.
fn is_group(group: &[u8; GROUP_BYTES]) -> bool {
    let (numbers, scale) = group.split_at(GROUP_COLUMNS);
    let scale = f32::from_le_bytes(scale.try_into().expect("four bytes are left"));
    scale.is_finite() && scale.is_sign_positive() && !numbers.contains(&0x80)
}

/// What an executor says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExecuteAnswer {
    /// An expert's results follow, as many bytes: rows of f32.
    Results {
        /// Which of the request's tasks.
        task: u16,
        /// Bytes that follow.
        length: u32,
    },
    /// The executor lacks an expert.
    NotHave {
        /// Which of the request's tasks.
        task: u16,
    },
    /// All tasks are answered; a receipt of so many bytes follows.
    Done {
        /// Bytes that follow.
        length: u32,
    },
    /// The request is not served.
    Refused(Refusal),
}

/// Why a request is not served.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[repr(u16)]
pub enum Refusal {
    /// The asker is not among those whom the executor works for.
    #[error("it does not work for this node")]
    NotAllowed = 1,
    /// Too much to do at the moment.
    #[error("it is busy")]
    Busy = 2,
    /// An expert of another shape, or of a precision without exact bits.
    #[error("the experts are not of the kind that runs at peers")]
    Unsuitable = 3,
    /// Not a request.
    #[error("it calls the request malformed")]
    Malformed = 4,
}

impl ExecuteAnswer {
    /// The encoding, with the number of the request that is answered.
    pub fn to_bytes(self, number: u64) -> [u8; ANSWER_HEAD_BYTES] {
        let (kind, what, length) = match self {
            Self::Results { task, length } => (0, task, length),
            Self::NotHave { task } => (1, task, 0),
            Self::Done { length } => (2, 0, length),
            Self::Refused(why) => (3, why as u16, 0),
        };
        let mut bytes = [0; ANSWER_HEAD_BYTES];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        bytes[8] = kind;
        bytes[9..11].copy_from_slice(&u16::to_le_bytes(what));
        bytes[11..].copy_from_slice(&u32::to_le_bytes(length));
        bytes
    }

    /// Reads an answer's head: which request it is for, and what it says. Whether the length is right, the asker knows.
    pub fn from_bytes(bytes: &[u8; ANSWER_HEAD_BYTES]) -> Result<(u64, Self), MalformedExecute> {
        let malformed = MalformedExecute("answer");
        let mut rest = &bytes[..];
        let number = u64::from_le_bytes(take(&mut rest)?);
        let [kind] = take(&mut rest)?;
        let what = u16::from_le_bytes(take(&mut rest)?);
        let length = u32::from_le_bytes(take(&mut rest)?);
        let answer = match (kind, what, length) {
            (0, task, length) if length as usize <= RESULT_BYTES_MAX => Self::Results { task, length },
            (1, task, 0) => Self::NotHave { task },
            (2, 0, length) if length as usize <= RECEIPT_BYTES_MAX => Self::Done { length },
            (3, 1, 0) => Self::Refused(Refusal::NotAllowed),
            (3, 2, 0) => Self::Refused(Refusal::Busy),
            (3, 3, 0) => Self::Refused(Refusal::Unsuitable),
            (3, 4, 0) => Self::Refused(Refusal::Malformed),
            _ => return Err(malformed),
        };
        Ok((number, answer))
    }
}

/// What a node computed, for whom it was asked: whoever has an input can run the expert again and compare.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct Receipt {
    /// The request's.
    pub nonce: [u8; NONCE_BYTES],
    /// Hash of the name of the arithmetic, [`EXPERT_FUNCTION`].
    pub build_profile: ContentHash,
    /// One for each task that was run, in their order.
    pub results: Vec<ReceiptResult>,
}

/// A task's part of a receipt.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct ReceiptResult {
    /// The expert.
    pub expert: ContentHash,
    /// The rows that it ran on, as they travelled.
    pub input: ContentHash,
    /// The rows that it made, as they travelled.
    pub output: ContentHash,
}

/// Why bytes are not a receipt for a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReceiptError {
    /// Not signed, or by somebody else.
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    /// Signed by another node than the one that answered.
    #[error("receipt is signed by {0}, who was not asked")]
    Signer(NodeId),
    /// Signed, but not a receipt.
    #[error("receipt does not decode")]
    Malformed,
    /// For another request, or of another arithmetic.
    #[error("receipt is for something else")]
    Other,
    /// It does not say what was sent.
    #[error("receipt does not name the results that were sent")]
    Results,
}

impl Receipt {
    /// Signs a receipt.
    pub fn seal(key: &NodeKey, nonce: [u8; NONCE_BYTES], results: Vec<ReceiptResult>) -> SignedEnvelope {
        let receipt = Self { nonce, build_profile: ContentHash::of(EXPERT_FUNCTION.as_bytes()), results };
        SignedEnvelope::seal(key, Domain::Receipt, &crate::codec::to_bytes(&receipt))
    }

    /// Reads a receipt by `executor` for the request with `nonce`.
    pub fn open(executor: NodeId, nonce: [u8; NONCE_BYTES], bytes: Vec<u8>) -> Result<Self, ReceiptError> {
        let envelope = SignedEnvelope::open(Domain::Receipt, bytes)?;
        if envelope.signer() != executor {
            return Err(ReceiptError::Signer(envelope.signer()));
        }
        let receipt: Self = crate::codec::from_bytes(envelope.payload()).map_err(|_| ReceiptError::Malformed)?;
        if receipt.nonce != nonce || receipt.build_profile != ContentHash::of(EXPERT_FUNCTION.as_bytes()) {
            return Err(ReceiptError::Other);
        }
        Ok(receipt)
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], MalformedExecute> {
    let (first, later) = rest.split_first_chunk().ok_or(MalformedExecute("length"))?;
    *rest = later;
    Ok(*first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(rows: usize, tasks: &[&[u16]]) -> ExecuteRequest {
        let mut bytes = vec![1; rows * row_bytes(40)];
        bytes.chunks_exact_mut(GROUP_BYTES).for_each(|group| group[GROUP_COLUMNS..].copy_from_slice(&0.5f32.to_le_bytes()));
        let task = |(i, rows): (usize, &&[u16])| Task { expert: ContentHash::from_bytes([i as u8; 32]), rows: rows.to_vec() };
        ExecuteRequest { number: 7, nonce: [9; 16], hidden_size: 40, rows: bytes, tasks: tasks.iter().enumerate().map(task).collect() }
    }

    fn read(bytes: &[u8]) -> Result<ExecuteRequest, MalformedExecute> {
        let (head, body) = bytes.split_first_chunk().ok_or(MalformedExecute("request"))?;
        ExecuteRequest::from_body(&RequestHead::from_bytes(head)?, body)
    }

    #[test]
    fn request_bytes_are_frozen() {
        let bytes = request(1, &[&[0]]).to_bytes();
        let mut expected = vec![7, 0, 0, 0, 0, 0, 0, 0];
        expected.extend([9; 16]);
        expected.extend([40, 0, 0, 0, 1, 0, 1, 0, 1, 0, 0, 0]);
        for _ in 0..2 {
            expected.extend([1; 32]);
            expected.extend([0, 0, 0, 0x3f]);
        }
        expected.extend([0; 32]);
        expected.extend([1, 0, 0, 0]);
        assert_eq!(bytes, expected);
    }

    #[test]
    fn a_request_survives_the_way_and_knows_its_inputs() {
        let sent = request(3, &[&[0, 2], &[1]]);
        let got = read(&sent.to_bytes()).expect("well formed");
        assert_eq!(got, sent);
        assert_eq!(got.input(&got.tasks[0]).len(), 2 * row_bytes(40));
    }

    #[test]
    fn refuses_rows_out_of_order_or_range_and_numbers_that_nobody_quantised() {
        for rows in [&[2u16, 0][..], &[1, 1], &[3], &[]] {
            assert!(read(&request(3, &[rows]).to_bytes()).is_err(), "{rows:?}");
        }
        for (at, byte) in [(5, 0x80), (35, 0x7f), (35, 0xbf)] {
            let mut bytes = request(1, &[&[0]]).to_bytes();
            bytes[REQUEST_HEAD_BYTES + at] = byte;
            if at == 35 && byte == 0x7f {
                bytes[REQUEST_HEAD_BYTES + 34] = 0x80; // infinite
            }
            assert_eq!(read(&bytes), Err(MalformedExecute("activations")), "{at}");
        }
    }

    #[test]
    fn limits_hold_at_their_edges() {
        let head = RequestHead { number: 1, nonce: [0; 16], hidden_size: 64, rows: ROWS_MAX as u16, experts: 8, uses: USES_MAX as u32 };
        let fine = |head: RequestHead| RequestHead::from_bytes(&head.to_bytes()).is_ok();
        assert!(fine(head));
        assert!(!fine(RequestHead { rows: ROWS_MAX as u16 + 1, ..head }) && !fine(RequestHead { rows: 0, ..head }));
        assert!(!fine(RequestHead { uses: USES_MAX as u32 + 1, ..head }) && !fine(RequestHead { uses: 7, ..head }));
        assert!(
            fine(RequestHead { experts: EXPERTS_MAX as u16, ..head }) && !fine(RequestHead { experts: EXPERTS_MAX as u16 + 1, ..head })
        );
        assert!(
            !fine(RequestHead { hidden_size: 0, ..head }) && !fine(RequestHead { hidden_size: HIDDEN_MAX as u32 + 1, uses: 8, ..head })
        );
        assert!(fine(RequestHead { hidden_size: 4096, ..head }) && !fine(RequestHead { hidden_size: 4097, ..head })); // results of 64 MiB
    }

    #[test]
    fn a_receipt_is_for_one_request_by_one_node() {
        let (key, other) = (NodeKey::from_secret(&[1; 32]), NodeKey::from_secret(&[2; 32]));
        let hash = ContentHash::of(b"x");
        let envelope = Receipt::seal(&key, [3; 16], vec![ReceiptResult { expert: hash, input: hash, output: hash }]);
        let bytes = || envelope.as_bytes().to_vec();
        assert_eq!(Receipt::open(key.id(), [3; 16], bytes()).expect("its own").results.len(), 1);
        assert_eq!(Receipt::open(key.id(), [4; 16], bytes()), Err(ReceiptError::Other));
        assert_eq!(Receipt::open(other.id(), [3; 16], bytes()), Err(ReceiptError::Signer(key.id())));
        let mut flipped = bytes();
        *flipped.last_mut().expect("it has bytes") ^= 1;
        assert_eq!(Receipt::open(key.id(), [3; 16], flipped), Err(ReceiptError::Envelope(EnvelopeError::Signature)));
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_encodes_to_the_same_bytes(
            head in any::<[u8; 24]>(), counts in (1u32..200, 1u16..4, 1u16..4, 1u32..6), body in any::<[u8; 256]>(), answer in any::<[u8; ANSWER_HEAD_BYTES]>(),
        ) {
            let mut bytes = [0; REQUEST_HEAD_BYTES];
            bytes[..24].copy_from_slice(&head);
            bytes[24..28].copy_from_slice(&counts.0.to_le_bytes());
            bytes[28..30].copy_from_slice(&counts.1.to_le_bytes());
            bytes[30..32].copy_from_slice(&counts.2.to_le_bytes());
            bytes[32..].copy_from_slice(&counts.3.to_le_bytes());
            if let Ok(head) = RequestHead::from_bytes(&bytes) {
                prop_assert_eq!(head.to_bytes(), bytes);
                if let Ok(request) = ExecuteRequest::from_body(&head, &body[..head.body_bytes().min(256)]) {
                    prop_assert_eq!(&request.to_bytes()[REQUEST_HEAD_BYTES..], &body[..head.body_bytes()]);
                }
            }
            let mut answer = answer;
            answer[8] %= 4;
            if let Ok((number, read)) = ExecuteAnswer::from_bytes(&answer) { prop_assert_eq!(read.to_bytes(number), answer); }
        }
    }
}
