"""Pictures, videos and sounds that are drawn while training, and what turns media into the inputs of the towers.

The second half follows the published processors exactly: sizes by `smart_resize`, cubic resize on bytes, patches merge block
by merge block, Whisper's log-mel without padding.
"""
import functools, math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from words import COLOURS

RATE = 16000
GROUNDS = [(200, 200, 200), (120, 120, 120), (225, 215, 190), (190, 215, 225), (60, 70, 90), (90, 60, 60), (170, 200, 160), (235, 235, 240), (30, 30, 30)]


# ------------------------------------------------------------------------------------------------ pictures

def ground_for(rng, colours):
    """A ground on which all of these colours can be seen."""
    fits = [g for g in GROUNDS if all(np.abs(np.subtract(g, c)).sum() > 110 for c in colours)]
    g = np.array(fits[int(rng.integers(len(fits)))] if fits else (128, 128, 128))
    return tuple(int(v) for v in np.clip(g + rng.integers(-8, 9, 3), 0, 255))


def shape_points(shape, x, y, r, turn):
    """Corners of a shape around (x, y); curved ones are drawn with many corners."""
    def around(angles, radii):
        return [(x + k * r * math.sin(a + turn), y - k * r * math.cos(a + turn)) for a, k in zip(angles, radii)]
    circle = [2 * math.pi * i / 32 for i in range(32)]
    if shape in ("circle", "ring"):
        return around(circle, [1] * 32)
    if shape == "square":
        return around([math.pi * (i / 2 + 0.25) for i in range(4)], [1.15] * 4)
    if shape == "diamond":
        return around([0, math.pi / 2, math.pi, 1.5 * math.pi], [1.25, 0.75, 1.25, 0.75])
    if shape == "triangle":
        return around([0, 2 * math.pi / 3, 4 * math.pi / 3], [1.2] * 3)
    if shape == "star":
        return around([math.pi * i / 5 for i in range(10)], [1.25, 0.5] * 5)
    if shape == "cross":
        a, b = 0.33, 1.1
        corners = [(a, b), (a, a), (b, a), (b, -a), (a, -a), (a, -b), (-a, -b), (-a, -a), (-b, -a), (-b, a), (-a, a), (-a, b)]
    elif shape == "heart":
        corners = [(0.07 * 16 * math.sin(t) ** 3, 0.07 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))) for t in circle]
    else:  # moon
        outer = [(math.cos(t), math.sin(t)) for t in np.linspace(0.6, 2 * math.pi - 0.6, 24)]
        inner = [(0.45 + 0.72 * math.cos(t), 0.72 * math.sin(t)) for t in np.linspace(2 * math.pi - 0.9, 0.9, 20)]
        corners = [(1.1 * a, 1.1 * b) for a, b in outer + inner]
    s, c = math.sin(turn), math.cos(turn)
    return [(x + r * (a * c + b * s), y - r * (b * c - a * s)) for a, b in corners]


def draw_shapes(size, ground, shapes, fine=3):
    """A picture (height, width) with shapes [(shape, colour, x, y, radius, turn)], drawn finely and shrunk."""
    h, w = size
    image = Image.new("RGB", (w * fine, h * fine), ground)
    pen = ImageDraw.Draw(image)
    for shape, colour, x, y, r, turn in shapes:
        pen.polygon(shape_points(shape, x * fine, y * fine, r * fine, turn), fill=colour)
        if shape == "ring":
            pen.polygon(shape_points("circle", x * fine, y * fine, r * fine * 0.55, 0), fill=ground)
    return np.asarray(image.resize((w, h), Image.BOX))


def tint(rng, name):
    return tuple(int(v) for v in np.clip(np.array(COLOURS[name]) + rng.integers(-14, 15, 3), 0, 255))


def paste_emoji(rng, rgba, size=None):
    """An emoji on a ground of one colour, of two, or of a gradient: turned, scaled, shifted."""
    h, w = size or (int(rng.integers(56, 101)), int(rng.integers(56, 101)))
    a, b = (rng.integers(0, 256, 3) for _ in range(2))
    kind, ramp = int(rng.integers(3)), np.linspace(0, 1, w)[None, :, None]
    if kind == 0:
        field = np.broadcast_to(a, (h, w, 3))
    elif kind == 1:
        field = np.where(ramp < rng.uniform(0.2, 0.8), a, b)
    else:
        field = a * (1 - ramp) + b * ramp
    image = Image.fromarray(np.broadcast_to(field, (h, w, 3)).astype(np.uint8))
    side = int(min(h, w) * rng.uniform(0.65, 1.0))
    picture = Image.fromarray(rgba).rotate(float(rng.uniform(-25, 25)), Image.BILINEAR).resize((side, side), Image.BILINEAR)
    image.paste(picture, (int(rng.integers(0, w - side + 1)), int(rng.integers(0, h - side + 1))), picture)
    return np.asarray(image)


