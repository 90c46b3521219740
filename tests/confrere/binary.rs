//! Runs the real binary: one data directory a node, removed at the end; processes are killed when a test ends.
#![expect(clippy::disallowed_methods, reason = "how long a process takes is told by a clock")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::checkpoint;

/// Guard against a test that hangs, ten times what any command here should take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(100);
/// A command that takes so long hangs: ten times what the slowest takes, which reads 78,000 tokens of probes.
const HANGS_AFTER: Duration = Duration::from_secs(600);

/// The binary under test, built with the profile of these tests.
pub(crate) fn binary() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--workspace"]);
        // What cargo tells tests of themselves would have build scripts run again, and much be built twice.
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")) {
            build.env_remove(name);
        }
        if !cfg!(debug_assertions) {
            build.arg("--release");
        }
        assert!(build.status().expect("cargo runs").success(), "the binary builds");
        // This test runs from target/PROFILE/deps.
        let exe = std::env::current_exe().expect("a test has a path");
        exe.parent().and_then(Path::parent).expect("tests lie two levels deep").join("confrere")
    })
}

/// A node: a data directory and the commands run on it.
pub(crate) struct Node {
    dir: tempfile::TempDir,
}

/// How a command ended.
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
    pub(crate) took: Duration,
}

impl Node {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a temporary directory") }
    }

    /// A node that has imported a checkpoint of the vectors under the name `m`; and the model's id.
    pub(crate) fn with(name: &str) -> (Self, String) {
        let node = Self::new();
        let id = node.import(&checkpoint(name));
        (node, id)
    }

    pub(crate) fn import(&self, path: &Path) -> String {
        let ended = self.run(&["import", text(path), "--name", "m"]);
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        ended.out.lines().last().expect("the id").to_owned()
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.arg("--data-dir").arg(self.path()).args(args);
        // What the user of this machine has set is none of a test's business.
        for (variable, _) in std::env::vars().filter(|(variable, _)| variable.starts_with("CONFRERE_")) {
            command.env_remove(variable);
        }
        command.env("XDG_CONFIG_HOME", self.path()).env_remove("COLUMNS");
        command.stdin(Stdio::null());
        command
    }

    /// Runs a command to its end.
    pub(crate) fn run(&self, args: &[&str]) -> Ended {
        ended(&mut self.command(args))
    }

    /// Runs a command that must succeed and print JSON.
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let ended = self.run(&[args, &["--json"]].concat());
        assert_eq!(ended.code, Some(0), "{args:?}: {}", ended.err);
        serde_json::from_str(&ended.out).unwrap_or_else(|error| panic!("{args:?} printed {:?}: {error}", ended.out))
    }

    /// The node's key as `publishers add` takes it.
    pub(crate) fn id(&self) -> String {
        self.run(&["id"]).out.trim().to_owned()
    }

    pub(crate) fn trust(&self, other: &Node) {
        assert_eq!(self.run(&["publishers", "add", &other.id()]).code, Some(0));
    }

    pub(crate) fn serve(&self) -> Serving {
        self.serve_with(&["--listen", "/ip4/127.0.0.1/tcp/0"])
    }

    pub(crate) fn serve_with(&self, args: &[&str]) -> Serving {
        let mut child =
            self.command(&[&["serve"], args].concat()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
        let mut out = BufReader::new(child.stdout.take().expect("piped"));
        let mut line = || {
            let mut line = String::new();
            out.read_line(&mut line).expect("readable");
            line.trim().to_owned()
        };
        let (address, ticket) = (line(), line());
        assert!(address.contains("/p2p/"), "serve printed {address:?}");
        Serving { child, address, ticket }
    }

    /// Experts of model `m`: those here, and all.
    pub(crate) fn experts(&self) -> (u64, u64) {
        let models = self.json(&["ls"]);
        let experts = &models[0]["experts"];
        (experts["have"].as_u64().expect("a count"), experts["all"].as_u64().expect("a count"))
    }
}

/// A local port that nothing listens on.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port").port()
}

/// What a node's API answers, head and all, to a request that names `host`.
pub(crate) fn http_get(api: &str, path: &str, host: &str) -> String {
    let mut stream = TcpStream::connect(api).expect("it listens");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").expect("written");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("readable");
    answer
}

/// The JSON that a node's API answers with.
pub(crate) fn api_json(api: &str, path: &str) -> Value {
    let answer = http_get(api, path, api);
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    assert!(head.starts_with("HTTP/1.1 200 OK"), "{answer}");
    serde_json::from_str(body).expect("JSON")
}

/// Runs any command to its end, or panics when it takes too long.
pub(crate) fn ended(command: &mut Command) -> Ended {
    let began = Instant::now();
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    let read = |mut from: Box<dyn Read + Send>| {
        std::thread::spawn(move || {
            let mut text = Vec::new();
            from.read_to_end(&mut text).map(|_| String::from_utf8_lossy(&text).into_owned()).unwrap_or_default()
        })
    };
    let out = read(Box::new(child.stdout.take().expect("piped")));
    let err = read(Box::new(child.stderr.take().expect("piped")));
    let code = wait_for(&mut child, HANGS_AFTER).unwrap_or_else(|_| {
        let _ = child.kill();
        panic!("{command:?} hangs")
    });
    Ended { code, out: out.join().expect("read"), err: err.join().expect("read"), took: began.elapsed() }
}

/// How a process ended, or that it did not within [`PATIENCE`].
pub(crate) fn wait(child: &mut Child) -> Result<Option<i32>, &'static str> {
    wait_for(child, PATIENCE)
}

fn wait_for(child: &mut Child, patience: Duration) -> Result<Option<i32>, &'static str> {
    let began = Instant::now();
    while began.elapsed() < patience {
        if let Some(status) = child.try_wait().expect("it can be waited for") {
            return Ok(status.code());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Err("it does not end")
}

/// A node that serves; killed when dropped.
pub(crate) struct Serving {
    child: Child,
    pub(crate) address: String,
    pub(crate) ticket: String,
}

impl Serving {
    /// Asks it to stop, as a service manager does.
    pub(crate) fn stop(mut self) -> Option<i32> {
        signal(&self.child, "TERM");
        wait(&mut self.child).expect("it stops")
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The TCP address behind the multiaddr, and the peer's id.
    pub(crate) fn socket(&self) -> (String, String) {
        let parts: Vec<_> = self.address.split('/').collect();
        (format!("{}:{}", parts[2], parts[4]), parts[6].to_owned())
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Sends a signal by name.
pub(crate) fn signal(child: &Child, name: &str) {
    signal_process(child.id(), name);
}

/// Sends a signal by name to a process by number.
pub(crate) fn signal_process(process: u32, name: &str) {
    let sent = Command::new("kill").arg(format!("-{name}")).arg(process.to_string()).status();
    assert!(sent.expect("kill runs").success());
}

/// A path as text.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are text")
}
