//! Peers as a command or a daemon sees them: whom it asks, whose manifests count, and fetching.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base::clock::{now_ms, unless_interrupted};
use base::failure::{Failure, Kind};
use base::output::byte_bar;
use net::fetcher::{FetchItem, Fetched, Fetcher, PeerRates};
use net::group::GroupKey;
use net::link::{Sink, Wanted};
use net::network::{Network, NetworkOptions, NodeRole, Peers};
use net::progress::SharedTransfer;
use net::status::{self, Account};
use net::{Multiaddr, PeerId, random};
use protocol::manifest::MANIFEST_BYTES_MAX;
use protocol::message::{Listing, RANGE_BYTES_MAX, Subject};
use protocol::{BlobRef, ModelId, ModelManifest, NodeId, PartKind};
use store::BlobStore;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

use crate::data_dir::{DataDir, LocalModel, OpenDataDir, Resolved};
use crate::dispatcher::{DispatcherPeers, Providers, RemoteOptions, SharedFetcher};
use crate::memory::network_memory;
use crate::peer_book::Learned;

const RESULTS_MAX: usize = 32;

/// How a command finds peers and what it accepts from them.
#[derive(Clone, Debug)]
pub struct PeerOptions {
    pub peers: Vec<Multiaddr>,
    pub mdns: bool,
    /// The key file of a closed group: its nodes are asked, and no others.
    pub private: Option<PathBuf>,
    pub timeout: Duration,
    pub publishers: Publishers,
    pub remote: RemoteOptions,
}

/// Whose manifests count.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Publishers {
    /// Those whom the user trusts.
    Trusted,
    /// Anybody: the user has said so.
    Anybody,
}

/// The peers of one command, or none. Clones are of the same peers, who are remembered when the last of them goes.
#[derive(Clone)]
pub struct Federation {
    runtime: Handle,
    fetcher: Option<SharedFetcher>,
    publishers: Publishers,
    remote: RemoteOptions,
    acquaintance: Option<Arc<Acquaintance>>,
    /// Whoever waits for what is done; nobody, when it may be given up.
    client: Option<watch::Receiver<()>>,
}

/// The peers of a command, who are remembered when it ends.
struct Acquaintance {
    network: Network,
    /// Whether the network is this command's alone, and ends with it.
    is_own: bool,
    dir: DataDir,
    group: Option<String>,
    /// Who has sent something, by what was fetched.
    useful: Mutex<Vec<Providers>>,
    rates: PeerRates,
    progress: SharedTransfer,
}

impl Federation {
    /// Connects to the peers that were named, to those joined and to those met before.
    pub fn connect(runtime: &Handle, dir: &DataDir, options: &PeerOptions, offline: bool) -> Result<Self, Failure> {
        let mut options = options.clone();
        options.peers.extend(dir.peers()?);
        let group = options.private.as_deref().map(GroupKey::read).transpose()?;
        let book = dir.book(group.map(|group| group.fingerprint()).as_deref())?.plan(random);
        Self::connect_with(runtime, dir, options, book, offline)
    }

    /// Connects to the peers that were named, and to no others.
    pub fn connect_to(runtime: &Handle, dir: &DataDir, options: PeerOptions, offline: bool) -> Result<Self, Failure> {
        Self::connect_with(runtime, dir, options, Vec::new(), offline)
    }

    fn connect_with(runtime: &Handle, dir: &DataDir, options: PeerOptions, book: Vec<Multiaddr>, offline: bool) -> Result<Self, Failure> {
        let (peers, publishers) = (options.peers.clone(), options.publishers);
        if offline || (peers.is_empty() && book.is_empty() && !options.mdns) {
            return Ok(Self {
                runtime: runtime.clone(),
                fetcher: None,
                publishers,
                remote: options.remote,
                acquaintance: None,
                client: None,
            });
        }
        let key = dir.key()?;
        let group = options.private.as_deref().map(GroupKey::read).transpose()?;
        let _in_runtime = runtime.enter();
        let records = dir.load_records()?;
        let network = Network::start(NetworkOptions {
            key: &key,
            listen: Vec::new(),
            peers,
            book,
            mdns: options.mdns,
            group,
            memory_max: network_memory(),
            role: NodeRole::Guest,
            records,
            friends: options.remote.execute_at.named().collect(),
        })?;
        info!(local = %network.local, "asking peers");
        let group = group.map(|group| group.fingerprint());
        let mut federation = Self::over(runtime, network, dir, group, &options);
        if let Some(acquaintance) = federation.acquaintance.as_mut().and_then(Arc::get_mut) {
            acquaintance.is_own = true;
        }
        Ok(federation)
    }

