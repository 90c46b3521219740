//! What a model's experts do with the probes of known domains: counts for a profile.
//!
//! First each probe is read once, and noted which experts each token used and how likely the token after it was. Then single tokens are computed
//! again, each without one of its experts: a *trial* leaves the expert's result out, with the weights of the others as they were, and finishes the
//! forward pass. It is a *hit* when the token that follows became less likely. Of a question, all is computed again, the expert left out for its tokens
//! of one modality, and it is a hit when the answer as a whole became less likely. Which tokens an expert is tried on, and in which order, follows from the probes
//! alone, so that whoever has the model counts the same. Keeps no time and no files: whoever drives it does.

use std::collections::HashMap;

use protocol::profile::lift::{Z_95, wilson};
use protocol::profile::{COACTIVE_MAX, DomainTotal, GATE_UNIT, Modality, ProfileBody};
use protocol::{ContentHash, ExpertSlot, ModelId};
use serde::{Deserialize, Serialize};

use crate::activation_log::ActivationLog;
use crate::engine::{Engine, ForwardError, LeftOut};
use crate::generate::{GenerateError, TowerSource};
use crate::perplexity::negative_log_likelihood;
use crate::probe_tokens::{ProbeTokens, losses};
use crate::tokenizer::TokenizerError;

/// In place of a token: the whole probe.
const WHOLE: u32 = u32::MAX;
/// Trials that an expert has in a domain at a time.
const TRIALS_AT_ONCE: u32 = 8;
/// Pairs of expert and domain that are tried at a time, at most.
pub const PAIRS_AT_ONCE: usize = 128;
/// After so many trials in a domain an expert has had enough.
pub const TRIALS_MAX: u32 = 256;

/// Why a probe cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// The model's tokenizer makes nothing of it.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The model cannot take it in.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// Nor with its media.
    #[error(transparent)]
    Read(#[from] GenerateError),
    /// What was noted down earlier is not about these probes.
    #[error("what was noted down earlier is about other probes")]
    Other,
}

/// What came of reading one probe.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Reading {
    domain: u32,
    probe: u32,
    /// Experts of each token in each layer with experts, (tokens, layers, k).
    experts: Vec<u16>,
    /// The weights that experts were given, in parts of [`GATE_UNIT`], by expert, text first: the number of an expert, plus for each
    /// further modality the number of all experts.
    gate_mass: Vec<(u32, u64)>,
    /// Negative log-likelihood of each token that is scored, as bits of f64.
    losses: Vec<u64>,
}

/// What was counted of a probe's tokens of one modality.
#[derive(Clone, Debug)]
pub struct ProbeCounts {
    /// The probe's domain, by number.
    pub domain: usize,
    /// Its number in the domain.
    pub probe: usize,
    /// The tokens' modality.
    pub modality: Modality,
    /// How many they are.
    pub tokens: u32,
    /// By expert, how many of them were routed to it.
    pub routed: Vec<u32>,
    /// By expert, the sum of its weights, in parts of [`GATE_UNIT`].
    pub gate_mass: Vec<u64>,
}

/// How an expert fared in a domain.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Trials {
    /// Its number in the order of the body.
    pub expert: u32,
    /// The domain's number.
    pub domain: u32,
    /// Trials so far.
    pub trials: u32,
    /// Of those, hits.
    pub hits: u32,
}

/// A profile in the making.
pub struct Profiler {
    probes: Vec<Vec<ProbeTokens>>,
    /// By the set's domain and modality: the number among the body's domains.
    domains_of: Vec<[Option<usize>; 3]>,
    readings: Vec<Vec<Option<Reading>>>,
    body: ProfileBody,
    slots: Vec<ExpertSlot>,
    /// Number of each layer among those with experts.
    layers: Vec<u32>,
    k: usize,
    /// By the body's domain and expert: the tokens that it is tried on, in order, once the domain's probes are read.
    tokens_of: Vec<Vec<Vec<(u32, u32)>>>,
}

