//! Thin covers of system calls that std lacks.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

pub(crate) const TUN_NAME: &str = "tun0";

/// Returns what becomes readable with a signal that would end us or that a child has ended; those do nothing else any more.
#[expect(unsafe_code, reason = "std has no signals")]
pub(crate) fn catch_signals() -> io::Result<OwnedFd> {
    let signals = signal_set(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGCHLD]);
    // SAFETY: the set is initialised, the old mask is not asked for.
    let blocked = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut()) };
    if blocked != 0 {
        return Err(io::Error::from_raw_os_error(blocked));
    }
    // SAFETY: the set is initialised, and -1 asks for a new descriptor.
    let descriptor = checked(unsafe { libc::signalfd(-1, &raw const signals, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) })?;
    // SAFETY: it was opened just now and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

#[expect(unsafe_code, reason = "std has no signals")]
fn signal_set(signals: &[libc::c_int]) -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: `sigemptyset` initialises the whole set before anything else looks at it.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        set.assume_init()
    }
}

/// Lets a program have the signals that we keep from ourselves: it would inherit that.
#[expect(unsafe_code, reason = "std leaves the mask as it is")]
pub(crate) fn unblock_signals_in(program: &mut Command) {
    let none = signal_set(&[]);
    let unblock = move || {
        // SAFETY: the set is initialised, the old mask is not asked for.
        checked(unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()) }).map(drop)
    };
    // SAFETY: between fork and exec this makes one system call, and allocates nothing.
    unsafe { program.pre_exec(unblock) };
}

/// Sends to a process, or to a group when negative. One that is gone needs no signal.
#[expect(unsafe_code, reason = "std kills only children, and only with SIGKILL")]
pub(crate) fn send_signal(process: libc::pid_t, signal: libc::c_int) {
    // SAFETY: plain numbers.
    unsafe { libc::kill(process, signal) };
}

/// Moves the calling thread.
#[expect(unsafe_code, reason = "std has no namespaces")]
pub(crate) fn enter_namespace(namespace: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open while it is borrowed.
    checked(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) }).map(drop)
}

/// Makes the device in the namespace of the calling thread; it lasts as long as the file is open.
#[expect(unsafe_code, reason = "std has no ioctl")]
pub(crate) fn attach_tun(tun: &File) -> io::Result<()> {
    let flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    let mut request = libc::ifreq { ifr_name: [0; libc::IFNAMSIZ], ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags } };
    for (slot, byte) in request.ifr_name.iter_mut().zip(TUN_NAME.bytes()) {
        *slot = byte as libc::c_char;
    }
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which lives through the call.
    checked(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) }).map(drop)
}

pub(crate) fn readable(file: &File) -> libc::pollfd {
    libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN, revents: 0 }
}

/// Sleeps until a file is readable or the time is up; for ever without one.
#[expect(unsafe_code, reason = "std waits for one file only")]
pub(crate) fn wait(polled: &mut [libc::pollfd], timeout: Option<Duration>) -> io::Result<()> {
    polled.iter_mut().for_each(|poll| poll.revents = 0);
    let timeout = timeout.map(|time| libc::timespec { tv_sec: time.as_secs() as libc::time_t, tv_nsec: time.subsec_nanos().into() });
    let timeout = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: pointer and length are of one slice; the timeout is null or lives through the call, as does the absent mask.
    let ready = unsafe { libc::ppoll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, timeout, std::ptr::null()) };
    match checked(ready) {
        Err(error) if error.kind() != ErrorKind::Interrupted => Err(error),
        _ => Ok(()),
    }
}

fn checked(returned: libc::c_int) -> io::Result<libc::c_int> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(returned) }
}
