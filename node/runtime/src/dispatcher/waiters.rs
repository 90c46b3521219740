//! Whether what the model waits for is still of use to anybody.

use std::sync::{Arc, Mutex, PoisonError};

/// Whether anybody still wants what the model is at work on.
#[derive(Clone, Default)]
pub struct Waiters(Arc<Mutex<Option<IsWanted>>>);

type IsWanted = Box<dyn Fn() -> bool + Send>;

impl Waiters {
    /// From now on, what is awaited is given up when `is_wanted` says no.
    pub fn set(&self, is_wanted: impl Fn() -> bool + Send + 'static) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(is_wanted));
    }

    pub(super) fn is_gone(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_some_and(|is_wanted| !is_wanted())
    }
}
