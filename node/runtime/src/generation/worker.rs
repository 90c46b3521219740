//! The thread that generates: loads the models that are asked for, admits requests to their batches, and lets models go.

use std::sync::Arc;
use std::time::{Duration, Instant};

use base::clock::instant;
use base::failure::Failure;
use base::output::note;
use base::threads;
use inference::machine::Machine;
use inference::memory::plan_memory;
use protocol::ModelId;

use super::batch::Batch;
use super::{GenerationOptions, Item, ReadyModel, Shared, Stopped, TOGETHER_OF_ONE_MAX, Task};
use crate::data_dir::{LocalModel, OpenDataDir};
use crate::federation::Federation;
use crate::loading::{Loaded, beside_experts};
use crate::usage::Uses;

/// How often uses of experts are written down.
const USES_PAUSE: Duration = Duration::from_secs(30);

pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) open: Arc<OpenDataDir>,
    pub(super) federation: Federation,
    pub(super) options: GenerationOptions,
    pub(super) machine: Machine,
    pub(super) residents: Vec<Resident>,
}

/// A model in memory.
pub(super) struct Resident {
    ready: Arc<ReadyModel>,
    batch: Batch,
    /// When it last had something to do.
    used: Instant,
    /// Whether it is to go once what is under way has ended.
    leaving: bool,
    /// When uses were last written down, and how many by expert.
    written: (Instant, Vec<Uses>),
}

impl Worker {
    /// Works until the node is to stop.
    pub(super) fn work(mut self) {
        let mut waiting: Option<Item> = None;
        loop {
            while let Some(item) = waiting.take().or_else(|| self.shared.next(|user| self.admits(user))) {
                waiting = self.take_up(item);
                if waiting.is_some() {
                    break;
                }
            }
            if self.shared.must_stop() {
                self.residents.iter_mut().for_each(|resident| resident.batch.fail_all(&Stopped::Stopping));
            }
            if self.is_busy() {
                self.step();
                continue;
            }
            let is_over = self.shared.is_stopping();
            self.write_uses(true);
            if is_over {
                break;
            }
            self.let_go_of_idle();
            if waiting.is_none() {
                waiting = self.shared.wait(self.until_idle());
            }
        }
        self.residents.clear();
        waiting.into_iter().chain(std::iter::from_fn(|| self.shared.next(|_| true))).for_each(|item| item.fail(Stopped::Stopping));
        self.shared.tell_models(Vec::new());
    }

    /// Whether a user may have another request taken up now.
    fn admits(&self, user: &str) -> bool {
        self.residents.iter().map(|resident| resident.batch.active_of(user)).sum::<usize>() < TOGETHER_OF_ONE_MAX
    }

    fn is_busy(&self) -> bool {
        self.residents.iter().any(|resident| !resident.batch.is_empty())
    }

    fn find(&mut self, id: ModelId) -> Option<&mut Resident> {
        self.residents.iter_mut().find(|resident| resident.ready.found.id == id)
    }

    /// Takes up what is to be done, or gives it back where it has to wait for something under way.
    fn take_up(&mut self, item: Item) -> Option<Item> {
        if item.is_abandoned() {
            self.shared.activity.lock().abandoned += u64::from(matches!(item.task, Task::Answer(_)));
            return None;
        }
        if matches!(item.task, Task::Unload) {
            if let Some(resident) = self.find(item.found.id) {
                resident.leaving = true;
            }
            return None;
        }
        let Some(resident) = self.find(item.found.id) else {
            // While it is loaded, nothing else goes on.
            if self.is_busy() {
                return Some(item);
            }
            return self.bring_in(item);
        };
        if resident.leaving {
            return Some(item);
        }
        resident.used = instant();
        match item.task {
            Task::Answer(job) if resident.batch.fits(&job.request) => resident.batch.admit(job),
            Task::Answer(job) => return Some(Item { found: item.found, task: Task::Answer(job) }),
            // Whoever asked for the model waits to hear of it.
            Task::Load(_) | Task::LoadFirst | Task::Unload => {
                let ready = Arc::clone(&resident.ready);
                self.tell(Some(ready));
            }
        }
        None
    }

    /// Loads the model that is asked for, and goes on with what is to be done with it.
    fn bring_in(&mut self, item: Item) -> Option<Item> {
        let id = item.found.id;
        self.shared.tell_loading(&item.found);
        // A fault of a model's own files ends with this model's requests; the thread answers for others.
        match threads::caught("loading the model", || self.load(&item.found)).and_then(|loaded| loaded) {
            Ok(loaded) => {
                let text = Arc::clone(&loaded.text);
                let (context, work_bytes) = (loaded.engine.context(), loaded.engine.work_bytes());
                let ready = Arc::new(ReadyModel { found: item.found.clone(), text, context, work_bytes });
                let batch = Batch::new(id, loaded, Arc::clone(&self.shared));
                let written = (instant(), vec![Uses::default(); batch.experts()]);
                self.residents.push(Resident { ready: Arc::clone(&ready), batch, used: instant(), leaving: false, written });
                self.tell(Some(ready));
                self.take_up(item)
            }
            Err(failure) => {
                self.shared.tell_failed(id, failure.clone());
                item.fail(Stopped::Failed(failure));
                None
            }
        }
    }

