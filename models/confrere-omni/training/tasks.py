"""The tasks: each draws one question with its media and its answer.

`draw(store, task, split, rng)` gives a dict: `task`, `split`, `parts` (text, image [H,W,3] bytes, audio f32, video [T,H,W,3] with its fps, or video with
its sound), `answer`, and `options` (how many answers are possible, 0 for open ones). Splits:

- `train`: what training sees;
- `new`: new samples of seen kinds (new rendering, new combination of seen parts by chance);
- the rest is held out by its key and never occurs in training: `pair` (pairs of colour and shape), `object` and `drawing` (emoji), `word` (reading),
  `font`, `sentence` and `voice` (speech), `file` (recordings), `band` (pitches).
"""
import json

import numpy as np

import media
from words import COLOURS, MOTIONS, NUMBERS, PEOPLE, PLACES, SHAPES, article, counted, held_out, plural, sentence, words

PAIRS = [(c, s) for c in COLOURS for s in SHAPES]
PAIRS_BY = {True: [p for p in PAIRS if held_out("pair %s %s" % p, 0.15)], False: [p for p in PAIRS if not held_out("pair %s %s" % p, 0.15)]}
FONTS = ["dejavu/DejaVuSans.ttf", "dejavu/DejaVuSans-Bold.ttf", "dejavu/DejaVuSerif.ttf", "dejavu/DejaVuSansMono.ttf", "noto/NotoSans-Regular.ttf", "noto/NotoSerif-Regular.ttf"]
UNSEEN_FONTS = ["dejavu/DejaVuSerif-Bold.ttf", "noto/NotoSans-Bold.ttf"]

# How often each task comes, among the samples that are not plain text, and what it can be measured on.
TASKS = {
    "emoji_name": (0.15, ["new", "drawing"]), "emoji_kind": (0.04, ["new", "drawing", "object"]), "emoji_choice": (0.04, ["new", "drawing", "object"]),
    "scene_caption": (0.05, ["new", "pair"]), "scene_count": (0.06, ["new", "pair"]), "scene_colour": (0.05, ["new", "pair"]), "scene_shape": (0.03, ["new", "pair"]),
    "scene_place": (0.04, ["new", "pair"]), "scene_is": (0.04, ["new", "pair"]),
    "read": (0.09, ["new", "word", "font"]),
    "transcribe": (0.18, ["new", "sentence", "voice"]),
    "sound_recorded": (0.04, ["new", "file"]), "sound_ambient": (0.03, ["new"]),
    "tone_height": (0.015, ["new", "band"]), "tone_direction": (0.02, ["new", "band"]), "tone_count": (0.02, ["new", "band"]),
    "video_motion": (0.04, ["new", "pair"]), "video_caption": (0.03, ["new", "pair"]),
    "both_spoken_question": (0.04, ["new", "pair"]), "both_name_fits": (0.03, ["new", "drawing"]), "both_count_fits": (0.03, ["new"]), "both_video_fits": (0.03, ["new"]),
    "chat": (0.05, ["new"]), "continue": (0.03, ["new"]),
}

# Shares of a second phase for what sees: after the first, sounds were learned and pictures were not.
PICTURES = {
    "emoji_name": 0.17, "emoji_kind": 0.05, "emoji_choice": 0.04, "scene_caption": 0.06, "scene_count": 0.09, "scene_colour": 0.09, "scene_shape": 0.05,
    "scene_place": 0.06, "scene_is": 0.04, "read": 0.16, "transcribe": 0.05, "video_caption": 0.03, "both_spoken_question": 0.04, "both_name_fits": 0.02,
    "both_count_fits": 0.02, "both_video_fits": 0.01, "chat": 0.02,
}
MODALITY = {t: "image" if t.startswith(("emoji", "scene", "read")) else "audio" if t.startswith(("trans", "sound", "tone")) else "video" if t.startswith("video")
            else "both" if t.startswith("both") else "text" for t in TASKS}


