//! `confrere ps` and `confrere stop`: the models that a node which serves has in memory.

use base::failure::{Failure, Kind};
use base::output::{human_bytes, note, print_json, print_line};
use runtime::command::{Context, Held};
use serde_json::{Value, json};

/// Lists the models in memory.
pub(super) fn ps(context: &Context) -> Result<(), Failure> {
    let loaded = match context.open()? {
        Held::Daemon(daemon) => context.ask(&daemon, "/api/loaded")?,
        Held::Here(_) => {
            note("no node serves from this data directory");
            json!({"models": [], "memory": null})
        }
    };
    if context.json {
        return print_json(&loaded);
    }
    let models = loaded["models"].as_array().cloned().unwrap_or_default();
    if models.is_empty() {
        note("no model is in memory");
    } else {
        print_line(&format!("{:<24} {:>8} {:>10} {:>10} {:>10}  state", "model", "context", "trunk", "results", "keys"))?;
    }
    for model in &models {
        print_line(&line(model))?;
    }
    if let Some(experts) = loaded["memory"]["experts_bytes"].as_u64() {
        let most = loaded["memory"]["experts_bytes_max"].as_u64().unwrap_or(0);
        let work = loaded["memory"]["work_bytes"].as_u64().unwrap_or(0);
        note(&format!("all models: experts {} of {}, working memory {}", human_bytes(experts), human_bytes(most), human_bytes(work)));
    }
    Ok(())
}

fn line(model: &Value) -> String {
    let bytes = |name: &str| human_bytes(model[name].as_u64().unwrap_or(0));
    let state = match model["active"].as_u64().unwrap_or(0) {
        0 => format!("idle for {} s", model["idle_s"]),
        active => format!("{active} under way"),
    };
    format!(
        "{:<24} {:>8} {:>10} {:>10} {:>10}  {state}",
        model["name"].as_str().unwrap_or_default(),
        model["context"],
        bytes("trunk_bytes"),
        bytes("work_bytes"),
        bytes("kv_bytes")
    )
}

/// Has a model let go once what is under way with it has ended.
pub(super) fn stop(context: &Context, model: &str) -> Result<(), Failure> {
    let Held::Daemon(daemon) = context.open()? else {
        return Err(Failure::new(Kind::NotFound, "no node serves from this data directory, so no model is in memory"));
    };
    context.only_given(&["model"])?;
    let stopped = context.wait(daemon.post("/api/unload", &json!({"model": model})))?;
    if context.json {
        return print_json(&stopped);
    }
    let name = stopped["name"].as_str().unwrap_or_default();
    note(&if stopped["loaded"] == true {
        format!("{name} goes once what is under way has ended")
    } else {
        format!("{name} is not in memory")
    });
    Ok(())
}
