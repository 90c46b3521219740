//! `confrere import`: a published checkpoint becomes blobs in the store and a signed manifest.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use base::clock::{interrupted, now_ms};
use base::failure::{Failure, Kind, io_failure};
use base::output::{byte_bar, human_bytes, note, print_json, print_line};
use clap::Args;
use indicatif::ProgressBar;
use inference::calibration::{Calibration, WINDOW};
use inference::chat::{ChatTemplate, TEMPLATE_BYTES_MAX};
use inference::checkpoint::Checkpoint;
use inference::checkpoint::import::{BlobSink, import as import_checkpoint};
use inference::convert::Target;
use inference::engine::{EngineOptions, KvPrecision};
use inference::requantize;
use inference::tokenizer::{SpecialTokens, Tokenizer};
use protocol::{BlobRef, ContentHash, ModelManifest, Precision};
use runtime::command::{Context, PeerArgs};
use runtime::data_dir::{LocalModel, OpenDataDir};
use runtime::federation::{Federation, other_parts, trunk_parts};
use runtime::prompt::{Chat, TemplateFault};
use serde_json::json;
use store::{BlobStore, PutOutcome, StoreError};

#[derive(Args)]
pub(super) struct ImportArgs {
    /// The checkpoint's directory: config.json, safetensors, tokenizer.json
    path: PathBuf,
    /// What to call the model here [default: the directory's name]
    #[arg(long)]
    name: Option<String>,
    /// Convert the weights: f32, f16, bf16, q8, q6, q4, q3 or q2 [default: as they are]
    #[arg(long)]
    precision: Option<Precision>,
    /// Convert the trunk's weights to another precision than the experts' [default: theirs, but q6 where that is less]
    #[arg(long, value_name = "PRECISION")]
    trunk_precision: Option<Precision>,
    /// Import the model although its tokenizer cannot be read: prompts are token ids then
    #[arg(long)]
    without_tokenizer: bool,
}

#[derive(Args)]
pub(super) struct RequantizeArgs {
    /// A name, an id or the beginning of an id
    model: String,
    /// What to convert the weights to: q8, q6, q4, q3, q2, or a plain format
    precision: Precision,
    /// Convert the trunk's weights to another precision than the experts' [default: theirs, but q6 where that is less]
    #[arg(long, value_name = "PRECISION")]
    trunk_precision: Option<Precision>,
    /// Text that the model reads before, so that rounding costs less: what it was trained on does best. The byte 0x1e separates documents; may be given again
    #[arg(long, value_name = "FILE")]
    calibrate: Vec<PathBuf>,
    /// What to call the new model here [default: the old name and the precision]
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    peers: PeerArgs,
}

/// What becomes of a checkpoint whose tokenizer cannot be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum UnreadTokenizer {
    Refused,
    LeftOut,
}

pub(super) fn import(context: &Context, args: &ImportArgs) -> Result<(), Failure> {
    let open = context.lock()?;
    let target = target(args.precision, args.trunk_precision);
    let unread = if args.without_tokenizer { UnreadTokenizer::LeftOut } else { UnreadTokenizer::Refused };
    let model = import_into(&open, &args.path, args.name.as_deref(), target, unread)?;
    report(context, &open, &model)
}

/// `confrere requantize`: a model that is here becomes another, of narrower weights.
pub(super) fn requantize(context: &Context, args: &RequantizeArgs) -> Result<(), Failure> {
    let open = context.lock()?;
    if let Some(name) = &args.name {
        open.check_name(name, None)?;
    }
    let federation = Federation::connect(context.runtime.handle(), &open.dir, &args.peers.options(), context.offline)?;
    let found = federation.find(&open, &args.model, None)?;
    let manifest = Arc::clone(&found.manifest);
    let parts = [trunk_parts(&manifest), other_parts(&manifest)].concat();
    federation.bring(&open.store, &parts, "model")?;
    let target = target(Some(args.precision), args.trunk_precision);
    let store = Arc::clone(&open.store);
    let read = |blob: BlobRef| -> Result<Vec<u8>, Failure> {
        let gone = || Failure::new(Kind::Other, format!("{} has gone from the store", blob.hash));
        store.read(&blob.hash, now_ms())?.ok_or_else(gone)
    };
    let suggested = Some(format!("{}-{}", found.name, args.precision));
    let mut loaded = None;
    let calibration = if args.calibrate.is_empty() {
        None
    } else {
        // Nothing here may depend on the machine: the same text makes the same model everywhere.
        let own = EngineOptions::for_model(&manifest);
        let options = EngineOptions { context: own.context.min(WINDOW), kv: KvPrecision::F32, ..own };
        let loaded = loaded.insert(federation.load(&open, &found, context.memory_max, options)?);
        Some(Calibration::new(&mut loaded.engine, &read_documents(&args.calibrate, loaded.text.tokenizer.as_deref())?)?)
    };
    let made = |sink: &dyn BlobSink| requantize::requantize(&manifest, target, calibration, &read, sink).map_err(Failure::from);
    let model = make_model(&open, (args.name.as_deref(), suggested), manifest.total_bytes(), "requantize", made)?;
    report(context, &open, &model)
}

/// The number formats that a user asked for.
fn target(precision: Option<Precision>, trunk: Option<Precision>) -> Target {
    let usual = precision.map(Target::usual).unwrap_or_default();
    Target { trunk: trunk.or(usual.trunk), ..usual }
}

