//! `confrere serve`: a node that others fetch from, until it is told to stop.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use api::server::Server;
use base::clock::now_ms;
use base::failure::{Failure, Kind};
use base::output::{announce, human_bytes, note};
use inference::cache_policy::PolicyKind;
use inference::kernels::Kernels;
use inference::machine::Machine;
use net::address::{is_loopback, is_relayed, is_tcp, parse_listen};
use net::allowed::AllowedPeers;
use net::executor::{self, ExecutorOptions};
use net::group::GroupKey;
use net::network::{Network, NetworkOptions, NodeRole, Peers, Relay};
use net::provider::{self, Provider};
use net::query;
use net::records::{KEY_ELSEWHERE, SharedRecords, clock_text};
use net::status::OwnStatus;
use net::{Multiaddr, random};
use protocol::ModelId;
use protocol::profile::ProfileBody;
use protocol::profile::lift::ranking;
use protocol::query::{ATTESTATIONS_MAX, HEADS_MAX, Query, QueryAnswer};
use protocol::record::Facet;
use protocol::ticket::{TICKET_ADDRESSES_MAX, Ticket};
use runtime::announcer::Announcer;
use runtime::command::Context;
use runtime::data_dir::{DataDir, LocalModel, OpenDataDir};
use runtime::federation::remember;
use runtime::library::Library;
use runtime::memory::{network_memory, process_bytes};
use runtime::peer_book::Learned;
use runtime::specialists::own_body;
use serde_bytes::ByteBuf;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing::warn;

use super::serve_api::{ServedApi, Shared};
use super::serve_args::{ApiAddress, ServeArgs};

/// Where a node listens unless told otherwise.
pub(super) const DEFAULT_PORT: u16 = 4747;
/// Where its API is.
pub(super) const DEFAULT_API_PORT: u16 = 4748;
/// How often it is asked whether this clock differs from others', or another runs with this node's key.
const LOOK_PAUSE: Duration = Duration::from_secs(10);
/// How often the address book is written.
const NOTES_PAUSE: Duration = Duration::from_secs(300);
const LISTEN_WAIT: Duration = Duration::from_secs(5);
/// Addresses of further interfaces turn up one by one; after so long a pause all are there.
const LISTEN_PAUSE: Duration = Duration::from_millis(200);

pub(super) fn serve(context: &Context, args: &ServeArgs) -> Result<(), Failure> {
    let open = Arc::new(context.lock()?);
    let key = open.dir.key()?;
    let library = Arc::new(Library::new(Arc::clone(&open)));
    let models = library.models();
    let group = args.private.as_deref().map(GroupKey::read).transpose()?;
    let listen = listen_addresses(&args.listen, group)?;
    let fingerprint = group.map(|group| group.fingerprint());
    let (peers, book) = if context.offline {
        (Vec::new(), Vec::new())
    } else {
        (known_peers(args, &open.dir)?, open.dir.book(fingerprint.as_deref())?.plan(random))
    };
    context.runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).map_err(|error| Failure::new(Kind::Other, error.to_string()))?;
        let records = open.dir.load_records()?;
        let works_for = AllowedPeers::new(&args.execute_for);
        let network = Network::start(NetworkOptions {
            key: &key,
            listen,
            peers,
            book,
            mdns: args.mdns && !context.offline,
            group,
            memory_max: network_memory(),
            role: NodeRole::Host {
                models: models.iter().map(|model| model.id).collect(),
                relay: if args.relay { Relay::Yes } else { Relay::No },
            },
            records: records.clone(),
            friends: works_for.named().chain(AllowedPeers::new(&args.remote.execute_at).named()).collect(),
        })?;
        let threads = args.engine.threads();
        let executes = !works_for.is_empty();
        let memory_bytes = if executes { context.memory_max.saturating_sub(process_bytes()) } else { 0 };
        let own_status = OwnStatus {
            models: library.clone(),
            records: records.clone(),
            works_for: works_for.clone(),
            threads: threads as u16,
            memory_bytes,
        };
        provider::start(Provider::new(own_status), &network, args.upload)?;
        let kernels = args.engine.kernels.unwrap_or_else(Kernels::best);
        let machine = Machine::new(threads, kernels, PolicyKind::Lru);
        machine.experts().lock().set_bytes_max(memory_bytes);
        if executes {
            let (key, memory) = (open.dir.key()?, machine.experts().clone());
            let options = ExecutorOptions { key, works_for, threads, kernels, memory, bytes_max: memory_bytes };
            executor::start(library.clone(), options, &network)?;
        }
        let bodies = Arc::new(own_bodies(&open, &models));
        let (answering, known, dir) = (Arc::clone(&bodies), records.clone(), open.dir.clone());
        query::start(&network, move |query| {
            let is_told = dir.profile(query.model).is_ok_and(|profile| profile.is_some_and(|profile| profile.published));
            answer(query, answering.get(&query.model).filter(|_| is_told), &known)
        })?;
        let announcer = Announcer {
            network: network.clone(),
            dir: open.dir.clone(),
            key: open.dir.key()?,
            library: Arc::clone(&library),
            bodies: Arc::clone(&bodies),
            memory_bytes,
            disk_bytes: context.disk_max,
        };
        tokio::spawn(announcer.run());
        let addresses = wait_for_addresses(&network).await?;
        let (first, ticket) = introduce(&addresses, &network, key.id());
        let api_server = match api_address(args.api)? {
            Some(listener) => {
                let shared = Shared { context, args, library: &library, network: &network, group: fingerprint.clone(), executes };
                Some(ServedApi::open(&shared, listener, machine, (&addresses, &ticket))?)
            }
            None => None,
        };
        let api = api_server.as_ref().map(|served| served.server.address);
        if context.json {
            let all: Vec<_> = addresses.iter().map(ToString::to_string).collect();
            let introduction =
                json!({"address": first, "ticket": ticket.to_string(), "addresses": all, "api": api.map(|api| api.to_string())});
            announce(&format!("{introduction}\n"));
        } else {
            announce(&format!("{first}\n{ticket}\n"));
        }
        note(&format!("serving {} models as {}; on the other device: confrere join TICKET", models.len(), key.id()));
        if let Some(served) = &api_server {
            note(&served.introduction());
        }
        note(&limits(context, args));
        let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Ready]); // nobody may be waiting for it
        let ended = tokio::select! {
            _ = terminate.recv() => Ok(()),
            () = stdin_closed(), if args.until_stdin_closes => Ok(()),
            _ = tokio::signal::ctrl_c() => Err(Failure::interrupted()),
            never = keep_notes(&network, &open.dir, fingerprint.as_deref()) => match never {},
        };
        let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Stopping]);
        if let Some(served) = api_server {
            served.close().await;
        }
        network.leave().await;
        take_note(&network.peers.borrow(), &open.dir, fingerprint.as_deref());
        records.save_trust()?;
        records.save_records()?;
        ended
    })?;
    open.store.flush();
    Ok(())
}

