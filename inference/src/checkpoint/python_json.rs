//! JSON as Python writes it: with `NaN` and infinities, which JSON does not have, and here and there with a byte order mark.

use serde_json::Value;

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Reads JSON; numbers that it does not have are null, so that a field that is needed is missing.
pub(super) fn parse(bytes: &[u8]) -> Result<Value, serde_json::Error> {
    let bytes = without_mark(bytes);
    // Most files have none of them.
    serde_json::from_slice(bytes).or_else(|error| match without_odd_numbers(bytes) {
        Some(changed) => serde_json::from_slice(&changed),
        None => Err(error),
    })
}

/// The bytes behind a byte order mark, if there is one.
pub(super) fn without_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes)
}

/// The text with null in the place of such numbers outside of strings; nothing where there are none.
fn without_odd_numbers(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut changed = Vec::with_capacity(bytes.len() + 64);
    let (mut rest, mut in_string, mut found) = (bytes, false, false);
    while let Some((&byte, after)) = rest.split_first() {
        let odd = [&b"-Infinity"[..], b"Infinity", b"NaN"].into_iter().find(|word| !in_string && rest.starts_with(word));
        if let Some(word) = odd {
            changed.extend_from_slice(b"null");
            rest = &rest[word.len()..];
            found = true;
            continue;
        }
        in_string ^= byte == b'"';
        let taken = if in_string && byte == b'\\' { rest.len().min(2) } else { 1 };
        changed.extend_from_slice(&rest[..taken]);
        rest = if taken == 1 { after } else { &rest[taken..] };
    }
    found.then_some(changed)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn reads_what_python_writes() {
        let text = "\u{feff}{\"a\": [0.0, Infinity, -Infinity], \"b\": \"NaN \\\" Infinity\", \"c\": 1}";
        assert_eq!(parse(text.as_bytes()).expect("it is read"), json!({"a": [0.0, null, null], "b": "NaN \" Infinity", "c": 1}));
        assert_eq!(parse(b"[NaN]").expect("it is read"), json!([null]));
    }

    #[test]
    fn what_is_wrong_is_said_where_it_is() {
        let error = parse(b"[Infinity,\n oops]").expect_err("it is wrong");
        assert_eq!((error.line(), error.column()), (2, 2));
    }
}
