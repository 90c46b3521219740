//! Which experts a token uses: softmax over all of them, then the k likeliest.
//!
//! Nothing else may touch the router's logits: what is at hand, what is trusted and what is cheap are other modules' matters.

use crate::kernels::softmax;

/// The experts of one token, likeliest first, and how their results are weighted.
#[derive(Clone, PartialEq, Debug)]
pub struct Routing {
    /// Numbers of the experts within the layer.
    pub experts: Vec<u32>,
    /// As many weights; they sum to 1 when the model renormalises.
    pub weights: Vec<f32>,
}

/// Returns the `k` likeliest experts of a token, ties to the lower number.
pub fn route(router_logits: &[f32], k: usize, renormalise: bool) -> Routing {
    let mut probabilities = router_logits.to_vec();
    softmax(&mut probabilities);
    let mut order: Vec<u32> = (0..probabilities.len() as u32).collect();
    order.sort_by(|&a, &b| probabilities[b as usize].total_cmp(&probabilities[a as usize]).then(a.cmp(&b)));
    order.truncate(k);
    let mut weights: Vec<f32> = order.iter().map(|&expert| probabilities[expert as usize]).collect();
    if renormalise {
        let sum: f32 = weights.iter().sum();
        weights.iter_mut().for_each(|weight| *weight /= sum);
    }
    Routing { experts: order, weights }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_likeliest_and_breaks_ties_downwards() {
        let routing = route(&[1.0, 3.0, 3.0, -1.0, 3.0], 2, true);
        assert_eq!((routing.experts, routing.weights), (vec![1, 2], vec![0.5, 0.5]));
    }

    #[test]
    fn without_renormalisation_weights_are_probabilities() {
        let routing = route(&[0.0, 0.0, 0.0, 0.0], 2, false);
        assert_eq!(routing.weights, [0.25, 0.25]);
    }
}
