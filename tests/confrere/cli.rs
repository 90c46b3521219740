//! The command contract on one node: what is printed, what is kept, and the exit codes that scripts rely on.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::json;

use crate::binary::{Node, binary, ended, signal, text, wait};
use crate::refusals::{BROKEN, write_sound};
use crate::support::{checkpoint, floats, ids, read_safetensors, shipped_model, vectors};

#[test]
fn an_empty_store_lists_nothing_and_an_import_shows_up() {
    let node = Node::new();
    assert_eq!(node.json(&["ls"]), json!([]));
    let id = node.import(&checkpoint("tiny-qwen3-moe"));
    assert!(id.len() == 64 && id.chars().all(|c| c.is_ascii_hexdigit()), "{id}");
    let listed = node.json(&["ls"]);
    assert_eq!((&listed[0]["name"], &listed[0]["id"]), (&json!("m"), &json!(id)));
    assert_eq!(listed[0]["experts"], json!({"have": 32, "all": 32}));
    assert_eq!(node.import(&checkpoint("tiny-qwen3-moe")), id);
    assert_eq!(node.json(&["show", &id[..9]])["id"], json!(id));
    assert_eq!(node.run(&["rm", "m"]).code, Some(0));
    assert_eq!(node.json(&["repo", "stat"])["blobs"], json!(0));
}

#[test]
fn models_are_narrowed_planned_traced_and_measured() {
    let (node, _) = Node::with("tiny-qwen3-moe");
    let narrowed = node.json(&["requantize", "m", "q4"])["id"].clone();
    let imported = Node::new().json(&["import", text(&checkpoint("tiny-qwen3-moe")), "--name", "m", "--precision", "q4"])["id"].clone();
    assert!(narrowed.is_string() && narrowed == imported, "{narrowed} {imported}");

    let listed = node.json(&["show", "m-q4", "--blobs"]);
    let blobs = listed["blobs"].as_array().expect("a list");
    assert_eq!(blobs.iter().filter(|blob| blob["name"].as_str().is_some_and(|name| name.starts_with("layer "))).count(), 32);
    assert!(blobs.iter().any(|blob| blob["name"] == "model.embed_tokens.weight" && blob["precision"] == "q6"));

    let plan = node.json(&["plan", "m", "--memory", "1GiB"]);
    let ways = plan["ways"].as_array().expect("a list");
    assert!(ways.len() == 6 && ways.iter().all(|way| way["fits"] == true && way["hits"] == 1.0), "{plan}");
    let refused = node.run(&["plan", "m", "--memory", "1MiB"]);
    assert!(refused.out.contains("does not run in 1.00 MiB") && refused.out.contains("MiB would do"), "{}", refused.out);

    let rows = node.json(&["bench", "speed", "m-q4", "--threads", "1", "--prefill", "8", "--decode", "4", "--runs", "1"]);
    let phases: Vec<_> = rows.as_array().expect("a list").iter().map(|row| row["phase"].clone()).collect();
    assert_eq!(phases, [json!("decode"), json!("prefill")]);
    assert!(rows[0]["tokens_per_second"]["median"].as_f64().is_some_and(|speed| speed > 0.0), "{rows}");

    let trace = node.path().join("trace");
    node.json(&["run", "m", "[1,2,3]", "--max-tokens", "8", "--trace", text(&trace)]);
    let hits = node.json(&["bench", "trace", text(&trace)]);
    for policy in ["lru", "lfu", "s3-fifo"] {
        let [of_policy, best] = [&hits[0][policy], &hits[0]["belady"]].map(|hits| hits.as_f64().expect("a number"));
        assert!(0.0 < of_policy && of_policy <= best && best < 1.0, "{hits}");
    }
    fs::write(&trace, "no trace").expect("it is written");
    assert_eq!(node.run(&["bench", "trace", text(&trace)]).code, Some(2));
}

