//! Tells what this node has to say of itself, again and again, and catches up with what others have said while it was away.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use base::clock::now_ms;
use base::failure::Failure;
use net::PeerId;
use net::address::{is_loopback, is_relayed, node_id, peer_id};
use net::ask::{self, Answered};
use net::network::Network;
use net::records::{RecordKind, TOLD_BYTES_MAX};
use protocol::message::Subject;
use protocol::profile::ProfileBody;
use protocol::profile::lift::ranking;
use protocol::record::{
    ADDRESSES_MAX, Attestation, DomainSummary, Facet, MODELS_MAX, NodeRecord, ProfileHead, Record, RecordHead, Verified, attest_every_ms,
};
use protocol::trust::Ruling;
use protocol::{ModelId, NodeId, NodeKey};
use tracing::{debug, warn};

use crate::data_dir::DataDir;
use crate::library::Library;
use crate::profiles::Profile;

/// How often it is looked whether there is anything to say.
const LOOK: Duration = Duration::from_secs(2);
/// A statement is made again when so much of its life is over.
const RENEW_AFTER_MS: u64 = 12 * 3_600_000;
/// How often a peer is asked what it holds.
const CATCH_UP_EVERY_MS: u64 = 10 * 60_000;
/// Attestations that are told at a time: those who hear them allow a burst.
const ATTESTATIONS_AT_ONCE: usize = 32;
/// Records that wait for somebody to hear them.
const UNTOLD_MAX: usize = 64;
/// How often the records are written down.
const SAVE_EVERY_MS: u64 = 60_000;

/// What an announcer works with.
pub struct Announcer {
    pub network: Network,
    pub dir: DataDir,
    pub key: NodeKey,
    pub library: Arc<Library>,
    /// The bodies of finished profiles, by model.
    pub bodies: Arc<BTreeMap<ModelId, ProfileBody>>,
    pub memory_bytes: u64,
    pub disk_bytes: u64,
}

/// When things were said last, and what.
#[derive(Default)]
struct Said {
    node: Option<(u64, Vec<String>)>,
    profiles: BTreeMap<ModelId, (u64, Profile)>,
    attested_ms: Option<u64>,
    attestations: BTreeMap<(NodeId, Facet), ((u32, u32), u64)>,
    saved_ms: u64,
    /// What nobody was there to hear yet, by what it is about: what is newer takes its place.
    untold: BTreeMap<String, (RecordKind, Vec<u8>)>,
    /// Who was unwelcome at the last look.
    unwelcome: BTreeSet<PeerId>,
    /// Who was asked what it holds, and when.
    requested: BTreeMap<PeerId, u64>,
}

impl Announcer {
    /// Goes on until the network ends.
    pub async fn run(self) {
        let mut said = Said::default();
        let mut look = tokio::time::interval(LOOK);
        let mut peers = self.network.peers.clone();
        loop {
            tokio::select! {
                _ = look.tick() => {
                    if let Err(failure) = self.say(&mut said).await {
                        warn!(%failure, "nothing is told");
                    }
                }
                changed = peers.changed() => if changed.is_err() { return },
            }
            // At once when it comes, and again now and then: what was gossiped may have been lost.
            let now_ms = now_ms();
            for peer in peers.borrow_and_update().connected.clone() {
                let due = said.requested.get(&peer).is_none_or(|at_ms| now_ms.abs_diff(*at_ms) >= CATCH_UP_EVERY_MS);
                if due {
                    said.requested.insert(peer, now_ms);
                    self.catch_up(peer);
                }
            }
            said.requested.retain(|_, at_ms| now_ms.abs_diff(*at_ms) < CATCH_UP_EVERY_MS);
        }
    }

    /// Asks a peer what it holds: what was said while this node was away.
    fn catch_up(&self, peer: PeerId) {
        let network = self.network.clone();
        tokio::spawn(async move {
            let Answered::Bytes(bytes) = ask::ask(peer, network.streams.clone(), Subject::Records, TOLD_BYTES_MAX).await else { return };
            let (records, Some(teller)) = (network.records.clone(), node_id(peer)) else { return };
            match tokio::task::spawn_blocking(move || records.catch_up(teller, &bytes)).await {
                Ok(Ok(new)) => debug!(%peer, new, "caught up"),
                Ok(Err(refused)) => {
                    warn!(%peer, %refused, "dropped: it hands on forgeries");
                    network.drop_peer(peer).await;
                }
                Err(error) => warn!(%error, "cannot catch up"),
            }
        });
    }