/// Peers to stay connected to: those named now, and those joined before.
fn known_peers(args: &ServeArgs, dir: &DataDir) -> Result<Vec<Multiaddr>, Failure> {
    let mut peers = args.peers.clone();
    for address in dir.peers()? {
        if !peers.contains(&address) {
            peers.push(address);
        }
    }
    Ok(peers)
}

/// The bodies of this node's own profiles.
fn own_bodies(open: &OpenDataDir, models: &[LocalModel]) -> BTreeMap<ModelId, ProfileBody> {
    let read = |model: &LocalModel| match own_body(open, model) {
        Ok(body) => body.map(|body| (model.id, body)),
        Err(failure) => {
            note(&format!("warning: {failure}; confrere profile build {} makes it anew", model.name));
            None
        }
    };
    models.iter().filter_map(read).collect()
}

/// What this node knows of a question: the ranking of its own profile, if that is told to others, and what it holds signed.
fn answer(query: &Query, own: Option<&ProfileBody>, records: &SharedRecords) -> QueryAnswer {
    let ranked = own.and_then(|body| Some((body, body.domain(&query.domain)?))).filter(|_| query.top > 0);
    let experts = ranked.map_or_else(Vec::new, |(body, domain)| {
        ranking(body, domain).iter().take(query.top as usize).map(|one| one.expert as u32).collect()
    });
    let (records, now_ms) = (records.lock(), now_ms());
    let of_model = records.book.heads(now_ms).filter(|head| head.record().model == query.model);
    // By what was seen here alone first: what others say takes longer to look up.
    let mut heads: Vec<_> = of_model.map(|head| (records.first_hand(now_ms, &head.node(), Facet::Profile), head)).collect();
    heads.sort_by(|a, b| b.0.total_cmp(&a.0));
    heads.truncate(4 * HEADS_MAX);
    heads.iter_mut().for_each(|(priority, head)| *priority = records.ordering_own_first(now_ms, &head.node(), Facet::Profile));
    heads.sort_by(|a, b| b.0.total_cmp(&a.0));
    heads.truncate(HEADS_MAX);
    let mut attestations = Vec::new();
    for (_, head) in &heads {
        let node = head.node();
        let about = records.book.attestations_about(now_ms, &node, Facet::Profile);
        attestations.extend(about.map(|one| ByteBuf::from(one.as_bytes())).take(ATTESTATIONS_MAX));
    }
    QueryAnswer {
        domains: own.map_or_else(Vec::new, |body| body.names().into_iter().map(str::to_owned).collect()),
        experts,
        heads: heads.iter().map(|(_, head)| ByteBuf::from(head.as_bytes())).collect(),
        attestations,
    }
}

