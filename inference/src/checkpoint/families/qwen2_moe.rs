//! Qwen1.5-MoE and Qwen2-MoE: `Qwen2MoeForCausalLM`. Queries, keys and values have a bias; every token uses a shared expert besides.

use protocol::Decoder;
use protocol::decoder::{QkNorm, QkvBias, SharedExpert};

use super::keys::{ConfigProblem, Key, KeyTable, Keys};
use super::{Family, decoder_of, usual_name, usual_spelling};

pub(super) const QWEN2_MOE: Family =
    Family { model_type: "qwen2_moe", wrappers: &[], keys: KEYS, decoder, others: None, name: usual_name, spell: usual_spelling };

const KEYS: KeyTable = &[
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
    ("qkv_bias", Key::Ignored("published models have the biases, and say nothing of them")),
    ("shared_expert_intermediate_size", Key::Read),
    ("sliding_window", Key::Ignored("a window is named even where use_sliding_window says that there is none")),
    ("use_sliding_window", Key::Off),
];

fn decoder(keys: Keys<'_>) -> Result<Decoder, ConfigProblem> {
    let shared = SharedExpert::Gated { width: keys.integer("shared_expert_intermediate_size")? };
    let moe = keys.moe("moe_intermediate_size", keys.normalises()?, shared)?;
    decoder_of(keys, &keys.attention(QkNorm::None, QkvBias::Each)?, keys.sparse_or_dense(&moe)?)
}
