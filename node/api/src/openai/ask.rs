//! What a client asks of the OpenAI endpoints: every field checked, those that this node does not have refused by name.

use base::failure::Kind;
use base64::Engine as _;
use inference::chat::{Content, ContentPart, MediumKind, Message, Role};
use inference::media::limits::MediaLimits;
use inference::sampler::Sampling;
use runtime::data_dir::LocalModel;
use runtime::generation::ReadyModel;
use runtime::media::{FPS_DEFAULT, GivenMedium, MediaSource, Senses, prepare};
use runtime::prompt::{ModelText, Prompt, PromptError, default_sampling};
use serde_json::{Value, json};

use crate::body::{Fields, wrong};
use crate::error::ApiError;

/// Stop strings that a client may give, and the characters of each.
const STOPS_MAX: usize = 4;
const STOP_CHARS_MAX: usize = 256;
/// Tokens of an answer in `/v1/completions` unless told otherwise, as OpenAI has it.
const COMPLETION_TOKENS: usize = 16;

/// Members that a message of OpenAI's may have besides role and content. This node has none of what they are for, so they must be empty.
const OF_MESSAGES: [&str; 10] =
    ["name", "tool_calls", "tool_call_id", "function_call", "audio", "refusal", "annotations", "reasoning_details", "tool_name", "parsed"];

/// Which of the two endpoints.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Endpoint {
    Chat,
    Completions,
}

/// A request that is well-formed.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Ask {
    pub(crate) endpoint: Endpoint,
    pub model: String,
    pub what: What,
    tokens_max: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<usize>,
    repetition_penalty: Option<f32>,
    seed: Option<u64>,
    stop: Vec<String>,
    pub stream: bool,
    pub include_usage: bool,
    pub(crate) top_logprobs: Option<usize>,
    pub token_ids: bool,
    pub user: String,
}

/// What is to be continued.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum What {
    /// What is said, and what is seen and heard, in its order.
    Conversation(Vec<Message>, Vec<GivenMedium>),
    Text(String),
    Tokens(Vec<u32>),
}

impl Ask {
    /// A question about one medium.
    pub(crate) fn about(model: String, medium: GivenMedium, text: String, temperature: f32) -> Self {
        let content = Content::Parts(vec![ContentPart::Medium(medium.kind), ContentPart::Text(text)]);
        Self {
            endpoint: Endpoint::Chat,
            model,
            what: What::Conversation(vec![Message { role: Role::User, content }], vec![medium]),
            tokens_max: None,
            temperature: Some(temperature),
            top_p: None,
            top_k: None,
            repetition_penalty: None,
            seed: None,
            stop: Vec::new(),
            stream: false,
            include_usage: false,
            top_logprobs: None,
            token_ids: false,
            user: String::new(),
        }
    }

    pub(crate) fn parse(endpoint: Endpoint, mut fields: Fields) -> Result<Self, ApiError> {
        let required = |name: &str| ApiError::invalid(format!("{name} is missing")).param(name);
        let model = fields.text("model")?.ok_or_else(|| required("model"))?;
        let what = match endpoint {
            Endpoint::Chat => {
                let (messages, media) = messages(fields.take("messages").ok_or_else(|| required("messages"))?)?;
                What::Conversation(messages, media)
            }
            Endpoint::Completions => prompt(fields.take("prompt").ok_or_else(|| required("prompt"))?)?,
        };
        let any = (1, u64::MAX);
        let (tokens_max, newer) = (fields.count("max_tokens", any)?, fields.count("max_completion_tokens", any)?);
        let tokens_max = newer.or(tokens_max).map(|tokens| usize::try_from(tokens).unwrap_or(usize::MAX));
        let (stream, mut include_usage) = (fields.flag("stream")?, false);
        if let Some(options) = fields.take("stream_options") {
            if !stream {
                return Err(ApiError::invalid("stream_options goes with stream alone").param("stream_options"));
            }
            let mut options = Fields::of(options, "stream_options")?;
            include_usage = options.flag("include_usage")?;
            options.only("include_obfuscation", &[json!(false)])?;
            options.none_left()?;
        }
        let ask = Self {
            endpoint,
            model,
            what,
            tokens_max: tokens_max.or((endpoint == Endpoint::Completions).then_some(COMPLETION_TOKENS)),
            temperature: fields.number("temperature", "a number from 0 to 2", |t| (0.0..=2.0).contains(&t))?,
            top_p: fields.number("top_p", "a number above 0, up to 1", |p| p > 0.0 && p <= 1.0)?,
            top_k: fields.count("top_k", (0, u64::MAX))?.map(|top| top as usize),
            repetition_penalty: fields.number("repetition_penalty", "a number above 0, up to 100", |r| r > 0.0 && r <= 100.0)?,
            seed: seed(fields.take("seed"))?,
            stop: stops(fields.take("stop"))?,
            stream,
            include_usage,
            top_logprobs: match endpoint {
                Endpoint::Chat => chat_logprobs(&mut fields)?,
                Endpoint::Completions => fields.count("logprobs", (0, 5))?.map(|top| top as usize),
            },
            token_ids: fields.flag("return_token_ids")?,
            user: fields.text("user")?.unwrap_or_default(),
        };
        refuse_unsupported(endpoint, &mut fields)?;
        fields.none_left()?;
        Ok(ask)
    }

