//! Prompt in, answer out, token by token.

use std::ops::ControlFlow;

use crate::engine::{Engine, ForwardError};
use crate::experts::ExpertUse;
use crate::sampler::{NotFinite, Sampling, sample};
use crate::session::Session;
use crate::tokenizer::{Tokenizer, TokenizerError};

/// What to answer and when to stop.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    /// Tokens to answer, from the beginning of the sequence; those that the session has seen are not taken in again.
    pub prompt: Vec<u32>,
    /// Tokens of answer at most.
    pub tokens_max: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens that end the answer; they are not part of it.
    pub eos_token_ids: Vec<u32>,
    /// Texts that end the answer; they are not part of its text.
    pub stop_strings: Vec<String>,
}

/// Something that happened on the way.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Progress {
    /// The prompt has been taken in; the experts that it took.
    Prefilled(ExpertUse),
    /// The answer has grown by a token, and its text by this; the experts that it has taken so far.
    Token(String, ExpertUse),
}

/// Why an answer ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StopReason {
    /// The model ended it.
    EndOfText,
    /// A stop string came.
    StopString,
    /// As many tokens as were asked for.
    TokensMax,
    /// The model's context is full.
    ContextFull,
    /// The caller broke off.
    Interrupted,
}

/// An answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Generated {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Its text; empty without a tokenizer.
    pub text: String,
    /// Why it ended.
    pub stop_reason: StopReason,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// Nothing to answer.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// No room for an answer.
    #[error("the prompt has {tokens} tokens, the model's context is {context}")]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Tokens that the model can take.
        context: usize,
    },
    /// The model could not take a token in.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// The model's output is broken.
    #[error(transparent)]
    NotFinite(#[from] NotFinite),
    /// Tokens that are no text.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// Answers `request` in `session`; `on_progress` may break off after any token.
pub fn generate(
    engine: &mut Engine,
    tokenizer: Option<&Tokenizer>,
    session: &mut Session,
    request: &GenerateRequest,
    mut on_progress: impl FnMut(Progress) -> ControlFlow<()>,
) -> Result<Generated, GenerateError> {
    let total = request.prompt.len();
    if total <= session.tokens() {
        return Err(GenerateError::EmptyPrompt);
    }
    if total >= engine.context() {
        return Err(GenerateError::PromptTooLong { tokens: total, context: engine.context() });
    }
    let mut seen = request.prompt.clone();
    seen.reserve(request.tokens_max.min(engine.context()));
    engine.forward(session, &request.prompt[session.tokens()..])?;
    let mut answer = Answer { tokens: Vec::new(), text: StopText::new(&request.stop_strings), stream: tokenizer.map(Tokenizer::stream) };
    let mut go_on = on_progress(Progress::Prefilled(engine.experts().usage()));
    let stop_reason = loop {
        if go_on.is_break() {
            break StopReason::Interrupted;
        }
        if answer.tokens.len() >= request.tokens_max {
            break StopReason::TokensMax;
        }
        let token = sample(&request.sampling, engine.logits(0), &seen)?;
        if request.eos_token_ids.contains(&token) {
            break StopReason::EndOfText;
        }
        seen.push(token);
        let (text, stopped) = answer.push(token)?;
        go_on = on_progress(Progress::Token(text, engine.experts().usage()));
        if stopped {
            break StopReason::StopString;
        }
        if session.tokens() >= engine.context() {
            break StopReason::ContextFull;
        }
        engine.forward(session, &[token])?;
    };
    let Answer { tokens, mut text, stream } = answer;
    let mut rest = String::new();
    let mut stopped = stop_reason == StopReason::StopString;
    if let (Some(stream), false) = (stream, stopped) {
        (rest, stopped) = text.push(&stream.finish()?);
    }
    if !stopped {
        rest.push_str(&text.release());
    }
    if !rest.is_empty() {
        let _ = on_progress(Progress::Token(rest, engine.experts().usage()));
    }
    Ok(Generated { tokens, text: text.shown, stop_reason: if stopped { StopReason::StopString } else { stop_reason } })
}

struct Answer<'a> {
    tokens: Vec<u32>,
    text: StopText<'a>,
    stream: Option<crate::tokenizer::TextStream<'a>>,
}

impl Answer<'_> {
    fn push(&mut self, token: u32) -> Result<(String, bool), TokenizerError> {
        self.tokens.push(token);
        let Some(stream) = &mut self.stream else { return Ok((String::new(), false)) };
        let text = stream.push(token)?;
        Ok(self.text.push(&text))
    }
}

/// Text with its end held back while it might still become a stop string.
struct StopText<'a> {
    stops: &'a [String],
    shown: String,
    held: String,
}

impl<'a> StopText<'a> {
    fn new(stops: &'a [String]) -> Self {
        Self { stops, shown: String::new(), held: String::new() }
    }

    /// Adds text; returns what may be shown, and whether a stop string has come.
    fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(at) = found {
            self.held.truncate(at);
            return (self.release(), true);
        }
        let starts = |from: usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[from..]));
        let keep = self.held.char_indices().map(|(at, _)| at).find(|&at| starts(at)).unwrap_or(self.held.len());
        let rest = self.held.split_off(keep);
        let text = self.release();
        self.held = rest;
        (text, false)
    }

    /// Shows what was held back.
    fn release(&mut self) -> String {
        self.shown.push_str(&self.held);
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_back_only_what_may_become_a_stop_string() {
        let stops = ["\nUSER:".to_owned(), "END".to_owned()];
        let mut text = StopText::new(&stops);
        assert_eq!(text.push("one\n"), ("one".into(), false));
        assert_eq!(text.push("two\nUS"), ("\ntwo".into(), false));
        assert_eq!(text.push("é E"), ("\nUSé ".into(), false));
        assert_eq!(text.push("N"), (String::new(), false));
        assert_eq!(text.push("Dure"), (String::new(), true));
        assert_eq!(text.shown, "one\ntwo\nUSé ");
    }

    #[test]
    fn what_was_held_back_is_not_lost() {
        let stops = ["END".to_owned()];
        let mut text = StopText::new(&stops);
        assert_eq!(text.push("the EN"), ("the ".into(), false));
        assert_eq!((text.release(), text.shown), ("EN".into(), "the EN".into()));
    }
}
