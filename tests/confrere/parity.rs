//! The engine against transformers: `vectors/README.md` says what computed each reference.

use std::collections::BTreeMap;
use std::sync::Arc;

use inference::activation_log::ActivationLog;
use inference::engine::{Engine, ForwardError};
use inference::generate::{GenerateRequest, generate};
use inference::reference::reference_logits;
use inference::router::{Choice, route};
use inference::sampler::Sampling;
use protocol::decoder::{FeedForward, LayerRun, Mixer, Norm, Rope, Router};
use protocol::manifest::PartConfig;
use protocol::tensors::{LayerTensor, TensorRole};
use protocol::{Decoder, ModelManifest, Precision};

use crate::support::{Imported, Tensor, floats, ids, read_safetensors, vectors};

/// Largest deviation from the reference, in standard deviations of the reference.
const TOLERANCE: f32 = 1e-4;

/// Checkpoint and reference of every text case.
const CASES: [(&str, &str); 11] = [
    ("tiny-qwen3-moe", "moe_text"),
    ("tiny-qwen3-moe-bf16", "moe_text_bf16"),
    ("tiny-qwen3-omni", "omni_text"),
    ("tiny-qwen3-omni-thinker", "omni_text"),
    ("variant-dense", "variant-dense"),
    ("variant-sparse-step", "variant-sparse-step"),
    ("variant-tied", "variant-tied"),
    ("variant-fused", "variant-tied"),
    ("variant-no-renorm", "variant-no-renorm"),
    ("variant-f16", "variant-f16"),
    ("variant-faint", "variant-faint"),
];

fn reference(name: &str) -> BTreeMap<String, Tensor> {
    read_safetensors(&vectors(&format!("reference/{name}.safetensors")))
}

fn worst(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let mean = expected.iter().sum::<f32>() / expected.len() as f32;
    let deviation = (expected.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / expected.len() as f32).sqrt();
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / deviation
}

/// Logits after each of `tokens`.
fn all_logits(engine: &mut Engine, tokens: &[u32]) -> Vec<f32> {
    let mut all = Vec::new();
    let mut session = engine.session();
    let each = |_, logits: &mut [f32]| {
        all.extend_from_slice(logits);
        Ok::<_, ForwardError>(())
    };
    engine.forward_each(&mut session, tokens, each).expect("it runs");
    all
}

#[test]
fn logits_experts_and_greedy_tokens_are_those_of_transformers() {
    for (checkpoint, name) in CASES {
        let reference = reference(name);
        let imported = Imported::of(checkpoint);
        let decoder = imported.manifest.decoder();
        let moe = decoder.moe().expect("it has experts");
        let Router::Softmax { normalise } = moe.router;
        let mut engine = imported.engine(u64::MAX, 1);
        let prompt = ids(&reference["input_ids"]);

        engine.log = Some(ActivationLog::default());
        let error = worst(&all_logits(&mut engine, &prompt), &floats(&reference["logits"]));
        let log = engine.log.take().expect("it was there");
        println!("{checkpoint}: largest error {error:.2e} standard deviations");
        assert!(error < TOLERANCE, "{checkpoint}: {error}");

        for (i, layer) in decoder.moe_layers().enumerate() {
            let expected = floats(&reference[&format!("router.{i}")]);
            let found: Vec<_> = log.entries().filter(|entry| entry.layer == layer).collect();
            assert_eq!(found.len(), prompt.len());
            for (entry, row) in found.iter().zip(expected.chunks_exact(moe.experts as usize)) {
                let mut expected = vec![Choice::default(); moe.per_token as usize];
                route(&mut row.to_vec(), normalise, &mut expected);
                let experts = |choices: &[Choice]| choices.iter().map(|choice| choice.expert).collect::<Vec<_>>();
                assert_eq!(experts(entry.choices), experts(&expected), "{checkpoint} layer {layer} token {}", entry.position);
            }
        }

        let greedy = ids(&reference["greedy"]);
        let request = GenerateRequest {
            media: None,
            tokens_max: greedy.len() - prompt.len(),
            prompt: prompt.clone(),
            sampling: Sampling::GREEDY,
            eos_token_ids: vec![],
            stop_strings: vec![],
            top_logprobs: None,
        };
        let mut session = engine.session();
        let answer =
            generate(
                &mut engine,
                &mut inference::generate::NoTowers,
                None,
                &mut session,
                &request,
                |_| std::ops::ControlFlow::Continue(()),
            );
        assert_eq!(answer.expect("it runs").tokens, greedy[prompt.len()..], "{checkpoint}");
    }
}

