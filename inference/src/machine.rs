//! What all models of a process share: the threads that compute, the kernels, and the memory for experts, trunks and passes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use protocol::{BlobRef, ContentHash};

use crate::aligned::{AlignedBytes, ByteCount};
use crate::cache_policy::PolicyKind;
use crate::expert_memory::ExpertMemory;
use crate::kernels::Kernels;
use crate::pool::Pool;
use crate::work::WorkMemory;

/// A handle on a machine; one a process, but for tests.
#[derive(Clone, Debug)]
pub struct Machine {
    pool: Arc<Mutex<Pool>>,
    threads: usize,
    kernels: &'static Kernels,
    experts: ExpertMemory,
    tensors: Arc<Mutex<HashMap<ContentHash, Weak<AlignedBytes>>>>,
    trunk: ByteCount,
    work: WorkMemory,
}

impl Machine {
    /// A machine that computes on `threads` threads and keeps no experts until it is [told](ExpertMemory::lock) how many bytes they may
    /// take. Which expert leaves memory first is `policy`'s to say.
    pub fn new(threads: usize, kernels: &'static Kernels, policy: PolicyKind) -> Self {
        let pool = Pool::new(threads);
        Self {
            threads: pool.threads(),
            pool: Arc::new(Mutex::new(pool)),
            kernels,
            experts: ExpertMemory::new(0, policy),
            tensors: Arc::default(),
            trunk: ByteCount::default(),
            work: WorkMemory::default(),
        }
    }

    /// Threads that compute.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Kernels for packed weights.
    pub fn kernels(&self) -> &'static Kernels {
        self.kernels
    }

    /// The memory for experts.
    pub fn experts(&self) -> &ExpertMemory {
        &self.experts
    }

    /// Bytes that experts and the trunks of all models take, in whole pages, and what passes work in.
    pub fn bytes(&self) -> u64 {
        self.experts.bytes() + self.trunk.bytes() + self.work.bytes()
    }

    /// Bytes of the memory that passes of all models work in: as much as the most demanding of them needs.
    pub fn work_bytes(&self) -> u64 {
        self.work.bytes()
    }

    /// Those of them that no pass has written to yet: promised, and not taken.
    pub fn work_bytes_untaken(&self) -> u64 {
        self.work.untaken()
    }

    /// Bytes that the trunks of all models take, in whole pages; tensors that models share count once.
    pub fn trunk_bytes(&self) -> u64 {
        self.trunk.bytes()
    }

    /// A tensor of a trunk: one that a model has in memory, or what `read` fills in.
    pub fn tensor<E>(&self, blob: BlobRef, read: impl FnOnce(&mut AlignedBytes) -> Result<(), E>) -> Result<Arc<AlignedBytes>, E> {
        let lock = || self.tensors.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bytes) = lock().get(&blob.hash).and_then(Weak::upgrade) {
            return Ok(bytes);
        }
        let mut bytes = AlignedBytes::counted(blob.length as usize, &self.trunk);
        read(&mut bytes)?;
        let bytes = Arc::new(bytes);
        let mut tensors = lock();
        tensors.retain(|_, bytes| bytes.strong_count() > 0);
        tensors.insert(blob.hash, Arc::downgrade(&bytes));
        Ok(bytes)
    }

    /// Lets the thread that runs passes, which has a core of its own, run anywhere until the next: threads that it starts meanwhile may, too.
    pub fn rest(&self) {
        self.pool().rest();
    }

    /// The memory that passes work in.
    pub(crate) fn work(&self) -> &WorkMemory {
        &self.work
    }

    /// The threads, for one pass.
    pub(crate) fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
