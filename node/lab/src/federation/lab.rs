//! Nodes as processes of their own, in network namespaces that are joined by emulated lines. Nothing leaves the machine.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use base::clock::{check_interrupted, instant};
use base::failure::{Failure, Kind, io_failure};
use protocol::ContentHash;
use serde_json::Value;

/// Of the namespaces' names; their numbers follow.
const PREFIX: &str = "cffed";
/// What waits before an emulated line: more than the longest of them holds on its way.
const QUEUE_KB: &str = "4096";
/// Of an error's end, as much as says why.
const ERROR_CHARS: usize = 600;

/// Where processes are started from.
pub(super) struct Lab {
    program: PathBuf,
    linkhub: PathBuf,
    dir: PathBuf,
}

/// A line from each node to a place where all meet.
#[derive(Clone, Copy)]
pub(super) struct Line {
    /// 0 for no limit.
    pub(super) rate_mbit: u32,
    /// From any node to any other.
    pub(super) delay_ms: f64,
    pub(super) loss_ppm: u32,
}

/// Namespaces with addresses 10.88.0.1 and on, while it lives.
pub(super) enum Net {
    /// Lines with delay and loss: `linkhub` carries every packet.
    Hub(Child),
    /// Lines of some rate without either: the kernel carries them.
    Lan(usize),
}

/// Where a process runs: on a core, and in one of the namespaces.
#[derive(Clone, Copy, Default)]
pub(super) struct Place {
    pub(super) core: Option<usize>,
    pub(super) space: Option<usize>,
}

/// A node that serves, while it lives.
pub(super) struct Serving {
    child: Child,
    pub(super) address: String,
}

impl Lab {
    /// Needs root, and `linkhub` where nothing else is said beside this program.
    pub(super) fn new(dir: PathBuf, linkhub: Option<&Path>) -> Result<Self, Failure> {
        let program = std::env::current_exe().map_err(|error| Failure::new(Kind::Other, format!("cannot find this program: {error}")))?;
        let linkhub = linkhub.map_or_else(|| program.with_file_name("linkhub"), Path::to_owned);
        if !linkhub.is_file() {
            let what =
                format!("{} is not there: `cargo build --release --workspace` makes it, or name it with --linkhub", linkhub.display());
            return Err(Failure::new(Kind::NotFound, what));
        }
        fs::create_dir_all(&dir).map_err(|error| io_failure("create", &dir, &error))?;
        Ok(Self { program, linkhub, dir })
    }

    /// A data directory of this name.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Joins as many nodes as there are lines. Lines with delay or loss must be the same.
    pub(super) fn join(&self, lines: &[Line]) -> Result<Net, Failure> {
        let first = lines[0];
        if first.delay_ms == 0.0 && first.loss_ppm == 0 {
            return Net::lan(lines);
        }
        let mut command = Command::new(&self.linkhub);
        command.args(["--nodes", &lines.len().to_string(), "--rate-mbit", &first.rate_mbit.to_string(), "--prefix", PREFIX]);
        command.args(["--delay-ms", &first.delay_ms.to_string(), "--loss-ppm", &first.loss_ppm.to_string(), "--queue-kb", QUEUE_KB]);
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().map_err(|error| io_failure("start", &self.linkhub, &error))?;
        if first_line(&mut child)? == "ready" {
            Ok(Net::Hub(child))
        } else {
            Err(Failure::new(Kind::Other, "linkhub makes no network: is this root?"))
        }
    }

    /// A command of ours at some place.
    fn command(&self, place: Place, data: &Path, words: &[&str]) -> Command {
        let mut line: Vec<String> = Vec::new();
        line.extend(place.core.into_iter().flat_map(|core| ["taskset".to_owned(), "-c".to_owned(), core.to_string()]));
        line.extend(inside(place.space));
        line.push(self.program.display().to_string());
        let mut command = Command::new(&line[0]);
        command.args(&line[1..]).arg("--data-dir").arg(data).args(words).stdin(Stdio::null());
        command
    }

    /// Runs a command to its end; returns what it prints with `--json`, and how many seconds it took.
    pub(super) fn run(&self, place: Place, data: &Path, words: &[&str]) -> Result<(Value, f64), Failure> {
        let mut command = self.command(place, data, words);
        command.arg("--json");
        let began = instant();
        let output = output(&mut command)?;
        let took = (instant() - began).as_secs_f64();
        let json = serde_json::from_str(&output).map_err(|error| Failure::new(Kind::Other, format!("{}: {error}", words.join(" "))))?;
        Ok((json, took))
    }

