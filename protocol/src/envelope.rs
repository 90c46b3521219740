//! Signed statements: domain, payload type and payload under one Ed25519 signature, after libp2p's RFC 2.
//!
//! The signature is checked before a byte of the payload is decoded. Does not judge who may sign: that is the reader's.

use crate::identity::{NodeId, NodeKey};

/// What a signature is for. The strings are frozen: a signature in one domain says nothing in another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Domain {
    /// A model's manifest, signed by its publisher.
    Manifest,
    /// The head of a node's expert profile.
    Profile,
    /// A claim by one node about another.
    Attestation,
    /// What a node computed for another.
    Receipt,
    /// A node's capacity and addresses.
    Node,
}

impl Domain {
    /// The string that is signed.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Manifest => "confrere-manifest/v1",
            Self::Profile => "confrere-profile/v1",
            Self::Attestation => "confrere-attestation/v1",
            Self::Receipt => "confrere-receipt/v1",
            Self::Node => "confrere-node/v1",
        }
    }

    /// The payload type that envelopes of this domain carry.
    pub const fn payload_type(self) -> &'static str {
        match self {
            Self::Manifest => "/confrere/manifest/1",
            Self::Profile => "/confrere/profile/1",
            Self::Attestation => "/confrere/attestation/1",
            Self::Receipt => "/confrere/receipt/1",
            Self::Node => "/confrere/node/1",
        }
    }
}

const VERSION: u8 = 1;

/// Why bytes are not a valid envelope of a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// Cut short, too long, or lengths that do not add up.
    #[error("envelope is malformed")]
    Malformed,
    /// A version that this program does not know.
    #[error("envelope has version {0}, this program knows version {VERSION}")]
    Version(u8),
    /// A valid shape, but for something else.
    #[error("envelope carries another type of payload")]
    PayloadType,
    /// The signature is not the named key's over this domain, type and payload.
    #[error("envelope's signature does not verify")]
    Signature,
}

/// An envelope whose signature has been checked, with the bytes it was read from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SignedEnvelope {
    signer: NodeId,
    payload_at: usize,
    bytes: Vec<u8>, // kept and forwarded as received, never re-encoded
}

impl SignedEnvelope {
    /// Signs `payload`.
    pub fn seal(key: &NodeKey, domain: Domain, payload: &[u8]) -> Self {
        let signature = key.sign(&signing_input(domain, domain.payload_type(), payload));
        let mut bytes = vec![VERSION];
        bytes.extend_from_slice(key.id().as_bytes());
        bytes.extend_from_slice(&signature);
        push_field(&mut bytes, domain.payload_type().as_bytes());
        push_field(&mut bytes, payload);
        Self { signer: key.id(), payload_at: bytes.len() - payload.len(), bytes }
    }

    /// Reads and verifies an envelope of `domain`.
    pub fn open(domain: Domain, bytes: Vec<u8>) -> Result<Self, EnvelopeError> {
        let version = *bytes.first().ok_or(EnvelopeError::Malformed)?;
        if version != VERSION {
            return Err(EnvelopeError::Version(version));
        }
        let mut rest = &bytes[1..];
        let signer = NodeId::from_bytes(*take_array::<32>(&mut rest)?);
        let signature = *take_array::<64>(&mut rest)?;
        let payload_type = take_field(&mut rest)?;
        let payload = take_field(&mut rest)?;
        if !rest.is_empty() {
            return Err(EnvelopeError::Malformed);
        }
        if payload_type != domain.payload_type().as_bytes() {
            return Err(EnvelopeError::PayloadType);
        }
        if !signer.verifies(&signing_input(domain, domain.payload_type(), payload), &signature) {
            return Err(EnvelopeError::Signature);
        }
        let payload_at = bytes.len() - payload.len();
        Ok(Self { signer, payload_at, bytes })
    }

    /// Whom the bytes of an envelope name as the signer: nothing of it has been verified.
    pub fn claimed_signer(bytes: &[u8]) -> Option<NodeId> {
        bytes.get(1..)?.first_chunk().map(|key| NodeId::from_bytes(*key))
    }

