//! What several tests need: vectors, checkpoints written on the spot, and a model held in memory.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use inference::aligned::AlignedBytes;
use inference::cache_policy::PolicyKind;
use inference::checkpoint::Checkpoint;
use inference::checkpoint::import::{BlobSink, ImportError, import};
use inference::convert::Target;
use inference::engine::{Engine, EngineOptions, KvPrecision};
use inference::expert::Expert;
use inference::expert_runner::{ExpertResults, ExpertRunner};
use inference::expert_source::{Arrival, Brought, ExpertRequest, ExpertSource, Gain, LayerInputs, Origin, SourceError};
use inference::experts::Experts;
use inference::kernels::Kernels;
use inference::machine::Machine;
use inference::model::Model;
use protocol::{BlobRef, ContentHash, ModelManifest, PartKind, Precision};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

/// A file or directory of the vectors.
pub(crate) fn vectors(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("vectors").join(path)
}

/// A checkpoint of the vectors.
pub(crate) fn checkpoint(name: &str) -> PathBuf {
    vectors("checkpoints").join(name)
}

/// Blobs in memory.
#[derive(Default)]
pub(crate) struct MemoryBlobs(Mutex<BTreeMap<ContentHash, Vec<u8>>>);

impl MemoryBlobs {
    pub(crate) fn get(&self, blob: BlobRef) -> Vec<u8> {
        self.0.lock().expect("no test panics while holding it")[&blob.hash].clone()
    }
}

impl BlobSink for MemoryBlobs {
    fn put(&self, bytes: &[u8]) -> Result<BlobRef, String> {
        let blob = BlobRef::of(bytes);
        self.0.lock().expect("no test panics while holding it").insert(blob.hash, bytes.to_vec());
        Ok(blob)
    }

    fn progress(&self, _: u64) -> bool {
        true
    }
}

/// A model imported into memory.
pub(crate) struct Imported {
    pub(crate) manifest: Arc<ModelManifest>,
    pub(crate) blobs: Arc<MemoryBlobs>,
}

impl Imported {
    pub(crate) fn from_dir(dir: &Path, precision: Option<Precision>) -> Result<Self, ImportError> {
        let checkpoint = Checkpoint::open(dir).map_err(ImportError::Refused)?;
        let blobs = Arc::new(MemoryBlobs::default());
        let manifest = Arc::new(import(&checkpoint, Target::all(precision), &*blobs)?);
        Ok(Self { manifest, blobs })
    }

    pub(crate) fn of(name: &str) -> Self {
        Self::from_dir(&checkpoint(name), None).expect("the vectors import")
    }

    /// The model ready to run, as it is by default but with keys and values in f32.
    pub(crate) fn engine(&self, bytes_max: u64, seed: u64) -> Engine {
        self.engine_with(bytes_max, seed, self.options())
    }

    pub(crate) fn engine_with(&self, bytes_max: u64, seed: u64, options: EngineOptions) -> Engine {
        self.engine_of(bytes_max, Shuffled::new(self, seed), options)
    }

    /// The same, but about half of what is missing runs elsewhere, with some kernels.
    pub(crate) fn engine_elsewhere(&self, bytes_max: u64, seed: u64, kernels: &'static Kernels) -> Engine {
        let shape = self.manifest.text().expert_shape(self.manifest.usual_precision());
        let runner = ExpertRunner::new(shape, 1 + seed as usize % 2, kernels);
        self.engine_of(bytes_max, Shuffled { elsewhere: Some(runner), ..Shuffled::new(self, seed) }, self.options())
    }

    /// As by default, but with keys and values in f32.
    pub(crate) fn options(&self) -> EngineOptions {
        EngineOptions { kv: KvPrecision::F32, ..EngineOptions::for_model(&self.manifest) }
    }

    /// On a machine that other models may be on, too.
    pub(crate) fn engine_on(&self, machine: &Machine, seed: u64) -> Engine {
        self.put_together(machine, Shuffled::new(self, seed), self.options())
    }

