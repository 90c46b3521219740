//! `confrere atlas`: what the experts of a model are, measured from its weights, from what it uses, and by leaving experts out; as numbers,
//! tables, pictures and a page.

mod answers;
mod caches;
mod charts;
mod counts;
mod figures;
mod measure;
mod narrowed;
mod page;
mod plots;
mod routers;
mod statistics;
mod tables;
mod tries;

use std::path::PathBuf;

use base::failure::{Failure, io_failure};
use base::output::{note, print_json, print_line};
use clap::Args;
use runtime::command::{Context, EngineArgs, PeerArgs};
use serde_json::json;

/// Items of each domain that are read, and of those the ones that changes are tried on, unless told otherwise.
const ITEMS_DEFAULT: usize = 40;
const TRIED_DEFAULT: usize = 6;

#[derive(Args)]
pub struct AtlasArgs {
    /// A name, an id or the beginning of an id
    model: String,
    /// The folder to write to: atlas.html, atlas.json, tables and pictures. An atlas that was broken off goes on there
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The same model before its training: what it shows was not learned
    #[arg(long, value_name = "MODEL")]
    untrained: Option<String>,
    /// The same model at earlier points of its training, the earliest first, separated by commas
    #[arg(long, value_name = "MODELS", value_delimiter = ',')]
    checkpoints: Vec<String>,
    /// A directory with a file DOMAIN.txt or DOMAIN.jsonl for each domain, as `profile build` takes it [default: those that ship]
    #[arg(long, value_name = "DIR")]
    probes: Option<PathBuf>,
    /// Items of each domain that are read
    #[arg(long, value_name = "N", default_value_t = ITEMS_DEFAULT)]
    items: usize,
    /// Of those, the ones that changes are tried on
    #[arg(long, value_name = "N", default_value_t = TRIED_DEFAULT)]
    tried: usize,
    /// Leave out every expert on its own, not only the most used and a random sample
    #[arg(long)]
    all: bool,
    /// Where random choices begin
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    peers: PeerArgs,
}

pub fn atlas(context: &Context, args: &AtlasArgs) -> Result<(), Failure> {
    std::fs::create_dir_all(&args.out).map_err(|error| io_failure("create", &args.out, &error))?;
    let atlas = measure::measure(context, args)?;
    let write = |name: &str, bytes: &[u8]| {
        let path = args.out.join(name);
        std::fs::write(&path, bytes).map_err(|error| io_failure("write", &path, &error))
    };
    write("atlas.json", serde_json::to_string_pretty(&atlas).expect("an atlas is JSON").as_bytes())?;
    for (name, table) in tables::tables(&atlas) {
        write(&name, table.as_bytes())?;
    }
    let plots = plots::plots(&atlas);
    for plot in &plots {
        write(&format!("{}.png", plot.name), &plots::png(&plot.picture)?)?;
    }
    write("atlas.html", page::page(&atlas, &plots).as_bytes())?;
    if context.json {
        return print_json(&json!({"model": atlas.model.id, "out": args.out, "answers": atlas.answers}));
    }
    for answer in &atlas.answers {
        print_line(&format!("{}. {}\n   {}", answer.number, answer.question, answer.text))?;
    }
    note(&format!("the page is {}", args.out.join("atlas.html").display()));
    Ok(())
}
