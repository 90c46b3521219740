"""Writes manifests as docs/manifest.md draws them, by nothing but that page: python scripts/manifest.py manifest.json"""
import json
import struct
import sys

from blake3 import blake3

u16 = lambda n: struct.pack("<H", n)
u32 = lambda n: struct.pack("<I", n)
u64 = lambda n: struct.pack("<Q", n)
f32 = lambda x: struct.pack("<f", x)
f64 = lambda x: struct.pack("<d", x)
u8 = lambda n: struct.pack("<B", n)
listed = lambda members: u64(len(members)) + b"".join(members)
option = lambda value: b"\0" if value is None else b"\1" + value
text = lambda value: u64(len(value.encode())) + value.encode()
blob = lambda name, length: blake3(name.encode()).digest() + u64(length)

PLAIN = {0: 4, 1: 2, 2: 2}
BLOCK = {3: 32 + 512, 4: 32 + 256}


def matrix(precision, rows, columns):
    if precision in PLAIN:
        return rows * columns * PLAIN[precision]
    return -(-rows // 16) * -(-columns // 32) * BLOCK[precision]


def expert(precision, hidden, width):
    padded = lambda n: -(-n // 64) * 64
    return 64 + 2 * padded(matrix(precision, width, hidden)) + padded(matrix(precision, hidden, width))


HIDDEN, VOCAB, HEADS, KV, HEAD, EXPERTS, WIDTH, DENSE, SHARED = 64, 96, 4, 2, 16, 3, 48, 80, 40
LAYERS = ["dense", "moe", "moe"]
norm = u32(0) + f64(1e-5)
mixer = u32(0) + u32(HEADS) + u32(KV) + u32(HEAD) + u32(1) + f64(1e6) + u32(3) + u32(3) + u32(2) + u32(2) + u32(1)
dense = u32(0) + u32(DENSE) + u32(0)
moe = u32(1) + u32(EXPERTS) + u32(2) + u32(WIDTH) + u32(0) + u32(0) + u8(0) + u32(1) + u32(SHARED)
decoder = (
    u32(VOCAB) + u32(HIDDEN) + u32(128) + u32(0)
    + listed([u32(1) + norm + mixer + dense, u32(2) + norm + mixer + moe])
    + norm + u32(0)
)

trunk = []


def tensor(role, shape, packable=True):
    precision = 4 if packable and len(shape) == 2 else 2
    rows, columns = shape if len(shape) == 2 else (1, shape[0])
    trunk.append(role + u8(precision) + blob(f"tensor {len(trunk)}", matrix(precision, rows, columns)))


tensor(u32(0), (VOCAB, HIDDEN))
for layer, kind in enumerate(LAYERS):
    of = lambda number: u32(3) + u32(layer) + u32(number)
    queries, keys = HEADS * HEAD, KV * HEAD
    tensor(of(0), (HIDDEN,))
    for number, rows in ((1, queries), (2, keys), (3, keys)):
        tensor(of(number), (rows, HIDDEN))
    tensor(of(4), (HIDDEN, queries))
    for number, width in ((5, queries), (6, keys), (7, queries), (8, keys), (9, keys), (10, HIDDEN)):
        tensor(of(number), (width,))
    if kind == "dense":
        for number, shape in ((12, (DENSE, HIDDEN)), (13, (DENSE, HIDDEN)), (14, (HIDDEN, DENSE))):
            tensor(of(number), shape)
    else:
        tensor(of(11), (EXPERTS, HIDDEN), packable=False)
        for number, shape in ((15, (SHARED, HIDDEN)), (16, (SHARED, HIDDEN)), (17, (HIDDEN, SHARED))):
            tensor(of(number), shape)
        tensor(of(18), (1, HIDDEN), packable=False)
tensor(u32(1), (HIDDEN,))
tensor(u32(2), (VOCAB, HIDDEN))

experts = []
for number in range(EXPERTS * LAYERS.count("moe")):
    precision = (4, 3, 2)[number % 3]
    experts.append(u8(precision) + blob(f"expert {number}", expert(precision, HIDDEN, WIDTH)))

part = u32(0) + u32(0) + decoder + listed(trunk) + listed(experts)
chat = option(blob("template", 100)) + option(None) + option(text("</s>"))
generation = listed([u32(2), u32(7)]) + listed([text("\nUser:")]) + f32(0.5) + u32(20) + f32(0.75) + f32(1.0)
manifest = u16(3) + option(blake3(b"parent").digest()) + listed([part]) + option(blob("tokenizer", 1000)) + chat + generation

# The same with towers. Numbers of roles: (weight 0, bias 1) go last.
LAYERS_V, H_V, HEADS_V, W_V, PATCH, SIDE, DEEP = 3, 16, 2, 24, 16, 4, [0, 2]
LAYERS_A, H_A, HEADS_A, W_A, BANDS, CHANNELS = 2, 12, 3, 20, 16, 4
towers = []


def tower(role, shape, packable=False):
    rows = shape[0] if len(shape) > 1 else 1
    columns = 1
    for side in shape[1:] if len(shape) > 1 else shape:
        columns *= side
    precision = 3 if packable else 2
    towers.append(role + u8(precision) + blob(f"tower {len(towers)}", matrix(precision, rows, columns)))


def pair(role, shape, bias, packable=False):
    tower(role + u32(0), shape, packable)
    tower(role + u32(1), (bias,))


vision_role = lambda *numbers: u32(4) + b"".join(map(u32, numbers))
pair(vision_role(0), (H_V, 3, 2, PATCH, PATCH), H_V)
tower(vision_role(1), (SIDE * SIDE, H_V))
for block in range(LAYERS_V):
    pair(vision_role(2, block, 0), (H_V,), H_V)
    pair(vision_role(2, block, 1), (3 * H_V, H_V), 3 * H_V, True)
    pair(vision_role(2, block, 5), (H_V, H_V), H_V, True)
    pair(vision_role(2, block, 6), (H_V,), H_V)
    pair(vision_role(2, block, 7), (W_V, H_V), W_V, True)
    pair(vision_role(2, block, 8), (H_V, W_V), H_V, True)
for merger, norm in [((3,), H_V)] + [((4, number), 4 * H_V) for number in range(len(DEEP))]:
    pair(vision_role(*merger, 0), (norm,), norm)
    pair(vision_role(*merger, 1), (4 * H_V, 4 * H_V), 4 * H_V, True)
    pair(vision_role(*merger, 2), (HIDDEN, 4 * H_V), HIDDEN, True)
numbers = (LAYERS_V, H_V, HEADS_V, W_V, PATCH, 2, 2, SIDE, HIDDEN)
vision = u32(1) + b"".join(map(u32, numbers)) + listed([u32(n) for n in DEEP]) + b"".join(map(u32, (3, 4, 5, 6, 13, 3136, 9999, 4096, 8888)))
vision_part = u32(1) + vision + listed(towers) + listed([])

towers = []
audio_role = lambda *numbers: u32(5) + b"".join(map(u32, numbers))
for number in range(3):
    pair(audio_role(0, number), (CHANNELS, 1 if number == 0 else CHANNELS, 3, 3), CHANNELS)
tower(audio_role(1), (H_A, CHANNELS * BANDS // 8), True)
for layer in range(LAYERS_A):
    pair(audio_role(2, layer, 0), (H_A,), H_A)
    for tensor in (2, 3, 4, 5):
        pair(audio_role(2, layer, tensor), (H_A, H_A), H_A, True)
    pair(audio_role(2, layer, 6), (H_A,), H_A)
    pair(audio_role(2, layer, 7), (W_A, H_A), W_A, True)
    pair(audio_role(2, layer, 8), (H_A, W_A), H_A, True)
pair(audio_role(3), (H_A,), H_A)
pair(audio_role(4), (H_A, H_A), H_A, True)
pair(audio_role(5), (HIDDEN, H_A), HIDDEN, True)
numbers = (LAYERS_A, H_A, HEADS_A, W_A, BANDS, CHANNELS, 100, 800, HIDDEN, 7, 8, 9)
audio_part = u32(2) + u32(2) + b"".join(map(u32, numbers)) + listed(towers) + listed([])
seeing = u16(3) + option(None) + listed([part, vision_part, audio_part]) + option(blob("tokenizer", 1000)) + chat + generation

known = {"version_3": manifest, "version_3_towers": seeing}
json.dump({name: {"bytes": bytes_.hex(), "id": blake3(bytes_).hexdigest()} for name, bytes_ in known.items()}, open(sys.argv[1], "w"), indent=1)
