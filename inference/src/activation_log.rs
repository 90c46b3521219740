//! Which experts each token used. Stays on this node: routing traces reveal text.

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

    pub(crate) fn record(&mut self, position: usize, layer: u32, choices: &[Choice]) {
        self.entries.push(Activation { position, layer, choices: choices.to_vec() });
    }
}
