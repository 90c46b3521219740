//! What the weights of routers say before anything runs: how long their rows are, how alike, and which belong together.

use inference::model::Model;
use serde::Serialize;

use super::statistics::clusters;

/// A layer's router, by its rows: one for each expert.
#[derive(Clone, Debug, Serialize)]
pub(super) struct RouterFigures {
    pub(super) layer: u32,
    /// Lengths of the rows: mean, shortest, longest.
    pub(super) norms: [f64; 3],
    /// Cosines of pairs of rows: mean, and the most alike.
    pub(super) cosines: [f64; 2],
    /// Directions that the rows spread over: the inverse of the sum of squared shares of their variance (participation ratio).
    pub(super) directions: f64,
    /// By expert, its group of rows that are most alike.
    pub(super) clusters: Vec<usize>,
}

/// Describes the router of every layer that has one. Its experts are put into `groups` groups.
pub(super) fn routers(model: &Model, groups: usize) -> Vec<RouterFigures> {
    let layers = 0..model.decoder().layers();
    layers.filter_map(|layer| Some(router(layer, &model.router(layer)?, groups))).collect()
}

fn router(layer: u32, rows: &[Vec<f32>], groups: usize) -> RouterFigures {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let norms: Vec<f64> = rows.iter().map(|row| dot(row, row).sqrt()).collect();
    let products: Vec<Vec<f64>> = rows.iter().map(|a| rows.iter().map(|b| dot(a, b)).collect()).collect();
    let cosine = |a: usize, b: usize| products[a][b] / (norms[a] * norms[b]).max(1e-30);
    let pairs = || (0..rows.len()).flat_map(|a| (a + 1..rows.len()).map(move |b| (a, b)));
    let count = pairs().count().max(1) as f64;
    // The squared eigenvalues of the rows' products sum up to the squares of all products.
    let (trace, squares): (f64, f64) = (norms.iter().map(|norm| norm * norm).sum(), products.iter().flatten().map(|x| x * x).sum());
    RouterFigures {
        layer,
        norms: [norms.iter().sum::<f64>() / norms.len().max(1) as f64, least(&norms), most(&norms)],
        cosines: [pairs().map(|(a, b)| cosine(a, b)).sum::<f64>() / count, most(&pairs().map(|(a, b)| cosine(a, b)).collect::<Vec<_>>())],
        directions: trace * trace / squares.max(1e-30),
        clusters: clusters(rows.len(), groups, cosine),
    }
}

fn least(numbers: &[f64]) -> f64 {
    numbers.iter().copied().fold(f64::INFINITY, f64::min)
}

fn most(numbers: &[f64]) -> f64 {
    numbers.iter().copied().fold(f64::NEG_INFINITY, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_point_the_same_way_belong_together() {
        let rows = [vec![1.0, 0.0], vec![2.0, 0.1], vec![0.0, 3.0], vec![0.1, 1.0]];
        let found = router(5, &rows, 2);
        assert!(found.clusters[0] == found.clusters[1] && found.clusters[2] == found.clusters[3] && found.clusters[0] != found.clusters[2]);
        assert!((found.norms[1] - 1.0).abs() < 1e-9 && (found.norms[2] - 3.0).abs() < 1e-9 && found.cosines[1] > 0.99);
        let alone = router(0, &[vec![1.0, 0.0], vec![0.0, 1.0]], 2);
        assert!((alone.directions - 2.0).abs() < 1e-9, "two directions of the same weight");
    }
}
