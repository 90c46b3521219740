//! One sequence on its way through the model: what it has seen, and how it takes in more.

use crate::activation_log::ActivationLog;
use crate::attention::attention;
use crate::experts::{Experts, ExpertsError};
use crate::kernels::{matmul, rms_norm};
use crate::kv_cache::KvCache;
use crate::model::Model;
use crate::moe_layer::feed_forward;
use crate::rope::Position;

/// Tokens that go through the layers together at most: bounds the memory of a prefill, and changes no bit of it.
pub const PREFILL_TOKENS_MAX: usize = 512;

/// A sequence and its keys and values.
#[derive(Debug)]
pub struct Session {
    cache: KvCache,
    past: usize,
}

/// Why tokens could not be taken in. The session is as it was before.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// A token that the model does not have.
    #[error("token {token} is beyond the model's vocabulary of {vocab_size}")]
    Token {
        /// The token's id.
        token: u32,
        /// How many there are.
        vocab_size: u32,
    },
    /// More tokens than the model was made for.
    #[error("sequence of {tokens} tokens is longer than the model's context of {context}")]
    Context {
        /// Tokens there would be.
        tokens: usize,
        /// The most there may be.
        context: usize,
    },
    /// An expert was not to be had.
    #[error(transparent)]
    Experts(#[from] ExpertsError),
}

impl Session {
    /// An empty sequence for `model`.
    pub fn new(model: &Model) -> Self {
        Self { cache: KvCache::new(&model.config), past: 0 }
    }

    /// Tokens taken in so far.
    pub fn tokens(&self) -> usize {
        self.past
    }

    /// Forgets the tokens from `tokens` on, so that another continuation can follow.
    pub fn rewind(&mut self, tokens: usize) {
        self.past = self.past.min(tokens);
        self.cache.truncate(self.past);
    }

    /// Takes in `tokens` and returns their final hidden states, (tokens, hidden_size), for [`logits`].
    pub fn forward(
        &mut self,
        model: &Model,
        tokens: &[u32],
        experts: &mut Experts,
        mut log: Option<&mut ActivationLog>,
    ) -> Result<Vec<f32>, ForwardError> {
        if let Some(&token) = tokens.iter().find(|&&token| token >= model.config.vocab_size) {
            return Err(ForwardError::Token { token, vocab_size: model.config.vocab_size });
        }
        if self.past + tokens.len() > model.context() {
            return Err(ForwardError::Context { tokens: self.past + tokens.len(), context: model.context() });
        }
        let start = self.past;
        let mut hidden = Vec::with_capacity(tokens.len() * model.config.hidden_size as usize);
        for part in tokens.chunks(PREFILL_TOKENS_MAX) {
            match self.layers(model, part, experts, log.as_deref_mut()) {
                Ok(part) => hidden.extend(part),
                Err(error) => {
                    self.rewind(start);
                    return Err(error.into());
                }
            }
        }
        Ok(hidden)
    }

    fn layers(
        &mut self,
        model: &Model,
        tokens: &[u32],
        experts: &mut Experts,
        mut log: Option<&mut ActivationLog>,
    ) -> Result<Vec<f32>, ExpertsError> {
        let hidden_size = model.config.hidden_size as usize;
        let mut x = vec![0.0; tokens.len() * hidden_size]; // (tokens, hidden_size), the residual stream
        for (x, &token) in x.chunks_exact_mut(hidden_size).zip(tokens) {
            model.embed_tokens.view().row(token as usize, x);
        }
        let rotations: Vec<_> = (0..tokens.len()).map(|i| model.rope.at(Position::of_text(self.past + i))).collect();
        for (layer, weights) in model.layers.iter().enumerate() {
            let normed = norm_rows(&x, &weights.input_layernorm, model.eps());
            add(&mut x, &attention(model, layer, &normed, self.past, &rotations, &mut self.cache));
            let normed = norm_rows(&x, &weights.post_attention_layernorm, model.eps());
            add(&mut x, &feed_forward(model, layer, &normed, self.past, experts, log.as_deref_mut())?);
        }
        self.past += tokens.len();
        Ok(norm_rows(&x, &model.norm, model.eps()))
    }
}

/// Returns the logits, (tokens, vocab_size), of final hidden states.
pub fn logits(model: &Model, hidden: &[f32]) -> Vec<f32> {
    matmul(model.lm_head().view(), hidden)
}

fn norm_rows(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    x.chunks_exact(weight.len()).flat_map(|row| rms_norm(row, weight, eps)).collect()
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}
