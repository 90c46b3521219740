//! Peers that lie: one speaks the protocols, has the manifest and the trunk, and does something wrong about experts; another
//! says that it has a model and has nothing.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use futures::{AsyncReadExt, AsyncWriteExt, StreamExt};
use libp2p::swarm::{NetworkBehaviour, SwarmEvent};
use libp2p::{Stream, StreamProtocol, identify, kad, noise, tcp, yamux};
use protocol::exchange::wire::{EXCHANGE_PROTOCOL, HEAD_BYTES, MessageHead, MessageKind};
use protocol::exchange::{Bitfield, FromProvider, ToProvider};
use protocol::group_hashes::{GROUP_BYTES, group_length, group_offset};
use protocol::message::{FETCH_PROTOCOL, FetchAnswer, REQUEST_BYTES, Request, STREAM_ACK, Subject};
use protocol::{ContentHash, GroupHashes, ModelId, ModelManifest};

/// What it does when asked for an expert.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Lie {
    /// One bit is wrong.
    FlippedBit,
    /// All of it, but of another length.
    WrongLength,
    /// Says that much more will come.
    HugeLength,
    /// The bytes of another expert.
    AnotherExpert,
    /// Nothing of the protocol.
    Garbage,
    /// Takes the request and is silent.
    Silence,
    /// Hangs up.
    HangUp,
    /// Sends what nobody asked for.
    Unsolicited,
    /// Says that it has all, and has none.
    HasAll,
    /// Hashes of groups that are not those of the blob, whichever it is.
    ForgedHashes,
    /// The manifest itself is changed.
    ForgedManifest,
}

/// A running liar; it ends with the test.
pub(crate) struct Liar {
    pub(crate) address: String,
    pub(crate) peer: String,
    _runtime: tokio::runtime::Runtime,
}

/// What a liar tells the truth about: a node's data directory.
#[derive(Clone)]
struct Truth {
    dir: PathBuf,
    experts: HashSet<ContentHash>,
    blob_count: u32,
    lie: Lie,
}

impl Liar {
    /// Starts a liar that has what is in `dir`, of which the model is `id`.
    pub(crate) fn start(dir: &Path, id: &str, lie: Lie) -> Self {
        let envelope = std::fs::read(dir.join("manifests").join(id)).expect("a manifest");
        let id: ModelId = id.parse().expect("an id");
        let (manifest, _) = ModelManifest::open(id, envelope).expect("a valid manifest");
        let experts = manifest.expert_blobs().map(|blob| blob.hash).collect();
        let blob_count = manifest.blobs().count() as u32;
        let truth = Truth { dir: dir.to_owned(), experts, blob_count, lie };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let (address, peer) = runtime.block_on(listen(truth));
        Self { address, peer, _runtime: runtime }
    }
}

async fn listen(truth: Truth) -> (String, String) {
    let mut swarm = libp2p::SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(tcp::Config::default().nodelay(true), noise::Config::new, yamux::Config::default)
        .expect("TCP")
        .with_behaviour(|_| libp2p_stream::Behaviour::new())
        .expect("a behaviour")
        .with_swarm_config(|config| config.with_idle_connection_timeout(std::time::Duration::from_secs(600)))
        .build();
    swarm.listen_on("/ip4/127.0.0.1/tcp/0".parse().expect("an address")).expect("it listens");
    let peer = swarm.local_peer_id().to_string();
    let accept = |protocol| swarm.behaviour().new_control().accept(StreamProtocol::new(protocol)).expect("accepted once");
    let (mut fetches, mut exchanges) = (accept(FETCH_PROTOCOL), accept(EXCHANGE_PROTOCOL));
    let address = loop {
        if let SwarmEvent::NewListenAddr { address, .. } = swarm.select_next_some().await {
            break address;
        }
    };
    tokio::spawn(async move { while swarm.next().await.is_some() {} });
    tokio::spawn(async move {
        loop {
            tokio::select! {
                Some((_, stream)) = fetches.next() => drop(tokio::spawn(serve(truth.clone(), stream))),
                Some((_, stream)) = exchanges.next() => drop(tokio::spawn(exchange(truth.clone(), stream))),
                else => return,
            }
        }
    });
    (format!("{address}/p2p/{peer}"), peer)
}

