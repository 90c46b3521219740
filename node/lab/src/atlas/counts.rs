//! What was counted while a model read its probes, and the figures that follow from it: by layer, by modality or domain, and by expert.

use inference::profiler::{ProbeCounts, Profiler};
use inference::random::Random;
use protocol::profile::lift::{Ranked, ranking};
use protocol::profile::{DomainCounts, DomainTotal, ExpertCounts, Modality, ProfileBody};
use protocol::{ContentHash, ModelId};
use serde::Serialize;

use super::statistics::{Figure, RESAMPLES, bootstrap, divergence, entropy, gini, overlap, pool};

/// Shares of gate mass whose pools are compared.
const POOL_SHARES: [f64; 2] = [0.5, 0.9];

/// Counts of all probes that were read.
pub(super) struct Counts {
    pub(super) model: ModelId,
    pub(super) layers: Vec<u32>,
    /// Experts of a layer.
    pub(super) per_layer: usize,
    /// Probes, each an item of the samples: its domain, and its number there.
    pub(super) items: Vec<(usize, usize)>,
    pub(super) domains: Vec<String>,
    /// What input is sorted by: modalities, or domains where there is one modality only.
    pub(super) labels: Vec<String>,
    pub(super) blocks: Vec<Block>,
}

/// The tokens of one modality of one item.
pub(super) struct Block {
    pub(super) item: usize,
    pub(super) label: usize,
    pub(super) counts: ProbeCounts,
}

/// Sums over some of the blocks, by label and expert.
pub(super) struct Sums {
    pub(super) routed: Vec<Vec<f64>>,
    pub(super) mass: Vec<Vec<f64>>,
}

/// What follows from the counts of a layer.
#[derive(Clone, Debug, Serialize)]
pub(super) struct LayerFigures {
    pub(super) layer: u32,
    /// Mutual information of expert and label, in bits, each label as likely as the others.
    pub(super) information: Figure,
    /// The same where labels are permuted among the blocks: its mean, and what 95% of permutations stay below.
    pub(super) information_null: [f64; 2],
    /// Entropy of the use of all labels together, in bits.
    pub(super) entropy: Figure,
    pub(super) gini: Figure,
    pub(super) pairs: Vec<PairFigures>,
}

/// Two labels beside each other.
#[derive(Clone, Debug, Serialize)]
pub(super) struct PairFigures {
    pub(super) labels: [String; 2],
    /// Jensen–Shannon divergence of their use of experts, in bits.
    pub(super) divergence: Figure,
    /// Jaccard overlap of the pools that carry 50% and 90% of each one's gate mass.
    pub(super) overlap: [Figure; 2],
}

impl Counts {
    pub(super) fn new(model: ModelId, profiler: &Profiler, domains: &[&str]) -> Self {
        let all = profiler.counts_by_probe();
        let (layers, per_layer) = profiler.layers();
        let mut items: Vec<_> = all.iter().map(|counts| (counts.domain, counts.probe)).collect();
        items.dedup();
        let modalities: Vec<_> =
            Modality::ALL.into_iter().filter(|modality| all.iter().any(|counts| counts.modality == *modality)).collect();
        let by_modality = modalities.len() > 1;
        let labels = if by_modality {
            modalities.iter().map(|m| m.name().to_owned()).collect()
        } else {
            domains.iter().map(|&d| d.to_owned()).collect()
        };
        let block = |counts: ProbeCounts| {
            let item = items.binary_search(&(counts.domain, counts.probe)).expect("it is one of them");
            let label = if by_modality { modalities.iter().position(|m| *m == counts.modality) } else { Some(counts.domain) };
            Block { item, label: label.expect("it is one of them"), counts }
        };
        let blocks = all.into_iter().map(block).collect();
        Self {
            model,
            layers: layers.to_vec(),
            per_layer,
            items,
            domains: domains.iter().map(|&domain| domain.to_owned()).collect(),
            labels,
            blocks,
        }
    }

    /// The domain of each item, within which a bootstrap draws.
    fn strata(&self) -> Vec<usize> {
        self.items.iter().map(|(domain, _)| *domain).collect()
    }

    fn has_media(&self, domain: usize) -> bool {
        self.blocks.iter().any(|block| block.counts.domain == domain && block.counts.modality != Modality::Text)
    }

    /// Domains that have neither pictures nor sounds.
    pub(super) fn text_domains(&self) -> Vec<String> {
        (0..self.domains.len()).filter(|&domain| !self.has_media(domain)).map(|domain| self.domains[domain].clone()).collect()
    }

    /// Whether input is sorted by modality.
    pub(super) fn by_modality(&self) -> bool {
        self.labels != self.domains
    }

