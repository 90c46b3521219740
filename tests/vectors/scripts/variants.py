"""Builds very small Qwen3-MoE checkpoints that differ in one respect each, and what transformers computes from them.

usage: variants.py VECTORS_DIR      (made with transformers 4.57.6, torch 2.9.1, on the CPU)

Reads   VECTORS_DIR/checkpoints/tiny-qwen3-moe-bf16 and VECTORS_DIR/reference/moe_text.safetensors.
Writes  VECTORS_DIR/checkpoints/variant-* and VECTORS_DIR/reference/{variant-*,moe_text_bf16}.safetensors.

The names in a reference file are those of moe_text: input_ids (1,T), hidden.{i} (0 is the embedding, the last one is
after the final norm), router.{i} logits of the i-th layer that has experts, logits, greedy (prompt and what follows).
"""
import hashlib
import json
import math
import os
import shutil
import sys

import numpy as np
import torch

torch.cuda.is_current_stream_capturing = lambda: False
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

PROMPT_TOKENS = 16
NEW_TOKENS = 12
ROUTER_GAP_MIN = 2e-5  # smallest gap between the k-th and the next router probability
GREEDY_MARGIN_MIN = 1e-3  # smallest gap between the best and the next logit when choosing a token

BASE = dict(
    vocab_size=96, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2,
    norm_topk_prob=True, rope_theta=1e6, rms_norm_eps=1e-6, max_position_embeddings=512, tie_word_embeddings=False,
    decoder_sparse_step=1, mlp_only_layers=[], attention_bias=False, bos_token_id=1, eos_token_id=2,
)

# name: (what differs from BASE, type of the saved weights, largest shard, seed of weights and prompt).
# The seeds were picked for margins well above the two minima and for greedy tokens that do not just repeat.
VARIANTS = {
    "variant-dense": (dict(mlp_only_layers=[1]), torch.float32, "70KB", 17),
    "variant-sparse-step": (dict(decoder_sparse_step=2, num_hidden_layers=4, num_experts=6), torch.float32, "90KB", 24),
    "variant-tied": (dict(tie_word_embeddings=True, rope_theta=5e4), torch.float32, "70KB", 21),
    "variant-no-renorm": (dict(norm_topk_prob=False, num_experts=6, num_experts_per_tok=3), torch.float32, "90KB", 30),
    "variant-f16": (dict(num_experts=5), torch.float16, "40KB", 51),
    "variant-faint": (dict(), torch.float32, "70KB", 21),
}
FAINT = 1e-3  # scale of variant-faint's embeddings: their mean square is that of the norms' epsilon, which then shows


def reinit(model, seed):
    """Gives each weight noise from its own name, as make_tiny.py does: O(1) activations, separated router logits.

    A tied embedding is scaled as a projection, so that the logits stay O(1).
    """
    tied = model.config.tie_word_embeddings
    loudness = FAINT if seed.startswith("variant-faint:") else 1.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
            noise = generator.standard_normal(weight.shape, dtype=np.float32)
            if weight.ndim == 1:
                value = 1.0 + 0.1 * noise  # norms
            elif "embed" in name and not tied:
                value = noise * loudness
            elif name.endswith("mlp.gate.weight"):
                value = 2.5 * noise / math.sqrt(weight.shape[1])  # router
            else:
                value = noise / math.sqrt(weight.shape[1])
            weight.copy_(torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32)))


def moe_layers(config):
    """Lists the layers that have experts."""
    return [
        i for i in range(config.num_hidden_layers)
        if i not in config.mlp_only_layers and config.num_experts > 0 and (i + 1) % config.decoder_sparse_step == 0
    ]


def forward(model, ids):
    """Returns the outputs of the model and the router logits of each layer that has experts."""
    routers = []
    hooks = [
        model.model.layers[i].mlp.gate.register_forward_hook(lambda module, args, result: routers.append(result.detach()))
        for i in moe_layers(model.config)
    ]
    with torch.no_grad():
        outputs = model(ids, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return outputs, routers


def check_margins(model, prompt_tokens, greedy):
    """Asserts that no choice of an expert or a token is close, over the prompt and what was generated after it."""
    outputs, routers = forward(model, greedy)
    k = model.config.num_experts_per_tok
    probabilities = torch.softmax(torch.cat(routers).double(), -1).sort(-1, descending=True)[0]
    router_gap = float((probabilities[:, k - 1] - probabilities[:, k]).min())
    choosing = outputs.logits[0, prompt_tokens - 1:-1]
    best = choosing.topk(2, -1)
    greedy_margin = float((best.values[:, 0] - best.values[:, 1]).min())
    assert torch.equal(best.indices[:, 0], greedy[0, prompt_tokens:]), "generation differs from one forward pass"
    assert greedy.min() > model.config.eos_token_id, "an end of text inside"
    assert router_gap > ROUTER_GAP_MIN, f"router gap {router_gap}: take another seed"
    assert greedy_margin > GREEDY_MARGIN_MIN, f"greedy margin {greedy_margin}: take another seed"
    return router_gap, greedy_margin


def write_reference(checkpoint, ids, new_tokens, path):
    """Computes a checkpoint in f32 and writes what came out."""
    model = Qwen3MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    outputs, routers = forward(model, ids)
    with torch.no_grad():
        greedy = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None)
    router_gap, greedy_margin = check_margins(model, ids.shape[1], greedy)
    tensors = {"input_ids": ids, "logits": outputs.logits, "greedy": greedy}
    tensors |= {f"hidden.{i}": hidden for i, hidden in enumerate(outputs.hidden_states)}
    tensors |= {f"router.{i}": router for i, router in enumerate(routers)}
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, path)
    print(f"{os.path.basename(path):34s} router gap {router_gap:.1e}  greedy margin {greedy_margin:.1e}  "
          f"logit std {float(outputs.logits.std()):.2f}  greedy {greedy[0, ids.shape[1]:].tolist()}")


