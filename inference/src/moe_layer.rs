//! The feed-forward half of a layer: routed experts, or one dense network.

use std::collections::BTreeMap;
use std::sync::Arc;

use rayon::prelude::*;

use crate::activation_log::ActivationLog;
use crate::expert::Expert;
use crate::experts::{Experts, ExpertsError};
use crate::kernels::{matmul, silu_times};
use crate::model::{FeedForward, Model};
use crate::router::{Routing, route};

/// Returns the feed-forward output of layer `layer` for `x`, (tokens, hidden_size), the first of which stands at `past`.
pub(crate) fn feed_forward(
    model: &Model,
    layer: usize,
    x: &[f32],
    past: usize,
    experts: &mut Experts,
    log: Option<&mut ActivationLog>,
) -> Result<Vec<f32>, ExpertsError> {
    match &model.layers[layer].feed_forward {
        FeedForward::Dense { gate_proj, up_proj, down_proj } => {
            let mut middle = matmul(gate_proj.view(), x); // (tokens, intermediate_size)
            silu_times(&mut middle, &matmul(up_proj.view(), x));
            Ok(matmul(down_proj.view(), &middle))
        }
        FeedForward::Moe { router } => {
            let config = &model.config;
            let logits = matmul(router.view(), x); // (tokens, num_experts)
            let routings: Vec<_> = logits
                .chunks_exact(config.num_experts as usize)
                .map(|logits| route(logits, config.num_experts_per_tok as usize, config.norm_topk_prob))
                .collect();
            if let Some(log) = log {
                routings.iter().enumerate().for_each(|(i, routing)| log.record(past + i, layer as u32, routing));
            }
            mix_experts(layer as u32, x, config.hidden_size as usize, &routings, experts)
        }
    }
}

/// A token that an expert works on, and the weight of its result.
struct Assignment {
    token: usize,
    weight: f32,
}

/// Runs each needed expert once, on all of its tokens, and adds the results up by expert, ascending, whichever came first.
fn mix_experts(layer: u32, x: &[f32], hidden_size: usize, routings: &[Routing], experts: &mut Experts) -> Result<Vec<f32>, ExpertsError> {
    let mut assignments: BTreeMap<u32, Vec<Assignment>> = BTreeMap::new();
    for (token, routing) in routings.iter().enumerate() {
        for (&expert, &weight) in routing.experts.iter().zip(&routing.weights) {
            assignments.entry(expert).or_default().push(Assignment { token, weight });
        }
    }
    let wanted: Vec<u32> = assignments.keys().copied().collect();
    let mut results: BTreeMap<u32, Vec<f32>> = BTreeMap::new(); // each (assignments, hidden_size)
    let run = |(number, expert): &(u32, Arc<Expert>)| {
        let rows: Vec<f32> = assignments[number].iter().flat_map(|a| &x[a.token * hidden_size..][..hidden_size]).copied().collect();
        (*number, expert.forward(&rows))
    };
    experts.for_each(layer, &wanted, |present| results.par_extend(present.par_iter().map(run)))?;
    let mut out = vec![0.0; x.len()];
    for (number, rows) in &results {
        for (assignment, row) in assignments[number].iter().zip(rows.chunks_exact(hidden_size)) {
            let out = &mut out[assignment.token * hidden_size..][..hidden_size];
            out.iter_mut().zip(row).for_each(|(out, value)| *out += assignment.weight * value);
        }
    }
    Ok(out)
}
