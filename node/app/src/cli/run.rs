//! `confrere run`: a prompt, or a conversation.

use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base::clock::{instant, interrupted};
use base::failure::{Failure, Kind, io_failure};
use base::output::{human_bytes, note, print, print_json};
use inference::activation_log::{ActivationLog, ENTRIES_DEFAULT};
use inference::chat::{Content, ContentPart, MediumKind, Message, Role};
use inference::expert_use::ExpertUse;
use inference::generate::{GenerateRequest, Generated, Progress, StopReason, generate};
use inference::media::prompt::{MediaPrompt, Medium, PreparedMedium};
use inference::sampler::Sampling;
use inference::session::Session;
use protocol::manifest::GenerationDefaults;
use runtime::command::{Context, Held};
use runtime::dispatcher::Waited;
use runtime::federation::{Federation, PeerOptions};
use runtime::generation::by_modality_json;
use runtime::loading::Loaded;
use runtime::media::{Senses, prepare};
use runtime::memory::resident_bytes;
use runtime::prompt::{ModelText, Prompt, PromptError, default_sampling};
use serde_json::{Value, json};

use super::run_args::{RunArgs, next_line, read_stdin};
use super::run_at_daemon;

/// What a chat template may add to a prompt, for the plan of memory; a longer one costs more than was planned, nothing else.
const TEMPLATE_TOKENS_MAX: usize = 1024;

pub(super) fn run(context: &Context, args: &RunArgs) -> Result<(), Failure> {
    let open = match context.open()? {
        Held::Here(open) => open,
        Held::Daemon(daemon) => return run_at_daemon::run(context, args, &daemon),
    };
    let peers = PeerOptions { remote: args.remote.options(), ..args.peers.options() };
    let federation = Federation::connect(context.runtime.handle(), &open.dir, &peers, context.offline)?;
    let found = federation.find(&open, &args.model, None)?;
    let defaults = &found.manifest.generation;
    let prompt = match &args.prompt {
        Some(prompt) => Some(prompt.clone()),
        None if std::io::stdin().is_terminal() && !context.json => None,
        None => Some(read_stdin()?),
    };
    let limits = args.limits.limits();
    let senses = Senses { vision: found.manifest.vision(), audio: found.manifest.audio(), limits: &limits };
    let media = prepare(senses, &args.media.media())?;
    let places: usize = media.iter().map(|medium| medium.medium.places()).sum();
    // A token stands for a byte or more; a conversation may fill the context.
    let tokens_max = prompt
        .as_ref()
        .map(|prompt| prompt.len().saturating_add(args.max_tokens).saturating_add(TEMPLATE_TOKENS_MAX).saturating_add(places));
    let options = args.engine.options(&found.manifest, tokens_max);
    let mut loaded = federation.load(&open, &found, context.memory_max, options)?;
    let authors = default_sampling(defaults, args.seed);
    let sampling = Sampling {
        temperature: args.temperature.unwrap_or(authors.temperature),
        top_k: args.top_k.unwrap_or(authors.top_k),
        top_p: args.top_p.unwrap_or(authors.top_p),
        repetition_penalty: args.repetition_penalty.unwrap_or(authors.repetition_penalty),
        ..authors
    };
    let Some(prompt) = prompt else { return converse(&mut loaded, args, sampling, defaults, media) };
    let about: Vec<_> = media_of(&media).collect();
    let messages = [message(args.media.media().iter().map(|given| given.kind), &prompt)];
    let prompt = match () {
        () if args.raw => Prompt::Raw(&prompt),
        () if media.is_empty() => Prompt::Conversation(&messages, &prompt),
        () => Prompt::WithMedia(&messages, media),
    };
    let request =
        loaded.text.request(prompt, (loaded.engine.context(), args.max_tokens), sampling, defaults).map_err(PromptError::into_failure)?;
    let mut session = loaded.engine.session();
    let entries = args.trace.as_ref().map_or(ENTRIES_DEFAULT, |_| loaded.engine.context() * found.manifest.decoder().layers() as usize);
    loaded.engine.log = (!args.no_log).then(|| ActivationLog::new(entries));
    let answer = answer(&mut loaded, &mut session, &request, |progress| if context.json { Ok(()) } else { show(progress) })?;
    let log = loaded.engine.log.take();
    let by_modality = log.as_ref().map(|log| by_modality_json(log.uses()));
    if let Some(log) = log {
        if let Err(failure) = open.dir.add_usage(&found, &log) {
            note(&format!("warning: {failure}: the uses of experts are not counted")); // the answer is what was asked for
        }
        if let Some(path) = &args.trace {
            let trace = log.trace(found.manifest.decoder().layers(), found.manifest.decoder().experts());
            std::fs::write(path, trace.to_string()).map_err(|error| io_failure("write", path, &error))?;
        }
    }
    if context.json {
        let mut json = answer.json(&loaded);
        json["experts"]["by_modality"] = json!(by_modality);
        json["media"] = json!(about);
        let counted = loaded.counted_bytes(&session);
        json["memory"] = json!({"limit": context.memory_max, "counted": counted, "resident": resident_bytes()});
        print_json(&json)?;
    } else {
        end_line(&loaded, &answer)?;
    }
    note(&answer.summary(&loaded));
    if answer.generated.stop_reason == StopReason::Interrupted { Err(Failure::interrupted()) } else { Ok(()) }
}

