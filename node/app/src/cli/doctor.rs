//! `confrere doctor`: what may keep a node from working, one line a check, with what to do about it.

use std::fs;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::time::{Duration, UNIX_EPOCH};

use base::clock::now_ms;
use base::failure::{Failure, Kind};
use base::output::{human_bytes, print_json, print_line};
use inference::kernels::Kernels;
use net::records::{KEY_ELSEWHERE, clock_text};
use runtime::command::{Context, Held};
use runtime::daemon::Daemon;
use runtime::memory::default_memory;
use runtime::models::stat_json;
use serde_json::{Value, json};

use super::config::{Configuration, location};
use super::serve::{DEFAULT_API_PORT, DEFAULT_PORT};

/// Less free disk than this, and fetching will soon stop.
const DISK_FREE_MIN: u64 = 1 << 30;
/// Less memory than this is not enough for any model worth running.
const MEMORY_MIN: u64 = 1 << 30;
/// Files that a node with many peers has open.
const OPEN_FILES_MIN: u64 = 1024;
/// Clocks may differ by so much before records of others are not accepted.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(600);

/// How a check came out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Fine,
    /// It works, but less well than it could.
    Poor,
    Broken,
}

struct Finding {
    verdict: Verdict,
    what: &'static str,
    found: String,
    /// What to do.
    fix: Option<String>,
}

fn fine(what: &'static str, found: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Fine, what, found: found.into(), fix: None }
}

fn finding(verdict: Verdict, what: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Finding {
    Finding { verdict, what, found: found.into(), fix: Some(fix.into()) }
}

pub(super) fn doctor(context: &Context, configuration: &Configuration) -> Result<(), Failure> {
    let mut findings = vec![of_version(), of_configuration(configuration), of_directory(context)];
    let held = context.open();
    findings.extend([of_key(context, &held), of_clock(context, &held)]);
    findings.push(of_daemon(&held));
    findings.extend(of_store(context, &held));
    findings.extend(of_models(context, &held));
    findings.push(of_memory(context));
    findings.extend(of_open_files());
    findings.extend(of_ports(&held));
    findings.push(of_peers(context, &held));
    if context.json {
        let all = findings
            .iter()
            .map(|one| json!({"check": one.what, "verdict": word(one.verdict).trim_end(), "found": one.found, "fix": one.fix}));
        print_json(&all.collect::<Vec<_>>())?;
    } else {
        for one in &findings {
            print_line(&format!("{} {:14} {}", word(one.verdict), one.what, one.found))?;
            if let Some(fix) = &one.fix {
                print_line(&format!("       fix: {fix}"))?;
            }
        }
    }
    match findings.iter().filter(|one| one.verdict == Verdict::Broken).count() {
        0 => Ok(()),
        1 => Err(Failure::new(Kind::Other, "one thing keeps this node from working")),
        count => Err(Failure::new(Kind::Other, format!("{count} things keep this node from working"))),
    }
}

fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Fine => "ok    ",
        Verdict::Poor => "poor  ",
        Verdict::Broken => "broken",
    }
}

fn of_version() -> Finding {
    fine("version", format!("{}, kernels {}", env!("CARGO_PKG_VERSION"), Kernels::best().name))
}

fn of_configuration(configuration: &Configuration) -> Finding {
    let (path, settings) = location(configuration);
    fine("configuration", format!("{} ({settings} settings)", path.display()))
}

fn of_directory(context: &Context) -> Finding {
    let path = context.dir.path();
    let probe = path.join(format!("probe.{}", std::process::id()));
    let written = fs::write(&probe, b"x").and_then(|()| fs::remove_file(&probe));
    match written {
        Ok(()) => fine("data directory", path.display().to_string()),
        Err(error) => finding(
            Verdict::Broken,
            "data directory",
            format!("{} cannot be written: {error}", path.display()),
            "give this user the right to write there, or choose another with --data-dir",
        ),
    }
}

fn of_key(context: &Context, held: &Result<Held, Failure>) -> Finding {
    if let Ok(Held::Daemon(daemon)) = held
        && context.ask(daemon, "/api/node").is_ok_and(|node| node["key_is_elsewhere"] == true)
    {
        return finding(Verdict::Broken, "key", KEY_ELSEWHERE, "stop one of the two nodes, and start it with another --data-dir");
    }
    match context.dir.key() {
        Ok(key) => fine("key", key.id().to_string()),
        Err(failure) => finding(Verdict::Broken, "key", failure.message, format!("chmod 600 {}", context.dir.path().join("key").display())),
    }
}

