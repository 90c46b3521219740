//! Statistics of how experts are used: entropies, divergences, pools, clusters and how far two clusterings agree, and intervals by resampling.

use inference::random::Random;

/// Samples of a bootstrap, and permutations of a null.
pub(super) const RESAMPLES: usize = 200;

/// A measured number with its 95% interval, from so many items.
#[derive(Clone, Copy, PartialEq, Debug, serde::Serialize)]
pub(super) struct Figure {
    pub(super) value: f64,
    pub(super) low: f64,
    pub(super) high: f64,
    pub(super) items: usize,
}

impl Figure {
    /// Whether it is surely above `limit`.
    pub(super) fn is_above(&self, limit: f64) -> bool {
        self.low > limit
    }

    pub(super) fn text(&self) -> String {
        let Self { value, low, high, .. } = self;
        format!("{} [{}, {}]", short(*value), short(*low), short(*high))
    }
}

/// A number in three significant digits or so.
pub(super) fn short(x: f64) -> String {
    match x.abs() {
        size if size >= 100.0 => format!("{x:.0}"),
        size if size >= 10.0 => format!("{x:.1}"),
        size if size >= 0.1 || size == 0.0 => format!("{x:.2}"),
        _ => format!("{x:.4}"),
    }
}

/// Several figures by a bootstrap over items (Efron and Tibshirani 1993, §13): `of` makes them from how often each item is in a sample. Items are
/// drawn whole, since tokens of one are alike, and as many of each stratum as there are.
pub(super) fn bootstrap(strata: &[usize], seed: u64, of: impl Fn(&[u32]) -> Vec<f64>) -> Vec<Figure> {
    let items = strata.len();
    let values = of(&vec![1; items]);
    let mut random = Random::new(seed);
    let members = |stratum: usize| (0..items).filter(|&item| strata[item] == stratum).collect::<Vec<_>>();
    let strata: Vec<Vec<usize>> = (0..=strata.iter().copied().max().unwrap_or(0)).map(members).collect();
    let samples: Vec<Vec<f64>> = (0..RESAMPLES)
        .map(|_| {
            let mut times = vec![0; items];
            strata.iter().for_each(|members| members.iter().for_each(|_| times[members[random.below(members.len())]] += 1));
            of(&times)
        })
        .collect();
    let figure = |(at, &value): (usize, &f64)| {
        let (low, high) = middle_95(samples.iter().map(|sample| sample[at]).collect());
        Figure { value, low, high, items }
    };
    values.iter().enumerate().map(figure).collect()
}

/// What 95% of some numbers lie between.
pub(super) fn middle_95(mut numbers: Vec<f64>) -> (f64, f64) {
    numbers.retain(|number| number.is_finite());
    numbers.sort_by(f64::total_cmp);
    let at = |share: f64| numbers.get((share * numbers.len() as f64) as usize).or(numbers.last()).copied().unwrap_or(0.0);
    (at(0.025), at(0.975))
}

/// Mean of some numbers with its interval by bootstrap.
pub(super) fn mean(numbers: &[f64], seed: u64) -> Figure {
    let of = |times: &[u32]| {
        let sum: f64 = numbers.iter().zip(times).map(|(number, &times)| number * f64::from(times)).sum();
        vec![sum / numbers.len().max(1) as f64]
    };
    bootstrap(&vec![0; numbers.len()], seed, of)[0]
}

/// Entropy of counts, in bits.
pub(super) fn entropy(counts: &[f64]) -> f64 {
    let sum: f64 = counts.iter().sum();
    let of = |count: &f64| (count / sum).log2() * count / sum;
    if sum > 0.0 { -counts.iter().filter(|count| **count > 0.0).map(of).sum::<f64>() } else { 0.0 }
}

/// Jensen–Shannon divergence of the distributions of some counts, each of the same weight, in bits (Lin 1991): the mutual information of an outcome
/// and which of the distributions it comes from, where each is as likely.
pub(super) fn divergence(of: &[&[f64]]) -> f64 {
    let of: Vec<_> = of.iter().filter(|counts| counts.iter().sum::<f64>() > 0.0).collect();
    let Some(first) = of.first() else { return 0.0 };
    let mut mixed = vec![0.0; first.len()];
    for counts in &of {
        let sum: f64 = counts.iter().sum();
        mixed.iter_mut().zip(counts.iter()).for_each(|(mixed, count)| *mixed += count / sum);
    }
    let each: f64 = of.iter().map(|counts| entropy(counts)).sum();
    (entropy(&mixed) - each / of.len() as f64).max(0.0)
}