fn show(progress: &Progress) -> Result<(), Failure> {
    match progress {
        Progress::Token(text, _) if !text.is_empty() => print(text),
        _ => Ok(()),
    }
}

/// Ends the line of a streamed answer; without a tokenizer the answer is its token ids.
fn end_line(loaded: &Loaded, answer: &RunOutput) -> Result<(), Failure> {
    let ids = if loaded.text.tokenizer.is_none() { json!(answer.generated.tokens).to_string() } else { String::new() };
    print(&format!("{ids}\n"))
}

/// An answer and what it took.
pub(super) struct RunOutput {
    pub(super) generated: Generated,
    /// The experts that the prompt took.
    pub(super) prefill: ExpertUse,
    /// Those that prompt and answer took together.
    pub(super) experts: ExpertUse,
    pub(super) tokens_per_second: f64,
    pub(super) times: Times,
    /// How often it was made again, because a peer's result had been wrong.
    again: u32,
}

/// Generates one answer; `on_progress` sees it grow, and ends it by failing. When a peer's result turns out to be wrong meanwhile, the
/// answer is made again without that peer.
pub(super) fn answer(
    loaded: &mut Loaded,
    session: &mut Session,
    request: &GenerateRequest,
    mut on_progress: impl FnMut(&Progress) -> Result<(), Failure>,
) -> Result<RunOutput, Failure> {
    let (start, mut shown, mut again) = (session.tokens(), Shown::default(), 0);
    let report = loaded.shared_report();
    loop {
        let wrong_before = report.lock().wrong_peers();
        let is_wrong = || report.lock().wrong_peers() > wrong_before;
        let answer = attempt(loaded, session, request, |progress| {
            if is_wrong() {
                return Ok(ControlFlow::Break(()));
            }
            let news = match progress {
                Progress::Token(text, usage) => Progress::Token(shown.news(text), *usage),
                Progress::Prefilled(_) => progress.clone(),
            };
            on_progress(&news).map(ControlFlow::Continue)
        })?;
        if !is_wrong() {
            return Ok(RunOutput { again, ..answer });
        }
        note("note: a peer's result was wrong: the answer is made again without that peer");
        again += 1;
        loaded.engine.log.iter_mut().for_each(ActivationLog::clear);
        session.rewind(start);
        shown.begin_again();
    }
}

/// The text of an answer that may be made more than once.
#[derive(Default)]
struct Shown {
    text: String,
    /// What this attempt has come to.
    attempt: String,
}

impl Shown {
    fn begin_again(&mut self) {
        self.attempt.clear();
    }

