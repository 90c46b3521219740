//! The engine against transformers: `vectors/README.md` says what computed each reference.

use std::collections::BTreeMap;
use std::sync::Arc;

use inference::activation_log::ActivationLog;
use inference::generate::{GenerateRequest, generate};
use inference::reference::reference_logits;
use inference::router::route;
use inference::sampler::Sampling;
use inference::session::{Session, logits};
use protocol::ModelManifest;

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

#[test]
fn logits_experts_and_greedy_tokens_are_those_of_transformers() {
    for (checkpoint, name) in CASES {
        let reference = reference(name);
        let imported = Imported::of(checkpoint);
        let model = imported.model();
        let config = &imported.manifest.config;
        let mut experts = imported.experts(u64::MAX, 1);
        let prompt = ids(&reference["input_ids"]);

        let mut log = ActivationLog::default();
        let hidden = Session::new(&model).forward(&model, &prompt, &mut experts, Some(&mut log)).expect("it runs");
        let error = worst(&logits(&model, &hidden), &floats(&reference["logits"]));
        println!("{checkpoint}: largest error {error:.2e} standard deviations");
        assert!(error < TOLERANCE, "{checkpoint}: {error}");

        for (i, layer) in config.moe_layers().enumerate() {
            let expected = floats(&reference[&format!("router.{i}")]);
            let found: Vec<_> = log.entries().iter().filter(|entry| entry.layer == layer).collect();
            assert_eq!(found.len(), prompt.len());
            for (entry, row) in found.iter().zip(expected.chunks_exact(config.num_experts as usize)) {
                let expected = route(row, config.num_experts_per_tok as usize, config.norm_topk_prob);
                assert_eq!(entry.routing.experts, expected.experts, "{checkpoint} layer {layer} token {}", entry.position);
            }
        }

        let greedy = ids(&reference["greedy"]);
        let request = GenerateRequest {
            tokens_max: greedy.len() - prompt.len(),
            prompt: prompt.clone(),
            sampling: Sampling::GREEDY,
            eos_token_ids: vec![],
            stop_strings: vec![],
        };
        let mut session = Session::new(&model);
        let answer = generate(&model, None, &mut session, &mut experts, &request, |_| std::ops::ControlFlow::Continue(()));
        assert_eq!(answer.expect("it runs").tokens, greedy[prompt.len()..], "{checkpoint}");
    }
}

/// Breaks one thing on purpose.
type Break = fn(&mut ModelManifest);

/// A comparison that passes whatever is done to the model would prove nothing.
#[test]
fn each_thing_broken_on_purpose_is_noticed() {
    let breaks: [(&str, Break); 5] = [
        ("RoPE base", |m| m.config.rope_theta *= 1.01),
        ("top-k renormalisation", |m| m.config.norm_topk_prob = false),
        ("q_norm", |m| {
            let (q_norm, k_norm) = (norm(m, "q_norm"), norm(m, "k_norm"));
            m.trunk[q_norm].blob = m.trunk[k_norm].blob;
        }),
        ("order of experts", |m| m.experts.swap(0, 1)),
        ("norm epsilon", |m| m.config.rms_norm_eps = 1e-5),
    ];
    let reference = reference("variant-faint");
    let prompt = ids(&reference["input_ids"]);
    for (what, damage) in breaks {
        let mut imported = Imported::of("variant-faint");
        damage(Arc::make_mut(&mut imported.manifest));
        let model = imported.model();
        let hidden = Session::new(&model).forward(&model, &prompt, &mut imported.experts(u64::MAX, 1), None).expect("it runs");
        let error = worst(&logits(&model, &hidden), &floats(&reference["logits"]));
        println!("{what} broken: largest error {error:.2e} standard deviations");
        assert!(error > 3.0 * TOLERANCE, "{what} broken goes unnoticed: {error}");
    }
}

fn norm(manifest: &ModelManifest, name: &str) -> usize {
    let found = manifest.trunk.iter().position(|tensor| tensor.name.ends_with(&format!("{name}.weight")));
    found.expect("every layer has it")
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
