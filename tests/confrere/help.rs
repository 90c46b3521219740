//! What the command line says of itself: help texts as they were last looked at, completions, manual, settings, and the doctor.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use serde_json::{Value, json};

use crate::binary::{Node, free_port};

/// The help of a command and of those below it.
fn help(node: &Node, command: &[&str], all: &mut String) {
    let ended = node.run(&[command, &["--help"]].concat());
    assert_eq!(ended.code, Some(0), "{command:?}: {}", ended.err);
    writeln!(all, "$ confrere {}\n{}", [command, &["--help"]].concat().join(" "), ended.out).expect("a text grows");
    let below = ended.out.split_once("\nCommands:\n").map(|(_, rest)| rest.split("\n\n").next().unwrap_or_default().to_owned());
    for line in below.unwrap_or_default().lines() {
        let name = line.strip_prefix("  ").filter(|line| !line.starts_with(' ')).and_then(|line| line.split_whitespace().next());
        if let Some(name) = name.filter(|name| *name != "help") {
            help(node, &[command, &[name]].concat(), all);
        }
    }
}

#[test]
fn helps_say_what_they_said() {
    let node = Node::new();
    let mut all = String::new();
    help(&node, &[], &mut all);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("confrere/help.txt");
    if std::env::var_os("CONFRERE_WRITE_HELP").is_some() {
        fs::write(&path, &all).expect("written");
    }
    let expected = fs::read_to_string(&path).expect("readable");
    let differs = all.lines().zip(expected.lines()).find(|(now, then)| now != then);
    assert!(
        all == expected,
        "help has changed: {differs:?} (CONFRERE_WRITE_HELP=1 writes {} anew: look at the difference)",
        path.display()
    );
}

#[test]
fn completions_and_manual_name_every_command() {
    let node = Node::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = node.run(&["completions", shell]);
        assert_eq!(script.code, Some(0), "{}", script.err);
        for command in ["serve", "experts", "doctor", "execute-at"] {
            assert!(script.out.contains(command), "{shell}: {command}");
        }
    }
    let pages = node.path().join("man");
    assert_eq!(node.run(&["man", crate::binary::text(&pages)]).code, Some(0));
    for page in ["confrere.1", "confrere-serve.1", "confrere-experts-which.1"] {
        let text = fs::read_to_string(pages.join(page)).expect(page);
        assert!(text.starts_with(".ie") && text.contains(".SH SYNOPSIS"), "{page}: {text}");
    }
}

#[test]
fn settings_come_from_flags_then_the_environment_then_the_file() {
    let node = Node::new();
    let dir = node.path().join("confrere");
    fs::create_dir(&dir).expect("made");
    let file = dir.join("config.toml");
    fs::write(&file, "ram = \"2GiB\"\ndisk = \"7GB\"\nexecute_for = [\"any\"]\n").expect("written");
    let show = |args: &[&str], variable: Option<&str>| -> Value {
        let mut command = node.command(&[args, &["config", "show", "--json"]].concat());
        variable.map(|value| command.env("CONFRERE_RAM", value));
        serde_json::from_slice(&command.output().expect("it runs").stdout).expect("JSON")
    };
    let path = file.to_str().expect("text");
    assert_eq!(show(&[], None)["ram"], json!({"value": "2GiB", "origin": path}));
    assert_eq!(show(&[], Some("3GiB"))["ram"], json!({"value": "3GiB", "origin": "CONFRERE_RAM"}));
    assert_eq!(show(&["--ram", "4GiB"], Some("3GiB"))["ram"], json!({"value": "4GiB", "origin": "flag"}));
    assert_eq!(show(&[], None)["execute_for"], json!({"value": "any", "origin": path}));
    let text = node.run(&["config", "show", "--origin"]).out;
    assert!(text.contains(&format!("disk = \"7GB\"  # {path}\n")) && text.contains("# upload is not set:"), "{text}");
    // What is printed is a file that says the same.
    fs::write(&file, &text).expect("written");
    let plain: Vec<_> = text.lines().map(uncommented).collect();
    assert_eq!(node.run(&["config", "show"]).out.lines().collect::<Vec<_>>(), plain);
    for (wrong, said) in
        [("rma = 1", "unknown key rma; did you mean ram?"), ("ram = \"lots\"", "ram: invalid value 'lots'"), ("ram", "TOML parse error")]
    {
        fs::write(&file, wrong).expect("written");
        let ended = node.run(&["ls"]);
        assert_eq!(ended.code, Some(2), "{wrong}");
        assert!(ended.err.contains(path) && ended.err.contains(said), "{wrong}: {}", ended.err);
    }
}

/// A line without the remark at its end.
fn uncommented(line: &str) -> &str {
    if line.starts_with('#') { line } else { line.split("  # ").next().unwrap_or(line) }
}

#[test]
fn the_doctor_says_what_is_wrong_and_what_to_do() {
    let (node, _) = Node::with("tiny-qwen3-moe");
    let healthy = node.run(&["doctor"]);
    assert_eq!(healthy.code, Some(0), "{}{}", healthy.out, healthy.err);
    assert!(healthy.out.contains("ok     key") && healthy.out.contains("fix: confrere join TICKET"), "{}", healthy.out);
    // The same of a node that serves.
    let api = format!("127.0.0.1:{}", free_port());
    let serving = node.serve_with(&["--listen", "/ip4/127.0.0.1/tcp/0", "--api", &api]);
    let findings = node.json(&["doctor"]);
    let served = findings
        .as_array()
        .into_iter()
        .flatten()
        .any(|one| one["check"] == "node" && one["found"].as_str().is_some_and(|found| found.contains(&api)));
    assert!(served, "{findings}");
    assert_eq!(serving.stop(), Some(0));
    fs::set_permissions(node.path().join("key"), fs::Permissions::from_mode(0o644)).expect("set");
    let broken = node.run(&["doctor"]);
    assert_eq!(broken.code, Some(1));
    assert!(broken.out.contains("broken key") && broken.out.contains("fix: chmod 600"), "{}", broken.out);
}
