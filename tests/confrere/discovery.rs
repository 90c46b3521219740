//! Finding peers, and keeping others out: closed groups.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use crate::binary::{Node, text};

fn run<'a>(model: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["run", model, "[5, 60, 200, 7]", "--max-tokens", "5", "--temperature", "0", "--raw"], more].concat()
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
