//! The models that a node which serves offers, and the bytes of their manifests; it grows when a model comes by a join or a pull.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use base::failure::Failure;
use net::own_models::OwnModels;
use protocol::message::{LISTING_MODELS_MAX, Listing};
use protocol::status::Holding;
use protocol::{ContentHash, ModelId};
use store::BlobStore;

use crate::data_dir::{LocalModel, OpenDataDir};

/// The store's generation and the number of models, and what was counted then.
type Counted = ((u64, usize), Vec<Holding>);

/// Shared by all who speak of the node's models.
pub struct Library {
    pub open: Arc<OpenDataDir>,
    models: RwLock<Vec<LocalModel>>,
    /// The experts of all models.
    experts: RwLock<HashSet<ContentHash>>,
    /// Signed manifests, as they were asked for.
    envelopes: Mutex<HashMap<ModelId, Arc<Vec<u8>>>>,
    /// Which experts are here, counted when the store was of this generation and there were so many models.
    counted: Mutex<Option<Counted>>,
}

impl Library {
    pub fn new(open: Arc<OpenDataDir>) -> Self {
        let library =
            Self { open, models: RwLock::default(), experts: RwLock::default(), envelopes: Mutex::default(), counted: Mutex::default() };
        library.refresh();
        library
    }

    pub fn models(&self) -> Vec<LocalModel> {
        self.models.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Finds a model by name, id, or the beginning of an id.
    pub fn find(&self, model: &str) -> Result<LocalModel, Failure> {
        let id = self.open.identify(model)?.map(|(_, id)| id);
        let found = self.models().into_iter().filter(|found| Some(found.id) == id);
        // A model may have several names: the one that was asked for, if that is one.
        found.max_by_key(|found| found.name == model).ok_or_else(|| self.open.unknown(model))
    }

    /// Looks again which models are here.
    pub fn refresh(&self) {
        let models = self.open.readable_models();
        let experts = models.iter().flat_map(|found| found.manifest.expert_blobs()).map(|blob| blob.hash).collect();
        *self.experts.write().unwrap_or_else(PoisonError::into_inner) = experts;
        *self.models.write().unwrap_or_else(PoisonError::into_inner) = models;
    }
}

impl OwnModels for Library {
    fn store(&self) -> &Arc<BlobStore> {
        &self.open.store
    }

    fn has_expert(&self, hash: &ContentHash) -> bool {
        self.experts.read().unwrap_or_else(PoisonError::into_inner).contains(hash)
    }

    /// Counted anew only when something has come or gone, however often somebody asks.
    fn holdings(&self) -> Vec<Holding> {
        let models = self.models();
        let generation = (self.store().generation(), models.len());
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, holdings)) = counted.as_ref().filter(|(at, _)| *at == generation) {
            return holdings.clone();
        }
        let holding = |model: &LocalModel| Holding {
            name: model.name.clone(),
            model: model.id,
            experts: model.experts_present(self.store()) as u32,
            of: model.manifest.experts_count() as u32,
        };
        let holdings: Vec<_> = models.iter().map(holding).collect();
        *counted = Some((generation, holdings.clone()));
        holdings
    }

    fn envelope(&self, id: ModelId) -> Option<Arc<Vec<u8>>> {
        if !self.models.read().unwrap_or_else(PoisonError::into_inner).iter().any(|found| found.id == id) {
            return None;
        }
        let mut envelopes = self.envelopes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bytes) = envelopes.get(&id) {
            return Some(Arc::clone(bytes));
        }
        let read: Result<_, Failure> = self.open.envelope(id);
        let bytes = Arc::new(read.ok()?);
        envelopes.insert(id, Arc::clone(&bytes));
        Some(bytes)
    }

    fn listing(&self) -> Vec<u8> {
        let models = self.models().into_iter().take(LISTING_MODELS_MAX).map(|found| (found.name, found.id)).collect();
        protocol::codec::to_bytes(&Listing { models })
    }
}
