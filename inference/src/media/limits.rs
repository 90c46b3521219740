//! How much of a picture, a video or a sound is taken, and what is wrong with one that is not.

use super::resize::SizeError;

/// Limits of media; each is checked before anything of that size is made.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct MediaLimits {
    /// Bytes of a file.
    pub bytes: u64,
    /// Pixels of a picture or of a frame, as its file has them.
    pub pixels: u64,
    /// Frames of a video that a tower takes.
    pub frames: usize,
    /// Seconds of a sound or a video.
    pub seconds: f64,
    /// Places of a prompt that one medium may take.
    pub tokens: usize,
}

impl Default for MediaLimits {
    fn default() -> Self {
        Self { bytes: 64 << 20, pixels: 64 << 20, frames: 768, seconds: 1200.0, tokens: 32_768 }
    }
}

/// Why a file is not taken.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum MediaError {
    /// Beyond a limit.
    #[error("has {found} {what}, the limit is {limit}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// How much there is.
        found: String,
        /// How much is taken.
        limit: String,
    },
    /// A format that is not read.
    #[error("is no {kind} that is read ({known})")]
    Format {
        /// What it should be.
        kind: &'static str,
        /// What is read.
        known: &'static str,
    },
    /// Its bytes make no sense.
    #[error("cannot be read: {0}")]
    Damaged(String),
    /// Nothing is in it.
    #[error("is empty: {0}")]
    Empty(&'static str),
    /// No tower takes its shape.
    #[error(transparent)]
    Size(#[from] SizeError),
}

impl MediaError {
    pub(crate) fn limit(what: &'static str, found: impl Into<String>, limit: f64) -> Self {
        Self::Limit { what, found: found.into(), limit: limit.to_string() }
    }

    pub(crate) fn damaged(error: impl std::fmt::Display) -> Self {
        Self::Damaged(protocol::plain_text::plain_line(&error.to_string()))
    }
}

impl MediaLimits {
    pub(crate) fn check_bytes(&self, bytes: &[u8]) -> Result<(), MediaError> {
        if bytes.len() as u64 > self.bytes {
            return Err(MediaError::limit("bytes", bytes.len().to_string(), self.bytes as f64));
        }
        if bytes.is_empty() { Err(MediaError::Empty("it has no bytes")) } else { Ok(()) }
    }

    pub(crate) fn check_pixels(&self, width: u64, height: u64) -> Result<(), MediaError> {
        let pixels = width.saturating_mul(height);
        if pixels > self.pixels {
            return Err(MediaError::limit("pixels", format!("{width} × {height}"), self.pixels as f64));
        }
        if pixels == 0 { Err(MediaError::Empty("it has no pixels")) } else { Ok(()) }
    }
}