    /// Experts in memory take `bytes_max` bytes at most; others are delivered in an order that the source's seed decides.
    fn engine_of(&self, bytes_max: u64, source: Shuffled, options: EngineOptions) -> Engine {
        let machine = Machine::new(options.threads, options.kernels, PolicyKind::Lru);
        machine.experts().lock().set_bytes_max(bytes_max);
        self.put_together(&machine, source, options)
    }

    fn put_together(&self, machine: &Machine, source: Shuffled, options: EngineOptions) -> Engine {
        let experts = Experts::new(&self.manifest, PartKind::Text, machine.experts().clone(), Box::new(source));
        Engine::new(machine, self.model_on(machine), experts, options)
    }

    /// Reads blobs, as towers do.
    pub(crate) fn reader(&self) -> impl FnMut(BlobRef) -> Result<Arc<AlignedBytes>, std::io::Error> {
        |blob| {
            let mut bytes = AlignedBytes::zeroed(blob.length as usize);
            bytes.copy_from_slice(&self.blobs.get(blob));
            Ok(Arc::new(bytes))
        }
    }

    fn model_on(&self, machine: &Machine) -> Model {
        let mut read = |blob| {
            machine.tensor(blob, |bytes| {
                bytes.copy_from_slice(&self.blobs.get(blob));
                Ok::<_, std::io::Error>(())
            })
        };
        Model::load(Arc::clone(&self.manifest), PartKind::Text, &mut read).expect("the trunk is there")
    }
}

struct Shuffled {
    blobs: Arc<MemoryBlobs>,
    state: u64,
    coming: Vec<Arrival>,
    elsewhere: Option<ExpertRunner>,
}

impl Shuffled {
    fn new(model: &Imported, seed: u64) -> Self {
        Self { blobs: Arc::clone(&model.blobs), state: seed, coming: Vec::new(), elsewhere: None }
    }

    fn random(&mut self) -> usize {
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.state >> 33) as usize
    }

    fn weights(&self, ExpertRequest { slot, blob, mut buffer, .. }: ExpertRequest) -> Arrival {
        buffer.copy_from_slice(&self.blobs.get(blob));
        Arrival { slot, buffer, brought: Brought::Weights(Origin::Disk) }
    }
}

impl ExpertSource for Shuffled {
    fn request(&mut self, requests: Vec<ExpertRequest>, inputs: &LayerInputs<'_>) {
        for request in requests {
            let run = self.random().is_multiple_of(2);
            let Some(runner) = self.elsewhere.as_mut().filter(|_| run) else {
                self.coming.push(self.weights(request));
                continue;
            };
            let ExpertRequest { slot, blob, buffer, .. } = request;
            let bytes = AlignedBytes::copy_of(&self.blobs.get(blob));
            let expert = Expert::from_verified(bytes, runner.shape()).expect("an expert of the model");
            let mut rows = Vec::new();
            for row in inputs.rows_of(slot.expert) {
                let mut bytes = Vec::new();
                inputs.write_row(row, &mut bytes);
                rows.push(bytes);
            }
            let mut results = Vec::new();
            runner.run(&expert, &rows.iter().map(Vec::as_slice).collect::<Vec<_>>(), &mut results);
            let results = ExpertResults::from_bytes(&results, runner.shape().hidden_size).expect("whole rows");
            self.coming.push(Arrival { slot, buffer, brought: Brought::Results(results) });
        }
    }

    fn prefetch(&mut self, requests: Vec<ExpertRequest>) {
        for request in requests {
            self.coming.push(self.weights(request));
        }
    }

    fn hint(&mut self, _: &[BlobRef]) {}

    fn move_in(&mut self, request: ExpertRequest, _: Gain) {
        // One in three cannot be had.
        let lost = self.random().is_multiple_of(3);
        let Arrival { slot, buffer, .. } = self.weights(request);
        let origin = (!lost).then_some(Origin::Peer);
        self.coming.push(Arrival { slot, buffer, brought: Brought::MovedIn(origin) });
    }

    fn is_near(&self, _: &BlobRef) -> bool {
        true
    }

