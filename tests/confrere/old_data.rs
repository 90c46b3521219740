//! Data directories of earlier programs, and of later ones.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use protocol::ModelManifest;
use protocol::decoder::{QkNorm, SharedExpert};
use serde_json::{Value, json};

use crate::api::Door;
use crate::binary::Node;
use crate::support::vectors;

const ID: &str = "17c44f9db9a6cdfaddb2aa5f2492c903594c024532e7bc6978658b4e4fd3116f";
/// What the program that wrote the directory answered to `[5,6,7,8]`, greedily.
const TOKENS: [u32; 11] = [82, 84, 82, 84, 82, 84, 3, 3, 3, 78, 45];

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("made");
    for entry in fs::read_dir(from).expect("a directory").flatten() {
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy(&path, &target);
        } else {
            fs::copy(&path, &target).expect("copied");
        }
    }
}

/// A node with the data directory of before, as it was left.
fn before() -> Node {
    let node = Node::new();
    copy(&vectors("data_dir"), node.path());
    fs::set_permissions(node.path().join("key"), fs::Permissions::from_mode(0o600)).expect("set");
    node
}

#[test]
fn a_data_directory_of_before_opens_and_works() {
    let node = before();
    let models = node.json(&["ls"]);
    assert_eq!((&models[0]["id"], &models[0]["name"]), (&json!(ID), &json!("m")));
    assert_eq!(models[0]["experts"]["have"], models[0]["experts"]["all"]);
    let run = node.json(&["run", "m", "[5,6,7,8]", "--max-tokens", "12", "--temperature", "0"]);
    assert_eq!(run["tokens"], json!(TOKENS));
    assert_eq!(node.run(&["repo", "verify"]).code, Some(0));
    let shown = node.json(&["show", "m"]);
    assert_eq!(shown["config"]["dense_layers"], json!([1]));
    assert_eq!(shown["parts"][0]["kind"], "text");
    // Served, too; and what is imported now from the same checkpoint is the same model.
    let source = crate::support::checkpoint("variant-dense");
    let again = node.run(&["import", crate::binary::text(&source), "--name", "n", "--precision", "q4", "--trunk-precision", "q4"]);
    assert_eq!(again.out.trim(), ID, "{}", again.err);
    let door = Door::of(node, ID.to_owned(), &[]);
    let answer = door.answer("/v1/completions", &json!({"model": "m", "prompt": [5, 6, 7, 8], "max_tokens": 12, "temperature": 0}));
    assert_eq!(answer["usage"]["completion_tokens"], Value::from(TOKENS.len()));
}

#[test]
fn a_data_directory_of_a_newer_program_is_refused() {
    let node = before();
    assert_eq!(node.run(&["ls"]).code, Some(0));
    let format = node.path().join("format");
    assert_eq!(fs::read_to_string(&format).expect("written").trim(), "1");
    fs::write(&format, "2\n").expect("written");
    let ended = node.run(&["ls"]);
    assert!(ended.code == Some(1) && ended.err.contains("newer confrere"), "{:?} {}", ended.code, ended.err);
    fs::write(&format, "first\n").expect("written");
    assert_eq!(node.run(&["ls"]).code, Some(5));
}

/// Version 3, as a program writes it that knows `docs/manifest.md` and nothing else.
#[test]
fn the_manifest_of_the_vectors_is_read_and_written() {
    let vector: Value = serde_json::from_slice(&fs::read(vectors("manifest.json")).expect("readable")).expect("JSON");
    let read = |name: &str| {
        let hex = vector[name]["bytes"].as_str().expect("a text");
        let bytes: Vec<u8> = (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hex")).collect();
        let manifest = ModelManifest::from_bytes(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(manifest.to_bytes(), bytes, "{name}");
        assert_eq!(json!(manifest.id().to_string()), vector[name]["id"]);
        manifest
    };
    let seeing = read("version_3_towers");
    let (vision, audio) = (seeing.vision().expect("it sees"), seeing.audio().expect("it hears"));
    assert_eq!((vision.deepstack.as_slice(), vision.frame_pixels_max, audio.window, audio.end_token), (&[0, 2][..], 8888, 800, 9));
    let manifest = read("version_3");
    let decoder = manifest.decoder();
    let moe = decoder.moe().expect("it has experts");
    assert_eq!((decoder.layers(), decoder.moe_layers().collect::<Vec<_>>()), (3, vec![1, 2]));
    assert_eq!((moe.shared, decoder.attention().qk_norm), (SharedExpert::Gated { width: 40 }, QkNorm::AllHeads));
    assert_eq!(manifest.precision_text(), "bf16 × 2, q8 × 2, q4 × 2");
    assert_eq!(manifest.generation.stop_strings, ["\nUser:"]);
}
