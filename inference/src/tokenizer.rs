//! Text to tokens and back, by the checkpoint's own `tokenizer.json`.

use tokenizers::DecoderWrapper;

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
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
    /// Reads a `tokenizer.json`.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TokenizerError> {
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| TokenizerError(error.to_string()))?;
        // A text goes in whole: cutting and filling up are not this tokenizer's to decide.
        inner.with_truncation(None).map_err(|error| TokenizerError(error.to_string()))?;
        inner.with_padding(None);
        Ok(Self { inner })
    }

    /// Returns the tokens of `text`.
    pub fn encode(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode(text, special == SpecialTokens::Add);
        encoding.map(|encoding| encoding.get_ids().to_vec()).map_err(|error| TokenizerError(error.to_string()))
    }

    /// Returns the text of `tokens`, special tokens left out.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, TokenizerError> {
        self.inner.decode(tokens, true).map_err(|error| TokenizerError(error.to_string()))
    }

    /// How many bytes of text `token` stands for.
    pub fn token_bytes(&self, token: u32) -> usize {
        let Some(piece) = self.inner.id_to_token(token) else { return 0 };
        let special = self.inner.get_added_tokens_decoder().contains_key(&token);
        match self.inner.get_decoder() {
            // Byte-level pieces spell every byte as one character.
            Some(DecoderWrapper::ByteLevel(_)) if !special => piece.chars().count(),
            _ => self.decode(&[token]).map_or(0, |text| text.len()),
        }
    }

    /// Starts turning tokens into text as they come.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: self, tokens: Vec::new(), start: 0, shown: 0 }
    }
}

/// Text as it grows. A character whose bytes are spread over tokens appears when its last byte is there.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    tokens: Vec<u32>,
    start: usize, // first token of those decoded together, so that what joins two tokens is decoded with both
    shown: usize, // tokens from `start` whose text was handed out
}

impl TextStream<'_> {
    /// Adds a token and returns the text that is complete now.
    pub fn push(&mut self, token: u32) -> Result<String, TokenizerError> {
        self.tokens.push(token);
        let before = self.tokenizer.decode(&self.tokens[self.start..self.shown])?;
        let after = self.tokenizer.decode(&self.tokens[self.start..])?;
        // An unfinished character decodes to U+FFFD at the end; four tokens hold any character's bytes.
        let unfinished = after.ends_with('\u{FFFD}') && self.tokens.len() - self.shown < 4;
        if unfinished || after.len() <= before.len() {
            return Ok(String::new());
        }
        self.start = self.shown;
        self.shown = self.tokens.len();
        Ok(after.get(before.len()..).unwrap_or_default().to_owned())
    }

    /// Returns what is left: bytes that never became a character, as U+FFFD.
    pub fn finish(self) -> Result<String, TokenizerError> {
        let before = self.tokenizer.decode(&self.tokens[self.start..self.shown])?;
        let after = self.tokenizer.decode(&self.tokens[self.start..])?;
        Ok(after.get(before.len()..).unwrap_or_default().to_owned())
    }
}
