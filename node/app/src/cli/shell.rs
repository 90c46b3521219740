//! `confrere completions` and `man`: for shells and for manuals.

use std::path::{Path, PathBuf};

use base::failure::{Failure, io_failure};
use base::output::{note, print};
use clap::{Args, Command, ValueEnum};
use clap_complete::{Shell, generate};

/// Shells that completions are written for.
#[derive(Clone, Copy, ValueEnum)]
pub(super) enum Completed {
    Bash,
    Zsh,
    Fish,
}

#[derive(Args)]
pub(super) struct ManArgs {
    /// Where to write the pages, one a command [default: print that of confrere itself]
    directory: Option<PathBuf>,
}

pub(super) fn completions(mut command: Command, shell: Completed) -> Result<(), Failure> {
    let shell = match shell {
        Completed::Bash => Shell::Bash,
        Completed::Zsh => Shell::Zsh,
        Completed::Fish => Shell::Fish,
    };
    let mut script = Vec::new();
    generate(shell, &mut command, "confrere", &mut script);
    print(&String::from_utf8_lossy(&script))
}

pub(super) fn man(command: Command, args: &ManArgs) -> Result<(), Failure> {
    let Some(directory) = &args.directory else {
        return print(&String::from_utf8_lossy(&page(command, Path::new("standard output"))?));
    };
    std::fs::create_dir_all(directory).map_err(|error| io_failure("create", directory, &error))?;
    let mut command = command.disable_help_subcommand(true);
    command.build();
    let written = write_pages(&command, directory)?;
    note(&format!("wrote {written} pages"));
    Ok(())
}

fn write_pages(command: &Command, directory: &Path) -> Result<usize, Failure> {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
    let path = directory.join(format!("{name}.1"));
    let bytes = page(command.clone().name(name), &path)?;
    std::fs::write(&path, bytes).map_err(|error| io_failure("write", &path, &error))?;
    let subcommands = command.get_subcommands().filter(|sub| !sub.is_hide_set());
    subcommands.map(|sub| write_pages(sub, directory)).sum::<Result<usize, _>>().map(|below| below + 1)
}

fn page(command: Command, path: &Path) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    clap_mangen::Man::new(command).render(&mut bytes).map_err(|error| io_failure("write", path, &error))?;
    Ok(bytes)
}
