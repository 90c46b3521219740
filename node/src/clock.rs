//! The only place that reads a clock, and where Ctrl-C is noticed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::failure::Failure;

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    #[expect(clippy::disallowed_methods, reason = "this is where the node reads its clock")]
    let now = SystemTime::now();
    now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// A point in time to measure from.
pub(crate) fn instant() -> Instant {
    #[expect(clippy::disallowed_methods, reason = "this is where the node reads its clock")]
    Instant::now()
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Says whether the user has pressed Ctrl-C.
pub(crate) fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Fails once the user has pressed Ctrl-C.
pub(crate) fn check_interrupted() -> Result<(), Failure> {
    if interrupted() { Err(Failure::interrupted()) } else { Ok(()) }
}

/// Starts watching for Ctrl-C. The first asks to stop at the next safe point; the second does not wait for it.
pub(crate) fn watch_for_interrupts(runtime: &tokio::runtime::Handle) {
    runtime.spawn(async {
        while tokio::signal::ctrl_c().await.is_ok() {
            if INTERRUPTED.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
        }
    });
}
