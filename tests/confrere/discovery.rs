//! Finding peers, and keeping others out: closed groups, the address book, and nodes that know of others.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use crate::binary::{Node, text};
use crate::hostile::Pretender;

fn run<'a>(model: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["run", model, "[5, 60, 7]", "--max-tokens", "5", "--temperature", "0", "--raw"], more].concat()
}

/// A key file in a node's directory.
fn key_file(node: &Node, name: &str, content: &str, mode: u32) -> PathBuf {
    let path = node.path().join(name);
    std::fs::write(&path, content).expect("writable");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("its owner may");
    path
}

#[test]
fn a_closed_group_works_inside_and_refuses_all_others() {
    let (a, id) = Node::with("variant-tied");
    let alone = a.json(&run("m", &[]));
    let digits = "5a".repeat(32);
    let of_a = key_file(&a, "group", &digits, 0o600);
    let serving = a.serve_with(&["--listen", "127.0.0.1:0", "--private", text(&of_a)]);
    assert!(!serving.ticket.is_empty() && serving.address.contains("/tcp/"), "{}", serving.address);
    let b = Node::new();
    b.trust(&a);
    // The other form of the same key.
    let swarm_key = format!("/key/swarm/psk/1.0.0/\n/base16/\n{digits}\n");
    let of_b = key_file(&b, "swarm.key", &swarm_key, 0o600);
    let others = key_file(&b, "others", &"5b".repeat(32), 0o600);
    let peer = ["--peer", &serving.address, "--timeout", "3"];
    for outsider in [&[][..], &["--private", text(&others)]] {
        let ended = b.run(&run(&id, &[&peer[..], outsider].concat()));
        assert_eq!(ended.code, Some(4), "{outsider:?}: {}", ended.err);
        assert_eq!(b.json(&["ls"]), serde_json::json!([]), "not even the manifest got out");
    }
    let answer = b.json(&run(&id, &[&peer[..], &["--private", text(&of_b)]].concat()));
    assert_eq!(answer["tokens"], alone["tokens"]);
    let c = Node::new();
    let joined = c.run(&["join", &serving.ticket, "--private", text(&of_b)]);
    assert_eq!((joined.code, joined.out.trim()), (Some(0), format!("{id}  m").as_str()), "{}", joined.err);
}

#[test]
fn a_group_s_key_is_kept_from_others_and_quic_does_not_go_past_it() {
    let a = Node::new();
    let key = "5a".repeat(32);
    let open = key_file(&a, "open", &key, 0o644);
    let refused = a.run(&["serve", "--private", text(&open)]);
    assert_eq!(refused.code, Some(7), "{}", refused.err);
    assert!(refused.err.contains("chmod 600") && !refused.err.contains(&key), "{}", refused.err);
    let bad = key_file(&a, "bad", &key[1..], 0o600);
    assert_eq!(a.run(&["serve", "--private", text(&bad)]).code, Some(2));
    assert_eq!(a.run(&["serve", "--private", "/nowhere"]).code, Some(3));
    let good = key_file(&a, "good", &key, 0o600);
    let quic = a.run(&["serve", "--private", text(&good), "--listen", "/ip4/127.0.0.1/udp/0/quic-v1"]);
    assert_eq!(quic.code, Some(2), "{}", quic.err);
}

#[test]
fn a_peer_that_was_of_use_is_asked_again_without_being_named() {
    let (a, id) = Node::with("variant-tied");
    let alone = a.json(&run("m", &[]));
    let serving = a.serve();
    let b = Node::new();
    b.trust(&a);
    assert_eq!(b.json(&["peers"]), serde_json::json!([]));
    assert_eq!(b.run(&["pull", &id, "--trunk", "--peer", &serving.address]).code, Some(0));
    let book = b.json(&["peers"]);
    assert_eq!(
        (&book[0]["address"], &book[0]["source"], &book[0]["served"]),
        (&serving.address.as_str().into(), &"named".into(), &1.into())
    );
    let said = &book[0]["status"];
    assert_eq!((&book[0]["connected"], &said["executes"]), (&true.into(), &false.into()), "{book}");
    assert!(said["round_trip_ms"].as_f64().is_some_and(|ms| ms > 0.0) && said["stored_bytes"].as_u64() > Some(0), "{book}");
    let held = &said["holdings"][0];
    assert_eq!((&held["name"], &held["model"]), (&"m".into(), &id.as_str().into()));
    assert!(held["experts"] == held["of"] && held["of"].as_u64() > Some(0), "{book}");
    let answer = b.json(&run(&id, &[]));
    assert_eq!(answer["tokens"], alone["tokens"]);
    assert_eq!(answer["experts"]["fetched"], answer["experts"]["needed"]);
    assert_eq!(b.json(&["peers"])[0]["served"], 2);
    // A damaged book is an empty one, and losing it loses nothing else.
    std::fs::write(b.path().join("met"), b"\xff\xfe garbage\n").expect("writable");
    assert_eq!(b.run(&run(&id, &["--peer", &serving.address])).code, Some(0));
}

