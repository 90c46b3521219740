"""Vectors of the expert function at the precisions q8 and q4, bit for bit as docs/expert-function.md defines it.

usage: expert_function.py [OUT.safetensors]      (made with Python 3.11, numpy 2.4.6; nothing else is needed)

Without OUT it is tests/vectors/expert_function.safetensors; the README there says what is in it. Written from the page
alone, not from the Rust code. An array of np.float32 stays one: + - * / and rint of NumPy are the page's ⊕ ⊖ ⊗ ÷ and
round_half_even. What NumPy lacks or could get wrong (fma, the rounding to f16) is checked against exact fractions
before anything is written.
"""
import json
import os
import struct
import sys
from fractions import Fraction

import numpy as np

F = np.float32
GROUP = 32  # columns that share a scale
PANEL = 16  # rows of a block
PLANE_ALIGN = 64
MATRICES = ("gate_proj", "up_proj", "down_proj")
PRECISIONS = {"q8": 3, "q4": 4}  # the code in a blob's header
BLOCK_BYTES = {"q8": 544, "q4": 288}

CASES = [(64, 48), (256, 96), (96, 80), (33, 17), (512, 128), (7, 5)]  # hidden_size, intermediate_size
ANY_CASE = (64, 32)  # a blob of random bytes; whole panels and groups, so that none of them is filling
ROWS = 13
LARGE_FROM = 96  # intermediate_size from which gate_proj and up_proj have large weights too, see source_weights

# Picked from 300,000 random groups (see pack_case): sensitive to the order of a sum or a product in the q4 search, to
# the first of equal errors, to a reciprocal for a division, or to p, q or p ÷ q kept in more than f32.
SENSITIVE = [6, 12, 228, 3376, 7328, 19980, 21990, 24542, 25283, 32804, 41892, 46764, 51661, 71401, 135320, 176841,
             182098, 227422, 237928, 244552, 257124, 296722]


# ---- arithmetic

def fma(a, b, c):
    """a·b + c, rounded once to f32, of finite f32 values.

    Why it is exact: the product of two 24-bit numbers has 48 bits and is a multiple of 2^-298, so f64 holds it. The
    sum in f64 is rounded, and two-sum (Knuth) yields its error exactly. If there is one, the exact sum lies between
    two neighbouring f64; the one whose last bit is 1 is taken ("round to odd"). With 53 >= 24 + 2 bits that keeps
    apart all that rounding to f32 has to tell apart, so the cast to f32, to nearest even, acts as the only rounding.
    """
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    c = np.asarray(c, np.float64)
    total = np.asarray(product + c)
    c_part = total - product
    error = np.asarray((product - (total - c_part)) + (c - c_part))
    total, error = np.broadcast_arrays(total, error)
    bits = np.array(total).view(np.int64)
    step = np.where((error > 0) == (total > 0), 1, -1)  # in bits, +1 is away from zero; total is not 0 if error is not
    bits = np.where((error != 0) & (bits & 1 == 0), bits + step, bits)
    with np.errstate(over="ignore", under="ignore"):
        return bits.view(np.float64).astype(F)


def half(x):
    """f16(x): to nearest even; too large gives infinity."""
    with np.errstate(over="ignore", under="ignore"):
        return x.astype(np.float16)


def grouped(x):
    """Fills the last axis with zeros to whole groups and cuts it: (..., K) to (..., groups, 32)."""
    filling = -x.shape[-1] % GROUP
    x = np.concatenate([x, np.zeros(x.shape[:-1] + (filling,), x.dtype)], -1)
    return x.reshape(x.shape[:-1] + (-1, GROUP))


def sum32(x):
    """Σ over the last axis: element i and i + 16, then i and i + 8, i + 4, i + 2, i + 1."""
    for n in (16, 8, 4, 2, 1):
        x = x[..., :n] + x[..., n:2 * n]
    return x[..., 0]


def exp(x):
    bits = lambda pattern: np.uint32(pattern).view(F)
    x = np.minimum(np.maximum(x, F(-87)), F(88))
    n = np.rint(x * bits(0x3FB8AA3B))
    r = fma(n, bits(0xBF318000), x)
    r = fma(n, bits(0x395E8083), r)
    p = np.full_like(r, F(1) / F(5040))
    for divisor in (720, 120, 24, 6, 2, 1, 1):
        p = fma(p, r, F(1) / F(divisor))
    return np.ldexp(p, n.astype(np.int32))


def silu(z):
    return z / (F(1) + exp(-z))