    /// Who signed it.
    pub fn signer(&self) -> NodeId {
        self.signer
    }

    /// What was signed.
    pub fn payload(&self) -> &[u8] {
        &self.bytes[self.payload_at..]
    }

    /// The envelope as it travels and is kept.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

fn signing_input(domain: Domain, payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let mut input = Vec::with_capacity(payload.len() + 80);
    push_field(&mut input, domain.text().as_bytes());
    push_field(&mut input, payload_type.as_bytes());
    push_field(&mut input, payload);
    input
}

/// Appends the length as an unsigned LEB128, then the bytes.
fn push_field(out: &mut Vec<u8>, field: &[u8]) {
    let mut length = field.len();
    while length >= 0x80 {
        out.push(length as u8 | 0x80);
        length >>= 7;
    }
    out.push(length as u8);
    out.extend_from_slice(field);
}

fn take_field<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], EnvelopeError> {
    let mut length = 0usize;
    for shift in (0..35).step_by(7) {
        let (&byte, tail) = rest.split_first().ok_or(EnvelopeError::Malformed)?;
        *rest = tail;
        length |= usize::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            // A last byte of zero would be a second spelling of a shorter length.
            let canonical = byte != 0 || shift == 0;
            let (field, tail) = rest.split_at_checked(length).filter(|_| canonical).ok_or(EnvelopeError::Malformed)?;
            *rest = tail;
            return Ok(field);
        }
    }
    Err(EnvelopeError::Malformed)
}

fn take_array<'a, const N: usize>(rest: &mut &'a [u8]) -> Result<&'a [u8; N], EnvelopeError> {
    let (array, tail) = rest.split_first_chunk::<N>().ok_or(EnvelopeError::Malformed)?;
    *rest = tail;
    Ok(array)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::from_hex;
    use proptest::prelude::*;

    fn unhex(text: &str) -> Vec<u8> {
        (0..text.len() / 2).map(|i| from_hex::<1>(&text[2 * i..2 * i + 2]).expect("vectors are hexadecimal")[0]).collect()
    }

    fn domain(text: &str) -> Domain {
        [Domain::Manifest, Domain::Profile, Domain::Attestation, Domain::Receipt, Domain::Node]
            .into_iter()
            .find(|d| d.text() == text)
            .expect("a vector's domain is in the table")
    }

    /// The vectors come from Python's `cryptography`; see `tests/vectors/scripts/envelope.py`.
    #[test]
    fn agrees_with_the_vectors() {
        let text = include_str!("../../tests/vectors/envelope.json");
        let vectors: Vec<serde_json::Value> = serde_json::from_str(text).expect("vectors are JSON");
        let (mut valid, mut invalid) = (0, 0);
        for v in &vectors {
            let field = |name: &str| v[name].as_str().expect("a vector has this field").to_owned();
            let domain = domain(&field("domain"));
            let opened = SignedEnvelope::open(domain, unhex(&field("envelope")));
            if field("expected") == "ok" {
                valid += 1;
                let key = NodeKey::from_secret(&from_hex(&field("seed")).expect("a seed is 32 bytes"));
                let sealed = SignedEnvelope::seal(&key, domain, &unhex(&field("payload")));
                assert_eq!(opened, Ok(sealed), "{v}");
            } else {
                invalid += 1;
                assert!(opened.is_err(), "{v}");
            }
        }
        assert!(valid >= 6 && invalid >= 8, "{valid} valid, {invalid} invalid");
    }

    proptest! {
        #[test]
        fn one_flipped_bit_never_verifies(payload in proptest::collection::vec(any::<u8>(), 0..300), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let sealed = SignedEnvelope::seal(&NodeKey::from_secret(&[1; 32]), Domain::Manifest, &payload);
            let mut bytes = sealed.as_bytes().to_vec();
            prop_assert_eq!(&SignedEnvelope::open(Domain::Manifest, bytes.clone()), &Ok(sealed));
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(SignedEnvelope::open(Domain::Manifest, bytes).is_err());
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() { *first = VERSION; }
            prop_assert!(SignedEnvelope::open(Domain::Node, bytes).is_err());
        }
    }
}
