//! The hand-over in every order of events that the memory model allows, as far as `loom` tries them: its source, with loom's threads.

#[expect(clippy::duplicate_mod, reason = "once with the standard library, once with loom")]
#[path = "hand_over.rs"]
mod hand_over;

mod sync {
    pub(super) use loom::cell::UnsafeCell;
    pub(super) use loom::hint::spin_loop;
    pub(super) use loom::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, fence};
    pub(super) use loom::thread::{park, yield_now};

    /// A worker sleeps at once: after it yielded, loom would prefer other threads.
    pub(super) const WATCHES: u32 = 1;
    pub(super) const GIVE_UP: u32 = 1;
}

use hand_over::HandOver;
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};

/// Cells that tasks write, each its own.
struct Cells(Vec<UnsafeCell<usize>>);

// SAFETY: loom ends the test when two threads use a cell at once.
unsafe impl Sync for Cells {}

/// Tries runs on two threads; `runs` has the tasks of each. Loom goes through every order with at most `preemptions` preemptions. The thread that
/// hands over must see what tasks wrote, and the other must end. With `meet`, each task waits for the other thread: a sleeping worker must wake.
fn every_order(runs: &'static [usize], preemptions: usize, meet: bool) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.check(move || {
        let hand_over = Arc::new(HandOver::new());
        let worker = loom::thread::spawn({
            let hand_over = Arc::clone(&hand_over);
            move || hand_over.serve(1)
        });
        for &count in runs {
            let cells = Cells((0..count).map(|_| UnsafeCell::new(0)).collect());
            let cells = &cells; // as a whole, which is Sync
            let begun = AtomicUsize::new(0);
            let task = |number: usize, _: usize| {
                // SAFETY: each number is run once, which is what is tested.
                cells.0[number].with_mut(|cell| unsafe { *cell += 1 });
                begun.fetch_add(1, Ordering::Relaxed);
                while meet && begun.load(Ordering::Relaxed) < 2 {
                    loom::thread::yield_now();
                }
            };
            assert!(hand_over.run(count, &task, || worker.thread().unpark()));
            // SAFETY: the run has ended.
            assert!(cells.0.iter().all(|cell| cell.with(|cell| unsafe { *cell }) == 1));
        }
        hand_over.stop();
        worker.thread().unpark();
        worker.join().expect("it ends");
    });
}

#[test]
fn each_task_is_done_once_and_seen() {
    every_order(&[2, 2], 3, false);
    every_order(&[1, 2, 1], 2, false);
}

#[test]
fn a_sleeping_worker_is_woken() {
    every_order(&[2], 3, true);
}
