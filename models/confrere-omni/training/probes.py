"""Writes the probes of pictures and sounds, from held-out kinds that training never saw: a folder for `confrere profile build --probes`.

    python probes.py --cache CACHE --fonts DIR --out DIR [--count 100]

For each of eight domains a file DOMAIN.jsonl, a question a line, and a folder with its media: pictures as PNG, sounds as Ogg Vorbis, videos as GIF. The same
seeds give the same files.
"""
import argparse, json, pathlib

import numpy as np
import soundfile
from PIL import Image

import media, tasks

# Which tasks a domain asks, and of which held-out split; tasks take turns.
DOMAINS = {
    "objects": [("emoji_name", "drawing"), ("emoji_kind", "object"), ("emoji_choice", "drawing")],
    "scenes": [(task, "pair") for task in ("scene_caption", "scene_count", "scene_colour", "scene_shape", "scene_place", "scene_is")],
    "text_in_pictures": [("read", "word"), ("read", "font")],
    "speech": [("transcribe", "sentence")],
    "tones": [(task, "band") for task in ("tone_height", "tone_direction", "tone_count")],
    "ambient_sounds": [("sound_recorded", "file"), ("sound_ambient", "new")],
    "video": [("video_motion", "pair"), ("video_caption", "pair")],
    "cross_modal": [("both_spoken_question", "pair"), ("both_name_fits", "drawing"), ("both_count_fits", "new"), ("both_video_fits", "new")],
}


def write_sound(path, samples):
    soundfile.write(path, np.clip(samples, -1, 1), media.RATE, format="OGG", subtype="VORBIS")


def write_video(path, frames, fps):
    pictures = [Image.fromarray(frame) for frame in frames]
    # Frames that are alike would be merged; a program that looks at `fps` frames a second sees as many as there are.
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0, optimize=False)


def part(value, stem):
    """A part of a question in its file's words; its media are written beside."""
    if isinstance(value, str):
        return {"type": "text", "text": value}
    kind, data, *more = value
    if kind == "image":
        Image.fromarray(data).save(stem.with_suffix(".png"))
        return {"type": "image", "path": f"{stem.parent.name}/{stem.name}.png"}
    if kind == "audio":
        write_sound(stem.with_suffix(".ogg"), data)
        return {"type": "audio", "path": f"{stem.parent.name}/{stem.name}.ogg"}
    write_video(stem.with_suffix(".gif"), data, more[0])
    out = {"type": "video", "path": f"{stem.parent.name}/{stem.name}.gif", "fps": more[0]}
    if kind == "video_with_sound":
        write_sound(stem.with_suffix(".ogg"), more[1])
        out["sound"] = f"{stem.parent.name}/{stem.name}.ogg"
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("cache", "fonts", "out"):
        parser.add_argument("--" + name, type=pathlib.Path, required=True)
    parser.add_argument("--count", type=int, default=100, help="questions of each domain")
    args = parser.parse_args()
    store = tasks.Store(args.cache, args.fonts, "validation")
    for domain, questions in DOMAINS.items():
        (args.out / domain).mkdir(parents=True, exist_ok=True)
        lines = []
        for number in range(args.count):
            task, split = questions[number % len(questions)]
            rng = np.random.default_rng([424242, number, *domain.encode()])
            sample = tasks.draw(store, task, split, rng)
            content = [part(value, args.out / domain / f"{number:03}-{i}") for i, value in enumerate(sample["parts"])]
            lines.append(json.dumps({"content": content, "answer": sample["answer"]}, ensure_ascii=False))
        (args.out / f"{domain}.jsonl").write_text("\n".join(lines) + "\n")
        print(domain, sum(f.stat().st_size for f in (args.out / domain).iterdir()), "bytes", flush=True)


if __name__ == "__main__":
    main()
