//! What the uploads are told, and what they say is to be done.

use super::wire::ToProvider;
use crate::hash::{ContentHash, ModelId};

/// What happens.
#[derive(Clone, Debug)]
pub enum UploadEvent<P> {
    /// A peer has opened a stream.
    PeerUp {
        /// Which.
        peer: P,
    },
    /// A stream has ended.
    PeerDown {
        /// Whose.
        peer: P,
    },
    /// A peer asks.
    Received {
        /// Who.
        peer: P,
        /// For what.
        message: ToProvider,
    },
    /// A blob was opened, or is not here.
    Opened {
        /// Which.
        hash: ContentHash,
        /// Its length, if it is here.
        length: Option<u64>,
    },
    /// So many bytes of groups have gone out.
    Sent {
        /// To whom.
        peer: P,
        /// How many.
        bytes: u64,
    },
    /// Blobs of a model have come (true) or gone.
    Changed {
        /// Which model.
        model: ModelId,
        /// Which of its blobs.
        changes: Vec<(u32, bool)>,
    },
    /// Time has passed; due every 100 ms at least while anything is asked for.
    Tick,
}

/// What is to be done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum UploadAction<P> {
    /// Open a blob, verify it, and say [`UploadEvent::Opened`].
    Open {
        /// Which.
        hash: ContentHash,
    },
    /// Nobody asks for an open blob.
    Shut {
        /// Which.
        hash: ContentHash,
    },
    /// Send a peer something.
    Send {
        /// To whom.
        peer: P,
        /// What.
        what: Sent,
    },
    /// A peer takes nothing, or asks for what cannot be: end its stream.
    HangUp {
        /// On whom.
        peer: P,
        /// Why.
        why: &'static str,
    },
}

/// What a peer is sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Sent {
    /// Which blobs of a model are here, or that the model is not.
    Have {
        /// The request.
        id: u32,
        /// The model.
        model: ModelId,
    },
    /// What has changed of it.
    Update {
        /// The request.
        id: u32,
        /// At most [`CHANGES_MAX`](super::wire::CHANGES_MAX).
        changes: Vec<(u32, bool)>,
    },
    /// The hashes of an open blob's groups.
    Hashes {
        /// The request.
        id: u32,
        /// The blob.
        hash: ContentHash,
    },
    /// A group of an open blob; [`UploadEvent::Sent`] follows when it has gone out.
    Group {
        /// The request.
        id: u32,
        /// The blob.
        hash: ContentHash,
        /// Which of its groups.
        group: u32,
        /// Bytes of it.
        length: u64,
    },
    /// It is not here.
    NotHave {
        /// The request.
        id: u32,
    },
    /// Too much is asked for.
    Busy {
        /// The request.
        id: u32,
        /// When to ask again.
        retry_ms: u32,
    },
    /// It will come.
    Wait {
        /// The request.
        id: u32,
    },
}
