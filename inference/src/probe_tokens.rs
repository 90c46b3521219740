//! A probe as a model reads it: a text, or a question about media with its answer.

use std::sync::Arc;

use protocol::profile::Modality;

use crate::engine::Engine;
use crate::generate::{GenerateError, TowerSource, read};
use crate::media::prompt::MediaPrompt;
use crate::perplexity::negative_log_likelihood;

/// Tokens of a text that are read; what is longer is cut.
pub const PROBE_TOKENS_MAX: usize = 512;
/// Most tokens of a question with its media and its answer.
pub const QUESTION_TOKENS_MAX: usize = 4096;

/// A probe, as a model reads it.
#[derive(Clone, Debug)]
pub struct ProbeTokens {
    /// Its tokens; the answer to a question is the end of them.
    pub tokens: Vec<u32>,
    /// What stands in place of some of them.
    pub media: Option<Arc<MediaPrompt>>,
    /// Where the answer begins, if it is a question.
    pub answer: Option<usize>,
}

impl ProbeTokens {
    /// What each token stands for.
    pub(crate) fn modalities(&self) -> Vec<Modality> {
        let mut modalities = vec![Modality::Text; self.tokens.len()];
        for run in self.media.iter().flat_map(|media| &media.runs) {
            modalities[run.first..][..run.rows.len()].fill(run.source.modality());
        }
        modalities
    }

    /// The first token whose likelihood counts.
    pub(crate) fn scored_from(&self) -> usize {
        self.answer.unwrap_or(1).max(1)
    }
}

/// Reads a probe: negative log-likelihoods of the tokens that are scored, as bits of f64.
pub fn losses(engine: &mut Engine, towers: &mut dyn TowerSource, probe: &ProbeTokens) -> Result<Vec<u64>, GenerateError> {
    let (tokens, from) = (&probe.tokens, probe.scored_from());
    let mut losses = Vec::with_capacity(tokens.len().saturating_sub(from));
    read(engine, towers, (tokens, probe.media.as_ref()), |place, logits| {
        let next = tokens.get(place + 1).filter(|_| place + 1 >= from);
        losses.extend(next.map(|&next| negative_log_likelihood(logits, next).to_bits()));
        Ok::<_, GenerateError>(())
    })?;
    Ok(losses)
}
