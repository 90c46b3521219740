//! The engine's threads: they wait for work without sleeping for a moment, and share it out in small pieces as they go.
//!
//! A layer hands over work several times; waking a sleeping thread would cost more than the work. So a worker watches for a
//! while, then yields, then sleeps. Tasks are taken one by one, so a worker whose core is busy elsewhere just takes fewer.
//! Nothing is allocated and no lock is taken to run. Does not know what the tasks compute.

#![expect(unsafe_code, reason = "threads write disjoint parts of one slice")]

mod hand_over;
#[cfg(test)]
mod orders;
mod sync;

use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{JoinHandle, Thread};

use hand_over::{HandOver, Task};

/// A fixed number of threads, the caller's among them.
pub(crate) struct Pool {
    shared: Arc<HandOver>,
    workers: Vec<JoinHandle<()>>,
    /// The core of the thread that hands over work, where each thread has one.
    core: Option<usize>,
    /// Whether that thread keeps to it.
    stays: bool,
}

impl Pool {
    /// A pool of `threads` threads (at least one: the caller's).
    pub(crate) fn new(threads: usize) -> Self {
        static POOLS: AtomicUsize = AtomicUsize::new(0);
        let shared = Arc::new(HandOver::new());
        // Left to itself, a scheduler may keep two threads that hand work to each other on one core. Each gets its own, and so does the caller
        // once it hands over work: not before, since threads that it starts would keep to its core, too.
        let allowed = allowed_cores();
        let pinned = threads > 1 && allowed.len() >= threads;
        // Pools that live at the same time do not all begin with the same core.
        let shift = POOLS.fetch_add(threads, Ordering::Relaxed);
        let core = |worker: usize| if pinned { &allowed[(shift + worker) % allowed.len()..][..1] } else { &[] };
        let start = |worker: usize| {
            let shared = Arc::clone(&shared);
            let core = core(worker);
            let run = move || {
                if pinned {
                    stay_on(core);
                }
                shared.serve(worker);
            };
            std::thread::Builder::new().name(format!("engine-{worker}")).spawn(run)
        };
        // A machine that has no more threads to give still computes, with fewer.
        let workers = (1..threads.max(1)).map_while(|worker| start(worker).ok()).collect();
        Self { shared, workers, core: core(0).first().copied(), stays: false }
    }

    /// Lets the thread that hands over work run anywhere, until it does so again: threads that it starts meanwhile may, too.
    pub(crate) fn rest(&mut self) {
        if std::mem::take(&mut self.stays) {
            stay_on(allowed_cores());
        }
    }

    /// Threads that share the work.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(number, worker)` for every number below `tasks`, on all threads; returns when all are done.
    pub(crate) fn run(&mut self, tasks: usize, task: Task<'_>) {
        if self.workers.is_empty() || tasks <= 1 {
            return (0..tasks).for_each(|number| task(number, 0));
        }
        if let Some(core) = self.core
            && !std::mem::replace(&mut self.stays, true)
        {
            stay_on(&[core]);
        }
        if !self.shared.run(tasks, task, || self.workers.iter().map(JoinHandle::thread).for_each(Thread::unpark)) {
            resume_unwind(Box::new("a task of the engine panicked"));
        }
    }

    /// Runs `task(number, worker, part)` for `tasks` parts of `out`: those that `range` names, one behind the other.
    pub(crate) fn parts<T: Send>(
        &mut self,
        out: &mut [T],
        tasks: usize,
        range: impl Fn(usize) -> Range<usize> + Sync,
        task: impl Fn(usize, usize, &mut [T]) + Sync,
    ) {
        let mut end = 0;
        for number in 0..tasks {
            let range = range(number);
            assert!(end <= range.start && range.start <= range.end && range.end <= out.len(), "parts lie one behind the other");
            end = range.end;
        }
        let out = Parts(out.as_mut_ptr());
        self.run(tasks, &|number, worker| {
            let range = range(number);
            // SAFETY: parts of different numbers do not overlap, lie within `out`, and each number is run once.
            let part = unsafe { std::slice::from_raw_parts_mut(out.at(range.start), range.len()) };
            task(number, worker, part);
        });
    }

    /// The same for all of `out`, in equal parts of `length` (the last may be shorter).
    pub(crate) fn chunks<T: Send>(&mut self, out: &mut [T], length: usize, task: impl Fn(usize, usize, &mut [T]) + Sync) {
        let (all, tasks) = (out.len(), out.len().div_ceil(length.max(1)));
        let out = Parts(out.as_mut_ptr());
        self.run(tasks, &|number, worker| {
            let start = number * length;
            // SAFETY: as in `parts`.
            let part = unsafe { std::slice::from_raw_parts_mut(out.at(start), length.min(all - start)) };
            task(number, worker, part);
        });
    }

