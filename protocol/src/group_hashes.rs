//! Hashes of a blob's groups of 256 KiB: each group is verified alone, and all of them fold to the blob's own hash.
//!
//! BLAKE3 is a tree. A group that is a power of two of its chunks is a subtree, whose hash depends on where it stands; merging
//! the subtrees gives the plain hash of the whole. So a list of groups needs no signature: it is right when it folds to the
//! hash that was asked for, and then every group is bound to that hash.

use blake3::hazmat::{HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root};

use crate::hash::{BlobRef, ContentHash};

/// Bytes of a group; the last of a blob may be shorter.
pub const GROUP_BYTES: u64 = 256 << 10;
/// Most groups of a blob: 16 GiB of them.
pub const GROUPS_MAX: u32 = 1 << 16;

/// The hash of one group where it stands; of a blob's only group, the hash of the blob.
pub type GroupHash = [u8; 32];

/// A blob with the hashes of its groups, which fold to its hash.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GroupHashes {
    blob: BlobRef,
    hashes: Vec<GroupHash>,
}

/// All that it takes to verify one group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GroupCheck {
    /// Length of the whole blob.
    pub blob_length: u64,
    /// Which group.
    pub group: u32,
    /// What its bytes must hash to.
    pub hash: GroupHash,
}

/// A list that is not the one of its blob's groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WrongGroups {
    /// Another number of groups.
    #[error("a blob of {length} bytes does not have {found} groups")]
    Count {
        /// Length of the blob.
        length: u64,
        /// Groups that were listed.
        found: usize,
    },
    /// They fold to something else.
    #[error("the groups do not fold to {0}")]
    Fold(ContentHash),
}

/// Returns how many groups a blob of `length` bytes has, the empty one being one group; nothing when it is longer than we move.
pub fn group_count(length: u64) -> Option<u32> {
    u32::try_from(length.div_ceil(GROUP_BYTES).max(1)).ok().filter(|&count| count <= GROUPS_MAX)
}

/// Returns the length of a group of a blob of `length` bytes.
pub fn group_length(length: u64, group: u32) -> u64 {
    length.saturating_sub(group_offset(group)).min(GROUP_BYTES)
}

/// Returns where a group begins.
pub fn group_offset(group: u32) -> u64 {
    u64::from(group) * GROUP_BYTES
}

/// Returns the hash of `bytes` as a group of a blob of `length` bytes.
pub fn hash_group(length: u64, group: u32, bytes: &[u8]) -> GroupHash {
    if length <= GROUP_BYTES {
        return *blake3::hash(bytes).as_bytes();
    }
    blake3::Hasher::new().set_input_offset(group_offset(group)).update(bytes).finalize_non_root()
}

impl GroupHashes {
    /// Takes a list for the one of `blob` if it is that.
    pub fn new(blob: BlobRef, hashes: Vec<GroupHash>) -> Result<Self, WrongGroups> {
        if group_count(blob.length).is_none_or(|count| count as usize != hashes.len()) {
            return Err(WrongGroups::Count { length: blob.length, found: hashes.len() });
        }
        if fold_root(&hashes, blob.length) != blob.hash {
            return Err(WrongGroups::Fold(blob.hash));
        }
        Ok(Self { blob, hashes })
    }

    /// The list of a blob of one group, which is the blob's hash itself; nothing for a longer one.
    pub fn of_single(blob: BlobRef) -> Option<Self> {
        (blob.length <= GROUP_BYTES).then(|| Self { blob, hashes: vec![*blob.hash.as_bytes()] })
    }

    /// The list of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        let length = bytes.len() as u64;
        let mut hashes: Vec<_> =
            bytes.chunks(GROUP_BYTES as usize).enumerate().map(|(group, bytes)| hash_group(length, group as u32, bytes)).collect();
        if bytes.is_empty() {
            hashes.push(hash_group(0, 0, bytes));
        }
        Self { blob: BlobRef { hash: fold_root(&hashes, length), length }, hashes }
    }

    /// The blob.
    pub fn blob(&self) -> BlobRef {
        self.blob
    }

    /// The hashes in the order of the groups.
    pub fn hashes(&self) -> &[GroupHash] {
        &self.hashes
    }

    /// What a group must be; nothing beyond the last.
    pub fn check(&self, group: u32) -> Option<GroupCheck> {
        let hash = *self.hashes.get(group as usize)?;
        Some(GroupCheck { blob_length: self.blob.length, group, hash })
    }
}

