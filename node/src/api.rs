//! The local HTTP API.

use std::net::SocketAddr;

use axum::routing::get;
use axum::{Json, Router};
use serde_json::json;
use tokio::net::TcpListener;

use crate::failure::{Failure, Kind};

/// Serves the API on `address` until the runtime ends; returns the address that was bound.
pub(crate) async fn serve(address: SocketAddr) -> Result<SocketAddr, Failure> {
    let failed = |error: std::io::Error| Failure::new(Kind::Other, format!("cannot serve the API on {address}: {error}"));
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    let router = Router::new().route("/health", get(|| async { Json(json!({"status": "ok"})) }));
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(bound)
}
