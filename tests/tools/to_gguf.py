#!/usr/bin/env python3
"""Writes a model of Confrere at q4 or q8 as a GGUF file of llama.cpp with the same numbers.

Our q4 and its Q4_0, our q8 and its Q8_0, hold the same weights with the same scales in another order: nothing is rounded, so both
programs compute with one model. Routers and norms are widened to f32. The vocabulary is made up (256 bytes and fillers).

usage: to_gguf.py CONFRERE DATA_DIR MODEL OUT.gguf          (needs numpy and gguf from PyPI)
"""
import json
import subprocess
import sys

import gguf
import numpy as np

confrere, data_dir, model, out = sys.argv[1:5]
about = json.loads(subprocess.run([confrere, "--data-dir", data_dir, "--json", "show", model, "--blobs"], check=True, capture_output=True).stdout)
config = about["config"]
blobs = {blob["name"]: blob for blob in about["blobs"]}
H, I = config["hidden_size"], config["moe_intermediate_size"]
Q, KV = config["num_attention_heads"] * config["head_dim"], config["num_key_value_heads"] * config["head_dim"]
E, V = config["num_experts"], config["vocab_size"]
TYPES = {"q4": gguf.GGMLQuantizationType.Q4_0, "q8": gguf.GGMLQuantizationType.Q8_0}
BLOCK = {"q4": 288, "q8": 544}


def blob(name):
    hash = blobs[name]["hash"].removeprefix("b3:")
    return np.fromfile(f"{data_dir}/store/blobs/{hash[:2]}/{hash}", np.uint8), blobs[name]["precision"]


def unpack(plane, precision, rows, columns):
    """Panels of 16 rows, columns interleaved by 4, as rows of blocks of 32 columns."""
    panels, groups = rows // 16, columns // 32
    blocks = plane.reshape(panels, groups, BLOCK[precision])
    scales = blocks[:, :, :32].reshape(panels, groups, 16, 2)
    quads = (BLOCK[precision] - 32) // 64
    weights = blocks[:, :, 32:].reshape(panels, groups, quads, 16, 4).transpose(0, 1, 3, 2, 4).reshape(panels, groups, 16, quads * 4)
    if precision == "q8":
        weights = weights ^ 0x80
    both = np.concatenate([scales, weights], axis=3)
    return np.ascontiguousarray(both.transpose(0, 2, 1, 3)).reshape(rows, groups * (2 + quads * 4))


def plane_bytes(precision, rows, columns):
    return rows // 16 * (columns // 32) * BLOCK[precision]


def trunk(name, shape):
    data, precision = blob(name)
    if precision in BLOCK:
        return unpack(data, precision, *shape), TYPES[precision]
    if precision == "f32":
        values = data.view(np.float32)
    elif precision == "f16":
        values = data.view(np.float16).astype(np.float32)
    else:
        values = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.reshape(shape), None


def experts(layer, part):
    precision = about["precision"]
    planes, start = [], 64
    for rows, columns in ((I, H), (I, H), (H, I)):
        planes.append((start, start + plane_bytes(precision, rows, columns), rows, columns))
        start = -(-planes[-1][1] // 64) * 64
    start, end, rows, columns = planes[part]
    each = [unpack(blob(f"layer {layer} expert {e}")[0][start:end], precision, rows, columns) for e in range(E)]
    return np.stack(each), TYPES[precision]


tensors = [
    ("token_embd.weight", lambda: trunk("model.embed_tokens.weight", (V, H))),
    ("output_norm.weight", lambda: trunk("model.norm.weight", (H,))),
]
if "lm_head.weight" in blobs:
    tensors.append(("output.weight", lambda: trunk("lm_head.weight", (V, H))))
for layer in range(config["num_hidden_layers"]):
    for theirs, ours, shape in (
        ("attn_norm", "input_layernorm", (H,)),
        ("ffn_norm", "post_attention_layernorm", (H,)),
        ("attn_q", "self_attn.q_proj", (Q, H)),
        ("attn_k", "self_attn.k_proj", (KV, H)),
        ("attn_v", "self_attn.v_proj", (KV, H)),
        ("attn_output", "self_attn.o_proj", (H, Q)),
        ("attn_q_norm", "self_attn.q_norm", (config["head_dim"],)),
        ("attn_k_norm", "self_attn.k_norm", (config["head_dim"],)),
        ("ffn_gate_inp", "mlp.gate", (E, H)),
    ):
        name = f"model.layers.{layer}.{ours}.weight"
        tensors.append((f"blk.{layer}.{theirs}.weight", lambda name=name, shape=shape: trunk(name, shape)))
    for part, theirs in enumerate(("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")):
        tensors.append((f"blk.{layer}.{theirs}.weight", lambda layer=layer, part=part: experts(layer, part)))

w = gguf.GGUFWriter(out, "qwen3moe")
w.add_name(about["name"])
w.add_block_count(config["num_hidden_layers"])
w.add_context_length(config["max_position_embeddings"])
w.add_embedding_length(H)
w.add_feed_forward_length(3 * H)
w.add_head_count(config["num_attention_heads"])
w.add_head_count_kv(config["num_key_value_heads"])
w.add_key_length(config["head_dim"])
w.add_value_length(config["head_dim"])
w.add_layer_norm_rms_eps(config["rms_norm_eps"])
w.add_rope_freq_base(config["rope_theta"])
w.add_expert_count(E)
w.add_expert_used_count(config["num_experts_per_tok"])
w.add_expert_feed_forward_length(I)
w.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0 if about["precision"] == "q4" else gguf.LlamaFileType.MOSTLY_Q8_0)
w.add_vocab_size(V)
printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
others = [byte for byte in range(256) if byte not in printable]
symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
w.add_tokenizer_model("gpt2")
w.add_tokenizer_pre("qwen2")
w.add_token_list(symbols + [f"<|{i}|>" for i in range(256, V)])
w.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * (V - 256))
w.add_token_merges(["a b"])
w.add_bos_token_id(256)
w.add_eos_token_id(257)
w.add_add_bos_token(False)

# Sizes first, then the tensors one by one: memory stays below that of one tensor.
precision = about["precision"]
for name, make in tensors:
    if "_exps" in name:
        rows, columns = (H, I) if "down" in name else (I, H)
        stored = (E, rows, plane_bytes(precision, rows, columns) // rows)
        w.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=TYPES[precision])
    else:
        array, raw = make()
        w.add_tensor_info(name, array.shape, array.dtype, array.nbytes, raw_dtype=raw)
w.write_header_to_file()
w.write_kv_data_to_file()
w.write_ti_data_to_file()
for name, make in tensors:
    w.write_tensor_data(make()[0])
w.close()
