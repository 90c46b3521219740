//! Which experts serve pictures and sounds: profiles by probes that are questions about media.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::binary::{Node, api_json, free_port, text};
use crate::support::{checkpoint, vectors};

const MODEL: &str = "tiny-qwen3-omni-full";
const LISTEN: [&str; 2] = ["--listen", "/ip4/127.0.0.1/tcp/0"];

/// Probes of pictures, sounds and words, so few that every trial is made.
fn probes(dir: &Path) {
    let lines = |questions: &[Value]| questions.iter().map(Value::to_string).collect::<Vec<_>>().join("\n");
    let about = |kind: &str, file: &str, words: &str, answer: &str| {
        let path = vectors("omni/media").join(file);
        json!({"content": [{"type": kind, "path": path}, {"type": "text", "text": words}], "answer": answer})
    };
    let objects = [
        about("image", "c_64x64.png", "What is it?", "A square."),
        about("image", "a_75x53.png", "What colour is it?", "Red and green."),
        about("image", "b_131x208.png", "What is in the picture?", "Noise."),
    ];
    let speech = [about("audio", "short.wav", "What was said?", "one"), about("audio", "exact.wav", "Say it again.", "one and two")];
    fs::write(dir.join("objects.jsonl"), lines(&objects)).expect("written");
    fs::write(dir.join("speech.jsonl"), lines(&speech)).expect("written");
    fs::write(dir.join("words.txt"), "one and two and three\n%%\nfour of them, and five\n").expect("written");
}

fn importing(more: &[&str]) -> Node {
    let node = Node::new();
    let imported = node.run(&[&["import", text(&checkpoint(MODEL)), "--name", "m"], more].concat());
    assert_eq!(imported.code, Some(0), "{}", imported.err);
    node
}

#[test]
fn experts_of_pictures_and_sounds_are_found_and_counted_alike_everywhere() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    probes(dir.path());
    let (a, b) = (importing(&[]), importing(&[]));
    let build = ["profile", "build", "m", "--budget", "100s", "--probes", text(dir.path())];
    let built = a.json(&build);
    let told: Vec<_> = built["domains"].as_array().expect("a list").iter().map(|of| (&of["domain"], &of["modality"])).collect();
    let expected = [("objects", "text"), ("objects", "image"), ("speech", "text"), ("speech", "audio"), ("words", "text")];
    assert_eq!(told, expected.map(|(domain, modality)| (json!(domain), json!(modality))).each_ref().map(|(domain, of)| (domain, of)));
    // Every count is the same with other kernels and threads.
    let again = b.json(&[&build[..], &["--threads", "1", "--kernels", "scalar"]].concat());
    assert_eq!(again["body"], built["body"]);
    // By modality, a domain's tokens of one, and by a domain's name what it is about.
    let which = |more: &[&str]| a.json(&[&["experts", "which", "--top", "80", "--model", "m"], more].concat());
    let routed = |rows: &Value| -> u64 {
        rows["experts"].as_array().expect("a list").iter().map(|one| one["routed"].as_u64().expect("a count")).sum()
    };
    let (image, objects) = (which(&["--modality", "image"]), which(&["objects"]));
    assert_eq!(image["domain"], "image");
    assert!(routed(&image) > 0);
    // There are pictures in no other domain.
    assert_eq!(routed(&image), routed(&objects));
    assert_eq!(routed(&objects), routed(&which(&["objects", "--modality", "image"])));
    assert_ne!(routed(&objects), routed(&which(&["objects", "--modality", "text"])));
    // What a picture itself uses is counted by its own tokens.
    let picture = vectors("omni/media").join("c_64x64.png");
    let used = which(&["--image", text(&picture)]);
    let uses: u64 = used["experts"].as_array().expect("a list").iter().map(|one| one["used"].as_u64().expect("a count")).sum();
    assert_eq!((&used["tokens"], uses), (&json!(4), 4 * 5 * 4), "4 tokens, 5 layers, 4 experts each");
    // One expert, with all that is known of it.
    let first = &image["experts"][0];
    let (layer, expert) = (first["layer"].to_string(), first["expert"].to_string());
    let one = a.json(&["experts", "show", &layer, &expert, "--model", "m"]);
    assert_eq!(one["profile"]["primary_modality"], if first["specialist"] == true { json!("image") } else { Value::Null }, "{one}");
    let of_pictures = one["profile"]["modalities"].as_array().expect("a list").iter().find(|of| of["name"] == "image").expect("it has one");
    assert_eq!(of_pictures["routed"], first["routed"]);
    let missing = a.run(&["experts", "show", "0", "16", "--model", "m"]);
    assert!(missing.code == Some(3) && missing.err.contains("layer 0 of m has no expert 16"), "{}", missing.err);
    // The same over HTTP, and from another node.
    assert_eq!(a.run(&["profile", "publish", "m"]).code, Some(0));
    let api = format!("127.0.0.1:{}", free_port());
    let serving = a.serve_with(&[&LISTEN[..], &["--api", &api]].concat());
    b.trust(&a);
    let which_at_peers = [
        "experts",
        "which",
        "--modality",
        "image",
        "--top",
        "5",
        "--model",
        "m",
        "--federation",
        "--check",
        "0s",
        "--peer",
        &serving.address,
    ];
    let told = b.json(&which_at_peers);
    assert_eq!(told["claims"].as_array().map(Vec::len), Some(2), "{told}");
    let first =
        |rows: &Value| rows["experts"].as_array().expect("a list").iter().map(|one| one["expert"].clone()).take(5).collect::<Vec<_>>();
    assert_eq!(first(&told), first(&image));
    assert_eq!(api_json(&api, "/api/experts?modality=image&top=80")["experts"], image["experts"]);
    assert_eq!(api_json(&api, &format!("/api/experts/{layer}/{expert}"))["profile"], one["profile"]);
}

#[test]
fn wrong_probes_and_questions_are_told() {
    let node = importing(&[]);
    let refused = |files: &[(&str, &str)], more: &[&str]| {
        let dir = tempfile::tempdir().expect("a temporary directory");
        files.iter().for_each(|(name, text)| fs::write(dir.path().join(name), text).expect("written"));
        let ended = node.run(&[&["profile", "build", "m", "--budget", "0s", "--probes", text(dir.path())], more].concat());
        assert_eq!(ended.code, Some(2), "{}", ended.err);
        ended.err
    };
    let asks = |what: &str| format!("{{\"content\": {what}, \"answer\": \"x\"}}\n");
    let one = asks("\"What?\"");
    for (files, words) in [
        (vec![("a.jsonl", "{}")], "line 1 is no question"),
        (vec![("a.jsonl", &*one), ("b.jsonl", "{\"content\": \"What?\", \"answer\": \"\"}")], "question 1 of domain b needs an answer"),
        (vec![("a.jsonl", &one), ("a.txt", "x")], "domain a has two files"),
        (vec![("a.jsonl", &asks("[]"))], "question 1 of domain a needs an answer and 1 to 16 parts"),
    ] {
        let told = refused(&files, &[]);
        assert!(told.contains(words), "{told}");
    }
    let missing = node.run(&["experts", "which", "--modality", "smell", "--model", "m"]);
    assert!(missing.code == Some(2) && missing.err.contains("no modality is called smell (known: text, image, audio)"), "{}", missing.err);
    let none = node.run(&["experts", "which"]);
    assert_eq!(none.code, Some(2), "{}", none.err);
}
