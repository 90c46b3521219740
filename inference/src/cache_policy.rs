//! Which expert leaves memory when another one comes in, judged on recorded traces.
//!
//! Goals: no allocation and no clock once built; the same answers from the same calls; a trace that can be read by people.
//! Non-goals: it holds no weights and counts no bytes (every expert counts as one), and it does not know how experts come
//! into memory.

use std::collections::BinaryHeap;
use std::error::Error;
use std::fmt;
use std::str::FromStr;

/// The most layers of a trace.
pub const LAYERS_MAX: u32 = 1024;
/// The most experts in a layer of a trace.
pub const EXPERTS_MAX: u32 = 4096;

// ---------------------------------------------------------------------------------------------------------------------
// Policies
// ---------------------------------------------------------------------------------------------------------------------

/// Keeps account of which slots are in memory and chooses the one that leaves.
///
/// A slot is `layer × experts of a layer + expert`, below the `slots` that the policy was built for; another one panics.
/// None of the calls allocates.
pub trait CachePolicy: Send + fmt::Debug {
    /// A slot in memory was used. One that is not in memory is ignored.
    fn hit(&mut self, slot: usize);

    /// A slot has just been brought into memory, and is used. One that is there already counts as hit.
    fn insert(&mut self, slot: usize);

    /// Takes the slot that is to leave memory out of the account; `None` when all in memory are pinned.
    fn evict(&mut self, pinned: &dyn Fn(usize) -> bool) -> Option<usize>;
}

/// Evicts the least recently used.
#[derive(Debug)]
pub struct Lru {
    links: Links,
    by_use: List,
}

impl Lru {
    /// A policy for slots below `slots`. The capacity does not matter to it.
    pub fn new(slots: usize, _capacity: usize) -> Self {
        Self { links: Links::new(slots), by_use: List::EMPTY }
    }
}

impl CachePolicy for Lru {
    fn hit(&mut self, slot: usize) {
        if self.links.is_linked(slot) {
            self.links.remove(&mut self.by_use, slot);
            self.links.push_newest(&mut self.by_use, slot);
        }
    }

    fn insert(&mut self, slot: usize) {
        if self.links.is_linked(slot) {
            return self.hit(slot);
        }
        self.links.push_newest(&mut self.by_use, slot);
    }

    fn evict(&mut self, pinned: &dyn Fn(usize) -> bool) -> Option<usize> {
        let slot = self.links.oldest_unpinned(&self.by_use, pinned)?;
        self.links.remove(&mut self.by_use, slot);
        Some(slot)
    }
}

/// Evicts the least frequently used, the least recent among equals.
///
/// A slot's count outlives its stay in memory. All counts are halved after every
/// [`HALVE_AFTER`](Self::HALVE_AFTER) × capacity uses, so that yesterday's favourites leave.
#[derive(Debug)]
pub struct Lfu {
    links: Links,
    by_count: Vec<List>, // (COUNT_MAX + 1): of the slots in memory with this count, by use
    counts: Vec<u8>,     // (slots), in memory or not
    used: Vec<u64>,      // (slots): when last, in uses
    clock: u64,
    halve_after: u64,
}

impl Lfu {
    /// Counts stop here.
    pub const COUNT_MAX: u8 = 127;
    /// Uses between two halvings for each slot of the capacity. With 16, LFU is caught by what has passed wherever recency
    /// matters; with 1 it is nearly LRU. Weighed on synthetic routing only.
    pub const HALVE_AFTER: u64 = 4;

    /// A policy for slots below `slots`, of which about `capacity` will be in memory.
    pub fn new(slots: usize, capacity: usize) -> Self {
        Self {
            links: Links::new(slots),
            by_count: vec![List::EMPTY; usize::from(Self::COUNT_MAX) + 1],
            counts: vec![0; slots],
            used: vec![0; slots],
            clock: 0,
            halve_after: Self::HALVE_AFTER * (capacity.max(1) as u64),
        }
    }

    /// Counts a use of a slot that is in no list and puts it into its list.
    fn count(&mut self, slot: usize) {
        self.clock += 1;
        self.used[slot] = self.clock;
        let count = (self.counts[slot] + 1).min(Self::COUNT_MAX);
        self.counts[slot] = count;
        self.links.push_newest(&mut self.by_count[usize::from(count)], slot);
        if self.clock.is_multiple_of(self.halve_after) {
            self.halve();
        }
    }

    fn halve(&mut self) {
        for count in &mut self.counts {
            *count /= 2;
        }
        for count in 1..self.by_count.len() {
            // Counts ascend, so the list at half the count has already been emptied or holds the even neighbour.
            let left = std::mem::replace(&mut self.by_count[count / 2], List::EMPTY);
            let right = std::mem::replace(&mut self.by_count[count], List::EMPTY);
            self.by_count[count / 2] = self.merge(left, right);
        }
    }

    /// One list, still by use, of two.
    fn merge(&mut self, mut left: List, mut right: List) -> List {
        if left.len == 0 {
            return right;
        }
        let mut merged = List::EMPTY;
        loop {
            let from = match (left.oldest(), right.oldest()) {
                (Some(a), Some(b)) if self.used[a] < self.used[b] => &mut left,
                (_, Some(_)) => &mut right,
                (Some(_), None) => &mut left,
                (None, None) => return merged,
            };
            let slot = from.oldest as usize;
            self.links.remove(from, slot);
            self.links.push_newest(&mut merged, slot);
        }
    }
}

impl CachePolicy for Lfu {
    fn hit(&mut self, slot: usize) {
        if self.links.is_linked(slot) {
            self.links.remove(&mut self.by_count[usize::from(self.counts[slot])], slot);
            self.count(slot);
        }
    }

    fn insert(&mut self, slot: usize) {
        if self.links.is_linked(slot) {
            return self.hit(slot);
        }
        self.count(slot);
    }

    fn evict(&mut self, pinned: &dyn Fn(usize) -> bool) -> Option<usize> {
        for list in &mut self.by_count {
            if let Some(slot) = self.links.oldest_unpinned(list, pinned) {
                self.links.remove(list, slot);
                return Some(slot);
            }
        }
        None
    }
}

/// Lets new slots prove themselves in a small queue before they may push others out of the main one.
///
/// S3-FIFO of Yang, Zhang, Qiu, Yue and Rashmi, “FIFO queues are all you need for cache eviction”, SOSP 2023: a small
/// queue of a tenth of the capacity, a main queue in which used slots get another round, and a ghost queue, as long as
/// the main one, of slots that left the small queue unused and go straight to the main one if they come back.
/// It differs in two points: one use in the small queue is enough to be promoted (the paper asks for two), and a pinned
/// slot stays where it is.
#[derive(Debug)]
pub struct S3Fifo {
    links: Links,
    queues: Vec<Queue>, // (slots)
    uses: Vec<u8>,      // (slots): since the slot entered its queue or was passed over, up to USES_MAX
    small: List,
    main: List,
    ghost: List,
    small_max: usize,
    main_max: usize,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Queue {
    Outside,
    Small,
    Main,
    Ghost,
}

impl S3Fifo {
    /// Uses are counted in two bits.
    pub const USES_MAX: u8 = 3;
    /// The small queue's part of the capacity is one in so many.
    pub const SMALL_PART: usize = 10;
    /// So many uses in the small queue take a slot into the main one.
    pub const USES_TO_PROMOTE: u8 = 1;

