//! `confrere experts`: which experts serve a domain or a text, and a map of what each is good at.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use inference::tokenizer::SpecialTokens;
use protocol::ExpertSlot;
use protocol::profile::ProfileBody;
use protocol::profile::lift::{FALSE_DISCOVERY_RATE, Ranked, ranking};
use serde_json::{Value, json};

use super::map::{Cell, Map};
use super::{Context, EngineArgs, PeerArgs};
use crate::clock::now_ms;
use crate::data_dir::{LocalModel, OpenDataDir};
use crate::failure::{Failure, Kind};
use crate::federation::Federation;
use crate::output::{note, print_json, print_line};

/// Experts that are listed unless told otherwise.
const TOP_DEFAULT: usize = 10;

#[derive(Subcommand)]
pub(super) enum ExpertsCommand {
    /// List the experts that serve a domain, or a text, best
    Which(WhichArgs),
    /// Show which domain each expert serves
    Map(MapArgs),
}

#[derive(Args)]
pub(super) struct WhichArgs {
    /// A domain of the model's profile
    #[arg(required_unless_present = "text", conflicts_with = "text")]
    domain: Option<String>,
    /// The experts that this text uses
    #[arg(long, value_name = "TEXT")]
    text: Option<String>,
    /// A name, an id or the beginning of an id [default: the only model with a profile]
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Of this layer alone
    #[arg(long, value_name = "N")]
    layer: Option<u32>,
    /// How many
    #[arg(long, value_name = "N", default_value_t = TOP_DEFAULT)]
    top: usize,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    peers: PeerArgs,
}

#[derive(Args)]
pub(super) struct MapArgs {
    /// A name, an id or the beginning of an id
    model: String,
    /// Draw a picture into this file
    #[arg(long, value_name = "FILE")]
    png: Option<PathBuf>,
}

pub(super) fn experts(context: &Context, command: &ExpertsCommand) -> Result<(), Failure> {
    match command {
        ExpertsCommand::Which(args) => match (&args.domain, &args.text) {
            (Some(domain), _) => of_domain(context, args, domain),
            (None, Some(text)) => of_text(context, args, text),
            (None, None) => unreachable!("clap asks for one of both"),
        },
        ExpertsCommand::Map(args) => map(context, args),
    }
}

/// The body of this node's own profile of a model, if there is one.
pub(super) fn own_body(open: &OpenDataDir, found: &LocalModel) -> Result<Option<ProfileBody>, Failure> {
    let Some(profile) = open.dir.profile(found.id)? else { return Ok(None) };
    let Some(bytes) = open.store.read(&profile.body.hash, now_ms())? else { return Ok(None) };
    let slots: Vec<_> = found.manifest.config.expert_slots().collect();
    let body = ProfileBody::from_bytes(&bytes, (found.id, profile.probes), &slots);
    body.map(Some).map_err(|error| Failure::new(Kind::Integrity, error.to_string()).about(format_args!("profile of {}", found.name)))
}

fn no_profile(found: &LocalModel) -> Failure {
    Failure::new(Kind::NotFound, format!("there is no profile of {}; confrere profile build {} makes one", found.name, found.name))
}

/// The number of a domain, or an error that lists those that there are.
pub(super) fn domain_of(body: &ProfileBody, name: &str) -> Result<usize, Failure> {
    body.domain(name).ok_or_else(|| {
        let known: Vec<_> = body.domains.iter().map(|domain| domain.name.as_str()).collect();
        let near = known.iter().map(|known| (strsim::damerau_levenshtein(name, known), known)).min();
        let near = near.filter(|(distance, known)| distance * 2 <= known.len()).map(|(_, known)| format!("; did you mean {known}?"));
        Failure::new(Kind::NotFound, format!("no domain is called {name} (known: {}){}", known.join(", "), near.unwrap_or_default()))
    })
}

/// The model that was named, or the only one with a profile.
fn model_of(open: &OpenDataDir, model: Option<&str>) -> Result<LocalModel, Failure> {
    if let Some(model) = model {
        return open.local(model);
    }
    let profiled: Vec<_> = open.dir.all_profiles();
    match &profiled[..] {
        [(model, _)] => open.local(&model.to_string()),
        [] => Err(Failure::new(Kind::NotFound, "no model here has a profile; confrere profile build MODEL makes one")),
        _ => Err(Failure::new(Kind::Usage, "more than one model here has a profile; say which with --model")),
    }
}