/// How unequal counts are: 0 where all are the same, near 1 where one has all (Gini 1912).
pub(super) fn gini(counts: &[f64]) -> f64 {
    let mut counts = counts.to_vec();
    counts.sort_by(f64::total_cmp);
    let (n, sum) = (counts.len() as f64, counts.iter().sum::<f64>());
    let ranked: f64 = (1..).zip(&counts).map(|(rank, count)| f64::from(rank) * count).sum();
    if sum > 0.0 { 2.0 * ranked / (n * sum) - (n + 1.0) / n } else { 0.0 }
}

/// The fewest places that carry a share of some mass, ascending.
pub(super) fn pool(mass: &[f64], share: f64) -> Vec<usize> {
    let mut order: Vec<_> = (0..mass.len()).collect();
    order.sort_by(|&a, &b| mass[b].total_cmp(&mass[a]).then(a.cmp(&b)));
    let (goal, mut carried) = (mass.iter().sum::<f64>() * share, 0.0);
    let mut pool: Vec<_> = order
        .into_iter()
        .take_while(|&at| {
            let more = carried < goal;
            carried += mass[at];
            more
        })
        .collect();
    pool.sort_unstable();
    pool
}

/// Of what is in either of two pools, the share that is in both (Jaccard 1901).
pub(super) fn overlap(a: &[usize], b: &[usize]) -> f64 {
    let both = a.iter().filter(|at| b.contains(at)).count();
    both as f64 / (a.len() + b.len() - both).max(1) as f64
}

/// Groups `things` by average linkage (Sokal and Michener 1958) until `groups` are left; returns each one's group.
pub(super) fn clusters(things: usize, groups: usize, similarity: impl Fn(usize, usize) -> f64) -> Vec<usize> {
    let mut members: Vec<Vec<usize>> = (0..things).map(|thing| vec![thing]).collect();
    let mut sums: Vec<Vec<f64>> = (0..things).map(|a| (0..things).map(|b| similarity(a, b)).collect()).collect();
    while members.len() > groups.max(1) {
        let average = |a: usize, b: usize| sums[a][b] / (members[a].len() * members[b].len()) as f64;
        let pairs = (0..members.len()).flat_map(|a| (a + 1..members.len()).map(move |b| (a, b)));
        let Some((a, b)) = pairs.max_by(|&(a, b), &(c, d)| average(a, b).total_cmp(&average(c, d))) else { break };
        let gone = members.remove(b);
        members[a].extend(gone);
        let row = sums.remove(b);
        for other in &mut sums {
            let moved = other.remove(b);
            other[a] += moved;
        }
        let mut row = row;
        row.remove(b);
        let own = &mut sums[a];
        own.iter_mut().zip(&row).for_each(|(own, row)| *own += row);
    }
    let mut group_of = vec![0; things];
    for (group, members) in members.iter().enumerate() {
        members.iter().for_each(|&thing| group_of[thing] = group);
    }
    group_of
}

/// How far two clusterings agree.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub(super) struct Agreement {
    /// Adjusted mutual information (Vinh, Epps and Bailey 2010): 1 for the same, 0 for what chance gives; the expectation is by permutation.
    pub(super) adjusted: f64,
    /// What 95% of permutations stay below.
    pub(super) null_high: f64,
    /// The share of permutations that agree at least as much.
    pub(super) p_value: f64,
}

