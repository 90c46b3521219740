"""Proves that the fast forward of model.py is transformers' own: on samples of every task, logits, position ids, loss and gradients agree.

    python check.py --cache CACHE --fonts DIR [--weights FILE]

Everything in f32. Transformers runs each sample alone, from token ids and media, and computes positions itself. Also compares
the picture and sound preprocessing of media.py with transformers' processors.
"""
import argparse, pathlib

import numpy as np
import torch

import data, media, model, tasks, tokenizer


def theirs(thinker, tok, sample, encoded):
    """Logits of transformers' own forward on one sample, and the position ids it computed."""
    ids = torch.from_numpy(encoded["ids"])[None]
    kinds = [p[0] for p in sample["parts"] if not isinstance(p, str)]
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    if encoded["patches"]:
        pixels = (torch.from_numpy(np.concatenate(encoded["patches"])).float() - 127.5) / 127.5
        grids = torch.tensor(encoded["grids"])
        video = any(k.startswith("video") for k in kinds)
        inputs |= dict(pixel_values_videos=pixels, video_grid_thw=grids) if video else dict(pixel_values=pixels, image_grid_thw=grids)
        if video:
            inputs["video_second_per_grid"] = torch.tensor([2 / p[2] for p in sample["parts"] if p[0].startswith("video")])
            inputs["use_audio_in_video"] = "video_with_sound" in kinds
    if encoded["mels"]:
        mel = torch.from_numpy(encoded["mels"][0])[None]
        inputs |= dict(input_features=mel, feature_attention_mask=torch.ones(1, mel.shape[2], dtype=torch.long))
    seen = []
    hook = thinker.model.language_model.rotary_emb.register_forward_hook(lambda m, a, r: seen.append(a[1][:, 0].float()))
    out = thinker(**inputs)
    hook.remove()
    return out.logits[0], seen[0].expand(3, -1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=pathlib.Path, required=True)
    parser.add_argument("--fonts", type=pathlib.Path, required=True)
    parser.add_argument("--weights", type=pathlib.Path, help="a state dict saved by train.py; without it, fresh weights")
    args = parser.parse_args()
    tok, store = tokenizer.load(args.cache / "tokenizer"), tasks.Store(args.cache, args.fonts)
    thinker = model.build(model.thinker_config(model.special_ids(tok))).eval()
    if args.weights:
        thinker.load_state_dict({k: v.float() for k, v in torch.load(args.weights, weights_only=True).items()})
    print(f"{model.parameters(thinker) / 1e6:.2f} M parameters")
    rng = np.random.default_rng(5)
    drawn = [tasks.draw(store, t, "train", rng) for t in tasks.TASKS]
    encoded = [data.encode(tok, s) for s in drawn]
    window = np.asarray(store.text["stories"][:201])
    batch = data.tensors(data.pack(encoded + [data.plain(window)]))
    with model.fast():
        x = model.hidden_states(thinker, batch)
    ours = (x @ thinker.lm_head.weight.T).detach().split(list(batch["lengths"]))
    worst = 0.0
    for s, e, mine in zip(drawn, encoded, ours):
        with torch.no_grad():
            logits, positions = theirs(thinker, tok, s, e)
        error, shift = (logits - mine).abs().max().item(), (positions - torch.from_numpy(e["positions"])).abs().max().item()
        worst = max(worst, error)
        print(f"{s['task']:22} {len(e['ids']):4} tokens  logits differ by {error:.1e} of {logits.abs().max():.2f}, positions by {shift:.1e}")
        assert error < 2e-4 and shift < 1e-4
    thinker.zero_grad()
    loss, _, each = model.losses(thinker, batch)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in thinker.named_parameters() if p.grad is not None}
    thinker.zero_grad()
    total, at = 0.0, 0
    for i, s in enumerate(drawn + [None]):
        mine = batch["owner"] == i
        if s is None:
            logits = thinker(input_ids=torch.from_numpy(window[:-1].astype(np.int64))[None], attention_mask=torch.ones(1, len(window) - 1, dtype=torch.long)).logits[0]
        else:
            logits, _ = theirs(thinker, tok, s, encoded[i])
        where = batch["where"][mine] - at
        total = total + (torch.nn.functional.cross_entropy(logits[where], batch["target"][mine], reduction="none") * batch["weight"][mine]).sum()
        at += batch["lengths"][i]
    total.backward()
    print(f"loss {loss.item():.6f} against {total.item():.6f}")
    assert abs(loss.item() - total.item()) < 1e-4
    bad, without = [], []
    for n, p in thinker.named_parameters():
        if p.grad is None or n not in grads:
            without.append(n)
            continue
        error = (p.grad - grads[n]).norm().item() / max(p.grad.norm().item(), 1e-6)
        if error > 2e-3:
            bad.append((n, error))
    print(f"gradients of {len(grads)} parameters agree" if not bad else f"gradients DIFFER: {bad[:8]}", "| without gradient:", without)
    assert not bad
    from transformers import Qwen2VLImageProcessor, WhisperFeatureExtractor
    processor = Qwen2VLImageProcessor(patch_size=16, merge_size=2, temporal_patch_size=2, image_mean=[.5] * 3, image_std=[.5] * 3, min_pixels=3136, max_pixels=12845056)
    picture = drawn[0]["parts"][0][1]
    p, grid = media.patches(picture[None])
    q = processor(images=[picture], return_tensors="pt")
    assert q["image_grid_thw"][0].tolist() == list(grid)
    print("picture patches differ by", ((torch.from_numpy(p).float() - 127.5) / 127.5 - q["pixel_values"]).abs().max().item())
    sound = next(p[1] for s in drawn for p in s["parts"] if p[0] == "audio")
    mel = WhisperFeatureExtractor(feature_size=128)(sound, sampling_rate=16000, padding=False, truncation=False, return_tensors="np", return_attention_mask=True)["input_features"][0]
    n = media.log_mel(sound).shape[1]
    print("log-mel differs by", np.abs(mel[:, :n] - media.log_mel(sound)).max(), mel.shape, n)
    print("all agree")


if __name__ == "__main__":
    main()
