//! Who has the experts of a model, as peers said lately.

use std::sync::Arc;

use protocol::ModelId;

use super::refreshed::Refreshed;
use crate::net::PeerId;

/// Who has which experts of a model.
#[derive(Default)]
pub(crate) struct HoldersCache(pub(super) Refreshed<(ModelId, Holders)>);

pub(super) type Holders = Arc<Vec<Vec<PeerId>>>;
