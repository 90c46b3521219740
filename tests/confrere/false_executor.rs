//! A peer that runs experts and does something wrong about it. It serves nothing else.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::{AsyncReadExt, AsyncWriteExt, StreamExt};
use inference::aligned::AlignedBytes;
use inference::expert::Expert;
use inference::expert_runner::ExpertRunner;
use inference::kernels::Kernels;
use libp2p::swarm::SwarmEvent;
use libp2p::{Stream, StreamProtocol, noise, tcp, yamux};
use protocol::execute::{
    ANSWER_HEAD_BYTES, EXECUTE_PROTOCOL, ExecuteAnswer, ExecuteRequest, REQUEST_HEAD_BYTES, Receipt, ReceiptResult, RequestHead, row_bytes,
};
use protocol::expert_blob::ExpertShape;
use protocol::message::STREAM_ACK;
use protocol::{ContentHash, NodeKey};

/// What it does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Falsehood {
    /// One bit of a result is wrong, and signed.
    FlippedBit,
    /// One bit of a result is wrong in what is signed only.
    OtherReceipt,
    /// The receipt is signed by somebody else.
    StolenReceipt,
    /// Results that are no numbers.
    NotFinite,
    /// Results of another length.
    WrongLength,
    /// A receipt without results.
    NoResults,
    /// The same results twice.
    Twice,
    /// Right results, and the first of them again and again once all is done.
    WithoutEnd,
    /// Nothing of the protocol.
    Garbage,
    /// Takes the request and is silent.
    Silence,
    /// Hangs up.
    HangUp,
}

/// A running false executor; it ends with the test.
pub(crate) struct FalseExecutor {
    pub(crate) address: String,
    pub(crate) peer: String,
    /// Experts that it was asked to run.
    pub(crate) requested: Arc<AtomicU64>,
    _runtime: tokio::runtime::Runtime,
}

#[derive(Clone)]
struct State {
    dir: PathBuf,
    key: Arc<NodeKey>,
    falsehood: Falsehood,
    requested: Arc<AtomicU64>,
}

impl FalseExecutor {
    /// Starts one that has the experts in the data directory `dir`.
    pub(crate) fn start(dir: &Path, falsehood: Falsehood) -> Self {
        Self::numbered(dir, falsehood, 0)
    }

    /// One of several that do the same.
    pub(crate) fn numbered(dir: &Path, falsehood: Falsehood, number: usize) -> Self {
        let secret = *ContentHash::of(format!("{falsehood:?} {number}").as_bytes()).as_bytes();
        let requested = Arc::<AtomicU64>::default();
        let key = Arc::new(NodeKey::from_secret(&secret));
        let state = State { dir: dir.to_owned(), key, falsehood, requested: Arc::clone(&requested) };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let (address, peer) = runtime.block_on(listen(state, secret));
        Self { address, peer, requested, _runtime: runtime }
    }
}

async fn listen(state: State, secret: [u8; 32]) -> (String, String) {
    let keypair = libp2p::identity::Keypair::ed25519_from_bytes(secret).expect("a secret");
    let mut swarm = libp2p::SwarmBuilder::with_existing_identity(keypair)
        .with_tokio()
        .with_tcp(tcp::Config::default().nodelay(true), noise::Config::new, yamux::Config::default)
        .expect("TCP")
        .with_behaviour(|_| libp2p_stream::Behaviour::new())
        .expect("a behaviour")
        .with_swarm_config(|config| config.with_idle_connection_timeout(std::time::Duration::from_secs(600)))
        .build();
    swarm.listen_on("/ip4/127.0.0.1/tcp/0".parse().expect("an address")).expect("it listens");
    let peer = swarm.local_peer_id().to_string();
    let mut incoming = swarm.behaviour().new_control().accept(StreamProtocol::new(EXECUTE_PROTOCOL)).expect("accepted once");
    let address = loop {
        if let SwarmEvent::NewListenAddr { address, .. } = swarm.select_next_some().await {
            break address;
        }
    };
    tokio::spawn(async move { while swarm.next().await.is_some() {} });
    tokio::spawn(async move {
        while let Some((_, stream)) = incoming.next().await {
            tokio::spawn(serve(state.clone(), stream));
        }
    });
    (format!("{address}/p2p/{peer}"), peer)
}

