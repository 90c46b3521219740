//! Spreads records among hosts: what comes is checked before it is handed on, and who hands on forgeries is not listened to any more.
//!
//! What a record says is for `records` to judge.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use libp2p::gossipsub::{
    ConfigBuilder, IdentTopic, IdentityTransform, MessageAuthenticity, MessageId, PeerScoreParams, PeerScoreThresholds, TopicHash,
    TopicScoreParams, ValidationMode, WhitelistSubscriptionFilter,
};
use protocol::ContentHash;

use crate::records::RecordKind;

/// Most bytes of a message: a head of a profile and some wrapping are a sixth of it.
const MESSAGE_BYTES_MAX: usize = 64 << 10;
const HEARTBEAT: Duration = Duration::from_secs(1);
/// A forgery costs ten times its square: at the seventh, nothing more is read of its sender.
const FORGERY_WEIGHT: f64 = -10.0;
pub(super) const GRAYLIST: f64 = -400.0;
/// Half of a penalty is forgiven in so many heartbeats.
const FORGERY_DECAY: f64 = 0.99;

/// Gossip about records, and about nothing else: peers' other topics are not even remembered.
pub(super) type GossipBehaviour = libp2p::gossipsub::Behaviour<IdentityTransform, WhitelistSubscriptionFilter>;

/// The topic of a kind of record.
pub(super) fn topic(kind: RecordKind) -> IdentTopic {
    IdentTopic::new(match kind {
        RecordKind::Profile => "/confrere/gossip/profile/1",
        RecordKind::Attestation => "/confrere/gossip/attestation/1",
        RecordKind::Node => "/confrere/gossip/node/1",
    })
}

pub(super) fn kind(hash: &TopicHash) -> Option<RecordKind> {
    RecordKind::ALL.into_iter().find(|kind| topic(*kind).hash() == *hash)
}

/// A node's part in the gossip, with all topics joined.
pub(super) fn behaviour() -> Result<GossipBehaviour, std::io::Error> {
    let config = ConfigBuilder::default()
        // Records are signed by themselves, and the same record is the same message whoever hands it on.
        .validation_mode(ValidationMode::Anonymous)
        // With the topic, lest the same bytes on a wrong one stand in the way of the right.
        .message_id_fn(|message| {
            MessageId::new(ContentHash::of(&[message.topic.as_str().as_bytes(), &[0], &message.data].concat()).as_bytes())
        })
        .validate_messages()
        .max_transmit_size(MESSAGE_BYTES_MAX)
        .heartbeat_interval(HEARTBEAT)
        .build()
        .map_err(std::io::Error::other)?;
    let ours = WhitelistSubscriptionFilter(RecordKind::ALL.into_iter().map(|kind| topic(kind).hash()).collect());
    let created = GossipBehaviour::new_with_subscription_filter(MessageAuthenticity::Anonymous, config, ours);
    let mut behaviour = created.map_err(std::io::Error::other)?;
    let of_topic = TopicScoreParams {
        topic_weight: 1.0,
        time_in_mesh_weight: 0.0,
        // Topics are quiet: who has nothing to tell is not worse for it.
        mesh_message_deliveries_weight: 0.0,
        mesh_failure_penalty_weight: 0.0,
        // Who brings news first is kept; who never hands anything on comes last.
        first_message_deliveries_weight: 1.0,
        first_message_deliveries_decay: 0.999,
        first_message_deliveries_cap: 50.0,
        invalid_message_deliveries_weight: FORGERY_WEIGHT,
        invalid_message_deliveries_decay: FORGERY_DECAY,
        ..TopicScoreParams::default()
    };
    let topics: HashMap<_, _> = RecordKind::ALL.into_iter().map(|kind| (topic(kind).hash(), of_topic.clone())).collect();
    let score = PeerScoreParams {
        topics,
        // Connections by neighbourhood are limited elsewhere.
        app_specific_weight: 1.0,
        ip_colocation_factor_weight: 0.0,
        ip_colocation_factor_whitelist: HashSet::new(),
        ..PeerScoreParams::default()
    };
    let thresholds = PeerScoreThresholds {
        gossip_threshold: -40.0,
        publish_threshold: -80.0,
        graylist_threshold: GRAYLIST,
        accept_px_threshold: 10.0,
        opportunistic_graft_threshold: 1.0,
    };
    behaviour.with_peer_score(score, thresholds).map_err(std::io::Error::other)?;
    for kind in RecordKind::ALL {
        behaviour.subscribe(&topic(kind)).map_err(std::io::Error::other)?;
    }
    Ok(behaviour)
}
