//! An internet on one machine: network namespaces joined in a star, with a rate, a delay, random loss and drop-tail queues.
//!
//! For Linux kernels without `netem`. Packets go from TUN device to TUN device through this process, so nothing leaves the machine.
//! Leaves out jitter, reordering, IPv6, broadcast, multicast, and lines that differ from node to node.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

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
const NAMESPACES_DIR: &str = "/var/run/netns";
const TUN_NAME: &str = "tun0";
const MTU_BYTES: &str = "1500";
const TUN_QUEUE_PACKETS: &str = "5000"; // ten times the kernel's, so that our queues, which count, are the ones that drop
const READ_BYTES_MAX: usize = 65_536; // should a test raise the MTU
const READ_PACKETS_MAX: usize = 64; // from one node before others have their turn
const QUEUE_KB_DEFAULT: u64 = 512;
const PREFIX_DEFAULT: &str = "m";
const PREFIX_BYTES_MAX: usize = 32;
const GRACE_NS: u64 = 5_000_000_000; // between asking COMMAND to end and killing it
const SIGNAL_BYTES: usize = size_of::<libc::signalfd_siginfo>();
const NS_PER_SECOND: u64 = 1_000_000_000;
const PPM: u64 = 1_000_000;

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

// The command line.

/// What the user asked for.
#[derive(Debug, PartialEq)]
struct Options {
    nodes: usize,
    lines: LineOptions,
    prefix: String,
    command: Option<String>, // for `sh -c`
}

/// What all lines of the star have in common.
#[derive(Debug, PartialEq)]
struct LineOptions {
    rate_mbit: f64,
    delay_ms: f64,
    loss_ppm: u64,
    queue_kb: u64,
}

impl Options {
    /// Returns nothing if only the usage was asked for.
    fn parse(arguments: impl Iterator<Item = String>) -> Result<Option<Self>, Failure> {
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

// When and whether a packet leaves: no clock, no randomness, no system calls.

/// One direction of a node's line: sends one packet after the other, from a drop-tail queue.
#[derive(Clone)]
struct Line {
    bits_per_second: u64,
    queue_ns: u64, // how long a full queue takes to send, what is being sent included
    free_at_ns: u64,
}

impl Line {
    fn new(bits_per_second: u64, queue_bytes: u64) -> Self {
        Self { bits_per_second, queue_ns: sending_ns(queue_bytes, bits_per_second), free_at_ns: 0 }
    }

    /// Returns when the last bit of a packet that comes at `now_ns` has left, or nothing if the packet finds no room.
    fn admit(&mut self, now_ns: u64, packet_bytes: usize) -> Option<u64> {
        let sent_at_ns = self.free_at_ns.max(now_ns) + sending_ns(packet_bytes as u64, self.bits_per_second);
        if sent_at_ns - now_ns > self.queue_ns {
            return None;
        }
        self.free_at_ns = sent_at_ns;
        Some(sent_at_ns)
    }
}

fn sending_ns(bytes: u64, bits_per_second: u64) -> u64 {
    bytes * 8 * NS_PER_SECOND / bits_per_second // the largest queue, a GB, is 8e18: fits
}

/// A packet between two nodes.
#[derive(Debug, PartialEq)]
struct Packet {
    source: usize,
    destination: usize,
    bytes: Vec<u8>,
}

/// The next step of a packet under way.
enum Step {
    EnterDownlink(Packet),
    Arrive(Packet),
}

/// What became of packets.
#[derive(Default, Debug, PartialEq)]
struct Counts {
    delivered: u64,
    lost: u64,
    refused_up: u64,
    refused_down: u64,
}

impl Display for Counts {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { delivered, lost, refused_up, refused_down } = self;
        write!(out, "{delivered} packets delivered, {lost} lost, {refused_up} dropped by full uplinks, {refused_down} by full downlinks")
    }
}

/// All lines, and the packets between them. It holds no more than fits the queues and what the rate puts into the delay.
struct Star {
    uplinks: Vec<Line>,
    downlinks: Vec<Line>,
    delay_ns: u64,
    loss_ppm: u64,
    steps: BTreeMap<(u64, u64), Step>, // by time, then in the order of their making
    steps_made: u64,
    counts: Counts,
}

impl Star {
    fn new(nodes: usize, options: &LineOptions) -> Self {
        let line = Line::new((options.rate_mbit * 1e6) as u64, options.queue_kb * 1000);
        Self {
            uplinks: vec![line.clone(); nodes],
            downlinks: vec![line; nodes],
            delay_ns: (options.delay_ms * 1e6) as u64,
            loss_ppm: options.loss_ppm,
            steps: BTreeMap::new(),
            steps_made: 0,
            counts: Counts::default(),
        }
    }

