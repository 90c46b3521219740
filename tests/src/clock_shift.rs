//! Loaded into a process beside the C library (`LD_PRELOAD`), it shifts what that process takes for the time of day by `CLOCK_SHIFT_S` seconds.
//! Clocks that only measure are left alone.
#![expect(unsafe_code, reason = "it stands in the place of a function of the C library")]

use std::ffi::c_int;
use std::sync::OnceLock;

static SHIFT_S: OnceLock<i64> = OnceLock::new();

fn shift_s() -> i64 {
    *SHIFT_S.get_or_init(|| std::env::var("CLOCK_SHIFT_S").ok().and_then(|seconds| seconds.parse().ok()).unwrap_or(0))
}

/// As the C library has it.
///
/// # Safety
/// `time` points to a place for a time, or is null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> c_int {
    // SAFETY: the arguments are those that the caller vouches for.
    let result = unsafe { libc::syscall(libc::SYS_clock_gettime, libc::c_long::from(clock), time) } as c_int;
    if result == 0 && [libc::CLOCK_REALTIME, libc::CLOCK_REALTIME_COARSE].contains(&clock) {
        // SAFETY: the call has filled it in.
        if let Some(time) = unsafe { time.as_mut() } {
            time.tv_sec = time.tv_sec.saturating_add(shift_s());
        }
    }
    result
}
