//! What the user asked for, read from the command line.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::str::FromStr;

use crate::Failure;

pub(crate) const PPM: u64 = 1_000_000;
const QUEUE_KB_DEFAULT: u64 = 512;
const PREFIX_DEFAULT: &str = "m";
const PREFIX_BYTES_MAX: usize = 32;

/// What the user asked for.
#[derive(Debug, PartialEq)]
pub(crate) struct Options {
    pub(crate) nodes: usize,
    pub(crate) lines: LineOptions,
    pub(crate) prefix: String,
    pub(crate) command: Option<String>, // for `sh -c`
}

/// What all lines of the star have in common.
#[derive(Debug, PartialEq)]
pub(crate) struct LineOptions {
    pub(crate) rate_mbit: f64,
    pub(crate) delay_ms: f64,
    pub(crate) loss_ppm: u64,
    pub(crate) queue_kb: u64,
}

impl Options {
    /// Returns nothing if only the usage was asked for.
    pub(crate) fn parse(arguments: impl Iterator<Item = String>) -> Result<Option<Self>, Failure> {
        let mut arguments = arguments.peekable();
        let mut given = Given::default();
        while let Some(name) = arguments.next_if(|argument| argument != "--") {
            if name == "--help" || name == "-h" {
                return Ok(None);
            }
            let value = arguments.next().ok_or_else(|| Failure::Usage(format!("{name} lacks its value")))?;
            given.set(&name, value)?;
        }
        given.completed(shell_line(&arguments.skip(1).collect::<Vec<_>>())).map(Some)
    }
}

/// The options that were on the command line.
#[derive(Default)]
struct Given {
    nodes: Option<usize>,
    rate_mbit: Option<f64>,
    delay_ms: Option<f64>,
    loss_ppm: Option<u64>,
    queue_kb: Option<u64>,
    prefix: Option<String>,
}

impl Given {
    fn set(&mut self, name: &str, value: String) -> Result<(), Failure> {
        match name {
            "--nodes" => self.nodes = Some(number(name, &value, 1..=254)?),
            "--rate-mbit" => self.rate_mbit = Some(number(name, &value, 0.01..=100_000.0)?),
            "--delay-ms" => self.delay_ms = Some(number(name, &value, 0.0..=10_000.0)?),
            "--loss-ppm" => self.loss_ppm = Some(number(name, &value, 0..=PPM)?),
            "--queue-kb" => self.queue_kb = Some(number(name, &value, 2..=1_000_000)?), // at the least one whole packet
            "--prefix" => self.prefix = Some(checked_prefix(value)?),
            _ => return Err(Failure::Usage(format!("unknown option {name}"))),
        }
        Ok(())
    }

    fn completed(self, command: Option<String>) -> Result<Options, Failure> {
        let missing = |name: &str| Failure::Usage(format!("{name} is missing"));
        let lines = LineOptions {
            rate_mbit: self.rate_mbit.ok_or_else(|| missing("--rate-mbit"))?,
            delay_ms: self.delay_ms.ok_or_else(|| missing("--delay-ms"))?,
            loss_ppm: self.loss_ppm.unwrap_or(0),
            queue_kb: self.queue_kb.unwrap_or(QUEUE_KB_DEFAULT),
        };
        let nodes = self.nodes.ok_or_else(|| missing("--nodes"))?;
        Ok(Options { nodes, lines, prefix: self.prefix.unwrap_or_else(|| PREFIX_DEFAULT.to_owned()), command })
    }
}

fn number<T: FromStr + PartialOrd + Display>(name: &str, text: &str, range: RangeInclusive<T>) -> Result<T, Failure> {
    let parsed = text.parse().ok().filter(|value| range.contains(value));
    parsed.ok_or_else(|| Failure::Usage(format!("{name} {text} is not a number from {} to {}", range.start(), range.end())))
}

/// Refuses what is no file name, and a last digit: `m1` and `m` would both own `m10`.
fn checked_prefix(prefix: String) -> Result<String, Failure> {
    let plain = prefix.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
    let apart = prefix.bytes().next_back().is_some_and(|last| !last.is_ascii_digit());
    if plain && apart && prefix.len() <= PREFIX_BYTES_MAX && !prefix.starts_with('-') {
        return Ok(prefix);
    }
    Err(Failure::Usage(format!("--prefix {prefix} is not up to {PREFIX_BYTES_MAX} letters, digits, - and _ that end in no digit")))
}

/// Returns one word as it is, several quoted so that the shell sees the same words again.
fn shell_line(words: &[String]) -> Option<String> {
    match words {
        [] => None,
        [line] => Some(line.clone()),
        _ => Some(words.iter().map(|word| format!("'{}'", word.replace('\'', r"'\''"))).collect::<Vec<_>>().join(" ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Option<Options>, Failure> {
        Options::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn reads_all_options() {
        let line = "--nodes 3 --rate-mbit 2.5 --delay-ms 20 --loss-ppm 1000 --queue-kb 64 --prefix net- -- ip --help";
        let lines = LineOptions { rate_mbit: 2.5, delay_ms: 20.0, loss_ppm: 1000, queue_kb: 64 };
        let command = Some("'ip' '--help'".to_owned());
        assert_eq!(parse(line).expect("it is sound"), Some(Options { nodes: 3, lines, prefix: "net-".to_owned(), command }));
    }

    #[test]
    fn asks_for_no_more_than_nodes_rate_and_delay() {
        let lines = LineOptions { rate_mbit: 100.0, delay_ms: 0.0, loss_ppm: 0, queue_kb: QUEUE_KB_DEFAULT };
        let expected = Options { nodes: 254, lines, prefix: "m".to_owned(), command: None };
        assert_eq!(parse("--nodes 254 --rate-mbit 100 --delay-ms 0").expect("it is sound"), Some(expected));
        assert_eq!(parse("--help").expect("it is sound"), None);
    }

    #[test]
    fn refuses_what_makes_no_star() {
        let sound = "--nodes 2 --rate-mbit 100 --delay-ms 0";
        for (line, named) in [
            ("--nodes 0", "--nodes 0"),
            ("--nodes 255", "--nodes 255"),
            ("--rate-mbit 0", "--rate-mbit 0"),
            ("--rate-mbit NaN", "--rate-mbit NaN"),
            ("--delay-ms -1", "--delay-ms -1"),
            ("--loss-ppm 1000001", "--loss-ppm 1000001"),
            ("--queue-kb 1", "--queue-kb 1"),
            ("--prefix a/b", "--prefix a/b"),
            ("--prefix m1", "--prefix m1"),
            ("--jitter 3", "--jitter"),
            ("--queue-kb", "--queue-kb"),
        ] {
            let failure = parse(&format!("{sound} {line}")).expect_err(line).to_string();
            assert!(failure.contains(named), "{failure}");
        }
        for missing in ["--nodes 2 --rate-mbit 1", "--nodes 2 --delay-ms 1", "--rate-mbit 1 --delay-ms 1 -- --nodes 2"] {
            parse(missing).expect_err(missing);
        }
    }

    #[test]
    fn shell_sees_one_word_as_a_line_and_several_as_words() {
        let line = |words: &[&str]| shell_line(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>());
        assert_eq!(line(&[]), None);
        assert_eq!(line(&["a && b"]).as_deref(), Some("a && b"));
        assert_eq!(line(&["sh", "-c", "echo 'a  b'"]).as_deref(), Some(r"'sh' '-c' 'echo '\''a  b'\'''"));
    }
}
