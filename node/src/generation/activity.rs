//! What generating comes to, for whoever looks: requests under way, tokens, and where experts were.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use inference::experts::ServedFrom;
use serde_json::{Value, json};

use super::tally::Whereabouts;
use crate::clock::instant;

/// Over which time tokens a second are counted.
const WINDOW: Duration = Duration::from_secs(3);

/// Counts that the worker adds to and the API reads.
#[derive(Debug, Default)]
pub(crate) struct Activity(Mutex<Counts>);

/// Since the start, unless it says otherwise.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// Requests that are being answered now.
    pub(crate) active: usize,
    pub(crate) answers: u64,
    pub(crate) failed: u64,
    /// Requests of clients that went away.
    pub(crate) abandoned: u64,
    pub(crate) tokens: u64,
    pub(crate) prompt_tokens: u64,
    pub(crate) experts: Whereabouts,
    pub(crate) bytes_fetched: u64,
    /// From the request to its first token, of the newest.
    pub(crate) first_token: Option<Duration>,
    /// Sum and number of those times.
    pub(crate) first_tokens: (Duration, u64),
    came: VecDeque<(Instant, u64)>,
    /// By the place of each expert of the model that is loaded: uses since the events were last told, …
    fresh: Vec<u32>,
    /// … uses since it was loaded, …
    pub(crate) uses: Vec<u64>,
    /// … and whether it is in memory.
    pub(crate) in_memory: Vec<bool>,
}

impl Activity {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counts {
    /// Another model is loaded, with so many experts.
    pub(super) fn begin_model(&mut self, experts: usize) {
        self.fresh = vec![0; experts];
        self.uses = vec![0; experts];
        self.in_memory = vec![false; experts];
    }

    pub(super) fn use_expert(&mut self, place: usize, source: ServedFrom) {
        self.experts.add(source);
        self.fresh[place] += 1;
        self.uses[place] += 1;
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
    pub(crate) fn tokens_per_second(&self) -> f64 {
        let now = instant();
        let recent: u64 = self.came.iter().filter(|(at, _)| now - *at <= WINDOW).map(|(_, tokens)| tokens).sum();
        recent as f64 / WINDOW.as_secs_f64()
    }

    /// Uses of experts that have not been told yet, by place; now they have.
    pub(crate) fn take_fresh(&mut self) -> Vec<(usize, u32)> {
        let used = self.fresh.iter_mut().enumerate().filter(|(_, uses)| **uses > 0);
        used.map(|(place, uses)| (place, std::mem::take(uses))).collect()
    }

    pub(crate) fn json(&self, waiting: usize) -> Value {
        let Whereabouts { ram, disk, remote, fetched } = self.experts;
        json!({
            "active": self.active, "waiting": waiting, "answers": self.answers, "failed": self.failed, "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second(),
            "time_to_first_token_ms": self.first_token.map(|time| time.as_secs_f64() * 1e3),
            "experts": {"uses": self.experts.all(), "ram": ram, "disk": disk, "remote": remote, "fetched": fetched},
        })
    }
}