fn of_domain(context: &Context, args: &WhichArgs, domain: &str) -> Result<(), Failure> {
    let open = context.lock()?;
    let found = model_of(&open, args.model.as_deref())?;
    let body = own_body(&open, &found)?.ok_or_else(|| no_profile(&found))?;
    let number = domain_of(&body, domain)?;
    let slots: Vec<_> = found.manifest.config.expert_slots().collect();
    let rows: Vec<_> = ranking(&body, number).into_iter().filter(|one| args.layer.is_none_or(|layer| slots[one.expert].layer == layer)).collect();
    let shown = &rows[..rows.len().min(args.top)];
    let here = |one: &Ranked| open.store.contains(&found.manifest.experts[one.expert].hash);
    if context.json {
        let rows: Vec<_> = shown.iter().map(|one| row_json(slots[one.expert], one, here(one))).collect();
        return print_json(&json!({
            "model": found.id.to_string(), "domain": domain, "probes": body.probes.to_string(), "precision": found.manifest.expert_precision.to_string(),
            "tested": rows.len(), "false_discovery_rate": FALSE_DISCOVERY_RATE, "experts": rows,
        }));
    }
    print_line(&format!("{:>5} {:>6} {:>6} {:>15} {:>8} {:>7} {:>7} {:>14}  here", "layer", "expert", "lift", "95%", "q", "routed", "trials", "helps at least"))?;
    for one in shown {
        print_line(&format!("{}  {}", row_text(slots[one.expert], one), if here(one) { "yes" } else { "no" }))?;
    }
    let specialists = rows.iter().filter(|one| one.is_specialist()).count();
    note(&format!(
        "{} at {}: {specialists} of {} experts are specialists of {domain} (at most {:.0}% of them by chance)",
        found.name,
        found.manifest.expert_precision,
        rows.len(),
        FALSE_DISCOVERY_RATE * 100.0
    ));
    Ok(())
}

fn row_text(slot: ExpertSlot, one: &Ranked) -> String {
    let ExpertSlot { layer, expert } = slot;
    let bounds = format!("{:.2} to {:.2}", one.lift.lower, one.lift.upper);
    let q = if one.q_value < 1e-4 { "<0.0001".to_owned() } else { format!("{:.4}", one.q_value) };
    let helps = if one.counts.trials == 0 { "not tried".to_owned() } else { format!("{:.0}%", one.helps_lower * 100.0) };
    format!("{layer:>5} {expert:>6} {:>6.2} {bounds:>15} {q:>8} {:>7} {:>7} {helps:>14}", one.lift.value, one.counts.routed, one.counts.trials)
}

fn row_json(slot: ExpertSlot, one: &Ranked, here: bool) -> Value {
    json!({
        "layer": slot.layer, "expert": slot.expert, "lift": one.lift.value, "lift_lower": one.lift.lower, "lift_upper": one.lift.upper,
        "q": one.q_value, "specialist": one.is_specialist(), "routed": one.counts.routed, "trials": one.counts.trials, "hits": one.counts.hits,
        "helps_lower": one.helps_lower, "here": here,
    })
}

