//! How fast a node decodes that has memory for few of the experts, by where the others are. Every node has one core. The later half of
//! each run counts, when memory has settled for what is used most; the whole run stands beside it.

use std::collections::BTreeSet;

use base::failure::{Failure, Kind};
use serde_json::{Value, json};

use super::lab::{Lab, Line, Place, Serving, copy_data, parts, remove};
use super::transfer::id;
use super::{FederationArgs, Report, Routing, Row};

/// Where the starved node computes, and where all the others do.
const CORE: usize = 1;
const OTHER_CORE: usize = 0;
/// Memory that a node needs besides trunk and experts.
const PROCESS_BYTES: u64 = 160 << 20;
/// Lines on which a byte goes and comes back in 0.5 ms and in 5 ms: the forwarder itself takes 0.16 ms each way.
const NEAR: Line = Line { rate_mbit: 1000, delay_ms: 0.09, loss_ppm: 0 };
const FARTHER: Line = Line { rate_mbit: 1000, delay_ms: 2.34, loss_ppm: 0 };
const SLOW: Line = Line { rate_mbit: 100, delay_ms: 2.34, loss_ppm: 0 };
const PROMPT_TOKENS: u32 = 20;
/// Where the disk or fetches alone bring experts, a fraction of the tokens is decoded: it settles sooner, and takes long.
const SLOW_SHARE: u32 = 4;
/// What three nodes have memory and disk for, in percent of the experts; the first is the one that generates.
const UNEQUAL: [u64; 3] = [50, 30, 20];

const RUN: [&str; 14] =
    ["--temperature", "1", "--top-k", "50", "--top-p", "1", "--seed", "7", "--threads", "1", "--context", "4096", "--timeout", "60"];

/// What all measurements of a model share.
struct Bench<'a> {
    lab: &'a Lab,
    name: &'static str,
    id: String,
    experts: Vec<(String, u64)>,
    trunk: u64,
    prompt: String,
    tokens: u32,
    /// Tokens a second with everything in memory, and the tokens.
    alone: f64,
    reference: Vec<Value>,
}

pub(super) fn decode(lab: &Lab, args: &FederationArgs, routing: Routing, report: &mut Report) -> Result<(), Failure> {
    let bench = Bench::prepare(lab, args, routing)?;
    let all: u64 = bench.experts.iter().map(|(_, bytes)| bytes).sum();
    let ram = bench.trunk + all * u64::from(args.share) / 100 + PROCESS_BYTES;
    report.heading(&format!(
        "decode: {} routing, {} layers, {} experts, {:.0} MB, trunk {:.0} MB; the starved node has {:.0} MB, experts {}%; one core a node",
        bench.name,
        args.layers,
        bench.experts.len(),
        all as f64 / 1e6,
        bench.trunk as f64 / 1e6,
        ram as f64 / 1e6,
        args.share
    ))?;
    report.add(Row {
        text: format!("{:26} {:6.2} tokens/s", "all in memory", bench.alone),
        json: json!({"what": "all in memory", "routing": bench.name, "tokens_per_second": bench.alone}),
    })?;
    let whole = lab.path(bench.name);
    let ram_words = ["--ram", &ram.to_string()].map(str::to_owned);
    let disk_only = bench.run(None, &whole, bench.tokens / SLOW_SHARE, &ram_words)?;
    report.add(bench.row("disk only", &disk_only))?;
    for (what, line) in [("peer at 0.5 ms", NEAR), ("peer at 5 ms", FARTHER)] {
        let _net = lab.join(&[line, line])?;
        let serving = bench.serve(0, bench.name, &["--execute-for", "any"])?;
        let data = bench.starved()?;
        let words = [&ram_words[..], &peer_words(&[&serving], true)].concat();
        report.add(bench.row(what, &bench.run(Some(1), &data, bench.tokens, &words)?))?;
    }
    {
        let _net = lab.join(&[NEAR, NEAR])?;
        let serving = bench.serve(0, bench.name, &[])?;
        let data = bench.starved()?;
        let words = [&ram_words[..], &peer_words(&[&serving], false)].concat();
        let answer = bench.run(Some(1), &data, bench.tokens / SLOW_SHARE, &words)?;
        report.add(bench.row("fetch only, at 0.5 ms", &answer))?;
    }
    bench.first_token(ram, report)?;
    bench.unequal(report)
}

