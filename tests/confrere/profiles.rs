//! Which experts serve what: profiles of real nodes, one of which lies, and questions that are answered all the same.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use protocol::ContentHash;
use serde_json::Value;

use crate::binary::{Node, Serving, api_json, free_port, signal, text, wait};
use crate::support::shipped_model;

const K: usize = 4;
const LAYERS: usize = 6;
const EXPERTS: usize = 32;

/// A node with the shipped model and a profile of it.
fn profiled(budget: &str) -> (Node, String) {
    let node = Node::new();
    let id = node.import(&shipped_model());
    // Reading the probes takes what it takes; the budget is for leaving experts out.
    node.json(&["profile", "build", "m", "--budget", "0s"]);
    let built = node.json(&["profile", "build", "m", "--budget", budget]);
    assert_eq!(built["experts"], EXPERTS * LAYERS);
    (node, id)
}

/// Another node that has come by the same.
fn copy_of(node: &Node) -> Node {
    let copy = Node::new();
    let copied = Command::new("cp").arg("-a").arg(format!("{}/.", text(node.path()))).arg(copy.path()).status();
    assert!(copied.expect("cp runs").success());
    fs::remove_file(copy.path().join("key")).expect("it had a key");
    copy.trust(node);
    copy
}

/// What the node has noted down of the shipped probes.
fn journal(node: &Node, id: &str) -> PathBuf {
    let files = fs::read_dir(node.path().join("profiles")).into_iter().flatten().flatten().map(|file| file.path());
    let mut journals = files.filter(|path| text(path).ends_with(".journal") && text(path).contains(id));
    journals.next().unwrap_or_default()
}

fn slots(answer: &Value) -> Vec<(u64, u64)> {
    let number = |row: &Value, name: &str| row[name].as_u64().expect("a number");
    answer["experts"].as_array().expect("a list").iter().map(|row| (number(row, "layer"), number(row, "expert"))).collect()
}

/// The frames of a journal: what `docs/records.md` does not say, `node/runtime/src/profiles.rs` does.
fn frames(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut rest = bytes;
    let mut frames = Vec::new();
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        frames.push(after[8..8 + length].to_vec());
        rest = &after[8 + length..];
    }
    frames
}

/// Changes what a node has noted down: in the texts of one domain, the uses of one expert are another's. All counts are as they can be.
fn forge(node: &Node, id: &str, domain: u32, (layer, a, b): (usize, u16, u16)) {
    let path = journal(node, id);
    let swap = |expert: u16| {
        if expert == a {
            b
        } else if expert == b {
            a
        } else {
            expert
        }
    };
    let mut forged = Vec::new();
    for mut frame in frames(&fs::read(&path).expect("a journal")) {
        let number = |frame: &[u8], at: usize| u32::from_le_bytes(frame[at..at + 4].try_into().expect("four bytes"));
        if number(&frame, 0) == 2 {
            continue; // trials: they would be of other tokens
        }
        if number(&frame, 0) == 1 && number(&frame, 4) == domain {
            let count = number(&frame, 12) as usize;
            for (i, at) in (0..count).map(|i| (i, 20 + 2 * i)) {
                if i % (LAYERS * K) / K == layer {
                    let expert = u16::from_le_bytes([frame[at], frame[at + 1]]);
                    frame[at..at + 2].copy_from_slice(&swap(expert).to_le_bytes());
                }
            }
            let masses = 20 + 2 * count;
            for at in (0..number(&frame, masses) as usize).map(|i| masses + 8 + 12 * i) {
                let expert = number(&frame, at) as usize;
                if expert / EXPERTS == layer {
                    let swapped = (layer * EXPERTS) as u32 + u32::from(swap((expert % EXPERTS) as u16));
                    frame[at..at + 4].copy_from_slice(&swapped.to_le_bytes());
                }
            }
        }
        forged.extend((frame.len() as u32).to_le_bytes());
        forged.extend(&ContentHash::of(&frame).as_bytes()[..8]);
        forged.extend(frame);
    }
    fs::write(&path, forged).expect("written");
    let built = node.json(&["profile", "build", "m", "--budget", "0s"]);
    assert_eq!(built["domains"][1]["trials"], 0, "{built}");
}

