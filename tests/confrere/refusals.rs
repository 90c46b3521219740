//! Checkpoints that must be refused, each with what is wrong by name; and those that are the same model in another spelling.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use inference::checkpoint::CheckpointError;
use inference::checkpoint::import::ImportError;
use protocol::{PartKind, Precision};

use crate::support::{Imported, Tensor, checkpoint, read_tensors, write_checkpoint};

const BASE: &str = "tiny-qwen3-moe";
const EXPERT: &str = "model.layers.2.mlp.experts.5.up_proj.weight";

/// Makes one broken checkpoint.
type Break = fn(&Path);

/// Everything that is refused: what is broken, how, and a text that the refusal must contain.
pub(crate) const BROKEN: [(&str, Break, &str); 20] = [
    ("missing expert tensor", |dir| tensors(dir, |t| drop(t.remove(EXPERT))), "model.layers.2.mlp.experts.5.up_proj.weight: missing"),
    (
        "extra expert tensor",
        |dir| tensors(dir, |t| copy(t, EXPERT, "model.layers.2.mlp.experts.8.up_proj.weight")),
        "experts.8.up_proj.weight: unexpected",
    ),
    (
        "tensor of another family",
        |dir| tensors(dir, |t| copy(t, EXPERT, "model.layers.0.mlp.shared_expert.up_proj.weight")),
        "shared_expert.up_proj.weight: unexpected",
    ),
    ("tower in a text model", |dir| tensors(dir, |t| copy(t, EXPERT, "visual.merger.weight")), "visual.merger.weight: unexpected"),
    (
        "second spelling of a number",
        |dir| tensors(dir, |t| rename(t, EXPERT, "model.layers.02.mlp.experts.5.up_proj.weight")),
        "model.layers.02.mlp",
    ),
    (
        "wrong shape",
        |dir| tensors(dir, |t| edit(t, EXPERT, |t| t.shape.reverse())),
        "experts.5.up_proj.weight: has shape [64, 48], expected [48, 64]",
    ),
    (
        "wrong dtype",
        |dir| tensors(dir, |t| edit(t, EXPERT, |t| t.dtype = safetensors::Dtype::I32)),
        "experts.5.up_proj.weight: has dtype I32",
    ),
    (
        "experts of two dtypes",
        |dir| tensors(dir, |t| edit(t, EXPERT, narrow)),
        "experts.5.up_proj.weight: is bf16, while other experts are f32",
    ),
    (
        "NaN",
        |dir| tensors(dir, |t| edit(t, EXPERT, |t| t.bytes[40..44].copy_from_slice(&f32::NAN.to_le_bytes()))),
        "experts.5.up_proj.weight: 1 of 3072 weights are not finite",
    ),
    (
        "infinity in the trunk",
        |dir| tensors(dir, |t| edit(t, "model.norm.weight", |t| t.bytes[..4].copy_from_slice(&f32::INFINITY.to_le_bytes()))),
        "model.norm.weight: 1 of 64",
    ),
    (
        "1e30",
        |dir| tensors(dir, |t| edit(t, "lm_head.weight", |t| t.bytes[..4].copy_from_slice(&1e30f32.to_le_bytes()))),
        "lm_head.weight: 1 of 32768",
    ),
    ("shard cut short", |dir| shard(dir, |bytes| bytes.truncate(bytes.len() - 100)), "the file has only"),
    ("empty shard", |dir| shard(dir, Vec::clear), "has 0 bytes, too few for a header"),
    ("shard with a tail", |dir| shard(dir, |bytes| bytes.extend([0; 9])), "has 9 bytes after the last tensor"),
    (
        "index names a missing file",
        |dir| fs::remove_file(dir.join("model-00001.safetensors")).expect("there"),
        "model-00001.safetensors: the index names this file, and it is not there",
    ),
    (
        "index names a path",
        |dir| index(dir, |text| text.replace("model-00001", "../model-00001")),
        "which is not the name of a file beside it",
    ),
    (
        "index misplaces a tensor",
        |dir| index(dir, |text| text.replacen("model-00001", "model-00000", 1)),
        "the index places it in model-00000.safetensors, which does not have it",
    ),
    ("overlapping tensors", |dir| shard(dir, |bytes| overlap(bytes)), "overlaps"),
    ("tensor out of the file", |dir| shard(dir, |bytes| beyond(bytes)), "the file has only"),
    (
        "header of 2^63 bytes",
        |dir| shard(dir, |bytes| bytes[..8].copy_from_slice(&(1u64 << 63).to_le_bytes())),
        "claims a header of 9223372036854775808 bytes",
    ),
];