    /// A policy for slots below `slots`, of which `capacity` fit into memory.
    pub fn new(slots: usize, capacity: usize) -> Self {
        let small_max = (capacity / Self::SMALL_PART).max(1);
        Self {
            links: Links::new(slots),
            queues: vec![Queue::Outside; slots],
            uses: vec![0; slots],
            small: List::EMPTY,
            main: List::EMPTY,
            ghost: List::EMPTY,
            small_max,
            main_max: capacity.saturating_sub(small_max),
        }
    }

    /// A slot from the small queue; from the main one as soon as promotions have filled that beyond its part.
    fn evict_small(&mut self, pinned: &dyn Fn(usize) -> bool) -> Option<usize> {
        let mut next = self.small.oldest();
        while let Some(slot) = next {
            next = self.links.newer(slot);
            if pinned(slot) {
                continue;
            }
            self.links.remove(&mut self.small, slot);
            if self.uses[slot] < Self::USES_TO_PROMOTE {
                self.remember(slot);
                return Some(slot);
            }
            self.enter_main(slot);
            if self.main.len > self.main_max
                && let Some(slot) = self.evict_main(pinned)
            {
                return Some(slot);
            }
        }
        None
    }

    fn evict_main(&mut self, pinned: &dyn Fn(usize) -> bool) -> Option<usize> {
        // Each slot is passed over at most USES_MAX times and a pinned one once, so this ends.
        let mut next = self.main.oldest();
        while let Some(slot) = next {
            next = self.links.newer(slot);
            if pinned(slot) {
                continue;
            }
            self.links.remove(&mut self.main, slot);
            if self.uses[slot] == 0 {
                self.queues[slot] = Queue::Outside;
                return Some(slot);
            }
            self.uses[slot] -= 1;
            self.links.push_newest(&mut self.main, slot);
            next = next.or(Some(slot));
        }
        None
    }

    fn enter_main(&mut self, slot: usize) {
        self.queues[slot] = Queue::Main;
        self.uses[slot] = 0;
        self.links.push_newest(&mut self.main, slot);
    }

    fn remember(&mut self, slot: usize) {
        self.queues[slot] = Queue::Ghost;
        self.links.push_newest(&mut self.ghost, slot);
        if self.ghost.len > self.main_max
            && let Some(oldest) = self.ghost.oldest()
        {
            self.links.remove(&mut self.ghost, oldest);
            self.queues[oldest] = Queue::Outside;
        }
    }
}

impl CachePolicy for S3Fifo {
    fn hit(&mut self, slot: usize) {
        if matches!(self.queues[slot], Queue::Small | Queue::Main) {
            self.uses[slot] = (self.uses[slot] + 1).min(Self::USES_MAX);
        }
    }

    fn insert(&mut self, slot: usize) {
        match self.queues[slot] {
            Queue::Small | Queue::Main => self.hit(slot),
            Queue::Ghost => {
                self.links.remove(&mut self.ghost, slot);
                self.enter_main(slot);
            }
            Queue::Outside => {
                self.queues[slot] = Queue::Small;
                self.uses[slot] = 0;
                self.links.push_newest(&mut self.small, slot);
            }
        }
    }

    fn evict(&mut self, pinned: &dyn Fn(usize) -> bool) -> Option<usize> {
        // The last try finds what the small queue has just promoted.
        if self.small.len >= self.small_max && self.main.len <= self.main_max {
            self.evict_small(pinned).or_else(|| self.evict_main(pinned))
        } else {
            self.evict_main(pinned).or_else(|| self.evict_small(pinned)).or_else(|| self.evict_main(pinned))
        }
    }
}

/// The policies by name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PolicyKind {
    /// [`Lru`].
    Lru,
    /// [`Lfu`].
    Lfu,
    /// [`S3Fifo`].
    S3Fifo,
}

impl PolicyKind {
    /// Each of them.
    pub const ALL: [Self; 3] = [Self::Lru, Self::Lfu, Self::S3Fifo];

    /// What it is called on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::Lfu => "lfu",
            Self::S3Fifo => "s3-fifo",
        }
    }

    /// The policy, with nothing in memory, for slots below `slots`, of which `capacity` fit into memory.
    pub fn build(self, slots: usize, capacity: usize) -> Box<dyn CachePolicy> {
        match self {
            Self::Lru => Box::new(Lru::new(slots, capacity)),
            Self::Lfu => Box::new(Lfu::new(slots, capacity)),
            Self::S3Fifo => Box::new(S3Fifo::new(slots, capacity)),
        }
    }
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for PolicyKind {
    type Err = PolicyUnknown;

    fn from_str(name: &str) -> Result<Self, PolicyUnknown> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| PolicyUnknown(name.to_owned()))
    }
}

/// No policy has this name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PolicyUnknown(pub String);

impl fmt::Display for PolicyUnknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not a cache policy: it is one of {}", self.0, PolicyKind::ALL.map(PolicyKind::name).join(", "))
    }
}

impl Error for PolicyUnknown {}

/// Neighbours of each slot in the one list that it is in.
#[derive(Debug)]
struct Links {
    newer: Vec<u32>, // (slots)
    older: Vec<u32>, // (slots)
}

/// The two ends of a list in [`Links`].
#[derive(Clone, Copy, Debug)]
struct List {
    newest: u32,
    oldest: u32,
    len: usize,
}

/// There is no neighbour.
const END: u32 = u32::MAX;
/// The slot is in no list.
const UNLINKED: u32 = u32::MAX - 1;

impl Links {
    fn new(slots: usize) -> Self {
        assert!(slots < UNLINKED as usize, "slots are counted in 32 bits");
        Self { newer: vec![UNLINKED; slots], older: vec![UNLINKED; slots] }
    }

    fn is_linked(&self, slot: usize) -> bool {
        self.newer[slot] != UNLINKED
    }

    fn newer(&self, slot: usize) -> Option<usize> {
        (self.newer[slot] != END).then_some(self.newer[slot] as usize)
    }

    fn push_newest(&mut self, list: &mut List, slot: usize) {
        debug_assert!(!self.is_linked(slot), "slot {slot} is in a list");
        self.older[slot] = list.newest;
        self.newer[slot] = END;
        match list.newest {
            END => list.oldest = slot as u32,
            newest => self.newer[newest as usize] = slot as u32,
        }
        list.newest = slot as u32;
        list.len += 1;
    }

