//! Starting threads, so that none dies unseen. Work that panics fails and the thread goes on; a thread that cannot go on ends the process.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;

use tokio::runtime::Runtime;

use crate::failure::{Failure, Kind};
use crate::output::note;

/// Threads on which tasks do what blocks: reads, writes, what takes a processor's time. More tasks than that wait for one another.
const BLOCKING_THREADS_MAX: usize = 32;
/// Threads besides those of the runtime and of the engine: readers, verifiers, executors, auditor, saver and the like.
const OTHER_THREADS_MAX: usize = 24;

/// The most threads that a node has, whose engine computes on so many.
pub fn threads_max(engine_threads: usize) -> usize {
    cores() + BLOCKING_THREADS_MAX + OTHER_THREADS_MAX + 2 * engine_threads // an executor computes, too
}

/// The runtime that tasks run on.
pub fn runtime() -> std::io::Result<Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.enable_all().worker_threads(cores()).max_blocking_threads(BLOCKING_THREADS_MAX).build()
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// The exit code of a process that cannot go on.
const FAULT_EXIT: i32 = 1;

/// Starts a thread that works on each item that comes, until no more can come. `make` makes what works on them, and anew after a panic: what the
/// panic has left of it may be broken. The item is lost.
pub fn start<T, I, W>(name: &'static str, items: I, mut make: impl FnMut() -> W + Send + 'static) -> JoinHandle<()>
where
    I: IntoIterator<Item = T> + Send + 'static,
    W: FnMut(T),
{
    watched(name, move || {
        let mut work = make();
        for item in items {
            if caught(name, || work(item)).is_err() {
                work = make();
            }
        }
    })
}

/// Starts a thread for `run`. A panic of it ends the process: somebody would wait for the thread for ever.
pub fn watched(name: &'static str, run: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
    let run = move || {
        if let Err(failure) = caught(name, run) {
            note(&format!("error: {failure}; this process cannot go on without it"));
            std::process::exit(FAULT_EXIT);
        }
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(run).expect("a thread can be started")
}

/// Does something; a panic is a failure that says where it was.
pub fn caught<T>(what: &str, work: impl FnOnce() -> T) -> Result<T, Failure> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| Failure::new(Kind::Other, format!("a fault in {what}: {}", text_of(&*panic))))
}

fn text_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn work_that_panics_is_lost_and_the_next_is_done_by_new_hands() {
        let done = Arc::new(Mutex::new(Vec::new()));
        let (told, mut made) = (Arc::clone(&done), 0);
        let thread = start("test", 0..4, move || {
            made += 1;
            let (told, number) = (Arc::clone(&told), made);
            move |item| {
                assert_ne!(item, 1, "not this one");
                told.lock().expect("not held in a panic").push((number, item));
            }
        });
        thread.join().expect("it goes on");
        assert_eq!(*done.lock().expect("nobody else"), [(1, 0), (2, 2), (2, 3)]);
    }

    #[test]
    fn a_panic_says_what_it_was() {
        let failure = caught("the test", || assert_eq!(1, 2, "numbers")).expect_err("it panics");
        assert!(failure.message.starts_with("a fault in the test: ") && failure.message.contains("numbers"), "{failure}");
        assert_eq!(caught("it", || 5).expect("fine"), 5);
    }
}
