//! Who speaks: Ed25519 keys. Does not keep them: the key file is `node`'s.

use std::fmt;
use std::str::FromStr;

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize};

use crate::hash::{from_hex, to_hex};

/// A node's public key. It is not checked to be a point on the curve until a signature is verified with it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeId([u8; 32]);

const PREFIX: &str = "ed25519:";

impl NodeId {
    /// Wraps the 32 bytes of a public key.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Says whether `signature` over `message` is this node's, by RFC 8032's strict rules: no malleable signature
    /// and no key of small order passes.
    pub fn verifies(&self, message: &[u8], signature: &[u8; 64]) -> bool {
        VerifyingKey::from_bytes(&self.0).is_ok_and(|key| key.verify_strict(message, &Signature::from_bytes(signature)).is_ok())
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", to_hex(&self.0))
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}…", to_hex(&self.0[..6]))
    }
}

/// A text that is not a node's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a node's key is written ed25519: and 64 hexadecimal digits, as `confrere id` prints it")]
pub struct NotANodeId;

impl FromStr for NodeId {
    type Err = NotANodeId;

    fn from_str(text: &str) -> Result<Self, NotANodeId> {
        let bytes = text.strip_prefix(PREFIX).and_then(from_hex).ok_or(NotANodeId)?;
        VerifyingKey::from_bytes(&bytes).map_err(|_| NotANodeId)?;
        Ok(Self(bytes))
    }
}

/// A node's secret key; wiped from memory when dropped.
pub struct NodeKey(SigningKey);

impl NodeKey {
    /// Makes the key of a 32-byte secret.
    pub fn from_secret(secret: &[u8; 32]) -> Self {
        Self(SigningKey::from_bytes(secret))
    }

    /// The 32-byte secret.
    pub fn secret(&self) -> [u8; 32] {
        self.0.to_bytes()
    }

    /// The public key that goes with it.
    pub fn id(&self) -> NodeId {
        NodeId(self.0.verifying_key().to_bytes())
    }

    /// Signs `message`. Only [`crate::envelope`] should: what is signed must name its domain.
    pub(crate) fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.0.sign(message).to_bytes()
    }
}

impl fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "secret key of {:?}", self.id())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_round_trips_and_refuses_other_text() {
        let id = NodeKey::from_secret(&[7; 32]).id();
        assert_eq!(id.to_string().parse(), Ok(id));
        for text in ["", "ed25519:", &id.to_string()[8..], &format!("{id}0")] {
            assert_eq!(text.parse::<NodeId>(), Err(NotANodeId), "{text}");
        }
    }
}
