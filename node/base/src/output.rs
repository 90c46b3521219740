//! What goes to the terminal: data to standard output, everything else to standard error.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::failure::{Failure, Kind};

static QUIET: AtomicBool = AtomicBool::new(false);

/// Switches notes and progress bars off.
pub fn be_quiet() {
    QUIET.store(true, Ordering::Relaxed);
}

/// Prints data. When nobody reads any more, there is nothing left to do.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::new(Kind::Unread, "nobody reads the output")),
        Err(error) => Err(Failure::new(Kind::Other, format!("cannot write to standard output: {error}"))),
    }
}

/// Prints lines of data, for a program that goes on whether anybody reads them or not.
pub fn announce(lines: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(lines.as_bytes()).and_then(|()| out.flush());
}

/// Prints a line of data.
pub fn print_line(line: &str) -> Result<(), Failure> {
    print(&format!("{line}\n"))
}

/// Prints one JSON value.
pub fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Failure::new(Kind::Other, error.to_string()))?;
    print_line(&text)
}

/// Tells the user something that is not data.
pub fn note(line: &str) {
    if !QUIET.load(Ordering::Relaxed) {
        let _ = writeln!(io::stderr(), "{line}");
    }
}

/// A progress bar over bytes, with rate and time left; on anything but a terminal it draws nothing.
pub fn byte_bar(total: u64, what: &str) -> ProgressBar {
    bar(total, what, "{prefix} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta} left")
}

/// A progress bar over things that are counted.
pub fn count_bar(total: u64, what: &str, things: &str) -> ProgressBar {
    bar(total, what, &format!("{{prefix}} {{bar:30}} {{pos}}/{{len}} {things} {{eta}} left"))
}

fn bar(total: u64, what: &str, template: &str) -> ProgressBar {
    let shown = io::stderr().is_terminal() && !QUIET.load(Ordering::Relaxed);
    let bar = ProgressBar::with_draw_target(Some(total), if shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() });
    bar.set_style(ProgressStyle::with_template(template).expect("the templates are valid"));
    bar.set_prefix(what.to_owned());
    bar
}

/// Bytes as people read them.
pub fn human_bytes(bytes: u64) -> String {
    indicatif::HumanBytes(bytes).to_string()
}
