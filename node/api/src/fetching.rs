//! Joining a peer and pulling models while the node serves.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::response::{IntoResponse as _, Response};
use base::failure::{Failure, Kind};
use net::ask::{Answered, ask};
use protocol::message::{Listing, RANGE_BYTES_MAX, Subject};
use protocol::ticket::Ticket;
use runtime::data_dir::LocalModel;
use runtime::federation::Federation;
use runtime::models::pulled_json;
use runtime::pulling::{self, Introduced, PullScope, introduce, learn};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::task::spawn_blocking;

use super::body::{BODY_BYTES_MAX, Fields};
use super::error::ApiError;
use super::{Api, sse};

/// How long a peer that was joined may take to answer.
const JOIN_PATIENCE: Duration = Duration::from_secs(10);
/// How often it is said how far a pull is.
const PROGRESS_PAUSE: Duration = Duration::from_millis(250);

/// Peers for one request, which its client may give up; the engine's own fetcher may be busy.
fn federation(api: &Api, client: watch::Receiver<()>) -> Federation {
    let runtime = tokio::runtime::Handle::current();
    Federation::over(&runtime, api.network.clone(), &api.library.open.dir, api.group.clone(), &api.peers).for_client(client)
}

/// Has the models that are here now offered to others, too.
async fn offer(api: &Api) {
    api.library.refresh();
    api.network.offer(api.library.models().iter().map(|found| found.id).collect()).await;
}

pub(super) async fn join(State(api): State<Arc<Api>>, request: Request) -> Result<Json<Value>, Response> {
    let ticket: Ticket = api
        .intake
        .read(request, BODY_BYTES_MAX, |mut fields| {
            let missing = || ApiError::invalid("ticket is missing").param("ticket");
            let ticket = fields.text("ticket")?.ok_or_else(missing)?;
            fields.none_left()?;
            ticket.parse().map_err(|error| ApiError::invalid(format!("{error}")).param("ticket"))
        })
        .await?;
    join_by(&api, &ticket).await.map(Json).map_err(ApiError::into_response)
}

async fn join_by(api: &Api, ticket: &Ticket) -> Result<Value, ApiError> {
    let Introduced { node, peer, addresses } = introduce(&api.library.open.dir, ticket, &[])?;
    api.network.stay_with(addresses).await;
    let mut peers = api.network.peers.clone();
    let connected = tokio::time::timeout(JOIN_PATIENCE, peers.wait_for(|peers| peers.connected.contains(&peer))).await;
    let is_connected = connected.is_ok_and(|connected| connected.is_ok());
    let listing = if is_connected {
        ask(peer, api.network.streams.clone(), Subject::Listing, u64::from(RANGE_BYTES_MAX)).await
    } else {
        Answered::NotHave
    };
    let listing = match listing {
        Answered::Bytes(bytes) => Listing::from_bytes(&bytes).map_err(|error| error.to_string()),
        Answered::NotHave => Err("it cannot be reached".to_owned()),
        Answered::Wrong(why) => Err(format!("it {why}")),
        Answered::Broken(error) => Err(error.to_string()),
    };
    let (models, silent) = match listing {
        Err(why) => (Vec::new(), Some(why)),
        Ok(listing) => {
            let (_client, waiting) = watch::channel(());
            let (federation, library) = (federation(api, waiting), Arc::clone(&api.library));
            let learnt = spawn_blocking(move || learn(&library.open, &federation, listing)).await;
            (learnt.map_err(|_| ApiError::server("the models could not be learnt"))??, None)
        }
    };
    offer(api).await;
    let models: Vec<_> = models.iter().map(|model| json!({"name": model.name, "id": model.id.to_string()})).collect();
    Ok(json!({"node": node.to_string(), "models": models, "silent": silent}))
}

/// What is to be pulled.
struct Pull {
    model: String,
    name: Option<String>,
    part: PullScope,
}

impl Pull {
    fn parse(mut fields: Fields) -> Result<Self, ApiError> {
        let model = fields.text("model")?.ok_or_else(|| ApiError::invalid("model is missing").param("model"))?;
        let (name, trunk, domain) = (fields.text("name")?, fields.flag("trunk")?, fields.text("domain")?);
        let part = match (trunk, domain, fields.count("experts_bytes", (0, u64::MAX))?) {
            (false, Some(domain), bytes_max) => PullScope::Domain(domain, bytes_max),
            (false, None, Some(bytes_max)) => PullScope::Rarest(bytes_max),
            (false, None, None) => PullScope::All,
            (true, None, None) => PullScope::Trunk,
            (true, ..) => return Err(ApiError::invalid("trunk goes with neither experts_bytes nor domain").param("trunk")),
        };
        fields.none_left()?;
        Ok(Self { model, name, part })
    }
}

pub(super) async fn pull(State(api): State<Arc<Api>>, request: Request) -> Result<Response, Response> {
    let pull = api.intake.read(request, BODY_BYTES_MAX, Pull::parse).await?;
    let (events, told) = mpsc::channel::<Bytes>(4);
    tokio::spawn(async move {
        let said = match pulled(&api, pull, &events).await {
            Ok(pulled) => sse::data(&pulled) + sse::DONE,
            Err(error) => sse::error(&error),
        };
        let _ = events.send(Bytes::from(said)).await;
    });
    Ok(sse::of(told))
}

/// Pulls, and says now and then how far it is; gives up when nobody listens.
async fn pulled(api: &Arc<Api>, pull: Pull, events: &mpsc::Sender<Bytes>) -> Result<Value, ApiError> {
    let (client, waiting) = watch::channel(());
    let federation = federation(api, waiting);
    let (_, progress) = federation.figures();
    api.transfers.add(Arc::clone(&progress));
    let (library, disk_max) = (Arc::clone(&api.library), api.about.disk_bytes.unwrap_or(u64::MAX));
    let mut work = spawn_blocking(move || -> Result<(LocalModel, u64), Failure> {
        let found = federation.find(&library.open, &pull.model, pull.name.as_deref())?;
        let bytes = pulling::pull(&federation, &library.open, &found, &pull.part, disk_max)?;
        Ok((found, bytes))
    });
    let done = loop {
        tokio::select! {
            done = &mut work => break done,
            () = tokio::time::sleep(PROGRESS_PAUSE) => {}
            () = events.closed() => {
                drop(client);
                break work.await;
            }
        }
        let now = progress.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(one) = now {
            let _ = events.try_send(Bytes::from(sse::data(&one.json()))); // a slow client misses some
        }
    };
    api.transfers.remove(&progress);
    let done = done.unwrap_or_else(|_| Err(Failure::new(Kind::Other, "the pull broke off")));
    let (found, bytes) = done?;
    offer(api).await;
    Ok(pulled_json(&api.library.open, &found, bytes))
}
