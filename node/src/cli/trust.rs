//! `confrere trust`: what this node thinks of its peers, and why.

use std::collections::BTreeMap;

use clap::Subcommand;
use protocol::NodeId;
use protocol::record::Facet;
use protocol::trust::tally::GOOD_MAX;
use protocol::trust::{EXECUTION_GATE, Opinion, RATER_MIN, Ruling, score};
use serde_json::{Value, json};

use super::Context;
use crate::clock::now_ms;
use crate::failure::Failure;
use crate::net::address::peer_id;
use crate::output::{note, print_json, print_line};
use crate::probes;
use crate::records::{SharedRecords, parse_peer};

#[derive(Subcommand)]
pub(super) enum TrustCommand {
    /// List the peers of whom something was seen, with their scores
    Ls,
    /// Say how a peer's scores come about
    Explain {
        /// A peer's key (ed25519:…) or id (12D3Koo…)
        peer: String,
    },
}

pub(super) fn trust(context: &Context, command: &TrustCommand) -> Result<(), Failure> {
    let records = SharedRecords::load(&context.dir, [probes::shipped().hash()])?;
    match command {
        TrustCommand::Ls => ls(context, &records),
        TrustCommand::Explain { peer } => explain(context, &records, parse_peer(peer)?),
    }
}

fn opinions(records: &SharedRecords, peer: &NodeId, now_ms: u64) -> Vec<(Facet, Opinion)> {
    let records = records.lock();
    let opinion = |facet| (facet, records.trust.opinion(now_ms, peer, facet, &records.voices(now_ms, peer, facet)));
    Facet::ALL.into_iter().map(opinion).collect()
}

fn ls(context: &Context, records: &SharedRecords) -> Result<(), Failure> {
    let now_ms = now_ms();
    let peers: BTreeMap<NodeId, Option<Ruling>> = {
        let records = records.lock();
        let seen = records.trust.tallies().map(|(peer, ..)| peer).chain(records.trust.rulings().keys().copied());
        seen.map(|peer| (peer, records.trust.rulings().get(&peer).copied())).collect()
    };
    if context.json {
        let peers: Vec<_> = peers.iter().map(|(peer, ruling)| peer_json(peer, *ruling, &opinions(records, peer, now_ms))).collect();
        return print_json(&peers);
    }
    print_line(&format!("{:>9} {:>9} {:>9}  peer", "bytes", "execution", "profile"))?;
    for (peer, ruling) in peers {
        let scores: Vec<_> = opinions(records, &peer, now_ms).iter().map(|(_, opinion)| format!("{:>9.3}", opinion.ordering)).collect();
        let ruling = ruling.map_or("", |ruling| if ruling == Ruling::Banned { "  banned" } else { "  allowed" });
        print_line(&format!("{}  {peer}{ruling}", scores.join(" ")))?;
    }
    note(&format!("scores go from 0 to 0.88; nobody knows anything of a peer with {:.3}. confrere trust explain PEER", score(0.0, 0.0)));
    Ok(())
}

fn peer_json(peer: &NodeId, ruling: Option<Ruling>, opinions: &[(Facet, Opinion)]) -> Value {
    let mut json = json!({
        "peer": peer.to_string(), "peer_id": peer_id(*peer).map(|id| id.to_string()),
        "ruling": ruling.map(|ruling| if ruling == Ruling::Banned { "banned" } else { "allowed" }),
    });
    for (facet, opinion) in opinions {
        let hearsay: Vec<_> = opinion
            .hearsay
            .iter()
            .map(|(voice, adds)| json!({"rater": voice.rater.to_string(), "good": voice.good, "bad": voice.bad, "adds": adds}))
            .collect();
        json[facet.name()] = json!({
            "score": opinion.ordering, "first_hand": opinion.first_hand, "good": opinion.tally.good, "bad": opinion.tally.bad,
            "seen_good": opinion.tally.seen.0, "seen_bad": opinion.tally.seen.1, "hearsay": hearsay, "hearsay_good": opinion.hearsay_good,
        });
    }
    json
}

fn explain(context: &Context, records: &SharedRecords, peer: NodeId) -> Result<(), Failure> {
    let now_ms = now_ms();
    let (ruling, unwelcome) = {
        let records = records.lock();
        (records.trust.rulings().get(&peer).copied(), records.trust.is_unwelcome(now_ms, &peer))
    };
    let opinions = opinions(records, &peer, now_ms);
    if context.json {
        let mut json = peer_json(&peer, ruling, &opinions);
        json["unwelcome"] = json!(unwelcome);
        return print_json(&json);
    }
    print_line(&peer.to_string())?;
    for (facet, opinion) in &opinions {
        words(*facet, opinion).iter().try_for_each(|line| print_line(line))?;
    }
    match (ruling, unwelcome) {
        (Some(Ruling::Banned), _) => print_line("You have banned it: it is not talked to (confrere peers allow PEER)."),
        (Some(Ruling::Allowed), _) => print_line("You have allowed it: it is used whatever its scores."),
        (None, true) => print_line(
            "More of its work was proven wrong than right: it is not talked to until that has faded (confrere peers allow PEER).",
        ),
        (None, false) => Ok(()),
    }
}

/// A score, and every term that made it.
fn words(facet: Facet, opinion: &Opinion) -> Vec<String> {
    let Opinion { tally, first_hand, hearsay, hearsay_good, ordering } = opinion;
    let mut lines = vec![format!("{}: {ordering:.3}", facet.name())];
    if tally.seen == (0, 0) {
        lines.push("  nothing was seen of it here".to_owned());
    } else {
        let (good, bad) = tally.seen;
        lines.push(format!("  seen here: good {good} times, bad {bad} times"));
        let capped = if tally.good > GOOD_MAX - 0.5 { format!(", of which no more than {GOOD_MAX:.0} count") } else { String::new() };
        lines.push(format!("  left of the good: {:.2} (half is forgotten in 7 days{capped})", tally.good));
        let of_wrong = if tally.wrong > 0.0 { format!(", {:.2} of it proven wrong", tally.wrong) } else { String::new() };
        lines.push(format!("  left of the bad: {:.2} (10 for a wrong result or claim, 2 for wrong bytes, 0.5 for a time-out; half is forgotten in 30 days{of_wrong})", tally.bad));
    }
    let (a, b) = (1.0 + tally.good, 1.0 + tally.bad);
    lines.push(format!("  from that alone: {first_hand:.3} = the mean {:.3} less 1.64 standard deviations", a / (a + b)));
    for (voice, adds) in hearsay {
        lines.push(format!("  {} says: good {} times, bad {} times; that adds {adds:.2} to the good", voice.rater, voice.good, voice.bad));
    }
    if !hearsay.is_empty() {
        lines.push(format!(
            "  with what others say, {hearsay_good:.2} more of good (no more than 5): {ordering:.3}, for the order in which peers are asked"
        ));
    }
    let meaning = match facet {
        Facet::Execution if *first_hand >= EXECUTION_GATE => {
            format!("above {EXECUTION_GATE}: what was seen here would do for running experts")
        }
        Facet::Execution => format!("below {EXECUTION_GATE}: it runs experts only where --execute-at names it"),
        Facet::Bytes | Facet::Profile if *first_hand >= RATER_MIN => format!("above {RATER_MIN}: what it says of others is listened to"),
        Facet::Bytes | Facet::Profile => format!("below {RATER_MIN}: what it says of others is not listened to"),
    };
    lines.push(format!("  that is {meaning}"));
    lines
}
