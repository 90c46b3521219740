//! What a model's experts do with texts of known domains: counts for a profile.
//!
//! First each probe is read once, and noted which experts each token used and how likely the token after it was. Then single tokens are computed
//! again, each without one of its experts: a *trial* leaves the expert's result out, with the weights of the others as they were, and finishes the
//! forward pass. It is a *hit* when the token that follows became less likely. Which tokens an expert is tried on, and in which order, follows from the probes
//! alone, so that whoever has the model counts the same. Keeps no time and no files: whoever drives it does.

use protocol::profile::lift::{Z_95, wilson};
use protocol::profile::{COACTIVE_MAX, DomainTotal, GATE_UNIT, Modality, ProbeSet, ProfileBody};
use protocol::{ExpertSlot, ModelId};
use serde::{Deserialize, Serialize};

use crate::activation_log::ActivationLog;
use crate::engine::{Engine, ForwardError};
use crate::perplexity::negative_log_likelihood;
use crate::tokenizer::{SpecialTokens, Tokenizer, TokenizerError};

/// Tokens of a probe that are read; what is longer is cut.
pub const PROBE_TOKENS_MAX: usize = 512;
/// Trials that an expert has in a domain at a time.
const TRIALS_AT_ONCE: u32 = 8;
/// Pairs of expert and domain that are tried at a time, at most.
pub const PAIRS_AT_ONCE: usize = 128;
/// After so many trials in a domain an expert has had enough.
pub const TRIALS_MAX: u32 = 256;

/// The probes of one domain, as tokens.
type Tokens = Vec<Vec<u32>>;

/// Why a probe cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// The model's tokenizer makes nothing of it.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The model cannot take it in.
    #[error(transparent)]
    Forward(#[from] ForwardError),
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
    /// The weights that experts were given, in parts of [`GATE_UNIT`], by number in the order of the body.
    gate_mass: Vec<(u32, u64)>,
    /// Negative log-likelihood of each next token, as bits of f64.
    losses: Vec<u64>,
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
    probes: Vec<Tokens>,
    readings: Vec<Vec<Option<Reading>>>,
    body: ProfileBody,
    slots: Vec<ExpertSlot>,
    /// Number of each layer among those with experts.
    layers: Vec<u32>,
    k: usize,
    /// By domain and expert: the tokens that it is tried on, in order, once the domain's probes are read.
    tokens_of: Vec<Vec<Vec<(u32, u32)>>>,
}

