//! What this node says of itself, and what peers say of themselves, with how long they take to say it.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use protocol::message::Subject;
use protocol::status::{Holding, STATUS_BYTES_MAX, Status};
use serde_json::{Value, json};

use crate::PeerId;
use crate::allowed::AllowedPeers;
use crate::ask::{Answered, AskStream};
use crate::network::Network;
use crate::own_models::OwnModels;
use crate::records::SharedRecords;

/// Answers of which the quickest counts: the others had other things on their way.
const ANSWERS: u32 = 3;

/// This node, as it describes itself.
pub struct OwnStatus {
    pub models: Arc<dyn OwnModels>,
    pub records: SharedRecords,
    pub works_for: AllowedPeers,
    pub threads: u16,
    /// For experts that run for others.
    pub memory_bytes: u64,
}

impl OwnStatus {
    /// For one peer, since not everybody may have experts run here.
    pub(crate) fn for_peer(&self, peer: &PeerId) -> Status {
        let (stored_bytes, room_bytes) = self.models.store().stat().map_or((0, 0), |stat| {
            let quota = stat.bytes_max.saturating_sub(stat.bytes);
            (stat.bytes, quota.min(stat.disk_free_bytes))
        });
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            threads: self.threads,
            memory_bytes: self.memory_bytes,
            stored_bytes,
            room_bytes,
            executes: self.works_for.includes(peer),
            holdings: self.models.holdings(),
        }
    }
}

/// What a peer has said, and how long an answer took on a stream that was open.
#[derive(Clone, Debug)]
pub struct Account {
    pub peer: PeerId,
    pub said: Option<(Status, Duration)>,
}

/// Asks all who are connected, each for as long as `patience`.
pub async fn ask_all(network: &Network, patience: Duration) -> Vec<Account> {
    let connected = network.peers.borrow().connected.clone();
    let ask = |peer| async move {
        let said = tokio::time::timeout(patience, ask_one(network, peer)).await;
        Account { peer, said: said.ok().flatten() }
    };
    join_all(connected.into_iter().map(ask)).await
}

async fn ask_one(network: &Network, peer: PeerId) -> Option<(Status, Duration)> {
    let mut asking = AskStream::open(peer, network.streams.clone()).await.ok()?;
    let mut quickest = Duration::MAX;
    let mut status = None;
    for _ in 0..ANSWERS {
        let began = base::clock::instant();
        let Ok(Answered::Bytes(bytes)) = asking.ask(Subject::Status, STATUS_BYTES_MAX).await else { return None };
        quickest = quickest.min(base::clock::instant() - began);
        status = Some(Status::from_bytes(&bytes).ok()?);
    }
    Some((status?, quickest))
}

/// For programs that read it.
pub fn json(account: &Account) -> Value {
    let Some((status, round_trip)) = &account.said else { return Value::Null };
    let holdings: Vec<_> = status
        .holdings
        .iter()
        .map(|held| json!({"name": held.name, "model": held.model.to_string(), "experts": held.experts, "of": held.of}))
        .collect();
    json!({
        "version": status.version,
        "round_trip_ms": round_trip.as_secs_f64() * 1e3,
        "executes": status.executes,
        "threads": status.threads,
        "memory_bytes": status.memory_bytes,
        "stored_bytes": status.stored_bytes,
        "room_bytes": status.room_bytes,
        "holdings": holdings,
    })
}

/// What `/api/peers` says of a peer.
pub fn account_of(json: &Value) -> Option<Account> {
    let peer = json["peer"].as_str()?.parse().ok()?;
    let status = &json["status"];
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let holding = |held: &Value| {
        let (experts, of) = (held["experts"].as_u64()? as u32, held["of"].as_u64()? as u32);
        Some(Holding { name: text(&held["name"])?, model: held["model"].as_str()?.parse().ok()?, experts, of })
    };
    let said = || {
        let said = Status {
            version: text(&status["version"])?,
            threads: status["threads"].as_u64()? as u16,
            memory_bytes: status["memory_bytes"].as_u64()?,
            stored_bytes: status["stored_bytes"].as_u64()?,
            room_bytes: status["room_bytes"].as_u64()?,
            executes: status["executes"].as_bool()?,
            holdings: status["holdings"].as_array()?.iter().filter_map(holding).collect(),
        };
        Some((said, Duration::from_secs_f64(status["round_trip_ms"].as_f64()?.max(0.0) / 1e3)))
    };
    Some(Account { peer, said: said() })
}