impl Profiler {
    /// Nothing read yet of a set with that hash: its domains, ascending by name, and their probes.
    pub fn new(engine: &Engine, model: ModelId, set: ContentHash, domains: Vec<(String, Vec<ProbeTokens>)>) -> Result<Self, ProfileError> {
        let decoder = engine.model().decoder();
        let (mut probes, mut totals, mut domains_of) = (Vec::new(), Vec::new(), Vec::new());
        for (name, of_domain) in domains {
            let all = of_domain.iter().flat_map(|probe| &probe.tokens);
            if let Some(&token) = all.clone().find(|&&token| token >= decoder.vocab_size) {
                return Err(ForwardError::Token { token, vocab_size: decoder.vocab_size }.into());
            }
            let counts: Vec<[u64; 3]> = of_domain
                .iter()
                .map(|probe| {
                    let mut counts = [0; 3];
                    probe.modalities().iter().for_each(|&modality| counts[modality as usize] += 1);
                    counts
                })
                .collect();
            let mut numbers = [None; 3];
            for modality in Modality::ALL {
                let of = counts.iter().map(|counts| counts[modality as usize]);
                // A domain of texts has them, even if they are empty.
                if modality == Modality::Text || of.clone().any(|count| count > 0) {
                    numbers[modality as usize] = Some(totals.len());
                    totals.push(DomainTotal {
                        name: name.clone(),
                        modality,
                        probes: if modality == Modality::Text {
                            of_domain.len() as u32
                        } else {
                            of.clone().filter(|&n| n > 0).count() as u32
                        },
                        tokens: of.clone().sum(),
                        square_tokens: of.map(|n| n * n).sum(),
                    });
                }
            }
            domains_of.push(numbers);
            probes.push(of_domain);
        }
        let slots: Vec<_> = engine.model().manifest.text().slots().collect();
        let tokens_of = vec![Vec::new(); totals.len()];
        let body = ProfileBody::new(model, set, totals, slots.len());
        let readings = probes.iter().map(|domain| vec![None; domain.len()]).collect();
        let (layers, k) = (decoder.moe_layers().collect(), decoder.experts_per_token() as usize);
        Ok(Self { probes, domains_of, readings, body, slots, layers, k, tokens_of })
    }

    /// Tokens of all probes.
    pub fn tokens(&self) -> u64 {
        self.body.domains.iter().map(|domain| domain.tokens).sum()
    }

    /// Tokens of the probes that have been read.
    pub fn tokens_read(&self) -> u64 {
        self.readings.iter().flatten().flatten().map(|reading| (reading.experts.len() / (self.layers.len() * self.k).max(1)) as u64).sum()
    }

    /// What is counted so far.
    pub fn body(&self) -> &ProfileBody {
        &self.body
    }

    /// Reads the next probe that was not read yet; `None` when all have been.
    pub fn read_next(&mut self, engine: &mut Engine, towers: &mut dyn TowerSource) -> Result<Option<Reading>, ProfileError> {
        let mut readings = self.readings.iter().enumerate();
        let next = readings.find_map(|(domain, probes)| Some((domain, probes.iter().position(Option::is_none)?)));
        let Some((domain, probe)) = next else { return Ok(None) };
        let reading = self.read(engine, towers, domain, probe)?;
        self.take_reading(reading.clone())?;
        Ok(Some(reading))
    }

