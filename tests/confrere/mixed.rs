//! Models whose experts have a precision each: what they compute, and what they take in memory.

use std::process::Command;
use std::sync::Arc;

use inference::aligned::AlignedBytes;
use inference::cache_policy::PolicyKind;
use inference::checkpoint::families::parse_config;
use inference::checkpoint::import::BlobSink as _;
use inference::convert::{convert_expert, convert_matrix};
use inference::engine::Engine;
use inference::kernels::Kernels;
use inference::machine::Machine;
use inference::reference::reference_logits;
use protocol::manifest::{ChatFormat, GenerationDefaults, PackedBlob, Part, PartConfig, TrunkTensor};
use protocol::{BlobRef, ModelManifest, PartKind, Precision};
use serde_json::json;

use crate::crowd::resident_bytes;
use crate::support::{Imported, MemoryBlobs};

const MIXED: [Precision; 8] = Precision::ALL;
const LAYERS: u64 = 3;
const EXPERTS: u64 = 16;

/// Random numbers, the same from the same seed.
fn random(seed: u64, count: usize, size: f32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * size
    };
    (0..count).flat_map(|_| next().to_le_bytes()).collect()
}

/// A model with experts of `width`, each at the next of all precisions. Models of different seeds share every other expert.
fn model(seed: u64, width: usize) -> Imported {
    let config = json!({
        "model_type": "qwen3_moe", "vocab_size": 64, "hidden_size": width, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "num_experts": EXPERTS, "num_experts_per_tok": 4, "moe_intermediate_size": width,
        "norm_topk_prob": true, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "max_position_embeddings": 512,
    });
    let parsed = parse_config(&config, &inference::checkpoint::families::Preprocessors::default()).expect("a configuration");
    let decoder = parsed.decoder().clone();
    let blobs = MemoryBlobs::default();
    let put = |bytes: &[u8]| -> BlobRef { blobs.put(bytes).expect("memory") };
    let tensor = |(number, spec): (u64, protocol::tensors::TensorSpec)| {
        let (rows, columns) = spec.sides();
        let size = if rows == 1 { 0.0 } else { 2.0 / (columns as f32).sqrt() };
        let mut values = random(seed * 1000 + number, rows * columns, size);
        if rows == 1 {
            values = std::iter::repeat_n(1f32.to_le_bytes(), columns).flatten().collect();
        }
        let blob = put(&convert_matrix(&values, Precision::F32, Precision::Bf16, (rows, columns)));
        TrunkTensor { role: spec.role, precision: Precision::Bf16, blob }
    };
    let trunk = (0..).zip(decoder.tensors()).map(tensor).collect();
    let expert = |number: u64| {
        let precision = MIXED[(number % 8) as usize];
        let seed = if number.is_multiple_of(2) { 0 } else { seed };
        let plane = |n: u64| random(seed * 1_000_000 + 4 * number + n, width * width, 2.0 / (width as f32).sqrt());
        let planes = [plane(1), plane(2), plane(3)];
        let blob = put(&convert_expert([0, 1, 2].map(|n| (&planes[n][..], Precision::F32)), decoder.expert_shape(precision)));
        PackedBlob { precision, blob }
    };
    let experts = (0..LAYERS * EXPERTS).map(expert).collect();
    let manifest = ModelManifest {
        parent: None,
        parts: vec![Part { kind: PartKind::Text, config: PartConfig::Decoder(decoder), trunk, experts }],
        tokenizer: None,
        chat: ChatFormat::default(),
        generation: GenerationDefaults::default(),
    };
    Imported { manifest: Arc::new(manifest.checked().expect("the parts fit")), blobs: Arc::new(blobs) }
}

fn bits(engine: &mut Engine, tokens: &[u32], at_once: usize) -> Vec<u32> {
    let mut session = engine.session();
    tokens.chunks(at_once).flat_map(|tokens| engine.forward(&mut session, tokens).expect("it runs").to_vec()).map(f32::to_bits).collect()
}

