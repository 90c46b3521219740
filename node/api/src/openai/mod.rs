//! The OpenAI endpoints: models, chat completions, completions.

mod ask;
mod reply;
pub(crate) mod transcription;

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Extension, Path, Request, State};
use axum::response::{IntoResponse, Response};
use base::clock::now_ms;
use inference::generate::{GenerateRequest, Step};
use inference::media::limits::MediaLimits;
use net::random;
use runtime::data_dir::LocalModel;
use runtime::generation::{AnswerEvent, ReadyModel};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use self::ask::{Ask, Endpoint};
use self::reply::{AnswerPiece, PromptTokens, Reply};
use super::access::Asker;
use super::body::{BODY_BYTES_MAX, MEDIA_BODY_BYTES_MAX};
use super::error::ApiError;
use super::{Api, lookup, sse};

/// How long a request waits for its model to be loaded.
const LOAD_PATIENCE: Duration = Duration::from_secs(10);
/// How long a stream may keep its client waiting for a status: a failure in that time has one of its own.
const STATUS_PATIENCE: Duration = Duration::from_secs(2);
/// How often a stream says that it is alive when it has nothing else to say.
const PING_PAUSE: Duration = Duration::from_secs(5);

pub(super) async fn models(State(api): State<Arc<Api>>) -> impl IntoResponse {
    Json(json!({"object": "list", "data": api.library.models().iter().map(|found| model_json(&api, found)).collect::<Vec<_>>()}))
}

pub(super) async fn model(State(api): State<Arc<Api>>, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    let found = lookup(&api, &name)?;
    Ok(Json(model_json(&api, &found)))
}

/// What a model takes in.
fn inputs(found: &LocalModel) -> Vec<&'static str> {
    let vision = found.manifest.vision().map(|_| ["image", "video"]);
    let audio = found.manifest.audio().map(|_| "audio");
    ["text"].into_iter().chain(vision.into_iter().flatten()).chain(audio).collect()
}

fn model_json(api: &Api, found: &LocalModel) -> Value {
    json!({"id": found.name, "object": "model", "created": api.started_ms / 1000, "owned_by": found.publisher.to_string(), "root": found.id.to_string(),
           "modalities": {"input": inputs(found), "output": ["text"]}})
}

pub(super) async fn chat(State(api): State<Arc<Api>>, Extension(asker): Extension<Asker>, request: Request) -> Result<Response, Response> {
    answer(api, asker, Endpoint::Chat, request).await
}

pub(super) async fn completions(
    State(api): State<Arc<Api>>,
    Extension(asker): Extension<Asker>,
    request: Request,
) -> Result<Response, Response> {
    answer(api, asker, Endpoint::Completions, request).await
}

/// An answer on its way.
struct Submitted {
    ask: Ask,
    model: Arc<ReadyModel>,
    prompt: PromptTokens,
    events: mpsc::Receiver<AnswerEvent>,
}

async fn answer(api: Arc<Api>, asker: Asker, endpoint: Endpoint, request: Request) -> Result<Response, Response> {
    let bytes_max = if endpoint == Endpoint::Chat && takes_media(&api) { MEDIA_BODY_BYTES_MAX } else { BODY_BYTES_MAX };
    let ask = api.intake.read(request, bytes_max, move |fields| Ask::parse(endpoint, fields)).await?;
    answer_to(api, asker, ask).await.map_err(ApiError::into_response)
}

async fn answer_to(api: Arc<Api>, asker: Asker, ask: Ask) -> Result<Response, ApiError> {
    let found = lookup(&api, &ask.model)?;
    let user = match asker {
        Asker::Token(number) => format!("token {number}"),
        Asker::Local => format!("user {}", ask.user),
    };
    let model = api.generation.ready(&found, &user, LOAD_PATIENCE).await?;
    let (ask, model, request) = {
        let limits = api.media;
        api.intake.work(move || with_tokens(ask, model, &limits)).await?
    };
    let prompt = PromptTokens::of(&request);
    let mut events = api.generation.ask(&model, &user, request)?;
    if !ask.stream {
        return whole(Submitted { ask, model, prompt, events }).await;
    }
    // What fails at once is told by the status, not in the stream.
    let first = match tokio::time::timeout(STATUS_PATIENCE, events.recv()).await {
        Ok(Some(AnswerEvent::Failed(stopped))) => return Err(stopped.into()),
        Ok(None) => return Err(given_up()),
        Ok(first) => first,
        Err(_) => None,
    };
    Ok(stream(Submitted { ask, model, prompt, events }, first))
}

/// A whole answer, as a value again.
async fn reply_text(response: Response) -> Result<Value, ApiError> {
    let bytes = axum::body::to_bytes(response.into_body(), usize::MAX).await;
    bytes.ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).ok_or_else(|| ApiError::server("the answer cannot be read"))
}

/// Whether a model that is here sees or hears: then bodies may be as long as media are.
fn takes_media(api: &Api) -> bool {
    api.library.models().iter().any(|found| found.manifest.vision().is_some() || found.manifest.audio().is_some())
}

