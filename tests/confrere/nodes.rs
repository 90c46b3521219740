//! Two and more nodes, real processes: fetching, trust, liars, kills, restarts. The tokens never change.
#![expect(clippy::disallowed_methods, reason = "how long a peer is taken for there is told by a clock")]

use std::net::TcpListener;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::binary::{Node, ended, free_port, http_get, signal, text, wait};
use crate::hostile::{Liar, Lie};
use crate::slow_link::SlowLink;
use crate::support::{checkpoint, shipped_model};

const PROMPT: &str = "[5, 60, 200, 7]";

fn greedy<'a>(model: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["run", model, PROMPT, "--max-tokens", "12", "--temperature", "0", "--raw"], more].concat()
}

fn count(answer: &Value, what: &str) -> u64 {
    answer["experts"][what].as_u64().unwrap_or_else(|| panic!("no count {what} in {answer}"))
}

#[test]
fn a_node_with_nothing_generates_the_same_tokens_and_keeps_what_it_fetched() {
    let (a, id) = Node::with("tiny-qwen3-moe");
    let alone = a.json(&greedy("m", &[]));
    let serving = a.serve();
    let b = Node::new();
    b.trust(&a);
    let first = b.json(&greedy(&id, &["--peer", &serving.address]));
    assert_eq!(first["tokens"], alone["tokens"]);
    assert_eq!(count(&first, "fetched"), count(&first, "needed"));
    assert_eq!(count(&first, "bytes_fetched"), count(&first, "fetched") * (64 + 3 * 64 * 48 * 4));
    assert_eq!(first["experts"]["peers"], json!([serving.socket().1]));
    assert_eq!(b.experts(), (count(&first, "fetched"), 32));
    let second = b.json(&greedy(&id, &["--offline"]));
    assert_eq!((&second["tokens"], count(&second, "fetched")), (&alone["tokens"], 0));
    assert_eq!(count(&second, "disk"), count(&first, "needed"));
}

#[test]
fn both_transports_carry_a_model() {
    let (a, id) = Node::with("variant-tied");
    let alone = a.json(&["run", "m", "[5, 6]", "--temperature", "0", "--max-tokens", "5"]);
    for listen in ["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"] {
        let serving = a.serve_with(&["--listen", listen]);
        let b = Node::new();
        b.trust(&a);
        let answer = b.json(&["run", &id, "[5, 6]", "--temperature", "0", "--max-tokens", "5", "--peer", &serving.address]);
        assert_eq!(answer["tokens"], alone["tokens"], "{listen}");
    }
}

/// N18: bytes of a stranger's model, however right their hash, are not run.
#[test]
fn a_stranger_s_manifest_is_refused_until_he_is_trusted() {
    let (a, id) = Node::with("tiny-qwen3-moe");
    let serving = a.serve();
    let b = Node::new();
    let run = greedy(&id, &["--peer", &serving.address]);
    let ended = b.run(&run);
    assert_eq!(ended.code, Some(7), "{}", ended.err);
    assert!(ended.err.contains(&format!("confrere publishers add {}", a.id())), "{}", ended.err);
    assert_eq!(b.json(&["ls"]), json!([]));
    assert_eq!(b.run(&[&run[..], &["--allow-unsigned"]].concat()).code, Some(0));
    assert_eq!(b.run(&run).code, Some(7), "allowed once is not trusted");
    b.trust(&a);
    assert_eq!(b.run(&run).code, Some(0));
    assert_eq!(b.run(&["publishers", "rm", &a.id()]).code, Some(0));
    assert_eq!(b.run(&run).code, Some(7), "trust withdrawn counts for what is here, too");
}

#[test]
fn a_ticket_is_all_that_a_second_device_needs() {
    let (a, id) = Node::with("tiny-qwen3-moe");
    let alone = a.json(&greedy("m", &[]));
    let serving = a.serve();
    assert!(!serving.ticket.contains("/p2p/"), "{}", serving.ticket);
    let b = Node::new();
    let joined = b.run(&["join", &serving.ticket]);
    assert_eq!((joined.code, joined.out.trim()), (Some(0), format!("{id}  m").as_str()), "{}", joined.err);
    assert_eq!(b.experts(), (0, 32));
    assert_eq!(b.json(&greedy("m", &[]))["tokens"], alone["tokens"]);
    let mut damaged = serving.ticket.clone();
    damaged.replace_range(30..31, if &damaged[30..31] == "0" { "1" } else { "0" });
    assert_eq!(b.run(&["join", &damaged]).code, Some(2));
    drop(serving);
    let c = Node::new();
    let (ticket, later) = {
        let again = a.serve();
        (again.ticket.clone(), again)
    };
    drop(later);
    assert_eq!(c.run(&["join", &ticket, "--timeout", "0.5"]).code, Some(0), "joining works while the other is away");
}