/// Tells the user of addresses at relays, and remembers now and then whom this node has met.
async fn keep_notes(network: &Network, dir: &DataDir, group: Option<&str>) -> std::convert::Infallible {
    let mut peers = network.peers.clone();
    let mut told = BTreeSet::new();
    let mut pause = tokio::time::interval(NOTES_PAUSE);
    let (mut look, mut told_of_clock, mut told_of_key) = (tokio::time::interval(LOOK_PAUSE), false, false);
    loop {
        tokio::select! {
            _ = look.tick(), if !told_of_clock || !told_of_key => {
                let (offset_ms, key_is_elsewhere) = {
                    let records = network.records.lock();
                    (records.clock_offset_ms().filter(|_| !told_of_clock), records.key_is_elsewhere && !told_of_key)
                };
                offset_ms.iter().for_each(|offset_ms| note(&format!("warning: {}", clock_text(*offset_ms))));
                if key_is_elsewhere {
                    note(&format!("warning: {KEY_ELSEWHERE}"));
                }
                told_of_clock |= offset_ms.is_some();
                told_of_key |= key_is_elsewhere;
            }
            // Who is silent is counted once, at the end.
            _ = pause.tick() => {
                let known = Peers { silent: BTreeSet::new(), ..network.peers.borrow().clone() };
                take_note(&known, dir, group);
            }
            Ok(()) = peers.changed() => {
                for address in peers.borrow_and_update().listening.iter().filter(|address| is_relayed(address)) {
                    if told.insert(address.clone()) {
                        note(&format!("can be called at {address}"));
                    }
                }
            }
        }
    }
}

/// Hosts that were called and that serve are worth calling again.
fn take_note(peers: &Peers, dir: &DataDir, group: Option<&str>) {
    let promising = peers.met.iter().filter(|(_, met)| met.serves).map(|(peer, _)| *peer).collect();
    if let Err(failure) = remember(dir, group, peers, &Learned { promising, ..Learned::default() }) {
        warn!(%failure, "peers are not remembered");
    }
}

/// Waits on a thread of its own: a read from standard input cannot be cancelled, and must not keep the runtime from ending.
async fn stdin_closed() {
    let (closed, wait) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        let _ = closed.send(());
    });
    let _ = wait.await;
}

/// HOST:PORT means TCP alone in a closed group, which has no QUIC.
fn listen_addresses(texts: &[String], group: Option<GroupKey>) -> Result<Vec<Multiaddr>, Failure> {
    let default = [format!("0.0.0.0:{DEFAULT_PORT}")];
    let texts = if texts.is_empty() { &default[..] } else { texts };
    let mut addresses = Vec::new();
    for text in texts {
        let mut parsed = parse_listen(text).map_err(|error| Failure::new(Kind::Usage, format!("--listen: {error}")))?;
        parsed.retain(|address| group.is_none() || text.starts_with('/') || is_tcp(address));
        addresses.append(&mut parsed);
    }
    Ok(addresses)
}

/// A socket for the API. Where the user has named none and the usual one is taken, by another node mostly, any will do.
fn api_address(requested: Option<ApiAddress>) -> Result<Option<TcpListener>, Failure> {
    let usual = SocketAddr::from((Ipv4Addr::LOCALHOST, DEFAULT_API_PORT));
    match requested {
        Some(ApiAddress::Nowhere) => Ok(None),
        Some(ApiAddress::At(address)) => Server::bind(address).map(Some),
        None => match Server::bind(usual) {
            Err(failure) if failure.kind == Kind::Busy => Server::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).map(Some),
            bound => bound.map(Some),
        },
    }
}

/// What this node may take, in a line.
fn limits(context: &Context, args: &ServeArgs) -> String {
    let disk = if context.disk_max == u64::MAX { "no limit".to_owned() } else { human_bytes(context.disk_max) };
    let upload = args.upload.map_or_else(|| "no limit".to_owned(), |upload| format!("{}/s", human_bytes(upload)));
    format!("limits: memory {}, disk {disk}, upload {upload}", human_bytes(context.memory_max))
}

async fn wait_for_addresses(network: &Network) -> Result<Vec<Multiaddr>, Failure> {
    let mut peers = network.peers.clone();
    let found = tokio::time::timeout(LISTEN_WAIT, peers.wait_for(|peers: &Peers| !peers.listening.is_empty())).await;
    if !found.is_ok_and(|found| found.is_ok()) {
        return Err(Failure::new(Kind::Other, "no address to listen on came up"));
    }
    while tokio::time::timeout(LISTEN_PAUSE, peers.changed()).await.is_ok_and(|changed| changed.is_ok()) {}
    let mut addresses = peers.borrow().listening.clone();
    // What others should try first comes first: TCP before QUIC, a real interface before loopback.
    addresses.sort_by_key(|address| (!is_tcp(address), is_loopback(address)));
    Ok(addresses)
}

fn introduce(addresses: &[Multiaddr], network: &Network, node: protocol::NodeId) -> (String, Ticket) {
    let first = addresses.first().map_or_else(String::new, |address| format!("{address}/p2p/{}", network.local));
    let only_loopback = addresses.iter().all(is_loopback);
    let shared = addresses.iter().filter(|address| only_loopback || !is_loopback(address));
    let addresses = shared.take(TICKET_ADDRESSES_MAX).map(ToString::to_string).collect();
    (first, Ticket { node, addresses })
}
