//! The half of a layer that looks at other tokens: one file a kind.

pub(crate) mod attention;
pub(crate) mod gqa;
pub(crate) mod kv_cache;
pub(crate) mod rope;

use crate::kernels::{Kernels, Rows, Tile};
use crate::pool::Pool;
use crate::session::Session;

/// A session's share of a pass.
#[derive(Debug)]
pub(crate) struct Share<'a> {
    pub(crate) session: &'a mut Session,
    /// Its first row in the batch.
    pub(crate) first: usize,
    pub(crate) rows: usize,
    /// Rows taken in before.
    pub(crate) past: usize,
}

/// What a mixer has to work on, and with.
pub(crate) struct MixerInput<'a, 'b> {
    pub(crate) pool: &'a mut Pool,
    pub(crate) kernels: &'a Kernels,
    /// The layer's number.
    pub(crate) layer: usize,
    /// (rows, hidden_size)
    pub(crate) x: &'a Rows,
    pub(crate) tiles: &'a [Tile],
    pub(crate) shares: &'a mut [Share<'b>],
}
