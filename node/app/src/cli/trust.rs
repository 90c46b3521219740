//! `confrere trust`: what this node thinks of its peers, and why.

use base::failure::Failure;
use base::output::{note, print_json, print_line};
use clap::Subcommand;
use net::records::parse_peer;
use protocol::record::Facet;
use protocol::trust::tally::GOOD_MAX;
use protocol::trust::{EXECUTION_GATE, RATER_MIN, score};
use runtime::command::Context;
use runtime::daemon::Daemon;
use runtime::opinions::{opinions_json, trusted_peers};
use serde_json::Value;

use super::encoded;

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
    // A node that serves has seen more than it has written down.
    let daemon = Daemon::of(&context.dir)?.filter(|_| context.lock().is_err());
    let records = || context.dir.load_records();
    match command {
        TrustCommand::Ls => {
            let here = || -> Result<Value, Failure> {
                let records = records()?;
                Ok(trusted_peers(&records).keys().map(|peer| opinions_json(&records, peer)).collect())
            };
            let peers = daemon.map_or_else(here, |daemon| context.ask(&daemon, "/api/trust"))?;
            ls(context, &peers)
        }
        TrustCommand::Explain { peer } => {
            let peer = parse_peer(peer)?;
            let opinions = match daemon {
                Some(daemon) => context.ask(&daemon, &format!("/api/trust/{}", encoded(&peer.to_string())))?,
                None => opinions_json(&records()?, &peer),
            };
            explain(context, &opinions)
        }
    }
}

fn ls(context: &Context, peers: &Value) -> Result<(), Failure> {
    if context.json {
        return print_json(peers);
    }
    print_line(&format!("{:>9} {:>9} {:>9}  peer", "bytes", "execution", "profile"))?;
    for peer in peers.as_array().into_iter().flatten() {
        let scores: Vec<_> = Facet::ALL.iter().map(|facet| format!("{:>9.3}", number(&peer[facet.name()]["score"]))).collect();
        let ruling = peer["ruling"].as_str().map_or_else(String::new, |ruling| format!("  {ruling}"));
        print_line(&format!("{}  {}{ruling}", scores.join(" "), peer["peer"].as_str().unwrap_or_default()))?;
    }
    note(&format!("scores go from 0 to 0.88; nobody knows anything of a peer with {:.3}. confrere trust explain PEER", score(0.0, 0.0)));
    Ok(())
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(0.0)
}

fn explain(context: &Context, opinions: &Value) -> Result<(), Failure> {
    if context.json {
        return print_json(opinions);
    }
    print_line(opinions["peer"].as_str().unwrap_or_default())?;
    for facet in Facet::ALL {
        words(facet, &opinions[facet.name()]).iter().try_for_each(|line| print_line(line))?;
    }
    match (opinions["ruling"].as_str(), &opinions["unwelcome"]) {
        (Some("banned"), _) => print_line("You have banned it: it is not talked to (confrere peers allow PEER)."),
        (Some(_), _) => print_line("You have allowed it: it is used whatever its scores."),
        (None, Value::Bool(true)) => print_line(
            "More of its work was proven wrong than right: it is not talked to until that has faded (confrere peers allow PEER).",
        ),
        (None, _) => Ok(()),
    }
}

/// A score, and every term that made it.
fn words(facet: Facet, opinion: &Value) -> Vec<String> {
    let [ordering, first_hand, hearsay_good, good, bad, wrong] =
        ["score", "first_hand", "hearsay_good", "good", "bad", "wrong"].map(|name| number(&opinion[name]));
    let mut lines = vec![format!("{}: {ordering:.3}", facet.name())];
    if opinion["seen_good"] == 0 && opinion["seen_bad"] == 0 {
        lines.push("  nothing was seen of it here".to_owned());
    } else {
        lines.push(format!("  seen here: good {} times, bad {} times", opinion["seen_good"], opinion["seen_bad"]));
        let capped = if good > GOOD_MAX - 0.5 { format!(", of which no more than {GOOD_MAX:.0} count") } else { String::new() };
        lines.push(format!("  left of the good: {good:.2} (half is forgotten in 7 days{capped})"));
        let of_wrong = if wrong > 0.0 { format!(", {wrong:.2} of it proven wrong") } else { String::new() };
        lines.push(format!("  left of the bad: {bad:.2} (10 for a wrong result or claim, 2 for wrong bytes, 0.5 for a time-out; half is forgotten in 30 days{of_wrong})"));
    }
    let (a, b) = (1.0 + good, 1.0 + bad);
    lines.push(format!("  from that alone: {first_hand:.3} = the mean {:.3} less 1.64 standard deviations", a / (a + b)));
    let hearsay = opinion["hearsay"].as_array().cloned().unwrap_or_default();
    for voice in &hearsay {
        let rater = voice["rater"].as_str().unwrap_or_default();
        let adds = number(&voice["adds"]);
        lines.push(format!("  {rater} says: good {} times, bad {} times; that adds {adds:.2} to the good", voice["good"], voice["bad"]));
    }
    if !hearsay.is_empty() {
        lines.push(format!(
            "  with what others say, {hearsay_good:.2} more of good (no more than 5): {ordering:.3}, for the order in which peers are asked"
        ));
    }
    let meaning = match facet {
        Facet::Execution if first_hand >= EXECUTION_GATE => {
            format!("above {EXECUTION_GATE}: what was seen here would do for running experts")
        }
        Facet::Execution => format!("below {EXECUTION_GATE}: it runs experts only where --execute-at names it"),
        Facet::Bytes | Facet::Profile if first_hand >= RATER_MIN => format!("above {RATER_MIN}: what it says of others is listened to"),
        Facet::Bytes | Facet::Profile => format!("below {RATER_MIN}: what it says of others is not listened to"),
    };
    lines.push(format!("  that is {meaning}"));
    lines
}
