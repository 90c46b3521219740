//! Which `tokenizer.json` is taken. What one does to a text is a closed list here: a tokenizer comes from elsewhere, and the library that runs it
//! trusts it with memory and panics where it makes no sense.

use protocol::plain_text::plain_line;
use serde::Deserialize;
use serde_json::Value;

/// Bytes that a text may grow to for each byte, through all steps of a tokenizer.
pub const GROWTH_MAX: usize = 16;
/// Longest text that a step puts in the place of another, in bytes.
pub const REPLACEMENT_BYTES_MAX: usize = 64;
/// Steps in a sequence, and in all sequences together.
pub const STEPS_MAX: usize = 32;
/// Tokens that a tokenizer adds to a text by its own rules.
pub const ADDED_AROUND_MAX: usize = 16;
/// Longest added token, in bytes.
pub const ADDED_TOKEN_BYTES_MAX: usize = 512;

/// The parts of a `tokenizer.json` that are looked at.
#[derive(Deserialize)]
struct Parts {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    model: Model,
}

#[derive(Deserialize)]
struct AddedToken {
    content: String,
}

/// The vocabulary is the library's to read.
#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type", default)]
    kind: Option<String>,
}

/// Says what is wrong with a `tokenizer.json`, if anything is.
pub fn check(bytes: &[u8]) -> Result<(), String> {
    let parts: Parts = serde_json::from_slice(bytes).map_err(|error| format!("is not a tokenizer: {error}"))?;
    let kind = parts.model.kind.as_deref().unwrap_or("BPE");
    if !["BPE", "Unigram", "WordPiece", "WordLevel"].contains(&kind) {
        return Err(format!("model {} is not known", plain_line(kind)));
    }
    let growth = normalizer(&parts.normalizer)?.saturating_mul(pre_tokenizer(&parts.pre_tokenizer)?);
    if growth > GROWTH_MAX {
        return Err(format!("its normalizer and pre-tokenizer may make {growth} bytes of one; {GROWTH_MAX} is the limit"));
    }
    post_processor(&parts.post_processor)?;
    let growth = decoder(&parts.decoder)?;
    if growth > GROWTH_MAX {
        return Err(format!("its decoder may make {growth} bytes of one; {GROWTH_MAX} is the limit"));
    }
    match parts.added_tokens.iter().find(|token| token.content.is_empty() || token.content.len() > ADDED_TOKEN_BYTES_MAX) {
        Some(token) => Err(format!("an added token has {} bytes; 1 to {ADDED_TOKEN_BYTES_MAX} are fine", token.content.len())),
        None => Ok(()),
    }
}

/// The steps of a part, sequences taken apart.
fn steps<'a>(part: &str, value: &'a Value, list: &str) -> Result<Vec<(&'a str, &'a Value)>, String> {
    let (mut steps, mut rest) = (Vec::new(), vec![value]);
    while let Some(value) = rest.pop() {
        if value.is_null() {
            continue;
        }
        let kind = value["type"].as_str().ok_or_else(|| format!("{part} has a step without a type"))?;
        if kind == "Sequence" {
            let inner = value[list].as_array().ok_or_else(|| format!("{part} has a Sequence without {list}"))?;
            rest.extend(inner.iter().rev());
        } else {
            steps.push((kind, value));
        }
        if steps.len() + rest.len() > STEPS_MAX {
            return Err(format!("{part} has more than {STEPS_MAX} steps"));
        }
    }
    Ok(steps)
}

/// Bytes that a normalizer makes of one at most.
fn normalizer(value: &Value) -> Result<usize, String> {
    let mut growth = 1_usize;
    for (kind, step) in steps("normalizer", value, "normalizers")? {
        let more = match kind {
            "NFC" | "StripAccents" | "Strip" | "Nmt" => 1,
            // Three bytes become eleven at most (U+FDFA in NFKC has 33 for 3).
            "NFD" | "NFKC" | "NFKD" => 11,
            "Lowercase" | "BertNormalizer" => 3,
            "Replace" => replacement("normalizer", step)?,
            "Prepend" => 1 + text_of("normalizer", step, "prepend")?.len() / REPLACEMENT_BYTES_MAX,
            other => return Err(not_known("normalizer", other)),
        };
        growth = growth.saturating_mul(more);
    }
    Ok(growth)
}

/// Bytes that one becomes where a pattern is replaced.
fn replacement(part: &str, step: &Value) -> Result<usize, String> {
    let content = step["content"].as_str().ok_or_else(|| format!("{part} has a Replace without content"))?;
    if content.len() > REPLACEMENT_BYTES_MAX {
        return Err(format!("{part} replaces by {} bytes; {REPLACEMENT_BYTES_MAX} is the limit", content.len()));
    }
    match (step["pattern"]["String"].as_str(), step["pattern"]["Regex"].as_str()) {
        (Some(""), _) | (None, None) => Err(format!("{part} has a Replace without a pattern")),
        (Some(text), _) => Ok(content.len().div_ceil(text.len()).max(1)),
        // It may match nothing, between all bytes.
        (None, Some(_)) => Ok(1 + content.len()),
    }
}

fn text_of<'a>(part: &str, step: &'a Value, name: &str) -> Result<&'a str, String> {
    match step[name].as_str() {
        Some(text) if !text.is_empty() && text.len() <= REPLACEMENT_BYTES_MAX => Ok(text),
        _ => Err(format!("{part}: {name} must have 1 to {REPLACEMENT_BYTES_MAX} bytes")),
    }
}