    fn receive(&mut self) -> Result<Arrival, SourceError> {
        let chosen = self.random() % self.coming.len();
        Ok(self.coming.swap_remove(chosen))
    }

    fn cancel(&mut self) {
        self.coming.clear();
    }
}

/// A tensor, ready to be written.
#[derive(Clone, PartialEq)]
pub(crate) struct Tensor {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

/// All tensors of a checkpoint, by name, wherever they are sharded.
pub(crate) fn read_tensors(dir: &Path) -> BTreeMap<String, Tensor> {
    let mut tensors = BTreeMap::new();
    for entry in fs::read_dir(dir).expect("a checkpoint is a directory").flatten() {
        if entry.path().extension().is_some_and(|extension| extension == "safetensors") {
            tensors.extend(read_safetensors(&entry.path()));
        }
    }
    tensors
}

/// The tensors of one file.
pub(crate) fn read_safetensors(path: &Path) -> BTreeMap<String, Tensor> {
    let bytes = fs::read(path).expect("a file of tensors");
    let file = SafeTensors::deserialize(&bytes).expect("a valid file of tensors");
    let owned = |(name, view): (String, TensorView<'_>)| {
        (name, Tensor { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data().to_vec() })
    };
    file.tensors().into_iter().map(owned).collect()
}

/// Values of an f32 tensor.
pub(crate) fn floats(tensor: &Tensor) -> Vec<f32> {
    assert_eq!(tensor.dtype, Dtype::F32);
    tensor.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// Values of an i64 tensor of token ids.
pub(crate) fn ids(tensor: &Tensor) -> Vec<u32> {
    assert_eq!(tensor.dtype, Dtype::I64);
    tensor.bytes.chunks_exact(8).map(|b| u32::try_from(i64::from_le_bytes(b.try_into().expect("eight bytes"))).expect("an id")).collect()
}

/// Writes a checkpoint of `tensors`, `per_shard` to a file, with an index, and the JSON files of `like`.
pub(crate) fn write_checkpoint(dir: &Path, like: &Path, tensors: &BTreeMap<String, Tensor>, per_shard: usize) {
    fs::create_dir_all(dir).expect("creatable");
    for entry in fs::read_dir(like).expect("a checkpoint is a directory").flatten() {
        let name = entry.file_name();
        let json = name.to_string_lossy().ends_with(".json") && !name.to_string_lossy().ends_with(".index.json");
        if json {
            fs::copy(entry.path(), dir.join(name)).expect("copied");
        }
    }
    let names: Vec<_> = tensors.keys().collect();
    let mut weight_map = serde_json::Map::new();
    for (i, shard) in names.chunks(per_shard).enumerate() {
        let file = format!("model-{i:05}.safetensors");
        let views = shard.iter().map(|&name| {
            let tensor = &tensors[name];
            (name, TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).expect("a valid tensor"))
        });
        safetensors::serialize_to_file(views, None, &dir.join(&file)).expect("written");
        shard.iter().for_each(|&name| drop(weight_map.insert(name.clone(), file.clone().into())));
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": weight_map});
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).expect("written");
}

/// The model that ships with the project.
pub(crate) fn shipped_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/confrere-18m")
}

/// The same in `dir`, said to take `tokens` tokens: it writes on beyond what it was trained for.
pub(crate) fn shipped_model_of_length(dir: &Path, tokens: usize) {
    copy_shipped_model(dir);
    edit_json(&dir.join("config.json"), |json| json["max_position_embeddings"] = tokens.into());
}

/// A copy of it in `dir`, to be changed.
pub(crate) fn copy_shipped_model(dir: &Path) {
    for entry in fs::read_dir(shipped_model()).expect("it ships").flatten() {
        fs::copy(entry.path(), dir.join(entry.file_name())).expect("copied");
    }
}

/// Changes a file of JSON.
pub(crate) fn edit_json(path: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let mut json = serde_json::from_slice(&fs::read(path).expect("readable")).expect("JSON");
    change(&mut json);
    fs::write(path, json.to_string()).expect("written");
}
