//! The six questions about the experts of a model, each answered in two sentences that follow from measured numbers.

use super::figures::{Answer, Atlas, ChangeRow, RANKED_FIRST, Role};
use super::statistics::{Figure, short};

/// Below that, a rise of the loss is called none: one percent of a nat.
const NO_LOSS: f64 = 0.01;

pub(super) fn answers(atlas: &Atlas) -> Vec<Answer> {
    let all = [partition(atlas), knows(atlas), cross_modal(atlas), learned(atlas), roles(atlas), narrow(atlas)];
    all.into_iter().flatten().collect()
}

/// What input is sorted by, in words.
fn label(atlas: &Atlas) -> (&'static str, &'static str) {
    if atlas.by_modality { ("modality", "modalities") } else { ("domain", "domains") }
}

fn change<'a>(atlas: &'a Atlas, name: &str) -> Option<&'a ChangeRow> {
    atlas.changes.iter().find(|change| change.name == name)
}

/// Mean of some figures of which each holds its own interval: the interval is that of the mean of the ends.
fn together(figures: impl Iterator<Item = Figure>) -> Option<Figure> {
    let all: Vec<_> = figures.collect();
    let mean = |of: &dyn Fn(&Figure) -> f64| all.iter().map(of).sum::<f64>() / all.len() as f64;
    let first = all.first()?;
    Some(Figure { value: mean(&|f| f.value), low: mean(&|f| f.low), high: mean(&|f| f.high), items: first.items })
}

fn partition(atlas: &Atlas) -> Option<Answer> {
    let (one, many) = label(atlas);
    let most = (atlas.labels.len() as f64).log2();
    let exclusive = atlas.experts.iter().filter(|row| {
        let sum: f64 = row.by_label.iter().sum();
        sum > 0.0 && row.by_label.iter().any(|share| *share > 0.9 * sum)
    });
    let (exclusive, all) = (exclusive.count(), atlas.experts.len());
    let null = atlas.layers.iter().map(|layer| layer.information_null[1]).sum::<f64>() / atlas.layers.len().max(1) as f64;
    let overlap = |which: usize| together(atlas.layers.iter().flat_map(|layer| layer.pairs.iter().map(move |pair| pair.overlap[which])));
    let (half, nine) = (overlap(0)?, overlap(1)?);
    let verdict = if atlas.information.high <= null {
        format!("Neither: the use of experts does not differ by {one} more than chance makes it differ")
    } else if exclusive * 10 >= all * 9 {
        format!("They are partitioned: {exclusive} of {all} experts have nine tenths of their use from one {one}")
    } else {
        format!("They blend: only {exclusive} of {all} experts have nine tenths of their use from one {one}")
    };
    Some(Answer {
        number: 1,
        question: format!("Are experts partitioned by {one}, or do they blend?"),
        text: format!(
            "{verdict}. Which expert is used tells {} of the {} bits that tell the {many} apart, and the pools that carry nine tenths of each one's weight share {} of their experts.",
            short(atlas.information.value),
            short(most),
            short(nine.value)
        ),
        figures: vec![
            (format!("mutual information of expert and {one}, bits, mean of layers"), atlas.information.text()),
            ("the same with permuted labels, 95% below".to_owned(), short(null)),
            ("overlap of pools of 50% of the weight".to_owned(), half.text()),
            ("overlap of pools of 90% of the weight".to_owned(), nine.text()),
            (format!("experts with 90% of their use from one {one}"), format!("{exclusive} of {all}")),
        ],
        pictures: vec!["map", "information"],
        refuted_by: format!(
            "A set of items of the same {many} on which the interval of the information lies on the other side of what is said here."
        ),
    })
}