#[test]
fn a_refused_checkpoint_exits_5_with_its_faults_and_leaves_nothing() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for (i, (what, damage, expected)) in BROKEN.into_iter().enumerate() {
        let (node, path) = (Node::new(), dir.path().join(i.to_string()));
        write_sound(&path);
        damage(&path);
        let ended = node.run(&["import", text(&path), "--name", "m"]);
        assert_eq!(ended.code, Some(5), "{what}: {}", ended.err);
        assert!(ended.err.contains(expected), "{what}: {}", ended.err);
        assert_eq!(node.json(&["ls"]), json!([]), "{what}");
        assert_eq!(node.json(&["repo", "stat"])["blobs"], json!(0), "{what}");
    }
}

#[test]
fn exit_codes_say_what_kind_of_failure_it_is() {
    let (node, _) = Node::with("tiny-qwen3-moe");
    let nobody = "/ip4/127.0.0.1/tcp/1";
    let unknown = "0".repeat(64);
    let cases: [(&[&str], i32, &str); 12] = [
        (&["run", "absent", "x"], 3, "no model is called absent (known: m)"),
        (&["show", "ffff"], 3, "no model is called ffff"),
        (&["import", "/nowhere"], 3, "cannot read /nowhere"),
        (&["run", "m", "hello"], 2, "must be token ids"),
        (&["run", "m", "[]"], 2, "the prompt is empty"),
        (&["run", "m", "[600]"], 2, "beyond the model's vocabulary"),
        (&["run", "m", "[1]", "--ram", "100kB"], 2, "bytes of memory are not enough"),
        (&["run", "m", "[1]", "--temperature", "hot"], 2, "not a number"),
        (&["frobnicate"], 2, "unrecognized subcommand"),
        (&["publishers", "rm", "ed25519:00"], 2, "64 hexadecimal digits"),
        (&["run", &unknown, "[1]"], 4, "no peer is known"),
        (&["run", &unknown, "[1]", "--peer", nobody, "--timeout", "0.5"], 4, "does not answer"),
    ];
    for (args, code, message) in cases {
        let ended = node.run(args);
        assert_eq!(ended.code, Some(code), "{args:?}: {}", ended.err);
        assert!(ended.err.contains(message), "{args:?}: {}", ended.err);
        assert!(ended.out.is_empty(), "{args:?} printed {:?}", ended.out);
    }
}

#[test]
fn without_any_peer_it_fails_at_once() {
    let ended = Node::new().run(&["run", &"0".repeat(64), "x"]);
    assert_eq!(ended.code, Some(4));
    assert!(ended.took < Duration::from_secs(2), "{:?}", ended.took);
}

#[test]
fn a_second_process_is_kept_out_by_name() {
    let (node, _) = Node::with("tiny-qwen3-moe");
    let serving = node.serve_with(&["--listen", "/ip4/127.0.0.1/tcp/0", "--api", "off"]);
    let ended = node.run(&["run", "m", "[1]"]);
    assert_eq!(ended.code, Some(8));
    assert!(ended.err.contains(&format!("in use by process {}", serving.pid())), "{}", ended.err);
    assert_eq!(serving.stop(), Some(0));
    assert_eq!(node.run(&["run", "m", "[1]", "--max-tokens", "1"]).code, Some(0));
}

#[test]
fn the_key_is_its_owners_alone() {
    let node = Node::new();
    let id = node.id();
    assert!(id.starts_with("ed25519:"), "{id}");
    assert_eq!(node.id(), id);
    let path = node.path().join("key");
    assert_eq!(fs::metadata(&path).expect("a key").permissions().mode() & 0o777, 0o600);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("changed");
    let ended = node.run(&["id"]);
    assert_eq!(ended.code, Some(7), "{}", ended.err);
    assert!(ended.err.contains("chmod 600"), "{}", ended.err);
}

