//! The pictures of an atlas, each as SVG in the colours of a page and on white, and as PNG.

use std::sync::Arc;

use base::failure::{Failure, Kind};
use resvg::{tiny_skia, usvg};

use super::answers::selective;
use super::charts::{Cell, Series, Shown, bars, cells, lines};
use super::figures::{Atlas, ChangeRow, RANKED_FIRST};
use super::statistics::{Figure, short};

/// DejaVu Sans, cut down to Latin letters; its licence lies beside it.
const FONT: &[u8] = include_bytes!("../../fonts/DejaVuSans-latin.ttf");
/// Pixels of a picture for one of the page.
const SCALE: f32 = 2.0;

/// A picture.
pub(super) struct Plot {
    pub(super) name: &'static str,
    pub(super) title: String,
    /// What it shows, in a sentence.
    pub(super) about: String,
    pub(super) page: String,
    pub(super) picture: String,
}

/// All pictures of which there are numbers.
pub(super) fn plots(atlas: &Atlas) -> Vec<Plot> {
    let always = [map(atlas), information(atlas), use_of_experts(atlas), specialists(atlas), skipped(atlas)];
    let others = [pairs(atlas), pools(atlas), ranked(atlas), alone(atlas), precision(atlas), training(atlas)];
    always.into_iter().chain(others.into_iter().flatten()).collect()
}

fn plot(name: &'static str, title: String, about: String, draw: impl Fn(Shown, &str) -> String) -> Plot {
    Plot { name, page: draw(Shown::Page, &title), picture: draw(Shown::Picture, &title), title, about }
}

/// A picture as PNG.
pub(super) fn png(svg: &str) -> Result<Vec<u8>, Failure> {
    let failed = |why: String| Failure::new(Kind::Other, format!("cannot draw a picture: {why}"));
    let mut options = usvg::Options { font_family: "DejaVu Sans".to_owned(), ..usvg::Options::default() };
    Arc::make_mut(&mut options.fontdb).load_font_data(FONT.to_vec());
    let tree = usvg::Tree::from_str(svg, &options).map_err(|error| failed(error.to_string()))?;
    let size = tree.size();
    let pixels = |side: f32| (side * SCALE).ceil() as u32;
    let mut picture =
        tiny_skia::Pixmap::new(pixels(size.width()), pixels(size.height())).ok_or_else(|| failed("it has no size".to_owned()))?;
    picture.fill(tiny_skia::Color::WHITE);
    resvg::render(&tree, tiny_skia::Transform::from_scale(SCALE, SCALE), &mut picture.as_mut());
    picture.encode_png().map_err(|error| failed(error.to_string()))
}

fn exact(value: f64) -> Figure {
    Figure { value, low: value, high: value, items: 0 }
}

fn map(atlas: &Atlas) -> Plot {
    let layers = atlas.experts.chunk_by(|a, b| a.layer == b.layer);
    let rows = || {
        let row = |layer: &[super::figures::ExpertRow]| {
            let cell = |row: &super::figures::ExpertRow| {
                let sum: f64 = row.by_label.iter().sum::<f64>().max(1e-12);
                let most = (0..row.by_label.len()).max_by(|&a, &b| row.by_label[a].total_cmp(&row.by_label[b])).unwrap_or(0);
                let share = row.by_label.get(most).copied().unwrap_or(0.0) / sum;
                let even = 1.0 / row.by_label.len().max(2) as f64;
                let of_label = atlas.labels.get(most).map_or("", String::as_str);
                let title = format!("{}:{} {}, most for {of_label}: {}%", row.layer, row.expert, row.role.name(), short(100.0 * share));
                Cell { series: most, shade: 0.1 + 0.9 * (share - even) / (1.0 - even), title }
            };
            (format!("layer {}", layer[0].layer), layer.iter().map(cell).collect::<Vec<_>>())
        };
        layers.clone().map(row).collect::<Vec<_>>()
    };
    let about = format!(
        "Every expert by layer, in the colour of the {} that uses it most; the deeper, the more of its use is that one's.",
        label(atlas)
    );
    plot("map", "Which experts serve what".to_owned(), about, |shown, title| cells(shown, title, &atlas.labels, &rows(), &[]))
}

fn label(atlas: &Atlas) -> &'static str {
    if atlas.by_modality { "modality" } else { "domain" }
}

fn information(atlas: &Atlas) -> Plot {
    let of = |name: &str, layers: &[super::counts::LayerFigures]| Series {
        name: name.to_owned(),
        points: layers.iter().map(|layer| (f64::from(layer.layer), layer.information)).collect(),
    };
    let mut series = vec![of("trained", &atlas.layers)];
    series.extend(atlas.untrained.as_ref().map(|untrained| of("untrained", &untrained.layers)));
    let null = atlas.layers.iter().map(|layer| (f64::from(layer.layer), exact(layer.information_null[1]))).collect();
    series.push(Series { name: "labels permuted, 95% below".to_owned(), points: null });
    let about = format!("How many bits the expert that is used tells of the {}, by layer, with 95% intervals over items.", label(atlas));
    plot("information", format!("What an expert tells of the {}", label(atlas)), about, |shown, title| {
        lines(shown, title, "bits", "layer", &series)
    })
}