fn knows(atlas: &Atlas) -> Option<Answer> {
    let [within, between] = atlas.within_and_between?;
    let agreement = atlas.router_agreement;
    let verdict = if between.low > 2.0 * within.high {
        "It tells modalities apart before anything else: they differ more than twice as much as kinds of one modality do"
    } else if between.low > within.high {
        "Both: modalities differ more than kinds of one modality do, but the kinds differ, too"
    } else {
        "It matches patterns: kinds of one modality differ as much as modalities do"
    };
    let weights = if agreement.p_value < 0.05 { "predict" } else { "do not predict" };
    Some(Answer {
        number: 2,
        question: "Does the router know modality, or does it match patterns?".to_owned(),
        text: format!(
            "{verdict} ({} bits against {}). The rows of the routers alone {weights} which modality an expert will serve (adjusted mutual information {}, p = {}).",
            short(between.value),
            short(within.value),
            short(agreement.adjusted),
            short(agreement.p_value)
        ),
        figures: vec![
            ("divergence of kinds within a modality, bits".to_owned(), within.text()),
            ("divergence of kinds of different modalities, bits".to_owned(), between.text()),
            ("agreement of the routers' clusters with modality; 95% of permutations below".to_owned(), format!("{}; {}", short(agreement.adjusted), short(agreement.null_high))),
            (
                "the same of clusters of experts used together".to_owned(),
                format!("{}; {}", short(atlas.coactive_agreement.adjusted), short(atlas.coactive_agreement.null_high)),
            ),
        ],
        pictures: vec!["pairs", "map"],
        refuted_by: "Kinds of one modality chosen to look alike, or modalities with the same content (a text and its picture), that turn the order of the two divergences.".to_owned(),
    })
}

fn cross_modal(atlas: &Atlas) -> Option<Answer> {
    let use_of = atlas.foreign_use?;
    let of_text = |name: &str| -> Option<Figure> {
        let change = change(atlas, name)?;
        let text = atlas.domains.iter().zip(&change.rises).filter(|(domain, _)| is_text(atlas, domain));
        together(text.map(|(_, rise)| *rise))
    };
    let media: Vec<_> = atlas.labels.iter().filter(|label| *label != "text").collect();
    let mut figures = vec![("share of a text's uses of experts that specialists of pictures and sounds have".to_owned(), use_of.text())];
    let mut harmed = Vec::new();
    for label in &media {
        let (with, random) = (of_text(&format!("pool of {label}")), of_text(&format!("random, as many as the pool of {label}")));
        if let (Some(with), Some(random)) = (with, random) {
            figures.push((
                format!("rise of the loss on text alone without the pool of {label}; without as many random experts"),
                format!("{}; {}", with.text(), random.text()),
            ));
            if with.is_above(NO_LOSS.max(random.high)) {
                harmed.push(format!("the pool of {label} raises it by {} nats", short(with.value)));
            }
        }
    }
    let verdict = if use_of.low > 0.0 && use_of.value >= 0.001 { "Yes" } else { "Hardly" };
    let loss = if harmed.is_empty() {
        "Text does not need them: without the pools of pictures and sounds its loss rises no more than without as many random experts"
            .to_owned()
    } else {
        format!("Text needs them: leaving out {}, more than as many random experts do", harmed.join(", "))
    };
    Some(Answer {
        number: 3,
        question: "Do cross-modal experts fire when the input has one modality only?".to_owned(),
        text: format!("{verdict}: specialists of pictures and sounds have {}% of the uses when there is text alone. {loss}.", short(100.0 * use_of.value)),
        figures,
        pictures: vec!["pools"],
        refuted_by: "Texts on which the share of these experts has an interval on the other side of one in a thousand, or whose loss behaves otherwise without them.".to_owned(),
    })
}

/// Whether a domain has neither pictures nor sounds: none of its items was counted with other modalities.
fn is_text(atlas: &Atlas, domain: &str) -> bool {
    atlas.text_domains.iter().any(|text| text == domain)
}

fn learned(atlas: &Atlas) -> Option<Answer> {
    let untrained = atlas.untrained.as_ref()?;
    let (one, many) = label(atlas);
    let (now, before) = (atlas.information, untrained.information);
    let verdict = if before.low > now.high {
        format!("Built in: the untrained model separates {many} more than the trained one")
    } else if now.low > before.high {
        format!("Both: the untrained model separates {many} already, since their inputs differ, and training adds to that")
    } else {
        format!("Built in, as far as can be seen: training does not change how far {many} are separated")
    };
    let mut figures =
        vec![(format!("mutual information of expert and {one}, trained"), now.text()), ("untrained".to_owned(), before.text())];
    figures.extend(atlas.checkpoints.iter().map(|checkpoint| (checkpoint.model.name.clone(), checkpoint.information.text())));
    Some(Answer {
        number: 4,
        question: "Is specialisation learned, or built in?".to_owned(),
        text: format!(
            "{verdict}. An expert tells {} bits before training and {} after it{}.",
            short(before.value),
            short(now.value),
            if atlas.checkpoints.is_empty() {
                String::new()
            } else {
                format!(", by way of {}", atlas.checkpoints.iter().map(|c| short(c.information.value)).collect::<Vec<_>>().join(", "))
            }
        ),
        figures,
        pictures: vec!["training", "information"],
        refuted_by: "Another seed of the same training whose interval before or after it does not meet the one given here.".to_owned(),
    })
}

