//! Model families: what is special to each is one file, and nowhere else: which keys its configuration may have, what decoder they make, and
//! how its checkpoints spell the names of tensors. A new family is a file here and a line in `ALL`.

mod keys;
mod mixtral;
mod olmoe;
mod qwen2_moe;
mod qwen3_moe;
mod qwen3_omni;

use std::borrow::Cow;

use protocol::decoder::{Embedding, FeedForward, Gqa, LayerRun, Mixer};
use protocol::manifest::PartConfig;
use protocol::{Decoder, PartKind};
use serde_json::Value;

pub use keys::ConfigProblem;
use keys::{KeyTable, Keys, wrong};

/// Every family.
const ALL: &[Family] =
    &[qwen3_moe::QWEN3_MOE, qwen3_omni::QWEN3_OMNI, qwen3_omni::QWEN3_OMNI_THINKER, mixtral::MIXTRAL, olmoe::OLMOE, qwen2_moe::QWEN2_MOE];

/// Reads the parts beside a decoder.
type ReadParts = fn(&Value, &Preprocessors) -> Result<Vec<PartConfig>, ConfigProblem>;

/// What checkpoints say of media beside their configuration; null where a file is not there.
#[derive(Clone, Debug, Default)]
pub struct Preprocessors {
    /// `preprocessor_config.json`: pictures and sound.
    pub pictures: Value,
    /// `video_preprocessor_config.json`.
    pub videos: Value,
}

/// What is special to a family of models.
pub struct Family {
    /// What its configurations call themselves.
    pub model_type: &'static str,
    /// The objects around the decoder's configuration, outermost first.
    wrappers: &'static [Wrapper],
    /// Keys of the decoder's configuration, besides those that every family has.
    keys: KeyTable,
    decoder: fn(Keys<'_>) -> Result<Decoder, ConfigProblem>,
    /// The parts beside the decoder.
    others: Option<ReadParts>,
    /// What a tensor's name in a checkpoint of this family means.
    pub name: fn(&str) -> Name<'_>,
    /// The name of a tensor of a part in a checkpoint of this family.
    pub spell: fn(PartKind, &str) -> String,
}

impl std::fmt::Debug for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.model_type)
    }
}

/// An object around a decoder's configuration.
struct Wrapper {
    /// The key under which the next one stands.
    inner: &'static str,
    /// Its keys, that one among them.
    keys: KeyTable,
}

/// What a tensor's name means.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Name<'a> {
    /// The part that it belongs to, and its name there in most families; whether the model has such a tensor is another question.
    Usual(PartKind, Cow<'a, str>),
    /// A part that is left out by rule.
    Skipped(&'static str),
    /// No tensor of the family has this name.
    Unexpected,
}

/// A name as most families have it.
fn usual_name(name: &str) -> Name<'_> {
    if name.ends_with("rotary_emb.inv_freq") {
        return Name::Skipped("RoPE frequencies, which follow from the configuration");
    }
    Name::Usual(PartKind::Text, Cow::Borrowed(name))
}

/// The other way round.
fn usual_spelling(_: PartKind, name: &str) -> String {
    name.to_owned()
}

/// What a `config.json` describes.
#[derive(Debug)]
pub struct ParsedConfig {
    /// The parts, in the order of a manifest; the first is the decoder that makes text.
    pub parts: Vec<PartConfig>,
    /// The family.
    pub family: &'static Family,
}

impl ParsedConfig {
    /// The decoder that makes text.
    pub fn decoder(&self) -> &Decoder {
        self.parts[0].decoder().expect("the first part makes text")
    }
}