    /// Turns the request into tokens and rules for a model.
    pub(crate) fn request(
        &self,
        model: &ReadyModel,
        limits: &MediaLimits,
        random: u64,
    ) -> Result<inference::generate::GenerateRequest, ApiError> {
        let LocalModel { manifest, .. } = &model.found;
        let authors = default_sampling(&manifest.generation, self.seed.unwrap_or(random));
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(authors.temperature),
            top_k: self.top_k.unwrap_or(authors.top_k),
            top_p: self.top_p.unwrap_or(authors.top_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(authors.repetition_penalty),
            ..authors
        };
        let plain = match &self.what {
            What::Conversation(messages, _) => messages.iter().flat_map(|message| message.content.texts()).collect::<Vec<_>>().join("\n"),
            What::Text(_) | What::Tokens(_) => String::new(),
        };
        let (prompt, field) = match &self.what {
            What::Conversation(messages, media) if media.is_empty() => (Prompt::Conversation(messages, &plain), "messages"),
            What::Conversation(messages, media) => {
                let ModelText { vision, audio, .. } = &*model.text;
                let senses = Senses { vision: vision.as_ref(), audio: audio.as_ref(), limits };
                let prepared = prepare(senses, media).map_err(|failure| ApiError::invalid(failure.message).param("messages"))?;
                (Prompt::WithMedia(messages, prepared), "messages")
            }
            What::Text(text) => (Prompt::Raw(text), "prompt"),
            What::Tokens(tokens) => (Prompt::Tokens(tokens.clone()), "prompt"),
        };
        let refused = |error: PromptError| match error {
            error @ PromptError::TooLong { .. } => {
                ApiError::invalid(error.into_failure().message).param(field).code("context_length_exceeded")
            }
            // The template is the model's, but what it does not take is the client's.
            error @ (PromptError::Refused(_) | PromptError::Media(_)) => ApiError::invalid(error.into_failure().message).param(field),
            error @ PromptError::Template(_) => ApiError::server(error.into_failure().message).code("template_failed"),
            PromptError::Failed(failure) if matches!(failure.kind, Kind::Usage | Kind::Other) => {
                ApiError::invalid(failure.message).param(field)
            }
            PromptError::Failed(failure) => failure.into(),
        };
        let tokens_max = self.tokens_max.unwrap_or(usize::MAX);
        let lengths = (model.context, tokens_max);
        let mut request = model.text.request(prompt, lengths, sampling, &manifest.generation).map_err(refused)?;
        let vocab_size = manifest.decoder().vocab_size;
        if let Some(token) = request.prompt.iter().find(|&&token| token >= vocab_size) {
            let message = format!("token {token} is beyond the model's vocabulary of {vocab_size}");
            return Err(ApiError::invalid(message).param(field));
        }
        request.check(model.context).map_err(|error| {
            let error = ApiError::invalid(error.to_string()).param(field);
            if request.prompt.is_empty() { error } else { error.code("context_length_exceeded") }
        })?;
        request.tokens_max = request.tokens_max.min(model.context - request.prompt.len());
        request.stop_strings.extend(self.stop.iter().cloned());
        request.top_logprobs = self.top_logprobs;
        Ok(request)
    }
}

