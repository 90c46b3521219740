//! A byte-level BPE as older libraries keep it, in `vocab.json` and `merges.txt`, made into the `tokenizer.json` that transformers makes of it:
//! `Qwen2Converter` of `convert_slow_tokenizer.py`.

use std::collections::BTreeMap;

use protocol::plain_text::plain_line;
use serde_json::{Map, Value, json};

/// Classes of tokenizers that split text like this one.
const CLASSES: [&str; 2] = ["Qwen2Tokenizer", "Qwen2TokenizerFast"];
/// How text is split before bytes are joined: contractions, words with what stands before them, digits, punctuation, white space.
const SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Returns `tokenizer.json`, or why there can be none.
pub(super) fn tokenizer_json(vocab: &[u8], merges: &[u8], config: &Value) -> Result<Vec<u8>, String> {
    let class = config["tokenizer_class"].as_str().unwrap_or("of no name");
    if !CLASSES.contains(&class) {
        return Err(format!("there is no tokenizer.json, and how the tokenizer {} splits text is not known", plain_line(class)));
    }
    let vocab: BTreeMap<String, u32> = serde_json::from_slice(vocab).map_err(|error| format!("vocab.json is no vocabulary: {error}"))?;
    let merges = std::str::from_utf8(merges).map_err(|_| "merges.txt is not UTF-8".to_owned())?;
    let mut pairs = Vec::new();
    for (number, line) in merges.lines().enumerate() {
        if line.is_empty() || number == 0 && line.starts_with("#version") {
            continue;
        }
        let pair = line.split_once(' ').filter(|(a, b)| [*a, *b, &format!("{a}{b}")].iter().all(|piece| vocab.contains_key(*piece)));
        let (a, b) =
            pair.ok_or_else(|| format!("merges.txt line {}: {:?} joins no two pieces of the vocabulary", number + 1, plain_line(line)))?;
        pairs.push(json!([a, b]));
    }
    let level = |more: Value| {
        let mut level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
        level.as_object_mut().expect("an object").extend(more.as_object().cloned().unwrap_or_default());
        level
    };
    let split = json!({"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": false});
    let made = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(config)?,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level(json!({}))]},
        "post_processor": level(json!({})),
        "decoder": level(json!({"add_prefix_space": true, "trim_offsets": true, "use_regex": true})),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": pairs,
        },
    });
    Ok(made.to_string().into_bytes())
}

/// The tokens of `added_tokens_decoder`, by their numbers.
fn added_tokens(config: &Value) -> Result<Vec<Value>, String> {
    let none = Map::new();
    let listed = config["added_tokens_decoder"].as_object().unwrap_or(&none);
    let mut tokens = BTreeMap::new();
    for (number, token) in listed {
        let id: u32 = number.parse().map_err(|_| format!("added_tokens_decoder: {:?} is no number", plain_line(number)))?;
        let flag = |name: &str| token[name].as_bool().unwrap_or(false);
        let content = token["content"].as_str().ok_or_else(|| format!("added_tokens_decoder: token {id} has no content"))?;
        let entry = json!({
            "id": id, "content": content, "single_word": flag("single_word"), "lstrip": flag("lstrip"), "rstrip": flag("rstrip"),
            "normalized": flag("normalized"), "special": flag("special"),
        });
        tokens.insert(id, entry);
    }
    Ok(tokens.into_values().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_made_says_why() {
        let config = json!({"tokenizer_class": "Qwen2Tokenizer"});
        let made = |vocab: &str, merges: &str, config: &Value| tokenizer_json(vocab.as_bytes(), merges.as_bytes(), config);
        let vocab = r#"{"a": 0, "b": 1, "ab": 2}"#;
        assert!(made(vocab, "#version: 0.2\na b\n", &config).is_ok());
        for (vocab, merges, config) in [
            ("[]", "", &config),
            (vocab, "a c", &config),
            (vocab, "ab", &config),
            (vocab, "a b", &json!({"tokenizer_class": "LlamaTokenizer"})),
            (vocab, "a b", &json!({})),
            (vocab, "a b", &json!({"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": {"x": {"content": "y"}}})),
        ] {
            assert!(made(vocab, merges, config).is_err(), "{vocab} {merges} {config}");
        }
    }
}
