//! Measures everything that an atlas says, step by step: weights, what is used, and what is lost without it.

use std::collections::BTreeMap;

use base::clock::check_interrupted;
use base::failure::{Failure, Kind};
use base::output::note;
use inference::engine::LeftOut;
use inference::random::Random;
use protocol::profile::Modality;
use protocol::profile::lift::{Ranked, TOKENS_MIN};
use protocol::{ExpertSlot, Precision};
use runtime::command::Context;
use runtime::data_dir::{LocalModel, OpenDataDir};
use runtime::federation::Federation;
use runtime::measuring::Measuring;
use runtime::probes::{self, Probes};

use super::AtlasArgs;
use super::answers::answers;
use super::caches::caches;
use super::counts::Counts;
use super::figures::{Atlas, ChangeRow, Compared, ExpertRow, Named, RANKED_FIRST, Role};
use super::narrowed::Narrowed;
use super::routers::routers;
use super::statistics::{Figure, agreement, clusters, mean, pool};
use super::tries::{Bench, Change, Losses, Try, by_domain};

/// The share of gate mass that the pool of a label carries, which is left out as a whole.
const POOL: f64 = 0.5;
/// Draws of as many random experts as a domain ranks first.
const RANDOM_DRAWS: u64 = 4;
/// Experts that are left out on their own: the most used, and random ones.
const ALONE: usize = 12;
/// Shares of results that are left out since their weight is small.
const SKIPPED: [f64; 3] = [0.25, 0.5, 0.75];
/// Precisions to which experts are narrowed.
const NARROWED: [Precision; 1] = [Precision::Q4];

fn named(found: &LocalModel) -> Named {
    Named { name: found.name.clone(), id: found.id.to_string() }
}

/// A model whose probes are read.
struct Reader<'a> {
    context: &'a Context,
    args: &'a AtlasArgs,
    open: &'a OpenDataDir,
    federation: &'a Federation,
    probes: &'a Probes,
}

impl Reader<'_> {
    /// Loads a model and has it read all items, or what an earlier atlas has not read of them.
    fn read(&self, found: &LocalModel) -> Result<Measuring, Failure> {
        note(&format!("{}: reading …", found.name));
        let mut measuring = Measuring::new(self.context, (self.open, found), self.federation, &self.args.engine, self.probes)?;
        let mut journal = measuring.resume(self.open, found, self.probes)?;
        let is_read = measuring.read_all(|| !base::clock::interrupted(), |step| journal.add(&step));
        journal.sync()?;
        if !is_read? {
            note("interrupted: what was read is kept, and the same command goes on from there");
            return Err(Failure::interrupted());
        }
        Ok(measuring)
    }

    /// What another state of the model does with the same items.
    fn compare(&self, name: &str, items: &[(usize, usize)], domains: &[&str]) -> Result<Compared, Failure> {
        let found = self.federation.find(self.open, name, None)?;
        let mut measuring = self.read(&found)?;
        let counts = Counts::new(found.id, &measuring.profiler, domains);
        let seed = self.args.seed;
        let Measuring { loaded, profiler, .. } = &mut measuring;
        let about = self.about(&found, items);
        let path = self.args.out.join(format!("tried-{}.jsonl", &found.id.to_string()[..12]));
        let mut bench = Bench::new(loaded, profiler, items.to_vec(), &path, &about)?;
        let (losses, _) = bench.unchanged()?;
        Ok(Compared {
            model: named(&found),
            information: counts.information(seed),
            layers: counts.layer_figures(seed),
            losses: by_domain(items, &losses, domains.len(), seed),
        })
    }

    /// What tries are about: another model, other items or another seed have others.
    fn about(&self, found: &LocalModel, items: &[(usize, usize)]) -> String {
        format!("atlas 1, {}, probes {}, seed {}, {} items", found.id, self.probes.set.hash(), self.args.seed, items.len())
    }
}

