//! Opening and closing the door through which programs and people ask a node that serves: the engine's thread, the API, its tokens.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use api::server::Server;
use api::{About, Access, Api, Transfers, router};
use base::clock::now_ms;
use base::failure::{Failure, Kind, io_failure};
use base::{secret_file, threads};
use inference::engine::EngineOptions;
use inference::machine::Machine;
use net::network::Network;
use net::{Multiaddr, new_secret};
use protocol::ModelManifest;
use protocol::ticket::Ticket;
use runtime::command::{CONTEXT_DEFAULT, Context};
use runtime::daemon::Daemon;
use runtime::data_dir::DataDir;
use runtime::federation::{Federation, PeerOptions, Publishers};
use runtime::generation::{Generation, GenerationOptions};
use runtime::library::Library;
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::serve_args::ServeArgs;

/// The shortest token that is accepted: shorter ones can be guessed.
const TOKEN_BYTES_MIN: usize = 16;

/// What `serve` has and the API uses.
pub(super) struct Shared<'a> {
    pub(super) context: &'a Context,
    pub(super) args: &'a ServeArgs,
    pub(super) library: &'a Arc<Library>,
    pub(super) network: &'a Network,
    pub(super) group: Option<String>,
    /// Whether experts run for peers.
    pub(super) executes: bool,
}

/// The API of a node, with the engine behind it.
pub(super) struct ServedApi {
    pub(super) server: Server,
    generation: Generation,
    stopping: watch::Sender<bool>,
    dir: DataDir,
    /// Where the token is, if one is needed.
    token: Option<PathBuf>,
}

impl ServedApi {
    pub(super) fn open(
        shared: &Shared<'_>,
        listener: TcpListener,
        machine: Machine,
        (addresses, ticket): (&[Multiaddr], &Ticket),
    ) -> Result<Self, Failure> {
        let Shared { context, args, library, network, group, executes } = shared;
        let open = &library.open;
        let address = listener.local_addr().map_err(|error| Failure::new(Kind::Other, error.to_string()))?;
        let tokens = match &args.api_tokens {
            Some(file) => Some(read_tokens(file)?),
            None if Access::needs_tokens(address) => Some(vec![own_token(&open.dir)?]),
            None => None,
        };
        let first = args.model.as_deref().map(|model| open.local(model)).transpose()?;
        let peers = PeerOptions {
            peers: Vec::new(),
            mdns: false,
            private: args.private.clone(),
            timeout: Duration::from_secs_f64(args.timeout),
            publishers: Publishers::Trusted,
            remote: args.remote.options(),
        };
        let federation = Federation::over(context.runtime.handle(), (*network).clone(), &open.dir, group.clone(), &peers);
        let (rates, progress) = federation.figures();
        let generation = Generation::start(Arc::clone(open), federation, machine, options(context, args, *executes), first);
        let (stopping, until_stopping) = watch::channel(false);
        let api = Api {
            library: Arc::clone(library),
            network: (*network).clone(),
            generation: generation.clone(),
            about: About {
                addresses: addresses.iter().map(ToString::to_string).collect(),
                ticket: ticket.to_string(),
                ram_bytes: context.memory_max,
                disk_bytes: (context.disk_max < u64::MAX).then_some(context.disk_max),
                upload_bytes_per_second: args.upload,
                kv_tokens: kv_tokens(args) as u64,
                threads_max: threads::threads_max(args.engine.threads()),
            },
            peers,
            group: group.clone(),
            rates,
            transfers: Transfers::new(progress),
            media: args.media.limits(),
            intake: api::Intake::default(),
            started_ms: now_ms(),
            stopping: until_stopping,
            holders: api::HoldersCache::default(),
            accounts: api::Refreshed::default(),
        };
        let owner = tokens.as_ref().and_then(|tokens| tokens.first().cloned()).unwrap_or_else(|| protocol::hash::to_hex(&new_secret()));
        let access = Access::new(tokens.as_deref(), &owner, args.api_name.iter().cloned());
        let server = Server::start(listener, router(Arc::new(api), access))?;
        Daemon::at(server.address, owner).announce(&open.dir)?;
        let token = match (&args.api_tokens, &tokens) {
            (_, None) => None,
            (Some(file), _) => Some(file.clone()),
            (None, _) => Some(token_file(&open.dir)),
        };
        Ok(Self { server, generation, stopping, dir: open.dir.clone(), token })
    }

    /// What the user is told.
    pub(super) fn introduction(&self) -> String {
        let address = Daemon::reached_at(self.server.address);
        let more = if address == self.server.address { "" } else { ", and at this machine's other addresses" };
        let token = self.token.as_ref().map(|file| format!("; the token is in {}", file.display())).unwrap_or_default();
        format!("API http://{address}/v1, dashboard http://{address}/{more}{token}")
    }

    /// Answers no more requests; returns when those under way have ended, one way or the other.
    pub(super) async fn close(self) {
        Daemon::forget(&self.dir);
        let _ = self.stopping.send(true);
        self.generation.stop().await;
        self.server.stop().await;
    }
}

fn kv_tokens(args: &ServeArgs) -> usize {
    args.kv_tokens.map_or(CONTEXT_DEFAULT, |tokens| tokens as usize)
}

fn options(context: &Context, args: &ServeArgs, executes: bool) -> GenerationOptions {
    let (engine, kv_tokens) = (args.engine.clone(), kv_tokens(args));
    let by_model = move |manifest: &ModelManifest| {
        let options = engine.options(manifest, None);
        EngineOptions { kv_tokens: kv_tokens.max(options.context), ..options }
    };
    GenerationOptions { engine: Box::new(by_model), memory_max: context.memory_max, keep_alive: args.keep_alive, executes }
}

fn read_tokens(file: &Path) -> Result<Vec<String>, Failure> {
    secret_file::check(file)?;
    let text = fs::read_to_string(file).map_err(|error| io_failure("read", file, &error))?;
    let tokens: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned).collect();
    match tokens.iter().find(|token| token.len() < TOKEN_BYTES_MIN) {
        _ if tokens.is_empty() => Err(Failure::new(Kind::Usage, format!("{} has no token", file.display()))),
        Some(_) => Err(Failure::new(Kind::Usage, format!("{}: a token has {TOKEN_BYTES_MIN} characters or more", file.display()))),
        None => Ok(tokens),
    }
}

fn token_file(dir: &DataDir) -> PathBuf {
    dir.path().join("api-token")
}

/// The token in the data directory, made at first use.
fn own_token(dir: &DataDir) -> Result<String, Failure> {
    let path = token_file(dir);
    if path.exists() {
        return Ok(read_tokens(&path)?.remove(0));
    }
    let token = protocol::hash::to_hex(&new_secret());
    secret_file::write(&path, format!("{token}\n").as_bytes()).map_err(|error| io_failure("write", &path, &error))?;
    Ok(token)
}
