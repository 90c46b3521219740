//! Turning what was asked into tokens, and into the rules at which its answer ends.

use inference::chat::{ChatTemplate, Message};
use inference::generate::GenerateRequest;
use inference::sampler::Sampling;
use inference::tokenizer::{SpecialTokens, Tokenizer};
use protocol::manifest::GenerationDefaults;

use crate::failure::{Failure, Kind};

/// What a model has to do with text.
#[derive(Debug)]
pub(crate) struct ModelText {
    pub(crate) tokenizer: Option<Tokenizer>,
    pub(crate) chat: Option<ChatTemplate>,
}

/// What is to be continued.
pub(crate) enum Prompt<'a> {
    /// Text as it is.
    Raw(&'a str),
    /// A conversation, and the same as plain text for a checkpoint without a template.
    Conversation(&'a [Message], &'a str),
    /// Token ids.
    Tokens(Vec<u32>),
}

/// Why a prompt cannot be answered.
#[derive(Debug)]
pub(crate) enum PromptError {
    /// By its bytes alone it cannot fit.
    TooLong {
        bytes: usize,
        context: usize,
    },
    Failed(Failure),
}

impl<E: Into<Failure>> From<E> for PromptError {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

impl PromptError {
    pub(crate) fn into_failure(self) -> Failure {
        match self {
            Self::TooLong { bytes, context } => {
                Failure::new(Kind::Usage, format!("the prompt has {bytes} bytes, too many for {context} tokens, the model's context"))
            }
            Self::Failed(failure) => failure,
        }
    }
}

/// How the checkpoint's authors sample.
pub(crate) fn default_sampling(defaults: &GenerationDefaults, seed: u64) -> Sampling {
    let GenerationDefaults { temperature, top_p, repetition_penalty, .. } = *defaults;
    Sampling { temperature, top_k: defaults.top_k as usize, top_p, repetition_penalty, seed }
}

impl ModelText {
    /// What is to be generated. A text that cannot fit into `context` tokens is refused before it is looked at.
    pub(crate) fn request(
        &self,
        prompt: &Prompt<'_>,
        (context, tokens_max): (usize, usize),
        sampling: Sampling,
        defaults: &GenerationDefaults,
    ) -> Result<GenerateRequest, PromptError> {
        let encode = |tokenizer: &Tokenizer, text: &str, special| {
            if text.len() > tokenizer.text_bytes_max(context) {
                return Err(PromptError::TooLong { bytes: text.len(), context });
            }
            tokenizer.encode(text, special).map_err(PromptError::from)
        };
        let mut stop_strings = defaults.stop_strings.clone();
        let prompt = match (&self.tokenizer, prompt, &self.chat) {
            (_, Prompt::Tokens(tokens), _) => tokens.clone(),
            (None, Prompt::Raw(text) | Prompt::Conversation(_, text), _) => parse_ids(text)?,
            (Some(tokenizer), Prompt::Conversation(messages, _), Some(chat)) => {
                let text = chat.prompt(messages).map_err(|error| Failure::of(Kind::Other, &error))?;
                stop_strings.extend(chat.next_turn());
                encode(tokenizer, &text, SpecialTokens::AsWritten)?
            }
            (Some(tokenizer), Prompt::Raw(text) | Prompt::Conversation(_, text), _) => encode(tokenizer, text, SpecialTokens::Add)?,
        };
        let eos_token_ids = defaults.eos_token_ids.clone();
        Ok(GenerateRequest { prompt, tokens_max, sampling, eos_token_ids, stop_strings, top_logprobs: None })
    }
}

/// Reads token ids: a JSON array, or numbers with commas or spaces between.
fn parse_ids(text: &str) -> Result<Vec<u32>, Failure> {
    let inner = text.trim().trim_start_matches('[').trim_end_matches(']');
    let ids = inner.split([',', ' ', '\n', '\t']).filter(|part| !part.is_empty()).map(|part| part.parse().map_err(|_| part));
    ids.collect::<Result<_, _>>().map_err(|part| {
        Failure::new(
            Kind::Usage,
            format!("the model has no tokenizer, so the prompt must be token ids, such as [1, 2, 3]; {part:?} is none"),
        )
    })
}
