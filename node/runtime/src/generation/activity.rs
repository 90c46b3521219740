//! What generating comes to, for whoever looks: requests under way, tokens, and where experts were.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base::clock::instant;
use inference::expert_use::ServedFrom;
use protocol::ModelId;
use protocol::profile::Modality;
use serde_json::{Value, json};

use super::tally::Whereabouts;
use crate::usage::Uses;

/// Over which time tokens a second are counted.
const WINDOW: Duration = Duration::from_secs(3);

/// Counts that the worker adds to and the API reads.
#[derive(Debug, Default)]
pub struct Activity(Mutex<ActivityCounts>);

/// Since the start, unless it says otherwise.
#[derive(Debug, Default)]
pub struct ActivityCounts {
    pub answers: u64,
    pub failed: u64,
    /// Requests of clients that went away.
    pub abandoned: u64,
    pub tokens: u64,
    pub prompt_tokens: u64,
    pub experts: Whereabouts,
    pub bytes_fetched: u64,
    /// From the request to its first token, of the newest.
    pub first_token: Option<Duration>,
    /// Sum and number of those times.
    pub first_tokens: (Duration, u64),
    came: VecDeque<(Instant, u64)>,
    /// Of each model that is loaded.
    models: BTreeMap<ModelId, ModelCounts>,
}

/// Of one model since it was loaded.
#[derive(Debug, Default)]
pub struct ModelCounts {
    /// Requests that are being answered now.
    pub active: usize,
    /// When that number last changed.
    pub used: Option<Instant>,
    /// Bytes that keys and values take.
    pub kv_bytes: u64,
    /// By the place of each expert: uses since the events were last told, …
    fresh: Vec<[u32; 3]>,
    /// … all uses, …
    pub uses: Vec<Uses>,
    /// … and whether it is in memory.
    pub in_memory: Vec<bool>,
}

impl Activity {
    pub fn lock(&self) -> MutexGuard<'_, ActivityCounts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ActivityCounts {
    /// A model is loaded, with so many experts.
    pub(super) fn begin_model(&mut self, model: ModelId, experts: usize) {
        let used = Some(instant());
        let (fresh, uses, in_memory) = (vec![Default::default(); experts], vec![Uses::default(); experts], vec![false; experts]);
        let counts = ModelCounts { active: 0, used, kv_bytes: 0, fresh, uses, in_memory };
        self.models.insert(model, counts);
    }

    /// It is loaded no more.
    pub(super) fn end_model(&mut self, model: ModelId) {
        self.models.remove(&model);
    }

    /// What is counted of a model; nothing of one that is not loaded.
    pub fn model(&mut self, model: ModelId) -> &mut ModelCounts {
        self.models.entry(model).or_default()
    }

    /// Whether each expert of a model is in memory, by place; nothing of one that is not loaded.
    pub fn in_memory(&self, model: ModelId) -> Vec<bool> {
        self.models.get(&model).map_or_else(Vec::new, |counts| counts.in_memory.clone())
    }

    /// Requests that are being answered now.
    pub fn active(&self) -> usize {
        self.models.values().map(|counts| counts.active).sum()
    }

    pub(super) fn use_expert(&mut self, model: ModelId, place: usize, modality: Modality, source: ServedFrom) {
        self.experts.add(source);
        let counts = self.model(model);
        counts.fresh[place][modality as usize] += 1;
        counts.uses[place][modality as usize] += 1;
    }

    pub(super) fn tokens_came(&mut self, tokens: u64) {
        self.tokens += tokens;
        let now = instant();
        self.came.push_back((now, tokens));
        while self.came.front().is_some_and(|(at, _)| now - *at > WINDOW) {
            self.came.pop_front();
        }
    }

    pub(super) fn first_token_came(&mut self, after: Duration) {
        self.first_token = Some(after);
        self.first_tokens = (self.first_tokens.0 + after, self.first_tokens.1 + 1);
    }

    /// Over the last seconds.
    pub fn tokens_per_second(&self) -> f64 {
        let now = instant();
        let recent: u64 = self.came.iter().filter(|(at, _)| now - *at <= WINDOW).map(|(_, tokens)| tokens).sum();
        recent as f64 / WINDOW.as_secs_f64()
    }

    /// Uses of experts of a model that have not been told yet, by place, and by [`Modality`] of the tokens; now they have.
    pub fn take_fresh(&mut self, model: ModelId) -> Vec<(usize, [u32; 3])> {
        let used = self.model(model).fresh.iter_mut().enumerate().filter(|(_, uses)| uses.iter().any(|&uses| uses > 0));
        used.map(|(place, uses)| (place, std::mem::take(uses))).collect()
    }

    pub fn json(&self, waiting: usize) -> Value {
        let Whereabouts { ram, disk, remote, fetched } = self.experts;
        json!({
            "active": self.active(), "waiting": waiting, "answers": self.answers, "failed": self.failed, "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second(),
            "time_to_first_token_ms": self.first_token.map(|time| time.as_secs_f64() * 1e3),
            "experts": {"uses": self.experts.all(), "ram": ram, "disk": disk, "remote": remote, "fetched": fetched},
        })
    }
}
