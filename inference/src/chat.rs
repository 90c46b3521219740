//! Turns a conversation into the text that a model was trained on, by the checkpoint's own template.
//!
//! A template comes from elsewhere. Its steps and its output are bounded here; its memory and stack are not: whoever renders one of a model
//! that anybody may have made does so in a process of its own.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind};
use protocol::plain_text::plain_lines;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

/// Longest template, in bytes.
pub const TEMPLATE_BYTES_MAX: usize = 64 << 10;
/// Steps that a template may take: it comes with a checkpoint and must not run for ever.
const FUEL: u64 = 5_000_000;

/// Of `tojson`.
const INDENT_MAX: usize = 16;
const JSON_DEPTH_MAX: usize = 64;

/// Who says something.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Whoever sets the rules.
    System,
    /// Whoever asks.
    User,
    /// The model.
    Assistant,
}

/// Who says what.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Message {
    /// Who.
    pub role: Role,
    /// What.
    pub content: Content,
}

/// What a message says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Content {
    /// A text.
    Text(String),
    /// Texts, and what is seen and heard, in their order.
    Parts(Vec<ContentPart>),
}

/// A part of a message.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ContentPart {
    /// A text.
    Text(String),
    /// The place of a picture, a video or a sound.
    Medium(MediumKind),
}

/// What is seen or heard.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum MediumKind {
    /// A still picture.
    Image,
    /// A sound.
    Audio,
    /// Pictures that follow one another, with or without sound.
    Video,
}

impl MediumKind {
    /// What templates call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Audio => "audio",
            Self::Video => "video",
        }
    }
}

impl Message {
    /// A message of text.
    pub fn text(role: Role, text: impl Into<String>) -> Self {
        Self { role, content: Content::Text(text.into()) }
    }

    /// As templates see it.
    fn value(&self) -> Value {
        let object = |fields: &[(&'static str, Value)]| fields.iter().cloned().collect::<Value>();
        let content = match &self.content {
            Content::Text(text) => Value::from(text.as_str()),
            Content::Parts(parts) => parts
                .iter()
                .map(|part| match part {
                    ContentPart::Text(text) => object(&[("type", "text".into()), ("text", text.as_str().into())]),
                    ContentPart::Medium(kind) => object(&[("type", kind.name().into())]),
                })
                .collect(),
        };
        object(&[("role", Value::from_serialize(self.role)), ("content", content)])
    }
}

impl Content {
    /// Its texts, in their order.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        let (one, several) = match self {
            Self::Text(text) => (Some(text.as_str()), &[][..]),
            Self::Parts(parts) => (None, &parts[..]),
        };
        one.into_iter().chain(several.iter().filter_map(|part| if let ContentPart::Text(text) = part { Some(text.as_str()) } else { None }))
    }

    /// What is seen and heard, in its order.
    pub fn media(&self) -> impl Iterator<Item = MediumKind> {
        let parts = if let Self::Parts(parts) = self { &parts[..] } else { &[] };
        parts.iter().filter_map(|part| if let ContentPart::Medium(kind) = part { Some(*kind) } else { None })
    }

    /// The same with other texts.
    #[must_use]
    pub fn map_texts(&self, change: impl Fn(&str) -> String) -> Self {
        let part = |part: &ContentPart| match part {
            ContentPart::Text(text) => ContentPart::Text(change(text)),
            ContentPart::Medium(kind) => ContentPart::Medium(*kind),
        };
        match self {
            Self::Text(text) => Self::Text(change(text)),
            Self::Parts(parts) => Self::Parts(parts.iter().map(part).collect()),
        }
    }
}

/// A checkpoint's way to write conversations.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ChatTemplate {
    /// The template (Jinja).
    pub source: String,
    /// What it calls `bos_token`.
    pub bos_token: Option<String>,
    /// What it calls `eos_token`.
    pub eos_token: Option<String>,
}

