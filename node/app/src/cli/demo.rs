//! `confrere demo`: a node with everything and a node with nothing, two processes on loopback, and the proof that it makes no difference.

use std::io::{BufRead, BufReader, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use base::clock::{check_interrupted, instant};
use base::failure::{Failure, Kind, io_failure};
use base::output::{be_quiet, human_bytes, note, print, print_json, print_line};
use clap::Args;
use inference::convert::Target;
use inference::expert_use::ExpertUse;
use inference::generate::Progress;
use net::Multiaddr;
use protocol::ModelId;
use runtime::command::EngineArgs;
use runtime::data_dir::{DataDir, LocalModel};
use runtime::dispatcher::RemoteOptions;
use runtime::federation::{Federation, PeerOptions, Publishers};
use runtime::loading::Loaded;
use runtime::memory::default_memory;
use runtime::prompt::{Prompt, PromptError, default_sampling};
use serde_json::json;
use tokio::runtime::Runtime;

use super::import::{UnreadTokenizer, import_into};
use super::run::{RunOutput, answer};

/// Two prompts of each of three domains: the second of a pair shows what the first has already brought.
const PROMPTS: [(&str, &str); 6] = [
    ("Rust", "impl fmt::Display for Error {\n    fn fmt(&self, f: &mut fmt::Formatter"),
    ("Rust", "#[test]\nfn reads_an_empty_file() {\n    let"),
    ("stories", "Once upon a time there was a little girl who lived"),
    ("stories", "The old king called his three sons and said,"),
    ("poems", "春夜喜雨\n杜甫\n好雨"),
    ("poems", "秋思\n李白\n明月"),
];
/// For a checkpoint without a tokenizer: as many prompts, of token ids.
const ID_PROMPTS: [(&str, &str); 6] = [
    ("ids 1", "[1, 2, 3]"),
    ("ids 1", "[1, 2, 4]"),
    ("ids 2", "[20, 30]"),
    ("ids 2", "[20, 31]"),
    ("ids 3", "[9, 9, 9, 9]"),
    ("ids 3", "[9, 9, 9, 8]"),
];
const DEFAULT_MODEL: &str = "models/confrere-18m";
/// The same on both nodes.
const SEED: u64 = 1;
const START_TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Args)]
pub(super) struct DemoArgs {
    /// Another checkpoint's directory [default: the model that ships with Confrere]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Most tokens to generate for each prompt
    #[arg(long, value_name = "N", default_value_t = 48)]
    max_tokens: usize,
}

/// What one prompt took.
struct Row {
    domain: &'static str,
    tokens: Vec<u32>,
    prefill: ExpertUse,
    total: ExpertUse,
    tokens_per_second: f64,
}