@functools.lru_cache(512)
def font(path, size):
    return ImageFont.truetype(path, size)


def write_text(rng, text, path):
    """Text in a picture a little larger than it, dark on light or light on dark, perhaps slightly turned."""
    face = font(path, int(rng.integers(17, 29)))
    left, top, right, bottom = face.getbbox(text)
    w, h = right - left + int(rng.integers(8, 24)), bottom - top + int(rng.integers(8, 20))
    h = max(h, 24)
    a, b = rng.integers(0, 90, 3), rng.integers(165, 256, 3)
    if rng.random() < 0.4:
        a, b = b, a
    image = Image.new("RGB", (w, h), tuple(int(v) for v in b))
    ImageDraw.Draw(image).text((int(rng.integers(2, max(w - right + left - 2, 3))) - left, int(rng.integers(2, max(h - bottom + top - 2, 3))) - top), text, font=face, fill=tuple(int(v) for v in a))
    if rng.random() < 0.3:
        image = image.rotate(float(rng.uniform(-3, 3)), Image.BILINEAR, fillcolor=tuple(int(v) for v in b))
    return np.asarray(image)


# ------------------------------------------------------------------------------------------------ sounds

def smooth(x, share):
    from scipy.signal import lfilter
    return lfilter([share], [1, share - 1], x)


def pulse(n, at, length, rise=0.02):
    """An envelope that rises at `at` (samples) and dies away."""
    t = np.arange(n) - at
    return np.where(t >= 0, np.minimum(t / (rise * RATE), 1) * np.exp(-np.maximum(t, 0) / length), 0)


def chirp(frequency, rng=None, timbre=0):
    """A tone whose frequency (an array, in Hz) may change: sine, soft square, or rich."""
    phase = 2 * np.pi * np.cumsum(frequency) / RATE
    if timbre == 0:
        return np.sin(phase)
    if timbre == 1:
        return np.tanh(3 * np.sin(phase))
    return np.sin(phase) + 0.5 * np.sin(2 * phase) + 0.3 * np.sin(3 * phase)


def ambient(rng, name):
    """A synthetic sound of nature or everyday life, 1.2 to 2.4 seconds."""
    n = int(rng.uniform(1.2, 2.4) * RATE)
    t, noise, u = np.arange(n) / RATE, rng.standard_normal(n), rng.uniform
    if name == "rain":
        x = 0.25 * (noise - smooth(noise, 0.3))
        for at in rng.integers(0, n - 400, int(n / RATE * u(25, 60))):
            x[at:at + 200] += u(0.5, 2) * rng.standard_normal(200) * np.exp(-np.arange(200) / 30)
        return x
    if name == "wind":
        return smooth(smooth(noise, u(0.02, 0.06)), 0.2) * (1 + 0.8 * np.sin(2 * np.pi * u(0.3, 0.9) * t + u(0, 6)))
    if name == "waves":
        return smooth(noise, u(0.15, 0.4)) * (0.15 + np.maximum(0, np.sin(2 * np.pi * u(0.4, 0.7) * t + u(0, 6))) ** 2)
    if name == "clock":
        x, step = np.zeros(n), int(RATE / u(1.8, 4.5))
        for i, at in enumerate(range(int(u(0, step)), n, step)):
            x += pulse(n, at, 60, 0.001) * np.sin(2 * np.pi * (2600 if i % 2 else 2100) * t)
        return x
    if name == "siren":
        rate, wide = u(0.6, 2.5), u(0.2, 0.45)
        wave = np.sin(2 * np.pi * rate * t) if rng.random() < 0.5 else np.sign(np.sin(2 * np.pi * rate * t))
        return chirp(u(650, 950) * (1 + wide * wave), timbre=1)
    if name == "bird":
        x = np.zeros(n)
        for at in np.cumsum(rng.uniform(0.08, 0.3, 20)):
            m = int(u(0.04, 0.12) * RATE)
            a = int(at * RATE)
            if a + m < n:
                x[a:a + m] += np.hanning(m) * chirp(np.linspace(u(2500, 5500), u(2500, 5500), m))
        return x
    if name == "heartbeat":
        x, step, tone = np.zeros(n), int(RATE / u(0.9, 1.8)), u(45, 75)
        for at in range(int(u(0, step / 2)), n, step):
            for d in (0, int(0.22 * step)):
                x += pulse(n, at + d, 700) * np.sin(2 * np.pi * tone * t)
        return x
    if name == "engine":
        f = u(35, 80) * (1 + u(0, 0.6) * t / t[-1])
        return chirp(f, timbre=1) * (1 + 0.5 * np.sin(np.cumsum(f) / RATE * np.pi)) + 0.3 * smooth(noise, 0.1)
    if name == "crickets":
        return np.sin(2 * np.pi * u(3800, 5200) * t) * (np.sin(2 * np.pi * u(25, 45) * t) > 0) * (np.sin(2 * np.pi * u(1.5, 4) * t) > -0.2)
    if name == "footsteps":
        x, step = np.zeros(n), int(RATE / u(1.5, 3))
        for at in range(int(u(0, step / 2)), n, step):
            x += pulse(n, at, u(500, 900), 0.004) * smooth(noise, u(0.05, 0.15)) * 3
        return x
    if name == "applause":
        x = np.zeros(n)
        for at in rng.integers(0, n - 700, int(n / RATE * u(60, 140))):
            x[at:at + 600] += u(0.4, 1) * rng.standard_normal(600) * np.exp(-np.arange(600) / 90)
        return x - smooth(x, 0.1)
    f, x = u(500, 1400), np.zeros(n)  # church bell
    for k, a in ((0.5, 0.6), (1, 1), (1.19, 0.7), (1.56, 0.5), (2, 0.6), (2.51, 0.3), (3.01, 0.2)):
        x += a * np.sin(2 * np.pi * f / 2 * k * t) * np.exp(-t * k * u(0.8, 1.8))
    return x


