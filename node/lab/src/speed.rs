//! Prefill and decode against their limits: a token's bytes over the memory's speed, and its multiplications over the kernel's.

use base::clock::{check_interrupted, instant};
use base::failure::Failure;
use base::output::{human_bytes, note, print_json, print_line};
use clap::Args;
use inference::activation_log::ActivationLog;
use inference::engine::{Engine, EngineOptions, KvPrecision, Piece, Want};
use inference::expert_use::ExpertUse;
use inference::kernels::Kernels;
use inference::probe::{KernelProbe, MemoryProbe, TokenCost};
use protocol::Precision;
use runtime::command::{Context, PeerArgs, RemoteArgs, parse_kernels};
use runtime::federation::{Federation, PeerOptions};
use serde_json::{Value, json};

use super::Median;

/// Larger than any cache.
const PROBE_BYTES: usize = 1 << 30;

#[derive(Args)]
pub struct SpeedArgs {
    /// Names, ids or beginnings of ids
    #[arg(required = true)]
    models: Vec<String>,
    /// Numbers of threads
    #[arg(long, value_delimiter = ',', value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Vec<u16>,
    /// Tokens of a prefill; 0 for none
    #[arg(long, default_value_t = 512)]
    prefill: usize,
    /// Tokens of a decode; 0 for none
    #[arg(long, default_value_t = 64)]
    decode: usize,
    /// Tokens that stand before the decoded ones
    #[arg(long, default_value_t = 8)]
    depth: usize,
    /// Sequences decoded together
    #[arg(long, value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u16).range(1..=16))]
    batch: Vec<u16>,
    /// How often each is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Kernels to compute with [default: the fastest that this processor has]
    #[arg(long, value_name = "NAME", value_parser = parse_kernels)]
    kernels: Option<&'static Kernels>,
    /// Number format of keys and values
    #[arg(long, value_name = "FORMAT")]
    kv: Option<KvPrecision>,
    /// Let experts come from the disk as they are needed, instead of having them in memory first
    #[arg(long)]
    cold: bool,
    /// Decode the same tokens with the activation log, too, in turns, and say what it costs
    #[arg(long, conflicts_with = "cold")]
    log: bool,
    #[command(flatten)]
    peers: PeerArgs,
    #[command(flatten)]
    remote: RemoteArgs,
}

struct Line {
    what: String,
    limit: f64,
    measured: Median,
    detail: Value,
}