    /// What is to be shown when the attempt goes on like this: nothing as long as it says the same again, all of it when it does not.
    fn news(&mut self, more: &str) -> String {
        self.attempt.push_str(more);
        if self.text.starts_with(&self.attempt) {
            return String::new();
        }
        let news = match self.attempt.strip_prefix(&self.text) {
            Some(news) => news.to_owned(),
            None => format!("\n{}", self.attempt),
        };
        self.text.clone_from(&self.attempt);
        news
    }
}

fn attempt(
    loaded: &mut Loaded,
    session: &mut Session,
    request: &GenerateRequest,
    mut on_progress: impl FnMut(&Progress) -> Result<ControlFlow<()>, Failure>,
) -> Result<RunOutput, Failure> {
    loaded.engine.experts().start_counting();
    let mut decoding_since: Option<Instant> = None;
    let mut prefill = ExpertUse::default();
    let mut failed = None;
    let (mut came, mut gaps, mut waited_before) = (None, Vec::new(), Waited::default());
    let report = loaded.shared_report();
    let generated = generate(&mut loaded.engine, &mut loaded.towers, loaded.text.tokenizer.as_ref(), session, request, |progress| {
        match progress {
            Progress::Prefilled(usage) => {
                (decoding_since, prefill) = (Some(instant()), usage);
                waited_before = report.lock().waited;
            }
            Progress::Token(..) => {
                let before = came.replace(instant()).or(decoding_since);
                gaps.extend(before.zip(came).map(|(before, now)| now - before));
            }
        }
        let next = on_progress(&progress).unwrap_or_else(|failure| {
            failed.get_or_insert(failure);
            ControlFlow::Break(())
        });
        if interrupted() { ControlFlow::Break(()) } else { next }
    })?;
    if let Some(failure) = failed {
        return Err(failure);
    }
    let seconds = decoding_since.map_or(0.0, |since| (instant() - since).as_secs_f64());
    let tokens_per_second = if seconds > 0.0 { generated.tokens.len() as f64 / seconds } else { 0.0 };
    let times = Times::of(gaps, report.lock().waited.since(waited_before));
    Ok(RunOutput { generated, prefill, experts: loaded.engine.experts().usage(), tokens_per_second, times, again: 0 })
}

/// How long tokens took, and what of that the model waited.
#[derive(Clone, Debug)]
pub(super) struct Times {
    /// The longest first.
    gaps: Vec<Duration>,
    /// In the order in which they came: of the later half, which memory has settled for.
    later: Duration,
    waited: Waited,
}

impl Times {
    fn of(mut gaps: Vec<Duration>, waited: Waited) -> Self {
        let later = gaps[gaps.len() / 2..].iter().sum();
        gaps.sort_by_key(|gap| std::cmp::Reverse(*gap));
        Self { gaps, later, waited }
    }

    fn percentile(&self, percent: usize) -> f64 {
        let at = self.gaps.len() * (100 - percent) / 100;
        self.gaps.get(at).map_or(0.0, |gap| gap.as_secs_f64() * 1e3)
    }

    fn per_token(&self, time: Duration) -> f64 {
        time.as_secs_f64() * 1e3 / self.gaps.len().max(1) as f64
    }

    fn json(&self) -> Value {
        let later = self.gaps.len() - self.gaps.len() / 2;
        let Waited { disk, remote, fetched } = self.waited;
        json!({
            "median": self.percentile(50), "p99": self.percentile(99), "max": self.percentile(100),
            "later_half_mean": self.later.as_secs_f64() * 1e3 / later.max(1) as f64,
            "waited": {"disk": self.per_token(disk), "remote": self.per_token(remote), "fetched": self.per_token(fetched)},
        })
    }

    /// For the line after an answer; nothing when the model waited for nothing.
    fn words(&self) -> String {
        let Waited { disk, remote, fetched } = self.waited;
        let ways = [(disk, "the disk"), (remote, "peers"), (fetched, "fetches")];
        let waits: Vec<_> = ways
            .iter()
            .filter(|(time, _)| !time.is_zero())
            .map(|(time, what)| format!("{:.1} ms for {what}", self.per_token(*time)))
            .collect();
        if waits.is_empty() { String::new() } else { format!("; each waited {}", waits.join(", ")) }
    }
}