    /// Runs a command that takes long and prints nothing of interest.
    pub(super) fn run_quietly(&self, data: &Path, words: &[&str]) -> Result<(), Failure> {
        output(&mut self.command(Place::default(), data, words)).map(drop)
    }

    /// Starts a node that serves at its namespace's address.
    pub(super) fn serve(&self, place: Place, data: &Path, words: &[&str]) -> Result<Serving, Failure> {
        let listen = format!("/ip4/{}/tcp/4747", address(place.space.unwrap_or(0)));
        let mut command = self.command(place, data, &["serve", "--until-stdin-closes", "--listen", &listen]);
        command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().map_err(|error| io_failure("start", &self.program, &error))?;
        let address = first_line(&mut child)?;
        Ok(Serving { child, address })
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

impl Net {
    /// A switch in a namespace of its own, with a line of some rate to each node, each way.
    fn lan(lines: &[Line]) -> Result<Self, Failure> {
        let net = Self::Lan(lines.len());
        let hub = format!("{PREFIX}x");
        ip(&["netns", "add", &hub])?;
        ip(&["-n", &hub, "link", "add", "switch", "type", "bridge"])?;
        ip(&["-n", &hub, "link", "set", "switch", "up"])?;
        for (number, line) in lines.iter().enumerate() {
            let (space, port) = (name(number), format!("to{number}"));
            ip(&["netns", "add", &space])?;
            ip(&["-n", &space, "link", "set", "lo", "up"])?;
            ip(&["-n", &hub, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &space])?;
            ip(&["-n", &hub, "link", "set", &port, "master", "switch", "up"])?;
            ip(&["-n", &space, "addr", "add", &format!("{}/24", address(number)), "dev", "eth0"])?;
            ip(&["-n", &space, "link", "set", "eth0", "up"])?;
            let rate = format!("{}mbit", line.rate_mbit);
            if line.rate_mbit == 0 {
                continue;
            }
            for (space, device) in [(&hub, port.as_str()), (&space, "eth0")] {
                let shape = ["tc", "qdisc", "add", "dev", device, "root", "tbf", "rate", &rate, "burst", "256kb", "latency", "50ms"];
                output(Command::new("ip").args(["netns", "exec", space]).args(shape))?;
            }
        }
        Ok(net)
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        match self {
            // It takes its namespaces down when it is asked to end, and cannot when it is killed.
            Self::Hub(child) => {
                let _ = Command::new("kill").arg(child.id().to_string()).status();
                let _ = child.wait();
            }
            Self::Lan(nodes) => {
                let names = (0..*nodes).map(name).chain([format!("{PREFIX}x")]);
                names.for_each(|name| drop(Command::new("ip").args(["netns", "del", &name]).stderr(Stdio::null()).status()));
            }
        }
    }
}

impl Serving {
    /// Processor seconds that it has taken.
    pub(super) fn processor_seconds(&self) -> f64 {
        processor_seconds(&format!("/proc/{}/stat", self.child.id()), 11)
    }
}

/// Processor seconds of all processes that were started and have ended.
pub(super) fn processor_seconds_of_ended() -> f64 {
    processor_seconds("/proc/self/stat", 13)
}

/// Two neighbouring fields, in hundredths of a second, counted from the one behind the name.
fn processor_seconds(path: &str, from: usize) -> f64 {
    let stat = fs::read_to_string(path).unwrap_or_default();
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
    fields.skip(from).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// How fast one TCP stream carries bytes from one node to another just now, in bytes a second: by `iperf3`.
pub(super) fn raw_tcp(from: usize, to: usize, seconds: u32) -> Result<f64, Failure> {
    let iperf3 = |space: usize| {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &name(space), "iperf3"]);
        command
    };
    let mut server = iperf3(from).args(["--server", "--one-off", "--forceflush"]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let server = server.as_mut().map_err(|error| Failure::new(Kind::Other, format!("cannot start ip: {error}")))?;
    // It prints a rule before it listens, and says that it listens after.
    let mut lines = server.stdout.take().map(BufReader::new).into_iter().flat_map(BufRead::lines).map_while(Result::ok);
    if !lines.any(|line| line.contains("listening")) {
        let _ = server.wait();
        return Err(Failure::new(Kind::NotFound, "iperf3 is needed for comparison, and does not run"));
    }
    let text = output(iperf3(to).args(["--client", &address(from), "--reverse", "--json", "--time", &seconds.to_string()]));
    let _ = (server.kill(), server.wait());
    let json: Value = serde_json::from_str(&text?).map_err(|error| Failure::new(Kind::Other, format!("iperf3: {error}")))?;
    json["end"]["sum_received"]["bits_per_second"]
        .as_f64()
        .map(|bits| bits / 8.0)
        .ok_or_else(|| Failure::new(Kind::Other, "iperf3 says no speed"))
}

/// A data directory like `from`, with a key of its own and the blobs that `wanted` names: they are never written, so links do.
pub(super) fn copy_data(from: &Path, to: &Path, wanted: impl Fn(&str) -> bool) -> Result<(), Failure> {
    remove(to)?;
    let entries = |path: &Path| -> Result<Vec<PathBuf>, Failure> {
        let entries = fs::read_dir(path).map_err(|error| io_failure("read", path, &error))?;
        Ok(entries.flatten().map(|entry| entry.path()).collect())
    };
    let copy = |from: &Path, to: &Path| fs::copy(from, to).map(drop).map_err(|error| io_failure("copy", from, &error));
    let create = |path: &Path| fs::create_dir_all(path).map_err(|error| io_failure("create", path, &error));
    for dir in ["manifests", "store/blobs"] {
        create(&to.join(dir))?;
    }
    copy(&from.join("models.json"), &to.join("models.json"))?;
    for manifest in entries(&from.join("manifests"))? {
        copy(&manifest, &to.join("manifests").join(manifest.file_name().unwrap_or_default()))?;
    }
    for prefix in entries(&from.join("store/blobs"))? {
        let to = to.join("store/blobs").join(prefix.file_name().unwrap_or_default());
        create(&to)?;
        for blob in entries(&prefix)? {
            let hash = blob.file_name().unwrap_or_default();
            if hash.to_str().is_some_and(&wanted) {
                fs::hard_link(&blob, to.join(hash)).map_err(|error| io_failure("link", &blob, &error))?;
            }
        }
    }
    Ok(())
}

/// Removes a data directory, if there is one.
pub(super) fn remove(dir: &Path) -> Result<(), Failure> {
    if dir.exists() { fs::remove_dir_all(dir).map_err(|error| io_failure("remove", dir, &error)) } else { Ok(()) }
}

/// The blobs of a model that are experts, in order, by the names of their files, and the bytes of all the others.
pub(super) fn parts(about: &Value) -> (Vec<(String, u64)>, u64) {
    let (mut experts, mut trunk, mut seen) = (Vec::new(), 0, BTreeSet::new());
    for blob in about["blobs"].as_array().into_iter().flatten() {
        let hash = blob["hash"].as_str().and_then(|hash| hash.parse::<ContentHash>().ok());
        let (hash, bytes) = (hash.map_or_else(String::new, |hash| hash.to_hex()), blob["bytes"].as_u64().unwrap_or(0));
        if blob["name"].as_str().is_some_and(|name| name.starts_with("layer ")) {
            experts.push((hash, bytes));
        } else if seen.insert(hash) {
            trunk += bytes;
        }
    }
    (experts, trunk)
}

fn name(number: usize) -> String {
    format!("{PREFIX}{number}")
}

fn address(number: usize) -> String {
    format!("10.88.0.{}", number + 1)
}

fn inside(space: Option<usize>) -> Vec<String> {
    space.map_or_else(Vec::new, |space| ["ip", "netns", "exec", &name(space)].map(str::to_owned).to_vec())
}

fn ip(words: &[&str]) -> Result<(), Failure> {
    output(Command::new("ip").args(words)).map(drop)
}

/// What a program prints, if it ends well.
fn output(command: &mut Command) -> Result<String, Failure> {
    let what = format!("{command:?}").replace('"', "");
    let ended = command.output().map_err(|error| Failure::new(Kind::Other, format!("{what}: {error}")))?;
    check_interrupted()?;
    if ended.status.success() {
        return Ok(String::from_utf8_lossy(&ended.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&ended.stderr).trim().to_owned();
    let from = said.char_indices().rev().nth(ERROR_CHARS).map_or(0, |(at, _)| at);
    Err(Failure::new(Kind::Other, format!("{what}: {}: {}", ended.status, &said[from..])))
}

fn first_line(child: &mut Child) -> Result<String, Failure> {
    let mut line = String::new();
    // The pipe stays open in the reader's place: what is said later is not read, and is little.
    if let Some(out) = child.stdout.as_mut() {
        let _ = BufReader::new(out).read_line(&mut line);
    }
    if line.is_empty() {
        let ended = child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
        return Err(Failure::new(Kind::Other, format!("a program that was to go on has ended: {ended}")));
    }
    Ok(line.trim().to_owned())
}
