//! Making a model ready to run: its trunk fetched, verified and loaded, memory divided, experts within reach.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use base::clock::now_ms;
use base::failure::{Failure, Kind};
use base::output::{human_bytes, note};
use inference::aligned::AlignedBytes;
use inference::cache_policy::PolicyKind;
use inference::chat::ChatTemplate;
use inference::engine::{Engine, EngineOptions};
use inference::experts::Experts;
use inference::machine::Machine;
use inference::memory::plan_memory;
use inference::model::Model;
use inference::session::Session;
use inference::tokenizer::Tokenizer;
use net::PeerId;
use protocol::{BlobRef, PartKind};
use store::BlobStore;

use crate::data_dir::{LocalModel, OpenDataDir};
use crate::dispatcher::{Dispatcher, DispatcherOptions, Providers, RemoteReport, SharedReport, Waiters};
use crate::federation::{Federation, no_peer, trunk_parts};
use crate::memory::{HEADROOM, resident_bytes};
use crate::prompt::{Chat, ModelText};
use crate::towers::Towers;

/// A model ready to run.
pub struct Loaded {
    pub engine: Engine,
    /// Eyes and ears, once they are needed.
    pub towers: Towers,
    pub text: Arc<ModelText>,
    /// Whether somebody still wants what it is at work on.
    pub(crate) waiters: Waiters,
    providers: Providers,
    report: SharedReport,
    /// Memory that the process had before the model was loaded.
    process: u64,
    /// Memory that was left for experts, before it.
    experts_bytes: u64,
}

impl Loaded {
    /// Memory that we count as taken, with the keys and values of `session`.
    pub fn counted_bytes(&mut self, session: &Session) -> u64 {
        self.process + self.engine.machine().bytes() + self.engine.results_bytes() + session.bytes()
    }

    /// The same, as it goes on.
    pub fn shared_report(&self) -> SharedReport {
        self.report.clone()
    }

    /// The peers that have sent experts or run some, with how often: whoever's number grows has just helped.
    pub(crate) fn helpers(&self) -> BTreeMap<PeerId, u64> {
        let mut helpers = self.providers();
        for (peer, count) in self.report.lock().book.counts() {
            *helpers.entry(*peer).or_default() += count.used;
        }
        helpers
    }

    /// What running experts at peers came to so far.
    pub fn remote_report(&self) -> RemoteReport {
        self.report.snapshot()
    }

