//! What commands are given: a data directory, the options that several share, and whom to ask.

use std::num::NonZero;
use std::path::PathBuf;
use std::time::Duration;

use base::clock::unless_interrupted;
use base::failure::{Failure, Kind};
use clap::{Arg, ArgAction, ArgMatches, Args, FromArgMatches, value_parser};
use inference::chat::MediumKind;
use inference::engine::{EngineOptions, KvPrecision};
use inference::kernels::Kernels;
use inference::media::limits::MediaLimits;
use net::Multiaddr;
use net::address::parse_address;
use net::allowed::{Allowed, AllowedPeers};
use protocol::ModelManifest;
use protocol::audit::AuditShare;
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::daemon::Daemon;
use crate::data_dir::{DataDir, OpenDataDir};
use crate::dispatcher::RemoteOptions;
use crate::federation::{PeerOptions, Publishers};
use crate::media::{FPS_DEFAULT, GivenMedium, MediaSound, MediaSource};

/// How a command finds peers.
#[derive(Args, Clone)]
pub struct PeerArgs {
    /// A peer's address, as its `serve` prints it; may be given again
    #[arg(long = "peer", value_name = "ADDR", value_parser = parse_address, env = "CONFRERE_PEER", value_delimiter = ',')]
    pub peers: Vec<Multiaddr>,
    /// Look for peers on the local network
    #[arg(long, env = "CONFRERE_MDNS", value_parser = clap::builder::FalseyValueParser::new())]
    pub mdns: bool,
    /// Be in a closed group: ask only nodes that have the key in this file
    #[arg(long, value_name = "KEYFILE", env = "CONFRERE_PRIVATE")]
    pub private: Option<PathBuf>,
    /// Give up after so many seconds without progress
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0, value_parser = parse_seconds, env = "CONFRERE_TIMEOUT")]
    pub timeout: f64,
    /// Accept models from publishers that you do not trust
    #[arg(long)]
    pub(crate) allow_unsigned: bool,
}

/// How a command computes.
#[derive(Args, Clone, Default)]
pub struct EngineArgs {
    /// Threads that compute [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), env = "CONFRERE_THREADS")]
    pub threads: Option<u16>,
    /// Kernels to compute with [default: the fastest that this processor has]
    #[arg(long, value_name = "NAME", value_parser = parse_kernels, env = "CONFRERE_KERNELS")]
    pub kernels: Option<&'static Kernels>,
    /// Number format of keys and values: f32, f16 or q8 [default: f16 where weights are packed, else f32]
    #[arg(long, value_name = "FORMAT", env = "CONFRERE_KV")]
    pub kv: Option<KvPrecision>,
    /// Most tokens of prompt and answer together [default: what this prompt needs; 8192 for a conversation]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..), env = "CONFRERE_CONTEXT")]
    pub context: Option<u32>,
}

/// Context of a conversation, unless told otherwise: keys and values of a model's whole context can be larger than the model.
pub const CONTEXT_DEFAULT: usize = 8192;

impl EngineArgs {
    /// Threads that an engine computes on.
    pub fn threads(&self) -> usize {
        self.threads.map_or_else(|| std::thread::available_parallelism().map_or(1, NonZero::get), usize::from)
    }

    /// Options for a model whose sequences will have up to `tokens` tokens, where that is known.
    pub fn options(&self, manifest: &ModelManifest, tokens: Option<usize>) -> EngineOptions {
        let own = EngineOptions::for_model(manifest);
        let context = self.context.map_or(tokens.unwrap_or(CONTEXT_DEFAULT), |context| context as usize);
        EngineOptions {
            threads: self.threads.map_or(own.threads, usize::from),
            kernels: self.kernels.unwrap_or(own.kernels),
            kv: self.kv.unwrap_or(own.kv),
            context: context.min(own.context),
            ..own
        }
    }
}

pub fn parse_kernels(name: &str) -> Result<&'static Kernels, String> {
    let known: Vec<_> = Kernels::available().map(|kernels| kernels.name).collect();
    Kernels::named(name).ok_or_else(|| format!("this processor has no kernels called {name} (it has {})", known.join(", ")))
}

impl PeerArgs {
    pub fn options(&self) -> PeerOptions {
        PeerOptions {
            peers: self.peers.clone(),
            mdns: self.mdns,
            private: self.private.clone(),
            timeout: Duration::from_secs_f64(self.timeout),
            publishers: if self.allow_unsigned { Publishers::Anybody } else { Publishers::Trusted },
            remote: RemoteOptions::default(),
        }
    }
}

