//! Hostile headers by hand, and agreement with the `safetensors` crate on everything else.

use proptest::prelude::*;

use super::*;

fn file(header: &str, data_bytes: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + data_bytes, 0);
    file
}

const GOOD: &str = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":{"dtype":"BF16","shape":[3],"data_offsets":[16,22]}}"#;

#[test]
fn reads_what_the_crate_writes() {
    let tensors = read_header(&file(GOOD, 22)).expect("a valid header");
    let start = 8 + GOOD.len() as u64;
    assert_eq!(tensors["b"].range, start + 16..start + 22);
    assert_eq!((tensors["b"].precision, &tensors["a"].shape[..]), (Some(Precision::Bf16), &[2, 2][..]));
    assert!(read_header(&file("{}", 0)).expect("an empty file is valid").is_empty());
}

/// P3: hostile headers, each refused; each was made by changing one thing.
#[test]
fn refuses_hostile_headers() {
    let one =
        |dtype: &str, shape: &str, offsets: &str| format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#);
    let two = |first: &str, second: &str| {
        format!(r#"{{"a":{{"dtype":"U8","shape":[8],"data_offsets":{first}}},"b":{{"dtype":"U8","shape":[8],"data_offsets":{second}}}}}"#)
    };
    let mut hostile: Vec<(String, Vec<u8>)> =
        vec![("nothing".into(), vec![]), ("seven bytes".into(), vec![0; 7]), ("no JSON".into(), 0u64.to_le_bytes().to_vec())];
    for length in [1 << 63, u64::MAX, u64::MAX - 7, HEADER_BYTES_MAX + 1, 1 << 32, 3, 1] {
        hostile.push((format!("claims {length}"), [&length.to_le_bytes()[..], b"{}"].concat()));
    }
    let texts = [
        "",
        " {}",
        "[]",
        "null",
        "{",
        "{}}",
        "{}x",
        "{\"a\":1}",
        "{\"a\":{}}",
        "{\"a\":[]}",
        "{\"a\":null}",
        "\u{feff}{}",
        "{\"a\"}",
        r#"{"__metadata__":1}"#,
        r#"{"__metadata__":{"x":1}}"#,
        r#"{"__metadata__":{"x":{}}}"#,
        "{}\0",
        "{\"a\":{\"dtype\":\"U8\"}}",
    ];
    hostile.extend(texts.iter().map(|text| ((*text).to_owned(), file(text, 0))));
    let tensors = [
        one("U8", "[8]", "[0,9]"),
        one("U8", "[8]", "[0,7]"),
        one("U8", "[9]", "[0,9]"),
        one("U8", "[8]", "[8,0]"),
        one("U8", "[8]", "[1,9]"),
        one("U8", "[8]", "[-8,0]"),
        one("U8", "[-8]", "[0,8]"),
        one("U8", "[8.0]", "[0,8]"),
        one("U8", "[8]", "[0.0,8]"),
        one("U8", "[8]", "[0]"),
        one("U8", "[8]", "[0,8,8]"),
        one("U8", "8", "[0,8]"),
        one("U8", "[8]", "8"),
        one("U8", "[\"8\"]", "[0,8]"),
        one("U9", "[8]", "[0,8]"),
        one("f32", "[2]", "[0,8]"),
        one("", "[8]", "[0,8]"),
        one("F4", "[15]", "[0,8]"),
        one("U8", "[4294967296,4294967296]", "[0,8]"),
        one("U8", "[18446744073709551615]", "[0,8]"),
        one("F64", "[2305843009213693953]", "[0,8]"),
        one("U8", "[18446744073709551616]", "[0,8]"),
        one("U8", "[8]", "[18446744073709551608,18446744073709551615]"),
        one("U8", "[8]", "[18446744073709551608,0]"),
        one("U8", "[9223372036854775808,2]", "[0,0]"),
        one("U8", "[8]", "[0,1e1]"),
        one("F32", "[1]", "[0,8]"),
        one("F32", "[4]", "[0,8]"),
        one("U8", "[8]", "[0,8],\"x\":1"),
        one("U8", "[7]", "[0,7]"),
        one("U8", "[0]", "[4,4]"),
    ];
    hostile.extend(tensors.iter().map(|text| (text.clone(), file(text, 8))));
    let pairs = [
        two("[0,8]", "[0,8]"),
        two("[0,8]", "[4,12]"),
        two("[0,8]", "[9,17]"),
        two("[8,16]", "[8,16]"),
        two("[1,9]", "[9,17]"),
        GOOD.replace("\"b\"", "\"a\"").replace("[3]", "[8]").replace("BF16", "U8").replace("[16,22]", "[0,8]"),
        two("[0,8]", "[8,16]").replace("\"b\"", "\"a\""),
    ];
    hostile.extend(pairs.iter().map(|text| (text.clone(), file(text, 16))));
    assert!(hostile.len() >= 60, "{}", hostile.len());
    for (name, bytes) in hostile {
        assert!(read_header(&bytes).is_err(), "{name} was accepted");
    }
}

#[test]
fn names_every_faulty_tensor() {
    let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]},
        "c":{"dtype":"XX","shape":[2],"data_offsets":[12,20]},"d":{"dtype":"F32","shape":[2],"data_offsets":[12,100]}}"#;
    let problems = read_header(&file(header, 20)).expect_err("three tensors are wrong");
    let names: Vec<_> = problems.iter().filter_map(|problem| problem.tensor.as_deref()).collect();
    assert_eq!(names, ["c", "d", "b"]);
}

#[test]
fn a_name_is_text_and_never_a_path() {
    let header = GOOD.replace("\"a\"", "\"../../etc/passwd\"");
    assert!(read_header(&file(&header, 22)).expect("the name is only a name").contains_key("../../etc/passwd"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]
    /// P2: what we accept, the crate accepts, with the same tensors; what it accepts and we refuse names something twice.
    #[test]
    fn agrees_with_the_safetensors_crate(edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4), data in 20usize..24) {
        let mut bytes = file(GOOD, data);
        for (at, value) in edits {
            let at = at.index(8 + GOOD.len());
            // Mostly characters that keep the JSON interesting.
            bytes[at] = if at < 8 { value % 3 } else { b"0123456789[]{},:\"aBFU "[usize::from(value) % 22] };
        }
        let ours = read_header(&bytes);
        let theirs = safetensors::SafeTensors::deserialize(&bytes);
        match (&ours, &theirs) {
            (Ok(ours), Ok(theirs)) => {
                prop_assert_eq!(ours.len(), theirs.len());
                for (name, tensor) in ours {
                    let view = theirs.tensor(name).expect("the same names");
                    prop_assert_eq!(view.data().len() as u64, tensor.range.end - tensor.range.start);
                    let shape: Vec<_> = view.shape().iter().map(|&side| side as u64).collect();
                    prop_assert_eq!(&shape, &tensor.shape);
                }
            }
            (Ok(_), Err(error)) => prop_assert!(false, "the crate refuses: {}", error),
            (Err(problems), Ok(_)) => prop_assert!(problems.iter().any(|p| p.what.contains("stands twice") || p.what.contains("unknown field")), "{:?}", problems),
            (Err(_), Err(_)) => {}
        }
    }

    #[test]
    fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = read_header(&bytes);
    }
}
