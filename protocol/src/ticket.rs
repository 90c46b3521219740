//! What one device gives to another so that they find and trust each other: a key and where its node listens, as one word.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::codec;
use crate::hash::{ContentHash, from_hex, to_hex};
use crate::identity::NodeId;

/// Most addresses that a ticket carries.
pub const TICKET_ADDRESSES_MAX: usize = 8;
const ADDRESS_BYTES_MAX: usize = 256;
const PREFIX: &str = "confrere1";
const CHECK_BYTES: usize = 4;

/// A node's key and its addresses (multiaddr texts without the peer's id, which the key gives).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Ticket {
    /// Whose node it is.
    pub node: NodeId,
    /// Where it listens.
    pub addresses: Vec<String>,
}

/// A text that is not a ticket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// Something else altogether.
    #[error("not a ticket: a ticket starts with {PREFIX}, as `confrere serve` prints it")]
    NotATicket,
    /// Cut short or mistyped.
    #[error("ticket is damaged: its check digits do not match")]
    Damaged,
    /// Well-formed, but nothing this program can use.
    #[error("ticket is of another version or beyond the limits")]
    Unknown,
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = codec::to_bytes(self);
        write!(f, "{PREFIX}{}{}", to_hex(&bytes), to_hex(&check(&bytes)))
    }
}

impl FromStr for Ticket {
    type Err = TicketError;

    fn from_str(text: &str) -> Result<Self, TicketError> {
        let digits = text.trim().strip_prefix(PREFIX).ok_or(TicketError::NotATicket)?;
        let bytes: Option<Vec<u8>> =
            digits.as_bytes().chunks(2).map(|pair| from_hex::<1>(std::str::from_utf8(pair).ok()?).map(|[byte]| byte)).collect();
        let bytes = bytes.ok_or(TicketError::Damaged)?;
        let (body, found) = bytes.split_last_chunk::<CHECK_BYTES>().ok_or(TicketError::Damaged)?;
        if *found != check(body) {
            return Err(TicketError::Damaged);
        }
        let ticket: Self = codec::from_bytes(body).map_err(|_| TicketError::Unknown)?;
        let fine = ticket.addresses.len() <= TICKET_ADDRESSES_MAX && ticket.addresses.iter().all(|a| a.len() <= ADDRESS_BYTES_MAX);
        if fine { Ok(ticket) } else { Err(TicketError::Unknown) }
    }
}

fn check(bytes: &[u8]) -> [u8; CHECK_BYTES] {
    let [a, b, c, d, ..] = *ContentHash::of(bytes).as_bytes();
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::NodeKey;

    #[test]
    fn round_trips_and_notices_a_wrong_character() {
        let ticket = Ticket { node: NodeKey::from_secret(&[9; 32]).id(), addresses: vec!["/ip4/127.0.0.1/tcp/4001".into()] };
        let text = ticket.to_string();
        assert_eq!(text.parse(), Ok(ticket));
        assert!(!text.contains("/p2p/"));
        for at in 0..text.len() {
            let mut other = text.clone().into_bytes();
            other[at] = if other[at] == b'0' { b'1' } else { b'0' };
            let other = String::from_utf8(other).expect("ASCII");
            assert!(other.parse::<Ticket>().is_err(), "{other}");
        }
        assert_eq!(text[..text.len() - 3].parse::<Ticket>(), Err(TicketError::Damaged));
        assert_eq!("".parse::<Ticket>(), Err(TicketError::NotATicket));
    }

    #[test]
    fn refuses_more_addresses_than_the_limit() {
        for (count, fine) in [(TICKET_ADDRESSES_MAX, true), (TICKET_ADDRESSES_MAX + 1, false)] {
            let ticket = Ticket { node: NodeKey::from_secret(&[9; 32]).id(), addresses: vec!["/ip4/1.2.3.4/tcp/1".into(); count] };
            assert_eq!(ticket.to_string().parse::<Ticket>().is_ok(), fine);
        }
    }
}
