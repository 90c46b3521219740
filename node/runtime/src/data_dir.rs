//! The data directory: what lies where, and the small files in it. Blobs are the store's.
//!
//! ```text
//! key             secret key, hexadecimal, readable by its owner alone
//! publishers      trusted keys, one a line
//! peers           addresses of peers that were joined, one a line
//! met, met-GROUP  address books: peers that were met and useful, of everybody's network and of each closed group
//! models.json     local names of models
//! manifests/ID    signed manifests, as received
//! profiles/       what was measured of models' experts (see `profiles`)
//! records, trust, rulings, checked, seq
//!                 what peers have signed, what was seen of them, what the user decided (see `records`)
//! tokenizers      hashes of tokenizers that were tried and do no harm
//! usage/          how often experts were used
//! store/          blobs and their index
//! lock            held by the process that uses all this
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base::failure::{Failure, Kind, io_failure};
use base::files::{Files, SMALL_FILE_BYTES_MAX, keep_damaged};
use base::output::note;
use base::secret_file;
use net::records::SharedRecords;
use net::records::files::RecordFiles;
use net::{Multiaddr, new_secret};
use protocol::manifest::MANIFEST_BYTES_MAX;
use protocol::message::is_model_name;
use protocol::{ContentHash, ModelId, ModelManifest, NodeId, NodeKey, SignedEnvelope};
use store::disk::read_file;
use store::{BlobStore, DataDirLock, RealDisk};
use tracing::debug;

use crate::evidence::Evidence;
use crate::peer_book::Book;
use crate::sandbox;

use crate::probes;

/// The format of data directories that this program reads and writes; one without the file is of the first.
const FORMAT: u32 = 1;
/// After this long, a file beside the one that it should replace was left behind.
const LEFT_BEHIND_AGE: Duration = Duration::from_secs(3600);
/// Manifests of one publisher, in bytes.
const PUBLISHER_MANIFEST_BYTES_MAX: u64 = 64 << 20;
/// Tokenizers of which it is remembered that they were tried.
const TOKENIZERS_MAX: usize = 64;

/// A data directory, without the lock: the key and the lists of whom the user trusts.
#[derive(Clone, Debug)]
pub struct DataDir {
    /// The small ones.
    pub files: Files,
}

