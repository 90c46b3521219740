//! What nodes say of a model's experts: their signed heads, the bodies that those name, and whether they hold when they are measured again.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use base::clock::{instant, interrupted, now_ms};
use base::failure::{Failure, Kind};
use inference::profiler::{ProfileError, Profiler, TRIALS_MAX, Trials};
use net::fetcher::{FetchItem, Fetched};
use net::link::Wanted;
use net::network::Network;
use net::query;
use net::random;
use net::records::{RecordKind, clock_text};
use protocol::profile::lift::{Ranked, ranking};
use protocol::profile::{BODY_BYTES_MAX, BodyError, DomainCounts, ProfileBody};
use protocol::query::Query;
use protocol::record::{Facet, ProfileHead, Verified};
use protocol::trust::{Opinion, Outcome};
use protocol::{BlobRef, ContentHash, NodeId};
use tokio::sync::mpsc;

use crate::data_dir::{LocalModel, OpenDataDir};
use crate::federation::Federation;
use crate::loading::Loaded;
use crate::specialists::{Subject, no_such_domain};

/// For peers to turn up, and for each to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// For fetching what heads point to.
const FETCHING_MAX: Duration = Duration::from_secs(30);
/// In the place of a domain, where a body is no body at all.
const WHOLE: &str = "-";
/// Claims that are looked at.
const CLAIMS_MAX: usize = 16;

/// How far a claim has been checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Check {
    /// It is this node's own.
    Own,
    /// Measured again, it came out the same.
    Holds,
    /// It was not measured again, for a reason.
    Not(&'static str),
    /// It is not true, and this is why.
    Refuted(String),
}

/// A node's profile of a model.
pub struct Claim {
    pub node: NodeId,
    pub probes: ContentHash,
    pub build_profile: ContentHash,
    pub body: ProfileBody,
    pub opinion: Opinion,
    pub check: Check,
}

impl Claim {
    /// Whether it is taken into account: what was refuted is not, nor is anything by a node that has been proven wrong more often than right, unless it
    /// was measured again now.
    fn counts(&self) -> bool {
        match self.check {
            Check::Own | Check::Holds => true,
            Check::Refuted(_) => false,
            Check::Not(_) => self.opinion.tally.wrong <= self.opinion.tally.good,
        }
    }
}

/// What could be found out.
#[derive(Default)]
pub struct Claims {
    pub held: Vec<Claim>,
    /// Claims that are not true, with the reason.
    pub refuted: Vec<(NodeId, String)>,
    /// Claims whose bodies could not be had, or not be read, with the reason.
    pub missing: Vec<(NodeId, String)>,
    /// Domains that peers know.
    pub domains: Vec<String>,
    /// How far others' clocks are ahead of this one, where most of them are.
    pub clock_offset_ms: Option<i64>,
}

/// What came of checking, for people.
pub fn check_text(check: &Check) -> String {
    match check {
        Check::Own => "measured here".to_owned(),
        Check::Holds => "measured again: it holds".to_owned(),
        Check::Not(why) => format!("not measured again: {why}"),
        Check::Refuted(why) => format!("does not hold: {why}"),
    }
}

/// Why nothing can be said of a domain.
pub fn unknown_domain(name: &str, known: &[String], claims: &Claims) -> Failure {
    if known.is_empty() || known.iter().any(|known| known == name) {
        let held = claims.held.iter().map(|claim| (&claim.node, check_text(&claim.check)));
        let void = claims.refuted.iter().chain(&claims.missing).map(|(node, why)| (node, why.clone()));
        let clock = claims.clock_offset_ms.map(|offset_ms| format!("; {}", clock_text(offset_ms)));
        let why: Vec<_> = held.chain(void).map(|(node, why)| format!("; {node}: {why}")).chain(clock).collect();
        return Failure::new(
            Kind::NotFound,
            format!("no peer has a profile of this model that says anything of {name} and counts{}", why.concat()),
        );
    }
    no_such_domain(name, known)
}

