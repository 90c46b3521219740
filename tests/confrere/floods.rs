//! Strangers who try to take a node's connections, streams, threads or memory for themselves: the node answers its own users, and whoever means
//! well is let in, all the while.
#![expect(clippy::disallowed_methods, reason = "how long others wait beside a flood is told by a clock")]

use std::io::Write as _;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures::AsyncReadExt as _;
use protocol::execute::EXECUTE_PROTOCOL;
use protocol::message::{FETCH_PROTOCOL, STREAM_ACK};
use protocol::query::QUERY_PROTOCOL;
use serde_json::json;
use tokio::runtime::Runtime;

use crate::api::Door;
use crate::binary::{Node, Serving, api_json, free_port, http_get, text};
use crate::crowd::{connect, open, resident_bytes};
use crate::false_executor::{FalseExecutor, Falsehood};
use crate::support::{checkpoint, shipped_model};

const LISTEN: [&str; 2] = ["--listen", "/ip4/127.0.0.1/tcp/0"];
/// Ten times what a node should take to say that it is there, and an honest peer to join.
const HEALTH_MAX: Duration = Duration::from_secs(1);
const JOIN_MAX: Duration = Duration::from_secs(8);

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
}

/// Identities that each open so many streams and say nothing on them.
fn silent(runtime: &Runtime, address: &str, identities: usize, streams: usize, protocol: &'static str) {
    for _ in 0..identities {
        let address = address.to_owned();
        runtime.spawn(async move {
            let (peer, mut control) = connect(&address).await?;
            let mut held = Vec::new();
            for _ in 0..streams {
                held.extend(open(peer, &mut control, protocol).await);
            }
            tokio::time::sleep(Duration::from_secs(600)).await;
            drop(held);
            Some(())
        });
    }
}

/// A new node joins by a ticket; returns how long that took.
fn join(serving: &Serving) -> Duration {
    let node = Node::new();
    let joined = node.run(&["join", &serving.ticket]);
    assert!(joined.code == Some(0) && !joined.err.contains("does not answer"), "{}", joined.err);
    joined.took
}

/// How long a node takes to say that it is there.
fn health(api: &str) -> Duration {
    let began = Instant::now();
    let answer = http_get(api, "/health", api);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    began.elapsed()
}

/// P1: results that are sent again without end neither block the threads of those who ask for nothing, nor fill their memory.
#[test]
fn results_without_end_stop_nobody() {
    let a = Node::new();
    let imported = a.run(&["import", text(&shipped_model()), "--name", "m", "--precision", "q4"]);
    assert_eq!(imported.code, Some(0), "{}", imported.err);
    let alone = a.json(&["run", "m", "Once upon a time", "--max-tokens", "8", "--temperature", "0", "--raw"]);
    // As many as there are threads to block.
    let liars: Vec<_> = (0..4).map(|number| FalseExecutor::numbered(a.path(), Falsehood::WithoutEnd, number)).collect();
    let peers: Vec<_> = liars.iter().flat_map(|liar| ["--peer", &liar.address]).collect();
    let door = Door::of(a, String::new(), &[&["--execute-at", "any", "--model", "m", "--ram", "100MB"], &peers[..]].concat());
    let (serving, api) = (&door.serving, &door.api);
    let ask = json!({"model": "m", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "return_token_ids": true});
    let answer = door.answer("/v1/completions", &ask);
    assert_eq!(answer["choices"][0]["text"], alone["text"], "{answer}");
    let before = resident_bytes(serving.pid());
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(4) {
        assert!(health(api) < HEALTH_MAX);
        std::thread::sleep(Duration::from_millis(100));
    }
    let requested = liars.iter().filter(|liar| liar.requested.load(Ordering::Relaxed) > 0).count();
    let after = resident_bytes(serving.pid());
    println!("{requested} were asked; {before} bytes before, {after} after");
    assert!(requested > 0 && after < before + (64 << 20));
    let answer = door.answer("/v1/completions", &ask);
    assert_eq!(answer["choices"][0]["text"], alone["text"], "{answer}");
    assert_eq!(door.serving.stop(), Some(0));
}

/// P2: a stranger gets no execute stream, and one of those who may gets no more than its share.
#[test]
fn a_stranger_takes_no_execute_stream() {
    let a = Node::new();
    let imported = a.run(&["import", text(&checkpoint("tiny-qwen3-omni")), "--name", "m", "--precision", "q4"]);
    assert_eq!(imported.code, Some(0), "{}", imported.err);
    let id = imported.out.lines().last().expect("the id").to_owned();
    let friend = Node::new();
    let serving = a.serve_with(&[&LISTEN[..], &["--execute-for", &friend.id()]].concat());
    let runtime = runtime();
    silent(&runtime, &serving.address, 4, 40, EXECUTE_PROTOCOL);
    std::thread::sleep(Duration::from_secs(1));
    friend.trust(&a);
    let run =
        ["run", &id, "[5, 60, 200]", "--max-tokens", "8", "--temperature", "0", "--raw", "--peer", &serving.address, "--execute-at", "any"];
    let answer = friend.json(&run);
    assert!(answer["experts"]["remote"].as_u64() > Some(0), "{answer}");
}

