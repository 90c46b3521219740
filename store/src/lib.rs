//! Keeps experts and other blobs by hash, on disk, until told otherwise.
//!
//! Goals: a blob that was acknowledged survives a crash; a blob that is served is the one that was asked for; the index
//! is never the only copy of anything; the quota holds at every moment.
//! Non-goals: it does not know what a model is, does not fetch and does not read a clock.

mod arriving;
pub mod blob_store;
pub mod disk;
pub mod error;
pub mod index;
pub mod lock;
pub mod partial;
pub mod quota;
pub mod scrub;

pub use blob_store::{BlobReader, BlobStore, BlobWriter, PutOutcome, StoreStat};
pub use disk::{Disk, DiskFile, RealDisk};
pub use error::StoreError;
pub use lock::{DataDirLock, LockError};
pub use partial::PartialBlob;
pub use scrub::ScrubReport;
