//! Models that a trusted publisher signs and should not: what such a publisher can do to those who trust it.

use std::fs;

use protocol::decoder::FeedForward;
use protocol::manifest::{PackedBlob, PartConfig, TrunkTensor};
use protocol::tensors::TensorSpec;
use protocol::{BlobRef, ContentHash, ModelManifest, NodeKey, Precision};

use crate::binary::{Node, text};
use crate::support::shipped_model;

/// P9: manifests count against the disk that a node may take, and those of one publisher have a limit.
#[test]
fn manifests_fill_no_disk() {
    let (a, id) = Node::with("variant-tied");
    let mut bytes = 0;
    for number in 0..6 {
        bytes = forge(&a, &id, |_, manifest| {
            let part = &mut manifest.parts[0];
            let PartConfig::Decoder(decoder) = &mut part.config else { panic!("its first part is a decoder") };
            let run = &mut decoder.runs[0];
            let FeedForward::Moe(moe) = &mut run.feed_forward else { panic!("its layers have experts") };
            (run.layers, moe.experts) = (96, 4096);
            let tensor = |spec: TensorSpec| {
                let name = spec.role.to_string();
                let (hash, length) = (ContentHash::of(name.as_bytes()), spec.bytes(Precision::Bf16).expect("a length"));
                TrunkTensor { role: spec.role, precision: Precision::Bf16, blob: BlobRef { hash, length } }
            };
            part.trunk = decoder.tensors().into_iter().map(tensor).collect();
            let (precision, bytes) = (part.experts[0].precision, part.experts[0].blob.length);
            let blob = |number: usize| BlobRef { hash: ContentHash::of(&number.to_le_bytes()), length: bytes };
            part.experts = (0..96 * 4096).map(|number| PackedBlob { precision, blob: blob(number) }).collect();
            manifest.generation.top_k = number;
        });
    }
    assert!(bytes > 15 << 20, "{bytes}");
    let serving = a.serve();
    for (disk, most) in [("40MB", 40_000_000), ("1TB", 64 << 20)] {
        let b = Node::new();
        let joined = b.run(&["--disk", disk, "join", &serving.ticket]);
        assert!(joined.code == Some(0) && joined.err.contains("is left out"), "{}", joined.err);
        let manifests = fs::read_dir(b.path().join("manifests")).expect("there").flatten();
        let held: u64 = manifests.map(|file| file.metadata().expect("a file").len()).sum();
        assert!(held > bytes as u64 && held <= most, "{held} of {most} with --disk {disk}");
        let listed = b.run(&["--disk", disk, "ls"]);
        assert_eq!(listed.code, Some(0), "{}", listed.err);
    }
}

/// A10: an expert has one hash: bytes that nothing is kept in are zero.
#[test]
fn an_expert_with_bytes_that_belong_to_nothing_is_refused() {
    let node = Node::new();
    let imported = node.run(&["import", text(&shipped_model()), "--name", "m", "--precision", "q8"]);
    let id = imported.out.lines().last().expect("the id").to_owned();
    forge(&node, &id, |node, manifest| {
        for expert in &mut manifest.parts[0].experts {
            let hex = expert.blob.hash.to_hex();
            let mut bytes = fs::read(node.path().join("store/blobs").join(&hex[..2]).join(hex)).expect("a blob");
            bytes[40] = 0x5a;
            expert.blob = keep(node, &bytes);
        }
    });
    let models = node.json(&["ls"]);
    let forged = models.as_array().expect("a list").iter().find(|model| model["name"] != "m").expect("the forged one")["name"].clone();
    let ended = node.run(&["run", forged.as_str().expect("a name"), "Once", "--raw", "--max-tokens", "2"]);
    assert!(ended.code == Some(5) && ended.err.contains("belongs to nothing"), "{:?} {}", ended.code, ended.err);
}

/// Puts bytes among a node's blobs.
pub(crate) fn keep(node: &Node, bytes: &[u8]) -> BlobRef {
    let blob = BlobRef::of(bytes);
    let hex = blob.hash.to_hex();
    let dir = node.path().join("store/blobs").join(&hex[..2]);
    fs::create_dir_all(&dir).expect("made");
    fs::write(dir.join(hex), bytes).expect("written");
    blob
}

/// Signs a model like one that a node has, but for a change, with the node's own key: as a publisher may who means ill. Returns the bytes of it.
pub(crate) fn forge(node: &Node, id: &str, change: impl FnOnce(&Node, &mut ModelManifest)) -> usize {
    let envelope = fs::read(node.path().join("manifests").join(id)).expect("a manifest");
    let (mut manifest, _) = ModelManifest::open(id.parse().expect("an id"), envelope).expect("a valid manifest");
    change(node, &mut manifest);
    let key = fs::read_to_string(node.path().join("key")).expect("a key");
    let key = NodeKey::from_secret(&protocol::hash::from_hex(key.trim()).expect("hexadecimal"));
    let sealed = manifest.checked().expect("a manifest that counts").seal(&key);
    let id = ContentHash::of(sealed.payload());
    fs::write(node.path().join("manifests").join(id.to_hex()), sealed.as_bytes()).expect("written");
    sealed.as_bytes().len()
}
