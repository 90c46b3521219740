//! Experts that run at peers, with real processes: the tokens are those of one machine, whatever the peers do.

use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::Value;

use crate::binary::{Node, Serving, ended, signal_process, text};
use crate::false_executor::{FalseExecutor, Falsehood};
use crate::support::{checkpoint, shipped_model, shipped_model_of_length};

const PROMPT: &str = "[5, 60, 200, 7, 33, 2, 91]";
const LISTEN: [&str; 2] = ["--listen", "/ip4/127.0.0.1/tcp/0"];

/// A node with a packed model `m`, its id, and its answer.
fn owner(path: &Path, precision: &str, run: &[&str]) -> (Node, String, Value) {
    let node = Node::new();
    let imported = node.run(&["import", text(path), "--name", "m", "--precision", precision, "--trunk-precision", precision]);
    assert_eq!(imported.code, Some(0), "{}", imported.err);
    let alone = node.json(&[&["run", "m"], run].concat());
    (node, imported.out.lines().last().expect("the id").to_owned(), alone["tokens"].clone())
}

fn tiny(precision: &str) -> (Node, String, Value) {
    owner(&checkpoint("tiny-qwen3-omni"), precision, &GREEDY)
}

const GREEDY: [&str; 6] = [PROMPT, "--max-tokens", "24", "--temperature", "0", "--raw"];

fn executor(node: &Node) -> Serving {
    node.serve_with(&[&LISTEN[..], &["--execute-for", "any"]].concat())
}

fn greedy<'a>(id: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["run", id], &GREEDY[..], more].concat()
}

fn count(answer: &Value, what: &str) -> u64 {
    answer["experts"][what].as_u64().unwrap_or_else(|| panic!("no count {what} in {answer}"))
}

#[test]
fn a_peer_that_runs_the_experts_gives_the_tokens_of_one_machine() {
    for precision in ["q4", "q8"] {
        let (a, id, alone) = tiny(precision);
        let serving = executor(&a);
        let b = Node::new();
        b.trust(&a);
        let peer = serving.socket().1;
        let answer = b.json(&greedy(&id, &["--peer", &serving.address, "--execute-at", &peer, "--audit", "1"]));
        assert_eq!(answer["tokens"], alone, "{precision}");
        assert!(
            count(&answer, "remote") > 0
                && count(&answer, "fetched") + count(&answer, "remote") + count(&answer, "disk") == count(&answer, "needed"),
            "{answer}"
        );
        let seen = &answer["remote"]["peers"][0];
        assert_eq!((&seen["peer"], &seen["audits"]["different"]), (&Value::from(peer), &Value::from(0)), "{answer}");
        assert!(seen["audits"]["chosen"] == seen["results"] && seen["rows_sent"].as_u64() > Some(0), "{answer}");
    }
}

#[test]
fn nobody_runs_experts_who_was_not_told_to_and_nobody_sees_activations_who_was_not_chosen() {
    let (a, id, alone) = tiny("q4");
    let unwilling = a.serve();
    let b = Node::new();
    b.trust(&a);
    let answer = b.json(&greedy(&id, &["--peer", &unwilling.address, "--execute-at", "any"]));
    assert_eq!((&answer["tokens"], count(&answer, "remote")), (&alone, 0));
    drop(unwilling);
    let only_another = a.serve_with(&[&LISTEN[..], &["--execute-for", &Node::new().id()]].concat());
    let c = Node::new();
    c.trust(&a);
    let ended = c.run(&greedy(&id, &["--peer", &only_another.address, "--execute-at", "any"]));
    assert!(ended.code == Some(0) && ended.err.contains("runs no experts for this node"), "{}", ended.err);
    drop(only_another);
    let willing = executor(&a);
    let d = Node::new();
    d.trust(&a);
    for chosen in [&[][..], &["--execute-at", &Node::new().id()]] {
        let answer = d.json(&greedy(&id, &[&["--peer", &willing.address], chosen].concat()));
        assert_eq!((&answer["tokens"], count(&answer, "remote"), &answer["remote"]["requests"]), (&alone, 0, &Value::from(0)));
    }
}