fn roles(atlas: &Atlas) -> Option<Answer> {
    let (one, _) = label(atlas);
    let count = |role: Role| atlas.experts.iter().filter(|row| row.role == role).count();
    let [special, universal, rare, undecided] = Role::ALL.map(count);
    let by_label: Vec<_> = atlas
        .labels
        .iter()
        .map(|label| {
            let own = atlas.experts.iter().filter(|row| row.special.as_ref().is_some_and(|(of, _)| of == label)).count();
            format!("{label} {own}")
        })
        .collect();
    let last = atlas.specialists.last()?;
    Some(Answer {
        number: 5,
        question: "Which experts are universal, and which specialised?".to_owned(),
        text: format!(
            "{special} of {} experts are specialists of a {one} on items that they were not chosen by ({}), {universal} are surely used alike by all, {rare} are rarely used, and of {undecided} neither can be said. By their counts alone {} would be called specialists, of which other items confirm {}; with a bound it is {}, of which they confirm {}.",
            atlas.experts.len(),
            by_label.join(", "),
            last.by_value,
            last.confirmed,
            last.with_bound,
            last.confirmed_with_bound
        ),
        figures: Role::ALL.map(|role| (role.name().to_owned(), count(role).to_string())).to_vec(),
        pictures: vec!["map", "specialists"],
        refuted_by:
            "New items of the same kinds on which an expert that is called a specialist here is not used more often than elsewhere."
                .to_owned(),
    })
}

fn narrow(atlas: &Atlas) -> Option<Answer> {
    let of = |half: &str| atlas.changes.iter().find(|change| change.name.starts_with(&format!("the {half} half at")));
    let (least, most, random) = (of("least used")?, of("most used")?, of("random")?);
    let precision = least.name.rsplit(' ').next().unwrap_or_default();
    let worst = atlas.domains.iter().zip(&least.rises).max_by(|a, b| a.1.value.total_cmp(&b.1.value))?;
    let verdict = if least.rise.high < NO_LOSS {
        format!("Yes: with the least used half of the experts at {precision} the loss rises by less than {NO_LOSS} nats a token")
    } else if least.rise.high < most.rise.low {
        format!(
            "Not without loss, but at less than others cost: the least used half at {precision} raises the loss by {} nats a token, the most used by {}",
            short(least.rise.value),
            short(most.rise.value)
        )
    } else {
        format!(
            "No: the least used half at {precision} raises the loss by {} nats a token, and the most used half by {}",
            short(least.rise.value),
            short(most.rise.value)
        )
    };
    let row = |change: &ChangeRow| (change.name.clone(), change.rise.text());
    Some(Answer {
        number: 6,
        question: "May experts that are little used have 4 bits without loss?".to_owned(),
        text: format!(
            "{verdict}. A random half raises it by {}, and of all kinds {} suffers most from the least used half at less precision, by {}.",
            short(random.rise.value),
            worst.0,
            short(worst.1.value)
        ),
        figures: atlas.changes.iter().filter(|change| change.name.contains(" at q")).map(row).collect(),
        pictures: vec!["precision"],
        refuted_by: "A kind of input that uses the least used experts, on which the loss rises by more than is said here.".to_owned(),
    })
}

/// The domains that surely suffer without the ten experts ranked first for them, and at least `times` as much as without ten random ones, by the means.
pub(super) fn selective(atlas: &Atlas, times: f64) -> Vec<String> {
    let random: Vec<_> = atlas.changes.iter().filter(|change| change.name.starts_with(&format!("random {RANKED_FIRST}, draw"))).collect();
    let of = |(number, domain): (usize, &String)| {
        let own = change(atlas, &format!("ranked first for {domain}"))?.rises[number];
        let drawn = random.iter().map(|change| change.rises[number].value).sum::<f64>() / random.len().max(1) as f64;
        (own.is_above(0.0) && own.value >= times * drawn).then(|| domain.clone())
    };
    atlas.domains.iter().enumerate().filter_map(of).collect()
}
