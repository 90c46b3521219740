//! `confrere profile`: measures what a model's experts are good at, tells it, and checks what others tell.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use inference::engine::EngineOptions;
use inference::profiler::{PROBE_TOKENS_MAX, ProfileError, Profiler};
use protocol::profile::ProbeSet;
use protocol::profile::lift::{FALSE_DISCOVERY_RATE, ranking};
use protocol::ContentHash;
use serde_json::{Value, json};

use super::{Context, EngineArgs, PeerArgs};
use crate::clock::{instant, interrupted, now_ms};
use crate::data_dir::{LocalModel, OpenDataDir};
use crate::failure::{Failure, Kind};
use crate::federation::{Federation, Loaded};
use crate::output::{count_bar, note, print_json, print_line};
use crate::probes;
use crate::profiles::{Journal, Profile, Step};

#[derive(Subcommand)]
pub(super) enum ProfileCommand {
    /// Measure which experts serve which domains, by reading probe texts and by leaving experts out
    Build(BuildArgs),
}

#[derive(Args)]
pub(super) struct BuildArgs {
    /// A name, an id or the beginning of an id
    model: String,
    /// A directory with a file DOMAIN.txt for each domain, probes between lines of %% [default: the nine domains that ship]
    #[arg(long, value_name = "DIR")]
    probes: Option<PathBuf>,
    /// How long to leave experts out, once the probes have been read: 90s, 10m, 2h. A later build goes on from there
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
    }
}

/// A model that is being measured.
pub(super) struct Measuring {
    pub(super) loaded: Loaded,
    pub(super) profiler: Profiler,
    pub(super) build_profile: ContentHash,
}

impl Measuring {
    /// Loads a model and gets its probes ready.
    pub(super) fn new(
        context: &Context,
        (open, found): (&OpenDataDir, &LocalModel),
        federation: &Federation<'_>,
        engine: &EngineArgs,
        set: &ProbeSet,
    ) -> Result<Self, Failure> {
        let window = found.manifest.config.max_position_embeddings.min(PROBE_TOKENS_MAX as u32) as usize;
        let options = engine.options(&found.manifest, Some(window));
        let loaded = federation.load(open, found, context.memory_max, options)?;
        let missing = || Failure::new(Kind::Usage, "the model has no tokenizer, so it cannot read probes");
        let tokenizer = loaded.tokenizer.as_ref().ok_or_else(missing)?;
        let profiler = Profiler::new(&loaded.engine, found.id, tokenizer, set)?;
        Ok(Self { loaded, profiler, build_profile: build_profile(&options) })
    }

    /// Reads all probes; `note_down` is given what came of each. Says whether it got to the end.
    pub(super) fn read_all(&mut self, what: &str, mut note_down: impl FnMut(Step) -> Result<(), Failure>) -> Result<bool, Failure> {
        let bar = count_bar(self.profiler.tokens(), what, "tokens");
        loop {
            bar.set_position(self.profiler.tokens_read());
            match self.profiler.read_next(&mut self.loaded.engine)? {
                Some(reading) => note_down(Step::Read(reading))?,
                None => {
                    bar.finish_and_clear();
                    return Ok(true);
                }
            }
            if interrupted() {
                return Ok(false);
            }
        }
    }
}

/// The arithmetic that counts depend on: who uses another may count otherwise.
pub(super) fn build_profile(options: &EngineOptions) -> ContentHash {
    ContentHash::of(format!("confrere-forward/1 kv={}", options.kv).as_bytes())
}