/// Files from the future mean that this clock was right once and is not now; what peers sign says so of a clock that was never right.
fn of_clock(context: &Context, held: &Result<Held, Failure>) -> Finding {
    const FIX: &str = "set the clock (timedatectl set-ntp true): records with other dates are not accepted";
    if let Ok(Held::Daemon(daemon)) = held
        && let Some(offset_s) = context.ask(daemon, "/api/node").ok().and_then(|node| node["clock_offset_s"].as_i64())
    {
        return finding(Verdict::Broken, "clock", clock_text(offset_s.saturating_mul(1000)), FIX);
    }
    let files = fs::read_dir(context.dir.path()).into_iter().flatten().flatten();
    let modified =
        files.filter_map(|file| Some(file.metadata().ok()?.modified().ok()?.duration_since(UNIX_EPOCH).ok()?.as_millis() as u64));
    let newest = modified.max().unwrap_or(0);
    let now_ms = now_ms();
    if newest > now_ms + CLOCK_TOLERANCE.as_millis() as u64 {
        let hours = (newest - now_ms) / 3_600_000;
        return finding(Verdict::Broken, "clock", format!("it is {hours} hours or more behind files that were written here"), FIX);
    }
    fine("clock", format!("{} s since 1970, not behind what was written here", now_ms / 1000))
}

fn of_daemon(held: &Result<Held, Failure>) -> Finding {
    match held {
        Ok(Held::Here(_)) => fine("node", "none serves from this data directory"),
        Ok(Held::Daemon(daemon)) => fine("node", format!("serves; its API is at http://{}", daemon.address)),
        Err(failure) if failure.kind == Kind::Busy => {
            finding(Verdict::Poor, "node", failure.message.clone(), "commands could ask it if it were started without --api off")
        }
        Err(failure) => finding(Verdict::Broken, "node", failure.message.clone(), "confrere repo verify"),
    }
}

fn of_store(context: &Context, held: &Result<Held, Failure>) -> Vec<Finding> {
    let stat = match held {
        Ok(Held::Here(open)) => open.store.stat().map(|stat| stat_json(&stat)).map_err(Failure::from),
        Ok(Held::Daemon(daemon)) => context.ask(daemon, "/api/store"),
        Err(_) => return Vec::new(),
    };
    let stat = match stat {
        Ok(stat) => stat,
        Err(failure) => return vec![finding(Verdict::Broken, "store", failure.message, "confrere repo verify")],
    };
    let number = |name: &str| stat[name].as_u64().unwrap_or(0);
    let mut findings = Vec::new();
    findings.push(match number("quarantined") {
        0 => fine("store", format!("{} blobs, {}", number("blobs"), human_bytes(number("bytes")))),
        count => finding(
            Verdict::Poor,
            "store",
            format!("{count} damaged blobs were put aside"),
            "confrere repo gc removes them; confrere pull fetches what is missing",
        ),
    });
    let free = number("disk_free_bytes");
    findings.push(if free < DISK_FREE_MIN {
        finding(Verdict::Poor, "disk", format!("{} are free", human_bytes(free)), "make room, or bound what is kept with --disk SIZE")
    } else {
        fine("disk", format!("{} are free", human_bytes(free)))
    });
    findings
}

fn of_models(context: &Context, held: &Result<Held, Failure>) -> Option<Finding> {
    let models = match held {
        Ok(Held::Here(open)) => Value::from(open.readable_models().iter().map(|found| json!({"name": found.name})).collect::<Vec<_>>()),
        Ok(Held::Daemon(daemon)) => context.ask(daemon, "/api/models").unwrap_or_default(),
        Err(_) => return None,
    };
    let names: Vec<_> = models.as_array().into_iter().flatten().filter_map(|model| model["name"].as_str()).collect();
    Some(if names.is_empty() {
        finding(Verdict::Poor, "models", "none", "confrere import PATH, or confrere join TICKET")
    } else {
        fine("models", names.join(", "))
    })
}