#[test]
fn a_model_of_mixed_precisions_computes_what_its_weights_say() {
    let model = model(1, 64);
    assert_eq!(ModelManifest::from_bytes(&model.manifest.to_bytes()).expect("it is read again"), *model.manifest);
    assert_eq!(model.manifest.precision_text(), "f32 × 6, f16 × 6, bf16 × 6, q8 × 6, q6 × 6, q4 × 6, q3 × 6, q2 × 6");
    let tokens: Vec<u32> = (0..24).map(|n| n * 7 % 64).collect();
    let expected = reference_logits(&model.manifest, &tokens, &mut |blob| Ok(model.blobs.get(blob))).expect("it runs");
    let found: Vec<f32> = bits(&mut model.engine(u64::MAX, 1), &tokens, 1).into_iter().map(f32::from_bits).collect();
    let size = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x * x)).sum::<f64>().sqrt();
    let error = size(&mut found.iter().zip(&expected).map(|(a, b)| a - b)) / size(&mut expected.iter().copied());
    println!("error of mixed precisions: {error:.1e} of the logits' size");
    assert!(error < 0.05, "{error}"); // activations are rounded to 8 bits for some of the experts
    for kernels in Kernels::available() {
        let options = inference::engine::EngineOptions { kernels, ..model.options() };
        let single = bits(&mut model.engine_with(u64::MAX, 3, options), &tokens, 1);
        assert!(single.iter().zip(&found).all(|(a, b)| *a == b.to_bits()), "{}", kernels.name);
    }
}

/// Two models in one memory, too small for either, give the bits of each alone; what they share is there once.
#[test]
fn two_models_in_one_memory_are_as_each_alone() {
    let models = [model(1, 64), model(2, 64)];
    let tokens: Vec<u32> = (0..40).map(|n| n * 11 % 64).collect();
    let alone: Vec<_> = models.iter().map(|model| bits(&mut model.engine(u64::MAX, 1), &tokens, 5)).collect();
    for bytes_max in [0, 200 << 10, 1 << 20, u64::MAX] {
        let machine = Machine::new(2, Kernels::best(), PolicyKind::Lru);
        machine.experts().lock().set_bytes_max(bytes_max);
        let mut engines: Vec<_> = models.iter().zip(5..).map(|(model, seed)| model.engine_on(&machine, seed)).collect();
        let mut sessions: Vec<_> = engines.iter().map(Engine::session).collect();
        let mut found = [Vec::new(), Vec::new()];
        for tokens in tokens.chunks(5) {
            for ((engine, session), found) in engines.iter_mut().zip(&mut sessions).zip(&mut found) {
                found.extend(engine.forward(session, tokens).expect("it runs").iter().map(|logit| logit.to_bits()));
            }
        }
        assert!(found[0] == alone[0] && found[1] == alone[1], "with {bytes_max} bytes");
        if bytes_max == u64::MAX {
            let of = |model: &Imported| model.manifest.expert_blobs().map(|blob| AlignedBytes::taken(blob.length as usize)).sum::<u64>();
            assert!(machine.experts().bytes() < of(&models[0]) + of(&models[1]), "what is shared counts once");
        } else {
            assert!(machine.experts().bytes() <= bytes_max);
        }
        drop(engines);
        machine.experts().lock().set_bytes_max(0);
        assert_eq!(machine.bytes(), 0);
    }
}

