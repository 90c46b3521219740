//! Properties of the engine, bit for bit: batches, caches, threads, kernels and orders of arrival change nothing.

use inference::aligned::AlignedBytes;
use inference::engine::{Engine, EngineOptions, ForwardError, Input, KvPrecision, Piece, Position, Want};
use inference::kernels::Kernels;
use inference::session::Session;
use protocol::Precision;

use crate::support::{Imported, checkpoint, ids, read_safetensors, vectors};

fn prompt() -> Vec<u32> {
    ids(&read_safetensors(&vectors("reference/moe_text.safetensors"))["greedy"])
}

fn imported(name: &str, precision: Precision) -> Imported {
    Imported::from_dir(&checkpoint(name), Some(precision)).expect("it imports")
}

/// Bytes that one expert takes in memory.
fn expert_bytes(imported: &Imported) -> u64 {
    AlignedBytes::taken(imported.manifest.text().largest_expert() as usize)
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
        let one = expert_bytes(&imported);
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
                let cached = expert_bytes(&imported) * seed as u64;
                let mut engine = imported.engine_elsewhere(cached, seed as u64, kernels);
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
                let mut batch: Vec<_> =
                    sessions.iter_mut().zip(&next).map(|(session, token)| Piece::tokens(session, std::slice::from_ref(token))).collect();
                let layers = engine.all_layers();
                engine.pass(&mut batch, layers, Want::Last).expect("it runs");
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
    let mut engine = imported.engine(expert_bytes(&imported) * 24, 2);
    assert!(bits(&mut engine, &tokens, 1) == expected);
    let usage = engine.experts().usage();
    assert!(usage.prefetched_used > 0 && usage.prefetched_used <= usage.prefetched, "{usage:?}");
    // Where nothing is missing, nobody looks ahead.
    let mut engine = imported.engine(u64::MAX, 1);
    bits(&mut engine, &tokens, 60);
    bits(&mut engine, &tokens, 1);
    assert_eq!(engine.experts().usage().prefetched, 0);
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

/// Rows that were made elsewhere go in like tokens, a pass may cover some layers only, and what one gives out the next takes in.
#[test]
fn spans_of_layers_one_after_the_other_are_all_of_them() {
    for precision in [Precision::F32, Precision::Q8, Precision::Q4] {
        let imported = imported("tiny-qwen3-omni", precision);
        let mut engine = imported.engine(u64::MAX, 1);
        let (tokens, hidden) = (prompt(), engine.model().decoder().hidden_size as usize);
        let expected = bits(&mut engine, &tokens, tokens.len());
        let layers = engine.all_layers();
        for cut in 1..layers.end {
            let mut sessions = [engine.session(), engine.session()];
            let mut found = Vec::new();
            for tokens in tokens.chunks(5) {
                engine.pass(&mut [Piece::tokens(&mut sessions[0], tokens)], 0..cut, Want::Rows).expect("it runs");
                let mut rows = vec![0.0; tokens.len() * hidden];
                rows.chunks_exact_mut(hidden).enumerate().for_each(|(row, out)| engine.row(row, out));
                let piece = Piece { session: &mut sessions[1], input: Input::Rows(&rows), positions: None, overlays: &[] };
                engine.pass(&mut [piece], cut..layers.end, Want::All).expect("it runs");
                (0..tokens.len()).for_each(|row| found.extend(engine.logits_of(row).iter().map(|logit| logit.to_bits())));
            }
            assert!(found == expected, "{precision}, cut at layer {cut}");
        }
    }
}

/// Positions that text would have, given one by one, change nothing; others do, and a rewind knows what follows.
#[test]
fn positions_may_be_given() {
    let imported = imported("tiny-qwen3-omni", Precision::F32);
    let mut engine = imported.engine(u64::MAX, 1);
    let (tokens, layers) = (prompt(), engine.all_layers());
    let mut logits = |positions: Option<&[Position]>| {
        let mut session = engine.session();
        engine.forward(&mut session, &tokens[..3]).expect("it runs");
        let piece = Piece { session: &mut session, input: Input::Tokens(&tokens[3..7]), positions, overlays: &[] };
        engine.pass(&mut [piece], layers.clone(), Want::Nothing).expect("it runs");
        let next = session.next_position();
        let logits = engine.forward(&mut session, &tokens[7..9]).expect("it runs").to_vec();
        (logits, next, session)
    };
    let (plain, next, _) = logits(None);
    let as_text: Vec<_> = (3..7).map(Position::of_text).collect();
    let (same, same_next, _) = logits(Some(&as_text));
    assert!(same == plain && (next, same_next) == (7.0, 7.0));
    let square = [(3.0, 3.0), (3.0, 4.0), (4.0, 3.0), (4.0, 4.0)].map(|(height, width)| Position { time: 3.0, height, width });
    let (other, next, mut session) = logits(Some(&square));
    assert!(other != plain && next.to_bits() == 5_f32.to_bits());
    assert_eq!((session.tokens(), session.next_position()), (9, 7.0));
    assert_eq!((session.rewind(8), session.next_position()), (8, 6.0));
    assert_eq!((session.rewind(5), session.next_position()), (5, 5.0));
}

/// What does not fit together is refused before anything is taken in.
#[test]
fn passes_that_cannot_be_are_refused() {
    let imported = imported("tiny-qwen3-omni", Precision::Q4);
    let mut engine = imported.engine_with(u64::MAX, 1, EngineOptions { batch_tokens: 8, ..imported.options() });
    let (tokens, layers, mut session) = (prompt(), engine.all_layers(), engine.session());
    let row = vec![0.0; engine.model().decoder().hidden_size as usize];
    let piece = |input, positions| (input, positions);
    let at = [Position::of_text(0)];
    let cases = [
        (piece(Input::Tokens(&tokens[..9]), None), layers.clone(), Want::Nothing),
        (piece(Input::Tokens(&tokens[..2]), None), 1..layers.end, Want::Nothing),
        (piece(Input::Tokens(&tokens[..2]), None), 0..layers.end + 1, Want::Nothing),
        (piece(Input::Tokens(&tokens[..2]), None), 1..1, Want::Nothing),
        (piece(Input::Tokens(&tokens[..2]), None), 0..1, Want::Last),
        (piece(Input::Tokens(&tokens[..2]), Some(&at[..])), layers.clone(), Want::Nothing),
        (piece(Input::Rows(&row[1..]), None), layers.clone(), Want::Nothing),
        (piece(Input::Rows(&[]), None), layers.clone(), Want::Nothing),
    ];
    for (number, ((input, positions), span, want)) in cases.into_iter().enumerate() {
        let piece = Piece { session: &mut session, input, positions, overlays: &[] };
        assert!(engine.pass(&mut [piece], span, want).is_err(), "case {number}");
        assert_eq!(session.tokens(), 0);
    }
}
