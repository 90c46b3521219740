//! Peers that lie: one speaks the fetch protocol, has the manifest and the trunk, and does something wrong about experts; another
//! says that it has a model and has nothing.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use futures::{AsyncReadExt, AsyncWriteExt, StreamExt};
use libp2p::swarm::{NetworkBehaviour, SwarmEvent};
use libp2p::{Stream, StreamProtocol, identify, kad, noise, tcp, yamux};
use protocol::message::{Answer, FETCH_PROTOCOL, REQUEST_BYTES, Request, STREAM_ACK, Subject};
use protocol::{ContentHash, ModelId, ModelManifest};

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
    lie: Lie,
}

impl Liar {
    /// Starts a liar that has what is in `dir`, of which the model is `id`.
    pub(crate) fn start(dir: &Path, id: &str, lie: Lie) -> Self {
        let envelope = std::fs::read(dir.join("manifests").join(id)).expect("a manifest");
        let id: ModelId = id.parse().expect("an id");
        let (manifest, _) = ModelManifest::open(id, envelope).expect("a valid manifest");
        let experts = manifest.experts.iter().map(|blob| blob.hash).collect();
        let truth = Truth { dir: dir.to_owned(), experts, lie };
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
    let mut incoming = swarm.behaviour().new_control().accept(StreamProtocol::new(FETCH_PROTOCOL)).expect("accepted once");
    let address = loop {
        if let SwarmEvent::NewListenAddr { address, .. } = swarm.select_next_some().await {
            break address;
        }
    };
    tokio::spawn(async move { while swarm.next().await.is_some() {} });
    tokio::spawn(async move {
        while let Some((_, stream)) = incoming.next().await {
            tokio::spawn(serve(truth.clone(), stream));
        }
    });
    (format!("{address}/p2p/{peer}"), peer)
}

async fn serve(truth: Truth, mut stream: Stream) -> std::io::Result<()> {
    stream.write_all(&[STREAM_ACK]).await?;
    stream.flush().await?;
    let mut request = [0; REQUEST_BYTES];
    loop {
        stream.read_exact(&mut request).await?;
        let request = Request::from_bytes(&request).map_err(std::io::Error::other)?;
        if !answer(&truth, request, &mut stream).await? {
            return Ok(());
        }
        stream.flush().await?;
    }
}

/// Answers one request; says whether to go on.
async fn answer(truth: &Truth, request: Request, stream: &mut Stream) -> std::io::Result<bool> {
    let mut whole = match request.subject {
        Subject::Manifest(id) => std::fs::read(truth.dir.join("manifests").join(id.to_string()))?,
        Subject::Blob(hash) => blob(truth, hash)?,
        Subject::Listing => protocol::codec::to_bytes(&protocol::message::Listing::default()),
    };
    let expert = matches!(request.subject, Subject::Blob(hash) if truth.experts.contains(&hash));
    let manifest = matches!(request.subject, Subject::Manifest(_));
    match truth.lie {
        Lie::FlippedBit if expert => whole[100] ^= 4,
        Lie::ForgedManifest if manifest => *whole.last_mut().expect("a manifest has bytes") ^= 1,
        Lie::WrongLength if expert => whole.push(0),
        Lie::HugeLength if expert => {
            let head = Answer::Bytes { total: u64::MAX, length: 1 };
            stream.write_all(&head.to_bytes()).await?;
            stream.write_all(&[0]).await?;
            return Ok(true);
        }
        Lie::AnotherExpert if expert => {
            let other = truth.experts.iter().find(|&&other| request.subject != Subject::Blob(other)).expect("there are several");
            whole = blob(truth, *other)?;
        }
        Lie::Garbage if expert => {
            stream.write_all(&[0xff; 5000]).await?;
            return Ok(true);
        }
        Lie::Silence if expert => return Ok(true),
        Lie::HangUp if expert => return Ok(false),
        _ => {}
    }
    let from = (request.offset as usize).min(whole.len());
    let part = &whole[from..(from + request.length as usize).min(whole.len())];
    let head = Answer::Bytes { total: whole.len() as u64, length: part.len() as u32 };
    stream.write_all(&head.to_bytes()).await?;
    stream.write_all(part).await?;
    Ok(true)
}

fn blob(truth: &Truth, hash: ContentHash) -> std::io::Result<Vec<u8>> {
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
