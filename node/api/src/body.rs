//! Reading what clients send: how much, how fast, how deep; and the fields of a JSON object, each checked, none overlooked.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, HttpBody as _};
use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use futures::StreamExt as _;
use serde_json::{Map, Value};
use tokio::sync::Semaphore;

use super::error::ApiError;

/// Longest body, in bytes.
pub(crate) const BODY_BYTES_MAX: usize = 1 << 20;
/// The same of a conversation with pictures, videos or sounds.
pub(crate) const MEDIA_BODY_BYTES_MAX: usize = 32 << 20;
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// For the rest of a body that is of no use.
const UNREAD_TIMEOUT: Duration = Duration::from_secs(1);
/// Bytes of bodies that may be on their way together, in units of a KiB.
const ROOM_KIB: usize = 64 << 10;
/// Bodies that are turned into values and tokens at a time: a value can be many times as large as its text.
const WORKED_ON_MAX: usize = 2;

/// Objects and lists in a body: each takes many times the memory of its text.
const PARTS_MAX: usize = 8192;

/// Room for bodies on their way.
#[derive(Clone, Debug)]
pub struct Intake {
    room: Arc<Semaphore>,
    working: Arc<Semaphore>,
}

impl Default for Intake {
    fn default() -> Self {
        Self { room: Arc::new(Semaphore::new(ROOM_KIB)), working: Arc::new(Semaphore::new(WORKED_ON_MAX)) }
    }
}

impl Intake {
    /// Reads a JSON object of at most `bytes_max` bytes and does something with it.
    pub(crate) async fn read<T: Send + 'static>(
        &self,
        request: Request,
        bytes_max: usize,
        work: impl FnOnce(Fields) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, Response> {
        let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        if !kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json") {
            let error = ApiError::with_status(StatusCode::UNSUPPORTED_MEDIA_TYPE, "the body must be application/json");
            return Err(refuse_unread(error, request).await);
        }
        let bytes = tokio::time::timeout(BODY_TIMEOUT, self.collect(request.into_body(), bytes_max)).await;
        let bytes = bytes.unwrap_or_else(|_| Err(ApiError::with_status(StatusCode::REQUEST_TIMEOUT, "the body took too long")));
        let bytes = bytes.map_err(|error| {
            let mut response = error.into_response();
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            response
        })?;
        self.work(move || work(Fields::parse(&bytes)?)).await.map_err(ApiError::into_response)
    }

    /// Does something with what a client sent, on a thread on which that may take its time; few do at a time.
    pub(crate) async fn work<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T, ApiError> + Send + 'static) -> Result<T, ApiError> {
        let _one = self.working.acquire().await;
        let done = tokio::task::spawn_blocking(work).await;
        done.unwrap_or_else(|_| Err(ApiError::server("the request could not be worked on")))
    }

    async fn collect(&self, body: Body, bytes_max: usize) -> Result<Vec<u8>, ApiError> {
        let too_long = || ApiError::with_status(StatusCode::PAYLOAD_TOO_LARGE, format!("the body is longer than {bytes_max} bytes"));
        if body.size_hint().lower() > bytes_max as u64 {
            return Err(too_long());
        }
        let mut bytes = Vec::new();
        let mut held = Vec::new();
        let mut pieces = body.into_data_stream();
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|error| ApiError::invalid(format!("the body cannot be read: {error}")))?;
            if bytes.len() + piece.len() > bytes_max {
                return Err(too_long());
            }
            let room = self.room.try_acquire_many(piece.len().div_ceil(1024) as u32);
            held.push(room.map_err(|_| ApiError::unavailable("busy", "too many bodies are on their way", Some(1)))?);
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    }
}

