//! Rounding weights by what a model reads.

use std::path::Path;

use serde_json::Value;

use crate::binary::{Node, text};
use crate::support::shipped_model;

fn probes(domain: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../node/runtime/probes/{domain}.txt"));
    path.to_str().expect("a path").to_owned()
}

#[test]
fn rounding_costs_less_where_text_was_read_before_and_makes_the_same_model_with_any_threads() {
    let node = Node::new();
    assert_eq!(node.run(&["import", text(&shipped_model()), "--name", "m"]).code, Some(0));
    let (prose, stories, manuals) = (probes("prose"), probes("stories"), probes("manuals"));
    let calibrated = ["requantize", "m", "q3", "--calibrate", &prose, "--calibrate", &stories, "--calibrate", &manuals];
    let id = node.json(&[&calibrated[..], &["--name", "by-text"]].concat())["id"].clone();
    let mut command = node.command(&[&["--json"], &calibrated[..], &["--name", "again"]].concat());
    let again = command.env("RAYON_NUM_THREADS", "1").output().expect("it runs");
    let again: Value = serde_json::from_slice(&again.stdout).expect("JSON");
    assert!(id.is_string() && again["id"] == id, "{again} {id}");

    assert_ne!(node.json(&["requantize", "m", "q3", "--name", "plain"])["id"], id);
    let loss = |model: &str| {
        let measured = node.json(&["eval", "perplexity", model, &probes("poetry")]);
        measured["nats_per_token"].as_f64().expect("a number")
    };
    let [whole, plain, by_text] = ["m", "plain", "by-text"].map(loss);
    println!("nats a token: {whole:.4}, at q3 {plain:.4}, by what was read {by_text:.4}");
    assert!(by_text - whole < 0.9 * (plain - whole), "{whole} {plain} {by_text}");
    assert!(plain - whole < 0.05, "{whole} {plain}");
}

#[test]
fn text_to_calibrate_by_must_be_there() {
    let (node, _) = Node::with("tiny-qwen3-moe");
    let missing = node.run(&["requantize", "m", "q4", "--calibrate", "/nowhere/text"]);
    assert!(missing.code != Some(0) && missing.err.contains("tokenizer"), "{:?} {}", missing.code, missing.err);
    let node = Node::new();
    assert_eq!(node.run(&["import", text(&shipped_model()), "--name", "m"]).code, Some(0));
    let missing = node.run(&["requantize", "m", "q4", "--calibrate", "/nowhere/text"]);
    assert!(missing.code != Some(0) && missing.err.contains("/nowhere/text"), "{:?} {}", missing.code, missing.err);
    let empty = tempfile::NamedTempFile::new().expect("a file");
    let empty = node.run(&["requantize", "m", "q4", "--calibrate", text(empty.path())]);
    assert!(empty.code == Some(2) && empty.err.contains("nothing to calibrate with"), "{:?} {}", empty.code, empty.err);
    assert_eq!(node.json(&["ls"]).as_array().map(Vec::len), Some(1));
}