impl Profiler {
    /// Nothing read yet.
    pub fn new(engine: &Engine, model: ModelId, tokenizer: &Tokenizer, set: &ProbeSet) -> Result<Self, ProfileError> {
        let decoder = engine.model().decoder();
        let mut probes = Vec::new();
        let tokens_max = PROBE_TOKENS_MAX.min(engine.context());
        for texts in set.domains().values() {
            let mut domain = Vec::with_capacity(texts.len());
            for text in texts {
                let mut tokens = tokenizer.encode(text, SpecialTokens::AsWritten)?;
                tokens.truncate(tokens_max);
                if let Some(&token) = tokens.iter().find(|&&token| token >= decoder.vocab_size) {
                    return Err(ForwardError::Token { token, vocab_size: decoder.vocab_size }.into());
                }
                domain.push(tokens);
            }
            probes.push(domain);
        }
        let domains = set.domains().keys().zip(&probes).map(|(name, probes)| DomainTotal {
            name: name.clone(),
            probes: probes.len() as u32,
            tokens: probes.iter().map(|tokens| tokens.len() as u64).sum(),
            square_tokens: probes.iter().map(|tokens| (tokens.len() as u64).pow(2)).sum(),
        });
        let slots: Vec<_> = engine.model().manifest.text().slots().collect();
        let body = ProfileBody::new(model, set.hash(), domains.collect(), slots.len());
        let readings = probes.iter().map(|domain| vec![None; domain.len()]).collect();
        let (layers, k) = (decoder.moe_layers().collect(), decoder.experts_per_token() as usize);
        let tokens_of = vec![Vec::new(); probes.len()];
        Ok(Self { probes, readings, body, slots, layers, k, tokens_of })
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
    pub fn read_next(&mut self, engine: &mut Engine) -> Result<Option<Reading>, ProfileError> {
        let mut readings = self.readings.iter().enumerate();
        let next = readings.find_map(|(domain, probes)| Some((domain, probes.iter().position(Option::is_none)?)));
        let Some((domain, probe)) = next else { return Ok(None) };
        let reading = self.read(engine, domain, probe)?;
        self.take_reading(reading.clone())?;
        Ok(Some(reading))
    }

    fn read(&self, engine: &mut Engine, domain: usize, probe: usize) -> Result<Reading, ProfileError> {
        let tokens = &self.probes[domain][probe];
        let mut losses = Vec::with_capacity(tokens.len());
        let mut session = engine.session();
        let mut log = ActivationLog::new(tokens.len().max(1) * self.layers.len().max(1));
        log.domain = Some(domain as u16);
        let log = engine.log.replace(log);
        let read = if tokens.is_empty() {
            Ok(())
        } else {
            engine.forward_each(&mut session, tokens, |place, logits| {
                losses.extend(tokens.get(place + 1).map(|&next| negative_log_likelihood(logits, next).to_bits()));
                Ok::<_, ForwardError>(())
            })
        };
        let routed = std::mem::replace(&mut engine.log, log).expect("it was put there");
        read?;
        let mut experts = vec![0; tokens.len() * self.layers.len() * self.k];
        let mut mass = vec![0u64; self.slots.len()];
        for entry in routed.entries() {
            let layer = self.layers.binary_search(&entry.layer).expect("only layers with experts route");
            let row = (entry.position * self.layers.len() + layer) * self.k;
            for (place, choice) in experts[row..][..self.k].iter_mut().zip(entry.choices) {
                *place = choice.expert as u16;
                mass[self.number(layer, choice.expert)] += (f64::from(choice.weight) * GATE_UNIT as f64).round() as u64;
            }
        }
        let gate_mass = (0..).zip(mass).filter(|(_, mass)| *mass > 0).collect();
        Ok(Reading { domain: domain as u32, probe: probe as u32, experts, gate_mass, losses })
    }

    /// Takes in what was read, now or earlier.
    pub fn take_reading(&mut self, reading: Reading) -> Result<(), ProfileError> {
        let (domain, probe) = (reading.domain as usize, reading.probe as usize);
        let tokens = self.probes.get(domain).and_then(|probes| probes.get(probe)).ok_or(ProfileError::Other)?.len();
        let per_layer = self.slots.iter().map(|slot| slot.expert + 1).max().unwrap_or(0);
        let fits = reading.experts.len() == tokens * self.layers.len() * self.k
            && reading.losses.len() + 1 == tokens.max(1)
            && reading.experts.iter().all(|&expert| u32::from(expert) < per_layer)
            && reading.gate_mass.iter().all(|(expert, _)| (*expert as usize) < self.slots.len());
        if !fits || self.readings[domain][probe].is_some() {
            return Err(ProfileError::Other);
        }
        let mut routed = vec![0u32; self.slots.len()];
        for (at, &expert) in reading.experts.iter().enumerate() {
            routed[self.number(at / self.k % self.layers.len(), u32::from(expert))] += 1;
        }
        for (counts, &routed) in self.body.experts.iter_mut().zip(&routed).filter(|(_, routed)| **routed > 0) {
            counts.tokens += u64::from(routed);
            counts.modalities[Modality::Text as usize] += u64::from(routed);
            let of = &mut counts.domains[domain];
            of.routed += routed;
            of.square_routed += routed * routed;
            of.cross += routed * tokens as u32;
        }
        for &(expert, mass) in &reading.gate_mass {
            self.body.experts[expert as usize].domains[domain].gate_mass += mass;
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

    /// Lays down which tokens of a domain each expert is tried on.
    fn lay_down_trials(&mut self, domain: usize) {
        let mut tokens_of = vec![Vec::new(); self.slots.len()];
        for reading in self.readings[domain].iter().flatten() {
            for (row, experts) in reading.experts.chunks_exact(self.k).enumerate() {
                let (token, layer) = (row / self.layers.len(), row % self.layers.len());
                if token < reading.losses.len() {
                    experts.iter().for_each(|&expert| tokens_of[self.number(layer, u32::from(expert))].push((reading.probe, token as u32)));
                }
            }
        }
        self.tokens_of[domain] = tokens_of.into_iter().map(spread).collect();
    }

    /// Counts which experts are used together.
    fn count_together(&mut self) {
        let mut together = vec![std::collections::HashMap::<u32, u32>::new(); self.slots.len()];
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
        for (counts, together) in self.body.experts.iter_mut().zip(together) {
            let mut pairs: Vec<_> = together.into_iter().collect();
            pairs.sort_unstable_by_key(|&(expert, count)| (std::cmp::Reverse(count), expert));
            pairs.truncate(COACTIVE_MAX);
            counts.coactive = pairs;
        }
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
        engine: &mut Engine,
        round: &[Trials],
        mut go_on: impl FnMut() -> bool,
    ) -> Result<Vec<Trials>, ProfileError> {
        let mut round = round.to_vec();
        round.sort_by_key(|next| next.domain);
        let mut all = Vec::new();
        for of_domain in round.chunk_by(|a, b| a.domain == b.domain) {
            let begun = |next: &Trials| self.body.experts[next.expert as usize].domains[next.domain as usize];
            let from: Vec<_> = of_domain.iter().map(|next| begun(next).trials).collect();
            let Some(hits) = self.hits(engine, of_domain, &from, &mut go_on)? else { break };
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
    pub fn replay(&self, engine: &mut Engine, claim: Trials, mut go_on: impl FnMut() -> bool) -> Result<Option<u32>, ProfileError> {
        let tokens = self.tokens_of.get(claim.domain as usize).and_then(|experts| experts.get(claim.expert as usize));
        if tokens.is_none_or(|tokens| tokens.len() < claim.trials as usize) {
            return Err(ProfileError::Other);
        }
        Ok(self.hits(engine, &[claim], &[0], &mut go_on)?.map(|hits| hits[0]))
    }

    /// Hits of each of `round` in its trials from `from` on. A probe is read once, and then gone back through.
    fn hits(
        &self,
        engine: &mut Engine,
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
            let (domain, probe, last, _) = of_probe[0];
            let tokens = &self.probes[domain as usize][probe as usize];
            let reading = self.readings[domain as usize][probe as usize].as_ref().expect("all are read before any is tried");
            let mut session = engine.session();
            if last > 0 {
                engine.forward(&mut session, &tokens[..last as usize])?;
            }
            for &(_, _, token, number) in of_probe {
                if !go_on() {
                    return Ok(None);
                }
                session.rewind(token as usize);
                engine.left_out = vec![self.slots[round[number].expert as usize]];
                let loss = engine
                    .forward(&mut session, &tokens[token as usize..=token as usize])
                    .map(|logits| negative_log_likelihood(logits, tokens[token as usize + 1]));
                engine.left_out.clear();
                hits[number] += u32::from(loss? > f64::from_bits(reading.losses[token as usize]));
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
