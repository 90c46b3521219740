//! Conversations and questions in JSON files, and the media that they name by their paths.

use std::path::{Path, PathBuf};

use base::failure::{Failure, Kind, io_failure};
use inference::chat::{Content, ContentPart, MediumKind, Message, Role};
use serde::Deserialize;

use crate::media::{FPS_DEFAULT, GivenMedium, MediaSound, MediaSource};

/// Longest file of text or of a medium, in bytes.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// A message of a file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileMessage {
    role: Role,
    content: FileContent,
}

/// A question of a file, and its answer.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileQuestion {
    content: FileContent,
    answer: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum FileContent {
    Text(String),
    Parts(Vec<FilePart>),
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
enum FilePart {
    Text { text: String },
    Image { path: PathBuf },
    Audio { path: PathBuf },
    Video { path: PathBuf, fps: Option<f64>, sound: Option<FileSound> },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum FileSound {
    Own(bool),
    Path(PathBuf),
}

/// A question about media, and its answer.
#[derive(Clone, Debug)]
pub struct Question {
    /// What is asked.
    pub content: Vec<ContentPart>,
    /// The media that it is about, in the order of its parts.
    pub media: Vec<GivenMedium>,
    /// What is to be answered.
    pub answer: String,
}

/// Reads a JSON list of messages and the media that they name; paths are relative to the file, or else to where the command was given.
pub fn read_messages(file: &Path) -> Result<(Vec<Message>, Vec<GivenMedium>), Failure> {
    let read: Vec<FileMessage> =
        serde_json::from_slice(&bytes_of(file)?).map_err(|error| wrong(file, format!("is no list of messages: {error}")))?;
    let mut media = Vec::new();
    let mut messages = Vec::new();
    for FileMessage { role, content } in read {
        let content = match content {
            FileContent::Text(text) => Content::Text(text),
            FileContent::Parts(parts) => Content::Parts(parts_of(file, parts, &mut media)?),
        };
        messages.push(Message { role, content });
    }
    if messages.is_empty() { Err(wrong(file, "has no messages")) } else { Ok((messages, media)) }
}

/// Reads questions, one a line: {"content": text or parts, "answer": text}. Paths as in [`read_messages`].
pub fn read_questions(file: &Path) -> Result<Vec<Question>, Failure> {
    let text = String::from_utf8(bytes_of(file)?).map_err(|_| wrong(file, "is not UTF-8"))?;
    questions_of(file, &text)
}

/// The questions of a file's text.
pub(crate) fn questions_of(file: &Path, text: &str) -> Result<Vec<Question>, Failure> {
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    let question = |(number, line): (usize, &str)| {
        let read = serde_json::from_str(line).map_err(|error| wrong(file, format!("line {number} is no question: {error}")))?;
        let FileQuestion { content, answer } = read;
        let mut media = Vec::new();
        let content = match content {
            FileContent::Text(text) => vec![ContentPart::Text(text)],
            FileContent::Parts(parts) => parts_of(file, parts, &mut media)?,
        };
        Ok(Question { content, media, answer })
    };
    lines.map(question).collect()
}

fn wrong(file: &Path, what: impl std::fmt::Display) -> Failure {
    Failure::new(Kind::Usage, format!("{}: {what}", file.display()))
}

/// Reads a file of a set, or says that there is none.
pub(crate) fn bytes_of(file: &Path) -> Result<Vec<u8>, Failure> {
    let bytes = store::disk::read_file(file, FILE_BYTES_MAX).map_err(|error| io_failure("read", file, &error))?;
    bytes.ok_or_else(|| Failure::new(Kind::NotFound, format!("cannot read {}: there is no such file", file.display())))
}

/// The parts of a message; the media that they name are added to `media`.
fn parts_of(file: &Path, parts: Vec<FilePart>, media: &mut Vec<GivenMedium>) -> Result<Vec<ContentPart>, Failure> {
    let beside = |path: PathBuf| {
        let there = file.parent().map(|dir| dir.join(&path)).filter(|there| there.exists());
        there.unwrap_or(path)
    };
    let mut medium = |kind, path: PathBuf, fps: Option<f64>, sound: Option<FileSound>| {
        let fps = fps.unwrap_or(FPS_DEFAULT);
        if !(fps.is_finite() && fps > 0.0) {
            return Err(wrong(file, format!("fps is {fps}, which is no rate")));
        }
        let sound = match sound {
            None | Some(FileSound::Own(false)) => None,
            Some(FileSound::Own(true)) => Some(MediaSound::Own),
            Some(FileSound::Path(path)) => Some(MediaSound::Other(MediaSource::Path(beside(path)))),
        };
        media.push(GivenMedium { kind, name: path.display().to_string(), source: MediaSource::Path(beside(path)), fps, sound });
        Ok(ContentPart::Medium(kind))
    };
    let parts = parts.into_iter().map(|part| match part {
        FilePart::Text { text } => Ok(ContentPart::Text(text)),
        FilePart::Image { path } => medium(MediumKind::Image, path, None, None),
        FilePart::Audio { path } => medium(MediumKind::Audio, path, None, None),
        FilePart::Video { path, fps, sound } => medium(MediumKind::Video, path, fps, sound),
    });
    parts.collect()
}