/// Which peers may run experts for a command.
#[derive(Args, Clone)]
pub struct RemoteArgs {
    /// Let a peer run experts of q8 and q4 models: its key, its id, or any. It sees activations, which say much of the text
    #[arg(long, value_name = "PEER", env = "CONFRERE_EXECUTE_AT", value_delimiter = ',')]
    pub execute_at: Vec<Allowed>,
    /// Share of peers' results that is computed again here and compared
    #[arg(long, value_name = "SHARE", default_value = "0.05", value_parser = parse_share, env = "CONFRERE_AUDIT")]
    pub audit: AuditShare,
}

impl RemoteArgs {
    pub fn options(&self) -> RemoteOptions {
        RemoteOptions { execute_at: AllowedPeers::new(&self.execute_at), audit: self.audit }
    }
}

pub(crate) fn parse_share(text: &str) -> Result<AuditShare, String> {
    text.parse().ok().and_then(AuditShare::of).ok_or_else(|| format!("{text:?} is not a number from 0 to 1"))
}

/// Pictures, videos and sounds of a prompt, in the order in which they are named.
#[derive(Clone, Debug, Default)]
pub struct MediaArgs {
    given: Vec<(MediumKind, PathBuf)>,
    fps: f64,
    video_sound: bool,
}

impl MediaArgs {
    const FLAGS: [(&str, MediumKind); 3] = [("image", MediumKind::Image), ("audio", MediumKind::Audio), ("video", MediumKind::Video)];

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.given.is_empty()
    }

    /// The media, as they are to be read.
    pub fn media(&self) -> Vec<GivenMedium> {
        self.given.iter().map(|(kind, path)| self.medium(*kind, path.clone())).collect()
    }

    /// One more, read as these are.
    pub fn medium(&self, kind: MediumKind, path: PathBuf) -> GivenMedium {
        let sound = (kind == MediumKind::Video && self.video_sound).then_some(MediaSound::Own);
        GivenMedium { kind, name: path.display().to_string(), source: MediaSource::Path(path), fps: self.fps, sound }
    }
}

impl Args for MediaArgs {
    fn augment_args(command: clap::Command) -> clap::Command {
        let file = |name: &'static str, help: &'static str| {
            let file = Arg::new(name).long(name).value_name("FILE").action(ArgAction::Append).value_parser(value_parser!(PathBuf));
            file.help(help).conflicts_with("raw")
        };
        command
            .arg(file("image", "Ask about a picture (PNG, JPEG, WebP, GIF, BMP); may be given again"))
            .arg(file("audio", "Ask about a sound (WAV, FLAC, MP3, Ogg, M4A); may be given again"))
            .arg(file(
                "video",
                "Ask about a video: an animated GIF, WebP or PNG, a folder of pictures, or what ffmpeg reads; may be given again",
            ))
            .arg(
                Arg::new("fps")
                    .long("fps")
                    .value_name("N")
                    .default_value("2")
                    .value_parser(parse_fps)
                    .help("Frames of a video that are looked at in a second; of a folder, those that it has"),
            )
            .arg(Arg::new("video_sound").long("video-sound").action(ArgAction::SetTrue).help("Hear the videos' own sound, too"))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for MediaArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut given = Vec::new();
        for (flag, kind) in Self::FLAGS {
            let paths = matches.get_many::<PathBuf>(flag).into_iter().flatten();
            given.extend(matches.indices_of(flag).into_iter().flatten().zip(paths).map(|(at, path)| (at, kind, path.clone())));
        }
        given.sort_by_key(|(at, ..)| *at);
        Ok(Self {
            given: given.into_iter().map(|(_, kind, path)| (kind, path)).collect(),
            fps: matches.get_one::<f64>("fps").copied().unwrap_or(FPS_DEFAULT),
            video_sound: matches.get_flag("video_sound"),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// How much of pictures, videos and sounds is taken.
#[derive(Args, Clone, Copy, Debug)]
#[expect(clippy::struct_field_names, reason = "the fields are flags of all commands that take media")]
pub struct MediaLimitArgs {
    /// Most bytes of a picture, a video or a sound [default: 64MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, env = "CONFRERE_MEDIA_BYTES")]
    media_bytes: Option<u64>,
    /// Most pixels of a picture or of a frame, as its file has them [default: 67108864]
    #[arg(long, value_name = "N", env = "CONFRERE_MEDIA_PIXELS")]
    media_pixels: Option<u64>,
    /// Most frames of a video that are looked at [default: 768]
    #[arg(long, value_name = "N", env = "CONFRERE_MEDIA_FRAMES")]
    media_frames: Option<usize>,
    /// Most seconds of a sound or a video [default: 1200]
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, env = "CONFRERE_MEDIA_SECONDS")]
    media_seconds: Option<f64>,
    /// Most places of a prompt that one of them may take [default: 32768]
    #[arg(long, value_name = "N", env = "CONFRERE_MEDIA_TOKENS")]
    media_tokens: Option<usize>,
}

impl MediaLimitArgs {
    /// The limits in force.
    pub fn limits(&self) -> MediaLimits {
        let own = MediaLimits::default();
        MediaLimits {
            bytes: self.media_bytes.unwrap_or(own.bytes),
            pixels: self.media_pixels.unwrap_or(own.pixels),
            frames: self.media_frames.unwrap_or(own.frames),
            seconds: self.media_seconds.unwrap_or(own.seconds),
            tokens: self.media_tokens.unwrap_or(own.tokens),
        }
    }
}

fn parse_fps(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|fps| (0.01..=120.0).contains(fps)).ok_or_else(|| format!("{text:?} is not a number from 0.01 to 120"))
}

/// What every command may use.
pub struct Context {
    pub dir: DataDir,
    pub runtime: Runtime,
    pub json: bool,
    pub offline: bool,
    pub disk_max: u64,
    pub memory_max: u64,
    /// Options that are on the command line.
    pub given: Vec<String>,
}

impl Context {
    /// Takes the data directory for this command alone.
    pub fn lock(&self) -> Result<OpenDataDir, Failure> {
        self.dir.lock(self.disk_max).map_err(|failure| match failure.kind {
            Kind::Busy => Failure { message: format!("{}, and this needs it for itself", failure.message), ..failure },
            _ => failure,
        })
    }
}

/// Who has the data directory.
pub enum Held {
    Here(OpenDataDir),
    /// A node that serves, which is asked.
    Daemon(Daemon),
}

impl Context {
    /// Takes the data directory, or finds the node that has it.
    pub fn open(&self) -> Result<Held, Failure> {
        match self.lock() {
            Err(busy) if busy.kind == Kind::Busy => match Daemon::of(&self.dir)? {
                Some(daemon) => Ok(Held::Daemon(daemon)),
                None => Err(busy),
            },
            held => held.map(Held::Here),
        }
    }

