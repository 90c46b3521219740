//! The page of an atlas: one file that needs no network, in light and dark, on screens of any width.

use std::fmt::Write as _;

use super::answers::selective;
use super::figures::{Atlas, RANKED_FIRST, Role};
use super::plots::Plot;
use super::statistics::short;

const STYLE: &str = include_str!("page.css");

pub(super) fn page(atlas: &Atlas, plots: &[Plot]) -> String {
    let mut page = String::new();
    let title = format!("Atlas of {}", escaped(&atlas.model.name));
    let _ = write!(
        page,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <title>{title}</title><style>{STYLE}</style></head><body><main><h1>{title}</h1>\
         <p>{} experts in {} layers, measured on {} items of {} kinds; experts were left out on {} further items, which nothing was chosen by. \
         Numbers in brackets are 95% intervals by bootstrap over items. Random choices begin at {}. \
         The model is <code>{}</code>, the probes <code>{}</code>; all numbers are in atlas.json.</p>",
        atlas.experts.len(),
        atlas.layers.len(),
        atlas.items,
        atlas.domains.len(),
        atlas.items_tried,
        atlas.seed,
        escaped(&atlas.model.id),
        escaped(&atlas.probes),
    );
    let mut shown = Vec::new();
    for answer in &atlas.answers {
        let _ = write!(
            page,
            "<section><h2>{}. {}</h2><p class=\"answer\">{}</p>",
            answer.number,
            escaped(&answer.question),
            escaped(&answer.text)
        );
        let rows = answer.figures.iter().map(|(name, number)| vec![name.clone(), number.clone()]);
        page.push_str(&table("What it follows from", &["", "value"], rows));
        for name in &answer.pictures {
            if let Some(plot) = plots.iter().find(|plot| plot.name == *name && !shown.contains(name)) {
                shown.push(plot.name);
                figure(&mut page, plot);
            }
        }
        let _ = write!(page, "<p><strong>What would refute it.</strong> {}</p></section>", escaped(&answer.refuted_by));
    }
    page.push_str("<section><h2>More pictures</h2>");
    plots.iter().filter(|plot| !shown.contains(&plot.name)).for_each(|plot| figure(&mut page, plot));
    page.push_str("</section><section><h2>Tables</h2>");
    page.push_str(&losses(atlas));
    page.push_str(&layers(atlas));
    page.push_str(&changes(atlas));
    page.push_str(&caches(atlas));
    page.push_str(&experts(atlas));
    page.push_str("</section></main></body></html>\n");
    page
}

fn figure(page: &mut String, plot: &Plot) {
    let _ = write!(
        page,
        "<figure><h3>{}</h3><div class=\"wide\" tabindex=\"0\" role=\"region\" aria-label=\"{} (picture)\">{}</div><figcaption>{}</figcaption></figure>",
        escaped(&plot.title),
        escaped(&plot.title),
        plot.page,
        escaped(&plot.about)
    );
}

fn table(caption: &str, heading: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let head: String = heading
        .iter()
        .map(|name| if name.is_empty() { "<td></td>".to_owned() } else { format!("<th scope=\"col\">{}</th>", escaped(name)) })
        .collect();
    let row = |cells: Vec<String>| {
        let cell = |(at, text): (usize, &String)| {
            if at == 0 { format!("<th scope=\"row\">{}</th>", escaped(text)) } else { format!("<td>{}</td>", escaped(text)) }
        };
        format!("<tr>{}</tr>", cells.iter().enumerate().map(cell).collect::<String>())
    };
    let rows: String = rows.map(row).collect();
    let caption = escaped(caption);
    format!(
        "<div class=\"wide\" tabindex=\"0\" role=\"region\" aria-label=\"{caption} (table)\"><table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
}

fn losses(atlas: &Atlas) -> String {
    let ranked = |domain: &String, number: usize| {
        let change = atlas.changes.iter().find(|change| change.name == format!("ranked first for {domain}"));
        change.map_or_else(String::new, |change| change.rises[number].text())
    };
    let selective = selective(atlas, 5.0);
    let row = |(number, domain): (usize, &String)| {
        let yes = if selective.contains(domain) { "yes" } else { "no" };
        vec![domain.clone(), atlas.losses[number].text(), ranked(domain, number), yes.to_owned()]
    };
    let first = format!("rise without its {RANKED_FIRST} first");
    table("Losses by kind, nats a token", &["kind", "loss", &first, "at least 5 × random"], atlas.domains.iter().enumerate().map(row))
}

fn layers(atlas: &Atlas) -> String {
    let row = |(number, layer): (usize, &super::counts::LayerFigures)| {
        let router = &atlas.routers[number];
        vec![
            layer.layer.to_string(),
            layer.information.text(),
            short(layer.information_null[1]),
            layer.entropy.text(),
            layer.gini.text(),
            short(router.norms[0]),
            short(router.cosines[0]),
            short(router.directions),
        ]
    };
    let heading =
        ["layer", "information, bits", "permuted, 95% below", "entropy, bits", "Gini", "router norm", "router cosine", "router directions"];
    table("Layers", &heading, atlas.layers.iter().enumerate().map(row))
}

fn changes(atlas: &Atlas) -> String {
    let rows = atlas.changes.iter().map(|change| {
        let most = atlas.domains.iter().zip(&change.rises).max_by(|a, b| a.1.value.total_cmp(&b.1.value));
        let most = most.map_or_else(String::new, |(domain, rise)| format!("{domain}: {}", rise.text()));
        vec![change.name.clone(), change.experts.to_string(), change.rise.text(), most]
    });
    table("What was left out or narrowed", &["change", "experts", "rise, nats a token", "most"], rows)
}

fn caches(atlas: &Atlas) -> String {
    let percent = |share: f64| format!("{}%", short(100.0 * share));
    let rows = atlas.caches.iter().map(|row| vec![row.policy.clone(), percent(row.hits), percent(row.brought)]);
    table(
        "A memory for a fifth of the experts, requests of each kind in turns",
        &["policy", "uses that find their expert", "brought for each use"],
        rows,
    )
}

fn experts(atlas: &Atlas) -> String {
    let mut named: Vec<_> = atlas.experts.iter().filter(|row| matches!(row.role, Role::Specialised | Role::Universal)).collect();
    named.sort_by(|a, b| b.use_share.total_cmp(&a.use_share));
    let rows = named.into_iter().take(60).map(|row| {
        let special = row
            .special
            .as_ref()
            .map_or_else(String::new, |(label, [lift, lower])| format!("{label}, {} (above {})", short(*lift), short(*lower)));
        vec![format!("{}:{}", row.layer, row.expert), row.role.name().to_owned(), special, format!("{}%", short(100.0 * row.use_share))]
    });
    table(
        "Experts that can be called something, the most used first",
        &["expert", "role", "lift on other items", "share of its layer's uses"],
        rows,
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