fn of_memory(context: &Context) -> Finding {
    let (may, free) = (context.memory_max, default_memory() / 3 * 4);
    if may > free {
        return finding(
            Verdict::Poor,
            "memory",
            format!("--ram is {}, but {} are free", human_bytes(may), human_bytes(free)),
            "lower --ram, or close something",
        );
    }
    if may < MEMORY_MIN {
        return finding(
            Verdict::Poor,
            "memory",
            format!("a model may take {}", human_bytes(may)),
            "confrere plan MODEL --memory SIZE says what would run",
        );
    }
    fine("memory", format!("a model may take {} of the {} that are free", human_bytes(may), human_bytes(free)))
}

fn of_open_files() -> Option<Finding> {
    let text = fs::read_to_string("/proc/self/limits").ok()?;
    let line = text.lines().find(|line| line.starts_with("Max open files"))?;
    let limit: u64 = line.split_whitespace().nth(3)?.parse().unwrap_or(u64::MAX);
    Some(if limit < OPEN_FILES_MIN {
        finding(Verdict::Poor, "open files", format!("at most {limit}"), format!("ulimit -n {}", 4 * OPEN_FILES_MIN))
    } else {
        fine("open files", format!("at most {limit}"))
    })
}

/// Whether the usual ports are there to listen on.
fn of_ports(held: &Result<Held, Failure>) -> Vec<Finding> {
    if !matches!(held, Ok(Held::Here(_))) {
        return Vec::new(); // a node of this data directory has them
    }
    let free =
        TcpListener::bind((Ipv4Addr::UNSPECIFIED, DEFAULT_PORT)).is_ok() && UdpSocket::bind((Ipv4Addr::UNSPECIFIED, DEFAULT_PORT)).is_ok();
    let peers = if free {
        fine("port", format!("{DEFAULT_PORT} is free, by TCP and UDP"))
    } else {
        finding(Verdict::Poor, "port", format!("{DEFAULT_PORT} is taken by another program"), "confrere serve --listen 0.0.0.0:PORT")
    };
    let api = if TcpListener::bind((Ipv4Addr::LOCALHOST, DEFAULT_API_PORT)).is_ok() {
        fine("API port", format!("{DEFAULT_API_PORT} is free"))
    } else {
        finding(
            Verdict::Poor,
            "API port",
            format!("{DEFAULT_API_PORT} is taken: serve would take another"),
            "confrere serve --api 127.0.0.1:PORT",
        )
    };
    vec![peers, api]
}

fn of_peers(context: &Context, held: &Result<Held, Failure>) -> Finding {
    const HOW: &str = "confrere join TICKET, with the ticket that `serve` prints on another device";
    if let Ok(Held::Daemon(daemon)) = held {
        return of_daemon_s_peers(context, daemon);
    }
    match context.dir.peers() {
        Ok(peers) if peers.is_empty() => finding(Verdict::Poor, "peers", "none was joined", HOW),
        Ok(peers) => fine("peers", format!("{} addresses of peers that were joined (confrere peers asks them)", peers.len())),
        Err(failure) => finding(Verdict::Broken, "peers", failure.message, "mend or remove that file"),
    }
}

fn of_daemon_s_peers(context: &Context, daemon: &Daemon) -> Finding {
    let known = context.dir.peers().map_or(0, |peers| peers.len());
    let addresses = context.ask(daemon, "/api/node").map_or(0, |node| node["addresses"].as_array().map_or(0, Vec::len));
    match context.ask(daemon, "/api/peers").map(|peers| peers.as_array().map_or(0, Vec::len)) {
        Ok(0) if known > 0 => finding(
            Verdict::Poor,
            "peers",
            format!("none of {known} answers; this node listens at {addresses} addresses"),
            "are they on, and in the same network? behind a NAT a relay helps: README.md, `serve --relay`",
        ),
        Ok(0) => finding(Verdict::Poor, "peers", "none", "confrere join TICKET, with the ticket that `serve` prints on another device"),
        Ok(count) => fine("peers", format!("{count} connected; this node listens at {addresses} addresses")),
        Err(failure) => finding(Verdict::Poor, "peers", failure.message, "is the node stopping? try again"),
    }
}
