//! A checkpoint directory as published: configuration, index, shards. Opening one checks everything but the weights' values.

mod byte_level_bpe;
pub mod families;
pub mod generation;
pub mod header;
pub mod import;
pub mod names;
mod python_json;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use protocol::manifest::{GenerationDefaults, PartConfig, SIDE_FILE_BYTES_MAX};
use protocol::plain_text::{LINES_MAX, plain_line};
use protocol::{Decoder, ExpertSlot, PartKind, Precision};
use serde_json::Value;

use families::{Family, ParsedConfig, Preprocessors, parse_config};
use generation::parse_generation;
use header::{TensorEntry, read_header};
use names::{Names, Projection, Role};

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
        let required = |name: &str| read_json(dir, name)?.ok_or_else(|| not_found(&dir.join(name)));
        let json = required("config.json")?;
        let preprocessors = Preprocessors {
            pictures: read_json(dir, "preprocessor_config.json")?.unwrap_or(Value::Null),
            videos: read_json(dir, "video_preprocessor_config.json")?.unwrap_or(Value::Null),
        };
        let ParsedConfig { parts, family } = parse_config(&json, &preprocessors).map_err(|problem| refused("config.json", &problem.0))?;
        let generation = read_json(dir, "generation_config.json")?.unwrap_or(Value::Null);
        let tokenizer_config = read_json(dir, "tokenizer_config.json")?.unwrap_or(Value::Null);
        let chat_template = match read_side_file(dir, "chat_template.jinja")? {
            Some(bytes) => Some(String::from_utf8(bytes).map_err(|_| refused("chat_template.jinja", "is not UTF-8"))?),
            None => match chat_template(&tokenizer_config) {
                Some(template) => Some(template),
                None => chat_template(&read_json(dir, "chat_template.json")?.unwrap_or(Value::Null)),
            },
        };
        let shard_list = shard_list(dir)?;
        check_size(&parts, &shard_list)?;
        let mut collected = Collector::new(parts, family);
        let mut shards = Vec::new();
        for (path, expected) in shard_list {
            let file = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
            let map = match map_file(&path) {
                Ok(map) => map,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    collected.problem(&file, "the index names this file, and it is not there");
                    continue;
                }
                Err(source) => return Err(CheckpointError::Io { path: path.display().to_string(), source }),
            };
            collected.shard(&file, shards.len(), &map, expected.as_ref());
            shards.push(map);
        }
        let (parts, skipped, tied_head) = collected.finish()?;
        let eos_token = special_token(&tokenizer_config["eos_token"]);
        let mut generation = parse_generation(&json, &generation);
        let of_tokenizer = eos_token.as_deref().and_then(|token| added_token_id(&tokenizer_config, token));
        generation.eos_token_ids.extend(of_tokenizer.filter(|id| !generation.eos_token_ids.contains(id)));
        let (tokenizer, unread_tokenizer) = tokenizer(dir, &tokenizer_config)?;
        Ok(Self {
            generation,
            parts,
            tokenizer,
            unread_tokenizer,
            chat_template,
            bos_token: special_token(&tokenizer_config["bos_token"]),
            eos_token,
            skipped,
            tied_head,
            shards,
        })
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
    seen: HashMap<String, String>, // tensor to file
}

/// A part in the making.
struct Collecting {
    config: PartConfig,
    shapes: Vec<(String, Vec<u64>)>, // of the trunk, by usual name
    trunk: Vec<Option<TensorSource>>,
}