#[test]
fn publishers_are_kept_and_forgotten() {
    let (node, other) = (Node::new(), Node::new());
    let key = other.id();
    assert_eq!(node.json(&["publishers", "ls"]), json!([]));
    node.trust(&other);
    node.trust(&other);
    assert_eq!(node.json(&["publishers", "ls"]), json!([key]));
    assert_eq!(node.run(&["publishers", "rm", &key]).code, Some(0));
    assert_eq!(node.run(&["publishers", "rm", &key]).code, Some(3));
}

#[test]
fn eval_logits_writes_what_transformers_computes() {
    let (node, _) = Node::with("tiny-qwen3-omni");
    let reference = read_safetensors(&vectors("reference/omni_text.safetensors"));
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (tokens, out) = (dir.path().join("ids.json"), dir.path().join("out.safetensors"));
    fs::write(&tokens, serde_json::to_string(&ids(&reference["input_ids"])).expect("JSON")).expect("written");
    for engine in [&[][..], &["--reference"]] {
        let args = [&["eval", "logits", "m", "--tokens", text(&tokens), "--out", text(&out)], engine].concat();
        assert_eq!(node.run(&args).code, Some(0));
        let found = &read_safetensors(&out)["logits"];
        assert_eq!(found.shape, [20, 512]);
        let worst = floats(found).iter().zip(floats(&reference["logits"])).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-4, "{worst}");
    }
}

#[test]
fn global_flags_work_on_either_side_and_json_is_one_value() {
    let (node, _) = Node::with("tiny-qwen3-moe");
    let run = ["run", "m", "[5, 6]", "--max-tokens", "4", "--temperature", "0", "--raw"];
    let after = node.json(&run);
    let before = ended(Command::new(binary()).arg("--json").arg("--data-dir").arg(node.path()).args(run));
    let mut before: serde_json::Value = serde_json::from_str(&before.out).expect("one JSON value");
    // What a run took differs from run to run; what it said does not.
    for measured in ["tokens_per_second", "token_ms", "memory"] {
        before[measured] = after[measured].clone();
    }
    assert_eq!(before, after);
    let memory = |name: &str| after["memory"][name].as_u64().expect("bytes");
    assert!(memory("counted") > 0 && memory("counted") <= memory("limit") && memory("resident") > 0, "{after}");
    assert_eq!(after["tokens"].as_array().map(Vec::len), Some(4));
    let needed = after["experts"]["needed"].as_u64().expect("a count");
    assert!(needed > 0 && after["experts"]["disk"] == needed && after["experts"]["fetched"] == 0, "{after}");
}

#[test]
fn a_prompt_comes_from_standard_input_too() {
    let (node, _) = Node::with("tiny-qwen3-moe");
    let mut child = node.command(&["run", "m", "--json", "--max-tokens", "2", "--temperature", "0"]);
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("it starts");
    std::io::Write::write_all(&mut child.stdin.take().expect("piped"), b"[5, 6]\n").expect("written");
    let output = child.wait_with_output().expect("it ends");
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(answer["tokens"], node.json(&["run", "m", "[5, 6]", "--max-tokens", "2", "--temperature", "0"])["tokens"]);
}

#[test]
fn a_quota_that_is_too_small_exits_6_and_leaves_nothing() {
    let node = Node::new();
    let ended = node.run(&["import", text(&checkpoint("tiny-qwen3-moe")), "--disk", "500kB"]);
    assert_eq!(ended.code, Some(6), "{}", ended.err);
    assert!(ended.err.contains("disk quota"), "{}", ended.err);
    assert_eq!((node.json(&["ls"]), &node.json(&["repo", "stat"])["blobs"]), (json!([]), &json!(0)));
}

