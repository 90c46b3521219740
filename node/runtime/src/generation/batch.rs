//! The requests that are answered together, pass by pass: first a piece of one's prompt, then the next token of each.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use base::clock::instant;
use base::failure::{Failure, Kind};
use inference::activation_log::ActivationLog;
use inference::engine::Engine;
use inference::generate::{Answer, GenerateError, GenerateRequest, Sequence, StopReason, decode};
use inference::media::prompt::MediaPrompt;
use inference::session::Session;
use net::PeerId;
use protocol::ModelId;

use super::tally::{ExpertTally, rows};
use super::{AnswerEvent, Done, Job, Shared, Stopped, TOGETHER_MAX};
use crate::loading::Loaded;
use crate::places::ExpertIndex;
use crate::prompt::ModelText;

/// How long a piece of a prompt should take: others wait for it, and so does the news that a client has gone.
const PIECE_TIME: Duration = Duration::from_millis(100);
/// Tokens of the first piece, and of the smallest.
const PIECE_TOKENS: usize = 32;
const PIECE_TOKENS_MIN: usize = 8;
/// A conversation is gone on with when at least so many tokens are the same.
const SAME_TOKENS_MIN: usize = 16;
/// How often the map of what is in memory is brought up to date.
const MAP_PAUSE: Duration = Duration::from_millis(250);

/// Requests under way with one model.
pub(super) struct Batch {
    model: ModelId,
    loaded: Loaded,
    text: Arc<ModelText>,
    shared: Arc<Shared>,
    places: ExpertIndex,
    active: Vec<Active>,
    /// Sequences whose answers are complete, the oldest first: the next request often goes on from there.
    kept: VecDeque<Kept>,
    /// Bytes of keys and values that there may be.
    room: u64,
    /// Tokens of a prompt that a pass takes in.
    piece: usize,
    /// Whose turn it is to have a piece taken in.
    turn: usize,
    /// Peers of whom results were wrong.
    wrong: usize,
    helpers: BTreeMap<PeerId, u64>,
    mapped: Option<Instant>,
}

/// A request under way.
struct Active {
    job: Job,
    sequence: Sequence,
    /// Bytes that are set aside for it.
    bytes: u64,
    tally: ExpertTally,
    cached: usize,
    admitted: Instant,
    prefilled: Option<Instant>,
    state: Course,
}

/// How far a request is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Course {
    GoesOn,
    Ended(StopReason),
    Failed,
}

struct Kept {
    /// Whose it is: how fast an answer begins must not tell what others have asked.
    user: String,
    session: Session,
    tokens: Vec<u32>,
    media: Option<Arc<MediaPrompt>>,
}

