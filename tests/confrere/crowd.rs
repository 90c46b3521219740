//! N1, N8, N9 and N14 at the scale of CI: many hostile peers at once. Memory stays, honest peers are served, nothing is stored.
#![expect(clippy::disallowed_methods, reason = "how long an honest peer takes beside a crowd is told by a clock")]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::{AsyncReadExt, AsyncWriteExt, StreamExt};
use libp2p::swarm::SwarmEvent;
use libp2p::{Multiaddr, PeerId, Stream, StreamProtocol, noise, tcp, yamux};
use protocol::exchange::wire::EXCHANGE_PROTOCOL;
use protocol::exchange::{ToProvider, Urgency};
use protocol::execute::EXECUTE_PROTOCOL;
use protocol::message::FETCH_PROTOCOL;
use protocol::{ContentHash, ModelId, ModelManifest};

use crate::binary::Node;
use crate::support::shipped_model;

/// Of each kind.
const PEERS: usize = 12;
/// How much more memory the node may take.
const BYTES_MORE_MAX: u64 = 96 << 20;
/// Honest peers may take so many times as long, and so much more: the crowd shares their two cores.
const TIMES_MAX: u32 = 2;
const MORE_MAX: Duration = Duration::from_secs(8);

/// Hostile peers that got a connection.
static LET_IN: AtomicUsize = AtomicUsize::new(0);

/// What a hostile peer does.
#[derive(Clone, Copy, Debug)]
enum Attack {
    /// Asks for everything and never reads.
    NeverReads,
    /// Says that a gigabyte follows.
    HugeLength,
    /// Asks for what nobody has, over and over.
    Flood,
    /// Opens as many streams as it can, and is silent.
    ManyStreams,
}

const ATTACKS: [Attack; 4] = [Attack::NeverReads, Attack::HugeLength, Attack::Flood, Attack::ManyStreams];

/// Memory that a process has.
pub(crate) fn resident_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().expect("a number") * 1024
}

/// A connection under a key of its own, and a way to open streams on it; `None` when the node has no room for one more.
pub(crate) async fn connect(address: &str) -> Option<(PeerId, libp2p_stream::Control)> {
    let mut swarm = libp2p::SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
        .expect("TCP")
        .with_behaviour(|_| libp2p_stream::Behaviour::new())
        .expect("a behaviour")
        .with_swarm_config(|config| config.with_idle_connection_timeout(Duration::from_secs(600)))
        .build();
    let control = swarm.behaviour().new_control();
    swarm.dial(address.parse::<Multiaddr>().expect("an address")).expect("it can be dialled");
    let peer = loop {
        match swarm.select_next_some().await {
            SwarmEvent::ConnectionEstablished { peer_id, .. } => break peer_id,
            SwarmEvent::OutgoingConnectionError { .. } => return None,
            _ => {}
        }
    };
    tokio::spawn(async move { while swarm.next().await.is_some() {} });
    Some((peer, control))
}

pub(crate) async fn open(peer: PeerId, control: &mut libp2p_stream::Control, protocol: &'static str) -> Option<Stream> {
    control.open_stream(peer, StreamProtocol::new(protocol)).await.ok()
}

async fn attack(address: String, attack: Attack, blobs: Vec<(ContentHash, u32)>, id: ModelId) -> Option<()> {
    let (peer, mut control) = connect(&address).await?;
    LET_IN.fetch_add(1, Ordering::Relaxed);
    let mut held = Vec::new();
    match attack {
        Attack::NeverReads => {
            let mut stream = open(peer, &mut control, EXCHANGE_PROTOCOL).await?;
            stream.write_all(&ToProvider::Follow { id: 1, model: id }.to_bytes()).await.ok()?;
            let groups = blobs.iter().flat_map(|&(blob, groups)| (0..groups).map(move |group| (blob, group)));
            for (request, (blob, group)) in groups.enumerate() {
                let ask = ToProvider::Group { id: 2 + request as u32, urgency: Urgency::Now, blob, group };
                stream.write_all(&ask.to_bytes()).await.ok()?;
            }
            stream.flush().await.ok()?;
            held.push(stream);
        }
        Attack::HugeLength => {
            for protocol in [EXCHANGE_PROTOCOL, EXECUTE_PROTOCOL, FETCH_PROTOCOL] {
                let mut stream = open(peer, &mut control, protocol).await?;
                let length = (1u32 << 30).to_le_bytes();
                let heads = [[1, 0, 0, 0].as_slice(), &length, &length, &length].concat().repeat(64);
                let _ = stream.write_all(&heads).await;
                let _ = stream.flush().await;
                held.push(stream);
            }
        }
        Attack::Flood => {
            let mut stream = open(peer, &mut control, EXCHANGE_PROTOCOL).await?;
            for id in 2..20_000 {
                let blob = ContentHash::of(&u32::to_le_bytes(id));
                let ask = ToProvider::Group { id, urgency: Urgency::Now, blob, group: 0 };
                stream.write_all(&ask.to_bytes()).await.ok()?;
            }
            stream.flush().await.ok()?;
            let mut sink = vec![0; 1 << 16];
            while stream.read(&mut sink).await.ok()? > 0 {}
        }
        Attack::ManyStreams => {
            for _ in 0..64 {
                held.extend(open(peer, &mut control, EXCHANGE_PROTOCOL).await);
            }
        }
    }
    tokio::time::sleep(Duration::from_secs(600)).await;
    drop(held);
    Some(())
}

#[test]
fn a_hostile_crowd_costs_little_memory_and_shuts_nobody_out() {
    let a = Node::new();
    let id = a.import(&shipped_model());
    let stored = a.experts();
    let serving = a.serve_with(&["--listen", "/ip4/127.0.0.1/tcp/0", "--execute-for", "any"]);
    let pull = || {
        let b = Node::new();
        b.trust(&a);
        let began = Instant::now();
        let ended = b.run(&["pull", &id, "--peer", &serving.address]);
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        began.elapsed()
    };
    let quiet = (0..3).map(|_| pull()).min().expect("three");
    let before = resident_bytes(serving.pid());
    let model: ModelId = id.parse().expect("an id");
    let envelope = std::fs::read(a.path().join("manifests").join(&id)).expect("a manifest");
    let (manifest, _) = ModelManifest::open(model, envelope).expect("a valid manifest");
    let blobs: Vec<_> = manifest.blobs().map(|blob| (blob.hash, blob.length.div_ceil(256 << 10) as u32)).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    for number in 0..PEERS * ATTACKS.len() {
        let attack = attack(serving.address.clone(), ATTACKS[number % ATTACKS.len()], blobs.clone(), model);
        runtime.spawn(attack);
    }
    let mut most = 0;
    let beside: Vec<_> = (0..4)
        .map(|_| {
            let took = pull();
            most = most.max(resident_bytes(serving.pid()));
            took
        })
        .collect();
    let slowest = *beside.iter().max().expect("four");
    let let_in = LET_IN.load(Ordering::Relaxed);
    println!("{quiet:?} alone, {beside:?} beside a crowd of {let_in}; {} KiB more", most.saturating_sub(before) >> 10);
    assert!(let_in >= PEERS, "{let_in} of the crowd were let in");
    assert!(slowest <= quiet * TIMES_MAX + MORE_MAX, "{slowest:?} beside the crowd, {quiet:?} alone");
    assert!(most <= before + BYTES_MORE_MAX, "{before} bytes before, {most} beside the crowd");
    drop(runtime);
    drop(serving);
    assert_eq!(a.experts(), stored, "nothing was stored, nothing was lost");
}
