//! Turning what was asked into tokens, and into the rules at which its answer ends.

use std::fmt;
use std::sync::Arc;

use base::clock::now_ms;
use base::failure::{Failure, Kind};
use inference::chat::{ChatError, ChatTemplate, Content, ContentPart, Message, Rendering, Role};
use inference::generate::GenerateRequest;
use inference::media::prompt::{Layout, LayoutError, MediaPrompt, PreparedMedium, lay_out};
use inference::sampler::Sampling;
use inference::tokenizer::{SpecialTokens, Tokenizer, TokenizerError};
use protocol::manifest::GenerationDefaults;
use protocol::towers::{Audio, Vision};

use crate::sandbox::{self, RenderError};

/// Longest prompt that a template may make, in bytes, and longest short conversation.
const RENDERED_BYTES_MAX: usize = 32 << 20;
const NEXT_TURN_BYTES_MAX: usize = 256 << 10;

/// What a model has to do with text.
#[derive(Debug)]
pub struct ModelText {
    pub tokenizer: Option<Arc<Tokenizer>>,
    pub chat: Option<Chat>,
    /// The shape of its eyes, if it has any.
    pub vision: Option<Vision>,
    /// The shape of its ears, if it has any.
    pub audio: Option<Audio>,
}

/// A chat template, as it is used.
#[derive(Debug)]
pub struct Chat {
    template: ChatTemplate,
    /// What comes between an answer and the user's next turn, or why the template cannot be used.
    next_turn: Result<Option<String>, TemplateFault>,
}

/// Why a template cannot be used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TemplateFault {
    /// It has an error.
    Fails(String),
    /// It takes more than any template may.
    Exceeds(String),
}

impl fmt::Display for TemplateFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Fails(why) | Self::Exceeds(why)) = self;
        f.write_str(why)
    }
}

impl Chat {
    /// Tries a template on a short conversation: one that cannot be used is known before anybody chats.
    pub fn new(template: ChatTemplate) -> Self {
        let mut broken = None;
        let next_turn = ChatTemplate::next_turn(|messages| {
            let rendered = sandbox::render(&template, messages, rendering(false, NEXT_TURN_BYTES_MAX));
            rendered.map_err(|error| broken = TemplateFault::of(error)).ok()
        });
        Self { template, next_turn: broken.map_or(Ok(next_turn), Err) }
    }

    /// Whether the template says nothing of what the system says, and takes such a conversation all the same.
    pub fn leaves_out_system(&self) -> bool {
        const RULE: &str = "\u{1}rule\u{1}";
        let messages = [(Role::System, RULE), (Role::User, "hello")].map(|(role, content)| Message::text(role, content));
        sandbox::render(&self.template, &messages, rendering(true, NEXT_TURN_BYTES_MAX)).is_ok_and(|text| !text.contains(RULE))
    }

    /// Why the template cannot be used, if that is so.
    pub fn fault(&self) -> Option<&TemplateFault> {
        self.next_turn.as_ref().err()
    }
}

impl TemplateFault {
    /// Of an error; a template that refuses a conversation has no fault.
    fn of(error: RenderError) -> Option<Self> {
        match error {
            RenderError::Chat(ChatError::Raised(_)) => None,
            RenderError::Chat(ChatError::Failed(why)) => Some(Self::Fails(why)),
            RenderError::Exceeds(why) => Some(Self::Exceeds(why)),
        }
    }
}

fn rendering(add_generation_prompt: bool, bytes_max: usize) -> Rendering {
    Rendering { add_generation_prompt, now_ms: now_ms(), bytes_max }
}