    fn load(&mut self, found: &LocalModel) -> Result<Loaded, Failure> {
        self.federation.check_publisher(&self.open.dir, found.publisher)?;
        self.federation.follow(found);
        let (options, memory_max) = ((self.options.engine)(&found.manifest), self.options.memory_max);
        // Eyes and ears are let go first, then the idlest model. A model that is too large even alone fails below, with the reason.
        while plan_memory(&found.manifest, &options, beside_experts(&self.machine) + self.reserved(), memory_max).is_err() {
            if self.residents.iter_mut().any(|resident| resident.batch.let_go_of_towers()) {
                continue;
            }
            let Some(idlest) = (0..self.residents.len()).min_by_key(|&at| self.residents[at].used) else { break };
            self.unload(idlest, "to make room");
        }
        let reserved = self.reserved();
        self.federation.load_on(&self.machine, (&self.open, found), memory_max, reserved, options)
    }

    /// Bytes of keys and values that are promised to the models that are here, and not taken yet.
    fn reserved(&self) -> u64 {
        self.residents.iter().map(|resident| resident.batch.reserved()).sum()
    }

    /// Lets a model go that has nothing under way; experts may have its memory.
    fn unload(&mut self, at: usize, why: &str) {
        let mut resident = self.residents.remove(at);
        resident.write_uses(&self.shared, &self.open, true);
        note(&format!("{} is unloaded {why}", resident.ready.found.name));
        drop(resident);
        let experts = self.options.memory_max.saturating_sub(beside_experts(&self.machine) + self.reserved());
        let wanted = self.options.executes || !self.residents.is_empty();
        let mut memory = self.machine.experts().lock();
        memory.set_bytes_max(if wanted { experts } else { 0 });
        // Those that ran for peers are nobody's either: they stay where that goes on.
        if !self.options.executes {
            memory.forget_released();
        }
        drop(memory);
        self.tell(None);
    }

    /// Lets go of models that are told to go, and of those that have had nothing to do for as long as models are kept.
    fn let_go_of_idle(&mut self) {
        while let Some(at) = self.residents.iter().position(|resident| resident.leaving) {
            self.unload(at, "as it was told to be");
        }
        self.residents.iter_mut().for_each(|resident| resident.batch.let_go_of_idle_towers());
        let Some(keep) = self.options.keep_alive else { return };
        while let Some(at) = self.residents.iter().position(|resident| instant() - resident.used >= keep) {
            self.unload(at, "after it has been idle");
        }
    }

    /// How long until the first of the models, or of their towers, has been idle for long enough to go.
    fn until_idle(&self) -> Option<Duration> {
        let models = self.residents.iter().filter_map(|resident| Some(self.options.keep_alive?.saturating_sub(instant() - resident.used)));
        models.chain(self.residents.iter().filter_map(|resident| resident.batch.until_towers_idle())).min()
    }

    /// Goes on with everything that is under way, model after model.
    fn step(&mut self) {
        let mut at = 0;
        while let Some(resident) = self.residents.get_mut(at) {
            if !resident.batch.is_empty() {
                resident.used = instant();
                resident.batch.let_go_of_idle_towers();
                // A fault of a pass ends with this model's requests; the thread answers for others.
                if let Err(failure) = threads::caught("answering", || resident.batch.step()) {
                    note(&format!("error: {failure}; the model is loaded anew when it is asked for"));
                    let broken = self.residents.remove(at);
                    self.shared.tell_failed(broken.ready.found.id, failure);
                    drop(broken);
                    self.tell(None);
                    continue;
                }
            }
            at += 1;
        }
        // By the clock: under steady load there is no better time.
        self.write_uses(false);
        if self.residents.iter().any(|resident| resident.leaving && resident.batch.is_empty()) {
            self.let_go_of_idle();
        }
    }

    /// Tells which models are here; `current` is the one that was asked for last.
    fn tell(&self, current: Option<Arc<ReadyModel>>) {
        let models: Vec<_> = self.residents.iter().map(|resident| Arc::clone(&resident.ready)).collect();
        match current {
            Some(current) => self.shared.tell_ready(models, current),
            None => self.shared.tell_models(models),
        }
    }

    fn write_uses(&mut self, is_over: bool) {
        self.residents.iter_mut().for_each(|resident| resident.write_uses(&self.shared, &self.open, is_over));
    }
}

impl Resident {
    /// Adds the uses that have not been written yet to those in the data directory, now and then and at the end.
    fn write_uses(&mut self, shared: &Shared, open: &OpenDataDir, is_over: bool) {
        let (at, written) = &mut self.written;
        if !is_over && instant() - *at < USES_PAUSE {
            return;
        }
        let uses = shared.activity.lock().model(self.ready.found.id).uses.clone();
        let since = |(now, then): (&Uses, &Uses)| std::array::from_fn(|modality| now[modality] - then[modality]);
        let more: Vec<Uses> = uses.iter().zip(&*written).map(since).collect();
        if more.iter().flatten().any(|&uses| uses > 0)
            && let Err(failure) = open.dir.add_uses(&self.ready.found, &more)
        {
            note(&format!("warning: {failure}: the uses of experts are not counted"));
        }
        (*at, *written) = (instant(), uses);
    }
}
