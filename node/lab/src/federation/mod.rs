//! A federation on one machine: nodes in network namespaces, what their lines allow, and what Confrere makes of them.

mod decode;
mod lab;
mod transfer;

use std::path::PathBuf;

use base::failure::{Failure, Kind};
use base::output::{print_json, print_line};
use clap::{Args, ValueEnum};
use runtime::command::Context;
use serde_json::{Value, json};

use self::lab::Lab;
use super::synth::Routing;

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Part {
    /// Fetching a model, beside one TCP stream by iperf3
    Transfer,
    /// Decoding with memory for few of the experts, by where the others are
    Decode,
}

#[derive(Args)]
pub struct FederationArgs {
    /// What to measure [default: all]
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// Where models and nodes are kept, for the next time too: 15 GB
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// The program that makes slow lines [default: linkhub beside this one]
    #[arg(long, value_name = "FILE")]
    linkhub: Option<PathBuf>,
    /// How often each transfer is measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Layers of the models that decode
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=48))]
    layers: u32,
    /// Tokens to decode
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(8..=4000))]
    tokens: u32,
    /// Percent of the experts that the starved node has memory for
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100))]
    share: u32,
    /// How evenly experts are used
    #[arg(long, value_delimiter = ',', default_values = ["skewed", "uniform"])]
    routing: Vec<Routing>,
}

/// A line of a table, as it is printed and as JSON.
struct Row {
    text: String,
    json: Value,
}

/// The tables so far.
struct Report {
    json: bool,
    rows: Vec<Value>,
    /// Whether some tokens were not those of one machine.
    differs: bool,
}

impl Report {
    fn heading(&self, text: &str) -> Result<(), Failure> {
        if self.json { Ok(()) } else { print_line(text) }
    }

    fn add(&mut self, Row { text, json }: Row) -> Result<(), Failure> {
        self.differs |= json["same_tokens"] == false;
        self.rows.push(json);
        if self.json { Ok(()) } else { print_line(&format!("  {text}")) }
    }
}

pub(crate) fn federation(context: &Context, args: &FederationArgs) -> Result<(), Failure> {
    let lab = Lab::new(args.dir.clone(), args.linkhub.as_deref())?;
    let mut report = Report { json: context.json, rows: Vec::new(), differs: false };
    let wanted = |part| args.parts.is_empty() || args.parts.contains(&part);
    if wanted(Part::Transfer) {
        transfer::transfer(&lab, args, &mut report)?;
    }
    if wanted(Part::Decode) {
        args.routing.iter().try_for_each(|&routing| decode::decode(&lab, args, routing, &mut report))?;
    }
    if context.json {
        print_json(&json!({"rows": report.rows}))?;
    }
    if report.differs { Err(Failure::new(Kind::Integrity, "tokens are not those of one machine")) } else { Ok(()) }
}
