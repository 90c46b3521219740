//! `confrere pull`: a model, or part of it, from peers into the store.

use base::failure::Failure;
use base::output::{byte_bar, human_bytes, note, print_json, print_line};
use clap::Args;
use indicatif::ProgressBar;
use runtime::command::{Context, Held, PeerArgs, parse_size};
use runtime::daemon::Daemon;
use runtime::federation::Federation;
use runtime::models::pulled_json;
use runtime::pulling::{self, PullScope};
use serde_json::{Value, json};

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
    let pulled = match context.open()? {
        Held::Here(open) => {
            let federation = Federation::connect(context.runtime.handle(), &open.dir, &args.peers.options(), context.offline)?;
            let model = federation.find(&open, &args.model, args.name.as_deref())?;
            let bytes = pulling::pull(&federation, &open, &model, &args.part(), context.disk_max)?;
            pulled_json(&open, &model, bytes)
        }
        Held::Daemon(daemon) => ask(context, args, &daemon)?,
    };
    let name = pulled["name"].as_str().unwrap_or_default();
    note(&format!("{name}: fetched {}", human_bytes(pulled["bytes_fetched"].as_u64().unwrap_or(0))));
    if context.json { print_json(&pulled) } else { print_line(pulled["id"].as_str().unwrap_or_default()) }
}

/// Has the node that serves pull, and shows how far it is.
fn ask(context: &Context, args: &PullArgs, daemon: &Daemon) -> Result<Value, Failure> {
    context.only_given(&["model", "name", "trunk", "all", "experts", "domain"])?;
    let request = json!({
        "model": args.model, "name": args.name, "trunk": args.trunk.then_some(true), "experts_bytes": args.experts, "domain": args.domain,
    });
    let (mut bar, mut pulled) = (None::<(String, ProgressBar)>, Value::Null);
    let on_event = |event: Value| {
        if event["id"].is_string() {
            pulled = event;
            return Ok(());
        }
        let name = event["name"].as_str().unwrap_or_default();
        if bar.as_ref().is_none_or(|(known, _)| known != name) {
            let (_, old) = bar.replace((name.to_owned(), byte_bar(event["total"].as_u64().unwrap_or(0), name))).unzip();
            old.iter().for_each(ProgressBar::finish_and_clear);
        }
        bar.iter().for_each(|(_, bar)| bar.set_position(event["bytes"].as_u64().unwrap_or(0)));
        Ok(())
    };
    let ended = context.wait(daemon.stream("/api/pull", &request, on_event));
    bar.iter().for_each(|(_, bar)| bar.finish_and_clear());
    ended.map(|()| pulled)
}

impl PullArgs {
    fn part(&self) -> PullScope {
        match (&self.domain, self.experts) {
            (Some(domain), bytes_max) => PullScope::Domain(domain.clone(), bytes_max),
            (None, Some(bytes_max)) => PullScope::Rarest(bytes_max),
            (None, None) if self.trunk => PullScope::Trunk,
            (None, None) => PullScope::All,
        }
    }
}
