//! The dashboard's files, which are part of the binary.

use axum::extract::Path;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::error::ApiError;

const PAGE: &str = include_str!("dashboard/index.html");
const SCRIPT: &str = "text/javascript; charset=utf-8";
/// Name, kind and bytes of each.
const FILES: &[(&str, &str, &[u8])] = &[
    ("icon.svg", "image/svg+xml", include_bytes!("dashboard/icon.svg")),
    ("style.css", "text/css; charset=utf-8", include_bytes!("dashboard/style.css")),
    ("api.js", SCRIPT, include_bytes!("dashboard/api.js")),
    ("app.js", SCRIPT, include_bytes!("dashboard/app.js")),
    ("attach.js", SCRIPT, include_bytes!("dashboard/attach.js")),
    ("chart_tools.js", SCRIPT, include_bytes!("dashboard/chart_tools.js")),
    ("chat.js", SCRIPT, include_bytes!("dashboard/chat.js")),
    ("details.js", SCRIPT, include_bytes!("dashboard/details.js")),
    ("dom.js", SCRIPT, include_bytes!("dashboard/dom.js")),
    ("experts.js", SCRIPT, include_bytes!("dashboard/experts.js")),
    ("figures.js", SCRIPT, include_bytes!("dashboard/figures.js")),
    ("format.js", SCRIPT, include_bytes!("dashboard/format.js")),
    ("heatmap.js", SCRIPT, include_bytes!("dashboard/heatmap.js")),
    ("peers.js", SCRIPT, include_bytes!("dashboard/peers.js")),
    ("sparkline.js", SCRIPT, include_bytes!("dashboard/sparkline.js")),
    ("storage.js", SCRIPT, include_bytes!("dashboard/storage.js")),
    ("views.js", SCRIPT, include_bytes!("dashboard/views.js")),
];

pub(super) async fn page() -> Response {
    ([(header::CONTENT_TYPE, "text/html; charset=utf-8"), (header::CACHE_CONTROL, "no-cache")], PAGE).into_response()
}

pub(super) async fn file(Path(name): Path<String>) -> Result<Response, ApiError> {
    let file = FILES.iter().find(|(known, ..)| *known == name);
    let (_, kind, bytes) = file.ok_or_else(|| ApiError::not_found("not_found", format!("the dashboard has no file {name:?}")))?;
    Ok(([(header::CONTENT_TYPE, *kind), (header::CACHE_CONTROL, "no-cache")], *bytes).into_response())
}
