//! Work on what others have written, by libraries that trust it: chat templates and tokenizers. A template can take all memory or overflow the
//! stack, and a tokenizer can have the library allocate what it says; either ends the process in which it happens. So it happens in a child that
//! has little memory and time: this program, started again for one task.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use inference::chat::{ChatError, ChatTemplate, Message, Rendering};
use inference::tokenizer::{SpecialTokens, Tokenizer};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

/// What makes this program a child that does one task.
const CHILD_ARGUMENT: &str = "sandboxed-child";
/// Memory that a child may have beyond what the program itself takes, in bytes, and its time on a processor, in seconds.
const RENDER_LIMITS: Limits = Limits { memory_bytes: 256 << 20, processor_s: 4 };
const TOKENIZER_LIMITS: Limits = Limits { memory_bytes: 3 << 30, processor_s: 60 };
/// Longest text of an error that a child returns, in bytes.
const ERROR_BYTES_MAX: u64 = 64 << 10;

#[derive(Clone, Copy)]
struct Limits {
    memory_bytes: u64,
    processor_s: u64,
}

/// What a child does.
#[derive(Serialize, Deserialize)]
enum Task {
    Render { template: ChatTemplate, messages: Vec<Message>, rendering: Rendering },
    TryTokenizer(ByteBuf),
}

/// How it ended: the first byte of what a child writes, before the text.
const DONE: u8 = 0;
const RAISED: u8 = 1;
const FAILED: u8 = 2;

/// Why a conversation is not rendered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RenderError {
    /// The template refuses it, or has an error.
    Chat(ChatError),
    /// The child came to its limits, or could not be started.
    Exceeds(String),
}

/// Renders a conversation.
pub fn render(template: &ChatTemplate, messages: &[Message], rendering: Rendering) -> Result<String, RenderError> {
    let task = Task::Render { template: template.clone(), messages: messages.to_vec(), rendering };
    run(&task, RENDER_LIMITS, rendering.bytes_max as u64)
}

/// Reads a tokenizer and tries it on texts; says what is wrong with it.
pub fn try_tokenizer(bytes: &[u8]) -> Result<(), String> {
    let task = Task::TryTokenizer(ByteBuf::from(bytes));
    run(&task, TOKENIZER_LIMITS, ERROR_BYTES_MAX).map(drop).map_err(|error| match error {
        RenderError::Chat(ChatError::Raised(why) | ChatError::Failed(why)) | RenderError::Exceeds(why) => why,
    })
}

fn run(task: &Task, limits: Limits, bytes_max: u64) -> Result<String, RenderError> {
    let cannot = |error: std::io::Error| RenderError::Exceeds(format!("the process that works on it cannot be used: {error}"));
    let mut command = Command::new(own_program());
    command.arg(CHILD_ARGUMENT).arg(limits.memory_bytes.to_string()).arg(limits.processor_s.to_string()).env_clear();
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().map_err(cannot)?;
    // The child reads all before it writes anything. One that has ended already says by its status why.
    let mut to_child = child.stdin.take().expect("it is piped");
    let _ = to_child.write_all(&protocol::codec::to_bytes(task));
    drop(to_child);
    let mut output = Vec::new();
    let read = child.stdout.take().expect("it is piped").take(1 + bytes_max.max(ERROR_BYTES_MAX)).read_to_end(&mut output);
    let _ = child.kill(); // it has said all that it may
    let status = child.wait().map_err(cannot)?;
    read.map_err(cannot)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match output.split_first() {
        Some((&DONE, bytes)) => Ok(text(bytes)),
        Some((&RAISED, bytes)) => Err(RenderError::Chat(ChatError::Raised(text(bytes)))),
        Some((&FAILED, bytes)) => Err(RenderError::Chat(ChatError::Failed(text(bytes)))),
        _ => Err(RenderError::Exceeds(format!(
            "it needs more than {} MiB of memory, {} s, or too much of the stack ({status})",
            limits.memory_bytes >> 20,
            limits.processor_s
        ))),
    }
}

