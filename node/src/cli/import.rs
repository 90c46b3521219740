//! `confrere import`: a published checkpoint becomes blobs in the store and a signed manifest.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use clap::Args;
use indicatif::ProgressBar;
use inference::checkpoint::Checkpoint;
use inference::checkpoint::import::{BlobSink, import as import_checkpoint};
use protocol::{BlobRef, ContentHash, Precision};
use serde_json::json;
use store::{BlobStore, PutOutcome, StoreError};

use super::Context;
use crate::clock::{interrupted, now_ms};
use crate::data_dir::{LocalModel, OpenDataDir};
use crate::failure::{Failure, Kind};
use crate::output::{byte_bar, human_bytes, note, print_json, print_line};

#[derive(Args)]
pub(super) struct ImportArgs {
    /// The checkpoint's directory: config.json, safetensors, tokenizer.json
    path: PathBuf,
    /// What to call the model here [default: the directory's name]
    #[arg(long)]
    name: Option<String>,
    /// Convert the weights: f32, f16 or bf16 [default: as they are]
    #[arg(long)]
    precision: Option<Precision>,
}

pub(super) fn import(context: &Context, args: &ImportArgs) -> Result<(), Failure> {
    let mut open = context.lock()?;
    let model = import_into(&mut open, &args.path, args.name.as_deref(), args.precision)?;
    if context.json {
        let experts = model.manifest.experts.len();
        return print_json(
            &json!({"name": model.name, "id": model.id.to_string(), "experts": experts, "bytes": model.bytes_present(&open.store)}),
        );
    }
    print_line(&model.id.to_string())
}

/// Imports the checkpoint at `path`. One that is refused leaves nothing behind; one that is interrupted can go on.
pub(super) fn import_into(
    open: &mut OpenDataDir,
    path: &Path,
    name: Option<&str>,
    precision: Option<Precision>,
) -> Result<LocalModel, Failure> {
    if let Some(name) = name {
        open.check_name(name, None)?;
    }
    if !path.is_dir() {
        return Err(Failure::new(Kind::NotFound, format!("cannot read {}: it is not a directory with a checkpoint", path.display())));
    }
    let checkpoint = Checkpoint::open(path)?;
    for (part, (tensors, bytes)) in &checkpoint.skipped {
        note(&format!("left out: {part} ({tensors} tensors, {})", human_bytes(*bytes)));
    }
    if checkpoint.tokenizer.is_none() {
        note("warning: the checkpoint has no tokenizer.json; prompts are token ids, such as [1, 2, 3]");
    }
    let bar = byte_bar(checkpoint.total_bytes(), "import");
    let sink = StoreSink { store: &open.store, bar, written: Mutex::default(), failed: Mutex::default() };
    let imported = import_checkpoint(&checkpoint, precision, &sink);
    sink.bar.finish_and_clear();
    let StoreSink { written, failed, .. } = sink;
    let named = imported.map_err(|error| match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(cause) => Failure::from(cause),
        None => error.into(),
    });
    let named = named.and_then(|manifest| name.map_or(Ok(()), |name| open.check_name(name, Some(manifest.id()))).map(|()| manifest));
    open.store.flush();
    let manifest = match named {
        Ok(manifest) => manifest,
        Err(failure) if failure.kind == Kind::Interrupted => return Err(failure),
        Err(failure) => {
            for hash in written.into_inner().unwrap_or_else(PoisonError::into_inner) {
                open.store.remove(&hash)?;
            }
            return Err(failure);
        }
    };
    let envelope = manifest.seal(&open.dir.key()?);
    let suggested = name.map(str::to_owned).or_else(|| free_name(open, path, &manifest.id()));
    let model = open.keep(suggested.as_deref(), manifest, &envelope)?;
    note(&format!("imported {} ({} experts, {})", model.name, model.manifest.experts.len(), human_bytes(model.manifest.total_bytes())));
    Ok(model)
}

/// The directory's name, if it can name this model.
fn free_name(open: &OpenDataDir, path: &Path, id: &protocol::ModelId) -> Option<String> {
    let path = path.canonicalize().ok()?;
    let name = path.file_name()?.to_str()?;
    open.check_name(name, Some(*id)).is_ok().then(|| name.to_owned())
}

struct StoreSink<'a> {
    store: &'a BlobStore,
    bar: ProgressBar,
    written: Mutex<Vec<ContentHash>>,
    failed: Mutex<Option<StoreError>>,
}

impl BlobSink for StoreSink<'_> {
    fn put(&self, bytes: &[u8]) -> Result<BlobRef, String> {
        match self.store.put(bytes, now_ms()) {
            Ok((blob, outcome)) => {
                if outcome == PutOutcome::Written {
                    self.written.lock().unwrap_or_else(PoisonError::into_inner).push(blob.hash);
                }
                Ok(blob)
            }
            Err(error) => {
                let text = error.to_string();
                self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                Err(text)
            }
        }
    }

    fn progress(&self, bytes_done: u64) -> bool {
        self.bar.set_position(bytes_done);
        !interrupted()
    }
}