pub(super) fn measure(context: &Context, args: &AtlasArgs) -> Result<Atlas, Failure> {
    let open = context.lock()?;
    let federation = Federation::connect(context.runtime.handle(), &open.dir, &args.peers.options(), context.offline)?;
    let found = federation.find(&open, &args.model, None)?;
    if found.manifest.experts_count() == 0 {
        return Err(Failure::new(Kind::Usage, format!("{} has no experts", found.name)));
    }
    let all = args.probes.as_deref().map_or_else(|| Ok(probes::shipped_for(&found.manifest)), probes::read)?;
    let probes = all.first(args.items)?;
    let reader = Reader { context, args, open: &open, federation: &federation, probes: &probes };
    let mut measuring = reader.read(&found)?;
    let domains: Vec<&str> = probes.set.domains().keys().map(String::as_str).collect();
    let counts = Counts::new(found.id, &measuring.profiler, &domains);
    let seed = args.seed;
    note("counting …");
    let routers = routers(measuring.loaded.engine.model(), counts.labels.len().max(2));
    let (chosen_on, tried_on) = (counts.half(0), counts.half(1));
    let experts = expert_rows(&counts, &chosen_on, &tried_on);
    let primary = primary_labels(&counts, &experts);
    let router_agreement = agreement(&by_layer(&routers.iter().map(|r| r.clusters.clone()).collect::<Vec<_>>(), &primary), seed);
    let coactive_agreement = agreement(&by_layer(&coactive_clusters(&measuring, &counts), &primary), seed);
    let items = items_to_try(&measuring, &counts, args.tried);
    let tries = tries(&counts, &experts, &chosen_on, args);
    let about = reader.about(&found, &items);
    let Measuring { loaded, profiler, .. } = &mut measuring;
    let mut bench = Bench::new(loaded, profiler, items.clone(), &args.out.join("tried.jsonl"), &about)?;
    note(&format!("leaving experts out: {} changes on {} items …", tries.len() + 2 * SKIPPED.len(), items.len()));
    let (before, weights) = bench.unchanged()?;
    let skips = skips(&weights);
    let losses_with = bench.with_each(&[&tries[..], &skips[..]].concat())?;
    let row = |name: &str, experts: usize, after: &Losses| {
        let differences: Vec<_> = before.iter().zip(after).map(|(before, after)| after - before).collect();
        ChangeRow {
            name: name.to_owned(),
            experts,
            rises: by_domain(&items, &differences, domains.len(), seed),
            rise: mean(&differences, seed),
        }
    };
    let mut changes: Vec<_> = tries.iter().chain(&skips).map(|one| row(&one.name, one.experts(), &losses_with[&one.name])).collect();
    let losses = by_domain(&items, &before, domains.len(), seed);
    for (name, experts, after) in narrowed(&reader, &found, &measuring, &counts, &items)? {
        changes.push(row(&name, experts, &after));
    }
    let foreign_use = foreign_use(&counts, &experts, seed);
    let caches = caches(&measuring, &counts, seed);
    drop(measuring);
    let untrained = args.untrained.as_deref().map(|name| reader.compare(name, &items, &domains)).transpose()?;
    let checkpoints = args.checkpoints.iter().map(|name| reader.compare(name, &items, &domains)).collect::<Result<_, _>>()?;
    let mut atlas = Atlas {
        version: 1,
        model: named(&found),
        seed,
        probes: probes.set.hash().to_string(),
        domains: counts.domains.clone(),
        text_domains: counts.text_domains(),
        items: counts.items.len(),
        items_tried: items.len(),
        labels: counts.labels.clone(),
        by_modality: counts.by_modality(),
        routers,
        router_agreement,
        coactive_agreement,
        layers: counts.layer_figures(seed),
        information: counts.information(seed),
        within_and_between: counts.within_and_between(seed),
        experts,
        specialists: counts.specialists_by_items(seed),
        losses,
        changes,
        foreign_use,
        caches,
        untrained,
        checkpoints,
        answers: Vec::new(),
    };
    atlas.answers = answers(&atlas);
    Ok(atlas)
}

/// The items that changes are tried on: the first `of_each` of each domain, from the half that chooses nothing.
fn items_to_try(measuring: &Measuring, counts: &Counts, of_each: usize) -> Vec<(usize, usize)> {
    let is_scored = |&&(domain, probe): &&(usize, usize)| measuring.profiler.probes()[domain][probe].tokens.len() > 1;
    let items: Vec<_> = counts.items.iter().skip(1).step_by(2).filter(is_scored).collect();
    let of_domain = |domain| items.iter().filter(move |item| item.0 == domain).take(of_each).map(|item| **item);
    (0..counts.domains.len()).flat_map(of_domain).collect()
}

