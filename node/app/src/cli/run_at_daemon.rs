//! `confrere run` where a node serves from the same data directory: it is asked by its API, and answers as `run` itself would.

use std::io::IsTerminal as _;

use base::failure::{Failure, Kind, io_failure};
use base::output::{human_bytes, note, print, print_json};
use base64::Engine as _;
use inference::chat::MediumKind;
use runtime::command::Context;
use runtime::daemon::Daemon;
use runtime::media::{FPS_DEFAULT, GivenMedium, MediaSource};
use serde_json::{Value, json};

use super::run_args::{RunArgs, next_line, read_stdin};

/// An answer of the node, put together.
#[derive(Default)]
struct Answer {
    text: String,
    tokens: Vec<Value>,
    finish_reason: Value,
    usage: Value,
    timings: Value,
}

pub(super) fn run(context: &Context, args: &RunArgs, daemon: &Daemon) -> Result<(), Failure> {
    context.only_given(&[
        "model",
        "prompt",
        "max_tokens",
        "temperature",
        "top_k",
        "top_p",
        "repetition_penalty",
        "seed",
        "raw",
        "image",
        "audio",
        "video",
    ])?;
    note("note: the node that serves answers, with its own peers, threads and memory");
    let prompt = match &args.prompt {
        Some(prompt) => prompt.clone(),
        None if std::io::stdin().is_terminal() && !context.json => return converse(context, args, daemon),
        None => read_stdin()?,
    };
    let mut parts = args.media.media().iter().map(|given| part(given, args)).collect::<Result<Vec<_>, _>>()?;
    let content = if parts.is_empty() {
        json!(prompt)
    } else {
        parts.push(json!({"type": "text", "text": prompt}));
        json!(parts)
    };
    let what = if args.raw { json!({"prompt": prompt}) } else { json!({"messages": [{"role": "user", "content": content}]}) };
    let answer = ask(context, args, daemon, what)?;
    if context.json {
        print_json(&answer.json())?;
    } else {
        answer.end_line()?;
    }
    note(&answer.summary());
    Ok(())
}

/// A picture, a video or a sound as a part of a message.
fn part(given: &GivenMedium, args: &RunArgs) -> Result<Value, Failure> {
    let MediaSource::Path(path) = &given.source else { unreachable!("the command line names files") };
    let why = "a node that serves takes videos as files, two frames a second and without their sound";
    if path.is_dir() || given.sound.is_some() || given.fps.to_bits() != FPS_DEFAULT.to_bits() {
        return Err(Failure::new(Kind::Busy, format!("{}: {why}; stop that node to ask otherwise", path.display())));
    }
    let bytes = store::disk::read_file(path, args.limits.limits().bytes).map_err(|error| io_failure("read", path, &error))?;
    let bytes = bytes.ok_or_else(|| Failure::new(Kind::NotFound, format!("{} is not there", path.display())))?;
    let data = base64::engine::general_purpose::STANDARD.encode(bytes);
    Ok(match given.kind {
        MediumKind::Image => json!({"type": "image_url", "image_url": {"url": format!("data:image/*;base64,{data}")}}),
        MediumKind::Video => json!({"type": "video_url", "video_url": {"url": format!("data:video/*;base64,{data}")}}),
        MediumKind::Audio => json!({"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}),
    })
}

fn converse(context: &Context, args: &RunArgs, daemon: &Daemon) -> Result<(), Failure> {
    note("Ctrl-D ends the conversation");
    let (mut messages, mut text) = (Vec::new(), String::new());
    loop {
        let Some(line) = next_line()? else { return print("\n") };
        let requested = [&messages[..], &[json!({"role": "user", "content": line})]].concat();
        let continued = format!("{text}{line}");
        let what = if args.raw { json!({"prompt": continued}) } else { json!({"messages": requested}) };
        match ask(context, args, daemon, what) {
            Ok(answer) => {
                answer.end_line()?;
                note(&answer.summary());
                text = continued + &answer.text;
                messages = requested;
                messages.push(json!({"role": "assistant", "content": answer.text.trim()}));
            }
            Err(failure) if matches!(failure.kind, Kind::Interrupted | Kind::Unread) => return Err(failure),
            Err(failure) => note(&format!("error: {failure}")),
        }
    }
}

/// Asks, and shows the answer as it comes.
fn ask(context: &Context, args: &RunArgs, daemon: &Daemon, mut request: Value) -> Result<Answer, Failure> {
    let path = if args.raw { "/v1/completions" } else { "/v1/chat/completions" };
    let more = json!({
        "model": args.model, "max_tokens": args.max_tokens, "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k,
        "repetition_penalty": args.repetition_penalty, "seed": args.seed, "stream": true, "stream_options": {"include_usage": true},
        "return_token_ids": true,
    });
    for (name, value) in more.as_object().into_iter().flatten() {
        request[name] = value.clone();
    }
    let mut answer = Answer::default();
    context.wait(daemon.stream(path, &request, |chunk| answer.add(&chunk, !context.json)))?;
    Ok(answer)
}

impl Answer {
    fn add(&mut self, chunk: &Value, is_shown: bool) -> Result<(), Failure> {
        let choice = &chunk["choices"][0];
        let text = choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default();
        self.text.push_str(text);
        self.tokens.extend(choice["token_ids"].as_array().into_iter().flatten().cloned());
        if choice["finish_reason"].is_string() {
            self.finish_reason = choice["finish_reason"].clone();
        }
        if chunk["usage"].is_object() {
            (self.usage, self.timings) = (chunk["usage"].clone(), chunk["timings"].clone());
        }
        if is_shown && !text.is_empty() { print(text) } else { Ok(()) }
    }

    /// Ends the line of a streamed answer; without a tokenizer the answer is its token ids.
    fn end_line(&self) -> Result<(), Failure> {
        let ids = if self.text.is_empty() && !self.tokens.is_empty() { json!(self.tokens).to_string() } else { String::new() };
        print(&format!("{ids}\n"))
    }

    fn json(&self) -> Value {
        json!({
            "text": self.text, "tokens": self.tokens, "experts": self.usage["x_experts"], "stop_reason": self.finish_reason,
            "tokens_per_second": self.timings["predicted_per_second"], "timings": self.timings,
        })
    }

    /// The line after an answer.
    fn summary(&self) -> String {
        let experts = &self.usage["x_experts"];
        let count = |name: &str| experts[name].as_u64().unwrap_or(0);
        let peers: Vec<_> = experts["peers"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let from = if peers.is_empty() { String::new() } else { format!(" ({})", peers.join(", ")) };
        let ran = if count("remote") > 0 { format!(", {} run at peers", count("remote")) } else { String::new() };
        format!(
            "[experts: {} needed, {} had ({} in memory, {} on disk){ran}, {} fetched, {}{from}; {} tokens, {:.1} a second]",
            count("needed"),
            count("ram") + count("disk"),
            count("ram"),
            count("disk"),
            count("fetched"),
            human_bytes(count("bytes_fetched")),
            self.tokens.len(),
            self.timings["predicted_per_second"].as_f64().unwrap_or(0.0),
        )
    }
}
