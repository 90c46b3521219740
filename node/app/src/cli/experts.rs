//! `confrere experts`: which experts serve a domain or a text, and a map of what each is good at.

use std::path::PathBuf;
use std::time::Duration;

use base::clock::{check_interrupted, instant, interrupted};
use base::failure::{Failure, Kind};
use base::output::{note, print_json, print_line};
use clap::{Args, Subcommand};
use inference::chat::{ContentPart, MediumKind};
use inference::generate::read;
use inference::media::limits::MediaLimits;
use inference::tokenizer::SpecialTokens;
use net::PeerId;
use net::network::Network;
use net::records::clock_text;
use protocol::profile::Modality;
use protocol::profile::lift::FALSE_DISCOVERY_RATE;
use protocol::record::is_domain_name;
use runtime::claims::{self, Check, Claim, Claims, Sample, check_text, unknown_domain};
use runtime::command::{Context, EngineArgs, Held, PeerArgs};
use runtime::data_dir::{LocalModel, OpenDataDir};
use runtime::federation::Federation;
use runtime::measuring::Measuring;
use runtime::media::{FPS_DEFAULT, GivenMedium, MediaSource, Senses, prepare};
use runtime::probes;
use runtime::profiles::ProfileStep;
use runtime::pulling::SETTLE;
use runtime::specialists::{Subject, check_layer, domain_json, map_json, model_of, no_profile, own_body, row_json};
use serde_json::{Value, json};

use super::map::Map;
use super::one_expert;
use super::{encoded, parse_time};

const HEADING: &str = "layer expert   lift             95%        q  routed  trials helps at least";
/// Providers of an expert that are named.
const PROVIDERS_SHOWN: usize = 3;
/// Experts whose trials are made again.
const SAMPLE: usize = 5;
/// Tokens that a chat template puts around a question, at most.
const QUESTION_MARKS: usize = 1024;
/// Experts that are listed unless told otherwise.
const TOP_DEFAULT: u32 = 10;

#[derive(Subcommand)]
pub(super) enum ExpertsCommand {
    /// List the experts that serve a domain, or a text, best
    Which(Box<WhichArgs>),
    /// Show what is known of one expert
    Show(one_expert::ShowArgs),
    /// Show which domain each expert serves
    Map(MapArgs),
}

#[derive(Args)]
pub(super) struct WhichArgs {
    /// A domain of the model's profile
    #[arg(required_unless_present_any = ["modality", "text", "image", "audio"], conflicts_with_all = ["text", "image", "audio"])]
    domain: Option<String>,
    /// Tokens of this modality: text, image or audio; of the domain, or of all
    #[arg(long, value_name = "MODALITY", conflicts_with_all = ["text", "image", "audio"])]
    modality: Option<String>,
    /// The experts that this text uses; with a picture or a sound, the question about it
    #[arg(long, value_name = "TEXT")]
    text: Option<String>,
    /// The experts that this picture uses
    #[arg(long, value_name = "FILE")]
    image: Vec<PathBuf>,
    /// The experts that this sound uses
    #[arg(long, value_name = "FILE")]
    audio: Vec<PathBuf>,
    /// A name, an id or the beginning of an id [default: the only model with a profile]
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Of this layer alone
    #[arg(long, value_name = "N")]
    layer: Option<u32>,
    /// How many
    #[arg(long, value_name = "N", default_value_t = TOP_DEFAULT, value_parser = clap::value_parser!(u32).range(1..))]
    top: u32,
    /// Ask the peers, too, and check what they say if the whole model is here
    #[arg(long, conflicts_with_all = ["text", "image", "audio"])]
    federation: bool,
    /// With --federation: how long to measure again what peers say
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_time)]
    check: Duration,
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
        ExpertsCommand::Which(args) if args.text.is_some() || !args.image.is_empty() || !args.audio.is_empty() => of_input(context, args),
        ExpertsCommand::Which(args) => {
            let subject = Subject::new(args.domain.clone(), args.modality.as_deref())?;
            if args.federation { of_federation(context, args, &subject) } else { of_subject(context, args, &subject) }
        }
        ExpertsCommand::Show(args) => one_expert::show(context, args),
        ExpertsCommand::Map(args) => map(context, args),
    }
}

