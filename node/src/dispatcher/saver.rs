//! Writes experts to the store beside the model's work: a durable write takes longer than an expert's multiplication.

use std::sync::{Arc, mpsc};

use protocol::BlobRef;
use store::BlobStore;

use crate::clock::{now_ms, stand_back};
use crate::failure::Failure;
use crate::output::note;
use crate::threads;

const SAVES_MAX: usize = 8;

/// A queue of experts to keep, and the thread that writes them.
pub(super) struct Saver {
    queue: Option<mpsc::SyncSender<(BlobRef, Vec<u8>)>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Saver {
    pub(super) fn start(store: Arc<BlobStore>) -> Self {
        let (queue, saves) = mpsc::sync_channel::<(BlobRef, Vec<u8>)>(SAVES_MAX);
        let thread = threads::watched("saver", move || {
            stand_back();
            let mut full = false;
            for (blob, bytes) in saves {
                let saved = threads::caught("keeping an expert", || {
                    store.writer(blob).and_then(|mut writer| {
                        writer.write(&bytes)?;
                        writer.finish(now_ms())
                    })
                });
                match saved.and_then(|saved| saved.map_err(Failure::from)) {
                    Ok(_) => {}
                    Err(error) if full => drop(error),
                    Err(error) => {
                        full = true;
                        note(&format!("note: experts that do not fit are used and not kept: {error}"));
                    }
                }
            }
            store.flush();
        });
        Self { queue: Some(queue), thread: Some(thread) }
    }

    pub(super) fn save(&self, blob: BlobRef, bytes: Vec<u8>) {
        if let Some(queue) = &self.queue {
            let _ = queue.send((blob, bytes));
        }
    }
}

impl Drop for Saver {
    /// Waits until everything that was handed over is on the disk.
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
