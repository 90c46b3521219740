//! `confrere repo`: counting, verifying and cleaning the store.

use base::clock::{check_interrupted, interrupted, now_ms};
use base::failure::{Failure, Kind};
use base::output::{byte_bar, human_bytes, note, print_json, print_line};
use clap::Subcommand;
use runtime::command::{Context, Held};
use runtime::models::stat_json;
use serde_json::json;
use store::scrub::scrub;

#[derive(Subcommand)]
pub(super) enum RepoCommand {
    /// Count blobs and bytes
    Stat,
    /// Read every blob and compare it with its hash; damaged ones are put aside
    Verify,
    /// Remove the blobs that no model uses
    Gc,
}

pub(super) fn repo(context: &Context, command: &RepoCommand) -> Result<(), Failure> {
    match command {
        RepoCommand::Stat => stat(context),
        RepoCommand::Verify => verify(context),
        RepoCommand::Gc => gc(context),
    }
}

fn stat(context: &Context) -> Result<(), Failure> {
    let stat = match context.open()? {
        Held::Here(open) => open.store.stat().map(|stat| stat_json(&stat))?,
        Held::Daemon(daemon) => context.ask(&daemon, "/api/store")?,
    };
    if context.json {
        return print_json(&stat);
    }
    let number = |name: &str| stat[name].as_u64().unwrap_or(0);
    print_line(&format!("blobs        {}", number("blobs")))?;
    print_line(&format!("bytes        {}", human_bytes(number("bytes"))))?;
    print_line(&format!("quota        {}", stat["bytes_max"].as_u64().map_or_else(|| "none".to_owned(), human_bytes)))?;
    print_line(&format!("disk free    {}", human_bytes(number("disk_free_bytes"))))?;
    print_line(&format!("quarantined  {}", number("quarantined")))?;
    let age = match (number("unverified"), stat["oldest_verified_at_ms"].as_u64()) {
        (0, None) => "nothing to verify".to_owned(),
        (0, Some(at)) => format!("all within {} days", now_ms().saturating_sub(at) / 86_400_000 + 1),
        (count, _) => format!("not yet: {count} blobs (confrere repo verify)"),
    };
    print_line(&format!("verified     {age}"))
}

fn verify(context: &Context) -> Result<(), Failure> {
    let open = context.lock()?;
    let bar = byte_bar(open.store.stat()?.bytes, "verify");
    let report = scrub(&open.store, now_ms, |bytes| {
        bar.set_position(bytes);
        !interrupted()
    });
    bar.finish_and_clear();
    let damaged: Vec<_> = report.damaged.iter().map(ToString::to_string).collect();
    let unreadable: Vec<_> = report.unreadable.iter().map(|(hash, why)| format!("{hash}: {why}")).collect();
    let printed = if context.json {
        print_json(&json!({"verified": report.verified, "bytes": report.bytes, "damaged": damaged, "unreadable": unreadable}))
    } else {
        let lines = damaged.iter().map(|hash| format!("damaged, put into quarantine: {hash}"));
        let lines = lines.chain(unreadable.iter().map(|line| format!("cannot be read: {line}")));
        let first = format!("{} blobs are what they should be ({})", report.verified, human_bytes(report.bytes));
        std::iter::once(first).chain(lines).try_for_each(|line| print_line(&line))
    };
    check_interrupted()?;
    if damaged.is_empty() && unreadable.is_empty() {
        return printed;
    }
    // Whether anybody reads it or not.
    Err(Failure::new(
        Kind::Integrity,
        format!("{} damaged and {} unreadable blobs; peers or another import can replace them", damaged.len(), unreadable.len()),
    ))
}

fn gc(context: &Context) -> Result<(), Failure> {
    let (blobs, bytes) = context.lock()?.collect_garbage()?;
    if context.json {
        return print_json(&json!({"blobs_removed": blobs, "bytes_removed": bytes}));
    }
    note(&format!("removed {blobs} blobs, {}", human_bytes(bytes)));
    Ok(())
}
