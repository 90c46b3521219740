//! `confrere profile`: measures what a model's experts are good at, tells it, and checks what others tell.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use base::clock::{instant, interrupted, now_ms};
use base::failure::{Failure, Kind};
use base::output::{count_bar, note, print_json, print_line};
use clap::{Args, Subcommand};
use inference::profiler::PAIRS_AT_ONCE;
use net::records::parse_peer;
use protocol::ModelId;
use protocol::profile::BODY_BYTES_MAX;
use protocol::profile::lift::{FALSE_DISCOVERY_RATE, ranking};
use protocol::record::Facet;
use runtime::claims::{self, Check, Sample, check_text};
use runtime::command::{Context, EngineArgs, PeerArgs};
use runtime::data_dir::LocalModel;
use runtime::federation::Federation;
use runtime::measuring::Measuring;
use runtime::probes;
use runtime::profiles::{Journal, Profile, ProfileStep};
use runtime::pulling::SETTLE;
use serde_json::{Value, json};

use super::parse_time;

/// How long a round of trials should take, and pairs of expert and domain in the first.
const ROUND_TIME: Duration = Duration::from_millis(800);
const PAIRS_FIRST: usize = 16;
/// For measuring a domain again.
const PER_DOMAIN: Duration = Duration::from_secs(600);

#[derive(Subcommand)]
pub(super) enum ProfileCommand {
    /// Measure which experts serve which domains, by reading probe texts and by leaving experts out
    Build(BuildArgs),
    /// Have `serve` tell others what was measured of a model
    Publish(PublishArgs),
    /// Measure again a part of what a peer says of a model's experts; what comes of it counts for or against the peer. What is missing of the
    /// model is fetched
    Verify(VerifyArgs),
}

#[derive(Args)]
pub(super) struct PublishArgs {
    /// A name, an id or the beginning of an id
    model: String,
    /// Take it back: it is told no more
    #[arg(long)]
    withdraw: bool,
}

#[derive(Args)]
pub(super) struct VerifyArgs {
    /// A peer's key (ed25519:…) or id (12D3Koo…)
    peer: String,
    /// A name, an id or the beginning of an id [default: the only model here]
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// In each domain, experts on which the trials are made again
    #[arg(long, value_name = "N", default_value_t = 3)]
    sample: usize,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    peers: PeerArgs,
}

#[derive(Args)]
pub(super) struct BuildArgs {
    /// A name, an id or the beginning of an id
    model: String,
    /// A directory with a file for each domain: DOMAIN.txt, probes between lines of %%, or DOMAIN.jsonl, questions with pictures and sounds
    /// [default: the nine domains of text that ship, or for a model with eyes and ears eight of them and eight kinds of questions]
    #[arg(long, value_name = "DIR")]
    probes: Option<PathBuf>,
    /// How long it may take in all: 90s, 10m, 2h. A later build goes on from there. 0 reads the probes to the end, and leaves no expert out
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_time)]
    budget: Duration,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    peers: PeerArgs,
}

pub(super) fn profile(context: &Context, command: &ProfileCommand) -> Result<(), Failure> {
    match command {
        ProfileCommand::Build(args) => build(context, args),
        ProfileCommand::Publish(args) => publish(context, args),
        ProfileCommand::Verify(args) => verify(context, args),
    }
}

fn build(context: &Context, args: &BuildArgs) -> Result<(), Failure> {
    let began = instant();
    let is_over = || !args.budget.is_zero() && instant() - began >= args.budget;
    let given = args.probes.as_deref().map(probes::read).transpose()?;
    let open = context.lock()?;
    let federation = Federation::connect(context.runtime.handle(), &open.dir, &args.peers.options(), context.offline)?;
    let found = federation.find(&open, &args.model, None)?;
    let probes = given.unwrap_or_else(|| probes::shipped_for(&found.manifest));
    let set = probes.set.hash();
    let mut measuring = Measuring::new(context, (&open, &found), &federation, &args.engine, &probes)?;
    let mut journal = measuring.resume(&open, &found, &probes)?;
    if open.dir.profile(found.id)?.is_some_and(|profile| profile.probes != set) {
        note("note: the profile by other probes is replaced; to build it again takes no new measuring");
    }
    let left = measuring.profiler.tokens() - measuring.profiler.tokens_read();
    if left > 0 {
        note(&format!("reading probes: {left} tokens …"));
    }
    if !measuring.read_all(|| !interrupted() && !is_over(), |step| journal.add(&step))? {
        journal.sync()?;
        if interrupted() {
            note("interrupted: what was read is kept, and the next build goes on from there");
            return Err(Failure::interrupted());
        }
        return read_in_part(context, &found, &measuring, began);
    }
    if !args.budget.is_zero() {
        let left = args.budget.saturating_sub(instant() - began);
        note(&format!("leaving experts out for {:.0} s …", left.as_secs_f64()));
        try_experts(&mut measuring, &mut journal, left)?;
    }
    journal.sync()?;
    let bytes = measuring.profiler.body().to_bytes();
    if bytes.len() > BODY_BYTES_MAX {
        let why = format!("the profile has {} bytes, {BODY_BYTES_MAX} is the most; fewer domains make it smaller", bytes.len());
        return Err(Failure::new(Kind::Usage, why));
    }
    let (body, _) = open.store.put(&bytes, now_ms())?;
    open.store.flush();
    let published = open.dir.profile(found.id)?.is_some_and(|profile| profile.published);
    let profile = Profile { probes: set, arithmetic: measuring.build_profile, body, published };
    open.dir.set_profile(found.id, &profile)?;
    show(context, &found, &measuring, &profile)?;
    if interrupted() {
        note("interrupted: what was found is kept, and the next build goes on from there");
        return Err(Failure::interrupted());
    }
    Ok(())
}

