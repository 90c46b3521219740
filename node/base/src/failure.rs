//! What a command could not do, and the exit code that says so. The codes are a contract: people script against them.

use std::path::Path;
use std::{fmt, io};

use inference::calibration::CalibrationError;
use inference::checkpoint::CheckpointError;
use inference::checkpoint::import::ImportError;
use inference::engine::ForwardError;
use inference::expert_source::SourceError;
use inference::experts::ExpertsError;
use inference::generate::GenerateError;
use inference::memory::BudgetTooSmall;
use inference::perplexity::PerplexityError;
use inference::profiler::ProfileError;
use inference::requantize::RequantizeError;
use inference::tokenizer::TokenizerError;
use inference::weights::LoadError;
use protocol::manifest::ManifestError;
use store::{LockError, StoreError};

/// The kind of a failure, by exit code.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Whoever read the output has gone: a reason to stop, and no failure.
    Unread = 0,
    Other = 1,
    Usage = 2,
    NotFound = 3,
    NoPeers = 4,
    Integrity = 5,
    Disk = 6,
    Refused = 7,
    Busy = 8,
    Interrupted = 130,
}

/// A failure with the text that the user reads.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    pub kind: Kind,
    pub message: String,
}

impl Failure {
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// An error with all of its causes.
    pub fn of(kind: Kind, error: &dyn std::error::Error) -> Self {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            let cause_text = cause.to_string();
            // Some errors say nothing of their own, or repeat what caused them.
            if message.is_empty() {
                message = cause_text;
            } else if !cause_text.is_empty() && !message.ends_with(&cause_text) {
                message = format!("{message}: {cause_text}");
            }
            source = cause.source();
        }
        Self { kind, message }
    }

    pub fn interrupted() -> Self {
        Self::new(Kind::Interrupted, "interrupted")
    }

    /// The same failure, said of something.
    #[must_use]
    pub fn about(self, what: impl fmt::Display) -> Self {
        Self { message: format!("{what}: {}", self.message), ..self }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let kind = match &error {
            StoreError::QuotaExceeded { .. } | StoreError::DiskFull { .. } => Kind::Disk,
            StoreError::WrongBytes { .. } | StoreError::Damaged { .. } => Kind::Integrity,
            StoreError::Arriving { .. } | StoreError::Io { .. } => Kind::Other,
        };
        Self::of(kind, &error)
    }
}

impl From<LockError> for Failure {
    fn from(error: LockError) -> Self {
        let kind = match &error {
            LockError::Held { .. } => Kind::Busy,
            LockError::Io { .. } => Kind::Other,
        };
        Self::of(kind, &error)
    }
}

impl From<CheckpointError> for Failure {
    fn from(error: CheckpointError) -> Self {
        let kind = match &error {
            CheckpointError::Refused(_) => Kind::Integrity,
            CheckpointError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => Kind::NotFound,
            CheckpointError::Io { .. } => Kind::Other,
        };
        Self::of(kind, &error)
    }
}

impl From<ImportError> for Failure {
    fn from(error: ImportError) -> Self {
        match error {
            ImportError::Refused(error) => error.into(),
            ImportError::Interrupted => Self::interrupted(),
            ImportError::Manifest(error) => error.into(),
            ImportError::Sink(_) => Self::of(Kind::Other, &error),
        }
    }
}

impl From<RequantizeError<Failure>> for Failure {
    fn from(error: RequantizeError<Failure>) -> Self {
        match error {
            RequantizeError::Read(what, failure) => failure.about(what),
            RequantizeError::Import(error) => error.into(),
            RequantizeError::Calibration(error) => error.into(),
            RequantizeError::Packed(_) | RequantizeError::Same => Self::of(Kind::Usage, &error),
        }
    }
}

impl From<CalibrationError> for Failure {
    fn from(error: CalibrationError) -> Self {
        match error {
            CalibrationError::Forward(error) => error.into(),
            CalibrationError::Empty => Self::of(Kind::Usage, &error),
            CalibrationError::Interrupted => Self::interrupted(),
        }
    }
}

impl From<ManifestError> for Failure {
    fn from(error: ManifestError) -> Self {
        Self::of(Kind::Integrity, &error)
    }
}

impl From<BudgetTooSmall> for Failure {
    fn from(error: BudgetTooSmall) -> Self {
        Self::of(Kind::Usage, &error)
    }
}

impl From<LoadError<Failure>> for Failure {
    fn from(error: LoadError<Failure>) -> Self {
        match error {
            LoadError::Read { tensor, source } => source.about(format_args!("cannot load {tensor}")),
            LoadError::WrongBytes(_) => Self::of(Kind::Integrity, &error),
        }
    }
}

impl Failure {
    /// What our own sources report, they report as a failure.
    fn of_source(error: SourceError) -> Self {
        match error.0.downcast::<Self>() {
            Ok(failure) => *failure,
            Err(other) => Self::new(Kind::Other, other.to_string()),
        }
    }
}

impl From<ExpertsError> for Failure {
    fn from(error: ExpertsError) -> Self {
        match error {
            ExpertsError::Source(source) => Self::of_source(source),
            ExpertsError::Expert { .. } | ExpertsError::Router { .. } => Self::of(Kind::Integrity, &error),
        }
    }
}

impl From<ForwardError> for Failure {
    fn from(error: ForwardError) -> Self {
        match error {
            ForwardError::Experts(error) => error.into(),
            ForwardError::Token { .. } | ForwardError::Context { .. } | ForwardError::Shape(_) => Self::of(Kind::Usage, &error),
        }
    }
}

impl From<GenerateError> for Failure {
    fn from(error: GenerateError) -> Self {
        match error {
            GenerateError::Forward(error) => error.into(),
            GenerateError::EmptyPrompt | GenerateError::PromptTooLong { .. } => Self::of(Kind::Usage, &error),
            GenerateError::NotFinite(_) => Self::of(Kind::Integrity, &error),
            GenerateError::Tokenizer(_) => Self::of(Kind::Other, &error),
            GenerateError::Tower(source) => Self::of_source(source),
        }
    }
}

impl From<TokenizerError> for Failure {
    fn from(error: TokenizerError) -> Self {
        Self::new(Kind::Usage, error.to_string())
    }
}

impl From<ProfileError> for Failure {
    fn from(error: ProfileError) -> Self {
        match error {
            ProfileError::Read(error) => error.into(),
            ProfileError::Forward(error) => error.into(),
            ProfileError::Tokenizer(error) => error.into(),
            ProfileError::Other => Self::new(Kind::Integrity, error.to_string()),
        }
    }
}

impl From<PerplexityError> for Failure {
    fn from(error: PerplexityError) -> Self {
        match error {
            PerplexityError::Forward(error) => error.into(),
            PerplexityError::Interrupted => Self::interrupted(),
            PerplexityError::TooShort => Self::of(Kind::Usage, &error),
            PerplexityError::NotFinite(_) => Self::of(Kind::Integrity, &error),
            PerplexityError::Tokenizer(_) => Self::of(Kind::Other, &error),
        }
    }
}

/// What the operating system did not do with a file.
pub fn io_failure(action: &str, path: &Path, error: &io::Error) -> Failure {
    let kind = match error.kind() {
        io::ErrorKind::NotFound => Kind::NotFound,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Kind::Disk,
        _ => Kind::Other,
    };
    Failure::new(kind, format!("cannot {action} {}: {error}", path.display()))
}