#[test]
fn pull_brings_the_trunk_or_everything() {
    let (a, id) = Node::with("tiny-qwen3-moe");
    let serving = a.serve();
    let b = Node::new();
    b.trust(&a);
    let pulled = b.json(&["pull", &id, "--name", "mine", "--trunk", "--peer", &serving.address]);
    assert_eq!((&pulled["name"], &pulled["experts"]["have"]), (&json!("mine"), &json!(0)));
    let pulled = b.run(&["pull", "mine", "--peer", &serving.address]);
    assert_eq!(pulled.out.trim(), id);
    assert_eq!(b.experts(), (32, 32));
    drop(serving);
    assert_eq!(b.run(&greedy("mine", &["--offline"])).code, Some(0));
}

#[test]
fn every_liar_is_dropped_and_the_bytes_come_from_another() {
    let (a, id) = Node::with("tiny-qwen3-moe");
    let alone = a.json(&greedy("m", &[]));
    for lie in [
        Lie::FlippedBit,
        Lie::WrongLength,
        Lie::HugeLength,
        Lie::AnotherExpert,
        Lie::Garbage,
        Lie::Unsolicited,
        Lie::HasAll,
        Lie::HangUp,
        Lie::Silence,
        Lie::ForgedManifest,
    ] {
        let liar = Liar::start(a.path(), &id, lie);
        let b = Node::new();
        b.trust(&a);
        let only = b.run(&greedy(&id, &["--peer", &liar.address, "--timeout", "3"]));
        // A wrong byte is proof; silence, hanging up and not having it are only failures.
        let code = if matches!(lie, Lie::HasAll | Lie::HangUp | Lie::Silence) { 4 } else { 5 };
        assert_eq!(only.code, Some(code), "{lie:?}: {}", only.err);
        assert!(code == 4 || only.err.contains(&format!("{} was dropped", liar.peer)), "{lie:?}: {}", only.err);
        let serving = a.serve();
        let both = b.json(&greedy(&id, &["--peer", &liar.address, "--peer", &serving.address, "--timeout", "30"]));
        assert_eq!(both["tokens"], alone["tokens"], "{lie:?}");
        assert_eq!(b.json(&["repo", "verify"])["damaged"], json!([]), "{lie:?}");
    }
}

#[test]
fn what_nobody_has_is_named_at_once() {
    let (a, id) = Node::with("tiny-qwen3-moe");
    let c = Node::new();
    {
        let serving = a.serve();
        c.trust(&a);
        assert_eq!(c.run(&["pull", &id, "--trunk", "--peer", &serving.address]).code, Some(0));
    }
    let incomplete = c.serve();
    let b = Node::new();
    b.trust(&a);
    let ended = b.run(&greedy(&id, &["--peer", &incomplete.address]));
    assert_eq!(ended.code, Some(4), "{}", ended.err);
    assert!(ended.err.contains("missing layer 0 expert") && ended.err.contains("none of 1 connected peers has it"), "{}", ended.err);
    assert!(ended.took < Duration::from_secs(8), "{:?}", ended.took);
}

#[test]
fn a_provider_that_starts_late_or_restarts_is_found_again() {
    let (a, id) = Node::with("tiny-qwen3-moe");
    let alone = a.json(&greedy("m", &[]));
    let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port").port();
    let listen = format!("/ip4/127.0.0.1/tcp/{port}");
    let b = Node::new();
    b.trust(&a);
    let child = b.command(&greedy(&id, &["--json", "--peer", &listen])).stdout(Stdio::piped()).spawn().expect("it starts");
    std::thread::sleep(Duration::from_secs(1));
    let _serving = a.serve_with(&["--listen", &listen]);
    let output = child.wait_with_output().expect("it ends");
    let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(answer["tokens"], alone["tokens"]);
}

