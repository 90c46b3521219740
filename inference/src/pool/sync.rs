//! What threads share, as the standard library has it; `loom` has the same to try every order of events with.

pub(super) use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, fence};
pub(super) use std::thread::{park, yield_now};

pub(super) use std::hint::spin_loop;

/// How often an idle worker looks for work before it lets others have the core now and then (about 50 µs), and how often it does that
/// before it sleeps (about 2 ms).
pub(super) const WATCHES: u32 = 2_000;
pub(super) const GIVE_UP: u32 = WATCHES + 4_000;

/// A value that one thread at a time may change.
pub(super) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

impl<T> UnsafeCell<T> {
    pub(super) fn new(value: T) -> Self {
        Self(std::cell::UnsafeCell::new(value))
    }

    pub(super) fn with<R>(&self, read: impl FnOnce(*const T) -> R) -> R {
        read(self.0.get())
    }

    pub(super) fn with_mut<R>(&self, write: impl FnOnce(*mut T) -> R) -> R {
        write(self.0.get())
    }
}