fn expert_rows(counts: &Counts, chosen_on: &[u32], tried_on: &[u32]) -> Vec<ExpertRow> {
    let labels = counts.labels.len();
    let all = vec![1; counts.items.len()];
    let sums = counts.sums(&all, &counts.labels_of_blocks(), labels);
    let (chosen, held_out, whole) = (counts.rankings(chosen_on), counts.rankings(tried_on), counts.rankings(&all));
    let of = |rankings: &[Vec<Ranked>], label: usize, number: usize| rankings[label].iter().find(|ranked| ranked.expert == number).copied();
    let row = |number: usize| {
        let (layer, expert) = (number / counts.per_layer, number % counts.per_layer);
        let of_layer = |sums: &[f64]| sums[layer * counts.per_layer..][..counts.per_layer].iter().sum::<f64>().max(1.0);
        let by_label: Vec<_> = sums.routed.iter().map(|sums| sums[number] / of_layer(sums)).collect();
        let (own, layers): (f64, f64) = (sums.routed.iter().map(|s| s[number]).sum(), sums.routed.iter().map(|s| of_layer(s)).sum());
        let special = (0..labels).find_map(|label| {
            let is_chosen = |ranked: Ranked| ranked.is_specialist() && ranked.lift.value >= counts.special_lift();
            let confirmed = of(&held_out, label, number).filter(Ranked::is_specialist)?;
            let is_special = of(&chosen, label, number).is_some_and(is_chosen);
            is_special.then(|| (counts.labels[label].clone(), [confirmed.lift.value, confirmed.lift.lower]))
        });
        let near = |label: usize| {
            of(&whole, label, number).is_some_and(|r| r.counts.routed >= TOKENS_MIN && r.lift.upper < 2.0 && r.lift.lower > 0.5)
        };
        let use_share = own / layers.max(1.0);
        let role = match special {
            Some(_) => Role::Specialised,
            None if use_share < 0.25 / counts.per_layer as f64 => Role::RarelyUsed,
            None if (0..labels).all(near) => Role::Universal,
            None => Role::Undecided,
        };
        ExpertRow { layer: counts.layers[layer], expert: expert as u32, use_share, by_label, role, special }
    };
    (0..counts.layers.len() * counts.per_layer).map(row).collect()
}

/// By layer and expert, the label that it serves most.
fn primary_labels(counts: &Counts, experts: &[ExpertRow]) -> Vec<Vec<usize>> {
    let most = |row: &ExpertRow| (0..row.by_label.len()).max_by(|&a, &b| row.by_label[a].total_cmp(&row.by_label[b])).unwrap_or(0);
    experts.chunks(counts.per_layer).map(|layer| layer.iter().map(most).collect()).collect()
}

fn by_layer(a: &[Vec<usize>], b: &[Vec<usize>]) -> Vec<(Vec<usize>, Vec<usize>)> {
    a.iter().cloned().zip(b.iter().cloned()).collect()
}

/// Experts in groups of those that are used for the same tokens: by how often two are used together, of the uses of the lesser.
fn coactive_clusters(measuring: &Measuring, counts: &Counts) -> Vec<Vec<usize>> {
    let together = measuring.profiler.together();
    let uses: Vec<_> = measuring.profiler.body().experts.iter().map(|expert| expert.tokens).collect();
    let of_layer = |layer: usize| {
        let first = layer * counts.per_layer;
        clusters(counts.per_layer, counts.labels.len().max(2), |a, b| {
            let both = together[first + a].get(&(b as u32)).copied().unwrap_or(0);
            f64::from(both) / uses[first + a].min(uses[first + b]).max(1) as f64
        })
    };
    (0..counts.layers.len()).map(of_layer).collect()
}

