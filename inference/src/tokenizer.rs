//! Text to tokens and back, by the checkpoint's own `tokenizer.json`.

use std::collections::HashMap;
use std::sync::Arc;

use tokenizers::{DecoderWrapper, NormalizerWrapper};

use crate::control_tokens::{ControlToken, ControlTokens};
use crate::tokenizer_rules;

/// Tokens after which what is no character yet counts as broken; four bytes make any character, and stray ones may precede.
const UNFINISHED_TOKENS_MAX: usize = 8;

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Bytes of text that one token can come from at most, where that is known.
    token_bytes_max: Option<usize>,
    /// Added tokens by their numbers.
    added: HashMap<u32, ControlToken>,
    control: ControlTokens,
}

/// A tokenizer that cannot be used, or a text that it cannot take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("tokenizer: {0}")]
pub struct TokenizerError(String);

/// Whether a text gets the special tokens that the tokenizer's own rules put around one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SpecialTokens {
    /// As `tokenizer.json` says.
    Add,
    /// The text has them already, or must not have any.
    AsWritten,
}

impl Tokenizer {
    /// Reads a `tokenizer.json` of those that `tokenizer_rules` takes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TokenizerError> {
        tokenizer_rules::check(bytes).map_err(TokenizerError)?;
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| TokenizerError(error.to_string()))?;
        // A text goes in whole: cutting and filling up are not this tokenizer's to decide.
        inner.with_truncation(None).map_err(|error| TokenizerError(error.to_string()))?;
        inner.with_padding(None);
        let shrinks = match inner.get_normalizer() {
            None => Some(1),
            // Composition turns up to nine bytes into three (Hangul syllables).
            Some(NormalizerWrapper::NFC(_)) => Some(3),
            Some(_) => None,
        };
        let token = |token: &tokenizers::AddedToken| ControlToken { text: token.content.clone(), special: token.special };
        let added: HashMap<_, _> = inner.get_added_tokens_decoder().iter().map(|(id, added)| (*id, token(added))).collect();
        let control = ControlTokens::new(added.values().cloned());
        let tokenizer = Self { inner, token_bytes_max: None, added, control };
        let longest = (0..tokenizer.token_count()).map(|token| tokenizer.piece_bytes(token)).max();
        Ok(Self { token_bytes_max: shrinks.zip(longest).map(|(shrinks, longest)| shrinks * longest.max(1)), ..tokenizer })
    }

    /// Tokens, those added to the vocabulary among them.
    pub fn token_count(&self) -> u32 {
        self.inner.get_vocab_size(true) as u32
    }

    /// The longest text, in bytes, that can become no more than `tokens` tokens; a longer one need not be looked at.
    pub fn text_bytes_max(&self, tokens: usize) -> usize {
        self.token_bytes_max.map_or(usize::MAX, |most| most.saturating_mul(tokens))
    }

    /// An upper bound of the bytes of a token's text: of a byte-level piece, every character is one of them or more.
    fn piece_bytes(&self, token: u32) -> usize {
        self.inner.id_to_token(token).map_or(0, |piece| piece.len())
    }

    /// Returns the tokens of `text`.
    pub fn encode(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode(text, special == SpecialTokens::Add);
        encoding.map(|encoding| encoding.get_ids().to_vec()).map_err(|error| TokenizerError(error.to_string()))
    }

    /// Returns the tokens of a text, as written; none reaches over the character `breaks`, which stands for nothing.
    pub fn encode_broken(&self, text: &str, breaks: char) -> Result<Vec<u32>, TokenizerError> {
        let pieces = text.split(breaks).filter(|piece| !piece.is_empty());
        let tokens: Result<Vec<_>, _> = pieces.map(|piece| self.encode(piece, SpecialTokens::AsWritten)).collect();
        Ok(tokens?.concat())
    }

    /// The tokens that control a model.
    pub fn control_tokens(&self) -> &ControlTokens {
        &self.control
    }

    /// How a special token is spelled, which [`decode`](Self::decode) leaves out; nothing of any other.
    pub fn special_text(&self, token: u32) -> Option<&str> {
        self.added.get(&token).filter(|added| added.special).map(|added| added.text.as_str())
    }

    /// The special token that a text begins with.
    pub fn special_at_start(&self, text: &str) -> Option<u32> {
        let starts = self.added.iter().filter(|(_, added)| added.special && text.starts_with(&added.text));
        starts.max_by_key(|(_, added)| added.text.len()).map(|(token, _)| *token)
    }

    /// Returns the text of `tokens`, special tokens left out.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, TokenizerError> {
        self.inner.decode(tokens, true).map_err(|error| TokenizerError(error.to_string()))
    }

    /// The bytes of text that `token` stands for: perhaps a part of a character, or none for a special token.
    pub fn bytes_of(&self, token: u32) -> Vec<u8> {
        let Some(piece) = self.inner.id_to_token(token) else { return Vec::new() };
        let special = self.added.contains_key(&token);
        match self.inner.get_decoder() {
            // Byte-level pieces spell every byte as one character.
            Some(DecoderWrapper::ByteLevel(_)) if !special => piece.chars().filter_map(spelled_byte).collect(),
            _ => self.decode(&[token]).map_or_else(|_| Vec::new(), String::into_bytes),
        }
    }

    /// How many bytes of text `token` stands for.
    pub fn token_bytes(&self, token: u32) -> usize {
        self.bytes_of(token).len()
    }

    /// Starts turning tokens into text as they come.
    pub fn stream(self: &Arc<Self>) -> TextStream {
        TextStream { tokenizer: Arc::clone(self), tokens: Vec::new(), start: 0, shown: 0 }
    }
}

