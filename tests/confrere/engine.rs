//! Properties of the engine, bit for bit: batches, caches, threads, kernels and orders of arrival change nothing.

use inference::engine::{Engine, EngineOptions, ForwardError, Sequence};
use inference::kernels::Kernels;
use inference::kv_cache::KvPrecision;
use inference::session::Session;
use protocol::Precision;

use crate::support::{Imported, checkpoint, ids, read_safetensors, vectors};

fn prompt() -> Vec<u32> {
    ids(&read_safetensors(&vectors("reference/moe_text.safetensors"))["greedy"])
}

fn imported(name: &str, precision: Precision) -> Imported {
    Imported::from_dir(&checkpoint(name), Some(precision)).expect("it imports")
}

/// Logits of `tokens` taken in by `parts` at a time, as bits.
fn bits(engine: &mut Engine, tokens: &[u32], parts: usize) -> Vec<u32> {
    let mut session = engine.session();
    let mut all = Vec::new();
    for part in tokens.chunks(parts) {
        let each = |_, logits: &mut [f32]| {
            all.extend(logits.iter().map(|logit| logit.to_bits()));
            Ok::<_, ForwardError>(())
        };
        engine.forward_each(&mut session, part, each).expect("it runs");
    }
    all
}

#[test]
fn a_batch_equals_single_steps_and_prefill_equals_decode() {
    for precision in Precision::ALL {
        let imported = imported("tiny-qwen3-moe", precision);
        for kv in [KvPrecision::F32, KvPrecision::F16, KvPrecision::Q8] {
            // Longer than a piece of keys, so that pieces are merged.
            let tokens: Vec<u32> = prompt().into_iter().cycle().take(300).collect();
            let mut engine = imported.engine_with(u64::MAX, 1, EngineOptions { kv, ..imported.options() });
            let single = bits(&mut engine, &tokens, 1);
            for parts in [3, 7, 40, 300] {
                assert!(bits(&mut engine, &tokens, parts) == single, "{precision} by {parts}, keys and values {kv}");
            }
        }
    }
}

#[test]
fn neither_cache_size_nor_order_of_arrival_nor_threads_nor_kernels_change_a_bit() {
    for precision in Precision::ALL {
        let imported = imported("tiny-qwen3-omni", precision);
        let expected = bits(&mut imported.engine(u64::MAX, 1), &prompt(), 10);
        let one = imported.manifest.experts[0].length;
        for (cached, seed) in [(0, 2), (1, 3), (3, 4), (20, 5), (1000, 6)] {
            let found = bits(&mut imported.engine(cached * one, seed), &prompt(), 10);
            assert!(found == expected, "{precision} with {cached} experts cached");
        }
        for (threads, batch_tokens) in [(1, 512), (2, 3), (5, 512)] {
            let options = EngineOptions { threads, batch_tokens, ..imported.options() };
            let found = bits(&mut imported.engine_with(u64::MAX, 7, options), &prompt(), 10);
            assert!(found == expected, "{precision} on {threads} threads, {batch_tokens} tokens at a time");
        }
        for kernels in Kernels::available() {
            let found = bits(&mut imported.engine_with(u64::MAX, 7, EngineOptions { kernels, ..imported.options() }), &prompt(), 10);
            assert!(found == expected, "{precision} with {} kernels", kernels.name);
        }
    }
}

#[test]
fn experts_that_run_elsewhere_change_no_bit() {
    for (model, precision) in [("tiny-qwen3-omni", Precision::Q4), ("tiny-qwen3-omni", Precision::Q8), ("tiny-qwen3-moe", Precision::Q4)] {
        let imported = imported(model, precision);
        let tokens: Vec<u32> = prompt().into_iter().cycle().take(300).collect();
        let expected = bits(&mut imported.engine(u64::MAX, 1), &tokens, 300);
        for (seed, kernels) in Kernels::available().enumerate() {
            for parts in [1, 7, 300] {
                let cached = imported.manifest.experts[0].length * seed as u64;
                let experts = imported.experts_elsewhere(cached, seed as u64, kernels);
                let mut engine = Engine::new(imported.model(), experts, imported.options());
                let found = bits(&mut engine, &tokens, parts);
                assert!(found == expected, "{model} at {precision}, {parts} tokens at a time, with {} kernels elsewhere", kernels.name);
                let usage = engine.experts().usage();
                assert!(usage.remote > 0 && usage.remote_rows >= usage.remote as u64, "{usage:?}");
            }
        }
    }
}

