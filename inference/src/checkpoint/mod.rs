//! A checkpoint directory as published: configuration, index, shards. Opening one checks everything but the weights' values.

mod byte_level_bpe;
pub mod families;
pub mod generation;
pub mod header;
pub mod import;
pub mod names;
mod python_json;
mod safetensors;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::io;
use std::path::Path;

use memmap2::Mmap;
use protocol::manifest::{GenerationDefaults, PartConfig};
use protocol::plain_text::{LINES_MAX, plain_line};
use protocol::{Decoder, ExpertSlot, PartKind, Precision};
use serde_json::Value;

use families::{Family, ParsedConfig, Preprocessors, parse_config};
use header::TensorEntry;
use names::{Names, Projection, TensorUse};

/// One thing that is wrong with a checkpoint.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Problem {
    /// The tensor or the file.
    pub subject: String,
    /// What is wrong with it.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject, self.what)
    }
}

/// Why a checkpoint is not imported.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// It is not there, or cannot be read.
    #[error("cannot read {path}")]
    Io {
        /// The file or directory.
        path: String,
        /// Why not.
        source: io::Error,
    },
    /// It is incomplete or damaged: everything that is wrong with it.
    #[error("checkpoint is refused: {} problem{}\n{}", .0.count, if .0.count == 1 { "" } else { "s" }, .0)]
    Refused(Problems),
}

/// Of a long list, the first are kept and the others counted.
pub const PROBLEMS_KEPT_MAX: usize = LINES_MAX;

/// What is wrong with a checkpoint.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Problems {
    /// The first in the order of their names, each once.
    kept: BTreeSet<Problem>,
    /// All of them.
    count: usize,
}

