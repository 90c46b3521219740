"""Verifies records as docs/records.md defines them, and knows nothing else.

usage: verify_records.py RECORDS.json                             every vector; exit 1 if any comes out otherwise than expected
       verify_records.py --file PATH --record profile [--now MS]  one envelope; its fields as JSON, or exit 1 and the check
                                                                  (made with cryptography 50.0.2, blake3 1.0.11)

Checks are named by what they look at, in this order: length, envelope, signature, decode, canonical, signer, version,
times, seq or equivocation, unknown, and for the body of a profile: body. How much a sender has sent is not looked at.
"""
import argparse
import json
import re
import sys
import time

from blake3 import blake3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

HOUR, SKEW = 3_600_000, 600_000  # in milliseconds
LIMITS = {"profile": (10_240, 48 * HOUR), "attestation": (4_096, 7 * 24 * HOUR), "node": (4_096, 48 * HOUR)}
BODY_AT_MOST = 4 * 2**20
DOMAIN_NAME, ADDRESS = re.compile(rb"[a-z0-9_]{1,32}"), re.compile(rb"[!-~]{1,128}")

P, L = 2**255 - 19, 2**252 + 27742317777372353535851937790883648493  # the field, and the order of the base point
Y8 = int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little")
SMALL_ORDER = {0, 1, P - 1, Y8, P - Y8}  # the y of the eight points whose order divides 8


class Refused(Exception):
    """Carries the name of the check that fails."""


class Malformed(Exception):
    """The bytes are no value of the kind, or one outside its limits."""


def need(condition, error):
    if not condition:
        raise error


class Reader:
    def __init__(self, data):
        self.rest = data

    def take(self, size):
        need(size <= len(self.rest), Malformed("the bytes end"))
        taken, self.rest = self.rest[:size], self.rest[size:]
        return taken

    def number(self, size):
        return int.from_bytes(self.take(size), "little")

    def hash(self):
        return self.take(32).hex()

    def text(self, allowed):
        text = self.take(self.number(8))
        need(allowed.fullmatch(text), Malformed("a text"))
        return text.decode()

    def list(self, least, most, element):
        count = self.number(8)
        need(least <= count <= most, Malformed("the length of a list"))
        return [element() for _ in range(count)]

    def numbers(self, **sizes):
        return {name: self.number(size) for name, size in sizes.items()}

    def field(self):
        length = shift = 0
        while shift == 0 or byte >= 0x80:
            byte = self.number(1)
            length |= (byte & 0x7F) << shift
            shift += 7
        need(length < 2**64 and (byte or shift == 7), Malformed("a length not in its shortest form"))
        return self.take(length)


def ascending(items):
    need(all(a < b for a, b in zip(items, items[1:])), Malformed("not ascending"))


# ---- payloads: decoded within their limits, by the name of the record

def profile(r, node, issued):
    out = {name: r.hash() for name in ("model", "probes", "build_profile", "body_hash")}
    out["body_length"] = r.number(8)
    out["summary"] = r.list(0, 32, lambda: {"domain": r.text(DOMAIN_NAME), **r.numbers(experts=4, trials=8, hits=8)})
    ascending([d["domain"] for d in out["summary"]])
    need(all(d["hits"] <= d["trials"] for d in out["summary"]), Malformed("hits"))
    return out


def attestation(r, node, issued):
    out = {"subject": r.hash(), **r.numbers(facet=1, from_ms=8, until_ms=8, good=4, bad=4)}
    out["evidence"] = r.list(0, 16, r.hash)
    need(out["subject"] != node and out["facet"] <= 2, Malformed("about oneself, or of no facet"))
    need(out["from_ms"] <= out["until_ms"] <= issued, Malformed("from, until"))
    return out


def node(r, node, issued):
    out = r.numbers(memory_bytes=8, disk_bytes=8, experts_per_second=4)
    out["addresses"] = r.list(0, 16, lambda: r.text(ADDRESS))
    out["models"] = r.list(0, 64, r.hash)
    ascending(out["models"])
    return out


def open_envelope(record, data):
    """Returns signer and payload: checks 1, 3 and 4."""
    need(len(data) <= LIMITS[record][0], Refused("length"))
    r = Reader(data)
    try:
        version, key, signature, kind, payload = r.number(1), r.take(32), r.take(64), r.field(), r.field()
    except Malformed:
        raise Refused("envelope")
    need(version == 1 and not r.rest and kind == f"/confrere/{record}/1".encode(), Refused("envelope"))
    for point in key, signature[:32]:
        y = int.from_bytes(point, "little") % 2**255
        need(y < P and y not in SMALL_ORDER, Refused("signature"))
    need(int.from_bytes(signature[32:], "little") < L, Refused("signature"))
    signed_from = data[97:]  # both fields, as they are
    domain = f"confrere-{record}/v1".encode()
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, bytes([len(domain)]) + domain + signed_from)
    except (InvalidSignature, ValueError):
        raise Refused("signature")
    return key.hex(), payload


