"""Golden vectors of records, good ones and bad ones, computed from docs/records.md alone.

usage: records.py OUT.json      (made with cryptography 50.0.2, blake3 1.0.11)

The file is an array, one vector a line. `record` says as what the `bytes` are to be read at `now_ms`; `expected` is "ok" or
the check that must fail (see CHECKS). `known` is what the verifier has: `seq` and `bytes_hash` of the last record of that
signer about the same thing, null if none, and the models and probe sets that are known here. `fields` of a good one are its
values, those above 2^53 as strings. With "record": "body", `bytes` is a body, `head` the valid envelope of its profile head,
and `shape` the model's. Bytes are hexadecimal, hashes BLAKE3. A bad vector fails only at the check that it names, except
those named "first-...", which fail at later ones too. The page's second check is not here: it is about many records.
"""
import copy
import json
import sys

import envelope as e
from blake3 import blake3

CHECKS = {
    "length": "the envelope is longer than its kind may be",
    "envelope": "no envelope of this payload type",
    "signature": "not signed by the key in the envelope under our domain, or not strictly so",
    "decode": "the payload is no such record, or one outside its limits",
    "canonical": "the payload is not what its record is encoded as: bytes follow",
    "signer": "`node` is another key",
    "version": "the version is not 1",
    "times": "too far ahead, expired, over before it began, or living too long",
    "seq": "not newer than what is known",
    "equivocation": "another record with the seq of the known one",
    "unknown": "about a model or a probe set that is not known here",
    "body": "the body is not the one in the head, or not within its limits",
}

MINUTE, HOUR = 60_000, 3_600_000
SKEW = 10 * MINUTE
LIMITS = {"profile": (10_240, 48 * HOUR), "attestation": (4_096, 168 * HOUR), "node": (4_096, 48 * HOUR)}
NOW = 1_790_000_000_000
END = 2**64 - 1


def hash_of(name):
    return blake3(f"confrere test {name}".encode()).digest()


def key_of(name):
    return e.public_key(e.seed_of(name))


MODEL, PROBES = hash_of("model"), hash_of("probes")
SIGNER = "signer of records"


# ---- encoding: a value is a dict in the order of its fields, and nothing here looks at limits

def u8(n):
    return n.to_bytes(1, "little")


def u16(n):
    return n.to_bytes(2, "little")


def u32(n):
    return n.to_bytes(4, "little")


def u64(n):
    return n.to_bytes(8, "little")


def text(value):
    """Of a str, or of bytes that need not be UTF-8."""
    value = value if isinstance(value, bytes) else value.encode()
    return u64(len(value)) + value


def array(value):
    return bytes(value)


def list_of(encode):
    return lambda values: u64(len(values)) + b"".join(map(encode, values))


def struct(**encoders):
    def encode(value):
        assert list(value) == list(encoders), (list(value), list(encoders))
        return b"".join(encoders[name](value[name]) for name in encoders)

    return encode


PRELUDE = dict(version=u16, node=array, seq=u64, issued_ms=u64, expires_ms=u64)
ENCODE = {
    "profile": struct(
        **PRELUDE, model=array, probes=array, build_profile=array, body_hash=array, body_length=u64,
        summary=list_of(struct(domain=text, experts=u32, trials=u64, hits=u64))),
    "attestation": struct(
        **PRELUDE, subject=array, facet=u8, from_ms=u64, until_ms=u64, good=u32, bad=u32, evidence=list_of(array)),
    "node": struct(
        **PRELUDE, memory_bytes=u64, disk_bytes=u64, experts_per_second=u32, addresses=list_of(text), models=list_of(array)),
    "body": lambda value: encode_body(value),
}


def encode_body(value):
    """Version 2 says of each domain which modality its tokens are of."""
    modality = dict(modality=u8) if any("modality" in domain for domain in value["domains"]) else {}
    return struct(
        version=u16, model=array, probes=array,
        domains=list_of(struct(name=text, **modality, probes=u32, tokens=u64, square_tokens=u64)),
        experts=list_of(struct(
            tokens=u64, modalities=lambda m: b"".join(map(u64, m)),
            domains=list_of(struct(routed=u32, gate_mass=u64, square_routed=u32, cross=u32, trials=u32, hits=u32)),
            coactive=list_of(struct(expert=u32, count=u32)))))(value)


def plain(value):
    """What JSON is to hold."""
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, bytes):
        return value.hex()
    return str(value) if isinstance(value, int) and value > 2**53 else value


# ---- ordinary records, of which the vectors are variants

def prelude(signer, issued=NOW - HOUR, lives=24 * HOUR):
    return dict(version=1, node=key_of(signer), seq=issued, issued_ms=issued, expires_ms=issued + lives)


def summary(*names):
    return [dict(domain=name, experts=2 + i, trials=400 + i, hits=300 + 50 * i) for i, name in enumerate(names)]


