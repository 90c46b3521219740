//! The thread that generates: loads the model that is asked for, and admits requests to its batch.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::batch::Batch;
use super::{GenerationOptions, Item, ModelState, ReadyModel, Shared, Stopped, Task};
use crate::clock::instant;
use crate::data_dir::{LocalModel, OpenDataDir};
use crate::failure::Failure;
use crate::federation::Federation;
use crate::loading::Loaded;
use crate::output::note;
use crate::threads;

/// How often uses of experts are written down.
const USES_PAUSE: Duration = Duration::from_secs(30);

pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) open: Arc<OpenDataDir>,
    pub(super) federation: Federation,
    pub(super) options: GenerationOptions,
}

impl Worker {
    /// Works until the node is to stop.
    pub(super) fn work(self) {
        let mut next = None;
        while let Some(item) = next.take().or_else(|| self.shared.wait()) {
            if item.is_abandoned() {
                continue;
            }
            let id = item.found.id;
            self.shared.model.send_replace(ModelState::Loading(item.found.clone()));
            // A fault of a model's own files or of a pass ends with this model's requests; the thread answers for others.
            match threads::caught("loading the model", || self.load(&item.found)).and_then(|loaded| loaded) {
                Ok(mut loaded) => {
                    let served = threads::caught("answering", || self.serve(&mut loaded, item));
                    next = served.unwrap_or_else(|failure| {
                        note(&format!("error: {failure}; the model is loaded anew when it is asked for"));
                        self.shared.model.send_replace(ModelState::Failed(id, failure));
                        None
                    });
                }
                Err(failure) => {
                    self.shared.model.send_replace(ModelState::Failed(id, failure.clone()));
                    item.fail(Stopped::Failed(failure));
                }
            }
            if self.shared.is_stopping() {
                break;
            }
        }
        next.into_iter().chain(std::iter::from_fn(|| self.shared.next(|_| true))).for_each(|item| item.fail(Stopped::Stopping));
        self.shared.model.send_replace(ModelState::None);
    }

    fn load(&self, found: &LocalModel) -> Result<Loaded, Failure> {
        self.federation.check_publisher(&self.open.dir, found.publisher)?;
        self.federation.follow(found);
        let options = (self.options.engine)(&found.manifest);
        self.federation.load(&self.open, found, (self.options.memory_max)(), options)
    }

    /// Answers requests to one model, until there is one to another and nothing under way; returns that.
    fn serve(&self, loaded: &mut Loaded, first: Item) -> Option<Item> {
        let found = first.found.clone();
        let text = Arc::clone(&loaded.text);
        let ready = Arc::new(ReadyModel { found: found.clone(), text: Arc::clone(&text), context: loaded.engine.context() });
        self.shared.model.send_replace(ModelState::Ready(Arc::clone(&ready)));
        let mut batch = Batch::new(loaded, &text, &self.shared);
        let mut written = (instant(), vec![0; batch.experts()]);
        let mut next = Some(first);
        loop {
            while let Some(item) = next.take().or_else(|| self.shared.next(|user| batch.admits(user))) {
                let fits = item.found.id == found.id
                    && match &item.task {
                        Task::Answer(job) => batch.fits(&job.request),
                        Task::Load(_) | Task::LoadFirst => true,
                    };
                if !fits && !item.is_abandoned() {
                    next = Some(item);
                    break;
                }
                match item.task {
                    Task::Answer(job) => batch.admit(job),
                    // Whoever asked for the model waits to hear of it.
                    Task::Load(_) | Task::LoadFirst => drop(self.shared.model.send_replace(ModelState::Ready(Arc::clone(&ready)))),
                }
            }
            if self.shared.must_stop() {
                batch.fail_all(&Stopped::Stopping);
            }
            if !batch.is_empty() {
                batch.step();
                // By the clock: under steady load there is no better time.
                self.write_uses(&found, &mut written, false);
                continue;
            }
            let is_over = self.shared.is_stopping() || next.is_some();
            self.write_uses(&found, &mut written, is_over);
            if is_over {
                return next;
            }
            next = self.shared.wait();
        }
    }

    /// Adds the uses that have not been written yet to those in the data directory, now and then and at the end.
    fn write_uses(&self, found: &LocalModel, (at, written): &mut (Instant, Vec<u64>), is_over: bool) {
        if !is_over && instant() - *at < USES_PAUSE {
            return;
        }
        let uses = self.shared.activity.lock().uses.clone();
        let more: Vec<_> = uses.iter().zip(&*written).map(|(now, then)| now - then).collect();
        if more.iter().any(|&uses| uses > 0)
            && let Err(failure) = self.open.dir.add_uses(found, &more)
        {
            note(&format!("warning: {failure}: the uses of experts are not counted"));
        }
        (*at, *written) = (instant(), uses);
    }
}