    /// Takes a packet from its source. `draw_ppm` is evenly distributed below a million; a lost packet has used its uplink.
    fn send(&mut self, now_ns: u64, draw_ppm: u64, packet: Packet) {
        match self.uplinks[packet.source].admit(now_ns, packet.bytes.len()) {
            None => self.counts.refused_up += 1,
            Some(_) if draw_ppm < self.loss_ppm => self.counts.lost += 1,
            Some(sent_at_ns) => self.schedule(sent_at_ns + self.delay_ns, Step::EnterDownlink(packet)),
        }
    }

    /// Returns the next packet that has arrived by `now_ns`.
    fn next_arrived(&mut self, now_ns: u64) -> Option<Packet> {
        while let Some(entry) = self.steps.first_entry().filter(|entry| entry.key().0 <= now_ns) {
            // The downlink is entered when that was due, not when we came to it: lateness does not add up.
            let ((due_ns, _), step) = entry.remove_entry();
            match step {
                Step::EnterDownlink(packet) => match self.downlinks[packet.destination].admit(due_ns, packet.bytes.len()) {
                    None => self.counts.refused_down += 1,
                    Some(sent_at_ns) => self.schedule(sent_at_ns, Step::Arrive(packet)),
                },
                Step::Arrive(packet) => {
                    self.counts.delivered += 1;
                    return Some(packet);
                }
            }
        }
        None
    }

    /// Returns when `next_arrived` has something to do.
    fn next_due_ns(&self) -> Option<u64> {
        self.steps.first_key_value().map(|((due_ns, _), _)| *due_ns)
    }

    fn schedule(&mut self, due_ns: u64, step: Step) {
        self.steps.insert((due_ns, self.steps_made), step);
        self.steps_made += 1;
    }
}

/// Returns which node an IPv4 packet is for; nothing for all that the star does not carry.
fn destination(packet: &[u8], nodes: usize) -> Option<usize> {
    let is_ipv4 = packet.first()? >> 4 == 4;
    match packet.get(16..20)? {
        [10, 88, 0, host] if is_ipv4 => usize::from(*host).checked_sub(1).filter(|node| *node < nodes),
        _ => None,
    }
}

/// Pseudo-random numbers (`SplitMix64`), the same in each run.
struct Draws(u64);

impl Draws {
    fn next_ppm(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % PPM
    }
}

// The running star.

/// Nanoseconds since the start.
struct Clock(Instant);

impl Clock {
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the clock: below, now is an argument")]
    fn start() -> Self {
        Self(Instant::now())
    }

