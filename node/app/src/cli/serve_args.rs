//! What `confrere serve` is told.

use std::net::{SocketAddr, ToSocketAddrs as _};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use net::Multiaddr;
use net::address::parse_address;
use net::allowed::Allowed;
use runtime::command::{EngineArgs, MediaLimitArgs, RemoteArgs, parse_seconds, parse_size};

use super::parse_time;

#[derive(Args)]
pub(super) struct ServeArgs {
    /// Where to listen: HOST:PORT for TCP and QUIC, or a multiaddr; may be given again [default: 0.0.0.0:4747]
    #[arg(long, value_name = "ADDR", env = "CONFRERE_LISTEN", value_delimiter = ',')]
    pub(super) listen: Vec<String>,
    /// Where to serve the HTTP API and the dashboard; off for nowhere [default: 127.0.0.1:4748, or another port if that is taken]
    #[arg(long, value_name = "HOST:PORT", value_parser = parse_api, env = "CONFRERE_API")]
    pub(super) api: Option<ApiAddress>,
    /// Tokens of the API, one a line. Beyond this machine one is needed [default: one in the data directory, made at the first start]
    #[arg(long, value_name = "FILE", env = "CONFRERE_API_TOKENS")]
    pub(super) api_tokens: Option<PathBuf>,
    /// A name under which the API is called, besides addresses and localhost; may be given again
    #[arg(long, value_name = "NAME", env = "CONFRERE_API_NAME", value_delimiter = ',')]
    pub(super) api_name: Vec<String>,
    /// Load this model at the start, not when it is first asked for
    #[arg(long, value_name = "MODEL", env = "CONFRERE_MODEL")]
    pub(super) model: Option<String>,
    /// Tokens of all requests under way, prompts and answers together [default: 8192, or the context if that is more]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..), env = "CONFRERE_KV_TOKENS")]
    pub(super) kv_tokens: Option<u32>,
    /// A peer to stay connected to; may be given again
    #[arg(long = "peer", value_name = "ADDR", value_parser = parse_address, env = "CONFRERE_PEER", value_delimiter = ',')]
    pub(super) peers: Vec<Multiaddr>,
    /// Run experts for a peer: its key, its id, or any; may be given again
    #[arg(long, value_name = "PEER", env = "CONFRERE_EXECUTE_FOR", value_delimiter = ',')]
    pub(super) execute_for: Vec<Allowed>,
    /// Send no more than this a second [default: as much as the line takes]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, env = "CONFRERE_UPLOAD")]
    pub(super) upload: Option<u64>,
    /// Stop when standard input closes: for a program that starts a node and must not leave it behind
    #[arg(long, hide = true)]
    pub(super) until_stdin_closes: bool,
    /// Serve a closed group: only nodes that have the key in this file
    #[arg(long, value_name = "KEYFILE", env = "CONFRERE_PRIVATE")]
    pub(super) private: Option<PathBuf>,
    /// Let nodes that cannot be reached from outside be called through this one, which must be reachable itself
    #[arg(long, env = "CONFRERE_RELAY", value_parser = clap::builder::FalseyValueParser::new())]
    pub(super) relay: bool,
    /// Let nodes on the local network find this one
    #[arg(long, env = "CONFRERE_MDNS", value_parser = clap::builder::FalseyValueParser::new())]
    pub(super) mdns: bool,
    /// Give up on peers after so many seconds without progress
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0, value_parser = parse_seconds, env = "CONFRERE_TIMEOUT")]
    pub(super) timeout: f64,
    /// Let models go that have had nothing to do for so long, e.g. 10m [default: they stay until memory is wanted for others]
    #[arg(long, value_name = "TIME", value_parser = parse_time, env = "CONFRERE_KEEP_ALIVE")]
    pub(super) keep_alive: Option<Duration>,
    #[command(flatten)]
    pub(super) media: MediaLimitArgs,
    #[command(flatten)]
    pub(super) engine: EngineArgs,
    #[command(flatten)]
    pub(super) remote: RemoteArgs,
}

/// Where the API is to be.
#[derive(Clone, Copy, Debug)]
pub(super) enum ApiAddress {
    Nowhere,
    At(SocketAddr),
}

fn parse_api(text: &str) -> Result<ApiAddress, String> {
    if text == "off" { Ok(ApiAddress::Nowhere) } else { parse_socket(text).map(ApiAddress::At) }
}

fn parse_socket(text: &str) -> Result<SocketAddr, String> {
    let mut found = text.to_socket_addrs().map_err(|error| format!("{text:?} is not HOST:PORT: {error}"))?;
    found.next().ok_or_else(|| format!("{text:?} has no address"))
}
