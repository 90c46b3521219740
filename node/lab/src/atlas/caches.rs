//! How often experts are in a small memory when requests about pictures, sounds and text take turns: policies that know nothing of modality, and
//! some that use the pools of a profile.

use std::collections::BTreeSet;

use inference::cache_policy::{PolicyKind, Trace, belady, simulate};
use inference::random::Random;
use runtime::measuring::Measuring;
use serde::Serialize;

use super::counts::Counts;

/// The share of all experts that memory holds.
const HELD: f64 = 0.2;
/// Requests of one label that follow each other.
const BURST: usize = 4;

/// What a policy reaches.
#[derive(Clone, Debug, Serialize)]
pub(super) struct CacheRow {
    pub(super) policy: String,
    /// Of all uses of an expert, the share that finds it in memory.
    pub(super) hits: f64,
    /// Experts that are brought in for each use: misses, and what is fetched beforehand.
    pub(super) brought: f64,
}

/// A workload: steps in order, each with the label of its request.
struct Workload {
    trace: Trace,
    labels: Vec<usize>,
}

/// Policies on bursts of requests of each label, in a random order: a request's prompt is one step a layer, each token of its answer another.
pub(super) fn caches(measuring: &Measuring, counts: &Counts, seed: u64) -> Vec<CacheRow> {
    let workload = workload(measuring, counts, seed);
    let slots = counts.layers.len() * counts.per_layer;
    let capacity = (slots as f64 * HELD) as usize;
    let uses = workload.trace.steps().map(|step| step.experts.len()).sum::<usize>().max(1) as f64;
    let plain = |(name, hits): (String, f64)| CacheRow { policy: name, hits, brought: 1.0 - hits };
    let mut rows: Vec<_> =
        PolicyKind::ALL.map(|kind| (kind.name().to_owned(), simulate(&workload.trace, capacity, kind).rate())).map(plain).to_vec();
    let values = values(measuring, counts);
    for (policy, ahead, by_value) in
        [("lru, pools fetched ahead", true, false), ("pools kept", false, true), ("pools fetched ahead and kept", true, true)]
    {
        let (hits, brought) = Pools { values: &values, capacity, per_layer: counts.per_layer, ahead, by_value }.run(&workload);
        rows.push(CacheRow { policy: policy.to_owned(), hits: hits as f64 / uses, brought: brought as f64 / uses });
    }
    rows.push(plain(("belady, who knows the future".to_owned(), belady(&workload.trace, capacity).rate())));
    rows
}

/// What a request is about: the label of its media, if it has some.
fn label_of_item(counts: &Counts) -> Vec<usize> {
    let mut labels = vec![0; counts.items.len()];
    counts.blocks.iter().for_each(|block| labels[block.item] = labels[block.item].max(block.label));
    labels
}

fn workload(measuring: &Measuring, counts: &Counts, seed: u64) -> Workload {
    let (label_of, mut random) = (label_of_item(counts), Random::new(seed));
    let mut bursts: Vec<Vec<usize>> = Vec::new();
    for label in 0..counts.labels.len() {
        let mut items: Vec<_> = (0..counts.items.len()).filter(|&item| item % 2 == 1 && label_of[item] == label).collect();
        random.shuffle(&mut items);
        bursts.extend(items.chunks(BURST).map(<[usize]>::to_vec));
    }
    random.shuffle(&mut bursts);
    let mut trace = Trace::new(counts.layers.len() as u32, counts.per_layer as u32).expect("a model's shape is within a trace's limits");
    let mut labels = Vec::new();
    for item in bursts.into_iter().flatten() {
        let (domain, probe) = counts.items[item];
        let Some(routing) = measuring.profiler.routing(domain, probe) else { continue };
        let prompt = measuring.profiler.probes()[domain][probe].answer.unwrap_or(routing.len() / 2).clamp(1, routing.len());
        let passes = std::iter::once(0..prompt).chain((prompt..routing.len()).map(|token| token..token + 1));
        for tokens in passes {
            for layer in 0..counts.layers.len() {
                let used: BTreeSet<u32> =
                    routing[tokens.clone()].iter().flat_map(|token| token[layer]).map(|&expert| expert.into()).collect();
                trace.push(layer as u32, &used.into_iter().collect::<Vec<_>>()).expect("experts of the model, ascending");
                labels.push(label_of[item]);
            }
        }
    }
    Workload { trace, labels }
}

