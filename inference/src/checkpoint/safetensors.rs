//! Checkpoints as Hugging Face publishes them: `config.json`, an index, shards of safetensors, and files beside them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use protocol::manifest::SIDE_FILE_BYTES_MAX;
use serde_json::Value;

use super::families::Preprocessors;
use super::generation::parse_generation;
use super::header::read_header;
use super::{CheckpointError, CheckpointReader, FoundTensor, Problems, byte_level_bpe, not_found, python_json, refused};

/// Reads everything but the weights' values.
pub(super) fn open(dir: &Path) -> Result<CheckpointReader, CheckpointError> {
    let required = |name: &str| read_json(dir, name)?.ok_or_else(|| not_found(&dir.join(name)));
    let optional = |name: &str| read_json(dir, name).map(|json| json.unwrap_or(Value::Null));
    let config = required("config.json")?;
    let preprocessors =
        Preprocessors { pictures: optional("preprocessor_config.json")?, videos: optional("video_preprocessor_config.json")? };
    let tokenizer_config = optional("tokenizer_config.json")?;
    let chat_template = match read_side_file(dir, "chat_template.jinja")? {
        Some(bytes) => Some(String::from_utf8(bytes).map_err(|_| refused("chat_template.jinja", "is not UTF-8"))?),
        None => match chat_template(&tokenizer_config) {
            Some(template) => Some(template),
            None => chat_template(&optional("chat_template.json")?),
        },
    };
    let eos_token = special_token(&tokenizer_config["eos_token"]);
    let mut generation = parse_generation(&config, &optional("generation_config.json")?);
    let of_tokenizer = eos_token.as_deref().and_then(|token| added_token_id(&tokenizer_config, token));
    generation.eos_token_ids.extend(of_tokenizer.filter(|id| !generation.eos_token_ids.contains(id)));
    let (mut shards, mut all_files) = (Shards::default(), true);
    for (path, expected) in shard_list(dir)? {
        let file = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        match map_file(&path) {
            Ok(map) => shards.take(&file, map, expected.as_ref()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                shards.problems.add(&file, "the index names this file, and it is not there");
                all_files = false;
            }
            Err(source) => return Err(CheckpointError::Io { path: path.display().to_string(), source }),
        }
    }
    let Shards { files, tensors, problems, unreadable, .. } = shards;
    Ok(CheckpointReader {
        preprocessors,
        generation,
        tokenizer: tokenizer(dir, &tokenizer_config)?,
        chat_template,
        bos_token: special_token(&tokenizer_config["bos_token"]),
        eos_token,
        tensors,
        problems,
        unreadable,
        files,
        all_files,
        config,
    })
}

/// What the shards have, as far as they have been read.
#[derive(Default)]
struct Shards {
    files: Vec<Mmap>,
    tensors: Vec<FoundTensor>,
    problems: Problems,
    unreadable: BTreeSet<String>,
    /// Tensor to file.
    seen: HashMap<String, String>,
}

impl Shards {
    /// Takes in one shard; `expected` are the tensors that the index says it has.
    fn take(&mut self, file: &str, map: Mmap, expected: Option<&BTreeSet<String>>) {
        let tensors = match read_header(&map) {
            Ok(tensors) => tensors,
            Err(problems) => {
                for problem in problems {
                    match problem.tensor {
                        Some(tensor) => self.problems.add(&tensor, &format!("{} (in {file})", problem.what)),
                        None => self.problems.add(file, &problem.what),
                    }
                }
                // Its tensors are not missing, they are unreadable: said once, above.
                self.unreadable.extend(expected.into_iter().flatten().cloned());
                self.files.push(map);
                return;
            }
        };
        for name in expected.into_iter().flatten().filter(|name| !tensors.contains_key(*name)) {
            self.problems.add(name, &format!("the index places it in {file}, which does not have it"));
        }
        for (name, entry) in tensors {
            if expected.is_some_and(|expected| !expected.contains(&name)) {
                self.problems.add(&name, &format!("{file} has it, the index does not say so"));
            } else if let Some(first) = self.seen.insert(name.clone(), file.to_owned()) {
                self.problems.add(&name, &format!("stands in {first} and again in {file}"));
            } else {
                self.tensors.push(FoundTensor { name, entry, file: self.files.len() });
            }
        }
        self.files.push(map);
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
fn tokenizer(dir: &Path, tokenizer_config: &Value) -> Result<Result<Vec<u8>, Option<String>>, CheckpointError> {
    if let Some(bytes) = read_side_file(dir, "tokenizer.json")? {
        return Ok(Ok(python_json::without_mark(&bytes).to_vec()));
    }
    match (read_side_file(dir, "vocab.json")?, read_side_file(dir, "merges.txt")?) {
        (Some(vocab), Some(merges)) => {
            let made = byte_level_bpe::tokenizer_json(&vocab, &merges, tokenizer_config);
            Ok(made.map_err(Some))
        }
        (Some(_), None) => Ok(Err(Some("vocab.json is there, and merges.txt and tokenizer.json are not".to_owned()))),
        (None, Some(_)) => Ok(Err(Some("merges.txt is there, and vocab.json and tokenizer.json are not".to_owned()))),
        (None, None) => {
            let other =
                ["tokenizer.model", "spiece.model", "tekken.json", "tiktoken.model"].into_iter().find(|name| dir.join(name).exists());
            Ok(Err(other.map(|name| format!("the tokenizer is in {name}, which is not read, and tokenizer.json is not there"))))
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