impl DataDir {
    /// Opens a data directory, creating it where needed.
    pub fn open(root: &Path) -> Result<Self, Failure> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(root); // what is in it is its owner's alone
        made.map_err(|error| io_failure("create", root, &error))?;
        Ok(Self { files: Files::of(root) })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.files.path()
    }

    /// The node's key, made at first use.
    pub fn key(&self) -> Result<NodeKey, Failure> {
        let path = self.path().join("key");
        match self.files.read("key", 100)? {
            Some(text) => {
                secret_file::check(&path)?;
                let secret = std::str::from_utf8(&text).ok().and_then(|text| protocol::hash::from_hex(text.trim()));
                let secret = secret.ok_or_else(|| Failure::new(Kind::Integrity, format!("{} does not hold a key", path.display())))?;
                Ok(NodeKey::from_secret(&secret))
            }
            None => self.make_key(&path),
        }
    }

    fn make_key(&self, path: &Path) -> Result<NodeKey, Failure> {
        let secret = new_secret();
        let temporary = self.path().join(format!("key.{}", std::process::id()));
        let write = || -> io::Result<()> {
            secret_file::write(&temporary, format!("{}\n", protocol::hash::to_hex(&secret)).as_bytes())?;
            // A link fails where a file is: of two processes that start at once, the second takes the first one's key.
            fs::hard_link(&temporary, path)?;
            fs::File::open(self.path())?.sync_all()
        };
        let written = write();
        let _ = fs::remove_file(&temporary);
        match written {
            Ok(()) => Ok(NodeKey::from_secret(&secret)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => self.key(),
            Err(error) => Err(io_failure("write", path, &error)),
        }
    }

    /// Where records and opinions are kept.
    pub fn record_files(&self) -> RecordFiles {
        RecordFiles::new(self.files.clone())
    }

    /// Records and opinions as they are on the disk, of the models that are here and of all probes that were measured with, the shipped ones too.
    pub fn load_records(&self) -> Result<SharedRecords, Failure> {
        let probes = self.all_profiles().into_iter().map(|(_, profile)| profile.probes).chain(probes::shipped_hashes());
        SharedRecords::load(self.record_files(), self.key()?.id(), self.model_ids(), probes.collect())
    }

    /// Where evidence against peers is kept.
    pub(crate) fn evidence(&self) -> Evidence {
        Evidence::new(self.path().join("evidence"))
    }

    /// The models whose manifests are here.
    pub(crate) fn model_ids(&self) -> BTreeSet<ModelId> {
        let files = fs::read_dir(self.path().join("manifests")).into_iter().flatten().flatten();
        files.filter_map(|file| file.file_name().to_str()?.parse().ok()).collect()
    }

    /// Local names of models; a daemon may be changing them.
    pub fn model_names(&self) -> Result<BTreeMap<String, ModelId>, Failure> {
        let path = self.path().join("models.json");
        let text = self.files.read("models.json", SMALL_FILE_BYTES_MAX)?;
        let names: BTreeMap<String, String> = serde_json::from_slice(&text.unwrap_or_else(|| b"{}".to_vec())).unwrap_or_else(|error| {
            // Names are a convenience: the manifests are all there, and get names from their ids.
            keep_damaged(&path, &format!("{error}; names of models are lost"));
            BTreeMap::new()
        });
        Ok(names.into_iter().filter_map(|(name, id)| Some((name, id.parse().ok()?))).collect())
    }

    /// The keys whose models this user runs, besides the node's own.
    pub fn publishers(&self) -> Result<BTreeSet<NodeId>, Failure> {
        let path = self.path().join("publishers");
        let mut publishers = BTreeSet::new();
        for (i, line) in self.files.lines("publishers")?.iter().enumerate() {
            let key = line.parse().map_err(|error| Failure::new(Kind::Integrity, format!("{} line {}: {error}", path.display(), i + 1)))?;
            publishers.insert(key);
        }
        Ok(publishers)
    }

    /// Replaces the list of trusted keys.
    pub fn set_publishers(&self, publishers: &BTreeSet<NodeId>) -> Result<(), Failure> {
        self.files.set_lines("publishers", publishers.iter().map(ToString::to_string))
    }

    /// Addresses of peers that this node was given.
    pub fn peers(&self) -> Result<Vec<Multiaddr>, Failure> {
        let path = self.path().join("peers");
        let parse =
            |line: &String| line.parse().map_err(|error| Failure::new(Kind::Integrity, format!("{}: {line}: {error}", path.display())));
        self.files.lines("peers")?.iter().map(parse).collect()
    }

    /// Replaces the list of known peers.
    pub(crate) fn set_peers(&self, peers: &[Multiaddr]) -> Result<(), Failure> {
        self.files.set_lines("peers", peers.iter().map(ToString::to_string))
    }

    /// The address book of a closed group, by its fingerprint, or of everybody's network.
    pub fn book(&self, group: Option<&str>) -> Result<Book, Failure> {
        let path = self.path().join(book_file(group));
        let bytes = self.files.read(&book_file(group), SMALL_FILE_BYTES_MAX)?.unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let (book, unreadable) = Book::parse(text.lines());
        if unreadable > 0 {
            keep_damaged(&path, &format!("{unreadable} of its lines are no peers"));
        }
        Ok(book)
    }

    /// Replaces an address book.
    pub(crate) fn set_book(&self, group: Option<&str>, book: &Book) -> Result<(), Failure> {
        self.files.set_lines(&book_file(group), book.lines())
    }

    /// Takes the lock and opens everything; at most `disk_max` bytes of blobs.
    pub fn lock(&self, disk_max: u64) -> Result<OpenDataDir, Failure> {
        let lock = DataDirLock::take(self.path())?;
        self.check_format()?;
        let store = BlobStore::open(Box::new(RealDisk), &self.path().join("store"), disk_max)?;
        let manifests = self.path().join("manifests");
        fs::create_dir_all(&manifests).map_err(|error| io_failure("create", &manifests, &error))?;
        let names = self.model_names()?;
        let open = OpenDataDir { dir: self.clone(), store: Arc::new(store), names: Mutex::new(names), _lock: lock };
        open.count_manifests();
        self.sweep();
        open.adopt_unnamed()?;
        Ok(open)
    }

    /// Refuses a directory that a newer program has written, and notes down the format of one that nobody has noted it in.
    fn check_format(&self) -> Result<(), Failure> {
        let path = self.path().join("format");
        match self.files.lines("format")?.first() {
            None => self.files.set_lines("format", std::iter::once(FORMAT.to_string())),
            Some(format) if format.parse() == Ok(FORMAT) => Ok(()),
            Some(format) if format.parse::<u32>().is_ok_and(|format| format > FORMAT) => Err(Failure::new(
                Kind::Other,
                format!(
                    "{} says format {format}; this program knows {FORMAT}: a newer confrere has written this data directory",
                    path.display()
                ),
            )),
            Some(format) => Err(Failure::new(Kind::Integrity, format!("{} says {format:?}, which is no format", path.display()))),
        }
    }

    /// Tries a tokenizer where it can do no harm, unless one of these bytes has been tried before.
    pub fn try_tokenizer(&self, hash: ContentHash, bytes: &[u8]) -> Result<(), Failure> {
        let line = hash.to_string();
        // What cannot be remembered is tried again.
        let tried = self.files.lines("tokenizers").unwrap_or_default();
        if tried.contains(&line) {
            return Ok(());
        }
        sandbox::try_tokenizer(bytes).map_err(|why| Failure::new(Kind::Integrity, format!("the model's tokenizer is refused: {why}")))?;
        let from = tried.len().saturating_sub(TOKENIZERS_MAX - 1);
        if let Err(failure) = self.files.set_lines("tokenizers", tried.into_iter().skip(from).chain([line])) {
            debug!(%failure, "that a tokenizer was tried is not remembered");
        }
        Ok(())
    }

    /// Removes what writes of small files have left behind that were killed; one that is under way is younger.
    fn sweep(&self) {
        let is_old = |file: &fs::DirEntry| {
            let age = file.metadata().ok().and_then(|metadata| metadata.modified().ok()?.elapsed().ok());
            age.is_some_and(|age| age > LEFT_BEHIND_AGE)
        };
        let files = fs::read_dir(self.path()).into_iter().flatten().flatten();
        for file in files.filter(|file| file.path().extension().is_some_and(|extension| extension == "new") && is_old(file)) {
            let _ = fs::remove_file(file.path()); // nothing but disk is lost with what stays
        }
    }
}

