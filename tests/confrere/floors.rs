//! What ARCHITECTURE.md says of who may know whom.

use std::collections::{BTreeMap, BTreeSet};
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

/// Our packages, where their sources lie, and their floors: a package may use those below it only.
const PACKAGES: [(&str, &str, u32); 10] = [
    ("protocol", "protocol/src", 0),
    ("store", "store/src", 1),
    ("inference", "inference/src", 1),
    ("base", "node/base/src", 2),
    ("net", "node/net/src", 3),
    ("runtime", "node/runtime/src", 4),
    ("api", "node/api/src", 5),
    ("lab", "node/lab/src", 5),
    ("node", "node/app/src", 6),
    ("tests", "tests/confrere", 7),
];

#[test]
fn packages_depend_only_on_lower_floors() {
    for (package, _, floor) in PACKAGES {
        let dependencies = dependencies(package);
        for (used, _, its_floor) in PACKAGES {
            assert!(!dependencies.contains(used) || its_floor < floor, "{package} must not know {used}");
        }
    }
    let forbid = |packages: &[&str], libraries: &[&str]| {
        for package in packages {
            let used = dependencies(package);
            let forbidden: Vec<_> = libraries.iter().filter(|library| used.contains(**library)).collect();
            assert!(forbidden.is_empty(), "{package} must not know {forbidden:?}");
        }
    };
    forbid(&["protocol", "store", "inference"], &["tokio", "libp2p", "axum", "clap", "indicatif", "directories"]);
    forbid(&["base", "runtime", "api", "lab", "node"], &["libp2p", "libp2p-stream"]);
    forbid(&["base", "net", "runtime", "lab", "node"], &["axum"]);
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

/// Modules that use each other cannot be understood one by one.
#[test]
fn modules_form_no_circle() {
    for (package, source, _) in PACKAGES {
        let circle = circle(&uses(&root().join(source)));
        assert!(circle.is_empty(), "{package}: {}", circle.join(" uses "));
    }
}

#[test]
fn a_circle_is_found() {
    let graph = |edges: &[(&str, &str)]| -> Graph {
        edges.iter().fold(Graph::new(), |mut graph, (from, to)| {
            graph.entry((*from).to_owned()).or_default().insert((*to).to_owned());
            graph
        })
    };
    assert!(circle(&graph(&[("a", "b"), ("b", "c"), ("a", "c")])).is_empty());
    assert_eq!(circle(&graph(&[("a", "b"), ("b", "c"), ("c", "b")])), ["b", "c", "b"]);
    let modules = ["", "a", "a::b", "c"].map(str::to_owned).into();
    let text =
        "use super::{Thing, other::{self, Part}};\nfn f() { crate::c::call() }\n#[cfg(test)]\nmod tests {\n    use crate::a::X;\n}\n";
    assert_eq!(used_modules("a::b", text, &modules), ["a", "c"].map(str::to_owned).into());
}

/// Modules, and which each uses.
type Graph = BTreeMap<String, BTreeSet<String>>;

/// The modules under a directory of sources.
fn uses(source: &Path) -> Graph {
    let mut texts = BTreeMap::new();
    visit(source, &mut |path, text| {
        let path = path.strip_prefix(source).expect("it lies there").with_extension("");
        let mut parts: Vec<_> = path.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        if parts.last().is_some_and(|last| ["mod", "lib", "main"].contains(&last.as_str())) {
            parts.pop();
        }
        texts.insert(parts.join("::"), text.to_owned());
    });
    let modules: BTreeSet<_> = texts.keys().cloned().collect();
    texts.iter().map(|(module, text)| (module.clone(), used_modules(module, text, &modules))).collect()
}

/// The modules that a text of `module` names in its `use`s, and by paths from the crate's root; its tests may name any.
fn used_modules(module: &str, text: &str, modules: &BTreeSet<String>) -> BTreeSet<String> {
    let text: String = text
        .lines()
        .take_while(|line| *line != "#[cfg(test)]")
        .filter(|line| !line.trim().starts_with("//"))
        .collect::<Vec<_>>()
        .join("\n");
    let mut paths = Vec::new();
    for statement in text.split("use ").skip(1).filter_map(|rest| rest.split_once(';')).map(|(statement, _)| statement) {
        if ["crate::", "super::", "self::"].iter().any(|root| statement.starts_with(root)) {
            expand(&statement.split_whitespace().collect::<Vec<_>>().join(" "), &mut paths);
        }
    }
    let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    paths.extend(text.match_indices("crate::").map(|(at, _)| text[at..].split(|c| !is_word(c)).next().unwrap_or_default().to_owned()));
    let resolved = paths.iter().filter_map(|path| resolve(module, path, modules));
    resolved.filter(|used| used != module).collect()
}

/// Writes every path of a `use` with braces out.
fn expand(path: &str, paths: &mut Vec<String>) {
    let Some((before, inner)) = path.split_once('{') else { return paths.push(path.trim().to_owned()) };
    let inner = &inner[..inner.rfind('}').unwrap_or(inner.len())];
    let (mut depth, mut start) = (0, 0);
    for (at, c) in inner.char_indices().chain([(inner.len(), ',')]) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                let part = inner[start..at].trim();
                if !part.is_empty() {
                    expand(&format!("{before}{part}"), paths);
                }
                start = at + 1;
            }
            _ => {}
        }
    }
}

/// The module that a path leads to: the longest part of it that is one.
fn resolve(module: &str, path: &str, modules: &BTreeSet<String>) -> Option<String> {
    let mut here: Vec<_> =
        if path.starts_with("crate") { Vec::new() } else { module.split("::").filter(|part| !part.is_empty()).collect() };
    let mut parts = path.split(" as ").next()?.split("::").map(str::trim).peekable();
    while let Some(root) = parts.next_if(|part| ["crate", "self", "super"].contains(part)) {
        if root == "super" {
            here.pop();
        }
    }
    here.extend(parts);
    (0..=here.len()).rev().map(|length| here[..length].join("::")).find(|known| modules.contains(known))
}

/// A circle of uses, if there is one: its modules in order, the first again at the end.
fn circle(graph: &Graph) -> Vec<String> {
    fn search(at: &str, graph: &Graph, way: &mut Vec<String>, done: &mut BTreeSet<String>) -> bool {
        if let Some(from) = way.iter().position(|module| module == at) {
            way.drain(..from);
            way.push(at.to_owned());
            return true;
        }
        if done.contains(at) {
            return false;
        }
        way.push(at.to_owned());
        if graph.get(at).into_iter().flatten().any(|next| search(next, graph, way, done)) {
            return true;
        }
        way.pop();
        done.insert(at.to_owned());
        false
    }
    let (mut way, mut done) = (Vec::new(), BTreeSet::new());
    for module in graph.keys() {
        if search(module, graph, &mut way, &mut done) {
            return way;
        }
    }
    Vec::new()
}
