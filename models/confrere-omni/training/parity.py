"""Proves that Confrere answers as transformers does: ten samples of each modality, greedy tokens, in f32.

    python parity.py --model DIR --cache CACHE --fonts DIR --confrere target/release/confrere [--samples 10]

DIR is what export.py wrote. Media are written without loss: pictures as PNG, sounds as WAV in f32, videos as folders of pictures. Says of each modality how many
answers are equal token for token, and fails if one is not.
"""
import argparse, json, pathlib, subprocess, sys, tempfile

import numpy as np
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file

import check, data, media, model, tasks, tokenizer

KINDS = {
    "picture": ["emoji_name", "scene_caption", "scene_count", "read", "scene_place"],
    "sound": ["transcribe", "sound_recorded", "sound_ambient", "tone_direction", "tone_count"],
    "video": ["video_motion", "video_caption"],
    "picture and sound": ["both_spoken_question", "both_name_fits", "both_count_fits"],
    "text": ["chat"],
}
MOST = 24


def weights_of(directory):
    """The thinker's weights under the names of model.py: gate and up projections of all experts together."""
    files = [load_file(f) for f in sorted(directory.glob("*.safetensors"))]
    flat = {n.removeprefix("thinker."): t.float() for file in files for n, t in file.items()}
    out, experts = {}, {}
    for name, t in flat.items():
        name = ("model." + name if name.startswith(("visual.", "audio_tower.")) else name.replace("model.", "model.language_model.", 1))
        if ".experts." in name:
            layer, rest = name.split(".experts.")
            number, which, _ = rest.split(".")
            experts.setdefault(layer + ".experts", {})[int(number), which] = t
        else:
            out[name] = t
    for name, parts in experts.items():
        count = 1 + max(number for number, _ in parts)
        out[name + ".gate_up_proj"] = torch.stack([torch.cat([parts[e, "gate_proj"], parts[e, "up_proj"]]) for e in range(count)])
        out[name + ".down_proj"] = torch.stack([parts[e, "down_proj"] for e in range(count)])
    return out


@torch.no_grad()
def theirs(thinker, tok, sample):
    encoded, ends, answer = data.encode(tok, dict(sample, answer=None)), {tok.special["<|im_end|>"], tok.special["<|endoftext|>"]}, []
    while len(answer) < MOST:
        logits, _ = check.theirs(thinker, tok, sample, encoded)
        token = int(logits[-1].argmax())
        if token in ends:
            break
        answer.append(token)
        encoded["ids"] = np.append(encoded["ids"], token)
    return answer


def ours(confrere, home, sample, work):
    media_of, words = [], ""
    for number, p in enumerate(sample["parts"]):
        at = work / f"{number}"
        if isinstance(p, str):
            words = p
        elif p[0] == "image":
            Image.fromarray(p[1]).save(at.with_suffix(".png"))
            media_of += ["--image", at.with_suffix(".png")]
        elif p[0] == "audio":
            soundfile.write(at.with_suffix(".wav"), p[1].astype(np.float32), media.RATE, subtype="FLOAT")
            media_of += ["--audio", at.with_suffix(".wav")]
        elif p[0] == "video":
            at.mkdir()
            for frame, picture in enumerate(p[1]):
                Image.fromarray(picture).save(at / f"{frame:03}.png")
            media_of += ["--video", at, "--fps", str(p[2])]
        else:  # a dialogue: its last question alone
            words = p[1][-1][1]
    command = [confrere, "run", "m", words, *media_of, "--kv", "f32", "--temperature", "0", "--max-tokens", str(MOST), "--json", "--offline", "--data-dir", home]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["tokens"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "cache", "fonts", "confrere"):
        parser.add_argument("--" + name, type=pathlib.Path, required=True)
    parser.add_argument("--samples", type=int, default=10)
    args = parser.parse_args()
    tok, store = tokenizer.load(args.cache / "tokenizer"), tasks.Store(args.cache, args.fonts, "validation")
    thinker = model.build(model.thinker_config(model.special_ids(tok))).eval()
    thinker.load_state_dict(weights_of(args.model))
    differ = 0
    with tempfile.TemporaryDirectory() as home:
        subprocess.run([args.confrere, "import", args.model, "--name", "m", "--data-dir", home], check=True, capture_output=True)
        for kind, names in KINDS.items():
            equal = 0
            for number in range(args.samples):
                task = names[number % len(names)]
                sample = tasks.draw(store, task, "new", np.random.default_rng([99, number, *task.encode()]))
                if task == "chat":
                    sample["parts"] = [("turns", sample["parts"][0][1][-1:])]
                with tempfile.TemporaryDirectory() as work:
                    a, b = theirs(thinker, tok, sample), ours(args.confrere, home, sample, pathlib.Path(work))
                equal += a == b
                if a != b:
                    print(f"{task}: {tok.decode(a)!r} there, {tok.decode(b)!r} here")
            print(f"{kind}: {equal} of {args.samples} answers are equal token for token", flush=True)
            differ += args.samples - equal
    sys.exit(differ > 0)


if __name__ == "__main__":
    main()
