//! Pictures, videos and sounds that come with a prompt: read within limits, and made ready for a model's towers.
//!
//! Files are decoded on the thread of whoever asks, and a decoder that panics is an error of the file. Nothing is fetched from anywhere.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use base::clock::instant;
use base::failure::{Failure, Kind, io_failure};
use base::threads::caught;
use inference::chat::MediumKind;
use inference::media::limits::{MediaError, MediaLimits};
use inference::media::patches::{of_frames, of_picture};
use inference::media::picture::{decode_frames, decode_picture, sample};
use inference::media::prompt::{Medium, PreparedMedium};
use inference::media::resize::Picture;
use inference::media::sound::decode_sound;
use inference::media::spectrum::{SAMPLE_RATE, spectrum};
use inference::tower::audio::rows_of_frames;
use inference::tower::vision::Patches;
use protocol::ContentHash;
use protocol::towers::{Audio, Vision};

/// Frames of a video that are looked at in a second, unless told otherwise: as the model's authors do.
pub const FPS_DEFAULT: f64 = 2.0;
/// Formats that `ffmpeg` may read: those that hold what they show.
const FFMPEG_FORMATS: &str = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,ogg,flv,asf,h264,hevc,ivf";
/// How long `ffmpeg` may take, and how long it may say nothing.
const FFMPEG_TIME: Duration = Duration::from_secs(120);
/// Files of a folder that is a video.
const FOLDER_FILES_MAX: usize = 4096;

/// A medium as it was given.
#[derive(Clone, PartialEq, Debug)]
pub struct GivenMedium {
    /// What it is.
    pub kind: MediumKind,
    /// What to call it in errors.
    pub name: String,
    /// Where it is.
    pub source: MediaSource,
    /// Frames a second, of a video.
    pub fps: f64,
    /// A video's sound, if it is to be heard.
    pub sound: Option<MediaSound>,
}

/// Where a medium is.
#[derive(Clone, PartialEq, Debug)]
pub enum MediaSource {
    /// In memory.
    Bytes(Vec<u8>),
    /// A file, or a folder of pictures in the order of their names.
    Path(PathBuf),
}

/// The sound of a video.
#[derive(Clone, PartialEq, Debug)]
pub enum MediaSound {
    /// Its own.
    Own,
    /// A file of its own.
    Other(MediaSource),
}

/// The towers that take media, and how much of them.
#[derive(Clone, Copy, Debug)]
pub struct Senses<'a> {
    /// Eyes.
    pub vision: Option<&'a Vision>,
    /// Ears.
    pub audio: Option<&'a Audio>,
    /// How much is taken.
    pub limits: &'a MediaLimits,
}

/// Makes media ready for the towers of a model.
pub fn prepare(senses: Senses<'_>, given: &[GivenMedium]) -> Result<Vec<Arc<PreparedMedium>>, Failure> {
    let one = |given: &GivenMedium| {
        let prepared = caught("reading a file", || senses.prepare_one(given)).and_then(|prepared| prepared).map(Arc::new);
        prepared.map_err(|failure| Failure { message: format!("{}: {}", given.name, failure.message), ..failure })
    };
    given.iter().map(one).collect()
}

fn refused(error: impl Into<MediaError>) -> Failure {
    Failure::new(Kind::Usage, error.into().to_string())
}

