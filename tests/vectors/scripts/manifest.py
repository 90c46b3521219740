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

json.dump({"version_3": {"bytes": manifest.hex(), "id": blake3(manifest).hexdigest()}}, open(sys.argv[1], "w"), indent=1)
