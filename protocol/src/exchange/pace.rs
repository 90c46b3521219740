//! How fast a peer sends: its rate, how much to ask for ahead, and when it is too slow.

use crate::group_hashes::GROUP_BYTES;

/// Asked for ahead before a rate is known: whoever comes first must not be asked for all.
pub(super) const WINDOW_FIRST_BYTES: u64 = 1 << 20;
/// Most bytes asked of one peer ahead.
pub(super) const WINDOW_BYTES_MAX: u64 = 16 << 20;
const WINDOW_BYTES_MIN: u64 = 2 * GROUP_BYTES;
/// Rates are measured over at least so long.
const SAMPLE_MS: u64 = 200;
/// Assumed until the first answer tells.
const ROUND_TRIP_FIRST_MS: u64 = 100;
/// Asked for ahead beyond a round trip: what a busy provider and a full queue on the way take.
const SLACK_MS: u64 = 300;
/// Without a byte for this long, a peer that owes some counts as dead …
pub(super) const SILENCE_MAX_MS: u64 = 1000;
/// … and with fewer than these in as long a time, as one that drips.
const DRIP_BYTES: u64 = 16 << 10;

/// The pace of one peer.
#[derive(Clone, Debug)]
pub(super) struct Pace {
    total: u64,        // bytes that have come so far
    rate: Option<u64>, // bytes a second
    round_trip_ms: u64,
    sample: Mark,
    drip: Mark,
    last_sign_ms: u64,
    /// Since when it has said that it works on it, without a byte since.
    waiting_since_ms: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Mark {
    at_ms: u64,
    total: u64,
}

/// What a peer that owes bytes makes of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Pulse {
    /// They come.
    Steady,
    /// They come too slowly to wait for if anybody else has them.
    Dripping,
    /// None come.
    Silent,
}

impl Pace {
    pub(super) fn new(now_ms: u64) -> Self {
        let mark = Mark { at_ms: now_ms, total: 0 };
        Self {
            total: 0,
            rate: None,
            round_trip_ms: ROUND_TRIP_FIRST_MS,
            sample: mark,
            drip: mark,
            last_sign_ms: now_ms,
            waiting_since_ms: None,
        }
    }

    /// The first request after a pause goes out: what came before says nothing about what comes.
    pub(super) fn begin(&mut self, now_ms: u64) {
        let mark = Mark { at_ms: now_ms, total: self.total };
        (self.sample, self.drip, self.last_sign_ms, self.waiting_since_ms) = (mark, mark, now_ms, None);
    }

    /// An answer came to a request that found the peer idle.
    pub(super) fn answered_after(&mut self, ms: u64) {
        self.round_trip_ms = ms.clamp(1, 2000);
    }

    /// `total` bytes have come so far.
    pub(super) fn progress(&mut self, now_ms: u64, total: u64) {
        if total <= self.total {
            return;
        }
        (self.total, self.last_sign_ms, self.waiting_since_ms) = (total, now_ms, None);
        let took_ms = now_ms.saturating_sub(self.sample.at_ms);
        if took_ms >= SAMPLE_MS {
            let now = (total - self.sample.total) * 1000 / took_ms;
            self.rate = Some(self.rate.map_or(now, |rate| (rate * 2 + now) / 3));
            self.sample = Mark { at_ms: now_ms, total };
        }
    }

    /// The peer says that it works on it.
    pub(super) fn waits(&mut self, now_ms: u64) {
        self.waiting_since_ms.get_or_insert(now_ms);
        self.last_sign_ms = now_ms;
        let mark = Mark { at_ms: now_ms, total: self.total };
        (self.sample, self.drip) = (mark, mark);
    }

    /// Looks at a peer that owes bytes; `patience_ms` is how long it may say that it works on it.
    pub(super) fn pulse(&mut self, now_ms: u64, patience_ms: u64) -> Pulse {
        let waited_too_long = self.waiting_since_ms.is_some_and(|since| now_ms.saturating_sub(since) > patience_ms);
        if waited_too_long || self.silence_ms(now_ms) >= SILENCE_MAX_MS.max(3 * self.round_trip_ms) {
            return Pulse::Silent;
        }
        if now_ms.saturating_sub(self.drip.at_ms) < SILENCE_MAX_MS.max(3 * self.round_trip_ms) {
            return Pulse::Steady;
        }
        let came = self.total - self.drip.total;
        self.drip = Mark { at_ms: now_ms, total: self.total };
        if came < DRIP_BYTES { Pulse::Dripping } else { Pulse::Steady }
    }

    /// How long there has been no sign of it.
    pub(super) fn silence_ms(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(self.last_sign_ms)
    }

    /// How much to have asked for.
    pub(super) fn window_bytes(&self) -> u64 {
        let Some(rate) = self.rate else { return WINDOW_FIRST_BYTES };
        let ahead_ms = self.round_trip_ms + SLACK_MS;
        (rate.saturating_mul(ahead_ms) / 1000 * 3 / 2).clamp(WINDOW_BYTES_MIN, WINDOW_BYTES_MAX)
    }

    /// Bytes a second, once they have been seen for long enough.
    pub(super) fn rate(&self) -> Option<u64> {
        self.rate
    }

    /// When `bytes` would be here, in milliseconds from now; nothing before a rate is known.
    pub(super) fn expected_ms(&self, bytes: u64) -> Option<u64> {
        Some(self.round_trip_ms + bytes.saturating_mul(1000) / self.rate?.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_follows_the_rate_within_its_limits() {
        let mut pace = Pace::new(0);
        assert_eq!(pace.window_bytes(), WINDOW_FIRST_BYTES);
        pace.answered_after(50);
        let mut send = |from_ms: u64, rate: u64| {
            for ms in (from_ms + 200..=from_ms + 4000).step_by(200) {
                pace.progress(ms, pace.total + rate / 5);
            }
            pace.window_bytes()
        };
        assert_eq!(send(0, 1_000), WINDOW_BYTES_MIN);
        let middle = send(4_000, 12_500_000);
        assert!((6_000_000..7_000_000).contains(&middle), "{middle}");
        assert_eq!(send(8_000, 125_000_000), WINDOW_BYTES_MAX);
    }

    #[test]
    fn silence_and_drips_are_noticed_within_two_seconds() {
        let mut pace = Pace::new(0);
        pace.begin(0);
        pace.progress(900, 1_000_000);
        let noticed = (900..).step_by(50).find(|&ms| pace.pulse(ms, 0) == Pulse::Silent);
        assert_eq!(noticed, Some(1900));
        let mut pace = Pace::new(0);
        let noticed = (0..10_000).step_by(50).find(|&ms| {
            pace.progress(ms, ms / 50);
            pace.pulse(ms, 0) == Pulse::Dripping
        });
        assert_eq!(noticed, Some(1000));
    }

    #[test]
    fn a_peer_that_works_on_it_has_its_time_and_no_more() {
        let mut pace = Pace::new(0);
        let gone = (0..60_000).step_by(100).find(|&ms| {
            pace.waits(ms);
            pace.pulse(ms, 5000) != Pulse::Steady
        });
        assert_eq!(gone, Some(5100));
    }
}
