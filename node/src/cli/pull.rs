//! `confrere pull`: a model, or part of it, from peers into the store.

use clap::Args;
use serde_json::json;

use super::{Context, PeerArgs, parse_size};
use crate::failure::Failure;
use crate::federation::{Federation, expert_parts, trunk_parts};
use crate::output::{human_bytes, note, print_json, print_line};

#[derive(Args)]
pub(super) struct PullArgs {
    /// A model's id, or the name of one that is known here
    model: String,
    /// What to call it here
    #[arg(long)]
    name: Option<String>,
    /// Fetch the trunk alone; experts come when they are needed
    #[arg(long, conflicts_with = "all")]
    trunk: bool,
    /// Fetch the trunk and every expert (the default)
    #[arg(long)]
    all: bool,
    /// Fetch the trunk, and experts up to so many bytes: those that the fewest peers have
    #[arg(long, value_name = "SIZE", value_parser = parse_size, conflicts_with_all = ["trunk", "all"])]
    experts: Option<u64>,
    #[command(flatten)]
    peers: PeerArgs,
}

pub(super) fn pull(context: &Context, args: &PullArgs) -> Result<(), Failure> {
    let mut open = context.lock()?;
    let federation = Federation::connect(&context.runtime, &open.dir, &args.peers.options(), context.offline)?;
    let model = federation.find(&mut open, &args.model, args.name.as_deref())?;
    let mut bytes = federation.bring(&open.store, &trunk_parts(&model.manifest), "trunk")?;
    if let Some(bytes_max) = args.experts {
        bytes += federation.bring(&open.store, &federation.rarest(&open.store, &model.manifest, bytes_max)?, "experts")?;
    } else if !args.trunk {
        bytes += federation.bring(&open.store, &expert_parts(&model.manifest), "experts")?;
    }
    note(&format!("{}: fetched {}", model.name, human_bytes(bytes)));
    if context.json {
        let experts = json!({"have": model.experts_present(&open.store), "all": model.manifest.experts.len()});
        return print_json(&json!({"name": model.name, "id": model.id.to_string(), "experts": experts, "bytes_fetched": bytes}));
    }
    print_line(&model.id.to_string())
}
