//! The command line: what people type, one file a command.

mod config;
mod demo;
mod doctor;
mod eval;
mod experts;
mod import;
mod join;
mod keys;
mod map;
mod models;
mod one_expert;
mod peers;
mod plan;
mod profile;
mod pull;
mod repo;
mod resident;
mod run;
mod run_args;
mod run_at_daemon;
mod serve;
mod serve_api;
mod serve_args;
mod shell;
mod trust;

use std::path::PathBuf;
use std::time::Duration;

use base::clock::watch_for_interrupts;
use base::failure::{Failure, Kind};
use base::{output, threads};
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use lab::{AtlasArgs, BenchCommand};
use net::CALM_LOG;
use protocol::NodeId;
use runtime::command::{Context, parse_size};
use runtime::data_dir::DataDir;
use runtime::memory::default_memory;

use self::config::Configuration;

/// Runs Mixture-of-Experts models together with your other devices: what one lacks, it fetches from its peers.
#[derive(Parser)]
#[command(name = "confrere", version, propagate_version = true, arg_required_else_help = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
struct Global {
    /// Where this node keeps its key, models and experts
    #[arg(long, global = true, value_name = "DIR", env = "CONFRERE_DATA_DIR")]
    data_dir: Option<PathBuf>,
    /// Print one JSON value instead of text
    #[arg(long, global = true)]
    json: bool,
    /// Say nothing but data and errors
    #[arg(short, long, global = true)]
    quiet: bool,
    /// Log what happens; twice for more
    #[arg(short, long, global = true, action = clap::ArgAction::Count, conflicts_with = "quiet")]
    verbose: u8,
    /// Ask no peer
    #[arg(long, global = true, env = "CONFRERE_OFFLINE", value_parser = clap::builder::FalseyValueParser::new())]
    offline: bool,
    /// Most disk that blobs may take, e.g. 20GB [default: no limit]
    #[arg(long, global = true, value_name = "SIZE", value_parser = parse_size, env = "CONFRERE_DISK")]
    disk: Option<u64>,
    /// Most memory that a model may take, e.g. 4GiB [default: three quarters of what is free]
    #[arg(long, global = true, value_name = "SIZE", value_parser = parse_size, env = "CONFRERE_RAM")]
    ram: Option<u64>,
}

#[derive(Subcommand)]
enum Command {
    /// Show two nodes working together on the model that ships with Confrere, in data directories of their own
    Demo(demo::DemoArgs),
    /// Import a checkpoint directory into the store
    Import(import::ImportArgs),
    /// Make a model of narrower weights from one that is here
    Requantize(import::RequantizeArgs),
    /// Trust a node and learn what it has, from the ticket that its `serve` prints. A node that serves from the data directory is told
    Join(join::JoinArgs),
    /// Keep the list of those whose models you run
    #[command(subcommand)]
    Publishers(keys::PublishersCommand),
    /// List the peers that this node remembers
    Peers(peers::PeersArgs),
    /// Print this node's key, in the form that `publishers add` takes
    Id,
    /// List the models
    Ls,
    /// Show what a model is made of
    Show {
        /// A name, an id or the beginning of an id
        model: String,
        /// List every tensor and expert with the blob that holds it, too
        #[arg(long)]
        blobs: bool,
    },
    /// Remove a model, and the blobs that no other model uses
    Rm {
        /// A name, an id or the beginning of an id
        model: String,
    },
    /// Serve manifests, trunks and experts to peers
    Serve(serve_args::ServeArgs),
    /// List the models that the node which serves has in memory
    Ps,
    /// Have the node which serves let a model go from memory
    Stop {
        /// A name, an id or the beginning of an id
        model: String,
    },
    /// Fetch a model, or part of it, from peers. A node that serves from the data directory is told to
    Pull(pull::PullArgs),
    /// Say what of a model would run in some memory, and how fast
    Plan(plan::PlanArgs),
    /// Generate text; experts that are missing are fetched. A node that serves from the data directory is asked
    Run(run_args::RunArgs),
    /// Say which experts serve a domain
    #[command(subcommand)]
    Experts(experts::ExpertsCommand),
    /// Say what this node thinks of its peers
    #[command(subcommand)]
    Trust(trust::TrustCommand),
    /// Measure what a model's experts are good at
    #[command(subcommand)]
    Profile(profile::ProfileCommand),
    /// Say what a model's experts are: six questions answered with numbers, tables, pictures and a page
    Atlas(Box<AtlasArgs>),
    /// Measure a model
    #[command(subcommand)]
    Eval(eval::EvalCommand),
    /// Measure this machine, and what the engine makes of it
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Look after the store
    #[command(subcommand)]
    Repo(repo::RepoCommand),
    /// Say what may keep this node from working, and what to do about it
    Doctor,
    /// Show the settings in force
    #[command(subcommand)]
    Config(config::ConfigCommand),
    /// Print completions for a shell
    Completions {
        /// Which shell
        shell: shell::Completed,
    },
    /// Write the manual
    Man(shell::ManArgs),
}

/// The options on the command line, of all levels.
fn given(matches: &ArgMatches) -> Vec<String> {
    let own = matches.ids().map(clap::Id::as_str).filter(|id| {
        // Names of groups, which begin with a capital, are none.
        id.starts_with(char::is_lowercase) && matches.value_source(id) == Some(ValueSource::CommandLine)
    });
    let below = matches.subcommand().map(|(_, matches)| given(matches));
    own.map(str::to_owned).chain(below.into_iter().flatten()).collect()
}