# ---- weights

def quantize_q8(x):
    """Groups (rows, groups, 32) of f32 to f16 scales (rows, groups) and integer weights."""
    d = half(np.abs(x).max(-1) / F(127))
    divisor = np.where(d == 0, F(1), d.astype(F))
    w = np.clip(np.rint(x / divisor[..., None]), -127, 127)
    return d, np.where((d == 0)[..., None], 0, w).astype(np.int32)


def quantize_q4(x):
    """As quantize_q8, by the search for the scale with the least error."""
    first_largest = np.abs(x).argmax(-1)[..., None]
    m = np.take_along_axis(x, first_largest, -1)[..., 0]
    plain = half(m / F(-8))
    with np.errstate(all="ignore"):  # groups of scale 0 compute nonsense here, which is dropped below
        round_by = lambda d: np.clip(np.rint(x / d.astype(F)[..., None]), F(-8), F(7))
        best_d, best_w = plain.copy(), round_by(plain)  # if every n is passed over
        best_error = np.zeros_like(m)
        found = np.zeros(m.shape, bool)
        for n in range(-12, 13):
            w = round_by(m / -(F(8) + F(n) * F(0.125)))
            p = sum32(x * w)
            q = sum32(w * w)
            d = half(p / q)
            taken = (q > 0) & (d != 0) & np.isfinite(d)
            w = round_by(d)
            t = x - d.astype(F)[..., None] * w
            error = sum32(t * t)
            better = taken & (~found | (error < best_error))
            best_d = np.where(better, d, best_d)
            best_w = np.where(better[..., None], w, best_w)
            best_error = np.where(better, error, best_error)
            found |= taken
    zero = plain == 0
    return np.where(zero, np.float16(0), best_d), np.where(zero[..., None], 0, best_w).astype(np.int32)


QUANTIZE = {"q8": quantize_q8, "q4": quantize_q4}