def ordinary(record, signer=SIGNER, **changes):
    value = prelude(signer)
    if record == "profile":
        value |= dict(model=MODEL, probes=PROBES, build_profile=hash_of("build profile"), body_hash=hash_of("body"),
                      body_length=123_456, summary=summary("code", "law", "medicine"))
    elif record == "attestation":
        value |= dict(subject=key_of("subject"), facet=1, from_ms=NOW - 9 * HOUR, until_ms=NOW - 2 * HOUR, good=97, bad=3,
                      evidence=[hash_of(f"evidence {i}") for i in range(3)])
    else:
        value |= dict(memory_bytes=16 << 30, disk_bytes=500 << 30, experts_per_second=1200,
                      addresses=["192.0.2.7:4001", "[2001:db8::7]:4001"],
                      models=sorted([MODEL, hash_of("another model")]))
    assert set(changes) <= set(value)
    return value | changes


def seal(record, payload, signer=SIGNER):
    return e.sealed(e.seed_of(signer), *e.DOMAINS[record], payload)


def sealed(record, value, signer=SIGNER):
    return seal(record, ENCODE[record](value), signer)


def known(before=None, models=(MODEL,), probes=(PROBES,)):
    """`before` is a pair: the seq that is known and the envelope that had it."""
    seq, data = before or (None, None)
    return {"seq": plain(seq), "bytes_hash": blake3(data).hexdigest() if data else None,
            "models": [m.hex() for m in models], "probes": [p.hex() for p in probes]}


# ---- the checks that need no decoder, every one that fails rather than the first

def failed_checks(record, data, now, have):
    failed = {"length"} if len(data) > LIMITS[record][0] else set()
    of_envelope = set(e.failed_checks(data, *e.DOMAINS[record]))
    if of_envelope & {"truncated", "version", "length", "trailing", "type"}:
        return failed | {"envelope"}
    if of_envelope:
        failed |= {"signature"}
    at = 97 + 1 + len(e.DOMAINS[record][1])
    while data[at] >= 0x80:
        at += 1
    payload = data[at + 1:]
    if payload[:2] != u16(1)[:len(payload)]:
        failed |= {"version"}
    if len(payload) < 58 + (64 if record == "profile" else 0):
        return failed
    seq, issued, expires = (int.from_bytes(payload[i:i + 8], "little") for i in (34, 42, 50))
    if payload[2:34] != data[1:33]:
        failed |= {"signer"}
    if issued > now + SKEW or expires + SKEW < now or not issued <= expires <= issued + LIMITS[record][1]:
        failed |= {"times"}
    if have["seq"] is not None and seq <= int(have["seq"]):
        same = seq < int(have["seq"]) or blake3(data).hexdigest() == have["bytes_hash"]
        failed |= {"seq" if same else "equivocation"}
    if record == "profile" and not (payload[58:90].hex() in have["models"] and payload[90:122].hex() in have["probes"]):
        failed |= {"unknown"}
    return failed


def vector(name, record, expected, data, value=None, now=NOW, have=None):
    """Makes a vector, after checking as far as can be without decoding that only the expected check fails."""
    have = have or (known() if record == "profile" else known(models=(), probes=()))
    failed = failed_checks(record, data, now, have)
    if name.startswith("first-"):
        assert failed - {expected}, (name, failed)
    elif expected in ("ok", "decode", "canonical"):
        assert not failed, (name, failed)
    else:
        assert failed == {expected}, (name, expected, failed)
    out = {"name": name, "record": record, "now_ms": now, "bytes": data.hex(), "known": have, "expected": expected}
    return out | ({"fields": plain(value)} if expected == "ok" else {})


def good(name, record, now=NOW, have=None, **changes):
    value = ordinary(record, **changes)
    return vector(f"{record}-{name}", record, "ok", sealed(record, value), value, now, have)


def bad(name, record, expected, now=NOW, have=None, **changes):
    """A record that is well signed and wrong in what it says."""
    return vector(f"{record}-{name}", record, expected, sealed(record, ordinary(record, **changes)), None, now, have)


# ---- bodies

def draw(below, *what):
    return int.from_bytes(blake3(repr(what).encode()).digest(8), "little") % below