/// The experts that a text uses, by how much likelier that is than in the mean of the profile's domains.
fn of_text(context: &Context, args: &WhichArgs, text: &str) -> Result<(), Failure> {
    let mut open = context.lock()?;
    let federation = Federation::connect(&context.runtime, &open.dir, &args.peers.options(), context.offline)?;
    let found = match &args.model {
        Some(model) => federation.find(&mut open, model, None)?,
        None => model_of(&open, None)?,
    };
    let usual = own_body(&open, &found)?;
    let mut loaded = federation.load(&open, &found, context.memory_max, args.engine.options(&found.manifest, Some(text.len().max(1))))?;
    let missing = || Failure::new(Kind::Usage, "the model has no tokenizer, so it cannot read text");
    let mut tokens = loaded.tokenizer.as_ref().ok_or_else(missing)?.encode(text, SpecialTokens::AsWritten)?;
    tokens.truncate(loaded.engine.context());
    if tokens.is_empty() {
        return Err(Failure::new(Kind::Usage, "the text is empty"));
    }
    let config = &found.manifest.config;
    let slots: Vec<_> = config.expert_slots().collect();
    let log = inference::activation_log::ActivationLog::new(tokens.len() * config.num_hidden_layers as usize);
    loaded.engine.log = Some(log);
    let mut session = loaded.engine.session();
    loaded.engine.forward(&mut session, &tokens)?;
    let log = loaded.engine.log.take().expect("it was put there");
    let mut used = std::collections::BTreeMap::<(u32, u32), u32>::new();
    for entry in log.entries() {
        for choice in entry.choices {
            *used.entry((entry.layer, choice.expert)).or_default() += 1;
        }
    }
    let share_of = |number: usize| match &usual {
        Some(body) => {
            let shares = body.domains.iter().zip(&body.experts[number].domains);
            shares.map(|(total, of)| f64::from(of.routed) / total.tokens.max(1) as f64).sum::<f64>() / body.domains.len() as f64
        }
        None => f64::from(config.num_experts_per_tok) / f64::from(config.num_experts),
    };
    let mut rows: Vec<_> = slots
        .iter()
        .enumerate()
        .filter(|(_, slot)| args.layer.is_none_or(|layer| slot.layer == layer))
        .filter_map(|(number, slot)| {
            let used = *used.get(&(slot.layer, slot.expert))?;
            let share = f64::from(used) / tokens.len() as f64;
            Some((*slot, used, share, share / share_of(number).max(1e-9)))
        })
        .collect();
    // Of a short text, what was used once says little.
    rows.sort_by(|a, b| (b.3 * f64::from(b.1).sqrt()).total_cmp(&(a.3 * f64::from(a.1).sqrt())).then(a.0.cmp(&b.0)));
    rows.truncate(args.top);
    if context.json {
        let rows: Vec<_> = rows
            .iter()
            .map(|(slot, used, share, lift)| json!({"layer": slot.layer, "expert": slot.expert, "used": used, "share": share, "lift": lift}))
            .collect();
        return print_json(&json!({"model": found.id.to_string(), "tokens": tokens.len(), "experts": rows}));
    }
    print_line(&format!("{:>5} {:>6} {:>6} {:>6} {:>6}", "layer", "expert", "used", "share", "lift"))?;
    for (slot, used, share, lift) in rows {
        print_line(&format!("{:>5} {:>6} {used:>6} {:>5.0}% {lift:>6.2}", slot.layer, slot.expert, share * 100.0))?;
    }
    let against = if usual.is_some() { "the mean of the profile's domains" } else { "what chance would give; confrere profile build makes a profile" };
    note(&format!("{} tokens; lift is against {against}", tokens.len()));
    Ok(())
}

fn map(context: &Context, args: &MapArgs) -> Result<(), Failure> {
    let open = context.lock()?;
    let found = open.local(&args.model)?;
    let body = own_body(&open, &found)?.ok_or_else(|| no_profile(&found))?;
    let slots: Vec<_> = found.manifest.config.expert_slots().collect();
    let mut cells = vec![None; slots.len()];
    for domain in 0..body.domains.len() {
        for one in ranking(&body, domain).iter().filter(|one| one.is_specialist()) {
            let best: &mut Option<Cell> = &mut cells[one.expert];
            if best.is_none_or(|best| best.strength < one.lift.lower) {
                *best = Some(Cell { domain, strength: one.lift.lower });
            }
        }
    }
    let names = body.domains.iter().map(|domain| domain.name.clone()).collect();
    let map = Map { names, per_layer: found.manifest.config.num_experts as usize, first_layers: found.manifest.config.moe_layers().collect(), cells };
    if let Some(path) = &args.png {
        std::fs::write(path, map.png()?).map_err(|error| crate::data_dir::io_failure("write", path, &error))?;
        note(&format!("wrote {}", path.display()));
    }
    if context.json {
        let cells = slots.iter().zip(&map.cells).map(|(slot, cell)| {
            json!({"layer": slot.layer, "expert": slot.expert, "domain": cell.map(|cell| map.names[cell.domain].clone()), "lift_lower": cell.map(|cell| cell.strength)})
        });
        return print_json(&json!({"model": found.id.to_string(), "domains": map.names, "experts": cells.collect::<Vec<_>>()}));
    }
    print_line(map.text().trim_end())
}
