//! What this node thinks of its peers, as it is told to people and programs.

use std::collections::BTreeMap;

use base::clock::now_ms;
use net::address::peer_id;
use net::records::SharedRecords;
use protocol::NodeId;
use protocol::record::Facet;
use protocol::trust::{Opinion, Ruling};
use serde_json::{Value, json};

/// The peers of whom something was seen, or whom the user has ruled on.
pub fn trusted_peers(records: &SharedRecords) -> BTreeMap<NodeId, Option<Ruling>> {
    let records = records.lock();
    let seen = records.trust.tallies().map(|(peer, ..)| peer).chain(records.trust.rulings().keys().copied());
    seen.map(|peer| (peer, records.trust.rulings().get(&peer).copied())).collect()
}

pub fn ruling_word(ruling: Ruling) -> &'static str {
    match ruling {
        Ruling::Banned => "banned",
        Ruling::Allowed => "allowed",
    }
}

/// A peer's scores alone.
pub fn scores(records: &SharedRecords, peer: &NodeId) -> Value {
    opinions(records, peer)
        .iter()
        .map(|(facet, opinion)| (facet.name().to_owned(), json!(opinion.ordering)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// What is thought of a peer, facet by facet.
pub fn opinions(records: &SharedRecords, peer: &NodeId) -> Vec<(Facet, Opinion)> {
    let (records, now_ms) = (records.lock(), now_ms());
    let opinion = |facet| (facet, records.trust.opinion(now_ms, peer, facet, &records.voices(now_ms, peer, facet)));
    Facet::ALL.into_iter().map(opinion).collect()
}

/// The same for programs, with every term that it is made of.
pub fn opinions_json(records: &SharedRecords, peer: &NodeId) -> Value {
    let opinions = opinions(records, peer);
    let (ruling, unwelcome) = {
        let records = records.lock();
        (records.trust.rulings().get(peer).copied(), records.trust.is_unwelcome(now_ms(), peer))
    };
    let mut json = json!({
        "peer": peer.to_string(), "peer_id": peer_id(*peer).map(|id| id.to_string()),
        "ruling": ruling.map(ruling_word), "unwelcome": unwelcome,
    });
    for (facet, opinion) in &opinions {
        let hearsay: Vec<_> = opinion
            .hearsay
            .iter()
            .map(|(voice, adds)| json!({"rater": voice.rater.to_string(), "good": voice.good, "bad": voice.bad, "adds": adds}))
            .collect();
        json[facet.name()] = json!({
            "score": opinion.ordering, "first_hand": opinion.first_hand, "good": opinion.tally.good, "bad": opinion.tally.bad, "wrong": opinion.tally.wrong,
            "seen_good": opinion.tally.seen.0, "seen_bad": opinion.tally.seen.1, "hearsay": hearsay, "hearsay_good": opinion.hearsay_good,
        });
    }
    json
}
