//! `confrere join`: all that one's own second device needs. Trusts the ticket's key, remembers its addresses, learns its models.

use clap::Args;
use protocol::ticket::Ticket;
use serde_json::json;

use super::{Context, PeerArgs};
use crate::failure::{Failure, Kind};
use crate::federation::Federation;
use crate::net::Multiaddr;
use crate::net::address::{peer_id, peer_of, with_peer};
use crate::output::{note, print_json, print_line};

#[derive(Args)]
pub(super) struct JoinArgs {
    /// The ticket that `confrere serve` prints
    ticket: Ticket,
    #[command(flatten)]
    peers: PeerArgs,
}

pub(super) fn join(context: &Context, args: &JoinArgs) -> Result<(), Failure> {
    let mut open = context.lock()?;
    let node = args.ticket.node;
    let peer = peer_id(node).ok_or_else(|| Failure::new(Kind::Usage, "the ticket's key is not a key"))?;
    let mut publishers = open.dir.publishers()?;
    publishers.insert(node);
    open.dir.set_publishers(&publishers)?;
    let addresses = args.ticket.addresses.iter().map(|text| {
        let address: Multiaddr = text.parse().map_err(|error| Failure::new(Kind::Usage, format!("the ticket names {text:?}: {error}")))?;
        Ok(with_peer(address, peer))
    });
    let addresses: Vec<_> = addresses.collect::<Result<_, Failure>>()?;
    // The node may have moved: its new addresses replace the old ones.
    let mut known = open.dir.peers()?;
    known.retain(|address| peer_of(address) != Some(peer));
    known.extend(addresses);
    open.dir.set_peers(&known)?;
    note(&format!("joined {node}: its models are trusted"));
    let federation = Federation::connect(&context.runtime, &open.dir, &args.peers.options(), context.offline)?;
    let listing = match federation.listing() {
        Ok(listing) => listing,
        Err(failure) if failure.kind == Kind::NoPeers => {
            note(&format!("it does not answer now ({failure}); its models are known by id once it does"));
            return if context.json { print_json(&json!({"node": node.to_string(), "models": []})) } else { Ok(()) };
        }
        Err(failure) => return Err(failure),
    };
    let mut models = Vec::new();
    for (name, id) in listing.models {
        let free = open.check_name(&name, Some(id)).is_ok();
        match federation.fetch_manifest(&mut open, id, free.then_some(name.as_str())) {
            Ok(model) => models.push(model),
            Err(failure) => note(&format!("{name} is left out: {failure}")),
        }
    }
    if context.json {
        let models: Vec<_> = models.iter().map(|model| json!({"name": model.name, "id": model.id.to_string()})).collect();
        return print_json(&json!({"node": node.to_string(), "models": models}));
    }
    models.iter().for_each(|model| print_line(&format!("{}  {}", model.id, model.name)));
    Ok(())
}