/// Asks the peers who says what of a model's experts in a domain; fetches what they point to.
pub fn collect(
    federation: &Federation,
    (open, network): (&OpenDataDir, &Network),
    found: &LocalModel,
    domain: &str,
    of: Option<NodeId>,
) -> Result<Claims, Failure> {
    let question = Query { model: found.id, domain: domain.to_owned(), top: 0 };
    let answers = federation.wait(async { Ok(query::ask_all(network, &question, PATIENCE).await) })?;
    let mut claims = Claims::default();
    let now_ms = now_ms();
    for (_, answer) in answers {
        let mut records = network.records.lock();
        for head in answer.heads {
            let _ = records.take_requested(now_ms, RecordKind::Profile, head.into_vec());
        }
        for attestation in answer.attestations {
            let _ = records.take_requested(now_ms, RecordKind::Attestation, attestation.into_vec());
        }
        claims.domains.extend(answer.domains);
    }
    claims.clock_offset_ms = network.records.lock().clock_offset_ms();
    claims.domains.sort();
    claims.domains.dedup();
    let slots: Vec<_> = found.manifest.text().placed_experts().map(|(slot, _)| slot).collect();
    let mut bodies: HashMap<(BlobRef, ContentHash), Result<ProfileBody, BadBody>> = HashMap::new();
    let began = instant();
    for head in trusted_first(network, found, of) {
        let node = head.head.node;
        let said = (node, head.body.hash);
        if head.body.length > BODY_BYTES_MAX as u64 {
            claims.refute(network, said, format!("names a body of {} bytes; {BODY_BYTES_MAX} is the most", head.body.length))?;
            continue;
        }
        let about = (head.model, head.probes);
        let read = || {
            if instant() - began > FETCHING_MAX {
                return Err(BadBody::Missing("there was no time for it".to_owned()));
            }
            let here = open.store.read(&head.body.hash, now_ms).ok().flatten().filter(|bytes| bytes.len() as u64 == head.body.length);
            let fetched = here.map_or_else(|| fetch(federation, &head), Ok);
            let bytes = fetched.map_err(|failure| BadBody::Missing(failure.to_string()))?;
            ProfileBody::from_bytes(&bytes, about, &slots).map_err(|error| match error {
                BodyError::Version(_) => BadBody::Missing(error.to_string()),
                _ => BadBody::False(error.to_string()),
            })
        };
        match bodies.entry((head.body, head.probes)).or_insert_with(read) {
            Err(BadBody::Missing(why)) => claims.missing.push((node, why.clone())),
            Err(BadBody::False(why)) => {
                let why = why.clone();
                claims.refute(network, said, why)?;
            }
            Ok(body) if (body.model, body.probes) != about || !sums_agree(&head, body) => {
                claims.refute(network, said, "its head says something else than its body".to_owned())?;
            }
            Ok(body) => {
                let (body, opinion, check) = (body.clone(), opinion(network, &node), Check::Not("not asked for"));
                claims.held.push(Claim { node, probes: head.probes, build_profile: head.build_profile, body, opinion, check });
            }
        }
    }
    Ok(claims)
}

/// Why there is no body to a head.
enum BadBody {
    /// It could not be had, or not be read: nobody is to blame.
    Missing(String),
    /// It is no body of such a profile, and signed all the same.
    False(String),
}

/// The heads of profiles of a model, of one node or of all: those first who are trusted most, and not too many.
fn trusted_first(network: &Network, found: &LocalModel, of: Option<NodeId>) -> Vec<ProfileHead> {
    let (records, now_ms) = (network.records.lock(), now_ms());
    let (unwelcome, own) = (records.unwelcome(now_ms), records.own());
    let heads = records.book.heads(now_ms).map(Verified::record);
    let requested = |head: &&ProfileHead| {
        head.model == found.id && of.is_none_or(|of| head.head.node == of) && head.head.node != own && !unwelcome.contains(&head.head.node)
    };
    let mut heads: Vec<_> =
        heads.filter(requested).map(|head| (records.ordering(now_ms, &head.head.node, Facet::Profile), head.clone())).collect();
    heads.sort_by(|a, b| b.0.total_cmp(&a.0));
    heads.truncate(CLAIMS_MAX);
    heads.into_iter().map(|(_, head)| head).collect()
}

fn opinion(network: &Network, node: &NodeId) -> Opinion {
    let (records, now_ms) = (network.records.lock(), now_ms());
    records.trust.opinion(now_ms, node, Facet::Profile, &records.voices(now_ms, node, Facet::Profile))
}

fn fetch(federation: &Federation, head: &ProfileHead) -> Result<Vec<u8>, Failure> {
    let name = format!("body of the profile by {}", head.head.node);
    let want = FetchItem { wanted: Wanted::ToldBlob(head.body), name };
    let (results, mut arrivals) = mpsc::channel::<Fetched>(1);
    federation.fetch_one(want, results, &mut arrivals)
}

