//! How one thread hands work over to others, and they take it task by task. What it shares comes from `sync`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;

use super::sync::{AtomicBool, AtomicU64, AtomicUsize, GIVE_UP, UnsafeCell, WATCHES, fence, park, spin_loop, yield_now};

/// Tasks of one run at most: they are counted in 20 bits.
pub(super) const TASKS_MAX: usize = (1 << 20) - 1;

/// Called with the number of the task and of the thread that does it.
pub(super) type Task<'a> = &'a (dyn Fn(usize, usize) + Sync);

pub(super) struct HandOver {
    /// Run (24 bits), tasks (20), next task (20). Whoever counts up the last holds the task, and with it the job.
    state: AtomicU64,
    done: AtomicUsize,
    panicked: AtomicBool,
    job: UnsafeCell<Option<Task<'static>>>,
    asleep: AtomicUsize,
    stop: AtomicBool,
}

// SAFETY: `job` is written only between runs, by the thread that hands over: a run ends when all its tasks are done, and a worker reads
// the job only while it holds a task that is not done. The state's release and acquire order the two.
unsafe impl Sync for HandOver {}
// SAFETY: as above; the job is a shared reference to something Sync.
unsafe impl Send for HandOver {}

impl HandOver {
    pub(super) fn new() -> Self {
        Self {
            state: AtomicU64::new(0),
            done: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            job: UnsafeCell::new(None),
            asleep: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        }
    }

    /// Does the work of a thread, `worker`, until [`stop`](Self::stop).
    pub(super) fn serve(&self, worker: usize) {
        let mut seen = 0;
        while let Some(run) = self.next_run(seen) {
            seen = run;
            self.work(worker);
        }
    }

    /// Has all tasks below `tasks` done, by this thread, number 0, and those that serve; `wake` wakes these.
    /// Only one thread may call this. Returns whether no task panicked.
    pub(super) fn run(&self, tasks: usize, task: Task<'_>, wake: impl FnOnce()) -> bool {
        assert!(tasks <= TASKS_MAX, "a run has at most {TASKS_MAX} tasks");
        // SAFETY: the job lives until this function returns, and it returns when all tasks are done. Nobody reads the job now: the
        // last run's tasks are all done, so no worker holds one.
        self.job.with_mut(|job| unsafe { *job = Some(std::mem::transmute::<Task<'_>, Task<'static>>(task)) });
        self.done.store(0, Ordering::Relaxed);
        let run = (self.state.load(Ordering::Relaxed) >> 40).wrapping_add(1) & 0xff_ffff;
        self.state.store(run << 40 | (tasks as u64) << 20, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) > 0 {
            wake();
        }
        self.work(0);
        let mut watches = 0;
        while self.done.load(Ordering::Acquire) < tasks {
            watches += 1;
            // A worker that holds the last task may have lost its core: let it have this one.
            if watches < WATCHES { spin_loop() } else { yield_now() }
        }
        !self.panicked.swap(false, Ordering::Relaxed)
    }

    /// Ends those that serve, once they are woken.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
    }

    fn claim(&self) -> Option<usize> {
        let mut state = self.state.load(Ordering::Acquire);
        loop {
            let (tasks, next) = ((state >> 20) as usize & TASKS_MAX, state as usize & TASKS_MAX);
            if next >= tasks {
                return None;
            }
            match self.state.compare_exchange_weak(state, state + 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(next),
                Err(now) => state = now,
            }
        }
    }

    /// Does tasks until none is left.
    fn work(&self, worker: usize) {
        while let Some(task) = self.claim() {
            // SAFETY: we hold a task of this run, so the caller is still waiting and the job alive; see `Sync`.
            let job = self.job.with(|job| unsafe { (*job).expect("a run has a job") });
            if catch_unwind(AssertUnwindSafe(|| job(task, worker))).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.done.fetch_add(1, Ordering::Release);
        }
    }

    /// Waits for another run than the one `seen`: watches, then yields, then sleeps.
    fn next_run(&self, seen: u64) -> Option<u64> {
        let mut watches = 0;
        loop {
            let state = self.state.load(Ordering::Acquire);
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            if state >> 40 != seen {
                return Some(state >> 40);
            }
            watches += 1;
            if watches < WATCHES {
                spin_loop();
            } else if watches < GIVE_UP {
                yield_now();
            } else {
                return self.sleep(seen);
            }
        }
    }

    fn sleep(&self, seen: u64) -> Option<u64> {
        self.asleep.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let run = loop {
            let state = self.state.load(Ordering::SeqCst);
            if self.stop.load(Ordering::SeqCst) {
                break None;
            }
            if state >> 40 != seen {
                break Some(state >> 40);
            }
            park();
        };
        self.asleep.fetch_sub(1, Ordering::SeqCst);
        run
    }
}