/// The documents of some text files, each as tokens.
fn read_documents(files: &[PathBuf], tokenizer: Option<&Tokenizer>) -> Result<Vec<Vec<u32>>, Failure> {
    let tokenizer =
        tokenizer.ok_or_else(|| Failure::new(Kind::Usage, "the model has no tokenizer, so it cannot read text to calibrate with"))?;
    let mut documents = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(file).map_err(|error| io_failure("read", file, &error))?;
        for document in text.split('\u{1e}') {
            documents
                .push(tokenizer.encode(document, SpecialTokens::AsWritten).map_err(|error| Failure::new(Kind::Usage, error.to_string()))?);
        }
    }
    Ok(documents)
}

fn report(context: &Context, open: &OpenDataDir, model: &LocalModel) -> Result<(), Failure> {
    if context.json {
        let experts = model.manifest.experts_count();
        return print_json(
            &json!({"name": model.name, "id": model.id.to_string(), "experts": experts, "bytes": model.bytes_present(&open.store)}),
        );
    }
    print_line(&model.id.to_string())
}

/// Imports the checkpoint at `path`. One that is refused leaves nothing behind; one that is interrupted can go on.
pub(super) fn import_into(
    open: &OpenDataDir,
    path: &Path,
    name: Option<&str>,
    target: Target,
    unread: UnreadTokenizer,
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
    check_text(open, &checkpoint, unread)?;
    let suggested = directory_name(path).map(|name| target.experts.map_or(name.clone(), |precision| format!("{name}-{precision}")));
    let make = |sink: &dyn BlobSink| Ok(import_checkpoint(&checkpoint, target, sink)?);
    make_model(open, (name, suggested), checkpoint.total_bytes(), "import", make)
}

/// Tries what the checkpoint does with text, before hours are spent on its weights.
fn check_text(open: &OpenDataDir, checkpoint: &Checkpoint, unread: UnreadTokenizer) -> Result<(), Failure> {
    match (&checkpoint.tokenizer, &checkpoint.unread_tokenizer) {
        (Some(bytes), _) => open.dir.try_tokenizer(ContentHash::of(bytes), bytes)?,
        (None, Some(why)) if unread == UnreadTokenizer::Refused => {
            let message = format!("{why}; nothing could be said to the model (--without-tokenizer imports it all the same)");
            return Err(Failure::new(Kind::Integrity, message));
        }
        (None, _) => note("warning: the checkpoint has no tokenizer; prompts are token ids, such as [1, 2, 3]"),
    }
    let Some(source) = &checkpoint.chat_template else { return Ok(()) };
    if source.len() > TEMPLATE_BYTES_MAX {
        let message = format!("the chat template has {} bytes; {TEMPLATE_BYTES_MAX} is the limit", source.len());
        return Err(Failure::new(Kind::Integrity, message));
    }
    let (bos_token, eos_token) = (checkpoint.bos_token.clone(), checkpoint.eos_token.clone());
    let chat = Chat::new(ChatTemplate { source: source.clone(), bos_token, eos_token });
    match chat.fault() {
        None => {
            if chat.leaves_out_system() {
                note("warning: the chat template leaves out system messages: they have no effect on this model");
            }
            Ok(())
        }
        Some(fault @ TemplateFault::Fails(_)) => {
            note(&format!(
                "warning: the chat template cannot be used: {fault}; there can be no conversation with this model, only text to go on with (--raw)"
            ));
            Ok(())
        }
        Some(fault @ TemplateFault::Exceeds(_)) => Err(Failure::new(Kind::Integrity, format!("the chat template is refused: {fault}"))),
    }
}

/// Makes a model of new blobs and keeps it under the name that is wanted, else under the one suggested if that is free. When it fails, the
/// blobs go; when it is interrupted, they stay.
fn make_model(
    open: &OpenDataDir,
    (name, suggested): (Option<&str>, Option<String>),
    bytes: u64,
    what: &str,
    make: impl FnOnce(&dyn BlobSink) -> Result<ModelManifest, Failure>,
) -> Result<LocalModel, Failure> {
    let store = Arc::clone(&open.store);
    let sink = StoreSink { store: &store, bar: byte_bar(bytes, what), written: Mutex::default(), failed: Mutex::default() };
    let made = make(&sink);
    sink.bar.finish_and_clear();
    let StoreSink { written, failed, .. } = sink;
    let made = made.map_err(|failure| match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(cause) => Failure::from(cause),
        None => failure,
    });
    let named = made.and_then(|manifest| name.map_or(Ok(()), |name| open.check_name(name, Some(manifest.id()))).map(|()| manifest));
    store.flush();
    let manifest = match named {
        Ok(manifest) => manifest,
        Err(failure) if failure.kind == Kind::Interrupted => return Err(failure),
        Err(failure) => {
            for hash in written.into_inner().unwrap_or_else(PoisonError::into_inner) {
                store.remove(&hash)?;
            }
            return Err(failure);
        }
    };
    let envelope = manifest.seal(&open.dir.key()?);
    let suggested = suggested.filter(|name| open.check_name(name, Some(manifest.id())).is_ok());
    let model = open.keep(name.or(suggested.as_deref()), manifest, &envelope)?;
    let size = human_bytes(model.manifest.total_bytes());
    note(&format!("{} is here: {} experts at {}, {size}", model.name, model.manifest.experts_count(), model.manifest.precision_text()));
    Ok(model)
}

fn directory_name(path: &Path) -> Option<String> {
    Some(path.canonicalize().ok()?.file_name()?.to_str()?.to_owned())
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