/// The changes that are tried, whose experts are chosen on the other half of the items.
fn tries(counts: &Counts, experts: &[ExpertRow], chosen_on: &[u32], args: &AtlasArgs) -> Vec<Try> {
    let slot = |number: usize| ExpertSlot {
        part: protocol::PartKind::Text,
        layer: counts.layers[number / counts.per_layer],
        expert: (number % counts.per_layer) as u32,
    };
    let without = |name: String, numbers: &[usize]| Try { name, change: Change::without(numbers.iter().map(|&number| slot(number))) };
    let sums = counts.sums(chosen_on, &counts.labels_of_blocks(), counts.labels.len());
    let layers = 0..counts.layers.len();
    let mut tries = Vec::new();
    for (label, mass) in counts.labels.iter().zip(&sums.mass) {
        let of_layer = |layer: usize| pool(&mass[layer * counts.per_layer..][..counts.per_layer], POOL);
        let pools: Vec<Vec<usize>> = layers.clone().map(of_layer).collect();
        let numbers = |pools: &[Vec<usize>]| {
            pools.iter().enumerate().flat_map(|(l, pool)| pool.iter().map(move |e| l * counts.per_layer + e)).collect::<Vec<_>>()
        };
        tries.push(without(format!("pool of {label}"), &numbers(&pools)));
        let mut random = Random::new(args.seed);
        let random_pools: Vec<_> = pools.iter().map(|pool| random.sample(counts.per_layer, pool.len())).collect();
        tries.push(without(format!("random, as many as the pool of {label}"), &numbers(&random_pools)));
    }
    for (domain, ranked) in counts.domains.iter().zip(counts.rankings_of_domains(chosen_on)) {
        let first: Vec<_> =
            ranked.iter().filter(|ranked| ranked.counts.routed >= TOKENS_MIN).take(RANKED_FIRST).map(|ranked| ranked.expert).collect();
        tries.push(without(format!("ranked first for {domain}"), &first));
    }
    let slots = experts.len();
    for draw in 0..RANDOM_DRAWS {
        tries.push(without(
            format!("random {RANKED_FIRST}, draw {}", draw + 1),
            &Random::new(args.seed + 100 + draw).sample(slots, RANKED_FIRST),
        ));
    }
    let alone: Vec<usize> = if args.all {
        (0..slots).collect()
    } else {
        let mut most: Vec<_> = (0..slots).collect();
        most.sort_by(|&a, &b| experts[b].use_share.total_cmp(&experts[a].use_share));
        most.truncate(ALONE);
        let mut all = [most, Random::new(args.seed + 7).sample(slots, ALONE)].concat();
        all.sort_unstable();
        all.dedup();
        all
    };
    tries.extend(alone.into_iter().map(|number| without(format!("expert {}:{}", slot(number).layer, slot(number).expert), &[number])));
    if counts.by_modality() {
        tries.push(Try {
            name: "each modality confined to its own experts".to_owned(),
            change: Change::LeftOut(confined(counts, experts, &slot)),
        });
    }
    tries
}

/// Bins by modality, as SMoES has them: every expert serves only the modality that uses it most, as far as each keeps as many as a token needs.
fn confined(counts: &Counts, experts: &[ExpertRow], slot: &impl Fn(usize) -> ExpertSlot) -> Vec<LeftOut> {
    let mut left_out = Vec::new();
    for (number, row) in experts.iter().enumerate() {
        let most = row.by_label.iter().copied().fold(0.0, f64::max);
        for (label, &share) in counts.labels.iter().zip(&row.by_label) {
            let modality = Modality::named(label);
            if share < most && modality.is_some() {
                left_out.push(LeftOut { slot: slot(number), modality });
            }
        }
    }
    left_out
}

/// Results of little weight left out, as MoDES does: with one threshold for all tokens, and with one for each modality that leaves out the same share.
fn skips(weights: &[Vec<f32>; 3]) -> Vec<Try> {
    let quantile = |sorted: &[f32], share: f64| sorted.get((share * sorted.len() as f64) as usize).copied().unwrap_or(0.0);
    let mut all: Vec<f32> = weights.iter().flatten().copied().collect();
    all.sort_by(f32::total_cmp);
    let skip = |share: f64| {
        let percent = (100.0 * share).round();
        let one =
            Try { name: format!("{percent}% of results left out, one threshold"), change: Change::WeightMin([quantile(&all, share); 3]) };
        let each = weights.each_ref().map(|weights| quantile(weights, share));
        [one, Try { name: format!("{percent}% of results left out, a threshold by modality"), change: Change::WeightMin(each) }]
    };
    SKIPPED.into_iter().flat_map(skip).collect()
}

impl Try {
    fn experts(&self) -> usize {
        match &self.change {
            Change::LeftOut(left_out) => {
                let mut slots: Vec<_> = left_out.iter().map(|one| (one.slot.layer, one.slot.expert)).collect();
                slots.sort_unstable();
                slots.dedup();
                slots.len()
            }
            Change::WeightMin(_) => 0,
        }
    }
}