/// Reads a `config.json`, and what stands beside it of media.
pub fn parse_config(json: &Value, preprocessors: &Preprocessors) -> Result<ParsedConfig, ConfigProblem> {
    let model_type = json["model_type"].as_str().unwrap_or("");
    let family = ALL.iter().find(|family| family.model_type == model_type).ok_or_else(|| {
        let known = ALL.iter().map(|family| family.model_type).collect::<Vec<_>>().join(", ");
        ConfigProblem(format!("model_type is {model_type:?}, which this engine does not implement (known: {known})"))
    })?;
    let mut object = json;
    for wrapper in family.wrappers {
        Keys(object).check(wrapper.keys)?;
        object = &object[wrapper.inner];
        if !object.is_object() {
            return Err(wrong(wrapper.inner, "there"));
        }
    }
    let keys = Keys(object);
    keys.check(family.keys)?;
    let decoder = (family.decoder)(keys)?;
    decoder.validate().map_err(|error| ConfigProblem(error.to_string()))?;
    if decoder.moe().is_none() {
        return Err(ConfigProblem("no layer has experts".into()));
    }
    let mut parts = vec![PartConfig::Decoder(decoder)];
    if let Some(others) = family.others {
        parts.extend(others(json, preprocessors)?);
    }
    parts[1..].iter().try_for_each(|part| part.validate().map_err(|error| ConfigProblem(format!("{}: {error}", part.kind()))))?;
    Ok(ParsedConfig { parts, family })
}