pub(crate) fn speed(context: &Context, args: &SpeedArgs) -> Result<(), Failure> {
    let open = context.lock()?;
    let peers = PeerOptions { remote: args.remote.options(), ..args.peers.options() };
    let federation = Federation::connect(context.runtime.handle(), &open.dir, &peers, context.offline)?;
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as u16;
    let threads = if args.threads.is_empty() { (0..16).map(|i| 1 << i).filter(|&n| n <= cores).collect() } else { args.threads.clone() };
    let kernels = args.kernels.unwrap_or_else(Kernels::best);
    let mut lines = Vec::new();
    for &threads in &threads {
        let memory = memory_speed(threads.into(), args.runs)?;
        note(&format!(
            "{threads} threads read memory at {:.1} GB/s ({:.1} to {:.1})",
            memory.median / 1e9,
            memory.min / 1e9,
            memory.max / 1e9
        ));
        for model in &args.models {
            let found = federation.find(&open, model, None)?;
            let most = (args.prefill).max(args.depth + args.decode) + 1;
            let own = EngineOptions::for_model(&found.manifest);
            let kv = args.kv.unwrap_or(own.kv);
            let options = EngineOptions { threads: threads.into(), kernels, kv, context: most.min(own.context), ..own };
            let mut engine = federation.load(&open, &found, context.memory_max, options)?.engine;
            let cost = TokenCost::of(&found.manifest);
            if !args.cold {
                warm(&mut engine, args)?;
            }
            if args.decode > 0 {
                for &batch in &args.batch {
                    let measured = decode(&mut engine, args, batch.into())?;
                    let costs: Vec<_> = measured.iter().filter_map(DecodeRun::log_cost).collect();
                    if !costs.is_empty() {
                        let Median { median, min, max } = Median::of(costs);
                        let [median, min, max] = [median, min, max].map(|cost| cost * 100.0);
                        note(&format!(
                            "{}: the activation log costs {median:.1}% of the time in the median of {} pairs ({min:.1} to {max:.1})",
                            found.name,
                            measured.len()
                        ));
                    }
                    if let Some(last) = measured.last()
                        && last.hits() < 1.0
                    {
                        note(&format!(
                            "{}: {:.1}% of experts were in memory, {} read; {} of {} looked ahead for were used",
                            found.name,
                            100.0 * last.hits(),
                            human_bytes(last.experts.bytes_read),
                            last.experts.prefetched_used,
                            last.experts.prefetched
                        ));
                    }
                    let mut line = Line {
                        what: format!(
                            "{} decode, {threads} threads{}",
                            found.name,
                            if batch == 1 { String::new() } else { format!(", {batch} together") }
                        ),
                        limit: memory.median / cost.bytes as f64,
                        measured: Median::of(measured.iter().map(|run| run.speed).collect()),
                        detail: json!({"model": found.name, "phase": "decode", "threads": threads, "batch": batch, "bytes_per_token": cost.bytes,
                                       "runs": measured.iter().map(DecodeRun::json).collect::<Vec<_>>(), "kernels": kernels.name, "kv": kv.name(), "depth": args.depth}),
                    };
                    if batch > 1 {
                        line.limit = f64::NAN; // experts that sequences share are read once: no single figure
                    }
                    lines.push(line);
                }
            }
            if args.prefill > 0 {
                let precision = found.manifest.usual_precision();
                let limit = kernel_speed(kernels, precision, threads.into(), args.runs)? / (2 * cost.multiplications) as f64;
                let measured = prefill(&mut engine, args)?;
                lines.push(Line {
                    what: format!("{} prefill of {}, {threads} threads", found.name, args.prefill),
                    limit,
                    measured,
                    detail: json!({"model": found.name, "phase": "prefill", "threads": threads, "tokens": args.prefill,
                                   "multiplications_per_token": cost.multiplications, "kernels": kernels.name}),
                });
            }
        }
    }
    if context.json {
        let rows = lines.iter().map(|line| {
            let mut row = line.detail.clone();
            row["limit"] = json!(if line.limit.is_finite() { Some(line.limit) } else { None });
            row["tokens_per_second"] = line.measured.json();
            row["ratio"] = json!(if line.limit.is_finite() { Some(line.measured.median / line.limit) } else { None });
            row
        });
        return print_json(&json!(rows.collect::<Vec<_>>()));
    }
    print_line(&format!("{:<52}{:>10}{:>10}{:>20}{:>8}", "tokens a second", "limit", "median", "min – max", "ratio"))?;
    for Line { what, limit, measured: Median { median, min, max }, .. } in lines {
        let range = format!("{min:.1} – {max:.1}");
        let (limit, ratio) = if limit.is_finite() {
            (format!("{limit:.1}"), format!("{:.0}%", 100.0 * median / limit))
        } else {
            (String::new(), String::new())
        };
        print_line(&format!("{what:<52}{limit:>10}{median:>10.1}{range:>20}{ratio:>8}"))?;
    }
    Ok(())
}

fn memory_speed(threads: usize, runs: u32) -> Result<Median, Failure> {
    let mut probe = MemoryProbe::new(threads, PROBE_BYTES);
    probe.read();
    let mut speeds = Vec::new();
    for _ in 0..runs {
        check_interrupted()?;
        let start = instant();
        let bytes = probe.read();
        speeds.push(bytes as f64 / (instant() - start).as_secs_f64());
    }
    Ok(Median::of(speeds))
}

/// Operations a second of a kernel on what lies in the nearest cache; nothing is known of plain weights.
fn kernel_speed(kernels: &'static Kernels, precision: Precision, threads: usize, runs: u32) -> Result<f64, Failure> {
    if !precision.is_packed() {
        return Ok(f64::NAN);
    }
    let mut probe = KernelProbe::new(kernels, precision, threads);
    let mut speeds = Vec::new();
    for _ in 0..20 {
        probe.multiply();
    }
    for _ in 0..=runs {
        check_interrupted()?;
        let start = instant();
        let operations = probe.multiply();
        speeds.push(operations as f64 / (instant() - start).as_secs_f64());
    }
    Ok(Median::of(speeds).median)
}

