//! Records as they come by gossip, and as they are told.

use std::time::Duration;

use base::clock::now_ms;
use libp2p::gossipsub::{Event, MessageAcceptance, PublishError};
use tokio::time::Instant;
use tracing::{debug, warn};

use super::address::node_id;
use super::gossip::{GRAYLIST, kind, topic};
use super::swarm::SwarmTask;
use crate::records::RecordKind;

/// Who sends more than his allowance is not listened to for this long.
const NOISY_FOR: Duration = Duration::from_secs(60);

impl SwarmTask {
    pub(super) fn on_gossip(&mut self, event: Event) {
        let Event::Message { propagation_source, message_id, message } = event else { return };
        let (records, Some(gossip)) = (&self.records, self.swarm.behaviour_mut().gossip.as_mut()) else { return };
        let sender = node_id(propagation_source).zip(kind(&message.topic));
        let length = message.data.len() as u64;
        if sender.is_some_and(|(sender, _)| !records.lock().is_within_allowance(now_ms(), sender)) {
            // This one is judged all the same: it may be an honest record, of which no other copy is looked at.
            debug!(peer = %propagation_source, "sends too much");
            gossip.set_application_score(&propagation_source, 2.0 * GRAYLIST);
            self.noisy.insert(propagation_source, Instant::now() + NOISY_FOR);
        }
        let acceptance = match sender.map(|(_, kind)| records.lock().take(now_ms(), kind, message.data)) {
            Some(Ok(())) => {
                records.lock().counts.bytes_out += length * gossip.all_mesh_peers().count().saturating_sub(1) as u64;
                MessageAcceptance::Accept
            }
            Some(Err(refused)) if refused.is_forgery() => {
                debug!(peer = %propagation_source, %refused, "a forged record");
                MessageAcceptance::Reject
            }
            Some(Err(refused)) => {
                debug!(peer = %propagation_source, %refused, "a record is ignored");
                MessageAcceptance::Ignore
            }
            None => MessageAcceptance::Reject,
        };
        gossip.report_message_validation_result(&message_id, &propagation_source, acceptance);
    }

    /// Listens again to those who had sent too much.
    pub(super) fn forgive_noisy(&mut self, now: Instant) {
        let over: Vec<_> = self.noisy.iter().filter(|(_, until)| **until <= now).map(|(peer, _)| *peer).collect();
        for peer in over {
            self.noisy.remove(&peer);
            if let Some(gossip) = self.swarm.behaviour_mut().gossip.as_mut() {
                gossip.set_application_score(&peer, 0.0);
            }
        }
    }

    /// Tells a record of this node's own; says whether anybody was there to hear it.
    pub(super) fn tell_record(&mut self, of: RecordKind, bytes: Vec<u8>) -> bool {
        let Some(gossip) = self.swarm.behaviour_mut().gossip.as_mut() else { return true };
        let (length, peers) = (bytes.len() as u64, gossip.all_mesh_peers().count() as u64);
        match gossip.publish(topic(of), bytes) {
            Ok(_) => {
                self.records.lock().counts.bytes_out += length * peers;
                true
            }
            Err(PublishError::NoPeersSubscribedToTopic | PublishError::AllQueuesFull(_)) => false,
            Err(PublishError::Duplicate) => true,
            Err(error) => {
                warn!(%error, "a record is not told");
                true
            }
        }
    }
}