async fn serve(state: State, mut stream: Stream) -> std::io::Result<()> {
    stream.write_all(&[STREAM_ACK]).await?;
    stream.flush().await?;
    loop {
        let mut head = [0; REQUEST_HEAD_BYTES];
        stream.read_exact(&mut head).await?;
        let head = RequestHead::from_bytes(&head).map_err(std::io::Error::other)?;
        let mut body = vec![0; head.body_bytes()];
        stream.read_exact(&mut body).await?;
        if head.is_hint() {
            continue;
        }
        let request = ExecuteRequest::from_body(&head, &body).map_err(std::io::Error::other)?;
        state.requested.fetch_add(request.tasks.len() as u64, Ordering::Relaxed);
        match state.falsehood {
            Falsehood::Silence => continue,
            Falsehood::HangUp => return Ok(()),
            Falsehood::WithoutEnd => {
                let answers = answers(&state, &request);
                stream.write_all(&answers).await?;
                stream.flush().await?;
                // Once the asker has what it wants, and listens no more.
                tokio::time::sleep(std::time::Duration::from_millis(500)).await;
                let length = request.tasks[0].rows.len() * request.hidden_size as usize * 4;
                let first = &answers[..ANSWER_HEAD_BYTES + length];
                loop {
                    stream.write_all(first).await?;
                }
            }
            _ => stream.write_all(&answers(&state, &request)).await?,
        }
        stream.flush().await?;
    }
}

/// All that is said of a request.
fn answers(state: &State, request: &ExecuteRequest) -> Vec<u8> {
    let number = request.number;
    if state.falsehood == Falsehood::Garbage {
        return vec![0xff; 5000];
    }
    let (mut said, mut receipt) = (Vec::new(), Vec::new());
    for (task_number, task) in request.tasks.iter().enumerate() {
        let mut results = run(state, request, &task.rows, task.expert);
        match state.falsehood {
            Falsehood::FlippedBit => results[5] ^= 1,
            Falsehood::NotFinite => results[..4].copy_from_slice(&f32::NAN.to_le_bytes()),
            Falsehood::WrongLength => results.truncate(results.len() - 4),
            _ => {}
        }
        let mut signed = ContentHash::of(&results);
        if state.falsehood == Falsehood::OtherReceipt {
            signed = ContentHash::of(b"something else");
        }
        receipt.push(ReceiptResult { expert: task.expert, input: ContentHash::of(&request.input(task)), output: signed });
        for _ in 0..match state.falsehood {
            Falsehood::NoResults => 0,
            Falsehood::Twice => 2,
            _ => 1,
        } {
            said.extend(ExecuteAnswer::Results { task: task_number as u16, length: results.len() as u32 }.to_bytes(number));
            said.extend(&results);
        }
    }
    let thief = NodeKey::from_secret(&[77; 32]);
    let key = if state.falsehood == Falsehood::StolenReceipt { &thief } else { &*state.key };
    let receipt = Receipt::seal(key, request.nonce, receipt).as_bytes().to_vec();
    said.extend(ExecuteAnswer::Done { length: receipt.len() as u32 }.to_bytes(number));
    said.extend(receipt);
    said
}

fn run(state: &State, request: &ExecuteRequest, rows: &[u16], expert: ContentHash) -> Vec<u8> {
    let hex = expert.to_hex();
    let bytes = std::fs::read(state.dir.join("store/blobs").join(&hex[..2]).join(hex)).expect("an expert of the model");
    let shape = ExpertShape::of_blob(&bytes).expect("an expert");
    let expert = Expert::from_verified(AlignedBytes::copy_of(&bytes), shape).expect("an expert");
    let all: Vec<&[u8]> = request.rows.chunks_exact(row_bytes(shape.hidden_size)).collect();
    let rows: Vec<&[u8]> = rows.iter().map(|&row| all[usize::from(row)]).collect();
    let mut results = Vec::new();
    ExpertRunner::new(shape, 1, Kernels::best()).run(&expert, &rows, &mut results);
    results
}
