//! Mixtral: `MixtralForCausalLM`.

use std::borrow::Cow;

use protocol::decoder::{QkNorm, QkvBias, SharedExpert};
use protocol::{Decoder, PartKind};

use super::keys::{ConfigProblem, Key, KeyTable, Keys};
use super::{Family, Name, decoder_of, usual_name};

pub(super) const MIXTRAL: Family = Family { model_type: "mixtral", wrappers: &[], keys: KEYS, decoder, others: None, name, spell };

const KEYS: KeyTable = &[
    ("head_dim", Key::Read),
    ("intermediate_size", Key::Read),
    ("num_experts_per_tok", Key::Read),
    ("num_local_experts", Key::Read),
    ("router_jitter_noise", Key::Ignored("training")),
    ("sliding_window", Key::Off),
];

fn decoder(keys: Keys<'_>) -> Result<Decoder, ConfigProblem> {
    let moe = keys.moe("intermediate_size", true, SharedExpert::None)?;
    decoder_of(keys, &keys.attention(QkNorm::None, QkvBias::None)?, keys.sparse_or_dense(&moe)?)
}

/// `block_sparse_moe` is Mixtral's word for `mlp`, `w1`, `w3` and `w2` are its words for gate, up and down.
fn name(name: &str) -> Name<'_> {
    if name.contains(".mlp.") {
        return Name::Unexpected;
    }
    let Some((layer, rest)) = name.split_once(".block_sparse_moe.") else { return usual_name(name) };
    let rest = match rest.split_once(".w") {
        Some((expert, "1.weight")) => format!("{expert}.gate_proj.weight"),
        Some((expert, "3.weight")) => format!("{expert}.up_proj.weight"),
        Some((expert, "2.weight")) => format!("{expert}.down_proj.weight"),
        _ => rest.to_owned(),
    };
    Name::Usual(PartKind::Text, Cow::Owned(format!("{layer}.mlp.{rest}")))
}

fn spell(_: PartKind, usual: &str) -> String {
    let Some((layer, rest)) = usual.split_once(".mlp.") else { return usual.to_owned() };
    let rest = rest.replace(".gate_proj.", ".w1.").replace(".up_proj.", ".w3.").replace(".down_proj.", ".w2.");
    format!("{layer}.block_sparse_moe.{rest}")
}
