//! `confrere peers`: whom this node remembers: those it has joined, and those it has met and found useful.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::Context;
use crate::clock::now_ms;
use crate::failure::Failure;
use crate::net::group::GroupKey;
use crate::output::{print_json, print_line};

#[derive(Args)]
pub(super) struct PeersArgs {
    /// Those of a closed group, by the file with its key
    #[arg(long, value_name = "KEYFILE", env = "CONFRERE_PRIVATE")]
    private: Option<PathBuf>,
}

pub(super) fn peers(context: &Context, args: &PeersArgs) -> Result<(), Failure> {
    let group = args.private.as_deref().map(GroupKey::read).transpose()?;
    let joined = context.dir.peers()?;
    let book = context.dir.book(group.map(|group| group.fingerprint()).as_deref())?;
    if context.json {
        let joined = joined.iter().map(|address| json!({"address": address.to_string(), "source": "joined"}));
        let met = book.entries().into_iter().map(|entry| {
            json!({
                "address": entry.address.to_string(),
                "source": entry.source.to_string(),
                "last_seen_ms": entry.seen_ms,
                "served": entry.served,
                "silences": entry.silences,
            })
        });
        return print_json(&joined.chain(met).collect::<Vec<_>>());
    }
    joined.iter().try_for_each(|address| print_line(&format!("{address}  joined")))?;
    let now_ms = now_ms();
    book.entries().into_iter().try_for_each(|entry| {
        let minutes = now_ms.saturating_sub(entry.seen_ms) / 60_000;
        let seen = match minutes {
            0..120 => format!("{minutes} min"),
            120..2880 => format!("{} h", minutes / 60),
            _ => format!("{} days", minutes / 1440),
        };
        print_line(&format!("{}  {}, seen {seen} ago, of use in {} runs", entry.address, entry.source, entry.served))
    })
}
