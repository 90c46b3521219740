//! Reading the keys of a `config.json`: each is implemented, ignored for a reason, or refused by name.

use protocol::decoder::{Activation, FeedForward, Gqa, Head, Moe, Norm, QkNorm, QkvBias, Rope, Router, SharedExpert};
use protocol::plain_text::plain_line;
use serde_json::Value;

/// A key that is missing, of the wrong type, or of a value that this engine does not implement.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("config.json: {0}")]
pub struct ConfigProblem(pub String);

/// What becomes of a key.
#[derive(Clone, Copy, Debug)]
pub(super) enum Key {
    /// The family's code reads it.
    Read,
    /// It changes nothing that a model computes, or nothing with the other keys as they must be.
    Ignored(#[expect(dead_code, reason = "said to who reads the table")] &'static str),
    /// It switches something on that is not implemented: it must be off, that is `null`, `false`, 0 or empty.
    Off,
}

/// Keys by name, each once.
pub(super) type KeyTable = &'static [(&'static str, Key)];

/// Keys that any published configuration may have, whatever the model.
pub(super) const COMMON: KeyTable = &[
    ("_name_or_path", Key::Ignored("where it was made")),
    ("architectures", Key::Ignored("model_type says it")),
    ("attention_dropout", Key::Ignored("training")),
    ("auto_map", Key::Ignored("code of others is never run")),
    ("bos_token_id", Key::Ignored("the tokenizer and the template say it")),
    ("dtype", Key::Ignored("each tensor says its own")),
    ("eos_token_id", Key::Read), // by `generation`
    ("hidden_act", Key::Read),
    ("hidden_size", Key::Read),
    ("initializer_range", Key::Ignored("training")),
    ("max_position_embeddings", Key::Read),
    ("model_type", Key::Read),
    ("num_attention_heads", Key::Read),
    ("num_hidden_layers", Key::Read),
    ("num_key_value_heads", Key::Read),
    ("output_router_logits", Key::Ignored("what is returned, not what is computed")),
    ("pad_token_id", Key::Ignored("nothing is padded")),
    ("rms_norm_eps", Key::Read),
    ("rope_parameters", Key::Read),
    ("rope_scaling", Key::Read),
    ("rope_theta", Key::Read),
    ("router_aux_loss_coef", Key::Ignored("training")),
    ("tie_word_embeddings", Key::Read),
    ("time_step_limit", Key::Ignored("of Mamba layers, which no family here has")),
    ("tokenizer_class", Key::Ignored("the tokenizer's file says it")),
    ("torch_dtype", Key::Ignored("each tensor says its own")),
    ("transformers_version", Key::Ignored("who wrote it")),
    ("use_cache", Key::Ignored("keys and values are always kept")),
    ("vocab_size", Key::Read),
];

/// Keys that transformers 4 writes into every inner configuration: defaults of generation and of heads that no decoder has.
const LIBRARY_DEFAULTS: &[&str] = &[
    "add_cross_attention",
    "bad_words_ids",
    "begin_suppress_tokens",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "prefix",
    "problem_type",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "top_k",
    "top_p",
    "torchscript",
    "typical_p",
    "use_bfloat16",
];

/// Keys of `rope_scaling` and `rope_parameters`.
const ROPE: KeyTable = &[
    ("interleaved", Key::Read),
    ("mrope_interleaved", Key::Read),
    ("mrope_section", Key::Read),
    ("rope_theta", Key::Read),
    ("rope_type", Key::Read),
    ("type", Key::Read),
];

/// An object of a `config.json`.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a>(pub(super) &'a Value);

