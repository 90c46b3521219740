//! Qwen3-MoE: `Qwen3MoeForCausalLM`.

use protocol::Decoder;
use protocol::decoder::{QkNorm, QkvBias, SharedExpert};

use super::keys::{ConfigProblem, Key, KeyTable, Keys};
use super::{Family, decoder_of, usual_name, usual_spelling};

pub(super) const QWEN3_MOE: Family =
    Family { model_type: "qwen3_moe", wrappers: &[], keys: KEYS, decoder, others: None, name: usual_name, spell: usual_spelling };

/// Of the family's decoder, wherever it stands.
pub(super) const KEYS: KeyTable = &[
    ("attention_bias", Key::Off),
    ("decoder_sparse_step", Key::Read),
    ("head_dim", Key::Read),
    ("intermediate_size", Key::Read),
    ("max_window_layers", Key::Ignored("of use only with use_sliding_window")),
    ("mlp_only_layers", Key::Read),
    ("moe_intermediate_size", Key::Read),
    ("norm_topk_prob", Key::Read),
    ("num_experts", Key::Read),
    ("num_experts_per_tok", Key::Read),
    ("num_local_experts", Key::Read),
    ("shared_expert_intermediate_size", Key::Off),
    ("sliding_window", Key::Ignored("a window is named even where use_sliding_window says that there is none")),
    ("use_qk_norm", Key::Ignored("queries and keys are normed in every published model")),
    ("use_sliding_window", Key::Off),
];

pub(super) fn decoder(keys: Keys<'_>) -> Result<Decoder, ConfigProblem> {
    let moe = keys.moe("moe_intermediate_size", keys.normalises()?, SharedExpert::None)?;
    decoder_of(keys, &keys.attention(QkNorm::PerHead, QkvBias::None)?, keys.sparse_or_dense(&moe)?)
}