fn use_of_experts(atlas: &Atlas) -> Plot {
    let of = |name: &str, pick: &dyn Fn(&super::counts::LayerFigures) -> Figure| Series {
        name: name.to_owned(),
        points: atlas.layers.iter().map(|layer| (f64::from(layer.layer), pick(layer))).collect(),
    };
    let series = [of("entropy of use, bits", &|layer| layer.entropy), of("Gini of use", &|layer| layer.gini)];
    let about = "How evenly the experts of a layer are used: an entropy of log2 of their number and a Gini of 0 are even.".to_owned();
    plot("use", "How evenly experts are used".to_owned(), about, |shown, title| lines(shown, title, "", "layer", &series))
}

fn pairs(atlas: &Atlas) -> Option<Plot> {
    let names: Vec<_> = atlas.layers.first()?.pairs.iter().map(|pair| pair.labels.join(" and ")).collect();
    if names.len() > 8 {
        return None; // a table says it better
    }
    let of = |(number, name): (usize, &String)| Series {
        name: name.clone(),
        points: atlas.layers.iter().map(|layer| (f64::from(layer.layer), layer.pairs[number].divergence)).collect(),
    };
    let series: Vec<_> = names.iter().enumerate().map(of).collect();
    let about = "Jensen–Shannon divergence of the use of experts, in bits: 0 where two use the same, 1 where they share none.".to_owned();
    Some(plot("pairs", "How far two differ".to_owned(), about, |shown, title| lines(shown, title, "bits", "layer", &series)))
}

/// Changes as rows and domains as columns, the deeper the more the loss rises.
fn heat(name: &'static str, title: &str, about: &str, atlas: &Atlas, changes: &[&ChangeRow]) -> Option<Plot> {
    let most = changes.iter().flat_map(|change| &change.rises).map(|rise| rise.value).fold(1e-9, f64::max);
    let rows = || {
        let row = |change: &&ChangeRow| {
            let cell = |(domain, rise): (&String, &Figure)| Cell {
                series: usize::from(rise.value > 0.0), // what falls is blue
                shade: (rise.value.abs() / most).sqrt(),
                title: format!("{}, {domain}: {}", change.name, rise.text()),
            };
            (change.name.clone(), atlas.domains.iter().zip(&change.rises).map(cell).collect::<Vec<_>>())
        };
        changes.iter().map(row).collect::<Vec<_>>()
    };
    let about = format!("{about} The deepest cell is {} nats a token.", short(most));
    (!changes.is_empty()).then(|| plot(name, title.to_owned(), about, |shown, title| cells(shown, title, &[], &rows(), &atlas.domains)))
}

fn starting<'a>(atlas: &'a Atlas, starts: &[&str]) -> Vec<&'a ChangeRow> {
    atlas.changes.iter().filter(|change| starts.iter().any(|start| change.name.starts_with(start))).collect()
}

fn pools(atlas: &Atlas) -> Option<Plot> {
    let changes = starting(atlas, &["pool of", "random, as many", "each modality"]);
    heat(
        "pools",
        "What is lost without a pool",
        "Rise of the loss by kind of item when the experts that carry half of the weight are left out.",
        atlas,
        &changes,
    )
}

fn alone(atlas: &Atlas) -> Option<Plot> {
    let mut changes = starting(atlas, &["expert "]);
    changes.sort_by(|a, b| b.rise.value.total_cmp(&a.rise.value));
    changes.truncate(40);
    heat(
        "alone",
        "What is lost without one expert",
        "Rise of the loss by kind of item when one expert is left out, the dearest first.",
        atlas,
        &changes,
    )
}