impl<'a> Bench<'a> {
    fn prepare(lab: &'a Lab, args: &FederationArgs, routing: Routing) -> Result<Self, Failure> {
        let name = routing.name();
        let data = lab.path(name);
        let layers = args.layers.to_string();
        if !data.is_dir() {
            let words = ["bench", "synth", "qwen3-30b-a3b", "--vocab", "32000", "--precision", "q4", "--name", "m"];
            lab.run_quietly(&data, &[&words[..], &["--layers", &layers, "--routing", name]].concat())?;
        }
        let on_core = Place { core: Some(CORE), space: None };
        let (about, _) = lab.run(on_core, &data, &["show", "m", "--blobs"])?;
        if about["config"]["num_hidden_layers"] != json!(args.layers) {
            return Err(Failure::new(Kind::Usage, format!("{} has a model of other layers: remove it", data.display())));
        }
        let (experts, trunk) = parts(&about);
        let prompt = json!((1..=PROMPT_TOKENS).map(|i| 17 * i).collect::<Vec<_>>()).to_string();
        let mut bench = Self { lab, name, id: id(&about), experts, trunk, prompt, tokens: args.tokens, alone: 0.0, reference: Vec::new() };
        let answer = bench.run(None, &data, args.tokens, &[])?;
        bench.alone = later_speed(&answer);
        bench.reference = tokens_of(&answer);
        Ok(bench)
    }

    /// Generates on the starved core.
    fn run(&self, space: Option<usize>, data: &std::path::Path, tokens: u32, more: &[String]) -> Result<Value, Failure> {
        let tokens = tokens.to_string();
        let mut words = vec!["run", self.id.as_str(), self.prompt.as_str(), "--max-tokens", tokens.as_str()];
        words.extend(RUN);
        words.extend(more.iter().map(String::as_str));
        Ok(self.lab.run(Place { core: Some(CORE), space }, data, &words)?.0)
    }

    fn serve(&self, space: usize, data: &str, more: &[&str]) -> Result<Serving, Failure> {
        let place = Place { core: Some(OTHER_CORE), space: Some(space) };
        self.lab.serve(place, &self.lab.path(data), &[&["--threads", "1"], more].concat())
    }

    /// A node that has the trunk and nothing else.
    fn starved(&self) -> Result<std::path::PathBuf, Failure> {
        let (from, to) = (self.lab.path(self.name), self.lab.path("starved"));
        let experts: BTreeSet<_> = self.experts.iter().map(|(hash, _)| hash.as_str()).collect();
        copy_data(&from, &to, |hash| !experts.contains(hash))?;
        Ok(to)
    }

    fn row(&self, what: &str, answer: &Value) -> Row {
        let used = &answer["experts"];
        let (speed, whole) = (later_speed(answer), answer["tokens_per_second"].as_f64().unwrap_or(0.0));
        let share = speed / self.alone;
        let same = self.reference.starts_with(&tokens_of(answer));
        let longest = answer["token_ms"]["max"].as_f64().unwrap_or(0.0);
        let count = |name: &str| used[name].as_u64().unwrap_or(0);
        let hits = 100.0 * count("hits") as f64 / count("uses").max(1) as f64;
        Row {
            text: format!(
                "{what:26} {speed:6.2} tokens/s {:3.0}% (whole run {whole:.2})   hits {hits:.0}%, {} experts: {} disk, {} peer, {} fetched, {} moved in; longest {longest:.0} ms; {}",
                100.0 * share,
                count("needed"),
                count("disk"),
                count("remote"),
                count("fetched"),
                count("moved_in"),
                if same { "the same tokens" } else { "OTHER TOKENS" }
            ),
            json: json!({"what": what, "routing": self.name, "tokens_per_second": speed, "whole_run": whole, "share": share, "token_ms": answer["token_ms"], "same_tokens": same, "experts": used, "remote": answer["remote"]}),
        }
    }

