//! The models and blobs in a data directory, as they are told to people and programs.

use protocol::decoder::{Head, QkNorm, Rope, Router};
use protocol::manifest::{Part, PartConfig};
use protocol::{BlobRef, Decoder, ModelManifest, PartKind, Precision};
use serde_json::{Value, json};
use store::StoreStat;

use crate::data_dir::{LocalModel, OpenDataDir};

/// A model in short.
pub fn summary(open: &OpenDataDir, found: &LocalModel) -> Value {
    json!({
        "name": found.name, "id": found.id.to_string(), "publisher": found.publisher.to_string(),
        "precision": found.manifest.precision_text(), "context": found.manifest.decoder().context,
        "experts": {"have": found.experts_present(&open.store), "all": found.manifest.experts_count()},
        "bytes": found.bytes_present(&open.store), "total_bytes": found.manifest.total_bytes(),
        "profile": open.dir.profile(found.id).is_ok_and(|profile| profile.is_some()),
    })
}

/// What a model is made of; with `blobs`, down to every tensor and expert.
pub fn details(open: &OpenDataDir, found: &LocalModel, blobs: bool) -> Value {
    let LocalModel { name, id, manifest, publisher } = found;
    let trunk: u64 = manifest.parts.iter().map(Part::trunk_bytes).sum();
    let parts: Vec<_> = manifest.parts.iter().map(part_json).collect();
    let mut about = json!({
        "name": name, "id": id.to_string(), "publisher": publisher.to_string(), "parent": manifest.parent.map(|id| id.to_string()),
        "config": config_json(manifest.decoder()), "parts": parts, "precision": manifest.precision_text(),
        "experts": {"have": found.experts_present(&open.store), "all": manifest.experts_count(), "bytes_each": manifest.expert_blobs().next().map(|blob| blob.length)},
        "trunk_bytes": trunk, "bytes": found.bytes_present(&open.store), "total_bytes": manifest.total_bytes(),
        "tokenizer": manifest.tokenizer.map(|blob| blob.hash.to_string()), "chat_template": manifest.chat.template.is_some(),
    });
    if blobs {
        let listed = |(name, precision, blob): (String, Precision, BlobRef)| json!({"name": name, "precision": precision.name(), "hash": blob.hash.to_string(), "bytes": blob.length});
        about["blobs"] = all_blobs(manifest).map(listed).collect();
    }
    about
}

/// What a pull has come to.
pub fn pulled_json(open: &OpenDataDir, found: &LocalModel, bytes: u64) -> Value {
    let experts = json!({"have": found.experts_present(&open.store), "all": found.manifest.experts_count()});
    json!({"name": found.name, "id": found.id.to_string(), "experts": experts, "bytes_fetched": bytes})
}

/// Every tensor of the trunk, then every expert, layer by layer.
fn all_blobs(manifest: &ModelManifest) -> impl Iterator<Item = (String, Precision, BlobRef)> {
    let trunk = manifest.parts.iter().flat_map(|part| {
        let name = move |role: &dyn std::fmt::Display| {
            if part.kind == PartKind::Text { role.to_string() } else { format!("{}: {role}", part.kind) }
        };
        part.trunk.iter().map(move |tensor| (name(&tensor.role), tensor.precision, tensor.blob))
    });
    trunk.chain(manifest.experts().map(|(slot, expert)| (slot.to_string(), expert.precision, expert.blob)))
}

/// The shape of a decoder by the usual names, as far as they go.
fn config_json(decoder: &Decoder) -> Value {
    let (attention, moe) = (decoder.attention(), decoder.moe());
    let (dense_width, _) = decoder.widths_beside_experts();
    let sections = match attention.rope {
        Rope::Plain { .. } => None,
        Rope::Interleaved { sections, .. } => Some(sections),
    };
    let normalise = moe.is_some_and(|moe| moe.router == Router::Softmax { normalise: true });
    json!({
        "vocab_size": decoder.vocab_size, "hidden_size": decoder.hidden_size, "num_hidden_layers": decoder.layers(),
        "num_attention_heads": attention.heads, "num_key_value_heads": attention.kv_heads, "head_dim": attention.head_dim,
        "num_experts": decoder.experts(), "num_experts_per_tok": decoder.experts_per_token(), "moe_intermediate_size": moe.map(|moe| moe.width),
        "intermediate_size": dense_width, "dense_layers": (0..decoder.layers()).filter(|&layer| !decoder.is_moe(layer)).collect::<Vec<_>>(),
        "qk_norm": attention.qk_norm != QkNorm::None, "norm_topk_prob": normalise, "rope_theta": attention.rope.base(), "mrope_section": sections,
        "rms_norm_eps": decoder.final_norm.eps(), "tie_word_embeddings": decoder.head == Head::Embedding, "max_position_embeddings": decoder.context,
    })
}

/// What a part of a model is.
fn part_json(part: &Part) -> Value {
    let mut about = json!({"kind": part.kind.name(), "trunk_bytes": part.trunk_bytes(), "experts": part.experts.len()});
    match &part.config {
        PartConfig::Decoder(decoder) => about["decoder"] = json!(decoder),
        PartConfig::Vision(shape) => about["shape"] = json!(shape),
        PartConfig::Audio(shape) => about["shape"] = json!(shape),
        PartConfig::Talker(shape) => about["shape"] = json!(shape),
        PartConfig::CodePredictor(shape) => about["shape"] = json!(shape),
        PartConfig::CodeToWave(shape) => about["shape"] = json!(shape),
    }
    about
}

/// The store, counted.
pub fn stat_json(stat: &StoreStat) -> Value {
    json!({
        "blobs": stat.blobs, "bytes": stat.bytes, "bytes_max": (stat.bytes_max < u64::MAX).then_some(stat.bytes_max),
        "disk_free_bytes": stat.disk_free_bytes, "quarantined": stat.quarantined, "unverified": stat.unverified,
        "oldest_verified_at_ms": (stat.oldest_verified_at_ms > 0).then_some(stat.oldest_verified_at_ms),
    })
}