impl RunOutput {
    fn json(&self, loaded: &Loaded) -> Value {
        let ExpertUse { needed, ram, disk, fetched, bytes_fetched, remote, remote_uses, remote_rows, moved_in, uses, .. } = self.experts;
        let ExpertUse { hits, bytes_read, prefetched, prefetched_used, hinted, hinted_used, .. } = self.experts;
        let peers: Vec<_> = loaded.providers().keys().map(ToString::to_string).collect();
        json!({
            "text": self.generated.text,
            "tokens": self.generated.tokens,
            "experts": {"needed": needed, "ram": ram, "disk": disk, "remote": remote, "remote_uses": remote_uses, "remote_rows": remote_rows, "moved_in": moved_in, "fetched": fetched, "bytes_fetched": bytes_fetched, "peers": peers,
                        "uses": uses, "hits": hits, "bytes_read": bytes_read, "prefetched": prefetched, "prefetched_used": prefetched_used, "hinted": hinted, "hinted_used": hinted_used},
            "token_ms": self.times.json(), "again": self.again,
            "remote": loaded.remote_report().json(),
            "tokens_per_second": (self.tokens_per_second * 100.0).round() / 100.0,
            "stop_reason": match self.generated.stop_reason {
                StopReason::EndOfText | StopReason::StopString => "stop",
                StopReason::TokensMax | StopReason::ContextFull => "length",
                StopReason::Interrupted => "interrupted",
            },
        })
    }

    /// The line after an answer.
    fn summary(&self, loaded: &Loaded) -> String {
        let ExpertUse { needed, ram, disk, fetched, bytes_fetched, remote, .. } = self.experts;
        let providers: Vec<_> = loaded.providers().keys().map(ToString::to_string).collect();
        let from = if providers.is_empty() { String::new() } else { format!(" from {}", providers.join(", ")) };
        let ran = if remote > 0 { format!(", {remote} run at peers") } else { String::new() };
        let tokens = self.generated.tokens.len();
        let line = format!(
            "[experts: {needed} needed, {} had ({ram} in memory, {disk} on disk){ran}, {fetched} fetched{from}, {}; {tokens} tokens, {:.1} a second{}]",
            ram + disk,
            human_bytes(bytes_fetched),
            self.tokens_per_second,
            self.times.words()
        );
        [vec![line], loaded.remote_report().lines()].concat().join("\n")
    }
}

/// A conversation on the terminal. What is in memory stays there from turn to turn.
fn converse(
    loaded: &mut Loaded,
    args: &RunArgs,
    sampling: Sampling,
    defaults: &GenerationDefaults,
    media: Vec<Arc<PreparedMedium>>,
) -> Result<(), Failure> {
    note("Ctrl-D ends the conversation; /image FILE, /audio FILE and /video FILE show or play something with your next line");
    let kinds = args.media.media().iter().map(|given| given.kind).collect();
    let mut conversation = Conversation {
        session: loaded.engine.session(),
        taken_in: Vec::new(),
        seen: None,
        messages: Vec::new(),
        text: String::new(),
        waiting: kinds,
        media,
    };
    loop {
        let Some(line) = next_line()? else { return print("\n") };
        if let Some(shown) = conversation.show(loaded, args, &line) {
            match shown {
                Ok(()) => note("it goes with your next line"),
                Err(failure) => note(&format!("error: {failure}")),
            }
            continue;
        }
        match conversation.turn(loaded, args, sampling, defaults, &line) {
            Ok(()) => {}
            Err(failure) if matches!(failure.kind, Kind::Interrupted | Kind::Unread) => return Err(failure),
            // The conversation goes on: the peer may come back, and the next line may be shorter.
            Err(failure) => note(&format!("error: {failure}")),
        }
    }
}

