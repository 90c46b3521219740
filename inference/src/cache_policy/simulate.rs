//! How often experts of a trace would have been in memory.

use std::collections::BinaryHeap;
use std::iter::from_fn;

use super::{PolicyKind, Trace};

/// How often an expert was in memory when it was used.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Hits {
    /// Uses of an expert by a step.
    pub uses: u64,
    /// Those that found it in memory.
    pub hits: u64,
}

impl Hits {
    /// Hits for each use; 0 without uses.
    pub fn rate(self) -> f64 {
        if self.uses == 0 { 0.0 } else { self.hits as f64 / self.uses as f64 }
    }
}

/// The hits of a memory of `capacity` experts, empty at first, under a policy.
///
/// In a step all hits are noted first, then each miss is brought in, and pushes another one out where memory is full. The
/// step's experts are pinned: a miss that finds nothing but them is not kept.
pub fn simulate(trace: &Trace, capacity: usize, policy: PolicyKind) -> Hits {
    let mut policy = policy.build(trace.slots(), capacity);
    let mut memory = Memory::new(trace.slots(), capacity);
    for slots in trace.slots_of_steps() {
        let (held, missed) = memory.look_up(&slots);
        held.into_iter().for_each(|slot| policy.hit(slot));
        for slot in missed {
            if memory.bring_in(slot, || policy.evict(&|slot| slots.binary_search(&slot).is_ok())) {
                policy.insert(slot);
            }
        }
    }
    memory.hits
}

/// The hits of a memory that knows the future: as [`simulate`], but the expert whose next use is farthest leaves.
///
/// No policy has more hits where every step fits into memory (Belady, “A study of replacement algorithms for a
/// virtual-storage computer”, 1966).
pub fn belady(trace: &Trace, capacity: usize) -> Hits {
    let mut uses_of = vec![Vec::new(); trace.slots()]; // (slots): the steps that are still to use it, the next one last
    for (index, slots) in trace.slots_of_steps().enumerate().rev() {
        slots.into_iter().for_each(|slot| uses_of[slot].push(index));
    }
    let mut farthest: BinaryHeap<(usize, usize)> = BinaryHeap::new(); // (next use, slot), outdated ones too
    let mut memory = Memory::new(trace.slots(), capacity);
    for mut slots in trace.slots_of_steps() {
        slots.iter().for_each(|slot| _ = uses_of[*slot].pop());
        let next_use = |slot: usize| uses_of[slot].last().copied().unwrap_or(usize::MAX);
        for slot in memory.look_up(&slots).1 {
            // The step's own experts get their entries after it, so what is found here is not pinned.
            memory.bring_in(slot, || from_fn(|| farthest.pop()).find(|(next, slot)| next_use(*slot) == *next).map(|(_, slot)| slot));
        }
        slots.retain(|slot| memory.holds[*slot]);
        farthest.extend(slots.into_iter().map(|slot| (next_use(slot), slot)));
    }
    memory.hits
}

/// What is in memory during a simulation.
struct Memory {
    holds: Vec<bool>, // (slots)
    free: usize,
    hits: Hits,
}

impl Memory {
    fn new(slots: usize, capacity: usize) -> Self {
        Self { holds: vec![false; slots], free: capacity, hits: Hits::default() }
    }

    /// Those of a step's slots that are in memory and those that are not, counted.
    fn look_up(&mut self, slots: &[usize]) -> (Vec<usize>, Vec<usize>) {
        let (held, missed): (Vec<usize>, Vec<usize>) = slots.iter().partition(|slot| self.holds[**slot]);
        self.hits.uses += slots.len() as u64;
        self.hits.hits += held.len() as u64;
        (held, missed)
    }

    /// Whether there is room for the slot, after what `evict` chose has left if need be.
    fn bring_in(&mut self, slot: usize, evict: impl FnOnce() -> Option<usize>) -> bool {
        if self.free > 0 {
            self.free -= 1;
        } else if let Some(leaving) = evict() {
            assert!(self.holds[leaving], "slot {leaving} is not in memory");
            self.holds[leaving] = false;
        } else {
            return false;
        }
        self.holds[slot] = true;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache_policy::{Skew, synthetic};
    use crate::random::Random;

    fn random_trace(random: &mut Random, layers: u32, experts: u32, steps: u32, step_max: usize) -> Trace {
        let mut trace = Trace::new(layers, experts).expect("within limits");
        while trace.steps().len() < steps as usize {
            let used: Vec<u32> = (0..experts).filter(|_| random.below(3) == 0).take(step_max).collect();
            _ = trace.push(random.below(layers as usize) as u32, &used); // one without experts is refused
        }
        trace
    }

    #[test]
    fn a_step_larger_than_memory_keeps_what_fits() {
        let trace = Trace::parse("confrere-trace 1 1 8\n0 0 1 2 3\n0 0 1 2\n0 0 1 2 3\n0 0 1 2\n0 4\n0 0 1 2 3").expect("valid");
        for (capacity, hits) in [(0, 0), (2, 2 + 2 + 2 + 1), (3, 3 + 3 + 3 + 2), (4, 3 + 4 + 3 + 3)] {
            let expected = Hits { uses: 19, hits };
            assert_eq!(belady(&trace, capacity), expected);
            PolicyKind::ALL.into_iter().for_each(|kind| assert_eq!(simulate(&trace, capacity, kind), expected, "{kind}"));
        }
        assert!((Hits { uses: 8, hits: 3 }.rate() - 0.375).abs() < 1e-12 && Hits::default().rate() == 0.0);
    }

    #[test]
    fn no_policy_beats_belady() {
        let mut random = Random::new(3);
        let mut traces: Vec<Trace> = (0..30).map(|_| random_trace(&mut random, 3, 12, 300, 6)).collect();
        traces.extend([Skew::Measured, Skew::Uniform].map(|skew| synthetic(4, 128, 8, 300, skew, 1)));
        for (trace, kind) in traces.iter().flat_map(|trace| PolicyKind::ALL.map(|kind| (trace, kind))) {
            for capacity in [8, 12, 20, 35, 60, 100, 200] {
                let (best, found) = (belady(trace, capacity), simulate(trace, capacity, kind));
                assert!(best.hits >= found.hits && best.uses == found.uses, "{kind} at {capacity}: {found:?}, {best:?}");
                assert!(capacity < trace.slots() || best == found, "{kind}: with room for all nothing leaves");
            }
        }
    }

    /// The most hits that any choice of what leaves makes in these steps, each a set of slots, from this memory on.
    fn most_hits(steps: &[u32], memory: u32, capacity: u32) -> u32 {
        let Some((used, later)) = steps.split_first() else { return 0 };
        // Nothing is won by evicting more than needed: memory then holds the step, and else only what was there.
        let full = capacity.min((memory | used).count_ones());
        let choices = (0..1 << 6).filter(|after| after & used == *used && after & !(memory | used) == 0 && after.count_ones() == full);
        (memory & used).count_ones() + choices.map(|after| most_hits(later, after, capacity)).max().expect("capacity holds a step")
    }

    #[test]
    fn belady_is_the_best_of_all_choices() {
        let mut random = Random::new(11);
        for round in 0..150 {
            let trace = random_trace(&mut random, 2, 3, 8, 2);
            let capacity = 2 + round % 3;
            let steps: Vec<u32> = trace.slots_of_steps().map(|slots| slots.iter().map(|slot| 1 << slot).sum()).collect();
            assert_eq!(belady(&trace, capacity).hits, u64::from(most_hits(&steps, 0, capacity as u32)), "{trace}");
        }
    }
}
