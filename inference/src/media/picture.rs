//! Files of pictures, and of frames that follow one another, to pixels.

use std::io::Cursor;

use image::codecs::gif::GifDecoder;
use image::codecs::png::PngDecoder;
use image::codecs::webp::WebPDecoder;
use image::{AnimationDecoder, DynamicImage, Frames, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits};

use super::limits::{MediaError, MediaLimits};
use super::resize::Picture;

/// Formats that are read.
const KNOWN: &str = "PNG, JPEG, WebP, GIF, BMP";
/// Formats whose frames may follow one another.
const KNOWN_MOVING: &str = "an animated GIF, WebP or PNG";
/// Bytes that decoding a pixel takes at most, several copies of it counted.
const BYTES_A_PIXEL: u64 = 24;
/// Pixels of all frames together, at most: those of so many of the largest pictures.
const FRAMES_OF_PIXELS: f64 = 16.0;
/// Seconds of a frame whose file gives it none.
const FRAME_SECONDS: f64 = 0.1;

/// A frame, and how long it is shown.
#[derive(Clone, Debug)]
pub struct Frame {
    /// What is seen.
    pub picture: Picture,
    /// For how long, in seconds.
    pub seconds: f64,
}

fn reader<'a>(bytes: &'a [u8], limits: &MediaLimits) -> Result<ImageReader<Cursor<&'a [u8]>>, MediaError> {
    limits.check_bytes(bytes)?;
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(MediaError::damaged)?;
    reader.limits(allowed(limits));
    Ok(reader)
}

fn allowed(limits: &MediaLimits) -> Limits {
    let mut allowed = Limits::default();
    allowed.max_alloc = Some(limits.pixels.saturating_mul(BYTES_A_PIXEL));
    allowed
}

/// A decoder refuses a size by itself when it does not even fit its integers.
fn unreadable(error: &ImageError, limits: &MediaLimits) -> MediaError {
    match error {
        ImageError::Limits(_) => MediaError::limit("pixels", "too many", limits.pixels as f64),
        _ => MediaError::damaged(error),
    }
}

/// Reads a picture of any known format, turned as its EXIF data says; of frames that follow one another the first. Transparency is dropped, as
/// the reference implementation does.
pub fn decode_picture(bytes: &[u8], limits: &MediaLimits) -> Result<Picture, MediaError> {
    let reader = reader(bytes, limits)?;
    let known = [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP, ImageFormat::Gif, ImageFormat::Bmp];
    if !reader.format().is_some_and(|format| known.contains(&format)) {
        return Err(MediaError::Format { kind: "picture", known: KNOWN });
    }
    let mut decoder = reader.into_decoder().map_err(|error| unreadable(&error, limits))?;
    let (width, height) = decoder.dimensions();
    limits.check_pixels(width.into(), height.into())?;
    let orientation = decoder.orientation().unwrap_or(image::metadata::Orientation::NoTransforms);
    let mut image = DynamicImage::from_decoder(decoder).map_err(|error| unreadable(&error, limits))?;
    image.apply_orientation(orientation);
    Ok(of_image(&image))
}

fn of_image(image: &DynamicImage) -> Picture {
    let rgb = image.to_rgb8();
    Picture { width: rgb.width() as usize, height: rgb.height() as usize, rgb: rgb.into_raw() }
}

/// Reads the frames of a moving picture, each with its time, as long as its limits allow.
pub fn decode_frames(bytes: &[u8], limits: &MediaLimits) -> Result<Vec<Frame>, MediaError> {
    let reader = reader(bytes, limits)?;
    let check = |decoder: &dyn ImageDecoder| limits.check_pixels(decoder.dimensions().0.into(), decoder.dimensions().1.into());
    let cursor = Cursor::new(bytes);
    let frames: Frames<'_> = match reader.format() {
        Some(ImageFormat::Gif) => {
            let mut decoder = GifDecoder::new(cursor).map_err(|error| unreadable(&error, limits))?;
            check(&decoder)?;
            decoder.set_limits(allowed(limits)).map_err(MediaError::damaged)?;
            decoder.into_frames()
        }
        Some(ImageFormat::WebP) => {
            let mut decoder = WebPDecoder::new(cursor).map_err(|error| unreadable(&error, limits))?;
            check(&decoder)?;
            decoder.set_limits(allowed(limits)).map_err(MediaError::damaged)?;
            if !decoder.has_animation() {
                return Err(MediaError::Format { kind: "video", known: KNOWN_MOVING });
            }
            decoder.into_frames()
        }
        Some(ImageFormat::Png) => {
            let mut decoder = PngDecoder::new(cursor).map_err(|error| unreadable(&error, limits))?;
            check(&decoder)?;
            decoder.set_limits(allowed(limits)).map_err(MediaError::damaged)?;
            if !decoder.is_apng().map_err(MediaError::damaged)? {
                return Err(MediaError::Format { kind: "video", known: KNOWN_MOVING });
            }
            decoder.apng().map_err(MediaError::damaged)?.into_frames()
        }
        _ => return Err(MediaError::Format { kind: "video", known: KNOWN_MOVING }),
    };
    let (mut read, mut seconds, mut pixels) = (Vec::new(), 0.0, 0_u64);
    for frame in frames {
        let frame = frame.map_err(MediaError::damaged)?;
        let (numerator, denominator) = frame.delay().numer_denom_ms();
        let mut shown = f64::from(numerator) / f64::from(denominator.max(1)) / 1000.0;
        if shown <= 0.0 {
            shown = FRAME_SECONDS;
        }
        seconds += shown;
        if seconds > limits.seconds {
            return Err(MediaError::limit("seconds", format!("more than {}", limits.seconds), limits.seconds));
        }
        let picture = of_image(&DynamicImage::ImageRgba8(frame.into_buffer()));
        pixels += (picture.width * picture.height) as u64;
        if pixels as f64 > limits.pixels as f64 * FRAMES_OF_PIXELS {
            return Err(MediaError::limit("pixels in all frames", pixels.to_string(), limits.pixels as f64 * FRAMES_OF_PIXELS));
        }
        read.push(Frame { picture, seconds: shown });
    }
    if read.is_empty() { Err(MediaError::Empty("it has no frames")) } else { Ok(read) }
}

/// The frames that are seen at times 1 ÷ `fps` apart, from the beginning on; at least one.
pub fn sample(frames: &[Frame], fps: f64, limits: &MediaLimits) -> Result<Vec<Picture>, MediaError> {
    let seconds: f64 = frames.iter().map(|frame| frame.seconds).sum();
    let count = ((seconds * fps).round() as usize).max(1);
    if count > limits.frames {
        return Err(MediaError::limit("frames", format!("{count} ({seconds:.1} s at {fps} a second)"), limits.frames as f64));
    }
    let (mut at, mut until) = (0, frames.first().map_or(0.0, |frame| frame.seconds));
    let mut chosen = Vec::with_capacity(count);
    for number in 0..count {
        let time = number as f64 / fps;
        while time >= until && at + 1 < frames.len() {
            at += 1;
            until += frames[at].seconds;
        }
        chosen.push(frames[at].picture.clone());
    }
    Ok(chosen)
}