/// Losses with the least used, the most used and a random half of each layer's experts at less precision. Nothing where the model's experts are packed
/// already: what they were is not known.
fn narrowed(
    reader: &Reader<'_>,
    found: &LocalModel,
    measuring: &Measuring,
    counts: &Counts,
    items: &[(usize, usize)],
) -> Result<Vec<(String, usize, Losses)>, Failure> {
    if found.manifest.text().experts.iter().any(|expert| expert.precision.is_packed()) {
        note(
            "the experts are packed already, so they are not narrowed any further: an atlas of the model at f32 or bf16 answers question 6",
        );
        return Ok(Vec::new());
    }
    let sums = counts.sums(&counts.half(0), &counts.labels_of_blocks(), counts.labels.len());
    let uses: Vec<f64> =
        (0..counts.layers.len() * counts.per_layer).map(|number| sums.routed.iter().map(|sums| sums[number]).sum()).collect();
    let mut halves: BTreeMap<&str, Vec<bool>> = BTreeMap::new();
    let mut random = Random::new(reader.args.seed + 13);
    for of_layer in uses.chunks(counts.per_layer) {
        let mut order: Vec<_> = (0..of_layer.len()).collect();
        order.sort_by(|&a, &b| of_layer[a].total_cmp(&of_layer[b]));
        let least = &order[..of_layer.len() / 2];
        let drawn = random.sample(of_layer.len(), of_layer.len() / 2);
        for expert in 0..of_layer.len() {
            halves.entry("least used").or_default().push(least.contains(&expert));
            halves.entry("most used").or_default().push(!least.contains(&expert));
            halves.entry("random").or_default().push(drawn.contains(&expert));
            halves.entry("whole").or_default().push(true);
        }
    }
    let mut rows = Vec::new();
    for precision in NARROWED {
        for (half, chosen) in &halves {
            check_interrupted()?;
            let number = |slot: ExpertSlot| {
                counts.layers.binary_search(&slot.layer).ok().map(|layer| layer * counts.per_layer + slot.expert as usize)
            };
            let is_chosen = |slot: ExpertSlot| slot.part == protocol::PartKind::Text && number(slot).is_some_and(|number| chosen[number]);
            let made = Narrowed::new(&reader.open.store, found, precision, is_chosen)?;
            let options = *measuring.loaded.engine.options();
            let mut loaded = reader.federation.load(reader.open, &made.model, reader.context.memory_max, options)?;
            let name = if *half == "whole" { format!("all experts at {precision}") } else { format!("the {half} half at {precision}") };
            let path = reader.args.out.join(format!("tried-{}.jsonl", &made.model.id.to_string()[..12]));
            let mut bench = Bench::new(&mut loaded, &measuring.profiler, items.to_vec(), &path, &reader.about(&made.model, items))?;
            let unchanged = Try { name: name.clone(), change: Change::LeftOut(Vec::new()) };
            let losses = bench.with_each(&[unchanged])?.remove(&name).expect("it was measured");
            rows.push((name, chosen.iter().filter(|chosen| **chosen).count(), losses));
        }
    }
    Ok(rows)
}

/// Of the uses of experts by items of text alone, the share that goes to specialists of pictures and sounds.
fn foreign_use(counts: &Counts, experts: &[ExpertRow], seed: u64) -> Option<Figure> {
    if !counts.by_modality() {
        return None;
    }
    let foreign: Vec<bool> =
        experts.iter().map(|row| row.special.as_ref().is_some_and(|(label, _)| label != Modality::Text.name())).collect();
    let with_media: std::collections::BTreeSet<_> =
        counts.blocks.iter().filter(|block| block.counts.modality != Modality::Text).map(|block| block.item).collect();
    let share = |block: &super::counts::Block| {
        let all: u32 = block.counts.routed.iter().sum();
        let those: u32 = block.counts.routed.iter().zip(&foreign).filter(|(_, foreign)| **foreign).map(|(count, _)| count).sum();
        f64::from(those) / f64::from(all.max(1))
    };
    let shares: Vec<_> = counts.blocks.iter().filter(|block| !with_media.contains(&block.item)).map(share).collect();
    (!shares.is_empty()).then(|| mean(&shares, seed))
}