/// Bytes that a pre-tokenizer makes of one at most; byte levels spell each in two.
fn pre_tokenizer(value: &Value) -> Result<usize, String> {
    let mut growth = 1;
    for (kind, step) in steps("pre_tokenizer", value, "pretokenizers")? {
        match kind {
            "ByteLevel" => growth = 2,
            "Metaspace" => drop(text_of("pre_tokenizer", step, "replacement")?),
            "BertPreTokenizer" | "Whitespace" | "WhitespaceSplit" | "Punctuation" | "Digits" | "Split" | "CharDelimiterSplit"
            | "UnicodeScripts" => {}
            other => return Err(not_known("pre_tokenizer", other)),
        }
    }
    Ok(growth)
}

fn post_processor(value: &Value) -> Result<(), String> {
    for (kind, step) in steps("post_processor", value, "processors")? {
        match kind {
            "ByteLevel" | "BertProcessing" | "RobertaProcessing" => {}
            "TemplateProcessing" => {
                for form in ["single", "pair"] {
                    let parts = step[form].as_array().map_or(&[][..], Vec::as_slice);
                    let texts = parts.iter().filter(|part| !part["Sequence"].is_null()).count();
                    if parts.len() > ADDED_AROUND_MAX || texts > 2 {
                        return Err(format!("post_processor: {form} has {} parts, {texts} of them texts", parts.len()));
                    }
                }
                let tokens = step["special_tokens"].as_object().into_iter().flat_map(serde_json::Map::values);
                if tokens.map(|token| token["ids"].as_array().map_or(0, Vec::len)).any(|ids| ids > ADDED_AROUND_MAX) {
                    return Err(format!("post_processor: a special token stands for more than {ADDED_AROUND_MAX}"));
                }
            }
            other => return Err(not_known("post_processor", other)),
        }
    }
    Ok(())
}

/// Bytes that a decoder makes of one at most.
fn decoder(value: &Value) -> Result<usize, String> {
    let mut growth = 1_usize;
    for (kind, step) in steps("decoder", value, "decoders")? {
        match kind {
            "ByteLevel" | "ByteFallback" | "Fuse" | "BPEDecoder" => {}
            "Metaspace" => drop(text_of("decoder", step, "replacement")?),
            "WordPiece" => drop(text_of("decoder", step, "prefix")?),
            "Replace" => growth = growth.saturating_mul(replacement("decoder", step)?),
            "Strip" => {
                if ["start", "stop"].iter().any(|side| step[side].as_u64().is_none_or(|count| count > REPLACEMENT_BYTES_MAX as u64)) {
                    return Err(format!("decoder: Strip takes off 0 to {REPLACEMENT_BYTES_MAX} characters"));
                }
            }
            other => return Err(not_known("decoder", other)),
        }
    }
    Ok(growth)
}

fn not_known(part: &str, kind: &str) -> String {
    format!("{part} {} is not known", plain_line(kind))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn with(part: &str, value: Value) -> Result<(), String> {
        let mut json = json!({"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}});
        json[part] = value;
        check(json.to_string().as_bytes())
    }

    fn replace(pattern: &Value, content: &str) -> Value {
        json!({"type": "Replace", "pattern": pattern, "content": content})
    }

    #[test]
    fn takes_what_the_families_have() {
        let llama =
            json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace(&json!({"String": " "}), "▁")]});
        let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
        let decoders = json!([replace(&json!({"String": "▁"}), " "), {"type": "ByteFallback"}, {"type": "Fuse"}, strip]);
        let template = json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}});
        let split = json!({"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}]});
        for (part, value) in [
            ("normalizer", Value::Null),
            ("normalizer", json!({"type": "NFC"})),
            ("normalizer", llama),
            ("decoder", json!({"type": "Sequence", "decoders": decoders})),
            ("post_processor", template),
            ("pre_tokenizer", split),
        ] {
            assert_eq!(with(part, value), Ok(()), "{part}");
        }
    }

    #[test]
    fn refuses_what_multiplies_panics_or_is_not_known() {
        let grows = |times: usize| json!({"type": "Sequence", "normalizers": vec![replace(&json!({"String": "l"}), "ll"); times]});
        assert_eq!(with("normalizer", grows(4)), Ok(()));
        let long = "l".repeat(REPLACEMENT_BYTES_MAX + 1);
        let parts = vec![json!({"SpecialToken": {"id": "a", "type_id": 0}}); ADDED_AROUND_MAX + 1];
        let texts = vec![json!({"Sequence": {"id": "A", "type_id": 0}}); 3];
        for (part, value) in [
            ("normalizer", grows(5)),
            ("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"})),
            ("normalizer", json!({"type": "Prepend", "prepend": ""})),
            ("normalizer", replace(&json!({"String": ""}), "x")),
            ("normalizer", replace(&json!({"String": "x"}), &long)),
            ("normalizer", replace(&json!({"Regex": ""}), &"x".repeat(GROWTH_MAX))),
            ("normalizer", json!({"type": "Sequence", "normalizers": vec![json!({"type": "NFC"}); STEPS_MAX + 1]})),
            ("normalizer", json!("NFC")),
            ("decoder", json!({"type": "CTC"})),
            ("decoder", json!({"type": "Strip", "content": " ", "start": u64::MAX, "stop": 0})),
            ("decoder", replace(&json!({"String": "x"}), &"x".repeat(GROWTH_MAX + 1))),
            ("pre_tokenizer", json!({"type": "Delimiter\u{1b}"})),
            ("post_processor", json!({"type": "TemplateProcessing", "single": parts})),
            ("post_processor", json!({"type": "TemplateProcessing", "single": texts})),
            ("added_tokens", json!([{"id": 1, "content": ""}])),
            ("model", json!({"type": "Other"})),
        ] {
            let refused = with(part, value.clone()).expect_err(&value.to_string());
            assert!(!refused.contains('\u{1b}'), "{refused}");
        }
    }
}
