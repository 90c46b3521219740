//! `confrere id` and `confrere publishers`: who this node is, and whose models it runs.

use base::failure::{Failure, Kind};
use base::output::{print_json, print_line};
use clap::Subcommand;
use net::address::peer_id;
use runtime::command::Context;
use serde_json::json;

use super::PublisherKey;

#[derive(Subcommand)]
pub(super) enum PublishersCommand {
    /// Trust the models of a key
    Add(PublisherKey),
    /// List the trusted keys
    Ls,
    /// No longer trust a key
    Rm(PublisherKey),
}

pub(super) fn id(context: &Context) -> Result<(), Failure> {
    let id = context.dir.key()?.id();
    if context.json {
        return print_json(&json!({"id": id.to_string(), "peer_id": peer_id(id).map(|peer| peer.to_string())}));
    }
    print_line(&id.to_string())
}

pub(super) fn publishers(context: &Context, command: &PublishersCommand) -> Result<(), Failure> {
    let _editing = context.dir.files.exclusive()?;
    let mut publishers = context.dir.publishers()?;
    match command {
        PublishersCommand::Add(PublisherKey { key }) => {
            publishers.insert(*key);
            context.dir.set_publishers(&publishers)?;
        }
        PublishersCommand::Rm(PublisherKey { key }) => {
            if !publishers.remove(key) {
                return Err(Failure::new(Kind::NotFound, format!("{key} is not among the trusted keys")));
            }
            context.dir.set_publishers(&publishers)?;
        }
        PublishersCommand::Ls if !context.json => publishers.iter().try_for_each(|key| print_line(&key.to_string()))?,
        PublishersCommand::Ls => {}
    }
    if context.json {
        let keys: Vec<_> = publishers.iter().map(ToString::to_string).collect();
        return print_json(&keys);
    }
    Ok(())
}
