"""Golden vectors of the signed envelope, good ones and bad ones.

usage: envelope.py OUT.json      (made with cryptography 50.0.2, blake3 1.0.11)

signing input = field(domain) || field(payload type) || field(payload)
field(b)      = unsigned LEB128 length of b || b
envelope      = 0x01 || public key (32) || Ed25519 signature (64) || field(payload type) || field(payload)

The file is an array. Each vector is opened under its `domain` and `payload_type`; `expected` is "ok" or the one check
that must fail (see CHECKS). `seed` is the secret of the key named in the envelope, null where none is known; `payload`
is what its signer meant. Bytes are hexadecimal. `blake3` is the hash of the envelope.
"""
import hashlib
import json
import sys

from blake3 import blake3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

CHECKS = {
    "truncated": "the bytes end before the envelope does",
    "version": "the first byte is not 1",
    "length": "a length is not the shortest LEB128, or does not fit in 64 bits",
    "trailing": "bytes follow the payload",
    "type": "the payload type is another one",
    "key": "the public key is a point of small order",
    "nonce": "the signature's R is a point of small order",
    "scalar": "the signature's S is not below L",
    "signature": "the equation of the signature does not hold",
}

VERSION = b"\x01"
L = 2**252 + 27742317777372353535851937790883648493  # order of the base point
P = 2**255 - 19
IDENTITY = (1).to_bytes(32, "little")  # the neutral point, y = 1
IDENTITY_NOT_CANONICAL = (P + 1).to_bytes(32, "little")  # the same with y not reduced
ZERO = bytes(32)  # y = 0, a point of order 4

DOMAINS = {
    name: (f"confrere-{name}/v1", f"/confrere/{name}/1")
    for name in ("manifest", "profile", "attestation", "receipt", "node")
}


def leb128(n):
    """Encodes a length, in as few bytes as possible."""
    out = bytearray()
    while n >= 0x80:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


def field(data):
    return leb128(len(data)) + data


def signing_input(domain, payload_type, payload):
    return field(domain.encode()) + field(payload_type.encode()) + field(payload)


def seed_of(name):
    """A secret that anyone can derive again."""
    return hashlib.sha256(f"confrere test key {name}".encode()).digest()


def public_key(seed):
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


def sign(seed, message):
    return Ed25519PrivateKey.from_private_bytes(seed).sign(message)


def envelope(key, signature, payload_type, payload):
    return VERSION + key + signature + field(payload_type.encode()) + field(payload)


def sealed(seed, domain, payload_type, payload):
    return envelope(public_key(seed), sign(seed, signing_input(domain, payload_type, payload)), payload_type, payload)


# ---- what a verifier must refuse: points of small order, S that is not reduced

def secret_scalar(seed):
    """The scalar a of the seed's public key A = aB."""
    digest = bytearray(hashlib.sha512(seed).digest()[:32])
    digest[0] &= 248
    digest[31] = digest[31] & 127 | 64
    return int.from_bytes(digest, "little")


def challenge(r, key, message):
    return int.from_bytes(hashlib.sha512(r + key + message).digest(), "little") % L


def forge_for_small_order_key(key, order, message):
    """A signature that satisfies S B = R + h A for a key A of small order, without any secret: R = S B and h A = 0."""
    for attempt in range(1000):
        seed = seed_of(f"forgery {attempt}")
        r = public_key(seed)
        if challenge(r, key, message) % order == 0:
            return r + (secret_scalar(seed) % L).to_bytes(32, "little")
    raise AssertionError("no forgery found")


def sign_with_identity_nonce(seed, message):
    """A signature that satisfies the equation with R the neutral point: S = h a, which gives the secret away."""
    s = challenge(IDENTITY, public_key(seed), message) * secret_scalar(seed) % L
    return IDENTITY + s.to_bytes(32, "little")


def with_unreduced_s(signature):
    """The same signature with S + L for S."""
    return signature[:32] + (int.from_bytes(signature[32:], "little") + L).to_bytes(32, "little")


def small_order_encodings():
    """All encodings of the eight points of small order, canonical or not."""
    d = -121665 * pow(121666, -1, P) % P
    y = int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little")
    assert (d * y**4 + 2 * y**2 - 1) % P == 0  # so its order is 8
    ys = [0, P, 1, P + 1, P - 1, y, P - y]
    return {(y | sign << 255).to_bytes(32, "little") for y in ys for sign in (0, 1)}


SMALL_ORDER = small_order_encodings()


# ---- an opener that names every check that fails, rather than stopping at the first

def failed_checks(data, domain, payload_type):
    """Returns the names of the checks that the bytes fail."""
    failed = []
    rest = data

    def take(n):
        nonlocal rest
        if len(rest) < n:
            raise EOFError
        taken, rest = rest[:n], rest[n:]
        return taken

    def take_field():
        length = shift = 0
        while True:
            byte = take(1)[0]
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        if length >= 2**64:
            raise OverflowError
        if byte == 0 and shift > 7:
            failed.append("length")
        return take(length)

    try:
        if take(1) != VERSION:
            failed.append("version")
        key, signature, found_type, payload = take(32), take(64), take_field(), take_field()
    except EOFError:
        return failed + ["truncated"]
    except OverflowError:
        return failed + ["length"]
    if rest:
        failed.append("trailing")
    if found_type != payload_type.encode():
        failed.append("type")
    if key in SMALL_ORDER:
        failed.append("key")
    if signature[:32] in SMALL_ORDER:
        failed.append("nonce")
    s = int.from_bytes(signature[32:], "little")
    if s >= L:
        failed.append("scalar")
    try:  # the equation alone: S reduced first, and this library lets points of small order pass
        message = field(domain.encode()) + field(found_type) + field(payload)
        Ed25519PublicKey.from_public_bytes(key).verify(signature[:32] + (s % L).to_bytes(32, "little"), message)
    except InvalidSignature:
        failed.append("signature")
    return failed