def build_variant(name, vectors):
    """Writes one checkpoint in transformers 4's layout (a name per expert) and its reference."""
    changes, dtype, max_shard_size, seed = VARIANTS[name]
    checkpoint = f"{vectors}/checkpoints/{name}"
    shutil.rmtree(checkpoint, ignore_errors=True)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**BASE | changes)).eval()
    reinit(model, f"{name}:{seed}")
    model.to(dtype).save_pretrained(checkpoint, max_shard_size=max_shard_size)
    shards = [file for file in os.listdir(checkpoint) if file.endswith(".safetensors")]
    assert 2 <= len(shards) <= 3, f"{name} has {len(shards)} shards"
    prompt = np.random.default_rng([7, seed]).integers(3, 90, (1, PROMPT_TOKENS))
    write_reference(checkpoint, torch.from_numpy(prompt), NEW_TOKENS, f"{vectors}/reference/{name}.safetensors")


def load_shards(checkpoint):
    """Reads all tensors of a sharded checkpoint."""
    tensors = {}
    for file in sorted(os.listdir(checkpoint)):
        if file.endswith(".safetensors"):
            tensors |= load_file(f"{checkpoint}/{file}")
    return tensors


def build_fused(source, target):
    """Rewrites a checkpoint as transformers 5 does when it keeps its own layout: experts fused into 3-D tensors.

    One unsharded file; the config has rope_parameters, and num_local_experts instead of num_experts.
    """
    shutil.rmtree(target, ignore_errors=True)
    os.makedirs(target)
    with open(f"{source}/config.json") as file:
        config = json.load(file)
    tensors = load_shards(source)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate_up, down = [], []
        for expert in range(config["num_experts"]):
            gate, up, out = (tensors.pop(f"{prefix}.{expert}.{part}.weight") for part in ("gate_proj", "up_proj", "down_proj"))
            gate_up.append(torch.cat([gate, up]))  # gate rows first
            down.append(out)
        tensors[f"{prefix}.gate_up_proj"] = torch.stack(gate_up)
        tensors[f"{prefix}.down_proj"] = torch.stack(down)
    save_file(tensors, f"{target}/model.safetensors", metadata={"format": "pt"})

    assert config.pop("rope_scaling") is None
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    config["num_local_experts"] = config.pop("num_experts")
    config["pad_token_id"] = None
    config["transformers_version"] = "5.23.0"
    assert config["dtype"] == "float32"
    with open(f"{target}/config.json", "w") as file:
        file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")
    shutil.copy(f"{source}/generation_config.json", f"{target}/generation_config.json")


def check_fused(source, target):
    """Asserts that the fused checkpoint holds the weights of the other one, tensor by tensor."""
    expected = load_shards(source)
    with safe_open(f"{target}/model.safetensors", "pt") as fused:
        names = set(fused.keys())
        for name, weight in expected.items():
            if ".experts." not in name:
                found = fused.get_tensor(name)
                names.discard(name)
            else:
                prefix, expert, part, _ = name.rsplit(".", 3)
                fused_name = f"{prefix}.{'down_proj' if part == 'down_proj' else 'gate_up_proj'}"
                found = fused.get_tensor(fused_name)[int(expert)]
                names.discard(fused_name)
                if part != "down_proj":
                    found = found.chunk(2)[part == "up_proj"]
            assert torch.equal(found, weight), name
    assert not names, names


def main():
    vectors = sys.argv[1]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name in VARIANTS:
        build_variant(name, vectors)
    tied, fused = f"{vectors}/checkpoints/variant-tied", f"{vectors}/checkpoints/variant-fused"
    build_fused(tied, fused)
    check_fused(tied, fused)
    text = load_file(f"{vectors}/reference/moe_text.safetensors")
    write_reference(f"{vectors}/checkpoints/tiny-qwen3-moe-bf16", text["input_ids"],
                    text["greedy"].shape[1] - text["input_ids"].shape[1], f"{vectors}/reference/moe_text_bf16.safetensors")


if __name__ == "__main__":
    main()