def measured(name, layers, experts, top_k, domains, probes=3):
    """The body that a model with a random router would have: every token chooses top_k experts in every layer. In version 2, domains
    are pairs of a name and a modality."""
    lengths = {d: [2 + draw(6, name, "length", d, p) for p in range(probes)] for d in domains}
    rows = []
    for layer in range(layers):
        layer_rows = [dict(tokens=0, modalities=[0, 0, 0], domains=[], coactive=[]) for _ in range(experts)]
        together = [[0] * experts for _ in range(experts)]
        for d in domains:
            cells = [dict(routed=0, gate_mass=0, square_routed=0, cross=0, trials=0, hits=0) for _ in range(experts)]
            for p, length in enumerate(lengths[d]):
                routed = [0] * experts
                for t in range(length):
                    rank = sorted(range(experts), key=lambda x: draw(2**60, name, layer, d, p, t, x))
                    chosen = rank[:top_k]
                    for x in chosen:
                        routed[x] += 1
                        cells[x]["gate_mass"] += 2**16 // top_k - draw(1000, name, "gate", layer, d, p, t, x)
                        trial, hit = draw(3, name, "trial", layer, d, p, t, x), draw(2, name, "hit", layer, d, p, t, x)
                        cells[x]["trials"] += trial > 0
                        cells[x]["hits"] += trial > 0 and hit
                        layer_rows[x]["tokens"] += 1
                        modality = d[1] if isinstance(d, tuple) else draw(3, name, "modality", d, p, t)
                        layer_rows[x]["modalities"][modality] += 1
                        for other in chosen:
                            together[x][other] += other != x
                for x in range(experts):
                    cells[x]["routed"] += routed[x]
                    cells[x]["square_routed"] += routed[x] ** 2
                    cells[x]["cross"] += routed[x] * length
            for x in range(experts):
                layer_rows[x]["domains"].append(cells[x])
        for x, row in enumerate(layer_rows):
            most = sorted((-count, other) for other, count in enumerate(together[x]) if count)[:8]
            row["coactive"] = [dict(expert=other, count=-count) for count, other in most]
        rows += layer_rows
    def named(d):
        return dict(name=d[0], modality=d[1]) if isinstance(d, tuple) else dict(name=d)

    version = 2 if any(isinstance(d, tuple) for d in domains) else 1
    return dict(version=version, model=MODEL, probes=PROBES, experts=rows, domains=[
        named(d) | dict(probes=probes, tokens=sum(lengths[d]), square_tokens=sum(n * n for n in lengths[d])) for d in domains])


def body_fields(value):
    return {name: value[name] for name in ("version", "model", "probes", "domains", "experts")}


def head_of(value, data, **changes):
    """The profile head of a body, with the summary that follows from it."""
    # Of a domain's tokens, those that are not text, where it has such.
    leading = {}
    for i, d in enumerate(value["domains"]):
        rank = (d.get("modality", 0) != 0, d["tokens"], -i)
        leading[d["name"]] = max(leading.get(d["name"], (rank, i)), (rank, i))
    sums = [dict(domain=name, experts=min(2, len(value["experts"])),
                 trials=sum(x["domains"][i]["trials"] for x in value["experts"]),
                 hits=sum(x["domains"][i]["hits"] for x in value["experts"])) for name, (_, i) in leading.items()]
    return ordinary("profile", body_hash=blake3(data).digest(), body_length=len(data), summary=sums) | changes


def body_vector(name, expected, shape, value, data=None, head_from=None, **head_changes):
    """`head_from` is the body from which the summary is taken, so that the head of a bad body is good."""
    value = body_fields(value)
    data = ENCODE["body"](value) if data is None else data
    head = sealed("profile", head_of(head_from or value, data, **head_changes))
    assert not failed_checks("profile", head, NOW, known())
    out = {"name": f"body-{name}", "record": "body", "now_ms": NOW, "bytes": data.hex(), "known": known(), "head": head.hex(),
           "shape": dict(zip(("layers", "experts", "top_k"), shape)), "expected": expected}
    return out | ({"fields": plain(value)} if expected == "ok" else {})


SMALL = (2, 4, 2)
SMALL_DOMAINS = ["code", "law"]


OF_MEDIA = [("objects", 0), ("objects", 1), ("speech", 0), ("speech", 2)]


def full_sixteen():
    return [f"domain_{i:02}" for i in range(16)]


def one_expert_with_largest_counts():
    """2^32-1 probes of one token, all routed to the only expert with all of the weight, tried and hit."""
    most = 2**32 - 1
    cell = dict(routed=most, gate_mass=most << 16, square_routed=most, cross=most, trials=most, hits=most)
    return dict(version=1, model=MODEL, probes=PROBES,
                domains=[dict(name=d, probes=most, tokens=most, square_tokens=most) for d in SMALL_DOMAINS],
                experts=[dict(tokens=2 * most, modalities=[most, most, 0], domains=[cell, cell], coactive=[])])


def valid_bodies():
    unused = measured("unused", 1, 3, 1, ["a"])
    unused["domains"].append(dict(name="b" * 32, probes=0, tokens=0, square_tokens=0))
    for row in unused["experts"]:
        row["domains"].append(dict(routed=0, gate_mass=0, square_routed=0, cross=0, trials=0, hits=0))
    cases = [
        ("two-layers", SMALL, measured("two layers", *SMALL, SMALL_DOMAINS)),
        ("sixteen-domains-and-eight-coactive", (1, 9, 9), measured("full", 1, 9, 9, full_sixteen(), probes=1)),
        ("largest-counts", (1, 1, 1), one_expert_with_largest_counts()),
        ("domain-without-probes", (1, 3, 1), unused),
        ("of-three-modalities", SMALL, measured("three modalities", *SMALL, OF_MEDIA)),
    ]
    assert all(len(x["coactive"]) == 8 for x in cases[1][2]["experts"])
    return [body_vector(name, "ok", shape, value) for name, shape, value in cases]


