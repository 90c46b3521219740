//! `confrere ls`, `show` and `rm`: the models that are here.

use protocol::{BlobRef, ModelManifest, Precision};
use serde_json::json;

use super::Context;
use crate::data_dir::LocalModel;
use crate::failure::{Failure, Kind};
use crate::output::{human_bytes, note, print_json, print_line};

pub(super) fn ls(context: &Context) -> Result<(), Failure> {
    let open = context.lock()?;
    let models = open.readable_models();
    if context.json {
        let rows: Vec<_> = models
            .iter()
            .map(|model| {
                let experts = json!({"have": model.experts_present(&open.store), "all": model.manifest.experts.len()});
                json!({"name": model.name, "id": model.id.to_string(), "experts": experts, "bytes": model.bytes_present(&open.store)})
            })
            .collect();
        return print_json(&rows);
    }
    if models.is_empty() {
        note("no models yet: confrere import PATH, or confrere join TICKET");
        return Ok(());
    }
    let width = models.iter().map(|model| model.name.len()).max().unwrap_or(0).max(4);
    print_line(&format!("{:width$}  {:12}  {:>13}  {:>10}", "name", "id", "experts", "here"))?;
    for model in models {
        let experts = format!("{}/{}", model.experts_present(&open.store), model.manifest.experts.len());
        let id = model.id.to_string();
        print_line(&format!("{:width$}  {}  {experts:>13}  {:>10}", model.name, &id[..12], human_bytes(model.bytes_present(&open.store))))?;
    }
    Ok(())
}

pub(super) fn show(context: &Context, model: &str, blobs: bool) -> Result<(), Failure> {
    let open = context.lock()?;
    let model = open.local(model)?;
    let LocalModel { name, id, manifest, publisher } = &model;
    let trunk: u64 = manifest.trunk.iter().map(|tensor| tensor.blob.length).sum();
    let present = model.experts_present(&open.store);
    if context.json {
        let mut about = json!({
            "name": name, "id": id.to_string(), "publisher": publisher.to_string(), "parent": manifest.parent.map(|id| id.to_string()),
            "config": manifest.config, "precision": manifest.expert_precision.name(),
            "experts": {"have": present, "all": manifest.experts.len(), "bytes_each": manifest.experts.first().map(|blob| blob.length)},
            "trunk_bytes": trunk, "bytes": model.bytes_present(&open.store), "total_bytes": manifest.total_bytes(),
            "tokenizer": manifest.tokenizer.map(|blob| blob.hash.to_string()), "chat_template": manifest.chat.template.is_some(),
        });
        if blobs {
            let listed = |(name, precision, blob): (String, Precision, BlobRef)| json!({"name": name, "precision": precision.name(), "hash": blob.hash.to_string(), "bytes": blob.length});
            about["blobs"] = all_blobs(manifest).map(listed).collect();
        }
        return print_json(&about);
    }
    let config = &manifest.config;
    let mut rows = vec![
        ("name", name.clone()),
        ("id", id.to_string()),
        ("publisher", publisher.to_string()),
        ("layers", format!("{}, {} of them with experts", config.num_hidden_layers, config.moe_layers().count())),
        (
            "experts",
            format!(
                "{} a layer, {} a token; {present} of {} are here",
                config.num_experts,
                config.num_experts_per_tok,
                manifest.experts.len()
            ),
        ),
        ("an expert", format!("{} × {} {}", config.hidden_size, config.moe_intermediate_size, manifest.expert_precision)),
        ("context", format!("{} tokens", config.max_position_embeddings)),
        ("trunk", human_bytes(trunk)),
        ("here", format!("{} of {}", human_bytes(model.bytes_present(&open.store)), human_bytes(manifest.total_bytes()))),
        ("tokenizer", if manifest.tokenizer.is_some() { "yes" } else { "none: prompts are token ids" }.to_owned()),
    ];
    rows.extend(manifest.parent.map(|parent| ("made from", parent.to_string())));
    rows.iter().try_for_each(|(word, value)| print_line(&format!("{word:10}  {value}")))?;
    if blobs {
        for (name, precision, blob) in all_blobs(manifest) {
            print_line(&format!("{}  {:>10}  {precision:4}  {name}", blob.hash, blob.length))?;
        }
    }
    Ok(())
}

/// Every tensor of the trunk, then every expert, layer by layer.
fn all_blobs(manifest: &ModelManifest) -> impl Iterator<Item = (String, Precision, BlobRef)> {
    let trunk = manifest.trunk.iter().map(|tensor| (tensor.name.clone(), tensor.precision, tensor.blob));
    let slots = manifest.config.expert_slots().zip(&manifest.experts);
    trunk.chain(slots.map(|(slot, blob)| (slot.to_string(), manifest.expert_precision, *blob)))
}

pub(super) fn rm(context: &Context, model: &str) -> Result<(), Failure> {
    let mut open = context.lock()?;
    let Some((name, id)) = open.identify(model)? else {
        return Err(open.local(model).err().unwrap_or_else(|| Failure::new(Kind::NotFound, format!("no model is called {model}"))));
    };
    open.forget(id)?;
    let (blobs, bytes) = open.collect_garbage()?;
    if context.json {
        return print_json(&json!({"name": name, "id": id.to_string(), "blobs_removed": blobs, "bytes_removed": bytes}));
    }
    note(&format!("removed {name}: {blobs} blobs, {}", human_bytes(bytes)));
    Ok(())
}
