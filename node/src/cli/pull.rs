//! `confrere pull`: a model, or part of it, from peers into the store.

use clap::Args;
use protocol::BlobRef;
use serde_json::json;

use super::profile::SETTLE;
use super::{Context, PeerArgs, experts, parse_size};
use crate::claims::{self, Claims};
use crate::data_dir::{LocalModel, OpenDataDir};
use crate::failure::Failure;
use crate::federation::{Federation, expert_parts, trunk_parts};
use crate::output::{human_bytes, note, print_json, print_line};
use crate::specialists::own_body;

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
    /// Fetch the trunk, and of the experts those that a domain uses most, as far as the disk goes that --disk or --experts allows
    #[arg(long, value_name = "DOMAIN", conflicts_with_all = ["trunk", "all"])]
    domain: Option<String>,
    #[command(flatten)]
    peers: PeerArgs,
}

pub(super) fn pull(context: &Context, args: &PullArgs) -> Result<(), Failure> {
    let mut open = context.lock()?;
    let federation = Federation::connect(context.runtime.handle(), &open.dir, &args.peers.options(), context.offline)?;
    let model = federation.find(&mut open, &args.model, args.name.as_deref())?;
    let mut bytes = federation.bring(&open.store, &trunk_parts(&model.manifest), "trunk")?;
    if let Some(domain) = &args.domain {
        bytes += federation.bring(&open.store, &of_domain(context, args, (&open, &federation, &model), domain)?, "experts")?;
    } else if let Some(bytes_max) = args.experts {
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

/// The experts that a domain uses most, by what is measured here or, failing that, by what the peer says who is trusted most; as many as fit.
fn of_domain(
    context: &Context,
    args: &PullArgs,
    (open, federation, model): (&OpenDataDir, &Federation, &LocalModel),
    domain: &str,
) -> Result<Vec<(BlobRef, String)>, Failure> {
    let mut claims = Claims::default();
    if let (Some(body), Some(profile)) = (own_body(open, model)?, open.dir.profile(model.id)?) {
        claims.add_own(open.dir.key()?.id(), profile.arithmetic, body);
    } else if let Some(network) = federation.settle(SETTLE)? {
        claims = claims::collect(federation, (open, &network), model, domain, None)?;
    }
    let order = claims.by_use(domain);
    if order.is_empty() {
        claims.domains.extend(claims.held.iter().flat_map(|claim| claim.body.domains.iter().map(|of| of.name.clone())));
        claims.domains.sort();
        claims.domains.dedup();
        return Err(experts::unknown_domain(domain, &claims.domains, &claims));
    }
    let stat = open.store.stat()?;
    let parts = expert_parts(&model.manifest);
    let here = parts.iter().filter(|(blob, _)| open.store.contains(&blob.hash)).map(|(blob, _)| blob.length).sum();
    let of_experts = args.experts.map_or(u64::MAX, |most| most.saturating_sub(here));
    let mut left = of_experts.min(context.disk_max.saturating_sub(stat.bytes));
    let mut fits = |blob: &BlobRef| open.store.contains(&blob.hash) || left.checked_sub(blob.length).inspect(|now| left = *now).is_some();
    Ok(order.into_iter().map(|number| parts[number].clone()).filter(|(blob, _)| fits(blob)).collect())
}