class Store:
    """What `prepare.py` made, read where it lies."""
    def __init__(self, cache, fonts, split="train"):
        load = lambda name: json.loads((cache / name).read_text())
        self.fonts = fonts
        self.emoji, self.emoji_pixels = load("emoji.json"), np.load(cache / "emoji.npy", mmap_mode="r")
        self.speech, self.speech_samples = load("speech.json"), np.load(cache / "speech.npy", mmap_mode="r")
        self.sounds, self.sound_samples = load("sounds.json"), np.load(cache / "sounds.npy", mmap_mode="r")
        self.chats = load(f"chats.{split}.json")
        self.text = {p.name.split(".")[1]: np.load(p, mmap_mode="r") for p in sorted(cache.glob(f"text.*.{split}.npy"))}
        self.by = lambda items, **want: [i for i, m in enumerate(items) if all(m[k] == v for k, v in want.items())]
        self.emoji_by = {s: self.by(self.emoji, split=s) for s in ("train", "drawing", "object")}
        self.speech_by = {s: self.by(self.speech, split=s) for s in ("train", "sentence", "voice")}
        self.sounds_by = {s: self.by(self.sounds, split=s) for s in ("train", "file")}
        self.spoken = {}
        for i, m in enumerate(self.speech):
            if m["split"] in ("word", "name"):
                self.spoken.setdefault(m["text"], []).append(i)
        every = words()
        self.read_by = {True: [w for w in every if held_out("read " + w)], False: [w for w in every if not held_out("read " + w)]}
        self.sound_kinds = sorted({m["name"] for m in self.sounds})

    def clip(self, rng, samples, entry, jitter=0.08):
        x = np.asarray(samples[entry["start"]:entry["start"] + entry["length"]], dtype=np.float64)
        return media.finish(rng, media.change_speed(x, float(rng.uniform(1 - jitter, 1 + jitter))))

    def say(self, rng, text):
        return self.clip(rng, self.speech_samples, self.speech[pick(rng, self.spoken[text])])


def pick(rng, items):
    return items[int(rng.integers(len(items)))]


def image(x):
    return ("image", x)


def audio(x):
    return ("audio", x)


# ------------------------------------------------------------------------------------------------ emoji

def emoji_entry(store, split, rng):
    return store.emoji[i := pick(rng, store.emoji_by["train" if split == "new" else split])], store.emoji_pixels[i]


def emoji_name(store, split, rng):
    entry, pixels = emoji_entry(store, split, rng)
    return [image(media.paste_emoji(rng, pixels)), "What is this?"], entry["name"], 0


def emoji_kind(store, split, rng):
    entry, pixels = emoji_entry(store, split, rng)
    return [image(media.paste_emoji(rng, pixels)), "What kind of thing is this?"], entry["kind"], 8


def emoji_choice(store, split, rng):
    entry, pixels = emoji_entry(store, split, rng)
    while (other := emoji_entry(store, split, rng)[0])["name"] == entry["name"]:
        pass
    names = [entry["name"], other["name"]]
    if rng.random() < 0.5:
        names.reverse()
    return [image(media.paste_emoji(rng, pixels)), f"Is this {names[0]} or {names[1]}?"], entry["name"], 2


# ------------------------------------------------------------------------------------------------ scenes