/// A text as a part of a path.
fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// Reads the command line and does what it says.
pub(crate) fn main() -> Result<(), Failure> {
    let own = Cli::command();
    let configuration = Configuration::read(&own)?;
    let parsed = configuration.apply(own.clone()).try_get_matches();
    let parsed = parsed.and_then(|matches| Cli::from_arg_matches(&matches).map(|cli| (matches, cli)));
    let (matches, cli) = parsed.or_else(|error| configuration.explain(&error).map_or_else(|| error.exit(), Err))?;
    start_logging(cli.global.verbose, cli.global.quiet);
    let runtime = threads::runtime().map_err(|error| Failure::new(Kind::Other, format!("cannot start the runtime: {error}")))?;
    watch_for_interrupts(runtime.handle());
    let data_dir = match cli.global.data_dir {
        Some(dir) => dir,
        None => default_data_dir()?,
    };
    // What needs no data directory, or has some of its own.
    match &cli.command {
        Command::Demo(args) => return demo::demo(&runtime, args, cli.global.json),
        Command::Config(command) => return config::config(command, (&configuration, &own), &matches, cli.global.json),
        Command::Completions { shell } => return shell::completions(own, *shell),
        Command::Man(args) => return shell::man(own, args),
        _ => {}
    }
    let context = Context {
        dir: DataDir::open(&data_dir)?,
        runtime,
        json: cli.global.json,
        offline: cli.global.offline,
        disk_max: cli.global.disk.unwrap_or(u64::MAX),
        memory_max: cli.global.ram.unwrap_or_else(default_memory),
        given: given(&matches),
    };
    match cli.command {
        Command::Demo(_) | Command::Config(_) | Command::Completions { .. } | Command::Man(_) => unreachable!("done above"),
        Command::Doctor => doctor::doctor(&context, &configuration),
        Command::Import(args) => import::import(&context, &args),
        Command::Requantize(args) => import::requantize(&context, &args),
        Command::Join(args) => join::join(&context, &args),
        Command::Publishers(command) => keys::publishers(&context, &command),
        Command::Peers(args) => peers::peers(&context, &args),
        Command::Id => keys::id(&context),
        Command::Ls => models::ls(&context),
        Command::Show { model, blobs } => models::show(&context, &model, blobs),
        Command::Rm { model } => models::rm(&context, &model),
        Command::Ps => resident::ps(&context),
        Command::Stop { model } => resident::stop(&context, &model),
        Command::Serve(args) => serve::serve(&context, &args),
        Command::Plan(args) => plan::plan(&context, &args),
        Command::Experts(command) => experts::experts(&context, &command),
        Command::Trust(command) => trust::trust(&context, &command),
        Command::Profile(command) => profile::profile(&context, &command),
        Command::Pull(args) => pull::pull(&context, &args),
        Command::Run(args) => run::run(&context, &args),
        Command::Atlas(args) => lab::atlas(&context, &args),
        Command::Bench(command) => lab::bench(&context, &command),
        Command::Eval(command) => eval::eval(&context, &command),
        Command::Repo(command) => repo::repo(&context, &command),
    }
}

fn start_logging(verbose: u8, quiet: bool) {
    if quiet {
        output::be_quiet();
    }
    let level = match (quiet, verbose) {
        (true, _) => "error".to_owned(),
        (false, 0) => format!("warn,{CALM_LOG}"),
        (false, 1) => format!("confrere=debug,net=debug,runtime=debug,api=debug,store=debug,warn,{CALM_LOG}"),
        (false, _) => "debug".to_owned(),
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("CONFRERE_LOG").unwrap_or_else(|_| level.into());
    let color = std::env::var_os("NO_COLOR").is_none() && std::io::IsTerminal::is_terminal(&std::io::stderr());
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(color).with_writer(std::io::stderr).finish();
    // `init` would also print what libraries say of files that they cannot read.
    let _ = tracing::subscriber::set_global_default(subscriber);
}

fn default_data_dir() -> Result<PathBuf, Failure> {
    let dirs = directories::ProjectDirs::from("", "", "confrere");
    let missing = || Failure::new(Kind::Usage, "no home directory to keep data in; say where with --data-dir");
    Ok(dirs.ok_or_else(missing)?.data_dir().to_owned())
}

/// Reads a time: seconds, or a number with s, m or h.
fn parse_time(text: &str) -> Result<Duration, String> {
    let (number, factor) = match text.strip_suffix(['s', 'm', 'h']) {
        Some(number) if text.ends_with('m') => (number, 60.0),
        Some(number) if text.ends_with('h') => (number, 3600.0),
        Some(number) => (number, 1.0),
        None => (text, 1.0),
    };
    let seconds = number.parse::<f64>().ok().map(|number| number * factor).filter(|seconds| (0.0..=1e9).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| format!("{text:?} is not a time; write 90s, 10m or 2h"))
}

#[derive(Args)]
struct PublisherKey {
    /// A key as `confrere id` prints it
    key: NodeId,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn global_flags_stand_before_and_after_the_command() {
        for line in [["confrere", "--data-dir", "x", "--json", "ls"], ["confrere", "ls", "--json", "--data-dir", "x"]] {
            let cli = Cli::try_parse_from(line).unwrap_or_else(|error| panic!("{error}"));
            assert!(cli.global.json && cli.global.data_dir == Some("x".into()));
        }
    }

    #[test]
    fn sizes_have_decimal_and_binary_units() {
        let sizes =
            [("0", 0), ("12", 12), ("1.5kB", 1500), ("2GiB", 2 << 30), ("3 MB", 3_000_000), ("1ti", 1 << 40), ("1048576TiB", 1 << 60)];
        for (text, bytes) in sizes {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "GB", "-1", "1XB", "1.2.3", "1e3", "1048577TiB", "99999999999999999999GB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