#[test]
fn serve_answers_health_and_stops_when_told() {
    let (a, _) = Node::with("variant-tied");
    let api = format!("127.0.0.1:{}", free_port());
    let serving = a.serve_with(&["--listen", "127.0.0.1:0", "--api", &api]);
    assert!(serving.address.contains("/tcp/"), "TCP comes first: {}", serving.address);
    let get = |path: &str, host: &str| http_get(&api, path, host);
    let answer = get("/health", "localhost");
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("{\"status\":\"ok\"}"), "{answer}");
    let answer = get("/api/peers", &api);
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("[]"), "{answer}");
    // A web page whose name was made to point here.
    assert!(get("/api/peers", "evil.example").starts_with("HTTP/1.1 403"));
    assert_eq!(serving.stop(), Some(0));
}

#[test]
fn an_expert_that_rotted_on_disk_is_fetched_again() {
    let (a, id) = Node::with("tiny-qwen3-moe");
    let alone = a.json(&greedy("m", &[]));
    let serving = a.serve();
    let b = Node::new();
    b.trust(&a);
    assert_eq!(b.run(&["pull", &id, "--peer", &serving.address]).code, Some(0));
    let mut rotten = 0;
    for prefix in std::fs::read_dir(b.path().join("store/blobs")).expect("blobs").flatten() {
        for file in std::fs::read_dir(prefix.path()).expect("blobs").flatten() {
            let mut bytes = std::fs::read(file.path()).expect("a blob");
            if bytes.starts_with(b"CFXP") {
                bytes[64] ^= 1;
                std::fs::write(file.path(), bytes).expect("writable");
                rotten += 1;
            }
        }
    }
    assert_eq!(rotten, 32);
    let offline = b.run(&greedy(&id, &["--offline"]));
    assert_eq!(offline.code, Some(4), "{}", offline.err);
    let answer = b.json(&greedy(&id, &["--peer", &serving.address]));
    assert_eq!(answer["tokens"], alone["tokens"]);
    assert!(count(&answer, "fetched") > 0);
}

#[test]
fn experts_beyond_the_disk_quota_are_used_and_not_kept() {
    let (a, id) = Node::with("tiny-qwen3-moe");
    let alone = a.json(&greedy("m", &[]));
    let serving = a.serve();
    let b = Node::new();
    b.trust(&a);
    // The trunk takes 667 kB, an expert 37 kB.
    let args = greedy(&id, &["--peer", &serving.address, "--disk", "800kB"]);
    for _ in 0..2 {
        let answer = b.json(&args);
        assert_eq!(answer["tokens"], alone["tokens"]);
        assert!(count(&answer, "fetched") > 20, "{answer}");
        let stat = b.json(&["repo", "stat"]);
        assert!(stat["bytes"].as_u64().is_some_and(|bytes| bytes <= 800_000), "{stat}");
    }
    let (have, _) = b.experts();
    assert!((1..=3).contains(&have), "{have}");
    let trunkless = Node::new();
    trunkless.trust(&a);
    assert_eq!(trunkless.run(&greedy(&id, &["--peer", &serving.address, "--disk", "100kB"])).code, Some(6));
}

#[test]
fn a_provider_killed_in_the_middle_is_replaced_by_another() {
    let (a, id) = Node::with("tiny-qwen3-moe");
    let alone = a.json(&greedy("m", &[]));
    let second = Node::new();
    second.trust(&a);
    let mut first = a.serve();
    assert_eq!(second.run(&["pull", &id, "--peer", &first.address]).code, Some(0));
    let other = second.serve();
    for bytes in [100_000, 700_000, 1_000_000] {
        let slow = |serving: &crate::binary::Serving| SlowLink::to(serving, 1_000_000);
        let (one, two) = (slow(&first), slow(&other));
        let b = Node::new();
        b.trust(&a);
        let child = b.command(&greedy(&id, &["--json", "--peer", &one.address, "--peer", &two.address]));
        let child = { child }.stdout(Stdio::piped()).spawn().expect("it starts");
        SlowLink::wait_for_all(&[&one, &two], bytes);
        one.cut();
        first.kill();
        let output = child.wait_with_output().expect("it ends");
        let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(answer["tokens"], alone["tokens"], "killed after {bytes} bytes");
        first = a.serve();
    }
}

