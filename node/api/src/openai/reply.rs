//! What a client reads of an answer: the objects of OpenAI's API, whole or in chunks.

use inference::generate::{GenerateRequest, Step, StopReason};
use inference::media::prompt::RowSource;
use inference::sampler::TokenLogprobs;
use runtime::generation::{Done, ReadyModel, by_modality_json};
use serde_json::{Value, json};

use super::ask::{Ask, Endpoint};

/// What all objects of one answer share.
pub(crate) struct Reply<'a> {
    ask: &'a Ask,
    model: &'a ReadyModel,
    id: String,
    created: u64,
    /// Characters of text so far, for the offsets of `/v1/completions`.
    offset: usize,
}

/// The text, tokens and probabilities of an answer, or of a piece of it.
#[derive(Clone, Default, Debug)]
pub(crate) struct AnswerPiece {
    pub text: String,
    pub tokens: Vec<u32>,
    pub(crate) logprobs: Vec<TokenLogprobs>,
}

impl AnswerPiece {
    pub(crate) fn add(&mut self, step: Step) {
        self.text.push_str(&step.text);
        self.tokens.extend(step.token);
        self.logprobs.extend(step.logprobs);
    }
}

impl<'a> Reply<'a> {
    /// A reply with an id of its own.
    pub(crate) fn new(ask: &'a Ask, model: &'a ReadyModel, random: u128, now_ms: u64) -> Self {
        let prefix = match ask.endpoint {
            Endpoint::Chat => "chatcmpl",
            Endpoint::Completions => "cmpl",
        };
        Self { ask, model, id: format!("{prefix}-{random:032x}"), created: now_ms / 1000, offset: 0 }
    }

    /// The answer as one object.
    pub(crate) fn whole(&mut self, piece: &AnswerPiece, done: &Done, prompt: PromptTokens) -> Value {
        let reason = finish_reason(done.reason);
        let mut choice = match self.ask.endpoint {
            Endpoint::Chat => {
                json!({"index": 0, "message": {"role": "assistant", "content": piece.text, "refusal": null}, "logprobs": null, "finish_reason": reason})
            }
            Endpoint::Completions => json!({"index": 0, "text": piece.text, "logprobs": null, "finish_reason": reason}),
        };
        self.add_tokens(&mut choice, piece);
        let object = match self.ask.endpoint {
            Endpoint::Chat => "chat.completion",
            Endpoint::Completions => "text_completion",
        };
        let mut whole = self.object(object, &[choice]);
        whole["usage"] = usage(done, prompt, piece.tokens.len());
        whole["timings"] = timings(done, prompt, piece.tokens.len());
        whole
    }

