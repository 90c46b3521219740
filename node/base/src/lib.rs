//! What every crate of the node stands on: failures with their exit codes, the clock, the terminal, threads that are watched, small files.

#![expect(missing_docs, reason = "the crates of the node are public to one another only, and many a name says it all")]

pub mod clock;
pub mod failure;
pub mod files;
pub mod output;
pub mod secret_file;
pub mod threads;
