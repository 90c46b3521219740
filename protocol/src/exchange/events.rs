//! What the downloads are told, and what they say is to be done.

use super::Urgency;
use super::wire::{FromProvider, ToProvider};
use crate::group_hashes::{GroupCheck, GroupHashes};
use crate::hash::{BlobRef, ContentHash, ModelId};

/// What happens.
#[derive(Clone, Debug)]
pub enum DownloadEvent<P, B> {
    /// A peer has taken our stream on.
    PeerUp {
        /// Which.
        peer: P,
        /// Requests that it takes at a time.
        requests_max: u32,
    },
    /// There is more against a peer than for it: whatever another may have is asked of the other. Best said before [`DownloadEvent::PeerUp`].
    Doubted {
        /// Whom.
        peer: P,
    },
    /// A stream has ended.
    PeerDown {
        /// Whose.
        peer: P,
    },
    /// A model whose blobs may be wanted, in the order in which bitfields have them.
    Follow {
        /// The model.
        model: ModelId,
        /// Its blobs.
        blobs: Vec<ContentHash>,
    },
    /// A blob is wanted, or wanted more urgently.
    Want {
        /// Which.
        blob: BlobRef,
        /// How much.
        urgency: Urgency,
    },
    /// There is room for a blob that [`DownloadAction::Prepare`] was about.
    Prepared {
        /// Which.
        hash: ContentHash,
        /// The hashes of its groups, if they are known from an earlier time.
        hashes: Option<GroupHashes>,
        /// Groups that are here already, verified.
        here: Vec<u32>,
    },
    /// The length of a blob that is wanted is hearsay: who sends another length does not have it, and has done nothing wrong.
    Unsure {
        /// Which.
        hash: ContentHash,
    },
    /// A blob is wanted no more.
    Unwant {
        /// Which.
        hash: ContentHash,
    },
    /// Nothing is wanted any more.
    UnwantAll,
    /// A peer says something.
    Received {
        /// Who.
        peer: P,
        /// What.
        message: FromProvider<B>,
    },
    /// So many bytes have come from a peer on this stream, those of unfinished messages included.
    Progress {
        /// Who.
        peer: P,
        /// How many.
        bytes: u64,
    },
    /// A group is what it should be, and kept.
    Verified {
        /// Who sent it.
        peer: P,
        /// As [`DownloadAction::Verify`] said.
        hash: ContentHash,
        /// As [`DownloadAction::Verify`] said.
        serial: u64,
        /// As [`DownloadAction::Verify`] said.
        check: GroupCheck,
    },
    /// A group is not what it should be.
    Wrong {
        /// Who sent it.
        peer: P,
        /// As [`DownloadAction::Verify`] said.
        hash: ContentHash,
        /// As [`DownloadAction::Verify`] said.
        serial: u64,
        /// As [`DownloadAction::Verify`] said.
        check: GroupCheck,
    },
    /// Time has passed; due every [`TICK_MS`] at least while anything is wanted.
    Tick,
}

/// How often the clock must be heard.
pub const TICK_MS: u64 = 100;

/// What is to be done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DownloadAction<P, B> {
    /// Say something to a peer.
    Send {
        /// To whom.
        peer: P,
        /// What.
        message: ToProvider,
    },
    /// Make room for a blob, then say [`DownloadEvent::Prepared`].
    Prepare {
        /// Which.
        blob: BlobRef,
    },
    /// The hashes of a blob's groups are known now: what is kept of it can be verified after a restart.
    Listed {
        /// The list, which folds to the blob's hash.
        hashes: GroupHashes,
    },
    /// Hash a group somewhere where nobody waits; keep it if it is right; say [`DownloadEvent::Verified`] or [`DownloadEvent::Wrong`].
    Verify {
        /// Who sent it.
        peer: P,
        /// Of which blob.
        hash: ContentHash,
        /// Which time that the blob is wanted.
        serial: u64,
        /// What it must be.
        check: GroupCheck,
        /// What came.
        bytes: B,
    },
    /// All groups of a blob are here.
    Complete {
        /// Which.
        hash: ContentHash,
    },
    /// A peer has sent what no honest peer sends: part with it for good.
    Blame {
        /// Whom.
        peer: P,
        /// For what.
        fault: Fault,
    },
    /// A peer owes bytes and is silent: its stream is as good as broken.
    HangUp {
        /// On whom.
        peer: P,
    },
}

/// What no honest peer does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// A group does not match its hash.
    #[error("sent bytes that do not match group {group} of {hash}")]
    WrongGroup {
        /// Of which blob.
        hash: ContentHash,
        /// Which group.
        group: u32,
    },
    /// A group has another length than it must.
    #[error("sent {length} bytes for group {group} of {hash}, which has {expected}")]
    WrongLength {
        /// Of which blob.
        hash: ContentHash,
        /// Which group.
        group: u32,
        /// Bytes that came.
        length: u64,
        /// Bytes that the group has.
        expected: u64,
    },
    /// A list does not fold to its blob's hash.
    #[error("sent hashes of groups that do not fold to {hash}")]
    WrongHashes {
        /// Which blob.
        hash: ContentHash,
    },
    /// Nobody asked for it.
    #[error("sent what nobody asked for")]
    Unsolicited,
}

/// What has come, for whoever measures.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ExchangeCounts {
    /// Groups that were verified.
    pub groups: u64,
    /// Groups that came although they were here, or on their way to be verified: asked twice near the end, or cancelled late.
    pub surplus_groups: u64,
    /// Requests that asked a second peer for a group.
    pub doubled: u64,
    /// Peers that were found too slow.
    pub demotions: u64,
}