    pub(super) fn labels_of_blocks(&self) -> Vec<usize> {
        self.blocks.iter().map(|block| block.label).collect()
    }

    /// The items whose number leaves `half` when it is divided by two.
    pub(super) fn half(&self, half: usize) -> Vec<u32> {
        (0..self.items.len()).map(|item| u32::from(item % 2 == half)).collect()
    }

    /// Sums up the blocks of a sample, by the given labels.
    pub(super) fn sums(&self, times: &[u32], label_of: &[usize], labels: usize) -> Sums {
        let slots = self.layers.len() * self.per_layer;
        let mut sums = Sums { routed: vec![vec![0.0; slots]; labels], mass: vec![vec![0.0; slots]; labels] };
        for (block, &label) in self.blocks.iter().zip(label_of) {
            let times = f64::from(times[block.item]);
            if times > 0.0 {
                let add = |sum: &mut f64, count: f64| *sum += times * count;
                sums.routed[label].iter_mut().zip(&block.counts.routed).for_each(|(sum, &count)| add(sum, f64::from(count)));
                sums.mass[label].iter_mut().zip(&block.counts.gate_mass).for_each(|(sum, &mass)| add(sum, mass as f64));
            }
        }
        sums
    }

    fn of_layer<'a>(&self, sums: &'a [Vec<f64>], layer: usize) -> Vec<&'a [f64]> {
        sums.iter().map(|sums| &sums[layer * self.per_layer..][..self.per_layer]).collect()
    }

    /// Everything that is said of layers, with intervals over items and a null by permutation of labels.
    pub(super) fn layer_figures(&self, seed: u64) -> Vec<LayerFigures> {
        let (labels, own) = (self.labels.len(), self.labels_of_blocks());
        let pairs: Vec<_> = (0..labels).flat_map(|a| (a + 1..labels).map(move |b| (a, b))).collect();
        let numbers = |times: &[u32]| -> Vec<f64> {
            let sums = self.sums(times, &own, labels);
            let of = |layer: usize| {
                let (routed, mass) = (self.of_layer(&sums.routed, layer), self.of_layer(&sums.mass, layer));
                let all: Vec<f64> = (0..self.per_layer).map(|expert| routed.iter().map(|counts| counts[expert]).sum()).collect();
                let mut numbers = vec![divergence(&routed), entropy(&all), gini(&all)];
                for &(a, b) in &pairs {
                    numbers.push(divergence(&[routed[a], routed[b]]));
                    numbers.extend(POOL_SHARES.map(|share| overlap(&pool(mass[a], share), &pool(mass[b], share))));
                }
                numbers
            };
            (0..self.layers.len()).flat_map(of).collect()
        };
        let figures = bootstrap(&self.strata(), seed, numbers);
        let nulls = self.information_null(seed);
        let of_layer = figures.chunks_exact(3 + 3 * pairs.len());
        of_layer
            .zip(&self.layers)
            .zip(nulls)
            .map(|((figures, &layer), information_null)| {
                let pair = |(figures, &(a, b)): (&[Figure], &(usize, usize))| PairFigures {
                    labels: [self.labels[a].clone(), self.labels[b].clone()],
                    divergence: figures[0],
                    overlap: [figures[1], figures[2]],
                };
                LayerFigures {
                    layer,
                    information: figures[0],
                    information_null,
                    entropy: figures[1],
                    gini: figures[2],
                    pairs: figures[3..].chunks_exact(3).zip(&pairs).map(pair).collect(),
                }
            })
            .collect()
    }

    /// By layer, the mutual information of expert and label where labels are permuted among the blocks: mean, and what 95% stay below.
    fn information_null(&self, seed: u64) -> Vec<[f64; 2]> {
        let (mut random, mut permuted, all) = (Random::new(seed), self.labels_of_blocks(), vec![1; self.items.len()]);
        let mut by_layer = vec![Vec::new(); self.layers.len()];
        for _ in 0..RESAMPLES {
            random.shuffle(&mut permuted);
            let sums = self.sums(&all, &permuted, self.labels.len());
            for (layer, null) in by_layer.iter_mut().enumerate() {
                null.push(divergence(&self.of_layer(&sums.routed, layer)));
            }
        }
        let sum_up = |mut null: Vec<f64>| {
            null.sort_by(f64::total_cmp);
            [null.iter().sum::<f64>() / RESAMPLES as f64, null[RESAMPLES * 95 / 100]]
        };
        by_layer.into_iter().map(sum_up).collect()
    }

    /// Mean over layers of the mutual information of expert and label.
    pub(super) fn information(&self, seed: u64) -> Figure {
        let own = self.labels_of_blocks();
        let of = |times: &[u32]| {
            let sums = self.sums(times, &own, self.labels.len());
            let by_layer = (0..self.layers.len()).map(|layer| divergence(&self.of_layer(&sums.routed, layer)));
            vec![by_layer.sum::<f64>() / self.layers.len().max(1) as f64]
        };
        bootstrap(&self.strata(), seed, of)[0]
    }

    /// How far domains differ within a modality, and modalities from each other, by the divergence of pairs, mean over layers: of all pairs
    /// of a domain and a modality. `None` where there is one modality only.
    pub(super) fn within_and_between(&self, seed: u64) -> Option<[Figure; 2]> {
        if !self.by_modality() {
            return None;
        }
        let mut kinds: Vec<_> = self.blocks.iter().map(|block| (block.label, block.counts.domain)).collect();
        kinds.sort_unstable();
        kinds.dedup();
        let of_kind: Vec<_> =
            self.blocks.iter().map(|block| kinds.binary_search(&(block.label, block.counts.domain)).expect("one of them")).collect();
        let of = |times: &[u32]| {
            let sums = self.sums(times, &of_kind, kinds.len());
            let (mut totals, mut pairs) = ([0.0; 2], [0.0_f64; 2]);
            for a in 0..kinds.len() {
                for b in a + 1..kinds.len() {
                    let side = usize::from(kinds[a].0 != kinds[b].0);
                    for layer in 0..self.layers.len() {
                        let here = layer * self.per_layer..(layer + 1) * self.per_layer;
                        totals[side] += divergence(&[&sums.routed[a][here.clone()], &sums.routed[b][here]]);
                        pairs[side] += 1.0;
                    }
                }
            }
            [0, 1].map(|side| totals[side] / pairs[side].max(1.0)).to_vec()
        };
        let figures = bootstrap(&self.strata(), seed, of);
        Some([figures[0], figures[1]])
    }

    /// For each label, the experts of all layers with how sure it is that they are its own, from the items of a sample.
    pub(super) fn rankings(&self, times: &[u32]) -> Vec<Vec<Ranked>> {
        self.rankings_by(times, self.labels.len(), |block| Some(block.label))
    }

    /// The same for each domain, by the tokens of what it is about: its pictures or sounds, if it has some, else its text.
    pub(super) fn rankings_of_domains(&self, times: &[u32]) -> Vec<Vec<Ranked>> {
        let has_media: Vec<_> = (0..self.domains.len()).map(|domain| self.has_media(domain)).collect();
        let of =
            |block: &Block| (has_media[block.counts.domain] == (block.counts.modality != Modality::Text)).then_some(block.counts.domain);
        self.rankings_by(times, self.domains.len(), of)
    }

    fn rankings_by(&self, times: &[u32], labels: usize, label_of: impl Fn(&Block) -> Option<usize>) -> Vec<Vec<Ranked>> {
        let slots = self.layers.len() * self.per_layer;
        let total =
            |label: usize| DomainTotal { name: label.to_string(), modality: Modality::Text, probes: 0, tokens: 0, square_tokens: 0 };
        let totals = (0..labels).map(total).collect();
        let mut body = ProfileBody::new(self.model, ContentHash::of(b"atlas"), totals, slots);
        for block in self.blocks.iter().filter(|block| times[block.item] > 0) {
            let (tokens, Some(label)) = (block.counts.tokens, label_of(block)) else { continue };
            let total = &mut body.domains[label];
            total.probes += 1;
            total.tokens += u64::from(tokens);
            total.square_tokens += u64::from(tokens) * u64::from(tokens);
            for (expert, &routed) in block.counts.routed.iter().enumerate().filter(|(_, routed)| **routed > 0) {
                let ExpertCounts { tokens: all, domains, .. } = &mut body.experts[expert];
                *all += u64::from(routed);
                let DomainCounts { routed: sum, square_routed, cross, .. } = &mut domains[label];
                *sum += routed;
                *square_routed += routed * routed;
                *cross += routed * tokens;
            }
        }
        (0..labels).map(|label| ranking(&body, label)).collect()
    }

    /// The least lift of what may be called a specialist: twice the mean of all labels, or less where there are so few labels that none can have more.
    pub(super) fn special_lift(&self) -> f64 {
        f64::midpoint(1.0, self.labels.len() as f64).min(2.0)
    }

    /// By label, experts whose lift there is at least that: `[as the numbers say, of those the ones that are
    /// surely used more often there, of the first the ones that other items confirm]`, with the number of items, as more are looked at.
    pub(super) fn specialists_by_items(&self, seed: u64) -> Vec<SpecialistsFound> {
        let mut order: Vec<_> = (0..self.items.len()).step_by(2).collect();
        Random::new(seed).shuffle(&mut order);
        let held_out = self.rankings(&self.half(1));
        let confirmed =
            |label: usize, expert: usize| held_out[label].iter().any(|ranked| ranked.expert == expert && ranked.is_specialist());
        let found = |items: usize| {
            let mut times = vec![0; self.items.len()];
            order[..items].iter().for_each(|&item| times[item] = 1);
            let rankings = self.rankings(&times);
            let called: Vec<_> = rankings
                .iter()
                .enumerate()
                .flat_map(|(label, ranked)| {
                    ranked.iter().filter(|ranked| ranked.lift.value >= self.special_lift()).map(move |ranked| (label, ranked))
                })
                .collect();
            SpecialistsFound {
                items,
                by_value: called.len(),
                with_bound: called.iter().filter(|(_, ranked)| ranked.is_specialist()).count(),
                confirmed: called.iter().filter(|(label, ranked)| confirmed(*label, ranked.expert)).count(),
                confirmed_with_bound: called.iter().filter(|(label, r)| r.is_specialist() && confirmed(*label, r.expert)).count(),
            }
        };
        let mut sizes: Vec<_> = [64, 32, 16, 8, 4, 2, 1].map(|part| (order.len() / part).max(2.min(order.len()))).to_vec();
        sizes.dedup();
        sizes.into_iter().map(found).collect()
    }
}