fn ranked(atlas: &Atlas) -> Option<Plot> {
    let random = starting(atlas, &[&format!("random {RANKED_FIRST}, draw")]);
    let own = |(number, domain): (usize, &String)| {
        let change = atlas.changes.iter().find(|change| change.name == format!("ranked first for {domain}"))?;
        let others: Vec<_> = (0..atlas.domains.len()).filter(|&other| other != number).map(|other| change.rises[other].value).collect();
        let drawn: Vec<_> = random.iter().map(|change| change.rises[number]).collect();
        let mean = |of: &dyn Fn(&Figure) -> f64| drawn.iter().map(of).sum::<f64>() / drawn.len().max(1) as f64;
        let drawn = Figure { value: mean(&|f| f.value), low: mean(&|f| f.low), high: mean(&|f| f.high), items: change.rises[number].items };
        Some([change.rises[number], drawn, exact(others.iter().sum::<f64>() / others.len().max(1) as f64)])
    };
    let found: Vec<_> = atlas.domains.iter().enumerate().map(own).collect::<Option<_>>()?;
    let series = ["its own ten", "ten random ones", "its ten, on other kinds"].iter().enumerate();
    let series: Vec<_> =
        series.map(|(at, name)| ((*name).to_owned(), found.iter().map(|figures| figures[at]).collect::<Vec<_>>())).collect();
    let about = format!(
        "Rise of the loss on items that the ranking has not seen, when the {RANKED_FIRST} experts ranked first for a kind are left out: at least five times that of random ones for {} of {} kinds.",
        selective(atlas, 5.0).len(),
        atlas.domains.len()
    );
    Some(plot("ranked", "Whether the ranking means anything".to_owned(), about, |shown, title| {
        bars(shown, title, "nats a token", &atlas.domains, &series)
    }))
}

fn specialists(atlas: &Atlas) -> Plot {
    let of = |name: &str, pick: &dyn Fn(&super::counts::SpecialistsFound) -> usize| Series {
        name: name.to_owned(),
        points: atlas.specialists.iter().map(|found| ((found.items as f64).log2(), exact(pick(found) as f64))).collect(),
    };
    let series = [
        of("by their counts alone", &|found| found.by_value),
        of("of these, confirmed by other items", &|found| found.confirmed),
        of("with a bound", &|found| found.with_bound),
        of("of these, confirmed", &|found| found.confirmed_with_bound),
    ];
    let about = "Experts that would be called specialists, as more items are looked at: few items make specialists out of noise, which a bound does not call so.".to_owned();
    plot("specialists", "How many specialists there are".to_owned(), about, |shown, title| {
        lines(shown, title, "experts", "items, as a power of 2", &series)
    })
}

fn skipped(atlas: &Atlas) -> Plot {
    let of = |name: &str, end: &str| {
        let here = atlas.changes.iter().filter(|change| change.name.ends_with(end));
        let share = |change: &ChangeRow| change.name.split('%').next().and_then(|share| share.parse().ok()).unwrap_or(0.0);
        Series { name: name.to_owned(), points: here.map(|change| (share(change), change.rise)).collect() }
    };
    let series = [of("one threshold for all", "one threshold"), of("a threshold for each modality", "by modality")];
    let about = "Rise of the loss when results are left out whose weight is below a threshold: the same share of all tokens' results, or of each modality's (as MoDES has it).".to_owned();
    plot("skipped", "What is lost without results of little weight".to_owned(), about, |shown, title| {
        lines(shown, title, "nats a token", "% of results left out", &series)
    })
}

fn precision(atlas: &Atlas) -> Option<Plot> {
    let changes: Vec<_> = atlas.changes.iter().filter(|change| change.name.contains(" at q")).collect();
    let all = |change: &&ChangeRow| std::iter::once(change.rise).chain(change.rises.iter().copied()).collect::<Vec<_>>();
    let series: Vec<_> = changes.iter().map(|change| (change.name.clone(), all(change))).collect();
    let groups: Vec<_> = std::iter::once("all".to_owned()).chain(atlas.domains.iter().cloned()).collect();
    let about =
        "Rise of the loss when half of each layer's experts have less precision: the least used, the most used, or random ones.".to_owned();
    (!changes.is_empty()).then(|| {
        plot("precision", "What less precision costs".to_owned(), about, |shown, title| {
            bars(shown, title, "nats a token", &groups, &series)
        })
    })
}

fn training(atlas: &Atlas) -> Option<Plot> {
    let before = atlas.untrained.iter().chain(&atlas.checkpoints);
    let mut states: Vec<_> = before.map(|state| (state.model.name.clone(), state.information)).collect();
    if states.is_empty() {
        return None;
    }
    states.push((atlas.model.name.clone(), atlas.information));
    let (groups, figures): (Vec<_>, Vec<_>) = states.into_iter().unzip();
    let about = format!("What an expert tells of the {} as training goes on, mean of layers.", label(atlas));
    let series = [("bits".to_owned(), figures)];
    Some(plot("training", "What training does".to_owned(), about, |shown, title| bars(shown, title, "bits", &groups, &series)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_is_drawn_with_its_letters() {
        let series = [Series { name: "WWWW".to_owned(), points: vec![(0.0, exact(1.0)), (1.0, exact(2.0))] }];
        let ink = |name: &str| {
            let svg = lines(Shown::Picture, "t", name, "", &series);
            let bytes = png(&svg).expect("it is drawn");
            let picture = tiny_skia::Pixmap::decode_png(&bytes).expect("a picture");
            picture.pixels().iter().filter(|pixel| pixel.red() < 128).count()
        };
        assert!(ink("WWWWWWWW") > ink("") + 200, "letters leave ink");
    }
}