/// Passes of models of different shapes take turns in one working memory, as large as the larger needs; the smaller's is its own again.
#[test]
fn models_of_different_shapes_share_what_they_work_in() {
    let models = [model(1, 64), model(2, 96), model(3, 32)];
    let tokens: Vec<u32> = (0..40).map(|n| n * 13 % 64).collect();
    let alone: Vec<_> = models.iter().map(|model| bits(&mut model.engine(u64::MAX, 1), &tokens, 7)).collect();
    let machine = Machine::new(2, Kernels::best(), PolicyKind::Lru);
    machine.experts().lock().set_bytes_max(u64::MAX);
    let mut engines = Vec::new();
    let needs: Vec<_> = [1, 0, 2]
        .map(|n| {
            engines.push(models[n].engine_on(&machine, 5));
            machine.work_bytes()
        })
        .into();
    assert_eq!(needs, [needs[0]; 3], "the first is the largest");
    assert_eq!(machine.work_bytes_untaken(), needs[0]);
    let mut sessions: Vec<_> = engines.iter().map(Engine::session).collect();
    let mut found = [const { Vec::new() }; 3];
    for tokens in tokens.chunks(7) {
        for ((engine, session), found) in engines.iter_mut().zip(&mut sessions).zip(&mut found) {
            found.extend(engine.forward(session, tokens).expect("it runs").iter().map(|logit| logit.to_bits()));
        }
    }
    assert!(found == [1, 0, 2].map(|n| alone[n].clone()));
    assert!(machine.work_bytes_untaken() > 0, "no pass had all rows that there may be");
    engines.remove(0);
    let less = machine.work_bytes();
    assert!(less < needs[0] && less > 0);
    let mut session = engines[0].session();
    assert_eq!(
        engines[0].forward(&mut session, &tokens[..7]).expect("it runs").iter().map(|logit| logit.to_bits()).collect::<Vec<_>>(),
        alone[0][..64]
    );
    drop(engines);
    assert_eq!(machine.work_bytes(), 0);
}

/// Runs the test below in a process of its own: what others take must not count.
#[test]
fn what_the_process_takes_is_what_it_counts() {
    let test = ["--exact", "mixed::memory_of_two_models_of_four_precisions", "--ignored", "--nocapture", "--test-threads", "1"];
    let ended = Command::new(std::env::current_exe().expect("this program")).args(test).output().expect("it runs");
    let out = String::from_utf8_lossy(&ended.stdout);
    print!("{}", out.lines().filter(|line| line.contains("counted")).collect::<Vec<_>>().join("\n"));
    assert!(ended.status.success() && out.contains("1 passed"), "{out}{}", String::from_utf8_lossy(&ended.stderr));
}

#[test]
#[ignore = "run by the test above, in a process of its own"]
fn memory_of_two_models_of_four_precisions() {
    const REQUESTS: u64 = 10_000;
    let models = [model(1, 512), model(2, 512)];
    let machine = Machine::new(2, Kernels::best(), PolicyKind::Lru);
    let before = resident_bytes(std::process::id());
    machine.experts().lock().set_bytes_max(48 << 20);
    let mut engines: Vec<_> = models.iter().zip(5..).map(|(model, seed)| model.engine_on(&machine, seed)).collect();
    let mut sessions: Vec<_> = engines.iter().map(Engine::session).collect();
    let (mut uses, mut token, mut worst) = (0, 1_u32, 0);
    while uses < REQUESTS {
        for (engine, session) in engines.iter_mut().zip(&mut sessions) {
            session.rewind(session.tokens() % 200);
            token = token.wrapping_mul(1_103_515_245).wrapping_add(12_345);
            engine.forward(session, &[token >> 16 & 63]).expect("it runs");
        }
        uses = engines.iter_mut().map(|engine| engine.experts().usage().uses).sum();
        let counted = machine.bytes()
            + engines.iter().map(Engine::results_bytes).sum::<u64>()
            + sessions.iter().map(inference::session::Session::bytes).sum::<u64>();
        let taken = resident_bytes(std::process::id()).saturating_sub(before);
        worst = worst.max(taken.saturating_sub(counted));
        assert!(taken <= counted + counted / 20 + (64 << 20), "{taken} bytes taken, {counted} counted after {uses} uses");
        assert!(machine.experts().bytes() <= 48 << 20);
    }
    let read: u64 = engines.iter_mut().map(|engine| engine.experts().usage().bytes_read).sum();
    println!("{uses} uses, {read} bytes read; at most {worst} bytes were taken beyond what is counted");
    assert!(read > 1 << 30, "memory was for some of them only");
}
