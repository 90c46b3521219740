//! Eyes and ears: every step from a file to logits against what transformers computes for the same files and weights.

use std::collections::BTreeMap;
use std::sync::Arc;

use inference::engine::{Engine, Overlay, Piece, Position, Want};
use inference::media::limits::MediaLimits;
use inference::media::patches::{of_frames, of_picture};
use inference::media::picture::{decode_frames, decode_picture, sample};
use inference::media::prompt::{Layout, Medium, RowSource, lay_out};
use inference::media::resize::{Picture, resize, target_size};
use inference::media::sound::decode_sound;
use inference::media::spectrum::spectrum;
use inference::tokenizer::{SpecialTokens, Tokenizer};
use inference::tower::TowerRows;
use inference::tower::audio::{AudioTower, rows_of_frames};
use inference::tower::vision::{Patches, VisionTower};
use protocol::Precision;
use protocol::manifest::PartConfig;
use protocol::towers::{Audio, Vision};
use serde_json::Value;

use crate::support::{Imported, Tensor, checkpoint, floats, ids, read_safetensors, vectors};

const MODEL: &str = "tiny-qwen3-omni-full";
/// Largest error, in standard deviations of the reference.
const TOLERANCE: f32 = 1e-4;

type Reference = BTreeMap<String, Tensor>;

fn media(name: &str) -> Vec<u8> {
    std::fs::read(vectors("omni/media").join(name)).expect("the vectors have it")
}

fn picture(name: &str) -> Picture {
    decode_picture(&media(name), &MediaLimits::default()).expect("a picture")
}

fn sound(name: &str) -> Vec<f32> {
    decode_sound(&media(name), &MediaLimits::default()).expect("a sound")
}

fn frames() -> Vec<Picture> {
    (0..5).map(|number| picture(&format!("video_{number}.png"))).collect()
}

fn meta() -> Value {
    serde_json::from_slice(&std::fs::read(vectors("omni/meta.json")).expect("the vectors have it")).expect("JSON")
}

/// The largest difference, in standard deviations of the reference.
fn error(what: &str, found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len(), "{what}");
    let mean = expected.iter().sum::<f32>() / expected.len() as f32;
    let deviation = (expected.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / expected.len() as f32).sqrt();
    let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    worst / deviation.max(f32::MIN_POSITIVE)
}