#[test]
fn weights_without_exact_bits_are_never_run_elsewhere() {
    let (a, id, alone) = owner(&checkpoint("tiny-qwen3-moe"), "bf16", &GREEDY);
    let serving = executor(&a);
    let b = Node::new();
    b.trust(&a);
    let answer = b.json(&greedy(&id, &["--peer", &serving.address, "--execute-at", "any"]));
    assert_eq!((&answer["tokens"], count(&answer, "remote")), (&alone, 0));
}

/// Whatever breaks the protocol, or never answers, is noticed before a result is used.
#[test]
fn a_false_executor_changes_no_token_where_it_breaks_the_protocol() {
    let (a, id, alone) = tiny("q4");
    let serving = executor(&a);
    for falsehood in [
        Falsehood::NotFinite,
        Falsehood::WrongLength,
        Falsehood::NoResults,
        Falsehood::Twice,
        Falsehood::Garbage,
        Falsehood::Silence,
        Falsehood::HangUp,
    ] {
        let liar = FalseExecutor::start(a.path(), falsehood);
        let b = Node::new();
        b.trust(&a);
        let answer = b.json(&greedy(&id, &["--peer", &serving.address, "--peer", &liar.address, "--execute-at", &liar.peer]));
        assert_eq!(answer["tokens"], alone, "{falsehood:?}");
        assert!(liar.requested.load(Ordering::Relaxed) > 0, "{falsehood:?}: it was asked");
        let dropped = answer["remote"]["dropped"].as_array().expect("a list").len();
        let silent = matches!(falsehood, Falsehood::Silence | Falsehood::HangUp);
        assert_eq!(dropped, usize::from(!silent), "{falsehood:?}: {answer}");
    }
}

/// N15, N19: a wrong result is found by computing it again, whichever way it came, and its maker's own signature is kept as evidence.
#[test]
fn a_false_result_is_found_and_its_maker_dropped_with_evidence() {
    let (a, id, alone) = tiny("q4");
    let serving = executor(&a);
    for falsehood in [Falsehood::FlippedBit, Falsehood::OtherReceipt, Falsehood::StolenReceipt] {
        let liar = FalseExecutor::start(a.path(), falsehood);
        let b = Node::new();
        b.trust(&a);
        let run = greedy(&id, &["--peer", &serving.address, "--peer", &liar.address, "--execute-at", &liar.peer, "--audit", "1"]);
        let answer = b.json(&run);
        let dropped = &answer["remote"]["dropped"][0];
        // The last audits may end after the answer: then the warning comes with the end of the command.
        if !dropped.is_null() {
            assert_eq!(dropped["peer"], Value::from(liar.peer.as_str()), "{falsehood:?}");
            assert!(answer["again"] == 0 || answer["tokens"] == alone, "{falsehood:?}: made again, and right");
        }
        if falsehood == Falsehood::StolenReceipt {
            // What it did not sign proves nothing to others.
            assert!(!b.path().join("evidence").exists());
            continue;
        }
        let evidence: Vec<_> = std::fs::read_dir(b.path().join("evidence")).expect("evidence is kept").flatten().collect();
        let record: Value = serde_json::from_slice(&std::fs::read(evidence[0].path()).expect("readable")).expect("JSON");
        assert_eq!(record["peer"], Value::from(liar.peer.as_str()), "{falsehood:?}");
        assert!(record["receipt"].as_str().is_some_and(|receipt| receipt.len() > 200), "{falsehood:?}: {record}");
    }
}

/// Memory that is enough for a run, but not for most of the experts; what the process itself takes differs between machines.
fn little_memory(node: &Node, run: &[&str]) -> String {
    // Enough for the model alone, so that the refusal counts the process too.
    let refused = node.run(&[run, &["--ram", "16MB"]].concat()).err;
    let least = refused.split_once(" would do").and_then(|(before, _)| before.rsplit(' ').next()?.parse::<u64>().ok());
    (least.unwrap_or_else(|| panic!("no figure in {refused}")) + (4 << 20)).to_string()
}