impl Senses<'_> {
    fn prepare_one(&self, given: &GivenMedium) -> Result<PreparedMedium, Failure> {
        let missing = || Failure::new(Kind::Usage, format!("this model takes no {}", given.kind.name()));
        let mut hasher = blake3::Hasher::new();
        hasher.update(given.kind.name().as_bytes());
        match given.kind {
            MediumKind::Image => {
                let vision = self.vision.ok_or_else(missing)?;
                let bytes = self.read(&given.source)?;
                hasher.update(&bytes);
                let patches = of_picture(vision, &decode_picture(&bytes, self.limits).map_err(refused)?).map_err(refused)?;
                let [_, height, width] = patches.grid;
                self.check_tokens(patches.rows())?;
                Ok(of_sight(Medium::Picture { grid: [height, width] }, &hasher, patches, 0.0))
            }
            MediumKind::Audio => {
                let audio = self.audio.ok_or_else(missing)?;
                let bytes = self.read(&given.source)?;
                hasher.update(&bytes);
                let (spectrum, rows, seconds) = self.listen(audio, &decode_sound(&bytes, self.limits).map_err(refused)?)?;
                let hash = ContentHash::from_bytes(*hasher.finalize().as_bytes());
                Ok(PreparedMedium { medium: Medium::Sound { rows }, hash, patches: None, spectrum: Some(spectrum), seconds })
            }
            MediumKind::Video => {
                let vision = self.vision.ok_or_else(missing)?;
                hasher.update(&given.fps.to_le_bytes());
                let frames = self.frames(given, &mut hasher)?;
                let seconds = frames.len() as f64 / given.fps;
                let patches = of_frames(vision, &frames).map_err(refused)?;
                self.check_tokens(patches.rows())?;
                let heard = match (&given.sound, self.audio) {
                    (None, _) => None,
                    (Some(_), None) => return Err(Failure::new(Kind::Usage, "this model takes no sound")),
                    (Some(sound), Some(audio)) => {
                        let bytes = match sound {
                            MediaSound::Other(source) => self.read(source)?,
                            MediaSound::Own => self.own_sound(given)?,
                        };
                        hasher.update(&bytes);
                        Some(self.listen(audio, &decode_sound(&bytes, self.limits).map_err(refused)?)?)
                    }
                };
                let seconds_per_grid = (f64::from(vision.frames) / given.fps) as f32;
                let sound_rows = heard.as_ref().map(|(_, rows, _)| *rows);
                let medium = Medium::Video { grid: patches.grid, seconds_per_grid, sound_rows };
                Ok(PreparedMedium { spectrum: heard.map(|(spectrum, ..)| spectrum), ..of_sight(medium, &hasher, patches, seconds) })
            }
        }
    }

    /// The spectrum of a sound, its rows, and its seconds.
    fn listen(&self, audio: &Audio, samples: &[f32]) -> Result<(Vec<f32>, usize, f64), Failure> {
        let spectrum = spectrum(samples, audio.bands as usize);
        let rows = rows_of_frames(spectrum.len() / audio.bands as usize, audio.chunk as usize);
        self.check_tokens(rows)?;
        Ok((spectrum, rows, samples.len() as f64 / f64::from(SAMPLE_RATE)))
    }

    fn check_tokens(&self, rows: usize) -> Result<(), Failure> {
        if rows > self.limits.tokens {
            return Err(Failure::new(Kind::Usage, format!("takes {rows} places of a prompt, the limit is {}", self.limits.tokens)));
        }
        Ok(())
    }

    fn read(&self, source: &MediaSource) -> Result<Vec<u8>, Failure> {
        match source {
            MediaSource::Bytes(bytes) => Ok(bytes.clone()),
            MediaSource::Path(path) => {
                let file = fs::File::open(path).map_err(|error| io_failure("read", path, &error))?;
                let mut bytes = Vec::new();
                file.take(self.limits.bytes + 1).read_to_end(&mut bytes).map_err(|error| io_failure("read", path, &error))?;
                Ok(bytes)
            }
        }
    }

    /// The frames of a video that are looked at.
    fn frames(&self, given: &GivenMedium, hasher: &mut blake3::Hasher) -> Result<Vec<Picture>, Failure> {
        if let MediaSource::Path(path) = &given.source
            && path.is_dir()
        {
            return self.folder(path, hasher);
        }
        let bytes = self.read(&given.source)?;
        hasher.update(&bytes);
        match decode_frames(&bytes, self.limits) {
            Ok(frames) => sample(&frames, given.fps, self.limits).map_err(refused),
            Err(error @ MediaError::Format { .. }) => match ffmpeg() {
                None => Err(Failure::new(
                    Kind::Usage,
                    format!("{error}; for other videos a program called ffmpeg is needed, and none is found"),
                )),
                Some(program) => self.frames_by(&program, &bytes, given.fps),
            },
            Err(error) => Err(refused(error)),
        }
    }

    /// The pictures of a folder, in the order of their names.
    fn folder(&self, path: &Path, hasher: &mut blake3::Hasher) -> Result<Vec<Picture>, Failure> {
        let entries = fs::read_dir(path).map_err(|error| io_failure("read", path, &error))?;
        let mut files: Vec<_> =
            entries.flatten().map(|entry| entry.path()).filter(|path| path.is_file()).take(FOLDER_FILES_MAX + 1).collect();
        files.sort();
        if files.is_empty() {
            return Err(refused(MediaError::Empty("there are no files in the folder")));
        }
        if files.len() > self.limits.frames.min(FOLDER_FILES_MAX) {
            return Err(Failure::new(
                Kind::Usage,
                format!("has {} frames, the limit is {}", files.len(), self.limits.frames.min(FOLDER_FILES_MAX)),
            ));
        }
        let picture = |file: &PathBuf| {
            let bytes = self.read(&MediaSource::Path(file.clone()))?;
            hasher.update(&bytes);
            let named = |failure: Failure| Failure { message: format!("{}: {}", file.display(), failure.message), ..failure };
            decode_picture(&bytes, self.limits).map_err(|error| named(refused(error)))
        };
        let frames: Vec<_> = files.iter().map(picture).collect::<Result<_, _>>()?;
        let size = |picture: &Picture| (picture.width, picture.height);
        if let Some((file, frame)) = files.iter().zip(&frames).find(|(_, frame)| size(frame) != size(&frames[0])) {
            let ((width, height), (first_width, first_height)) = (size(frame), size(&frames[0]));
            let what = format!("{} is {width} × {height}, the first frame is {first_width} × {first_height}", file.display());
            return Err(Failure::new(Kind::Usage, what));
        }
        Ok(frames)
    }

    /// Frames as `ffmpeg` reads them.
    fn frames_by(&self, program: &Path, video: &[u8], fps: f64) -> Result<Vec<Picture>, Failure> {
        let rate = format!("fps={fps}");
        let most = (self.limits.frames + 1).to_string();
        let bytes_max = self.limits.pixels.saturating_mul(3 * 16);
        let output =
            run_ffmpeg(program, video, &["-vf", &rate, "-frames:v", &most, "-f", "image2pipe", "-c:v", "ppm", "pipe:1"], bytes_max)?;
        let mut frames = Vec::new();
        let mut rest = &output[..];
        while !rest.is_empty() {
            let (frame, after) =
                portable_pixmap(rest).ok_or_else(|| refused(MediaError::Damaged("ffmpeg's frames make no sense".to_owned())))?;
            if (frame.width * frame.height) as u64 > self.limits.pixels {
                return Err(Failure::new(
                    Kind::Usage,
                    format!("has frames of {} × {} pixels, the limit is {}", frame.width, frame.height, self.limits.pixels),
                ));
            }
            frames.push(frame);
            rest = after;
        }
        match frames.len() {
            0 => Err(refused(MediaError::Empty("it has no frames"))),
            count if count > self.limits.frames => {
                let found = format!("{count} or more at {fps} a second");
                Err(refused(MediaError::Limit { what: "frames", found, limit: self.limits.frames.to_string() }))
            }
            _ => Ok(frames),
        }
    }

    /// A video's own sound, as a WAV file.
    fn own_sound(&self, given: &GivenMedium) -> Result<Vec<u8>, Failure> {
        let none = || Failure::new(Kind::Usage, "a video's own sound is read by a program called ffmpeg, and none is found");
        let program = ffmpeg().ok_or_else(none)?;
        let video = self.read(&given.source)?;
        run_ffmpeg(&program, &video, &["-vn", "-ac", "1", "-ar", "16000", "-f", "wav", "pipe:1"], self.limits.bytes)
    }
}

