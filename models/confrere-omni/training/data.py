"""Samples to packed batches: the chat template, token ids, the three position axes, the inputs of the towers.

Also draws the batches of training, in a process of its own, by step number alone: a resumed run draws what an
uninterrupted one would have drawn.
"""
import numpy as np

import media
import tasks

POSITIONS_PER_SECOND = 13


def video_grid(frames):
    return media.patches(frames, **media.VIDEO_PIXELS)


def encode(tok, sample):
    """One sample as dict(ids, positions [3, T] f32, label_from, patches, grids, mels)."""
    special = tok.special
    image_pad, video_pad, audio_pad = (special[f"<|{k}_pad|>"] for k in ("image", "video", "audio"))
    ids, positions, pixels, grids, mels = [], [], [], [], []
    at = 0.0  # the next position

    def text(new):
        nonlocal at
        ids.extend(new)
        positions.append(np.repeat(np.arange(at, at + len(new), dtype=np.float32)[None], 3, 0))
        at += len(new)

    def grid_positions(grid, seconds):
        t, h, w = grid[0], grid[1] // 2, grid[2] // 2
        time = np.float32(np.arange(t, dtype=np.float32) * np.float32(seconds)) * np.float32(POSITIONS_PER_SECOND)
        return np.float32(at) + np.stack([np.repeat(time, h * w), np.tile(np.repeat(np.arange(h), w), t), np.tile(np.arange(w), t * h)]).astype(np.float32)

    def see(frames, limits):
        p, grid = media.patches(frames, **limits)
        pixels.append(p)
        grids.append(grid)
        return grid

    def hear(x):
        mels.append(media.log_mel(x))
        return media.audio_tokens(mels[-1].shape[1])

    def place(pad, block):
        nonlocal at
        ids.extend([pad] * block.shape[1])
        positions.append(block)
        at = float(block.max()) + 1

    def part(p):
        nonlocal at
        kind = p[0]
        if kind == "image":
            text([special["<|vision_start|>"]])
            place(image_pad, grid_positions(see(p[1][None], {}), 1.0))
            text([special["<|vision_end|>"]])
        elif kind == "audio":
            text([special["<|audio_start|>"]])
            text([audio_pad] * hear(p[1]))
            text([special["<|audio_end|>"]])
        elif kind == "video":
            text([special["<|vision_start|>"]])
            place(video_pad, grid_positions(see(p[1], media.VIDEO_PIXELS), 2 / p[2]))
            text([special["<|vision_end|>"]])
        elif kind == "video_with_sound":
            text([special["<|vision_start|>"], special["<|audio_start|>"]])
            video, n = grid_positions(see(p[1], media.VIDEO_PIXELS), 2 / p[2]), hear(p[3])
            sound = np.repeat(np.arange(at, at + n, dtype=np.float32)[None], 3, 0)
            v = a = 0
            last = None
            while v < video.shape[1] or a < n:
                seen = a >= n or (v < video.shape[1] and video[0, v] <= sound[0, a])
                last = video[:, v] if seen else sound[:, a]
                ids.append(video_pad if seen else audio_pad)
                positions.append(last[:, None])
                v, a = v + seen, a + (not seen)
            at = float(last.max()) + 1
            text([special["<|audio_end|>"], special["<|vision_end|>"]])
        elif kind == "tokens":
            text([int(i) for i in p[1]])
        else:
            raise ValueError(kind)

    parts = sample["parts"]
    if parts and parts[0][0] == "turns":
        for role, said in parts[0][1]:
            text(tok.encode(f"<|im_start|>{role}\n{said}<|im_end|>\n"))
    else:
        # A text part that follows "user\n" is one piece of text with it, as in the template.
        text(tok.encode("<|im_start|>user\n" + (parts[0] if isinstance(parts[0], str) else "")))
        for p in parts[isinstance(parts[0], str):]:
            text(tok.encode(p)) if isinstance(p, str) else part(p)
        text(tok.encode("<|im_end|>\n"))
    text(tok.encode("<|im_start|>assistant\n"))
    label_from = len(ids)
    if sample.get("answer") is not None:
        if parts[0][0] == "tokens":
            text([int(i) for i in parts[0][2]])
        else:
            text(tok.encode(sample["answer"]))
        text([special["<|im_end|>"]])
    return dict(ids=np.array(ids, dtype=np.int64), positions=np.concatenate(positions, 1), label_from=label_from, patches=pixels, grids=grids, mels=mels,
                task=sample["task"])


