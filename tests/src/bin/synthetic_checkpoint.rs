//! Writes a checkpoint of random weights with the layer shapes of Qwen3-30B-A3B, as large as wanted, to measure imports with.
//!
//! `synthetic_checkpoint OUT [--layers 4] [--experts 128] [--vocab 32000] [--hidden 2048]`: one shard a layer, bf16, no tokenizer. A smaller
//! hidden size makes all else smaller with it: models of many experts and few bytes.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

struct Options {
    out: String,
    layers: usize,
    experts: usize,
    vocab: usize,
    hidden: usize,
}

impl Options {
    fn heads(&self) -> usize {
        (self.hidden / 64).max(1)
    }

    fn kv_heads(&self) -> usize {
        (self.heads() / 8).max(1)
    }

    fn head_dim(&self) -> usize {
        self.hidden.min(128)
    }

    fn intermediate(&self) -> usize {
        self.hidden * 3 / 8
    }
}

fn main() -> io::Result<()> {
    let options = parse(std::env::args().skip(1))
        .ok_or_else(|| io::Error::other("usage: synthetic_checkpoint OUT [--layers N] [--experts N] [--vocab N] [--hidden N]"))?;
    let out = Path::new(&options.out);
    fs::create_dir_all(out)?;
    let mut weight_map = Vec::new();
    let mut random = Random(1);
    let top = vec![
        ("model.embed_tokens.weight".to_owned(), vec![options.vocab, options.hidden]),
        ("lm_head.weight".to_owned(), vec![options.vocab, options.hidden]),
        ("model.norm.weight".to_owned(), vec![options.hidden]),
    ];
    shard(out, "model-top.safetensors", &top, &mut random, &mut weight_map)?;
    for layer in 0..options.layers {
        shard(out, &format!("model-{layer:05}.safetensors"), &layer_tensors(layer, &options), &mut random, &mut weight_map)?;
    }
    fs::write(out.join("model.safetensors.index.json"), format!("{{\"metadata\":{{}},\"weight_map\":{{{}}}}}", weight_map.join(",")))?;
    fs::write(out.join("config.json"), config(&options))
}

fn parse(mut args: impl Iterator<Item = String>) -> Option<Options> {
    let mut options = Options { out: args.next()?, layers: 4, experts: 128, vocab: 32_000, hidden: 2048 };
    while let Some(flag) = args.next() {
        let value = args.next()?.parse().ok()?;
        match flag.as_str() {
            "--layers" => options.layers = value,
            "--experts" => options.experts = value,
            "--vocab" => options.vocab = value,
            "--hidden" if value % 8 == 0 && value > 0 => options.hidden = value,
            _ => return None,
        }
    }
    Some(options)
}

fn layer_tensors(layer: usize, options: &Options) -> Vec<(String, Vec<usize>)> {
    let (hidden, intermediate, head_dim) = (options.hidden, options.intermediate(), options.head_dim());
    let (query, key) = (options.heads() * head_dim, options.kv_heads() * head_dim);
    let mut tensors = Vec::new();
    let mut push = |name: &str, shape: &[usize]| tensors.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec()));
    push("input_layernorm", &[hidden]);
    push("post_attention_layernorm", &[hidden]);
    push("self_attn.q_proj", &[query, hidden]);
    push("self_attn.k_proj", &[key, hidden]);
    push("self_attn.v_proj", &[key, hidden]);
    push("self_attn.o_proj", &[hidden, query]);
    push("self_attn.q_norm", &[head_dim]);
    push("self_attn.k_norm", &[head_dim]);
    push("mlp.gate", &[options.experts, hidden]);
    for expert in 0..options.experts {
        push(&format!("mlp.experts.{expert}.gate_proj"), &[intermediate, hidden]);
        push(&format!("mlp.experts.{expert}.up_proj"), &[intermediate, hidden]);
        push(&format!("mlp.experts.{expert}.down_proj"), &[hidden, intermediate]);
    }
    tensors
}

fn shard(out: &Path, name: &str, tensors: &[(String, Vec<usize>)], random: &mut Random, weight_map: &mut Vec<String>) -> io::Result<()> {
    let mut entries = Vec::new();
    let mut end = 0;
    for (tensor, shape) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        entries.push(format!("\"{tensor}\":{{\"dtype\":\"BF16\",\"shape\":{shape:?},\"data_offsets\":[{start},{end}]}}"));
        weight_map.push(format!("\"{tensor}\":\"{name}\""));
    }
    let header = format!("{{{}}}", entries.join(","));
    let mut file = BufWriter::with_capacity(1 << 20, File::create(out.join(name))?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    for _ in 0..end / 8 {
        file.write_all(&random.four_weights())?;
    }
    file.flush()
}

/// Xorshift (Marsaglia 2003).
struct Random(u64);

impl Random {
    /// Four bf16 numbers of either sign, magnitudes from 2⁻⁹ to 2⁻⁵.
    fn four_weights(&mut self) -> [u8; 8] {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let sign_exponent_low_bits_and_mantissa = self.0 & 0x81ff_81ff_81ff_81ff;
        (sign_exponent_low_bits_and_mantissa | 0x3b00_3b00_3b00_3b00).to_le_bytes()
    }
}

fn config(options: &Options) -> String {
    let Options { layers, experts, vocab, hidden, .. } = options;
    let (heads, kv_heads, head_dim, intermediate) = (options.heads(), options.kv_heads(), options.head_dim(), options.intermediate());
    format!(
        "{{\"architectures\":[\"Qwen3MoeForCausalLM\"],\"model_type\":\"qwen3_moe\",\"vocab_size\":{vocab},\"hidden_size\":{hidden},
\"num_hidden_layers\":{layers},\"num_attention_heads\":{heads},\"num_key_value_heads\":{kv_heads},\"head_dim\":{head_dim},
\"num_experts\":{experts},\"num_experts_per_tok\":8,\"moe_intermediate_size\":{intermediate},\"norm_topk_prob\":true,
\"rope_theta\":1000000.0,\"rms_norm_eps\":1e-6,\"tie_word_embeddings\":false,\"max_position_embeddings\":40960,\"hidden_act\":\"silu\"}}\n"
    )
}