pub(super) fn demo(runtime: &Runtime, args: &DemoArgs, as_json: bool) -> Result<(), Failure> {
    if as_json {
        be_quiet();
    }
    let checkpoint = args.model.clone().map_or_else(shipped_model, Ok)?;
    let workplace = Workplace::new()?;
    let began = instant();

    note(&format!("node A imports {} …", checkpoint.display()));
    let (rich, poor) = (DataDir::open(&workplace.path.join("a"))?, DataDir::open(&workplace.path.join("b"))?);
    let model = import_into(&rich.lock(u64::MAX)?, &checkpoint, Some("demo"), Target::default(), UnreadTokenizer::Refused)?;
    let experts = model.manifest.experts_count();

    note("node A answers alone, for comparison …");
    let alone = generate_all(runtime, &rich, None, model.id, args.max_tokens, Show::Nothing)?;

    let provider = Provider::start(&workplace.path.join("a"))?;
    note(&format!("node A serves from process {}; node B is this process, {}, and has nothing\n", provider.child.id(), std::process::id()));
    // B trusts A's key: what `confrere join` does with A's ticket.
    poor.set_publishers(&[model.publisher].into())?;
    let show = if as_json { Show::Nothing } else { Show::Everything };
    let together = generate_all(runtime, &poor, Some(provider.address.clone()), model.id, args.max_tokens, show)?;
    drop(provider);

    let identical = alone.iter().zip(&together).all(|(a, b)| a.tokens == b.tokens);
    let fetched: u64 = together.iter().map(|row| row.total.bytes_fetched).sum();
    if as_json {
        let rows: Vec<_> = together.iter().map(|row| json!({
            "domain": row.domain, "needed_in_prefill": row.prefill.needed, "needed": row.total.needed, "had": row.total.ram + row.total.disk,
            "fetched": row.total.fetched, "bytes_fetched": row.total.bytes_fetched, "tokens_per_second": row.tokens_per_second,
        })).collect();
        print_json(
            &json!({"model": model.id.to_string(), "experts": experts, "model_bytes": model.manifest.total_bytes(), "prompts": rows,
                           "expert_bytes_fetched": fetched, "seconds": (instant() - began).as_secs_f64(), "identical": identical}),
        )?;
    } else {
        table(&together, &model, fetched)?;
        note(&format!("{:.1} s in all", (instant() - began).as_secs_f64()));
        print_line(&format!("tokens identical: {}", if identical { "yes" } else { "no" }))?;
    }
    if identical { Ok(()) } else { Err(Failure::new(Kind::Integrity, "node B's tokens differ from node A's")) }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Show {
    Nothing,
    Everything,
}

/// Answers every prompt on the node of `dir`, which may ask `peer` for what it lacks.
fn generate_all(
    runtime: &Runtime,
    dir: &DataDir,
    peer: Option<Multiaddr>,
    model: ModelId,
    tokens_max: usize,
    show: Show,
) -> Result<Vec<Row>, Failure> {
    let open = dir.lock(u64::MAX)?;
    let options = PeerOptions {
        peers: peer.into_iter().collect(),
        mdns: false,
        private: None,
        timeout: Duration::from_secs(10),
        publishers: Publishers::Trusted,
        remote: RemoteOptions::default(),
    };
    let federation = Federation::connect(runtime.handle(), dir, &options, false)?;
    let found = federation.find(&open, &model.to_string(), Some("demo"))?;
    let options = EngineArgs::default().options(&found.manifest, None);
    let mut loaded = federation.load(&open, &found, default_memory(), options)?;
    let prompts = if loaded.text.tokenizer.is_some() { PROMPTS } else { ID_PROMPTS };
    prompts.iter().map(|(domain, prompt)| generate_one(&mut loaded, &found, domain, prompt, tokens_max, show)).collect()
}

fn generate_one(
    loaded: &mut Loaded,
    found: &LocalModel,
    domain: &'static str,
    prompt: &str,
    tokens_max: usize,
    show: Show,
) -> Result<Row, Failure> {
    check_interrupted()?;
    let defaults = &found.manifest.generation;
    let request = loaded
        .text
        .request(Prompt::Raw(prompt), (loaded.engine.context(), tokens_max), default_sampling(defaults, SEED), defaults)
        .map_err(PromptError::into_failure)?;
    let terminal = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let [bold, dim, plain] = if terminal { ["\x1b[1m", "\x1b[2m", "\x1b[0m"] } else { [""; 3] };
    if show == Show::Everything {
        print(&format!("{bold}{prompt}{plain}"))?;
    }
    let mut session = loaded.engine.session();
    let mut fetched = 0;
    let RunOutput { generated, prefill, experts, tokens_per_second, .. } = answer(loaded, &mut session, &request, |progress| {
        let (Progress::Prefilled(usage) | Progress::Token(_, usage)) = progress;
        // What the model waited for stands before the token that came of it.
        if show == Show::Everything && usage.fetched > fetched {
            print(&format!("{dim}⟨+{}⟩{plain}", usage.fetched - fetched))?;
        }
        fetched = usage.fetched;
        if let (Show::Everything, Progress::Token(text, _)) = (show, progress) {
            print(text)?;
        }
        Ok(())
    })?;
    check_interrupted()?; // half an answer proves nothing
    if show == Show::Everything {
        let ids = if loaded.text.tokenizer.is_none() { format!(" {:?}", generated.tokens) } else { String::new() };
        print(&format!("{ids}\n"))?;
        let all = found.manifest.experts_count();
        note(&format!(
            "[{domain}: {} of {all} experts touched, {} fetched, {}]\n",
            experts.needed,
            experts.fetched,
            human_bytes(experts.bytes_fetched)
        ));
    }
    Ok(Row { domain, tokens: generated.tokens, prefill, total: experts, tokens_per_second })
}

/// Says what each prompt took, and what the second of its domain still had to fetch.
fn table(rows: &[Row], model: &LocalModel, fetched: u64) -> Result<(), Failure> {
    let all = model.manifest.experts_count();
    print_line(&format!(
        "{:10} {:>20} {:>12} {:>8} {:>12} {:>10}",
        "prompt", "touched in prefill", "in all", "fetched", "bytes", "tokens/s"
    ))?;
    let mut before = "";
    for row in rows {
        let prompt = format!("{} {}", row.domain, if row.domain == before { "again" } else { "" });
        before = row.domain;
        let Row { prefill, total, tokens_per_second, .. } = row;
        let bytes = human_bytes(total.bytes_fetched);
        print_line(&format!(
            "{prompt:16} {:>9} of {all} {:>5} of {all} {:>8} {bytes:>12} {tokens_per_second:>10.1}",
            prefill.needed, total.needed, total.fetched
        ))?;
    }
    let trunk: u64 = model.manifest.trunk_blobs().map(|blob| blob.length).sum();
    let whole = model.manifest.total_bytes();
    let share = 100 * (trunk + fetched) / whole;
    print_line(&format!(
        "node B fetched {} of experts and {} of trunk: {share}% of the model's {}",
        human_bytes(fetched),
        human_bytes(trunk),
        human_bytes(whole)
    ))
}

/// The model that ships with Confrere: beside the build that this binary comes from.
fn shipped_model() -> Result<PathBuf, Failure> {
    let exe = std::env::current_exe().and_then(|exe| exe.canonicalize()).unwrap_or_default();
    let source = Path::new(env!("CARGO_MANIFEST_DIR"));
    let places = exe.ancestors().chain(source.ancestors()).map(|dir| dir.join(DEFAULT_MODEL));
    let found = places.into_iter().find(|dir| dir.join("config.json").exists());
    found.ok_or_else(|| Failure::new(Kind::NotFound, format!("{DEFAULT_MODEL} is not near this program; say where with --model DIR")))
}

/// A directory for the demo's nodes, removed at the end.
struct Workplace {
    path: PathBuf,
}

impl Workplace {
    fn new() -> Result<Self, Failure> {
        let path = std::env::temp_dir().join(format!("confrere-demo-{}", std::process::id()));
        std::fs::create_dir_all(&path).map_err(|error| io_failure("create", &path, &error))?;
        Ok(Self { path })
    }
}

impl Drop for Workplace {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// Node A, a process of its own; stopped when dropped. However this process ends, the pipe to that one closes, and so does that one.
struct Provider {
    child: Child,
    address: Multiaddr,
}

impl Provider {
    fn start(data_dir: &Path) -> Result<Self, Failure> {
        let failed = |what: String| Failure::new(Kind::Other, format!("cannot start node A: {what}"));
        let exe = std::env::current_exe().map_err(|error| failed(error.to_string()))?;
        let mut command = Command::new(exe);
        command
            .arg("--data-dir")
            .arg(data_dir)
            .args(["--quiet", "serve", "--listen", "/ip4/127.0.0.1/tcp/0", "--until-stdin-closes"])
            .env_remove("CONFRERE_MDNS");
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(|error| failed(error.to_string()))?;
        let mut provider = Self { child, address: Multiaddr::empty() };
        let out = provider.child.stdout.take().expect("its output is piped");
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        std::thread::spawn(move || {
            let mut line = String::new();
            let _ = BufReader::new(out).read_line(&mut line);
            let _ = sender.send(line);
        });
        let line = receiver.recv_timeout(START_TIMEOUT).map_err(|_| failed("it says nothing".to_owned()))?;
        provider.address = line.trim().parse().map_err(|_| failed(format!("it says {line:?}")))?;
        Ok(provider)
    }
}

impl Drop for Provider {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