fn sums_agree(head: &ProfileHead, body: &ProfileBody) -> bool {
    head.summary.iter().all(|of| {
        body.domain(&of.domain).is_some_and(|number| {
            let counts = body.experts.iter().map(|counts| counts.domains[number]);
            let (trials, hits) = counts.fold((0, 0), |sums, counts| (sums.0 + u64::from(counts.trials), sums.1 + u64::from(counts.hits)));
            (trials, hits) == (of.trials, of.hits)
        })
    })
}

impl Claims {
    fn refute(&mut self, network: &Network, (node, body): (NodeId, ContentHash), why: String) -> Result<(), Failure> {
        // To say a false thing twice is to say it once.
        if network.records.note_checked(node, body, WHOLE, false)? {
            network.records.observe(node, Facet::Profile, Outcome::WrongResult);
        }
        self.refuted.push((node, why));
        Ok(())
    }

    /// Adds this node's own profile.
    pub fn add_own(&mut self, node: NodeId, build_profile: ContentHash, body: ProfileBody) {
        self.held.retain(|claim| claim.node != node);
        let opinion =
            Opinion { tally: protocol::trust::Tally::default(), first_hand: 1.0, hearsay: Vec::new(), hearsay_good: 0.0, ordering: 1.0 };
        self.held.push(Claim { node, probes: body.probes, build_profile, body, opinion, check: Check::Own });
    }

    /// Experts by what is most to be relied on: of each, what the node says that is trusted most, and by the number of that claim. Best first.
    pub fn ranking(&self, subject: &Subject) -> Vec<(Ranked, usize)> {
        let mut rows: BTreeMap<usize, (Ranked, usize)> = BTreeMap::new();
        let mut order: Vec<_> = (0..self.held.len()).filter(|&number| self.held[number].counts()).collect();
        order.sort_by(|&a, &b| self.reliance(b).total_cmp(&self.reliance(a)));
        for number in order {
            for one in subject.ranking(&self.held[number].body).into_iter().flatten() {
                rows.entry(one.expert).or_insert((one, number));
            }
        }
        let mut rows: Vec<_> = rows.into_values().collect();
        rows.sort_by(|a, b| b.0.lift.lower.total_cmp(&a.0.lift.lower).then(a.0.expert.cmp(&b.0.expert)));
        rows
    }

    /// Experts by how much a domain uses them, by the claim that is most to be relied on; what it never used is left out.
    pub(crate) fn by_use(&self, domain: &str) -> Vec<usize> {
        let known = |number: &usize| self.held[*number].body.domain(domain).is_some() && self.held[*number].counts();
        let best = (0..self.held.len()).filter(known).max_by(|&a, &b| self.reliance(a).total_cmp(&self.reliance(b)));
        let Some((body, domain)) = best.and_then(|number| Some((&self.held[number].body, self.held[number].body.domain(domain)?))) else {
            return Vec::new();
        };
        let uses = body.experts.iter().enumerate().map(|(number, counts)| (counts.domains[domain].routed, number));
        let mut uses: Vec<_> = uses.filter(|(routed, _)| *routed > 0).collect();
        uses.sort_unstable_by_key(|&(routed, number)| (std::cmp::Reverse(routed), number));
        uses.into_iter().map(|(_, number)| number).collect()
    }

    /// What was measured here comes first, then what was measured again, then by trust.
    fn reliance(&self, number: usize) -> f64 {
        let claim = &self.held[number];
        let checked = match claim.check {
            Check::Own => 4.0,
            Check::Holds => 2.0,
            Check::Not(_) | Check::Refuted(_) => 0.0,
        };
        checked + claim.opinion.ordering
    }

    /// Says why nothing is measured again.
    pub fn leave_unchecked(&mut self, why: &'static str) {
        self.held.iter_mut().filter(|claim| claim.check != Check::Own).for_each(|claim| claim.check = Check::Not(why));
    }