fn of_sight(medium: Medium, hasher: &blake3::Hasher, patches: Patches, seconds: f64) -> PreparedMedium {
    PreparedMedium { medium, hash: ContentHash::from_bytes(*hasher.finalize().as_bytes()), patches: Some(patches), spectrum: None, seconds }
}

/// Where `ffmpeg` is, if it is on the path.
fn ffmpeg() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join("ffmpeg")).find(|file| file.is_file())
}

/// Has `ffmpeg` read a video from its standard input or, since many formats are read from their end, from a file; returns what it writes.
fn run_ffmpeg(program: &Path, video: &[u8], arguments: &[&str], bytes_max: u64) -> Result<Vec<u8>, Failure> {
    let failed = |what: String| Failure::new(Kind::Usage, format!("ffmpeg: {what}"));
    let written = tempfile::NamedTempFile::new().and_then(|mut file| file.write_all(video).map(|()| file));
    let file = written.map_err(|error| io_failure("write", &std::env::temp_dir(), &error))?; // removed when it goes out of scope
    let mut command = Command::new(program);
    // A playlist names other files, here and elsewhere: none is read, and nothing is fetched.
    command.args(["-v", "error", "-nostdin", "-protocol_whitelist", "file,pipe", "-format_whitelist", FFMPEG_FORMATS, "-i"]);
    command.arg(file.path()).args(arguments);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let mut child = child.map_err(|error| failed(error.to_string()))?;
    let mut out = child.stdout.take().expect("it is piped");
    let reading = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let read = out.by_ref().take(bytes_max + 1).read_to_end(&mut bytes);
        read.map(|_| bytes)
    });
    let began = instant();
    while !reading.is_finished() && instant() - began < FFMPEG_TIME {
        std::thread::sleep(Duration::from_millis(5));
    }
    let late = !reading.is_finished();
    let _ = child.kill();
    let status = child.wait();
    let bytes = reading.join().ok().and_then(Result::ok).ok_or_else(|| failed("its output cannot be read".to_owned()))?;
    if late {
        return Err(failed(format!("it took more than {} s", FFMPEG_TIME.as_secs())));
    }
    if bytes.len() as u64 > bytes_max {
        return Err(failed(format!("it made more than {bytes_max} bytes")));
    }
    if bytes.is_empty() {
        return Err(failed(status.map_or_else(|error| error.to_string(), |status| format!("it read nothing ({status})"))));
    }
    Ok(bytes)
}

