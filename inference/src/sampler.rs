//! Chooses a token from logits: repetition penalty, temperature, top-k, top-p, in transformers' order.

use protocol::ContentHash;

use crate::kernels::math::softmax;

/// How tokens are chosen.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Sampling {
    /// 0 takes the likeliest token.
    pub temperature: f32,
    /// Keep this many of the likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the likeliest tokens up to this probability; 1 keeps all.
    pub top_p: f32,
    /// Divides positive logits of tokens already there and multiplies negative ones; 1 changes nothing.
    pub repetition_penalty: f32,
    /// The same seed gives the same tokens.
    pub seed: u64,
}

/// Logits that are not numbers: the weights or the arithmetic are broken, and no token is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the model's logits are not finite (token {token}); nothing is sampled from them")]
pub struct NotFinite {
    /// The first token without a finite logit.
    pub token: usize,
}

impl Sampling {
    /// The likeliest token, always.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0, repetition_penalty: 1.0, seed: 0 };
}

/// Returns the next token after `before`. Ties go to the lower id. A repetition penalty changes the logits.
pub fn sample(sampling: &Sampling, logits: &mut [f32], before: &[u32]) -> Result<u32, NotFinite> {
    if let Some(token) = logits.iter().position(|logit| !logit.is_finite()) {
        return Err(NotFinite { token });
    }
    if (sampling.repetition_penalty - 1.0).abs() > f32::EPSILON {
        let mut seen = before.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for token in seen {
            let logit = &mut logits[token as usize];
            *logit = if *logit > 0.0 { *logit / sampling.repetition_penalty } else { *logit * sampling.repetition_penalty };
        }
    }
    let likelier = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if sampling.temperature <= 0.0 {
        return Ok((0..logits.len() as u32).min_by(likelier).expect("a vocabulary has tokens"));
    }
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let kept = if sampling.top_k == 0 { order.len() } else { sampling.top_k.min(order.len()) };
    if kept < order.len() {
        order.select_nth_unstable_by(kept - 1, likelier);
        order.truncate(kept);
    }
    order.sort_unstable_by(likelier);
    // The largest becomes 0 before the division, which then cannot overflow to what has no order.
    let largest = logits[order[0] as usize];
    let mut probabilities: Vec<f32> = order.iter().map(|&token| (logits[token as usize] - largest) / sampling.temperature).collect();
    softmax(&mut probabilities);
    let kept = nucleus(&probabilities, sampling.top_p);
    let total: f64 = probabilities[..kept].iter().map(|&p| f64::from(p)).sum();
    let mut left = uniform(sampling.seed, before.len()) * total;
    for (&token, &p) in order.iter().zip(&probabilities[..kept]) {
        left -= f64::from(p);
        if left < 0.0 {
            return Ok(token);
        }
    }
    Ok(order[kept - 1])
}

/// How many of the likeliest tokens it takes to reach `top_p`; at least one.
fn nucleus(probabilities: &[f32], top_p: f32) -> usize {
    if top_p >= 1.0 {
        return probabilities.len();
    }
    let mut sum = 0.0;
    let reached = probabilities.iter().position(|p| {
        sum += p;
        sum >= top_p
    });
    reached.map_or(probabilities.len(), |at| at + 1)
}

/// A number from 0 to 1 that depends on the seed and the place alone, on every machine.
fn uniform(seed: u64, place: usize) -> f64 {
    let hash = ContentHash::of(&[seed.to_le_bytes(), (place as u64).to_le_bytes()].concat());
    let bits = u64::from_le_bytes(*hash.as_bytes().first_chunk().expect("a hash has 32 bytes"));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// How likely a token was, and which were likeliest.
#[derive(Clone, PartialEq, Debug)]
pub struct TokenLogprobs {
    /// The token that was chosen.
    pub token: u32,
    /// Natural logarithm of its probability by the model alone: at temperature 1, without penalties.
    pub logprob: f64,
    /// The likeliest tokens, the likeliest first, with the same of each.
    pub top: Vec<(u32, f64)>,
}

impl TokenLogprobs {
    /// Of `token` and the `top` likeliest tokens, by logits (vocab_size) that are finite.
    pub fn of(logits: &[f32], token: u32, top: usize) -> Self {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit - largest).exp()).sum();
        let logprob = |token: u32| f64::from(logits[token as usize] - largest) - sum.ln();
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let likelier = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        let top = top.min(order.len());
        if 0 < top && top < order.len() {
            order.select_nth_unstable_by(top - 1, likelier);
        }
        order.truncate(top);
        order.sort_unstable_by(likelier);
        Self { token, logprob: logprob(token), top: order.into_iter().map(|token| (token, logprob(token))).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_likeliest_and_breaks_ties_downwards() {
        assert_eq!(sample(&Sampling::GREEDY, &mut [0.0, 2.0, 2.0, 1.0], &[]), Ok(1));
    }

    #[test]
    fn never_samples_from_what_is_not_finite() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(sample(&Sampling::GREEDY, &mut [0.0, bad], &[]), Err(NotFinite { token: 1 }));
        }
    }

    #[test]
    fn draws_each_token_as_often_as_it_is_likely() {
        let logits = vec![0.1f32.ln(), 0.2f32.ln(), 0.7f32.ln()];
        let count = |sampling: Sampling| {
            let mut counts = [0; 3];
            for seed in 0..4000 {
                counts[sample(&Sampling { seed, ..sampling }, &mut logits.clone(), &[]).expect("finite") as usize] += 1;
            }
            counts
        };
        let plain = Sampling { temperature: 1.0, ..Sampling::GREEDY };
        let [a, b, c] = count(plain);
        // Five standard deviations of a binomial with 4,000 trials.
        assert!((305..495).contains(&a) && (673..927).contains(&b) && (2655..2945).contains(&c), "{a} {b} {c}");
        assert_eq!(count(Sampling { top_k: 1, ..plain }), [0, 0, 4000]);
        assert_eq!(count(Sampling { top_p: 0.8, ..plain })[0], 0);
        assert_eq!(count(Sampling { top_p: 0.0, ..plain }), [0, 0, 4000]);
    }

    #[test]
    fn probabilities_are_those_that_the_logits_were_made_of() {
        let logits = [0.1f32.ln() + 7.0, 0.2f32.ln() + 7.0, 0.7f32.ln() + 7.0];
        let of = TokenLogprobs::of(&logits, 1, 2);
        let close = |a: f64, b: f64| (a - b.ln()).abs() < 1e-6;
        assert!(close(of.logprob, 0.2) && of.top.len() == 2 && of.top[0].0 == 2 && of.top[1].0 == 1);
        assert!(close(of.top[0].1, 0.7) && close(of.top[1].1, 0.2), "{of:?}");
        assert_eq!(TokenLogprobs::of(&logits, 0, 0).top, []);
        assert_eq!(TokenLogprobs::of(&logits, 0, 9).top.len(), 3);
    }

    #[test]
    fn the_smallest_temperature_is_greedy() {
        let sampling = Sampling { temperature: f32::MIN_POSITIVE / 8.0, ..Sampling::GREEDY };
        assert_eq!(sample(&sampling, &mut [1.0, 9.0, -3.0, 8.9], &[]), Ok(1));
    }

    #[test]
    fn repetition_penalty_pushes_down_on_both_sides_of_zero() {
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::GREEDY };
        assert_eq!(sample(&sampling, &mut [3.0, 2.0], &[0, 0]), Ok(1));
        assert_eq!(sample(&sampling, &mut [-1.0, -1.5], &[0]), Ok(1));
    }
}
