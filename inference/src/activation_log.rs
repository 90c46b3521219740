//! Which experts each token used. Stays on this node: routing traces reveal text.

use crate::cache_policy::Trace;
use crate::router::Choice;

/// The routing of every token and layer of some forward passes, in order of computation.
#[derive(Debug, Default)]
pub struct ActivationLog {
    entries: Vec<Activation>,
}

/// One token's routing in one layer.
#[derive(Clone, PartialEq, Debug)]
pub struct Activation {
    /// The token's place in the sequence.
    pub position: usize,
    /// The transformer layer.
    pub layer: u32,
    /// Its experts, likeliest first.
    pub choices: Vec<Choice>,
}

impl ActivationLog {
    /// Everything logged so far.
    pub fn entries(&self) -> &[Activation] {
        &self.entries
    }

    /// The experts that each layer used in each pass, as a trace for the simulation of caches.
    pub fn trace(&self, layers: u32, experts: u32) -> Trace {
        let mut trace = Trace::new(layers, experts).expect("a model's shape is within a trace's limits");
        // Entries of one pass and layer stand together, with positions ascending.
        let passes = self.entries.chunk_by(|a, b| a.layer == b.layer && a.position < b.position);
        for pass in passes {
            let mut used: Vec<u32> = pass.iter().flat_map(|entry| &entry.choices).map(|choice| choice.expert).collect();
            used.sort_unstable();
            used.dedup();
            trace.push(pass[0].layer, &used).expect("experts of the model, ascending");
        }
        trace
    }

    pub(crate) fn record(&mut self, position: usize, layer: u32, choices: &[Choice]) {
        self.entries.push(Activation { position, layer, choices: choices.to_vec() });
    }
}