    fn now_ns(&self) -> u64 {
        self.0.elapsed().as_nanos() as u64 // enough for centuries
    }
}

/// Carries packets between the TUN devices while the command runs.
struct Hub {
    star: Star,
    tuns: Vec<File>, // by node
    signals: File,
    draws: Draws,
    clock: Clock,
    command: Option<RunningCommand>,
}

impl Hub {
    /// Returns the exit code once the command has ended, or, without one, a signal has come.
    fn forward(&mut self) -> Result<u8, Failure> {
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
struct RunningCommand {
    child: Child,
    kill_at_ns: Option<u64>, // once it was asked to end
}

impl RunningCommand {
    fn start(line: &str) -> Result<Self, Failure> {
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

// Namespaces and devices.

/// Keeps a second linkhub from removing our namespaces as left-overs. An abstract socket leaves nothing behind.
fn lock_prefix(prefix: &str) -> Result<UnixListener, Failure> {
    let failed = |error| Failure::io(format!("cannot lock the prefix {prefix}, which another linkhub may have"), error);
    let address = SocketAddr::from_abstract_name(format!("linkhub-{prefix}")).map_err(failed)?;
    UnixListener::bind_addr(&address).map_err(failed)
}

/// The namespaces of one prefix; they go when this goes.
struct Namespaces {
    prefix: String,
    nodes: usize,
}

impl Namespaces {
    /// Makes them, in place of what an earlier run left.
    fn make(options: &Options) -> Result<Self, Failure> {
        remove_namespaces(&options.prefix)?;
        let namespaces = Self { prefix: options.prefix.clone(), nodes: options.nodes }; // from here on, a failure removes them
        for name in namespaces.names() {
            ip(&["netns", "add", &name])?;
            ip(&["-n", &name, "link", "set", "lo", "up"])?;
        }
        Ok(namespaces)
    }

    fn names(&self) -> impl Iterator<Item = String> {
        (0..self.nodes).map(|node| format!("{}{node}", self.prefix))
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        if let Err(failure) = remove_namespaces(&self.prefix) {
            log(&failure);
        }
    }
}

/// Removes all namespaces of a prefix with the processes in them, which would keep them alive without a name.
fn remove_namespaces(prefix: &str) -> Result<(), Failure> {
    let names = namespaces_of(prefix).map_err(|error| Failure::io(format!("cannot list {NAMESPACES_DIR}"), error))?;
    for name in names {
        let processes = processes_in(&name).map_err(|error| Failure::io(format!("cannot list the processes in {name}"), error))?;
        processes.into_iter().for_each(|process| send_signal(process, libc::SIGKILL));
        ip(&["netns", "delete", &name])?;
    }
    Ok(())
}

fn namespaces_of(prefix: &str) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(NAMESPACES_DIR) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()), // until the first is made
        entries => entries?,
    };
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<io::Result<Vec<_>>>()?;
    Ok(names.into_iter().filter(|name| is_of_prefix(name, prefix)).collect())
}

fn is_of_prefix(name: &str, prefix: &str) -> bool {
    name.strip_prefix(prefix).is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

fn processes_in(name: &str) -> io::Result<Vec<libc::pid_t>> {
    let namespace = identity(&Path::new(NAMESPACES_DIR).join(name))?;
    if namespace == identity(Path::new("/proc/self/ns/net"))? {
        return Ok(Vec::new()); // somebody gave our own a name: not ours to empty
    }
    let entries = fs::read_dir("/proc")?.collect::<io::Result<Vec<_>>>()?;
    let processes = entries.iter().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    // One that has ended since is not in it any more.
    Ok(processes.filter(|process| identity(Path::new(&format!("/proc/{process}/ns/net"))).is_ok_and(|of| of == namespace)).collect())
}

/// Returns device and inode, which tell namespaces apart.
fn identity(namespace: &Path) -> io::Result<(u64, u64)> {
    fs::metadata(namespace).map(|found| (found.dev(), found.ino()))
}

/// Opens the device of a namespace. A thread enters a namespace alone, so this one ends there.
fn open_tun(namespace: &str) -> Result<File, Failure> {
    let open = || {
        enter_namespace(&File::open(Path::new(NAMESPACES_DIR).join(namespace))?)?;
        let tun = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
        attach_tun(&tun)?;
        Ok(tun)
    };
    let opened = std::thread::scope(|scope| scope.spawn(open).join()).expect("opening a device does not panic");
    opened.map_err(|error| Failure::io(format!("cannot open {TUN_NAME} in namespace {namespace}"), error))
}

fn configure_tun(namespace: &str, node: usize) -> Result<(), Failure> {
    ip(&["-n", namespace, "address", "add", &format!("10.88.0.{}/24", node + 1), "dev", TUN_NAME])?;
    ip(&["-n", namespace, "link", "set", TUN_NAME, "mtu", MTU_BYTES, "txqueuelen", TUN_QUEUE_PACKETS, "up"])
}

fn ip(arguments: &[&str]) -> Result<(), Failure> {
    let output = Command::new("ip").args(arguments).stdin(Stdio::null()).output();
    let output = output.map_err(|error| Failure::io("cannot run ip (iproute2)", error))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Failure::Ip { arguments: arguments.join(" "), said: String::from_utf8_lossy(&output.stderr).trim().to_owned() })
}

// Thin covers of system calls that std lacks.

/// Returns what becomes readable with a signal that would end us or that a child has ended; those do nothing else any more.
#[expect(unsafe_code, reason = "std has no signals")]
fn catch_signals() -> io::Result<OwnedFd> {
    let signals = signal_set(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGCHLD]);
    // SAFETY: the set is initialised, the old mask is not asked for.
    let blocked = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut()) };
    if blocked != 0 {
        return Err(io::Error::from_raw_os_error(blocked));
    }
    // SAFETY: the set is initialised, and -1 asks for a new descriptor.
    let descriptor = checked(unsafe { libc::signalfd(-1, &raw const signals, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) })?;
    // SAFETY: it was opened just now and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

#[expect(unsafe_code, reason = "std has no signals")]
fn signal_set(signals: &[libc::c_int]) -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: `sigemptyset` initialises the whole set before anything else looks at it.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        set.assume_init()
    }
}

