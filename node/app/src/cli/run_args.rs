//! What `confrere run` is told, on the command line and by its input.

use std::io::{BufRead as _, Read as _};
use std::path::PathBuf;

use base::clock::while_waiting_for_input;
use base::failure::{Failure, Kind};
use base::output::print;
use clap::Args;
use runtime::command::{EngineArgs, MediaArgs, MediaLimitArgs, PeerArgs, RemoteArgs};

/// Longest prompt that is read from standard input, in bytes.
const STDIN_BYTES_MAX: u64 = 16 << 20;

#[derive(Args)]
pub(super) struct RunArgs {
    /// A name, an id or the beginning of an id
    pub(super) model: String,
    /// What to answer; without it, a conversation on a terminal, else standard input. Token ids ([1, 2, 3]) where there is no tokenizer
    pub(super) prompt: Option<String>,
    /// Most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub(super) max_tokens: usize,
    /// 0 takes the likeliest token [default: the model's own]
    #[arg(long, value_name = "T", value_parser = parse_temperature)]
    pub(super) temperature: Option<f32>,
    /// Choose among so many of the likeliest tokens; 0 for all
    #[arg(long, value_name = "K")]
    pub(super) top_k: Option<usize>,
    /// Choose among the likeliest tokens up to this probability
    #[arg(long, value_name = "P", value_parser = parse_probability)]
    pub(super) top_p: Option<f32>,
    /// Push down tokens that are there already; 1 for not at all
    #[arg(long, value_name = "R", value_parser = parse_penalty)]
    pub(super) repetition_penalty: Option<f32>,
    /// The same seed gives the same text
    #[arg(long, default_value_t = 0)]
    pub(super) seed: u64,
    /// Continue the text as it is, without the chat template
    #[arg(long)]
    pub(super) raw: bool,
    /// Write which experts are used to FILE, for `bench trace` and `plan`. It reveals much of the text: keep it to yourself
    #[arg(long, value_name = "FILE", conflicts_with = "no_log")]
    pub(super) trace: Option<PathBuf>,
    /// Do not count which experts are used. The counts stay on this node
    #[arg(long)]
    pub(super) no_log: bool,
    #[command(flatten)]
    pub(super) media: MediaArgs,
    #[command(flatten)]
    pub(super) limits: MediaLimitArgs,
    #[command(flatten)]
    pub(super) engine: EngineArgs,
    #[command(flatten)]
    pub(super) peers: PeerArgs,
    #[command(flatten)]
    pub(super) remote: RemoteArgs,
}

/// What the user says next, once he says something; nothing at the end of the input.
pub(super) fn next_line() -> Result<Option<String>, Failure> {
    loop {
        print("> ")?;
        let mut line = String::new();
        let read = while_waiting_for_input(|| std::io::stdin().lock().read_line(&mut line));
        match read.map_err(|error| Failure::new(Kind::Other, error.to_string()))? {
            0 => return Ok(None),
            _ if line.trim().is_empty() => {}
            _ => return Ok(Some(line.trim().to_owned())),
        }
    }
}

/// The whole of standard input, as a prompt.
pub(super) fn read_stdin() -> Result<String, Failure> {
    let mut text = String::new();
    let read = while_waiting_for_input(|| std::io::stdin().lock().take(STDIN_BYTES_MAX + 1).read_to_string(&mut text));
    read.map_err(|error| Failure::new(Kind::Usage, format!("cannot read the prompt from standard input: {error}")))?;
    if text.len() as u64 > STDIN_BYTES_MAX {
        return Err(Failure::new(Kind::Usage, format!("the prompt on standard input is longer than {STDIN_BYTES_MAX} bytes")));
    }
    // The line's end belongs to the shell that wrote it, not to the prompt.
    Ok(text.strip_suffix('\n').map(str::to_owned).unwrap_or(text))
}

fn parse_number(text: &str, fine: impl Fn(f32) -> bool, rule: &str) -> Result<f32, String> {
    text.parse().ok().filter(|&number| fine(number)).ok_or_else(|| format!("{text:?} is not {rule}"))
}

fn parse_temperature(text: &str) -> Result<f32, String> {
    parse_number(text, |t| (0.0..=100.0).contains(&t), "a number from 0 to 100")
}

fn parse_probability(text: &str) -> Result<f32, String> {
    parse_number(text, |p| p > 0.0 && p <= 1.0, "a number above 0, up to 1")
}

fn parse_penalty(text: &str) -> Result<f32, String> {
    parse_number(text, |p| p > 0.0 && p <= 100.0, "a number above 0, up to 100")
}
