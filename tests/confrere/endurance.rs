//! Nodes that live on: networks that fall apart and heal, clocks that are wrong, and many hours' work in a short time.
#![expect(clippy::disallowed_methods, reason = "how long things take is told by a clock")]

use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::binary::{Node, api_json, free_port, signal_process};
use crate::crowd::resident_bytes;
use crate::hostile::{Liar, Lie};
use crate::support::shipped_model;

/// N6 with real nodes: of two that serve, one is as if it were cut off for a while, without its connections being ended.
#[test]
fn nodes_that_were_parted_know_of_each_other_again_within_fifteen_seconds() {
    let (a, id) = Node::with("variant-tied");
    let serving = a.serve();
    let b = Node::new();
    let api = format!("127.0.0.1:{}", free_port());
    let _asking = b.serve_with(&["--listen", "/ip4/127.0.0.1/tcp/0", "--peer", &serving.address, "--api", &api]);
    let wait = |what: &str, is_so: &dyn Fn(&[Value]) -> bool| {
        let began = Instant::now();
        loop {
            let seen = api_json(&api, "/api/peers");
            if is_so(seen.as_array().expect("a list")) {
                return began.elapsed();
            }
            assert!(began.elapsed() < Duration::from_secs(15), "{what}: {seen}");
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    let holds = |peer: &Value| peer["status"]["holdings"][0]["model"] == id.as_str();
    wait("before", &|peers| peers.len() == 1 && holds(&peers[0]));
    signal_process(serving.pid(), "STOP");
    wait("while apart", &|peers| !peers.iter().any(holds));
    std::thread::sleep(Duration::from_secs(5));
    signal_process(serving.pid(), "CONT");
    let took = wait("afterwards", &|peers| peers.len() == 1 && holds(&peers[0]));
    println!("knows again after {took:?}");
}

/// N7: a day fast, a day slow, and fast and slow in turn.
#[test]
fn clocks_that_are_wrong_change_nothing() {
    const DAY: i64 = 86_400;
    let (a, id) = Node::with("variant-tied");
    let run = ["run", &id, "[5, 60, 7]", "--max-tokens", "5", "--temperature", "0", "--raw"];
    let alone = a.json(&run);
    let serving = a.serve_with(&["--listen", "/ip4/127.0.0.1/tcp/0", "--execute-for", "any"]);
    let b = Node::new();
    b.trust(&a);
    for (round, shift) in [DAY, -DAY, 0, 3650 * DAY, -3650 * DAY, i64::MIN, i64::MAX, 0].into_iter().enumerate() {
        let mut command = b.command(&[&["--json"], &run[..], &["--peer", &serving.address, "--execute-at", "any"]].concat());
        let ended = crate::binary::ended(command.env("LD_PRELOAD", clock_shift()).env("CLOCK_SHIFT_S", shift.to_string()));
        assert_eq!(ended.code, Some(0), "round {round}, {shift}: {}", ended.err);
        let answer: Value = serde_json::from_str(&ended.out).expect("JSON");
        assert_eq!(answer["tokens"], alone["tokens"], "{shift}");
        let book = b.json(&["peers"]);
        assert_eq!(book[0]["address"], serving.address.as_str(), "{shift}: {book}");
    }
    assert_eq!(b.run(&["repo", "verify"]).code, Some(0));
}

/// Report 16: a clock that differs from all others is named, where the user meets what that does.
#[test]
fn a_wrong_clock_is_told() {
    let a = Node::new();
    let id = a.import(&shipped_model());
    assert_eq!(a.run(&["profile", "build", "m", "--budget", "0s"]).code, Some(0));
    assert_eq!(a.run(&["profile", "publish", "m"]).code, Some(0));
    let serving = a.serve();
    for (shift, words) in [(-86_400, "slow"), (86_400 * 365, "fast")] {
        let b = Node::new();
        b.trust(&a);
        assert_eq!(b.run(&["pull", &id, "--trunk", "--peer", &serving.address]).code, Some(0));
        let which = ["experts", "which", "code", "--model", &id, "--federation", "--peer", &serving.address, "--check", "0s"];
        let ended = crate::binary::ended(b.command(&which).env("LD_PRELOAD", clock_shift()).env("CLOCK_SHIFT_S", shift.to_string()));
        assert!(ended.code == Some(3) && ended.err.contains(&format!("this clock is probably {words}")), "{shift}: {}", ended.err);
        let right = b.run(&which);
        assert!(right.code == Some(0) && !right.err.contains("clock"), "{}", right.err);
    }
}

/// The library of this package that shifts a process's clock; it lies where the test's own libraries do.
fn clock_shift() -> std::path::PathBuf {
    let own = std::env::current_exe().expect("a test has a program");
    let near = own.ancestors().skip(1).take(2).filter_map(|dir| fs::read_dir(dir).ok()).flatten().flatten();
    let libraries = near.map(|file| file.path()).filter(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with("libclock_shift") && path.extension().is_some_and(|extension| extension == "so")
    });
    libraries.max_by_key(|path| fs::metadata(path).and_then(|file| file.modified()).ok()).expect("the library is built with the tests")
}

/// What a process has: bytes in memory, open files, threads.
fn burden(process: u32) -> (u64, usize, usize) {
    let count = |what: &str| fs::read_dir(format!("/proc/{process}/{what}")).expect("it runs").count();
    (resident_bytes(process), count("fd"), count("task"))
}

/// The seconds that the next test takes; half an hour is what `docs/measuring.md` says.
fn seconds() -> u64 {
    std::env::var("CONFRERE_SOAK").ok().and_then(|seconds| seconds.parse().ok()).unwrap_or(24)
}

/// Rounds after which a node has come to have what it needs, and those that there are at least in all: a busy machine takes longer.
const WARM_ROUNDS: u64 = 8;
const ROUNDS_MIN: u64 = 24;

/// K1, scaled: one node serves while others come, take, run, break off and lie; it does not grow.
#[test]
fn a_node_that_serves_for_long_does_not_grow() {
    let a = Node::new();
    let id = a.import(&shipped_model());
    let api = format!("127.0.0.1:{}", free_port());
    let serving = a.serve_with(&["--listen", "/ip4/127.0.0.1/tcp/0", "--execute-for", "any", "--ram", "64MB", "--api", &api]);
    let threads_max = api_json(&api, "/api/node")["limits"]["threads"].as_u64().expect("a number") as usize;
    let b = Node::new();
    b.trust(&a);
    let peer = ["--peer", &serving.address];
    let run = ["run", &id, "fn main() {", "--max-tokens", "24", "--temperature", "0"];
    let (length, began) = (Duration::from_secs(seconds()), Instant::now());
    let mut quarter = None;
    let (mut rounds, mut threads) = (0, 0);
    while began.elapsed() < length || rounds < ROUNDS_MIN {
        let c = Node::new();
        c.trust(&a);
        assert_eq!(c.run(&[&["pull", &id], &peer[..]].concat()).code, Some(0));
        assert_eq!(b.run(&[&run[..], &peer, &["--execute-at", "any"]].concat()).code, Some(0));
        let mut broken_off = Node::new();
        broken_off.trust(&a);
        let mut child = broken_off.command(&[&["pull", &id], &peer[..]].concat()).spawn().expect("it starts");
        std::thread::sleep(Duration::from_millis(rounds * 7 % 100));
        child.kill().and_then(|()| child.wait()).expect("killed");
        broken_off = Node::new();
        broken_off.trust(&a);
        let liar = Liar::start(a.path(), &id, Lie::FlippedBit);
        let among = ["--peer", &liar.address, "--peer", &serving.address];
        assert_eq!(broken_off.run(&[&["pull", &id], &among[..]].concat()).code, Some(0));
        rounds += 1;
        threads = threads.max(burden(serving.pid()).2);
        if quarter.is_none() && rounds >= WARM_ROUNDS && began.elapsed() >= length / 4 {
            std::thread::sleep(Duration::from_millis(500)); // what ended has been tidied away
            quarter = Some(burden(serving.pid()));
        }
    }
    std::thread::sleep(Duration::from_millis(500));
    let (quarter, end) = (quarter.expect("a quarter of the time has passed"), burden(serving.pid()));
    println!("{rounds} rounds in {:?}; bytes, files and threads after a quarter {quarter:?}, at the end {end:?}", began.elapsed());
    assert!(end.0 <= quarter.0 / 10 * 11 + (4 << 20), "it grows");
    assert!(end.1.abs_diff(quarter.1) <= 5, "files");
    // Threads come and go with the work; what they may come to has a name and is told.
    assert!(threads <= threads_max, "{threads} threads; {threads_max} is the most");
    assert_eq!(serving.stop(), Some(0));
    assert_eq!(a.run(&["repo", "verify"]).code, Some(0));
}