    /// Works over a network that is there already.
    pub fn over(runtime: &Handle, network: Network, dir: &DataDir, group: Option<String>, options: &PeerOptions) -> Self {
        let rates = PeerRates::default();
        let fetcher = Fetcher::new(network.clone(), options.timeout, Arc::clone(&rates));
        let progress = fetcher.progress();
        Self {
            runtime: runtime.clone(),
            fetcher: Some(Arc::new(tokio::sync::Mutex::new(fetcher))),
            publishers: options.publishers,
            remote: options.remote.clone(),
            acquaintance: Some(Arc::new(Acquaintance {
                network,
                is_own: false,
                dir: dir.clone(),
                group,
                useful: Mutex::default(),
                rates,
                progress,
            })),
            client: None,
        }
    }

    /// Gives up what it waits for when the sender of `client` is gone.
    #[must_use]
    pub fn for_client(self, client: watch::Receiver<()>) -> Self {
        Self { client: Some(client), ..self }
    }

    /// Has the peers asked who else has a model.
    fn look_for(&self, model: ModelId) {
        if let Some(acquaintance) = &self.acquaintance {
            self.runtime.block_on(acquaintance.network.look_for(model));
        }
    }

    /// What a dispatcher needs to reach the peers, if there are any.
    pub(crate) fn dispatcher_peers(&self) -> Option<DispatcherPeers> {
        let network = self.acquaintance.as_ref().map(|acquaintance| acquaintance.network.clone());
        let peers = self.fetcher.clone().zip(network);
        peers.map(|(fetcher, network)| DispatcherPeers { fetcher, network, runtime: self.runtime.clone() })
    }

    /// How fast peers have sent, and what is on its way.
    pub fn figures(&self) -> (PeerRates, SharedTransfer) {
        self.acquaintance.as_ref().map(|known| (Arc::clone(&known.rates), Arc::clone(&known.progress))).unwrap_or_default()
    }

    /// Whether there is anybody to fetch from.
    pub(crate) fn has_peers(&self) -> bool {
        self.fetcher.is_some()
    }

    /// How peers may run experts.
    pub fn remote(&self) -> &RemoteOptions {
        &self.remote
    }

