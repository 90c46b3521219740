//! Model families against transformers, step by step: `vectors/README.md` says what computed each reference.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use inference::activation_log::ActivationLog;
use inference::engine::{Engine, Piece, Want};
use inference::generate::{GenerateRequest, generate};
use inference::reference::reference_logits;
use inference::sampler::Sampling;
use protocol::Precision;

use crate::support::{Imported, Tensor, checkpoint, floats, ids, read_safetensors, vectors};

/// Largest deviation of logits from the reference, in standard deviations of the reference, and of hidden states.
const LOGITS_TOLERANCE: f32 = 1e-4;
const HIDDEN_TOLERANCE: f32 = 2e-4;

/// A checkpoint for each family beside Qwen3, whose cases are in `parity`.
const CASES: [&str; 3] = ["tiny-mixtral", "tiny-olmoe", "tiny-qwen2-moe"];

fn worst(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let mean = expected.iter().sum::<f32>() / expected.len() as f32;
    let deviation = (expected.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / expected.len() as f32).sqrt();
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / deviation
}

/// Hidden states of the last rows of `prompt` after the first layers.
fn hidden_after(engine: &mut Engine, prompt: &[u32], layers: u32, last: usize) -> Vec<f32> {
    let width = engine.model().decoder().hidden_size as usize;
    let mut session = engine.session();
    engine.pass(&mut [Piece::tokens(&mut session, prompt)], 0..layers, Want::Rows).expect("it runs");
    let mut rows = vec![0.0; last * width];
    rows.chunks_exact_mut(width).zip(prompt.len() - last..).for_each(|(out, row)| engine.row(row, out));
    rows
}

/// The experts of each row of a layer, ascending.
fn experts(reference: &BTreeMap<String, Tensor>, layer: u32) -> Vec<Vec<u32>> {
    let indices = &reference[&format!("router.{layer}.indices")];
    let mut rows: Vec<_> = ids(indices).chunks_exact(indices.shape[1]).map(<[u32]>::to_vec).collect();
    rows.iter_mut().for_each(|row| row.sort_unstable());
    rows
}

#[test]
fn layers_experts_logits_and_tokens_are_those_of_transformers() {
    for name in CASES {
        let reference = read_safetensors(&vectors(&format!("reference/{name}.safetensors")));
        let imported = Imported::of(name);
        let mut engine = imported.engine(u64::MAX, 1);
        let (prompt, greedy) = (ids(&reference["input_ids"]), ids(&reference["greedy"]));

        let mut worst_hidden = 0.0f32;
        for layer in engine.all_layers() {
            let expected = floats(&reference[&format!("layer.{layer}")]);
            let found = hidden_after(&mut engine, &prompt, layer + 1, 16);
            worst_hidden = worst_hidden.max(worst(&found, &expected));
            assert!(worst_hidden < HIDDEN_TOLERANCE, "{name} layer {layer}: {worst_hidden}");
        }

        engine.log = Some(ActivationLog::default());
        let mut session = engine.session();
        let layers = engine.all_layers();
        engine.pass(&mut [Piece::tokens(&mut session, &prompt)], layers.clone(), Want::All).expect("it runs");
        let log = engine.log.take().expect("it was there");
        let logits: Vec<f32> = (prompt.len() - 8..prompt.len()).flat_map(|row| engine.logits_of(row).to_vec()).collect();
        let error = worst(&logits, &floats(&reference["logits_last8"]));
        assert!(error < LOGITS_TOLERANCE, "{name}: {error}");
        for layer in layers.filter(|layer| reference.contains_key(&format!("router.{layer}.indices"))) {
            let found: Vec<Vec<u32>> = log
                .entries()
                .filter(|entry| entry.layer == layer)
                .map(|entry| {
                    let mut experts: Vec<_> = entry.choices.iter().map(|choice| choice.expert).collect();
                    experts.sort_unstable();
                    experts
                })
                .collect();
            assert_eq!(found, experts(&reference, layer), "{name} layer {layer}");
        }

        let request = GenerateRequest {
            prompt: prompt.clone(),
            media: None,
            tokens_max: greedy.len(),
            sampling: Sampling::GREEDY,
            eos_token_ids: vec![],
            stop_strings: vec![],
            top_logprobs: None,
        };
        let mut session = engine.session();
        let answer = generate(&mut engine, &mut inference::generate::NoTowers, None, &mut session, &request, |_| ControlFlow::Continue(()));
        assert_eq!(answer.expect("it runs").tokens, greedy, "{name}");

        // What chose the last eight of them, one token at a time.
        let mut session = engine.session();
        engine.forward(&mut session, &prompt).expect("it runs");
        let mut decoded = Vec::new();
        for &token in &greedy[..greedy.len() - 1] {
            decoded.push(engine.forward(&mut session, &[token]).expect("it runs").to_vec());
        }
        let decode_error = worst(&decoded[decoded.len() - 8..].concat(), &floats(&reference["decode_logits"]));
        assert!(decode_error < LOGITS_TOLERANCE, "{name}: {decode_error}");
        println!(
            "{name}: largest errors in standard deviations: layers {worst_hidden:.1e}, logits {error:.1e}, decoding {decode_error:.1e}"
        );
    }
}

#[test]
fn the_reference_engine_agrees_with_transformers_too() {
    for name in CASES {
        let reference = read_safetensors(&vectors(&format!("reference/{name}.safetensors")));
        let imported = Imported::of(name);
        let found = reference_logits(&imported.manifest, &ids(&reference["input_ids"]), &mut |blob| Ok(imported.blobs.get(blob)));
        let (found, vocab) = (found.expect("it runs"), imported.manifest.decoder().vocab_size as usize);
        let error = worst(&found[found.len() - 8 * vocab..], &floats(&reference["logits_last8"]));
        assert!(error < LOGITS_TOLERANCE, "{name}: {error}");
    }
}

/// Packed weights of every family against the reference engine, which widens them and multiplies in f32.
#[test]
fn packed_families_compute_what_their_weights_say() {
    for name in CASES {
        for precision in [Precision::Q8, Precision::Q4] {
            let imported = Imported::from_dir(&checkpoint(name), Some(precision)).expect("it imports");
            let prompt: Vec<u32> = (1..25).collect();
            let expected = reference_logits(&imported.manifest, &prompt, &mut |blob| Ok(imported.blobs.get(blob))).expect("it runs");
            let mut engine = imported.engine(u64::MAX, 1);
            let mut session = engine.session();
            let mut found = Vec::new();
            let each = |_, logits: &mut [f32]| {
                found.extend_from_slice(logits);
                Ok::<_, inference::engine::ForwardError>(())
            };
            engine.forward_each(&mut session, &prompt, each).expect("it runs");
            let mean = |x: &[f32]| x.iter().sum::<f32>() / x.len() as f32;
            let error = mean(&found.iter().zip(&expected).map(|(a, b)| (a - b).powi(2)).collect::<Vec<_>>()).sqrt();
            let size = mean(&expected.iter().map(|x| x.powi(2)).collect::<Vec<_>>()).sqrt();
            println!("{name} at {precision}: {:.2e} of the logits' size", error / size);
            assert!(error / size < 0.1, "{name} at {precision}: {}", error / size);
        }
    }
}
