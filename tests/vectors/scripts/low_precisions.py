"""Vectors of the precisions q6, q3 and q2, and of rounding with compensation, bit for bit as docs/expert-function.md defines them.

usage: low_precisions.py [OUT.safetensors]      (made with Python 3.11, numpy 2.4.6; nothing else is needed)

Without OUT it is tests/vectors/low_precisions.safetensors. Written from the page alone, not from the Rust code; arithmetic, inputs and
the layer's function are those of expert_function.py beside it.
"""
import os
import struct
import sys

import numpy as np

import expert_function as base
from expert_function import F, GROUP, PANEL, PLANE_ALIGN, half, grouped, sum32

BLOCK = {"q8": 544, "q6": 416, "q4": 288, "q3": 208, "q2": 144}
HEAD = {"q3": 64, "q2": 64}
TABLE = {"q3": np.array([-127, -76, -44, -18, 8, 34, 65, 106]), "q2": np.array([-127, -44, 18, 90])}
RANGE = {"q6": (-32, 31), "q4": (-8, 7), "q8": (-127, 127)}
CODE = {"q6": 5, "q3": 6, "q2": 7}
PLANES = {"q6": ["q6", "q6", "q6"], "q3": ["q3", "q3", "q4"], "q2": ["q2", "q2", "q3"]}
CASES = [(64, 48), (33, 17), (96, 80)]


# ---- scales