fn of_subject(context: &Context, args: &WhichArgs, subject: &Subject) -> Result<(), Failure> {
    let json = match context.open()? {
        Held::Here(open) => domain_json(&open, &model_of(&open, args.model.as_deref())?, subject, args.layer, args.top as usize)?,
        Held::Daemon(daemon) => {
            context.only_given(&["domain", "modality", "model", "layer", "top"])?;
            let (domain, modality) = (args.domain.clone(), args.modality.clone());
            let more = [
                ("domain", domain),
                ("modality", modality),
                ("model", args.model.clone()),
                ("layer", args.layer.map(|layer| layer.to_string())),
            ];
            let more: String = more.iter().filter_map(|(name, value)| Some(format!("&{name}={}", encoded(value.as_ref()?)))).collect();
            context.ask(&daemon, &format!("/api/experts?top={}{more}", args.top))?
        }
    };
    if context.json {
        return print_json(&json);
    }
    print_line(&format!("{HEADING}  here"))?;
    for row in json["experts"].as_array().into_iter().flatten() {
        print_line(&format!("{}  {}", row_text(row), if row["here"] == true { "yes" } else { "no" }))?;
    }
    note(&format!(
        "{} at {}, by the lower bound of the lift: {} of {} experts are specialists of {} (at most {:.0}% of them by chance)",
        json["name"].as_str().unwrap_or_default(),
        json["precision"].as_str().unwrap_or_default(),
        json["specialists"],
        json["tested"],
        subject.text(),
        FALSE_DISCOVERY_RATE * 100.0
    ));
    Ok(())
}

/// What the federation says: claims of peers, measured again as far as that can be done here, and who has the experts.
fn of_federation(context: &Context, args: &WhichArgs, subject: &Subject) -> Result<(), Failure> {
    let open = context.lock()?;
    let federation = Federation::connect(context.runtime.handle(), &open.dir, &args.peers.options(), context.offline)?;
    let model = args.model.clone().map_or_else(|| open.only_model(), Ok)?;
    let found = federation.find(&open, &model, None)?;
    check_layer(&found, args.layer)?;
    let network = federation.settle(SETTLE)?.ok_or_else(|| no_peer(context))?;
    // Peers are asked for what they say of the model; a modality is looked up in that.
    let text = subject.text();
    let domain = subject.domain().unwrap_or(&text);
    if !is_domain_name(domain) {
        return Err(Failure::new(
            Kind::Usage,
            format!("{domain:?} cannot name a domain: it takes 1 to 32 lower-case letters, digits and _"),
        ));
    }
    let mut claims = claims::collect(&federation, (&open, &network), &found, domain, None)?;
    if let (Some(body), Some(profile)) = (own_body(&open, &found)?, open.dir.profile(found.id)?) {
        claims.domains.extend(body.names().into_iter().map(str::to_owned));
        claims.add_own(open.dir.key()?.id(), profile.arithmetic, body);
    }
    if claims.held.is_empty() && network.peers.borrow().connected.is_empty() {
        return Err(Failure::new(Kind::NoPeers, "no peer answers"));
    }
    check_claims(context, args, (&open, &found), &federation, &network, domain, &mut claims)?;
    let experts: Vec<_> = found.manifest.text().placed_experts().collect();
    let rows: Vec<_> = claims
        .ranking(subject)
        .into_iter()
        .filter(|(one, _)| args.layer.is_none_or(|layer| experts[one.expert].0.layer == layer))
        .collect();
    if rows.is_empty() {
        claims.domains.sort();
        claims.domains.dedup();
        return Err(unknown_domain(domain, &claims.domains, &claims));
    }
    let shown = &rows[..rows.len().min(args.top as usize)];
    let blobs: Vec<_> = shown.iter().map(|(one, _)| experts[one.expert].1.blob).collect();
    let holders = federation.holders(found.id, &blobs)?;
    let trust = |peer: &PeerId| network.trust_in_bytes(*peer);
    if context.json {
        let rows: Vec<_> = shown
            .iter()
            .zip(&holders)
            .map(|((one, claim), holders)| {
                let (slot, expert) = experts[one.expert];
                let mut row = row_json(slot, one, open.store.contains(&expert.blob.hash));
                row["claim"] = json!(claim);
                row["providers"] = holders.iter().map(|peer| json!({"peer": peer.to_string(), "trust": trust(peer)})).collect();
                row
            })
            .collect();
        return print_json(&json!({
            "model": found.id.to_string(), "domain": text, "precision": found.manifest.precision_text(),
            "false_discovery_rate": FALSE_DISCOVERY_RATE, "experts": rows, "claims": claims.held.iter().map(claim_json).collect::<Vec<_>>(),
            "refuted": by_node(&claims.refuted), "missing": by_node(&claims.missing),
        }));
    }
    print_line(&format!("{HEADING}  says  providers (trust)"))?;
    for ((one, claim), holders) in shown.iter().zip(&holders) {
        let here = open.store.contains(&experts[one.expert].1.blob.hash).then(|| "here".to_owned());
        let mut trusted: Vec<_> = holders.iter().map(|peer| (trust(peer), peer)).collect();
        trusted.sort_by(|a, b| b.0.total_cmp(&a.0));
        let peers = trusted.iter().take(PROVIDERS_SHOWN).map(|(trust, peer)| format!("{} ({trust:.2})", short(&peer.to_string())));
        let more = trusted.len().saturating_sub(PROVIDERS_SHOWN);
        let providers: Vec<_> = here.into_iter().chain(peers).chain((more > 0).then(|| format!("{more} more"))).collect();
        let providers = if providers.is_empty() { "nobody".to_owned() } else { providers.join(", ") };
        print_line(&format!("{}  [{}]   {providers}", row_text(&row_json(experts[one.expert].0, one, false)), claim + 1))?;
    }
    for (number, claim) in (1..).zip(&claims.held) {
        let trust = if claim.check == Check::Own {
            String::new()
        } else {
            format!("trust {:.2} from here, {:.2} with what others say; ", claim.opinion.first_hand, claim.opinion.ordering)
        };
        note(&format!("[{number}] {}: {trust}{}", claim.node, check_text(&claim.check)));
    }
    claims.clock_offset_ms.iter().for_each(|offset_ms| note(&format!("warning: {}", clock_text(*offset_ms))));
    claims.refuted.iter().for_each(|(node, why)| note(&format!("[–] {node}: counts for nothing: {why}")));
    claims.missing.iter().for_each(|(node, why)| note(&format!("[–] {node}: what it says could not be had: {why}")));
    note(&format!("{} at {}", found.name, found.manifest.precision_text()));
    Ok(())
}