/// Serves manifests and listings.
async fn serve(truth: Truth, mut stream: Stream) -> std::io::Result<()> {
    stream.write_all(&[STREAM_ACK]).await?;
    stream.flush().await?;
    let mut request = [0; REQUEST_BYTES];
    loop {
        stream.read_exact(&mut request).await?;
        let request = Request::from_bytes(&request).map_err(std::io::Error::other)?;
        let mut whole = match request.subject {
            Subject::Manifest(id) => std::fs::read(truth.dir.join("manifests").join(id.to_string()))?,
            Subject::Listing => protocol::codec::to_bytes(&protocol::message::Listing::default()),
            Subject::Status | Subject::Records => Vec::new(),
        };
        if truth.lie == Lie::ForgedManifest && matches!(request.subject, Subject::Manifest(_)) {
            *whole.last_mut().expect("a manifest has bytes") ^= 1;
        }
        let from = (request.offset as usize).min(whole.len());
        let part = &whole[from..(from + request.length as usize).min(whole.len())];
        let head = FetchAnswer::Bytes { total: whole.len() as u64, length: part.len() as u32 };
        stream.write_all(&head.to_bytes()).await?;
        stream.write_all(part).await?;
        stream.flush().await?;
    }
}

/// Serves blobs, group by group.
async fn exchange(truth: Truth, mut stream: Stream) -> std::io::Result<()> {
    stream.write_all(&FromProvider::<Vec<u8>>::Hello { requests_max: 100 }.to_bytes()).await?;
    stream.flush().await?;
    loop {
        let mut head = [0; HEAD_BYTES];
        stream.read_exact(&mut head).await?;
        let head = MessageHead::of_request(&head).map_err(std::io::Error::other)?;
        let mut body = vec![0; head.length as usize];
        stream.read_exact(&mut body).await?;
        let Some(answer) = answer(&truth, ToProvider::from_body(head, &body).map_err(std::io::Error::other)?)? else { return Ok(()) };
        stream.write_all(&answer).await?;
        stream.flush().await?;
    }
}

/// The bytes that answer one request; nothing when it is time to hang up.
fn answer(truth: &Truth, request: ToProvider) -> std::io::Result<Option<Vec<u8>>> {
    let honest = match request {
        ToProvider::Cancel { .. } => return Ok(Some(Vec::new())),
        ToProvider::Follow { id, .. } => {
            let mut bits = Bitfield::new(truth.blob_count);
            (0..truth.blob_count).for_each(|index| bits.set(index, true));
            FromProvider::Have { id, bits }
        }
        ToProvider::Hashes { id, blob } => {
            let mut hashes = GroupHashes::of(&read(truth, blob)?).hashes().to_vec();
            if truth.lie == Lie::ForgedHashes {
                hashes[0][0] ^= 1;
            }
            FromProvider::Hashes { id, hashes }
        }
        ToProvider::Group { id, blob, group, .. } if truth.experts.contains(&blob) => {
            return lie(truth, id, blob, group);
        }
        ToProvider::Group { id, blob, group, .. } => FromProvider::Group { id, bytes: part(&read(truth, blob)?, group) },
    };
    Ok(Some(honest.to_bytes()))
}

