//! Answering requests of several clients at once: a queue in which users take turns, and a thread that owns the engines and decodes what is
//! under way in one batch a model. No request changes a bit of another's tokens.

mod activity;
mod batch;
mod queue;
mod tally;
mod worker;

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use base::clock::instant;
use base::failure::Failure;
use base::threads;
use inference::engine::{EngineOptions, LOGITS_TOKENS};
use inference::generate::{GenerateRequest, Step, StopReason};
use inference::machine::Machine;
use protocol::{ModelId, ModelManifest};
use tokio::sync::{mpsc, watch};

use self::activity::Activity;
use self::queue::FairQueue;
use self::tally::ExpertTally;
pub use self::tally::by_modality_json;
use crate::data_dir::{LocalModel, OpenDataDir};
use crate::federation::Federation;
use crate::prompt::ModelText;

/// Requests that are decoded together at most.
pub const TOGETHER_MAX: usize = LOGITS_TOKENS;
/// Of those, requests of one user, who may not keep all others waiting.
pub(crate) const TOGETHER_OF_ONE_MAX: usize = 12;
/// Requests that wait at most, …
pub const QUEUE_MAX: usize = 64;
/// … and of one user.
pub(crate) const QUEUE_OF_ONE_MAX: usize = 16;
/// Events of an answer besides its tokens.
const EVENTS_MORE: usize = 16;
/// How long what is under way may go on once the node is to stop.
const STOP_PATIENCE: Duration = Duration::from_secs(8);

/// How engines are made.
pub struct GenerationOptions {
    /// How one works, by the model.
    pub engine: Box<dyn Fn(&ModelManifest) -> EngineOptions + Send>,
    /// Most memory that all of them may take, with everything else in this process, in bytes.
    pub memory_max: u64,
    /// How long a model that has nothing to do stays in memory; for ever, if memory suffices, where nothing is said.
    pub keep_alive: Option<Duration>,
    /// Whether experts run for peers, too, and stay in memory for that when no model is here.
    pub executes: bool,
}

/// A handle on the thread that generates.
#[derive(Clone)]
pub struct Generation {
    shared: Arc<Shared>,
    machine: Machine,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

/// What the handle and the thread share.
struct Shared {
    state: Mutex<State>,
    news: Condvar,
    models: watch::Sender<Models>,
    activity: Activity,
}

struct State {
    queue: FairQueue<Item>,
    /// Whether a model has just been loaded, or could not be.
    loaded: bool,
    /// When the node was told to stop.
    stopping: Option<Instant>,
    /// Gone when it was: then nobody waits for a model to be loaded any more.
    loading: Option<watch::Sender<()>>,
}

/// Something to do for a model.
struct Item {
    found: LocalModel,
    task: Task,
}

/// What is to be done.
enum Task {
    /// A request to answer.
    Answer(Job),
    /// The model is to be loaded, as long as somebody waits for that.
    Load(Weak<()>),
    /// The model is to be loaded, whether or not somebody waits.
    LoadFirst,
    /// The model is to go once what is under way has ended.
    Unload,
}

/// A request on its way.
struct Job {
    user: String,
    request: GenerateRequest,
    events: mpsc::Sender<AnswerEvent>,
    queued_at: Instant,
}

/// What becomes of a request.
#[derive(Debug)]
pub enum AnswerEvent {
    /// The answer has come so far.
    Step(Step),
    /// A peer's result was wrong: the answer is made again from its beginning.
    Again,
    /// It is complete.
    Done(Box<Done>),
    /// It ends here.
    Failed(Stopped),
}

/// A complete answer, in figures.
#[derive(Debug)]
pub struct Done {
    pub reason: StopReason,
    pub experts: ExpertTally,
    pub bytes_fetched: u64,
    /// Tokens of the prompt that need not be taken in, since the node had the same beginning already.
    pub cached: usize,
    pub queued: Duration,
    pub prefill: Duration,
    pub decode: Duration,
}

/// The models that are in memory.
#[derive(Clone, Debug)]
pub struct Models {
    /// The one that was asked for last.
    pub current: ModelState,
    /// All that are ready.
    pub ready: Vec<Arc<ReadyModel>>,
    /// Those that could not be loaded when they were last asked for.
    failed: HashMap<ModelId, Failure>,
}

/// How far a model is.
#[derive(Clone, Debug)]
pub enum ModelState {
    None,
    Loading(LocalModel),
    Ready(Arc<ReadyModel>),
    Failed,
}

/// A model that answers.
#[derive(Debug)]
pub struct ReadyModel {
    pub found: LocalModel,
    pub text: Arc<ModelText>,
    /// Longest sequence, in tokens.
    pub context: usize,
    /// Bytes of what its passes leave behind.
    pub results_bytes: u64,
}

/// Why a request is not answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stopped {
    QueueFull,
    /// The model is being loaded.
    Loading,
    /// The node is about to end.
    Stopping,
    Failed(Failure),
}

