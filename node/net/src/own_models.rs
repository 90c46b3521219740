//! What the network asks of the models that this node has.

use std::sync::Arc;

use protocol::status::Holding;
use protocol::{ContentHash, ModelId};
use store::BlobStore;

/// The models that this node offers; the library implements it.
pub trait OwnModels: Send + Sync {
    /// Where their blobs are.
    fn store(&self) -> &Arc<BlobStore>;

    /// Whether one of them has an expert of that hash.
    fn has_expert(&self, hash: &ContentHash) -> bool;

    /// What is here of each.
    fn holdings(&self) -> Vec<Holding>;

    /// The list of them that is told to peers, encoded.
    fn listing(&self) -> Vec<u8>;

    /// The signed manifest of one of them.
    fn envelope(&self, id: ModelId) -> Option<Arc<Vec<u8>>>;
}