/// Says how far a build came whose time was over before all probes had been read: there is no profile yet.
fn read_in_part(context: &Context, found: &LocalModel, measuring: &Measuring, began: Instant) -> Result<(), Failure> {
    let (read, of) = (measuring.profiler.tokens_read(), measuring.profiler.tokens());
    let rest = (instant() - began).mul_f64((of - read) as f64 / read.max(1) as f64);
    note(&format!(
        "the time is over: {read} of {of} tokens of the probes were read, and kept; `confrere profile build {}` goes on from there, about {:.0} s more",
        found.name,
        rest.as_secs_f64()
    ));
    if context.json {
        return print_json(&json!({"model": found.id.to_string(), "finished": false, "tokens_read": read, "tokens": of}));
    }
    Ok(())
}

/// Leaves experts out, those first of which least is known, until the time is over.
fn try_experts(measuring: &mut Measuring, journal: &mut Journal, budget: Duration) -> Result<(), Failure> {
    let Measuring { loaded, profiler, .. } = measuring;
    let bar = count_bar(budget.as_millis() as u64, "trials", "ms");
    let began = instant();
    let mut pairs = PAIRS_FIRST;
    while instant() - began < budget && !interrupted() {
        let round = profiler.next_round(pairs);
        if round.is_empty() {
            break;
        }
        let round_began = instant();
        let go_on = || {
            bar.set_position((instant() - began).as_millis() as u64);
            instant() - began < budget && !interrupted()
        };
        let found = profiler.try_round((&mut loaded.engine, &mut loaded.towers), &round, go_on)?;
        if !found.is_empty() {
            journal.add(&ProfileStep::Tried(found))?;
        }
        // Rounds that end in time, whatever the model and its precision.
        let goal = pairs as f64 * ROUND_TIME.as_secs_f64() / (instant() - round_began).as_secs_f64().max(1e-3);
        pairs = (goal as usize).clamp(1, 2 * pairs).min(PAIRS_AT_ONCE);
    }
    bar.finish_and_clear();
    Ok(())
}

fn publish(context: &Context, args: &PublishArgs) -> Result<(), Failure> {
    let (id, name) = model_without_lock(context, &args.model)?;
    let missing = || Failure::new(Kind::NotFound, format!("there is no profile of {name}; confrere profile build {name} makes one"));
    let profile = context.dir.profile(id)?.ok_or_else(missing)?;
    context.dir.set_profile(id, &Profile { published: !args.withdraw, ..profile })?;
    if context.json {
        return print_json(&json!({"model": id.to_string(), "body": profile.body.hash.to_string(), "published": !args.withdraw}));
    }
    let what = if args.withdraw { "serve tells it no more" } else { "serve tells it, signed, and again before it expires" };
    note(&format!("profile of {name}: {what}"));
    Ok(())
}

/// A model with a profile, by its id or its name: a daemon may hold the lock.
fn model_without_lock(context: &Context, model: &str) -> Result<(ModelId, String), Failure> {
    match context.lock() {
        Ok(open) => open.local(model).map(|found| (found.id, found.name)),
        Err(failure) if failure.kind == Kind::Busy => {
            let names = context.dir.model_names()?;
            if let Some(id) = names.get(model) {
                return Ok((*id, model.to_owned()));
            }
            let mut fitting = names.into_iter().filter(|(_, id)| model.len() >= 4 && id.to_string().starts_with(model));
            match (fitting.next(), fitting.next()) {
                (Some((name, id)), None) => Ok((id, name)),
                (None, _) => Err(Failure::new(Kind::NotFound, format!("no model is called {model}"))),
                (Some(_), Some(_)) => Err(Failure::new(Kind::NotFound, format!("{model} is the beginning of several models' ids"))),
            }
        }
        Err(failure) => Err(failure),
    }
}

