//! `POST /v1/audio/transcriptions`: what is said in a sound, written down by a model that hears.

use std::sync::Arc;

use axum::extract::multipart::{Field, Multipart};
use axum::extract::{Extension, FromRequest as _, Request, State};
use axum::response::{IntoResponse as _, Response};
use inference::chat::MediumKind;
use inference::media::limits::MediaError;
use inference::media::sound::decode_sound;
use inference::media::spectrum::SAMPLE_RATE;
use runtime::media::{FPS_DEFAULT, GivenMedium, MediaSource};
use serde_json::json;

use super::ask::Ask;
use super::{answer_to, reply_text};
use crate::access::Asker;
use crate::body::MEDIA_BODY_BYTES_MAX;
use crate::error::ApiError;
use crate::{Api, json_response};

/// What a model is asked, unless the client says something else.
const PROMPT: &str = "Transcribe the audio into text.";
/// Longest field that is no file, in bytes.
const FIELD_BYTES_MAX: usize = 64 << 10;

/// How the text is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Format {
    Json,
    Text,
    Verbose,
}

/// What a client sent.
#[derive(Default)]
struct Form {
    file: Option<Vec<u8>>,
    model: Option<String>,
    prompt: Option<String>,
    language: Option<String>,
    format: Option<String>,
    temperature: Option<f32>,
}

pub(crate) async fn transcriptions(
    State(api): State<Arc<Api>>,
    Extension(asker): Extension<Asker>,
    request: Request,
) -> Result<Response, ApiError> {
    let form = Multipart::from_request(request, &()).await.map_err(|error| ApiError::with_status(error.status(), error.body_text()))?;
    let form = Form::read(form).await?;
    let missing = |name: &str| ApiError::invalid(format!("{name} is missing")).param(name);
    let format = match form.format.as_deref() {
        None | Some("json") => Format::Json,
        Some("text") => Format::Text,
        Some("verbose_json") => Format::Verbose,
        Some(other) => {
            let message = format!("response_format {other:?} is not supported; json, text and verbose_json are");
            return Err(ApiError::invalid(message).code("unsupported_value").param("response_format"));
        }
    };
    let file = form.file.ok_or_else(|| missing("file"))?;
    let model = form.model.ok_or_else(|| missing("model"))?;
    let submitted = match (&form.prompt, &form.language) {
        (Some(prompt), _) => prompt.clone(),
        (None, Some(language)) => format!("{PROMPT} The language is {language}."),
        (None, None) => PROMPT.to_owned(),
    };
    let (file, seconds) = {
        let limits = api.media;
        let read = move || {
            let wrong = |error: MediaError| ApiError::invalid(format!("file: {error}")).param("file");
            let samples = decode_sound(&file, &limits).map_err(wrong)?;
            Ok((file, samples.len() as f64 / f64::from(SAMPLE_RATE)))
        };
        api.intake.work(read).await?
    };
    let sound =
        GivenMedium { kind: MediumKind::Audio, name: "file".to_owned(), source: MediaSource::Bytes(file), fps: FPS_DEFAULT, sound: None };
    let ask = Ask::about(model, sound, submitted, form.temperature.unwrap_or(0.0));
    let answer = reply_text(answer_to(api, asker, ask).await?).await?;
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap_or_default().trim().to_owned();
    let count = |name: &str| answer["usage"][name].as_u64().unwrap_or(0);
    let (all, heard) = (count("prompt_tokens"), answer["usage"]["prompt_tokens_details"]["audio_tokens"].as_u64().unwrap_or(0));
    let usage = json!({
        "type": "tokens", "input_tokens": all, "output_tokens": count("completion_tokens"), "total_tokens": count("total_tokens"),
        "input_token_details": {"audio_tokens": heard, "text_tokens": all - heard},
    });
    Ok(match format {
        Format::Text => text.into_response(),
        Format::Json => json_response(json!({"text": text, "usage": usage})),
        Format::Verbose => json_response(json!({
            "task": "transcribe", "language": form.language.unwrap_or_default(), "duration": seconds, "text": text, "segments": [],
            "usage": {"type": "duration", "seconds": seconds.ceil()},
        })),
    })
}

impl Form {
    async fn read(mut parts: Multipart) -> Result<Self, ApiError> {
        let wrong = |error: axum::extract::multipart::MultipartError| ApiError::with_status(error.status(), error.body_text());
        let (mut form, mut bytes) = (Self::default(), 0);
        while let Some(field) = parts.next_field().await.map_err(wrong)? {
            let name = field.name().unwrap_or_default().to_owned();
            let most = if name == "file" { MEDIA_BODY_BYTES_MAX } else { FIELD_BYTES_MAX };
            let value = collect(field, most.min(MEDIA_BODY_BYTES_MAX - bytes)).await?;
            bytes += value.len();
            if name == "file" {
                form.file = Some(value);
                continue;
            }
            let text = String::from_utf8(value).map_err(|_| ApiError::invalid(format!("{name} is no text")).param(&name))?;
            match name.as_str() {
                "model" => form.model = Some(text),
                "prompt" => form.prompt = Some(text).filter(|text| !text.is_empty()),
                "language" => form.language = Some(text).filter(|text| !text.is_empty()),
                "response_format" => form.format = Some(text),
                "temperature" => {
                    let number = text.parse().ok().filter(|t| (0.0..=2.0).contains(t));
                    form.temperature =
                        Some(number.ok_or_else(|| ApiError::invalid("temperature must be a number from 0 to 2").param("temperature"))?);
                }
                "stream" if text == "false" => {}
                _ => return Err(ApiError::invalid(format!("{name} is not supported")).code("unsupported_parameter").param(&name)),
            }
        }
        Ok(form)
    }
}

/// A field's bytes, as far as there may be so many.
async fn collect(mut field: Field<'_>, most: usize) -> Result<Vec<u8>, ApiError> {
    let mut bytes = Vec::new();
    while let Some(piece) = field.chunk().await.map_err(|error| ApiError::with_status(error.status(), error.body_text()))? {
        if bytes.len() + piece.len() > most {
            return Err(ApiError::with_status(axum::http::StatusCode::PAYLOAD_TOO_LARGE, format!("a field is longer than {most} bytes")));
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}