/// Experts that are called specialists of a label, counted on the first `items` items.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct SpecialistsFound {
    pub(super) items: usize,
    /// Their lift is at least that of a specialist, as counted.
    pub(super) by_value: usize,
    /// Of those, the ones whose lift is surely above 1, at a false-discovery rate of 5%.
    pub(super) with_bound: usize,
    /// Of the first, the ones that are specialists on the other half of the items, too.
    pub(super) confirmed: usize,
    /// Of the second, the same.
    pub(super) confirmed_with_bound: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPERTS: usize = 8;

    /// Items of two labels in one layer: `use_of(item, label)` says how often each expert is used.
    fn counts(items: usize, use_of: impl Fn(usize, usize) -> [u32; EXPERTS]) -> Counts {
        let block = |item: usize, label: usize| {
            let routed = use_of(item, label).to_vec();
            let gate_mass = routed.iter().map(|&count| u64::from(count)).collect();
            let modality = [Modality::Text, Modality::Image][label];
            let counts = ProbeCounts { domain: 0, probe: item, modality, tokens: routed.iter().sum::<u32>() / 2, routed, gate_mass };
            Block { item, label, counts }
        };
        Counts {
            model: ModelId(ContentHash::of(b"m")),
            layers: vec![0],
            per_layer: EXPERTS,
            items: (0..items).map(|item| (0, item)).collect(),
            domains: vec!["d".to_owned()],
            labels: vec!["text".to_owned(), "image".to_owned()],
            blocks: (0..items).flat_map(|item| [block(item, 0), block(item, 1)]).collect(),
        }
    }

    #[test]
    fn what_is_planted_is_found() {
        let apart = counts(40, |item, label| {
            std::array::from_fn(|expert| if expert / 4 == label { 10 + (item * 7 + expert) as u32 % 3 } else { 0 })
        });
        let layer = &apart.layer_figures(1)[0];
        assert!((layer.information.value - 1.0).abs() < 1e-9 && layer.information.low > 0.99, "a whole bit: {layer:?}");
        assert!(layer.information_null[1] < 0.2 && layer.pairs[0].overlap[1].value < 1e-9);
        let found = apart.specialists_by_items(1);
        let last = found.last().expect("some");
        assert_eq!((last.by_value, last.confirmed, last.confirmed_with_bound), (8, 8, 8));
        let special = apart.rankings(&apart.half(0));
        assert_eq!(special.iter().map(|ranked| ranked.iter().filter(|r| r.is_specialist()).count()).collect::<Vec<_>>(), [4, 4]);

        let alike = counts(40, |item, _| std::array::from_fn(|expert| 8 + ((item * 7 + expert * 3) % 5) as u32));
        let layer = &alike.layer_figures(1)[0];
        assert!(layer.information.value <= layer.information_null[1] && layer.pairs[0].overlap[1].value > 0.8, "{layer:?}");
        assert!(alike.rankings(&alike.half(0)).iter().flatten().all(|ranked| !ranked.is_specialist()));
        assert_eq!(apart.within_and_between(1).map(|[within, _]| within.value), Some(0.0), "one domain has no pairs within a modality");
    }
}
