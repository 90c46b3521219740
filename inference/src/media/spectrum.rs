//! Sound to a log-mel spectrum, as Whisper's feature extractor makes it (Radford et al. 2022): no padding to 30 s, no truncation.

use realfft::RealFftPlanner;

/// Samples a second.
pub const SAMPLE_RATE: u32 = 16_000;
/// Samples of a frame, and from one frame to the next.
const FRAME: usize = 400;
const HOP: usize = 160;
/// Below this, a band is silent.
const FLOOR: f64 = 1e-10;
/// How far below the loudest a band may be, in powers of ten.
const RANGE: f32 = 8.0;
/// Frequencies of the bands, in hertz.
const HIGHEST: f64 = SAMPLE_RATE as f64 / 2.0;
/// Where Slaney's mel scale turns from linear to logarithmic: hertz, mels, and hertz a mel below.
const BREAK_HERTZ: f64 = 1000.0;
const BREAK_MELS: f64 = 15.0;
const HERTZ_A_MEL: f64 = 200.0 / 3.0;

/// Samples of the shortest clip: it is mirrored at its ends.
pub const SAMPLES_MIN: usize = FRAME / 2 + 1;

/// Frames of a clip of so many samples; 100 a second.
pub fn frames_of(samples: usize) -> usize {
    samples / HOP
}

/// The spectrum of a clip of mono samples of −1 to 1, 16,000 a second: (bands, frames). A clip of fewer than [`SAMPLES_MIN`] samples has none.
pub fn spectrum(samples: &[f32], bands: usize) -> Vec<f32> {
    let frames = frames_of(samples.len());
    if samples.len() < SAMPLES_MIN {
        return Vec::new();
    }
    let mirrored = |at: isize| {
        let last = samples.len() as isize - 1;
        let at = at.abs();
        samples[(if at > last { 2 * last - at } else { at }) as usize]
    };
    let window: Vec<_> = (0..FRAME).map(|n| 0.5 - 0.5 * (std::f64::consts::TAU * n as f64 / FRAME as f64).cos()).collect();
    let filters = mel_filters(bands);
    let fft = RealFftPlanner::<f64>::new().plan_fft_forward(FRAME);
    let (mut input, mut output) = (fft.make_input_vec(), fft.make_output_vec());
    let mut scratch = fft.make_scratch_vec();
    let mut out = vec![0.0; bands * frames];
    for frame in 0..frames {
        let start = (frame * HOP) as isize - (FRAME / 2) as isize;
        input.iter_mut().enumerate().for_each(|(n, x)| *x = f64::from(mirrored(start + n as isize)) * window[n]);
        fft.process_with_scratch(&mut input, &mut output, &mut scratch).expect("its own buffers fit");
        for (band, (first, weights)) in filters.iter().enumerate() {
            let power: f64 = output[*first..].iter().zip(weights).map(|(x, weight)| x.norm_sqr() * weight).sum();
            out[band * frames + frame] = power.max(FLOOR).log10() as f32;
        }
    }
    let loudest = out.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    out.iter_mut().for_each(|x| *x = (x.max(loudest - RANGE) + 4.0) / 4.0);
    out
}

/// For each band, its first frequency and their weights: triangles of equal area, evenly spaced in mels (Slaney 1998).
fn mel_filters(bands: usize) -> Vec<(usize, Vec<f64>)> {
    let step = 6.4_f64.ln() / 27.0;
    let mels = |hertz: f64| {
        if hertz >= BREAK_HERTZ { BREAK_MELS + (hertz / BREAK_HERTZ).ln() / step } else { hertz / HERTZ_A_MEL }
    };
    let hertz = |mels: f64| {
        if mels >= BREAK_MELS { BREAK_HERTZ * (step * (mels - BREAK_MELS)).exp() } else { mels * HERTZ_A_MEL }
    };
    let edges: Vec<_> = (0..bands + 2).map(|i| hertz(mels(HIGHEST) * i as f64 / (bands + 1) as f64)).collect();
    let frequency = |k: usize| HIGHEST * k as f64 / (FRAME / 2) as f64;
    let band = |edges: &[f64]| {
        let [low, middle, high] = edges else { unreachable!("windows of three") };
        let weight = |k: usize| {
            let rise = (frequency(k) - low) / (middle - low);
            let fall = (high - frequency(k)) / (high - middle);
            rise.min(fall).max(0.0) * 2.0 / (high - low)
        };
        let first = (0..=FRAME / 2).find(|&k| weight(k) > 0.0).unwrap_or(0);
        let end = (0..=FRAME / 2).rev().find(|&k| weight(k) > 0.0).map_or(0, |k| k + 1);
        (first, (first..end.max(first)).map(weight).collect())
    };
    edges.windows(3).map(band).collect()
}
