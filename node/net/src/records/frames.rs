//! Records one behind the other: the kind of each, its length, its bytes.

/// Most bytes of records that are kept on the disk.
pub(super) const RECORDS_BYTES_MAX: u64 = 32 << 20;

/// The kinds of records that are gossiped.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum RecordKind {
    Profile = 1,
    Attestation = 2,
    Node = 3,
}

impl RecordKind {
    pub const ALL: [Self; 3] = [Self::Profile, Self::Attestation, Self::Node];

    pub(super) fn of(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == number)
    }
}

/// Reads frames of records, and says how many bytes they have: it stops where they end, or where they make no sense.
pub fn frames(bytes: &[u8]) -> (Vec<(RecordKind, Vec<u8>)>, usize) {
    let (mut frames, mut left) = (Vec::new(), bytes);
    while let Some((&[kind, a, b, c, d], rest)) = left.split_first_chunk() {
        let length = u32::from_le_bytes([a, b, c, d]) as usize;
        let Some((envelope, after)) = rest.split_at_checked(length) else { break };
        frames.extend(RecordKind::of(kind).map(|kind| (kind, envelope.to_vec())));
        left = after;
    }
    (frames, bytes.len() - left.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_stop_where_they_make_no_sense() {
        let mut bytes = vec![1, 2, 0, 0, 0, 9, 9, 7, 1, 0, 0, 0, 5, 3, 0, 0, 0, 0];
        assert_eq!(frames(&bytes), (vec![(RecordKind::Profile, vec![9, 9]), (RecordKind::Node, vec![])], bytes.len()));
        let whole = bytes.len();
        bytes.extend([1, 255, 255, 255, 255, 1]);
        assert_eq!((frames(&bytes).0.len(), frames(&bytes).1), (2, whole));
    }
}
