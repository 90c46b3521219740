//! Conversations, their text and tokens, against transformers: `tests/vectors/chat`.

use inference::chat::{ChatError, ChatTemplate, Message, Rendering, Role};
use inference::checkpoint::Checkpoint;
use inference::tokenizer::{SpecialTokens, Tokenizer};
use serde_json::{Value, json};

use crate::support::{copy_shipped_model, edit_json, shipped_model, vectors};

fn read(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(vectors("chat").join(name)).expect("vectors")).expect("JSON")
}

fn texts(value: &Value) -> Vec<String> {
    value.as_array().expect("a list").iter().map(|text| text.as_str().expect("a text").to_owned()).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

/// The shipped tokenizer with the marks of the templates.
fn tokenizer(marks: &Value) -> Tokenizer {
    let mut json: Value = serde_json::from_slice(&std::fs::read(shipped_model().join("tokenizer.json")).expect("it ships")).expect("JSON");
    let mut next = json["model"]["vocab"].as_object().expect("a vocabulary").len();
    for (kind, special) in [("special", true), ("plain", false)] {
        for mark in texts(&marks[kind]) {
            let token = json!({"id": next, "content": mark, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": special});
            json["added_tokens"].as_array_mut().expect("tokens").push(token);
            next += 1;
        }
    }
    Tokenizer::from_bytes(json.to_string().as_bytes()).expect("a tokenizer")
}

fn message(value: &Value) -> Message {
    let role = match value["role"].as_str() {
        Some("system") => Role::System,
        Some("user") => Role::User,
        _ => Role::Assistant,
    };
    Message::text(role, value["content"].as_str().expect("a text"))
}

/// Fifteen conversations in each template: the text and the tokens are those of transformers, and keeping contents apart changes none of them.
#[test]
fn conversations_have_the_text_and_tokens_of_transformers() {
    let all = read("prompts.json");
    let tokenizer = tokenizer(&all["marks"]);
    let cases = all["cases"].as_array().expect("a list");
    assert!(cases.len() == 60, "{}", cases.len());
    for case in cases {
        let source = std::fs::read_to_string(vectors("chat").join(case["template"].as_str().expect("a name"))).expect("a template");
        let template = ChatTemplate { source, bos_token: Some("<s>".to_owned()), eos_token: Some("</s>".to_owned()) };
        let messages: Vec<_> = case["messages"].as_array().expect("a list").iter().map(message).collect();
        let render =
            |messages: &[Message]| template.render(messages, Rendering { add_generation_prompt: true, now_ms: 0, bytes_max: 1 << 20 });
        let rendered = tokenizer.control_tokens().render(&messages, render);
        if let Some(why) = case["refused"].as_str() {
            assert_eq!(rendered, Err(ChatError::Raised(why.to_owned())), "{case}");
            continue;
        }
        let (text, breaks) = rendered.unwrap_or_else(|error| panic!("{case}: {error}"));
        // Thoughts of the model are its own; nothing else here spells a token.
        assert_eq!(text.replace(breaks, ""), case["prompt"].as_str().expect("a text"), "{case}");
        assert_eq!(tokenizer.encode_broken(&text, breaks).expect("tokens"), ids(&case["ids"]), "{case}");
    }
}

/// A vocabulary and merges by themselves make the tokens that transformers makes of them.
#[test]
fn a_tokenizer_without_tokenizer_json_has_the_tokens_of_transformers() {
    let all = read("qwen2.json");
    let dir = tempfile::tempdir().expect("a directory");
    copy_shipped_model(dir.path());
    let shipped: Value = serde_json::from_slice(&std::fs::read(dir.path().join("tokenizer.json")).expect("it ships")).expect("JSON");
    std::fs::remove_file(dir.path().join("tokenizer.json")).expect("removed");
    std::fs::write(dir.path().join("vocab.json"), shipped["model"]["vocab"].to_string()).expect("written");
    let pair = |merge: &Value| merge.as_str().map_or_else(|| texts(merge).join(" "), str::to_owned);
    let merges: Vec<_> = shipped["model"]["merges"].as_array().expect("merges").iter().map(pair).collect();
    std::fs::write(dir.path().join("merges.txt"), format!("#version: 0.2\n{}\n", merges.join("\n"))).expect("written");
    edit_json(&dir.path().join("tokenizer_config.json"), |json| *json = all["config"].clone());
    let made = Checkpoint::open(dir.path()).expect("it opens").tokenizer.expect("a tokenizer");
    let tokenizer = Tokenizer::from_bytes(&made).expect("a tokenizer");
    for case in all["cases"].as_array().expect("a list") {
        let tokens = tokenizer.encode(case["text"].as_str().expect("a text"), SpecialTokens::Add).expect("tokens");
        assert_eq!(tokens, ids(&case["ids"]), "{case}");
    }
}
