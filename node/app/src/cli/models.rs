//! `confrere ls`, `show` and `rm`: the models that are here.

use base::failure::{Failure, Kind};
use base::output::{human_bytes, note, print_json, print_line};
use runtime::command::{Context, Held};
use runtime::models::{details, summary};
use serde_json::{Value, json};

use super::encoded;

pub(super) fn ls(context: &Context) -> Result<(), Failure> {
    let models = match context.open()? {
        Held::Here(open) => open.readable_models().iter().map(|found| summary(&open, found)).collect(),
        Held::Daemon(daemon) => context.ask(&daemon, "/api/models")?,
    };
    if context.json {
        return print_json(&models);
    }
    let models = models.as_array().cloned().unwrap_or_default();
    if models.is_empty() {
        note("no models yet: confrere import PATH, or confrere join TICKET");
        return Ok(());
    }
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let width = models.iter().map(|model| text(&model["name"]).len()).max().unwrap_or(0).max(4);
    print_line(&format!("{:width$}  {:12}  {:>13}  {:>10}", "name", "id", "experts", "here"))?;
    for model in models {
        let experts = format!("{}/{}", model["experts"]["have"], model["experts"]["all"]);
        let here = human_bytes(model["bytes"].as_u64().unwrap_or(0));
        print_line(&format!("{:width$}  {:.12}  {experts:>13}  {here:>10}", text(&model["name"]), text(&model["id"])))?;
    }
    Ok(())
}

/// The parts of a model, each with what its trunk takes.
fn parts(parts: &Value) -> String {
    let part = |part: &Value| {
        let (kind, bytes) = (part["kind"].as_str().unwrap_or_default(), human_bytes(part["trunk_bytes"].as_u64().unwrap_or(0)));
        let experts =
            part["experts"].as_u64().filter(|&experts| experts > 0).map_or_else(String::new, |experts| format!(" and {experts} experts"));
        format!("{kind} ({bytes}{experts})")
    };
    parts.as_array().into_iter().flatten().map(part).collect::<Vec<_>>().join(", ")
}

pub(super) fn show(context: &Context, model: &str, blobs: bool) -> Result<(), Failure> {
    let about = match context.open()? {
        Held::Here(open) => details(&open, &open.local(model)?, blobs),
        Held::Daemon(daemon) => context.ask(&daemon, &format!("/api/models/{}?blobs={blobs}", encoded(model)))?,
    };
    if context.json {
        return print_json(&about);
    }
    let (config, experts) = (&about["config"], &about["experts"]);
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let bytes = |value: &Value| human_bytes(value.as_u64().unwrap_or(0));
    let dense = config["dense_layers"].as_array().map_or(0, Vec::len) as u64;
    let layers = config["num_hidden_layers"].as_u64().unwrap_or(0);
    let mut rows = vec![
        ("name", text(&about["name"])),
        ("id", text(&about["id"])),
        ("publisher", text(&about["publisher"])),
        ("layers", format!("{layers}, {} of them with experts", layers - dense)),
        (
            "experts",
            format!(
                "{} a layer, {} a token; {} of {} are here",
                config["num_experts"], config["num_experts_per_tok"], experts["have"], experts["all"]
            ),
        ),
        ("an expert", format!("{} × {} {}", config["hidden_size"], config["moe_intermediate_size"], text(&about["precision"]))),
        ("context", format!("{} tokens", config["max_position_embeddings"])),
        ("trunk", bytes(&about["trunk_bytes"])),
        ("parts", parts(&about["parts"])),
        ("here", format!("{} of {}", bytes(&about["bytes"]), bytes(&about["total_bytes"]))),
        ("tokenizer", if about["tokenizer"].is_string() { "yes" } else { "none: prompts are token ids" }.to_owned()),
    ];
    if about["parent"].is_string() {
        rows.push(("made from", text(&about["parent"])));
    }
    rows.iter().try_for_each(|(word, value)| print_line(&format!("{word:10}  {value}")))?;
    for blob in about["blobs"].as_array().into_iter().flatten() {
        let (hash, precision, name) = (text(&blob["hash"]), text(&blob["precision"]), text(&blob["name"]));
        print_line(&format!("{hash}  {:>10}  {precision:4}  {name}", blob["bytes"].as_u64().unwrap_or(0)))?;
    }
    Ok(())
}

pub(super) fn rm(context: &Context, model: &str) -> Result<(), Failure> {
    let open = context.lock()?;
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