/// A data directory of which this process has the lock.
pub struct OpenDataDir {
    pub dir: DataDir,
    pub store: Arc<BlobStore>,
    names: Mutex<BTreeMap<String, ModelId>>,
    _lock: DataDirLock,
}

/// A model in this data directory.
#[derive(Clone, Debug)]
pub struct LocalModel {
    pub name: String,
    pub id: ModelId,
    pub manifest: Arc<ModelManifest>,
    pub publisher: NodeId,
}

impl LocalModel {
    /// Experts whose bytes are in `store`.
    pub(crate) fn experts_present(&self, store: &BlobStore) -> usize {
        self.manifest.expert_blobs().filter(|blob| store.contains(&blob.hash)).count()
    }

    /// Bytes of the model that are in `store`.
    pub fn bytes_present(&self, store: &BlobStore) -> u64 {
        self.blobs().into_iter().filter(|(hash, _)| store.contains(hash)).map(|(_, length)| length).sum()
    }

    /// Every blob of the model, once.
    pub fn blobs(&self) -> BTreeMap<ContentHash, u64> {
        let all = self.manifest.blobs();
        all.map(|blob| (blob.hash, blob.length)).collect()
    }
}

/// What a MODEL argument turned out to be.
pub(crate) enum Resolved {
    /// A model that is here.
    Here(LocalModel),
    /// The id of one that is not.
    Elsewhere(ModelId),
}

impl OpenDataDir {
    /// The only model that is here.
    pub fn only_model(&self) -> Result<String, Failure> {
        let mut models = self.models()?;
        match (models.pop(), models.is_empty()) {
            (Some(model), true) => Ok(model.name),
            (None, _) => Err(Failure::new(Kind::NotFound, "no model is here; say which with --model ID")),
            _ => Err(Failure::new(Kind::Usage, "more than one model is here; say which with --model")),
        }
    }

    /// All models, by name; fails when the manifest of one cannot be read.
    pub fn models(&self) -> Result<Vec<LocalModel>, Failure> {
        self.names().into_iter().map(|(name, id)| self.load(name, id)).collect()
    }

    /// All models whose manifests can be read; the user is told of the others.
    pub fn readable_models(&self) -> Vec<LocalModel> {
        let load = |(name, id): (String, ModelId)| match self.load(name.clone(), id) {
            Ok(model) => Some(model),
            Err(failure) => {
                note(&format!("warning: {failure}; confrere rm {name} removes it, a peer or another import can replace it"));
                None
            }
        };
        self.names().into_iter().filter_map(load).collect()
    }

