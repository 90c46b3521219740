//! `confrere plan`: what of a model would run in some memory, how fast it could be, and what to change.

use std::path::PathBuf;

use base::clock::{instant, now_ms};
use base::failure::{Failure, Kind};
use base::output::{human_bytes, note, print_json, print_line};
use clap::Args;
use inference::aligned::AlignedBytes;
use inference::cache_policy::{PolicyKind, Trace, simulate};
use inference::convert::Target;
use inference::engine::EngineOptions;
use inference::memory::{MemoryPlan, plan_memory};
use inference::probe::{MemoryProbe, TokenCost};
use lab::read_trace;
use protocol::{ModelManifest, PartKind, Precision};
use runtime::command::{Context, EngineArgs, PeerArgs, parse_size};
use runtime::data_dir::OpenDataDir;
use runtime::federation::Federation;
use runtime::memory::process_bytes;
use serde_json::json;

/// Memory that is read to find out how fast that is.
const PROBE_BYTES: usize = 256 << 20;
/// Experts that are read to find out how fast the disk is.
const PROBE_EXPERTS: usize = 16;

#[derive(Args)]
pub(super) struct PlanArgs {
    /// A name, an id or the beginning of an id
    model: String,
    /// Memory that it may take, e.g. 8GiB [default: that of --ram]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
    /// A trace of experts, as `run --trace FILE` writes it, to expect hits from
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    peers: PeerArgs,
}

/// One way to run the model.
struct Way {
    trunk: Precision,
    experts: Precision,
    /// Slots of a layer, or what would do.
    plan: Result<(MemoryPlan, usize), u64>,
    hits: Option<f64>,
    tokens_per_second: Option<f64>,
}

pub(super) fn plan(context: &Context, args: &PlanArgs) -> Result<(), Failure> {
    let open = context.lock()?;
    let federation = Federation::connect(context.runtime.handle(), &open.dir, &args.peers.options(), context.offline)?;
    let found = federation.find(&open, &args.model, None)?;
    let manifest = &*found.manifest;
    let memory = args.memory.unwrap_or(context.memory_max);
    let trace = args.trace.as_ref().map(|file| read_trace(file)).transpose()?;
    if let Some(trace) = &trace
        && (trace.layers, trace.experts) != (manifest.decoder().layers(), manifest.decoder().experts())
    {
        let other = format!("{} layers of {} experts", trace.layers, trace.experts);
        return Err(Failure::new(Kind::Usage, format!("the trace is of a model with {other}, not of {}", found.name)));
    }
    let options = args.engine.options(manifest, None);
    let process = process_bytes(); // before memory is measured: the probe leaves some behind
    let memory_speed = memory_speed(options.threads);
    let disk_speed = disk_speed(&open, manifest)?;
    let own = manifest.usual_precision();
    let narrower = |p: &Precision| !own.is_packed() && p.is_packed();
    let mut choices = vec![(own, own)];
    for experts in [Precision::Q8, Precision::Q4, Precision::Q3, Precision::Q2].into_iter().filter(narrower) {
        choices.push((Target::usual(experts).trunk.unwrap_or(experts), experts));
        // A trunk that every token reads whole may be worth having faster.
        if experts == Precision::Q4 {
            choices.push((experts, experts));
        }
    }
    let mut ways = Vec::new();
    for (trunk, experts) in choices {
        ways.push(way(manifest, (trunk, experts), (process, memory), &options, trace.as_ref(), memory_speed, disk_speed));
    }
    if context.json {
        return print_json(&json!({
            "model": found.name, "memory": memory, "context": options.context, "memory_bytes_per_second": memory_speed, "disk_bytes_per_second": disk_speed,
            "ways": ways.iter().map(json_of).collect::<Vec<_>>(),
        }));
    }
    let disk = disk_speed.map_or("no experts here to read from the disk".to_owned(), |speed| format!("disk {:.2} GB/s", speed / 1e9));
    note(&format!(
        "{}; {} of context; memory {:.1} GB/s on {} threads, {disk}",
        human_bytes(memory),
        options.context,
        memory_speed / 1e9,
        options.threads
    ));
    print_line(&format!(
        "{:<7}{:<9}{:>12}{:>12}{:>12}{:>10}{:>14}",
        "trunk", "experts", "needs", "kept/layer", "of", "hits", "tokens/s ≤"
    ))?;
    for way in &ways {
        print_line(&way.line(manifest))?;
    }
    print_line(&advice(&ways, manifest, &found.name, memory))
}

/// The same model with other precisions, as far as sizes go.
fn at(manifest: &ModelManifest, trunk: Precision, experts: Precision) -> ModelManifest {
    let mut made = manifest.clone();
    let own = manifest.usual_precision();
    for part in made.parts.iter_mut().filter(|part| part.kind == PartKind::Text) {
        let (specs, bytes) = (part.config.tensors(), part.expert_shape(experts).blob_bytes() as u64);
        for (tensor, spec) in part.trunk.iter_mut().zip(&specs).filter(|(_, spec)| spec.packable && trunk != own) {
            tensor.precision = trunk;
            tensor.blob.length = spec.bytes(trunk).unwrap_or(tensor.blob.length);
        }
        for expert in part.experts.iter_mut().filter(|_| experts != own) {
            expert.precision = experts;
            expert.blob.length = bytes;
        }
    }
    made
}

