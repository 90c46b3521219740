//! `confrere bench`: what this machine allows, what the engine reaches of it, and how caches fare.

#![expect(missing_docs, reason = "the crates of the node are public to one another only, and many a name says it all")]

mod atlas;
mod federation;
mod speed;
mod synth;
mod towers;
mod trace;

pub use self::atlas::{AtlasArgs, atlas};
pub use self::trace::read_trace;

use base::failure::Failure;
use clap::Subcommand;
use runtime::command::Context;

#[derive(Subcommand)]
pub enum BenchCommand {
    /// Measure prefill and decode of models that are here, against what memory and arithmetic allow
    Speed(speed::SpeedArgs),
    /// Make a model of random weights in the shape of a known one
    Synth(synth::SynthArgs),
    /// Measure several nodes on one machine, joined by emulated lines (needs root, iproute2 and iperf3)
    Federation(federation::FederationArgs),
    /// Measure eyes and ears at the published sizes, on weights made up here
    Towers(towers::TowersArgs),
    /// Replay a recorded trace of experts against cache policies
    Trace(trace::TraceArgs),
}

pub fn bench(context: &Context, command: &BenchCommand) -> Result<(), Failure> {
    match command {
        BenchCommand::Speed(args) => speed::speed(context, args),
        BenchCommand::Synth(args) => synth::synth(context, args),
        BenchCommand::Federation(args) => federation::federation(context, args),
        BenchCommand::Towers(args) => towers::towers(context, args),
        BenchCommand::Trace(args) => trace::trace(context, args),
    }
}

/// The middle of some measurements, with the least and the greatest.
#[expect(clippy::struct_field_names, reason = "the median of a Median is what it is")]
#[derive(Clone, Copy, Debug)]
struct Median {
    median: f64,
    min: f64,
    max: f64,
}

impl Median {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let (Some(&min), Some(&max)) = (values.first(), values.last()) else { return Self { median: 0.0, min: 0.0, max: 0.0 } };
        let middle = values.len() / 2;
        let median = if values.len().is_multiple_of(2) { f64::midpoint(values[middle - 1], values[middle]) } else { values[middle] };
        Self { median, min, max }
    }

    fn json(self) -> serde_json::Value {
        serde_json::json!({"median": self.median, "min": self.min, "max": self.max})
    }
}
