//! Answering requests of several clients at once: a queue in which users take turns, and a thread that owns the engine and decodes what is
//! under way in one batch. No request changes a bit of another's tokens.

mod activity;
mod batch;
mod queue;
mod tally;
mod worker;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use inference::engine::{EngineOptions, LOGITS_TOKENS};
use inference::generate::{GenerateRequest, Step, StopReason};
use protocol::{ModelId, ModelManifest};
use tokio::sync::{mpsc, watch};

use self::activity::Activity;
use self::queue::FairQueue;
use self::tally::Tally;
use crate::clock::instant;
use crate::data_dir::{LocalModel, OpenDataDir};
use crate::failure::Failure;
use crate::federation::Federation;
use crate::prompt::ModelText;
use crate::threads;

/// Requests that are decoded together at most.
pub(crate) const TOGETHER_MAX: usize = LOGITS_TOKENS;
/// Of those, requests of one user, who may not keep all others waiting.
pub(crate) const TOGETHER_OF_ONE_MAX: usize = 12;
/// Requests that wait at most, …
pub(crate) const QUEUE_MAX: usize = 64;
/// … and of one user.
pub(crate) const QUEUE_OF_ONE_MAX: usize = 16;
/// Events of an answer besides its tokens.
const EVENTS_MORE: usize = 16;
/// How long what is under way may go on once the node is to stop.
const STOP_PATIENCE: Duration = Duration::from_secs(8);

/// How engines are made.
pub(crate) struct GenerationOptions {
    /// How one works, by the model.
    pub(crate) engine: Box<dyn Fn(&ModelManifest) -> EngineOptions + Send>,
    /// Most memory that it may take, in bytes; asked each time that a model is loaded.
    pub(crate) memory_max: Box<dyn Fn() -> u64 + Send>,
}

/// A handle on the thread that generates.
#[derive(Clone)]
pub(crate) struct Generation {
    shared: Arc<Shared>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

/// What the handle and the thread share.
struct Shared {
    state: Mutex<State>,
    news: Condvar,
    model: watch::Sender<ModelState>,
    activity: Activity,
}

struct State {
    queue: FairQueue<Item>,
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
}

/// A request on its way.
struct Job {
    user: String,
    request: GenerateRequest,
    events: mpsc::Sender<Event>,
    asked: Instant,
}

/// What becomes of a request.
#[derive(Debug)]
pub(crate) enum Event {
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
pub(crate) struct Done {
    pub(crate) reason: StopReason,
    pub(crate) experts: Tally,
    pub(crate) bytes_fetched: u64,
    /// Tokens of the prompt that need not be taken in, since the node had the same beginning already.
    pub(crate) cached: usize,
    pub(crate) queued: Duration,
    pub(crate) prefill: Duration,
    pub(crate) decode: Duration,
}

/// The model that is loaded.
#[derive(Clone, Debug)]
pub(crate) enum ModelState {
    None,
    Loading(LocalModel),
    Ready(Arc<ReadyModel>),
    Failed(ModelId, Failure),
}

/// A model that answers.
#[derive(Debug)]
pub(crate) struct ReadyModel {
    pub(crate) found: LocalModel,
    pub(crate) text: Arc<ModelText>,
    /// Longest sequence, in tokens.
    pub(crate) context: usize,
}

/// Why a request is not answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Stopped {
    QueueFull,
    /// The model is being loaded.
    Loading,
    /// The node is about to end.
    Stopping,
    Failed(Failure),
}

impl Generation {
    /// Starts the thread. The model of `first`, if there is one, is loaded at once.
    pub(crate) fn start(open: Arc<OpenDataDir>, federation: Federation, options: GenerationOptions, first: Option<LocalModel>) -> Self {
        let mut queue = FairQueue::new(QUEUE_MAX, QUEUE_OF_ONE_MAX);
        let state = first.clone().map_or(ModelState::None, ModelState::Loading);
        if let Some(found) = first {
            assert!(queue.push("", Item { found, task: Task::LoadFirst }).is_ok(), "an empty queue has room");
        }
        let (loading, waiting) = watch::channel(());
        let federation = federation.for_client(waiting);
        let shared = Arc::new(Shared {
            state: Mutex::new(State { queue, stopping: None, loading: Some(loading) }),
            news: Condvar::new(),
            model: watch::Sender::new(state),
            activity: Activity::default(),
        });
        let worker = worker::Worker { shared: Arc::clone(&shared), open, federation, options };
        let thread = threads::watched("generation", move || worker.work());
        Self { shared, thread: Arc::new(Mutex::new(Some(thread))) }
    }

    /// The model that is loaded or about to be.
    pub(crate) fn model(&self) -> ModelState {
        self.shared.model.borrow().clone()
    }

    pub(crate) fn activity(&self) -> &Activity {
        &self.shared.activity
    }

    pub(crate) fn waiting(&self) -> usize {
        let mut state = self.shared.lock();
        self.shared.let_go(&mut state);
        state.queue.len()
    }

    /// Has a model loaded, if it is not; waits for that as long as `patience`.
    pub(crate) async fn ready(&self, found: &LocalModel, user: &str, patience: Duration) -> Result<Arc<ReadyModel>, Stopped> {
        let mut states = self.shared.model.subscribe();
        if let ModelState::Ready(model) = &*states.borrow()
            && model.found.id == found.id
        {
            return Ok(Arc::clone(model));
        }
        let waits = Arc::new(());
        self.push(user, Item { found: found.clone(), task: Task::Load(Arc::downgrade(&waits)) })?;
        let loaded = async {
            while states.changed().await.is_ok() {
                match &*states.borrow_and_update() {
                    ModelState::Ready(model) if model.found.id == found.id => return Ok(Arc::clone(model)),
                    ModelState::Failed(id, failure) if *id == found.id => return Err(Stopped::Failed(failure.clone())),
                    _ => {}
                }
            }
            Err(Stopped::Stopping)
        };
        let ready = tokio::time::timeout(patience, loaded).await.unwrap_or(Err(Stopped::Loading));
        drop(waits);
        ready
    }

    /// Puts a request into the queue. It is given up when nobody holds the receiver any more.
    pub(crate) fn ask(&self, model: &ReadyModel, user: &str, request: GenerateRequest) -> Result<mpsc::Receiver<Event>, Stopped> {
        // Room for the whole answer: whoever reads slowly does not hold up the others.
        let (events, receiver) = mpsc::channel(request.tokens_max.saturating_add(EVENTS_MORE));
        let job = Job { user: user.to_owned(), request, events, asked: instant() };
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
    pub(crate) async fn stop(&self) {
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

    /// What is next of the users whom `may` lets, if anything is.
    fn next(&self, may: impl Fn(&str) -> bool) -> Option<Item> {
        self.lock().queue.pop(may)
    }

    /// Waits for what is next; returns nothing once the node is to stop.
    fn wait(&self) -> Option<Item> {
        let mut state = self.lock();
        loop {
            if state.stopping.is_some() {
                return None;
            }
            if let Some(item) = state.queue.pop(|_| true) {
                return Some(item);
            }
            state = self.news.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
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
            Task::LoadFirst => false,
        }
    }

    fn fail(self, why: Stopped) {
        if let Task::Answer(job) = self.task {
            let _ = job.events.try_send(Event::Failed(why));
        }
    }
}