def plain(window):
    """A window of a domain's text: every token but the first is to be foretold."""
    n = len(window) - 1
    return dict(ids=np.asarray(window[:-1], dtype=np.int64), positions=np.repeat(np.arange(n, dtype=np.float32)[None], 3, 0), targets=np.asarray(window[1:], dtype=np.int64),
                patches=[], grids=[], mels=[], task="text")


def pack(samples, text_weight=0.5, fill=0):
    """Samples one after the other. Labelled tokens of plain text share `text_weight` of the loss, answers share the rest.

    With `fill` a blank picture, which no token stands for, makes the number of patches a multiple of it: few shapes, fewer kernels to make."""
    ids, positions, lengths, where, target, label_task, at = [], [], [], [], [], [], 0
    pixels, grids, mels = [], [], []
    for i, s in enumerate(samples):
        n = len(s["ids"])
        if "targets" in s:
            w, t = np.arange(n), s["targets"]
        else:
            w = np.arange(s["label_from"] - 1, n - 1)
            t = s["ids"][s["label_from"]:]
        where.append(at + w)
        target.append(t)
        label_task.append(np.full(len(w), i))
        ids.append(s["ids"])
        positions.append(s["positions"])
        lengths.append(n)
        pixels += s["patches"]
        grids += s["grids"]
        mels += s["mels"]
        at += n
    owner = np.concatenate(label_task)
    text = np.array([s["task"] == "text" for s in samples])[owner]
    weight = np.where(text, text_weight / max(text.sum(), 1), (1 - text_weight) / max((~text).sum(), 1))
    batch = dict(ids=np.concatenate(ids), positions=np.concatenate(positions, 1), lengths=np.array(lengths), where=np.concatenate(where), target=np.concatenate(target),
                 weight=weight.astype(np.float32), owner=owner, tasks=[s["task"] for s in samples])
    if pixels:
        if fill and (short := -sum(map(len, pixels)) % fill):
            pixels.append(np.full((short, 1536), 127, dtype=np.uint8))
            grids.append((1, 2, short // 2))
        batch |= dict(patches=np.concatenate(pixels), grids=np.array(grids))
    if mels:
        frames = np.array([m.shape[1] for m in mels])
        batch |= dict(mel=np.concatenate(mels, 1), mel_lengths=frames, audio_tokens=np.array([media.audio_tokens(n) for n in frames]))
    return batch


def tensors(batch):
    """The arrays of a packed batch as what the model takes; byte patches become what the published processor gives."""
    import torch
    out = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) and k not in ("owner", "lengths", "audio_tokens") else v for k, v in batch.items()}
    if "patches" in out:
        out["patches"] = (out["patches"].float() - 127.5) / 127.5
    return out


# ------------------------------------------------------------------------------------------------ training batches

def domain_weights(text):
    size = np.array([len(text[d]) for d in text], dtype=float) ** 0.6
    return size / size.sum()


def training_batch(tok, store, step, part, text_rows, media_tokens, mix="all", window=512, seed=1):
    """Batch number (step, part): `text_rows` windows of text, and samples of the tasks that hold `media_tokens` tokens."""
    rng = np.random.default_rng([seed, step, part])
    samples, domains, share = [], list(store.text), domain_weights(store.text)

    def add_text(length):
        stream = store.text[domains[int(rng.choice(len(domains), p=share))]]
        a = int(rng.integers(0, len(stream) - length - 1))
        samples.append(plain(stream[a:a + length + 1]))
    for _ in range(text_rows):
        add_text(window)
    shares = tasks.PICTURES if mix == "pictures" else {t: share for t, (share, _) in tasks.TASKS.items()}
    names, often = list(shares), np.array(list(shares.values()))
    room = media_tokens
    while True:
        task = names[int(rng.choice(len(names), p=often / often.sum()))]
        s = encode(tok, tasks.draw(store, task, "train", rng))
        if len(s["ids"]) > window:
            continue
        if len(s["ids"]) > room:
            break
        samples.append(s)
        room -= len(s["ids"])
    if room:
        add_text(room)  # every batch has the same number of tokens
    return pack(samples, fill=128)


def feed(queue, cache, fonts, first, parts, text_rows, media_tokens, mix):
    """The body of the process that draws batches ahead of training."""
    import torch
    torch.set_num_threads(1)
    import tokenizer
    tok, store, step = tokenizer.load(cache / "tokenizer"), tasks.Store(cache, fonts), first
    while True:
        for part in parts:
            queue.put((step, part, training_batch(tok, store, step, part, text_rows, media_tokens, mix)))
        step += 1
