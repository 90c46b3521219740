//! The memory that passes work in: made once, for the model that needs most, and shared by all models of a machine.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use protocol::Decoder;

use crate::kernels::{Operand, Rows, Tile, tiles};
use crate::mixer::gqa::GqaWork;
use crate::moe_layer::MoeWork;
use crate::work_sizes::WorkSizes;

/// The memory that a pass works in. Nothing in it outlasts the pass.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) normed: Rows,
    pub(crate) out: Rows,
    pub(crate) scales: Vec<f32>,
    pub(crate) tiles: Vec<Tile>,
    pub(crate) gqa: GqaWork,
    pub(crate) moe: MoeWork,
    pub(crate) head_x: Rows,
    pub(crate) head_normed: Rows,
    pub(crate) head_operand: Operand,
}

impl Work {
    fn new(sizes: &WorkSizes) -> Self {
        let (rows, hidden, head_rows) = (sizes.rows(), sizes.hidden(), sizes.head_rows());
        Self {
            normed: Rows::with_capacity(rows, hidden),
            out: Rows::with_capacity(rows, hidden),
            scales: Vec::with_capacity(rows),
            tiles: Vec::with_capacity(rows),
            gqa: GqaWork::new(&sizes.gqa),
            moe: MoeWork::new(sizes),
            head_x: Rows::with_capacity(head_rows, hidden),
            head_normed: Rows::with_capacity(head_rows, hidden),
            head_operand: Operand::with_capacity(head_rows, hidden, sizes.trunk_forms()),
        }
    }

    /// Bytes of all buffers.
    pub(crate) fn bytes(sizes: &WorkSizes) -> u64 {
        let (hidden, head_rows) = (sizes.hidden(), sizes.head_rows());
        let rows = 2 * Rows::bytes(sizes.rows(), hidden) + 2 * Rows::bytes(head_rows, hidden);
        let head = Operand::bytes(head_rows, hidden, sizes.trunk_forms());
        rows + head + sizes.gqa.bytes() + MoeWork::bytes(sizes)
    }

    /// Prepares for the rows of a pass.
    pub(crate) fn begin(&mut self, decoder: &Decoder, rows: usize) {
        let hidden = decoder.hidden_size as usize;
        self.normed.reshape(rows, hidden);
        self.out.reshape(rows, hidden);
        self.tiles.clear();
        self.tiles.extend(tiles(0, rows));
        self.moe.begin(decoder);
    }

    /// Prepares for some rows whose logits are to be computed.
    pub(crate) fn begin_head(&mut self, decoder: &Decoder, rows: usize) {
        let hidden = decoder.hidden_size as usize;
        self.head_x.reshape(rows, hidden);
        self.head_normed.reshape(rows, hidden);
    }
}

/// The working memory of a machine.
#[derive(Clone, Debug, Default)]
pub(crate) struct WorkMemory(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    /// What each engine needs.
    needs: Vec<Arc<WorkSizes>>,
    made: Option<Made>,
}

#[derive(Debug)]
struct Made {
    sizes: WorkSizes,
    work: Work,
    /// Rows of the largest pass so far: memory is taken where it has been written.
    rows: usize,
}

impl Inner {
    fn sizes(&self) -> Option<WorkSizes> {
        self.needs.iter().map(|sizes| **sizes).reduce(|one, other| one.max(&other))
    }

    fn bytes(&self) -> u64 {
        self.sizes().map_or(0, |sizes| Work::bytes(&sizes))
    }
}

impl WorkMemory {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that it is to take.
    pub(crate) fn bytes(&self) -> u64 {
        self.lock().bytes()
    }

    /// Those of them that no pass has written to yet.
    pub(crate) fn untaken(&self) -> u64 {
        let inner = self.lock();
        let taken = inner.made.as_ref().map_or(0, |made| Work::bytes(&made.sizes.of_rows(made.rows)));
        inner.bytes().saturating_sub(taken)
    }

    /// Bytes that it takes more once a model with such needs is there.
    pub(crate) fn more_for(&self, sizes: &WorkSizes) -> u64 {
        let inner = self.lock();
        let with = inner.sizes().map_or(*sizes, |there| there.max(sizes));
        Work::bytes(&with) - inner.bytes()
    }

    /// A share for an engine with such needs.
    pub(crate) fn share(&self, sizes: WorkSizes) -> WorkShare {
        let sizes = Arc::new(sizes);
        self.lock().needs.push(Arc::clone(&sizes));
        WorkShare { memory: self.clone(), sizes }
    }
}

/// An engine's share of the working memory. What only this one needed is given back with it.
#[derive(Debug)]
pub(crate) struct WorkShare {
    memory: WorkMemory,
    sizes: Arc<WorkSizes>,
}

impl WorkShare {
    /// The memory, which nobody else uses meanwhile, for a pass of `rows` rows.
    pub(crate) fn lock(&self, rows: usize) -> WorkGuard<'_> {
        let mut inner = self.memory.lock();
        let sizes = inner.sizes().expect("this share is one of them");
        inner.made.take_if(|made| made.sizes != sizes); // before another is made
        let made = inner.made.get_or_insert_with(|| Made { sizes, work: Work::new(&sizes), rows: 0 });
        made.rows = made.rows.max(rows);
        WorkGuard(inner)
    }
}

impl Drop for WorkShare {
    fn drop(&mut self) {
        let mut inner = self.memory.lock();
        inner.needs.retain(|sizes| !Arc::ptr_eq(sizes, &self.sizes));
        let sizes = inner.sizes();
        inner.made.take_if(|made| Some(made.sizes) != sizes);
    }
}

/// The memory, lent for a pass.
pub(crate) struct WorkGuard<'a>(MutexGuard<'a, Inner>);

impl Deref for WorkGuard<'_> {
    type Target = Work;

    fn deref(&self) -> &Work {
        &self.0.made.as_ref().expect("it is made before it is lent").work
    }
}

impl DerefMut for WorkGuard<'_> {
    fn deref_mut(&mut self) -> &mut Work {
        &mut self.0.made.as_mut().expect("it is made before it is lent").work
    }
}
