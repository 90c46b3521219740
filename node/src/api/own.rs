//! The local HTTP API.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::json;
use tokio::net::TcpListener;

use crate::clock::now_ms;
use crate::failure::{Failure, Kind};
use crate::net::network::Network;
use crate::net::status::{self, Account};

/// For what peers say of themselves.
const PATIENCE: Duration = Duration::from_secs(2);

/// Serves the API on `address` until the runtime ends; returns the address that was bound.
pub(crate) async fn serve(address: SocketAddr, network: Network) -> Result<SocketAddr, Failure> {
    let failed = |error: std::io::Error| Failure::new(Kind::Other, format!("cannot serve the API on {address}: {error}"));
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    let router = Router::new()
        .route("/health", get(|| async { Json(json!({"status": "ok"})) }))
        .route("/api/peers", get(peers))
        .route("/api/records", get(records))
        .layer(middleware::from_fn(only_by_address))
        .with_state(network);
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(bound)
}

/// Who is connected, and what they say of themselves.
async fn peers(State(network): State<Network>) -> impl IntoResponse {
    let accounts = status::ask_all(&network, PATIENCE).await;
    let known = network.peers.borrow().clone();
    let one = |account: &Account| {
        let met = known.met.get(&account.peer);
        json!({
            "peer": account.peer.to_string(),
            "address": met.map(|met| met.address.to_string()),
            "source": met.map(|met| met.source.to_string()),
            "connected": true,
            "status": status::json(account),
        })
    };
    Json(accounts.iter().map(one).collect::<Vec<_>>())
}

/// Which records are held, and what came of those that were gossiped.
async fn records(State(network): State<Network>) -> impl IntoResponse {
    let (records, now_ms) = (network.records.lock(), now_ms());
    let heads = records
        .book
        .heads(now_ms)
        .map(|head| json!({"node": head.node().to_string(), "model": head.record().model.to_string(), "seq": head.record().head.seq}));
    Json(json!({
        "heads": heads.collect::<Vec<_>>(),
        "attestations": records.book.attestations(now_ms).count(),
        "nodes": records.book.nodes(now_ms).map(|node| node.node().to_string()).collect::<Vec<_>>(),
        "gossip": records.counts,
    }))
}

/// Refuses requests under a name: a web page may have had its own name resolved to this machine (DNS rebinding).
async fn only_by_address(request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let name = host.rsplit_once(':').filter(|(_, port)| port.bytes().all(|byte| byte.is_ascii_digit())).map_or(host, |(name, _)| name);
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    if name == "localhost" || address.is_ok() {
        return next.run(request).await;
    }
    (StatusCode::FORBIDDEN, Json(json!({"error": format!("{name:?} is no address of this machine")}))).into_response()
}