/// P3, P8: silent identities keep nobody from fetching or asking, nor from connecting.
#[test]
fn silent_identities_hold_no_place_that_another_needs() {
    let (a, _) = Node::with("variant-tied");
    let api = format!("127.0.0.1:{}", free_port());
    let serving = a.serve_with(&[&LISTEN[..], &["--api", &api]].concat());
    let runtime = runtime();
    silent(&runtime, &serving.address, 40, 8, FETCH_PROTOCOL);
    silent(&runtime, &serving.address, 40, 8, QUERY_PROTOCOL);
    std::thread::sleep(Duration::from_secs(2));
    for _ in 0..2 {
        let (joined, health) = (join(&serving), health(&api));
        println!("beside silent streams: joined in {joined:?}, health in {health:?}");
        assert!(joined < JOIN_MAX && health < HEALTH_MAX);
    }
    silent(&runtime, &serving.address, 90, 1, FETCH_PROTOCOL);
    std::thread::sleep(Duration::from_secs(4));
    for _ in 0..2 {
        let (joined, health) = (join(&serving), health(&api));
        println!("beside 170 identities: joined in {joined:?}, health in {health:?}");
        assert!(joined < JOIN_MAX && health < HEALTH_MAX);
    }
    assert!(api_json(&api, "/api/peers").as_array().expect("a list").len() <= 128);
}

/// P7: connections that never prove who they are keep no newcomer out.
#[test]
fn half_open_connections_keep_nobody_out() {
    let (a, _) = Node::with("variant-tied");
    let serving = a.serve();
    let (socket, _) = serving.socket();
    let stop = Arc::new(AtomicBool::new(false));
    let flood = {
        let stop = Arc::clone(&stop);
        std::thread::spawn(move || {
            let mut held = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                // Those that were cut are opened again.
                held.retain(|stream: &TcpStream| stream.set_nonblocking(true).is_ok() && !is_closed(stream));
                if held.len() < 120
                    && let Ok(mut stream) = TcpStream::connect(&socket)
                    && stream.write_all(b"\x13/multistream/1.0.0\n\x07/noise\n").is_ok()
                {
                    held.push(stream);
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        })
    };
    std::thread::sleep(Duration::from_secs(2));
    let joined: Vec<_> = (0..4).map(|_| join(&serving)).collect();
    stop.store(true, Ordering::Relaxed);
    flood.join().expect("it ends");
    println!("beside half-open connections: joined in {joined:?}");
    assert!(joined.iter().all(|took| *took < JOIN_MAX), "{joined:?}");
}

fn is_closed(stream: &TcpStream) -> bool {
    let mut byte = [0; 64];
    loop {
        match std::io::Read::read(&mut { stream }, &mut byte) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() != std::io::ErrorKind::WouldBlock,
        }
    }
}

/// H1: clients that send a little of a head now and then keep no other out.
#[test]
fn slow_clients_keep_nobody_out() {
    let node = Node::new();
    let api = format!("127.0.0.1:{}", free_port());
    let _serving = node.serve_with(&[&LISTEN[..], &["--api", &api]].concat());
    let mut slow: Vec<TcpStream> = Vec::new();
    let mut longest = Duration::ZERO;
    for round in 0..20 {
        while slow.len() < 700 {
            let mut stream = TcpStream::connect(&api).expect("connections are always taken");
            let _ = stream.write_all(b"GET /health HTTP/1.1\r\n");
            slow.push(stream);
        }
        slow.retain_mut(|stream| stream.write_all(format!("X-{round}: y\r\n").as_bytes()).is_ok());
        longest = longest.max(health(&api));
    }
    println!("beside 700 slow clients, health took {longest:?} at most");
    assert!(longest < HEALTH_MAX);
}

/// P10: what is no expert of a model here is never read for a peer, however large it is.
#[test]
fn a_trunk_s_table_is_not_run_as_an_expert() {
    use futures::AsyncWriteExt as _;
    use protocol::execute::{ANSWER_HEAD_BYTES, ExecuteAnswer, ExecuteRequest, Task, row_bytes};
    let a = Node::new();
    let imported = a.run(&["import", text(&shipped_model()), "--name", "m", "--precision", "q4"]);
    let id: protocol::ModelId = imported.out.lines().last().expect("the id").parse().expect("an id");
    let envelope = std::fs::read(a.path().join("manifests").join(id.to_string())).expect("a manifest");
    let (manifest, _) = protocol::ModelManifest::open(id, envelope).expect("a valid manifest");
    let largest = manifest.text().trunk.iter().max_by_key(|tensor| tensor.blob.length).expect("a trunk").blob;
    let serving = a.serve_with(&[&LISTEN[..], &["--execute-for", "any"]].concat());
    let (before, runtime) = (resident_bytes(serving.pid()), runtime());
    let hidden_size = manifest.decoder().hidden_size;
    runtime.block_on(async {
        let (peer, mut control) = connect(&serving.address).await.expect("it is let in");
        let mut stream = open(peer, &mut control, EXECUTE_PROTOCOL).await.expect("a stream");
        let mut ack = [0];
        stream.read_exact(&mut ack).await.expect("an acknowledgement");
        assert_eq!(ack, [STREAM_ACK]);
        for number in 0..50 {
            let rows = vec![0; row_bytes(hidden_size as usize)];
            let tasks = vec![Task { expert: largest.hash, rows: vec![0] }];
            let request = ExecuteRequest { number, nonce: [0; 16], hidden_size, rows, tasks };
            stream.write_all(&request.to_bytes()).await.expect("sent");
            stream.flush().await.expect("sent");
            let mut head = [0; ANSWER_HEAD_BYTES];
            stream.read_exact(&mut head).await.expect("an answer");
            assert_eq!(ExecuteAnswer::from_bytes(&head), Ok((number, ExecuteAnswer::NotHave { task: 0 })));
            stream.read_exact(&mut head).await.expect("a receipt");
            let Ok((_, ExecuteAnswer::Done { length })) = ExecuteAnswer::from_bytes(&head) else { panic!("no receipt") };
            stream.read_exact(&mut vec![0; length as usize]).await.expect("a receipt");
        }
    });
    assert!(resident_bytes(serving.pid()) < before + (16 << 20));
}