fn no_peer(context: &Context) -> Failure {
    let why = if context.offline { "--offline: no peer is asked" } else { "no peer is known (--peer ADDR, or `confrere join TICKET`)" };
    Failure::new(Kind::NoPeers, why)
}

/// Measures again what peers say, if the model is here and there is time.
fn check_claims(
    context: &Context,
    args: &WhichArgs,
    (open, found): (&OpenDataDir, &LocalModel),
    federation: &Federation,
    network: &Network,
    domain: &str,
    claims: &mut Claims,
) -> Result<(), Failure> {
    let shipped = claims.held.iter().find_map(|claim| probes::shipped_as(claim.probes));
    let probes = shipped.unwrap_or_else(|| probes::shipped_for(&found.manifest));
    let is_known = probes.set.domains().contains_key(domain);
    if claims.held.iter().all(|claim| claim.check == Check::Own) || args.check.is_zero() {
        return Ok(());
    }
    let is_whole = found.blobs().keys().all(|hash| open.store.contains(hash));
    if !is_known || !is_whole {
        let why = if is_whole {
            "the domain is not among the probes here"
        } else {
            "the model is not all here (confrere profile verify fetches it)"
        };
        claims.leave_unchecked(why);
        return Ok(());
    }
    let began = instant();
    let in_time = || instant() - began < args.check && !interrupted();
    let mut measuring = Measuring::new(context, (open, found), federation, &args.engine, &probes)?;
    let mut journal = measuring.resume(open, found, &probes)?;
    while in_time()
        && let Some(reading) = measuring.profiler.read_next(&mut measuring.loaded.engine, &mut measuring.loaded.towers)?
    {
        journal.add(&ProfileStep::Read(reading))?; // the next time goes on from here
    }
    check_interrupted()?;
    if measuring.profiler.tokens_read() < measuring.profiler.tokens() {
        claims.leave_unchecked("no time (--check TIME)");
        return Ok(());
    }
    let number = measuring.profiler.body().domain(domain).expect("the set has it");
    let tools = (&measuring.profiler, &mut measuring.loaded);
    let slots: Vec<_> = found.manifest.text().placed_experts().map(|(slot, _)| slot).collect();
    let among = |expert: usize| args.layer.is_none_or(|layer| slots[expert].layer == layer);
    let sample = Sample { domain: number, experts: SAMPLE, of: args.top as usize, among: &among };
    claims.check(network, tools, measuring.build_profile, &sample, began + args.check)?;
    check_interrupted()
}

