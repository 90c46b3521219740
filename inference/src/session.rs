//! One sequence on its way through a model: how far it is, and its keys and values.

use protocol::Decoder;

use crate::mixer::kv_cache::{KvCache, KvPrecision};
use crate::mixer::rope::Position;

/// A sequence and its keys and values.
#[derive(Debug)]
pub struct Session {
    cache: KvCache,
    past: usize,
    /// By row, up to the last whose position was given: the position that follows the farthest one so far.
    next: Vec<f32>,
}

impl Session {
    /// An empty sequence for `decoder`.
    pub fn new(decoder: &Decoder, kv: KvPrecision) -> Self {
        Self { cache: KvCache::new(decoder, kv), past: 0, next: Vec::new() }
    }

    /// Tokens and other rows taken in so far.
    pub fn tokens(&self) -> usize {
        self.past
    }

    /// The position of the next token of text.
    pub fn next_position(&self) -> f32 {
        self.next.last().copied().unwrap_or(0.0) + (self.past - self.next.len()) as f32
    }

    /// Forgets what was taken in from row `rows` on, so that another continuation can follow. Returns how many rows are left.
    pub fn rewind(&mut self, rows: usize) -> usize {
        self.past = self.past.min(rows);
        self.next.truncate(self.past);
        self.past
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

    /// Notes that rows have been taken in, at `positions` if they were given.
    pub(crate) fn advance(&mut self, rows: usize, positions: Option<&[Position]>) {
        if let Some(positions) = positions {
            // Rows of text that came before follow one another.
            let (known, mut next) = (self.next.len(), self.next.last().copied().unwrap_or(0.0));
            self.next.extend((known..self.past).map(|row| next + (row - known + 1) as f32));
            next = self.next.last().copied().unwrap_or(0.0);
            self.next.extend(positions.iter().map(|at| {
                next = next.max(at.farthest() + 1.0);
                next
            }));
        }
        self.past += rows;
    }
}
