//! Who has the experts of a model, as peers said lately.

use std::sync::Arc;

use net::PeerId;
use protocol::ModelId;

use super::refreshed::Refreshed;

/// Who has which experts of a model.
#[derive(Default)]
pub struct HoldersCache(pub(super) Refreshed<(ModelId, Holders)>);

pub(super) type Holders = Arc<Vec<Vec<PeerId>>>;
