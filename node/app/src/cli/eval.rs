//! `confrere eval`: logits and perplexity, to compare with other programs.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use base::clock::{check_interrupted, interrupted, now_ms};
use base::failure::{Failure, Kind, io_failure};
use base::output::{byte_bar, note, print_json, print_line};
use clap::{Args, Subcommand};
use inference::generate::read as read_prompt;
use inference::perplexity::{PerplexityError, PerplexityReport, perplexity};
use inference::reference::reference_logits;
use protocol::ExpertSlot;
use runtime::command::{Context, EngineArgs, MediaLimitArgs, PeerArgs};
use runtime::data_dir::{LocalModel, OpenDataDir};
use runtime::federation::Federation;
use runtime::media::{Senses, prepare};
use runtime::message_files::read_messages;
use runtime::prompt::{Prompt, PromptError, default_sampling};
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
    #[arg(long, value_name = "FILE", required_unless_present = "messages")]
    tokens: Option<PathBuf>,
    /// A file with a JSON array of chat messages, whose parts may be pictures, sounds and videos: {"type": "image", "path": FILE}, audio and
    /// video alike; of a video also "fps", and "sound": true or FILE. A video may be a folder of pictures. The model's own template is used
    #[arg(long, value_name = "FILE", conflicts_with_all = ["tokens", "reference"])]
    messages: Option<PathBuf>,
    /// Where to write: safetensors with tensors `logits`, (tokens, vocab), f32, and `input_ids`, (tokens), i64
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Compute with the reference engine instead: slow, on other kernels
    #[arg(long)]
    reference: bool,
    #[command(flatten)]
    limits: MediaLimitArgs,
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

fn read_tokens(file: &Path) -> Result<Vec<u32>, Failure> {
    let tokens: Vec<u32> = serde_json::from_slice(&read(file)?)
        .map_err(|error| Failure::new(Kind::Usage, format!("{} is not a JSON array of token ids: {error}", file.display())))?;
    if tokens.is_empty() { Err(Failure::new(Kind::Usage, format!("{} has no tokens", file.display()))) } else { Ok(tokens) }
}

/// The tokens of a conversation, its media among them, and the logits after each.
fn logits_of_messages(
    context: &Context,
    args: &LogitsArgs,
    (open, federation, found): (&OpenDataDir, &Federation, &LocalModel),
    file: &Path,
) -> Result<(Vec<u32>, Vec<f32>), Failure> {
    let (messages, media) = read_messages(file)?;
    let limits = args.limits.limits();
    let senses = Senses { vision: found.manifest.vision(), audio: found.manifest.audio(), limits: &limits };
    let media = prepare(senses, &media)?;
    let mut loaded = federation.load(open, found, context.memory_max, args.engine.options(&found.manifest, None))?;
    let defaults = &found.manifest.generation;
    let prompt = Prompt::WithMedia(&messages, media);
    let request = loaded.text.request(prompt, (loaded.engine.context(), 1), default_sampling(defaults, 0), defaults);
    let request = request.map_err(PromptError::into_failure)?;
    request.check(loaded.engine.context())?;
    let mut values = Vec::new();
    let prompt = (&request.prompt[..], request.media.as_ref());
    read_prompt(&mut loaded.engine, &mut loaded.towers, prompt, |_, logits| {
        check_interrupted()?;
        values.extend_from_slice(logits);
        Ok::<_, Failure>(())
    })?;
    Ok((request.prompt, values))
}

fn logits(context: &Context, args: &LogitsArgs) -> Result<(), Failure> {
    let mut tokens = args.tokens.as_deref().map(read_tokens).transpose()?.unwrap_or_default();
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
    } else if let Some(file) = &args.messages {
        let values;
        (tokens, values) = logits_of_messages(context, args, (&open, &federation, &found), file)?;
        values
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
    let ids: Vec<u8> = tokens.iter().flat_map(|&token| i64::from(token).to_le_bytes()).collect();
    let ids = TensorView::new(Dtype::I64, vec![tokens.len()], &ids).map_err(|error| Failure::new(Kind::Other, error.to_string()))?;
    let tensors = HashMap::from([("logits", view), ("input_ids", ids)]);
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
    let slots: BTreeSet<_> = found.manifest.text().placed_experts().map(|(slot, _)| slot).collect();
    if let Some(slot) = args.without.iter().find(|slot| !slots.contains(slot)) {
        return Err(Failure::new(Kind::Usage, format!("{} has no {slot}", found.name)));
    }
    loaded.engine.left_out = args.without.iter().map(|&slot| slot.into()).collect();
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
