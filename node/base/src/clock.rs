//! The only place that reads a clock, and where Ctrl-C is noticed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::failure::Failure;

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    #[expect(clippy::disallowed_methods, reason = "this is where the node reads its clock")]
    let now = SystemTime::now();
    now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// Lets this thread run when no other has anything to do, as far as the operating system can tell: its work can wait.
pub fn stand_back() {
    const MOST: i32 = 19;
    let _ = rustix::process::nice(MOST); // on Linux that is the calling thread's own; elsewhere it may be refused, and nothing is lost
}

/// A point in time to measure from.
pub fn instant() -> Instant {
    #[expect(clippy::disallowed_methods, reason = "this is where the node reads its clock")]
    Instant::now()
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
static WAITING_FOR_INPUT: AtomicBool = AtomicBool::new(false);

/// Says whether the user has pressed Ctrl-C.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Fails once the user has pressed Ctrl-C.
pub fn check_interrupted() -> Result<(), Failure> {
    if interrupted() { Err(Failure::interrupted()) } else { Ok(()) }
}

/// Does something that waits for the user: Ctrl-C ends the program meanwhile.
pub fn while_waiting_for_input<T>(read: impl FnOnce() -> T) -> T {
    WAITING_FOR_INPUT.store(true, Ordering::Relaxed);
    let result = read();
    WAITING_FOR_INPUT.store(false, Ordering::Relaxed);
    result
}

/// Returns once the user has pressed Ctrl-C.
pub(crate) async fn until_interrupted() {
    while !interrupted() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Does something until it ends or the user presses Ctrl-C.
pub async fn unless_interrupted<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::select! {
        result = work => result,
        () = until_interrupted() => Err(Failure::interrupted()),
    }
}

/// Starts watching for Ctrl-C. The first asks to stop at the next safe point; the second does not wait for it.
pub fn watch_for_interrupts(runtime: &tokio::runtime::Handle) {
    runtime.spawn(async {
        while tokio::signal::ctrl_c().await.is_ok() {
            // A read from a terminal does not end by itself, and while it lasts there is nothing to lose.
            if INTERRUPTED.swap(true, Ordering::Relaxed) || WAITING_FOR_INPUT.load(Ordering::Relaxed) {
                std::process::exit(130);
            }
        }
    });
}
