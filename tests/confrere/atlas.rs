//! The atlas of a model: what it writes, that it goes on where it was broken off, and that its numbers are those of the model.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::binary::{Node, text};
use crate::support::shipped_model;

#[test]
fn an_atlas_is_written_and_written_again_the_same() {
    let node = Node::new();
    let ended = node.run(&["import", text(&shipped_model()), "--name", "m"]);
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let (out, probes) = (node.path().join("atlas"), node.path().join("probes"));
    fs::create_dir(&probes).expect("a directory");
    for domain in ["code", "maths", "poetry"] {
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../node/runtime/probes").join(domain).with_extension("txt");
        let shipped = fs::read_to_string(shipped).expect("readable");
        let some: Vec<String> = shipped.split("%%\n").take(6).map(|probe| probe.chars().take(150).collect::<String>() + "\n").collect();
        fs::write(probes.join(domain).with_extension("txt"), some.join("%%\n")).expect("written");
    }
    let atlas = ["atlas", "m", "--out", text(&out), "--probes", text(&probes), "--items", "4", "--tried", "2", "--untrained", "m"];
    let ended = node.run(&atlas);
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    assert!(ended.out.contains("1. Are experts partitioned by domain, or do they blend?"), "{}", ended.out);
    let first = fs::read_to_string(out.join("atlas.json")).expect("written");
    let found: Value = serde_json::from_str(&first).expect("JSON");

    // Questions that need pictures and sounds are left out, and the rest are answered.
    let asked: Vec<_> = found["answers"].as_array().expect("a list").iter().map(|answer| answer["number"].as_u64()).collect();
    assert_eq!(asked, [1, 4, 5, 6].map(Some));
    assert_eq!(found["experts"].as_array().map(Vec::len), Some(192));
    assert_eq!((&found["items"], &found["items_tried"]), (&Value::from(12), &Value::from(6)));
    let shares: f64 = found["experts"].as_array().expect("a list").iter().map(|row| row["use_share"].as_f64().expect("a share")).sum();
    assert!((shares - 6.0).abs() < 1e-6, "each layer's uses are shared out: {shares}");
    // The same model is no more special before its training.
    assert_eq!(found["untrained"]["information"], found["information"]);
    // Its loss is what `eval perplexity` finds of such texts, within what texts differ by.
    let losses: Vec<_> = found["losses"].as_array().expect("a list").iter().map(|loss| loss["value"].as_f64().expect("a loss")).collect();
    assert!(losses.iter().all(|loss| (1.0..6.0).contains(loss)), "{losses:?}");
    let rise = |name: &str| {
        let change = found["changes"].as_array().expect("a list").iter().find(|change| change["name"] == name);
        change.unwrap_or_else(|| panic!("no {name}"))["rise"]["value"].as_f64().expect("a rise")
    };
    assert!(rise("pool of code") > 0.01, "the experts that carry half of the weight are missed");
    assert!(rise("all experts at q4").abs() < rise("pool of code"));

    for picture in ["map", "information", "use", "ranked", "specialists", "skipped", "precision", "training"] {
        let bytes = fs::read(out.join(format!("{picture}.png"))).unwrap_or_else(|error| panic!("{picture}: {error}"));
        assert!(bytes.starts_with(b"\x89PNG\r\n") && bytes.len() > 4096, "{picture}");
    }
    let page = fs::read_to_string(out.join("atlas.html")).expect("written");
    let addresses = page.matches("http").count() - page.matches("http://www.w3.org/2000/svg").count();
    assert!(addresses == 0 && !page.contains("<script") && page.contains("prefers-color-scheme"), "it needs no network");
    for table in ["layers", "experts", "changes", "specialists"] {
        let table = fs::read_to_string(out.join(format!("{table}.csv"))).expect("written");
        let widths: Vec<_> = table.lines().map(|line| line.split(',').count()).collect();
        assert!(widths.len() > 1 && widths.iter().all(|width| *width >= 5), "{table}");
    }

    // What was measured is not measured again: without most of its experts' trials, the same comes out.
    let tried = out.join("tried.jsonl");
    let lines = fs::read_to_string(&tried).expect("written");
    let half: Vec<_> = lines.lines().take(lines.lines().count() / 2).chain(["{\"name\": \"cut o"]).collect();
    fs::write(&tried, half.join("\n")).expect("written");
    assert_eq!(node.run(&atlas).code, Some(0));
    assert!(fs::read_to_string(out.join("atlas.json")).expect("written") == first, "the same atlas");
    assert_eq!(fs::read_to_string(&tried).expect("written").lines().count(), lines.lines().count());
    assert_eq!(node.json(&["repo", "verify"])["damaged"].as_array().map_or(0, Vec::len), 0);

    let ended = node.run(&["atlas", "nobody", "--out", text(&out)]);
    assert!(ended.code == Some(3) && ended.err.contains("nobody"), "{}", ended.err);
}