/// What is to be continued.
pub enum Prompt<'a> {
    /// Text as it is.
    Raw(&'a str),
    /// A conversation, and the same as plain text for a checkpoint without a template.
    Conversation(&'a [Message], &'a str),
    /// A conversation in which the media have their places, in the order in which they are named.
    WithMedia(&'a [Message], Vec<Arc<PreparedMedium>>),
    /// Token ids.
    Tokens(Vec<u32>),
}

/// Why a prompt cannot be answered.
#[derive(Debug)]
pub enum PromptError {
    /// By its bytes alone it cannot fit.
    TooLong {
        bytes: usize,
        context: usize,
    },
    /// The model's template does not take such a conversation.
    Refused(String),
    /// The model's template cannot be used.
    Template(String),
    /// The media do not fit the conversation or the model.
    Media(LayoutError),
    Failed(Failure),
}

impl From<RenderError> for PromptError {
    fn from(error: RenderError) -> Self {
        match error {
            RenderError::Chat(ChatError::Raised(why)) => Self::Refused(why),
            RenderError::Chat(ChatError::Failed(why)) | RenderError::Exceeds(why) => Self::Template(why),
        }
    }
}

impl From<Failure> for PromptError {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<TokenizerError> for PromptError {
    fn from(error: TokenizerError) -> Self {
        Self::Failed(error.into())
    }
}

impl PromptError {
    pub fn into_failure(self) -> Failure {
        match self {
            Self::TooLong { bytes, context } => {
                Failure::new(Kind::Usage, format!("the prompt has {bytes} bytes, too many for {context} tokens, the model's context"))
            }
            Self::Refused(why) => Failure::new(Kind::Usage, format!("the model's chat template refuses the conversation: {why}")),
            Self::Media(error) => Failure::new(Kind::Usage, error.to_string()),
            Self::Template(why) => Failure::new(Kind::Other, format!("the model's chat template cannot be used: {why}")),
            Self::Failed(failure) => failure,
        }
    }
}

/// How the checkpoint's authors sample.
pub fn default_sampling(defaults: &GenerationDefaults, seed: u64) -> Sampling {
    let GenerationDefaults { temperature, top_p, repetition_penalty, .. } = *defaults;
    Sampling { temperature, top_k: defaults.top_k as usize, top_p, repetition_penalty, seed }
}

impl ModelText {
    /// A user's question as a prompt, the likeliest tokens to be its answer.
    pub fn question(
        &self,
        parts: Vec<ContentPart>,
        media: Vec<Arc<PreparedMedium>>,
        context: usize,
        defaults: &GenerationDefaults,
    ) -> Result<GenerateRequest, Failure> {
        let messages = [Message { role: Role::User, content: Content::Parts(parts) }];
        let request = self.request(Prompt::WithMedia(&messages, media), (context, 1), Sampling::GREEDY, defaults);
        request.map_err(PromptError::into_failure)
    }

    /// What is to be generated. A text that cannot fit into `context` tokens is refused before it is looked at.
    pub fn request(
        &self,
        prompt: Prompt<'_>,
        (context, tokens_max): (usize, usize),
        sampling: Sampling,
        defaults: &GenerationDefaults,
    ) -> Result<GenerateRequest, PromptError> {
        let check = |tokenizer: &Tokenizer, text: &str| {
            let fits = text.len() <= tokenizer.text_bytes_max(context);
            if fits { Ok(()) } else { Err(PromptError::TooLong { bytes: text.len(), context }) }
        };
        let mut stop_strings = defaults.stop_strings.clone();
        let mut eos_token_ids = defaults.eos_token_ids.clone();
        let (prompt, media) = match prompt {
            Prompt::WithMedia(messages, media) => (Prompt::Conversation(messages, ""), media),
            other => (other, Vec::new()),
        };
        let prompt = match (&self.tokenizer, prompt, &self.chat) {
            (_, Prompt::WithMedia(..), _) => unreachable!("taken apart above"),
            (_, Prompt::Tokens(tokens), _) => tokens,
            (_, Prompt::Conversation(..), None) | (None, Prompt::Conversation(..), _) if !media.is_empty() => {
                return Err(PromptError::Template("it has none, and only a template gives media their places".to_owned()));
            }
            (None, Prompt::Raw(text) | Prompt::Conversation(_, text), _) => parse_ids(text)?,
            (Some(tokenizer), Prompt::Conversation(messages, plain), Some(chat)) => {
                check(tokenizer, plain)?;
                let next_turn = chat.next_turn.as_ref().map_err(|fault| PromptError::Template(fault.to_string()))?;
                let bytes_max = tokenizer.text_bytes_max(context).min(RENDERED_BYTES_MAX);
                let render = |messages: &[Message]| sandbox::render(&chat.template, messages, rendering(true, bytes_max));
                let (text, breaks) = tokenizer.control_tokens().render(messages, render)?;
                check(tokenizer, &text)?;
                // What the template puts behind an answer ends it; where that begins by a special token, the token does.
                if let Some(next_turn) = next_turn {
                    let token = tokenizer.special_at_start(next_turn.trim_start());
                    eos_token_ids.extend(token.filter(|token| !eos_token_ids.contains(token)));
                    stop_strings.push(next_turn.clone());
                }
                tokenizer.encode_broken(&text, breaks)?
            }
            (Some(tokenizer), Prompt::Raw(text) | Prompt::Conversation(_, text), _) => {
                check(tokenizer, text)?;
                tokenizer.encode(text, SpecialTokens::Add)?
            }
        };
        let (prompt, media) = if media.is_empty() {
            (prompt, None)
        } else {
            let places: Vec<_> = media.iter().map(|medium| medium.medium.clone()).collect();
            let layout = lay_out(self.vision.as_ref(), self.audio.as_ref(), &prompt, &places).map_err(PromptError::Media)?;
            let Layout { tokens, positions, runs } = layout;
            (tokens, Some(Arc::new(MediaPrompt { positions, runs, media })))
        };
        Ok(GenerateRequest { prompt, media, tokens_max, sampling, eos_token_ids, stop_strings, top_logprobs: None })
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
