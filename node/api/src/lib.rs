//! The HTTP API: OpenAI's endpoints, the node's own, and the dashboard. `docs/api.md` is its contract.

#![expect(missing_docs, reason = "the crates of the node are public to one another only, and many a name says it all")]

mod access;
mod body;
mod connections;
mod dashboard;
mod error;
mod events;
mod experts;
mod fetching;
mod holders;
mod metrics;
mod openai;
mod own;
mod refreshed;
pub mod server;
mod sse;

use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use inference::media::limits::MediaLimits;
use net::fetcher::PeerRates;
use net::network::Network;
use net::progress::SharedTransfer;
use net::status::Account;
use runtime::data_dir::LocalModel;
use runtime::federation::PeerOptions;
use runtime::generation::{Generation, ModelState};
use runtime::library::Library;
use serde_json::{Value, json};
use tokio::sync::watch;

pub use self::access::Access;
pub use self::body::Intake;
use self::body::refuse_unread;
use self::error::ApiError;
pub use self::holders::HoldersCache;
pub use self::refreshed::Refreshed;

/// Everything that the API asks.
pub struct Api {
    pub library: Arc<Library>,
    pub network: Network,
    pub generation: Generation,
    pub about: About,
    /// How to ask peers what they hold.
    pub peers: PeerOptions,
    /// The closed group that the node is in, by its fingerprint.
    pub group: Option<String>,
    /// How fast peers have sent, and what is on its way.
    pub rates: PeerRates,
    pub transfers: Transfers,
    pub intake: Intake,
    /// How much of pictures, videos and sounds is taken.
    pub media: MediaLimits,
    pub started_ms: u64,
    /// Becomes true when the node is about to stop: streams that have no end of their own end then.
    pub stopping: watch::Receiver<bool>,
    pub holders: HoldersCache,
    /// What connected peers say of themselves.
    pub accounts: Refreshed<Vec<Account>>,
}

/// What is on its way: for answers, and for those who pull.
#[derive(Clone, Default, Debug)]
pub struct Transfers(Arc<Mutex<Vec<SharedTransfer>>>);

impl Transfers {
    pub fn new(first: SharedTransfer) -> Self {
        Self(Arc::new(Mutex::new(vec![first])))
    }

    fn add(&self, progress: SharedTransfer) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(progress);
    }

    fn remove(&self, progress: &SharedTransfer) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|known| !Arc::ptr_eq(known, progress));
    }

    fn json(&self) -> Value {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let now = all.iter().filter_map(|one| one.lock().unwrap_or_else(PoisonError::into_inner).clone());
        now.map(|one| one.json()).collect()
    }
}

/// What does not change while the node runs.
#[derive(Clone, Debug)]
pub struct About {
    pub addresses: Vec<String>,
    pub ticket: String,
    pub ram_bytes: u64,
    pub disk_bytes: Option<u64>,
    pub upload_bytes_per_second: Option<u64>,
    pub kv_tokens: u64,
    pub threads_max: usize,
}

/// All paths, behind the rules of `access`.
pub fn router(api: Arc<Api>, access: Access) -> Router {
    let events = events::Events::start(Arc::clone(&api));
    Router::new()
        .route("/v1/models", get(openai::models))
        .route("/v1/models/{id}", get(openai::model))
        .route("/v1/chat/completions", post(openai::chat))
        .route("/v1/completions", post(openai::completions))
        .route("/health", get(own::health))
        .route("/metrics", get(metrics::metrics))
        .route("/openapi.json", get(own::openapi))
        .route("/v1/audio/transcriptions", post(openai::transcription::transcriptions))
        .route("/api/node", get(own::node))
        .route("/api/models", get(own::models))
        .route("/api/models/{id}", get(own::model))
        .route("/api/loaded", get(own::loaded))
        .route("/api/unload", post(own::unload))
        .route("/api/join", post(fetching::join))
        .route("/api/pull", post(fetching::pull))
        .route("/api/peers", get(own::peers))
        .route("/api/store", get(own::store))
        .route("/api/records", get(own::records))
        .route("/api/trust", get(own::trust))
        .route("/api/trust/{peer}", get(own::trust_in))
        .route("/api/experts", get(experts::which))
        .route("/api/experts/map", get(experts::map))
        .route("/api/experts/{layer}/{expert}", get(experts::one))
        .route("/api/events", get(move || std::future::ready(events.stream())))
        .route("/", get(dashboard::page))
        .route("/dashboard/{file}", get(dashboard::file))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(access, access::check))
        .layer(middleware::from_fn(with_headers))
        .with_state(api)
}

async fn not_found(request: Request) -> Response {
    refuse_unread(ApiError::not_found("not_found", format!("there is nothing at {}", request.uri().path())), request).await
}

async fn method_not_allowed(request: Request) -> Response {
    let error = ApiError::with_status(StatusCode::METHOD_NOT_ALLOWED, format!("{} is not for this path", request.method()));
    refuse_unread(error, request).await
}

/// What every answer says to browsers.
async fn with_headers(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    for (name, value) in [
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'self'; img-src 'self' blob:; media-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
        ),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Finds a model by name, id, or the beginning of an id.
fn lookup(api: &Api, name: &str) -> Result<LocalModel, ApiError> {
    api.library.find(name).map_err(|failure| ApiError::not_found("model_not_found", failure.message).param("model"))
}

/// The model that was named, the one that is loaded, or the only one.
fn model_or_default(api: &Api, name: Option<&str>) -> Result<LocalModel, ApiError> {
    if let Some(name) = name {
        return lookup(api, name);
    }
    match api.generation.model() {
        ModelState::Ready(ready) => return Ok(ready.found.clone()),
        ModelState::Loading(found) => return Ok(found),
        ModelState::None | ModelState::Failed => {}
    }
    let mut models = api.library.models();
    match models.len() {
        1 => Ok(models.remove(0)),
        0 => Err(ApiError::not_found("model_not_found", "no model is here yet")),
        _ => Err(ApiError::invalid("more than one model is here; say which with ?model=").param("model")),
    }
}

/// The fields after a question mark.
type QueryParams<T> = Result<Query<T>, QueryRejection>;

fn params<T>(query: QueryParams<T>) -> Result<T, ApiError> {
    query.map(|Query(query)| query).map_err(|error| ApiError::invalid(error.body_text()))
}

fn json_response(value: Value) -> Response {
    Json(value).into_response()
}

/// An error in the shape of `/health`.
fn loading() -> Response {
    let body = json!({"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}});
    (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "5")], Json(body)).into_response()
}
