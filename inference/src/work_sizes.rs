//! Sizes of the memory that passes work in.

use protocol::{ModelManifest, PartKind};

use crate::kernels::Forms;
use crate::mixer::gqa::GqaSizes;
use crate::model::expert_forms;

/// Rows whose logits are computed together.
pub const LOGITS_TOKENS: usize = 16;

/// Sizes of all buffers that passes work in: what they are made of, and what they are counted by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct WorkSizes {
    pub(crate) gqa: GqaSizes,
    pub(crate) vocab: usize,
    pub(crate) assigned: usize,
    pub(crate) experts: usize,
    pub(crate) intermediate: usize,
    /// Width of the widest network that is no routed expert; 0 where there is none.
    pub(crate) dense: usize,
    /// Whether layers have a shared expert.
    pub(crate) shared: bool,
    pub(crate) expert_forms: Forms,
}

impl WorkSizes {
    /// Sizes for passes of at most `batch_tokens` rows, on sequences of at most `context` tokens.
    pub(crate) fn new(manifest: &ModelManifest, part: PartKind, (batch_tokens, threads, context): (usize, usize, usize)) -> Self {
        let trunk = manifest.part(part).map(|part| &part.trunk[..]).unwrap_or_default();
        let decoder = manifest.decoder_of(part);
        let rows = batch_tokens.clamp(1, context.max(1)).max(1);
        let forms = trunk.iter().fold(Forms { plain: true, packed: false }, |forms, tensor| forms.or(Forms::of(tensor.precision)));
        let (dense, shared) = decoder.widths_beside_experts();
        Self {
            gqa: GqaSizes::new(decoder, (rows, threads.max(1), context), forms),
            vocab: decoder.vocab_size as usize,
            assigned: rows * decoder.experts_per_token() as usize,
            experts: decoder.experts() as usize,
            intermediate: decoder.moe().map_or(0, |moe| moe.width as usize),
            dense: dense.max(shared) as usize,
            shared: shared > 0,
            expert_forms: expert_forms(manifest, part),
        }
    }

    /// Sizes that serve both.
    pub(crate) fn max(&self, other: &Self) -> Self {
        Self {
            gqa: self.gqa.max(&other.gqa),
            vocab: self.vocab.max(other.vocab),
            assigned: self.assigned.max(other.assigned),
            experts: self.experts.max(other.experts),
            intermediate: self.intermediate.max(other.intermediate),
            dense: self.dense.max(other.dense),
            shared: self.shared || other.shared,
            expert_forms: self.expert_forms.or(other.expert_forms),
        }
    }

    /// What passes of at most `rows` rows take of all this.
    pub(crate) fn of_rows(&self, rows: usize) -> Self {
        let all = self.rows().max(1);
        let part = |numbers: usize| (numbers * rows.min(all)).div_ceil(all);
        Self { gqa: self.gqa.of_rows(rows.min(all), part(self.gqa.partials)), assigned: part(self.assigned), ..*self }
    }

    pub(crate) fn rows(&self) -> usize {
        self.gqa.rows
    }

    pub(crate) fn threads(&self) -> usize {
        self.gqa.threads
    }

    pub(crate) fn hidden(&self) -> usize {
        self.gqa.hidden
    }

    pub(crate) fn trunk_forms(&self) -> Forms {
        self.gqa.forms
    }

    pub(crate) fn head_rows(&self) -> usize {
        LOGITS_TOKENS.min(self.rows())
    }
}
