"""Makes the parts of the training data that are slow to make, once: text as tokens, emoji as pixels, speech, recorded sounds.

    python prepare.py tokenizer --from-tokenizer MODEL/tokenizer.json --cache CACHE
    python prepare.py text      --corpus CORPUS --cache CACHE
    python prepare.py emoji     --noto DIR --fluent DIR --cache CACHE      (unpacked npm packages, holding icons.json)
    python prepare.py speech    --cache CACHE [--sentences 14000]          (needs espeak-ng and flite)
    python prepare.py sounds    --samples DIR --cache CACHE                (the .flac files of sonic-pi-samples)

Each command writes its own files into CACHE and may be repeated. What is cheap to draw (scenes, text in pictures, tones,
synthetic sounds, video) is drawn while training; see tasks.py.
"""
import argparse, concurrent.futures, io, json, lzma, pathlib, re, subprocess, wave

import numpy as np

from words import COLOURS, NUMBERS, SHAPES, held_out, sentence, words

DOMAINS = ["rust", "python", "stories", "prose", "poetry", "chinese_poetry", "law", "manuals", "maths", "dialogue"]
RATE = 16000
VARIANTS = ["", "+m1", "+m3", "+m5", "+m7", "+f1", "+f2", "+f3", "+f5"]
ESPEAK = [a + v for a in ("en-us", "en-gb", "en-gb-scotland") for v in VARIANTS]
FLITE = ["kal16", "awb", "rms"]
UNSEEN_VOICES = ["flite:slt", "espeak:en-us+f4"]


# ------------------------------------------------------------------------------------------------ text

def prepare_tokenizer(args):
    """The tokenizer in the published layout (vocab.json, merges.txt, special tokens), from an existing byte-level BPE."""
    import tokenizer
    tokenizer.write(args.from_tokenizer, args.cache / "tokenizer")


def prepare_text(args):
    """Every document as tokens with an end-of-text after it, one array a domain and split; dialogues and maths as chats, too."""
    import tokenizer
    tok = tokenizer.load(args.cache / "tokenizer")
    end = tok.special["<|endoftext|>"]
    for split in ("train", "validation"):
        chats = []
        for domain in DOMAINS:
            with lzma.open(args.corpus / f"{domain}.{split}.txt.xz", "rb") as file:
                docs = [d for d in file.read().decode().split("\x1e") if d]
            ids = []
            for encoding in tok.base.encode_batch(docs, add_special_tokens=False):
                ids += encoding.ids + [end]
            np.save(args.cache / f"text.{domain}.{split}.npy", np.array(ids, dtype=np.uint16))
            size = sum(len(d.encode()) for d in docs)
            print(f"{domain} {split}: {len(ids)} tokens, {size / len(ids):.2f} bytes a token", flush=True)
            if domain == "dialogue":
                chats += [c for c in map(dialogue_turns, docs) if c]
            if domain == "maths":
                chats += [c for c in map(maths_turns, docs) if c]
        (args.cache / f"chats.{split}.json").write_text(json.dumps(chats, ensure_ascii=False))
        print(f"chats {split}: {len(chats)}", flush=True)


def dialogue_turns(doc):
    """`USER: …` and `ASSISTANT: …` lines as a list of [role, text], beginning with the user and alternating; None if it does not."""
    turns = []
    for line in doc.strip().split("\n"):
        role, _, text = line.partition(": ")
        if role not in ("USER", "ASSISTANT") or not text.strip():
            return None
        role = role.lower()
        if turns and turns[-1][0] == role:
            turns[-1][1] += " " + text.strip()
        else:
            turns.append([role, text.strip()])
    if turns and turns[0][0] == "assistant":
        turns = turns[1:]
    return turns if len(turns) >= 2 else None


def maths_turns(doc):
    match = re.fullmatch(r"Q: (.*?)\nA: ?(.*)", doc.strip(), re.S)
    return [["user", match[1].strip()], ["assistant", match[2].strip()]] if match else None


# ------------------------------------------------------------------------------------------------ emoji

LEAVE_OUT = re.compile(r"skin-tone|^keycap|button|^flag-|-hand-|clock-face|oclock|thirty|medium|-facing-|input|zodiac|couple-with|kiss-|family")
KINDS = {"Activities": "game or event", "Animals & Nature": "animal or plant", "Food & Drink": "food or drink", "Objects": "object", "People & Body": "person",
         "Smileys & Emotion": "face or feeling", "Symbols": "symbol", "Travel & Places": "vehicle or place"}


