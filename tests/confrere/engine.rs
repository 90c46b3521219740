//! Properties of the engine, bit for bit: batches, caches, threads and orders of arrival change nothing.

use inference::experts::Experts;
use inference::model::Model;
use inference::session::{Session, logits};
use protocol::Precision;

use crate::support::{Imported, checkpoint, ids, read_safetensors, vectors};

const PRECISIONS: [Precision; 3] = [Precision::F32, Precision::F16, Precision::Bf16];

fn prompt() -> Vec<u32> {
    ids(&read_safetensors(&vectors("reference/moe_text.safetensors"))["greedy"])
}

/// Logits of `tokens` taken in by `parts` at a time, as bits.
fn bits(model: &Model, experts: &mut Experts, tokens: &[u32], parts: usize) -> Vec<u32> {
    let mut session = Session::new(model);
    let mut all = Vec::new();
    for part in tokens.chunks(parts) {
        let hidden = session.forward(model, part, experts, None).expect("it runs");
        all.extend(logits(model, &hidden).into_iter().map(f32::to_bits));
    }
    all
}

#[test]
fn a_batch_equals_single_steps_and_prefill_equals_decode() {
    for precision in PRECISIONS {
        let imported = Imported::from_dir(&checkpoint("tiny-qwen3-moe"), Some(precision)).expect("it imports");
        let model = imported.model();
        let mut experts = imported.experts(u64::MAX, 1);
        let single = bits(&model, &mut experts, &prompt(), 1);
        for parts in [2, 3, 7, 40] {
            assert!(bits(&model, &mut experts, &prompt(), parts) == single, "{precision} by {parts}");
        }
    }
}

#[test]
fn neither_cache_size_nor_order_of_arrival_nor_threads_change_a_bit() {
    for precision in PRECISIONS {
        let imported = Imported::from_dir(&checkpoint("tiny-qwen3-omni"), Some(precision)).expect("it imports");
        let model = imported.model();
        let expected = bits(&model, &mut imported.experts(u64::MAX, 1), &prompt(), 10);
        let one = imported.manifest.experts[0].length;
        for (cached, seed) in [(0, 2), (1, 3), (3, 4), (20, 5), (1000, 6)] {
            let mut experts = imported.experts(cached * one, seed);
            assert!(bits(&model, &mut experts, &prompt(), 10) == expected, "{precision} with {cached} experts cached");
        }
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            let found = pool.install(|| bits(&model, &mut imported.experts(u64::MAX, 7), &prompt(), 10));
            assert!(found == expected, "{precision} on {threads} threads");
        }
    }
}

#[test]
fn counts_each_slot_once_and_by_where_it_was() {
    let imported = Imported::of("tiny-qwen3-moe");
    let model = imported.model();
    let mut experts = imported.experts(u64::MAX, 1);
    bits(&model, &mut experts, &prompt(), 5);
    let first = experts.usage();
    assert_eq!((first.ram, first.fetched, first.disk), (0, 0, first.needed));
    experts.start_counting();
    bits(&model, &mut experts, &prompt(), 40);
    let second = experts.usage();
    assert_eq!((second.needed, second.ram, second.disk), (first.needed, first.needed, 0));
}

#[test]
fn a_sequence_ends_at_the_context_and_a_failed_step_leaves_no_trace() {
    let imported = Imported::of("variant-tied");
    let model = imported.model();
    let mut experts = imported.experts(u64::MAX, 1);
    let mut session = Session::new(&model);
    assert!(session.forward(&model, &[1, u32::MAX], &mut experts, None).is_err());
    assert!(session.forward(&model, &vec![1; model.context() + 1], &mut experts, None).is_err());
    assert_eq!(session.tokens(), 0);
    let hidden = session.forward(&model, &[5, 6], &mut experts, None).expect("it runs");
    let fresh = Session::new(&model).forward(&model, &[5, 6], &mut experts, None).expect("it runs");
    assert_eq!(hidden, fresh);
}