fn messages(value: Value) -> Result<(Vec<Message>, Vec<GivenMedium>), ApiError> {
    let Value::Array(list) = value else { return Err(wrong("messages", "a list", &value)) };
    if list.is_empty() {
        return Err(ApiError::invalid("messages is empty").param("messages"));
    }
    let mut media = Vec::new();
    let messages = list.into_iter().enumerate().map(|(number, value)| message(value, &format!("messages[{number}]"), &mut media));
    Ok((messages.collect::<Result<_, _>>()?, media))
}

fn message(value: Value, path: &str, media: &mut Vec<GivenMedium>) -> Result<Message, ApiError> {
    let mut fields = Fields::of(value, path)?;
    let role = match fields.text("role")?.as_deref() {
        Some("system" | "developer") => Role::System,
        Some("user") => Role::User,
        Some("assistant") => Role::Assistant,
        Some(other) => {
            let message = format!("{path}.role {other:?} is not supported; system, developer, user and assistant are");
            return Err(ApiError::invalid(message).code("unsupported_value").param(format!("{path}.role")));
        }
        None => return Err(ApiError::invalid(format!("{path}.role is missing")).param(format!("{path}.role"))),
    };
    let content_path = format!("{path}.content");
    let content = match fields.take("content") {
        Some(Value::String(text)) => Content::Text(text),
        Some(Value::Array(parts)) => {
            let before = media.len();
            let parts = parts.into_iter().enumerate().map(|(number, value)| part(value, &format!("{content_path}[{number}]"), media));
            let parts = Content::Parts(parts.collect::<Result<_, _>>()?);
            // Templates take a text as it is; not all take a list.
            if media.len() == before { Content::Text(parts.texts().collect()) } else { parts }
        }
        Some(other) => return Err(wrong(&content_path, "a text or a list of parts", &other)),
        // An answer that was nothing but calls, or nothing at all.
        None if role == Role::Assistant => Content::Text(String::new()),
        None => return Err(ApiError::invalid(format!("{content_path} is missing")).param(content_path)),
    };
    for name in OF_MESSAGES {
        fields.take_empty(name);
        fields.only(name, &[])?;
    }
    if role == Role::Assistant {
        // What it thought is not a part of what it said; models are not shown it again.
        for thought in ["reasoning_content", "reasoning"] {
            let _ = fields.text(thought)?;
        }
    }
    fields.none_left()?;
    Ok(Message { role, content })
}