def prepare_emoji(args, size=128):
    """Draws every emoji that both sets have (name of at most three words) at 128 x 128, RGBA; names, kinds and splits beside them."""
    import resvg_py
    from PIL import Image
    sets = {"noto": args.noto, "fluent": args.fluent}
    icons = {k: json.loads((p / "icons.json").read_text()) for k, p in sets.items()}
    categories = json.loads((args.noto / "metadata.json").read_text())["categories"]
    kind = {n: KINDS[c] for c, names in categories.items() if c in KINDS for n in names}
    names = sorted(n for n in kind if n in icons["noto"]["icons"] and n in icons["fluent"]["icons"] and not LEAVE_OUT.search(n) and n.count("-") < 3)
    pixels, meta = [], []
    for i, name in enumerate(names):
        for style in sets:
            icon, whole = icons[style]["icons"][name], icons[style]
            w, h = icon.get("width", whole.get("width", 16)), icon.get("height", whole.get("height", 16))
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{size}" height="{size}" viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {w} {h}">{icon["body"]}</svg>'
            try:
                png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
                picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA").resize((size, size)))
            except Exception as error:  # a drawing that the renderer refuses is left out, and said
                print(f"left out: {style} {name}: {error}", flush=True)
                continue
            # An object is held out with both its drawings; a drawing may be held out while its object stays.
            split = "object" if held_out("emoji " + name, 0.1) else "drawing" if held_out(f"emoji {style} {name}", 0.06) else "train"
            meta.append(dict(name=name.replace("-", " "), kind=kind[name], style=style, split=split))
            pixels.append(picture)
        if i % 100 == 0:
            print(f"emoji {i} of {len(names)}", flush=True)
    np.save(args.cache / "emoji.npy", np.stack(pixels))
    (args.cache / "emoji.json").write_text(json.dumps(meta, indent=0))
    print(f"{len(meta)} drawings of {len(names)} emoji;", {s: sum(m['split'] == s for m in meta) for s in ("train", "drawing", "object")})


# ------------------------------------------------------------------------------------------------ speech