    fn read(&self, engine: &mut Engine, towers: &mut dyn TowerSource, domain: usize, probe: usize) -> Result<Reading, ProfileError> {
        let here = &self.probes[domain][probe];
        let mut log = ActivationLog::new(here.tokens.len().max(1) * self.layers.len().max(1));
        log.domain = Some(domain as u16);
        let log = engine.log.replace(log);
        let losses = losses(engine, towers, here);
        let routed = std::mem::replace(&mut engine.log, log).expect("it was put there");
        let losses = losses?;
        let mut experts = vec![0; here.tokens.len() * self.layers.len() * self.k];
        let mut mass = vec![0u64; Modality::ALL.len() * self.slots.len()];
        for entry in routed.entries() {
            let layer = self.layers.binary_search(&entry.layer).expect("only layers with experts route");
            let row = (entry.position * self.layers.len() + layer) * self.k;
            for (place, choice) in experts[row..][..self.k].iter_mut().zip(entry.choices) {
                *place = choice.expert as u16;
                let number = entry.modality as usize * self.slots.len() + self.number(layer, choice.expert);
                mass[number] += (f64::from(choice.weight) * GATE_UNIT as f64).round() as u64;
            }
        }
        let gate_mass = (0..).zip(mass).filter(|(_, mass)| *mass > 0).collect();
        Ok(Reading { domain: domain as u32, probe: probe as u32, experts, gate_mass, losses })
    }

    /// Takes in what was read, now or earlier.
    pub fn take_reading(&mut self, reading: Reading) -> Result<(), ProfileError> {
        let (domain, probe) = (reading.domain as usize, reading.probe as usize);
        let here = self.probes.get(domain).and_then(|probes| probes.get(probe)).ok_or(ProfileError::Other)?;
        let (tokens, modalities) = (here.tokens.len(), here.modalities());
        let per_layer = self.slots.iter().map(|slot| slot.expert + 1).max().unwrap_or(0);
        let numbers = self.domains_of[domain];
        let has_domain = |number: u32| numbers.get(number as usize / self.slots.len().max(1)).is_some_and(Option::is_some);
        let fits = reading.experts.len() == tokens * self.layers.len() * self.k
            && reading.losses.len() == tokens.saturating_sub(here.scored_from())
            && reading.experts.iter().all(|&expert| u32::from(expert) < per_layer)
            && reading.gate_mass.iter().all(|(number, _)| has_domain(*number));
        if !fits || self.readings[domain][probe].is_some() {
            return Err(ProfileError::Other);
        }
        for modality in Modality::ALL {
            let Some(number) = numbers[modality as usize] else { continue };
            let (routed, tokens) = self.routed(&reading, &modalities, modality);
            for (counts, &routed) in self.body.experts.iter_mut().zip(&routed).filter(|(_, routed)| **routed > 0) {
                counts.tokens += u64::from(routed);
                counts.modalities[modality as usize] += u64::from(routed);
                let of = &mut counts.domains[number];
                of.routed += routed;
                of.square_routed += routed * routed;
                of.cross += routed * tokens;
            }
        }
        for &(number, mass) in &reading.gate_mass {
            let (modality, expert) = (number as usize / self.slots.len(), number as usize % self.slots.len());
            let domain = numbers[modality].expect("checked above");
            self.body.experts[expert].domains[domain].gate_mass += mass;
        }
        self.readings[domain][probe] = Some(reading);
        if self.readings[domain].iter().all(Option::is_some) {
            self.lay_down_trials(domain);
        }
        if self.readings.iter().flatten().all(Option::is_some) {
            self.count_together();
        }
        Ok(())
    }

    /// Lays down which tokens of a domain of the set each expert is tried on.
    fn lay_down_trials(&mut self, domain: usize) {
        for modality in Modality::ALL {
            let Some(number) = self.domains_of[domain][modality as usize] else { continue };
            let mut tokens_of = vec![Vec::new(); self.slots.len()];
            for (probe, reading) in self.probes[domain].iter().zip(self.readings[domain].iter().flatten()) {
                let modalities = probe.modalities();
                for (row, experts) in reading.experts.chunks_exact(self.k).enumerate() {
                    let (token, layer) = (row / self.layers.len(), row % self.layers.len());
                    // A text is tried token by token, a question as a whole.
                    let at = if probe.answer.is_some() { WHOLE } else { token as u32 };
                    if modalities[token] == modality && (at == WHOLE || token < reading.losses.len()) {
                        for &expert in experts {
                            let tokens = &mut tokens_of[self.number(layer, u32::from(expert))];
                            if tokens.last() != Some(&(reading.probe, at)) {
                                tokens.push((reading.probe, at));
                            }
                        }
                    }
                }
            }
            self.tokens_of[number] = tokens_of.into_iter().map(spread).collect();
        }
    }