/// A part of a message: a text, or what is seen or heard, as bytes in the request.
fn part(value: Value, path: &str, media: &mut Vec<GivenMedium>) -> Result<ContentPart, ApiError> {
    let mut fields = Fields::of(value, path)?;
    let kind = fields.text("type")?;
    let part = match kind.as_deref() {
        Some("text") => {
            let missing = || ApiError::invalid(format!("{path}.text is missing")).param(format!("{path}.text"));
            ContentPart::Text(fields.text("text")?.ok_or_else(missing)?)
        }
        Some(word @ ("image_url" | "video_url")) => {
            let url = url(&mut fields, word, path)?;
            let kind = if word == "image_url" { MediumKind::Image } else { MediumKind::Video };
            medium(kind, path, from_data_url(&url, path)?, media)
        }
        Some("input_audio") => {
            let missing = || ApiError::invalid(format!("{path}.input_audio is missing")).param(path);
            let mut inner = Fields::of(fields.take("input_audio").ok_or_else(missing)?, &format!("{path}.input_audio"))?;
            let data = inner.text("data")?.ok_or_else(|| ApiError::invalid(format!("{path}.input_audio.data is missing")).param(path))?;
            let _ = inner.text("format")?; // the bytes say it
            inner.none_left()?;
            let bytes = if data.starts_with("data:") { from_data_url(&data, path)? } else { from_base64(&data, path)? };
            medium(MediumKind::Audio, path, bytes, media)
        }
        Some("file") => {
            let missing = || ApiError::invalid(format!("{path}.file.file_data is missing")).param(path);
            let mut inner = Fields::of(fields.take("file").ok_or_else(missing)?, &format!("{path}.file"))?;
            let data = inner.text("file_data")?.ok_or_else(missing)?;
            let _ = inner.text("filename")?;
            inner.none_left()?;
            let kind = match data.strip_prefix("data:").unwrap_or_default().split('/').next() {
                Some("image") => MediumKind::Image,
                Some("audio") => MediumKind::Audio,
                Some("video") => MediumKind::Video,
                _ => {
                    let message = format!("{path}.file.file_data must be a data: URL of a picture, a sound or a video");
                    return Err(ApiError::invalid(message).code("unsupported_value").param(path));
                }
            };
            medium(kind, path, from_data_url(&data, path)?, media)
        }
        kind => {
            let kind = kind.unwrap_or("that is not given");
            let message = format!("{path}: parts of type {kind} are not supported; text, image_url, input_audio, video_url and file are");
            return Err(ApiError::invalid(message).code("unsupported_value").param(path));
        }
    };
    fields.none_left()?;
    Ok(part)
}

/// An address, alone or in an object.
fn url(fields: &mut Fields, word: &str, path: &str) -> Result<String, ApiError> {
    let missing = || ApiError::invalid(format!("{path}.{word}.url is missing")).param(path);
    match fields.take(word).ok_or_else(missing)? {
        Value::String(url) => Ok(url),
        inner => {
            let mut inner = Fields::of(inner, &format!("{path}.{word}"))?;
            let url = inner.text("url")?.ok_or_else(missing)?;
            let _ = inner.text("detail")?; // pictures are always looked at as closely as the model can
            inner.none_left()?;
            Ok(url)
        }
    }
}

fn medium(kind: MediumKind, path: &str, bytes: Vec<u8>, media: &mut Vec<GivenMedium>) -> ContentPart {
    media.push(GivenMedium { kind, name: path.to_owned(), source: MediaSource::Bytes(bytes), fps: FPS_DEFAULT, sound: None });
    ContentPart::Medium(kind)
}

/// The bytes of a `data:` URL. Nothing is fetched from any other.
fn from_data_url(url: &str, path: &str) -> Result<Vec<u8>, ApiError> {
    let Some((_, data)) = url.strip_prefix("data:").and_then(|rest| rest.split_once(";base64,")) else {
        let message = format!("{path}: nothing is fetched from addresses; send the bytes as data:TYPE;base64,BYTES");
        return Err(ApiError::invalid(message).code("unsupported_value").param(path));
    };
    from_base64(data, path)
}

fn from_base64(data: &str, path: &str) -> Result<Vec<u8>, ApiError> {
    let wrong = |error| ApiError::invalid(format!("{path}: its bytes are no base64: {error}")).param(path);
    base64::engine::general_purpose::STANDARD.decode(data).map_err(wrong)
}

fn prompt(value: Value) -> Result<What, ApiError> {
    let rule = "a text, a list of one text, or a list of token ids";
    match value {
        Value::String(text) => Ok(What::Text(text)),
        Value::Array(mut list) if matches!(&list[..], [Value::String(_) | Value::Array(_)]) => prompt(list.remove(0)),
        Value::Array(list) if list.iter().any(|value| !value.is_number()) => {
            Err(wrong("prompt", &format!("{rule} (one prompt a request)"), &Value::Array(list)))
        }
        Value::Array(list) => {
            let token =
                |value: &Value| value.as_u64().and_then(|token| u32::try_from(token).ok()).ok_or_else(|| wrong("prompt", rule, value));
            list.iter().map(token).collect::<Result<_, _>>().map(What::Tokens)
        }
        other => Err(wrong("prompt", rule, &other)),
    }
}