    /// Measures claims about a domain again, those first that would be relied on: all that was routed, and the trials of some experts. What
    /// comes of it counts against who said it, or for him, and that once for a body. Claims share the time until `until`.
    pub fn check(
        &mut self,
        network: &Network,
        (profiler, loaded): (&Profiler, &mut Loaded),
        build_profile: ContentHash,
        sample: &Sample<'_>,
        until: Instant,
    ) -> Result<(), Failure> {
        let mut order: Vec<_> = (0..self.held.len()).filter(|&number| self.held[number].check != Check::Own).collect();
        order.sort_by(|&a, &b| self.reliance(b).total_cmp(&self.reliance(a)));
        let domain = &profiler.body().domains[sample.domain].name;
        for (done, &number) in order.iter().enumerate() {
            let left = until.saturating_duration_since(instant()) / (order.len() - done) as u32;
            let until = instant() + left;
            let claim = &mut self.held[number];
            if claim.probes != profiler.body().probes {
                claim.check = Check::Not("by other probes");
                continue;
            }
            if claim.build_profile != build_profile {
                claim.check = Check::Not("by another arithmetic");
                continue;
            }
            let body = ContentHash::of(&claim.body.to_bytes());
            match network.records.was_true(claim.node, body, domain)? {
                Some(true) => {
                    claim.check = Check::Holds;
                    continue;
                }
                Some(false) => {
                    claim.check = Check::Refuted("it was measured again before, and did not hold".to_owned());
                    continue;
                }
                None => {}
            }
            let Replayed { check, trials } = replay(claim, (profiler, &mut *loaded), sample, || instant() < until && !interrupted())?;
            match check {
                Check::Refuted(_) => {
                    if network.records.note_checked(claim.node, body, domain, false)? {
                        network.records.observe(claim.node, Facet::Profile, Outcome::WrongResult);
                    }
                }
                // The routing alone can be had by reading the probes, which costs little.
                Check::Holds if trials > 0 && network.records.note_checked(claim.node, body, domain, true)? => {
                    network.records.observe(claim.node, Facet::Profile, Outcome::Good);
                }
                Check::Holds | Check::Own | Check::Not(_) => {}
            }
            claim.opinion = opinion(network, &claim.node);
            claim.check = check;
        }
        Ok(())
    }
}

/// What of a claim is measured again.
pub struct Sample<'a> {
    /// The domain's number.
    pub domain: usize,
    /// How many experts, …
    pub experts: usize,
    /// … of so many that the claim ranks first, …
    pub of: usize,
    /// … of those that are looked at.
    pub among: &'a dyn Fn(usize) -> bool,
}

/// What came of measuring again.
struct Replayed {
    check: Check,
    /// Trials that were made again.
    trials: u32,
}

/// Compares a claim with what comes of measuring again.
fn replay(
    claim: &Claim,
    (profiler, loaded): (&Profiler, &mut Loaded),
    sample: &Sample<'_>,
    mut go_on: impl FnMut() -> bool,
) -> Result<Replayed, Failure> {
    let ours = profiler.body();
    let refuted = |why: String| Ok(Replayed { check: Check::Refuted(why), trials: 0 });
    if claim.body.domains != ours.domains {
        return refuted("it has read other probes than it says".to_owned());
    }
    for (number, (theirs, ours)) in claim.body.experts.iter().zip(&ours.experts).enumerate() {
        // Lift is against all domains: what is said of the others counts as much.
        let routing = |counts: &DomainCounts| (counts.routed, counts.gate_mass, counts.square_routed, counts.cross);
        let differs = theirs.domains.iter().zip(&ours.domains).position(|(theirs, ours)| routing(theirs) != routing(ours));
        if let Some(differs) = differs {
            let (said, was, name) = (theirs.domains[differs].routed, ours.domains[differs].routed, &claim.body.domains[differs].name);
            return refuted(format!("of expert number {number} it says that {said} tokens of {name} were routed to it; {was} were"));
        }
    }
    let ranked = ranking(&claim.body, sample.domain).into_iter().filter(|one| one.counts.trials > 0 && (sample.among)(one.expert));
    let mut relied_on: Vec<_> = ranked.take(sample.of).collect();
    let mut trials = 0;
    for _ in 0..sample.experts.min(relied_on.len()) {
        // Nobody can know which.
        let one = relied_on.swap_remove(random() as usize % relied_on.len());
        if one.counts.trials > TRIALS_MAX {
            return refuted(format!("of expert number {} it says more trials than anybody makes", one.expert));
        }
        let said = Trials { expert: one.expert as u32, domain: sample.domain as u32, trials: one.counts.trials, hits: one.counts.hits };
        let hits = match profiler.replay((&mut loaded.engine, &mut loaded.towers), said, &mut go_on) {
            Ok(Some(hits)) => hits,
            Ok(None) => return Ok(Replayed { check: Check::Not("no time (--check TIME)"), trials }),
            Err(ProfileError::Other) => {
                return refuted(format!("of expert number {} it says more trials than there are tokens", one.expert));
            }
            // That we cannot measure is not the peer's fault.
            Err(error) => return Err(error.into()),
        };
        if hits != said.hits {
            return refuted(format!("of expert number {} it says {} hits in {} trials; it was {hits}", one.expert, said.hits, said.trials));
        }
        trials += said.trials;
    }
    Ok(Replayed { check: Check::Holds, trials })
}