/// Breaks one thing on purpose.
type Break = fn(&mut ModelManifest);

/// A comparison that passes whatever is done to the model would prove nothing.
#[test]
fn each_thing_broken_on_purpose_is_noticed() {
    let breaks: [(&str, Break); 5] = [
        ("RoPE base", |m| {
            each_run(m, |run| {
                let Mixer::Gqa(attention) = &mut run.mixer;
                attention.rope = Rope::Plain { base: 1.01 * attention.rope.base() };
            });
        }),
        ("top-k renormalisation", |m| {
            each_run(m, |run| {
                if let FeedForward::Moe(moe) = &mut run.feed_forward {
                    moe.router = Router::Softmax { normalise: false };
                }
            });
        }),
        ("q_norm", |m| {
            let (q_norm, k_norm) = (first(m, LayerTensor::QueryNorm), first(m, LayerTensor::KeyNorm));
            let trunk = &mut m.parts[0].trunk;
            trunk[q_norm].blob = trunk[k_norm].blob;
        }),
        ("order of experts", |m| m.parts[0].experts.swap(0, 1)),
        ("norm epsilon", |m| {
            each_run(m, |run| run.norm = Norm::Rms { eps: 1e-5 });
            decoder(m).final_norm = Norm::Rms { eps: 1e-5 };
        }),
    ];
    let reference = reference("variant-faint");
    let prompt = ids(&reference["input_ids"]);
    for (what, damage) in breaks {
        let mut imported = Imported::of("variant-faint");
        damage(Arc::make_mut(&mut imported.manifest));
        let error = worst(&all_logits(&mut imported.engine(u64::MAX, 1), &prompt), &floats(&reference["logits"]));
        println!("{what} broken: largest error {error:.2e} standard deviations");
        assert!(error > 3.0 * TOLERANCE, "{what} broken goes unnoticed: {error}");
    }
}

fn decoder(manifest: &mut ModelManifest) -> &mut Decoder {
    let PartConfig::Decoder(decoder) = &mut manifest.parts[0].config else { panic!("its first part is a decoder") };
    decoder
}

fn each_run(manifest: &mut ModelManifest, change: impl Fn(&mut LayerRun)) {
    decoder(manifest).runs.iter_mut().for_each(change);
}

/// The first layer's tensor of a kind.
fn first(manifest: &ModelManifest, tensor: LayerTensor) -> usize {
    manifest.text().trunk.iter().position(|other| other.role == TensorRole::Layer(0, tensor)).expect("every layer has it")
}

#[test]
fn the_reference_engine_agrees_with_transformers_too() {
    for (checkpoint, name) in CASES {
        let reference = reference(name);
        let imported = Imported::of(checkpoint);
        let found = reference_logits(&imported.manifest, &ids(&reference["input_ids"]), &mut |blob| Ok(imported.blobs.get(blob)));
        let error = worst(&found.expect("it runs"), &floats(&reference["logits"]));
        assert!(error < TOLERANCE, "{checkpoint}: {error}");
    }
}

/// Packed weights against the reference engine, which widens them and multiplies in f32: what is left is the rounding of activations.
#[test]
fn packed_models_compute_what_their_weights_say() {
    for precision in [Precision::Q8, Precision::Q4] {
        for checkpoint in ["tiny-qwen3-moe", "variant-dense"] {
            let imported = Imported::from_dir(&crate::support::checkpoint(checkpoint), Some(precision)).expect("it imports");
            let prompt: Vec<u32> = (1..25).collect();
            let expected = reference_logits(&imported.manifest, &prompt, &mut |blob| Ok(imported.blobs.get(blob))).expect("it runs");
            let found = all_logits(&mut imported.engine(u64::MAX, 1), &prompt);
            let square = |pairs: &mut dyn Iterator<Item = f32>| pairs.map(|x| x * x).sum::<f32>().sqrt();
            let error = square(&mut found.iter().zip(&expected).map(|(a, b)| a - b)) / square(&mut expected.iter().copied());
            println!("{checkpoint} at {precision}: root mean square error {error:.2e} of the logits'");
            assert!(error < 0.05, "{checkpoint} at {precision}: {error}");
        }
    }
}