fn build(context: &Context, args: &BuildArgs) -> Result<(), Failure> {
    let set = args.probes.as_deref().map_or_else(|| Ok(probes::shipped()), probes::read)?;
    let mut open = context.lock()?;
    let federation = Federation::connect(&context.runtime, &open.dir, &args.peers.options(), context.offline)?;
    let found = federation.find(&mut open, &args.model, None)?;
    let mut measuring = Measuring::new(context, (&open, &found), &federation, &args.engine, &set)?;
    let begun = Step::Begun(set.hash(), measuring.build_profile);
    let (mut journal, steps) = Journal::open(&open.dir, found.id)?;
    if resume(&mut measuring.profiler, &begun, steps).is_err() {
        // Of other probes, or of another arithmetic.
        measuring.profiler = Profiler::new(&measuring.loaded.engine, found.id, tokenizer(&measuring.loaded), &set)?;
        journal.clear()?;
        journal.add(&begun)?;
    }
    if !measuring.read_all("probes", |step| journal.add(&step))? {
        journal.sync()?;
        note("interrupted: what was read is kept, and the next build goes on from there");
        return Err(Failure::interrupted());
    }
    try_experts(&mut measuring, &mut journal, args.budget)?;
    journal.sync()?;
    let (body, _) = open.store.put(&measuring.profiler.body().to_bytes(), now_ms())?;
    open.store.flush();
    let published = open.dir.profile(found.id)?.is_some_and(|profile| profile.published);
    let profile = Profile { probes: set.hash(), build_profile: measuring.build_profile, body, published };
    open.dir.set_profile(found.id, &profile)?;
    show(context, &found, &measuring, &profile)?;
    if interrupted() { Err(Failure::interrupted()) } else { Ok(()) }
}

fn tokenizer(loaded: &Loaded) -> &inference::tokenizer::Tokenizer {
    loaded.tokenizer.as_ref().expect("it was there when the probes were read")
}

/// Takes in the steps of an earlier build, if they are about the same.
fn resume(profiler: &mut Profiler, begun: &Step, steps: Vec<Step>) -> Result<(), ProfileError> {
    let mut steps = steps.into_iter();
    if steps.next().as_ref() != Some(begun) {
        return Err(ProfileError::Other);
    }
    for step in steps {
        match step {
            Step::Begun(..) => return Err(ProfileError::Other),
            Step::Read(reading) => profiler.take_reading(reading)?,
            Step::Tried(found) => found.into_iter().try_for_each(|trials| profiler.take_trials(trials))?,
        }
    }
    Ok(())
}

/// Leaves experts out, those first of which least is known, until the time is over.
fn try_experts(measuring: &mut Measuring, journal: &mut Journal, budget: Duration) -> Result<(), Failure> {
    let Measuring { loaded, profiler, .. } = measuring;
    let bar = count_bar(budget.as_millis() as u64, "trials", "ms");
    let began = instant();
    while instant() - began < budget && !interrupted() {
        let round = profiler.next_round();
        if round.is_empty() {
            break;
        }
        let go_on = || {
            bar.set_position((instant() - began).as_millis() as u64);
            instant() - began < budget && !interrupted()
        };
        match profiler.try_round(&mut loaded.engine, &round, go_on)? {
            Some(found) => journal.add(&Step::Tried(found))?,
            None => break,
        }
    }
    bar.finish_and_clear();
    Ok(())
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
                json!({"domain": domain.name, "probes": domain.probes, "tokens": domain.tokens, "specialists": specialists, "trials": trials})
            })
            .collect();
        return print_json(&json!({
            "model": found.id.to_string(), "probes": profile.probes.to_string(), "build_profile": profile.build_profile.to_string(),
            "body": profile.body.hash.to_string(), "body_bytes": profile.body.length, "experts": body.experts.len(), "domains": domains,
        }));
    }
    print_line(&format!("{:16} {:>7} {:>8} {:>12} {:>8}", "domain", "probes", "tokens", "specialists", "trials"))?;
    for (domain, specialists, trials) in &domains {
        print_line(&format!("{:16} {:>7} {:>8} {specialists:>12} {trials:>8}", domain.name, domain.probes, domain.tokens))?;
    }
    note(&format!(
        "of {} experts tested in each domain, at most {:.0}% of those called specialists are so by chance; confrere experts which {}",
        body.experts.len(),
        FALSE_DISCOVERY_RATE * 100.0,
        domains.first().map_or("", |(domain, ..)| &domain.name)
    ));
    Ok(())
}

/// Reads a time: seconds, or a number with s, m or h.
pub(super) fn parse_time(text: &str) -> Result<Duration, String> {
    let (number, factor) = match text.strip_suffix(['s', 'm', 'h']) {
        Some(number) if text.ends_with('m') => (number, 60.0),
        Some(number) if text.ends_with('h') => (number, 3600.0),
        Some(number) => (number, 1.0),
        None => (text, 1.0),
    };
    let seconds = number.parse::<f64>().ok().map(|number| number * factor).filter(|seconds| (0.0..=1e9).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| format!("{text:?} is not a time; write 90s, 10m or 2h"))
}
