//! One sequence on its way through a model: how far it is, and its keys and values.

use protocol::Decoder;

use crate::mixer::kv_cache::{KvCache, KvPrecision};
use crate::mixer::rope::Position;

/// A sequence and its keys and values.
#[derive(Debug)]
pub struct Session {
    cache: KvCache,
    past: usize,
    /// Rows whose positions were given, which are not those of text: where they begin and end, and the position that follows.
    placed: Vec<Placed>,
}

#[derive(Clone, Copy, Debug)]
struct Placed {
    first: usize,
    end: usize,
    next: u32,
}

impl Session {
    /// An empty sequence for `decoder`.
    pub fn new(decoder: &Decoder, kv: KvPrecision) -> Self {
        Self { cache: KvCache::new(decoder, kv), past: 0, placed: Vec::new() }
    }

    /// Tokens and other rows taken in so far.
    pub fn tokens(&self) -> usize {
        self.past
    }

    /// The position of the next token of text.
    pub fn next_position(&self) -> u32 {
        self.placed.last().map_or(self.past as u32, |placed| placed.next + (self.past - placed.end) as u32)
    }

    /// Forgets what was taken in from row `rows` on, so that another continuation can follow. Rows whose positions were given together go
    /// together. Returns how many rows are left.
    pub fn rewind(&mut self, rows: usize) -> usize {
        self.past = self.past.min(rows);
        while let Some(placed) = self.placed.last().filter(|placed| placed.end > self.past) {
            self.past = placed.first;
            self.placed.pop();
        }
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
            // The position after an image is one beyond the farthest of its axes.
            let next = positions.iter().map(|at| at.time.max(at.height).max(at.width)).max().map_or(self.next_position(), |last| last + 1);
            self.placed.push(Placed { first: self.past, end: self.past + rows, next });
        }
        self.past += rows;
    }
}