/// N16: executors die while tokens are made.
#[test]
fn executors_that_die_and_come_back_leave_the_text_as_it_is() {
    let prompt = ["fn main() {", "--raw", "--max-tokens", "300", "--temperature", "0"];
    let (a, id, alone) = owner(&shipped_model(), "q4", &prompt);
    let mut first = executor(&a);
    let b = Node::new();
    b.trust(&a);
    // The trunk is here; experts are not.
    assert_eq!(b.run(&["pull", &id, "--trunk", "--peer", &first.address]).code, Some(0));
    let copy = Node::new();
    copy.trust(&a);
    assert_eq!(copy.run(&["pull", &id, "--peer", &first.address]).code, Some(0));
    let second = executor(&copy);
    let ram = little_memory(&b, &[&["run", &id], &prompt[..]].concat());
    let mut command = b.command(
        &[
            &["--json", "run", &id],
            &prompt[..],
            &["--peer", &first.address, "--peer", &second.address, "--execute-at", "any", "--ram", &ram],
        ]
        .concat(),
    );
    let child = std::thread::spawn(move || ended(command.stdin(Stdio::null())));
    std::thread::sleep(Duration::from_millis(400));
    first.kill();
    let ended = child.join().expect("it ends");
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let answer: Value = serde_json::from_str(&ended.out).expect("JSON");
    assert_eq!(answer["tokens"], alone, "{}", ended.err);
    assert!(count(&answer, "remote") > 0, "{answer}");
}

/// N16, N19: one executor is killed and comes back, one stalls, one lies, one takes requests and never answers.
#[test]
fn peers_that_die_stall_lie_and_come_back_change_no_token_and_hold_none_up_for_two_seconds() {
    let prompt = ["fn main() {", "--raw", "--max-tokens", "1000", "--temperature", "0"];
    let model = tempfile::tempdir().expect("a directory");
    shipped_model_of_length(model.path(), 1024);
    let (a, id, alone) = owner(model.path(), "q4", &prompt);
    assert_eq!(alone.as_array().map(Vec::len), Some(1000));
    let mut first = executor(&a);
    let listen = format!("/ip4/127.0.0.1/tcp/{}", first.socket().0.rsplit(':').next().expect("a port"));
    let (b, copy) = (Node::new(), Node::new());
    b.trust(&a);
    copy.trust(&a);
    assert_eq!(b.run(&["pull", &id, "--trunk", "--peer", &first.address]).code, Some(0));
    assert_eq!(copy.run(&["pull", &id, "--peer", &first.address]).code, Some(0));
    let second = executor(&copy);
    let liar = FalseExecutor::start(a.path(), Falsehood::FlippedBit);
    let silent = FalseExecutor::start(a.path(), Falsehood::Silence);
    let mut command = b.command(
        &[
            &["--json", "run", &id],
            &prompt[..],
            &["--peer", &first.address, "--peer", &second.address, "--peer", &liar.address, "--peer", &silent.address],
            &["--execute-at", "any", "--audit", "0.5", "--ram", "72MB", "--kernels", "scalar", "--threads", "1"],
        ]
        .concat(),
    );
    let child = std::thread::spawn(move || ended(command.stdin(Stdio::null())));
    let pause = |ms| std::thread::sleep(Duration::from_millis(ms));
    // Once the text is on its way.
    let begun = (0..6000).any(|_| liar.requested.load(Ordering::Relaxed) > 0 || child.is_finished() || (pause(10), false).1);
    assert!(begun && !child.is_finished(), "the liar is asked before the end: {}", child.join().expect("it ends").err);
    first.kill();
    pause(100);
    signal_process(second.pid(), "STOP");
    let _first = a.serve_with(&["--listen", &listen, "--execute-for", "any"]);
    pause(300);
    signal_process(second.pid(), "CONT");
    let ended = child.join().expect("it ends");
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let answer: Value = serde_json::from_str(&ended.out).expect("JSON");
    assert_eq!(answer["tokens"], alone, "{}", ended.err);
    let lost = answer["remote"]["broken"].as_u64().zip(answer["remote"]["hedged"].as_u64()).expect("counts");
    assert!(count(&answer, "remote_uses") > 0 && lost.0 + lost.1 > 0, "{answer}");
    assert!(answer["token_ms"]["max"].as_f64() < Some(2000.0), "{answer}");
    assert_eq!(answer["remote"]["dropped"][0]["peer"], Value::from(liar.peer.as_str()), "{answer}");
    println!("{}; made again {} times; requests lost and late: {lost:?}", answer["token_ms"], answer["again"]);
}