fn seed(value: Option<Value>) -> Result<Option<u64>, ApiError> {
    let Some(value) = value else { return Ok(None) };
    let seed = value.as_u64().or_else(|| value.as_i64().map(|seed| seed as u64));
    seed.map(Some).ok_or_else(|| wrong("seed", "a whole number of 64 bits", &value))
}

fn stops(value: Option<Value>) -> Result<Vec<String>, ApiError> {
    let rule = format!("a text or up to {STOPS_MAX} of them, none empty or longer than {STOP_CHARS_MAX} characters");
    let list = match value {
        None => Vec::new(),
        Some(Value::Array(list)) if list.len() <= STOPS_MAX => list,
        Some(Value::String(text)) => vec![Value::String(text)],
        Some(other) => return Err(wrong("stop", &rule, &other)),
    };
    let text = |value| match value {
        Value::String(text) if !text.is_empty() && text.chars().count() <= STOP_CHARS_MAX => Ok(text),
        other => Err(wrong("stop", &rule, &other)),
    };
    list.into_iter().map(text).collect()
}

fn chat_logprobs(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let (submitted, top) = (fields.flag("logprobs")?, fields.count("top_logprobs", (0, 20))?);
    match (submitted, top) {
        (false, Some(top)) if top > 0 => Err(ApiError::invalid("top_logprobs needs logprobs: true").param("top_logprobs")),
        (true, top) => Ok(Some(top.unwrap_or(0) as usize)),
        (false, _) => Ok(None),
    }
}

