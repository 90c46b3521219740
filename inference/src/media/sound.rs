//! Files of sound to mono samples, 16,000 a second.

use std::io::Cursor;

use rubato::{FftFixedIn, Resampler};
use symphonia::core::audio::SampleBuffer;
use symphonia::core::codecs::{CODEC_TYPE_NULL, DecoderOptions};
use symphonia::core::errors::Error;
use symphonia::core::formats::FormatOptions;
use symphonia::core::io::MediaSourceStream;
use symphonia::core::meta::MetadataOptions;
use symphonia::core::probe::Hint;

use super::limits::{MediaError, MediaLimits};
use super::spectrum::{SAMPLE_RATE, SAMPLES_MIN};

/// Formats that are read.
const KNOWN: &str = "WAV, FLAC, MP3, Ogg Vorbis, M4A or AAC";
/// Rates that are taken, in hertz, and channels.
const RATES: std::ops::RangeInclusive<u32> = 1_000..=768_000;
const CHANNELS_MAX: usize = 64;
/// Samples that are resampled at a time.
const TOGETHER: usize = 4096;

/// Reads a sound. Several channels are mixed into one.
pub fn decode_sound(bytes: &[u8], limits: &MediaLimits) -> Result<Vec<f32>, MediaError> {
    limits.check_bytes(bytes)?;
    let mut bytes = bytes.to_vec();
    state_length(&mut bytes);
    let source = MediaSourceStream::new(Box::new(Cursor::new(bytes)), symphonia::core::io::MediaSourceStreamOptions::default());
    let unknown = || MediaError::Format { kind: "sound", known: KNOWN };
    let probed = symphonia::default::get_probe().format(&Hint::new(), source, &FormatOptions::default(), &MetadataOptions::default());
    let mut format =
        probed.map_err(|error| if matches!(error, Error::Unsupported(_)) { unknown() } else { MediaError::damaged(error) })?.format;
    let track = format.tracks().iter().find(|track| track.codec_params.codec != CODEC_TYPE_NULL).ok_or_else(unknown)?;
    let (id, params) = (track.id, track.codec_params.clone());
    let claimed = params.n_frames;
    if let (Some(frames), Some(rate)) = (claimed, params.sample_rate) {
        check_seconds(frames as f64 / f64::from(rate.max(1)), limits)?;
    }
    let mut decoder = symphonia::default::get_codecs().make(&params, &DecoderOptions::default()).map_err(|_| unknown())?;
    let (mut mono, mut rate) = (Vec::new(), 0);
    loop {
        let packet = match format.next_packet() {
            Ok(packet) => packet,
            Err(Error::IoError(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => break,
            Err(Error::ResetRequired) => break,
            Err(error) => return Err(MediaError::damaged(error)),
        };
        if packet.track_id() != id {
            continue;
        }
        let decoded = decoder.decode(&packet).map_err(MediaError::damaged)?;
        let spec = *decoded.spec();
        let channels = spec.channels.count();
        if !RATES.contains(&spec.rate) || channels == 0 || channels > CHANNELS_MAX || rate != 0 && rate != spec.rate {
            return Err(MediaError::Damaged(format!("{channels} channels at {} Hz", spec.rate)));
        }
        rate = spec.rate;
        check_seconds((mono.len() + decoded.frames()) as f64 / f64::from(rate), limits)?;
        let mut samples = SampleBuffer::<f32>::new(decoded.capacity() as u64, spec);
        samples.copy_interleaved_ref(decoded);
        mono.extend(samples.samples().chunks_exact(channels).map(|frame| frame.iter().sum::<f32>() / channels as f32));
    }
    if let Some(claimed) = claimed.filter(|&claimed| claimed > mono.len() as u64) {
        return Err(MediaError::Damaged(format!("its header says {claimed} samples, and it has {}", mono.len())));
    }
    if let Some(at) = mono.iter().position(|sample| !sample.is_finite()) {
        return Err(MediaError::Damaged(format!("sample {at} is no number")));
    }
    let mono = if mono.is_empty() || rate == SAMPLE_RATE { mono } else { resample(&mono, rate)? };
    if mono.len() < SAMPLES_MIN {
        return Err(MediaError::Empty("it is shorter than an eightieth of a second"));
    }
    Ok(mono)
}

/// A WAV file that was written into a pipe says that it has 2³² - 1 bytes of samples: it has all that follow.
fn state_length(bytes: &mut [u8]) {
    if !(bytes.starts_with(b"RIFF") && bytes.get(8..12) == Some(b"WAVE")) {
        return;
    }
    let mut at: usize = 12;
    while let Some(&[a, b, c, d, ref length @ ..]) = bytes.get(at..).and_then(|rest| rest.first_chunk::<8>()) {
        let length = u32::from_le_bytes(*length);
        let start = at + 8;
        if [a, b, c, d] == *b"data" && length == u32::MAX {
            let follow = u32::try_from(bytes.len() - start).unwrap_or(u32::MAX);
            bytes[at + 4..start].copy_from_slice(&follow.to_le_bytes());
            return;
        }
        at = start.saturating_add(length as usize).saturating_add(length as usize % 2);
    }
}

fn check_seconds(seconds: f64, limits: &MediaLimits) -> Result<(), MediaError> {
    if seconds > limits.seconds {
        return Err(MediaError::limit("seconds", format!("{seconds:.1}"), limits.seconds));
    }
    Ok(())
}

fn resample(samples: &[f32], rate: u32) -> Result<Vec<f32>, MediaError> {
    let mut resampler = FftFixedIn::<f32>::new(rate as usize, SAMPLE_RATE as usize, TOGETHER, 2, 1).map_err(MediaError::damaged)?;
    let wanted = (samples.len() as u64 * u64::from(SAMPLE_RATE)).div_ceil(u64::from(rate)) as usize;
    let delay = resampler.output_delay();
    let mut out = Vec::with_capacity(wanted + delay);
    let mut rest = samples;
    // Zeros follow until what the filter holds back has come out.
    while out.len() < wanted + delay {
        let count = rest.len().min(resampler.input_frames_next());
        let (mut now, later) = (rest[..count].to_vec(), &rest[count..]);
        now.resize(resampler.input_frames_next(), 0.0);
        rest = later;
        out.extend_from_slice(&resampler.process(&[now], None).map_err(MediaError::damaged)?[0]);
    }
    Ok(out[delay..delay + wanted].to_vec())
}
