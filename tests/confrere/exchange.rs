//! Moving blobs between real nodes: providers that die at any moment, interruptions, limits. `CONFRERE_KILLS=50` kills more.
#![expect(clippy::disallowed_methods, reason = "how soon a provider is replaced is told by a clock")]

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use crate::binary::{Node, Serving, signal_process, wait};
use crate::hostile::{Liar, Lie};
use crate::slow_link::SlowLink;
use crate::support::shipped_model;

/// Of each provider's link: the model takes some four seconds over one.
const BYTES_PER_SECOND: u64 = 8_000_000;
/// Noise, Yamux, heads of messages and lists of hashes.
const OVERHEAD_PERCENT: u64 = 2;
/// What may come in vain: a group that was broken off, and the last ones, of which a few are asked twice.
const VAIN_BYTES_MAX: u64 = 5 * (256 << 10);
const REPLACED_WITHIN: Duration = Duration::from_secs(2);

fn kills() -> u64 {
    std::env::var("CONFRERE_KILLS").ok().and_then(|count| count.parse().ok()).unwrap_or(4)
}

fn bytes_of_blobs(node: &Node) -> u64 {
    let files = |path: &Path| std::fs::read_dir(path).expect("a directory").flatten().map(|entry| entry.path()).collect::<Vec<_>>();
    let blobs = files(&node.path().join("store/blobs")).into_iter().flat_map(|prefix| files(&prefix));
    blobs.map(|blob| blob.metadata().expect("a file").len()).sum()
}

fn begin(node: &Node, args: &[&str]) -> Child {
    node.command(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("it starts")
}

/// The longest time in which nothing came over `link`, until `child` ends.
fn longest_silence(link: &SlowLink, child: &mut Child) -> Duration {
    let (mut passed, mut since, mut longest) = (link.passed(), Instant::now(), Duration::ZERO);
    while child.try_wait().expect("it can be waited for").is_none() {
        std::thread::sleep(Duration::from_millis(5));
        longest = longest.max(since.elapsed());
        if link.passed() != passed {
            (passed, since) = (link.passed(), Instant::now());
        }
    }
    longest
}

/// N2: the connection breaks, or the provider stops and says nothing.
#[test]
fn a_provider_that_dies_is_replaced_within_two_seconds_and_no_group_comes_again() {
    let a = Node::new();
    let id = a.import(&shipped_model());
    let second = Node::new();
    second.trust(&a);
    let mut first = a.serve();
    assert_eq!(second.run(&["pull", &id, "--peer", &first.address]).code, Some(0));
    let other = second.serve();
    let total = bytes_of_blobs(&a);
    for round in 0..kills() {
        let (one, two) = (SlowLink::to(&first, BYTES_PER_SECOND), SlowLink::to(&other, BYTES_PER_SECOND));
        let b = Node::new();
        b.trust(&a);
        let mut child = begin(&b, &["pull", &id, "--peer", &one.address, "--peer", &two.address]);
        // Spread over the first nine tenths of all bytes by the golden ratio. How much of them comes over which link is not certain.
        let share = (round * 618 + 97) % 1000;
        SlowLink::wait_for_all(&[&one, &two], total * share / 1000 * 9 / 10 + 40_000);
        let stops = round % 2 == 1;
        if stops {
            signal_process(first.pid(), "STOP");
        } else {
            one.cut();
            first.kill();
        }
        let silence = longest_silence(&two, &mut child);
        let ended = child.wait_with_output().expect("it ends");
        let error = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(0), "{error}");
        assert!(silence < REPLACED_WITHIN, "kill {round} at {share} per mille, {silence:?} without a byte");
        let came = one.passed() + two.passed();
        let most = total + total * OVERHEAD_PERCENT / 100 + VAIN_BYTES_MAX;
        assert!(came <= most, "kill {round} at {share} per mille: {came} bytes came of {total}");
        println!("kill {round} at {share} per mille, stopped: {stops}: longest silence {silence:?}, {came} bytes of {total}");
        first.kill();
        first = a.serve();
    }
}

