"""Bursts of requests about pictures, sounds and text against a node whose memory holds some of the experts: builds take turns, tokens a second and hits.

usage: switching.py DATA_DIR MODEL RAM ROUNDS BINARY…
DATA_DIR has MODEL, which sees and hears; the requests are the probes that ship. Traffic stays on loopback.
"""
import base64
import json
import random
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

PROBES = Path(__file__).resolve().parents[2] / "node/runtime/probes"
KINDS = {"image": ["objects", "scenes", "text_in_pictures"], "audio": ["speech", "tones", "ambient_sounds"]}
TEXTS = ["code", "stories", "law"]
OF_EACH, BURST = 16, 4


def part(given):
    if given["type"] == "text":
        return given
    data = base64.b64encode((PROBES / "omni" / given["path"]).read_bytes()).decode()
    if given["type"] == "image":
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    return {"type": "input_audio", "input_audio": {"data": data, "format": "ogg"}}


def bursts():
    """Four requests of a kind after each other, kinds in a random order, the same each time."""
    chance, all_bursts = random.Random(1), []

    def add(requests):
        chance.shuffle(requests)
        all_bursts.extend(requests[first : first + BURST] for first in range(0, len(requests), BURST))

    for names in KINDS.values():
        lines = [line for name in names for line in (PROBES / "omni" / f"{name}.jsonl").read_text().splitlines()[:OF_EACH]]
        contents = [[part(given) for given in json.loads(line)["content"]] for line in lines]
        add([("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], "max_tokens": 24}) for content in contents])
    texts = [text.strip() for name in TEXTS for text in (PROBES / f"{name}.txt").read_text().split("%%")[:OF_EACH]]
    add([("/v1/completions", {"prompt": text[:200], "max_tokens": 48}) for text in texts])
    chance.shuffle(all_bursts)
    return [request for burst in all_bursts for request in burst]


def measure(binary, data_dir, model, ram, requests):
    serve = ["serve", "--listen", "/ip4/127.0.0.1/tcp/0", "--api", "127.0.0.1:0", "--json", "--ram", ram, "--model", model, "--kv-tokens", "2048"]
    node = subprocess.Popen([binary, "--data-dir", data_dir, *serve], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        api = "http://" + json.loads(node.stdout.readline())["api"].removeprefix("http://")

        def call(path, body=None):
            request = urllib.request.Request(api + path, json.dumps(body).encode() if body else None, {"Content-Type": "application/json"})
            return json.load(urllib.request.urlopen(request, timeout=60))

        while True:
            try:
                call("/health")
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        began, tokens, said = time.monotonic(), 0, []
        for path, body in requests:
            answer = call(path, {**body, "model": model, "temperature": 0})
            tokens += answer["usage"]["completion_tokens"]
            said.append(json.dumps(answer["choices"], sort_keys=True))
        took = time.monotonic() - began
        uses, memory = call("/api/node")["generation"]["experts"], call("/api/loaded")["memory"]
        return tokens / took, uses["ram"] / uses["uses"], memory["experts_bytes_max"], said
    finally:
        node.terminate()
        node.wait()


def main():
    data_dir, model, ram, rounds, *binaries = sys.argv[1:]
    requests, found, answers = bursts(), {binary: [] for binary in binaries}, None
    for number in range(int(rounds)):
        for binary in binaries if number % 2 == 0 else binaries[::-1]:
            speed, hits, memory, said = measure(binary, data_dir, model, ram, requests)
            answers = answers or said
            assert said == answers, "the answers differ"
            found[binary].append((speed, hits))
            print(f"{binary}: {speed:.1f} tokens/s, hits {hits:.1%}, experts at most {memory / 1e6:.1f} MB", flush=True)
    first = [speed for speed, _ in found[binaries[0]]]
    for binary, rows in found.items():
        ratios = [speed / old for (speed, _), old in zip(rows, first)]
        print(f"{binary}: median {statistics.median(speed for speed, _ in rows):.1f} tokens/s, ratio {statistics.median(ratios):.3f}, hits {statistics.median(hits for _, hits in rows):.1%}")


main()