    /// Counts which experts are used together.
    fn count_together(&mut self) {
        let together = self.together();
        for (counts, together) in self.body.experts.iter_mut().zip(together) {
            let mut pairs: Vec<_> = together.into_iter().collect();
            pairs.sort_unstable_by_key(|&(expert, count)| (std::cmp::Reverse(count), expert));
            pairs.truncate(COACTIVE_MAX);
            counts.coactive = pairs;
        }
    }

    /// For every expert, those of its layer that were used for the same tokens, and for how many.
    pub fn together(&self) -> Vec<HashMap<u32, u32>> {
        let mut together = vec![HashMap::new(); self.slots.len()];
        for reading in self.readings.iter().flatten().flatten() {
            for (row, experts) in reading.experts.chunks_exact(self.k).enumerate() {
                for &expert in experts {
                    let number = self.number(row % self.layers.len(), u32::from(expert));
                    for &other in experts.iter().filter(|&&other| other != expert) {
                        *together[number].entry(u32::from(other)).or_default() += 1;
                    }
                }
            }
        }
        together
    }

    /// Every probe by domain, in the order of the set.
    pub fn probes(&self) -> &[Vec<ProbeTokens>] {
        &self.probes
    }

    /// The layers that have routed experts, and how many each has.
    pub fn layers(&self) -> (&[u32], usize) {
        (&self.layers, self.slots.len() / self.layers.len().max(1))
    }

    /// Which experts each token of a probe used, (tokens, layers, experts of a token), if it has been read.
    pub fn routing(&self, domain: usize, probe: usize) -> Option<Vec<Vec<&[u16]>>> {
        let experts = &self.readings[domain][probe].as_ref()?.experts;
        Some(experts.chunks_exact(self.layers.len() * self.k).map(|token| token.chunks_exact(self.k).collect()).collect())
    }

    /// What was counted of the tokens of each modality of each probe that has been read, by domain and probe.
    pub fn counts_by_probe(&self) -> Vec<ProbeCounts> {
        let mut all = Vec::new();
        for (domain, probes) in self.readings.iter().enumerate() {
            for reading in probes.iter().flatten() {
                let modalities = self.probes[domain][reading.probe as usize].modalities();
                for modality in Modality::ALL {
                    let (routed, tokens) = self.routed(reading, &modalities, modality);
                    if tokens > 0 {
                        let mut gate_mass = vec![0; self.slots.len()];
                        let from = modality as usize * self.slots.len();
                        let of = |&&(number, _): &&(u32, u64)| (from..from + self.slots.len()).contains(&(number as usize));
                        reading.gate_mass.iter().filter(of).for_each(|&(number, mass)| gate_mass[number as usize - from] = mass);
                        all.push(ProbeCounts { domain, probe: reading.probe as usize, modality, tokens, routed, gate_mass });
                    }
                }
            }
        }
        all
    }

    /// How many of a probe's tokens of a modality were routed to each expert, and how many such tokens it has.
    fn routed(&self, reading: &Reading, modalities: &[Modality], modality: Modality) -> (Vec<u32>, u32) {
        let mut routed = vec![0; self.slots.len()];
        for (row, experts) in reading.experts.chunks_exact(self.k).enumerate() {
            if modalities[row / self.layers.len()] == modality {
                experts.iter().for_each(|&expert| routed[self.number(row % self.layers.len(), u32::from(expert))] += 1);
            }
        }
        (routed, modalities.iter().filter(|&&of| of == modality).count() as u32)
    }

