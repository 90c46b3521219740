"""Writes weights that train.py saved as a checkpoint in the layout Qwen3-Omni publishes (thinker only), for transformers and for Confrere.

    python export.py --weights WORK/checkpoint-60000000.pt --config WORK/config.json --tokenizer CACHE/tokenizer --out DIR [--shards 4]

bf16 tensors named thinker.*, each expert by itself, in shards with an index; config.json, generation_config.json, preprocessor_config.json,
video_preprocessor_config.json; vocab.json, merges.txt, tokenizer_config.json, chat_template.json. WORK/state.pt is accepted, too.
Afterwards transformers loads what was written, and every tensor is compared.
"""
import argparse, json, pathlib, shutil

import torch

import media, model, tokenizer


def published(weights, experts, size):
    """Names and tensors as published: `thinker.` in front, no `language_model`, gate and up projections of each expert apart."""
    out = {}
    for name, t in weights.items():
        name = "thinker." + name.replace("model.visual.", "visual.").replace("model.audio_tower.", "audio_tower.").replace("model.language_model.", "model.")
        t = t.to(torch.bfloat16)
        if name.endswith("experts.gate_up_proj"):
            for e in range(experts):
                out[name.replace("gate_up_proj", f"{e}.gate_proj.weight")], out[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = t[e].split(size)
        elif name.endswith("experts.down_proj"):
            for e in range(experts):
                out[name.replace("down_proj", f"{e}.down_proj.weight")] = t[e]
        else:
            out[name] = t
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("weights", "config", "tokenizer", "out"):
        parser.add_argument("--" + name, type=pathlib.Path, required=True)
    parser.add_argument("--shards", type=int, default=4)
    args = parser.parse_args()
    from safetensors.torch import save_file
    thinker, tok = json.loads(args.config.read_text()), tokenizer.load(args.tokenizer)
    weights = torch.load(args.weights, weights_only=True)
    weights = weights.get("model", weights)
    text = thinker["text_config"]
    tensors = published(weights, text["num_experts"], text["moe_intermediate_size"])
    args.out.mkdir(parents=True, exist_ok=True)
    total = sum(t.nbytes for t in tensors.values())
    shards, size = [{}], 0
    for name, t in tensors.items():
        if size > total / args.shards * len(shards) and len(shards) < args.shards:
            shards.append({})
        shards[-1][name] = t.contiguous().clone()
        size += t.nbytes
    index = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, args.out / name, metadata={"format": "pt"})
        (args.out / name).chmod(0o644)
        index |= {t: name for t in shard}
    write = lambda name, value: (args.out / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    write("model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))})
    s = model.special_ids(tok)
    write("config.json", dict(
        architectures=["Qwen3OmniMoeForConditionalGeneration"], model_type="qwen3_omni_moe", dtype="bfloat16", enable_audio_output=False, im_start_token_id=s["<|im_start|>"],
        im_end_token_id=s["<|im_end|>"], system_token_id=s["system"], user_token_id=s["user"], assistant_token_id=s["assistant"], tts_pad_token_id=s["<tts_pad>"],
        tts_bos_token_id=s["<tts_text_bos>"], tts_eos_token_id=s["<tts_text_eod>"], thinker_config=thinker))
    write("generation_config.json", dict(bos_token_id=s["<|endoftext|>"], eos_token_id=[s["<|im_end|>"], s["<|endoftext|>"]], pad_token_id=s["<|endoftext|>"], do_sample=True, temperature=0.7, top_k=20, top_p=0.9))
    pictures = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, patch_size=16, temporal_patch_size=2, merge_size=2)
    write("preprocessor_config.json", dict(
        feature_extractor_type="WhisperFeatureExtractor", feature_size=128, sampling_rate=16000, hop_length=160, n_fft=400, chunk_length=300, n_samples=4800000, nb_max_frames=30000,
        padding_side="right", padding_value=0.0, dither=0.0, return_attention_mask=True, image_processor_type="Qwen2VLImageProcessor", **pictures, min_pixels=3136, max_pixels=12845056,
        processor_class="Qwen3OmniMoeProcessor"))
    low, high = media.VIDEO_PIXELS["low"], media.VIDEO_PIXELS["high"]
    write("video_preprocessor_config.json", dict(video_processor_type="Qwen2VLVideoProcessor", **pictures, min_pixels=low, max_pixels=high, size=dict(shortest_edge=low, longest_edge=high),
                                                 processor_class="Qwen3OmniMoeProcessor"))
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "chat_template.json"):
        shutil.copy(args.tokenizer / name, args.out / name)
    print(f"{len(tensors)} tensors, {total // 2} parameters, {total} bytes in {len(shards)} shards")
    loaded = model.modeling.Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(args.out, dtype=torch.bfloat16).state_dict()
    different = [n for n, t in weights.items() if not torch.equal(loaded[n], t.to(torch.bfloat16))]
    assert not different and set(loaded) == set(weights), different
    print("transformers reads back every tensor")


if __name__ == "__main__":
    main()