impl Generation {
    /// Starts the thread. The model of `first`, if there is one, is loaded at once.
    pub fn start(
        open: Arc<OpenDataDir>,
        federation: Federation,
        machine: Machine,
        options: GenerationOptions,
        first: Option<LocalModel>,
    ) -> Self {
        let mut queue = FairQueue::new(QUEUE_MAX, QUEUE_OF_ONE_MAX);
        let state = first.clone().map_or(ModelState::None, ModelState::Loading);
        if let Some(found) = first {
            assert!(queue.push("", Item { found, task: Task::LoadFirst }).is_ok(), "an empty queue has room");
        }
        let (loading, waiting) = watch::channel(());
        let federation = federation.for_client(waiting);
        let shared = Arc::new(Shared {
            state: Mutex::new(State { queue, loaded: false, stopping: None, loading: Some(loading) }),
            news: Condvar::new(),
            models: watch::Sender::new(Models { current: state, ready: Vec::new(), failed: HashMap::new() }),
            activity: Activity::default(),
        });
        let worker = worker::Worker::new(Arc::clone(&shared), open, federation, options, machine.clone());
        let thread = threads::watched("generation", move || worker.work());
        Self { shared, machine, thread: Arc::new(Mutex::new(Some(thread))) }
    }

    /// The model that was asked for last: it is loaded or about to be.
    pub fn model(&self) -> ModelState {
        self.shared.models.borrow().current.clone()
    }

    /// What they run on.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// All models that are loaded.
    pub fn models(&self) -> Vec<Arc<ReadyModel>> {
        self.shared.models.borrow().ready.clone()
    }

    /// Lets a model go once what is under way with it has ended.
    pub fn unload(&self, found: &LocalModel, user: &str) -> Result<(), Stopped> {
        self.push(user, Item { found: found.clone(), task: Task::Unload })
    }

    pub fn activity(&self) -> &Activity {
        &self.shared.activity
    }

    pub fn waiting(&self) -> usize {
        let mut state = self.shared.lock();
        self.shared.let_go(&mut state);
        state.queue.len()
    }

    /// Has a model loaded, if it is not; waits for that as long as `patience`.
    pub async fn ready(&self, found: &LocalModel, user: &str, patience: Duration) -> Result<Arc<ReadyModel>, Stopped> {
        let mut states = self.shared.models.subscribe();
        let is_it = |model: &&Arc<ReadyModel>| model.found.id == found.id;
        if let Some(model) = states.borrow().ready.iter().find(is_it) {
            return Ok(Arc::clone(model));
        }
        let waits = Arc::new(());
        self.push(user, Item { found: found.clone(), task: Task::Load(Arc::downgrade(&waits)) })?;
        let loaded = async {
            while states.changed().await.is_ok() {
                let models = states.borrow_and_update();
                if let Some(model) = models.ready.iter().find(is_it) {
                    return Ok(Arc::clone(model));
                }
                if let Some(failure) = models.failed.get(&found.id) {
                    return Err(Stopped::Failed(failure.clone()));
                }
            }
            Err(Stopped::Stopping)
        };
        let ready = tokio::time::timeout(patience, loaded).await.unwrap_or(Err(Stopped::Loading));
        drop(waits);
        ready
    }

    /// Puts a request into the queue. It is given up when nobody holds the receiver any more.
    pub fn ask(&self, model: &ReadyModel, user: &str, request: GenerateRequest) -> Result<mpsc::Receiver<AnswerEvent>, Stopped> {
        // Room for the whole answer: whoever reads slowly does not hold up the others.
        let (events, receiver) = mpsc::channel(request.tokens_max.saturating_add(EVENTS_MORE));
        let job = Job { user: user.to_owned(), request, events, queued_at: instant() };
        self.push(user, Item { found: model.found.clone(), task: Task::Answer(job) })?;
        Ok(receiver)
    }