/// How a conversation is to be rendered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Rendering {
    /// Whether the assistant's next message is to follow.
    pub add_generation_prompt: bool,
    /// What time it is, in milliseconds since 1970, for templates that write the date.
    pub now_ms: u64,
    /// Longest text, in bytes.
    pub bytes_max: usize,
}

/// Why there is no text.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ChatError {
    /// The template says that it does not take such a conversation (`raise_exception`).
    #[error("the chat template refuses the conversation: {0}")]
    Raised(String),
    /// The template itself is at fault.
    #[error("the chat template fails: {0}")]
    Failed(String),
}

impl ChatTemplate {
    /// Returns the text of a conversation.
    pub fn render(&self, messages: &[Message], rendering: Rendering) -> Result<String, ChatError> {
        if self.source.len() > TEMPLATE_BYTES_MAX {
            return Err(ChatError::Failed(format!("it has {} bytes; {TEMPLATE_BYTES_MAX} is the limit", self.source.len())));
        }
        let raised = Arc::new(Mutex::new(None));
        let environment = environment(rendering.now_ms, &raised);
        let mut text = Limited { bytes: Vec::new(), bytes_max: rendering.bytes_max };
        let source = without_generation_blocks(&self.source);
        let rendered = environment.template_from_str(&source).and_then(|template| {
            // What a checkpoint does not have is not there at all, as in transformers: none would be written as a word.
            let mut context = vec![
                ("messages", messages.iter().map(Message::value).collect()),
                ("add_generation_prompt", Value::from(rendering.add_generation_prompt)),
            ];
            context.extend(self.bos_token.as_deref().map(|token| ("bos_token", Value::from(token))));
            context.extend(self.eos_token.as_deref().map(|token| ("eos_token", Value::from(token))));
            template.render_captured_to(context.into_iter().collect::<Value>(), &mut text).map(drop)
        });
        match rendered {
            Ok(()) => String::from_utf8(text.bytes).map_err(|_| ChatError::Failed("it writes what is no text".to_owned())),
            Err(error) => Err(match raised.lock().unwrap_or_else(PoisonError::into_inner).take() {
                Some(message) => ChatError::Raised(plain_lines(&message)),
                None => ChatError::Failed(described(&error)),
            }),
        }
    }

    /// Returns the text with which the user's next turn begins, where the template shows one: an answer ends before it.
    pub fn next_turn(render: impl FnOnce(&[Message]) -> Option<String>) -> Option<String> {
        const MARKS: [&str; 3] = ["\u{1}first\u{1}", "\u{1}second\u{1}", "\u{1}third\u{1}"];
        let roles = [Role::User, Role::Assistant, Role::User];
        let messages: Vec<_> = roles.into_iter().zip(MARKS).map(|(role, mark)| Message::text(role, mark)).collect();
        let text = render(&messages)?;
        let between = text.split_once(MARKS[1])?.1.split_once(MARKS[2])?.0.trim_end();
        (!between.trim().is_empty()).then(|| between.to_owned())
    }
}

/// What transformers gives to a template: blocks trimmed, Python's methods of texts, and functions of its own.
fn environment(now_ms: u64, raised: &Arc<Mutex<Option<String>>>) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    let raised = Arc::clone(raised);
    environment.add_function("raise_exception", move |message: String| -> Result<String, Error> {
        *raised.lock().unwrap_or_else(PoisonError::into_inner) = Some(message.clone());
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", move |format: String| strftime(now_ms, &format));
    environment.add_filter("tojson", to_json);
    environment
}

/// The template without `{% generation %}` and its end: they mark for training what the assistant says, and say nothing else.
fn without_generation_blocks(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        text.push_str(before);
        let Some(length) = tag[2..].find("%}").map(|end| end + 4) else { break };
        let (tag, after) = tag.split_at(length);
        let word = tag[2..length - 2].trim_matches(['-', '+']).trim();
        match word {
            "generation" => text.push_str(&tag.replacen(word, "if true", 1)),
            "endgeneration" => text.push_str(&tag.replacen(word, "endif", 1)),
            _ => text.push_str(tag),
        }
        rest = after;
    }
    text + rest
}