def vector(name, expected, about, seed, payload, data):
    """Makes a vector, after checking that exactly the expected check fails."""
    domain, payload_type = DOMAINS[about]
    failed = failed_checks(data, domain, payload_type)
    assert failed == ([] if expected == "ok" else [expected]), (name, expected, failed)
    return {
        "name": name, "expected": expected, "domain": domain, "payload_type": payload_type,
        "seed": seed.hex() if seed else None, "payload": payload.hex(), "envelope": data.hex(),
        "blake3": blake3(data).hexdigest(),
    }


def valid_vectors():
    payloads = [
        ("manifest", "manifest", b'{"name":"tiny","layers":4}'),
        ("profile", "profile", bytes(range(48))),
        ("attestation", "attestation", b"\x00"),
        ("receipt", "receipt", b"\xff" * 16),
        ("node", "node", "caf\u00e9".encode()),
        ("empty-payload", "manifest", b""),
        ("length-127-takes-one-byte", "profile", bytes(i * 3 % 256 for i in range(127))),
        ("length-128-takes-two-bytes", "attestation", bytes(i * 5 % 256 for i in range(128))),
        ("length-200-takes-two-bytes", "receipt", bytes(i * 7 % 256 for i in range(200))),
        ("payload-is-an-envelope", "node", sealed(seed_of("inner"), *DOMAINS["node"], b"inner")),
    ]
    return [vector(name, "ok", about, seed_of(name), payload, sealed(seed_of(name), *DOMAINS[about], payload))
            for name, about, payload in payloads]


def flip(data, at, bit):
    """The bytes with one bit flipped."""
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1:]


def invalid_vectors():
    about = "manifest"
    domain, kind = DOMAINS[about]
    seed, payload = seed_of("signer"), b"eleven weeks"
    key, message = public_key(seed), signing_input(domain, kind, payload)
    signature = sign(seed, message)
    good = envelope(key, signature, kind, payload)
    head = VERSION + key + signature

    def signed(text):
        return envelope(key, sign(seed, text), kind, payload)

    def forged(bad_key, order):
        return envelope(bad_key, forge_for_small_order_key(bad_key, order, message), kind, payload)

    by_us = [
        ("wrong-domain", "signature", signed(signing_input(DOMAINS["profile"][0], kind, payload))),
        ("boundary-of-domain-and-type-moved", "signature", signed(signing_input(domain + kind[0], kind[1:], payload))),
        ("fields-signed-without-lengths", "signature", signed(domain.encode() + kind.encode() + payload)),
        ("payload-signed-alone", "signature", signed(payload)),
        ("wrong-payload-type", "type", sealed(seed, domain, DOMAINS["profile"][1], payload)),
        ("payload-type-of-a-later-version", "type", sealed(seed, domain, kind[:-1] + "2", payload)),
        ("boundary-of-type-and-payload-moved", "type", sealed(seed, domain, kind[:-1], kind[-1:].encode() + payload)),
        ("payload-bit-flipped", "signature", flip(good, len(good) - 1, 0)),
        ("signature-r-bit-flipped", "signature", flip(good, 33, 3)),
        ("signature-s-bit-flipped", "signature", flip(good, 33 + 32, 3)),
        ("signed-by-another-key", "signature", envelope(key, sign(seed_of("another"), message), kind, payload)),
        ("trailing-byte", "trailing", good + b"\x00"),
        ("two-envelopes", "trailing", good + good),
        ("last-byte-missing", "truncated", good[:-1]),
        ("ends-before-the-payload-length", "truncated", head + field(kind.encode())),
        ("ends-within-a-length", "truncated", head + field(kind.encode()) + b"\x80"),
        ("ends-within-the-signature", "truncated", good[:64]),
        ("no-bytes", "truncated", b""),
        ("length-beyond-the-end", "truncated", head + field(kind.encode()) + leb128(2**63) + payload),
        ("version-0", "version", b"\x00" + good[1:]),
        ("version-2", "version", b"\x02" + good[1:]),
        ("overlong-payload-length", "length", head + field(kind.encode()) + bytes([len(payload) | 0x80, 0]) + payload),
        ("overlong-type-length", "length", head + bytes([len(kind) | 0x80, 0x80, 0]) + kind.encode() + field(payload)),
        ("length-beyond-64-bits", "length", head + field(kind.encode()) + b"\xff" * 9 + b"\x02" + payload),
        ("s-not-reduced", "scalar", envelope(key, with_unreduced_s(signature), kind, payload)),
        ("nonce-of-small-order", "nonce", envelope(key, sign_with_identity_nonce(seed, message), kind, payload)),
    ]
    by_nobody = [
        ("key-is-the-identity", "key", forged(IDENTITY, 1)),
        ("key-is-the-identity-not-canonical", "key", forged(IDENTITY_NOT_CANONICAL, 1)),
        ("key-is-all-zero", "key", forged(ZERO, 4)),
    ]
    return ([vector(name, expected, about, seed, payload, data) for name, expected, data in by_us]
            + [vector(name, expected, about, None, payload, data) for name, expected, data in by_nobody])


def main():
    vectors = valid_vectors() + invalid_vectors()
    assert {v["expected"] for v in vectors} == {"ok", *CHECKS}
    with open(sys.argv[1], "w") as file:
        json.dump(vectors, file, indent=1)
        file.write("\n")
    for v in vectors:
        print(v["expected"], v["name"])
    print(sum(v["expected"] == "ok" for v in vectors), "valid,", sum(v["expected"] != "ok" for v in vectors), "invalid")


if __name__ == "__main__":
    main()