    /// The chunk that opens a conversation's answer; other answers have none.
    pub(crate) fn first_chunk(&self) -> Option<Value> {
        let delta = json!({"role": "assistant", "content": "", "refusal": null});
        (self.ask.endpoint == Endpoint::Chat)
            .then(|| self.chunk(json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": null})))
    }

    /// A chunk with a piece of the answer.
    pub(crate) fn piece_chunk(&mut self, piece: &AnswerPiece) -> Value {
        let mut choice = match self.ask.endpoint {
            Endpoint::Chat => json!({"index": 0, "delta": {"content": piece.text}, "logprobs": null, "finish_reason": null}),
            Endpoint::Completions => json!({"index": 0, "text": piece.text, "logprobs": null, "finish_reason": null}),
        };
        self.add_tokens(&mut choice, piece);
        self.chunk(choice)
    }

    /// The last chunk with a choice.
    pub(crate) fn last_chunk(&self, reason: StopReason) -> Value {
        let reason = finish_reason(reason);
        self.chunk(match self.ask.endpoint {
            Endpoint::Chat => json!({"index": 0, "delta": {}, "logprobs": null, "finish_reason": reason}),
            Endpoint::Completions => json!({"index": 0, "text": "", "logprobs": null, "finish_reason": reason}),
        })
    }

    /// The chunk with the figures.
    pub(crate) fn usage_chunk(&self, done: &Done, prompt: PromptTokens, tokens: usize) -> Value {
        let mut chunk = self.object(self.chunk_object(), &[]);
        chunk["usage"] = usage(done, prompt, tokens);
        chunk["timings"] = timings(done, prompt, tokens);
        chunk
    }

    fn chunk_object(&self) -> &'static str {
        match self.ask.endpoint {
            Endpoint::Chat => "chat.completion.chunk",
            Endpoint::Completions => "text_completion",
        }
    }

    fn chunk(&self, choice: Value) -> Value {
        let mut chunk = self.object(self.chunk_object(), &[choice]);
        if self.ask.include_usage {
            chunk["usage"] = Value::Null; // as OpenAI does in all chunks but the last
        }
        chunk
    }

    fn object(&self, object: &str, choices: &[Value]) -> Value {
        let found = &self.model.found;
        json!({
            "id": self.id, "object": object, "created": self.created, "model": found.name, "system_fingerprint": &found.id.to_string()[..16],
            "choices": choices,
        })
    }

    /// Adds what was asked for of each token.
    fn add_tokens(&mut self, choice: &mut Value, piece: &AnswerPiece) {
        if self.ask.token_ids {
            choice["token_ids"] = json!(piece.tokens);
        }
        if self.ask.top_logprobs.is_some() {
            choice["logprobs"] = match self.ask.endpoint {
                Endpoint::Chat => {
                    json!({"content": piece.logprobs.iter().map(|one| self.chat_logprobs(one)).collect::<Vec<_>>(), "refusal": null})
                }
                Endpoint::Completions => self.completion_logprobs(&piece.logprobs),
            };
        }
    }

    fn chat_logprobs(&self, one: &TokenLogprobs) -> Value {
        let entry = |token: u32, logprob: f64| {
            let bytes = self.bytes(token);
            json!({"token": String::from_utf8_lossy(&bytes), "logprob": logprob, "bytes": bytes})
        };
        let mut all = entry(one.token, one.logprob);
        all["top_logprobs"] = one.top.iter().map(|&(token, logprob)| entry(token, logprob)).collect();
        all
    }

    fn completion_logprobs(&mut self, all: &[TokenLogprobs]) -> Value {
        let text = |token: u32| String::from_utf8_lossy(&self.bytes(token)).into_owned();
        let tokens: Vec<_> = all.iter().map(|one| text(one.token)).collect();
        let top = |one: &TokenLogprobs| -> Value {
            let chosen = std::iter::once((one.token, one.logprob));
            chosen
                .chain(one.top.iter().copied())
                .map(|(token, logprob)| (text(token), json!(logprob)))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        let top: Vec<_> = all.iter().map(top).collect();
        let offsets: Vec<_> = tokens
            .iter()
            .map(|token| {
                let offset = self.offset;
                self.offset += token.chars().count();
                offset
            })
            .collect();
        let logprobs: Vec<_> = all.iter().map(|one| one.logprob).collect();
        json!({"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets})
    }

    fn bytes(&self, token: u32) -> Vec<u8> {
        self.model.text.tokenizer.as_ref().map(|tokenizer| tokenizer.bytes_of(token)).unwrap_or_default()
    }
}

fn finish_reason(reason: StopReason) -> &'static str {
    match reason {
        StopReason::EndOfText | StopReason::StopString | StopReason::Interrupted => "stop",
        StopReason::TokensMax | StopReason::ContextFull => "length",
    }
}

/// Tokens of a prompt, and those of them that keep the places of what is heard and seen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PromptTokens {
    all: usize,
    heard: usize,
    seen: usize,
}

impl PromptTokens {
    pub(crate) fn of(request: &GenerateRequest) -> Self {
        let runs = request.media.iter().flat_map(|media| &media.runs);
        let count = |source: RowSource| runs.clone().filter(|run| run.source == source).map(|run| run.rows.len()).sum();
        Self { all: request.prompt.len(), heard: count(RowSource::Audio), seen: count(RowSource::Vision) }
    }
}

fn usage(done: &Done, prompt: PromptTokens, tokens: usize) -> Value {
    let first = done.experts.first;
    let peers: Vec<_> = done.experts.peers.iter().map(ToString::to_string).collect();
    json!({
        "prompt_tokens": prompt.all, "completion_tokens": tokens, "total_tokens": prompt.all + tokens,
        "prompt_tokens_details": {"cached_tokens": done.cached, "audio_tokens": prompt.heard, "x_vision_tokens": prompt.seen},
        "x_experts": {"needed": first.all(), "ram": first.ram, "disk": first.disk, "remote": first.remote, "fetched": first.fetched,
                      "bytes_fetched": done.bytes_fetched, "peers": peers, "by_modality": by_modality_json(&done.experts.by_modality)},
    })
}

fn timings(done: &Done, prompt: PromptTokens, tokens: usize) -> Value {
    let (prefill, decode) = (done.prefill.as_secs_f64(), done.decode.as_secs_f64());
    let taken_in = prompt.all - done.cached;
    let rate = |count: usize, seconds: f64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
    json!({
        "cache_n": done.cached, "prompt_n": taken_in, "prompt_ms": prefill * 1e3, "prompt_per_second": rate(taken_in, prefill),
        "predicted_n": tokens, "predicted_ms": decode * 1e3,
        // The first token comes with the prompt.
        "predicted_per_second": rate(tokens.saturating_sub(1), decode),
        "queued_ms": done.queued.as_secs_f64() * 1e3,
    })
}