fn claim_json(claim: &Claim) -> Value {
    let (check, why) = match &claim.check {
        Check::Own => ("own", None),
        Check::Holds => ("holds", None),
        Check::Not(why) => ("unchecked", Some((*why).to_owned())),
        Check::Refuted(why) => ("refuted", Some(why.clone())),
    };
    json!({
        "node": claim.node.to_string(), "check": check, "why": why, "trust": claim.opinion.first_hand, "ordering": claim.opinion.ordering,
        "body": protocol::ContentHash::of(&claim.body.to_bytes()).to_string(),
    })
}

fn by_node(whys: &[(protocol::NodeId, String)]) -> Vec<Value> {
    whys.iter().map(|(node, why)| json!({"node": node.to_string(), "why": why})).collect()
}

/// The beginning of a long name.
fn short(name: &str) -> String {
    let end = name.char_indices().nth(14).map_or(name.len(), |(at, _)| at);
    if end < name.len() { format!("{}…", &name[..end]) } else { name.to_owned() }
}

/// A row for people, from the one for programs.
fn row_text(row: &Value) -> String {
    let number = |name: &str| row[name].as_f64().unwrap_or(0.0);
    let bounds = format!("{:.2} to {:.2}", number("lift_lower"), number("lift_upper"));
    let q = if number("q") < 1e-4 { "<0.0001".to_owned() } else { format!("{:.4}", number("q")) };
    let helps = if row["trials"] == 0 { "not tried".to_owned() } else { format!("{:.0}%", number("helps_lower") * 100.0) };
    let count = |name: &str| row[name].as_u64().unwrap_or(0);
    format!(
        "{:>5} {:>6} {:>6.2} {bounds:>15} {q:>8} {:>7} {:>7} {helps:>14}",
        count("layer"),
        count("expert"),
        number("lift"),
        count("routed"),
        count("trials")
    )
}