    fn push(&self, user: &str, item: Item) -> Result<(), Stopped> {
        let mut state = self.shared.lock();
        if state.stopping.is_some() {
            return Err(Stopped::Stopping);
        }
        let refused = state.queue.push(user, item);
        if let Err(item) = refused {
            // Whichever limit it was: those who have gone make room.
            self.shared.let_go(&mut state);
            state.queue.push(user, item).map_err(|_| Stopped::QueueFull)?;
        }
        self.shared.news.notify_one();
        Ok(())
    }

    /// Answers no more requests; returns when those under way are answered, or have failed since they took too long.
    pub async fn stop(&self) {
        {
            let mut state = self.shared.lock();
            state.stopping.get_or_insert_with(instant);
            state.loading = None;
        }
        self.shared.news.notify_one();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = tokio::task::spawn_blocking(move || thread.join()).await;
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets go of what waits for nobody.
    fn let_go(&self, state: &mut State) {
        let before = state.queue.len();
        state.queue.retain(|item| !item.is_abandoned());
        self.activity.lock().abandoned += (before - state.queue.len()) as u64;
    }

    /// What is next of all that `may` be taken up, if anything is.
    fn next(&self, may: impl Fn(&str, &Item) -> bool) -> Option<Item> {
        self.lock().queue.pop(may)
    }

    /// Waits until something `may` be taken up, a model has been loaded or the node is to stop, so long at most.
    fn wait(&self, most: Option<Duration>, may: impl Fn(&str, &Item) -> bool) {
        let idle = |state: &mut State| state.stopping.is_none() && !state.loaded && !state.queue.has(&may);
        let state = self.lock();
        let mut state = match most {
            Some(most) => self.news.wait_timeout_while(state, most, idle).unwrap_or_else(PoisonError::into_inner).0,
            None => self.news.wait_while(state, idle).unwrap_or_else(PoisonError::into_inner),
        };
        state.loaded = false;
    }

    /// Whoever loads a model is done.
    fn has_loaded(&self) {
        self.lock().loaded = true;
        self.news.notify_one();
    }

    /// A model is being loaded.
    fn tell_loading(&self, found: &LocalModel) {
        self.models.send_modify(|models| {
            models.failed.remove(&found.id);
            models.current = ModelState::Loading(found.clone());
        });
    }

    /// A model could not be loaded, or broke down.
    fn tell_failed(&self, id: ModelId, failure: Failure) {
        self.models.send_modify(|models| {
            models.failed.insert(id, failure);
            models.current = models.ready.last().map_or(ModelState::Failed, |model| ModelState::Ready(Arc::clone(model)));
        });
    }

    /// A model is ready; `ready` are all that are.
    fn tell_ready(&self, ready: Vec<Arc<ReadyModel>>, current: Arc<ReadyModel>) {
        self.models.send_modify(|models| {
            models.current = ModelState::Ready(current);
            models.ready = ready;
        });
    }

    /// Others are ready than before.
    fn tell_models(&self, ready: Vec<Arc<ReadyModel>>) {
        self.models.send_modify(|models| {
            if let ModelState::Ready(current) = &models.current
                && !ready.iter().any(|model| Arc::ptr_eq(model, current))
            {
                models.current = ready.last().map_or(ModelState::None, |model| ModelState::Ready(Arc::clone(model)));
            }
            models.ready = ready;
        });
    }

    fn is_stopping(&self) -> bool {
        self.lock().stopping.is_some()
    }

    /// Whether what is under way has had its time since the node was to stop.
    fn must_stop(&self) -> bool {
        self.lock().stopping.is_some_and(|since| instant() - since > STOP_PATIENCE)
    }
}

impl Item {
    /// Whether nobody waits for it any more.
    fn is_abandoned(&self) -> bool {
        match &self.task {
            Task::Answer(job) => job.events.is_closed(),
            Task::Load(waits) => waits.strong_count() == 0,
            Task::LoadFirst | Task::Unload => false,
        }
    }

    fn fail(self, why: Stopped) {
        if let Task::Answer(job) = self.task {
            let _ = job.events.try_send(AnswerEvent::Failed(why));
        }
    }
}