/// Compares two clusterings of things that lie in several sets; labels are permuted within each.
pub(super) fn agreement(sets: &[(Vec<usize>, Vec<usize>)], seed: u64) -> Agreement {
    let information = |sets: &[(Vec<usize>, Vec<usize>)]| sets.iter().map(|(a, b)| mutual_information(a, b)).sum::<f64>();
    let most: f64 = sets.iter().map(|(a, b)| f64::midpoint(entropy(&sizes(a)), entropy(&sizes(b)))).sum();
    let mut random = Random::new(seed);
    let mut permuted = sets.to_vec();
    let null: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            permuted.iter_mut().for_each(|(_, labels)| random.shuffle(labels));
            information(&permuted)
        })
        .collect();
    let (found, expected) = (information(sets), null.iter().sum::<f64>() / RESAMPLES as f64);
    let adjusted = |found: f64| if most - expected > 1e-12 { (found - expected) / (most - expected) } else { 0.0 };
    let mut sorted = null.clone();
    sorted.sort_by(f64::total_cmp);
    let as_much = null.iter().filter(|null| **null >= found - 1e-12).count();
    Agreement {
        adjusted: adjusted(found),
        null_high: adjusted(sorted[RESAMPLES * 95 / 100]),
        p_value: (as_much + 1) as f64 / (RESAMPLES + 1) as f64,
    }
}

fn sizes(labels: &[usize]) -> Vec<f64> {
    let mut sizes = vec![0.0; labels.iter().max().map_or(0, |most| most + 1)];
    labels.iter().for_each(|&label| sizes[label] += 1.0);
    sizes
}

/// Of two labels of the same things, in bits.
fn mutual_information(a: &[usize], b: &[usize]) -> f64 {
    let width = b.iter().max().map_or(0, |most| most + 1);
    let both: Vec<_> = a.iter().zip(b).map(|(a, b)| a * width + b).collect();
    entropy(&sizes(a)) + entropy(&sizes(b)) - entropy(&sizes(&both))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of scipy 1.17 and scikit-learn 1.9: `entropy(p, base=2)`, `jensenshannon(p, q, base=2) ** 2`, `mutual_info_score / log(2)`.
    #[test]
    fn are_those_of_other_programs() {
        let near = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-9, "{found}, expected {expected}");
        near(entropy(&[1.0, 2.0, 3.0, 4.0]), 1.846_439_344_671_015_5);
        near(divergence(&[&[1.0, 2.0, 3.0, 4.0], &[4.0, 3.0, 2.0, 1.0]]), 0.153_560_655_328_984_52);
        near(mutual_information(&[0, 0, 1, 1, 2, 2], &[0, 0, 1, 2, 2, 2]), 1.125_814_583_693_911_2);
        near(gini(&[1.0, 2.0, 3.0, 4.0]), 0.25);
        near(gini(&[0.0, 0.0, 0.0, 8.0]), 0.75);
    }

    #[test]
    fn pools_and_their_overlap() {
        let mass = [5.0, 1.0, 3.0, 1.0];
        assert_eq!((pool(&mass, 0.5), pool(&mass, 0.75), pool(&mass, 1.0)), (vec![0], vec![0, 2], vec![0, 1, 2, 3]));
        assert!((overlap(&[0, 2], &[0, 1, 2]) - 2.0 / 3.0).abs() < 1e-12);
    }

    #[test]
    fn clusters_are_what_lies_together() {
        let places = [0.0_f64, 10.0, 0.1, 10.2, 0.3, 20.0];
        let groups = clusters(6, 3, |a, b| -(places[a] - places[b]).abs());
        assert!(groups[0] == groups[2] && groups[2] == groups[4] && groups[1] == groups[3]);
        assert_eq!(groups.iter().collect::<std::collections::BTreeSet<_>>().len(), 3);
        let labels: Vec<_> = groups.iter().map(|&group| 2 - group).collect();
        let same = agreement(&[(groups.clone(), labels.clone()), (groups, labels)], 1);
        assert!((same.adjusted - 1.0).abs() < 1e-9 && same.p_value < 0.1, "{same:?}");
        let other = agreement(&[(vec![0, 0, 0, 1, 1, 1, 2, 2, 2], vec![0, 1, 2, 0, 1, 2, 0, 1, 2])], 1);
        assert!(other.adjusted < 0.0 && other.p_value > 0.9, "{other:?}");
    }

    #[test]
    fn intervals_hold_what_they_are_of() {
        let mut random = Random::new(3);
        let held = (0..100).filter(|&seed| {
            let numbers: Vec<_> = (0..60).map(|_| random.below(1000) as f64).collect();
            let Figure { low, high, .. } = mean(&numbers, seed);
            (low..high).contains(&499.5)
        });
        let held = held.count();
        assert!((88..=99).contains(&held), "{held} of 100 intervals hold the mean");
    }
}