    /// The peers that have sent experts, with how many.
    pub fn providers(&self) -> BTreeMap<PeerId, u64> {
        self.providers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What the process needs besides experts and models to come.
pub(crate) fn beside_experts(machine: &Machine) -> u64 {
    resident_bytes().saturating_sub(machine.experts().bytes()) + machine.work_bytes_untaken() + HEADROOM
}

impl Federation {
    /// Makes a model ready to run that is alone on its machine.
    pub fn load(&self, open: &OpenDataDir, found: &LocalModel, memory_max: u64, options: EngineOptions) -> Result<Loaded, Failure> {
        let machine = Machine::new(options.threads, options.kernels, PolicyKind::Lru);
        let loaded = self.load_on(&machine, (open, found), memory_max, 0, options)?;
        machine.experts().lock().set_bytes_max(loaded.experts_bytes);
        Ok(loaded)
    }

    /// Makes a model ready to run: trunk fetched, verified and loaded, experts within reach. `reserved` bytes are set aside for other models on
    /// the machine, and not taken yet; what experts take is shared among all, and the caller says how much that may be.
    pub(crate) fn load_on(
        &self,
        machine: &Machine,
        (open, found): (&OpenDataDir, &LocalModel),
        memory_max: u64,
        reserved: u64,
        options: EngineOptions,
    ) -> Result<Loaded, Failure> {
        let manifest = &found.manifest;
        // Before anything is fetched: no budget is large enough by what only the process itself would save.
        plan_memory(manifest, &options, None, 0, memory_max)?;
        let fetched = self.bring(&open.store, &trunk_parts(manifest), "trunk")?;
        if fetched > 0 {
            note(&format!("fetched the trunk, {}", human_bytes(fetched)));
        }
        let text = |blob: BlobRef| -> Result<String, Failure> {
            let bytes = self.read_part(&open.store, blob)?.to_vec();
            String::from_utf8(bytes).map_err(|_| Failure::new(Kind::Integrity, format!("{} is not UTF-8", blob.hash)))
        };
        let tokenizer = manifest.tokenizer.map(|blob| {
            let bytes = self.read_part(&open.store, blob)?;
            open.dir.try_tokenizer(blob.hash, &bytes)?;
            Tokenizer::from_bytes(&bytes).map(Arc::new).map_err(|error| Failure::new(Kind::Integrity, error.to_string()))
        });
        let chat = manifest.chat.template.map(|blob| {
            let (bos_token, eos_token) = (manifest.chat.bos_token.clone(), manifest.chat.eos_token.clone());
            Ok::<_, Failure>(Chat::new(ChatTemplate { source: text(blob)?, bos_token, eos_token }))
        });
        let (tokenizer, chat) = (tokenizer.transpose()?, chat.transpose()?);
        let memory = plan_memory(manifest, &options, Some(machine), beside_experts(machine) + reserved, memory_max)?;
        let process = (resident_bytes() + machine.work_bytes_untaken()).saturating_sub(machine.bytes());
        let mut read = |blob| machine.tensor(blob, |bytes| self.read_into(&open.store, blob, bytes));
        let model = Model::load(Arc::clone(manifest), PartKind::Text, &mut read)?;
        let providers = self.new_providers();
        let report = SharedReport::new(self.remote().audit);
        let waiters = Waiters::default();
        let dispatching = DispatcherOptions {
            hidden_size: manifest.decoder().hidden_size as usize,
            packed: manifest.text().experts.iter().any(|expert| expert.precision.is_packed()),
            kernels: options.kernels,
            remote: self.remote().clone(),
            report: report.clone(),
            evidence: open.dir.evidence(),
            waiters: waiters.clone(),
        };
        let source = Dispatcher::new(Arc::clone(&open.store), self.dispatcher_peers(), Arc::clone(&providers), dispatching);
        let experts = Experts::new(manifest, PartKind::Text, machine.experts().clone(), Box::new(source));
        let engine = Engine::new(machine, model, experts, EngineOptions { batch_tokens: memory.batch_tokens, ..options });
        let towers = Towers::new(manifest, &open.store, self);
        Ok(Loaded {
            engine,
            towers,
            text: Arc::new(ModelText { tokenizer, chat, vision: manifest.vision().cloned(), audio: manifest.audio().cloned() }),
            waiters,
            providers,
            report,
            process,
            experts_bytes: memory.experts,
        })
    }

    /// Reads a part of the trunk; one that has rotted on the disk is fetched again.
    fn read_part(&self, store: &Arc<BlobStore>, blob: BlobRef) -> Result<AlignedBytes, Failure> {
        let mut bytes = AlignedBytes::zeroed(blob.length as usize);
        self.read_into(store, blob, &mut bytes)?;
        Ok(bytes)
    }

    pub(crate) fn read_into(&self, store: &Arc<BlobStore>, blob: BlobRef, bytes: &mut AlignedBytes) -> Result<(), Failure> {
        let read = store.read_into(&blob.hash, bytes, now_ms());
        match read {
            Ok(true) => return Ok(()),
            Ok(false) | Err(store::StoreError::Damaged { .. }) if self.has_peers() => {}
            Ok(false) => return Err(no_peer(&blob.hash.to_string())),
            Err(error) => return Err(error.into()),
        }
        self.bring(store, &[(blob, blob.hash.to_string())], "trunk")?;
        if store.read_into(&blob.hash, bytes, now_ms())? {
            return Ok(());
        }
        Err(Failure::new(Kind::Other, format!("{} has gone from the store again", blob.hash)))
    }
}
