//! Which size a picture is given, and how: cubic interpolation with antialiasing in fixed point, as the reference implementation does it, bit for bit.
//!
//! The horizontal pass comes first and is rounded to bytes before the vertical one. No library does it so; a float resize differs by up to 15
//! levels at sharp edges.

/// Sides of pictures are multiples of this: a patch times the square of patches that becomes a row.
const RATIO_MAX: f64 = 200.0;
/// Shape of the cubic (Keys 1981).
const CUBIC: f64 = -0.5;
/// Bits of the weights, at most.
const WEIGHT_BITS_MAX: u32 = 22;

/// A picture: bytes of red, green and blue, row by row.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Picture {
    /// Pixels to the right.
    pub width: usize,
    /// Pixels down.
    pub height: usize,
    /// (height, width, 3)
    pub rgb: Vec<u8>,
}

/// A picture that no tower takes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// It is too long for its breadth.
    #[error("a picture of {0} × {1} pixels is more than 200 times as long as broad")]
    Ratio(usize, usize),
    /// It has no pixels.
    #[error("a picture of {0} × {1} pixels has none")]
    Empty(usize, usize),
}

/// Height and width that a picture is given: multiples of `factor` near its own, of `pixels[0]` to `pixels[1]` pixels in all.
pub fn target_size(height: usize, width: usize, factor: usize, pixels: [u32; 2]) -> Result<(usize, usize), SizeError> {
    if height == 0 || width == 0 {
        return Err(SizeError::Empty(width, height));
    }
    let (h, w, f) = (height as f64, width as f64, factor as f64);
    if h.max(w) / h.min(w) > RATIO_MAX {
        return Err(SizeError::Ratio(width, height));
    }
    let near = |side: f64| (side / f).round_ties_even() * f;
    let (least, most) = (f64::from(pixels[0]), f64::from(pixels[1]));
    let sides = if near(h) * near(w) > most {
        let scale = (h * w / most).sqrt();
        [h, w].map(|side| f.max((side / scale / f).floor() * f))
    } else if near(h) * near(w) < least {
        let scale = (least / (h * w)).sqrt();
        [h, w].map(|side| (side * scale / f).ceil() * f)
    } else {
        [near(h), near(w)]
    };
    Ok((sides[0] as usize, sides[1] as usize))
}

/// Resizes a picture.
pub fn resize(picture: &Picture, height: usize, width: usize) -> Picture {
    let mut rgb = picture.rgb.clone();
    if width != picture.width {
        let taps = Taps::new(picture.width, width);
        rgb = rgb.chunks_exact(3 * picture.width).flat_map(|row| taps.pass(row, 3)).collect();
    }
    if height != picture.height {
        // A column is a row of the picture turned over: each step to the next pixel is one of a whole row.
        rgb = Taps::new(picture.height, height).pass(&rgb, 3 * width);
    }
    Picture { width, height, rgb }
}

/// The weights of one pass.
struct Taps {
    /// For each pixel: the first one that it is made of, and their weights.
    taps: Vec<(usize, Vec<i64>)>,
    bits: u32,
}

impl Taps {
    fn new(from: usize, to: usize) -> Self {
        let scale = from as f64 / to as f64;
        let stretch = scale.max(1.0);
        let weights = |i: usize| {
            let centre = (i as f64 + 0.5) * scale;
            let first = ((centre - 2.0 * stretch + 0.5) as i64).max(0) as usize;
            let end = ((centre + 2.0 * stretch + 0.5) as i64).clamp(0, from as i64) as usize;
            let weights: Vec<_> = (first..end).map(|j| cubic((j as f64 - centre + 0.5) / stretch)).collect();
            let sum: f64 = weights.iter().sum();
            (first, weights.into_iter().map(|weight| weight / sum).collect::<Vec<_>>())
        };
        let taps: Vec<_> = (0..to).map(weights).collect();
        let greatest = taps.iter().flat_map(|(_, weights)| weights).copied().fold(0.0, f64::max);
        let fits = |bits: u32| (0.5 + greatest * f64::from(1_u32 << (bits + 1))) < f64::from(1 << 15);
        let bits = (0..WEIGHT_BITS_MAX).find(|&bits| !fits(bits)).unwrap_or(WEIGHT_BITS_MAX);
        let fixed = |weight: f64| (weight * f64::from(1_u32 << bits) + if weight < 0.0 { -0.5 } else { 0.5 }) as i64;
        let taps = taps.into_iter().map(|(first, weights)| (first, weights.into_iter().map(fixed).collect())).collect();
        Self { taps, bits }
    }

    /// Makes pixels of `stride` bytes each of those in `from`.
    fn pass(&self, from: &[u8], stride: usize) -> Vec<u8> {
        let half = 1_i64 << (self.bits - 1);
        let mut out = Vec::with_capacity(self.taps.len() * stride);
        for (first, weights) in &self.taps {
            for byte in 0..stride {
                let pixels = from[first * stride + byte..].iter().step_by(stride);
                let sum: i64 = pixels.zip(weights).map(|(&pixel, weight)| i64::from(pixel) * weight).sum();
                out.push(((sum + half) >> self.bits).clamp(0, 255) as u8);
            }
        }
        out
    }
}

fn cubic(x: f64) -> f64 {
    let x = x.abs();
    if x < 1.0 {
        ((CUBIC + 2.0) * x - (CUBIC + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * CUBIC
    } else {
        0.0
    }
}