fn verify(context: &Context, args: &VerifyArgs) -> Result<(), Failure> {
    let peer = parse_peer(&args.peer)?;
    let open = context.lock()?;
    let federation = Federation::connect(context.runtime.handle(), &open.dir, &args.peers.options(), context.offline)?;
    let model = args.model.clone().map_or_else(|| open.only_model(), Ok)?;
    let found = federation.find(&open, &model, None)?;
    let own = probes::shipped_for(&found.manifest);
    let any = own.set.domains().keys().next().expect("a probe set has domains").clone();
    let network = federation.settle(SETTLE)?.ok_or_else(|| Failure::new(Kind::NoPeers, "no peer is known (--peer ADDR)"))?;
    let mut claims = claims::collect(&federation, (&open, &network), &found, &any, Some(peer))?;
    let mut results = Vec::new();
    if let Some((_, why)) = claims.missing.first() {
        return Err(Failure::new(Kind::NoPeers, format!("what {peer} says could not be had: {why}")));
    }
    if claims.held.is_empty() && claims.refuted.is_empty() {
        if network.peers.borrow().connected.is_empty() {
            return Err(Failure::new(Kind::NoPeers, "no peer answers"));
        }
        return Err(Failure::new(Kind::NotFound, format!("{peer} says nothing of {} that has come here", found.name)));
    }
    if let Some(claim) = claims.held.first() {
        let probes = probes::shipped_as(claim.probes).unwrap_or(own);
        let mut measuring = Measuring::new(context, (&open, &found), &federation, &args.engine, &probes)?;
        let mut journal = measuring.resume(&open, &found, &probes)?;
        if !measuring.read_all(|| !interrupted(), |step| journal.add(&step))? {
            return Err(Failure::interrupted());
        }
        let body = measuring.profiler.body();
        let labels: Vec<_> = (0..body.domains.len()).map(|number| body.label(number)).collect();
        for (domain, name) in labels.into_iter().enumerate() {
            let sample = Sample { domain, experts: args.sample, of: usize::MAX, among: &|_| true };
            let tools = (&measuring.profiler, &mut measuring.loaded);
            claims.check(&network, tools, measuring.build_profile, &sample, instant() + PER_DOMAIN)?;
            let check = claims.held.first().map(|claim| claim.check.clone()).expect("there is one");
            results.push((name, check.clone()));
            if interrupted() {
                return Err(Failure::interrupted());
            }
            if matches!(check, Check::Refuted(_)) {
                break;
            }
        }
    }
    let refuted = claims
        .refuted
        .first()
        .map(|(_, why)| why.clone())
        .or_else(|| results.iter().find_map(|(_, check)| if let Check::Refuted(why) = check { Some(why.clone()) } else { None }));
    let trust = network.records.lock().trust.first_hand(now_ms(), &peer, Facet::Profile);
    if context.json {
        let domains: Vec<_> = results.iter().map(|(name, check)| json!({"domain": name, "holds": *check == Check::Holds})).collect();
        print_json(
            &json!({"peer": peer.to_string(), "model": found.id.to_string(), "domains": domains, "refuted": refuted, "trust": trust}),
        )?;
    } else {
        for (name, check) in &results {
            print_line(&format!("{name:16} {}", check_text(check)))?;
        }
        note(&format!("trust of {peer} in profiles, from what was seen here: {trust:.3}"));
    }
    refuted.map_or(Ok(()), |why| Err(Failure::new(Kind::Refused, format!("what {peer} says does not hold: {why}"))))
}

/// Says what a profile comes to.
fn show(context: &Context, found: &LocalModel, measuring: &Measuring, profile: &Profile) -> Result<(), Failure> {
    let body = measuring.profiler.body();
    let trials = |domain: usize| body.experts.iter().map(|counts| u64::from(counts.domains[domain].trials)).sum::<u64>();
    let specialists = |domain| ranking(body, domain).iter().filter(|one| one.is_specialist()).count();
    let domains: Vec<_> = body.domains.iter().enumerate().map(|(n, domain)| (domain, specialists(n), trials(n))).collect();
    if context.json {
        let domains: Vec<Value> = domains
            .iter()
            .map(|(domain, specialists, trials)| {
                json!({"domain": domain.name, "modality": domain.modality.name(), "probes": domain.probes, "tokens": domain.tokens, "specialists": specialists, "trials": trials})
            })
            .collect();
        return print_json(&json!({
            "model": found.id.to_string(), "probes": profile.probes.to_string(), "build_profile": profile.arithmetic.to_string(),
            "body": profile.body.hash.to_string(), "body_bytes": profile.body.length, "experts": body.experts.len(), "domains": domains,
        }));
    }
    print_line(&format!("{:22} {:>7} {:>8} {:>12} {:>8}", "domain", "probes", "tokens", "specialists", "trials"))?;
    for (number, (domain, specialists, trials)) in domains.iter().enumerate() {
        print_line(&format!("{:22} {:>7} {:>8} {specialists:>12} {trials:>8}", body.label(number), domain.probes, domain.tokens))?;
    }
    note(&format!(
        "of the up to {} experts that are tested in a domain, at most {:.0}% of those called specialists are so by chance; confrere experts which {}",
        body.experts.len(),
        FALSE_DISCOVERY_RATE * 100.0,
        domains.first().map_or("", |(domain, ..)| &domain.name)
    ));
    Ok(())
}