/// The experts that a text, a picture or a sound uses, by how much likelier that is than in the mean of the profile's domains.
fn of_input(context: &Context, args: &WhichArgs) -> Result<(), Failure> {
    let open = context.lock()?;
    let federation = Federation::connect(context.runtime.handle(), &open.dir, &args.peers.options(), context.offline)?;
    let found = match &args.model {
        Some(model) => federation.find(&open, model, None)?,
        None => model_of(&open, None)?,
    };
    check_layer(&found, args.layer)?;
    let usual = own_body(&open, &found)?;
    let text = args.text.as_deref().unwrap_or_default();
    let files = |kind, paths: &[PathBuf]| {
        let given = |path: &PathBuf| GivenMedium {
            kind,
            name: path.display().to_string(),
            source: MediaSource::Path(path.clone()),
            fps: FPS_DEFAULT,
            sound: None,
        };
        paths.iter().map(given).collect::<Vec<_>>()
    };
    let media = [files(MediumKind::Image, &args.image), files(MediumKind::Audio, &args.audio)].concat();
    let limits = MediaLimits::default();
    let senses = Senses { vision: found.manifest.vision(), audio: found.manifest.audio(), limits: &limits };
    let prepared = prepare(senses, &media)?;
    let places: usize = prepared.iter().map(|medium| medium.medium.places()).sum();
    let window = if media.is_empty() { text.len().max(1) } else { places + text.len() + QUESTION_MARKS };
    let mut loaded = federation.load(&open, &found, context.memory_max, args.engine.options(&found.manifest, Some(window)))?;
    let (tokens, media) = if media.is_empty() {
        let missing = || Failure::new(Kind::Usage, "the model has no tokenizer, so it cannot read text");
        let mut tokens = loaded.text.tokenizer.as_ref().ok_or_else(missing)?.encode(text, SpecialTokens::AsWritten)?;
        tokens.truncate(loaded.engine.context());
        if tokens.is_empty() {
            return Err(Failure::new(Kind::Usage, "the text is empty"));
        }
        (tokens, None)
    } else {
        let parts = media.iter().map(|medium| ContentPart::Medium(medium.kind)).chain([ContentPart::Text(text.to_owned())]);
        let context = loaded.engine.context();
        let request = loaded.text.question(parts.collect(), prepared, context, &found.manifest.generation)?;
        (request.prompt, request.media)
    };
    let decoder = found.manifest.decoder();
    let slots: Vec<_> = found.manifest.text().placed_experts().map(|(slot, _)| slot).collect();
    let log = inference::activation_log::ActivationLog::new(tokens.len() * decoder.layers() as usize);
    loaded.engine.log = Some(log);
    read(&mut loaded.engine, &mut loaded.towers, (&tokens, media.as_ref()), |_, _| Ok::<_, Failure>(()))?;
    let log = loaded.engine.log.take().expect("it was put there");
    // Of a picture or a sound, its own tokens are looked at, and not the words about it.
    let counts = |modality: Modality| media.is_none() || modality != Modality::Text;
    let counted = if media.is_none() { tokens.len() } else { places };
    let mut used = std::collections::BTreeMap::<(u32, u32), u32>::new();
    for entry in log.entries().filter(|entry| counts(entry.modality)) {
        for choice in entry.choices {
            *used.entry((entry.layer, choice.expert)).or_default() += 1;
        }
    }
    let share_of = |number: usize| match &usual {
        Some(body) => {
            let shares = body.domains.iter().zip(&body.experts[number].domains);
            shares.map(|(total, of)| f64::from(of.routed) / total.tokens.max(1) as f64).sum::<f64>() / body.domains.len() as f64
        }
        None => f64::from(decoder.experts_per_token()) / f64::from(decoder.experts()),
    };
    let mut rows: Vec<_> = slots
        .iter()
        .enumerate()
        .filter(|(_, slot)| args.layer.is_none_or(|layer| slot.layer == layer))
        .filter_map(|(number, slot)| {
            let used = *used.get(&(slot.layer, slot.expert))?;
            let share = f64::from(used) / counted as f64;
            Some((*slot, used, share, share / share_of(number).max(1e-9)))
        })
        .collect();
    // Of a short text, what was used once says little.
    rows.sort_by(|a, b| (b.3 * f64::from(b.1).sqrt()).total_cmp(&(a.3 * f64::from(a.1).sqrt())).then(a.0.cmp(&b.0)));
    rows.truncate(args.top as usize);
    if context.json {
        let rows: Vec<_> = rows
            .iter()
            .map(
                |(slot, used, share, lift)| json!({"layer": slot.layer, "expert": slot.expert, "used": used, "share": share, "lift": lift}),
            )
            .collect();
        return print_json(&json!({"model": found.id.to_string(), "tokens": counted, "experts": rows}));
    }
    print_line(&format!("{:>5} {:>6} {:>6} {:>6} {:>6}", "layer", "expert", "used", "share", "lift"))?;
    for (slot, used, share, lift) in rows {
        print_line(&format!("{:>5} {:>6} {used:>6} {:>5.0}% {lift:>6.2}", slot.layer, slot.expert, share * 100.0))?;
    }
    let against = if usual.is_some() {
        "the mean of the profile's domains"
    } else {
        "what chance would give; confrere profile build makes a profile"
    };
    note(&format!("{counted} tokens; lift is against {against}"));
    Ok(())
}

fn map(context: &Context, args: &MapArgs) -> Result<(), Failure> {
    let json = match context.open()? {
        Held::Here(open) => map_json(&open, &open.local(&args.model)?)?,
        Held::Daemon(daemon) => context.ask(&daemon, &format!("/api/experts/map?model={}", encoded(&args.model)))?,
    };
    let map = Map::of(&json).ok_or_else(|| Failure::new(Kind::Other, "the map cannot be read"))?;
    if map.names.is_empty() {
        return Err(no_profile(&args.model));
    }
    if let Some(path) = &args.png {
        std::fs::write(path, map.png()?).map_err(|error| base::failure::io_failure("write", path, &error))?;
        note(&format!("wrote {}", path.display()));
    }
    if context.json {
        let cells = map.cells.iter().enumerate().map(|(at, cell)| {
            json!({"layer": map.first_layers[at / map.per_layer], "expert": at % map.per_layer,
                   "domain": cell.map(|cell| map.names[cell.domain].clone()), "lift_lower": cell.map(|cell| cell.strength)})
        });
        return print_json(&json!({"model": json["model"], "domains": map.names, "experts": cells.collect::<Vec<_>>()}));
    }
    print_line(map.text().trim_end())
}