    /// Refuses options that a node which serves already would not heed: it has its own.
    pub fn only_given(&self, heeded: &[&str]) -> Result<(), Failure> {
        const ALWAYS: [&str; 4] = ["json", "quiet", "verbose", "data_dir"];
        let other = self.given.iter().find(|given| !ALWAYS.contains(&given.as_str()) && !heeded.contains(&given.as_str()));
        other.map_or(Ok(()), |other| {
            let option = if other == "peers" { "peer".to_owned() } else { other.replace('_', "-") };
            let why = "the node that serves from this data directory answers, with its own settings";
            Err(Failure::new(Kind::Busy, format!("--{option} would not be heeded: {why}; leave it out, or stop that node")))
        })
    }

    /// Does something on the network until it ends or the user presses Ctrl-C.
    pub fn wait<T>(&self, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        self.runtime.block_on(unless_interrupted(work))
    }

    /// Asks a node that serves for something.
    pub fn ask(&self, daemon: &Daemon, path: &str) -> Result<Value, Failure> {
        self.wait(daemon.get(path))
    }
}

/// Reads a number of seconds.
pub fn parse_seconds(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|seconds| (0.0..=1e6).contains(seconds)).ok_or_else(|| format!("{text:?} is not a number of seconds"))
}

/// Largest size that is taken, 1 EiB: a larger one is a mistake, and no limit.
const SIZE_MAX: u64 = 1 << 60;

/// Reads a size: a number of bytes, or one with kB, MB, GB, TB or KiB, MiB, GiB, TiB.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" => 1000,
        "m" | "mb" => 1000_u64.pow(2),
        "g" | "gb" => 1000_u64.pow(3),
        "t" | "tb" => 1000_u64.pow(4),
        "ki" | "kib" => 1 << 10,
        "mi" | "mib" => 1 << 20,
        "gi" | "gib" => 1 << 30,
        "ti" | "tib" => 1 << 40,
        other => return Err(format!("{other:?} is not a unit; write 500MB or 4GiB")),
    };
    let number: f64 = number.parse().map_err(|_| format!("{text:?} is not a size; write 500MB or 4GiB"))?;
    let bytes = number * factor as f64;
    if bytes > SIZE_MAX as f64 {
        return Err(format!("{text:?} is more than any machine has"));
    }
    Ok(bytes as u64)
}