/// The first of the PPM pictures (P6, 8 bits) in some bytes, and the bytes behind it.
fn portable_pixmap(bytes: &[u8]) -> Option<(Picture, &[u8])> {
    let mut at = 0;
    let mut word = || {
        let start = at + bytes[at..].iter().position(|byte| !byte.is_ascii_whitespace())?;
        let end = start + bytes[start..].iter().position(u8::is_ascii_whitespace)?;
        at = end;
        std::str::from_utf8(&bytes[start..end]).ok()
    };
    let (magic, width, height, depth) = (word()?, word()?, word()?, word()?);
    let (width, height): (usize, usize) = (width.parse().ok()?, height.parse().ok()?);
    if (magic, depth) != ("P6", "255") {
        return None;
    }
    let length = width.checked_mul(height)?.checked_mul(3)?;
    let (rgb, rest) = bytes.get(at + 1..)?.split_at_checked(length)?;
    Some((Picture { width, height, rgb: rgb.to_vec() }, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pixmaps_follow_one_another() {
        let bytes = b"P6\n2 1\n255\nabcdefP6 1 1 255\nxyzP6\n9 9\n255\nshort";
        let (first, rest) = portable_pixmap(bytes).expect("a picture");
        assert_eq!((first.width, first.height, &first.rgb[..]), (2, 1, &b"abcdef"[..]));
        let (second, rest) = portable_pixmap(rest).expect("a picture");
        assert_eq!(second.rgb, b"xyz");
        assert!(portable_pixmap(rest).is_none() && portable_pixmap(b"P5 1 1 255 a").is_none() && portable_pixmap(b"").is_none());
    }
}
