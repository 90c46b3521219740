//! Reads `config.json` and `generation_config.json` in all their spellings into the one normal form.

use protocol::ModelConfig;
use protocol::manifest::GenerationDefaults;
use serde_json::Value;

/// Which parts a checkpoint of this configuration may hold beside the text model.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    /// `Qwen3MoeForCausalLM`: text only.
    Text,
    /// `MixtralForCausalLM`: text only, no norms on queries and keys.
    Mixtral,
    /// The thinker of a Qwen3-Omni, with its towers.
    Thinker,
    /// A whole Qwen3-Omni: thinker, talker and code2wav.
    Omni,
}

/// A field that is missing, of the wrong type, or of a value that this engine does not implement.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("config.json: {0}")]
pub struct ConfigProblem(pub String);

/// Returns the normal form of a `config.json`.
pub fn parse_config(json: &Value) -> Result<(ModelConfig, Family), ConfigProblem> {
    let model_type = json["model_type"].as_str().unwrap_or("");
    let (family, text) = match model_type {
        "mixtral" => (Family::Mixtral, json),
        "qwen3_moe" => (Family::Text, json),
        "qwen3_omni_moe_thinker" => (Family::Thinker, &json["text_config"]),
        "qwen3_omni_moe" => (Family::Omni, &json["thinker_config"]["text_config"]),
        other => {
            let known = "known: qwen3_moe, qwen3_omni_moe, qwen3_omni_moe_thinker, mixtral";
            return Err(ConfigProblem(format!("model_type is {other:?}, which this engine does not implement ({known})")));
        }
    };
    if !text.is_object() {
        return Err(ConfigProblem("text_config is missing".into()));
    }
    refuse_unimplemented(text)?;
    let num_hidden_layers = integer(text, "num_hidden_layers")?;
    let num_attention_heads = integer(text, "num_attention_heads")?;
    let hidden_size = integer(text, "hidden_size")?;
    let dense_layers = dense_layers(text, num_hidden_layers)?;
    let head_dim = match optional_integer(text, "head_dim")? {
        Some(head_dim) => head_dim,
        None => hidden_size.checked_div(num_attention_heads).unwrap_or(0),
    };
    let num_experts = match optional_integer(text, "num_experts")? {
        Some(count) => count,
        None => integer(text, "num_local_experts")?, // transformers 5
    };
    let config = ModelConfig {
        vocab_size: integer(text, "vocab_size")?,
        hidden_size,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads: optional_integer(text, "num_key_value_heads")?.unwrap_or(num_attention_heads),
        head_dim,
        num_experts,
        num_experts_per_tok: integer(text, "num_experts_per_tok")?,
        moe_intermediate_size: integer(text, if family == Family::Mixtral { "intermediate_size" } else { "moe_intermediate_size" })?,
        intermediate_size: if dense_layers.is_empty() { 0 } else { integer(text, "intermediate_size")? },
        dense_layers,
        qk_norm: family != Family::Mixtral,
        norm_topk_prob: family == Family::Mixtral || boolean(text, "norm_topk_prob")?.unwrap_or(false),
        rope_theta: rope_field(text, "rope_theta").and_then(Value::as_f64).ok_or_else(|| wrong("rope_theta", "a number"))?,
        mrope_section: mrope_section(text)?,
        rms_norm_eps: text["rms_norm_eps"].as_f64().ok_or_else(|| wrong("rms_norm_eps", "a number"))?,
        tie_word_embeddings: boolean(text, "tie_word_embeddings")?.unwrap_or(false),
        max_position_embeddings: integer(text, "max_position_embeddings")?,
    };
    config.validate().map_err(|error| ConfigProblem(error.to_string()))?;
    Ok((config, family))
}