/// What is said about an expert.
fn lie(truth: &Truth, id: u32, blob: ContentHash, group: u32) -> std::io::Result<Option<Vec<u8>>> {
    let whole = read(truth, blob)?;
    let mut bytes = part(&whole, group);
    match truth.lie {
        Lie::FlippedBit => bytes[100] ^= 4,
        Lie::WrongLength => bytes.push(0),
        Lie::HugeLength => return Ok(Some(MessageHead { kind: MessageKind::Group, id, length: u32::MAX }.to_bytes().to_vec())),
        Lie::AnotherExpert => {
            let other = truth.experts.iter().find(|&&other| other != blob).expect("there are several");
            bytes = part(&read(truth, *other)?, group);
        }
        Lie::Garbage => return Ok(Some(vec![0xff; 5000])),
        Lie::Unsolicited => return Ok(Some(FromProvider::Group { id: id + 1000, bytes }.to_bytes())),
        Lie::HasAll => return Ok(Some(FromProvider::<Vec<u8>>::NotHave { id }.to_bytes())),
        Lie::Silence => return Ok(Some(Vec::new())),
        Lie::HangUp => return Ok(None),
        Lie::ForgedHashes | Lie::ForgedManifest => {}
    }
    Ok(Some(FromProvider::Group { id, bytes }.to_bytes()))
}

fn part(whole: &[u8], group: u32) -> Vec<u8> {
    assert!(u64::from(group) * GROUP_BYTES <= whole.len() as u64, "asked for group {group} of {} bytes", whole.len());
    whole[group_offset(group) as usize..][..group_length(whole.len() as u64, group) as usize].to_vec()
}

fn read(truth: &Truth, hash: ContentHash) -> std::io::Result<Vec<u8>> {
    let hex = hash.to_hex();
    std::fs::read(truth.dir.join("store/blobs").join(&hex[..2]).join(hex))
}

/// A node that tells others of a model which it does not have, at an address where nobody speaks; it ends with the test.
pub(crate) struct Pretender {
    _runtime: tokio::runtime::Runtime,
}

#[derive(NetworkBehaviour)]
struct Pretence {
    kad: kad::Behaviour<kad::store::MemoryStore>,
    identify: identify::Behaviour,
}

impl Pretender {
    /// Tells the node at `host` of model `id`, and returns once that is done.
    pub(crate) fn tell(host: &str, id: &str, silent: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let id: ModelId = id.parse().expect("an id");
        runtime.block_on(pretend(host.parse().expect("an address"), id, silent.parse().expect("an address")));
        Self { _runtime: runtime }
    }
}

async fn pretend(host: libp2p::Multiaddr, id: ModelId, silent: libp2p::Multiaddr) {
    let mut swarm = libp2p::SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(tcp::Config::default().nodelay(true), noise::Config::new, yamux::Config::default)
        .expect("TCP")
        .with_behaviour(|key| {
            let local = key.public().to_peer_id();
            let config = kad::Config::new(StreamProtocol::new("/confrere/kad/1"));
            let mut kad = kad::Behaviour::with_config(local, kad::store::MemoryStore::new(local), config);
            kad.set_mode(Some(kad::Mode::Client)); // it tells; it is not asked
            Pretence { kad, identify: identify::Behaviour::new(identify::Config::new("/confrere/1".to_owned(), key.public())) }
        })
        .expect("a behaviour")
        .with_swarm_config(|config| config.with_idle_connection_timeout(std::time::Duration::from_secs(600)))
        .build();
    swarm.add_external_address(silent);
    swarm.dial(host.clone()).expect("it can be dialled");
    loop {
        match swarm.select_next_some().await {
            SwarmEvent::Behaviour(PretenceEvent::Identify(identify::Event::Received { peer_id, .. })) => {
                swarm.behaviour_mut().kad.add_address(&peer_id, host.clone());
                swarm.behaviour_mut().kad.start_providing(kad::RecordKey::new(id.0.as_bytes())).expect("there is room");
            }
            SwarmEvent::Behaviour(PretenceEvent::Kad(kad::Event::OutboundQueryProgressed {
                result: kad::QueryResult::StartProviding(_),
                ..
            })) => break,
            _ => {}
        }
    }
    tokio::spawn(async move { while swarm.next().await.is_some() {} });
}