/// Fields that OpenAI has and this node does not: fine where they change nothing.
fn refuse_unsupported(endpoint: Endpoint, fields: &mut Fields) -> Result<(), ApiError> {
    fields.only("n", &[json!(1)])?;
    fields.only("presence_penalty", &[json!(0), json!(0.0)])?;
    fields.only("frequency_penalty", &[json!(0), json!(0.0)])?;
    fields.only("logit_bias", &[json!({})])?;
    fields.only("service_tier", &[json!("auto"), json!("default")])?;
    // These change nothing anywhere: what they are for does not exist here.
    for ignored in ["safety_identifier", "prompt_cache_key", "prompt_cache_retention", "metadata", "parallel_tool_calls"] {
        let _ = fields.take(ignored);
    }
    match endpoint {
        Endpoint::Chat => {
            fields.only("tools", &[json!([])])?;
            fields.only("functions", &[json!([])])?;
            fields.only("tool_choice", &[json!("none"), json!("auto")])?;
            fields.only("function_call", &[json!("none"), json!("auto")])?;
            fields.only("response_format", &[json!({"type": "text"})])?;
            fields.only("modalities", &[json!(["text"])])?;
            fields.only("store", &[json!(false)])?;
            for refused in ["audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"] {
                fields.only(refused, &[])?;
            }
        }
        Endpoint::Completions => {
            fields.only("best_of", &[json!(1)])?;
            fields.only("echo", &[json!(false)])?;
            fields.only("suffix", &[])?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(endpoint: Endpoint, body: Value) -> Result<Ask, Value> {
        Ask::parse(endpoint, Fields::of(body, "").expect("an object")).map_err(|error| error.json()["error"].clone())
    }

    fn chat(more: &Value) -> Result<Ask, Value> {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hello"}]});
        for (name, value) in more.as_object().expect("an object") {
            body[name] = value.clone();
        }
        ask(Endpoint::Chat, body)
    }

    #[test]
    fn what_clients_send_by_habit_is_taken() {
        let habits = json!({"n": 1, "tools": [], "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"},
            "user": "me", "metadata": {"a": "b"}, "store": false, "max_tokens": 5, "temperature": null, "parallel_tool_calls": true, "stop": null});
        let ask = chat(&habits).expect("fine");
        assert_eq!((ask.tokens_max, ask.user.as_str(), ask.stop.len()), (Some(5), "me", 0));
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        let cases = [
            (json!({"n": 2}), "n", "unsupported_value"),
            (json!({"tools": [{"type": "function"}]}), "tools", "unsupported_value"),
            (json!({"audio": {"voice": "a"}}), "audio", "unsupported_parameter"),
            (json!({"frequency_penalty": 0.5}), "frequency_penalty", "unsupported_value"),
            (json!({"foo": 1}), "foo", "unknown_parameter"),
            (json!({"stream": true, "stream_options": {"bar": 1}}), "stream_options.bar", "unknown_parameter"),
            (json!({"messages": [{"role": "tool", "content": "x"}]}), "messages[0].role", "unsupported_value"),
            (
                json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}]}),
                "messages[0].content[0]",
                "unsupported_value",
            ),
            (json!({"messages": [{"role": "user", "content": "x", "name": "y"}]}), "messages[0].name", "unsupported_parameter"),
        ];
        for (more, param, code) in cases {
            let error = chat(&more).expect_err(&more.to_string());
            assert_eq!((&error["param"], &error["code"]), (&json!(param), &json!(code)), "{error}");
        }
    }

    #[test]
    fn values_out_of_range_are_refused() {
        let cases = json!([
            {"temperature": 2.1}, {"temperature": -0.1}, {"temperature": "hot"}, {"top_p": 0}, {"top_p": 1.5}, {"max_tokens": 0}, {"max_tokens": -1},
            {"max_tokens": 1.5}, {"seed": 1.5}, {"seed": "a"}, {"stop": ["a", "b", "c", "d", "e"]}, {"stop": ""}, {"stop": [1]}, {"logprobs": 1},
            {"top_logprobs": 3}, {"logprobs": true, "top_logprobs": 21}, {"messages": []}, {"messages": "hi"}, {"messages": [{"content": "x"}]},
            {"messages": [{"role": "user"}]}, {"messages": [{"role": "user", "content": 5}]}, {"stream": "yes"}, {"stream_options": {}}, {"model": 5}, {"user": 5}
        ]);
        for case in cases.as_array().expect("a list") {
            assert_eq!(chat(case).expect_err(&case.to_string())["type"], "invalid_request_error", "{case}");
        }
    }

    #[test]
    fn an_answer_may_come_back_with_every_member_that_it_may_have() {
        let echoed = json!({"role": "assistant", "content": "b", "refusal": null, "annotations": [], "audio": null, "function_call": null, "name": "",
            "tool_calls": [], "reasoning_content": "so", "reasoning": null, "whatever": null});
        let empty = json!({"role": "assistant", "content": null, "tool_calls": null});
        let user = json!({"role": "user", "content": "a"});
        let ask =
            chat(&json!({"messages": [user, echoed, empty, user], "thinking": null, "extra_body": null, "min_p": null})).expect("fine");
        let What::Conversation(messages, _) = ask.what else { panic!("a conversation") };
        assert_eq!(messages.iter().flat_map(|message| message.content.texts()).collect::<Vec<_>>(), ["a", "b", "", "a"]);
        assert!(chat(&json!({"messages": [{"role": "user", "content": null}]})).is_err());
        assert!(chat(&json!({"messages": [user, {"role": "assistant", "content": "b", "annotations": [{}]}]})).is_err());
        assert!(chat(&json!({"stream": true, "stream_options": {"include_usage": true, "foo": null}})).is_ok());
    }

    #[test]
    fn prompts_are_texts_or_tokens() {
        let what = |prompt: Value| ask(Endpoint::Completions, json!({"model": "m", "prompt": prompt})).map(|ask| ask.what);
        assert_eq!(what(json!("a")), Ok(What::Text("a".to_owned())));
        assert_eq!(what(json!(["a"])), Ok(What::Text("a".to_owned())));
        assert_eq!(what(json!([1, 2])), Ok(What::Tokens(vec![1, 2])));
        assert_eq!(what(json!([[1, 2]])), Ok(What::Tokens(vec![1, 2])));
        for wrong in [json!(["a", "b"]), json!([1, "a"]), json!([-1]), json!([4_294_967_296_u64]), json!(5), json!({}), json!(null)] {
            assert!(what(wrong.clone()).is_err(), "{wrong}");
        }
    }
}