/// Returns sampling defaults and stop tokens; `config` fills in what `generation` leaves out.
pub fn parse_generation(config: &Value, generation: &Value) -> GenerationDefaults {
    let number = |name: &str| generation[name].as_f64().map(|value| value as f32);
    let thinker = &config["thinker_config"]["text_config"]["eos_token_id"];
    let eos = [&generation["eos_token_id"], &config["eos_token_id"], &config["text_config"]["eos_token_id"], thinker];
    let sampled = generation["do_sample"].as_bool().unwrap_or(false);
    let strings = generation["stop_strings"]
        .as_array()
        .into_iter()
        .flatten()
        .chain(generation["stop_strings"].is_string().then(|| &generation["stop_strings"]));
    GenerationDefaults {
        // Each source may know of one that the others leave out: an answer ends at any of them.
        eos_token_ids: eos.into_iter().flat_map(token_ids).fold(Vec::new(), |mut all, id| {
            if !all.contains(&id) {
                all.push(id);
            }
            all
        }),
        stop_strings: strings.filter_map(Value::as_str).filter(|text| !text.is_empty()).map(str::to_owned).collect(),
        // Without do_sample, transformers takes the likeliest token.
        temperature: if sampled { number("temperature").unwrap_or(1.0) } else { 0.0 },
        top_k: generation["top_k"].as_u64().filter(|_| sampled).unwrap_or(0) as u32,
        top_p: number("top_p").filter(|_| sampled).unwrap_or(1.0),
        repetition_penalty: number("repetition_penalty").unwrap_or(1.0),
    }
}

fn token_ids(value: &Value) -> Vec<u32> {
    let ids = value.as_array().map_or_else(|| std::slice::from_ref(value), Vec::as_slice);
    ids.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()).collect()
}

/// What would change the arithmetic and is not there must not pass silently.
fn refuse_unimplemented(text: &Value) -> Result<(), ConfigProblem> {
    let refuse = |field: &str, value: &Value| Err(ConfigProblem(format!("{field} is {value}, which this engine does not implement")));
    if let Some(act) = text["hidden_act"].as_str()
        && act != "silu"
    {
        return refuse("hidden_act", &text["hidden_act"]);
    }
    for field in ["attention_bias", "use_sliding_window"] {
        if text[field].as_bool() == Some(true) {
            return refuse(field, &text[field]);
        }
    }
    // Qwen3 names a window and says beside it that none is used; Mixtral means what it names.
    if text["model_type"] == "mixtral" && !text["sliding_window"].is_null() {
        return refuse("sliding_window", &text["sliding_window"]);
    }
    for group in ["rope_scaling", "rope_parameters"] {
        for field in ["rope_type", "type"] {
            if let Some(kind) = text[group][field].as_str()
                && !["default", "mrope"].contains(&kind)
            {
                return refuse(&format!("{group}.{field}"), &text[group][field]);
            }
        }
    }
    Ok(())
}

fn dense_layers(text: &Value, layers: u32) -> Result<Vec<u32>, ConfigProblem> {
    let step = optional_integer(text, "decoder_sparse_step")?.unwrap_or(1);
    if step == 0 {
        return Err(wrong("decoder_sparse_step", "1 or more"));
    }
    let listed = match &text["mlp_only_layers"] {
        Value::Null => Vec::new(),
        value => {
            let layers = value.as_array().map(|list| list.iter().map(Value::as_u64).collect::<Option<Vec<_>>>());
            layers.flatten().ok_or_else(|| wrong("mlp_only_layers", "a list of layers"))?
        }
    };
    if let Some(layer) = listed.iter().find(|&&layer| layer >= u64::from(layers)) {
        return Err(ConfigProblem(format!("mlp_only_layers names layer {layer} of {layers}")));
    }
    // A model of more layers than the limit is refused by validate; do not list them here first.
    Ok((0..layers.min(4096)).filter(|&layer| listed.contains(&u64::from(layer)) || (layer + 1) % step != 0).collect())
}

/// RoPE's settings stand in `rope_parameters` (transformers 5), or in `rope_scaling` and beside it.
fn rope_field<'a>(text: &'a Value, name: &str) -> Option<&'a Value> {
    [&text["rope_parameters"][name], &text["rope_scaling"][name], &text[name]].into_iter().find(|value| !value.is_null())
}

fn mrope_section(text: &Value) -> Result<Option<[u32; 3]>, ConfigProblem> {
    let Some(value) = rope_field(text, "mrope_section") else { return Ok(None) };
    let numbers: Option<Vec<u32>> =
        value.as_array().and_then(|list| list.iter().map(|n| n.as_u64().and_then(|n| u32::try_from(n).ok())).collect());
    let section = numbers.and_then(|numbers| <[u32; 3]>::try_from(numbers).ok());
    section.map(Some).ok_or_else(|| wrong("mrope_section", "three counts"))
}

