//! Which experts a token uses: softmax over all of them, then the k likeliest.
//!
//! Nothing else may touch the router's logits: what is at hand, what is trusted and what is cheap are other modules' matters.

use crate::kernels::math::softmax;

/// One expert of a token, and the weight of its result.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Choice {
    /// Number of the expert within the layer.
    pub expert: u32,
    /// The weights of a token sum to 1 when the model renormalises.
    pub weight: f32,
}

/// Writes the likeliest experts of a token, likeliest first, ties to the lower number. The logits become probabilities.
pub fn route(logits: &mut [f32], renormalise: bool, choices: &mut [Choice]) {
    softmax(logits);
    let mut taken = 0;
    for (expert, &weight) in logits.iter().enumerate() {
        let place = choices[..taken].partition_point(|choice| choice.weight >= weight);
        if place < choices.len() {
            taken = (taken + 1).min(choices.len());
            choices[place..taken].rotate_right(1);
            choices[place] = Choice { expert: expert as u32, weight };
        }
    }
    if renormalise {
        let sum: f32 = choices.iter().map(|choice| choice.weight).sum();
        choices.iter_mut().for_each(|choice| choice.weight /= sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routed(logits: &[f32], k: usize, renormalise: bool) -> (Vec<u32>, Vec<f32>) {
        let mut choices = vec![Choice::default(); k];
        route(&mut logits.to_vec(), renormalise, &mut choices);
        choices.iter().map(|choice| (choice.expert, choice.weight)).unzip()
    }

    #[test]
    fn takes_the_likeliest_and_breaks_ties_downwards() {
        assert_eq!(routed(&[1.0, 3.0, 3.0, -1.0, 3.0], 2, true), (vec![1, 2], vec![0.5, 0.5]));
        assert_eq!(routed(&[1.0, 2.0, 3.0], 3, true).0, [2, 1, 0]);
    }

    #[test]
    fn without_renormalisation_weights_are_probabilities() {
        assert_eq!(routed(&[0.0, 0.0, 0.0, 0.0], 2, false).1, [0.25, 0.25]);
    }
}