    /// Counts for those who send something, which the address book will see.
    pub(crate) fn new_providers(&self) -> Providers {
        let providers = Providers::default();
        if let Some(acquaintance) = &self.acquaintance {
            acquaintance.useful.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&providers));
        }
        providers
    }

    /// Finds MODEL here or, by its id, at a peer; refuses a publisher whom the user does not trust.
    pub fn find(&self, open: &OpenDataDir, model: &str, name: Option<&str>) -> Result<LocalModel, Failure> {
        let found = self.find_manifest(open, model, name)?;
        self.follow(&found);
        Ok(found)
    }

    /// Has what peers hold of a model followed.
    pub fn follow(&self, found: &LocalModel) {
        if let Some(fetcher) = &self.fetcher {
            self.runtime.block_on(async { fetcher.lock().await.follow(&found.manifest) });
        }
        if let Some(acquaintance) = &self.acquaintance {
            acquaintance.network.records.lock().know(found.id);
        }
    }

    fn find_manifest(&self, open: &OpenDataDir, model: &str, name: Option<&str>) -> Result<LocalModel, Failure> {
        if let Some(name) = name {
            open.check_name(name, None)?;
        }
        let found = match open.resolve(model)? {
            Resolved::Here(found) => found,
            Resolved::Elsewhere(id) => {
                self.look_for(id);
                return self.fetch_manifest(open, id, name);
            }
        };
        self.look_for(found.id);
        self.check_publisher(&open.dir, found.publisher)?;
        match name {
            Some(name) if name != found.name => {
                let (manifest, envelope) = ModelManifest::open(found.id, open.envelope(found.id)?)?;
                open.keep(Some(name), manifest, &envelope)
            }
            _ => Ok(found),
        }
    }

    /// Refuses a publisher whom the user does not trust.
    pub(crate) fn check_publisher(&self, dir: &DataDir, publisher: NodeId) -> Result<(), Failure> {
        check_publisher(self.trusted_publishers(dir)?.as_ref(), publisher)
    }

    /// Takes a manifest from a peer and keeps it.
    pub(crate) fn fetch_manifest(&self, open: &OpenDataDir, id: ModelId, name: Option<&str>) -> Result<LocalModel, Failure> {
        let fetcher = self.fetcher.as_ref().ok_or_else(|| no_peer(&format!("manifest of model {id}")))?;
        let what = format!("manifest of model {id}");
        // Read before anybody is asked: what is wrong with our own files is not a peer's fault.
        let trusted = self.trusted_publishers(&open.dir)?;
        let judge = |bytes| {
            let (manifest, envelope) = ModelManifest::open(id, bytes).map_err(|error| Failure::from(error).about("sent a bad manifest"))?;
            check_publisher(trusted.as_ref(), envelope.signer())?;
            Ok((manifest, envelope))
        };
        let fetched =
            self.wait(async { fetcher.lock().await.fetch_judged(Subject::Manifest(id), MANIFEST_BYTES_MAX as u64, &what, judge).await });
        let (manifest, envelope) = fetched?;
        open.keep(name, manifest, &envelope)
    }

    /// Asks all peers that can be reached within `patience` what they can do and what they hold.
    pub fn ask_all(&self, patience: Duration) -> Result<(Peers, Vec<Account>), Failure> {
        let Some(acquaintance) = &self.acquaintance else { return Ok(Default::default()) };
        self.settle(patience)?;
        self.wait(async {
            let network = &acquaintance.network;
            let accounts = status::ask_all(network, patience).await;
            let peers = network.peers.borrow().clone();
            Ok((peers, accounts))
        })
    }

    /// The peers that are connected, once all who were named or remembered have been dialled, or after `patience`.
    pub fn settle(&self, patience: Duration) -> Result<Option<Network>, Failure> {
        let Some(acquaintance) = &self.acquaintance else { return Ok(None) };
        let network = acquaintance.network.clone();
        self.wait(async {
            let mut peers = network.peers.clone();
            let settled = peers.wait_for(|peers| peers.awaited.is_empty() && !peers.may_discover);
            let _ = tokio::time::timeout(patience, settled).await;
            Ok(())
        })?;
        Ok(Some(network))
    }

    /// Asks for the models that the peers have; the first answer counts.
    pub fn listing(&self) -> Result<Listing, Failure> {
        let fetcher = self.fetcher.as_ref().ok_or_else(|| no_peer("list of models"))?;
        let judge = |bytes: Vec<u8>| Listing::from_bytes(&bytes).map_err(|error| Failure::new(Kind::Integrity, format!("sent a {error}")));
        self.wait(async { fetcher.lock().await.fetch_judged(Subject::Listing, u64::from(RANGE_BYTES_MAX), "list of models", judge).await })
    }

    /// Of the experts that are missing, those that fit into so many bytes together with the ones that are here: the rarest among the peers.
    pub(crate) fn rarest(&self, store: &BlobStore, manifest: &ModelManifest, bytes_max: u64) -> Result<Vec<(BlobRef, String)>, Failure> {
        let parts = expert_parts(manifest);
        let (here, missing): (Vec<_>, Vec<_>) = parts.into_iter().partition(|(blob, _)| store.contains(&blob.hash));
        let mut left = bytes_max.saturating_sub(here.iter().map(|(blob, _)| blob.length).sum());
        let fetcher = self.fetcher.as_ref().ok_or_else(|| no_peer("experts"))?;
        let mut names: HashMap<_, _> = missing.into_iter().collect();
        let blobs = names.keys().copied().collect();
        let order = self.wait(async { fetcher.lock().await.rarest_first(manifest.id(), blobs).await })?;
        let mut fits = |blob: &BlobRef| left.checked_sub(blob.length).inspect(|now| left = *now).is_some();
        Ok(order.into_iter().filter(|blob| fits(blob)).filter_map(|blob| names.remove_entry(&blob)).collect())
    }

    /// Fetches one thing into memory.
    pub(crate) fn fetch_one(
        &self,
        want: FetchItem,
        results: mpsc::Sender<Fetched>,
        arrivals: &mut mpsc::Receiver<Fetched>,
    ) -> Result<Vec<u8>, Failure> {
        let name = want.name.clone();
        let fetcher = self.fetcher.as_ref().ok_or_else(|| no_peer(&name))?;
        self.wait(async {
            let mut fetcher = fetcher.lock().await;
            let fetch = async {
                let result = fetcher.fetch(vec![want], &results).await;
                drop(results);
                result
            };
            let (result, arrived) = tokio::join!(fetch, arrivals.recv());
            result?;
            arrived.map(|fetched| fetched.bytes).ok_or_else(|| no_peer(&name))
        })
    }

    /// Who says that he has each of some blobs of a model.
    pub fn holders(&self, model: ModelId, blobs: &[BlobRef]) -> Result<Vec<Vec<PeerId>>, Failure> {
        let Some(fetcher) = &self.fetcher else { return Ok(vec![Vec::new(); blobs.len()]) };
        self.wait(async { fetcher.lock().await.holders(model, blobs).await })
    }

    /// Brings the blobs of `wanted` that are missing into the store; the bar shows how far it is.
    pub fn bring(&self, store: &Arc<BlobStore>, wanted: &[(BlobRef, String)], what: &str) -> Result<u64, Failure> {
        let mut seen = BTreeSet::new();
        let missing: Vec<_> = wanted.iter().filter(|(blob, _)| !store.contains(&blob.hash) && seen.insert(blob.hash)).collect();
        if missing.is_empty() {
            return Ok(0);
        }
        let fetcher =
            self.fetcher.as_ref().ok_or_else(|| no_peer(&format!("{} of {} parts of the {what}", missing.len(), wanted.len())))?;
        let total = missing.iter().map(|(blob, _)| blob.length).sum();
        let bar = byte_bar(total, what);
        let sink = Arc::new(Sink(Arc::clone(store)));
        let wants = missing
            .iter()
            .map(|(blob, name)| FetchItem { wanted: Wanted::StoredBlob(*blob, Arc::clone(&sink)), name: name.clone() })
            .collect();
        let (results, mut arrivals) = mpsc::channel::<Fetched>(RESULTS_MAX);
        let providers = self.new_providers();
        self.wait(async {
            let mut fetcher = fetcher.lock().await;
            let count = async {
                while let Some(fetched) = arrivals.recv().await {
                    *providers.lock().unwrap_or_else(PoisonError::into_inner).entry(fetched.peer).or_default() += 1;
                    bar.inc(missing[fetched.index].0.length);
                }
            };
            let fetch = async {
                let result = fetcher.fetch(wants, &results).await;
                drop(results);
                result
            };
            tokio::join!(fetch, count).0
        })?;
        bar.finish_and_clear();
        store.flush();
        Ok(total)
    }

    /// Whose manifests count; nothing when anybody's do.
    fn trusted_publishers(&self, dir: &DataDir) -> Result<Option<BTreeSet<NodeId>>, Failure> {
        if self.publishers == Publishers::Anybody {
            return Ok(None);
        }
        let mut trusted = dir.publishers()?;
        trusted.insert(dir.key()?.id());
        Ok(Some(trusted))
    }

    /// Runs something on the network until it ends or the user presses Ctrl-C.
    pub fn wait<T>(&self, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        self.runtime.block_on(unless_interrupted(async {
            tokio::select! {
                result = work => result,
                () = gone(self.client.clone()) => Err(Failure::interrupted()),
            }
        }))
    }
}