/// N12, scaled: nine tenths of the book accept connections and are silent, or refuse them; the honest one is reached each time.
#[test]
fn a_book_that_is_nine_tenths_hostile_does_not_keep_a_node_from_the_honest() {
    let (a, id) = Node::with("variant-tied");
    let serving = a.serve();
    let b = Node::new();
    b.trust(&a);
    assert_eq!(b.run(&["pull", &id, "--trunk", "--peer", &serving.address]).code, Some(0));
    let honest = std::fs::read_to_string(b.path().join("met")).expect("a book");
    let honest = honest.trim();
    let peer = |i: usize| {
        let node = Node::new();
        let peer = node.json(&["id"])["peer_id"].as_str().expect("an id").to_owned();
        (format!("127.0.{i}.1"), peer)
    };
    let mut silent = Vec::new();
    let mut lines = vec![honest.replace(" 1 0 named", " 0 0 named")];
    for i in 1..28 {
        let (ip, peer) = peer(i);
        let socket = TcpListener::bind((ip.as_str(), 0)).expect("a port");
        let port = socket.local_addr().expect("an address").port();
        // They pretend to have been of use before; every third is not there at all.
        lines.push(format!("/ip4/{ip}/tcp/{port}/p2p/{peer} 9999999999999 3 0 named"));
        if i % 3 != 0 {
            silent.push(socket);
        }
    }
    for restart in 0..5 {
        std::fs::write(b.path().join("met"), lines.join("\n")).expect("writable");
        let pulled = b.run(&["pull", &id, "--timeout", "20"]);
        assert_eq!(pulled.code, Some(0), "restart {restart}: {}", pulled.err);
        assert!(b.experts().0 > 0);
        assert!(pulled.took < Duration::from_secs(15), "{:?}", pulled.took);
        for prefix in std::fs::read_dir(b.path().join("store/blobs")).expect("blobs").flatten() {
            std::fs::remove_dir_all(prefix.path()).expect("removable");
        }
    }
    drop(silent);
}

#[test]
fn a_model_s_peer_is_found_through_a_third_node() {
    let (a, id) = Node::with("variant-tied");
    let alone = a.json(&run("m", &[]));
    let b = Node::new();
    let knows = b.serve();
    let _serving = a.serve_with(&["--listen", "/ip4/127.0.0.1/tcp/0", "--peer", &knows.address]);
    let c = Node::new();
    c.trust(&a);
    // It takes a moment until A has told B.
    let mut answer = c.run(&run(&id, &["--json", "--peer", &knows.address]));
    for _ in 0..50 {
        if answer.code == Some(0) {
            break;
        }
        assert!(answer.err.contains("none of"), "{}", answer.err);
        std::thread::sleep(Duration::from_millis(100));
        answer = c.run(&run(&id, &["--json", "--peer", &knows.address]));
    }
    assert_eq!(answer.code, Some(0), "{}", answer.err);
    let answer: serde_json::Value = serde_json::from_str(&answer.out).expect("JSON");
    assert_eq!(answer["tokens"], alone["tokens"]);
    assert_eq!(c.json(&["peers"])[0]["source"], "found");
    // What B does not know of is said at once, though B was asked for others.
    let unknown = "0".repeat(64);
    let ended = c.run(&["pull", &unknown, "--peer", &knows.address]);
    assert_eq!(ended.code, Some(4), "{}", ended.err);
    assert!(ended.took < Duration::from_secs(8), "{:?}", ended.took);
}

/// N13: whoever says that he has the model costs a dial each, and not the model.
#[test]
fn those_who_pretend_to_have_a_model_do_not_hide_who_has_it() {
    let (a, id) = Node::with("variant-tied");
    let alone = a.json(&run("m", &[]));
    let b = Node::new();
    let knows = b.serve();
    let sockets: Vec<_> = (0..6).map(|_| TcpListener::bind("127.0.0.1:0").expect("a port")).collect();
    let port = |socket: &TcpListener| socket.local_addr().expect("an address").port();
    let pretend = |socket| Pretender::tell(&knows.address, &id, &format!("/ip4/127.0.0.1/tcp/{}", port(socket)));
    let _pretenders: Vec<_> = sockets.iter().map(pretend).collect();
    let _serving = a.serve_with(&["--listen", "/ip4/127.0.0.1/tcp/0", "--peer", &knows.address]);
    std::thread::sleep(Duration::from_secs(2)); // until A has told B
    let c = Node::new();
    c.trust(&a);
    let dials = |socket: &TcpListener| {
        socket.set_nonblocking(true).expect("it can be asked");
        std::iter::from_fn(|| socket.accept().ok()).count()
    };
    let before: Vec<_> = sockets.iter().map(dials).collect();
    let ended = c.run(&run(&id, &["--json", "--timeout", "20", "--peer", &knows.address]));
    let during: Vec<_> = sockets.iter().map(dials).collect();
    eprintln!("dials of pretenders: {before:?} by the hosts before, {during:?} while C looked for {:?}", ended.took);
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let answer: serde_json::Value = serde_json::from_str(&ended.out).expect("JSON");
    assert_eq!(answer["tokens"], alone["tokens"]);
    // The search dials each once, and so does the table in each of its questions.
    assert!(during.iter().all(|&dials| dials <= 2), "{during:?}");
}