    fn remove(&mut self, list: &mut List, slot: usize) {
        debug_assert!(self.is_linked(slot), "slot {slot} is in no list");
        let (newer, older) = (self.newer[slot], self.older[slot]);
        match newer {
            END => list.newest = older,
            newer => self.older[newer as usize] = older,
        }
        match older {
            END => list.oldest = newer,
            older => self.newer[older as usize] = newer,
        }
        self.newer[slot] = UNLINKED;
        list.len -= 1;
    }

    fn oldest_unpinned(&self, list: &List, pinned: &dyn Fn(usize) -> bool) -> Option<usize> {
        let mut next = list.oldest();
        while let Some(slot) = next {
            if !pinned(slot) {
                return Some(slot);
            }
            next = self.newer(slot);
        }
        None
    }
}

impl List {
    const EMPTY: Self = Self { newest: END, oldest: END, len: 0 };

    fn oldest(&self) -> Option<usize> {
        (self.oldest != END).then_some(self.oldest as usize)
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Traces
// ---------------------------------------------------------------------------------------------------------------------

/// Which experts were used together, in order of computation.
///
/// As text: a line `confrere-trace 1 LAYERS EXPERTS`, then for each step a line `LAYER EXPERT EXPERT …` with the experts
/// ascending. A decoded token makes one step in each layer; so does a prefill batch, of all its experts.
/// Stays on this node like [`ActivationLog`](crate::activation_log::ActivationLog): routing traces reveal text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Trace {
    /// Layers of the model, of which some may not occur.
    pub layers: u32,
    /// Experts of each layer.
    pub experts: u32,
    steps: Vec<(u16, usize)>, // the layer, and where the step's experts end in `used`
    used: Vec<u16>,           // the experts of all steps
}

/// The experts that one layer used together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step<'a> {
    /// The layer.
    pub layer: u32,
    experts: &'a [u16],
}

impl<'a> Step<'a> {
    /// The experts, ascending.
    pub fn experts(self) -> impl ExactSizeIterator<Item = u32> + use<'a> {
        self.experts.iter().map(|expert| u32::from(*expert))
    }
}

impl Trace {
    /// A trace without steps of a model with these many layers and experts in a layer.
    pub fn new(layers: u32, experts: u32) -> Result<Self, TraceFault> {
        if !(1..=LAYERS_MAX).contains(&layers) {
            return Err(TraceFault::Layers(layers));
        }
        if !(1..=EXPERTS_MAX).contains(&experts) {
            return Err(TraceFault::Experts(experts));
        }
        Ok(Self { layers, experts, steps: Vec::new(), used: Vec::new() })
    }

    /// Adds a step. One that is refused leaves the trace as it was.
    pub fn push(&mut self, layer: u32, experts: &[u32]) -> Result<(), TraceFault> {
        if layer >= self.layers {
            return Err(TraceFault::Layer { layer, layers: self.layers });
        }
        if experts.is_empty() {
            return Err(TraceFault::NoExperts);
        }
        if let Some(pair) = experts.windows(2).find(|pair| pair[0] >= pair[1]) {
            return Err(TraceFault::NotAscending { expert: pair[1], previous: pair[0] });
        }
        if let Some(&expert) = experts.iter().find(|expert| **expert >= self.experts) {
            return Err(TraceFault::Expert { expert, experts: self.experts });
        }
        self.used.extend(experts.iter().map(|expert| *expert as u16));
        self.steps.push((layer as u16, self.used.len()));
        Ok(())
    }

    /// Reads what its `Display` writes.
    pub fn parse(text: &str) -> Result<Self, TraceError> {
        let mut lines = text.lines().zip(1..);
        let (header, _) = lines.next().unwrap_or_default();
        let mut trace = Self::parse_header(header).map_err(|fault| TraceError { line: 1, fault })?;
        let mut numbers = Vec::new();
        for (text, line) in lines {
            trace.parse_step(text, &mut numbers).map_err(|fault| TraceError { line, fault })?;
        }
        Ok(trace)
    }

    /// The steps, in order.
    pub fn steps(&self) -> impl DoubleEndedIterator<Item = Step<'_>> + ExactSizeIterator {
        (0..self.steps.len()).map(|index| {
            let (layer, end) = self.steps[index];
            let start = index.checked_sub(1).map_or(0, |before| self.steps[before].1);
            Step { layer: u32::from(layer), experts: &self.used[start..end] }
        })
    }

    /// Slots of the model: layers × experts.
    pub fn slots(&self) -> usize {
        self.layers as usize * self.experts as usize
    }

    fn parse_header(header: &str) -> Result<Self, TraceFault> {
        let words: Vec<&str> = header.split_ascii_whitespace().take(5).collect();
        let ["confrere-trace", "1", layers, experts] = words[..] else { return Err(TraceFault::Header) };
        Self::new(number(layers)?, number(experts)?)
    }

    fn parse_step(&mut self, line: &str, numbers: &mut Vec<u32>) -> Result<(), TraceFault> {
        numbers.clear();
        for word in line.split_ascii_whitespace() {
            numbers.push(number(word)?);
        }
        let (layer, experts) = numbers.split_first().ok_or(TraceFault::NoExperts)?;
        self.push(*layer, experts)
    }

    /// The slots of a step, ascending.
    fn slots_of<'a>(&self, step: Step<'a>) -> impl Iterator<Item = usize> + use<'a> {
        let first = step.layer as usize * self.experts as usize;
        step.experts.iter().map(move |expert| first + usize::from(*expert))
    }
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "confrere-trace 1 {} {}", self.layers, self.experts)?;
        for step in self.steps() {
            write!(f, "{}", step.layer)?;
            step.experts().try_for_each(|expert| write!(f, " {expert}"))?;
            writeln!(f)?;
        }
        Ok(())
    }
}

/// The number that a word of digits is; a sign is refused.
fn number(word: &str) -> Result<u32, TraceFault> {
    let digits = word.bytes().all(|byte| byte.is_ascii_digit());
    word.parse().ok().filter(|_| digits).ok_or_else(|| TraceFault::Number(word.chars().take(20).collect()))
}

/// Text that is not a trace.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TraceError {
    /// The line, counted from 1.
    pub line: usize,
    /// What is wrong with it.
    pub fault: TraceFault,
}

impl fmt::Display for TraceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.fault)
    }
}

impl Error for TraceError {}

/// What is wrong with a trace or a step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TraceFault {
    /// The first line is another one.
    Header,
    /// So many layers are not possible.
    Layers(u32),
    /// So many experts in a layer are not possible.
    Experts(u32),
    /// Something else stands where a number should; its beginning.
    Number(String),
    /// A step without experts.
    NoExperts,
    /// The model does not have this layer.
    Layer {
        /// The layer named.
        layer: u32,
        /// Layers of the model.
        layers: u32,
    },
    /// The layers do not have this expert.
    Expert {
        /// The expert named.
        expert: u32,
        /// Experts of a layer.
        experts: u32,
    },
    /// An expert that is not above the one before it.
    NotAscending {
        /// The expert.
        expert: u32,
        /// The one before it.
        previous: u32,
    },
}