def verify(record, data, now, known=None):
    """Returns the fields of a record, or raises Refused: checks 1 and 3 to 11. Without `known`, all is new and known here."""
    signer, payload = open_envelope(record, data)
    r = Reader(payload)
    try:
        out = {"version": r.number(2), "node": r.hash(), **r.numbers(seq=8, issued_ms=8, expires_ms=8)}
        out |= {"profile": profile, "attestation": attestation, "node": node}[record](r, out["node"], out["issued_ms"])
        need(not r.rest, Refused("canonical"))  # no value has two encodings, so this is all that encoding again can find
    except (Malformed, Refused) as error:
        other = len(payload) >= 2 and payload[:2] != b"\x01\x00"
        raise Refused("version" if other else "canonical" if isinstance(error, Refused) else "decode")
    need(out["node"] == signer, Refused("signer"))
    need(out["version"] == 1, Refused("version"))
    issued, expires = out["issued_ms"], out["expires_ms"]
    need(issued <= now + SKEW and now <= expires + SKEW, Refused("times"))
    need(0 <= expires - issued <= LIMITS[record][1], Refused("times"))
    if known and known["seq"] is not None and out["seq"] <= int(known["seq"]):
        other = out["seq"] == int(known["seq"]) and blake3(data).hexdigest() != known["bytes_hash"]
        raise Refused("equivocation" if other else "seq")
    if known and record == "profile":
        need(out["model"] in known["models"] and out["probes"] in known["probes"], Refused("unknown"))
    return out


def decode_body(r, layers, experts):
    def expert():
        out = {"tokens": r.number(8), "modalities": [r.number(8) for _ in range(3)]}
        sizes = dict(routed=4, gate_mass=8, square_routed=4, cross=4, trials=4, hits=4)
        out["domains"] = r.list(len(domains), len(domains), lambda: r.numbers(**sizes))
        out["coactive"] = r.list(0, 8, lambda: r.numbers(expert=4, count=4))
        return out

    out = {"version": r.number(2), "model": r.hash(), "probes": r.hash()}
    domain_sizes = dict(probes=4, tokens=8, square_tokens=8)
    need(out["version"] in (1, 2), Malformed("another version"))
    modality = dict(modality=1) if out["version"] == 2 else {}
    domains = r.list(1, 16 * 3, lambda: {"name": r.text(DOMAIN_NAME), **r.numbers(**modality, **domain_sizes)})
    out["domains"] = domains
    need(len({d["name"] for d in domains}) <= 16, Malformed("too many domains"))
    out["experts"] = r.list(layers * experts, layers * experts, expert)
    need(not r.rest, Malformed("bytes left over"))
    ascending([(d["name"], d.get("modality", 0)) for d in domains])
    if modality:
        need(all(d["modality"] < 3 for d in domains) and any(d["modality"] for d in domains), Malformed("modality"))
        for e in out["experts"]:
            of = [sum(c["routed"] for c, d in zip(e["domains"], domains) if d["modality"] == m) for m in range(3)]
            need(of == e["modalities"], Malformed("modalities"))
    for row, e in enumerate(out["experts"]):
        for d, of in zip(e["domains"], domains):
            need(d["hits"] <= d["trials"] <= d["routed"] <= of["tokens"], Malformed("counts"))
            need(d["gate_mass"] <= d["routed"] << 16, Malformed("gate_mass"))
        need(e["tokens"] == sum(d["routed"] for d in e["domains"]) == sum(e["modalities"]), Malformed("sums"))
        ascending([(-c["count"], c["expert"]) for c in e["coactive"]])
        numbers = [c["expert"] for c in e["coactive"]]
        need(len(set(numbers)) == len(numbers) and row % experts not in numbers, Malformed("coactive twice, or itself"))
        need(all(c["expert"] < experts and 1 <= c["count"] <= e["tokens"] for c in e["coactive"]), Malformed("coactive"))
    return out


def verify_body(head, data, shape):
    """Returns the fields of a body, or raises Refused: check 12."""
    need(len(data) == head["body_length"] and len(data) <= BODY_AT_MOST, Refused("body"))
    need(blake3(data).hexdigest() == head["body_hash"], Refused("body"))
    try:
        out = decode_body(Reader(data), shape["layers"], shape["experts"])
    except Malformed:
        raise Refused("body")
    need((out["model"], out["probes"]) == (head["model"], head["probes"]), Refused("body"))
    return out


def plain(value):
    """The same with strings for the numbers that JSON's readers may round."""
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, int) and value > 2**53 else value


def outcome(v):
    data = bytes.fromhex(v["bytes"])
    try:
        if v["record"] != "body":
            return "ok", plain(verify(v["record"], data, v["now_ms"], v["known"]))
        try:
            head = verify("profile", bytes.fromhex(v["head"]), v["now_ms"], v["known"])
        except Refused as refused:
            return f"head refused: {refused}", None
        return "ok", plain(verify_body(head, data, v["shape"]))
    except Refused as refused:
        return str(refused), None


def main():
    parser = argparse.ArgumentParser(usage=__doc__.split("usage: ")[1].split("\n\n")[0])
    parser.add_argument("vectors", nargs="?")
    parser.add_argument("--file")
    parser.add_argument("--record", choices=LIMITS)
    parser.add_argument("--now", type=int, default=time.time_ns() // 1_000_000)
    args = parser.parse_args()
    if bool(args.vectors) == bool(args.file) or bool(args.file) != bool(args.record):
        parser.error("either RECORDS.json, or --file and --record")
    if args.file:
        with open(args.file, "rb") as file:
            data = file.read()
        try:
            print(json.dumps(plain(verify(args.record, data, args.now)), indent=1))
        except Refused as check:
            print(check)
            sys.exit(1)
        return
    with open(args.vectors) as file:
        vectors = json.load(file)
    valid = refused = wrong = 0
    for v in vectors:
        found, fields = outcome(v)
        if found != v["expected"] or fields != v.get("fields"):
            wrong += 1
            print(f"{v['name']}: expected {v['expected']}, found {found}, fields {fields}")
        elif found == "ok":
            valid += 1
        else:
            refused += 1
    print(f"{len(vectors)} vectors: {valid} valid, {refused} refused at the check that they should be; {wrong} wrong")
    sys.exit(wrong > 0 or not vectors)


if __name__ == "__main__":
    main()
