//! Keys and values of the tokens seen so far, by layer.

use protocol::ModelConfig;

/// What attention looks back on.
#[derive(Debug)]
pub(crate) struct KvCache {
    layers: Vec<Layer>,
    width: usize, // num_key_value_heads × head_dim
}

#[derive(Debug, Default)]
struct Layer {
    keys: Vec<f32>,   // (tokens, width)
    values: Vec<f32>, // (tokens, width)
}

impl KvCache {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let layers = (0..config.num_hidden_layers).map(|_| Layer::default()).collect();
        Self { layers, width: (config.num_key_value_heads * config.head_dim) as usize }
    }

    /// Bytes that `tokens` tokens take.
    pub(crate) fn bytes(config: &ModelConfig, tokens: usize) -> u64 {
        let width = u64::from(config.num_key_value_heads) * u64::from(config.head_dim);
        u64::from(config.num_hidden_layers) * 2 * width * 4 * tokens as u64
    }

    /// Appends the keys and values of some tokens, each (tokens, width).
    pub(crate) fn extend(&mut self, layer: usize, keys: &[f32], values: &[f32]) {
        self.layers[layer].keys.extend_from_slice(keys);
        self.layers[layer].values.extend_from_slice(values);
    }

    /// Forgets the tokens from `tokens` on.
    pub(crate) fn truncate(&mut self, tokens: usize) {
        for layer in &mut self.layers {
            layer.keys.truncate(tokens * self.width);
            layer.values.truncate(tokens * self.width);
        }
    }

    pub(crate) fn key(&self, layer: usize, token: usize, offset: usize, length: usize) -> &[f32] {
        &self.layers[layer].keys[token * self.width + offset..][..length]
    }

    pub(crate) fn value(&self, layer: usize, token: usize, offset: usize, length: usize) -> &[f32] {
        &self.layers[layer].values[token * self.width + offset..][..length]
    }
}
