//! How fast a model is fetched, from whole command to whole command, with what one TCP stream carries over the same line.

use base::failure::Failure;
use serde_json::{Value, json};

use super::super::Median;
use super::lab::{Lab, Line, Net, Place, Serving, parts, processor_seconds_of_ended, raw_tcp, remove};
use super::{FederationArgs, Report, Row};

/// How long the stream that is compared with runs: a slow start is not what it is asked about.
const RAW_SECONDS: u32 = 10;

const UNLIMITED: Line = Line { rate_mbit: 0, delay_ms: 0.0, loss_ppm: 0 };
const GIGABIT: Line = Line { rate_mbit: 1000, delay_ms: 0.0, loss_ppm: 0 };
const SLOW: Line = Line { rate_mbit: 100, delay_ms: 0.0, loss_ppm: 0 };
const FAR: Line = Line { rate_mbit: 100, delay_ms: 50.0, loss_ppm: 0 };
const LOSSY: Line = Line { rate_mbit: 100, delay_ms: 50.0, loss_ppm: 1000 };

/// A model to fetch: `name` is that of its data directory.
struct Model {
    name: &'static str,
    synth: &'static [&'static str],
}

/// 1.5 GB in experts of 2.7 MB.
const LARGE: Model = Model { name: "large", synth: &["--layers", "4", "--vocab", "32000", "--precision", "q4"] };
/// 0.4 GB in experts of 2.7 MB.
const SMALL: Model = Model { name: "small", synth: &["--layers", "1", "--vocab", "32000", "--precision", "q4"] };
/// 1.3 GB in experts of 9.4 MB.
const WIDE: Model = Model { name: "wide", synth: &["--layers", "1", "--vocab", "4096", "--precision", "bf16"] };

pub(super) fn transfer(lab: &Lab, args: &FederationArgs, report: &mut Report) -> Result<(), Failure> {
    report.heading("transfer: `pull` of a whole model into an empty store, MB/s of blobs over the time of the whole command")?;
    for (what, line, model) in [
        ("no limit", UNLIMITED, LARGE),
        ("1 Gbit/s", GIGABIT, LARGE),
        ("100 Mbit/s, 50 ms each way", FAR, SMALL),
        ("100 Mbit/s, 50 ms each way, experts of 9.4 MB", FAR, WIDE),
        ("100 Mbit/s, 50 ms each way, 0.1% lost", LOSSY, SMALL),
    ] {
        let (id, bytes) = make(lab, &model)?;
        let _net = lab.join(&[line, line])?;
        let serving = serve(lab, &model, 0)?;
        let (mut raw, mut ours, mut processor) = (Vec::new(), Vec::new(), 0.0);
        for _ in 0..args.runs {
            raw.push(raw_tcp(0, 1, RAW_SECONDS)?);
            let before = (serving.processor_seconds(), processor_seconds_of_ended());
            ours.push(bytes as f64 / pull(lab, 1, &id, &[&serving])?);
            processor += serving.processor_seconds() + processor_seconds_of_ended() - before.0 - before.1;
        }
        report.add(row(what, raw, ours, processor * 1e9 / (bytes as f64 * f64::from(args.runs))))?;
    }
    several(lab, args, report)
}

/// Four slow providers and a receiver ten times as fast.
fn several(lab: &Lab, args: &FederationArgs, report: &mut Report) -> Result<(), Failure> {
    let (id, bytes) = make(lab, &SMALL)?;
    let _net: Net = lab.join(&[SLOW, SLOW, SLOW, SLOW, GIGABIT])?;
    let all = lab.path(SMALL.name);
    let others: Vec<_> = (1..4).map(|number| lab.path(&format!("{}{number}", SMALL.name))).collect();
    others.iter().try_for_each(|other| super::lab::copy_data(&all, other, |_| true))?;
    let mut servings = vec![serve(lab, &SMALL, 0)?];
    for (number, data) in others.iter().enumerate() {
        servings.push(lab.serve(Place { core: None, space: Some(number + 1) }, data, &[])?);
    }
    let (mut one, mut four) = (Vec::new(), Vec::new());
    for _ in 0..args.runs {
        one.push(bytes as f64 / pull(lab, 4, &id, &[&servings[0]])?);
        four.push(bytes as f64 / pull(lab, 4, &id, &servings.iter().collect::<Vec<_>>())?);
    }
    let (one, four) = (Median::of(one), Median::of(four));
    report.add(Row {
        text: format!(
            "{:48} one {:6.1}   four {:6.1} ({:.1} to {:.1})   {:.2} times one",
            "providers of 100 Mbit/s each",
            one.median / 1e6,
            four.median / 1e6,
            four.min / 1e6,
            four.max / 1e6,
            four.median / one.median
        ),
        json: json!({"what": "four providers", "one": one.json(), "four": four.json(), "ratio": four.median / one.median}),
    })
}

/// A line of the table; `processor` is in seconds for a gigabyte, of both sides together.
fn row(what: &str, raw: Vec<f64>, ours: Vec<f64>, processor: f64) -> Row {
    let (raw, ours) = (Median::of(raw), Median::of(ours));
    let share = ours.median / raw.median;
    Row {
        text: format!(
            "{what:48} TCP {:6.1}   pull {:6.1} ({:.1} to {:.1})   {:.0}%   {processor:.1} CPU s/GB",
            raw.median / 1e6,
            ours.median / 1e6,
            ours.min / 1e6,
            ours.max / 1e6,
            100.0 * share
        ),
        json: json!({"what": what, "tcp_bytes_per_second": raw.json(), "pull_bytes_per_second": ours.json(), "share": share, "processor_seconds_per_gigabyte": processor}),
    }
}

/// Makes a model unless it is there; returns its id and its bytes.
fn make(lab: &Lab, model: &Model) -> Result<(String, u64), Failure> {
    let data = lab.path(model.name);
    if !data.is_dir() {
        let words = [&["bench", "synth", "qwen3-30b-a3b", "--name", "m"], model.synth].concat();
        lab.run_quietly(&data, &words)?;
    }
    let (about, _) = lab.run(Place::default(), &data, &["show", "m", "--blobs"])?;
    let (experts, trunk) = parts(&about);
    Ok((id(&about), trunk + experts.iter().map(|(_, bytes)| bytes).sum::<u64>()))
}

pub(super) fn id(about: &Value) -> String {
    about["id"].as_str().unwrap_or_default().to_owned()
}

fn serve(lab: &Lab, model: &Model, space: usize) -> Result<Serving, Failure> {
    lab.serve(Place { core: None, space: Some(space) }, &lab.path(model.name), &[])
}

/// Fetches everything into an empty store; returns how many seconds that took.
fn pull(lab: &Lab, space: usize, id: &str, from: &[&Serving]) -> Result<f64, Failure> {
    let data = lab.path("empty");
    remove(&data)?;
    let peers = from.iter().flat_map(|serving| ["--peer", serving.address.as_str()]);
    let words: Vec<_> = ["pull", id, "--allow-unsigned"].into_iter().chain(peers).collect();
    let (_, took) = lab.run(Place { core: None, space: Some(space) }, &data, &words)?;
    remove(&data)?;
    Ok(took)
}
