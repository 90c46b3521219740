//! Confrere: a node that runs Mixture-of-Experts models together with its peers.

mod announcer;
mod api;
mod claims;
mod cli;
mod clock;
mod daemon;
mod data_dir;
mod dispatcher;
mod evidence;
mod failure;
mod federation;
mod generation;
mod library;
mod loading;
mod memory;
mod models;
mod net;
mod opinions;
mod output;
mod peer_book;
mod places;
mod probes;
mod profiles;
mod prompt;
mod pulling;
mod records;
mod sandbox;
mod secret_file;
mod specialists;
mod threads;
mod usage;

use std::process::ExitCode;

use failure::Kind;

fn main() -> ExitCode {
    if let Some(code) = sandbox::child() {
        return code;
    }
    match cli::main() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) if failure.kind == Kind::Unread => ExitCode::SUCCESS,
        Err(failure) => {
            // Even with --quiet: whoever asked must know why there is no answer.
            eprintln!("error: {failure}");
            ExitCode::from(failure.kind as u8)
        }
    }
}
