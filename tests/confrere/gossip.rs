//! N10 and N11 with a real node: floods of forgeries, and records that were said before, by others, or for something else. None is taken.
#![expect(clippy::disallowed_methods, reason = "how long honest news takes beside a flood is told by a clock")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures::StreamExt;
use libp2p::gossipsub::{self, IdentTopic, MessageAuthenticity, MessageId, ValidationMode};
use libp2p::swarm::SwarmEvent;
use libp2p::{Multiaddr, noise, tcp, yamux};
use protocol::record::{NodeRecord, Record, RecordHead, Verified};
use protocol::{ContentHash, Domain, NodeKey, SignedEnvelope};
use serde_json::Value;
use tokio::sync::mpsc;

use crate::binary::{Node, Serving, api_json, free_port};

const TOPICS: [&str; 3] = ["/confrere/gossip/profile/1", "/confrere/gossip/attestation/1", "/confrere/gossip/node/1"];
const NODE_TOPIC: usize = 2;
/// Peers that flood, and what each sends a second.
const FLOODERS: usize = 20;
const EACH_A_SECOND: u64 = 500;

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_millis() as u64
}

/// A gossiper that hands on whatever it is given: topic and bytes. Ends with its runtime.
async fn gossiper(address: String) -> mpsc::Sender<(usize, Vec<u8>)> {
    let mut swarm = libp2p::SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(tcp::Config::default().nodelay(true), noise::Config::new, yamux::Config::default)
        .expect("TCP")
        .with_behaviour(|_| {
            let config = gossipsub::ConfigBuilder::default()
                .validation_mode(ValidationMode::Anonymous)
                .message_id_fn(|message| MessageId::new(ContentHash::of(&message.data).as_bytes()))
                .build()
                .expect("a configuration");
            let mut gossip: gossipsub::Behaviour = gossipsub::Behaviour::new(MessageAuthenticity::Anonymous, config).expect("a behaviour");
            TOPICS.iter().for_each(|topic| drop(gossip.subscribe(&IdentTopic::new(*topic))));
            gossip
        })
        .expect("a behaviour")
        .with_swarm_config(|config| config.with_idle_connection_timeout(Duration::from_secs(600)))
        .build();
    swarm.dial(address.parse::<Multiaddr>().expect("an address")).expect("it can be dialled");
    // Until the node has said what it listens to.
    let mut subscribed = 0;
    while subscribed < TOPICS.len() {
        match swarm.select_next_some().await {
            SwarmEvent::Behaviour(gossipsub::Event::Subscribed { .. }) => subscribed += 1,
            SwarmEvent::OutgoingConnectionError { error, .. } => panic!("{error}"),
            _ => {}
        }
    }
    let (say, mut queue) = mpsc::channel::<(usize, Vec<u8>)>(1024);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = swarm.select_next_some() => {}
                Some((topic, bytes)) = queue.recv() => drop(swarm.behaviour_mut().publish(IdentTopic::new(TOPICS[topic]), bytes)),
            }
        }
    });
    say
}

fn node_record(key: &NodeKey, seq: u64) -> Vec<u8> {
    let head = RecordHead { seq, ..RecordHead::new(key.id(), now_ms(), NodeRecord::LIFE_MS_MAX, None) };
    let record = NodeRecord { head, memory_bytes: 1, disk_bytes: 1, experts_per_second: 0, addresses: Vec::new(), models: Vec::new() };
    Verified::seal(key, record).as_bytes().to_vec()
}

fn count(api: &str, what: &str) -> u64 {
    api_json(api, "/api/records")["gossip"][what].as_u64().expect("a count")
}

fn knows(api: &str, key: &NodeKey) -> bool {
    let id = Value::from(key.id().to_string());
    api_json(api, "/api/records")["nodes"].as_array().expect("a list").contains(&id)
}

fn serve(node: &Node) -> (Serving, String) {
    let api = format!("127.0.0.1:{}", free_port());
    (node.serve_with(&["--listen", "/ip4/127.0.0.1/tcp/0", "--api", &api]), api)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
}

/// Processor time that a process has used, in seconds.
fn processor_seconds(process: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).expect("it runs");
    let fields: Vec<_> = stat.rsplit(") ").next().expect("fields").split(' ').collect();
    (fields[11].parse::<f64>().expect("a number") + fields[12].parse::<f64>().expect("a number")) / 100.0
}