/// A medium of a case.
enum Shown {
    Picture(&'static str),
    Sound(&'static str),
    /// The five frames, at so many a second, with their sound where there is one.
    Video(f32, Option<&'static str>),
}

/// The cases, with their media.
fn cases() -> Vec<(&'static str, Vec<Shown>)> {
    use Shown::{Picture, Sound, Video};
    vec![
        ("text", vec![]),
        ("image", vec![Picture("a_75x53.png")]),
        ("images2", vec![Picture("a_75x53.png"), Picture("b_131x208.png")]),
        ("audio_short", vec![Sound("short.wav")]),
        ("audio_exact", vec![Sound("exact.wav")]),
        ("audio_long", vec![Sound("clip_long.wav")]),
        ("image_audio", vec![Picture("c_64x64.png"), Sound("exact.wav")]),
        ("video", vec![Video(1.0, None)]),
        ("video_fps3", vec![Video(3.0, None)]),
        ("image_video", vec![Picture("a_75x53.png"), Video(1.0, None)]),
        ("video_audio", vec![Video(3.0, Some("track.wav"))]),
    ]
}

/// A model with its towers.
struct Omni {
    engine: Engine,
    vision: VisionTower,
    audio: AudioTower,
    tokenizer: Arc<Tokenizer>,
    vision_shape: Vision,
    audio_shape: Audio,
}

impl Omni {
    fn new(precision: Option<Precision>) -> Self {
        let model = Imported::from_dir(&checkpoint(MODEL), precision).expect("it imports");
        let engine = model.engine(u64::MAX, 1);
        let mut read = model.reader();
        let vision = VisionTower::load(&model.manifest, &mut read).expect("it loads");
        let audio = AudioTower::load(&model.manifest, &mut read).expect("it loads");
        drop(read);
        let tokenizer = model.blobs.get(model.manifest.tokenizer.expect("it has one"));
        let tokenizer = Arc::new(Tokenizer::from_bytes(&tokenizer).expect("it is read"));
        // The reference's videos were resized within these.
        let vision_shape = Vision { frame_pixels_min: 4096, frame_pixels_max: 12_288, ..model.manifest.vision().expect("it sees").clone() };
        let audio_shape = model.manifest.audio().expect("it hears").clone();
        Self { engine, vision, audio, tokenizer, vision_shape, audio_shape }
    }
}

/// What a case's prompt became.
struct Prompt {
    layout: Layout,
    /// By medium: of what is seen, of what is heard.
    rows: Vec<(TowerRows, TowerRows)>,
}

impl Prompt {
    fn of(omni: &Omni, text: &str, shown: &[Shown], watch: &mut dyn FnMut(&str, &[f32])) -> Self {
        let tokens = omni.tokenizer.encode(text, SpecialTokens::AsWritten).expect("tokens");
        let (mut media, mut rows) = (Vec::new(), Vec::new());
        let see = |patches: &Patches, watch: &mut dyn FnMut(&str, &[f32])| {
            watch("pixel_values", &patches.numbers);
            omni.vision.run(omni.engine.machine(), patches, Some(&mut |name, x| watch(&format!("vision.{name}"), x)))
        };
        let hear = |name: &str, watch: &mut dyn FnMut(&str, &[f32])| {
            let bands = spectrum(&sound(name), omni.audio_shape.bands as usize);
            watch("input_features", &bands);
            omni.audio.run(omni.engine.machine(), &bands, Some(&mut |name, x| watch(&format!("audio.{name}"), x)))
        };
        let hidden = omni.audio_shape.out as usize;
        for one in shown {
            let (medium, seen, heard) = match one {
                Shown::Picture(name) => {
                    let patches = of_picture(&omni.vision_shape, &picture(name)).expect("its size is fine");
                    let [_, height, width] = patches.grid;
                    (Medium::Picture { grid: [height, width] }, see(&patches, watch), TowerRows::default())
                }
                Shown::Sound(name) => {
                    let heard = hear(name, watch);
                    (Medium::Sound { rows: heard.rows.len() / hidden }, TowerRows::default(), heard)
                }
                Shown::Video(fps, track) => {
                    let patches = of_frames(&omni.vision_shape, &frames()).expect("their size is fine");
                    let seen = see(&patches, watch);
                    let heard = track.map(|track| hear(track, watch));
                    let sound_rows = heard.as_ref().map(|heard| heard.rows.len() / hidden);
                    (Medium::Video { grid: patches.grid, seconds_per_grid: 2.0 / fps, sound_rows }, seen, heard.unwrap_or_default())
                }
            };
            media.push(medium);
            rows.push((seen, heard));
        }
        let layout = lay_out(Some(&omni.vision_shape), Some(&omni.audio_shape), &tokens, &media).expect("all have their places");
        Self { layout, rows }
    }

    /// Takes the prompt through some layers.
    fn pass(&self, engine: &mut Engine, session: &mut inference::session::Session, span: std::ops::Range<u32>, want: Want) {
        let width = engine.model().decoder().hidden_size as usize;
        let deepstack: Vec<Vec<&[f32]>> = self
            .layout
            .runs
            .iter()
            .map(|run| {
                let rows = self.tower_rows(run.medium, run.source);
                rows.deepstack.iter().map(|added| &added[run.rows.start * width..run.rows.end * width]).collect()
            })
            .collect();
        let overlays: Vec<_> = self
            .layout
            .runs
            .iter()
            .zip(&deepstack)
            .map(|(run, deepstack)| {
                let rows = &self.tower_rows(run.medium, run.source).rows[run.rows.start * width..run.rows.end * width];
                Overlay { modality: run.source.modality(), first: run.first, rows, deepstack }
            })
            .collect();
        let mut piece = Piece::tokens(session, &self.layout.tokens);
        (piece.positions, piece.overlays) = (Some(&self.layout.positions[..]), &overlays);
        engine.pass(&mut [piece], span, want).expect("it runs");
    }

    fn tower_rows(&self, medium: usize, source: RowSource) -> &TowerRows {
        let (seen, heard) = &self.rows[medium];
        if source == RowSource::Vision { seen } else { heard }
    }
}

/// What towers made on their way, case by case: what comes in several calls stands one behind the other, as in the reference.
fn check_steps(case: &str, steps: &BTreeMap<String, Vec<f32>>, reference: &Reference, worst: &mut BTreeMap<String, f32>) {
    for (name, found) in steps {
        let name = if case.starts_with("video") && name == "pixel_values" { "pixel_values_videos" } else { name };
        let Some(expected) = reference.get(name) else { continue };
        let mut expected = floats(expected);
        if name == "input_features" {
            // The reference pads what it does not mask.
            let bands = 128;
            let (padded, frames) = (expected.len() / bands, found.len() / bands);
            expected = expected.chunks_exact(padded).flat_map(|band| band[..frames].to_vec()).collect();
        }
        let error = error(&format!("{case} {name}"), found, &expected);
        let limit = match name {
            "pixel_values" | "pixel_values_videos" => 0.0,
            // The reference's own transform is in f32, and shows where a band is almost silent; NumPy in f64 is as far from it.
            "input_features" => 2.0 * TOLERANCE,
            _ => TOLERANCE,
        };
        assert!(error <= limit, "{case} {name}: {error:e}");
        let kind = name.split_once(".layer.").map_or(name, |(kind, _)| kind);
        let so_far = worst.entry(kind.to_owned()).or_default();
        *so_far = so_far.max(error);
    }
}

#[test]
fn every_step_from_a_file_to_logits_is_that_of_transformers() {
    let mut omni = Omni::new(Some(Precision::F32));
    let (meta, mut worst) = (meta(), BTreeMap::new());
    for (case, shown) in cases() {
        let reference = read_safetensors(&vectors("omni/reference").join(format!("{case}.safetensors")));
        let text = meta["cases"][case]["text"].as_str().expect("its text");
        let mut steps: BTreeMap<String, Vec<f32>> = BTreeMap::new();
        let prompt = Prompt::of(&omni, text, &shown, &mut |name, x| steps.entry(name.to_owned()).or_default().extend_from_slice(x));
        if case.starts_with("image_video") {
            steps.retain(|name, _| !name.starts_with("vision.")); // the reference keeps those of the last call alone
        }
        check_steps(case, &steps, &reference, &mut worst);
        assert_eq!(prompt.layout.tokens, ids(&reference["input_ids"]), "{case}");
        let axes: [fn(&Position) -> f32; 3] = [|at| at.time, |at| at.height, |at| at.width];
        let positions: Vec<f32> = axes.iter().flat_map(|axis| prompt.layout.positions.iter().map(axis).collect::<Vec<_>>()).collect();
        assert!(positions == floats(&reference["position_ids"]), "{case}: positions");
        check_layers(case, &mut omni.engine, &prompt, &reference, &mut worst);
        check_answer(case, &mut omni.engine, &prompt, &reference, &mut worst);
    }
    for (step, error) in &worst {
        println!("{step}: {error:.1e} standard deviations");
    }
}

/// Every layer's output, which is the next one's input.
fn check_layers(case: &str, engine: &mut Engine, prompt: &Prompt, reference: &Reference, worst: &mut BTreeMap<String, f32>) {
    let width = engine.model().decoder().hidden_size as usize;
    for layer in engine.all_layers() {
        let mut session = engine.session();
        prompt.pass(engine, &mut session, 0..layer + 1, Want::Rows);
        let mut found = vec![0.0; prompt.layout.tokens.len() * width];
        found.chunks_exact_mut(width).enumerate().for_each(|(row, out)| engine.row(row, out));
        let mut expected = floats(&reference[&format!("thinker.layer.{layer}")]);
        // The reference was taken before what eyes add to the first layers.
        for run in &prompt.layout.runs {
            if let Some(added) = prompt.tower_rows(run.medium, run.source).deepstack.get(layer as usize) {
                let rows = &added[run.rows.start * width..run.rows.end * width];
                expected[run.first * width..].iter_mut().zip(rows).for_each(|(x, added)| *x += added);
            }
        }
        let error = error(&format!("{case} layer {layer}"), &found, &expected);
        assert!(error <= TOLERANCE, "{case} layer {layer}: {error:e}");
        let so_far = worst.entry("thinker.layer".to_owned()).or_default();
        *so_far = so_far.max(error);
    }
}

/// Logits of the prompt's end, then greedy tokens with the logits of each.
fn check_answer(case: &str, engine: &mut Engine, prompt: &Prompt, reference: &Reference, worst: &mut BTreeMap<String, f32>) {
    let (mut session, layers) = (engine.session(), engine.all_layers());
    prompt.pass(engine, &mut session, layers, Want::All);
    let rows = prompt.layout.tokens.len();
    let logits: Vec<f32> = (rows - 8..rows).flat_map(|row| engine.logits_of(row).to_vec()).collect();
    let mut note = |name: &str, found: &[f32], expected: &[f32]| {
        let error = error(&format!("{case} {name}"), found, expected);
        assert!(error <= TOLERANCE, "{case} {name}: {error:e}");
        let so_far = worst.entry(name.to_owned()).or_default();
        *so_far = so_far.max(error);
    };
    note("logits_last8", &logits, &floats(&reference["logits_last8"]));
    let (greedy, expected) = (ids(&reference["greedy"]), floats(&reference["greedy_logits"]));
    let vocab = expected.len() / greedy.len();
    let mut logits = logits[7 * vocab..].to_vec();
    for (step, (&token, expected)) in greedy.iter().zip(expected.chunks_exact(vocab)).enumerate() {
        note("greedy_logits", &logits, expected);
        let best = (0..vocab).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).expect("a vocabulary");
        assert_eq!(best as u32, token, "{case}, token {step}");
        logits = engine.forward(&mut session, &[token]).expect("it runs").to_vec();
    }
}

#[test]
fn sizes_and_lengths_are_those_of_the_reference() {
    let meta = meta();
    let numbers =
        |value: &Value| value.as_array().expect("a list").iter().map(|n| n.as_u64().expect("a number") as usize).collect::<Vec<_>>();
    for case in meta["smart_resize"].as_array().expect("a list") {
        let [height, width, least, most, to_height, to_width] = numbers(case)[..] else { panic!("six numbers") };
        assert_eq!(target_size(height, width, 32, [least as u32, most as u32]), Ok((to_height, to_width)), "{height} × {width}");
    }
    for case in meta["audio_tokens"].as_array().expect("a list") {
        let [frames, rows] = numbers(case)[..] else { panic!("two numbers") };
        assert_eq!(rows_of_frames(frames, 100), rows, "{frames} frames");
    }
    assert!(target_size(10, 2001, 32, [3136, 1 << 24]).is_err() && target_size(10, 2000, 32, [3136, 1 << 24]).is_ok());
}

#[test]
fn pictures_are_resized_bit_for_bit() {
    for (name, tensor) in
        read_safetensors(&vectors("omni/reference/resize.safetensors")).iter().filter(|(name, _)| !name.ends_with("pillow"))
    {
        let (file, size) = name.split_once('.').expect("file and size");
        let (height, width) = size.split_once('x').expect("two sides");
        let (height, width): (usize, usize) = (height.parse().expect("a number"), width.parse().expect("a number"));
        let found = resize(&picture(&format!("{file}.png")), height, width);
        let planes: Vec<u8> = (0..3).flat_map(|channel| found.rgb.iter().skip(channel).step_by(3).copied().collect::<Vec<_>>()).collect();
        assert!(planes == tensor.bytes, "{name}");
    }
}

#[test]
fn every_format_says_the_same() {
    let original = picture("c_64x64.png");
    for name in ["c.bmp", "c.webp", "c_rgba.png"] {
        assert_eq!(picture(name), original, "{name}");
    }
    let near = |name: &str, expected: &Picture, most: f32| {
        let found = picture(name);
        assert_eq!((found.width, found.height), (expected.width, expected.height), "{name}");
        let differences = found.rgb.iter().zip(&expected.rgb).map(|(a, b)| f32::from(a.abs_diff(*b)));
        let mean = differences.sum::<f32>() / expected.rgb.len() as f32;
        assert!(mean < most, "{name}: {mean} levels");
    };
    near("c.jpg", &original, 14.0);
    near("c_turned.jpg", &original, 14.0);
    near("c.gif", &original, 12.0);
    let grey = picture("c_16bit.png");
    assert!(grey.rgb.chunks_exact(3).all(|pixel| pixel[0] == pixel[1] && pixel[1] == pixel[2]));
    let limits = MediaLimits::default();
    for (name, most) in [("video.webp", 4.0), ("video.png", 0.0), ("video.gif", 12.0)] {
        let read = decode_frames(&media(name), &limits).unwrap_or_else(|error| panic!("{name}: {error}"));
        let times: Vec<_> = read.iter().map(|frame| frame.seconds).collect();
        assert_eq!(times, [0.5; 5], "{name}");
        for (frame, expected) in read.iter().zip(frames()) {
            let differences = frame.picture.rgb.iter().zip(&expected.rgb).map(|(a, b)| f32::from(a.abs_diff(*b)));
            let mean = differences.sum::<f32>() / expected.rgb.len() as f32;
            assert!(mean <= most, "{name}: {mean} levels");
        }
        assert_eq!(sample(&read, 2.0, &limits).expect("few frames").len(), 5);
        assert_eq!(sample(&read, 4.0, &limits).expect("few frames").len(), 10);
        assert_eq!(sample(&read, 0.1, &limits).expect("few frames").len(), 1);
    }
    let original = sound("short.wav");
    assert_eq!(sound("short.flac"), original);
    let mut piped = media("short.wav");
    piped[4..8].fill(0xff);
    piped[40..44].fill(0xff);
    assert_eq!(decode_sound(&piped, &limits).expect("it was written into a pipe"), original);
    for name in ["short.ogg", "short.mp3", "short_48k_4ch.wav"] {
        let found = sound(name);
        let (power, length) =
            (|x: &[f32]| (x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32).sqrt(), found.len().abs_diff(original.len()));
        assert!(length < 2500, "{name}: {} samples for {}", found.len(), original.len());
        assert!((power(&found) / power(&original) - 1.0).abs() < 0.15, "{name}: {} for {}", power(&found), power(&original));
    }
}

/// Each limit at its edge.
#[test]
fn limits_hold_to_the_last_byte() {
    let with = |change: fn(&mut MediaLimits, i64), by: i64| {
        let mut limits = MediaLimits::default();
        change(&mut limits, by);
        limits
    };
    let png = media("c_64x64.png");
    for by in [-1, 0, 1] {
        let bytes = with(|limits, by| limits.bytes = (811 + by) as u64, by);
        assert_eq!(decode_picture(&png, &bytes).is_ok(), by >= 0, "bytes {by}");
        let pixels = with(|limits, by| limits.pixels = (64 * 64 + by) as u64, by);
        assert_eq!(decode_picture(&png, &pixels).is_ok(), by >= 0, "pixels {by}");
        let video = decode_frames(&media("video.webp"), &MediaLimits::default()).expect("a video");
        let frames = with(|limits, by| limits.frames = (5 + by) as usize, by);
        assert_eq!(sample(&video, 2.0, &frames).is_ok(), by >= 0, "frames {by}");
        let of_video = with(|limits, by| limits.seconds = 2.5 + 0.01 * by as f64, by);
        assert_eq!(decode_frames(&media("video.webp"), &of_video).is_ok(), by >= 0, "seconds of a video {by}");
        let of_sound = with(|limits, by| limits.seconds = 2.0 + 0.001 * by as f64, by);
        assert_eq!(decode_sound(&media("exact.wav"), &of_sound).is_ok(), by >= 0, "seconds of a sound {by}");
    }
}

/// What a slip of the hand would do is far beyond the tolerance: a resize that is not rounded between its passes, attention across the windows of
/// a long sound, positions without fractions.
#[test]
fn each_thing_broken_on_purpose_is_noticed() {
    let omni = Omni::new(Some(Precision::F32));
    // A vertical pass before the horizontal one: the same picture turned over, resized, and turned back.
    let turned = |picture: &Picture| {
        let pixel = |x: usize, y: usize| picture.rgb[3 * (y * picture.width + x)..][..3].to_vec();
        let rgb = (0..picture.width).flat_map(|x| (0..picture.height).flat_map(move |y| pixel(x, y))).collect();
        Picture { width: picture.height, height: picture.width, rgb }
    };
    let original = picture("b_131x208.png");
    let (right, wrong) = (resize(&original, 192, 128), turned(&resize(&turned(&original), 128, 192)));
    let differs = right.rgb.iter().zip(&wrong.rgb).filter(|(a, b)| a != b).count();
    println!("another order of passes: {differs} of {} bytes differ", right.rgb.len());
    assert!(differs > 0);
    let reference = read_safetensors(&vectors("omni/reference/audio_long.safetensors"));
    let expected = floats(&reference["audio.out"]);
    let bands = spectrum(&sound("clip_long.wav"), omni.audio_shape.bands as usize);
    let manifest = Imported::from_dir(&checkpoint(MODEL), Some(Precision::F32)).expect("it imports");
    let unmasked = {
        let mut changed = (*manifest.manifest).clone();
        for part in &mut changed.parts {
            if let PartConfig::Audio(audio) = &mut part.config {
                audio.window *= 100;
            }
        }
        AudioTower::load(&changed, &mut manifest.reader()).expect("it loads")
    };
    let found = unmasked.run(omni.engine.machine(), &bands, None);
    let worst = error("unmasked", &found.rows, &expected);
    println!("windows that see one another: {worst:.1e} standard deviations");
    assert!(worst > 100.0 * TOLERANCE);
    let reference = read_safetensors(&vectors("omni/reference/video_fps3.safetensors"));
    let mut engine = omni.engine;
    let meta = meta();
    let text = meta["cases"]["video_fps3"]["text"].as_str().expect("its text");
    let whole = Omni { engine: manifest.engine(u64::MAX, 1), ..omni };
    let mut prompt = Prompt::of(&whole, text, &[Shown::Video(3.0, None)], &mut |_, _| {});
    prompt.layout.positions.iter_mut().for_each(|at| at.time = at.time.floor());
    let (mut session, layers) = (engine.session(), engine.all_layers());
    prompt.pass(&mut engine, &mut session, layers, Want::All);
    let rows = prompt.layout.tokens.len();
    let logits: Vec<f32> = (rows - 8..rows).flat_map(|row| engine.logits_of(row).to_vec()).collect();
    let worst = error("whole positions", &logits, &floats(&reference["logits_last8"]));
    println!("positions in whole numbers: {worst:.1e} standard deviations");
    assert!(worst > 10.0 * TOLERANCE);
}
