//! The node about itself: who it is, its models, peers, store, records, and what it thinks of others.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse as _, Response};
use base::clock::{instant, now_ms};
use net::PeerId;
use net::address::node_id;
use net::records::parse_peer;
use net::status::{self, Account};
use runtime::data_dir::LocalModel;
use runtime::generation::{ModelState, QUEUE_MAX, ReadyModel, TOGETHER_MAX};
use runtime::models::{details, stat_json, summary};
use runtime::opinions::{opinions_json, ruling_word, scores, trusted_peers};
use serde::Deserialize;
use serde_json::{Value, json};

use super::body::BODY_BYTES_MAX;
use super::error::ApiError;
use super::{Api, QueryParams, json_response, loading, lookup, params};

/// What they have said is asked again after this long.
const ACCOUNTS_AGE_MAX: Duration = Duration::from_millis(500);
/// For what peers say of themselves.
const PATIENCE: Duration = Duration::from_secs(2);

pub(super) async fn health(State(api): State<Arc<Api>>) -> Response {
    match api.generation.model() {
        ModelState::Loading(_) if api.generation.models().is_empty() => loading(),
        _ => json_response(json!({"status": "ok"})),
    }
}

pub(super) async fn openapi() -> Response {
    let mut document: Value = serde_json::from_str(include_str!("openapi.json")).expect("the document is JSON");
    document["info"]["version"] = json!(env!("CARGO_PKG_VERSION"));
    json_response(document)
}

pub(super) async fn node(State(api): State<Arc<Api>>) -> Json<Value> {
    let about = &api.about;
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "node": node_id(api.network.local).map(|node| node.to_string()),
        "peer": api.network.local.to_string(),
        "addresses": about.addresses,
        "ticket": about.ticket,
        "clock_offset_s": api.network.records.lock().clock_offset_ms().map(|offset_ms| offset_ms / 1000),
        "key_is_elsewhere": api.network.records.lock().key_is_elsewhere,
        "uptime_s": now_ms().saturating_sub(api.started_ms) / 1000,
        "limits": {
            "ram_bytes": about.ram_bytes, "disk_bytes": about.disk_bytes, "upload_bytes_per_second": about.upload_bytes_per_second,
            "requests_at_once": TOGETHER_MAX, "queue": QUEUE_MAX, "kv_tokens": about.kv_tokens,
            "threads": about.threads_max,
        },
        "model": loaded_json(&api),
        "generation": generation_json(&api),
    }))
}

fn loaded_json(api: &Api) -> Value {
    let of = |found: &LocalModel, state: &str, ready: Option<&ReadyModel>| {
        let decoder = found.manifest.decoder();
        json!({
            "id": found.id.to_string(), "name": found.name, "state": state, "precision": found.manifest.precision_text(),
            "context": ready.map_or(decoder.context as usize, |ready| ready.context),
            "layers": decoder.moe_layers().collect::<Vec<_>>(), "experts_per_layer": decoder.experts(), "experts_per_token": decoder.experts_per_token(),
        })
    };
    match api.generation.model() {
        ModelState::Ready(ready) => of(&ready.found, "ready", Some(&ready)),
        ModelState::Loading(found) => of(&found, "loading", None),
        ModelState::None | ModelState::Failed => Value::Null,
    }
}

pub(super) fn generation_json(api: &Api) -> Value {
    let waiting = api.generation.waiting();
    api.generation.activity().lock().json(waiting)
}

pub(super) async fn models(State(api): State<Arc<Api>>) -> Json<Value> {
    let loaded = api.generation.models();
    let one = |found: &LocalModel| {
        let mut summary = summary(&api.library.open, found);
        summary["loaded"] = json!(loaded.iter().any(|ready| ready.found.id == found.id));
        summary
    };
    Json(api.library.models().iter().map(one).collect())
}

