//! `confrere join`: all that one's own second device needs. Trusts the ticket's key, remembers its addresses, learns its models.

use clap::Args;
use protocol::NodeId;
use protocol::message::Listing;
use protocol::ticket::Ticket;
use serde_json::json;

use super::{Context, PeerArgs};
use crate::data_dir::{DataDir, LocalModel, OpenDataDir, Resolved};
use crate::failure::{Failure, Kind};
use crate::federation::{Federation, PeerOptions};
use crate::net::address::{peer_id, peer_of, with_peer};
use crate::net::{Multiaddr, PeerId};
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
    if node == open.dir.key()?.id() {
        return Err(Failure::new(Kind::Usage, "this is the node's own ticket; it is for the other devices"));
    }
    let peer = peer_id(node).ok_or_else(|| Failure::new(Kind::Usage, "the ticket's key is not a key"))?;
    let addresses = args.ticket.addresses.iter().map(|text| {
        let address: Multiaddr = text.parse().map_err(|error| Failure::new(Kind::Usage, format!("the ticket names {text:?}: {error}")))?;
        Ok(with_peer(address, peer))
    });
    let addresses: Vec<_> = addresses.collect::<Result<_, Failure>>()?;
    remember(&open.dir, node, peer, &addresses)?;
    note(&format!("joined {node}: its models are trusted"));
    // This node alone is asked: what others call their models is not its business.
    let options = PeerOptions { peers: addresses, ..args.peers.options() };
    let federation = Federation::connect_to(context.runtime.handle(), &open.dir, options, context.offline)?;
    let models = match federation.listing() {
        Ok(listing) => learn(&mut open, &federation, listing)?,
        Err(failure) if failure.kind == Kind::NoPeers => {
            note(&format!("it does not answer now ({failure}); its models can be run by id once it does"));
            Vec::new()
        }
        Err(failure) => return Err(failure),
    };
    if context.json {
        let models: Vec<_> = models.iter().map(|model| json!({"name": model.name, "id": model.id.to_string()})).collect();
        return print_json(&json!({"node": node.to_string(), "models": models}));
    }
    models.iter().try_for_each(|model| print_line(&format!("{}  {}", model.id, model.name)))
}

/// Trusts the node's key and keeps its addresses; where it has moved, the new ones replace the old.
fn remember(dir: &DataDir, node: NodeId, peer: PeerId, addresses: &[Multiaddr]) -> Result<(), Failure> {
    let _editing = dir.exclusive()?;
    let mut publishers = dir.publishers()?;
    publishers.insert(node);
    dir.set_publishers(&publishers)?;
    let mut known = dir.peers()?;
    known.retain(|address| peer_of(address) != Some(peer));
    known.extend_from_slice(addresses);
    dir.set_peers(&known)
}

/// Keeps the manifests of a listing, under its names where those are free. What is here already stays as it is.
fn learn(open: &mut OpenDataDir, federation: &Federation, listing: Listing) -> Result<Vec<LocalModel>, Failure> {
    let mut models = Vec::new();
    for (name, id) in listing.models {
        if let Ok(Resolved::Here(model)) = open.resolve(&id.to_string()) {
            models.push(model);
            continue;
        }
        let free = open.check_name(&name, Some(id)).is_ok();
        match federation.fetch_manifest(open, id, free.then_some(name.as_str())) {
            Ok(model) => models.push(model),
            Err(failure) if failure.kind == Kind::Refused => note(&format!("{name} is left out: {failure}")),
            Err(failure) => return Err(failure),
        }
    }
    Ok(models)
}
