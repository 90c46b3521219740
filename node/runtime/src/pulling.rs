//! Bringing a model, or part of it, from peers into the store; and learning a peer's models from its ticket.

use std::collections::BTreeSet;
use std::time::Duration;

use base::failure::{Failure, Kind};
use base::output::note;
use net::address::{peer_id, peer_of, with_peer};
use net::{Multiaddr, PeerId};
use protocol::message::Listing;
use protocol::ticket::Ticket;
use protocol::{BlobRef, NodeId};

use crate::claims::{self, Claims, unknown_domain};
use crate::data_dir::{DataDir, LocalModel, OpenDataDir, Resolved};
use crate::federation::{Federation, expert_parts, other_parts, trunk_parts};
use crate::specialists::own_body;

/// For peers to turn up.
pub const SETTLE: Duration = Duration::from_secs(3);

/// Which part of a model.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PullScope {
    Trunk,
    All,
    /// The trunk, and experts up to so many bytes: those that the fewest peers have.
    Rarest(u64),
    /// The trunk, and the experts that a domain uses most, up to so many bytes.
    Domain(String, Option<u64>),
}

/// Fetches a part of a model; no more than `disk_max` bytes of blobs may be in the store. Returns how many bytes came.
pub fn pull(federation: &Federation, open: &OpenDataDir, model: &LocalModel, part: &PullScope, disk_max: u64) -> Result<u64, Failure> {
    let trunk = federation.bring(&open.store, &trunk_parts(&model.manifest), "trunk")?;
    let experts = match part {
        PullScope::Trunk => return Ok(trunk),
        PullScope::All => other_parts(&model.manifest),
        PullScope::Rarest(bytes_max) => federation.rarest(&open.store, &model.manifest, *bytes_max)?,
        PullScope::Domain(domain, bytes_max) => of_domain(federation, open, model, (domain, *bytes_max), disk_max)?,
    };
    Ok(trunk + federation.bring(&open.store, &experts, "experts")?)
}

/// The experts that a domain uses most, by what is measured here or, failing that, by what the peer says who is trusted most; as many as fit.
fn of_domain(
    federation: &Federation,
    open: &OpenDataDir,
    model: &LocalModel,
    (domain, bytes_max): (&str, Option<u64>),
    disk_max: u64,
) -> Result<Vec<(BlobRef, String)>, Failure> {
    let mut claims = Claims::default();
    if let (Some(body), Some(profile)) = (own_body(open, model)?, open.dir.profile(model.id)?) {
        claims.add_own(open.dir.key()?.id(), profile.arithmetic, body);
    } else if let Some(network) = federation.settle(SETTLE)? {
        claims = claims::collect(federation, (open, &network), model, domain, None)?;
    }
    let order = claims.by_use(domain);
    if order.is_empty() {
        claims.domains.extend(claims.held.iter().flat_map(|claim| claim.body.names().into_iter().map(str::to_owned)));
        claims.domains.sort();
        claims.domains.dedup();
        return Err(unknown_domain(domain, &claims.domains, &claims));
    }
    let stat = open.store.stat()?;
    let parts = expert_parts(&model.manifest);
    let here = parts.iter().filter(|(blob, _)| open.store.contains(&blob.hash)).map(|(blob, _)| blob.length).sum();
    let of_experts = bytes_max.map_or(u64::MAX, |most| most.saturating_sub(here));
    let mut left = of_experts.min(disk_max.saturating_sub(stat.bytes));
    let mut fits = |blob: &BlobRef| open.store.contains(&blob.hash) || left.checked_sub(blob.length).inspect(|now| left = *now).is_some();
    Ok(order.into_iter().map(|number| parts[number].clone()).filter(|(blob, _)| fits(blob)).collect())
}

/// A peer, as its ticket names it.
pub struct Introduced {
    pub node: NodeId,
    pub peer: PeerId,
    pub addresses: Vec<Multiaddr>,
}

/// Trusts a ticket's key and keeps its addresses and `more`; where the node has moved, the new ones replace the old.
pub fn introduce(dir: &DataDir, ticket: &Ticket, more: &[Multiaddr]) -> Result<Introduced, Failure> {
    let node = ticket.node;
    if node == dir.key()?.id() {
        return Err(Failure::new(Kind::Usage, "this is the node's own ticket; it is for the other devices"));
    }
    let peer = peer_id(node).ok_or_else(|| Failure::new(Kind::Usage, "the ticket's key is not a key"))?;
    let addresses = ticket.addresses.iter().map(|text| {
        let address: Multiaddr = text.parse().map_err(|error| Failure::new(Kind::Usage, format!("the ticket names {text:?}: {error}")))?;
        Ok(with_peer(address, peer))
    });
    let mut addresses: Vec<_> = addresses.collect::<Result<_, Failure>>()?;
    addresses.extend(more.iter().map(|address| with_peer(address.clone(), peer)));
    // Each is dialled once, however often it is named.
    let mut seen = BTreeSet::new();
    addresses.retain(|address| seen.insert(address.clone()));
    let _editing = dir.files.exclusive()?;
    let mut publishers = dir.publishers()?;
    publishers.insert(node);
    dir.set_publishers(&publishers)?;
    let mut known = dir.peers()?;
    known.retain(|address| peer_of(address) != Some(peer));
    known.extend_from_slice(&addresses);
    dir.set_peers(&known)?;
    Ok(Introduced { node, peer, addresses })
}

/// Keeps the manifests of a listing, under its names where those are free. What is here already stays as it is.
pub fn learn(open: &OpenDataDir, federation: &Federation, listing: Listing) -> Result<Vec<LocalModel>, Failure> {
    let mut models = Vec::new();
    for (name, id) in listing.models {
        if let Ok(Resolved::Here(model)) = open.resolve(&id.to_string()) {
            models.push(model);
            continue;
        }
        let free = open.check_name(&name, Some(id)).is_ok();
        match federation.fetch_manifest(open, id, free.then_some(name.as_str())) {
            Ok(model) => models.push(model),
            // One model too many or too large is no reason not to learn of the others.
            Err(failure) if matches!(failure.kind, Kind::Refused | Kind::Disk) => note(&format!("{name} is left out: {failure}")),
            Err(failure) => return Err(failure),
        }
    }
    Ok(models)
}
