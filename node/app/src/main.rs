//! Confrere: a node that runs Mixture-of-Experts models together with its peers.

mod cli;

use std::process::ExitCode;

use base::failure::Kind;
use runtime::sandbox;

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