def plane_of(precision, d, w):
    """The bytes of a packed matrix of scales d (rows, groups) and weights w (rows, groups, 32)."""
    rows, groups = d.shape
    filling = -rows % PANEL
    d = np.concatenate([d, np.zeros((filling, groups), np.float16)])
    w = np.concatenate([w, np.zeros((filling, groups, GROUP), np.int32)])
    d = d.reshape(-1, PANEL, groups).transpose(0, 2, 1)  # panel, group, row
    w = w.reshape(-1, PANEL, groups, GROUP // 4, 4).transpose(0, 2, 3, 1, 4)  # panel, group, j, row, i
    if precision == "q8":
        values = 128 + w
    else:
        values = (8 + w[:, :, :4]) | (8 + w[:, :, 4:]) << 4
    scale_bytes = np.ascontiguousarray(d.astype("<f2")).view(np.uint8)
    weight_bytes = values.astype(np.uint8).reshape(d.shape[0], groups, -1)
    return np.concatenate([scale_bytes, weight_bytes], -1).tobytes()


def read_plane(precision, plane, rows, columns):
    """What a plane says, byte by byte in the page's words: scales and weights, without the filling rows."""
    panels, groups = -(-rows // PANEL), -(-columns // GROUP)
    d = np.zeros((panels * PANEL, groups), np.float16)
    w = np.zeros((panels * PANEL, groups, GROUP), np.int32)
    at = 0
    for panel in range(panels):
        for group in range(groups):
            d[panel * PANEL:(panel + 1) * PANEL, group] = np.frombuffer(plane, "<f2", PANEL, at)
            at += 2 * PANEL
            for j in range(8 if precision == "q8" else 4):
                for r in range(panel * PANEL, (panel + 1) * PANEL):
                    for i in range(4):
                        if precision == "q8":
                            w[r, group, 4 * j + i] = plane[at] - 128
                        else:
                            w[r, group, 4 * j + i] = (plane[at] & 15) - 8
                            w[r, group, 16 + 4 * j + i] = (plane[at] >> 4) - 8
                        at += 1
    assert at == len(plane) == panels * groups * BLOCK_BYTES[precision]
    return d[:rows], w[:rows]


def blob_of(precision, hidden, intermediate, planes):
    """An expert's blob: docs/expert-format.md."""
    blob = struct.pack("<4sHBBIII44x", b"CFXP", 1, PRECISIONS[precision], 0, hidden, intermediate, GROUP)
    for plane in planes:
        blob += plane + bytes(-len(plane) % PLANE_ALIGN)
    return np.frombuffer(blob, np.uint8)


# ---- the function

def quantize_activations(x):
    """Vectors (T, K) to integers (T, groups, 32) and f32 scales (T, groups)."""
    assert np.isfinite(x).all()
    x = grouped(x)
    a = np.abs(x).max(-1)
    nothing = a < F(2.0 ** -100)
    a = np.where(nothing, F(1), a)
    q = np.rint(x * (F(127) / a)[..., None])
    assert np.abs(q[~nothing]).max(initial=0) <= 127
    return np.where(nothing[..., None], 0, q).astype(np.int32), np.where(nothing, F(0), a / F(127))


def times(matrix, activations):
    """A packed matrix times quantised vectors: (T, rows)."""
    d, w = matrix
    q, s = activations
    y = np.zeros((len(q), len(d)), F)
    for g in range(d.shape[1]):
        n = q[:, g].astype(np.int64) @ w[:, g].T.astype(np.int64)
        y = fma(n.astype(F), d[:, g].astype(F) * s[:, g, None], y)
    return y


def expert(matrices, x):
    """gate_proj·X and the expert's result, for rows x."""
    gate_proj, up_proj, down_proj = matrices
    activations = quantize_activations(x)
    gate = times(gate_proj, activations)
    h = silu(gate) * times(up_proj, activations)
    return gate, times(down_proj, quantize_activations(h))


def weighted_sum(weights, y):
    z = np.zeros(y.shape[1], F)
    for weight, row in zip(weights, y):
        z = fma(weight, row, z)
    return z


# ---- what the vectors are made of

def bf16(x):
    """Rounds f32 to the nearest bf16, ties to even: its 16 bits."""
    bits = np.ascontiguousarray(x, F).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(F)


def special_groups(rng, large):
    """Groups of weights that reach the corners of the page, each cut to the columns there are."""
    noise = lambda size: F(size) * rng.standard_normal(GROUP, dtype=F)
    tiny = noise(1e-30)
    tiny[::3] = F(1e-39)  # subnormal in bf16
    ties = [np.clip(noise(0.05), F(-0.09), F(0.09)) for _ in range(2)]  # the largest magnitude with both signs
    ties[0][[1, 3, 4]] = F(0.125), F(-0.125), F(0.125)
    ties[1][[0, 2, 4]] = F(-0.125), F(0.125), F(-0.125)
    single = np.zeros(GROUP, F)
    single[0] = F(0.0703125)
    halves_q8 = (rng.integers(-63, 63, GROUP) + 0.5).astype(F) / F(128)  # d = 1/128: every w but one is a tie
    halves_q8[2] = F(127 / 128)
    halves_q4 = (rng.integers(-7, 7, GROUP) + 0.5).astype(F) / F(64)  # the same for m ÷ −8 = 1/64
    halves_q4[1] = F(-8 / 64)
    outlier = noise(0.02)
    outlier[5] = F(0.75)
    alternating = np.where(np.arange(GROUP) % 2, F(-0.25), F(0.25))
    groups = [
        np.zeros(GROUP, F), tiny, *ties, single, halves_q8, halves_q4, outlier,
        np.full(GROUP, F(0.5)), np.full(GROUP, F(-0.5)), alternating,  # the largest sums of products of each sign
        noise(3e-7), noise(4e-6),  # scales around half the least f16, in q4 and in q8
        noise(1e-4),  # subnormal scales
    ]
    if large:
        refused = np.full(GROUP, F(-520192))  # q4: m ÷ −8 is a finite f16, but p ÷ q of no n is
        refused[0] = F(520192)
        groups += [noise(30000), refused]
    return groups


def source_weights(rng, hidden, intermediate):
    """The three matrices as bf16 bits: normal × 0.05, with special groups at random places, at most half of all groups.

    Large weights in gate_proj or up_proj make large elements of h, beside which those in the same group vanish. So they
    stand there only where h has groups enough.
    """
    out = {}
    for name in MATRICES:
        rows, columns = (hidden, intermediate) if name == "down_proj" else (intermediate, hidden)
        x = F(0.05) * rng.standard_normal((rows, columns), dtype=F)
        specials = special_groups(rng, name == "down_proj" or intermediate >= LARGE_FROM)
        groups = -(-columns // GROUP)
        order = rng.permutation(len(specials))
        places = rng.permutation(rows * groups)[:rows * groups // 2]
        for special, place in zip(order, places):
            row, start = place // groups, place % groups * GROUP
            stop = min(start + GROUP, columns)
            x[row, start:stop] = specials[special][:stop - start]
        out[name] = bf16(x)
    return out


def inputs(rng, hidden):
    x = rng.standard_normal((ROWS, hidden), dtype=F)
    columns = np.arange(hidden)
    group = columns // GROUP
    first = columns % GROUP == 0
    x[0] = np.where(columns % 2, F(0), F(-0.0))
    x[1] = F(1e-35) * np.sign(x[1])  # below 2⁻¹⁰⁰
    x[2] = rng.uniform(-1e4, 1e4, hidden).astype(F)
    halves = np.where(first, 127, rng.integers(-127, 127, hidden) + 0.5)  # 127 ÷ a is a power of two: exact ties
    x[3] = (halves * 2.0 ** (group % 5 - 2)).astype(F)
    border = F(2.0 ** -100)  # in turn a = 2⁻¹⁰⁰ and the next f32 below it
    border = np.where(group % 2, np.nextafter(border, F(0)), border)
    x[4] = np.where(first, border, border * np.clip(x[4] / F(4), F(-1), F(1)))
    x[5] = F(3)
    x[6] = F(-2.7)
    x[7] = np.where(columns == hidden // 2, F(1.7), F(0))
    x[8] = x[8] * np.array([1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1, 10, 100, 1e3], F)[group % 10]
    x[9] = x[9] * F(20)
    a = rng.uniform(0.5, 4, group[-1] + 1).astype(F)  # the quotient or the product decides which way it rounds
    x[10] = near_ties(rng, a / F(127)).reshape(-1)[:hidden]
    x[10] = np.where(first, a[group], x[10])
    return x


def random_planes(rng, precision, hidden, intermediate):
    """Planes of any bytes: every weight there is, 0 (−128 in q8) too; scales of both signs, subnormal ones and ±0."""
    planes = []
    for rows, columns in [(intermediate, hidden)] * 2 + [(hidden, intermediate)]:
        size = BLOCK_BYTES[precision]
        blocks = rng.integers(0, 256, (rows // PANEL * (columns // GROUP), size), dtype=np.uint8)
        scales = rng.integers(6, 12, (len(blocks), PANEL), dtype=np.uint16) << 10  # exponents
        scales[:, 3] = 0
        scales |= rng.integers(0, 1 << 10, scales.shape, dtype=np.uint16)
        scales[:, 7] = 0
        scales |= rng.integers(0, 2, scales.shape, dtype=np.uint16) << 15
        blocks[:, :2 * PANEL] = scales.astype("<u2").view(np.uint8)
        blocks[0, 2 * PANEL:] = 0  # every weight the least there is: the largest sums
        planes.append(blocks.tobytes())
    return planes


def read_blob(precision, hidden, intermediate, blob):
    """The matrices of a blob."""
    matrices, at, data = [], 64, blob.tobytes()
    for rows, columns in [(intermediate, hidden)] * 2 + [(hidden, intermediate)]:
        size = -(-rows // PANEL) * -(-columns // GROUP) * BLOCK_BYTES[precision]
        matrices.append(read_plane(precision, data[at:at + size], rows, columns))
        at += size + -size % PLANE_ALIGN
    assert at == len(data)
    return matrices


def expert_case(case, rng, hidden, intermediate, sources):
    """The tensors of one expert; without source weights, of blobs of random bytes."""
    x = inputs(rng, hidden)
    q, s = quantize_activations(x)
    out = {f"{case}.x": x, f"{case}.x_q": q.reshape(ROWS, -1).astype(np.int8), f"{case}.x_scale": s}
    for name, bits in sources.items():
        out[f"{case}.{name}"] = bits
    for precision in PRECISIONS:
        if sources:
            packed = [QUANTIZE[precision](grouped(from_bf16(sources[name]))) for name in MATRICES]
            planes = [plane_of(precision, *matrix) for matrix in packed]
        else:
            planes = random_planes(rng, precision, hidden, intermediate)
        blob = blob_of(precision, hidden, intermediate, planes)
        matrices = read_blob(precision, hidden, intermediate, blob)
        if sources:
            for (d, w), (read_d, read_w) in zip(packed, matrices):
                assert np.array_equal(d.view(np.uint16), read_d.view(np.uint16)) and np.array_equal(w, read_w)
        out[f"{case}.{precision}.blob"] = blob
        out[f"{case}.{precision}.gate"], out[f"{case}.{precision}.y"] = expert(matrices, x)
    return out


def near_ties(rng, unit):
    """Numbers within one f32 of (k + ½) · unit, for groups' units (rows)."""
    x = ((rng.integers(-126, 126, (len(unit), GROUP)) + 0.5) * unit[:, None].astype(np.float64)).astype(F)
    aside = rng.integers(-1, 2, x.shape)
    return np.where(aside == 0, x, np.nextafter(x, aside.astype(F)))


def pack_case(rng):
    """Weights of f32 and their planes: 42 rows of 40 columns."""
    sensitive = [np.random.default_rng([5, i]).integers(-1 << 20, 1 << 20, GROUP) * 2.0 ** -24 for i in SENSITIVE]
    a = rng.uniform(0.05, 0.5, 12).astype(F)
    ties = near_ties(rng, half(a / F(127)))
    ties[:, 9] = a
    first = np.concatenate([np.array(sensitive, F), ties, F(0.05) * rng.standard_normal((8, GROUP), dtype=F)])
    sizes = np.array([1e-8, 1e-7, 1e-6, 1e-4, 0.03, 1, 1e3], F)[np.arange(len(first)) % 7]
    second = sizes[:, None] * rng.standard_normal((len(first), 8), dtype=F)
    x = np.concatenate([first, second], 1)
    out = {"pack.x": x}
    for precision in PRECISIONS:
        plane = plane_of(precision, *QUANTIZE[precision](grouped(x)))
        out[f"pack.{precision}.plane"] = np.frombuffer(plane, np.uint8)
    return out


def function_cases(rng):
    """Arguments and values of exp, silu and the weighted sum."""
    spread = np.linspace(-100, 100, 2048).astype(F)
    uniform = rng.uniform(-100, 100, 1024).astype(F)
    turns = ((np.arange(-126, 128) + 0.5) * np.log(2)).astype(F)  # where n changes
    turns = np.concatenate([turns, np.nextafter(turns, F(200)), np.nextafter(turns, F(-200))])
    signed = np.array([0, 1e-45, 1e-40, 1.1754944e-38, 1e-30, 1e-10, 1e-7, 1e-3, 1, 1e3, 1e10, 1e30, 3.4e38], F)
    edges = np.array([86.5, 87, 88], F)
    edges = np.concatenate([edges, np.nextafter(edges, F(0)), np.nextafter(edges, F(200)), [F(88.5), F(104)]])
    special = np.concatenate([signed, -signed, edges, -edges])
    rest = rng.standard_normal(4096 - len(spread) - len(uniform) - len(turns), dtype=F)
    x = np.concatenate([special, spread, uniform, turns, rest])

    weights = np.array([0.40625, 0.23, 0.17, 0.1, 0.0625, 0.03], F)
    y = F(2) * rng.standard_normal((len(weights), 64), dtype=F)
    y[:, 0] = F(-0.0)
    y[:, 1] = F(1e-40) * rng.standard_normal(len(weights), dtype=F)
    y[:, 2] = np.array([1, 1, 1e-30, 0, 0, 0], F) * (F(1) / weights) * np.array([1, -1, 1, 1, 1, 1], F)  # cancels
    y[:, 3] = np.array([1e30, -1e30, 1e10, 1, 1e-10, -1], F)
    y[:, 4] = np.array([1e-38, -1e-38, 1e-44, 3e-45, -1e-45, 1e-45], F)
    return {
        "exp.x": x, "exp.y": exp(x), "silu.z": x, "silu.y": silu(x),
        "layer.weights": weights, "layer.y": y, "layer.z": weighted_sum(weights, y),
    }


# ---- checks against exact fractions

def rounded(value, precision, least, limit):
    """A fraction to the nearest number of `precision` bits, a multiple of 2^least below 2^limit; ties to even."""
    if value == 0:
        return 0.0
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - precision + 1, least)
    result = round(value / unit) * unit
    return float(result) if abs(result) < Fraction(2) ** limit else float("inf") * (1 if value > 0 else -1)


def hard_triples(rng, n):
    """Arguments of fma, n of each kind: of any size, and those that a wrong fma gets wrong."""
    def floats(low, high):
        return np.ldexp(rng.choice([-1.0, 1.0], n) * rng.uniform(1, 2, n), rng.integers(low, high, n)).astype(F)

    def power(low, high):
        return 2.0 ** rng.integers(low, high, n)

    yield floats(-40, 40), floats(-40, 40), floats(-80, 80)
    yield floats(-8, 8), floats(-8, 8), floats(-30, 30)
    a, b = floats(-10, 10), floats(-10, 10)
    c = -(a * b)
    yield a, b, np.where(rng.random(n) < 0.5, c, np.nextafter(c, F(0)))  # cancels but for the rounding of the product
    yield floats(-80, -60), floats(-80, -60), rng.integers(-9, 10, n) * 2.0 ** -149  # subnormal
    a = floats(-20, 20)
    yield a, rng.choice([-1, 1], n) * power(-30, 1), a * power(-30, 31)  # like 1 + 2⁻²⁴: ties
    few = rng.integers(-7, 8, (3, n)) * 2.0 ** rng.choice([-75, -74, -24, -12, 0, 12, 24], (3, n))
    yield tuple(few)  # ties and zeros
    # A tie but for an addend that f64 has no room for: a·b has 25 bits and is odd ...
    a, b = rng.integers(1 << 11, 2896, (2, n)) * 2 + 1
    yield a * rng.choice([-1, 1], n), b, rng.choice([-1.0, 1.0], n) * rng.uniform(1, 2, n) * power(-50, -20)
    # ... and in subnormal results: a·b = 2⁻¹⁵⁰ (1 ± about 2⁻²³, or 1 − 2⁻⁴⁶), c a multiple of 2⁻¹⁴⁹
    up, down = (1 + 2.0 ** -23) * 2.0 ** -75, (1 - 2.0 ** -23) * 2.0 ** -75
    yield np.where(rng.random(n) < 0.8, up, down), np.full(n, down), rng.integers(-1 << 23, 1 << 23, n) * 2.0 ** -149


def check_arithmetic(rng, count=100_000):
    """fma and half against Python's fractions."""
    a, b, c = (np.concatenate(part).astype(F) for part in zip(*hard_triples(rng, count // 8)))
    triples = list(zip(a.tolist(), b.tolist(), c.tolist()))
    exact = [Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in triples]
    wanted = np.array([rounded(value, 24, -149, 128) for value in exact]).astype(F)
    got = fma(a, b, c)
    assert len(got) >= count and np.array_equal(got, wanted)
    assert all(np.signbit(y) == (value < 0) for y, value in zip(got, exact) if value != 0)
    with np.errstate(all="ignore"):
        twice = (a.astype(np.float64) * b + c).astype(F)
        separately = a * b + c
    hard = int((got != twice).sum()), int((got != separately).sum())

    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(F)
    middles = (halves[1:] + halves[:-1]) / F(2)
    below, above = np.nextafter(middles, F(0)), np.nextafter(middles, F(1e9))
    x = np.concatenate([halves, middles, below, above, F([65519.996, 65520, 1e30])])
    wanted = np.array([rounded(Fraction(value), 11, -24, 16) for value in x.tolist()]).astype(F)
    assert np.array_equal(half(x).astype(F), wanted)
    assert np.array_equal(half(-x).astype(F), -wanted)
    assert min(hard) > 0
    print(f"fma: {len(got)} triples exact; rounding to f64 first errs in {hard[0]}, two operations err in {hard[1]}")
    print(f"f16: {2 * len(x)} values exact")


def save(path, tensors):
    """Writes a safetensors file: large elements first, so that all are aligned."""
    types = {np.dtype(F): "F32", np.dtype(np.uint16): "BF16", np.dtype(np.int8): "I8", np.dtype(np.uint8): "U8"}
    header, data = {}, b""
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        raw = tensor.astype(tensor.dtype.newbyteorder("<")).tobytes()
        header[name] = {
            "dtype": types[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]
        }
        data += raw
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head + data)


def main():
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "expert_function.safetensors")
    path = sys.argv[1] if len(sys.argv) > 1 else os.path.normpath(beside)
    check_arithmetic(np.random.default_rng(1))
    tensors = {}
    for hidden, intermediate in CASES:
        rng = np.random.default_rng([2, hidden, intermediate])
        sources = source_weights(rng, hidden, intermediate)
        tensors |= expert_case(f"{hidden}x{intermediate}", rng, hidden, intermediate, sources)
    tensors |= expert_case("any", np.random.default_rng(3), *ANY_CASE, {})
    tensors |= function_cases(np.random.default_rng(4))
    tensors |= pack_case(np.random.default_rng(6))
    for name, tensor in tensors.items():
        values = from_bf16(tensor) if tensor.dtype == np.uint16 else tensor
        assert np.isfinite(values).all(), f"{name} is not finite"
    save(path, tensors)
    print(f"{path}: {len(tensors)} tensors, {os.path.getsize(path)} bytes")


if __name__ == "__main__":
    main()
