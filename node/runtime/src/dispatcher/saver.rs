//! Writes experts to the store beside the model's work: a durable write takes longer than an expert's multiplication.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use base::clock::{now_ms, stand_back};
use base::failure::Failure;
use base::output::note;
use base::threads;
use protocol::BlobRef;
use store::BlobStore;

/// Experts that wait to be written, beside those being written.
const SAVES_MAX: usize = 4;

/// Threads that write: a slow disk syncs several files in hardly more time than one, and the engine waits when the queue is full.
const SAVERS: usize = 4;

/// A queue of experts to keep, and the threads that write them.
pub(super) struct Saver {
    queue: Option<mpsc::SyncSender<(BlobRef, Vec<u8>)>>,
    threads: Vec<std::thread::JoinHandle<()>>,
    store: Arc<BlobStore>,
}

impl Saver {
    pub(super) fn start(store: Arc<BlobStore>) -> Self {
        let (queue, saves) = mpsc::sync_channel::<(BlobRef, Vec<u8>)>(SAVES_MAX);
        let (saves, full) = (Arc::new(Mutex::new(saves)), Arc::new(AtomicBool::new(false)));
        let start = |_| {
            let (store, saves, full) = (Arc::clone(&store), Arc::clone(&saves), Arc::clone(&full));
            threads::watched("saver", move || {
                stand_back();
                while let Ok((blob, bytes)) = { saves.lock().unwrap_or_else(PoisonError::into_inner).recv() } {
                    keep(&store, blob, &bytes, &full);
                }
            })
        };
        let threads = (0..SAVERS).map(start).collect();
        Self { queue: Some(queue), threads, store }
    }

    pub(super) fn save(&self, blob: BlobRef, bytes: Vec<u8>) {
        if let Some(queue) = &self.queue {
            let _ = queue.send((blob, bytes));
        }
    }
}

/// Writes an expert; that it cannot is told once.
fn keep(store: &BlobStore, blob: BlobRef, bytes: &[u8], full: &AtomicBool) {
    let saved = threads::caught("keeping an expert", || {
        store.writer(blob).and_then(|mut writer| {
            writer.write(bytes)?;
            writer.finish(now_ms())
        })
    });
    if let Err(failure) = saved.and_then(|saved| saved.map_err(Failure::from))
        && !full.swap(true, Ordering::Relaxed)
    {
        note(&format!("note: experts that do not fit are used and not kept: {failure}"));
    }
}

impl Drop for Saver {
    /// Waits until everything that was handed over is on the disk.
    fn drop(&mut self) {
        self.queue = None;
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
        self.store.flush();
    }
}