/// S4: a filesystem of 1 MiB under a model of 1.8.
#[test]
fn a_full_disk_exits_6_and_leaves_the_node_usable() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "confrere-test"]).arg(dir.path()).output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        println!("skipped: mounting a small filesystem needs root");
        return;
    }
    let run = |args: &[&str]| ended(Command::new(binary()).arg("--data-dir").arg(dir.path()).args(args));
    let small = run(&["import", text(&checkpoint("variant-tied")), "--name", "small"]);
    let large = run(&["import", text(&checkpoint("tiny-qwen3-moe")), "--name", "large"]);
    let after = run(&["run", "small", "[1, 2]", "--max-tokens", "2", "--json"]);
    let unmounted = Command::new("umount").arg(dir.path()).status();
    assert!(unmounted.expect("umount runs").success());
    assert_eq!(small.code, Some(0), "{}", small.err);
    assert_eq!(large.code, Some(6), "{}", large.err);
    assert!(large.err.contains("no space left"), "{}", large.err);
    assert_eq!(after.code, Some(0), "{}", after.err);
}

#[test]
fn verify_finds_a_damaged_blob_and_another_import_heals_it() {
    let (node, _) = Node::with("tiny-qwen3-moe");
    assert_eq!(node.json(&["repo", "verify"])["verified"], 32 + 4 * 9 + 3);
    let blob = first_file(&node.path().join("store/blobs"));
    let mut bytes = fs::read(&blob).expect("a blob");
    bytes[70] ^= 1;
    fs::write(&blob, bytes).expect("writable");
    let ended = node.run(&["repo", "verify"]);
    assert_eq!(ended.code, Some(5), "{}", ended.err);
    assert!(ended.out.contains("put into quarantine: b3:"), "{}", ended.out);
    node.import(&checkpoint("tiny-qwen3-moe"));
    assert_eq!(node.json(&["repo", "verify"])["damaged"], json!([]));
}

fn first_file(dir: &std::path::Path) -> std::path::PathBuf {
    let mut entries: Vec<_> = fs::read_dir(dir).expect("a directory").flatten().map(|entry| entry.path()).collect();
    entries.sort();
    let first = entries.into_iter().find(|path| path.is_file() || fs::read_dir(path).is_ok_and(|mut files| files.next().is_some()));
    let first = first.expect("something is there");
    if first.is_file() { first } else { first_file(&first) }
}

/// S1 at the scale of CI: killed at some point, an import goes on and ends in the same model, and nothing is damaged.
#[test]
fn an_import_killed_anywhere_ends_in_the_same_model() {
    let model = shipped_model();
    let expected = Node::new().import(&model);
    let node = Node::new();
    for i in 0..20 {
        let mut child =
            node.command(&["import", text(&model), "--name", "m"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
        std::thread::sleep(Duration::from_millis(3 + 17 * i));
        signal_or_gone(&mut child, "KILL");
        let verified = node.json(&["repo", "verify"]);
        assert_eq!(verified["damaged"], json!([]), "after kill {i}");
    }
    assert_eq!(node.import(&model), expected);
    assert_eq!(node.experts().0, node.experts().1);
}

#[test]
fn an_import_interrupted_exits_130_and_can_go_on() {
    let model = shipped_model();
    let expected = Node::new().import(&model);
    let mut interrupted = 0;
    for _ in 0..40 {
        let node = Node::new();
        let has_begun = || fs::read_dir(node.path().join("store/blobs")).is_ok_and(|mut blobs| blobs.next().is_some());
        let mut child =
            node.command(&["import", text(&model), "--name", "m"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
        while !has_begun() && child.try_wait().expect("it can be waited for").is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        signal_or_gone(&mut child, "INT");
        match wait(&mut child).expect("it stops") {
            Some(130) => interrupted += 1,
            Some(0) => continue, // it was over before the signal came
            other => panic!("exit code {other:?}"),
        }
        assert_eq!(node.import(&model), expected);
        if interrupted > 1 {
            return;
        }
    }
    panic!("never interrupted");
}

fn signal_or_gone(child: &mut std::process::Child, name: &str) {
    if child.try_wait().expect("it can be waited for").is_none() {
        signal(child, name);
    }
    if name == "KILL" {
        let _ = child.wait();
    }
}
