//! How well a model predicts a text.
//!
//! A document is cut into windows of the model's context length that do not overlap; the first token of each
//! is not scored. Bytes are those of the scored tokens.

use std::ops::AddAssign;

use crate::engine::{Engine, ForwardError};
use crate::sampler::NotFinite;
use crate::tokenizer::{SpecialTokens, Tokenizer, TokenizerError};

/// The sum over all scored tokens.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct PerplexityReport {
    /// Tokens that were scored.
    pub tokens: u64,
    /// Their text's length in bytes.
    pub bytes: u64,
    /// Their negative log-likelihood.
    pub nats: f64,
}

impl AddAssign for PerplexityReport {
    fn add_assign(&mut self, other: Self) {
        self.tokens += other.tokens;
        self.bytes += other.bytes;
        self.nats += other.nats;
    }
}

impl PerplexityReport {
    /// Negative log-likelihood of a token, in nats.
    pub fn nats_per_token(&self) -> f64 {
        self.nats / self.tokens as f64
    }

    /// Bits that it takes to write a byte of this text with this model's help.
    pub fn bits_per_byte(&self) -> f64 {
        self.nats / std::f64::consts::LN_2 / self.bytes as f64
    }
}

/// Why a text could not be scored.
#[derive(Debug, thiserror::Error)]
pub enum PerplexityError {
    /// No window has two tokens.
    #[error("the text is too short: no token of it can be scored")]
    TooShort,
    /// The text is no text to the tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The model could not take it in.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// The model's output is broken.
    #[error(transparent)]
    NotFinite(#[from] NotFinite),
    /// The caller broke off.
    #[error("interrupted")]
    Interrupted,
}

/// Scores one document; `on_progress` is told the bytes dealt with and answers whether to go on.
pub fn perplexity(
    engine: &mut Engine,
    tokenizer: &Tokenizer,
    document: &str,
    mut on_progress: impl FnMut(u64) -> bool,
) -> Result<PerplexityReport, PerplexityError> {
    let mut report = PerplexityReport::default();
    let mut done = 0;
    let tokens = tokenizer.encode(document, SpecialTokens::AsWritten)?;
    for window in tokens.chunks(engine.context()) {
        score(engine, tokenizer, window, &mut report)?;
        done += window.iter().map(|&token| tokenizer.token_bytes(token) as u64).sum::<u64>();
        if !on_progress(done) {
            return Err(PerplexityError::Interrupted);
        }
    }
    if report.tokens == 0 { Err(PerplexityError::TooShort) } else { Ok(report) }
}

fn score(engine: &mut Engine, tokenizer: &Tokenizer, window: &[u32], report: &mut PerplexityReport) -> Result<(), PerplexityError> {
    if window.len() < 2 {
        return Ok(());
    }
    let vocab_size = engine.model().decoder().vocab_size;
    if let Some(&token) = window.iter().find(|&&token| token >= vocab_size) {
        return Err(ForwardError::Token { token, vocab_size }.into());
    }
    let mut session = engine.session();
    engine.forward_each(&mut session, &window[..window.len() - 1], |place, logits| {
        if let Some(token) = logits.iter().position(|logit| !logit.is_finite()) {
            return Err(PerplexityError::from(NotFinite { token }));
        }
        let target = window[place + 1];
        report.nats += negative_log_likelihood(logits, target);
        report.tokens += 1;
        report.bytes += tokenizer.token_bytes(target) as u64;
        Ok(())
    })
}

/// ln Σ exp(logits) − logit of `target`, summed in f64.
pub(crate) fn negative_log_likelihood(logits: &[f32], target: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // libm's are the same bits on every platform.
    let sum: f64 = logits.iter().map(|&logit| libm::exp(f64::from(logit - max))).sum();
    libm::log(sum) + f64::from(max) - f64::from(logits[target as usize])
}
