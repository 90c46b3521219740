//! What counts say: how much likelier an expert is to be used in a domain than elsewhere, how sure that is, and whether it helps there.
//!
//! Tokens of one probe are alike, so probes are what is independent: variances are those of a ratio estimated from clusters (Cochran, *Sampling
//! Techniques*, 3rd ed., 1977, §6.3 and §9A), from counts of squares and products by probe. Of the many experts that are tested at once, the share
//! that is called specialists by chance is kept below a rate (Benjamini and Hochberg, 1995).

use super::{DomainCounts, DomainTotal, ExpertCounts, ProfileBody};

/// Tokens that must have been routed to an expert in a domain before anything is said of it.
pub const TOKENS_MIN: u32 = 20;
/// Of those that are called specialists, the share that may be none.
pub const FALSE_DISCOVERY_RATE: f64 = 0.05;
/// One-sided 95%, in standard deviations.
pub const Z_95: f64 = 1.644_853_626_951_472_2;

/// How much likelier an expert is to be used in a domain than in the mean of all domains.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Lift {
    /// P(routed | domain) / mean over the domains of P(routed | domain).
    pub value: f64,
    /// It is higher than this with a confidence of 95%.
    pub lower: f64,
    /// It is lower than this with a confidence of 95%.
    pub upper: f64,
    /// How likely such counts would be if it were 1 or less.
    pub p_value: f64,
}

/// An expert's standing in a domain.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Ranked {
    /// Its number in the order of the body.
    pub expert: usize,
    /// Its lift.
    pub lift: Lift,
    /// The false-discovery rate at which it is still called a specialist.
    pub q_value: f64,
    /// What was counted.
    pub counts: DomainCounts,
    /// The share of trials in which the domain's tokens became less likely without it: at least this, with a confidence of 95%.
    pub helps_lower: f64,
}

impl Ranked {
    /// Whether it is called a specialist of the domain.
    pub fn is_specialist(&self) -> bool {
        self.counts.routed >= TOKENS_MIN && self.q_value <= FALSE_DISCOVERY_RATE
    }
}

/// The experts of which enough was seen in a domain, those first whose lift is surely highest.
pub fn ranking(body: &ProfileBody, domain: usize) -> Vec<Ranked> {
    let tested = body.experts.iter().enumerate().filter_map(|(expert, counts)| Some((expert, counts, lift(body, counts, domain)?)));
    let mut ranked: Vec<_> = tested
        .map(|(expert, counts, lift)| {
            let counts = counts.domains[domain];
            let helps_lower = wilson(counts.hits, counts.trials, Z_95).0;
            Ranked { expert, lift, q_value: lift.p_value, counts, helps_lower }
        })
        .collect();
    ranked.sort_by(|a, b| a.lift.p_value.total_cmp(&b.lift.p_value));
    // Benjamini and Hochberg: the k-th of m by p-value is a discovery at rate p·m/k, and whatever is before it, too.
    let (m, mut least) = (ranked.len() as f64, 1.0_f64);
    for (index, one) in ranked.iter_mut().enumerate().rev() {
        least = least.min(one.lift.p_value * m / (index + 1) as f64);
        one.q_value = least;
    }
    ranked.sort_by(|a, b| b.lift.lower.total_cmp(&a.lift.lower).then(a.expert.cmp(&b.expert)));
    ranked
}

/// An expert's lift in a domain; `None` where too little was seen.
pub fn lift(body: &ProfileBody, counts: &ExpertCounts, domain: usize) -> Option<Lift> {
    if counts.domains[domain].routed < TOKENS_MIN {
        return None;
    }
    let shares: Vec<_> = body.domains.iter().zip(&counts.domains).map(|(total, of)| share(total, of)).collect();
    let count = shares.len() as f64;
    let mean = shares.iter().map(|(share, _)| share).sum::<f64>() / count;
    let own = shares[domain].0;
    // The delta method on ln(own / mean).
    let variance: f64 = shares
        .iter()
        .enumerate()
        .map(|(number, (_, variance))| {
            let slope = if number == domain { 1.0 / own } else { 0.0 } - 1.0 / (count * mean);
            slope * slope * variance
        })
        .sum();
    let (log, deviation) = (libm::log(own / mean), variance.sqrt());
    let bound = |z: f64| libm::exp(log + z * deviation);
    let p_value = if deviation > 0.0 { libm::erfc(log / deviation / std::f64::consts::SQRT_2) / 2.0 } else { 1.0 };
    Some(Lift { value: own / mean, lower: bound(-Z_95), upper: bound(Z_95), p_value })
}

/// The share of a domain's tokens that were routed to an expert, and that share's variance.
fn share(total: &DomainTotal, of: &DomainCounts) -> (f64, f64) {
    let (tokens, probes) = (total.tokens.max(1) as f64, f64::from(total.probes));
    let share = f64::from(of.routed) / tokens;
    // Σ (r_p − share·n_p)², from sums.
    let squares = f64::from(of.square_routed) - 2.0 * share * f64::from(of.cross) + share * share * total.square_tokens as f64;
    let clustered = if probes > 1.0 { squares.max(0.0) * probes / (probes - 1.0) / (tokens * tokens) } else { 0.0 };
    // Tokens of a probe are alike; that they differ from each other more than by chance is not believed. Where none was seen, the next may be.
    (share, clustered.max(share * (1.0 - share) / tokens).max(1.0 / (tokens * tokens)))
}

/// Between which bounds the probability is of what came true `hits` times in `trials`; (0, 1) without trials.
///
/// Wilson's interval (*Journal of the American Statistical Association* 22, 1927).
pub fn wilson(hits: u32, trials: u32, z: f64) -> (f64, f64) {
    if trials == 0 {
        return (0.0, 1.0);
    }
    let (n, share) = (f64::from(trials), f64::from(hits) / f64::from(trials));
    let scale = 1.0 + z * z / n;
    let centre = (share + z * z / (2.0 * n)) / scale;
    let half = z / scale * (share * (1.0 - share) / n + z * z / (4.0 * n * n)).sqrt();
    ((centre - half).max(0.0), (centre + half).min(1.0))
}

#[cfg(test)]
#[path = "lift_tests.rs"]
mod tests;
