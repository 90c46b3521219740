//! Experts of a model: which serve a domain, where each is, who has it.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use net::PeerId;
use net::fetcher::Fetcher;
use runtime::data_dir::LocalModel;
use runtime::specialists::{Subject, by_modality, domain_json, expert_json, map_json, number_of};
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::ApiError;
use super::holders::Holders;
use super::{Api, QueryParams, model_or_default, params};

/// How long an answer to who has what is good for.
const HOLDERS_AGE_MAX: Duration = Duration::from_secs(10);
/// Experts that are listed unless told otherwise.
const TOP_DEFAULT: usize = 10;

/// Where an expert is, as a number of the map.
pub(super) const NOWHERE: u8 = 0;
pub(super) const AT_PEERS: u8 = 1;
pub(super) const ON_DISK: u8 = 2;
pub(super) const IN_MEMORY: u8 = 3;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WhichQuery {
    domain: Option<String>,
    modality: Option<String>,
    model: Option<String>,
    layer: Option<u32>,
    top: Option<usize>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ModelQuery {
    model: Option<String>,
}

pub(super) async fn which(State(api): State<Arc<Api>>, query: QueryParams<WhichQuery>) -> Result<Json<Value>, ApiError> {
    let query = params(query)?;
    let found = model_or_default(&api, query.model.as_deref())?;
    let top = query.top.unwrap_or(TOP_DEFAULT);
    if top == 0 {
        return Err(ApiError::invalid("top must be at least 1").param("top"));
    }
    let subject = Subject::new(query.domain, query.modality.as_deref())?;
    let json = reading(&api, move |api| Ok(domain_json(&api.library.open, &found, &subject, query.layer, top)?)).await?;
    Ok(Json(json))
}

/// Reads from the disk, on a thread on which that may take its time.
async fn reading<T: Send + 'static>(
    api: &Arc<Api>,
    read: impl FnOnce(&Api) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let api = Arc::clone(api);
    let done = tokio::task::spawn_blocking(move || read(&api)).await;
    done.unwrap_or_else(|_| Err(ApiError::server("the node's files could not be read")))
}

pub(super) async fn map(State(api): State<Arc<Api>>, query: QueryParams<ModelQuery>) -> Result<Json<Value>, ApiError> {
    let found = model_or_default(&api, params(query)?.model.as_deref())?;
    let holders = holders(&api, &found).await;
    let json = reading(&api, move |api| {
        let mut map = map_json(&api.library.open, &found)?;
        let usage = api.library.open.dir.usage(found.id, found.manifest.text().experts.len())?;
        map["place"] = json!(places(api, &found, &holders));
        map["holders"] = holders.iter().map(Vec::len).collect();
        map["uses"] = usage.iter().map(|uses| uses.iter().sum::<u64>()).collect();
        map["uses_by_modality"] = by_modality(&found, |modality| json!(usage.iter().map(|uses| uses[modality]).collect::<Vec<_>>()));
        Ok(map)
    });
    Ok(Json(json.await?))
}

/// Where each expert of a model is.
pub(super) fn places(api: &Api, found: &LocalModel, holders: &[Vec<PeerId>]) -> Vec<u8> {
    let in_memory = api.generation.activity().lock().in_memory(found.id);
    let place = |(number, blob): (usize, protocol::BlobRef)| {
        if in_memory.get(number) == Some(&true) {
            IN_MEMORY
        } else if api.library.open.store.contains(&blob.hash) {
            ON_DISK
        } else if holders.get(number).is_some_and(|holders| !holders.is_empty()) {
            AT_PEERS
        } else {
            NOWHERE
        }
    };
    found.manifest.text().experts.iter().map(|expert| expert.blob).enumerate().map(place).collect()
}

/// Who has each expert of a model, as peers said lately.
pub(super) async fn holders(api: &Api, found: &LocalModel) -> Holders {
    let count = found.manifest.text().experts.len();
    if api.network.peers.borrow().connected.is_empty() {
        return Arc::new(vec![Vec::new(); count]);
    }
    // One of its own, for as long as it takes: that of the engine may be busy fetching.
    let (network, timeout, id, manifest) = (api.network.clone(), api.peers.timeout, found.id, Arc::clone(&found.manifest));
    let ask = async move {
        let mut fetcher = Fetcher::new(network, timeout, Arc::default());
        fetcher.follow(&manifest);
        let holders = fetcher.holders(id, &manifest.text().experts.iter().map(|expert| expert.blob).collect::<Vec<_>>()).await.ok()?;
        Some((id, Arc::new(holders)))
    };
    let known = api.holders.0.get(HOLDERS_AGE_MAX, |(of, _)| *of == id, ask).await;
    known.map_or_else(|| Arc::new(vec![Vec::new(); count]), |(_, holders)| holders)
}

pub(super) async fn one(
    State(api): State<Arc<Api>>,
    path: Result<Path<(u32, u32)>, axum::extract::rejection::PathRejection>,
    query: QueryParams<ModelQuery>,
) -> Result<Json<Value>, ApiError> {
    let Path((layer, expert)) = path.map_err(|error| ApiError::invalid(error.body_text()))?;
    let found = model_or_default(&api, params(query)?.model.as_deref())?;
    let number = number_of(&found, layer, expert).map_err(|failure| ApiError::not_found("not_found", failure.message))?;
    let holders = holders(&api, &found).await;
    let json = reading(&api, move |api| {
        let mut json = expert_json(&api.library.open, &found, number)?;
        let holding = holders[number].iter().map(|peer| json!({"peer": peer.to_string(), "trust": api.network.trust_in_bytes(*peer)}));
        json["holders"] = holding.collect();
        json["place"] = json!(places(api, &found, &holders)[number]);
        Ok(json)
    });
    Ok(Json(json.await?))
}
