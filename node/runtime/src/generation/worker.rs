//! The thread that generates: has the models loaded that are asked for, admits requests to their batches, and lets models go.

use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
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
    shared: Arc<Shared>,
    open: Arc<OpenDataDir>,
    federation: Federation,
    options: GenerationOptions,
    machine: Machine,
    residents: Vec<Resident>,
    loading: Option<Loading>,
}

/// A model that another thread loads, meanwhile.
struct Loading {
    /// What it is loaded for.
    item: Item,
    result: mpsc::Receiver<Result<Loaded, Failure>>,
    thread: JoinHandle<()>,
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
    pub(super) fn new(
        shared: Arc<Shared>,
        open: Arc<OpenDataDir>,
        federation: Federation,
        options: GenerationOptions,
        machine: Machine,
    ) -> Self {
        Self { shared, open, federation, options, machine, residents: Vec::new(), loading: None }
    }

    /// Works until the node is to stop.
    pub(super) fn work(mut self) {
        let mut waiting: Option<Item> = None;
        loop {
            self.bring_in_loaded();
            while let Some(item) = waiting.take().or_else(|| self.shared.next(|user, item| self.admits(user, item))) {
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
            // What waits although nothing is under way waits for a model on its way.
            let is_blocked = waiting.is_some();
            if !is_blocked || self.loading.is_some() {
                self.shared.wait(self.until_idle(), |user, item| !is_blocked && self.admits(user, item));
            }
        }
        if let Some(Loading { item, thread, .. }) = self.loading.take() {
            let _ = thread.join(); // it gives up what it fetches, since the node is to stop
            item.fail(Stopped::Stopping);
        }
        self.residents.clear();
        waiting.into_iter().chain(std::iter::from_fn(|| self.shared.next(|_, _| true))).for_each(|item| item.fail(Stopped::Stopping));
        self.shared.tell_models(Vec::new());
    }

    /// Whether something of a user may be taken up now: nobody has all places, and what is for another model waits while one is loaded.
    fn admits(&self, user: &str, item: &Item) -> bool {
        let is_here = || self.residents.iter().any(|resident| resident.ready.found.id == item.found.id);
        (self.loading.is_none() || is_here())
            && self.residents.iter().map(|resident| resident.batch.active_of(user)).sum::<usize>() < TOGETHER_OF_ONE_MAX
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
        let Some(resident) = self.find(item.found.id) else { return self.begin_to_load(item) };
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

    /// Has the model loaded that is asked for, by another thread; gives the item back where that must wait for something under way.
    fn begin_to_load(&mut self, item: Item) -> Option<Item> {
        if self.loading.is_some() {
            return Some(item);
        }
        let Some(experts) = self.make_room(&item.found) else { return Some(item) };
        // Set here and not by what loads: towers take of it meanwhile.
        self.machine.experts().lock().set_bytes_max(experts);
        self.shared.tell_loading(&item.found);
        let (shared, open, federation, machine) =
            (Arc::clone(&self.shared), Arc::clone(&self.open), self.federation.clone(), self.machine.clone());
        let (options, memory_max, reserved) = ((self.options.engine)(&item.found.manifest), self.options.memory_max, self.reserved());
        let (sender, result) = mpsc::sync_channel(1);
        let found = item.found.clone();
        let load = move || -> Result<Loaded, Failure> {
            federation.check_publisher(&open.dir, found.publisher)?;
            federation.follow(&found);
            federation.load_on(&machine, (&open, &found), memory_max, reserved, options)
        };
        // What loads reads and verifies beside the engine's threads, not on the core of one of them.
        self.machine.rest();
        let thread = threads::watched("loading", move || {
            // A fault of a model's own files ends with this model's requests.
            let _ = sender.send(threads::caught("loading the model", load).and_then(|loaded| loaded));
            shared.has_loaded();
        });
        self.loading = Some(Loading { item, result, thread });
        None
    }

    /// Goes on with what a model was loaded for, once it is here.
    fn bring_in_loaded(&mut self) {
        let Some(result) = self.loading.as_ref().and_then(|loading| loading.result.try_recv().ok()) else { return };
        let Some(Loading { item, .. }) = self.loading.take() else { return };
        let id = item.found.id;
        match result {
            Ok(loaded) => {
                let text = Arc::clone(&loaded.text);
                let (context, results_bytes) = (loaded.engine.context(), loaded.engine.results_bytes());
                let ready = Arc::new(ReadyModel { found: item.found.clone(), text, context, results_bytes });
                let batch = Batch::new(id, loaded, Arc::clone(&self.shared));
                let written = (instant(), vec![Uses::default(); batch.experts()]);
                self.residents.push(Resident { ready: Arc::clone(&ready), batch, used: instant(), leaving: false, written });
                self.give_experts_the_rest();
                self.tell(Some(ready));
                if let Some(item) = self.take_up(item) {
                    item.fail(Stopped::QueueFull); // what a model that has nothing under way cannot take up would wait for ever
                }
            }
            Err(failure) => {
                self.give_experts_the_rest();
                self.shared.tell_failed(id, failure.clone());
                item.fail(Stopped::Failed(failure));
            }
        }
    }

    /// Lets go of what has nothing to do until a model has room, eyes and ears first, then the idlest model. Returns the bytes that are left
    /// for experts, or nothing where the model has to wait for those that are at work.
    fn make_room(&mut self, found: &LocalModel) -> Option<u64> {
        let (options, memory_max) = ((self.options.engine)(&found.manifest), self.options.memory_max);
        // What is too large even alone fails when it is loaded, with the reason; nothing goes for it.
        if plan_memory(&found.manifest, &options, None, 0, memory_max).is_err() {
            return Some(self.experts_bytes_max());
        }
        loop {
            let taken = beside_experts(&self.machine) + self.reserved();
            if let Ok(plan) = plan_memory(&found.manifest, &options, Some(&self.machine), taken, memory_max) {
                return Some(plan.experts);
            }
            let idle = |resident: &Resident| resident.batch.is_empty();
            if self.residents.iter_mut().filter(|resident| idle(resident)).any(|resident| resident.batch.let_go_of_towers()) {
                continue;
            }
            let idlest = (0..self.residents.len()).filter(|&at| idle(&self.residents[at])).min_by_key(|&at| self.residents[at].used);
            let Some(idlest) = idlest else { return self.residents.is_empty().then(|| self.experts_bytes_max()) };
            self.unload(idlest, "to make room");
        }
    }

    fn experts_bytes_max(&self) -> u64 {
        self.machine.experts().lock().bytes_max()
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
        self.give_experts_the_rest();
        // Those that ran for peers are nobody's either: they stay where that goes on.
        if !self.options.executes {
            self.machine.experts().lock().forget_released();
        }
        self.tell(None);
    }

    /// Gives experts the memory that nothing else takes or is promised.
    fn give_experts_the_rest(&self) {
        let rest = self.options.memory_max.saturating_sub(beside_experts(&self.machine) + self.reserved());
        let wanted = self.options.executes || !self.residents.is_empty();
        self.machine.experts().lock().set_bytes_max(if wanted { rest } else { 0 });
    }

    /// Lets go of models that are told to go, and of those that have had nothing to do for as long as models are kept; not while another is
    /// loaded, which has counted on what there is.
    fn let_go_of_idle(&mut self) {
        if self.loading.is_some() {
            return;
        }
        while let Some(at) = self.residents.iter().position(|resident| resident.leaving && resident.batch.is_empty()) {
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
        if self.loading.is_some() {
            return None;
        }
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