/// The models in memory, and what they take.
pub(super) async fn loaded(State(api): State<Arc<Api>>) -> Json<Value> {
    let models = api.generation.models();
    let mut counts = api.generation.activity().lock();
    let one = |ready: &Arc<ReadyModel>| {
        let of = counts.model(ready.found.id);
        json!({
            "id": ready.found.id.to_string(), "name": ready.found.name, "context": ready.context, "active": of.active,
            "idle_s": of.used.map_or(0, |used| (instant() - used).as_secs()), "trunk_bytes": ready.found.manifest.text().trunk_bytes(),
            "work_bytes": ready.results_bytes, "kv_bytes": of.kv_bytes,
        })
    };
    let models: Vec<_> = models.iter().map(one).collect();
    let machine = api.generation.machine();
    Json(json!({
        "models": models,
        "memory": {
            "experts_bytes": machine.experts().bytes(), "experts_bytes_max": machine.experts().lock().bytes_max(),
            "trunk_bytes": machine.trunk_bytes(), "work_bytes": machine.work_bytes(),
        },
    }))
}

/// Lets a model go.
pub(super) async fn unload(State(api): State<Arc<Api>>, request: Request) -> Result<Json<Value>, Response> {
    let name = api
        .intake
        .read(request, BODY_BYTES_MAX, |mut fields| {
            let name = fields.text("model")?.ok_or_else(|| ApiError::invalid("model is missing").param("model"))?;
            fields.none_left().map(|()| name)
        })
        .await?;
    let unload = || {
        let found = lookup(&api, &name)?;
        let loaded = api.generation.models().iter().any(|ready| ready.found.id == found.id);
        if loaded {
            api.generation.unload(&found, "")?;
        }
        Ok(Json(json!({"id": found.id.to_string(), "name": found.name, "loaded": loaded})))
    };
    unload().map_err(ApiError::into_response)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DetailsQuery {
    #[serde(default)]
    blobs: bool,
}

pub(super) async fn model(
    State(api): State<Arc<Api>>,
    Path(name): Path<String>,
    query: QueryParams<DetailsQuery>,
) -> Result<Json<Value>, ApiError> {
    let query = params(query)?;
    Ok(Json(details(&api.library.open, &lookup(&api, &name)?, query.blobs)))
}

/// Who is connected, and what they say of themselves.
pub(super) async fn peers(State(api): State<Arc<Api>>) -> Json<Value> {
    let network = &api.network;
    let params = network.clone();
    let ask = async move { Some(status::ask_all(&params, PATIENCE).await) };
    let said = api.accounts.get(ACCOUNTS_AGE_MAX, |_| true, ask).await.unwrap_or_default();
    // Who has come since has said nothing yet, and who has gone is not there.
    let of = |peer: &PeerId| said.iter().find(|account| account.peer == *peer).cloned().unwrap_or(Account { peer: *peer, said: None });
    let accounts: Vec<_> = network.peers.borrow().connected.iter().map(of).collect();
    let known = network.peers.borrow().clone();
    let rates = api.rates.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
    let one = |account: &Account| {
        let met = known.met.get(&account.peer);
        let node = node_id(account.peer);
        let ruling = node.and_then(|node| network.records.lock().trust.rulings().get(&node).copied());
        json!({
            "peer": account.peer.to_string(),
            "node": node.map(|node| node.to_string()),
            "address": met.map(|met| met.address.to_string()),
            "source": met.map(|met| met.source.to_string()),
            "connected": true,
            "ruling": ruling.map(ruling_word),
            "bytes_per_second": rates.get(&account.peer),
            "trust": node.map(|node| scores(&network.records, &node)),
            "status": status::json(account),
        })
    };
    Json(accounts.iter().map(one).collect())
}

pub(super) async fn store(State(api): State<Arc<Api>>) -> Result<Json<Value>, ApiError> {
    let stat = api.library.open.store.stat().map_err(base::failure::Failure::from)?;
    Ok(Json(stat_json(&stat)))
}

/// Which records are held, and what came of those that were gossiped.
pub(super) async fn records(State(api): State<Arc<Api>>) -> Json<Value> {
    let (records, now_ms) = (api.network.records.lock(), now_ms());
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

pub(super) async fn trust(State(api): State<Arc<Api>>) -> Json<Value> {
    let records = &api.network.records;
    Json(trusted_peers(records).keys().map(|peer| opinions_json(records, peer)).collect())
}

pub(super) async fn trust_in(State(api): State<Arc<Api>>, Path(peer): Path<String>) -> Result<Json<Value>, ApiError> {
    let peer = parse_peer(&peer)?;
    Ok(Json(opinions_json(&api.network.records, &peer)))
}
