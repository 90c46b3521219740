//! Several models in memory at once: the same tokens as each alone, shared memory, and which of them goes.
#![expect(clippy::disallowed_methods, reason = "a model that is kept for a time goes by the clock")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::api::Door;
use crate::binary::{Node, api_json, text};
use crate::support::shipped_model;

const PROMPTS: [&str; 3] = ["Once upon a time", "The sea was", "def main():"];

/// A node with the shipped model in several precisions.
fn node(precisions: &[&str]) -> Node {
    let node = Node::new();
    for precision in precisions {
        let ended = node.run(&["import", text(&shipped_model()), "--name", precision, "--precision", precision]);
        assert_eq!(ended.code, Some(0), "{}", ended.err);
    }
    node
}

fn ask(model: &str, prompt: &str) -> Value {
    json!({"model": model, "prompt": prompt, "max_tokens": 24, "temperature": 0, "logprobs": 1})
}

fn loaded(door: &Door) -> Vec<String> {
    let loaded = api_json(&door.api, "/api/loaded");
    loaded["models"].as_array().expect("a list").iter().map(|model| model["name"].as_str().expect("a name").to_owned()).collect()
}

/// Asks until what is loaded is as expected.
fn wait_until_loaded(door: &Door, expected: &[&str]) {
    let began = Instant::now();
    while loaded(door) != expected {
        assert!(began.elapsed() < Duration::from_secs(20), "{:?} are loaded, expected {expected:?}", loaded(door));
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn two_models_at_once_answer_as_each_alone() {
    let node = node(&["q4", "q8"]);
    let mut alone = BTreeMap::new();
    for model in ["q4", "q8"] {
        for prompt in PROMPTS {
            let run = node.json(&["run", model, prompt, "--raw", "--max-tokens", "24", "--temperature", "0"]);
            alone.insert((model, prompt), run["text"].as_str().expect("a text").to_owned());
        }
    }
    let door = Door::of(node, String::new(), &[]);
    for round in 0..3 {
        std::thread::scope(|scope| {
            let threads: Vec<_> = alone
                .iter()
                .map(|(&(model, prompt), expected)| {
                    let door = &door;
                    scope.spawn(move || {
                        let answer = door.answer("/v1/completions", &ask(model, prompt));
                        assert_eq!(answer["choices"][0]["text"].as_str(), Some(&**expected), "{model}, {prompt}, round {round}");
                    })
                })
                .collect();
            threads.into_iter().for_each(|thread| thread.join().expect("it answers"));
        });
    }
    let mut names = loaded(&door);
    names.sort();
    assert_eq!(names, ["q4", "q8"], "both stay in memory");
    let listed = door.node.json(&["ps"]);
    assert_eq!(listed["models"].as_array().map(Vec::len), Some(2));
    assert!(listed["memory"]["experts_bytes"].as_u64() <= listed["memory"]["experts_bytes_max"].as_u64(), "{listed}");
}

#[test]
fn a_model_goes_when_it_is_told_and_comes_again_when_it_is_asked() {
    let door = Door::of(node(&["q4", "q8"]), String::new(), &[]);
    let before = door.answer("/v1/completions", &ask("q4", PROMPTS[0]));
    door.answer("/v1/completions", &ask("q8", PROMPTS[0]));
    let trunks = |door: &Door| api_json(&door.api, "/api/loaded")["memory"]["trunk_bytes"].as_u64().expect("bytes");
    let experts = |door: &Door| api_json(&door.api, "/api/loaded")["memory"]["experts_bytes"].as_u64().expect("bytes");
    let (both, experts_of_both) = (trunks(&door), experts(&door));
    let ended = door.node.run(&["stop", "q4"]);
    assert!(ended.code == Some(0) && ended.err.contains("q4 goes"), "{}", ended.err);
    wait_until_loaded(&door, &["q8"]);
    assert!(trunks(&door) < both && experts(&door) < experts_of_both);
    let again = door.answer("/v1/completions", &ask("q4", PROMPTS[0]));
    assert_eq!(again["choices"], before["choices"]);
    let ended = door.node.run(&["stop", "nobody"]);
    assert!(ended.code == Some(3) && ended.err.contains("nobody"), "{}", ended.err);
    let alone = Node::new();
    assert_eq!(alone.run(&["stop", "q4"]).code, Some(3));
    assert_eq!(alone.json(&["ps"])["models"], json!([]));
}

#[test]
fn idle_models_go_after_their_time() {
    let door = Door::of(node(&["q4"]), String::new(), &["--keep-alive", "1s"]);
    door.answer("/v1/completions", &ask("q4", PROMPTS[0]));
    assert_eq!(loaded(&door), ["q4"]);
    wait_until_loaded(&door, &[]);
    assert_eq!(
        api_json(&door.api, "/api/loaded")["memory"],
        json!({"experts_bytes": 0, "experts_bytes_max": 0, "trunk_bytes": 0, "work_bytes": 0})
    );
    door.answer("/v1/completions", &ask("q4", PROMPTS[0]));
}

/// A model whose trunk comes slowly keeps no other from answering, and answers once it is here.
#[test]
fn a_model_answers_while_another_is_loaded() {
    let slow = Door::of(node(&["q8"]), String::new(), &["--upload", "500KB"]);
    let expected = slow.answer("/v1/completions", &ask("q8", PROMPTS[0]));
    let door = Door::of(node(&["q4"]), String::new(), &[]);
    door.answer("/v1/completions", &ask("q4", PROMPTS[0]));
    let joined = door.node.run(&["join", &slow.serving.ticket]);
    assert_eq!(joined.code, Some(0), "{}", joined.err);
    std::thread::scope(|scope| {
        let late = scope.spawn(|| door.answer("/v1/completions", &ask("q8", PROMPTS[0])));
        let state = || api_json(&door.api, "/api/node")["model"]["state"].clone();
        while state() != "loading" {
            assert!(!late.is_finished(), "the trunk comes slowly");
            std::thread::sleep(Duration::from_millis(10));
        }
        for prompt in PROMPTS {
            door.answer("/v1/completions", &ask("q4", prompt));
        }
        assert_eq!((state(), loaded(&door)), (json!("loading"), vec!["q4".to_owned()]));
        assert_eq!(api_json(&door.api, "/health")["status"], "ok");
        assert_eq!(late.join().expect("it answers")["choices"], expected["choices"]);
    });
    let mut names = loaded(&door);
    names.sort();
    assert_eq!(names, ["q4", "q8"]);
}

/// Where memory holds the keys and values of one model only, the other goes for it.
#[test]
fn the_idlest_makes_room() {
    const KV: [&str; 2] = ["--kv-tokens", "20000"]; // about 60 MB for each
    let with = |node, ram: u64| Door::of(node, String::new(), &[&KV[..], &["--ram", &ram.to_string()]].concat());
    // What would do is told: first without what the process takes, then with it.
    let (mut node, mut ram) = (node(&["q8", "q4"]), 30_000_000);
    for _ in 0..2 {
        let door = with(node, ram);
        let message = door.post("/v1/completions", &ask("q8", PROMPTS[0])).json()["error"]["message"].to_string();
        let before = message.split(" would do").next().and_then(|before| before.rsplit(' ').next());
        ram = before.and_then(|bytes| bytes.parse().ok()).unwrap_or_else(|| panic!("{message}"));
        let Door { node: same, serving, .. } = door;
        assert_eq!(serving.stop(), Some(0));
        node = same;
    }
    let door = with(node, ram + (24 << 20));
    for model in ["q8", "q4", "q8"] {
        door.answer("/v1/completions", &ask(model, PROMPTS[0]));
        assert_eq!(loaded(&door), [model]);
    }
}