/// Tokens that differ: experts are chosen by them.
fn token(engine: &Engine, n: usize) -> u32 {
    (n as u32).wrapping_mul(2_654_435_761) % engine.model().decoder().vocab_size
}

/// Brings the experts that the measurements will need into memory.
fn warm(engine: &mut Engine, args: &SpeedArgs) -> Result<(), Failure> {
    let count = args.prefill.max(args.depth + args.decode).max(256).min(engine.context());
    let tokens: Vec<_> = (0..count).map(|n| token(engine, n)).collect();
    let mut session = engine.session();
    engine.forward(&mut session, &tokens)?;
    Ok(())
}

/// A decode: tokens a second, and what its experts cost.
struct DecodeRun {
    speed: f64,
    /// The same with the activation log, if that was asked for.
    logged: Option<f64>,
    experts: ExpertUse,
}

impl DecodeRun {
    fn hits(&self) -> f64 {
        self.experts.hits as f64 / self.experts.uses.max(1) as f64
    }

    /// The share of the time that the activation log takes.
    fn log_cost(&self) -> Option<f64> {
        self.logged.map(|logged| 1.0 - logged / self.speed)
    }

    fn json(&self) -> Value {
        let ExpertUse { bytes_read, prefetched, prefetched_used, .. } = self.experts;
        json!({"tokens_per_second": self.speed, "logged": self.logged, "hits": self.hits(), "bytes_read": bytes_read, "prefetched": prefetched, "prefetched_used": prefetched_used})
    }
}

fn decode(engine: &mut Engine, args: &SpeedArgs, batch: usize) -> Result<Vec<DecodeRun>, Failure> {
    let mut runs = Vec::new();
    for run in 0..args.runs as usize {
        // What a run needs is in memory when it is measured: the same tokens have been decoded before.
        if !args.cold {
            decode_once(engine, args, batch, run)?;
        }
        // In turns, first the one and then the other.
        let mut logged = None;
        let log_first = args.log && run % 2 == 1;
        if log_first {
            logged = Some(decode_logged(engine, args, batch, run)?);
        }
        engine.experts().start_counting();
        let speed = decode_once(engine, args, batch, run)?;
        let experts = engine.experts().usage();
        if args.log && !log_first {
            logged = Some(decode_logged(engine, args, batch, run)?);
        }
        runs.push(DecodeRun { speed, logged, experts });
    }
    Ok(runs)
}

fn decode_logged(engine: &mut Engine, args: &SpeedArgs, batch: usize, run: usize) -> Result<f64, Failure> {
    engine.log = Some(ActivationLog::default());
    let speed = decode_once(engine, args, batch, run);
    engine.log = None;
    speed
}

/// Tokens a second.
fn decode_once(engine: &mut Engine, args: &SpeedArgs, batch: usize, run: usize) -> Result<f64, Failure> {
    let mut sessions: Vec<_> = (0..batch).map(|_| engine.session()).collect();
    for (i, session) in sessions.iter_mut().enumerate() {
        let before: Vec<_> = (0..args.depth.max(1)).map(|n| token(engine, n + 31 * i + 977 * run)).collect();
        session.reserve(args.depth + args.decode);
        engine.forward(session, &before)?;
    }
    let start = instant();
    for step in 0..args.decode {
        check_interrupted()?;
        let next: Vec<_> = (0..batch).map(|i| token(engine, step + 77 * i + 977 * run)).collect();
        let mut sequences: Vec<_> =
            sessions.iter_mut().zip(&next).map(|(session, token)| Piece::tokens(session, std::slice::from_ref(token))).collect();
        let layers = engine.all_layers();
        engine.pass(&mut sequences, layers, Want::Last)?;
    }
    Ok((batch * args.decode) as f64 / (instant() - start).as_secs_f64())
}

fn prefill(engine: &mut Engine, args: &SpeedArgs) -> Result<Median, Failure> {
    let tokens: Vec<_> = (0..args.prefill.min(engine.context())).map(|n| token(engine, n)).collect();
    let mut speeds = Vec::new();
    for _ in 0..args.runs {
        check_interrupted()?;
        let mut session = engine.session();
        session.reserve(tokens.len());
        let start = instant();
        engine.forward(&mut session, &tokens)?;
        speeds.push(tokens.len() as f64 / (instant() - start).as_secs_f64());
    }
    Ok(Median::of(speeds))
}