fn optional_integer(text: &Value, name: &'static str) -> Result<Option<u32>, ConfigProblem> {
    match &text[name] {
        Value::Null => Ok(None),
        value => value.as_u64().and_then(|n| u32::try_from(n).ok()).map(Some).ok_or_else(|| wrong(name, "a whole number")),
    }
}

fn integer(text: &Value, name: &'static str) -> Result<u32, ConfigProblem> {
    optional_integer(text, name)?.ok_or_else(|| wrong(name, "there"))
}

fn boolean(text: &Value, name: &'static str) -> Result<Option<bool>, ConfigProblem> {
    match &text[name] {
        Value::Null => Ok(None),
        value => value.as_bool().map(Some).ok_or_else(|| wrong(name, "true or false")),
    }
}

fn wrong(field: &str, rule: &str) -> ConfigProblem {
    ConfigProblem(format!("{field} must be {rule}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn published() -> Value {
        json!({"model_type": "qwen3_moe", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
               "num_key_value_heads": 2, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
               "intermediate_size": 96, "norm_topk_prob": true, "rope_theta": 1_000_000.0, "rope_scaling": null,
               "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "decoder_sparse_step": 1, "mlp_only_layers": []})
    }

    fn parsed(change: impl FnOnce(&mut Value)) -> Result<ModelConfig, ConfigProblem> {
        let mut json = published();
        change(&mut json);
        parse_config(&json).map(|(config, _)| config)
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
        assert_eq!(parse_config(&omni), Ok((old.clone(), Family::Omni)));
        let thinker = json!({"model_type": "qwen3_omni_moe_thinker", "text_config": published()});
        assert_eq!(parse_config(&thinker), Ok((old, Family::Thinker)));
    }

    #[test]
    fn mixtral_has_its_own_words() {
        let mixtral = json!({"model_type": "mixtral", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
               "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 96,
               "rope_theta": 1e6, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "sliding_window": null});
        let (config, family) = parse_config(&mixtral).expect("valid");
        assert_eq!((family, config.moe_intermediate_size, config.head_dim, config.intermediate_size), (Family::Mixtral, 96, 16, 0));
        assert!(config.norm_topk_prob && !config.qk_norm);
        let mut windowed = mixtral;
        windowed["sliding_window"] = json!(4096);
        assert!(parse_config(&windowed).is_err());
    }

    #[test]
    fn dense_layers_come_from_list_and_step() {
        let dense = |change: fn(&mut Value)| parsed(change).map(|config| config.dense_layers);
        assert_eq!(dense(|_| {}), Ok(vec![]));
        assert_eq!(dense(|json| json["mlp_only_layers"] = json!([1])), Ok(vec![1]));
        assert_eq!(dense(|json| json["decoder_sparse_step"] = json!(2)), Ok(vec![0, 2]));
        assert!(dense(|json| json["decoder_sparse_step"] = json!(0)).is_err());
        assert!(dense(|json| json["mlp_only_layers"] = json!([4])).is_err());
    }

    #[test]
    fn refuses_what_it_does_not_implement() {
        let changes: [fn(&mut Value); 7] = [
            |json| json["model_type"] = json!("llama"),
            |json| json["hidden_act"] = json!("gelu"),
            |json| json["attention_bias"] = json!(true),
            |json| json["use_sliding_window"] = json!(true),
            |json| json["rope_scaling"] = json!({"rope_type": "yarn", "factor": 4.0}),
            |json| json["num_experts"] = json!(-1),
            |json| json["rms_norm_eps"] = json!("small"),
        ];
        for (i, change) in changes.into_iter().enumerate() {
            assert!(parsed(change).is_err(), "change {i}");
        }
    }

    #[test]
    fn greedy_unless_the_checkpoint_samples() {
        let generation = json!({"eos_token_id": [7, 9], "temperature": 0.6, "top_k": 20, "do_sample": false});
        let greedy = parse_generation(&json!({"eos_token_id": 1}), &generation);
        assert_eq!((greedy.temperature, greedy.top_k, greedy.eos_token_ids), (0.0, 0, vec![7, 9, 1]));
        let sampled = parse_generation(&json!({"eos_token_id": 1}), &json!({"do_sample": true, "temperature": 0.5, "stop_strings": "x"}));
        assert_eq!((sampled.temperature, sampled.eos_token_ids, sampled.stop_strings), (0.5, vec![1], vec!["x".to_owned()]));
    }
}