fn tensors(dir: &Path, change: impl FnOnce(&mut BTreeMap<String, Tensor>)) {
    let mut tensors = read_tensors(dir);
    change(&mut tensors);
    for entry in fs::read_dir(dir).expect("a directory").flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("model"))
    {
        fs::remove_file(entry.path()).expect("removable");
    }
    write_checkpoint(dir, &checkpoint(BASE), &tensors, 20);
}

fn copy(tensors: &mut BTreeMap<String, Tensor>, from: &str, to: &str) {
    tensors.insert(to.to_owned(), tensors[from].clone());
}

fn rename(tensors: &mut BTreeMap<String, Tensor>, from: &str, to: &str) {
    copy(tensors, from, to);
    tensors.remove(from);
}

fn edit(tensors: &mut BTreeMap<String, Tensor>, name: &str, change: impl FnOnce(&mut Tensor)) {
    change(tensors.get_mut(name).expect("the base has it"));
}

fn narrow(tensor: &mut Tensor) {
    tensor.dtype = safetensors::Dtype::BF16;
    tensor.bytes = tensor.bytes.chunks_exact(4).flat_map(|b| [b[2], b[3]]).collect();
}

fn shard(dir: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let path = dir.join("model-00001.safetensors");
    let mut bytes = fs::read(&path).expect("a shard");
    change(&mut bytes);
    fs::write(path, bytes).expect("writable");
}

fn index(dir: &Path, change: impl FnOnce(&str) -> String) {
    let path = dir.join("model.safetensors.index.json");
    let text = fs::read_to_string(&path).expect("an index");
    fs::write(path, change(&text)).expect("writable");
}

/// Rewrites the header of a shard, its length unchanged.
fn header(bytes: &mut [u8], change: impl FnOnce(&mut serde_json::Value)) {
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let mut json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).expect("a header");
    change(&mut json);
    let mut text = json.to_string().into_bytes();
    assert!(text.len() <= length, "the change fits");
    text.resize(length, b' ');
    bytes[8..8 + length].copy_from_slice(&text);
}

fn by_place(json: &serde_json::Value) -> Vec<String> {
    let mut names: Vec<_> = json.as_object().expect("an object").iter().filter(|(_, t)| t["data_offsets"].is_array()).collect();
    names.sort_by_key(|(_, tensor)| tensor["data_offsets"][0].as_u64());
    names.into_iter().map(|(name, _)| name.clone()).collect()
}

fn overlap(bytes: &mut [u8]) {
    header(bytes, |json| {
        let names = by_place(json);
        let place = json[&names[0]]["data_offsets"].clone();
        let twin = names[1..].iter().find(|name| json[*name]["shape"] == json[&names[0]]["shape"]).expect("two of one shape").clone();
        json[twin]["data_offsets"] = place;
    });
}

fn beyond(bytes: &mut [u8]) {
    header(bytes, |json| {
        let name = by_place(json).pop().expect("tensors");
        let [start, end] = [0, 1].map(|i| json[&name]["data_offsets"][i].as_u64().expect("an offset"));
        json[name]["data_offsets"] = serde_json::json!([start + 8, end + 8]);
    });
}