    async fn say(&self, said: &mut Said) -> Result<(), Failure> {
        let now_ms = now_ms();
        self.heed_rulings(said).await?;
        for (about, (kind, bytes)) in std::mem::take(&mut said.untold) {
            self.tell(about, kind, bytes, said).await;
        }
        self.say_node(now_ms, said).await?;
        self.say_profiles(now_ms, said).await?;
        self.attest(now_ms, said).await?;
        if now_ms.abs_diff(said.saved_ms) >= SAVE_EVERY_MS {
            said.saved_ms = now_ms;
            self.network.records.save_records()?;
        }
        Ok(())
    }

    /// Takes over what the user has decided, and what other commands have seen, meanwhile.
    async fn heed_rulings(&self, said: &mut Said) -> Result<(), Failure> {
        self.network.records.reload_trust()?;
        let unwelcome: BTreeSet<_> = self.network.records.lock().unwelcome(now_ms()).into_iter().filter_map(peer_id).collect();
        let allowed: BTreeSet<_> = {
            let records = self.network.records.lock();
            let allowed = records.trust.rulings().iter().filter(|(_, ruling)| **ruling == Ruling::Allowed);
            allowed.filter_map(|(node, _)| peer_id(*node)).collect()
        };
        let dropped = self.network.peers.borrow().dropped.clone();
        for peer in unwelcome.difference(&dropped) {
            self.network.drop_peer(*peer).await;
        }
        // Those who were, and whose guilt has faded; and those of whom the user has said so.
        let forgiven = said.unwelcome.difference(&unwelcome).chain(dropped.intersection(&allowed));
        for peer in forgiven.copied().collect::<BTreeSet<_>>() {
            self.network.admit(peer).await;
        }
        said.unwelcome = unwelcome;
        Ok(())
    }

    async fn say_node(&self, now_ms: u64, said: &mut Said) -> Result<(), Failure> {
        let listening = self.network.peers.borrow().listening.clone();
        let only_here = listening.iter().all(is_loopback);
        let told = listening.iter().filter(|address| !is_relayed(address) && (only_here || !is_loopback(address)));
        let addresses: Vec<_> = told.map(ToString::to_string).take(ADDRESSES_MAX).collect();
        if said.node.as_ref().is_some_and(|(at_ms, last)| *last == addresses && now_ms.abs_diff(*at_ms) < RENEW_AFTER_MS) {
            return Ok(());
        }
        let mut models: Vec<_> = self.library.models().iter().map(|model| model.id).collect();
        models.sort_unstable();
        models.dedup();
        models.truncate(MODELS_MAX);
        let head = self.next_head(now_ms, NodeRecord::LIFE_MS_MAX)?;
        let record = NodeRecord {
            head,
            memory_bytes: self.memory_bytes,
            disk_bytes: self.disk_bytes,
            experts_per_second: 0,
            addresses: addresses.clone(),
            models,
        };
        said.node = Some((now_ms, addresses));
        self.say_one("node".to_owned(), RecordKind::Node, &Verified::seal(&self.key, record), said).await;
        Ok(())
    }

    async fn say_profiles(&self, now_ms: u64, said: &mut Said) -> Result<(), Failure> {
        for (model, profile) in self.dir.all_profiles() {
            if !profile.published {
                self.withdraw(now_ms, model, said).await?;
                continue;
            }
            let Some(body) = self.bodies.get(&model) else { continue };
            if said.profiles.get(&model).is_some_and(|(at_ms, last)| *last == profile && now_ms.abs_diff(*at_ms) < RENEW_AFTER_MS) {
                continue;
            }
            let head = self.next_head(now_ms, ProfileHead::LIFE_MS_MAX)?;
            said.profiles.insert(model, (now_ms, profile));
            let record = Verified::seal(&self.key, profile_head(head, &profile, body));
            self.say_one(model.to_string(), RecordKind::Profile, &record, said).await;
        }
        Ok(())
    }

    /// Takes back what was said of a model, if it was: the newest says the same and expires at once.
    async fn withdraw(&self, now_ms: u64, model: ModelId, said: &mut Said) -> Result<(), Failure> {
        let last = {
            let records = self.network.records.lock();
            let own = records.book.heads(now_ms).find(|head| head.node() == self.key.id() && head.record().model == model);
            own.map(|head| head.record().clone())
        };
        let Some(last) = last else { return Ok(()) };
        let head = self.next_head(now_ms, 0)?;
        said.profiles.remove(&model);
        self.say_one(model.to_string(), RecordKind::Profile, &Verified::seal(&self.key, ProfileHead { head, ..last }), said).await;
        Ok(())
    }

