//! Causal attention with grouped key and value heads and a norm on each head's queries and keys.

use rayon::prelude::*;

use crate::kernels::{dot, matmul, rms_norm, softmax};
use crate::kv_cache::KvCache;
use crate::model::Model;
use crate::rope::Rotation;

/// Returns the attention output of layer `layer` for `x`, (tokens, hidden_size), which follow the `past` tokens in `cache`.
pub(crate) fn attention(model: &Model, layer: usize, x: &[f32], past: usize, rotations: &[Rotation], cache: &mut KvCache) -> Vec<f32> {
    let config = &model.config;
    let (heads, kv_heads, head_dim) = (config.num_attention_heads as usize, config.num_key_value_heads as usize, config.head_dim as usize);
    let weights = &model.layers[layer];
    let mut q = matmul(weights.q_proj.view(), x); // (tokens, heads × head_dim)
    let mut k = matmul(weights.k_proj.view(), x); // (tokens, kv_heads × head_dim)
    let v = matmul(weights.v_proj.view(), x); // (tokens, kv_heads × head_dim)
    norm_and_rotate(&mut q, heads, &weights.q_norm, model.eps(), rotations);
    norm_and_rotate(&mut k, kv_heads, &weights.k_norm, model.eps(), rotations);
    cache.extend(layer, &k, &v);
    let cache = &*cache;
    let mut mixed = vec![0.0; q.len()];
    let tokens = mixed.par_chunks_mut(heads * head_dim).zip(q.par_chunks(heads * head_dim)).enumerate();
    tokens.for_each(|(token, (mixed, q))| {
        for (head, (out, q)) in mixed.chunks_exact_mut(head_dim).zip(q.chunks_exact(head_dim)).enumerate() {
            // Each key and value head serves heads / kv_heads query heads.
            mix_values(cache, layer, past + token + 1, head / (heads / kv_heads) * head_dim, q, out);
        }
    });
    matmul(weights.o_proj.view(), &mixed)
}

fn norm_and_rotate(x: &mut [f32], heads: usize, norm: &[f32], eps: f32, rotations: &[Rotation]) {
    for (token, rotation) in x.chunks_exact_mut(heads * norm.len()).zip(rotations) {
        for head in token.chunks_exact_mut(norm.len()) {
            head.copy_from_slice(&rms_norm(head, norm, eps));
            rotation.apply(head);
        }
    }
}

/// Sums the first `keys` values into `out`, weighted by softmax(q · key / √head_dim), in the order of the keys.
fn mix_values(cache: &KvCache, layer: usize, keys: usize, offset: usize, q: &[f32], out: &mut [f32]) {
    let scale = 1.0 / (q.len() as f32).sqrt();
    let mut scores: Vec<f32> = (0..keys).map(|key| dot(q, cache.key(layer, key, offset, q.len())) * scale).collect();
    softmax(&mut scores);
    for (key, score) in scores.iter().enumerate() {
        let value = cache.value(layer, key, offset, q.len());
        out.iter_mut().zip(value).for_each(|(out, value)| *out += score * value);
    }
}