impl fmt::Display for TraceFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header => write!(f, "not `confrere-trace 1 LAYERS EXPERTS`"),
            Self::Layers(layers) => write!(f, "{layers} layers: a trace has 1 to {LAYERS_MAX}"),
            Self::Experts(experts) => write!(f, "{experts} experts: a layer has 1 to {EXPERTS_MAX}"),
            Self::Number(word) => write!(f, "{word:?} is not a whole number of 32 bits"),
            Self::NoExperts => write!(f, "a step without experts"),
            Self::Layer { layer, layers } => write!(f, "layer {layer} of {layers}, counted from 0"),
            Self::Expert { expert, experts } => write!(f, "expert {expert} of {experts}, counted from 0"),
            Self::NotAscending { expert, previous } => write!(f, "expert {expert} after {previous}: they ascend"),
        }
    }
}

impl Error for TraceFault {}

// ---------------------------------------------------------------------------------------------------------------------
// Simulation
// ---------------------------------------------------------------------------------------------------------------------

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
    for step in trace.steps() {
        memory.pin(trace.slots_of(step));
        for slot in trace.slots_of(step).filter(|slot| memory.holds[*slot]) {
            memory.hits.hits += 1;
            policy.hit(slot);
        }
        for slot in trace.slots_of(step) {
            if !memory.holds[slot] && memory.make_room(|pinned| policy.evict(pinned)) {
                memory.keep(slot);
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
    let next_uses = next_uses(trace);
    let mut next_of = vec![NEVER; trace.slots()];
    let mut farthest: BinaryHeap<(usize, usize)> = BinaryHeap::new(); // (next use, slot), outdated ones too
    let mut memory = Memory::new(trace.slots(), capacity);
    let mut used = 0; // uses before this step
    for step in trace.steps() {
        memory.pin(trace.slots_of(step));
        for (slot, next) in trace.slots_of(step).zip(&next_uses[used..]) {
            memory.hits.hits += u64::from(memory.holds[slot]);
            next_of[slot] = *next;
        }
        for slot in trace.slots_of(step) {
            if memory.holds[slot] {
                continue;
            }
            // The step's own experts get their entries after it, so what is found here is not pinned.
            let evict = |_: &dyn Fn(usize) -> bool| {
                std::iter::from_fn(|| farthest.pop()).find(|(next, slot)| next_of[*slot] == *next).map(|(_, slot)| slot)
            };
            if memory.make_room(evict) {
                memory.keep(slot);
            }
        }
        farthest.extend(trace.slots_of(step).filter(|slot| memory.holds[*slot]).map(|slot| (next_of[slot], slot)));
        used += step.experts.len();
    }
    memory.hits
}

const NEVER: usize = usize::MAX;

/// For each use of a slot, the index of the next step that uses it.
fn next_uses(trace: &Trace) -> Vec<usize> {
    let mut next_of = vec![NEVER; trace.slots()];
    let mut next_uses = vec![NEVER; trace.used.len()];
    let mut end = trace.used.len();
    for (index, step) in trace.steps().enumerate().rev() {
        let start = end - step.experts.len();
        for (slot, next) in trace.slots_of(step).zip(&mut next_uses[start..end]) {
            *next = std::mem::replace(&mut next_of[slot], index);
        }
        end = start;
    }
    next_uses
}

/// What is in memory during a simulation.
struct Memory {
    holds: Vec<bool>,      // (slots)
    pinned_by: Vec<usize>, // (slots): the latest step that used it, counted from 1
    step: usize,
    free: usize,
    hits: Hits,
}

impl Memory {
    fn new(slots: usize, capacity: usize) -> Self {
        Self { holds: vec![false; slots], pinned_by: vec![0; slots], step: 0, free: capacity, hits: Hits::default() }
    }

    /// Starts a step that uses `slots`.
    fn pin(&mut self, slots: impl Iterator<Item = usize>) {
        self.step += 1;
        for slot in slots {
            self.pinned_by[slot] = self.step;
            self.hits.uses += 1;
        }
    }

    /// Whether there is room for one more, after what `evict` chose has left if need be.
    fn make_room(&mut self, evict: impl FnOnce(&dyn Fn(usize) -> bool) -> Option<usize>) -> bool {
        if self.free > 0 {
            return true;
        }
        let Some(slot) = evict(&|slot| self.pinned_by[slot] == self.step) else { return false };
        assert!(self.holds[slot] && self.pinned_by[slot] != self.step, "slot {slot} cannot leave memory");
        self.holds[slot] = false;
        self.free += 1;
        true
    }

    fn keep(&mut self, slot: usize) {
        self.holds[slot] = true;
        self.free -= 1;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Synthetic routing
// ---------------------------------------------------------------------------------------------------------------------

/// How tokens choose experts in a synthetic trace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Skew {
    /// All experts equally, whatever went before.
    Uniform,
    /// As Qwen3-30B-A3B (128 experts, top-8) was measured to: 45% of a token's experts repeat at the next token, 80%
    /// within 8, and an LRU cache of n experts a layer hits 74% at n = 24, 89% at 49 and 96% at 81.
    ///
    /// The measured 37% at n = 8 lies between what this gives when a step's experts are looked up one after another
    /// (about 32%) and when all hits of a step come first, as in [`simulate`] (45%: then it is the repeat rate).
    /// The figures do not tell recency from lasting popularity: mixtures of 20% to 100% recency fit them alike, while
    /// LFU gains on LRU with popularity. Judge a policy by recorded traces, not by this.
    Measured,
}

/// Where an expert comes from under [`Skew::Measured`]: constants found by a search over such forms, kept by a test.
/// Only operations that are exact everywhere, so no `powf`.
mod measured {
    /// The part of the draws that goes by recency; the others go by popularity.
    pub(super) const RECENT_PART: f64 = 0.5;

    /// The weight of the expert that so many of its layer were used after, if a token uses k.
    pub(super) fn recency(depth: usize, k: usize) -> f64 {
        let depth = 9.0 + depth as f64 * 8.0 / k as f64;
        1.0 / (depth * depth * depth)
    }

    /// The weight of the expert at a rank of popularity in its layer.
    pub(super) fn popularity(rank: usize, experts: usize) -> f64 {
        let rank = 8.0 + rank as f64 * 128.0 / experts as f64;
        1.0 / (rank * rank)
    }
}

/// An endless synthetic router, the same from the same seed.
#[derive(Debug)]
pub struct SyntheticRouting {
    skew: Skew,
    experts: usize,
    k: usize,
    random: SplitMix,
    recent: Vec<u16>,     // (layers, experts): the latest used first
    popular: Vec<u16>,    // (layers, experts): the most popular first
    recency: Vec<f64>,    // (experts): weights, summed up
    popularity: Vec<f64>, // (experts): weights, summed up
    taken_by: Vec<u64>,   // (experts): the latest call that drew it, counted from 1
    calls: u64,
}

impl SyntheticRouting {
    /// A router that chooses `k` of `experts` in each of `layers`.
    pub fn new(layers: u32, experts: u32, k: usize, skew: Skew, seed: u64) -> Self {
        assert!((1..=LAYERS_MAX).contains(&layers) && (1..=EXPERTS_MAX).contains(&experts), "{layers} layers of {experts} experts");
        let (layers, experts) = (layers as usize, experts as usize);
        assert!((1..=experts).contains(&k), "{k} of {experts} experts");
        let mut random = SplitMix(seed);
        let mut popular = Vec::with_capacity(layers * experts);
        for _ in 0..layers {
            let start = popular.len();
            popular.extend((0..experts).map(|expert| expert as u16));
            random.shuffle_first(&mut popular[start..], experts);
        }
        Self {
            skew,
            experts,
            k,
            random,
            recent: popular.clone(),
            popular,
            recency: sums((0..experts).map(|depth| measured::recency(depth, k))),
            popularity: sums((0..experts).map(|rank| measured::popularity(rank, experts))),
            taken_by: vec![0; experts],
            calls: 0,
        }
    }

    /// Fills `out`, which is as long as the router's k, with the ascending experts of the next token in `layer`.
    pub fn next(&mut self, layer: u32, out: &mut [u32]) {
        assert_eq!(out.len(), self.k, "experts of a token");
        let start = layer as usize * self.experts;
        match self.skew {
            Skew::Uniform => self.draw_uniform(start, out),
            Skew::Measured => {
                self.draw_measured(start, out);
                self.note_use(start, out);
            }
        }
        out.sort_unstable();
    }

    fn draw_uniform(&mut self, start: usize, out: &mut [u32]) {
        let layer = &mut self.popular[start..start + self.experts];
        self.random.shuffle_first(layer, out.len());
        for (out, expert) in out.iter_mut().zip(layer) {
            *out = u32::from(*expert);
        }
    }

    fn draw_measured(&mut self, start: usize, out: &mut [u32]) {
        /// A popular expert may have been drawn already; so often in a row only when k is near the number of experts.
        const TRIES_MAX: usize = 100;
        let layer = start..start + self.experts;
        self.calls += 1;
        for out in out {
            let drawn = (0..TRIES_MAX).map(|_| {
                let by_recency = self.random.unit() < measured::RECENT_PART;
                let (order, sums) = if by_recency { (&self.recent, &self.recency) } else { (&self.popular, &self.popularity) };
                order[start + self.random.by_weight(sums)]
            });
            let recent = self.recent[layer.clone()].iter().copied();
            let expert = drawn.chain(recent).find(|expert| self.taken_by[usize::from(*expert)] != self.calls);
            let expert = expert.expect("k is at most the number of experts");
            self.taken_by[usize::from(expert)] = self.calls;
            *out = u32::from(expert);
        }
    }

    /// Moves what has just been drawn to the front of the layer's experts by recency.
    fn note_use(&mut self, start: usize, drawn: &[u32]) {
        let recent = &mut self.recent[start..start + self.experts];
        let mut to = recent.len();
        for from in (0..recent.len()).rev() {
            // Without a branch, which would be mispredicted: what was drawn is overwritten by the next one or at the end.
            let expert = recent[from];
            recent[to - 1] = expert;
            to -= usize::from(self.taken_by[usize::from(expert)] != self.calls);
        }
        for (recent, expert) in recent.iter_mut().zip(drawn) {
            *recent = *expert as u16;
        }
    }
}

/// The trace of so many tokens decoded by a [`SyntheticRouting`].
pub fn synthetic(layers: u32, experts: u32, k: usize, tokens: usize, skew: Skew, seed: u64) -> Trace {
    let mut routing = SyntheticRouting::new(layers, experts, k, skew, seed);
    let mut trace = Trace::new(layers, experts).expect("the router has the same limits");
    let mut step = vec![0; k];
    for _ in 0..tokens {
        for layer in 0..layers {
            routing.next(layer, &mut step);
            trace.push(layer, &step).expect("the router's experts ascend");
        }
    }
    trace
}

fn sums(weights: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut sum = 0.0;
    weights
        .map(|weight| {
            sum += weight;
            sum
        })
        .collect()
}

/// SplitMix64 (Steele, Lea and Flood, 2014).
#[derive(Debug)]
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        bits ^ (bits >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        ((u128::from(self.next()) * limit as u128) >> 64) as usize
    }

    /// In 0..1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// An index, by weights summed up.
    fn by_weight(&mut self, sums: &[f64]) -> usize {
        let drawn = self.unit() * sums[sums.len() - 1];
        sums.partition_point(|sum| *sum <= drawn).min(sums.len() - 1)
    }

    /// Brings `count` of the items to the front, each choice and order alike.
    fn shuffle_first(&mut self, items: &mut [u16], count: usize) {
        for index in 0..count {
            let other = index + self.below(items.len() - index);
            items.swap(index, other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In memory, and nothing else known: what any policy must agree with.
    #[derive(Default)]
    struct Naive {
        slots: Vec<usize>, // the least recently used first
    }

    impl Naive {
        fn hit(&mut self, slot: usize) {
            if let Some(index) = self.slots.iter().position(|other| *other == slot) {
                self.slots.remove(index);
                self.slots.push(slot);
            }
        }

        fn insert(&mut self, slot: usize) {
            self.slots.retain(|other| *other != slot);
            self.slots.push(slot);
        }

        fn forget(&mut self, slot: usize) -> bool {
            let before = self.slots.len();
            self.slots.retain(|other| *other != slot);
            self.slots.len() < before
        }
    }

    #[derive(Clone, Copy)]
    enum Operation {
        Hit(usize),
        Insert(usize),
        Evict { pinned_mask: u64 },
    }

    fn random_operations(seed: u64, slots: usize, count: usize) -> Vec<Operation> {
        let mut random = SplitMix(seed);
        let operation = |_| {
            // Low slots are used more often; evictions pin some, all or nothing.
            let slot = random.below(slots).min(random.below(slots));
            match random.below(8) {
                0..=2 => Operation::Hit(slot),
                3..=5 => Operation::Insert(slot),
                _ => Operation::Evict { pinned_mask: [0, u64::MAX, random.next(), random.next() | random.next()][random.below(4)] },
            }
        };
        (0..count).map(operation).collect()
    }

    fn trace(layers: u32, experts: u32, steps: &[(u32, &[u32])]) -> Trace {
        let mut trace = Trace::new(layers, experts).expect("within limits");
        for (layer, experts) in steps {
            trace.push(*layer, experts).expect("a valid step");
        }
        trace
    }

    /// Steps of one to `step_max` experts, as from prefill and decode by turns.
    fn random_trace(random: &mut SplitMix, layers: u32, experts: u32, steps: usize, step_max: usize) -> Trace {
        let mut trace = Trace::new(layers, experts).expect("within limits");
        for step in 0..steps {
            let mut all: Vec<u16> = (0..experts as u16).collect();
            let count = 1 + random.below(step_max);
            random.shuffle_first(&mut all, count);
            let mut used: Vec<u32> = all[..count].iter().map(|expert| u32::from(*expert)).collect();
            used.sort_unstable();
            trace.push(step as u32 % layers, &used).expect("a valid step");
        }
        trace
    }

    #[test]
    fn lru_agrees_with_a_naive_one() {
        for seed in 0..50 {
            let (mut lru, mut naive) = (Lru::new(40, 0), Naive::default());
            for operation in random_operations(seed, 40, 1000) {
                match operation {
                    Operation::Hit(slot) => (lru.hit(slot), naive.hit(slot)).0,
                    Operation::Insert(slot) => (lru.insert(slot), naive.insert(slot)).0,
                    Operation::Evict { pinned_mask } => {
                        let pinned = |slot: usize| pinned_mask >> slot & 1 == 1;
                        let expected = naive.slots.iter().copied().find(|slot| !pinned(*slot));
                        assert_eq!(lru.evict(&pinned), expected);
                        expected.map(|slot| naive.forget(slot));
                    }
                }
            }
        }
    }

    #[test]
    fn lfu_agrees_with_a_naive_one() {
        for seed in 0..50 {
            let capacity = 1 + seed as usize % 7;
            let (mut lfu, mut naive) = (Lfu::new(40, capacity), Naive::default());
            let (mut counts, mut uses) = ([0u8; 40], 0);
            for operation in random_operations(seed, 40, 1000) {
                let used = match operation {
                    Operation::Hit(slot) => (lfu.hit(slot), naive.hit(slot), naive.slots.contains(&slot).then_some(slot)).2,
                    Operation::Insert(slot) => (lfu.insert(slot), naive.insert(slot), Some(slot)).2,
                    Operation::Evict { pinned_mask } => {
                        let pinned = |slot: usize| pinned_mask >> slot & 1 == 1;
                        let expected = naive.slots.iter().copied().filter(|slot| !pinned(*slot)).min_by_key(|slot| counts[*slot]);
                        assert_eq!(lfu.evict(&pinned), expected);
                        expected.map(|slot| naive.forget(slot));
                        None
                    }
                };
                if let Some(slot) = used {
                    counts[slot] = (counts[slot] + 1).min(Lfu::COUNT_MAX);
                    uses += 1;
                    if uses % (Lfu::HALVE_AFTER as usize * capacity) == 0 {
                        counts.iter_mut().for_each(|count| *count /= 2);
                    }
                }
            }
        }
    }

    /// The paper's three queues as plain vectors, the oldest first, with what our version does otherwise.
    #[derive(Default)]
    struct NaiveS3Fifo {
        small: Vec<(usize, u8)>,
        main: Vec<(usize, u8)>,
        ghost: Vec<usize>,
    }

    impl NaiveS3Fifo {
        fn hit(&mut self, slot: usize) -> bool {
            let found = self.small.iter_mut().chain(&mut self.main).find(|(other, _)| *other == slot);
            found.map(|(_, uses)| *uses = (*uses + 1).min(3)).is_some()
        }

        fn insert(&mut self, slot: usize) {
            if self.hit(slot) {
                return;
            }
            let queue = if self.ghost.contains(&slot) { &mut self.main } else { &mut self.small };
            queue.push((slot, 0));
            self.ghost.retain(|other| *other != slot);
        }

        fn evict(&mut self, capacity: usize, pinned: &dyn Fn(usize) -> bool) -> Option<usize> {
            let small_max = (capacity / 10).max(1);
            let main_max = capacity.saturating_sub(small_max);
            let mut from_small = self.small.len() >= small_max && self.main.len() <= main_max;
            loop {
                let unpinned = |queue: &[(usize, u8)]| queue.iter().position(|(slot, _)| !pinned(*slot));
                let (small, main) = (unpinned(&self.small), unpinned(&self.main));
                from_small = small.is_some() && (from_small || main.is_none());
                let (slot, uses) = if from_small { self.small.remove(small?) } else { self.main.remove(main?) };
                match (from_small, uses) {
                    (true, 0) => {
                        self.ghost.push(slot);
                        let beyond = self.ghost.len().saturating_sub(main_max);
                        self.ghost.drain(..beyond);
                        return Some(slot);
                    }
                    (true, _) => {
                        self.main.push((slot, 0));
                        from_small = self.main.len() <= main_max;
                    }
                    (false, 0) => return Some(slot),
                    (false, _) => self.main.push((slot, uses - 1)),
                }
            }
        }
    }

    #[test]
    fn s3_fifo_agrees_with_a_naive_one() {
        for seed in 0..100 {
            let capacity = seed as usize % 35;
            let (mut s3_fifo, mut naive) = (S3Fifo::new(40, capacity), NaiveS3Fifo::default());
            for operation in random_operations(seed, 40, 1000) {
                match operation {
                    Operation::Hit(slot) => (s3_fifo.hit(slot), naive.hit(slot)).0,
                    Operation::Insert(slot) => (s3_fifo.insert(slot), naive.insert(slot)).0,
                    Operation::Evict { pinned_mask } => {
                        let pinned = |slot: usize| pinned_mask >> slot & 1 == 1;
                        assert_eq!(s3_fifo.evict(&pinned), naive.evict(capacity, &pinned), "capacity {capacity}");
                    }
                }
            }
        }
    }

    #[test]
    fn every_policy_evicts_what_is_in_memory_and_not_pinned_and_all_of_it() {
        for (kind, seed) in PolicyKind::ALL.into_iter().flat_map(|kind| (0..50).map(move |seed| (kind, seed))) {
            let (mut policy, mut naive) = (kind.build(40, seed as usize % 30), Naive::default());
            for operation in random_operations(seed, 40, 1000) {
                match operation {
                    Operation::Hit(slot) => policy.hit(slot),
                    Operation::Insert(slot) => (policy.insert(slot), naive.insert(slot)).0,
                    Operation::Evict { pinned_mask } => {
                        let pinned = |slot: usize| pinned_mask >> slot & 1 == 1;
                        match policy.evict(&pinned) {
                            Some(slot) => assert!(!pinned(slot) && naive.forget(slot), "{kind}"),
                            None => assert!(naive.slots.iter().all(|slot| pinned(*slot)), "{kind}"),
                        }
                    }
                }
            }
            while let Some(slot) = policy.evict(&|_| false) {
                assert!(naive.forget(slot), "{kind}");
            }
            assert!(naive.slots.is_empty(), "{kind}");
        }
    }

    #[test]
    fn lfu_lets_go_of_former_favourites() {
        let mut lfu = Lfu::new(4, 2);
        lfu.insert(0);
        (0..100).for_each(|_| lfu.hit(0));
        lfu.insert(1);
        lfu.hit(1);
        lfu.hit(0);
        assert_eq!(lfu.evict(&|slot| slot == 3), Some(1), "a favourite still");
        lfu.insert(1);
        (0..30).for_each(|_| lfu.hit(1));
        assert_eq!(lfu.evict(&|_| false), Some(0), "with more uses in all, but long ago");
    }

    #[test]
    fn s3_fifo_keeps_what_is_used_through_a_scan_where_lru_does_not() {
        let mut steps: Vec<(u32, Vec<u32>)> = Vec::new();
        steps.extend((0..8).cycle().take(40).map(|expert| (0, vec![expert])));
        steps.extend((20..60).map(|expert| (0, vec![expert])));
        steps.extend((0..8).map(|expert| (0, vec![expert])));
        let steps: Vec<(u32, &[u32])> = steps.iter().map(|(layer, experts)| (*layer, experts.as_slice())).collect();
        let trace = trace(1, 60, &steps);
        assert_eq!(simulate(&trace, 10, PolicyKind::S3Fifo), Hits { uses: 88, hits: 32 + 8 });
        assert_eq!(simulate(&trace, 10, PolicyKind::Lru), Hits { uses: 88, hits: 32 });
    }

    #[test]
    fn policy_names_are_read_back_and_others_are_refused() {
        for kind in PolicyKind::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
            assert_eq!(kind.to_string(), kind.name());
        }
        let error = "fifo".parse::<PolicyKind>().expect_err("there is none");
        assert_eq!(error.to_string(), "\"fifo\" is not a cache policy: it is one of lru, lfu, s3-fifo");
    }

    #[test]
    fn trace_reads_back_as_written() {
        let written = trace(2, 4096, &[(0, &[0, 5, 4095]), (1, &[7]), (0, &[1, 2])]);
        assert_eq!(written.to_string(), "confrere-trace 1 2 4096\n0 0 5 4095\n1 7\n0 1 2\n");
        assert_eq!(Trace::parse(&written.to_string()), Ok(written.clone()));
        assert_eq!(Trace::parse(&written.to_string().replace('\n', "\r\n")), Ok(written.clone()));
        let steps: Vec<(u32, Vec<u32>)> = written.steps().map(|step| (step.layer, step.experts().collect())).collect();
        assert_eq!(steps, [(0, vec![0, 5, 4095]), (1, vec![7]), (0, vec![1, 2])]);
        for skew in [Skew::Uniform, Skew::Measured] {
            let written = synthetic(3, 16, 4, 20, skew, 1);
            assert_eq!(Trace::parse(&written.to_string()), Ok(written));
        }
        let empty = trace(LAYERS_MAX, EXPERTS_MAX, &[]);
        assert_eq!(Trace::parse(&empty.to_string()), Ok(empty));
    }

    #[test]
    fn trace_refuses_bad_lines_with_their_numbers() {
        let refused = |text: &str| Trace::parse(text).expect_err(text).to_string();
        for header in ["", "\n", "0 1 2", "confrere-trace 2 1 1", "confrere-trace 1 1", "confrere-trace 1 1 1 1", "confrere-trac 1 1 1"] {
            assert_eq!(refused(header), "line 1: not `confrere-trace 1 LAYERS EXPERTS`");
        }
        assert_eq!(refused("confrere-trace 1 0 8"), "line 1: 0 layers: a trace has 1 to 1024");
        assert_eq!(refused("confrere-trace 1 1025 8"), "line 1: 1025 layers: a trace has 1 to 1024");
        assert_eq!(refused("confrere-trace 1 1 0"), "line 1: 0 experts: a layer has 1 to 4096");
        assert_eq!(refused("confrere-trace 1 1 4097"), "line 1: 4097 experts: a layer has 1 to 4096");
        assert_eq!(refused("confrere-trace 1 1 +8"), "line 1: \"+8\" is not a whole number of 32 bits");
        let refused = |steps: &str| refused(&format!("confrere-trace 1 2 8\n{steps}"));
        assert_eq!(refused("0 1\n2 1"), "line 3: layer 2 of 2, counted from 0");
        assert_eq!(refused("0 7\n1 0\n0 1 8\n"), "line 4: expert 8 of 8, counted from 0");
        assert_eq!(refused("0 1 1"), "line 2: expert 1 after 1: they ascend");
        assert_eq!(refused("0 3 1 9"), "line 2: expert 1 after 3: they ascend");
        assert_eq!(refused("0"), "line 2: a step without experts");
        assert_eq!(refused("0 1\n\n0 1"), "line 3: a step without experts");
        assert_eq!(refused("0 -1"), "line 2: \"-1\" is not a whole number of 32 bits");
        assert_eq!(refused("0 4294967296"), "line 2: \"4294967296\" is not a whole number of 32 bits");
        assert_eq!(refused(&format!("0 {}", "é".repeat(50))), format!("line 2: {:?} is not a whole number of 32 bits", "é".repeat(20)));
    }

    #[test]
    fn a_refused_step_leaves_the_trace_as_it_was() {
        let mut trace = trace(1, 8, &[(0, &[1, 2])]);
        let before = trace.clone();
        for (layer, experts) in [(1, vec![1]), (0, vec![]), (0, vec![1, 8]), (0, vec![2, 1])] {
            trace.push(layer, &experts).expect_err("it is bad");
        }
        assert_eq!(trace, before);
    }

    #[test]
    fn a_step_larger_than_memory_keeps_what_fits() {
        let trace = trace(1, 8, &[(0, &[0, 1, 2, 3]), (0, &[0, 1, 2, 3])]);
        for kind in PolicyKind::ALL {
            assert_eq!(simulate(&trace, 0, kind), Hits { uses: 8, hits: 0 });
            assert_eq!(simulate(&trace, 3, kind), Hits { uses: 8, hits: 3 });
            assert_eq!(simulate(&trace, 4, kind), Hits { uses: 8, hits: 4 });
        }
        assert_eq!(belady(&trace, 0), Hits { uses: 8, hits: 0 });
        assert_eq!(belady(&trace, 3), Hits { uses: 8, hits: 3 });
        assert!((belady(&trace, 3).rate() - 0.375).abs() < 1e-12 && Hits::default().rate() == 0.0);
    }

    #[test]
    fn all_hits_of_a_step_come_before_its_misses() {
        // One after another, expert 0 would push out 5, which is used in the same step.
        let trace = trace(1, 8, &[(0, &[5]), (0, &[6]), (0, &[0, 5])]);
        assert_eq!(simulate(&trace, 2, PolicyKind::Lru), Hits { uses: 4, hits: 1 });
    }

    #[test]
    fn no_policy_beats_belady() {
        let mut random = SplitMix(3);
        let mut traces: Vec<Trace> = (0..30).map(|_| random_trace(&mut random, 3, 12, 300, 6)).collect();
        traces.push(synthetic(4, 128, 8, 300, Skew::Measured, 1));
        traces.push(synthetic(4, 128, 8, 300, Skew::Uniform, 1));
        for (trace, kind) in traces.iter().flat_map(|trace| PolicyKind::ALL.map(|kind| (trace, kind))) {
            for capacity in [8, 12, 20, 35, 60, 100, 200] {
                let (best, found) = (belady(trace, capacity), simulate(trace, capacity, kind));
                assert!(best.hits >= found.hits && best.uses == found.uses, "{kind} at {capacity}: {found:?}, {best:?}");
                assert!(capacity < trace.slots() || best == found, "{kind}: with room for all nothing leaves");
            }
        }
    }

    /// The most hits that any choice of what leaves makes from this step on.
    fn most_hits(trace: &Trace, steps: &[Step<'_>], memory: u32, capacity: u32) -> u64 {
        let Some((step, later)) = steps.split_first() else { return 0 };
        let used: u32 = trace.slots_of(*step).map(|slot| 1 << slot).sum();
        let hits = u64::from((memory & used).count_ones());
        // Nothing is won by evicting more than needed: any memory that holds the step and only what was there.
        let full = capacity.min((memory | used).count_ones());
        let mut best = 0;
        for after in (0u32..1 << trace.slots()).filter(|after| after & used == used && after & !(memory | used) == 0) {
            if after.count_ones() == full {
                best = best.max(most_hits(trace, later, after, capacity));
            }
        }
        hits + best
    }

    #[test]
    fn belady_is_the_best_of_all_choices() {
        let mut random = SplitMix(11);
        for round in 0..150 {
            let trace = random_trace(&mut random, 2, 3, 8, 2);
            let capacity = 2 + round % 3;
            let steps: Vec<Step<'_>> = trace.steps().collect();
            assert_eq!(belady(&trace, capacity).hits, most_hits(&trace, &steps, 0, capacity as u32), "{trace}");
        }
    }

    #[test]
    fn synthetic_routing_is_distinct_ascending_and_the_same_from_a_seed() {
        for (skew, k) in [Skew::Uniform, Skew::Measured].into_iter().flat_map(|skew| [1, 3, 9, 10].map(|k| (skew, k))) {
            let (mut left, mut right) = (SyntheticRouting::new(2, 10, k, skew, 5), SyntheticRouting::new(2, 10, k, skew, 5));
            let (mut one, mut other) = (vec![0; k], vec![0; k]);
            for token in 0..100 {
                left.next(token % 2, &mut one);
                right.next(token % 2, &mut other);
                assert_eq!(one, other);
                assert!(one.windows(2).all(|pair| pair[0] < pair[1]) && one[k - 1] < 10);
            }
            let trace = synthetic(2, 10, k, 50, skew, 5);
            assert!(k == 10 || trace != synthetic(2, 10, k, 50, skew, 6));
        }
    }

    /// Hits after a warm start: those of the whole trace less those of its first tokens.
    fn warm_rate(whole: &Trace, start: &Trace, hits: impl Fn(&Trace) -> Hits) -> f64 {
        let (whole, start) = (hits(whole), hits(start));
        Hits { uses: whole.uses - start.uses, hits: whole.hits - start.hits }.rate()
    }

    /// LRU as textbooks have it: one use after another, nothing pinned.
    fn lru_one_by_one(trace: &Trace, capacity: usize) -> Hits {
        let (mut lru, mut memory) = (Lru::new(trace.slots(), capacity), Memory::new(trace.slots(), capacity));
        for slot in trace.steps().flat_map(|step| trace.slots_of(step)) {
            memory.pin(std::iter::once(slot));
            if memory.holds[slot] {
                memory.hits.hits += 1;
                lru.hit(slot);
            } else if memory.make_room(|_| lru.evict(&|_| false)) {
                memory.keep(slot);
                lru.insert(slot);
            }
        }
        memory.hits
    }

    /// Uses of an expert that the same layer used in one of the `window` tokens before.
    fn repeats(trace: &Trace, window: usize) -> Hits {
        let mut hits = Hits::default();
        let mut last = vec![None; trace.slots()];
        for (index, step) in trace.steps().enumerate() {
            for slot in trace.slots_of(step) {
                let token = index / trace.layers as usize;
                hits.uses += 1;
                hits.hits += u64::from(last[slot].is_some_and(|last| token - last <= window));
                last[slot] = Some(token);
            }
        }
        hits
    }

    #[test]
    fn measured_skew_repeats_and_hits_as_measured() {
        let layers = 8;
        for seed in [1, 2] {
            let (whole, start) =
                (synthetic(layers, 128, 8, 1200, Skew::Measured, seed), synthetic(layers, 128, 8, 200, Skew::Measured, seed));
            let percent = |hits: &dyn Fn(&Trace) -> Hits| 100.0 * warm_rate(&whole, &start, hits);
            let lru = |n: usize| percent(&|trace| simulate(trace, n * layers as usize, PolicyKind::Lru));
            let one_by_one = |n: usize| percent(&|trace| lru_one_by_one(trace, n * layers as usize));
            for (n, measured) in [(24, 74.0), (49, 89.0), (81, 96.0)] {
                assert!((lru(n) - measured).abs() < 2.0, "{n} a layer: {}", lru(n));
                assert!((one_by_one(n) - measured).abs() < 2.0, "{n} a layer, one by one: {}", one_by_one(n));
            }
            for (window, measured) in [(1, 45.0), (8, 80.0)] {
                let repeats = percent(&|trace| repeats(trace, window));
                assert!((repeats - measured).abs() < 3.0, "within {window}: {repeats}");
            }
            // At k experts a layer memory is the token before, whatever the routing: the repeat rate. One by one, a miss
            // pushes out what the same step was about to use.
            assert!((lru(8) - percent(&|trace| repeats(trace, 1))).abs() < 1e-9);
            assert!(one_by_one(8) < 37.0 && 37.0 < lru(8), "{} {}", one_by_one(8), lru(8));
        }
    }

    #[test]
    fn uniform_skew_hits_as_much_as_fits() {
        let (whole, start) = (synthetic(4, 128, 8, 1200, Skew::Uniform, 1), synthetic(4, 128, 8, 200, Skew::Uniform, 1));
        for n in [16, 64] {
            let rate = warm_rate(&whole, &start, |trace| simulate(trace, 4 * n, PolicyKind::Lru));
            assert!((rate - n as f64 / 128.0).abs() < 0.02, "{n} a layer: {rate}");
        }
    }
}