/// A decoder with the usual keys, whose layers differ in their feed-forward halves at most.
fn decoder_of(keys: Keys<'_>, attention: &Gqa, layers: Vec<FeedForward>) -> Result<Decoder, ConfigProblem> {
    let norm = keys.norm()?;
    let run = |feed_forward| LayerRun { layers: 1, norm, mixer: Mixer::Gqa(attention.clone()), feed_forward };
    Ok(Decoder {
        vocab_size: keys.integer("vocab_size")?,
        hidden_size: keys.integer("hidden_size")?,
        context: keys.integer("max_position_embeddings")?,
        embedding: Embedding::Table,
        runs: Decoder::runs_of(layers.into_iter().map(run)),
        final_norm: norm,
        head: keys.head()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::decoder::{QkNorm, Rope, Router};
    use serde_json::json;

    fn published() -> Value {
        json!({"model_type": "qwen3_moe", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
               "num_key_value_heads": 2, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
               "intermediate_size": 96, "norm_topk_prob": true, "rope_theta": 1_000_000.0, "rope_scaling": null,
               "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "decoder_sparse_step": 1, "mlp_only_layers": []})
    }

    fn parsed(change: impl FnOnce(&mut Value)) -> Result<Decoder, ConfigProblem> {
        let mut json = published();
        change(&mut json);
        parse_config(&json, &Preprocessors::default()).map(|parsed| parsed.decoder().clone())
    }

    #[test]
    fn both_spellings_of_rope_and_experts_mean_the_same() {
        let old = parsed(|_| {}).expect("valid");
        let new = parsed(|json| {
            json["rope_parameters"] = json!({"rope_theta": 1_000_000, "rope_type": "default"});
            json["num_local_experts"] = json["num_experts"].take();
            json["rope_theta"] = Value::Null;
        });
        assert_eq!(new, Ok(old.clone()));
        let omni = json!({"model_type": "qwen3_omni_moe", "thinker_config": {"text_config": published()}});
        assert_eq!(
            parse_config(&omni, &Preprocessors::default()).map(|parsed| (parsed.decoder().clone(), parsed.family.model_type)),
            Ok((old.clone(), "qwen3_omni_moe"))
        );
        let thinker = json!({"model_type": "qwen3_omni_moe_thinker", "text_config": published()});
        assert_eq!(parse_config(&thinker, &Preprocessors::default()).map(|parsed| parsed.decoder().clone()), Ok(old));
    }

    #[test]
    fn mixtral_has_its_own_words() {
        let mixtral = json!({"model_type": "mixtral", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
               "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 96,
               "rope_theta": 1e6, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "sliding_window": null});
        let parsed = parse_config(&mixtral, &Preprocessors::default()).expect("valid");
        let decoder = parsed.decoder();
        let (moe, Mixer::Gqa(attention)) = (decoder.moe().expect("it has experts"), &decoder.runs[0].mixer);
        assert_eq!((decoder.runs.len(), moe.width, moe.router), (1, 96, Router::Softmax { normalise: true }));
        assert_eq!((attention.head_dim, attention.qk_norm), (16, QkNorm::None));
        let mut windowed = mixtral;
        windowed["sliding_window"] = json!(4096);
        assert!(parse_config(&windowed, &Preprocessors::default()).is_err());
    }

    #[test]
    fn dense_layers_come_from_list_and_step() {
        let dense = |change: fn(&mut Value)| {
            parsed(change).map(|decoder| (0..decoder.layers()).filter(|&layer| !decoder.is_moe(layer)).collect::<Vec<_>>())
        };
        assert_eq!(dense(|_| {}), Ok(vec![]));
        assert_eq!(dense(|json| json["mlp_only_layers"] = json!([1])), Ok(vec![1]));
        assert_eq!(dense(|json| json["decoder_sparse_step"] = json!(2)), Ok(vec![0, 2]));
        assert!(dense(|json| json["decoder_sparse_step"] = json!(0)).is_err());
        assert!(dense(|json| json["mlp_only_layers"] = json!([4])).is_err());
    }

    #[test]
    fn refuses_what_it_does_not_implement() {
        let changes: [fn(&mut Value); 12] = [
            |json| json["model_type"] = json!("llama"),
            |json| json["hidden_act"] = json!("gelu"),
            |json| json["attention_bias"] = json!(true),
            |json| json["use_sliding_window"] = json!(true),
            |json| json["rope_scaling"] = json!({"rope_type": "yarn", "factor": 4.0}),
            |json| json["rope_scaling"] = json!({"rope_type": "default", "low_freq_factor": 1.0}),
            |json| json["quantization_config"] = json!({"quant_method": "fp8"}),
            |json| json["attn_logit_softcapping"] = json!(50.0),
            |json| json["shared_expert_intermediate_size"] = json!(64),
            |json| json["mlp_only_layers"] = json!([0, 1, 2, 3]),
            |json| json["num_experts"] = json!(-1),
            |json| json["rms_norm_eps"] = json!("small"),
        ];
        for (i, change) in changes.into_iter().enumerate() {
            assert!(parsed(change).is_err(), "change {i}");
        }
    }

    #[test]
    fn what_is_off_and_what_changes_nothing_passes() {
        let same = parsed(|json| {
            json["sliding_window"] = json!(4096);
            json["final_logit_softcapping"] = Value::Null;
            json["mamba_layers"] = json!([]);
            json["router_aux_loss_coef"] = json!(0.1);
            json["temperature"] = json!(0.7);
        });
        assert_eq!(same, parsed(|_| {}));
        let omni = |change: fn(&mut Value)| {
            let mut json = json!({"model_type": "qwen3_omni_moe", "thinker_config": {"text_config": published(), "audio_token_id": 5}});
            change(&mut json);
            parse_config(&json, &Preprocessors::default()).map(|parsed| parsed.decoder().clone())
        };
        assert_eq!(omni(|_| {}), same);
        assert!(omni(|json| json["second_talker"] = json!({"layers": 3})).is_err());
        assert!(omni(|json| json["thinker_config"]["smell_token_id"] = json!(7)).is_err());
    }

    #[test]
    fn positions_of_three_axes_are_read() {
        let sections =
            parsed(|json| json["rope_scaling"] = json!({"mrope_section": [6, 5, 5], "rope_type": "default", "interleaved": true}));
        let Mixer::Gqa(attention) = &sections.expect("valid").runs[0].mixer;
        assert_eq!(attention.rope, Rope::Interleaved { base: 1e6, sections: [6, 5, 5] });
    }
}