/// By label and expert, how often requests of that label use it, on the other half of the items.
fn values(measuring: &Measuring, counts: &Counts) -> Vec<Vec<f64>> {
    let (label_of, slots) = (label_of_item(counts), measuring.profiler.body().experts.len());
    let mut values = vec![vec![0.0; slots]; counts.labels.len()];
    for block in counts.blocks.iter().filter(|block| block.item % 2 == 0) {
        let of = &mut values[label_of[block.item]];
        of.iter_mut().zip(&block.counts.routed).for_each(|(value, &routed)| *value += f64::from(routed));
    }
    values
}

/// A memory that knows which label a request has.
struct Pools<'a> {
    values: &'a [Vec<f64>],
    capacity: usize,
    per_layer: usize,
    /// Whether a label's most used experts are fetched when a request has another label than the last.
    ahead: bool,
    /// Whether what leaves is what the label uses least, and not what was used longest ago.
    by_value: bool,
}

impl Pools<'_> {
    /// Hits, and experts that were brought in.
    fn run(&self, workload: &Workload) -> (usize, usize) {
        let mut used_at: Vec<Option<usize>> = vec![None; self.values[0].len()]; // of what is in memory: when it was last used
        let (mut held, mut hits, mut brought, mut before) = (0, 0, 0, None);
        for (now, (step, &label)) in (1..).zip(workload.trace.steps().zip(&workload.labels)) {
            let value = &self.values[label];
            let needed: Vec<_> = step.experts.iter().map(|&expert| step.layer as usize * self.per_layer + usize::from(expert)).collect();
            // Of two that may leave, the one that is less worth.
            let worth = |slot: usize, at: usize| if self.by_value { (value[slot], at) } else { (0.0, at) };
            let least = |used_at: &[Option<usize>]| {
                let idle =
                    used_at.iter().enumerate().filter_map(|(slot, at)| Some((slot, (*at)?))).filter(|(slot, _)| !needed.contains(slot));
                idle.min_by(|a, b| worth(a.0, a.1).partial_cmp(&worth(b.0, b.1)).expect("counts are numbers")).map(|(slot, _)| slot)
            };
            let mut keep = |slot: usize, used_at: &mut Vec<Option<usize>>| {
                if held == self.capacity {
                    let Some(leaving) = least(used_at) else { return };
                    if self.by_value && value[leaving] > value[slot] {
                        return;
                    }
                    used_at[leaving] = None;
                } else {
                    held += 1;
                }
                used_at[slot] = Some(now);
            };
            if self.ahead && before.replace(label) != Some(label) {
                let mut order: Vec<_> = (0..value.len()).collect();
                order.sort_by(|&a, &b| value[b].total_cmp(&value[a]));
                for slot in order.into_iter().take(self.capacity / 2) {
                    if used_at[slot].is_none() {
                        brought += 1;
                        keep(slot, &mut used_at);
                    }
                }
            }
            for &slot in &needed {
                if used_at[slot].is_some() {
                    hits += 1;
                    used_at[slot] = Some(now);
                }
            }
            for &slot in &needed {
                if used_at[slot].is_none() {
                    brought += 1;
                    keep(slot, &mut used_at);
                }
            }
        }
        (hits, brought)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requests of two labels with experts of their own, in turns: room for one label's at a time.
    fn workload() -> Workload {
        let mut trace = Trace::new(1, 8).expect("a shape");
        let mut labels = Vec::new();
        for request in 0..20_u32 {
            let label = request / 2 % 2;
            for token in 0..6 {
                let first = 4 * label + token % 3;
                trace.push(0, &[first, first + 1]).expect("ascending");
                labels.push(label as usize);
            }
        }
        Workload { trace, labels }
    }

    #[test]
    fn pools_fetched_ahead_are_there() {
        let workload = workload();
        let own = |label: usize| (0..8).map(|slot| if slot / 4 == label { 1.0 } else { 0.0 }).collect();
        let values = [own(0), own(1)];
        let run = |ahead, by_value| Pools { values: &values, capacity: 8, per_layer: 8, ahead, by_value }.run(&workload);
        let uses = 20 * 6 * 2;
        assert_eq!(run(false, false), (uses - 8, 8), "all fit, and each is brought once");
        assert_eq!(run(true, false).0, uses, "whoever knows what comes misses nothing");
        let lru = Pools { values: &values, capacity: 4, per_layer: 8, ahead: false, by_value: false }.run(&workload);
        assert_eq!(lru.0 as u64, simulate(&workload.trace, 4, PolicyKind::Lru).hits, "as the least recently used");
    }
}
