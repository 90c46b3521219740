//! An import's memory does not grow with the checkpoint.

use std::process::{Command, Stdio};
use std::time::Duration;

use crate::binary::{Node, text, wait};

/// Above the largest tensor, in bytes of anonymous memory.
const ALLOWANCE: u64 = 256 << 20;

/// The checkpoint has 0.8 GB; `docs/measuring.md` says how the same is measured with 5 GB inside a cgroup.
#[test]
fn an_import_needs_little_more_memory_than_nothing() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("checkpoint");
    let tool = env!("CARGO_BIN_EXE_synthetic_checkpoint");
    let written = Command::new(tool).arg(&path).args(["--layers", "1", "--experts", "64", "--vocab", "32000"]).status();
    assert!(written.expect("the tool runs").success());
    let node = Node::new();
    let mut child =
        node.command(&["import", text(&path), "--name", "m"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
    let mut peak = 0;
    while child.try_wait().expect("it can be waited for").is_none() {
        peak = peak.max(anonymous_bytes(child.id()));
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(wait(&mut child).expect("it has ended"), Some(0));
    let largest_tensor = 32_000 * 2048 * 2;
    println!("peak anonymous memory: {} MiB, largest tensor {} MiB", peak >> 20, largest_tensor >> 20);
    assert!(peak > 0 && peak < ALLOWANCE, "{peak} bytes");
}

fn anonymous_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok()).map_or(0, |kilobytes| kilobytes * 1024)
}