    /// Finds MODEL: a name, an id or a unique prefix of one.
    pub(crate) fn resolve(&self, model: &str) -> Result<Resolved, Failure> {
        match self.identify(model)? {
            Some((name, id)) if self.manifest_path(id).exists() => self.load(name, id).map(Resolved::Here),
            Some((_, id)) => Ok(Resolved::Elsewhere(id)),
            None => model.parse().map(Resolved::Elsewhere).map_err(|_| self.unknown(model)),
        }
    }

    /// Finds the name and id of a model that is named here, whether its manifest can be read or not.
    pub fn identify(&self, model: &str) -> Result<Option<(String, ModelId)>, Failure> {
        let names = self.names();
        if let Some(&id) = names.get(model) {
            return Ok(Some((model.to_owned(), id)));
        }
        let hexadecimal = model.len() >= 4 && model.chars().all(|c| c.is_ascii_hexdigit());
        let begins = |id: &ModelId| hexadecimal && id.to_string().starts_with(&model.to_lowercase());
        let matching: BTreeMap<_, _> = names.iter().filter(|(_, id)| begins(id)).map(|(name, id)| (*id, name)).collect();
        match matching.len() {
            0 | 1 => Ok(matching.into_iter().next().map(|(id, name)| (name.clone(), id))),
            count => Err(Failure::new(Kind::NotFound, format!("{model} is the beginning of {count} models' ids"))),
        }
    }

    /// Finds a MODEL that must be here.
    pub fn local(&self, model: &str) -> Result<LocalModel, Failure> {
        match self.resolve(model)? {
            Resolved::Here(model) => Ok(model),
            Resolved::Elsewhere(_) => Err(self.unknown(model)),
        }
    }

    /// Keeps a signed manifest under a local name. A name that another model has is refused.
    pub fn keep(&self, name: Option<&str>, manifest: ModelManifest, envelope: &SignedEnvelope) -> Result<LocalModel, Failure> {
        let id = ModelId(ContentHash::of(envelope.payload()));
        let known = self.names().into_iter().find(|(_, known)| *known == id).map(|(name, _)| name);
        let name = match (name, known) {
            (Some(name), _) => name.to_owned(),
            (None, Some(name)) => name,
            (None, None) => id.to_string()[..12].to_owned(),
        };
        self.check_name(&name, Some(id))?;
        self.check_room(id, envelope)?;
        self.dir.files.write(&format!("manifests/{id}"), envelope.as_bytes())?;
        self.count_manifests();
        self.change_names(|names| {
            names.insert(name.clone(), id);
        })?;
        Ok(LocalModel { name, id, manifest: Arc::new(manifest), publisher: envelope.signer() })
    }

    /// Whether there is room for a manifest. What others publish is bounded by the disk that this node may take, and for each publisher.
    fn check_room(&self, id: ModelId, envelope: &SignedEnvelope) -> Result<(), Failure> {
        let bytes = envelope.as_bytes().len() as u64;
        if envelope.signer() == self.dir.key()?.id() || self.manifest_path(id).exists() {
            return Ok(());
        }
        let left = self.store.bytes_left();
        if bytes > left {
            let message = format!("the manifest of model {id} has {bytes} bytes; {left} are left of the disk that may be used (--disk)");
            return Err(Failure::new(Kind::Disk, message));
        }
        let publisher = envelope.signer();
        let theirs = self.dir.model_ids().into_iter().filter_map(|other| self.envelope(other).ok());
        // The envelope of one that is here has been verified; who signed it stands at its beginning.
        let theirs: u64 =
            theirs.filter(|bytes| SignedEnvelope::claimed_signer(bytes) == Some(publisher)).map(|bytes| bytes.len() as u64).sum();
        if theirs + bytes > PUBLISHER_MANIFEST_BYTES_MAX {
            let message = format!(
                "the manifests of models by {publisher} would have {} bytes; {PUBLISHER_MANIFEST_BYTES_MAX} is the most (confrere rm makes room)",
                theirs + bytes
            );
            return Err(Failure::new(Kind::Disk, message));
        }
        Ok(())
    }

    /// Counts the manifests against the disk that this node may take.
    fn count_manifests(&self) {
        let files = fs::read_dir(self.dir.path().join("manifests")).into_iter().flatten().flatten();
        self.store.count_elsewhere(files.filter_map(|file| Some(file.metadata().ok()?.len())).sum());
    }

