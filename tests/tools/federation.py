#!/usr/bin/env python3
"""Decodes a model whose experts mostly do not fit into memory, with a peer near, far or absent; every node on one core (needs root).

usage: federation.py BIN_DIR WORK_DIR [--layers 8] [--tokens 64] [--share 0.2] [--rate 1000] [--routing uniform,skewed]

BIN_DIR holds confrere and linkhub. Makes models of true layer shapes at q4 in WORK_DIR (2.8 GB each at 8 layers; kept for the next time).
Node A has all, in memory, and serves from core 0; node B has the trunk and memory for SHARE of the experts, on core 1. Each line is one
`confrere run` with the same prompt and seed, and its tokens are compared with those of A alone. The link is linkhub's, which takes some of
the cores itself.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("bin_dir")
parser.add_argument("work_dir")
parser.add_argument("--layers", type=int, default=8)
parser.add_argument("--tokens", type=int, default=64)
parser.add_argument("--share", type=float, default=0.2)
parser.add_argument("--rate", type=int, default=1000, help="Mbit/s of the near links")
parser.add_argument("--routing", default="uniform,skewed")
args = parser.parse_args()
confrere, hub = (f"{os.path.abspath(args.bin_dir)}/{name}" for name in ("confrere", "linkhub"))
os.makedirs(args.work_dir, exist_ok=True)
PROMPT = json.dumps([17 * i % 31_000 for i in range(1, 21)])
RUN = ["--temperature", "1", "--top-k", "0", "--top-p", "1", "--seed", "7", "--threads", "1", "--context", "512", "--timeout", "60"]

MANY = ["--max-tokens", str(args.tokens)]


def command(words, core, space=None):
    inside = ["ip", "netns", "exec", space] if space else []
    return ["taskset", "-c", str(core), *inside, confrere, *words]


def run(words, core, space=None):
    began = time.perf_counter()
    done = subprocess.run(command(["--json", *words], core, space), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{words}\nended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout), time.perf_counter() - began


class Link:
    """Two namespaces, fm0 and fm1, joined at some rate and delay, while it is in use."""

    def __init__(self, rate, round_trip_ms):
        self.words = [hub, "--nodes", "2", "--rate-mbit", str(rate), "--delay-ms", str(round_trip_ms / 2), "--prefix", "fm", "--queue-kb", "4096"]

    def __enter__(self):
        self.process = subprocess.Popen(self.words, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline().strip() == "ready", "linkhub makes the link"

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


class Serving:
    """Node A at work for others."""

    def __init__(self, data, *more):
        self.words = command(["--data-dir", data, "serve", "--listen", "/ip4/10.88.0.1/tcp/4747", "--threads", "1", *more], 0, "fm0")

    def __enter__(self):
        self.process = subprocess.Popen(self.words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return self.process.stdout.readline().strip()

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


def starved(work, empty):
    """A copy of a node that has nothing but the trunk."""
    data = f"{work}/b"
    shutil.rmtree(data, ignore_errors=True)
    shutil.copytree(empty, data)
    return data


def line(what, answer, alone, reference):
    used = answer["experts"]
    same = "the same tokens" if answer["tokens"] == reference else "OTHER TOKENS"
    speed = answer["tokens_per_second"]
    hits = 100 * used["hits"] / max(used["uses"], 1)
    print(f"  {what:34}{speed:7.2f} tokens/s {100 * speed / alone:5.0f}%   hits {hits:3.0f}%, experts needed {used['needed']}: {used['ram']} ram, {used['disk']} disk, {used['remote']} remote, {used['fetched']} fetched; {same}", flush=True)


for routing in args.routing.split(","):
    a, trunk = f"{args.work_dir}/{routing}", f"{args.work_dir}/{routing}-trunk"
    if not os.path.isdir(a):
        words = ["bench", "synth", "qwen3-30b-a3b", "--layers", str(args.layers), "--vocab", "32000", "--precision", "q4", "--routing", routing, "--name", "m"]
        subprocess.run([confrere, "--data-dir", a, *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    about = json.loads(subprocess.run([confrere, "--data-dir", a, "--json", "show", "m", "--blobs"], check=True, capture_output=True).stdout)
    experts = [blob["bytes"] for blob in about["blobs"] if blob["name"].startswith("layer ")]
    rest = sum(blob["bytes"] for blob in about["blobs"]) - sum(experts)
    ram = int(rest + args.share * sum(experts) + (160 << 20))
    print(f"{routing} routing, {args.layers} layers, {len(experts)} experts of {experts[0] / 1e6:.2f} MB, trunk {rest / 1e6:.0f} MB; memory of B {ram / 1e6:.0f} MB; one core a node")
    # Twice: the second finds the page cache and the disk as the first left them.
    model = about["id"]
    alone = [run(["--data-dir", a, "run", "m", PROMPT, *RUN, *MANY], 1)[0] for _ in range(2)][1]
    # Alone, everything in memory: what is decoded after a first run in the same process would be; measured by the bench.
    rows, _ = run(["--data-dir", a, "bench", "speed", "m", "--threads", "1", "--prefill", "0", "--decode", str(args.tokens), "--runs", "5"], 1)
    full = rows[0]["tokens_per_second"]["median"]
    print(f"  {'A alone, all in memory':34}{full:7.2f} tokens/s")
    line("disk only", run(["--data-dir", a, "--ram", str(ram), "run", "m", PROMPT, *RUN, *MANY], 1)[0], full, alone["tokens"])
    if not os.path.isdir(trunk):
        with Link(args.rate, 0.5), Serving(a) as address:
            run(["--data-dir", trunk, "pull", model, "--trunk", "--peer", address, "--allow-unsigned"], 1, "fm1")
    for round_trip in (0.5, 5):
        with Link(args.rate, round_trip), Serving(a, "--execute-for", "any") as address:
            peer = ["--peer", address, "--allow-unsigned"]
            # The peer has what it needs in memory after the first.
            for attempt in ("first", "again"):
                data = starved(args.work_dir, trunk)
                answer, _ = run(["--data-dir", data, "--ram", str(ram), "run", model, PROMPT, *RUN, *MANY, *peer, "--execute-at", "any"], 1, "fm1")
                line(f"peer at {round_trip} ms, {attempt}", answer, full, alone["tokens"])
            report = answer["remote"]
            print(f"    {report['requests']} requests, {report['hedged']} hedged, audits {report['peers'][0]['audits']}, skipped {report['audits_skipped']}")
    with Link(args.rate, 0.5), Serving(a) as address:
        data = starved(args.work_dir, trunk)
        line("fetch only, at 0.5 ms", run(["--data-dir", data, "--ram", str(ram), "run", model, PROMPT, *RUN, *MANY, "--peer", address, "--allow-unsigned"], 1, "fm1")[0], full, alone["tokens"])
    # From nothing, over a slow link: until the first token.
    with Link(100, 5), Serving(a, "--execute-for", "any") as address:
        data = f"{args.work_dir}/c"
        shutil.rmtree(data, ignore_errors=True)
        _, took = run(["--data-dir", data, "--ram", str(ram), "run", model, PROMPT, *RUN, "--max-tokens", "1", "--peer", address, "--allow-unsigned", "--execute-at", "any"], 1, "fm1")
        whole = sum(blob["bytes"] for blob in about["blobs"]) * 8 / 100e6
        print(f"  first token from nothing at 100 Mbit/s after {took:.1f} s; downloading the model takes {whole:.0f} s at the line's rate: {whole / took:.1f} times as long")