/// Returns when a client has gone.
async fn gone(client: Option<watch::Receiver<()>>) {
    match client {
        Some(mut client) => while client.changed().await.is_ok() {},
        None => std::future::pending().await,
    }
}

impl Acquaintance {
    fn remember(&self) -> Result<(), Failure> {
        let useful = self.useful.lock().unwrap_or_else(PoisonError::into_inner);
        let useful: BTreeSet<_> =
            useful.iter().flat_map(|set| set.lock().unwrap_or_else(PoisonError::into_inner).clone().into_keys()).collect();
        let rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let learned = Learned { useful, rates, ..Learned::default() };
        self.network.records.save_trust()?;
        remember(&self.dir, self.group.as_deref(), &self.network.peers.borrow(), &learned)
    }
}

impl Drop for Acquaintance {
    fn drop(&mut self) {
        if let Err(failure) = self.remember() {
            warn!(%failure, "peers are not remembered");
        }
        if self.is_own {
            self.network.leave_blocking();
        }
    }
}

fn check_publisher(trusted: Option<&BTreeSet<NodeId>>, publisher: NodeId) -> Result<(), Failure> {
    if trusted.is_none_or(|trusted| trusted.contains(&publisher)) {
        return Ok(());
    }
    let hint = format!("confrere publishers add {publisher}");
    Err(Failure::new(
        Kind::Refused,
        format!("the model is signed by {publisher}, whom you do not trust; if you do: {hint} (or --allow-unsigned, this once)"),
    ))
}

