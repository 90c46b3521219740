//! `confrere eval`: logits and perplexity, to compare with other programs.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use base::clock::{check_interrupted, interrupted, now_ms};
use base::failure::{Failure, Kind, io_failure};
use base::output::{byte_bar, note, print_json, print_line};
use clap::{Args, Subcommand};
use inference::perplexity::{PerplexityError, PerplexityReport, perplexity};
use inference::reference::reference_logits;
use protocol::ExpertSlot;
use runtime::command::{Context, EngineArgs, PeerArgs};
use runtime::federation::Federation;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

/// Tokens of a window of a text, unless the model's context is shorter or `--context` says otherwise.
const WINDOW_DEFAULT: u32 = 2048;

#[derive(Subcommand)]
pub(super) enum EvalCommand {
    /// Write the logits of some tokens to a file
    Logits(LogitsArgs),
    /// Say how well a model predicts a text
    Perplexity(PerplexityArgs),
}

#[derive(Args)]
pub(super) struct LogitsArgs {
    /// A name, an id or the beginning of an id
    model: String,
    /// A file with a JSON array of token ids
    #[arg(long, value_name = "FILE")]
    tokens: PathBuf,
    /// Where to write: safetensors with a tensor `logits`, (tokens, vocab), f32
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Compute with the reference engine instead: slow, on other kernels
    #[arg(long)]
    reference: bool,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    peers: PeerArgs,
}

#[derive(Args)]
pub(super) struct PerplexityArgs {
    /// A name, an id or the beginning of an id
    model: String,
    /// A text file; the byte 0x1e separates documents
    file: PathBuf,
    /// Leave out the results of these experts, to see what they are good for: LAYER:EXPERT, separated by commas
    #[arg(long, value_name = "SLOTS", value_delimiter = ',', value_parser = parse_slot)]
    without: Vec<ExpertSlot>,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    peers: PeerArgs,
}

pub(super) fn eval(context: &Context, command: &EvalCommand) -> Result<(), Failure> {
    match command {
        EvalCommand::Logits(args) => logits(context, args),
        EvalCommand::Perplexity(args) => measure(context, args),
    }
}

fn logits(context: &Context, args: &LogitsArgs) -> Result<(), Failure> {
    let text = read(&args.tokens)?;
    let tokens: Vec<u32> = serde_json::from_slice(&text)
        .map_err(|error| Failure::new(Kind::Usage, format!("{} is not a JSON array of token ids: {error}", args.tokens.display())))?;
    if tokens.is_empty() {
        return Err(Failure::new(Kind::Usage, format!("{} has no tokens", args.tokens.display())));
    }
    let open = context.lock()?;
    let federation = Federation::connect(context.runtime.handle(), &open.dir, &args.peers.options(), context.offline)?;
    let found = federation.find(&open, &args.model, None)?;
    let vocab_size = found.manifest.decoder().vocab_size as usize;
    let values = if args.reference {
        let mut read = |blob: protocol::BlobRef| {
            let bytes = open.store.read(&blob.hash, now_ms()).map_err(|error| error.to_string())?;
            bytes.ok_or_else(|| format!("{} is not here; confrere pull {} brings everything", blob.hash, found.name))
        };
        reference_logits(&found.manifest, &tokens, &mut read).map_err(|error| Failure::new(Kind::Other, error))?
    } else {
        let options = args.engine.options(&found.manifest, Some(tokens.len()));
        let mut engine = federation.load(&open, &found, context.memory_max, options)?.engine;
        let mut values = Vec::with_capacity(tokens.len() * vocab_size);
        let mut session = engine.session();
        engine.forward_each(&mut session, &tokens, |_, logits| {
            check_interrupted()?;
            values.extend_from_slice(logits);
            Ok::<_, Failure>(())
        })?;
        values
    };
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, vec![tokens.len(), vocab_size], &bytes)
        .map_err(|error| Failure::new(Kind::Other, error.to_string()))?;
    let tensors = HashMap::from([("logits", view)]);
    let file = safetensors::serialize(tensors, None).map_err(|error| Failure::new(Kind::Other, error.to_string()))?;
    // In place: what stands there may be a link or a device.
    std::fs::write(&args.out, file).map_err(|error| io_failure("write", &args.out, &error))?;
    if context.json {
        return print_json(&json!({"tokens": tokens.len(), "vocab": vocab_size, "out": args.out}));
    }
    note(&format!("wrote logits ({}, {vocab_size}) to {}", tokens.len(), args.out.display()));
    Ok(())
}

fn measure(context: &Context, args: &PerplexityArgs) -> Result<(), Failure> {
    let text =
        String::from_utf8(read(&args.file)?).map_err(|_| Failure::new(Kind::Usage, format!("{} is not UTF-8", args.file.display())))?;
    let open = context.lock()?;
    let federation = Federation::connect(context.runtime.handle(), &open.dir, &args.peers.options(), context.offline)?;
    let found = federation.find(&open, &args.model, None)?;
    let window = found.manifest.decoder().context.min(WINDOW_DEFAULT) as usize;
    let options = args.engine.options(&found.manifest, Some(window));
    let mut loaded = federation.load(&open, &found, context.memory_max, options)?;
    let missing = || Failure::new(Kind::Usage, "the model has no tokenizer, so it cannot read text");
    let tokenizer = loaded.text.tokenizer.as_ref().ok_or_else(missing)?;
    let slots: BTreeSet<_> = found.manifest.experts().map(|(slot, _)| slot).collect();
    if let Some(slot) = args.without.iter().find(|slot| !slots.contains(slot)) {
        return Err(Failure::new(Kind::Usage, format!("{} has no {slot}", found.name)));
    }
    loaded.engine.left_out.clone_from(&args.without);
    let bar = byte_bar(text.len() as u64, "perplexity");
    let (mut report, mut documents, mut before) = (PerplexityReport::default(), Vec::new(), 0);
    for document in text.split('\u{1e}') {
        let scored = perplexity(&mut loaded.engine, tokenizer, document, |done| {
            bar.set_position(before + done);
            !interrupted()
        });
        before += document.len() as u64 + 1;
        match scored {
            Ok(scored) => {
                report += scored;
                documents.push(json!({"tokens": scored.tokens, "nats": scored.nats}));
            }
            Err(PerplexityError::TooShort) => {}
            Err(error) => return Err(error.into()),
        }
    }
    bar.finish_and_clear();
    if report.tokens == 0 {
        return Err(PerplexityError::TooShort.into());
    }
    if context.json {
        return print_json(&json!({
            "tokens": report.tokens, "nats_per_token": report.nats_per_token(), "bits_per_byte": report.bits_per_byte(), "documents": documents,
        }));
    }
    print_line(&format!("{} tokens, {:.4} nats a token, {:.4} bits a byte", report.tokens, report.nats_per_token(), report.bits_per_byte()))
}

/// Reads LAYER:EXPERT.
fn parse_slot(text: &str) -> Result<ExpertSlot, String> {
    let slot = text.split_once(':').and_then(|(layer, expert)| Some(ExpertSlot::text(layer.parse().ok()?, expert.parse().ok()?)));
    slot.ok_or_else(|| format!("{text:?} is not LAYER:EXPERT, as in 3:17"))
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path).map_err(|error| io_failure("read", path, &error))
}