#[test]
fn sequences_decoded_together_are_as_each_alone() {
    for (precision, kv) in [(Precision::Q4, KvPrecision::F16), (Precision::Q8, KvPrecision::Q8), (Precision::Bf16, KvPrecision::F32)] {
        let imported = imported("tiny-qwen3-omni", precision);
        let mut engine = imported.engine_with(u64::MAX, 1, EngineOptions { kv, ..imported.options() });
        let tokens = prompt();
        for count in [1, 4, 8, 16] {
            // Sequence i begins with i tokens of its own, so that all stand at different places.
            let mut sessions: Vec<Session> = (0..count).map(|_| engine.session()).collect();
            for (i, session) in sessions.iter_mut().enumerate() {
                engine.forward(session, &tokens[..=i % 12]).expect("it runs");
            }
            for step in 0..4 {
                let next: Vec<u32> = (0..count).map(|i| tokens[(i * 5 + step) % tokens.len()]).collect();
                let mut batch: Vec<_> = sessions
                    .iter_mut()
                    .zip(&next)
                    .map(|(session, token)| Sequence { session, tokens: std::slice::from_ref(token) })
                    .collect();
                engine.decode(&mut batch).expect("it runs");
                let together: Vec<Vec<f32>> = (0..count).map(|i| engine.logits(i).to_vec()).collect();
                for (i, together) in together.iter().enumerate() {
                    let own: Vec<u32> =
                        tokens[..=i % 12].iter().copied().chain((0..=step).map(|step| tokens[(i * 5 + step) % tokens.len()])).collect();
                    let mut session = engine.session();
                    let alone = engine.forward(&mut session, &own).expect("it runs");
                    assert!(alone == together, "{precision}: sequence {i} of {count}, step {step}");
                }
            }
        }
    }
}

#[test]
fn counts_each_slot_once_and_by_where_it_was() {
    let imported = Imported::of("tiny-qwen3-moe");
    let mut engine = imported.engine(u64::MAX, 1);
    bits(&mut engine, &prompt(), 5);
    let first = engine.experts().usage();
    assert_eq!((first.ram, first.fetched, first.disk), (0, 0, first.needed));
    engine.experts().start_counting();
    bits(&mut engine, &prompt(), 40);
    let second = engine.experts().usage();
    assert_eq!((second.needed, second.ram, second.disk), (first.needed, first.needed, 0));
    assert_eq!((second.uses, second.bytes_read), (second.hits, 0));
}

#[test]
fn looking_ahead_changes_no_bit_and_is_counted() {
    let imported = imported("tiny-qwen3-omni", Precision::Q4);
    let tokens: Vec<u32> = prompt().into_iter().cycle().take(60).collect();
    let expected = bits(&mut imported.engine(u64::MAX, 1), &tokens, 60);
    let mut engine = imported.engine(imported.manifest.experts[0].length * 24, 2);
    assert!(bits(&mut engine, &tokens, 1) == expected);
    let usage = engine.experts().usage();
    assert!(usage.foreseen_used > 0 && usage.foreseen_used <= usage.foreseen, "{usage:?}");
    // Where nothing is missing, nobody looks ahead.
    let mut engine = imported.engine(u64::MAX, 1);
    bits(&mut engine, &tokens, 60);
    bits(&mut engine, &tokens, 1);
    assert_eq!(engine.experts().usage().foreseen, 0);
}

#[test]
fn a_sequence_ends_at_the_context_and_a_failed_step_leaves_no_trace() {
    let imported = Imported::of("variant-tied");
    let mut engine = imported.engine(u64::MAX, 1);
    let mut session = engine.session();
    assert!(engine.forward(&mut session, &[1, u32::MAX]).is_err());
    let context = engine.context();
    assert!(engine.forward(&mut session, &vec![1; context + 1]).is_err());
    assert_eq!(session.tokens(), 0);
    let logits = engine.forward(&mut session, &[5, 6]).expect("it runs").to_vec();
    let mut fresh = engine.session();
    assert_eq!(engine.forward(&mut fresh, &[5, 6]).expect("it runs"), logits);
}