    /// The `pairs_max` pairs of expert and domain of whose trials least is known: those that are tried next, with how many trials each will have had then.
    pub fn next_round(&self, pairs_max: usize) -> Vec<Trials> {
        let mut pairs = Vec::new();
        for (domain, experts) in self.tokens_of.iter().enumerate() {
            for (expert, tokens) in experts.iter().enumerate() {
                let of = self.body.experts[expert].domains[domain];
                let most = (tokens.len() as u32).min(TRIALS_MAX);
                if of.trials < most {
                    let (lower, upper) = wilson(of.hits, of.trials, Z_95);
                    let next =
                        Trials { expert: expert as u32, domain: domain as u32, trials: most.min(of.trials + TRIALS_AT_ONCE), hits: 0 };
                    pairs.push((upper - lower, tokens.len(), next));
                }
            }
        }
        // The widest first; among those of whom nothing is known, what is used most.
        pairs.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)).then((a.2.domain, a.2.expert).cmp(&(b.2.domain, b.2.expert))));
        pairs.truncate(pairs_max.min(PAIRS_AT_ONCE));
        pairs.into_iter().map(|(.., next)| next).collect()
    }

    /// Makes the trials of a round, domain by domain; `go_on` is asked before each. Returns what was found of the domains that it got through.
    pub fn try_round(
        &mut self,
        (engine, towers): (&mut Engine, &mut dyn TowerSource),
        round: &[Trials],
        mut go_on: impl FnMut() -> bool,
    ) -> Result<Vec<Trials>, ProfileError> {
        let mut round = round.to_vec();
        round.sort_by_key(|next| next.domain);
        let mut all = Vec::new();
        for of_domain in round.chunk_by(|a, b| a.domain == b.domain) {
            let begun = |next: &Trials| self.body.experts[next.expert as usize].domains[next.domain as usize];
            let from: Vec<_> = of_domain.iter().map(|next| begun(next).trials).collect();
            let Some(hits) = self.hits((engine, towers), of_domain, &from, &mut go_on)? else { break };
            let found = of_domain.iter().zip(hits).map(|(next, hits)| Trials { hits: begun(next).hits + hits, ..*next });
            let found: Vec<_> = found.collect();
            found.iter().try_for_each(|trials| self.take_trials(*trials))?;
            all.extend(found);
        }
        Ok(all)
    }

    /// Takes in what trials have found, now or earlier.
    pub fn take_trials(&mut self, found: Trials) -> Result<(), ProfileError> {
        let tokens = self.tokens_of.get(found.domain as usize).and_then(|experts| experts.get(found.expert as usize));
        let of = self.body.experts.get_mut(found.expert as usize).and_then(|counts| counts.domains.get_mut(found.domain as usize));
        let (tokens, of) = tokens.zip(of).ok_or(ProfileError::Other)?;
        if found.trials as usize > tokens.len() || found.hits > found.trials || found.trials < of.trials {
            return Err(ProfileError::Other);
        }
        (of.trials, of.hits) = (found.trials, found.hits);
        Ok(())
    }

    /// Hits in the first `trials` trials of a pair, computed anew: to compare with what somebody says. `None` when it was broken off.
    pub fn replay(
        &self,
        (engine, towers): (&mut Engine, &mut dyn TowerSource),
        claim: Trials,
        mut go_on: impl FnMut() -> bool,
    ) -> Result<Option<u32>, ProfileError> {
        let tokens = self.tokens_of.get(claim.domain as usize).and_then(|experts| experts.get(claim.expert as usize));
        if tokens.is_none_or(|tokens| tokens.len() < claim.trials as usize) {
            return Err(ProfileError::Other);
        }
        Ok(self.hits((engine, towers), &[claim], &[0], &mut go_on)?.map(|hits| hits[0]))
    }

    /// Hits of each of `round` in its trials from `from` on. A probe is read once, and then gone back through.
    fn hits(
        &self,
        (engine, towers): (&mut Engine, &mut dyn TowerSource),
        round: &[Trials],
        from: &[u32],
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<Option<Vec<u32>>, ProfileError> {
        let mut tests = Vec::new();
        for (number, (next, &from)) in round.iter().zip(from).enumerate() {
            let tokens = &self.tokens_of[next.domain as usize][next.expert as usize];
            tests.extend(tokens[from as usize..next.trials as usize].iter().map(|&(probe, token)| (next.domain, probe, token, number)));
        }
        // By probe, and within it backwards, so that a session is rewound and never read again.
        tests.sort_unstable_by_key(|&(domain, probe, token, number)| (domain, probe, std::cmp::Reverse(token), number));
        let mut hits = vec![0; round.len()];
        for of_probe in tests.chunk_by(|a, b| (a.0, a.1) == (b.0, b.1)) {
            if !go_on() {
                return Ok(None);
            }
            let (number, probe, last, _) = of_probe[0];
            let modality = self.body.domains[number as usize].modality;
            let domain = self.domains_of.iter().position(|of| of[modality as usize] == Some(number as usize)).expect("each is of one");
            let here = &self.probes[domain][probe as usize];
            let reading = self.readings[domain][probe as usize].as_ref().expect("all are read before any is tried");
            let sum = |losses: &[u64]| losses.iter().map(|&loss| f64::from_bits(loss)).sum::<f64>();
            let mut session = engine.session();
            if last > 0 && last != WHOLE {
                engine.forward(&mut session, &here.tokens[..last as usize])?;
            }
            for &(_, _, token, number) in of_probe {
                if !go_on() {
                    return Ok(None);
                }
                let slot = self.slots[round[number].expert as usize];
                let is_hit = if token == WHOLE {
                    engine.left_out = vec![LeftOut { slot, modality: Some(modality) }];
                    let found = losses(engine, towers, here);
                    engine.left_out.clear();
                    sum(&found?) > sum(&reading.losses)
                } else {
                    session.rewind(token as usize);
                    engine.left_out = vec![slot.into()];
                    let (token, next) = (token as usize, here.tokens[token as usize + 1]);
                    let loss =
                        engine.forward(&mut session, &here.tokens[token..=token]).map(|logits| negative_log_likelihood(logits, next));
                    engine.left_out.clear();
                    loss? > f64::from_bits(reading.losses[token])
                };
                hits[number] += u32::from(is_hit);
            }
        }
        Ok(Some(hits))
    }

    /// An expert's number in the order of the body.
    fn number(&self, layer: usize, expert: u32) -> usize {
        layer * (self.slots.len() / self.layers.len().max(1)) + expert as usize
    }
}