/// N11: replayed, re-signed, of another domain, with a flipped bit. 10,000, of which none is taken, and none after a restart.
#[test]
fn no_record_is_taken_that_is_old_or_another_s_or_changed() {
    let node = Node::new();
    let (serving, api) = serve(&node);
    let runtime = runtime();
    let key = NodeKey::from_secret(&[9; 32]);
    let (old, new) = (node_record(&key, 5), node_record(&key, 6));
    let say = runtime.block_on(gossiper(serving.address.clone()));
    let wait = |is_so: &dyn Fn() -> bool| (0..400).any(|_| is_so() || (std::thread::sleep(Duration::from_millis(50)), false).1);
    runtime.block_on(say.send((NODE_TOPIC, new.clone()))).expect("said");
    assert!(wait(&|| knows(&api, &key)), "the honest record is taken");
    let others = |i: u32| {
        let thief = NodeKey::from_secret(ContentHash::of(&i.to_le_bytes()).as_bytes());
        let payload_at = old.len() - SignedEnvelope::open(Domain::Node, old.clone()).expect("an envelope").payload().len();
        match i % 5 {
            0 => old.clone(),
            1 => SignedEnvelope::seal(&thief, Domain::Node, &old[payload_at..]).as_bytes().to_vec(),
            2 => SignedEnvelope::seal(&key, Domain::Attestation, &old[payload_at..]).as_bytes().to_vec(),
            3 => {
                let mut flipped = new.clone();
                let bit = i as usize % (flipped.len() * 8);
                flipped[bit / 8] ^= 1 << (bit % 8);
                flipped
            }
            _ => new.clone(),
        }
    };
    let attack = |serving: &Serving, api: &str| {
        // Each peer is cut off after a few forgeries: there are always others.
        for part in 0..50u32 {
            let say = runtime.block_on(gossiper(serving.address.clone()));
            for i in 0..100 {
                runtime.block_on(say.send(((part + i) as usize % 3, others(part * 100 + i)))).expect("said");
            }
        }
        std::thread::sleep(Duration::from_millis(500));
        let held = api_json(api, "/api/records");
        let others = held["nodes"].as_array().expect("a list").len();
        (count(api, "taken"), others, held["attestations"].clone(), held["heads"].clone())
    };
    let before = count(&api, "taken");
    let after = attack(&serving, &api);
    assert_eq!(after, (before, 2, Value::from(0), Value::from(Vec::<Value>::new())), "of 5,000");
    let refused = (count(&api, "refused"), count(&api, "ignored"), count(&api, "over_rate"));
    assert_eq!(serving.stop(), Some(0));
    let (serving, api) = serve(&node);
    assert!(knows(&api, &key), "what was known is known after a restart");
    let before = count(&api, "taken");
    let after = attack(&serving, &api);
    assert_eq!(after, (before, 2, Value::from(0), Value::from(Vec::<Value>::new())), "of 5,000 after a restart");
    println!(
        "refused, ignored, over the rate before the restart: {refused:?}; after it: {:?}",
        (count(&api, "refused"), count(&api, "ignored"), count(&api, "over_rate"))
    );
}

/// N10: twenty peers send 500 forgeries a second each. They are cut off, and honest news still comes.
#[test]
fn a_flood_of_forgeries_costs_little_and_does_not_drown_honest_news() {
    let node = Node::new();
    let (serving, api) = serve(&node);
    let runtime = runtime();
    let honest = runtime.block_on(gossiper(serving.address.clone()));
    let key = NodeKey::from_secret(&[9; 32]);
    let template = node_record(&key, 1);
    let mut flooders = Vec::new();
    for number in 0..FLOODERS {
        let say = runtime.block_on(gossiper(serving.address.clone()));
        let template = template.clone();
        flooders.push(runtime.spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_millis(20));
            let mut sent = 0u64;
            loop {
                tick.tick().await;
                for _ in 0..EACH_A_SECOND / 50 {
                    let mut forged = template.clone();
                    let last = forged.len() - 16;
                    forged[last..last + 8].copy_from_slice(&(number as u64 * 1_000_000 + sent).to_le_bytes());
                    sent += 1;
                    if say.send((NODE_TOPIC, forged)).await.is_err() {
                        return;
                    }
                }
            }
        }));
    }
    std::thread::sleep(Duration::from_secs(5));
    let (used, since) = (processor_seconds(serving.pid()), Instant::now());
    let mut slowest = Duration::ZERO;
    for i in 0..10u8 {
        let key = NodeKey::from_secret(&[100 + i; 32]);
        let said = Instant::now();
        runtime.block_on(honest.send((NODE_TOPIC, node_record(&key, 1)))).expect("said");
        while !knows(&api, &key) {
            assert!(said.elapsed() < Duration::from_secs(20), "honest news {i} does not come");
            std::thread::sleep(Duration::from_millis(20));
        }
        slowest = slowest.max(said.elapsed());
        std::thread::sleep(Duration::from_millis(400));
    }
    let share = (processor_seconds(serving.pid()) - used) / since.elapsed().as_secs_f64();
    flooders.iter().for_each(tokio::task::JoinHandle::abort);
    let (refused, over_rate) = (count(&api, "refused"), count(&api, "over_rate"));
    println!(
        "{:.0}% of a core after 5 s; honest news took {slowest:?} at most; {refused} forgeries were looked at, {over_rate} were over the rate",
        share * 100.0
    );
    assert!(share < 1.0, "{share}");
    assert!(refused < 20_000, "{refused} signatures were checked");
}

/// News that a node did not say, signed with its key: whoever runs it is told that the key is in use elsewhere.
#[test]
fn a_key_that_runs_twice_is_told() {
    let node = Node::new();
    let key = NodeKey::from_secret(&[9; 32]);
    fs::write(node.path().join("key"), "09".repeat(32)).expect("written");
    fs::set_permissions(node.path().join("key"), fs::Permissions::from_mode(0o600)).expect("only its owner reads it");
    let (serving, api) = serve(&node);
    let is_told = || api_json(&api, "/api/node")["key_is_elsewhere"] == true;
    let began = Instant::now();
    while !knows(&api, &key) {
        assert!(began.elapsed() < Duration::from_secs(30), "it speaks of itself");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(!is_told());
    let runtime = runtime();
    let say = runtime.block_on(gossiper(serving.address.clone()));
    runtime.block_on(say.send((NODE_TOPIC, node_record(&key, 1)))).expect("said");
    std::thread::sleep(Duration::from_millis(500));
    assert!(!is_told(), "what is older may be its own");
    runtime.block_on(say.send((NODE_TOPIC, node_record(&key, now_ms() + 1000)))).expect("said");
    while !is_told() {
        assert!(began.elapsed() < Duration::from_secs(60), "it is told");
        std::thread::sleep(Duration::from_millis(50));
    }
    let told = node.run(&["doctor"]);
    assert!(told.out.contains("another node runs with the same key"), "{}", told.out);
}
