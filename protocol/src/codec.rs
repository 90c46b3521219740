//! The one binary encoding: bincode with fixed-width little-endian integers, of which every value has exactly one form.
//!
//! Anything else in the project that needs bytes of a type calls this, so that the encoding can be replaced in one place.

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Most bytes that a decoded value may take, whatever lengths its encoding claims.
pub const DECODED_BYTES_MAX: usize = 64 << 20;

const CONFIG: Configuration<LittleEndian, Fixint, Limit<DECODED_BYTES_MAX>> =
    bincode::config::standard().with_little_endian().with_fixed_int_encoding().with_limit::<DECODED_BYTES_MAX>();

/// Why some bytes are not the encoding of a value.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// They do not decode, or claim more than [`DECODED_BYTES_MAX`].
    #[error("bytes do not decode: {0}")]
    Malformed(String),
    /// They decode, but to a value whose encoding is another: trailing bytes or an alternative spelling.
    #[error("bytes are not in canonical form")]
    NotCanonical,
}

/// Returns the encoding of `value`.
pub fn to_bytes<T: Serialize>(value: &T) -> Vec<u8> {
    bincode::serde::encode_to_vec(value, CONFIG).expect("our types have known lengths and stay below the limit")
}

/// Returns the value that `bytes` encode; refuses every encoding but the canonical one.
pub fn from_bytes<T: Serialize + DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let (value, used): (T, usize) =
        bincode::serde::decode_from_slice(bytes, CONFIG).map_err(|error| CodecError::Malformed(error.to_string()))?;
    if used != bytes.len() || to_bytes(&value) != bytes {
        return Err(CodecError::NotCanonical);
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_trailing_bytes_and_second_spellings() {
        let bytes = to_bytes(&(1u32, true));
        assert_eq!(bytes, [1, 0, 0, 0, 1]);
        assert!(from_bytes::<(u32, bool)>(&bytes).is_ok());
        assert!(matches!(from_bytes::<(u32, bool)>(&[1, 0, 0, 0, 1, 0]), Err(CodecError::NotCanonical)));
        assert!(from_bytes::<(u32, bool)>(&[1, 0, 0, 0, 2]).is_err());
        assert!(from_bytes::<(u32, bool)>(&[1, 0, 0, 0]).is_err());
    }

    #[test]
    fn refuses_a_claimed_length_without_allocating_it() {
        assert!(from_bytes::<Vec<u64>>(&u64::MAX.to_le_bytes()).is_err());
        assert!(from_bytes::<String>(&(1u64 << 40).to_le_bytes()).is_err());
    }
}