/// Lets a program have the signals that we keep from ourselves: it would inherit that.
#[expect(unsafe_code, reason = "std leaves the mask as it is")]
fn unblock_signals_in(program: &mut Command) {
    let none = signal_set(&[]);
    let unblock = move || {
        // SAFETY: the set is initialised, the old mask is not asked for.
        checked(unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()) }).map(drop)
    };
    // SAFETY: between fork and exec this makes one system call, and allocates nothing.
    unsafe { program.pre_exec(unblock) };
}

/// Sends to a process, or to a group when negative. One that is gone needs no signal.
#[expect(unsafe_code, reason = "std kills only children, and only with SIGKILL")]
fn send_signal(process: libc::pid_t, signal: libc::c_int) {
    // SAFETY: plain numbers.
    unsafe { libc::kill(process, signal) };
}

/// Moves the calling thread.
#[expect(unsafe_code, reason = "std has no namespaces")]
fn enter_namespace(namespace: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open while it is borrowed.
    checked(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) }).map(drop)
}

/// Makes the device in the namespace of the calling thread; it lasts as long as the file is open.
#[expect(unsafe_code, reason = "std has no ioctl")]
fn attach_tun(tun: &File) -> io::Result<()> {
    let flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    let mut request = libc::ifreq { ifr_name: [0; libc::IFNAMSIZ], ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags } };
    for (slot, byte) in request.ifr_name.iter_mut().zip(TUN_NAME.bytes()) {
        *slot = byte as libc::c_char;
    }
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which lives through the call.
    checked(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) }).map(drop)
}

fn readable(file: &File) -> libc::pollfd {
    libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN, revents: 0 }
}

/// Sleeps until a file is readable or the time is up; for ever without one.
#[expect(unsafe_code, reason = "std waits for one file only")]
fn wait(polled: &mut [libc::pollfd], timeout: Option<Duration>) -> io::Result<()> {
    polled.iter_mut().for_each(|poll| poll.revents = 0);
    let timeout = timeout.map(|time| libc::timespec { tv_sec: time.as_secs() as libc::time_t, tv_nsec: time.subsec_nanos().into() });
    let timeout = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: pointer and length are of one slice; the timeout is null or lives through the call, as does the absent mask.
    let ready = unsafe { libc::ppoll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, timeout, std::ptr::null()) };
    match checked(ready) {
        Err(error) if error.kind() != ErrorKind::Interrupted => Err(error),
        _ => Ok(()),
    }
}