impl Keys<'_> {
    /// Refuses every key that is in none of the tables, unless it is off, and every one that must be off and is not.
    pub(super) fn check(self, own: KeyTable) -> Result<(), ConfigProblem> {
        self.check_against(&[own, COMMON])?;
        for group in ["rope_scaling", "rope_parameters"] {
            Keys(&self.0[group]).check_against(&[ROPE])?;
        }
        for field in ["rope_type", "type"] {
            for group in ["rope_scaling", "rope_parameters"] {
                match self.0[group][field].as_str() {
                    None | Some("default" | "mrope") => {}
                    Some(_) => return Err(not_implemented(&format!("{group}.{field}"), &self.0[group][field])),
                }
            }
        }
        Ok(())
    }

    /// The same with these tables alone.
    pub(super) fn check_against(self, tables: &[KeyTable]) -> Result<(), ConfigProblem> {
        for (name, value) in self.0.as_object().into_iter().flatten() {
            let known = tables.iter().flat_map(|table| table.iter()).find(|(known, _)| known == name).map(|(_, key)| *key);
            let passes = match known {
                Some(Key::Read | Key::Ignored(_)) => true,
                Some(Key::Off) => is_off(value),
                None => is_off(value) || LIBRARY_DEFAULTS.contains(&name.as_str()),
            };
            if !passes {
                return Err(not_implemented(name, value));
            }
        }
        Ok(())
    }

    pub(super) fn optional_integer(self, name: &str) -> Result<Option<u32>, ConfigProblem> {
        match &self.0[name] {
            Value::Null => Ok(None),
            value => value.as_u64().and_then(|n| u32::try_from(n).ok()).map(Some).ok_or_else(|| wrong(name, "a whole number")),
        }
    }

    pub(super) fn integer(self, name: &str) -> Result<u32, ConfigProblem> {
        self.optional_integer(name)?.ok_or_else(|| wrong(name, "there"))
    }

    pub(super) fn number(self, name: &str) -> Result<f64, ConfigProblem> {
        self.0[name].as_f64().ok_or_else(|| wrong(name, "a number"))
    }

    pub(super) fn boolean(self, name: &str) -> Result<Option<bool>, ConfigProblem> {
        match &self.0[name] {
            Value::Null => Ok(None),
            value => value.as_bool().map(Some).ok_or_else(|| wrong(name, "true or false")),
        }
    }

    /// A list of whole numbers.
    pub(super) fn list(self, name: &str) -> Result<Vec<u32>, ConfigProblem> {
        let number = |value: &Value| value.as_u64().and_then(|n| u32::try_from(n).ok());
        let list = self.0[name].as_array().and_then(|list| list.iter().map(number).collect());
        list.ok_or_else(|| wrong(name, "a list of whole numbers"))
    }

    /// Refuses a key that says something else than `value`, and one that is absent.
    pub(super) fn must_be(self, name: &str, value: &str) -> Result<(), ConfigProblem> {
        if self.0[name] == value { Ok(()) } else { Err(not_implemented(name, &self.0[name])) }
    }

    /// The norm of all layers.
    pub(super) fn norm(self) -> Result<Norm, ConfigProblem> {
        Ok(Norm::Rms { eps: self.number("rms_norm_eps")? })
    }

    /// What networks do inside: SiLU, unless something else is named, which is refused.
    pub(super) fn activation(self) -> Result<Activation, ConfigProblem> {
        match self.0["hidden_act"].as_str() {
            None | Some("silu") => Ok(Activation::SwiGlu),
            Some(_) => Err(not_implemented("hidden_act", &self.0["hidden_act"])),
        }
    }

    /// The head; one of its own unless it is tied.
    pub(super) fn head(self) -> Result<Head, ConfigProblem> {
        Ok(if self.boolean("tie_word_embeddings")?.unwrap_or(false) { Head::Embedding } else { Head::Own })
    }

    /// Attention with the usual keys.
    pub(super) fn attention(self, qk_norm: QkNorm, bias: QkvBias) -> Result<Gqa, ConfigProblem> {
        let heads = self.integer("num_attention_heads")?;
        let head_dim = match self.optional_integer("head_dim")? {
            Some(head_dim) => head_dim,
            None => self.integer("hidden_size")?.checked_div(heads).unwrap_or(0),
        };
        let kv_heads = self.optional_integer("num_key_value_heads")?.unwrap_or(heads);
        Ok(Gqa { heads, kv_heads, head_dim, rope: self.rope()?, qk_norm, bias })
    }

    /// The experts of a layer: `num_experts`, or `num_local_experts` as Mixtral and transformers 5 have it.
    pub(super) fn experts(self) -> Result<u32, ConfigProblem> {
        match self.optional_integer("num_experts")? {
            Some(count) => Ok(count),
            None => self.integer("num_local_experts"),
        }
    }

    /// Routed experts behind softmax; `width` is the key of the length of the vectors inside one.
    pub(super) fn moe(self, width: &str, normalise: bool, shared: SharedExpert) -> Result<FeedForward, ConfigProblem> {
        Ok(FeedForward::Moe(Moe {
            experts: self.experts()?,
            per_token: self.integer("num_experts_per_tok")?,
            width: self.integer(width)?,
            activation: self.activation()?,
            router: Router::Softmax { normalise },
            shared,
        }))
    }

    /// Whether the weights of the chosen experts are scaled to sum to 1; not unless it says so.
    pub(super) fn normalises(self) -> Result<bool, ConfigProblem> {
        Ok(self.boolean("norm_topk_prob")?.unwrap_or(false))
    }

    /// The feed-forward half of each layer where some are dense: those that `mlp_only_layers` lists, and those that `decoder_sparse_step`
    /// passes over.
    pub(super) fn sparse_or_dense(self, sparse: &FeedForward) -> Result<Vec<FeedForward>, ConfigProblem> {
        // A model of more layers than the limit is refused by its decoder; do not list them here first.
        let layers = self.integer("num_hidden_layers")?.min(protocol::decoder::LAYERS_MAX + 1);
        let step = self.optional_integer("decoder_sparse_step")?.unwrap_or(1);
        if step == 0 {
            return Err(wrong("decoder_sparse_step", "1 or more"));
        }
        let listed = match &self.0["mlp_only_layers"] {
            Value::Null => Vec::new(),
            value => {
                let listed = value.as_array().map(|list| list.iter().map(Value::as_u64).collect::<Option<Vec<_>>>());
                listed.flatten().ok_or_else(|| wrong("mlp_only_layers", "a list of layers"))?
            }
        };
        if let Some(layer) = listed.iter().find(|&&layer| layer >= u64::from(layers)) {
            return Err(ConfigProblem(format!("mlp_only_layers names layer {layer} of {layers}")));
        }
        let is_dense = |layer: u32| listed.contains(&u64::from(layer)) || !(layer + 1).is_multiple_of(step);
        let dense = if (0..layers).any(is_dense) {
            Some(FeedForward::Dense { width: self.integer("intermediate_size")?, activation: self.activation()? })
        } else {
            None
        };
        Ok((0..layers).map(|layer| dense.as_ref().filter(|_| is_dense(layer)).unwrap_or(sparse).clone()).collect())
    }

    /// RoPE's settings stand in `rope_parameters` (transformers 5), or in `rope_scaling` and beside it.
    pub(super) fn rope(self) -> Result<Rope, ConfigProblem> {
        let field = |name: &str| {
            [&self.0["rope_parameters"][name], &self.0["rope_scaling"][name], &self.0[name]].into_iter().find(|value| !value.is_null())
        };
        let base = field("rope_theta").and_then(Value::as_f64).ok_or_else(|| wrong("rope_theta", "a number"))?;
        let Some(value) = field("mrope_section") else { return Ok(Rope::Plain { base }) };
        let numbers: Option<Vec<u32>> =
            value.as_array().and_then(|list| list.iter().map(|n| n.as_u64().and_then(|n| u32::try_from(n).ok())).collect());
        let sections = numbers.and_then(|numbers| <[u32; 3]>::try_from(numbers).ok());
        sections.map(|sections| Rope::Interleaved { base, sections }).ok_or_else(|| wrong("mrope_section", "three counts"))
    }
}

fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) => false,
    }
}

pub(super) fn not_implemented(name: &str, value: &Value) -> ConfigProblem {
    ConfigProblem(plain_line(&format!("{name} is {value}, which this engine does not implement")))
}

pub(super) fn wrong(field: &str, rule: &str) -> ConfigProblem {
    ConfigProblem(format!("{field} must be {rule}"))
}
