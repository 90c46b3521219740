//! `confrere peers`: whom this node knows, what they can do, how far and how fast they are, and what they hold.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use base::clock::now_ms;
use base::failure::{Failure, Kind};
use base::output::{human_bytes, print_json, print_line};
use clap::{Args, Subcommand};
use net::address::{node_id, parse_address, peer_of};
use net::group::GroupKey;
use net::network::Peers;
use net::records::parse_peer;
use net::status::{self, Account};
use net::{Multiaddr, PeerId};
use protocol::trust::Ruling;
use runtime::command::Context;
use runtime::daemon::Daemon;
use runtime::dispatcher::RemoteOptions;
use runtime::federation::{Federation, PeerOptions, Publishers};
use runtime::opinions::ruling_word;
use serde_json::{Value, json};

/// Peers that are not reached within this time are listed as remembered.
const PATIENCE: Duration = Duration::from_secs(3);
/// Where the address of a peer comes from that the user has joined.
const JOINED: &str = "joined";

#[derive(Subcommand)]
enum RulingCommand {
    /// Have nothing to do with a peer: it is not dialled, not let in, and what it signs counts for nothing
    Ban {
        /// A peer's key (ed25519:…) or id (12D3Koo…)
        peer: String,
    },
    /// Use a peer whatever its scores, or take a ban back
    Allow {
        /// A peer's key (ed25519:…) or id (12D3Koo…)
        peer: String,
    },
}

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct PeersArgs {
    #[command(subcommand)]
    ruling: Option<RulingCommand>,
    /// Ask this one, too; may be given again
    #[arg(long = "peer", value_name = "ADDR", value_parser = parse_address, env = "CONFRERE_PEER", value_delimiter = ',')]
    peers: Vec<Multiaddr>,
    /// Look for peers on the local network
    #[arg(long, env = "CONFRERE_MDNS", value_parser = clap::builder::FalseyValueParser::new())]
    mdns: bool,
    /// Those of a closed group, by the file with its key
    #[arg(long, value_name = "KEYFILE", env = "CONFRERE_PRIVATE")]
    private: Option<PathBuf>,
}

/// A peer, as far as it is known.
#[derive(Default)]
struct Known {
    address: Option<String>,
    source: Option<String>,
    seen_ms: Option<u64>,
    served: u32,
    silences: u32,
    bytes_per_second: Option<u64>,
    account: Option<Account>,
    ruling: Option<Ruling>,
}

pub(super) fn peers(context: &Context, args: &PeersArgs) -> Result<(), Failure> {
    if let Some(command) = &args.ruling {
        return rule(context, command);
    }
    let group = args.private.as_deref().map(GroupKey::read).transpose()?;
    let mut known: BTreeMap<PeerId, Known> = BTreeMap::new();
    for entry in context.dir.book(group.map(|group| group.fingerprint()).as_deref())?.entries() {
        let (address, source) = (Some(entry.address.to_string()), Some(entry.source.to_string()));
        let (seen_ms, bytes_per_second) = (Some(entry.seen_ms), entry.bytes_per_second);
        let (served, silences) = (entry.served, entry.silences);
        known.insert(entry.peer, Known { address, source, seen_ms, served, silences, bytes_per_second, account: None, ruling: None });
    }
    let mut nameless = Vec::new(); // joined at an address that does not say who is there
    for address in context.dir.peers()? {
        match peer_of(&address) {
            Some(peer) => {
                let entry = known.entry(peer).or_default();
                // A ticket's first address is the one to try first.
                if entry.source.as_deref() != Some(JOINED) {
                    (entry.address, entry.source) = (Some(address.to_string()), Some(JOINED.to_owned()));
                }
            }
            None => nameless.push(address.to_string()),
        }
    }
    let options = PeerOptions {
        peers: args.peers.clone(),
        mdns: args.mdns,
        private: args.private.clone(),
        timeout: PATIENCE,
        publishers: Publishers::Trusted,
        remote: RemoteOptions::default(),
    };
    // A node that serves is connected already, and under the same key.
    let daemon = Daemon::of(&context.dir)?.filter(|_| context.lock().is_err());
    let (reached, accounts) = match &daemon {
        Some(daemon) => {
            context.only_given(&[])?;
            let answer = context.ask(daemon, "/api/peers")?;
            (Peers::default(), answer.as_array().into_iter().flatten().filter_map(status::account_of).collect())
        }
        None => Federation::connect(context.runtime.handle(), &context.dir, &options, context.offline)?.ask_all(PATIENCE)?,
    };
    for account in accounts {
        let entry = known.entry(account.peer).or_default();
        let met = reached.met.get(&account.peer);
        if let (None, Some(met)) = (&entry.address, met) {
            (entry.address, entry.source) = (Some(met.address.to_string()), Some(met.source.to_string()));
        }
        nameless.retain(|address| met.is_none_or(|met| !met.address.to_string().starts_with(address.as_str())));
        entry.account = Some(account);
    }
    let trust = context.dir.record_files().trust()?;
    for (peer, known) in &mut known {
        known.ruling = node_id(*peer).and_then(|node| trust.rulings().get(&node).copied());
    }
    if context.json {
        let nameless = nameless.iter().map(|address| json!({"address": address, "source": JOINED, "connected": false}));
        return print_json(&known.iter().map(|(peer, known)| known.json(peer)).chain(nameless).collect::<Vec<_>>());
    }
    let now_ms = now_ms();
    known.iter().try_for_each(|(peer, known)| known.lines(peer, now_ms).iter().try_for_each(|line| print_line(line)))?;
    nameless.iter().try_for_each(|address| print_line(&format!("{address}  {JOINED}, does not answer")))
}

