//! Where experts were when the model wanted them, as counts.

/// Where the experts of a run were when the model first needed each of them, and how often they had to be brought.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ExpertUse {
    /// Distinct slots that were needed.
    pub needed: usize,
    /// In memory already.
    pub ram: usize,
    /// In this node's store.
    pub disk: usize,
    /// Brought from a peer while the model waited.
    pub fetched: usize,
    /// Bytes of those.
    pub bytes_fetched: u64,
    /// Run at a peer.
    pub remote: usize,
    /// Uses of an expert that were run at peers, each time counted.
    pub remote_uses: u64,
    /// Rows of activations that experts at peers worked on, each time counted.
    pub remote_rows: u64,
    /// Experts that came into memory because they ran elsewhere often.
    pub moved_in: u64,
    /// Uses of an expert by a layer, each time counted.
    pub uses: u64,
    /// Those that memory could serve.
    pub hits: u64,
    /// Bytes read from the store for the others.
    pub bytes_read: u64,
    /// Experts that were asked for before their layer's turn, …
    pub prefetched: u64,
    /// … and how many of them the layer then wanted.
    pub prefetched_used: u64,
    /// Experts of which peers were told before their layer's turn, …
    pub hinted: u64,
    /// … and how many of them the layer then had to ask for.
    pub hinted_used: u64,
}

/// Where an expert was when a layer wanted it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ServedFrom {
    /// In memory.
    #[default]
    Memory,
    /// In this node's store.
    Disk,
    /// At a peer, which ran it.
    Remote,
    /// At a peer, which sent it.
    Fetched,
}

impl ServedFrom {
    /// Whether it was on this node.
    pub fn is_here(self) -> bool {
        matches!(self, Self::Memory | Self::Disk)
    }
}