def short_value(code, unit):
    """8-bit scales: sign, 4 bits of exponent from `unit` on, 3 bits behind the point; 0 stands for zero."""
    m = code.astype(np.int64) & 127
    value = np.where(m == 0, 0.0, (1 + m % 8 / 8) * 2.0 ** (m // 8 + int(unit) - 127))
    return np.where(code >> 7 == 1, -value, value).astype(F)


def short_code(d, unit):
    """The nearest 8-bit scale, ties to the even one; those below all stand as zero, those above as the largest."""
    bits = np.abs(d).astype(F).view(np.uint32).astype(np.int64) - (int(unit) << 23)
    whole, rest = bits >> 20, bits & 0xFFFFF
    m = whole + ((rest > 0x80000) | ((rest == 0x80000) & (whole % 2 == 1)))
    return np.where(m < 1, 0, np.minimum(m, 127) | np.signbit(d).astype(np.int64) << 7).astype(np.uint8)


def stored(precision, d, unit):
    return short_value(short_code(d, unit), unit) if precision in HEAD else half(d).astype(F)


def unit_of(x):
    exponent = int(np.abs(x).max().astype(F).view(np.uint32) >> 23)
    return min(max(exponent - 20, 1), 239)


# ---- rounding

def nearest(precision, v):
    if precision in TABLE:
        table = TABLE[precision]
        index = sum((v > (a + b) / 2).astype(int) for a, b in zip(table, table[1:]))
        return table[index].astype(F)
    low, high = RANGE[precision]
    return np.clip(np.rint(v), F(low), F(high))


def rounded(precision, x, d):
    """Groups (..., 32) on scales (...)."""
    with np.errstate(all="ignore"):
        w = nearest(precision, x / d[..., None])
    return np.where((d == 0)[..., None], nearest(precision, np.zeros_like(x)), w)


def fit(precision, x, unit, importance=None):
    """Scales, as they are read back, of groups (..., 32)."""
    if precision == "q8":
        return stored(precision, np.abs(x).max(-1) / F(127), unit)
    m = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)[..., 0]
    ends = TABLE[precision][[0, -1]] if precision in TABLE else [RANGE[precision][0]]
    step = F(1 / 32) if precision in TABLE else F(1 / 64)
    plain = stored(precision, m / F(ends[0]), unit)
    weigh = (lambda v: v) if importance is None else (lambda v: v * importance)
    best, best_error, found = plain.copy(), np.zeros_like(m), np.zeros(m.shape, bool)
    with np.errstate(all="ignore"):
        for end in ends:
            for n in range(-12, 13):
                w = rounded(precision, x, m / (F(end) * (F(1) + F(n) * step)))
                p, q = sum32(weigh(x * w)), sum32(weigh(w * w))
                d = stored(precision, p / q, unit)
                taken = (q > 0) & (d != 0) & np.isfinite(d)
                t = x - d[..., None] * rounded(precision, x, d)
                error = sum32(weigh(t * t))
                better = taken & (~found | (error < best_error))
                best, best_error = np.where(better, d, best), np.where(better, error, best_error)
                found |= taken
    return np.where(plain == 0, F(0), best)


def quantize(precision, x, unit):
    """Scales (rows, groups) and weights (rows, groups, 32) of a matrix."""
    x = grouped(x)
    d = fit(precision, x, unit)
    return d, rounded(precision, x, d).astype(np.int32)


# ---- compensation

def moments(vectors):
    """Σ x·xᵀ in f64, vector after vector."""
    h = np.zeros((vectors.shape[1],) * 2)
    for x in vectors.astype(np.float64):
        h += x[:, None] * x[None, :]
    return h


def inverse_root(h, added):
    size = len(h)
    v = np.zeros_like(h)
    for j in reversed(range(size)):
        s = h[j, j] + added
        for k in range(j + 1, size):
            s -= v[j, k] * v[j, k]
        if not 0 < s < np.inf:
            return None
        root = np.sqrt(s)
        t = h[:j, j].copy()
        for k in range(j + 1, size):
            t -= v[j, k] * v[:j, k]
        v[:j, j] = t / root
        v[j, j] = root
    u = np.zeros_like(h)
    for i in reversed(range(size)):
        r = np.zeros(size)
        r[i] = 1
        for m in range(i + 1, size):
            r[m:] -= v[i, m] * u[m, m:]
        u[i, i:] = r[i:] / v[i, i]
    return u


def compensation(h):
    """Factors (K, K), importances (K) and damped moments (K, K), f32."""
    size = len(h)
    total = 0.0
    for i in range(size):
        total += h[i, i]
    mean = total / size
    for damping in (0.01, 0.1, 1.0, 10.0):
        u = inverse_root(h, damping * mean)
        if u is not None:
            break
    diagonal = np.diag(u)
    share = diagonal.min() / diagonal
    return np.triu(u / diagonal[:, None]).astype(F), (share * share).astype(F), (h / mean + damping * np.eye(size)).astype(F)


def refine(precision, exact, d, w, unit, h):
    """Two passes over the groups of all rows: a better scale, then better integers, where the error becomes less."""
    rows, columns = exact.shape
    h = np.concatenate([h, np.zeros((columns, -columns % GROUP), F)], 1)
    slope = np.zeros((rows, h.shape[1]), F)
    for k in range(columns):
        slope += (exact[:, k] - d[:, k // GROUP] * w[:, k // GROUP, k % GROUP])[:, None] * h[k]
    for _ in range(2):
        for g in range(d.shape[1]):
            first, some = g * GROUP, d[:, g] != 0
            count = min(GROUP, columns - first)
            spread = np.zeros_like(slope)
            for i in range(count):
                spread += w[:, g, i, None] * h[first + i]
            along, across = np.zeros((rows, GROUP), F), np.zeros((rows, GROUP), F)
            along[:, :count] = w[:, g, :count] * slope[:, first:first + count]
            across[:, :count] = w[:, g, :count] * spread[:, first:first + count]
            along, across = sum32(along), sum32(across)
            with np.errstate(all="ignore"):
                better = stored(precision, d[:, g] + along / across, unit)
                change = better - d[:, g]
                taken = some & (better != 0) & (change * (F(2) * along - change * across) > 0)
            d[:, g] = np.where(taken, better, d[:, g])
            slope -= np.where(taken, change, F(0))[:, None] * spread
            for i in range(count):
                now = d[:, g] * w[:, g, i]
                with np.errstate(all="ignore"):
                    one = np.where(some, nearest(precision, (now + slope[:, first + i] / h[first + i, first + i]) / d[:, g]), w[:, g, i])
                slope += (now - d[:, g] * one)[:, None] * h[first + i]
                w[:, g, i] = one


def quantize_compensated(precision, x, unit, h):
    factors, importance, damped = compensation(h)
    rows, columns = x.shape
    exact, x = x, grouped(x).reshape(rows, -1).copy()
    importance = np.concatenate([importance, np.zeros(x.shape[1] - columns, F)])
    groups = x.shape[1] // GROUP
    d, w = np.zeros((rows, groups), F), np.zeros((rows, groups, GROUP), F)
    w[:] = nearest(precision, np.zeros(1, F))[0]
    for g in range(groups):
        first = g * GROUP
        d[:, g] = fit(precision, x[:, first:first + GROUP], unit, importance[first:first + GROUP])
        for column in range(first, min(first + GROUP, columns)):
            scale, value = d[:, g], x[:, column].copy()
            with np.errstate(all="ignore"):
                one = np.where(scale == 0, nearest(precision, np.zeros_like(value)), nearest(precision, value / scale))
            error = np.where(scale == 0, value, value - scale * one)
            w[:, g, column - first] = one
            x[:, column:columns] -= error[:, None] * factors[column, None, column:]
    if precision in TABLE:
        refine(precision, exact, d, w, unit, damped)
    return d, w.astype(np.int32)


# ---- bytes

def plane_of(precision, d, w, unit):
    """The bytes of a packed matrix."""
    rows, groups = d.shape
    filling = -rows % PANEL
    zero = int(nearest(precision, np.zeros(1, F))[0])
    d = np.concatenate([d, np.zeros((filling, groups), F)])
    w = np.concatenate([w, np.full((filling, groups, GROUP), zero, np.int32)])
    if precision in TABLE:
        codes = np.searchsorted(TABLE[precision], w)
    else:
        codes = w + {"q8": 128, "q6": 32, "q4": 8}[precision]
    out = bytearray(HEAD.get(precision, 0))
    if out:
        out[0] = unit
    for panel in range(0, len(d), PANEL):
        for g in range(groups):
            scales, block = d[panel:panel + PANEL, g], codes[panel:panel + PANEL, g]
            out += short_code(scales, unit).tobytes() if precision in HEAD else half(scales).astype("<f2").tobytes()
            word = lambda j, r, i: int(block[r, 4 * j + i])
            if precision == "q8":
                out += bytes(word(j, r, i) for j in range(8) for r in range(PANEL) for i in range(4))
            if precision in ("q6", "q4"):
                out += bytes(word(j, r, i) & 15 | (word(j + 4, r, i) & 15) << 4 for j in range(4) for r in range(PANEL) for i in range(4))
            if precision in ("q6", "q3", "q2"):
                two = (lambda c: c >> 4) if precision == "q6" else (lambda c: c & 3)
                out += bytes(sum(two(word(4 * p + k, r, i)) << 2 * k for k in range(4)) for p in range(2) for r in range(PANEL) for i in range(4))
            if precision == "q3":
                out += bytes(sum(word(j, r, i) >> 2 << j for j in range(8)) for r in range(PANEL) for i in range(4))
    return bytes(out)


def blob_of(precision, hidden, intermediate, planes):
    blob = struct.pack("<4sHBBIII44x", b"CFXP", 1, CODE[precision], 0, hidden, intermediate, GROUP)
    for plane in planes:
        blob += plane + bytes(-len(plane) % PLANE_ALIGN)
    return np.frombuffer(blob, np.uint8)


def times(d, w, activations):
    """base.times, with scales of f32."""
    q, s = activations
    y = np.zeros((len(q), len(d)), F)
    for g in range(d.shape[1]):
        n = q[:, g].astype(np.int64) @ w[:, g].T.astype(np.int64)
        y = base.fma(n.astype(F), d[:, g] * s[:, g, None], y)
    return y


def expert_case(precision, rng, hidden, intermediate):
    sources = base.source_weights(rng, hidden, intermediate)
    x = base.inputs(rng, hidden)
    matrices, planes = [], []
    for name, kind in zip(base.MATRICES, PLANES[precision]):
        weights = base.from_bf16(sources[name])
        unit = unit_of(weights)
        d, w = quantize(kind, weights, unit)
        matrices.append((d, w))
        planes.append(plane_of(kind, d, w, unit))
    activations = base.quantize_activations(x)
    gate = times(*matrices[0], activations)
    h = base.silu(gate) * times(*matrices[1], activations)
    y = times(*matrices[2], base.quantize_activations(h))
    case = f"{hidden}x{intermediate}.{precision}"
    out = {f"{case}.{name}": bits for name, bits in sources.items()}
    return out | {f"{case}.x": x, f"{case}.blob": blob_of(precision, hidden, intermediate, planes), f"{case}.gate": gate, f"{case}.y": y}


def compensated_case(rng, rows, columns):
    """A matrix, what it is multiplied with (less of it than columns, so that damping counts), and its planes."""
    mix = rng.standard_normal((columns, columns)) * 0.2 + np.eye(columns)
    vectors = (rng.standard_normal((columns * 2 // 3, columns)) @ mix).astype(F)
    vectors[:, 3] = 0  # nothing ever comes in here
    weights = (F(0.05) * rng.standard_normal((rows, columns))).astype(F)
    weights[1] = 0
    weights[2, 5] = F(1.5)
    h = moments(vectors)
    out = {"compensated.vectors": vectors, "compensated.weights": weights}
    for precision in BLOCK:
        unit = unit_of(weights)
        d, w = quantize_compensated(precision, weights, unit, h)
        out[f"compensated.{precision}.plane"] = np.frombuffer(plane_of(precision, d, w, unit), np.uint8)
    return out


def main():
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "low_precisions.safetensors")
    path = sys.argv[1] if len(sys.argv) > 1 else os.path.normpath(beside)
    tensors = {}
    for hidden, intermediate in CASES:
        for precision in CODE:
            tensors |= expert_case(precision, np.random.default_rng([8, hidden, CODE[precision]]), hidden, intermediate)
    tensors |= compensated_case(np.random.default_rng(9), 21, 72)
    # What this script and the other share comes out the same.
    d, w = quantize("q4", tensors["compensated.weights"], 1)
    d4, w4 = base.quantize_q4(grouped(tensors["compensated.weights"]))
    assert np.array_equal(d, d4.astype(F)) and np.array_equal(w, w4)
    base.save(path, tensors)
    print(f"{path}: {len(tensors)} tensors, {os.path.getsize(path)} bytes")


if __name__ == "__main__":
    main()