fn checked(returned: libc::c_int) -> io::Result<libc::c_int> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(returned) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000; // in ns

    // At 8 Mbit/s a byte takes 1 microsecond, and a packet of 1000 bytes 1 ms.
    fn star(nodes: usize, delay_ms: f64, loss_ppm: u64, queue_kb: u64) -> Star {
        Star::new(nodes, &LineOptions { rate_mbit: 8.0, delay_ms, loss_ppm, queue_kb })
    }

    fn packet(source: usize, destination: usize) -> Packet {
        Packet { source, destination, bytes: vec![0; 1000] }
    }

    /// Returns from whom and when packets arrive.
    fn arrivals(star: &mut Star) -> Vec<(usize, u64)> {
        let mut arrived = Vec::new();
        while let Some(due_ns) = star.next_due_ns() {
            arrived.extend(std::iter::from_fn(|| star.next_arrived(due_ns)).map(|packet| (packet.source, due_ns)));
        }
        arrived
    }

    fn parse(line: &str) -> Result<Option<Options>, Failure> {
        Options::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn packet_takes_uplink_delay_and_downlink_and_not_a_nanosecond_less() {
        let mut star = star(2, 20.0, 0, 10);
        star.send(5 * MS, 0, packet(0, 1));
        assert_eq!(star.next_arrived(27 * MS - 1), None);
        assert_eq!(star.next_arrived(27 * MS), Some(packet(0, 1)));
        assert_eq!(star.next_due_ns(), None);
    }

    #[test]
    fn packets_of_one_sender_leave_in_order_at_its_rate() {
        let mut star = star(3, 0.0, 0, 10);
        [1, 2, 1].into_iter().for_each(|destination| star.send(0, 0, packet(0, destination)));
        assert_eq!(arrivals(&mut star), [(0, 2 * MS), (0, 3 * MS), (0, 4 * MS)]);
    }

    #[test]
    fn idle_line_saves_nothing_up() {
        let mut line = Line::new(8_000_000, 10_000);
        assert_eq!(line.admit(0, 1000), Some(MS));
        assert_eq!(line.admit(50 * MS, 1000), Some(51 * MS));
        assert_eq!(line.admit(50 * MS, 1000), Some(52 * MS));
    }

    #[test]
    fn queue_takes_what_fits_and_not_a_byte_more() {
        let mut line = Line::new(8_000_000, 3000);
        assert_eq!(line.admit(0, 1999), Some(1_999_000));
        assert_eq!(line.admit(0, 1002), None);
        assert_eq!(line.admit(0, 1001), Some(3 * MS));
        assert_eq!(line.admit(MS - 1, 1000), None);
        assert_eq!(line.admit(MS, 1000), Some(4 * MS));
    }

    #[test]
    fn senders_share_the_line_of_their_receiver() {
        let mut star = star(3, 10.0, 0, 10);
        star.send(0, 0, packet(0, 2));
        star.send(0, 0, packet(1, 2));
        assert_eq!(arrivals(&mut star), [(0, 12 * MS), (1, 13 * MS)]);
    }

    #[test]
    fn full_downlink_drops_and_says_so() {
        let mut star = star(4, 10.0, 0, 2);
        (0..3).for_each(|source| star.send(0, 0, packet(source, 3)));
        assert_eq!(arrivals(&mut star), [(0, 12 * MS), (1, 13 * MS)]);
        assert_eq!(star.counts, Counts { delivered: 2, refused_down: 1, ..Counts::default() });
    }

    #[test]
    fn one_senders_queue_does_not_hold_up_anothers_packet() {
        let mut star = star(3, 10.0, 0, 10);
        (0..5).for_each(|_| star.send(0, 0, packet(0, 2)));
        star.send(MS / 2, 0, packet(1, 2));
        assert_eq!(arrivals(&mut star)[..3], [(0, 12 * MS), (1, 13 * MS), (0, 14 * MS)]);
    }

    #[test]
    fn loses_by_the_draw_after_the_uplink() {
        let mut star = star(2, 0.0, 1000, 10);
        star.send(0, 999, packet(0, 1));
        star.send(0, 1000, packet(0, 1));
        assert_eq!(arrivals(&mut star), [(0, 3 * MS)]);
        assert_eq!(star.counts, Counts { delivered: 1, lost: 1, ..Counts::default() });
    }

    #[test]
    fn draws_below_the_loss_come_as_often_as_asked() {
        let mut draws = Draws(1);
        let lost = (0..1_000_000).filter(|_| draws.next_ppm() < 1000).count();
        assert!((900..1100).contains(&lost), "{lost}"); // 1000 expected, and this is three deviations
    }

    #[test]
    fn lateness_of_the_caller_does_not_add_up() {
        let mut star = star(2, 10.0, 0, 10);
        star.send(0, 0, packet(0, 1));
        star.send(0, 0, packet(0, 1));
        assert!(star.next_arrived(13 * MS).is_some(), "due at 12 ms");
        assert!(star.next_arrived(13 * MS).is_some(), "due at 13 ms, though the first was asked for late");
    }

    #[test]
    fn carries_ipv4_between_nodes_only() {
        let to = |address: [u8; 4]| [&[0x45][..], &[0; 15], &address, b"data"].concat();
        assert_eq!(destination(&to([10, 88, 0, 1]), 3), Some(0));
        assert_eq!(destination(&to([10, 88, 0, 3]), 3), Some(2));
        for elsewhere in [[10, 88, 0, 0], [10, 88, 0, 4], [10, 88, 0, 255], [10, 88, 1, 1], [224, 0, 0, 251]] {
            assert_eq!(destination(&to(elsewhere), 3), None, "{elsewhere:?}");
        }
        let mut ipv6 = to([10, 88, 0, 1]);
        ipv6[0] = 0x60;
        assert_eq!(destination(&ipv6, 3), None);
        assert_eq!(destination(&to([10, 88, 0, 1])[..19], 3), None);
        assert_eq!(destination(&[], 3), None);
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

    #[test]
    fn owns_only_numbered_names() {
        assert!(is_of_prefix("m0", "m") && is_of_prefix("m253", "m"));
        assert!(["m", "mx1", "m1a", "n1", "am1", ""].iter().all(|name| !is_of_prefix(name, "m")));
    }

    #[test]
    fn exit_code_is_the_commands_or_tells_its_signal() {
        assert_eq!(exit_code(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(exit_code(ExitStatus::from_raw(libc::SIGTERM)), 143);
    }
}