    /// Says whether `name` may be given to model `id`, or to any new model.
    pub fn check_name(&self, name: &str, id: Option<ModelId>) -> Result<(), Failure> {
        if !is_model_name(name) {
            let rule = "a name has 1 to 128 letters, digits and -_.: and starts with a letter or digit";
            return Err(Failure::new(Kind::Usage, format!("{name:?} cannot name a model: {rule}")));
        }
        if name.parse::<ModelId>().is_ok() {
            return Err(Failure::new(Kind::Usage, format!("{name} cannot name a model: it reads as an id")));
        }
        match self.names().get(name) {
            Some(&other) if id.is_some_and(|id| id != other) => Err(Failure::new(
                Kind::Usage,
                format!("the name {name} belongs to model {other}; choose another or remove that model first"),
            )),
            _ => Ok(()),
        }
    }

    /// Forgets a model's names and manifest. Its blobs stay until the next collection.
    pub fn forget(&self, id: ModelId) -> Result<(), Failure> {
        self.change_names(|names| names.retain(|_, known| *known != id))?;
        self.dir.forget_profile(id);
        let path = self.manifest_path(id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_failure("remove", &path, &error)),
            _ => {}
        }
        self.count_manifests();
        Ok(())
    }

    /// Removes blobs that no manifest names; returns how many, and their bytes.
    pub fn collect_garbage(&self) -> Result<(usize, u64), Failure> {
        let mut named = BTreeSet::new();
        for model in self.models()? {
            named.extend(model.blobs().into_keys());
        }
        named.extend(self.dir.all_profiles().into_iter().map(|(_, profile)| profile.body.hash));
        let (mut blobs, mut bytes) = (0, 0);
        for blob in self.store.list().into_iter().filter(|blob| !named.contains(&blob.hash)) {
            if self.store.remove(&blob.hash)? {
                blobs += 1;
                bytes += blob.length;
            }
        }
        blobs += self.store.clear_quarantine()?;
        self.store.flush();
        Ok((blobs, bytes))
    }

    /// The signed manifest of a model, as received.
    pub fn envelope(&self, id: ModelId) -> Result<Vec<u8>, Failure> {
        let path = self.manifest_path(id);
        let bytes = read_file(&path, MANIFEST_BYTES_MAX as u64).map_err(|error| io_failure("read", &path, &error))?;
        bytes.ok_or_else(|| Failure::new(Kind::Integrity, format!("{} is missing", path.display())))
    }

    fn manifest_path(&self, id: ModelId) -> PathBuf {
        self.dir.path().join("manifests").join(id.to_string())
    }

    fn load(&self, name: String, id: ModelId) -> Result<LocalModel, Failure> {
        let (manifest, envelope) = ModelManifest::open(id, self.envelope(id)?)
            .map_err(|error| Failure::from(error).about(format_args!("model {name} ({})", self.manifest_path(id).display())))?;
        Ok(LocalModel { name, id, manifest: Arc::new(manifest), publisher: envelope.signer() })
    }

    /// Gives a name to every manifest that has none: names are a convenience and may be lost, models are not.
    fn adopt_unnamed(&self) -> Result<(), Failure> {
        let ids = self.dir.model_ids();
        let named: BTreeSet<_> = self.names().into_values().collect();
        if ids.is_subset(&named) {
            return Ok(());
        }
        self.change_names(|names| names.extend(ids.difference(&named).map(|id| (id.to_string()[..12].to_owned(), *id))))
    }

    fn names(&self) -> BTreeMap<String, ModelId> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes the names, on the disk first of all.
    fn change_names(&self, change: impl FnOnce(&mut BTreeMap<String, ModelId>)) -> Result<(), Failure> {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let mut changed = names.clone();
        change(&mut changed);
        let text: BTreeMap<_, _> = changed.iter().map(|(name, id)| (name, id.to_string())).collect();
        let mut text = serde_json::to_vec_pretty(&text).expect("a map of texts is JSON");
        text.push(b'\n');
        self.dir.files.write("models.json", &text)?;
        *names = changed;
        Ok(())
    }

    /// Nothing is called that.
    pub fn unknown(&self, model: &str) -> Failure {
        let known: Vec<_> = self.names().into_keys().collect();
        let known = if known.is_empty() { "there is none here".to_owned() } else { format!("known: {}", known.join(", ")) };
        Failure::new(Kind::NotFound, format!("no model is called {model} ({known})"))
    }
}

fn book_file(group: Option<&str>) -> String {
    group.map_or_else(|| "met".to_owned(), |group| format!("met-{group}"))
}
