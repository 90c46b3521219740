//! How long eyes and ears take at the published sizes, on weights made up here.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use base::clock::{check_interrupted, instant};
use base::failure::Failure;
use base::output::{human_bytes, note, print_json, print_line};
use clap::Args;
use inference::aligned::AlignedBytes;
use inference::cache_policy::PolicyKind;
use inference::kernels::Kernels;
use inference::machine::Machine;
use inference::media::patches::of_picture;
use inference::media::resize::Picture;
use inference::media::spectrum::{SAMPLE_RATE, spectrum};
use inference::tower::audio::AudioTower;
use inference::tower::vision::VisionTower;
use protocol::manifest::{ChatFormat, GenerationDefaults, Part, PartConfig, TrunkTensor};
use protocol::towers::{Audio, Vision};
use protocol::{BlobRef, ContentHash, ModelManifest, Precision};
use runtime::command::{Context, parse_kernels};
use runtime::memory::resident_bytes;
use serde_json::json;

use super::Median;
use super::synth::{Random, weights};

#[derive(Args)]
pub struct TowersArgs {
    /// Number format of the weights
    #[arg(long, default_value = "q8")]
    precision: Precision,
    /// Pictures, WIDTHxHEIGHT
    #[arg(long, value_delimiter = ',', value_name = "SIZE", default_value = "448x448,1344x1008", value_parser = parse_size)]
    pictures: Vec<(usize, usize)>,
    /// Sounds, in seconds
    #[arg(long, value_delimiter = ',', value_name = "SECONDS", default_value = "30,300")]
    sounds: Vec<usize>,
    /// Threads
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: u16,
    /// How often each is measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Kernels to compute with [default: the fastest that this processor has]
    #[arg(long, value_name = "NAME", value_parser = parse_kernels)]
    kernels: Option<&'static Kernels>,
}

fn parse_size(text: &str) -> Result<(usize, usize), String> {
    let sides = text.split_once('x').and_then(|(width, height)| Some((width.parse().ok()?, height.parse().ok()?)));
    sides.filter(|&(width, height)| width * height > 0).ok_or_else(|| format!("{text:?} is not WIDTHxHEIGHT"))
}

/// The vision tower of Qwen3-Omni-30B-A3B.
fn vision() -> Vision {
    Vision {
        layers: 27,
        hidden_size: 1152,
        heads: 16,
        width: 4304,
        patch: 16,
        merge: 2,
        frames: 2,
        side: 48,
        out: 2048,
        deepstack: vec![8, 16, 24],
        image_token: 0,
        video_token: 1,
        start_token: 2,
        end_token: 3,
        positions_per_second: 13,
        pixels_min: 3136,
        pixels_max: 12_845_056,
        frame_pixels_min: 131_072,
        frame_pixels_max: 786_432,
    }
}

/// The audio tower of Qwen3-Omni-30B-A3B.
fn audio() -> Audio {
    Audio {
        layers: 32,
        hidden_size: 1280,
        heads: 20,
        width: 5120,
        bands: 128,
        channels: 480,
        chunk: 100,
        window: 800,
        out: 2048,
        token: 4,
        start_token: 5,
        end_token: 6,
    }
}

/// Blobs in memory.
type Blobs = HashMap<ContentHash, Arc<AlignedBytes>>;

/// A part of random weights.
fn made_up(config: PartConfig, precision: Precision, blobs: &mut Blobs) -> Part {
    let specs = config.tensors();
    let trunk = specs.iter().enumerate().map(|(number, spec)| {
        let precision = if spec.packable || !precision.is_packed() { precision } else { Precision::Bf16 };
        let bytes = weights(spec, precision, Random::new(1, number as u64));
        let mut aligned = AlignedBytes::zeroed(bytes.len());
        aligned.copy_from_slice(&bytes);
        let blob = BlobRef::of(&bytes);
        blobs.insert(blob.hash, Arc::new(aligned));
        TrunkTensor { role: spec.role, precision, blob }
    });
    Part { kind: config.kind(), trunk: trunk.collect(), experts: Vec::new(), config }
}

pub(crate) fn towers(context: &Context, args: &TowersArgs) -> Result<(), Failure> {
    let mut blobs = Blobs::new();
    let configs = [PartConfig::Vision(vision()), PartConfig::Audio(audio())];
    note("making weights up …");
    let parts = configs.into_iter().map(|config| made_up(config, args.precision, &mut blobs)).collect();
    let (chat, generation) = (ChatFormat::default(), GenerationDefaults::default());
    let manifest = ModelManifest { parent: None, parts, tokenizer: None, chat, generation };
    let mut read = |blob: BlobRef| blobs.get(&blob.hash).cloned().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound));
    let eyes = VisionTower::load(&manifest, &mut read).expect("its weights were made just now");
    let ears = AudioTower::load(&manifest, &mut read).expect("its weights were made just now");
    let kernels = args.kernels.unwrap_or_else(Kernels::best);
    let machine = Machine::new(args.threads.into(), kernels, PolicyKind::Lru);
    let weights: u64 = manifest.parts.iter().map(Part::trunk_bytes).sum();
    note(&format!("{} of weights at {}, {} threads, {} kernels", human_bytes(weights), args.precision, args.threads, kernels.name));
    let mut rows = Vec::new();
    let mut measure = |what: String, run: &dyn Fn() -> usize| -> Result<(), Failure> {
        let before = resident_bytes();
        let (mut seconds, mut made, mut most) = (Vec::new(), 0, before);
        for _ in 0..args.runs {
            check_interrupted()?;
            let began = instant();
            made = run();
            seconds.push((instant() - began).as_secs_f64());
            most = most.max(resident_bytes());
        }
        let median = Median::of(seconds);
        rows.push(
            json!({"what": what, "rows": made, "seconds": median.json(), "precision": args.precision.name(), "threads": args.threads,
                         "kernels": kernels.name, "grown_bytes": most - before}),
        );
        if !context.json {
            print_line(&format!("{what:<22}{made:>7} rows{:>10.3} s ({:.3} – {:.3})", median.median, median.min, median.max))?;
        }
        Ok(())
    };
    for &(width, height) in &args.pictures {
        let rgb = (0..3 * width * height).map(|i| (i as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
        let patches = of_picture(&vision(), &Picture { width, height, rgb }).expect("its size is fine");
        measure(format!("picture of {width} × {height}"), &|| eyes.run(&machine, &patches, None).rows.len() / vision().out as usize)?;
    }
    for &seconds in &args.sounds {
        let samples: Vec<f32> = (0..seconds * SAMPLE_RATE as usize).map(|i| (i as f32 * 0.05).sin() * 0.3).collect();
        let bands = spectrum(&samples, audio().bands as usize);
        measure(format!("sound of {seconds} s"), &|| ears.run(&machine, &bands, None).rows.len() / audio().out as usize)?;
    }
    if context.json { print_json(&json!(rows)) } else { Ok(()) }
}
