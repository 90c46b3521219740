//! Cache policies on a recorded trace, with the best that any could do beside them.

use std::path::{Path, PathBuf};

use base::failure::{Failure, Kind, io_failure};
use base::output::{print_json, print_line};
use clap::Args;
use inference::cache_policy::{PolicyKind, Trace, belady, simulate};
use runtime::command::Context;
use serde_json::json;

/// Longest trace that is read, in bytes.
const TRACE_BYTES_MAX: u64 = 1 << 30;

#[derive(Args)]
pub struct TraceArgs {
    /// A trace, as `run --trace FILE` writes it
    file: PathBuf,
    /// Experts kept per layer
    #[arg(long, value_delimiter = ',', value_name = "N", default_values_t = [8, 16, 24, 32, 49, 64, 81])]
    slots: Vec<usize>,
}

/// Reads a recorded trace.
pub fn read_trace(file: &Path) -> Result<Trace, Failure> {
    let bytes = store::disk::read_file(file, TRACE_BYTES_MAX).map_err(|error| io_failure("read", file, &error))?;
    let bytes = bytes.ok_or_else(|| Failure::new(Kind::NotFound, format!("{} is not there", file.display())))?;
    let text = String::from_utf8(bytes).map_err(|_| Failure::new(Kind::Usage, format!("{} is not a trace", file.display())))?;
    Trace::parse(&text).map_err(|error| Failure::new(Kind::Usage, format!("{}: {error}", file.display())))
}

pub(crate) fn trace(context: &Context, args: &TraceArgs) -> Result<(), Failure> {
    let trace = read_trace(&args.file)?;
    let mut rows = Vec::new();
    for &slots in args.slots.iter().filter(|&&slots| slots <= trace.experts as usize) {
        let capacity = slots * trace.layers as usize;
        let mut row = json!({"slots_per_layer": slots});
        for policy in PolicyKind::ALL {
            row[policy.name()] = json!(simulate(&trace, capacity, policy).rate());
        }
        row["belady"] = json!(belady(&trace, capacity).rate());
        rows.push(row);
    }
    if context.json {
        return print_json(&json!(rows));
    }
    print_line(&format!("{:>12}{:>10}{:>10}{:>10}{:>10}", "kept/layer", "lru", "lfu", "s3-fifo", "belady"))?;
    for row in rows {
        let rate = |name: &str| format!("{:.1}%", 100.0 * row[name].as_f64().unwrap_or(0.0));
        let line = [rate("lru"), rate("lfu"), rate("s3-fifo"), rate("belady")].map(|rate| format!("{rate:>10}")).concat();
        print_line(&format!("{:>12}{line}", row["slots_per_layer"]))?;
    }
    Ok(())
}