impl Problems {
    /// Adds one. Memory is bounded, however many there are.
    pub fn add(&mut self, subject: &str, what: &str) {
        self.count += 1;
        self.kept.insert(Problem { subject: plain_line(subject), what: plain_line(what) });
        if self.kept.len() > PROBLEMS_KEPT_MAX {
            self.kept.pop_last();
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// How many there are, those that are not kept among them.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Those that are kept.
    pub fn kept(&self) -> impl Iterator<Item = &Problem> {
        self.kept.iter()
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let more = self.count - self.kept.len();
        let shown = self.kept.iter().map(|problem| format!("  {problem}"));
        f.write_str(&shown.chain((more > 0).then(|| format!("  … and {more} more"))).collect::<Vec<_>>().join("\n"))
    }
}

/// A checkpoint as it was read: what a maker of any file format hands on.
struct CheckpointReader {
    /// As `config.json` has it.
    config: Value,
    preprocessors: Preprocessors,
    generation: GenerationDefaults,
    /// `tokenizer.json`, or what it would be; else why there is none, if there is something.
    tokenizer: Result<Vec<u8>, Option<String>>,
    chat_template: Option<String>,
    bos_token: Option<String>,
    eos_token: Option<String>,
    tensors: Vec<FoundTensor>,
    /// What is wrong with the files.
    problems: Problems,
    /// Tensors that are there and cannot be read.
    unreadable: BTreeSet<String>,
    files: Vec<Mmap>,
    /// Whether every file that should be there is.
    all_files: bool,
}

/// A tensor of a file.
struct FoundTensor {
    name: String,
    entry: TensorEntry,
    /// Of the files.
    file: usize,
}

/// A tensor's bytes, in the map of its shard.
#[derive(Clone, Debug)]
pub struct TensorSource {
    /// Its name as published.
    pub name: String,
    /// Its number format.
    pub precision: Precision,
    shard: usize,
    start: usize,
    end: usize,
}

/// Where an expert's three matrices stand.
#[derive(Clone, Debug)]
pub struct ExpertTensors {
    /// (intermediate_size, hidden_size)
    pub gate_proj: TensorSource,
    /// (intermediate_size, hidden_size)
    pub up_proj: TensorSource,
    /// (hidden_size, intermediate_size)
    pub down_proj: TensorSource,
}

/// A part of a checkpoint.
#[derive(Debug)]
pub struct PartTensors {
    /// Its shape.
    pub config: PartConfig,
    /// In the order of [`PartConfig::tensors`].
    pub trunk: Vec<TensorSource>,
    /// Layer by layer.
    pub experts: Vec<ExpertTensors>,
    /// The number format of all its experts.
    pub expert_precision: Precision,
}

/// A checkpoint of which every tensor is accounted for.
#[derive(Debug)]
pub struct Checkpoint {
    /// The parts, in the order of a manifest; the first makes text.
    pub parts: Vec<PartTensors>,
    /// Sampling and stop rules.
    pub generation: GenerationDefaults,
    /// `tokenizer.json`, or what it would be; nothing where there is no tokenizer that can be read.
    pub tokenizer: Option<Vec<u8>>,
    /// Why there is none, where the checkpoint has one in another form.
    pub unread_tokenizer: Option<String>,
    /// The chat template, if there is one.
    pub chat_template: Option<String>,
    /// What templates call `bos_token`.
    pub bos_token: Option<String>,
    /// What templates call `eos_token`.
    pub eos_token: Option<String>,
    /// Tensors left out by rule: which part, how many, how many bytes.
    pub skipped: BTreeMap<&'static str, (usize, u64)>,
    /// The head of a tied model, where the checkpoint repeats it.
    tied_head: Option<TensorSource>,
    shards: Vec<Mmap>,
}

impl Checkpoint {
    /// Opens the checkpoint in `dir` and checks names, shapes, number formats and places of all tensors.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        Self::of(safetensors::open(dir)?)
    }

    /// Sorts what was read by what it is for, whoever read it.
    fn of(reader: CheckpointReader) -> Result<Self, CheckpointError> {
        let CheckpointReader {
            config,
            preprocessors,
            generation,
            tokenizer,
            chat_template,
            bos_token,
            eos_token,
            tensors,
            problems,
            unreadable,
            files,
            all_files,
        } = reader;
        let ParsedConfig { parts, family } = parse_config(&config, &preprocessors).map_err(|problem| refused("config.json", &problem.0))?;
        if all_files {
            check_size(&parts, files.iter().map(|file| file.len() as u64).sum())?;
        }
        let mut collected = Collector::new(parts, family, problems, unreadable);
        for FoundTensor { name, entry, file } in &tensors {
            collected.tensor(name, entry, *file);
        }
        let (parts, skipped, tied_head) = collected.finish()?;
        let (tokenizer, unread_tokenizer) = tokenizer.map_or_else(|why| (None, why), |bytes| (Some(bytes), None));
        Ok(Self { generation, parts, tokenizer, unread_tokenizer, chat_template, bos_token, eos_token, skipped, tied_head, shards: files })
    }

    /// A tensor's bytes, from the map.
    pub fn bytes(&self, tensor: &TensorSource) -> &[u8] {
        &self.shards[tensor.shard][tensor.start..tensor.end]
    }

    /// Bytes of all tensors that an import reads.
    pub fn total_bytes(&self) -> u64 {
        let experts = self.parts.iter().flat_map(|part| &part.experts).flat_map(|e| [&e.gate_proj, &e.up_proj, &e.down_proj]);
        let trunk = self.parts.iter().flat_map(|part| &part.trunk);
        trunk.chain(experts).map(|tensor| (tensor.end - tensor.start) as u64).sum()
    }
}

/// What the shards hold, sorted by what it is for.
struct Collector {
    names: Names,
    parts: Vec<Collecting>,
    experts: HashMap<(ExpertSlot, Projection), TensorSource>,
    tied_head: Option<TensorSource>,
    skipped: BTreeMap<&'static str, (usize, u64)>,
    problems: Problems,
    /// Names that are there, readable or not.
    seen: BTreeSet<String>,
}

/// A part in the making.
struct Collecting {
    config: PartConfig,
    shapes: Vec<(String, Vec<u64>)>, // of the trunk, by usual name
    trunk: Vec<Option<TensorSource>>,
}

type Collected = (Vec<PartTensors>, BTreeMap<&'static str, (usize, u64)>, Option<TensorSource>);

impl Collector {
    fn new(parts: Vec<PartConfig>, family: &'static Family, problems: Problems, unreadable: BTreeSet<String>) -> Self {
        let names = Names::new(&parts, family);
        let collecting = |config: PartConfig| {
            let shapes: Vec<_> = config.tensors().into_iter().map(|spec| (spec.role.to_string(), spec.shape)).collect();
            Collecting { trunk: vec![None; shapes.len()], shapes, config }
        };
        Self {
            names,
            parts: parts.into_iter().map(collecting).collect(),
            experts: HashMap::new(),
            tied_head: None,
            skipped: BTreeMap::new(),
            problems,
            seen: unreadable,
        }
    }

    /// The decoder of a part that a tensor's role was found in.
    fn decoder(&self, kind: PartKind) -> &Decoder {
        let part = self.parts.iter().find(|part| part.config.kind() == kind);
        part.and_then(|part| part.config.decoder()).expect("only parts with a decoder have experts")
    }

    fn problem(&mut self, subject: &str, what: impl AsRef<str>) {
        self.problems.add(subject, what.as_ref());
    }

    fn tensor(&mut self, name: &str, entry: &TensorEntry, shard: usize) {
        self.seen.insert(name.to_owned());
        let role = self.names.role(name);
        let sides = |kind: PartKind| {
            let decoder = self.decoder(kind);
            let shape = decoder.expert_shape(Precision::F32);
            (shape.hidden_size as u64, shape.intermediate_size as u64, u64::from(decoder.experts()))
        };
        let mut plane = 0;
        let expected: Vec<u64> = match role {
            TensorUse::Skipped(part) => {
                let count = self.skipped.entry(part).or_default();
                *count = (count.0 + 1, count.1 + (entry.range.end - entry.range.start));
                return;
            }
            TensorUse::Unexpected => return self.problem(name, "unexpected: a model of this configuration has no such tensor"),
            TensorUse::Trunk(part, index) => self.parts[part].shapes[index].1.clone(),
            TensorUse::Expert(slot, projection) => {
                let (hidden, middle, _) = sides(slot.part);
                if projection == Projection::Down { vec![hidden, middle] } else { vec![middle, hidden] }
            }
            TensorUse::FusedGateUp(part, _) | TensorUse::FusedDown(part, _) => {
                let (hidden, middle, experts) = sides(part);
                plane = hidden * middle;
                if matches!(role, TensorUse::FusedDown(..)) { vec![experts, hidden, middle] } else { vec![experts, 2 * middle, hidden] }
            }
            TensorUse::TiedHead => {
                let decoder = self.decoder(PartKind::Text);
                vec![u64::from(decoder.vocab_size), u64::from(decoder.hidden_size)]
            }
        };
        if entry.shape != expected {
            return self.problem(name, format!("has shape {:?}, expected {expected:?}", entry.shape));
        }
        let Some(precision) = entry.precision else {
            return self.problem(name, format!("has dtype {}, expected F32, F16 or BF16", entry.dtype));
        };
        let source = |start: u64, bytes: u64| TensorSource {
            name: name.to_owned(),
            precision,
            shard,
            start: (entry.range.start + start) as usize,
            end: (entry.range.start + start + bytes) as usize,
        };
        let plane = plane * precision.matrix_bytes(1, 1) as u64;
        let whole = source(0, entry.range.end - entry.range.start);
        match role {
            TensorUse::Trunk(part, index) => self.parts[part].trunk[index] = Some(whole),
            TensorUse::TiedHead => self.tied_head = Some(whole),
            TensorUse::Expert(slot, projection) => self.expert(slot, projection, whole),
            TensorUse::FusedGateUp(part, layer) => {
                for expert in 0..self.decoder(part).experts() {
                    let (slot, at) = (ExpertSlot { part, layer, expert }, 2 * plane * u64::from(expert));
                    self.expert(slot, Projection::Gate, source(at, plane));
                    self.expert(slot, Projection::Up, source(at + plane, plane));
                }
            }
            TensorUse::FusedDown(part, layer) => {
                for expert in 0..self.decoder(part).experts() {
                    let at = plane * u64::from(expert);
                    self.expert(ExpertSlot { part, layer, expert }, Projection::Down, source(at, plane));
                }
            }
            TensorUse::Skipped(_) | TensorUse::Unexpected => {}
        }
    }

    fn expert(&mut self, slot: ExpertSlot, projection: Projection, source: TensorSource) {
        let name = source.name.clone();
        if let Some(other) = self.experts.insert((slot, projection), source) {
            self.problem(&name, format!("gives {slot} a second {projection:?} projection, beside {}", other.name));
        }
    }

    /// Lists what is missing; returns everything in a manifest's order when nothing is wrong.
    fn finish(mut self) -> Result<Collected, CheckpointError> {
        // Those that are there, unreadable or refused for another reason, are not missing.
        let seen: BTreeSet<_> = self.seen.iter().filter_map(|name| self.names.usual(name)).collect();
        let mut problems = std::mem::take(&mut self.problems);
        let mut parts = Vec::new();
        for Collecting { config, shapes, trunk } in self.parts {
            let kind = config.kind();
            let missing = |name: &str| !seen.contains(&(kind, name.into()));
            for ((name, _), _) in shapes.iter().zip(&trunk).filter(|(_, found)| found.is_none()) {
                if missing(name) {
                    problems.add(&self.names.spell(kind, name), "missing");
                }
            }
            let mut experts = Vec::new();
            for slot in config.slots() {
                let names = [(Projection::Gate, "gate_proj"), (Projection::Up, "up_proj"), (Projection::Down, "down_proj")];
                let found = names.map(|(projection, word)| {
                    let tensor = self.experts.remove(&(slot, projection));
                    let layer = format!("model.layers.{}.mlp.experts", slot.layer);
                    let name = format!("{layer}.{}.{word}.weight", slot.expert);
                    let fused = format!("{layer}.{}", if word == "down_proj" { word } else { "gate_up_proj" });
                    if tensor.is_none() && missing(&name) && missing(&fused) {
                        problems.add(&self.names.spell(kind, &name), "missing");
                    }
                    tensor
                });
                if let [Some(gate_proj), Some(up_proj), Some(down_proj)] = found {
                    experts.push(ExpertTensors { gate_proj, up_proj, down_proj });
                }
            }
            // Experts of one part share one format: their hashes must not depend on which shard they came in.
            let expert_precision = experts.first().map_or(Precision::F32, |expert| expert.gate_proj.precision);
            let tensors = experts.iter().flat_map(|e| [&e.gate_proj, &e.up_proj, &e.down_proj]);
            for tensor in tensors.filter(|tensor| tensor.precision != expert_precision) {
                problems.add(&tensor.name, &format!("is {}, while other experts are {expert_precision}", tensor.precision));
            }
            parts.push((shapes.len(), PartTensors { config, trunk: trunk.into_iter().flatten().collect(), experts, expert_precision }));
        }
        if !problems.is_empty() {
            return Err(CheckpointError::Refused(problems));
        }
        assert!(
            parts.iter().all(|(tensors, part)| part.trunk.len() == *tensors),
            "what is absent is unreadable or wrong, and so a problem"
        );
        Ok((parts.into_iter().map(|(_, part)| part).collect(), self.skipped, self.tied_head))
    }
}

/// Refuses a configuration of more tensors than the files' bytes can hold, before each of them is looked for.
fn check_size(parts: &[PartConfig], here: u64) -> Result<(), CheckpointError> {
    const MATRICES: u64 = 3;
    let (mut experts, mut needed) = (0, 0_u64);
    for decoder in parts.iter().filter_map(PartConfig::decoder) {
        let count = u64::from(decoder.experts()) * decoder.moe_layers().count() as u64;
        // No weight takes less than half a byte in any format.
        let shape = decoder.expert_shape(Precision::F32);
        let one = MATRICES * (shape.hidden_size * shape.intermediate_size) as u64 / 2;
        (experts, needed) = (experts + count, needed.saturating_add(count.saturating_mul(one)));
    }
    if needed > here {
        let what = format!("{experts} experts of this configuration take {needed} bytes or more; the files have {here}");
        return Err(refused("config.json", &what));
    }
    Ok(())
}

fn refused(subject: &str, what: &str) -> CheckpointError {
    let mut problems = Problems::default();
    problems.add(subject, what);
    CheckpointError::Refused(problems)
}

fn not_found(path: &Path) -> CheckpointError {
    CheckpointError::Io { path: path.display().to_string(), source: io::ErrorKind::NotFound.into() }
}