fn with_tokens(ask: Ask, model: Arc<ReadyModel>, limits: &MediaLimits) -> Result<(Ask, Arc<ReadyModel>, GenerateRequest), ApiError> {
    let request = ask.request(&model, limits, random())?;
    Ok((ask, model, request))
}

async fn whole(submitted: Submitted) -> Result<Response, ApiError> {
    let Submitted { ask, model, prompt, mut events } = submitted;
    let mut piece = AnswerPiece::default();
    let mut reply = Reply::new(&ask, &model, identifier(), now_ms());
    while let Some(event) = events.recv().await {
        match event {
            AnswerEvent::Step(step) => piece.add(step),
            AnswerEvent::Again => piece = AnswerPiece::default(),
            AnswerEvent::Done(done) => return Ok(Json(reply.whole(&piece, &done, prompt)).into_response()),
            AnswerEvent::Failed(stopped) => return Err(stopped.into()),
        }
    }
    Err(given_up())
}

fn given_up() -> ApiError {
    ApiError::server("the answer was given up")
}

fn identifier() -> u128 {
    u128::from(random()) << 64 | u128::from(random())
}

/// Sends an answer as it comes.
fn stream(submitted: Submitted, first: Option<AnswerEvent>) -> Response {
    let (sender, chunks) = mpsc::channel::<Bytes>(1);
    tokio::spawn(async move {
        let mut streaming = Streaming { sender, sent: Vec::new(), again: None, unsent: AnswerPiece::default() };
        if let Err(ended) = streaming.run(submitted, first).await {
            match ended {
                Ended::Gone => {}
                Ended::Failed(error) => drop(streaming.say(&sse::error(&error)).await),
            }
        }
    });
    sse::of(chunks)
}

/// Why a stream ends before its answer is complete.
enum Ended {
    /// Nobody reads it.
    Gone,
    Failed(ApiError),
}

/// A stream as it goes.
struct Streaming {
    sender: mpsc::Sender<Bytes>,
    /// What has come so far; an answer that is made again must begin with the same.
    sent: Vec<Step>,
    /// How much of that an answer that is made again has reached.
    again: Option<usize>,
    /// What has come and needs no chunk of its own.
    unsent: AnswerPiece,
}

impl Streaming {
    async fn run(&mut self, submitted: Submitted, first: Option<AnswerEvent>) -> Result<(), Ended> {
        let Submitted { ask, model, prompt, mut events } = submitted;
        let mut reply = Reply::new(&ask, &model, identifier(), now_ms());
        if let Some(chunk) = reply.first_chunk() {
            self.data(&chunk).await?;
        }
        let mut next = first;
        loop {
            let event = match next.take() {
                Some(event) => event,
                None => self.wait(&mut events).await?,
            };
            match event {
                AnswerEvent::Step(step) => self.step(&ask, &mut reply, step).await?,
                AnswerEvent::Again => self.again = Some(0),
                AnswerEvent::Failed(stopped) => return Err(Ended::Failed(stopped.into())),
                AnswerEvent::Done(done) => {
                    self.data(&reply.last_chunk(done.reason)).await?;
                    if ask.include_usage {
                        let tokens = self.sent.iter().filter(|step| step.token.is_some()).count();
                        self.data(&reply.usage_chunk(&done, prompt, tokens)).await?;
                    }
                    return self.say(sse::DONE).await;
                }
            }
        }
    }

    /// Waits for what is next, and tells the client now and then that it does.
    async fn wait(&self, events: &mut mpsc::Receiver<AnswerEvent>) -> Result<AnswerEvent, Ended> {
        loop {
            let next = tokio::select! {
                next = tokio::time::timeout(PING_PAUSE, events.recv()) => next,
                // The answer is given up as soon as its client has gone.
                () = self.sender.closed() => return Err(Ended::Gone),
            };
            match next {
                Ok(Some(event)) => return Ok(event),
                Ok(None) => return Err(Ended::Failed(given_up())),
                Err(_) => self.say(sse::PING).await?,
            }
        }
    }

    async fn step(&mut self, ask: &Ask, reply: &mut Reply<'_>, step: Step) -> Result<(), Ended> {
        if let Some(at) = self.again {
            if self.sent.get(at).is_some_and(|before| *before != step) {
                return Err(Ended::Failed(ApiError::server(
                    "a peer's result was wrong after a part of the answer had been sent; please ask again",
                )));
            }
            self.again = (at + 1 < self.sent.len()).then_some(at + 1);
            if at < self.sent.len() {
                return Ok(());
            }
        }
        self.sent.push(step.clone());
        self.unsent.add(step);
        // Text is held back while it may become a stop string, or half a character; what was asked for of each token is not.
        let of_tokens = (ask.token_ids || ask.top_logprobs.is_some()) && !self.unsent.tokens.is_empty();
        if self.unsent.text.is_empty() && !of_tokens {
            return Ok(());
        }
        let piece = std::mem::take(&mut self.unsent);
        self.data(&reply.piece_chunk(&piece)).await
    }

    async fn data(&self, value: &Value) -> Result<(), Ended> {
        self.say(&sse::data(value)).await
    }

    async fn say(&self, text: &str) -> Result<(), Ended> {
        self.sender.send(Bytes::copy_from_slice(text.as_bytes())).await.map_err(|_| Ended::Gone)
    }
}