    /// As [`parts`](Self::parts), and each thread has an element of `scratch` to itself.
    pub(crate) fn parts_with<T: Send, S: Send>(
        &mut self,
        out: &mut [T],
        tasks: usize,
        range: impl Fn(usize) -> Range<usize> + Sync,
        scratch: &mut [S],
        task: impl Fn(usize, &mut S, &mut [T]) + Sync,
    ) {
        assert!(scratch.len() >= self.threads(), "each thread has its scratch");
        let scratch = Parts(scratch.as_mut_ptr());
        self.parts(out, tasks, range, |number, worker, part| {
            // SAFETY: workers are numbered below `threads`, and one does one task at a time.
            task(number, unsafe { &mut *scratch.at(worker) }, part);
        });
    }

    /// As [`chunks`](Self::chunks), and each thread has an element of `scratch` to itself.
    pub(crate) fn chunks_with<T: Send, S: Send>(
        &mut self,
        out: &mut [T],
        length: usize,
        scratch: &mut [S],
        task: impl Fn(usize, &mut S, &mut [T]) + Sync,
    ) {
        assert!(scratch.len() >= self.threads(), "each thread has its scratch");
        let scratch = Parts(scratch.as_mut_ptr());
        self.chunks(out, length, |number, worker, part| {
            // SAFETY: workers are numbered below `threads`, and one does one task at a time.
            task(number, unsafe { &mut *scratch.at(worker) }, part);
        });
    }
}

/// The cores that threads of this process may run on, as they were before any was pinned.
fn allowed_cores() -> &'static [usize] {
    static ALLOWED: OnceLock<Vec<usize>> = OnceLock::new();
    ALLOWED.get_or_init(|| {
        #[cfg(any(target_os = "linux", target_os = "android"))]
        if let Ok(set) = rustix::thread::sched_getaffinity(None) {
            return (0..rustix::thread::CpuSet::MAX_CPU).filter(|&core| set.is_set(core)).collect();
        }
        Vec::new()
    })
}

/// Keeps this thread on some cores, where the operating system can; it runs elsewhere, too.
fn stay_on(cores: &[usize]) {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    {
        let mut set = rustix::thread::CpuSet::new();
        cores.iter().for_each(|&core| set.set(core));
        let _ = rustix::thread::sched_setaffinity(None, &set);
    }
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    let _ = cores;
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.rest();
        self.shared.stop();
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            let _ = worker.join();
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "pool of {} threads", self.threads())
    }
}

/// A pointer that threads may share: what they do with it is on those who call `at`.
struct Parts<T>(*mut T);

// SAFETY: each use states why what it makes of the pointer is its own.
unsafe impl<T: Send> Sync for Parts<T> {}

impl<T> Parts<T> {
    /// # Safety
    /// `index` must lie within the slice that this was made from.
    unsafe fn at(&self, index: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(index) }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn every_task_is_run_once_also_after_a_sleep() {
        for threads in [1, 2, 5] {
            let mut pool = Pool::new(threads);
            for round in 0..200 {
                let counts: Vec<AtomicUsize> = (0..round).map(|_| AtomicUsize::new(0)).collect();
                pool.run(round, &|task, worker| {
                    assert!(worker < threads);
                    counts[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
                if round % 50 == 0 {
                    std::thread::sleep(std::time::Duration::from_millis(20));
                }
            }
        }
    }

    #[test]
    fn parts_are_disjoint_and_complete() {
        let mut pool = Pool::new(3);
        let mut out = vec![0; 1000];
        let ranges = [0..10, 10..10, 20..700, 700..1000];
        pool.parts(&mut out, 4, |task| ranges[task].clone(), |task, _, part| part.fill(task + 1));
        assert!(out[..10].iter().all(|&x| x == 1) && out[10..20].iter().all(|&x| x == 0));
        assert!(out[20..700].iter().all(|&x| x == 3) && out[700..].iter().all(|&x| x == 4));
        let mut scratch = vec![0; 3];
        pool.chunks_with(&mut out, 64, &mut scratch, |task, mine, part| {
            *mine += part.len();
            part.fill(task);
        });
        assert_eq!((scratch.iter().sum::<usize>(), out[63], out[64], out[999]), (1000, 0, 1, 15));
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let mut pool = Pool::new(2);
        let failed = catch_unwind(AssertUnwindSafe(|| pool.run(100, &|task, _| assert!(task != 50, "fifty"))));
        assert!(failed.is_err());
        let sum = AtomicUsize::new(0);
        pool.run(10, &|task, _| {
            sum.fetch_add(task, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }
}