/// A refusal of a request whose body nobody has read: what there is of it is read now, so that the connection can go on, or it is said that it ends.
pub(crate) async fn refuse_unread(error: ApiError, request: Request) -> Response {
    let mut pieces = request.into_body().into_data_stream();
    let drained = async {
        let mut bytes = 0;
        while let Some(Ok(piece)) = pieces.next().await {
            bytes += piece.len();
            if bytes > BODY_BYTES_MAX {
                return false;
            }
        }
        true
    };
    let is_drained = tokio::time::timeout(UNREAD_TIMEOUT, drained).await.unwrap_or(false);
    let mut response = error.into_response();
    if !is_drained {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// The fields of an object. Each is taken out; what is left at the end is unknown.
#[derive(Debug)]
pub(crate) struct Fields {
    map: Map<String, Value>,
    /// What the object is called in errors: nothing, or a path with a dot at its end.
    path: String,
}

impl Fields {
    fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        if parts(bytes) > PARTS_MAX {
            return Err(ApiError::invalid(format!("the body has more than {PARTS_MAX} objects and lists")).code("invalid_json"));
        }
        let value = serde_json::from_slice(bytes)
            .map_err(|error| ApiError::invalid(format!("the body is no JSON that can be read: {error}")).code("invalid_json"))?;
        Self::of(value, "").map_err(|_| ApiError::invalid("the body must be a JSON object").code("invalid_json"))
    }

    /// The fields of `value`, which is at `path`.
    pub(crate) fn of(value: Value, path: &str) -> Result<Self, ApiError> {
        match value {
            Value::Object(mut map) => {
                // Clients echo what they were answered with every member that there may be: null says that there is none.
                map.retain(|_, value| !value.is_null());
                let path = if path.is_empty() { String::new() } else { format!("{path}.") };
                Ok(Self { map, path })
            }
            other => Err(wrong(path, "an object", &other)),
        }
    }

    pub(crate) fn path(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    /// Takes out a field; `null` counts as absent.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name)
    }

    /// Takes out a field if it says nothing: an empty text, list or object.
    pub(crate) fn take_empty(&mut self, name: &str) {
        let is_empty = self.map.get(name).is_some_and(|value| match value {
            Value::String(text) => text.is_empty(),
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            _ => false,
        });
        if is_empty {
            self.map.remove(name);
        }
    }

    pub(crate) fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(&self.path(name), "a text", &other)),
        }
    }

    pub(crate) fn flag(&mut self, name: &str) -> Result<bool, ApiError> {
        match self.take(name) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(other) => Err(wrong(&self.path(name), "true or false", &other)),
        }
    }

    /// A whole number from `least` to `most`.
    pub(crate) fn count(&mut self, name: &str, (least, most): (u64, u64)) -> Result<Option<u64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        // Some clients write 5 as 5.0.
        let whole = value.as_u64().or_else(|| value.as_f64().filter(|n| n.fract() == 0.0 && (0.0..9e15).contains(n)).map(|n| n as u64));
        match whole {
            Some(count) if (least..=most).contains(&count) => Ok(Some(count)),
            _ if most == u64::MAX => Err(wrong(&self.path(name), &format!("a whole number from {least} on"), &value)),
            _ => Err(wrong(&self.path(name), &format!("a whole number from {least} to {most}"), &value)),
        }
    }

    /// A number that `fine` takes; `rule` says which those are.
    pub(crate) fn number(&mut self, name: &str, rule: &str, fine: impl Fn(f64) -> bool) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_f64().filter(|&number| fine(number)) {
            Some(number) => Ok(Some(number as f32)),
            None => Err(wrong(&self.path(name), rule, &value)),
        }
    }

    /// Refuses a field unless it has one of the values that change nothing.
    pub(crate) fn only(&mut self, name: &str, harmless: &[Value]) -> Result<(), ApiError> {
        match self.take(name) {
            None => Ok(()),
            Some(value) if harmless.contains(&value) => Ok(()),
            Some(_) => {
                let path = self.path(name);
                let message = match harmless {
                    [] => format!("{path} is not supported"),
                    [one] => format!("{path} is not supported, but as {one}"),
                    [one, ..] => format!("this value of {path} is not supported; {one} is"),
                };
                let code = if harmless.is_empty() { "unsupported_parameter" } else { "unsupported_value" };
                Err(ApiError::invalid(message).code(code).param(path))
            }
        }
    }

    /// Refuses what nobody has taken out.
    pub(crate) fn none_left(self) -> Result<(), ApiError> {
        match self.map.keys().next() {
            None => Ok(()),
            Some(name) => {
                let path = self.path(name);
                Err(ApiError::invalid(format!("unknown field: {path}")).code("unknown_parameter").param(path))
            }
        }
    }
}

/// How many objects and lists a JSON text has: what opens one, outside of strings.
fn parts(bytes: &[u8]) -> usize {
    let (mut count, mut in_string, mut escaped) = (0, false, false);
    for byte in bytes {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => count += 1,
            _ => {}
        }
    }
    count
}

/// A field that is not what it should be.
pub(crate) fn wrong(path: &str, rule: &str, value: &Value) -> ApiError {
    let text = value.to_string();
    let shown: String = if text.chars().count() > 40 { text.chars().take(40).chain("…".chars()).collect() } else { text };
    ApiError::invalid(format!("{path} must be {rule}, not {shown}")).param(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_counted_outside_of_strings() {
        for (text, count) in [("{}", 1), (r#"{"a": [{"b": "{[\"{"}, []]}"#, 4), (r#""\\" [""#, 1), ("", 0)] {
            assert_eq!(parts(text.as_bytes()), count, "{text}");
        }
        let many = format!("{{\"a\": [{}0]}}", "[],".repeat(PARTS_MAX));
        assert!(Fields::parse(many.as_bytes()).is_err());
    }
}