fn strftime(now_ms: u64, format: &str) -> Result<String, Error> {
    let wrong = |what: &dyn std::fmt::Display| Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {what}"));
    let format = time::format_description::parse_strftime_borrowed(format).map_err(|error| wrong(&error))?;
    let now = i64::try_from(now_ms / 1000).ok().and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok());
    now.ok_or_else(|| wrong(&"no such time"))?.format(&format).map_err(|error| wrong(&error))
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False)` writes it; `indent` spreads it over lines.
#[expect(clippy::needless_pass_by_value, reason = "filters are given theirs so")]
fn to_json(value: &Value, indent: Option<usize>, options: Kwargs) -> Result<Value, Error> {
    let indent = indent.or(options.get::<Option<usize>>("indent")?);
    for accepted in ["ensure_ascii", "separators", "sort_keys"] {
        let _ = options.get::<Option<Value>>(accepted)?;
    }
    options.assert_all_used()?;
    if indent.is_some_and(|indent| indent > INDENT_MAX) {
        return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: an indent of more than {INDENT_MAX}")));
    }
    let mut text = String::new();
    write_json(value, indent, 0, &mut text)?;
    Ok(Value::from_safe_string(text))
}

fn write_json(value: &Value, indent: Option<usize>, depth: usize, text: &mut String) -> Result<(), Error> {
    if depth > JSON_DEPTH_MAX {
        return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: more than {JSON_DEPTH_MAX} lists in one another")));
    }
    let new_line = |text: &mut String, depth: usize| {
        if let Some(indent) = indent {
            text.push('\n');
            text.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    let (open, close) = if value.kind() == ValueKind::Map { ('{', '}') } else { ('[', ']') };
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => text.push_str("null"),
        ValueKind::Bool => text.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => {
            let _ = write!(text, "{value}");
        }
        ValueKind::Map | ValueKind::Seq | ValueKind::Iterable => {
            text.push(open);
            let mut is_empty = true;
            for item in value.try_iter()? {
                if !is_empty {
                    text.push_str(if indent.is_some() { "," } else { ", " });
                }
                is_empty = false;
                new_line(text, depth + 1);
                if value.kind() == ValueKind::Map {
                    let _ = write!(text, "{}: ", serde_json::Value::from(item.to_string()));
                    write_json(&value.get_item(&item)?, indent, depth + 1, text)?;
                } else {
                    write_json(&item, indent, depth + 1, text)?;
                }
            }
            if !is_empty {
                new_line(text, depth);
            }
            text.push(close);
        }
        _ => {
            let _ = write!(text, "{}", serde_json::Value::from(value.to_string()));
        }
    }
    Ok(())
}

/// An error with its causes, and the line of the template at which it came up.
fn described(error: &Error) -> String {
    let line = error.line().map_or_else(String::new, |line| format!("line {line}: "));
    let mut text =
        format!("{line}{}", error.detail().map_or_else(|| error.kind().to_string(), |detail| format!("{}: {detail}", error.kind())));
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    plain_lines(&text)
}

/// Output up to a length.
struct Limited {
    bytes: Vec<u8>,
    bytes_max: usize,
}

impl Write for Limited {
    fn write(&mut self, more: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + more.len() > self.bytes_max {
            return Err(io::Error::other(format!("it writes more than {} bytes", self.bytes_max)));
        }
        self.bytes.extend_from_slice(more);
        Ok(more.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate { source: source.to_owned(), bos_token: None, eos_token: Some("<|im_end|>".to_owned()) }
    }

    fn user(text: &str) -> [Message; 1] {
        [Message::text(Role::User, text)]
    }

    /// On 15 January 2026, 12:00.
    fn rendering(add_generation_prompt: bool) -> Rendering {
        Rendering { add_generation_prompt, now_ms: 1_768_478_400_000, bytes_max: 1 << 20 }
    }

    fn render(source: &str, messages: &[Message]) -> Result<String, ChatError> {
        template(source).render(messages, rendering(true))
    }

    const CHATML: &str = "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content.strip() + eos_token + '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";

    #[test]
    fn renders_as_pythons_jinja_does() {
        let prompt = render(CHATML, &user(" hello ")).expect("it renders");
        assert_eq!(prompt, "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n");
        let next = ChatTemplate::next_turn(|messages| template(CHATML).render(messages, rendering(false)).ok());
        assert_eq!(next.as_deref(), Some("<|im_end|>\n<|im_start|>user"));
    }

    #[test]
    fn what_a_checkpoint_does_not_have_is_not_there() {
        let source = "[{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ 'yes' if bos_token is defined else 'no' }}]";
        assert_eq!(render(source, &user("x")).as_deref(), Ok("[|<|im_end|>||no]"));
    }

    #[test]
    fn has_what_transformers_gives_to_templates() {
        let cases = [
            ("{{ strftime_now('%Y-%m-%d, %d %B %Y, %H:%M') }}", "2026-01-15, 15 January 2026, 12:00"),
            ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "a<é>\"b"),
            ("x {%- generation -%} y {%- endgeneration %} z", "xy z"),
            ("{# {%} generation #}x", "x"),
            ("{{ messages | tojson }}", r#"[{"role": "user", "content": "a<é>\"b"}]"#),
            ("{{ {'a': [1, 2], 'b': {}} | tojson(indent=2) }}", "{\n  \"a\": [\n    1,\n    2\n  ],\n  \"b\": {}\n}"),
            ("{{ [1.5, none, true] | tojson(ensure_ascii=False) }}", "[1.5, null, true]"),
        ];
        for (source, text) in cases {
            assert_eq!(render(source, &user("a<é>\"b")).as_deref(), Ok(text), "{source}");
        }
    }

    #[test]
    fn a_template_that_refuses_is_not_one_that_fails() {
        assert_eq!(render("{{ raise_exception('no system role') }}", &user("x")), Err(ChatError::Raised("no system role".to_owned())));
        for broken in ["{{ m.content }", "\n\n{{ 'a' % }}", "{{ strftime_now('%Q') }}", "{% include 'x' %}"] {
            assert!(matches!(render(broken, &user("x")), Err(ChatError::Failed(_))), "{broken}");
        }
        let Err(ChatError::Failed(why)) = render("\n\n{{ 'a' % }}", &user("x")) else { panic!("it is broken") };
        assert!(why.starts_with("line 3: "), "{why}");
        let shout = format!("{{{{ raise_exception('\u{1b}[2J' + 'a' * {}) }}}}", 1 << 16);
        let Err(ChatError::Raised(why)) = render(&shout, &user("x")) else { panic!("it refuses") };
        assert!(why.len() < 300 && !why.contains('\u{1b}'), "{why}");
    }

    #[test]
    fn steps_and_output_are_bounded() {
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}{% endfor %}";
        let long = "{% set x = 'abcdefghij' * 1000 %}{% for a in range(1000) %}{{ x }}{% endfor %}";
        for source in [endless, long, &" ".repeat(TEMPLATE_BYTES_MAX + 1)] {
            assert!(matches!(render(source, &user("x")), Err(ChatError::Failed(_))));
        }
        assert_eq!(render(&" ".repeat(TEMPLATE_BYTES_MAX), &user("x")).map(|text| text.len()), Ok(TEMPLATE_BYTES_MAX));
        let exactly = template("{{ messages[0].content }}");
        let bounded = |bytes_max| exactly.render(&user("12345"), Rendering { bytes_max, ..rendering(true) });
        assert!(bounded(5).is_ok() && bounded(4).is_err());
    }
}
