//! OLMoE: `OlmoeForCausalLM`. Queries and keys are normed over all heads together; the weights of the chosen experts are taken as they are.

use protocol::Decoder;
use protocol::decoder::{QkNorm, QkvBias, SharedExpert};

use super::keys::{ConfigProblem, Key, KeyTable, Keys};
use super::{Family, decoder_of, usual_name, usual_spelling};

pub(super) const OLMOE: Family =
    Family { model_type: "olmoe", wrappers: &[], keys: KEYS, decoder, others: None, name: usual_name, spell: usual_spelling };

const KEYS: KeyTable = &[
    ("attention_bias", Key::Off),
    ("clip_qkv", Key::Off),
    ("head_dim", Key::Read),
    ("intermediate_size", Key::Read),
    ("norm_topk_prob", Key::Read),
    ("num_experts", Key::Read),
    ("num_experts_per_tok", Key::Read),
    ("num_local_experts", Key::Read),
];

fn decoder(keys: Keys<'_>) -> Result<Decoder, ConfigProblem> {
    let moe = keys.moe("intermediate_size", keys.normalises()?, SharedExpert::None)?;
    decoder_of(keys, &keys.attention(QkNorm::AllHeads, QkvBias::None)?, keys.sparse_or_dense(&moe)?)
}
