//! What ARCHITECTURE.md says of who may know whom.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package lies in the workspace")
}

/// The packages that `package` uses when it runs.
fn dependencies(package: &str) -> BTreeSet<String> {
    let output =
        Command::new(env!("CARGO")).args(["metadata", "--no-deps", "--offline", "--format-version", "1"]).current_dir(root()).output();
    let metadata: Value = serde_json::from_slice(&output.expect("cargo runs").stdout).expect("JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let found = packages.iter().find(|p| p["name"] == package).expect("the package exists");
    let used = found["dependencies"].as_array().expect("dependencies").iter().filter(|d| d["kind"].is_null());
    used.map(|d| d["name"].as_str().expect("a name").to_owned()).collect()
}

#[test]
fn crates_depend_only_on_lower_floors() {
    let ours = |package: &str| -> Vec<String> {
        dependencies(package)
            .into_iter()
            .filter(|name| ["node", "protocol", "store", "inference", "tests"].contains(&name.as_str()))
            .collect()
    };
    assert!(ours("protocol").is_empty());
    assert_eq!(ours("store"), ["protocol"]);
    assert_eq!(ours("inference"), ["protocol"]);
    assert_eq!(ours("node"), ["inference", "protocol", "store"]);
    for package in ["protocol", "store", "inference"] {
        for forbidden in ["tokio", "libp2p", "axum", "clap", "indicatif", "directories"] {
            assert!(!dependencies(package).contains(forbidden), "{package} must not know {forbidden}");
        }
    }
}

#[test]
fn libp2p_is_named_only_under_net() {
    let mut naming = Vec::new();
    visit(&root().join("node/src"), &mut |path, text| {
        if text.contains("libp2p") && !path.starts_with(root().join("node/src/net")) {
            naming.push(path.to_owned());
        }
    });
    assert!(naming.is_empty(), "{naming:?}");
}

#[test]
fn every_file_opens_with_a_sentence_about_itself() {
    for package in ["protocol", "store", "inference", "node", "tests"] {
        visit(&root().join(package), &mut |path, text| assert!(text.starts_with("//! "), "{}", path.display()));
    }
}

#[test]
fn there_is_exactly_one_model() {
    let models = std::fs::read_dir(root().join("models")).expect("models").flatten();
    assert_eq!(models.filter(|entry| entry.path().join("config.json").exists()).count(), 1);
}

fn visit(dir: &Path, action: &mut dyn FnMut(&PathBuf, &str)) {
    for entry in std::fs::read_dir(dir).expect("a directory").flatten() {
        let path = entry.path();
        if path.is_dir() {
            visit(&path, action);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            action(&path, &std::fs::read_to_string(&path).expect("source is text"));
        }
    }
}
