//! Responses of server-sent events.

use std::convert::Infallible;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use futures::stream::unfold;
use serde_json::Value;
use tokio::sync::mpsc;

use super::error::ApiError;

/// What ends a stream that is complete.
pub(super) const DONE: &str = "data: [DONE]\n\n";
/// What says that a stream is alive.
pub(super) const PING: &str = ": ping\n\n";

/// An event with data.
pub(super) fn data(value: &Value) -> String {
    format!("data: {value}\n\n")
}

/// The event that ends a stream which is not.
pub(super) fn error(error: &ApiError) -> String {
    format!("event: error\ndata: {}\n\n", error.json())
}

/// A response that goes on as long as something is sent.
pub(super) fn of(events: mpsc::Receiver<Bytes>) -> Response {
    let events = unfold(events, |mut events| async { events.recv().await.map(|event| (Ok::<_, Infallible>(event), events)) });
    response(Body::from_stream(events))
}

/// A response with this body.
pub(super) fn response(body: Body) -> Response {
    let mut response = Response::new(body);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}
