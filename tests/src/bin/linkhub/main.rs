//! An internet on one machine: network namespaces joined in a star, with a rate, a delay, random loss and drop-tail queues.
//!
//! For Linux kernels without `netem`. Packets go from TUN device to TUN device through this process, so nothing leaves the machine.
//! Leaves out jitter, reordering, IPv6, broadcast, multicast, and lines that differ from node to node.

mod hub;
mod namespaces;
mod options;
mod star;
mod system;

use std::fmt::{self, Display};
use std::fs::File;
use std::io::{self, Write};
use std::process::ExitCode;

use crate::hub::{Clock, Hub, RunningCommand};
use crate::namespaces::{Namespaces, configure_tun, lock_prefix, open_tun};
use crate::options::Options;
use crate::star::{Draws, Star};
use crate::system::catch_signals;

const USAGE: &str = "\
usage: linkhub --nodes N --rate-mbit R --delay-ms D [--loss-ppm L] [--queue-kb Q] [--prefix P] [-- COMMAND...]

Makes network namespaces P0 ... P{N-1} with addresses 10.88.0.1 ... 10.88.0.N, joined in a star. Needs root.

  --nodes N      how many, 1 to 254
  --rate-mbit R  of each node's line, each way, in bits of IP packets
  --delay-ms D   one way, between any two nodes
  --loss-ppm L   packets lost at random in a million [0]
  --queue-kb Q   what waits before each line, each way; what does not fit is dropped [512]
  --prefix P     of the namespaces' names [m]
  COMMAND        run when all is ready, with LINKHUB_READY=1; its exit code is linkhub's. One word is a line for `sh`,
                 several are a program and its arguments. What it left running in its process group or in the namespaces is
                 killed. Without it, linkhub prints `ready` and runs until SIGINT or SIGTERM.

Run a program on a node with `ip netns exec P0 ...`; unplug a node with `ip -n P0 link set tun0 down`.
Exit code 125: linkhub itself failed.";

const EXIT_OWN_FAILURE: u8 = 125; // as `env` and `timeout` do, to be told from COMMAND's

fn main() -> ExitCode {
    let ended = match Options::parse(std::env::args().skip(1)) {
        Ok(Some(options)) => run(&options),
        Ok(None) => writeln!(io::stdout(), "{USAGE}").map(|()| 0).map_err(|error| Failure::io("cannot print the usage", error)),
        Err(failure) => Err(failure),
    };
    match ended {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            log(&failure);
            ExitCode::from(EXIT_OWN_FAILURE)
        }
    }
}

/// Unlike `eprintln`, does not panic when the terminal is gone: there is still something to take down.
fn log(message: &impl Display) {
    let _ = writeln!(io::stderr(), "linkhub: {message}");
}

/// Makes the star, lets it live as long as the command or until a signal, and takes it down again.
fn run(options: &Options) -> Result<u8, Failure> {
    let signals = File::from(catch_signals().map_err(|error| Failure::io("cannot catch signals", error))?);
    let _lock = lock_prefix(&options.prefix)?;
    let namespaces = Namespaces::make(options)?;
    let tuns = namespaces.names().map(|name| open_tun(&name)).collect::<Result<Vec<_>, _>>()?;
    for (node, name) in namespaces.names().enumerate() {
        configure_tun(&name, node)?;
    }
    let command = options.command.as_deref().map(RunningCommand::start).transpose()?;
    if command.is_none() {
        writeln!(io::stdout(), "ready").map_err(|error| Failure::io("cannot say that all is ready", error))?;
    }
    let mut hub = Hub { star: Star::new(options.nodes, &options.lines), tuns, signals, draws: Draws(1), clock: Clock::start(), command };
    let code = hub.forward()?;
    log(&hub.star.counts);
    Ok(code)
}

/// Why the star could not be made or kept.
#[derive(Debug)]
enum Failure {
    /// The command line makes no sense.
    Usage(String),
    /// The operating system refused something.
    Io { what: String, source: io::Error },
    /// `ip` refused something.
    Ip { arguments: String, said: String },
}

impl Failure {
    fn io(what: impl Into<String>, source: io::Error) -> Self {
        Self::Io { what: what.into(), source }
    }
}

impl Display for Failure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(why) => write!(out, "{why}; see linkhub --help"),
            Self::Io { what, source } => write!(out, "{what}: {source}"),
            Self::Ip { arguments, said } => write!(out, "ip {arguments}: {said}"),
        }
    }
}