def recount(row, tokens, modalities):
    """Adds to an expert's tokens and to the sum of its modalities, and leaves `routed`."""
    row["tokens"] += tokens
    row["modalities"][max(range(3), key=row["modalities"].__getitem__)] += modalities
    row["coactive"] = []


def invalid_bodies():
    base = measured("two layers", *SMALL, SMALL_DOMAINS)
    whole = ENCODE["body"](body_fields(base))
    out = []

    def refuse(name, change=None, shape=SMALL, value=None, data=None, **head_changes):
        """A body spoilt by `change`, which is called with it, or with other bytes."""
        start = value or base
        spoilt = copy.deepcopy(start)
        if change:
            change(spoilt)
            assert spoilt != start, name
        out.append(body_vector(name, "body", shape, spoilt, data, start, **head_changes))

    def cell(value, row=1, domain=0):
        return value["experts"][row]["domains"][domain]

    def add(value, n):
        """Routes n more tokens of the first domain to expert 1, with its sums right."""
        cell(value)["routed"] += n
        value["experts"][1]["tokens"] += n
        value["experts"][1]["modalities"][0] += n

    def wrap(value):
        value["experts"][1]["modalities"] = [END, value["experts"][1]["tokens"] + 1, 0]

    def coactive(*pairs):
        def change(value):
            value["experts"][1]["coactive"] = [dict(expert=x, count=count) for x, count in pairs]
        return change

    refuse("of-another-hash", body_hash=hash_of("another body"))
    refuse("with-a-flipped-bit", data=e.flip(whole, len(whole) - 1, 0), body_hash=blake3(whole).digest())
    refuse("shorter-than-its-head-says", body_length=len(whole) + 1)
    refuse("longer-than-its-head-says", body_length=len(whole) - 1)
    refuse("without-its-last-byte", data=whole[:-1])
    refuse("without-bytes", data=b"")
    refuse("with-a-byte-left-over", data=whole + b"\0")
    refuse("of-version-2", lambda v: v.update(version=2))
    media = measured("three modalities", *SMALL, OF_MEDIA)
    refuse("of-version-3", lambda v: v.update(version=3), value=media)
    refuse("of-version-1-with-modalities", lambda v: v.update(version=1), value=media)
    refuse("of-version-2-about-text-alone", value=measured("text alone", *SMALL, [("code", 0), ("law", 0)]))
    refuse("with-a-modality-that-is-none", lambda v: v["domains"][3].update(modality=3), value=media)
    refuse("with-modalities-unsorted", lambda v: v.update(domains=[v["domains"][i] for i in (1, 0, 2, 3)]), value=media)
    refuse("with-a-modality-twice", lambda v: v["domains"][0].update(modality=1), value=media)
    refuse("with-another-modality-s-tokens", lambda v: v["domains"][3].update(modality=1), value=media)
    refuse("of-another-model", lambda v: v.update(model=hash_of("another model")))
    refuse("of-other-probes", lambda v: v.update(probes=hash_of("other probes")))

    none = measured("none", *SMALL, [])
    refuse("without-domains", value=none)
    seventeen = measured("seventeen", 1, 2, 1, full_sixteen() + ["domain_16"], probes=1)
    refuse("with-seventeen-domains", shape=(1, 2, 1), value=seventeen)
    refuse("with-domains-unsorted", lambda v: v["domains"].reverse())
    refuse("with-a-domain-twice", lambda v: v["domains"][1].update(name="code"))
    refuse("with-a-domain-in-capitals", lambda v: v["domains"][0].update(name="Code"))
    refuse("with-a-domain-without-name", lambda v: v["domains"][0].update(name=""))
    refuse("with-a-domain-of-33-bytes", lambda v: v["domains"][1].update(name="l" * 33))
    refuse("claims-2^61-domains", data=whole[:66] + u64(2**61) + whole[74:])

    refuse("with-an-expert-less", lambda v: v["experts"].pop())
    refuse("with-an-expert-more", lambda v: v["experts"].append(v["experts"][-1]))
    refuse("with-a-layer-less", lambda v: v.update(experts=v["experts"][:4]))
    refuse("without-experts", lambda v: v.update(experts=[]))
    refuse("with-a-domain-missing-in-an-expert", lambda v: v["experts"][2]["domains"].pop())
    refuse("with-a-domain-more-in-an-expert", lambda v: v["experts"][2]["domains"].append(
        dict(routed=0, gate_mass=0, square_routed=0, cross=0, trials=0, hits=0)))

    refuse("hits-above-trials", lambda v: cell(v).update(hits=cell(v)["trials"] + 1))
    refuse("trials-above-routed", lambda v: cell(v).update(trials=cell(v)["routed"] + 1))
    refuse("routed-above-tokens", lambda v: add(v, v["domains"][0]["tokens"] + 1 - cell(v)["routed"]))
    refuse("gate-mass-too-big", lambda v: cell(v).update(gate_mass=(cell(v)["routed"] << 16) + 1))
    refuse("tokens-below-the-sum-of-routed", lambda v: recount(v["experts"][1], -1, -1))
    refuse("tokens-above-the-sum-of-routed", lambda v: recount(v["experts"][1], 1, 1))
    refuse("modalities-below-tokens", lambda v: recount(v["experts"][1], 0, -1))
    refuse("modalities-above-tokens", lambda v: recount(v["experts"][1], 0, 1))
    refuse("tokens-neither-routed-nor-modalities", lambda v: recount(v["experts"][1], 1, 0))
    refuse("modalities-sum-to-tokens-modulo-2^64", wrap)

    tokens = base["experts"][1]["tokens"]
    assert tokens >= 3
    refuse("coactive-itself", coactive((0, 3), (1, 2)))
    refuse("coactive-itself-in-the-second-layer", lambda v: v["experts"][6].update(coactive=[dict(expert=2, count=1)]))
    refuse("coactive-of-no-such-expert", coactive((0, 3), (4, 2)))
    refuse("coactive-numbered-over-all-layers", lambda v: v["experts"][6].update(coactive=[dict(expert=7, count=1)]))
    refuse("coactive-least-often-first", coactive((0, 1), (2, 2)))
    refuse("coactive-not-by-number", coactive((2, 2), (0, 2)))
    refuse("coactive-twice", coactive((0, 2), (0, 2)))
    refuse("coactive-twice-with-other-counts", coactive((0, 2), (0, 1)))
    refuse("coactive-never", coactive((0, 3), (2, 0)))
    refuse("coactive-more-often-than-used", coactive((0, tokens + 1)))
    ten = measured("ten", 1, 10, 10, ["code"])
    refuse("nine-coactive", lambda v: v["experts"][1]["coactive"].append(dict(expert=9, count=ten["experts"][1]["tokens"])),
           shape=(1, 10, 10), value=ten)
    return out