/// The byte that a character of a byte-level piece stands for: printable ones stand for themselves, the others follow from U+0100 on
/// (Radford et al. 2019, `bytes_to_unicode`).
fn spelled_byte(c: char) -> Option<u8> {
    let stands_for_itself = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match u32::from(c) {
        code @ 0..0x100 => u8::try_from(code).ok().filter(|&byte| stands_for_itself(byte)),
        code => (0..=u8::MAX).filter(|&byte| !stands_for_itself(byte)).nth(code as usize - 0x100),
    }
}

/// Text as it grows. A character whose bytes are spread over tokens appears when its last byte is there.
#[derive(Debug)]
pub struct TextStream {
    tokenizer: Arc<Tokenizer>,
    tokens: Vec<u32>,
    start: usize, // first token of those decoded together, so that what joins two tokens is decoded with both
    shown: usize, // tokens from `start` whose text was handed out
}

impl TextStream {
    /// Adds a token and returns the text that is complete now.
    pub fn push(&mut self, token: u32) -> Result<String, TokenizerError> {
        self.tokens.push(token);
        let new = self.new_text()?;
        // An unfinished character decodes to U+FFFD at the end. One that is still unfinished after so many tokens never ends.
        if new.is_empty() || (new.ends_with('\u{FFFD}') && self.tokens.len() - self.shown < UNFINISHED_TOKENS_MAX) {
            return Ok(String::new());
        }
        self.start = self.shown;
        self.shown = self.tokens.len();
        Ok(new)
    }

    /// Returns what is left: bytes that never became a character, as U+FFFD.
    pub fn finish(self) -> Result<String, TokenizerError> {
        self.new_text()
    }

    /// The text of the tokens not shown yet: what decoding them together with those before adds.
    fn new_text(&self) -> Result<String, TokenizerError> {
        let before = self.tokenizer.decode(&self.tokens[self.start..self.shown])?;
        let after = self.tokenizer.decode(&self.tokens[self.start..])?;
        let same =
            before.char_indices().zip(after.chars()).find(|((_, a), b)| a != b).map_or(before.len().min(after.len()), |((at, _), _)| at);
        Ok(after[same..].to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tokenizer of bytes: every token is one byte.
    fn bytes() -> Arc<Tokenizer> {
        let alphabet: std::collections::BTreeSet<char> =
            tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
        let vocab: serde_json::Map<_, _> = alphabet.iter().enumerate().map(|(id, c)| (c.to_string(), id.into())).collect();
        let level = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null, "pre_tokenizer": level,
            "post_processor": null, "decoder": level,
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
                      "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
        });
        Arc::new(Tokenizer::from_bytes(json.to_string().as_bytes()).expect("a valid tokenizer"))
    }

    #[test]
    fn characters_appear_whole_and_none_is_lost() {
        let tokenizer = bytes();
        for text in ["plain", "é", "汉字 and 🦀🦀", "\u{FFFD}", "a\u{FFFD}b🦀"] {
            let tokens = tokenizer.encode(text, SpecialTokens::AsWritten).expect("it encodes");
            assert_eq!(tokens.len(), text.len());
            let bytes: Vec<u8> = tokens.iter().flat_map(|&token| tokenizer.bytes_of(token)).collect();
            assert_eq!(bytes, text.as_bytes());
            let mut stream = tokenizer.stream();
            let mut streamed = String::new();
            for &token in &tokens {
                streamed += &stream.push(token).expect("it decodes");
                assert!(text.starts_with(&streamed), "{streamed:?} of {text:?}");
            }
            assert_eq!(streamed + &stream.finish().expect("it decodes"), text);
        }
    }

    #[test]
    fn no_text_within_the_bound_is_too_long_and_none_beyond_it_fits() {
        let tokenizer = bytes();
        // One token a byte; pieces of up to two bytes spell them.
        assert_eq!(tokenizer.text_bytes_max(100), 200);
        let tokens = tokenizer.encode(&"a".repeat(201), SpecialTokens::AsWritten).expect("it encodes");
        assert!(tokens.len() > 100);
    }

    #[test]
    fn every_byte_has_a_spelling() {
        let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        let bytes: std::collections::BTreeSet<u8> = alphabet.into_iter().filter_map(spelled_byte).collect();
        assert_eq!(bytes.len(), 256);
    }

    #[test]
    fn a_stray_byte_does_not_swallow_the_character_after_it() {
        let tokenizer = bytes();
        let crab = tokenizer.encode("🦀", SpecialTokens::AsWritten).expect("it encodes");
        let tokens = [&crab[3..], &crab[..], &crab[..2]].concat();
        let mut stream = tokenizer.stream();
        let mut streamed: String = tokens.iter().map(|&token| stream.push(token).expect("it decodes")).collect();
        streamed += &stream.finish().expect("it decodes");
        assert_eq!(streamed, tokenizer.decode(&tokens).expect("it decodes"));
        assert!(streamed.contains('🦀'));
    }
}