/// This very program, also when its file has been replaced meanwhile.
fn own_program() -> PathBuf {
    let own = PathBuf::from("/proc/self/exe");
    if own.exists() { own } else { std::env::current_exe().unwrap_or(own) }
}

/// Does a child's task, if this process is one; returns nothing for any other.
pub fn child() -> Option<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    if arguments.next()? != CHILD_ARGUMENT {
        return None;
    }
    let mut number = || arguments.next()?.parse().ok();
    let (Some(memory_bytes), Some(processor_s)) = (number(), number()) else { return Some(ExitCode::FAILURE) };
    restrict(Limits { memory_bytes, processor_s });
    let mut bytes = Vec::new();
    let read = std::io::stdin().lock().read_to_end(&mut bytes);
    let Some(task) = read.ok().and_then(|_| protocol::codec::from_bytes(&bytes).ok()) else { return Some(ExitCode::FAILURE) };
    drop(bytes);
    let (status, text) = match done(task) {
        Ok(text) => (DONE, text),
        Err(ChatError::Raised(why)) => (RAISED, why),
        Err(ChatError::Failed(why)) => (FAILED, why),
    };
    let mut output = std::io::stdout().lock();
    let written = output.write_all(&[status]).and_then(|()| output.write_all(text.as_bytes())).and_then(|()| output.flush());
    Some(if written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Takes from this process what its task does not need. Where the system does not know a limit, the others hold.
fn restrict(limits: Limits) {
    let set = |resource, most: u64| {
        let most = getrlimit(resource).maximum.map_or(most, |maximum| maximum.min(most));
        let _ = setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) });
    };
    let own_pages = std::fs::read_to_string("/proc/self/statm").ok().and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
    set(Resource::As, limits.memory_bytes + own_pages.unwrap_or(0) * rustix::param::page_size() as u64);
    set(Resource::Cpu, limits.processor_s);
    set(Resource::Core, 0);
    set(Resource::Fsize, 0);
}

fn done(task: Task) -> Result<String, ChatError> {
    match task {
        Task::Render { template, messages, rendering } => template.render(&messages, rendering),
        Task::TryTokenizer(bytes) => tried(&bytes).map(|()| String::new()).map_err(ChatError::Failed),
    }
}

/// Texts of which each takes another way through a tokenizer.
const TEXTS: [&str; 4] =
    ["Hello, world! 123\n\n\tfn main() {}", "é ﷺ 汉字 🦀 \u{301}\u{0}", "llllllllllllllll          ", "<s></s><|im_end|>[INST]"];
/// Tokens that a byte may become.
const TOKENS_PER_BYTE_MAX: usize = 4;
/// Tokens that are decoded together.
const DECODED_TOGETHER: usize = 64;

fn tried(bytes: &[u8]) -> Result<(), String> {
    let tokenizer = Tokenizer::from_bytes(bytes).map_err(|error| error.to_string())?;
    for text in TEXTS {
        for special in [SpecialTokens::Add, SpecialTokens::AsWritten] {
            let tokens = tokenizer.encode(text, special).map_err(|error| error.to_string())?;
            if tokens.len() > TOKENS_PER_BYTE_MAX * text.len() {
                return Err(format!("makes {} tokens of {} bytes", tokens.len(), text.len()));
            }
            tokenizer.decode(&tokens).map_err(|error| error.to_string())?;
        }
    }
    // Each token by itself as in a vocabulary's table, and with its neighbours as in an answer.
    let tokens: Vec<u32> = (0..tokenizer.token_count()).collect();
    for together in tokens.chunks(DECODED_TOGETHER) {
        tokenizer.decode(together).map_err(|error| error.to_string())?;
        together.iter().for_each(|&token| drop(tokenizer.bytes_of(token)));
    }
    Ok(())
}