/// Writes the sound checkpoint that the others are made from.
pub(crate) fn write_sound(dir: &Path) {
    write_checkpoint(dir, &checkpoint(BASE), &read_tensors(&checkpoint(BASE)), 20);
}

#[test]
fn every_broken_checkpoint_is_refused_by_name() {
    for (what, damage, expected) in BROKEN {
        let dir = tempfile::tempdir().expect("a temporary directory");
        write_sound(dir.path());
        Imported::from_dir(dir.path(), None).expect("sound before it is broken");
        damage(dir.path());
        match Imported::from_dir(dir.path(), None) {
            Err(ImportError::Refused(error @ CheckpointError::Refused(_))) => {
                let text = error.to_string();
                assert!(text.contains(expected), "{what}: {text}");
            }
            Err(error) => panic!("{what}: {error}"),
            Ok(_) => panic!("{what} was imported"),
        }
    }
}

#[test]
fn lists_everything_that_is_wrong() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    write_sound(dir.path());
    tensors(dir.path(), |t| {
        t.retain(|name, _| !name.contains("layers.1.mlp.experts.3."));
        copy(t, EXPERT, "model.extra");
        edit(t, "model.norm.weight", |t| t.shape = vec![8, 8]);
    });
    let Err(ImportError::Refused(CheckpointError::Refused(problems))) = Imported::from_dir(dir.path(), None) else { panic!("imported") };
    let subjects: Vec<_> = problems.kept().map(|problem| problem.subject.as_str()).collect();
    let expert = ["down_proj", "gate_proj", "up_proj"].map(|part| format!("model.layers.1.mlp.experts.3.{part}.weight"));
    assert_eq!(subjects, ["model.extra", &expert[0], &expert[1], &expert[2], "model.norm.weight"]);
}

#[test]
fn sharding_layout_and_prefix_do_not_change_the_model() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let base = Imported::of(BASE).manifest;
    for per_shard in [1, 7, 1000] {
        let path = dir.path().join(per_shard.to_string());
        write_checkpoint(&path, &checkpoint(BASE), &read_tensors(&checkpoint(BASE)), per_shard);
        assert_eq!(Imported::from_dir(&path, None).expect("it imports").manifest.id(), base.id(), "{per_shard} tensors a shard");
    }
    assert_eq!(Imported::of("variant-fused").manifest.text().experts, Imported::of("variant-tied").manifest.text().experts);
    assert_eq!(Imported::of("variant-fused").manifest.id(), Imported::of("variant-tied").manifest.id());
    assert_eq!(Imported::of("tiny-qwen3-omni").manifest.id(), Imported::of("tiny-qwen3-omni-thinker").manifest.id());
}

#[test]
fn a_converted_model_names_its_parent_and_is_the_same_however_it_was_made() {
    let base = Imported::of(BASE).manifest;
    let narrow = Imported::from_dir(&checkpoint(BASE), Some(Precision::Bf16)).expect("it imports").manifest;
    assert_eq!((narrow.parent, narrow.usual_precision()), (Some(base.id()), Precision::Bf16));
    assert_ne!(narrow.id(), base.id());
    let same = Imported::from_dir(&checkpoint(BASE), Some(Precision::F32)).expect("it imports").manifest;
    assert_eq!((same.id(), same.parent), (base.id(), None));
}

#[test]
fn towers_are_parts_and_what_the_configuration_switches_off_is_left_out() {
    let manifest = Imported::of("tiny-qwen3-omni").manifest;
    let kinds: Vec<_> = manifest.parts.iter().map(|part| part.kind).collect();
    assert_eq!(kinds, [PartKind::Text, PartKind::Vision, PartKind::Audio]);
    let speaking = inference::checkpoint::Checkpoint::open(&checkpoint("tiny-qwen3-omni")).expect("it opens");
    assert!(speaking.skipped.is_empty(), "it has no talker, whatever its configuration says of one");
}