type Collected = (Vec<PartTensors>, BTreeMap<&'static str, (usize, u64)>, Option<TensorSource>);

impl Collector {
    fn new(parts: Vec<PartConfig>, family: &'static Family) -> Self {
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
            problems: Problems::default(),
            seen: HashMap::new(),
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

    /// Takes in one shard; `expected` are the tensors that the index says it has.
    fn shard(&mut self, file: &str, shard: usize, map: &[u8], expected: Option<&BTreeSet<String>>) {
        let tensors = match read_header(map) {
            Ok(tensors) => tensors,
            Err(problems) => {
                for problem in problems {
                    match problem.tensor {
                        Some(tensor) => self.problem(&tensor, format!("{} (in {file})", problem.what)),
                        None => self.problem(file, problem.what),
                    }
                }
                // Its tensors are not missing, they are unreadable: said once, above.
                let lost: Vec<_> = expected.into_iter().flatten().cloned().collect();
                lost.into_iter().for_each(|name| drop(self.seen.insert(name, file.to_owned())));
                return;
            }
        };
        for name in expected.into_iter().flatten().filter(|name| !tensors.contains_key(*name)) {
            self.problem(name, format!("the index places it in {file}, which does not have it"));
        }
        for (name, entry) in &tensors {
            if expected.is_some_and(|expected| !expected.contains(name)) {
                self.problem(name, format!("{file} has it, the index does not say so"));
            } else if let Some(first) = self.seen.insert(name.clone(), file.to_owned()) {
                self.problem(name, format!("stands in {first} and again in {file}"));
            } else {
                self.tensor(name, entry, shard);
            }
        }
    }

    fn tensor(&mut self, name: &str, entry: &TensorEntry, shard: usize) {
        let role = self.names.role(name);
        let sides = |kind: PartKind| {
            let decoder = self.decoder(kind);
            let shape = decoder.expert_shape(Precision::F32);
            (shape.hidden_size as u64, shape.intermediate_size as u64, u64::from(decoder.experts()))
        };
        let mut plane = 0;
        let expected: Vec<u64> = match role {
            Role::Skipped(part) => {
                let count = self.skipped.entry(part).or_default();
                *count = (count.0 + 1, count.1 + (entry.range.end - entry.range.start));
                return;
            }
            Role::Unexpected => return self.problem(name, "unexpected: a model of this configuration has no such tensor"),
            Role::Trunk(part, index) => self.parts[part].shapes[index].1.clone(),
            Role::Expert(slot, projection) => {
                let (hidden, middle, _) = sides(slot.part);
                if projection == Projection::Down { vec![hidden, middle] } else { vec![middle, hidden] }
            }
            Role::FusedGateUp(part, _) | Role::FusedDown(part, _) => {
                let (hidden, middle, experts) = sides(part);
                plane = hidden * middle;
                if matches!(role, Role::FusedDown(..)) { vec![experts, hidden, middle] } else { vec![experts, 2 * middle, hidden] }
            }
            Role::TiedHead => {
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
            Role::Trunk(part, index) => self.parts[part].trunk[index] = Some(whole),
            Role::TiedHead => self.tied_head = Some(whole),
            Role::Expert(slot, projection) => self.expert(slot, projection, whole),
            Role::FusedGateUp(part, layer) => {
                for expert in 0..self.decoder(part).experts() {
                    let (slot, at) = (ExpertSlot { part, layer, expert }, 2 * plane * u64::from(expert));
                    self.expert(slot, Projection::Gate, source(at, plane));
                    self.expert(slot, Projection::Up, source(at + plane, plane));
                }
            }
            Role::FusedDown(part, layer) => {
                for expert in 0..self.decoder(part).experts() {
                    let at = plane * u64::from(expert);
                    self.expert(ExpertSlot { part, layer, expert }, Projection::Down, source(at, plane));
                }
            }
            Role::Skipped(_) | Role::Unexpected => {}
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
        let seen: BTreeSet<_> = self.seen.keys().filter_map(|name| self.names.usual(name)).collect();
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

/// A shard's path and the tensors that the index places in it.
type Shard = (PathBuf, Option<BTreeSet<String>>);

/// The shards in order, each with the tensors that the index places in it; without an index there is one file.
fn shard_list(dir: &Path) -> Result<Vec<Shard>, CheckpointError> {
    const INDEX: &str = "model.safetensors.index.json";
    let Some(index) = read_json(dir, INDEX)? else {
        let single = dir.join("model.safetensors");
        return if single.exists() { Ok(vec![(single, None)]) } else { Err(not_found(&dir.join(INDEX))) };
    };
    let map = index["weight_map"].as_object().ok_or_else(|| refused(INDEX, "has no weight_map"))?;
    let mut shards: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for (tensor, file) in map {
        let file = file.as_str().unwrap_or("");
        // A name from a file is a name, never a path.
        if file.is_empty() || file.contains(['/', '\\', '\0']) || file.starts_with('.') {
            return Err(refused(INDEX, &format!("places {tensor} in {file:?}, which is not the name of a file beside it")));
        }
        shards.entry(file).or_default().insert(tensor.clone());
    }
    Ok(shards.into_iter().map(|(file, tensors)| (dir.join(file), Some(tensors))).collect())
}

/// Refuses a configuration of more tensors than the shards' bytes can hold, before each of them is looked for.
fn check_size(parts: &[PartConfig], shards: &[Shard]) -> Result<(), CheckpointError> {
    const MATRICES: u64 = 3;
    let here: u64 = shards.iter().filter_map(|(path, _)| path.metadata().ok()).map(|file| file.len()).sum();
    let (mut experts, mut needed) = (0, 0_u64);
    for decoder in parts.iter().filter_map(PartConfig::decoder) {
        let count = u64::from(decoder.experts()) * decoder.moe_layers().count() as u64;
        // No weight takes less than half a byte in any format.
        let shape = decoder.expert_shape(Precision::F32);
        let one = MATRICES * (shape.hidden_size * shape.intermediate_size) as u64 / 2;
        (experts, needed) = (experts + count, needed.saturating_add(count.saturating_mul(one)));
    }
    let missing = shards.iter().any(|(path, _)| !path.exists());
    if !missing && needed > here {
        let what = format!("{experts} experts of this configuration take {needed} bytes or more; the files have {here}");
        return Err(refused("config.json", &what));
    }
    Ok(())
}

fn map_file(path: &Path) -> io::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: the map is only read. A file that shrinks meanwhile ends the import by a signal; nothing in the store
    // depends on it, and repeated, the import starts from what is there then.
    #[expect(unsafe_code, reason = "mapping a file is unsafe because others may change it")]
    unsafe {
        Mmap::map(&file)
    }
}

fn read_side_file(dir: &Path, name: &str) -> Result<Option<Vec<u8>>, CheckpointError> {
    let path = dir.join(name);
    let failed = |source| CheckpointError::Io { path: path.display().to_string(), source };
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound && dir.is_dir() => return Ok(None),
        Err(source) => return Err(failed(source)),
    };
    let mut bytes = Vec::new();
    file.take(SIDE_FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > SIDE_FILE_BYTES_MAX {
        return Err(refused(name, &format!("is longer than {SIDE_FILE_BYTES_MAX} bytes")));
    }
    Ok(Some(bytes))
}

fn read_json(dir: &Path, name: &str) -> Result<Option<Value>, CheckpointError> {
    let Some(bytes) = read_side_file(dir, name)? else { return Ok(None) };
    python_json::parse(&bytes).map(Some).map_err(|error| refused(name, &format!("is not valid JSON: {error}")))
}

/// The tokenizer: as `tokenizer.json` has it, or made of the files in which older libraries keep it; else why what there is cannot be read.
fn tokenizer(dir: &Path, tokenizer_config: &Value) -> Result<(Option<Vec<u8>>, Option<String>), CheckpointError> {
    if let Some(bytes) = read_side_file(dir, "tokenizer.json")? {
        return Ok((Some(python_json::without_mark(&bytes).to_vec()), None));
    }
    match (read_side_file(dir, "vocab.json")?, read_side_file(dir, "merges.txt")?) {
        (Some(vocab), Some(merges)) => {
            let made = byte_level_bpe::tokenizer_json(&vocab, &merges, tokenizer_config);
            Ok(made.map_or_else(|why| (None, Some(why)), |bytes| (Some(bytes), None)))
        }
        (Some(_), None) => Ok((None, Some("vocab.json is there, and merges.txt and tokenizer.json are not".to_owned()))),
        (None, Some(_)) => Ok((None, Some("merges.txt is there, and vocab.json and tokenizer.json are not".to_owned()))),
        (None, None) => {
            let other =
                ["tokenizer.model", "spiece.model", "tekken.json", "tiktoken.model"].into_iter().find(|name| dir.join(name).exists());
            Ok((None, other.map(|name| format!("the tokenizer is in {name}, which is not read, and tokenizer.json is not there"))))
        }
    }
}

/// The template in `tokenizer_config.json`: one text, or a list of named ones of which we take the default.
fn chat_template(tokenizer_config: &Value) -> Option<String> {
    let template = &tokenizer_config["chat_template"];
    let named = || template.as_array()?.iter().find(|t| t["name"] == "default")?["template"].as_str();
    template.as_str().or_else(named).map(str::to_owned)
}

/// A special token stands as a text or as an object around it.
fn special_token(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value["content"].as_str()).filter(|text| !text.is_empty()).map(str::to_owned)
}

/// The id of a token that `tokenizer_config.json` lists.
fn added_token_id(tokenizer_config: &Value, token: &str) -> Option<u32> {
    let added = tokenizer_config["added_tokens_decoder"].as_object()?;
    added.iter().find(|(_, entry)| entry["content"] == token).and_then(|(id, _)| id.parse().ok())
}

fn refused(subject: &str, what: &str) -> CheckpointError {
    let mut problems = Problems::default();
    problems.add(subject, what);
    CheckpointError::Refused(problems)
}

fn not_found(path: &Path) -> CheckpointError {
    CheckpointError::Io { path: path.display().to_string(), source: io::ErrorKind::NotFound.into() }
}
