//! One sequence on its way through the model: how far it is, and its keys and values.

use crate::kv_cache::{KvCache, KvPrecision};
use crate::model::Model;

/// A sequence and its keys and values.
#[derive(Debug)]
pub struct Session {
    cache: KvCache,
    past: usize,
}

impl Session {
    /// An empty sequence for `model`.
    pub fn new(model: &Model, kv: KvPrecision) -> Self {
        Self { cache: KvCache::new(&model.config, kv), past: 0 }
    }

    /// Tokens taken in so far.
    pub fn tokens(&self) -> usize {
        self.past
    }

    /// Forgets the tokens from `tokens` on, so that another continuation can follow.
    pub fn rewind(&mut self, tokens: usize) {
        self.past = self.past.min(tokens);
    }

    /// Makes room for `tokens` tokens in all, so that none has to be made later.
    pub fn reserve(&mut self, tokens: usize) {
        self.cache.reserve(tokens);
    }

    /// Bytes that its keys and values take.
    pub fn bytes(&self) -> u64 {
        self.cache.allocated_bytes()
    }

    pub(crate) fn cache(&self) -> &KvCache {
        &self.cache
    }

    pub(crate) fn cache_mut(&mut self) -> &mut KvCache {
        &mut self.cache
    }

    pub(crate) fn advance(&mut self, tokens: usize) {
        self.past += tokens;
    }
}
