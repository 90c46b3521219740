//! The tables of an atlas, as CSV.

use super::figures::Atlas;
use super::statistics::Figure;

/// Each table's file name and its text.
pub(super) fn tables(atlas: &Atlas) -> Vec<(String, String)> {
    vec![
        ("layers.csv".to_owned(), layers(atlas)),
        ("experts.csv".to_owned(), experts(atlas)),
        ("changes.csv".to_owned(), changes(atlas)),
        ("specialists.csv".to_owned(), specialists(atlas)),
        ("caches.csv".to_owned(), caches(atlas)),
    ]
}

fn csv(heading: &[String], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let line = |cells: &[String]| {
        let quoted =
            |cell: &String| if cell.contains([',', '"', '\n']) { format!("\"{}\"", cell.replace('"', "\"\"")) } else { cell.clone() };
        cells.iter().map(quoted).collect::<Vec<_>>().join(",") + "\n"
    };
    std::iter::once(line(heading)).chain(rows.into_iter().map(|row| line(&row))).collect()
}

fn heading(names: &[&str], figures: &[String]) -> Vec<String> {
    let three = figures.iter().flat_map(|name| [name.clone(), format!("{name} low"), format!("{name} high")]);
    names.iter().map(|&name| name.to_owned()).chain(three).collect()
}

fn cells(figure: &Figure) -> [String; 3] {
    [figure.value, figure.low, figure.high].map(|number| number.to_string())
}

fn layers(atlas: &Atlas) -> String {
    let pairs = atlas.layers.first().map(|layer| layer.pairs.clone()).unwrap_or_default();
    let of_pairs = pairs.iter().flat_map(|pair| {
        let name = pair.labels.join(" and ");
        [format!("divergence of {name}"), format!("overlap 50% of {name}"), format!("overlap 90% of {name}")]
    });
    let figures: Vec<_> = ["information", "entropy", "gini"].map(str::to_owned).into_iter().chain(of_pairs).collect();
    let names = ["layer", "information null mean", "information null 95%", "router norm mean", "router cosine mean", "router directions"];
    let row = |(number, layer): (usize, &super::counts::LayerFigures)| {
        let router = &atlas.routers[number];
        let first = [layer.information_null[0], layer.information_null[1], router.norms[0], router.cosines[0], router.directions];
        let pairs = layer.pairs.iter().flat_map(|pair| [pair.divergence, pair.overlap[0], pair.overlap[1]]);
        let all = [layer.information, layer.entropy, layer.gini].into_iter().chain(pairs);
        let numbers = first.iter().map(f64::to_string).chain(all.flat_map(|figure| cells(&figure)));
        std::iter::once(layer.layer.to_string()).chain(numbers).collect()
    };
    csv(&heading(&names, &figures), atlas.layers.iter().enumerate().map(row))
}

fn experts(atlas: &Atlas) -> String {
    let names = ["layer", "expert", "role", "special for", "lift on other items", "lift surely above", "share of uses"].map(str::to_owned);
    let heading: Vec<_> = names.into_iter().chain(atlas.labels.iter().map(|label| format!("share of {label}"))).collect();
    let rows = atlas.experts.iter().map(|row| {
        let special = row
            .special
            .as_ref()
            .map_or([const { String::new() }; 3], |(label, lift)| [label.clone(), lift[0].to_string(), lift[1].to_string()]);
        let first = [row.layer.to_string(), row.expert.to_string(), row.role.name().to_owned()];
        first.into_iter().chain(special).chain([row.use_share.to_string()]).chain(row.by_label.iter().map(f64::to_string)).collect()
    });
    csv(&heading, rows)
}

fn changes(atlas: &Atlas) -> String {
    let figures: Vec<_> =
        std::iter::once("rise".to_owned()).chain(atlas.domains.iter().map(|domain| format!("rise of {domain}"))).collect();
    let rows = atlas.changes.iter().map(|change| {
        let numbers = std::iter::once(&change.rise).chain(&change.rises).flat_map(cells);
        [change.name.clone(), change.experts.to_string()].into_iter().chain(numbers).collect()
    });
    csv(&heading(&["change", "experts"], &figures), rows)
}

fn caches(atlas: &Atlas) -> String {
    let rows = atlas.caches.iter().map(|row| vec![row.policy.clone(), row.hits.to_string(), row.brought.to_string()]);
    csv(&["policy", "hits", "brought for each use"].map(str::to_owned), rows)
}

fn specialists(atlas: &Atlas) -> String {
    let names = ["items", "by value", "with bound", "confirmed of by value", "confirmed of with bound"].map(str::to_owned);
    let rows = atlas.specialists.iter().map(|found| {
        [found.items, found.by_value, found.with_bound, found.confirmed, found.confirmed_with_bound].map(|count| count.to_string()).to_vec()
    });
    csv(&names, rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_quoted_where_they_must_be() {
        let table = csv(&["a".to_owned(), "b,c".to_owned()], [vec!["1".to_owned(), "say \"x\"".to_owned()]]);
        assert_eq!(table, "a,\"b,c\"\n1,\"say \"\"x\"\"\"\n");
    }
}
