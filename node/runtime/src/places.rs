//! Where each expert of a model lies in arrays that have an entry for every one of them.

use protocol::Decoder;

/// Where experts lie in arrays that have one entry for each of a model's.
#[derive(Clone, Debug)]
pub(crate) struct ExpertIndex {
    /// By layer; none for a dense one.
    first: Vec<Option<usize>>,
    count: usize,
}

impl ExpertIndex {
    pub(crate) fn of(decoder: &Decoder) -> Self {
        let mut count = 0;
        let first = (0..decoder.layers())
            .map(|layer| {
                let here = decoder.is_moe(layer).then_some(count);
                count += here.map_or(0, |_| decoder.experts() as usize);
                here
            })
            .collect();
        Self { first, count }
    }

    pub(crate) fn count(&self) -> usize {
        self.count
    }

    pub(crate) fn place(&self, layer: u32, expert: u32) -> Option<usize> {
        Some((*self.first.get(layer as usize)?)? + expert as usize)
    }
}
