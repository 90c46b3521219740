//! Pictures and frames of videos to patches.

use super::resize::{Picture, SizeError, resize, target_size};
use crate::tower::vision::Patches;
use protocol::towers::{CHANNELS, Vision};

/// Patches of a still picture, which stands for a pair of equal frames.
pub fn of_picture(shape: &Vision, picture: &Picture) -> Result<Patches, SizeError> {
    patches(shape, [picture, picture].into_iter(), [shape.pixels_min, shape.pixels_max])
}

/// Patches of a video. All frames are as large as the first; of an odd number the last one stands twice.
pub fn of_frames(shape: &Vision, frames: &[Picture]) -> Result<Patches, SizeError> {
    let odd = frames.last().filter(|_| !frames.len().is_multiple_of(2));
    patches(shape, frames.iter().chain(odd), [shape.frame_pixels_min, shape.frame_pixels_max])
}

/// Rows that a picture or the pairs of frames of a video become.
pub fn rows_of(shape: &Vision, (width, height): (usize, usize), frames: usize, pixels: [u32; 2]) -> Result<usize, SizeError> {
    let (height, width) = target_size(height, width, factor(shape), pixels)?;
    let side = shape.patch as usize;
    Ok(frames.div_ceil(shape.frames as usize) * (height / side) * (width / side) / (shape.merge * shape.merge) as usize)
}

fn factor(shape: &Vision) -> usize {
    (shape.patch * shape.merge) as usize
}

fn patches<'a>(shape: &Vision, frames: impl Iterator<Item = &'a Picture> + Clone, pixels: [u32; 2]) -> Result<Patches, SizeError> {
    let Some(first) = frames.clone().next() else { return Err(SizeError::Empty(0, 0)) };
    let (height, width) = target_size(first.height, first.width, factor(shape), pixels)?;
    let (side, together, channels) = (shape.patch as usize, shape.frames as usize, CHANNELS as usize);
    let grid = [frames.clone().count() / together, height / side, width / side];
    let numbers = channels * together * side * side;
    let mut out = vec![0.0; grid.iter().product::<usize>() * numbers];
    for (number, frame) in frames.enumerate() {
        let frame = resize(frame, height, width);
        let (pair, of_pair) = (number / together, number % together);
        let pair = &mut out[pair * grid[1] * grid[2] * numbers..][..grid[1] * grid[2] * numbers];
        for (patch, out) in pair.chunks_exact_mut(numbers).enumerate() {
            // Square of four by square of four.
            let (square, place) = (patch / 4, patch % 4);
            let (row, column) = (2 * (square / (grid[2] / 2)) + place / 2, 2 * (square % (grid[2] / 2)) + place % 2);
            for channel in 0..channels {
                let plane = &mut out[(channel * together + of_pair) * side * side..][..side * side];
                for (y, out) in plane.chunks_exact_mut(side).enumerate() {
                    let from = &frame.rgb[((row * side + y) * width + column * side) * channels..];
                    // Mean and deviation of a half.
                    let scaled = |byte: u8| (f32::from(byte) - 127.5) / 127.5;
                    out.iter_mut().enumerate().for_each(|(x, out)| *out = scaled(from[x * channels + channel]));
                }
            }
        }
    }
    Ok(Patches { numbers: out, grid })
}
