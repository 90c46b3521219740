//! The policies against slow ones in plain vectors and against cases worked out by hand.

use super::{CachePolicy, Lfu, PolicyKind, S3Fifo};
use crate::random::Random;

const SLOTS: usize = 40;

/// LFU; LRU as long as nothing is counted.
struct Naive {
    memory: Vec<usize>, // the least recently used first
    counts: [u8; SLOTS],
    uses: usize,
}

impl Naive {
    fn use_slot(&mut self, slot: usize, counting: Option<usize>) {
        self.memory.retain(|other| *other != slot);
        self.memory.push(slot);
        if let Some(capacity) = counting {
            self.counts[slot] = (self.counts[slot] + 1).min(127);
            self.uses += 1;
            if self.uses.is_multiple_of(4 * capacity.max(1)) {
                self.counts = self.counts.map(|count| count / 2);
            }
        }
    }

    fn choice(&self, pinned: &dyn Fn(usize) -> bool) -> Option<usize> {
        self.memory.iter().copied().filter(|slot| !pinned(*slot)).min_by_key(|slot| self.counts[*slot])
    }
}

#[test]
fn policies_evict_all_in_memory_but_nothing_pinned_and_as_naive_ones_do() {
    for (kind, seed) in PolicyKind::ALL.into_iter().flat_map(|kind| (0..100).map(move |seed| (kind, seed))) {
        let (mut random, capacity) = (Random::new(seed), seed as usize % 35);
        let (mut policy, mut naive) = (kind.build(SLOTS, capacity), Naive { memory: Vec::new(), counts: [0; SLOTS], uses: 0 });
        for call in 0..1000 + SLOTS {
            // Low slots are used more often; evictions pin some, all or nothing, and at the end nothing.
            let slot = random.below(SLOTS).min(random.below(SLOTS));
            let mask = [0, u64::MAX, random.bits(), random.bits() | random.bits()][random.below(4)];
            let pinned = |slot: usize| call < 1000 && mask >> slot & 1 == 1;
            let choice = random.below(8);
            if call < 1000 && choice < 6 {
                match choice {
                    0..3 => policy.insert(slot),
                    _ => policy.hit(slot),
                }
                if choice < 3 || naive.memory.contains(&slot) {
                    naive.use_slot(slot, (kind == PolicyKind::Lfu).then_some(capacity));
                }
                continue;
            }
            let (evicted, expected) = (policy.evict(&pinned), naive.choice(&pinned));
            assert!(evicted == expected || kind == PolicyKind::S3Fifo, "{kind}");
            assert_eq!(evicted.is_some(), expected.is_some(), "{kind}");
            if let Some(slot) = evicted {
                let index = naive.memory.iter().position(|other| *other == slot).expect("it is in memory");
                assert!(!pinned(naive.memory.remove(index)), "{kind}");
            }
        }
        assert!(naive.memory.is_empty());
    }
}

#[test]
fn lfu_lets_go_of_former_favourites() {
    let mut lfu = Lfu::new(3, 100);
    (0..400).for_each(|_| lfu.insert(0)); // counts 127, which are halved after 400 uses
    (0..62).for_each(|_| lfu.insert(1));
    assert_eq!(lfu.evict(&|_| false), Some(1), "a favourite still");
    (0..2).for_each(|_| lfu.insert(1));
    assert_eq!(lfu.evict(&|_| false), Some(0), "with more uses in all, but long ago");
}

#[test]
fn s3_fifo_decides_as_worked_out_by_hand() {
    // +0: insert 0; *0: hit; -0: 0 is evicted; -0/1: with 1 pinned.
    for (capacity, calls) in [
        (10, "+0 +1 +2 *0 -1 +1 -2 -0 -1"),                // 0 is promoted for its use, 1 because it comes back
        (10, "+0 +1 -1/0 -0"),                             // a pinned one stays where it is
        (20, "+0 +1 *0 -1 +2 -0 -2"),                      // a small queue below its two leaves it to the main one
        (2, "+0 +1 +2 *0 *1 -0 -2 -1"),                    // 2 stays while the main queue is beyond its one
        (2, "+0 +1 *0 -1 +1 +2 -0 -2 -1"),                 // so does 2, with what came back
        (10, "+0 *0 -0 +0 +1 -0 -1"),                      // what left the main queue does not come back to it
        (3, "+0 +1 +2 -0 -1 -2 +1 +0 -0 -1"),              // two ghosts, as many as fit into the main queue: 0 is forgotten
        (10, "+0 +1 +2 *0 *1 *2 -0 *1 *1 *1 *2 *2 -2 -1"), // the more used one gets another round
        (10, "+0 +1 +2 *0 *1 *2 -0 *1 *1 *1 *1 *2 *2 *2 -1 -2"), // four uses count as three
    ] {
        let mut policy = S3Fifo::new(3, capacity);
        for call in calls.split(' ') {
            let (slot, pinned) = call[1..].split_once('/').unwrap_or((&call[1..], "3"));
            let [slot, pinned] = [slot, pinned].map(|number| number.parse().expect("a number"));
            match &call[..1] {
                "+" => policy.insert(slot),
                "*" => policy.hit(slot),
                _ => assert_eq!(policy.evict(&|other| other == pinned), Some(slot), "{call} of {calls}"),
            }
        }
    }
}

#[test]
fn policy_names_are_read_back_and_others_are_refused() {
    for kind in PolicyKind::ALL {
        assert_eq!(kind.to_string().parse(), Ok(kind));
    }
    let error = "fifo".parse::<PolicyKind>().expect_err("there is none");
    assert_eq!(error.to_string(), "\"fifo\" is not a cache policy: it is one of lru, lfu, s3-fifo");
}