#[test]
fn the_only_provider_killed_in_the_middle_is_a_clear_error_and_the_next_run_goes_on() {
    let (a, id) = Node::with("tiny-qwen3-moe");
    let alone = a.json(&greedy("m", &[]));
    let mut serving = a.serve();
    let link = SlowLink::to(&serving, 1_000_000);
    let b = Node::new();
    b.trust(&a);
    let mut child = b.command(&greedy(&id, &["--json", "--timeout", "3", "--peer", &link.address]));
    let child = child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    link.wait_for(1_000_000);
    link.cut();
    serving.kill();
    let output = child.wait_with_output().expect("it ends");
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{error}");
    assert!(error.contains("missing layer") && error.contains("no progress for 3 s"), "{error}");
    let (kept, _) = b.experts();
    assert!(kept > 0, "what had come was lost");
    let serving = a.serve();
    let answer = b.json(&greedy(&id, &["--peer", &serving.address]));
    assert_eq!(answer["tokens"], alone["tokens"]);
    assert!(count(&answer, "fetched") <= 32 - kept, "{answer}");
}

#[test]
fn ctrl_c_exits_130_and_loses_nothing() {
    let (a, id) = Node::with("tiny-qwen3-moe");
    let serving = a.serve();
    let link = SlowLink::to(&serving, 1_000_000);
    let b = Node::new();
    b.trust(&a);
    let mut child =
        b.command(&greedy(&id, &["--peer", &link.address])).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("it starts");
    link.wait_for(1_200_000);
    signal(&child, "INT");
    assert_eq!(wait(&mut child).expect("it stops"), Some(130));
    assert!(b.experts().0 > 0, "what had come was lost");
    assert_eq!(b.json(&["repo", "verify"])["damaged"], json!([]));
}

#[test]
fn the_shipped_model_gives_the_same_text_on_both_nodes() {
    let a = Node::new();
    let id = a.import(&shipped_model());
    for (prompt, raw) in [("fn main() {", &["--raw"][..]), ("Can I get a latte?", &[])] {
        let run = |model: &'static str| [&["run", model, prompt, "--max-tokens", "24", "--seed", "3"], raw].concat();
        let alone = a.json(&run("m"));
        assert!(!alone["text"].as_str().expect("a text").is_empty());
        let serving = a.serve();
        let b = Node::new();
        assert_eq!(b.run(&["join", &serving.ticket]).code, Some(0));
        let together = b.json(&run("m"));
        assert_eq!((&together["text"], &together["tokens"]), (&alone["text"], &alone["tokens"]));
        assert_eq!(together["experts"]["fetched"], together["experts"]["needed"]);
    }
    assert_eq!(id, Node::new().import(&shipped_model()));
}

#[test]
fn the_demo_ends_with_its_proof() {
    let node = Node::new();
    let mut command = node.command(&["demo", "--max-tokens", "12"]);
    let ended = ended(command.current_dir("/"));
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    assert_eq!(ended.out.lines().last(), Some("tokens identical: yes"));
    let tiny = checkpoint("tiny-qwen3-moe");
    let ended = node.run(&["demo", "--model", text(&tiny), "--json"]);
    let report: Value = serde_json::from_str(&ended.out).expect("one JSON value");
    assert_eq!(report["identical"], true);
}

/// A node that is stopped in order is gone for its peers at once, over each transport.
#[test]
fn a_node_that_stops_says_goodbye() {
    for transport in ["tcp", "udp"] {
        let (a, _) = Node::with("variant-tied");
        let listen = format!("/ip4/127.0.0.1/{transport}/0{}", if transport == "udp" { "/quic-v1" } else { "" });
        let serving = a.serve_with(&["--listen", &listen]);
        let b = Node::new();
        let api = format!("127.0.0.1:{}", free_port());
        let _other = b.serve_with(&["--listen", "/ip4/127.0.0.1/tcp/0", "--peer", &serving.address, "--api", &api]);
        let connected = || http_get(&api, "/metrics", &api).lines().any(|line| line == "confrere_peers_connected 1");
        let until = |is: bool| {
            let began = Instant::now();
            while connected() != is {
                assert!(began.elapsed() < Duration::from_secs(10), "{transport}: {is}");
                std::thread::sleep(Duration::from_millis(5));
            }
            began.elapsed()
        };
        until(true);
        let stopping = std::thread::spawn(move || serving.stop());
        let took = until(false);
        println!("{transport}: gone after {took:?}");
        assert!(took < Duration::from_secs(5), "{transport}: {took:?}");
        assert_eq!(stopping.join().expect("it stops"), Some(0));
    }
}