/// Puts tokens, which come probe by probe, in the order in which an expert is tried on them: one of each probe, then another of each, since tokens of
/// one probe are alike. All experts of a domain meet the same probes first, so that a probe is read for many trials.
fn spread(mut tokens: Vec<(u32, u32)>) -> Vec<(u32, u32)> {
    tokens.sort_unstable_by_key(|&(probe, token)| (probe, scatter(u64::from(probe) << 32 | u64::from(token)), token));
    let of_probes = tokens.chunk_by(|a, b| a.0 == b.0).flat_map(|of_probe| of_probe.iter().enumerate());
    let mut order: Vec<_> = of_probes.map(|(turn, &(probe, token))| (turn, scatter(u64::from(probe)), probe, token)).collect();
    order.sort_unstable();
    order.into_iter().map(|(.., probe, token)| (probe, token)).collect()
}

/// Sebastiano Vigna's splitmix64, one step: an order that has nothing to do with the numbers.
fn scatter(number: u64) -> u64 {
    let z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trials_go_from_probe_to_probe() {
        let tokens: Vec<_> = (0..5).flat_map(|probe| (0..3 + probe).map(move |token| (probe, token))).collect();
        let order = spread(tokens.clone());
        for turn in 0..3 {
            let probes: std::collections::BTreeSet<_> = order[5 * turn..5 * turn + 5].iter().map(|(probe, _)| *probe).collect();
            assert_eq!(probes.len(), 5, "turn {turn}");
        }
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, tokens);
        assert_ne!(order[0].0, 0, "an order that has nothing to do with the numbers");
    }
}
