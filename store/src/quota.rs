//! Counts bytes against a limit, those on disk and those on their way there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A limit on bytes, shared by all writers.
#[derive(Debug, Clone)]
pub struct Quota {
    used: Arc<AtomicU64>,
    /// Bytes that lie elsewhere and count against the limit as well.
    elsewhere: Arc<AtomicU64>,
    bytes_max: u64,
}

/// Room that was set aside; given back when dropped, unless [kept](Reservation::keep).
#[derive(Debug)]
pub struct Reservation {
    used: Arc<AtomicU64>,
    bytes: u64,
}

impl Quota {
    /// A quota of which `used` bytes are taken already.
    pub fn new(used: u64, bytes_max: u64) -> Self {
        Self { used: Arc::new(AtomicU64::new(used)), elsewhere: Arc::default(), bytes_max }
    }

    /// Sets `bytes` aside, or says how many bytes are left.
    pub fn reserve(&self, bytes: u64) -> Result<Reservation, u64> {
        let most = self.bytes_max.saturating_sub(self.elsewhere.load(Ordering::SeqCst));
        let more = |used: u64| used.checked_add(bytes).filter(|&sum| sum <= most);
        match self.used.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more) {
            Ok(_) => Ok(Reservation { used: Arc::clone(&self.used), bytes }),
            Err(used) => Err(most.saturating_sub(used)),
        }
    }

    /// Counts bytes that lie elsewhere: what is there already may be beyond the limit, and then nothing more fits.
    pub fn count_elsewhere(&self, bytes: u64) {
        self.elsewhere.store(bytes, Ordering::SeqCst);
    }

    /// Bytes that still fit.
    pub fn left(&self) -> u64 {
        self.bytes_max.saturating_sub(self.elsewhere.load(Ordering::SeqCst)).saturating_sub(self.used())
    }

    /// Takes back the bytes of something that is gone.
    pub fn release(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::SeqCst);
    }

    /// Bytes taken, those set aside included.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::SeqCst)
    }

    /// The limit.
    pub fn bytes_max(&self) -> u64 {
        self.bytes_max
    }
}

impl Reservation {
    /// The bytes are there now and stay counted.
    pub fn keep(mut self) {
        self.bytes = 0;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_at_its_edge_and_takes_back() {
        let quota = Quota::new(10, 30);
        let first = quota.reserve(20).expect("20 are left");
        assert_eq!(quota.reserve(1).err(), Some(0));
        drop(first);
        assert_eq!(quota.reserve(21).err(), Some(20));
        assert_eq!(quota.reserve(u64::MAX).err(), Some(20));
        quota.reserve(20).expect("20 are left again").keep();
        quota.release(5);
        assert_eq!((quota.used(), quota.left()), (25, 5));
        quota.count_elsewhere(3);
        assert_eq!((quota.left(), quota.reserve(3).err()), (2, Some(2)));
        quota.count_elsewhere(9);
        assert_eq!((quota.left(), quota.reserve(1).err(), quota.used()), (0, Some(0), 25));
    }
}