def scene(rng, split, groups, most=5, distinct_shapes=False):
    """A picture with `groups` groups of like shapes on a 3 x 3 grid, and what is in it: [(count, colour, shape, places)].

    In the split `pair` the first group is a held-out pair of colour and shape."""
    pairs = []
    while len(pairs) < groups:
        p = pick(rng, PAIRS_BY[split == "pair" and not pairs])
        if all(p[1] != q[1] if distinct_shapes else p != q for q in pairs) and (not distinct_shapes or all(p[0] != q[0] for q in pairs)):
            pairs.append(p)
    counts = [int(rng.integers(1, most + 1)) for _ in pairs]
    while sum(counts) > 9:
        counts = [max(1, c - 1) for c in counts]
    h, w = int(rng.integers(80, 113)), int(rng.integers(80, 113))
    cells = [int(c) for c in rng.permutation(9)]
    shapes, inside = [], []
    ground = media.ground_for(rng, [COLOURS[c] for c, _ in pairs])
    for (colour, shape), n in zip(pairs, counts):
        mine = [cells.pop() for _ in range(n)]
        rgb = media.tint(rng, colour)
        for cell in mine:
            r = min(h, w) / 6 * rng.uniform(0.55, 0.8)
            x, y = (cell % 3 + 0.5) * w / 3 + rng.uniform(-2, 2), (cell // 3 + 0.5) * h / 3 + rng.uniform(-2, 2)
            shapes.append((shape, rgb, x, y, r, 0 if shape in ("diamond", "square", "cross") else rng.uniform(-0.3, 0.3)))
        inside.append((n, colour, shape, mine))
    return media.draw_shapes((h, w), ground, shapes), inside


def scene_caption(store, split, rng):
    picture, inside = scene(rng, split, int(rng.integers(1, 4)), most=4)
    text = [counted(n, c, s) for n, c, s, _ in sorted(inside, key=lambda g: (list(COLOURS).index(g[1]), SHAPES.index(g[2])))]
    return [image(picture), "Describe the picture."], " and ".join([", ".join(text[:-1]), text[-1]] if len(text) > 1 else text), 0


def scene_count(store, split, rng):
    picture, inside = scene(rng, split, int(rng.integers(1, 4)))
    n, colour, shape, _ = inside[0]
    kind = int(rng.integers(3))
    if kind == 0:
        return [image(picture), "How many shapes are there?"], NUMBERS[sum(g[0] for g in inside)], 9
    if kind == 1:
        return [image(picture), f"How many {plural(shape)} are there?"], NUMBERS[sum(g[0] for g in inside if g[2] == shape)], 9
    return [image(picture), f"How many {colour} shapes are there?"], NUMBERS[sum(g[0] for g in inside if g[1] == colour)], 9


def scene_colour(store, split, rng):
    picture, inside = scene(rng, split, int(rng.integers(1, 4)), most=2, distinct_shapes=True)
    n, colour, shape, _ = inside[0]
    return [image(picture), f"What colour is the {shape}?" if n == 1 else f"What colour are the {plural(shape)}?"], colour, len(COLOURS)


def scene_shape(store, split, rng):
    picture, inside = scene(rng, split, int(rng.integers(2, 4)), most=1, distinct_shapes=True)
    return [image(picture), f"Which shape is {inside[0][1]}?"], inside[0][2], len(SHAPES)


def scene_place(store, split, rng):
    picture, inside = scene(rng, split, int(rng.integers(1, 4)), most=1, distinct_shapes=True)
    return [image(picture), f"Where is the {inside[0][1]} {inside[0][2]}?"], PLACES[inside[0][3][0]], 9


def scene_is(store, split, rng):
    picture, inside = scene(rng, split, int(rng.integers(1, 4)), most=2)
    _, colour, shape, _ = inside[0]
    here = {(g[1], g[2]) for g in inside}
    if rng.random() < 0.5:
        return [image(picture), f"Is there {article(colour)} {shape}?"], "yes", 2
    while True:  # a pair that is not there, though its colour or its shape may be
        c, s = (pick(rng, list(COLOURS)), shape) if rng.random() < 0.5 else (colour, pick(rng, SHAPES))
        if (c, s) not in here and (split == "pair" or (c, s) in PAIRS_BY[False]):
            return [image(picture), f"Is there {article(c)} {s}?"], "no", 2


# ------------------------------------------------------------------------------------------------ reading

def read(store, split, rng):
    away = split == "word"
    kind = rng.random()
    if away or kind < 0.55:
        text = " ".join(pick(rng, store.read_by[away]) for _ in range(1 if rng.random() < 0.6 else 2))
    elif kind < 0.75:
        text = "".join(str(d) for d in rng.integers(0, 10, int(rng.integers(2, 6))))
    else:
        text = "".join("abcdefghijklmnopqrstuvwxyz"[i] for i in rng.integers(0, 26, int(rng.integers(2, 7))))
    kind = rng.random()
    text = text.upper() if kind < 0.2 else text.capitalize() if kind < 0.4 else text
    face = pick(rng, UNSEEN_FONTS if split == "font" else FONTS)
    return [image(media.write_text(rng, text, str(store.fonts / face))), "Read the text."], text, 0


# ------------------------------------------------------------------------------------------------ sound

def transcribe(store, split, rng):
    entry = store.speech[pick(rng, store.speech_by["train" if split == "new" else split])]
    return [audio(store.clip(rng, store.speech_samples, entry)), "Write down what you hear."], entry["text"], 0


def sound_recorded(store, split, rng):
    kind = pick(rng, store.sound_kinds)
    entry = store.sounds[pick(rng, [i for i in store.sounds_by["train" if split == "new" else split] if store.sounds[i]["name"] == kind])]
    x = np.asarray(store.sound_samples[entry["start"]:entry["start"] + entry["length"]], dtype=np.float64)
    most = int(media.RATE * rng.uniform(1.2, 2.4))
    if len(x) > most:
        a = int(rng.integers(0, len(x) - most)) if kind in ("ambience", "drum loop") else 0
        x = x[a:a + most]
    return [audio(media.finish(rng, media.change_speed(x, float(rng.uniform(0.85, 1.18))))), "What sound is this?"], kind, len(store.sound_kinds)


def sound_ambient(store, split, rng):
    kind = pick(rng, media.AMBIENT)
    return [audio(media.finish(rng, media.ambient(rng, kind)[:int(2.2 * media.RATE)])), "What sound is this?"], kind, len(media.AMBIENT)


def pitch(rng, split, high):
    """A frequency, low (120 to 320 Hz) or high (800 to 2200): the middle third of each is kept for the split `band`."""
    a, b = (800, 2200) if high else (120, 320)
    third = rng.uniform(1 / 3, 2 / 3) if split == "band" else rng.uniform(0, 1 / 3) if rng.random() < 0.5 else rng.uniform(2 / 3, 1)
    return float(a * (b / a) ** third)


def tone_height(store, split, rng):
    high = rng.random() < 0.5
    n = int(rng.uniform(0.5, 1.2) * media.RATE)
    x = media.chirp(np.full(n, pitch(rng, split, high)), timbre=int(rng.integers(3))) * media.pulse(n, 0, media.RATE * rng.uniform(0.3, 3))
    return [audio(media.finish(rng, x)), "Is the tone high or low?"], "high" if high else "low", 2


def tone_direction(store, split, rng):
    kind, n, f = int(rng.integers(3)), int(rng.uniform(0.7, 1.3) * media.RATE), pitch(rng, split, rng.random() < 0.5)
    x = media.chirp(f * 2 ** ((kind - 1) * np.linspace(-0.5, 0.5, n) * rng.uniform(0.7, 1.6)), timbre=int(rng.integers(3)))
    return [audio(media.finish(rng, x)), "Does the pitch rise, fall or stay?"], ["falls", "stays", "rises"][kind], 3


def beeps(rng, count, f):
    length, gap, timbre = rng.uniform(0.07, 0.13), rng.uniform(0.1, 0.18), int(rng.integers(3))
    n = int(length * media.RATE)
    one = np.concatenate([media.chirp(np.full(n, f), timbre=timbre) * np.hanning(n) ** 0.3, np.zeros(int(gap * media.RATE))])
    return np.tile(one, count)


def tone_count(store, split, rng):
    count, high = int(rng.integers(1, 6)), rng.random() < 0.5
    x = media.finish(rng, beeps(rng, count, pitch(rng, split, high)))
    if rng.random() < 0.5:
        return [audio(x), "How many beeps do you hear?"], NUMBERS[count], 5
    return [audio(x), "Describe the sound."], f"{NUMBERS[count]} {'high' if high else 'low'} beep{'s' * (count > 1)}", 10


# ------------------------------------------------------------------------------------------------ video

def moving(rng, split, motion, frames=8):
    """Frames of one shape that moves or changes."""
    colour, shape = pick(rng, PAIRS_BY[split == "pair"])
    h, w = int(rng.integers(60, 76)), int(rng.integers(60, 76))
    after = pick(rng, [c for c in COLOURS if c != colour])
    ground = media.ground_for(rng, [COLOURS[colour]] + [COLOURS[after]] * (motion == "changes colour"))
    rgb, rgb2, r, out = media.tint(rng, colour), media.tint(rng, after), rng.uniform(9, 14), []
    far, drift = rng.uniform(0.22, 0.32), rng.uniform(-0.08, 0.08, 2)
    for i in range(frames):
        u = i / (frames - 1) * 2 - 1
        x, y, size, tone, shown = 0.5 + drift[0], 0.5 + drift[1], r, rgb, True
        if motion in ("moves left", "moves right"):
            x = 0.5 + far * u * (1 if motion == "moves right" else -1)
        elif motion in ("moves up", "moves down"):
            y = 0.5 + far * u * (1 if motion == "moves down" else -1)
        elif motion in ("grows", "shrinks"):
            size = r * (1 + 0.45 * u * (1 if motion == "grows" else -1))
        elif motion == "blinks":
            shown = i // 2 % 2 == 0
        elif i >= frames // 2:
            tone = rgb2
        out.append(media.draw_shapes((h, w), ground, [(shape, tone, x * w, y * h, size, 0)] if shown else []))
    return np.stack(out), colour, shape, after


def video_motion(store, split, rng):
    motion = pick(rng, MOTIONS)
    frames, *_ = moving(rng, split, motion)
    return [("video", frames, pick(rng, [2.0, 3.0, 4.0])), "What happens?"], motion, len(MOTIONS)


def video_caption(store, split, rng):
    motion = pick(rng, MOTIONS)
    frames, colour, shape, after = moving(rng, split, motion)
    answer = f"a {colour} {shape} becomes {after}" if motion == "changes colour" else f"{article(colour)} {shape} {motion}"
    return [("video", frames, pick(rng, [2.0, 3.0, 4.0])), "Describe the video."], answer, 0


# ------------------------------------------------------------------------------------------------ picture and sound together

def both_spoken_question(store, split, rng):
    """The picture has several shapes, the voice names a colour (or a shape): which shape (or colour) is it?"""
    picture, inside = scene(rng, split, int(rng.integers(2, 4)), most=1, distinct_shapes=True)
    _, colour, shape, _ = inside[0]
    if rng.random() < 0.5:
        return [image(picture), audio(store.say(rng, colour)), "Which shape has this colour?"], shape, len(SHAPES)
    return [image(picture), audio(store.say(rng, shape)), "What colour has this shape?"], colour, len(COLOURS)


def both_name_fits(store, split, rng):
    while True:
        entry, pixels = emoji_entry(store, split, rng)
        if entry["name"] in store.spoken:
            break
    fits = rng.random() < 0.5
    name = entry["name"]
    while not fits and name == entry["name"]:
        other = emoji_entry(store, split, rng)[0]["name"]
        name = other if other in store.spoken else name
    return [image(media.paste_emoji(rng, pixels)), audio(store.say(rng, name)), "Does the sound fit the picture?"], "yes" if fits else "no", 2


def both_count_fits(store, split, rng):
    picture, inside = scene(rng, "new", 1, most=5)
    n = inside[0][0]
    count = n if rng.random() < 0.5 else pick(rng, [m for m in range(1, 6) if m != n])
    x = media.finish(rng, beeps(rng, count, pitch(rng, "new", rng.random() < 0.5)))
    return [image(picture), audio(x), "Are there as many beeps as shapes?"], "yes" if count == n else "no", 2


def both_video_fits(store, split, rng):
    """A shape that moves up or down (or grows or shrinks) with a tone that rises or falls: do they agree? The sound lies inside the video."""
    motion = pick(rng, ["moves up", "moves down", "grows", "shrinks"])
    rises, fits = motion in ("moves up", "grows"), rng.random() < 0.5
    frames, *_ = moving(rng, "new", motion)
    fps = pick(rng, [4.0, 5.0])
    n = int(len(frames) / fps * media.RATE)
    way = 1 if rises == fits else -1
    x = media.chirp(pitch(rng, "new", rng.random() < 0.5) * 2 ** (way * np.linspace(-0.5, 0.5, n)), timbre=int(rng.integers(3)))
    x = media.finish(rng, x)[:max(n, int(1.02 * media.RATE))]
    return [("video_with_sound", frames, fps, x), "Does the sound go with the movement?"], "yes" if fits else "no", 2


# ------------------------------------------------------------------------------------------------ text in the template

def chat(store, split, rng):
    """A dialogue or a sum, cut after one of the assistant's turns; earlier turns are context."""
    turns = pick(rng, store.chats)
    ends = [i for i in range(1, len(turns)) if turns[i][0] == "assistant"]
    end = pick(rng, ends)
    return [("turns", turns[max(0, end - 5) if max(0, end - 5) % 2 == 0 else end - 4:end])], turns[end][1], 0


def continue_text(store, split, rng):
    domain = pick(rng, list(store.text))
    stream = store.text[domain]
    a = int(rng.integers(0, len(stream) - 200))
    return [("tokens", np.asarray(stream[a:a + 48], dtype=np.int64), np.asarray(stream[a + 48:a + 128], dtype=np.int64)), "Continue the text."], "", 0


FUNCTIONS = {t: globals().get(t, continue_text if t == "continue" else None) for t in TASKS}


def draw(store, task, split, rng):
    parts, answer, options = FUNCTIONS[task](store, split, rng)
    return dict(task=task, split=split, parts=parts, answer=answer, options=options)
