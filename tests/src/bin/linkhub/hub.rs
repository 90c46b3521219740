//! The running star: carries packets between the TUN devices, and runs the command.

use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::star::{Draws, Packet, Star, destination};
use crate::system::{TUN_NAME, readable, send_signal, unblock_signals_in, wait};
use crate::{EXIT_OWN_FAILURE, Failure};

const READ_BYTES_MAX: usize = 65_536; // should a test raise the MTU
const READ_PACKETS_MAX: usize = 64; // from one node before others have their turn
const GRACE_NS: u64 = 5_000_000_000; // between asking COMMAND to end and killing it
const SIGNAL_BYTES: usize = size_of::<libc::signalfd_siginfo>();

/// Nanoseconds since the start.
pub(crate) struct Clock(Instant);

impl Clock {
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the clock: below, now is an argument")]
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    fn now_ns(&self) -> u64 {
        self.0.elapsed().as_nanos() as u64 // enough for centuries
    }
}

/// Carries packets between the TUN devices while the command runs.
pub(crate) struct Hub {
    pub(crate) star: Star,
    pub(crate) tuns: Vec<File>, // by node
    pub(crate) signals: File,
    pub(crate) draws: Draws,
    pub(crate) clock: Clock,
    pub(crate) command: Option<RunningCommand>,
}

impl Hub {
    /// Returns the exit code once the command has ended, or, without one, a signal has come.
    pub(crate) fn forward(&mut self) -> Result<u8, Failure> {
        let mut buffer = vec![0; READ_BYTES_MAX];
        let nodes = self.tuns.len();
        let mut polled: Vec<_> = self.tuns.iter().chain([&self.signals]).map(readable).collect();
        loop {
            self.deliver();
            wait(&mut polled, self.sleep()).map_err(|error| Failure::io("cannot wait for packets", error))?;
            let now_ns = self.clock.now_ns();
            for (node, _) in polled[..nodes].iter().enumerate().filter(|(_, poll)| poll.revents != 0) {
                self.receive(now_ns, node, &mut buffer)?;
            }
            let signal = if polled[nodes].revents == 0 { None } else { self.next_signal()? };
            if let Some(code) = self.react(now_ns, signal)? {
                return Ok(code);
            }
        }
    }

    /// Returns how long there is nothing to do unless something comes.
    fn sleep(&self) -> Option<Duration> {
        let kill_at_ns = self.command.as_ref().and_then(|command| command.kill_at_ns);
        let wake_at_ns = [self.star.next_due_ns(), kill_at_ns].into_iter().flatten().min()?;
        Some(Duration::from_nanos(wake_at_ns.saturating_sub(self.clock.now_ns())))
    }

    fn receive(&mut self, now_ns: u64, source: usize, buffer: &mut [u8]) -> Result<(), Failure> {
        for _ in 0..READ_PACKETS_MAX {
            let bytes = match self.tuns[source].read(buffer) {
                Ok(length) => &buffer[..length],
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => break,
                Err(error) => return Err(Failure::io(format!("cannot read {TUN_NAME} of node {source}"), error)),
            };
            if let Some(destination) = destination(bytes, self.tuns.len()) {
                self.star.send(now_ns, self.draws.next_ppm(), Packet { source, destination, bytes: bytes.to_vec() });
            }
        }
        Ok(())
    }

    fn deliver(&mut self) {
        let now_ns = self.clock.now_ns();
        while let Some(packet) = self.star.next_arrived(now_ns) {
            // A node whose device is down is off the net: the packet is gone, as it would be.
            let _ = self.tuns[packet.destination].write(&packet.bytes);
        }
    }

    fn next_signal(&mut self) -> Result<Option<libc::c_int>, Failure> {
        let mut info = [0; SIGNAL_BYTES];
        match self.signals.read(&mut info) {
            Ok(_) => Ok(info.first_chunk().map(|number| libc::c_int::from_ne_bytes(*number))), // ssi_signo comes first
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
            Err(error) => Err(Failure::io("cannot read signals", error)),
        }
    }

    /// Returns the exit code if it is time to end.
    fn react(&mut self, now_ns: u64, signal: Option<libc::c_int>) -> Result<Option<u8>, Failure> {
        let Some(command) = &mut self.command else {
            return Ok(signal.filter(|signal| *signal != libc::SIGCHLD).map(|_| 0));
        };
        match signal {
            Some(libc::SIGCHLD) => return command.exit_code(),
            Some(signal) => command.pass_on(now_ns, signal),
            None => command.kill_if_overdue(now_ns),
        }
        Ok(None)
    }
}

/// The command, in a process group of its own that ends with this.
pub(crate) struct RunningCommand {
    child: Child,
    kill_at_ns: Option<u64>, // once it was asked to end
}

impl RunningCommand {
    pub(crate) fn start(line: &str) -> Result<Self, Failure> {
        let mut shell = Command::new("sh");
        shell.args(["-c", line]).env("LINKHUB_READY", "1").process_group(0);
        if io::stdin().is_terminal() {
            shell.stdin(Stdio::null()); // who reads a terminal from another process group is stopped
        }
        unblock_signals_in(&mut shell);
        let child = shell.spawn().map_err(|error| Failure::io(format!("cannot start sh for {line}"), error))?;
        Ok(Self { child, kill_at_ns: None })
    }

    fn exit_code(&mut self) -> Result<Option<u8>, Failure> {
        let status = self.child.try_wait().map_err(|error| Failure::io("cannot ask for the command's exit code", error))?;
        Ok(status.map(exit_code))
    }

    /// Asks the command to end, or kills it when asked again.
    fn pass_on(&mut self, now_ns: u64, signal: libc::c_int) {
        let again = self.kill_at_ns.is_some();
        self.signal_group(if again { libc::SIGKILL } else { signal });
        self.kill_at_ns.get_or_insert(now_ns + GRACE_NS);
    }

    fn kill_if_overdue(&mut self, now_ns: u64) {
        if self.kill_at_ns.is_some_and(|kill_at_ns| kill_at_ns <= now_ns) {
            self.signal_group(libc::SIGKILL);
            self.kill_at_ns = Some(now_ns + GRACE_NS);
        }
    }

    fn signal_group(&self, signal: libc::c_int) {
        send_signal(-self.child.id().cast_signed(), signal);
    }
}

impl Drop for RunningCommand {
    fn drop(&mut self) {
        self.signal_group(libc::SIGKILL);
        let _ = self.child.wait();
    }
}

/// Returns what a shell would say.
fn exit_code(status: ExitStatus) -> u8 {
    status.code().or(status.signal().map(|signal| 128 + signal)).and_then(|code| u8::try_from(code).ok()).unwrap_or(EXIT_OWN_FAILURE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_code_is_the_commands_or_tells_its_signal() {
        assert_eq!(exit_code(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(exit_code(ExitStatus::from_raw(libc::SIGTERM)), 143);
    }
}
