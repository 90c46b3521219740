//! What goes on, told at most twice a second to whoever listens.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::response::Response;
use base::clock::now_ms;
use protocol::profile::Modality;
use runtime::generation::ModelState;
use runtime::models::stat_json;
use serde_json::json;
use tokio::sync::broadcast;

use super::experts::{holders, places};
use super::own::generation_json;
use super::{Api, sse};

const PAUSE: Duration = Duration::from_millis(500);
/// Events that a slow listener may be behind; then it misses some.
const BEHIND_MAX: usize = 8;
/// Experts that are told of in one event.
const USED_MAX: usize = 8192;

/// Events as they are made, for everybody who listens.
#[derive(Clone)]
pub(super) struct Events(broadcast::Sender<Bytes>);

impl Events {
    pub(super) fn start(api: Arc<Api>) -> Self {
        let (sender, _) = broadcast::channel(BEHIND_MAX);
        let mut stopping = api.stopping.clone();
        let made = sender.clone();
        tokio::spawn(async move {
            let mut maker = Maker { api, model: None, told: Vec::new() };
            loop {
                tokio::select! {
                    () = tokio::time::sleep(PAUSE) => {}
                    _ = stopping.changed() => break,
                }
                if made.receiver_count() > 0 {
                    let _ = made.send(maker.event().await);
                }
            }
        });
        Self(sender)
    }

    /// A response that goes on until its client or the node ends.
    pub(super) fn stream(&self) -> Response {
        let body = Body::from_stream(futures::stream::unfold(self.0.subscribe(), |mut listener| async {
            loop {
                match listener.recv().await {
                    Ok(event) => return Some((Ok::<_, Infallible>(event), listener)),
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return None,
                }
            }
        }));
        sse::response(body)
    }
}

/// Makes one event after another.
struct Maker {
    api: Arc<Api>,
    model: Option<protocol::ModelId>,
    /// Where experts were, as last told.
    told: Vec<u8>,
}

impl Maker {
    async fn event(&mut self) -> Bytes {
        let (found, loading) = match self.api.generation.model() {
            ModelState::Ready(ready) => (Some(ready.found.clone()), None),
            ModelState::Loading(found) => (None, Some(found.id)),
            ModelState::None | ModelState::Failed => (None, None),
        };
        let mut changed = Vec::new();
        if let Some(found) = &found {
            let holders = holders(&self.api, found).await;
            let (api, of) = (Arc::clone(&self.api), found.clone());
            let now = tokio::task::spawn_blocking(move || places(&api, &of, &holders)).await.unwrap_or_default();
            if self.model == Some(found.id) {
                changed = now
                    .iter()
                    .zip(&self.told)
                    .enumerate()
                    .filter(|(_, (now, told))| now != told)
                    .map(|(at, (now, _))| (at, *now))
                    .collect();
            }
            self.told = now;
        }
        self.model = found.as_ref().map(|found| found.id);
        let mut used = self.model.map(|model| self.api.generation.activity().lock().take_fresh(model)).unwrap_or_default();
        used.truncate(USED_MAX);
        let [image, audio] = [Modality::Image, Modality::Audio].map(|modality| modality as usize);
        let used: Vec<_> = used
            .iter()
            .map(|(expert, uses)| {
                [*expert as u64, uses.iter().copied().map(u64::from).sum(), u64::from(uses[image]), u64::from(uses[audio])]
            })
            .collect();
        let store = self.api.library.open.store.stat().ok().map(|stat| stat_json(&stat));
        let event = json!({
            "time_ms": now_ms(), "model": self.model.or(loading).map(|id| id.to_string()), "generation": generation_json(&self.api), "used": used,
            "place": changed, "transfers": self.api.transfers.json(), "store": store, "peers": self.api.network.peers.borrow().connected.len(),
        });
        Bytes::from(format!("event: state\n{}", sse::data(&event)))
    }
}