fn way(
    manifest: &ModelManifest,
    (trunk, experts): (Precision, Precision),
    (process, memory): (u64, u64),
    options: &EngineOptions,
    trace: Option<&Trace>,
    memory_speed: f64,
    disk_speed: Option<f64>,
) -> Way {
    let made = at(manifest, trunk, experts);
    let layers = made.decoder().moe_layers().count().max(1);
    let (total, one) = (layers * made.decoder().experts() as usize, made.text().largest_expert().max(1));
    let plan = match plan_memory(&made, options, None, process, memory) {
        Ok(plan) => Ok((plan, ((plan.experts / one) as usize).min(total))),
        Err(error) => Err(error.needed),
    };
    let hits = plan.as_ref().ok().and_then(|&(_, slots)| match trace {
        _ if slots == total => Some(1.0),
        Some(trace) => Some(simulate(trace, slots, PolicyKind::Lru).rate()),
        None => None,
    });
    let cost = TokenCost::of(&made);
    let missed = |hits: f64| (1.0 - hits) * (layers as u64 * u64::from(made.decoder().experts_per_token()) * one) as f64;
    let tokens_per_second = hits.and_then(|hits| {
        let read = if hits < 1.0 { missed(hits) / disk_speed? } else { 0.0 };
        // Reading from the disk and multiplying go on side by side.
        Some(1.0 / (cost.bytes as f64 / memory_speed).max(read))
    });
    Way { trunk, experts, plan, hits, tokens_per_second }
}

impl Way {
    fn line(&self, manifest: &ModelManifest) -> String {
        let layers = manifest.decoder().moe_layers().count().max(1);
        let (trunk, experts) = (self.trunk.name(), self.experts.name());
        let needs = match self.plan {
            Err(needed) => return format!("{trunk:<7}{experts:<9}{:>12}  does not fit", human_bytes(needed)),
            Ok((plan, _)) => human_bytes(plan.trunk + plan.kv_cache + plan.scratch + plan.process),
        };
        let slots = self.plan.as_ref().map_or(0, |&(_, slots)| slots) as f64 / layers as f64;
        let hits = self.hits.map_or("–".to_owned(), |hits| format!("{:.1}%", 100.0 * hits));
        let speed = self.tokens_per_second.map_or("–".to_owned(), |speed| format!("{speed:.1}"));
        format!("{trunk:<7}{experts:<9}{needs:>12}{slots:>12.1}{:>12}{hits:>10}{speed:>14}", manifest.decoder().experts())
    }
}

fn json_of(way: &Way) -> serde_json::Value {
    let (plan, slots) = match &way.plan {
        Ok((plan, slots)) => (Some(plan), Some(*slots)),
        Err(_) => (None, None),
    };
    json!({
        "trunk": way.trunk.name(), "experts": way.experts.name(), "fits": plan.is_some(), "needed": way.plan.as_ref().err(), "expert_slots": slots,
        "bytes": plan.map(|plan| json!({"trunk": plan.trunk, "kv_cache": plan.kv_cache, "scratch": plan.scratch, "process": plan.process, "experts": plan.experts})),
        "hits": way.hits, "tokens_per_second_max": way.tokens_per_second,
    })
}

fn advice(ways: &[Way], manifest: &ModelManifest, name: &str, memory: u64) -> String {
    let own = manifest.usual_precision();
    let all = manifest.text().experts.len();
    if let Some(way) = ways.iter().find(|way| way.plan.as_ref().is_ok_and(|&(_, slots)| slots >= all)) {
        return if way.experts == own {
            format!("{name} fits whole, as it is")
        } else {
            format!(
                "at {} experts and {} trunk all of it fits: confrere requantize {name} {}{}",
                way.experts,
                way.trunk,
                way.experts,
                trunk_flag(way)
            )
        };
    }
    let loses_little = |way: &&Way| !matches!(way.experts, Precision::Q3 | Precision::Q2);
    match ways.iter().rev().filter(loses_little).find(|way| way.plan.is_ok()) {
        Some(way) if way.experts == own => format!("{name} runs as it is; experts that are not in memory come from the disk or from peers"),
        Some(way) => format!("{name} runs best at {}: confrere requantize {name} {}{}", way.experts, way.experts, trunk_flag(way)),
        None => {
            let least = ways.iter().filter_map(|way| way.plan.as_ref().err()).min().copied().unwrap_or(memory);
            format!("{name} does not run in {}: {} would do, or a shorter --context, or --kv q8", human_bytes(memory), human_bytes(least))
        }
    }
}

fn trunk_flag(way: &Way) -> String {
    if Target::usual(way.experts).trunk == Some(way.trunk) { String::new() } else { format!(" --trunk-precision {}", way.trunk) }
}

fn memory_speed(threads: usize) -> f64 {
    let mut probe = MemoryProbe::new(threads, PROBE_BYTES);
    let mut best = 0.0f64;
    for _ in 0..5 {
        let start = instant();
        let bytes = probe.read();
        best = best.max(bytes as f64 / (instant() - start).as_secs_f64());
    }
    best
}

/// Bytes a second, verified, of experts that are here.
fn disk_speed(open: &OpenDataDir, manifest: &ModelManifest) -> Result<Option<f64>, Failure> {
    let step = (manifest.text().experts.len() / PROBE_EXPERTS).max(1);
    let mut bytes = 0;
    let start = instant();
    for blob in manifest.text().experts.iter().map(|expert| expert.blob).step_by(step).filter(|blob| open.store.contains(&blob.hash)) {
        let mut buffer = AlignedBytes::zeroed(blob.length as usize);
        if open.store.read_pages(&blob.hash, buffer.whole_pages(), blob.length as usize, now_ms())? {
            bytes += blob.length;
        }
    }
    Ok((bytes > 0).then(|| bytes as f64 / (instant() - start).as_secs_f64()))
}