# ---- envelopes

def node_of_length(length):
    """A node record whose envelope has this length, which the limits of the payload allow."""
    value = ordinary("node", addresses=["a"] * 16, models=sorted(hash_of(f"model {i}") for i in range(64)))
    lack = length - len(sealed("node", value))
    value["addresses"] = [chr(ord("a") + i) * (1 + lack // 16 + (i < lack % 16)) for i in range(16)]
    assert len(sealed("node", value)) == length and max(map(len, value["addresses"])) <= 128
    return value


def valid_vectors():
    before = [(NOW - 25 * HOUR, sealed(r, ordinary(r, seq=NOW - 25 * HOUR))) for r in ("profile", "attestation", "node")]
    many_models = (hash_of("another model"), MODEL, hash_of("third model"))
    most_domains = sorted(["_" * 32, "0", "z" * 32] + [f"domain_{i:02}" for i in range(29)])
    just_before = NOW - HOUR - 1
    longest = node_of_length(4096)
    zero = dict(seq=0, issued_ms=0, expires_ms=0)
    return [
        good("ordinary", "profile"),
        good("ordinary", "attestation"),
        good("ordinary", "node"),
        good("after-another", "profile", have=known(before[0], models=many_models)),
        good("after-another", "attestation", have=known(before[1], (), ())),
        good("after-another", "node", have=known(before[2], (), ())),
        good("seq-one-above", "profile", have=known((just_before, sealed("profile", ordinary("profile", seq=just_before))))),
        good("without-domains", "profile", summary=[]),
        good("with-32-domains", "profile", summary=[
            dict(domain=d, experts=2**32 - 1, trials=END, hits=END) for d in most_domains]),
        good("hits-are-trials-and-none", "profile", summary=[dict(domain="a", experts=0, trials=0, hits=0),
                                                             dict(domain="a_", experts=1, trials=7, hits=7),
                                                             dict(domain="aa", experts=1, trials=7, hits=0)]),
        good("taken-back", "profile", seq=END, have=known(before[0])),
        good("ten-minutes-ahead", "profile", issued_ms=NOW + SKEW, expires_ms=NOW + SKEW + HOUR),
        good("ten-minutes-expired", "profile", issued_ms=NOW - SKEW - HOUR, expires_ms=NOW - SKEW),
        good("lives-48-hours", "profile", issued_ms=NOW - HOUR, expires_ms=NOW + 47 * HOUR),
        good("lives-48-hours-and-ten-minutes-expired", "node", issued_ms=NOW - SKEW - 48 * HOUR, expires_ms=NOW - SKEW),
        good("expires-as-issued", "node", issued_ms=NOW - MINUTE, expires_ms=NOW - MINUTE),
        good("of-a-clock-at-zero", "node", now=0, **zero),
        good("of-seq-zero", "profile", seq=0),
        good("lives-7-days", "attestation", expires_ms=NOW - HOUR + 168 * HOUR),
        good("without-evidence", "attestation", evidence=[], good=0, bad=0, facet=0),
        good("with-16-evidence", "attestation", evidence=[hash_of(f"evidence {i}") for i in range(16)],
             good=2**32 - 1, bad=2**32 - 1, facet=2),
        good("of-an-instant", "attestation", from_ms=NOW - HOUR, until_ms=NOW - HOUR),
        good("since-1970", "attestation", from_ms=0, until_ms=0),
        good("without-addresses-and-models", "node", addresses=[], models=[], memory_bytes=0, disk_bytes=0, experts_per_second=0),
        good("with-largest-numbers", "node", seq=END, memory_bytes=END, disk_bytes=END, experts_per_second=2**32 - 1),
        good("with-16-addresses", "node", models=[], addresses=["!" * 128] + [f"~{i:02}" for i in range(15)]),
        good("with-addresses-in-any-order", "node", addresses=["b", "a"]),
        good("of-a-payload-of-128-bytes", "node", addresses=["a" * 26], models=[]),
        good("with-64-models", "node", models=longest["models"]),
        good("as-long-as-may-be", "node", addresses=longest["addresses"], models=longest["models"]),
    ] + valid_bodies()


def invalid_vectors():
    out = []
    payload = {record: ENCODE[record](ordinary(record)) for record in LIMITS}
    whole = {record: seal(record, payload[record]) for record in LIMITS}
    seed, key = e.seed_of(SIGNER), key_of(SIGNER)

    def raw(name, record, expected, data, **more):
        out.append(vector(f"{record}-{name}", record, expected, data, **more))

    def say(name, record, expected, **changes):
        out.append(bad(name, record, expected, **changes))

    def first(name, record, expected, data, **more):
        out.append(vector(f"first-{expected}-{name}", record, expected, data, **more))

    # length
    longer = node_of_length(4097)
    say("one-byte-too-long", "node", "length", addresses=longer["addresses"], models=longer["models"])
    say("all-lists-full", "node", "length", addresses=["a" * 128] * 16, models=longer["models"])

    # envelope
    for record, other in (("profile", "node"), ("attestation", "profile"), ("node", "attestation")):
        raw(f"of-the-type-of-{other}", record, "envelope",
            e.sealed(seed, e.DOMAINS[record][0], e.DOMAINS[other][1], payload[record]))
    domain, kind = e.DOMAINS["profile"]
    data = whole["profile"]
    at = 97 + 1 + len(kind)  # of the payload's length
    raw("of-a-later-type", "profile", "envelope", e.sealed(seed, domain, kind[:-1] + "2", payload["profile"]))
    raw("envelope-without-bytes", "profile", "envelope", b"")
    raw("envelope-of-version-2", "profile", "envelope", b"\2" + data[1:])
    raw("envelope-without-its-last-byte", "profile", "envelope", data[:-1])
    raw("envelope-with-a-byte-more", "profile", "envelope", data + b"\0")
    raw("envelope-with-a-length-beyond-64-bits", "profile", "envelope", data[:at] + b"\xff" * 9 + b"\2" + payload["profile"])
    raw("envelope-with-an-overlong-length", "profile", "envelope",
        data[:at] + bytes([data[at], data[at + 1] | 0x80, 0]) + data[at + 2:])

    # signature
    for record, other in (("profile", "attestation"), ("attestation", "node"), ("node", "profile")):
        raw(f"signed-under-the-domain-of-{other}", record, "signature",
            e.sealed(seed, e.DOMAINS[other][0], e.DOMAINS[record][1], payload[record]))
    signature, message = data[33:97], e.signing_input(domain, kind, payload["profile"])
    raw("payload-bit-flipped", "profile", "signature", e.flip(data, at + 2 + 58 + 128, 0))
    raw("signature-r-bit-flipped", "profile", "signature", e.flip(data, 33, 3))
    raw("signature-s-bit-flipped", "profile", "signature", e.flip(data, 65, 3))
    raw("signed-by-another", "profile", "signature",
        e.envelope(key, e.sign(e.seed_of("another"), message), kind, payload["profile"]))
    raw("signature-s-not-reduced", "profile", "signature",
        e.envelope(key, e.with_unreduced_s(signature), kind, payload["profile"]))
    raw("signature-r-of-small-order", "profile", "signature",
        e.envelope(key, e.sign_with_identity_nonce(seed, message), kind, payload["profile"]))
    for suffix, point, order in [("", e.IDENTITY, 1), ("-not-reduced", e.IDENTITY_NOT_CANONICAL, 1), ("-zero", e.ZERO, 4)]:
        by_nobody = ENCODE["profile"](ordinary("profile", node=point))
        forged = e.forge_for_small_order_key(point, order, e.signing_input(domain, kind, by_nobody))
        raw(f"key-of-small-order{suffix}", "profile", "signature", e.envelope(point, forged, kind, by_nobody))

    # decode
    for record in LIMITS:
        raw("payload-without-its-last-byte", record, "decode", seal(record, payload[record][:-1]))
    head_only = payload["profile"][:58 + 4 * 32 + 8]
    names = [("-empty", b""), ("-of-33-bytes", b"l" * 33), ("-in-capitals", b"Law"), ("-with-a-hyphen", b"civil-law"),
             ("-with-an-accent", "droit_p\u00e9nal".encode()), ("-not-utf8", b"law\xff"), ("-with-a-newline", b"law\n")]
    raw("payload-without-bytes", "profile", "decode", seal("profile", b""))
    raw("payload-of-one-byte", "profile", "decode", seal("profile", b"\1"))
    domains = payload["profile"][len(head_only) + 8:]
    raw("claims-a-domain-more", "profile", "decode", seal("profile", head_only + u64(4) + domains))
    raw("claims-2^63-domains", "profile", "decode", seal("profile", head_only + u64(2**63)))
    raw("claims-a-name-of-2^64-1-bytes", "profile", "decode", seal("profile", head_only + u64(1) + u64(END) + bytes(20)))
    say("with-33-domains", "profile", "decode", summary=summary(*(f"domain_{i:02}" for i in range(33))))
    for suffix, name in names:
        say(f"domain{suffix}", "profile", "decode", summary=[dict(domain=name, experts=1, trials=2, hits=1)])
    say("domains-not-ascending", "profile", "decode", summary=summary("law", "code"))
    say("domain-twice", "profile", "decode", summary=summary("code", "law", "law"))
    say("hits-above-trials", "profile", "decode", summary=[dict(domain="law", experts=1, trials=5, hits=6)])

    say("about-oneself", "attestation", "decode", subject=key)
    say("of-facet-3", "attestation", "decode", facet=3)
    say("until-before-from", "attestation", "decode", from_ms=NOW - 2 * HOUR + 1)
    say("until-after-issued", "attestation", "decode", until_ms=NOW - HOUR + 1)
    say("with-17-evidence", "attestation", "decode", evidence=[hash_of(f"evidence {i}") for i in range(17)])
    no_evidence = ENCODE["attestation"](ordinary("attestation", evidence=[]))
    raw("claims-2^59-evidence", "attestation", "decode", seal("attestation", no_evidence[:-8] + u64(2**59)))

    say("with-17-addresses", "node", "decode", addresses=[f"192.0.2.{i}:1" for i in range(10, 27)])
    for suffix, address in [("-empty", b""), ("-of-129-bytes", b"a" * 129), ("-with-a-space", b"192.0.2.7 4001"),
                            ("-with-a-delete", b"a\x7f"), ("-with-a-newline", b"a\n"), ("-not-ascii", "caf\u00e9:1".encode()),
                            ("-not-utf8", b"\xff\xfe")]:
        say(f"address{suffix}", "node", "decode", addresses=[address])
    say("with-65-models", "node", "decode", models=sorted(hash_of(f"model {i}") for i in range(65)))
    say("models-not-ascending", "node", "decode", models=sorted([MODEL, PROBES], reverse=True))
    say("model-twice", "node", "decode", models=[MODEL, MODEL])

    # canonical
    for record in LIMITS:
        raw("payload-with-a-byte-more", record, "canonical", seal(record, payload[record] + b"\0"))
    raw("payload-twice", "attestation", "canonical", seal("attestation", payload["attestation"] * 2))

    # signer
    for record in LIMITS:
        say("of-another-node", record, "signer", node=key_of("another"))
    say("about-its-signer-by-another-node", "attestation", "signer", node=key_of("another"), subject=key)

    # version
    for record in LIMITS:
        say("of-version-2", record, "version", version=2)
    say("of-version-0", "profile", "version", version=0)
    say("of-version-65535", "profile", "version", version=65535)
    raw("of-version-2-in-another-layout", "profile", "version", seal("profile", u16(2) + b"something else"))
    raw("of-version-2-alone", "node", "version", seal("node", u16(2)))
    raw("of-version-2-with-a-field-more", "node", "version", seal("node", u16(2) + payload["node"][2:] + u64(1)))
    say("of-version-2-with-other-limits", "profile", "version", version=2, summary=summary("law", "code"))

    # times
    for record, (_, lives) in LIMITS.items():
        say("issued-too-far-ahead", record, "times", issued_ms=NOW + SKEW + 1, expires_ms=NOW + HOUR)
        say("expired", record, "times", expires_ms=NOW - SKEW - 1, issued_ms=NOW - 2 * HOUR)
        say("lives-too-long", record, "times", expires_ms=NOW - HOUR + lives + 1)
        say("expires-before-issued", record, "times", issued_ms=NOW, expires_ms=NOW - 1)
    say("expires-never", "profile", "times", expires_ms=END)
    say("issued-at-the-end", "profile", "times", issued_ms=END, expires_ms=END)
    say("ahead-of-a-clock-at-zero", "node", "times", now=0, issued_ms=SKEW + 1, expires_ms=SKEW + 1)

    # seq, equivocation
    for record in LIMITS:
        models = ((MODEL,), (PROBES,)) if record == "profile" else ((), ())
        later = NOW - HOUR + 1
        say("seq-lower", record, "seq", have=known((later, sealed(record, ordinary(record, seq=later))), *models))
        raw("known-already", record, "seq", whole[record], have=known((NOW - HOUR, whole[record]), *models))
        another = sealed(record, ordinary(record, expires_ms=NOW + HOUR))
        say("seq-of-another", record, "equivocation", have=known((NOW - HOUR, another), *models))
    back = sealed("profile", ordinary("profile", seq=END))
    say("after-it-was-taken-back", "profile", "seq", have=known((END, back)))
    say("taken-back-twice", "profile", "equivocation", seq=END, expires_ms=NOW + HOUR, have=known((END, back)))
    nonce = e.seed_of("another nonce")
    r = e.public_key(nonce)
    s = (e.secret_scalar(nonce) + e.challenge(r, key, message) * e.secret_scalar(seed)) % e.L
    raw("signed-again-with-another-nonce", "profile", "equivocation",
        e.envelope(key, r + s.to_bytes(32, "little"), kind, payload["profile"]), have=known((NOW - HOUR, data)))

    # unknown
    say("of-an-unknown-model", "profile", "unknown", have=known(models=(hash_of("another model"),)))
    say("of-unknown-probes", "profile", "unknown", have=known(probes=(hash_of("other probes"),)))
    say("where-nothing-is-known", "profile", "unknown", have=known(models=(), probes=()))
    say("where-the-model-is-known-as-probes", "profile", "unknown", have=known(models=(PROBES,), probes=(MODEL,)))

    # the order of the checks: each fails at later ones too
    stale = dict(issued_ms=NOW - 9 * HOUR, expires_ms=NOW - 8 * HOUR)
    long = {r: payload[r] + bytes(LIMITS[r][0] - len(whole[r])) for r in ("profile", "attestation")}
    for record in long:
        assert len(seal(record, long[record])) == LIMITS[record][0]
        first(f"then-times-{record}", record, "canonical", seal(record, long[record]), now=NOW + 100 * HOUR)
        first(f"then-canonical-{record}", record, "length", seal(record, long[record] + b"\0"), now=NOW + 1000 * HOUR)
    first("then-envelope", "node", "length", bytes(4097))
    first("then-signature", "node", "length", e.flip(sealed("node", longer), 70, 0))
    first("then-decode", "profile", "signature", e.flip(seal("profile", payload["profile"][:-1]), 70, 0), now=NOW + 100 * HOUR)
    first("then-signer", "profile", "decode", sealed("profile", ordinary(
        "profile", node=key_of("another"), summary=summary("law", "code"))))
    first("then-signer", "node", "canonical", seal("node", ENCODE["node"](ordinary("node", node=key_of("another"))) + b"\0"))
    first("then-version", "node", "signer", sealed("node", ordinary("node", node=key_of("another"), version=2)))
    first("then-times", "node", "version", sealed("node", ordinary("node", version=2, **stale)))
    first("then-seq", "node", "times", sealed("node", ordinary("node", **stale)), have=known((END, back), (), ()))
    first("then-equivocation", "profile", "times", sealed("profile", ordinary("profile", seq=5, **stale)), have=known((5, back)))
    first("then-unknown", "profile", "seq", whole["profile"], have=known((END, back), (), ()))
    first("then-unknown", "profile", "equivocation", whole["profile"], have=known((NOW - HOUR, back), (), ()))
    return out + invalid_bodies()


def main():
    vectors = valid_vectors() + invalid_vectors()
    rank = ["ok", *CHECKS]
    kinds = [*LIMITS, "body"]
    vectors.sort(key=lambda v: (rank.index(v["expected"]), kinds.index(v["record"]), v["name"]))
    assert {v["expected"] for v in vectors} == {"ok", *CHECKS}
    assert len({v["name"] for v in vectors}) == len(vectors)
    with open(sys.argv[1], "w") as file:
        file.write("[\n" + ",\n".join(map(json.dumps, vectors)) + "\n]\n")
    for check in rank:
        print(sum(v["expected"] == check for v in vectors), check)
    print(sum(v["expected"] == "ok" for v in vectors), "valid,", sum(v["expected"] != "ok" for v in vectors), "invalid")


if __name__ == "__main__":
    main()