impl Batch {
    pub(super) fn new(model: ModelId, mut loaded: Loaded, shared: Arc<Shared>) -> Self {
        let text = Arc::clone(&loaded.text);
        let engine = &mut loaded.engine;
        let decoder = engine.model().decoder();
        let places = ExpertIndex::of(decoder);
        let rows = engine.options().batch_tokens.max(TOGETHER_MAX);
        engine.log = Some(ActivationLog::new(rows * decoder.layers() as usize));
        shared.activity.lock().begin_model(model, places.count());
        let room = engine.session_bytes(engine.options().kv_tokens.max(engine.context()));
        let piece = PIECE_TOKENS.min(engine.options().batch_tokens);
        let wrong = loaded.shared_report().lock().wrong_peers();
        let helpers = loaded.helpers();
        Self {
            model,
            loaded,
            text,
            shared,
            places,
            active: Vec::new(),
            kept: VecDeque::new(),
            room,
            piece,
            turn: 0,
            wrong,
            helpers,
            mapped: None,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.active.is_empty()
    }

    /// Experts of the model.
    pub(super) fn experts(&self) -> usize {
        self.places.count()
    }

    /// Requests of a user that are under way.
    pub(super) fn active_of(&self, user: &str) -> usize {
        self.active.iter().filter(|active| active.job.user == user).count()
    }

    /// Bytes of keys and values that may still be taken.
    pub(super) fn reserved(&self) -> u64 {
        self.room.saturating_sub(self.sessions().map(Session::bytes).sum())
    }

    /// Lets go of eyes and ears that no prompt has needed for a while.
    pub(super) fn let_go_of_idle_towers(&mut self) {
        self.loaded.towers.let_go_of_idle(&self.loaded.engine);
    }

    /// Lets go of eyes and ears. Says whether there were any.
    pub(super) fn let_go_of_towers(&mut self) -> bool {
        self.loaded.towers.let_go(&self.loaded.engine)
    }

    /// How long until eyes or ears are let go.
    pub(super) fn until_towers_idle(&self) -> Option<Duration> {
        self.loaded.towers.until_idle()
    }

    fn sessions(&self) -> impl Iterator<Item = &Session> {
        self.active.iter().map(|active| &active.sequence.session).chain(self.kept.iter().map(|kept| &kept.session))
    }

    /// Whether a request can be taken up now.
    pub(super) fn fits(&self, request: &GenerateRequest) -> bool {
        let most = TOGETHER_MAX.min(self.loaded.engine.options().batch_tokens);
        self.active.len() < most && self.taken() + self.bytes_of(request) <= self.room
    }

    /// Bytes that are set aside for what is under way.
    fn taken(&self) -> u64 {
        self.active.iter().map(|active| active.bytes).sum()
    }

    fn bytes_of(&self, request: &GenerateRequest) -> u64 {
        let engine = &self.loaded.engine;
        engine.session_bytes(request.prompt.len().saturating_add(request.tokens_max).min(engine.context()))
    }

    /// Takes up a request that fits.
    pub(super) fn admit(&mut self, job: Job) {
        if job.events.is_closed() {
            self.shared.activity.lock().abandoned += 1;
            return;
        }
        let bytes = self.bytes_of(&job.request);
        let (session, cached) = self.begin(&job);
        let taken = self.taken();
        while taken + bytes + self.kept.iter().map(|kept| kept.session.bytes()).sum::<u64>() > self.room && self.kept.pop_front().is_some()
        {
        }
        let sequence = Sequence::new(session, Answer::new(job.request.clone(), self.text.tokenizer.as_ref()));
        self.shared.activity.lock().prompt_tokens += (job.request.prompt.len() - cached) as u64;
        self.active.push(Active {
            sequence,
            bytes,
            tally: ExpertTally::new(self.places.count()),
            cached,
            admitted: instant(),
            prefilled: None,
            state: Course::GoesOn,
            job,
        });
        self.count_active();
    }

    /// A sequence with as much of the prompt in it as one that was kept for the user has.
    fn begin(&mut self, job: &Job) -> (Session, usize) {
        // The last token of a prompt is always taken in: the answer's first token follows from it.
        let same = |kept: &Kept| if kept.user == job.user { same_tokens(kept, &job.request) } else { 0 };
        let best = (0..self.kept.len()).max_by_key(|&at| same(&self.kept[at]));
        if let Some(at) = best.filter(|&at| same(&self.kept[at]) >= SAME_TOKENS_MIN) {
            let mut kept = self.kept.remove(at).expect("it is there");
            let same = same(&kept);
            kept.session.rewind(same);
            return (kept.session, same);
        }
        (self.loaded.engine.session(), 0)
    }

    /// Ends everything that is under way.
    pub(super) fn fail_all(&mut self, why: &Stopped) {
        for active in self.active.drain(..) {
            let _ = active.job.events.try_send(AnswerEvent::Failed(why.clone()));
            self.shared.activity.lock().failed += 1;
        }
        self.count_active();
    }

    /// Goes on with everything by one step.
    pub(super) fn step(&mut self) {
        self.let_go();
        self.begin_again_if_wrong();
        self.take_in_piece();
        self.decode();
        self.update_map(); // before who asked is told that the answer is complete, and looks at it
        self.settle();
        if self.active.is_empty() {
            self.work_for(&[]); // senders that are held for nobody keep streams from ending
        }
    }

    /// Gives up requests whose clients have gone.
    fn let_go(&mut self) {
        let before = self.active.len();
        self.active.retain(|active| !active.job.events.is_closed());
        self.shared.activity.lock().abandoned += (before - self.active.len()) as u64;
        self.count_active();
    }

    /// When a peer's result has turned out wrong, nothing that is under way can be relied on.
    fn begin_again_if_wrong(&mut self) {
        let wrong = self.loaded.shared_report().lock().wrong_peers();
        if wrong == std::mem::replace(&mut self.wrong, wrong) {
            return;
        }
        self.kept.clear();
        for active in &mut self.active {
            active.sequence.begin_again(Answer::new(active.job.request.clone(), self.text.tokenizer.as_ref()));
            (active.prefilled, active.cached) = (None, 0);
            let _ = active.job.events.try_send(AnswerEvent::Again);
        }
    }

    /// Takes in a piece of a prompt. Requests take turns.
    fn take_in_piece(&mut self) {
        let waiting: Vec<_> = (0..self.active.len()).filter(|&at| self.active[at].wants_prompt()).collect();
        if waiting.is_empty() {
            return;
        }
        self.turn = self.turn.wrapping_add(1);
        let at = waiting[self.turn % waiting.len()];
        self.work_for(&[at]);
        let began = instant();
        let result = self.active[at].sequence.take_in(&mut self.loaded.engine, &mut self.loaded.towers, self.piece);
        let active = &mut self.active[at];
        match result {
            Err(error) => {
                active.fail(error);
                return self.forget_uses();
            }
            // What towers took says nothing of the next piece.
            Ok(_) if active.job.request.media.is_some() => {}
            Ok(rows) => self.learn_pace(rows, instant() - began),
        }
        let active = &mut self.active[at];
        if !active.sequence.wants_prompt() {
            active.prefilled = Some(instant());
            active.advance(&mut self.loaded.engine, 0);
            let mut counts = self.shared.activity.lock();
            counts.first_token_came(instant() - active.job.queued_at);
            counts.tokens_came(1);
        }
        self.count_uses(&[at]);
    }

    /// Makes pieces as large as can be taken in within their time.
    fn learn_pace(&mut self, tokens: usize, time: Duration) {
        let most = self.loaded.engine.options().batch_tokens;
        let goal = tokens as f64 * PIECE_TIME.as_secs_f64() / time.as_secs_f64().max(1e-6);
        // A short piece says little of what a long one takes.
        let next = if tokens < self.piece { self.piece } else { (goal as usize).min(2 * self.piece) };
        self.piece = next.clamp(PIECE_TOKENS_MIN.min(most), most);
    }

    /// The next token of every answer.
    fn decode(&mut self) {
        let rows: Vec<_> = (0..self.active.len()).filter(|&at| self.active[at].wants_token()).collect();
        if rows.is_empty() {
            return;
        }
        let Err(error) = self.pass(&rows) else { return };
        if rows.len() == 1 {
            return self.active[rows[0]].fail(error);
        }
        // What one request lacks must not end the others: each on its own.
        for row in rows {
            if let Err(error) = self.pass(&[row]) {
                self.active[row].fail(error);
            }
        }
    }

    /// Says for whom the next pass is: what it waits for is given up when they have all gone, or must end.
    fn work_for(&self, requests: &[usize]) {
        let events: Vec<_> = requests.iter().map(|&request| self.active[request].job.events.clone()).collect();
        let shared = Arc::clone(&self.shared);
        self.loaded.waiters.set(move || events.iter().any(|events| !events.is_closed()) && !shared.must_stop());
    }

    fn pass(&mut self, rows: &[usize]) -> Result<(), GenerateError> {
        self.work_for(rows);
        let together = self.active.iter_mut().enumerate().filter(|(at, _)| rows.contains(at));
        let mut together: Vec<_> = together.map(|(_, active)| &mut active.sequence).collect();
        if let Err(error) = decode(&mut self.loaded.engine, &mut together) {
            self.forget_uses();
            return Err(error.into());
        }
        for (number, &row) in rows.iter().enumerate() {
            self.active[row].advance(&mut self.loaded.engine, number);
        }
        self.shared.activity.lock().tokens_came(rows.len() as u64);
        self.count_uses(rows);
        Ok(())
    }

    /// What a pass that failed has noted down is nobody's.
    fn forget_uses(&mut self) {
        self.loaded.engine.log.iter_mut().for_each(ActivationLog::clear);
    }

    /// Counts the experts that the last pass used, for the requests whose rows it had; a prompt's piece has all rows of one.
    fn count_uses(&mut self, requests: &[usize]) {
        let Some(mut log) = self.loaded.engine.log.take() else { return };
        let shared = Arc::clone(&self.shared);
        let mut counts = shared.activity.lock();
        let mut came = false;
        let model = self.model;
        for (row, entry) in rows(&log) {
            let request = if requests.len() == 1 { requests[0] } else { requests[row] };
            let tally = &mut self.active[request].tally;
            tally.by_modality.add(entry.layer, entry.modality, entry.choices);
            for place in entry.choices.iter().filter_map(|choice| self.places.place(entry.layer, choice.expert)) {
                let source = self.loaded.engine.experts().served_from(place);
                tally.add(place, source);
                counts.use_expert(model, place, entry.modality, source);
                came |= !source.is_here();
            }
        }
        log.clear();
        self.loaded.engine.log = Some(log);
        if came {
            let helpers = self.loaded.helpers();
            for (peer, _) in helpers.iter().filter(|(peer, times)| self.helpers.get(peer) != Some(times)) {
                for &request in requests {
                    self.active[request].tally.peers.insert(*peer);
                }
            }
            self.helpers = helpers;
        }
    }

    /// Takes leave of what has ended, and keeps its sequences.
    fn settle(&mut self) {
        let one = self.loaded.engine.model().manifest.text().largest_expert();
        let mut counts = self.shared.activity.lock();
        let (ended, active) = std::mem::take(&mut self.active).into_iter().partition(|active| active.state != Course::GoesOn);
        self.active = active;
        for active in Vec::<Active>::into_iter(ended) {
            let Course::Ended(reason) = active.state else {
                // Who goes away during a pass is found out when there is something to tell.
                let count = if active.job.events.is_closed() { &mut counts.abandoned } else { &mut counts.failed };
                *count += 1;
                continue;
            };
            counts.answers += 1;
            counts.bytes_fetched += active.tally.first.fetched * one;
            self.kept.push_back(active.done(reason, one));
        }
        drop(counts);
        self.count_active();
    }

    fn count_active(&self) {
        let kv_bytes = self.sessions().map(Session::bytes).sum();
        let mut counts = self.shared.activity.lock();
        let of = counts.model(self.model);
        (of.active, of.used, of.kv_bytes) = (self.active.len(), Some(instant()), kv_bytes);
    }

    /// Notes which experts are in memory, now and then, and whenever an answer ends.
    fn update_map(&mut self) {
        let all_go_on = self.active.iter().all(|active| active.state == Course::GoesOn);
        if self.mapped.is_some_and(|at| instant() - at < MAP_PAUSE) && all_go_on {
            return;
        }
        self.mapped = Some(instant());
        let experts = self.loaded.engine.experts();
        let mut counts = self.shared.activity.lock();
        let in_memory = &mut counts.model(self.model).in_memory;
        (0..self.places.count()).for_each(|place| in_memory[place] = experts.is_in_memory(place));
    }
}

impl Drop for Batch {
    /// Whatever ends a batch, nobody waits for it in vain.
    fn drop(&mut self) {
        self.fail_all(&Stopped::Failed(Failure::new(Kind::Other, "the answer ended by a fault of this node; its log says more")));
        self.shared.activity.lock().end_model(self.model);
    }
}

/// How many tokens at the beginning of a prompt a sequence has; never all of them.
fn same_tokens(kept: &Kept, request: &GenerateRequest) -> usize {
    let prompt = &request.prompt;
    let same = kept.tokens.iter().zip(&prompt[..prompt.len() - 1]).take_while(|(a, b)| a == b).count();
    let kept = kept.media.as_deref();
    match &request.media {
        Some(media) => media.same_rows(kept, same),
        // Tokens that keep the places of media may be written by hand.
        None => kept.and_then(|kept| kept.runs.first()).map_or(same, |run| same.min(run.first)),
    }
}

impl Active {
    fn wants_prompt(&self) -> bool {
        self.state == Course::GoesOn && self.sequence.wants_prompt()
    }

