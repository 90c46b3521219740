//! What Confrere's peers say to each other: types, canonical bytes, signatures.
//!
//! Goals: one canonical encoding of everything that is hashed or signed; decoders of outside bytes that never panic
//! and never allocate by a length they were told; frozen signing domains.
//! Non-goals: no input or output, no clock, no threads. Sockets are `node`'s, files are `store`'s.

pub mod audit;
pub mod codec;
pub mod decoder;
pub mod envelope;
pub mod exchange;
pub mod execute;
pub mod expert_blob;
pub mod group_hashes;
pub mod hash;
pub mod identity;
pub mod manifest;
pub mod message;
pub mod plain_text;
pub mod precision;
pub mod profile;
pub mod query;
pub mod record;
pub mod status;
pub mod tensors;
pub mod ticket;
pub mod towers;
pub mod trust;

pub use decoder::Decoder;
pub use envelope::{Domain, SignedEnvelope};
pub use group_hashes::{GroupCheck, GroupHashes};
pub use hash::{BlobRef, ContentHash, ModelId};
pub use identity::{NodeId, NodeKey};
pub use manifest::{ExpertSlot, ModelManifest, PartKind};
pub use precision::Precision;