    /// Says what was seen of peers, where that has changed.
    async fn attest(&self, now_ms: u64, said: &mut Said) -> Result<(), Failure> {
        let every_ms = attest_every_ms(self.network.records.lock().book.nodes(now_ms).count());
        if said.attested_ms.is_some_and(|at_ms| now_ms.abs_diff(at_ms) < every_ms) {
            return Ok(());
        }
        said.attested_ms = Some(now_ms);
        let seen: Vec<_> = {
            let records = self.network.records.lock();
            records.trust.tallies().map(|(peer, facet, tally)| (peer, facet, tally.at(now_ms))).collect()
        };
        let mut due: Vec<_> = seen
            .into_iter()
            .map(|(subject, facet, tally)| (subject, facet, (tally.good.round() as u32, tally.bad.round() as u32)))
            .filter(|(subject, facet, counts)| {
                let last = said.attestations.get(&(*subject, *facet));
                let told = last.is_some_and(|(last, at_ms)| last == counts && now_ms.abs_diff(*at_ms) < RENEW_AFTER_MS);
                *subject != self.key.id() && *counts != (0, 0) && !told
            })
            .collect();
        // What is due first is what was told longest ago, or never.
        due.sort_by_key(|(subject, facet, _)| said.attestations.get(&(*subject, *facet)).map_or(0, |(_, at_ms)| *at_ms));
        due.truncate(ATTESTATIONS_AT_ONCE);
        for (subject, facet, (good, bad)) in due {
            let head = self.next_head(now_ms, Attestation::LIFE_MS_MAX)?;
            let from_ms = now_ms.saturating_sub(Attestation::LIFE_MS_MAX);
            let attestation = Attestation { head, subject, facet, from_ms, until_ms: now_ms, good, bad, evidence: Vec::new() };
            self.say_one(format!("{facet:?} {subject}"), RecordKind::Attestation, &Verified::seal(&self.key, attestation), said).await;
            said.attestations.insert((subject, facet), ((good, bad), now_ms));
        }
        Ok(())
    }

    /// A head with the next sequence number, which is on the disk before anybody sees it.
    fn next_head(&self, now_ms: u64, life_ms: u64) -> Result<RecordHead, Failure> {
        let head = RecordHead::new(self.key.id(), now_ms, life_ms, self.dir.record_files().last_seq()?);
        self.dir.record_files().set_last_seq(head.seq)?;
        Ok(head)
    }

    /// Says something new.
    async fn say_one<R: Record>(&self, about: String, kind: RecordKind, record: &Verified<R>, said: &mut Said) {
        let bytes = record.as_bytes().to_vec();
        // Held like anybody's, so that whoever asks is told.
        if let Err(refused) = self.network.records.lock().take_requested(now_ms(), kind, bytes.clone()) {
            warn!(?kind, %refused, "this node's own record is not held");
        }
        self.tell(about, kind, bytes, said).await;
    }

    async fn tell(&self, about: String, kind: RecordKind, bytes: Vec<u8>, said: &mut Said) {
        let told = self.network.tell_record(kind, bytes.clone()).await;
        if !told && (said.untold.len() < UNTOLD_MAX || said.untold.contains_key(&about)) {
            said.untold.insert(about, (kind, bytes));
        }
    }
}

/// The head of a profile, with what its body comes to.
pub(crate) fn profile_head(head: RecordHead, profile: &Profile, body: &ProfileBody) -> ProfileHead {
    let summary = body.names().into_iter().filter_map(|name| Some((name, body.domain(name)?))).map(|(name, number)| {
        let counts = body.experts.iter().map(|counts| counts.domains[number]);
        DomainSummary {
            domain: name.to_owned(),
            experts: ranking(body, number).iter().filter(|one| one.is_specialist()).count() as u32,
            trials: counts.clone().map(|counts| u64::from(counts.trials)).sum(),
            hits: counts.map(|counts| u64::from(counts.hits)).sum(),
        }
    });
    ProfileHead {
        head,
        model: body.model,
        probes: profile.probes,
        build_profile: profile.arithmetic,
        body: profile.body,
        summary: summary.collect(),
    }
}