    fn wants_token(&self) -> bool {
        self.state == Course::GoesOn && self.sequence.wants_token()
    }

    /// Goes on by the logits of the n-th row of the last pass.
    fn advance(&mut self, engine: &mut Engine, number: usize) {
        match self.sequence.advance(engine, number) {
            Ok(step) => {
                if let Some(reason) = step.ended {
                    self.state = Course::Ended(reason);
                }
                // There is room unless an answer is made again for somebody who reads nothing: he is let go.
                if self.job.events.try_send(AnswerEvent::Step(step)).is_err() {
                    self.state = Course::Failed;
                }
            }
            Err(error) => self.fail(error),
        }
    }

    /// Tells that the answer is complete; its sequence may be gone on with.
    fn done(self, reason: StopReason, expert_bytes: u64) -> Kept {
        let Self { job, sequence: Sequence { session, answer, .. }, tally, cached, admitted, prefilled, .. } = self;
        let mut tokens = answer.sequence().to_vec();
        tokens.truncate(session.tokens());
        let prefilled = prefilled.unwrap_or(admitted);
        let done = Done {
            reason,
            bytes_fetched: tally.first.fetched * expert_bytes,
            experts: tally,
            cached,
            queued: admitted - job.queued_at,
            prefill: prefilled - admitted,
            decode: instant() - prefilled,
        };
        let _ = job.events.try_send(AnswerEvent::Done(Box::new(done)));
        Kept { user: job.user, session, tokens, media: job.request.media }
    }

    fn fail(&mut self, error: GenerateError) {
        self.state = Course::Failed;
        let _ = self.job.events.try_send(AnswerEvent::Failed(Stopped::Failed(error.into())));
    }
}