#[test]
fn what_has_arrived_outlives_a_kill_of_whoever_fetches() {
    let a = Node::new();
    let id = a.import(&shipped_model());
    let total = bytes_of_blobs(&a);
    let serving = a.serve();
    for share in [3, 10, 70] {
        let link = SlowLink::to(&serving, BYTES_PER_SECOND);
        let b = Node::new();
        b.trust(&a);
        let mut child = begin(&b, &["pull", &id, "--peer", &link.address]);
        link.wait_for(total * share / 100);
        child.kill().expect("it runs");
        let _ = wait(&mut child);
        let before = link.passed();
        assert_eq!(b.run(&["pull", &id, "--peer", &link.address]).code, Some(0));
        assert_eq!(b.experts(), (192, 192));
        assert_eq!(b.json(&["repo", "verify"])["damaged"], serde_json::json!([]));
        // In vain are the groups that were on their way or not yet on the disk.
        let most = total + total * OVERHEAD_PERCENT / 100 + (3 << 20);
        assert!(link.passed() <= most, "killed at {share}%: {before}, then {} of {total} bytes", link.passed() - before);
    }
}

#[test]
fn a_list_of_hashes_that_does_not_fold_names_the_liar() {
    let a = Node::new();
    let id = a.import(&shipped_model());
    let liar = Liar::start(a.path(), &id, Lie::ForgedHashes);
    let b = Node::new();
    b.trust(&a);
    let alone = b.run(&["pull", &id, "--trunk", "--peer", &liar.address, "--timeout", "3"]);
    assert_eq!(alone.code, Some(5), "{}", alone.err);
    assert!(alone.err.contains("do not fold") && alone.err.contains(&liar.peer), "{}", alone.err);
    let serving = a.serve();
    assert_eq!(b.run(&["pull", &id, "--peer", &liar.address, "--peer", &serving.address]).code, Some(0));
    assert_eq!(b.json(&["repo", "verify"])["damaged"], serde_json::json!([]));
}

/// Placement: a node with room for a part takes what is rare, so that peers together keep everything.
#[test]
fn a_node_with_little_room_takes_what_is_rare() {
    let a = Node::new();
    let id = a.import(&shipped_model());
    let half = (a.json(&["show", &id])["experts"]["bytes_each"].as_u64().expect("a size") * 96).to_string();
    let serving = a.serve();
    let (b, c) = (Node::new(), Node::new());
    b.trust(&a);
    c.trust(&a);
    assert_eq!(b.run(&["pull", &id, "--experts", &half, "--peer", &serving.address]).code, Some(0));
    assert_eq!(b.experts(), (96, 192));
    let second = b.serve();
    let pulled = c.run(&["pull", &id, "--experts", &half, "--peer", &serving.address, "--peer", &second.address]);
    assert_eq!(pulled.code, Some(0), "{}", pulled.err);
    assert_eq!(c.experts(), (96, 192));
    // What C has is what B lacks: from the two of them, all comes together.
    drop(serving);
    let third = c.serve();
    let d = Node::new();
    d.trust(&a);
    assert_eq!(d.run(&["pull", &id, "--peer", &second.address, "--peer", &third.address]).code, Some(0));
    assert_eq!(d.experts(), (192, 192));
}

#[test]
fn uploads_keep_to_their_limit() {
    let a = Node::new();
    let id = a.import(&shipped_model());
    let serving: Serving = a.serve_with(&["--listen", "/ip4/127.0.0.1/tcp/0", "--upload", "4MB"]);
    let b = Node::new();
    b.trust(&a);
    let pulled = b.run(&["pull", &id, "--trunk", "--peer", &serving.address]);
    assert_eq!(pulled.code, Some(0), "{}", pulled.err);
    // The trunk has 7.2 MB, of which a quarter of a second's worth comes at once.
    assert!((1500..4000).contains(&pulled.took.as_millis()), "{:?}", pulled.took);
}