struct Conversation {
    session: Session,
    taken_in: Vec<u32>,             // the tokens that the session has seen
    seen: Option<Arc<MediaPrompt>>, // and the media among them
    messages: Vec<Message>,
    text: String, // the same without a template
    /// What was shown or played since the last line.
    waiting: Vec<MediumKind>,
    /// All that was, in its order.
    media: Vec<Arc<PreparedMedium>>,
}

/// What a user says about what is seen and heard.
fn message(media: impl Iterator<Item = MediumKind>, text: &str) -> Message {
    let parts: Vec<_> = media.map(ContentPart::Medium).chain([ContentPart::Text(text.to_owned())]).collect();
    if parts.len() == 1 { Message::text(Role::User, text) } else { Message { role: Role::User, content: Content::Parts(parts) } }
}

/// Media as `--json` tells of them.
fn media_of(media: &[Arc<PreparedMedium>]) -> impl Iterator<Item = Value> {
    let name = |medium: &Medium| match medium {
        Medium::Picture { .. } => MediumKind::Image.name(),
        Medium::Sound { .. } => MediumKind::Audio.name(),
        Medium::Video { .. } => MediumKind::Video.name(),
    };
    media.iter().map(move |medium| json!({"kind": name(&medium.medium), "tokens": medium.medium.places(), "seconds": medium.seconds}))
}

impl Conversation {
    /// Takes a line that shows or plays something; nothing where it is another line.
    fn show(&mut self, loaded: &Loaded, args: &RunArgs, line: &str) -> Option<Result<(), Failure>> {
        let kinds = [("/image ", MediumKind::Image), ("/audio ", MediumKind::Audio), ("/video ", MediumKind::Video)];
        let (path, kind) = kinds.into_iter().find_map(|(word, kind)| Some((line.strip_prefix(word)?, kind)))?;
        let limits = args.limits.limits();
        let ModelText { vision, audio, .. } = &*loaded.text;
        let senses = Senses { vision: vision.as_ref(), audio: audio.as_ref(), limits: &limits };
        Some(prepare(senses, &[args.media.medium(kind, PathBuf::from(path.trim()))]).map(|prepared| {
            self.waiting.push(kind);
            self.media.extend(prepared);
        }))
    }

    fn turn(
        &mut self,
        loaded: &mut Loaded,
        args: &RunArgs,
        sampling: Sampling,
        defaults: &GenerationDefaults,
        line: &str,
    ) -> Result<(), Failure> {
        let mut messages = self.messages.clone();
        messages.push(message(self.waiting.iter().copied(), line));
        let text = format!("{}{line}", self.text);
        let prompt = match () {
            () if args.raw => Prompt::Raw(&text),
            () if self.media.is_empty() => Prompt::Conversation(&messages, &text),
            () => Prompt::WithMedia(&messages, self.media.clone()),
        };
        let request = loaded
            .text
            .request(prompt, (loaded.engine.context(), args.max_tokens), sampling, defaults)
            .map_err(PromptError::into_failure)?;
        let tokens = &request.prompt;
        // The beginning that is the same as last time need not be taken in again; the last token always is.
        let same = tokens.iter().zip(&self.taken_in).take_while(|(a, b)| a == b).count().min(tokens.len().saturating_sub(1));
        let same = request.media.as_ref().map_or(same, |media| media.same_rows(self.seen.as_deref(), same));
        self.session.rewind(same);
        self.taken_in.truncate(self.session.tokens());
        let answer = answer(loaded, &mut self.session, &request, show)?;
        end_line(loaded, &answer)?;
        note(&answer.summary(loaded));
        if answer.generated.stop_reason == StopReason::Interrupted {
            return Err(Failure::interrupted());
        }
        self.seen = request.media;
        self.waiting.clear();
        self.taken_in = request.prompt;
        self.taken_in.extend(&answer.generated.tokens);
        self.taken_in.truncate(self.session.tokens());
        self.text = text + &answer.generated.text;
        messages.push(Message::text(Role::Assistant, answer.generated.text.trim()));
        self.messages = messages;
        Ok(())
    }
}