def speak(voice, text, speed, pitch):
    """A sentence spoken by espeak-ng or flite, as i16 at 16 kHz without the silence at its ends."""
    from scipy.signal import resample_poly
    engine, _, name = voice.partition(":")
    if engine == "espeak":
        data = subprocess.run(["espeak-ng", "-v", name, "-s", str(speed), "-p", str(pitch), "--stdout", text], capture_output=True, check=True).stdout
        data, rate = np.frombuffer(data[44:len(data) // 2 * 2], "<i2"), int.from_bytes(data[24:28], "little")
    else:
        stretch = 165 / speed
        data = subprocess.run(["flite", "-voice", name, "--setf", f"duration_stretch={stretch:.3f}", "-t", text, "-o", "/dev/stdout"], capture_output=True, check=True).stdout
        with wave.open(io.BytesIO(data)) as file:
            rate, data = file.getframerate(), np.frombuffer(file.readframes(file.getnframes()), "<i2")
    x = data.astype(np.float64)
    if rate != RATE:
        x = resample_poly(x, RATE, rate) if rate % 50 else resample_poly(x, RATE // 50, rate // 50)
    loud = np.flatnonzero(np.abs(x) > 300)
    x = x[max(loud[0] - 480, 0):loud[-1] + 800] if len(loud) else x
    return np.clip(x * (12000 / max(np.abs(x).max(), 1)), -32768, 32767).astype(np.int16)


def prepare_speech(args):
    """Sentences and single words by many voices. Splits: train; sentence (never heard); voice (sentences never heard by a voice never heard)."""
    rng = np.random.default_rng(11)
    seen_voices = ["espeak:" + v for v in ESPEAK] + ["flite:" + v for v in FLITE] * 4
    jobs, used = [], set()

    def add(split, text, voices):
        jobs.append((split, text, voices[int(rng.integers(len(voices)))], int(rng.integers(135, 190)), int(rng.integers(30, 70))))

    def fresh(wanted):
        while True:
            text = sentence(rng)
            if held_out("sentence " + text) == wanted and text not in used:
                used.add(text)
                return text
    for word in sorted(set(COLOURS) | set(SHAPES) | set(NUMBERS)):
        for _ in range(24):
            add("word", word, seen_voices)
    names = args.cache / "emoji.json"
    if names.exists():
        for name in sorted({m["name"] for m in json.loads(names.read_text()) if m["name"].count(" ") < 2}):
            for _ in range(3):
                add("name", name, seen_voices)
    for _ in range(500):
        add("sentence", fresh(True), seen_voices)
    for _ in range(300):
        add("voice", fresh(True), UNSEEN_VOICES)
    for word in words():
        for _ in range(2):
            add("train", word, seen_voices)
    for _ in range(args.sentences):
        add("train", fresh(False), seen_voices)
    clips, meta, at, last = [], [], 0, 0

    def save():
        np.save(args.cache / "speech.npy.tmp.npy", np.concatenate(clips))
        (args.cache / "speech.json.tmp").write_text(json.dumps(meta))
        (args.cache / "speech.npy.tmp.npy").rename(args.cache / "speech.npy")
        (args.cache / "speech.json.tmp").rename(args.cache / "speech.json")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for i, (job, clip) in enumerate(zip(jobs, pool.map(lambda j: speak(*([j[2], j[1]] + list(j[3:]))), jobs))):
            clips.append(clip)
            meta.append(dict(split=job[0], text=job[1], voice=job[2], start=at, length=len(clip)))
            at += len(clip)
            if i % 500 == 0:
                print(f"speech {i} of {len(jobs)}, {at / RATE / 3600:.2f} hours", flush=True)
    save()
    print(f"{len(meta)} clips, {at / RATE / 3600:.2f} hours", flush=True)


# ------------------------------------------------------------------------------------------------ recorded sounds

SOUNDS = [(r"^bd_|kick|drum_bass", "bass drum"), (r"^sn_|snare", "snare drum"), (r"cymbal|splash", "cymbal"), (r"tom_|fuzz_tom", "tom drum"), (r"^tabla", "tabla"),
          (r"^guit", "guitar"), (r"^bass_", "bass"), (r"robot", "robot voice"), (r"phone", "telephone"), (r"^vinyl", "vinyl record"), (r"bell|chime|triangle", "bell"),
          (r"^ambi", "ambience"), (r"^loop", "drum loop"), (r"^elec", "electronic blip"), (r"^perc|glitch_perc", "percussion")]


def prepare_sounds(args):
    """The recordings at 16 kHz, at most four seconds of each, by kind of sound; about a fifth of the files of every kind is held out."""
    import soundfile
    from scipy.signal import resample_poly
    clips, meta, at = [], [], 0
    groups = {}
    for path in sorted(args.samples.glob("*.flac")):
        kind = next((k for pattern, k in SOUNDS if re.search(pattern, path.stem)), None)
        if kind:
            groups.setdefault(kind, []).append(path)
    for kind, paths in groups.items():
        order = sorted(paths, key=lambda p: (not held_out("sound " + p.stem, 0.2), p.stem))
        away = set(order[:max(1, len(order) // 5)])
        for path in paths:
            x, rate = soundfile.read(path, always_2d=True)
            x = resample_poly(x.mean(1), 160, rate // 100)[:4 * RATE]
            x = (x * (12000 / max(np.abs(x).max(), 1e-9))).astype(np.int16)
            clips.append(x)
            meta.append(dict(split="file" if path in away else "train", name=kind, file=path.stem, start=at, length=len(x)))
            at += len(x)
    np.save(args.cache / "sounds.npy", np.concatenate(clips))
    (args.cache / "sounds.json").write_text(json.dumps(meta, indent=0))
    print({k: len(v) for k, v in groups.items()}, len(meta), "files")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tokenizer", "text", "emoji", "speech", "sounds"])
    parser.add_argument("--cache", type=pathlib.Path, required=True)
    for name in ("corpus", "from-tokenizer", "noto", "fluent", "samples"):
        parser.add_argument("--" + name, type=pathlib.Path)
    parser.add_argument("--sentences", type=int, default=14000)
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    globals()["prepare_" + args.what](args)


if __name__ == "__main__":
    main()
