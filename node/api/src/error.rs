//! What a client reads when a request is not answered: OpenAI's shape.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base::failure::{Failure, Kind};
use runtime::generation::Stopped;
use serde_json::{Value, json};

/// An error with its status.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct ApiError {
    pub status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    message: String,
    param: Option<String>,
    /// Seconds after which it may be tried again.
    retry_after: Option<u32>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, code: None, message: message.into(), param: None, retry_after: None }
    }

    /// The request is wrong.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::with_status(StatusCode::BAD_REQUEST, message)
    }

    /// The request is wrong in a way that has a status of its own.
    pub(crate) fn with_status(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, "invalid_request_error", message)
    }

    pub(crate) fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message).code("invalid_api_key")
    }

    pub(crate) fn forbidden(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", message).code(code)
    }

    pub(crate) fn not_found(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found_error", message).code(code)
    }

    pub(crate) fn server(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    pub(crate) fn unavailable(code: &'static str, message: impl Into<String>, retry_after: Option<u32>) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable_error", message).code(code);
        Self { retry_after, ..error }
    }

    pub(crate) fn code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// Says which field it is about.
    pub(crate) fn param(self, param: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..self }
    }

    pub(crate) fn json(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.json())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        match failure.kind {
            Kind::Usage => Self::invalid(failure.message),
            Kind::NotFound => Self::not_found("not_found", failure.message),
            Kind::NoPeers => Self::unavailable("no_peers", failure.message, None),
            Kind::Refused => Self::forbidden("not_trusted", failure.message),
            Kind::Busy | Kind::Interrupted => Self::unavailable("stopping", failure.message, Some(10)),
            Kind::Unread | Kind::Other | Kind::Integrity | Kind::Disk => Self::server(failure.message),
        }
    }
}

impl From<Stopped> for ApiError {
    fn from(stopped: Stopped) -> Self {
        match stopped {
            Stopped::QueueFull => {
                let error =
                    Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "too many requests are waiting").code("queue_full");
                Self { retry_after: Some(2), ..error }
            }
            Stopped::Loading => Self::unavailable("loading", "the model is being loaded", Some(5)),
            Stopped::Stopping => Self::unavailable("stopping", "this node is about to stop", Some(10)),
            Stopped::Failed(failure) => failure.into(),
        }
    }
}
