//! How far peers are trusted: opinions of this node, from what it has seen itself and from what peers say whom it knows.
//!
//! Goals: only verified work counts, by facet; one proven lie costs more than all credit; what others say never buys more than an order among
//! candidates, and never costs anybody anything. Non-goals: scores are not sent, not signed, and touch no router. Time is passed in.

pub mod book;
pub mod tally;

pub use self::book::{Opinion, RATER_MIN, Ruling, TrustBook, Voice};
pub use self::tally::{Outcome, Tally, score};
pub use crate::record::Facet;

/// A peer that runs this node's experts has at least this score, from what this node has seen itself.
pub const EXECUTION_GATE: f64 = 0.7;
#[cfg(test)]
mod sim;