    /// From an empty store over a slow line, until the first token.
    fn first_token(&self, ram: u64, report: &mut Report) -> Result<(), Failure> {
        let _net = self.lab.join(&[SLOW, SLOW])?;
        let serving = self.serve(0, self.name, &["--execute-for", "any"])?;
        let data = self.lab.path("empty");
        remove(&data)?;
        let ram = ram.to_string();
        let mut words = vec!["run", self.id.as_str(), self.prompt.as_str(), "--max-tokens", "1", "--ram", &ram];
        words.extend(RUN);
        let peer = peer_words(&[&serving], true);
        words.extend(peer.iter().map(String::as_str));
        let (answer, took) = self.lab.run(Place { core: Some(CORE), space: Some(1) }, &data, &words)?;
        let bytes = self.trunk + self.experts.iter().map(|(_, bytes)| bytes).sum::<u64>();
        let download = bytes as f64 * 8.0 / (f64::from(SLOW.rate_mbit) * 1e6);
        let same = self.reference.starts_with(&tokens_of(&answer));
        report.add(Row {
            text: format!(
                "first token from nothing at 100 Mbit/s, 5 ms: {took:.1} s; the line takes {download:.0} s for the model: {:.1} times as long; {}",
                download / took,
                if same { "the same token" } else { "ANOTHER TOKEN" }
            ),
            json: json!({"what": "first token", "routing": self.name, "seconds": took, "download_seconds": download, "ratio": download / took, "same_tokens": same, "experts": answer["experts"]}),
        })
    }

    /// Three nodes of unequal size, none of which holds everything, beside the largest alone, whose disk does.
    fn unequal(&self, report: &mut Report) -> Result<(), Failure> {
        let all: u64 = self.experts.iter().map(|(_, bytes)| bytes).sum();
        let names = ["largest", "middle", "smallest"];
        let experts: Vec<BTreeSet<&str>> = (0..UNEQUAL.len()).map(|node| self.share_of(node)).collect();
        let known: BTreeSet<_> = self.experts.iter().map(|(hash, _)| hash.as_str()).collect();
        for (name, own) in names.iter().zip(&experts) {
            copy_data(&self.lab.path(self.name), &self.lab.path(name), |hash| own.contains(hash) || !known.contains(hash))?;
        }
        let ram = |share: u64| ["--ram".to_owned(), (self.trunk + all * share / 100 + PROCESS_BYTES).to_string()];
        let alone = self.run(None, &self.lab.path(self.name), self.tokens / SLOW_SHARE, &ram(UNEQUAL[0]))?;
        report.add(self.row("largest of three, alone", &alone))?;
        let _net = self.lab.join(&[NEAR; 3])?;
        let mut servings = Vec::new();
        for (space, (name, share)) in names.iter().zip(UNEQUAL).enumerate().skip(1) {
            let [flag, bytes] = ram(share);
            servings.push(self.serve(space, name, &["--execute-for", "any", &flag, &bytes])?);
        }
        let words = [&ram(UNEQUAL[0])[..], &peer_words(&servings.iter().collect::<Vec<_>>(), true)].concat();
        let together = self.run(Some(0), &self.lab.path(names[0]), self.tokens, &words)?;
        report.add(self.row("three together", &together))
    }

    /// The experts that one of the unequal nodes has: spread over all layers, none at two nodes.
    fn share_of(&self, node: usize) -> BTreeSet<&str> {
        let from: u64 = UNEQUAL[..node].iter().sum();
        let mine = from..from + UNEQUAL[node];
        // Steps of 61 in 100 visit every remainder, and neighbours far apart.
        let here = |number: usize| mine.contains(&(number as u64 * 61 % 100));
        self.experts.iter().enumerate().filter(|(number, _)| here(*number)).map(|(_, (hash, _))| hash.as_str()).collect()
    }
}

/// Of the later half of a run.
fn later_speed(answer: &Value) -> f64 {
    answer["token_ms"]["later_half_mean"].as_f64().filter(|&ms| ms > 0.0).map_or(0.0, |ms| 1e3 / ms)
}

fn tokens_of(answer: &Value) -> Vec<Value> {
    answer["tokens"].as_array().cloned().unwrap_or_default()
}

fn peer_words(servings: &[&Serving], execute: bool) -> Vec<String> {
    let peers = servings.iter().flat_map(|serving| ["--peer".to_owned(), serving.address.clone()]);
    let execute_at = if execute { &["--execute-at", "any"][..] } else { &[] };
    peers.chain(["--allow-unsigned".to_owned()]).chain(execute_at.iter().map(|&word| word.to_owned())).collect()
}