/// Notes what the user has decided; a daemon on the same data directory heeds it within seconds.
fn rule(context: &Context, command: &RulingCommand) -> Result<(), Failure> {
    let (peer, ruling) = match command {
        RulingCommand::Ban { peer } => (parse_peer(peer)?, Ruling::Banned),
        RulingCommand::Allow { peer } => (parse_peer(peer)?, Ruling::Allowed),
    };
    if peer == context.dir.key()?.id() {
        return Err(Failure::new(Kind::Usage, "that is this node itself"));
    }
    let _editing = context.dir.files.exclusive()?;
    let mut trust = context.dir.record_files().trust()?;
    trust.rule(peer, Some(ruling));
    context.dir.record_files().set_rulings(&trust)?;
    let word = ruling_word(ruling);
    if context.json { print_json(&json!({"peer": peer.to_string(), "ruling": word})) } else { print_line(&format!("{word} {peer}")) }
}

impl Known {
    fn json(&self, peer: &PeerId) -> Value {
        let mut json = json!({
            "peer": peer.to_string(),
            "address": self.address,
            "source": self.source,
            "last_seen_ms": self.seen_ms,
            "served": self.served,
            "silences": self.silences,
            "bytes_per_second": self.bytes_per_second,
            "connected": self.account.is_some(),
            "ruling": self.ruling.map(ruling_word),
        });
        if let Some(account) = &self.account {
            json["status"] = status::json(account);
        }
        json
    }

    fn lines(&self, peer: &PeerId, now_ms: u64) -> Vec<String> {
        let mut facts = vec![self.source.clone().unwrap_or_else(|| "met".to_owned())];
        let account = self.account.as_ref();
        match self.ruling {
            Some(Ruling::Banned) => facts.push("banned".to_owned()),
            Some(Ruling::Allowed) => facts.push("allowed".to_owned()),
            None => {}
        }
        if account.is_none() && self.ruling != Some(Ruling::Banned) {
            let seen = self.seen_ms.map(|seen_ms| format!(", last seen {} ago", ago(now_ms.saturating_sub(seen_ms))));
            facts.push(format!("does not answer{}", seen.unwrap_or_default()));
        }
        let said = account.and_then(|account| account.said.as_ref());
        facts.extend(said.map(|(_, round_trip)| format!("answers in {:.1} ms", round_trip.as_secs_f64() * 1e3)));
        facts.extend(self.bytes_per_second.map(|speed| format!("sent {}/s", human_bytes(speed))));
        facts.extend((self.served > 0).then(|| format!("of use in {} runs", self.served)));
        let mut lines = vec![format!("{}  {}", self.address.clone().unwrap_or_else(|| peer.to_string()), facts.join(", "))];
        match (account, said) {
            (Some(_), None) => lines.push("    says nothing of itself: an older version, or no server".to_owned()),
            (_, Some((status, _))) => {
                let runs = if status.executes {
                    format!("runs experts ({} threads, {})", status.threads, human_bytes(status.memory_bytes))
                } else {
                    "runs no experts for this node".to_owned()
                };
                let (stored, room) = (human_bytes(status.stored_bytes), human_bytes(status.room_bytes));
                lines.push(format!("    version {}, {runs}, {stored} stored, room for {room}", status.version));
                let holding = |held: &protocol::status::Holding| {
                    format!("    {}  {}/{} experts  {}", &held.model.to_string()[..12], held.experts, held.of, held.name)
                };
                lines.extend(status.holdings.iter().map(holding));
            }
            (None, None) => {}
        }
        lines
    }
}

fn ago(ms: u64) -> String {
    let minutes = ms / 60_000;
    match minutes {
        0..120 => format!("{minutes} min"),
        120..2880 => format!("{} h", minutes / 60),
        _ => format!("{} days", minutes / 1440),
    }
}