AMBIENT = ["rain", "wind", "waves", "clock", "siren", "bird", "heartbeat", "engine", "crickets", "footsteps", "applause", "church bell"]


def finish(rng, x, least=1.02):
    """A sound at some loudness over some noise, at least a second long (shorter clips would be padded otherwise by the tower)."""
    x = np.asarray(x, dtype=np.float64)
    before = int(rng.uniform(0, 0.15) * RATE)
    n = max(int(least * RATE), len(x) + before + int(rng.uniform(0, 0.1) * RATE))
    out = np.zeros(n)
    out[before:before + len(x)] = x / max(np.abs(x).max(), 1e-9) * 10 ** rng.uniform(-0.75, -0.1)
    return (out + rng.standard_normal(n) * 10 ** rng.uniform(-4.5, -2.3)).clip(-1, 1).astype(np.float32)


def change_speed(x, rate):
    """The same samples, played `rate` times as fast: pitch and length change together."""
    at = np.arange(0, len(x) - 1, rate)
    return np.interp(at, np.arange(len(x)), x)


# ------------------------------------------------------------------------------------------------ what the towers take

def smart_resize(h, w, low=3136, high=12845056, factor=32):
    a, b = round(h / factor) * factor, round(w / factor) * factor
    if a * b > high:
        k = math.sqrt(h * w / high)
        a, b = max(factor, math.floor(h / k / factor) * factor), max(factor, math.floor(w / k / factor) * factor)
    elif a * b < low:
        k = math.sqrt(low / (h * w))
        a, b = math.ceil(h * k / factor) * factor, math.ceil(w * k / factor) * factor
    return a, b


def resize(frames, h, w):
    """Byte frames [T, H, W, 3] to [T, 3, h, w], cubic with antialias on bytes, as the published processor does it."""
    import torch
    x = torch.from_numpy(np.array(frames)).permute(0, 3, 1, 2)
    if x.shape[2:] != (h, w):
        x = torch.nn.functional.interpolate(x.contiguous(), (h, w), mode="bicubic", antialias=True)
    return x.numpy()


def patches(frames, low=3136, high=12845056):
    """Frames [T, H, W, 3] (T = 1: a still picture) to byte patches [t*h*w, 1536] and the grid (t, h, w)."""
    H, W = smart_resize(frames.shape[1], frames.shape[2], low, high)
    x = resize(frames, H, W)
    if len(x) % 2:
        x = np.concatenate([x, x[-1:]])
    t, h, w = len(x) // 2, H // 16, W // 16
    x = x.reshape(t, 2, 3, h // 2, 2, 16, w // 2, 2, 16).transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(t * h * w, 1536), (t, h, w)


VIDEO_PIXELS = dict(low=4096, high=65536)  # per frame; the published processor's own are 131072 and 786432


@functools.lru_cache(1)
def mel_tables():
    import torch
    from transformers import WhisperFeatureExtractor
    extractor = WhisperFeatureExtractor(feature_size=128, sampling_rate=RATE, hop_length=160, n_fft=400)
    return torch.from_numpy(np.asarray(extractor.mel_filters, dtype=np.float32)).T.contiguous(), torch.hann_window(400)


def log_mel(x):
    """Whisper's log-mel of one clip, [128, samples // 160]."""
    import torch
    filters, window = mel_tables()
    power = torch.stft(torch.from_numpy(x), 400, 160, window=window, return_complex=True)[..., :-1].abs() ** 2
    l = torch.clamp(filters @ power, min=1e-10).log10()
    return ((torch.maximum(l, l.max() - 8.0) + 4.0) / 4.0).numpy()


def audio_tokens(frames):
    """How many tokens the audio tower makes of so many frames."""
    r = frames % 100
    f = -(-r // 2)
    return -(-(-(-f // 2)) // 2) + frames // 100 * 13