/// Writes into an address book what was seen of peers.
pub fn remember(dir: &DataDir, group: Option<&str>, peers: &Peers, learned: &Learned) -> Result<(), Failure> {
    let _editing = dir.files.exclusive()?;
    let known = dir.book(group)?;
    let mut book = known.clone();
    book.learn(peers, learned, now_ms());
    if book == known { Ok(()) } else { dir.set_book(group, &book) }
}

/// The tensors of a part's trunk with the names that errors give them; none where the model has no such part.
pub fn part_tensors(manifest: &ModelManifest, kind: PartKind) -> Vec<(BlobRef, String)> {
    let tensors = manifest.part(kind).into_iter().flat_map(|part| &part.trunk);
    tensors.map(|tensor| (tensor.blob, tensor.role.to_string())).collect()
}

/// What every answer needs of the trunk, with the names that errors give it: towers and what speaks come when they are asked for.
pub fn trunk_parts(manifest: &ModelManifest) -> Vec<(BlobRef, String)> {
    let tensors = part_tensors(manifest, PartKind::Text).into_iter();
    let files = [(manifest.tokenizer, "tokenizer.json"), (manifest.chat.template, "chat template")];
    tensors.chain(files.into_iter().filter_map(|(blob, name)| Some((blob?, name.to_owned())))).collect()
}

/// Everything that is not in [`trunk_parts`], with the names that errors give it.
pub fn other_parts(manifest: &ModelManifest) -> Vec<(BlobRef, String)> {
    let parts = manifest.parts.iter().map(|part| part.kind).filter(|&kind| kind != PartKind::Text);
    let tensors = parts.flat_map(|kind| part_tensors(manifest, kind));
    tensors.chain(manifest.experts().map(|(slot, expert)| (expert.blob, slot.to_string()))).collect()
}

/// The experts that make text, with the names that errors give them.
pub fn expert_parts(manifest: &ModelManifest) -> Vec<(BlobRef, String)> {
    manifest.text().placed_experts().map(|(slot, expert)| (expert.blob, slot.to_string())).collect()
}

pub fn no_peer(what: &str) -> Failure {
    Failure::new(Kind::NoPeers, format!("missing {what}: no peer is known (--peer ADDR, or `confrere join TICKET`)"))
}
