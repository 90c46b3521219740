//! Moving experts: who has which blobs of a model, and how their groups come from several peers at once.
//!
//! Two state machines without input or output. [`Downloads`] is told what is wanted, what peers say and what time it is, and
//! answers with what to send, what to verify and whom to blame. [`Uploads`] is told what peers ask for, and answers with whom
//! to send what next. Whoever drives them owns the sockets, the clock, the disk and the threads that hash.
//!
//! Goals: a group is fetched once; a wrong one names its sender; a peer that dies, drips or lies costs at most two seconds; no
//! peer can take what all share. The same events at the same times give the same actions, so networks of hundreds of nodes
//! are simulated from a seed.
//! Non-goals: finding peers, keeping connections, judging who may ask.

mod answers;
pub mod bitfield;
pub mod downloads;
pub mod events;
mod pace;
mod peer_state;
mod picker;
mod slow_peers;
pub mod upload_events;
pub mod uploads;
mod wanted;
pub mod wire;

pub use bitfield::Bitfield;
pub use downloads::Downloads;
pub use events::{DownloadAction, DownloadEvent, Fault};
pub use uploads::Uploads;
pub use wire::{FromProvider, ToProvider};

/// What comes first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Urgency {
    /// Somebody waits for it.
    Now = 0,
    /// Somebody will soon: a group at a time, so that what is wanted now has a free way.
    Soon = 1,
    /// Whenever there is nothing else to do; the rarest first.
    Rest = 2,
}

/// No such urgency.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no such urgency")]
pub struct UnknownUrgency;

impl TryFrom<u8> for Urgency {
    type Error = UnknownUrgency;

    fn try_from(byte: u8) -> Result<Self, UnknownUrgency> {
        [Self::Now, Self::Soon, Self::Rest].into_iter().find(|&urgency| urgency as u8 == byte).ok_or(UnknownUrgency)
    }
}

/// The bytes of a group, as whoever drives an exchange holds them.
pub trait Payload {
    /// How many there are.
    fn length(&self) -> u64;
}

impl Payload for Vec<u8> {
    fn length(&self) -> u64 {
        self.len() as u64
    }
}

/// Deterministic draws from a seed: SplitMix64 (Steele, Lea, Flood 2014). Not for secrets.
#[derive(Clone, Debug)]
pub(crate) struct Draws(pub(crate) u64);

impl Draws {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod downloads_tests;
#[cfg(test)]
pub(crate) mod sim;