fn publish_and_serve(node: &Node, more: &[&str]) -> Serving {
    assert_eq!(node.run(&["profile", "publish", "m"]).code, Some(0));
    node.serve_with(&[&["--listen", "/ip4/127.0.0.1/tcp/0"], more].concat())
}

fn holds_heads(api: &str, count: usize) -> bool {
    api_json(api, "/api/records")["heads"].as_array().expect("a list").len() == count
}

fn wait_for_heads(api: &str, count: usize) {
    for _ in 0..600 {
        if holds_heads(api, count) {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    panic!("{count} heads do not come: {}", api_json(api, "/api/records"));
}

/// Five nodes with profiles, of which one claims lift that an expert does not have, and one that asks.
#[test]
fn a_federation_with_a_liar_says_truly_which_experts_handle_code() {
    let (base, id) = profiled("3s");
    let own = base.json(&["experts", "which", "code", "--model", "m"]);
    let best = slots(&own)[0];
    let of_layer = base.json(&["experts", "which", "code", "--model", "m", "--top", "100", "--layer", &best.0.to_string()]);
    let worst = *slots(&of_layer).last().expect("some");
    let first = copy_of(&base);
    let api = format!("127.0.0.1:{}", free_port());
    let first_serving = publish_and_serve(&first, &["--api", &api]);
    let others: Vec<_> = (0..3).map(|_| copy_of(&base)).collect();
    let peer = ["--peer", first_serving.address.as_str()];
    let _servings: Vec<_> = others.iter().map(|node| publish_and_serve(node, &peer)).collect();
    let liar = copy_of(&base);
    forge(&liar, &id, 1, (best.0 as usize, best.1 as u16, worst.1 as u16));
    let lies = liar.json(&["experts", "which", "code", "--model", "m", "--top", "100"]);
    let lift = |answer: &Value, (layer, expert): (u64, u64)| {
        let rows = answer["experts"].as_array().expect("a list");
        let row = rows.iter().find(|row| row["layer"] == layer && row["expert"] == expert);
        row.and_then(|row| row["lift"].as_f64())
    };
    assert!(lift(&lies, worst).is_some_and(|lift| lift > 1.2) && lift(&of_layer, worst).is_some_and(|lift| lift < 0.5), "{worst:?}");
    let _lying = publish_and_serve(&liar, &peer);
    wait_for_heads(&api, 5);
    // One that comes late is told what was said before, and hands it on.
    let late = copy_of(&base);
    let late_api = format!("127.0.0.1:{}", free_port());
    let late_serving = late.serve_with(&["--listen", "/ip4/127.0.0.1/tcp/0", "--peer", &first_serving.address, "--api", &late_api]);
    wait_for_heads(&late_api, 5);

    let asker = Node::new();
    asker.trust(&base);
    let peer = ["--peer", late_serving.address.as_str()];
    assert_eq!(asker.run(&[&["pull", &id, "--name", "m"], &peer[..]].concat()).code, Some(0));
    let ask = [&["experts", "which", "code", "--federation", "--check", "100s"], &peer[..]].concat();
    let answer = asker.json(&ask);
    assert_eq!(slots(&answer), slots(&own), "{answer}");
    let liars_key = liar.id();
    let mut checks = BTreeMap::new();
    for claim in answer["claims"].as_array().expect("a list") {
        let is_liar = claim["node"] == liars_key.as_str();
        *checks.entry((is_liar, claim["check"].as_str().expect("a word").to_owned())).or_insert(0) += 1;
        assert!(claim["trust"].as_f64().is_some_and(|trust| if is_liar { trust < 0.027 } else { trust > 0.2 }), "{claim}");
    }
    assert_eq!(checks, BTreeMap::from([((false, "holds".to_owned()), 4), ((true, "refuted".to_owned()), 1)]), "{answer}");
    assert!(answer["experts"][0]["providers"].as_array().is_some_and(|providers| !providers.is_empty()), "{answer}");
    // What was seen is kept, and said in words.
    let words = asker.run(&["trust", "explain", &liars_key]);
    assert!(words.out.contains("profile: 0.000") && words.out.contains("bad 1 times"), "{}", words.out);
    // Without the means to measure again it is known by now whom to believe.
    let unchecked = asker.json(&[&["experts", "which", "code", "--federation", "--check", "0s"], &peer[..]].concat());
    assert_eq!(slots(&unchecked), slots(&own), "{unchecked}");
    let refused = asker.run(&[&["profile", "verify", &liars_key], &peer[..]].concat());
    assert_eq!(refused.code, Some(7), "{}", refused.err);
    let unknown = asker.run(&[&["experts", "which", "cod", "--federation", "--check", "0s"], &peer[..]].concat());
    assert!(unknown.code == Some(3) && unknown.err.contains("did you mean code?"), "{}", unknown.err);
    println!("{}\n{}", asker.run(&ask).out, words.out);

    // The experts that code uses most, within a quota: a run on code fetches less than after a random choice of the same size.
    let fetched = |how: &[&str]| {
        let node = Node::new();
        node.trust(&base);
        let pulled = node.run(&[&["pull", &id], how, &peer[..]].concat());
        assert_eq!(pulled.code, Some(0), "{}", pulled.err);
        let answer = node.json(&[&["run", &id, PROMPT, "--raw", "--max-tokens", "40", "--temperature", "0"], &peer[..]].concat());
        answer["experts"]["fetched"].as_u64().expect("a count")
    };
    for (size, least) in [("10MB", 1.1), ("20MB", 1.4)] {
        let (by_domain, by_chance) = (fetched(&["--domain", "code", "--experts", size]), fetched(&["--experts", size]));
        println!(
            "fetched by a run on code: {by_domain} experts after pull --domain code --experts {size}, {by_chance} after a random choice"
        );
        assert!(by_domain as f64 * least < by_chance as f64, "{size}: {by_domain} and {by_chance}");
    }
}

const PROMPT: &str = "impl fmt::Display for Error {\n    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {\n";

/// A build that is broken off goes on where it was, and comes to the same; and the newest sequence number is ahead even when all but the key is lost.
#[test]
fn a_profile_is_resumed_and_its_sequence_never_goes_back() {
    let node = Node::new();
    let id = node.import(&shipped_model());
    let mut child = node.command(&["profile", "build", "m", "--budget", "0s"]).spawn().expect("it starts");
    for _ in 0..2000 {
        if fs::metadata(journal(&node, &id)).is_ok_and(|file| file.len() > 100_000) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    signal(&child, "INT");
    assert_eq!(wait(&mut child), Ok(Some(130)));
    let before = fs::metadata(journal(&node, &id)).expect("a journal").len();
    assert!(before > 100_000);
    let resumed = node.json(&["profile", "build", "m", "--budget", "0s"]);
    let other = Node::new();
    other.import(&shipped_model());
    let whole = other.json(&["profile", "build", "m", "--budget", "0s", "--threads", "1", "--kernels", "scalar"]);
    assert_eq!(resumed["body"], whole["body"], "the same counts, by other kernels too");
    assert_eq!(node.json(&["repo", "gc"])["blobs_removed"], 0, "a body is not garbage");

    let api = format!("127.0.0.1:{}", free_port());
    let seq = |node: &Node| {
        let serving = publish_and_serve(node, &["--api", &api]);
        wait_for_heads(&api, 1);
        let seq = api_json(&api, "/api/records")["heads"][0]["seq"].as_u64().expect("a number");
        assert_eq!(serving.stop(), Some(0));
        seq
    };
    let first = seq(&node);
    assert!(seq(&node) > first);
    let last = seq(&node);
    let lost = copy_of(&node);
    fs::copy(node.path().join("key"), lost.path().join("key")).expect("copied");
    for name in ["seq", "records"] {
        fs::remove_file(lost.path().join(name)).expect("it was there");
    }
    assert!(seq(&lost) > last, "ahead of what it said before it lost all but its key");
    // S13: with nothing but the key, everything comes back by the manifest.
    let (bare, serving) = (Node::new(), other.serve());
    fs::copy(node.path().join("key"), bare.path().join("key")).expect("copied");
    bare.trust(&other);
    assert_eq!(bare.run(&["pull", &id, "--name", "m", "--peer", &serving.address]).code, Some(0));
    assert_eq!((bare.experts(), bare.id()), (node.experts(), node.id()));
}
