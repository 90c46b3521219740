//! Turns a conversation into the text that a model was trained on, by the checkpoint's own template.

use minijinja::{Environment, Error, ErrorKind, context};
use serde::Serialize;

/// Steps that a template may take: it comes with a checkpoint and must not run for ever.
const FUEL: u64 = 5_000_000;

/// Who says what.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: &'static str,
    /// The text.
    pub content: String,
}

/// A checkpoint's way to write conversations.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChatTemplate {
    /// The template (Jinja).
    pub source: String,
    /// What it calls `bos_token`.
    pub bos_token: Option<String>,
    /// What it calls `eos_token`.
    pub eos_token: Option<String>,
}

/// A template that does not render.
#[derive(Debug, thiserror::Error)]
#[error("chat template: {0:#}")]
pub struct ChatError(Error);

impl ChatTemplate {
    /// Returns the prompt after which the assistant's next message follows.
    pub fn prompt(&self, messages: &[Message]) -> Result<String, ChatError> {
        self.render(messages, true).map_err(ChatError)
    }

    /// Returns the text with which the user's next turn begins, where the template shows one: an answer ends before it.
    pub fn next_turn(&self) -> Option<String> {
        const MARKS: [&str; 3] = ["\u{1}first\u{1}", "\u{1}second\u{1}", "\u{1}third\u{1}"];
        let roles = ["user", "assistant", "user"];
        let messages: Vec<_> = roles.iter().zip(MARKS).map(|(role, mark)| Message { role, content: mark.to_owned() }).collect();
        let text = self.render(&messages, false).ok()?;
        let between = text.split_once(MARKS[1])?.1.split_once(MARKS[2])?.0.trim_end();
        (!between.trim().is_empty()).then(|| between.to_owned())
    }

    fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, Error> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        let template = environment.template_from_str(&self.source)?;
        template.render(context! { messages, add_generation_prompt, bos_token => self.bos_token, eos_token => self.eos_token })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate { source: source.to_owned(), bos_token: None, eos_token: Some("<|im_end|>".to_owned()) }
    }

    fn user(text: &str) -> [Message; 1] {
        [Message { role: "user", content: text.to_owned() }]
    }

    const CHATML: &str = "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content.strip() + eos_token + '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";

    #[test]
    fn renders_as_pythons_jinja_does() {
        let prompt = template(CHATML).prompt(&user(" hello ")).expect("it renders");
        assert_eq!(prompt, "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n");
        assert_eq!(template(CHATML).next_turn().as_deref(), Some("<|im_end|>\n<|im_start|>user"));
    }

    #[test]
    fn a_template_that_refuses_or_never_ends_is_an_error() {
        let refused = template("{{ raise_exception('no system role') }}").prompt(&user("x")).expect_err("it refuses");
        assert!(refused.to_string().contains("no system role"), "{refused}");
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}{% endfor %}";
        assert!(template(endless).prompt(&user("x")).is_err());
        assert_eq!(template("{{ raise_exception('x') }}").next_turn(), None);
    }
}