impl GroupCheck {
    /// Says whether `bytes` are the group.
    pub fn matches(&self, bytes: &[u8]) -> bool {
        bytes.len() as u64 == group_length(self.blob_length, self.group) && hash_group(self.blob_length, self.group, bytes) == self.hash
    }
}

fn fold_root(hashes: &[GroupHash], length: u64) -> ContentHash {
    if let [only] = hashes {
        return ContentHash::from_bytes(*only);
    }
    let (left, right) = fold_halves(hashes, length);
    ContentHash::from_bytes(*merge_subtrees_root(&left, &right, Mode::Hash).as_bytes())
}

fn fold(hashes: &[GroupHash], length: u64) -> GroupHash {
    if let [only] = hashes {
        return *only;
    }
    let (left, right) = fold_halves(hashes, length);
    merge_subtrees_non_root(&left, &right, Mode::Hash)
}

fn fold_halves(hashes: &[GroupHash], length: u64) -> (GroupHash, GroupHash) {
    let left_length = left_subtree_len(length);
    let (left, right) = hashes.split_at((left_length / GROUP_BYTES) as usize);
    (fold(left, left_length), fold(right, length - left_length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(length: u64) -> Vec<u8> {
        (0..length).map(|i| (i % 251) as u8).collect() // the pattern of BLAKE3's published vectors
    }

    #[test]
    fn groups_fold_to_the_plain_hash_at_every_border() {
        let g = GROUP_BYTES;
        for length in [0, 1, 1024, g - 1, g, g + 1, 2 * g - 1, 2 * g, 2 * g + 1, 3 * g, 4 * g + 7, 5 * g, 8 * g, 9 * g - 1, 37 * g + 5] {
            let bytes = bytes(length);
            let groups = GroupHashes::of(&bytes);
            assert_eq!(groups.blob(), BlobRef::of(&bytes), "{length}");
            assert_eq!(groups.hashes().len() as u32, group_count(length).expect("not too long"), "{length}");
            assert_eq!(GroupHashes::new(groups.blob(), groups.hashes().to_vec()), Ok(groups.clone()), "{length}");
            for group in 0..groups.hashes().len() as u32 {
                let from = group_offset(group) as usize;
                let part = &bytes[from..from + group_length(length, group) as usize];
                assert!(groups.check(group).expect("within the list").matches(part), "{length}, group {group}");
            }
            assert_eq!(groups.check(groups.hashes().len() as u32), None);
        }
    }

    #[test]
    fn refuses_lists_that_are_not_the_blob_s() {
        let groups = GroupHashes::of(&bytes(3 * GROUP_BYTES));
        let (blob, hashes) = (groups.blob(), groups.hashes().to_vec());
        for wrong in [&hashes[..2], &[&hashes[..], &hashes[..1]].concat(), &[]] {
            assert!(matches!(GroupHashes::new(blob, wrong.to_vec()), Err(WrongGroups::Count { .. })));
        }
        let swapped = vec![hashes[1], hashes[0], hashes[2]];
        assert_eq!(GroupHashes::new(blob, swapped), Err(WrongGroups::Fold(blob.hash)));
    }

    #[test]
    fn a_wrong_length_is_found_by_the_last_group() {
        let bytes = bytes(3 * GROUP_BYTES);
        let blob = BlobRef { length: bytes.len() as u64 - 1, ..BlobRef::of(&bytes) };
        // Hashes of subtrees do not tell how long the last one is; its bytes do.
        let groups = GroupHashes::new(blob, GroupHashes::of(&bytes).hashes().to_vec()).expect("the same tree");
        let last = &bytes[2 * GROUP_BYTES as usize..];
        let check = groups.check(2).expect("within the list");
        assert!(!check.matches(last) && !check.matches(&last[1..]) && !check.matches(&last[..last.len() - 1]));
    }

    #[test]
    fn the_number_of_groups_is_limited() {
        let most = u64::from(GROUPS_MAX) * GROUP_BYTES;
        assert_eq!((group_count(most), group_count(most + 1), group_count(u64::MAX)), (Some(GROUPS_MAX), None, None));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn one_flipped_bit_never_verifies(length in 1u64..4 * GROUP_BYTES, at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut bytes = bytes(length);
            let groups = GroupHashes::of(&bytes);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            for group in 0..groups.hashes().len() as u32 {
                let from = group_offset(group) as usize;
                let part = &bytes[from..from + group_length(length, group) as usize];
                let right = at as u64 / GROUP_BYTES != u64::from(group);
                prop_assert_eq!(groups.check(group).expect("within the list").matches(part), right);
            }
        }
    }
}
