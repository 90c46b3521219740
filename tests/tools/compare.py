#!/usr/bin/env python3
"""Times prefill and decode beside llama.cpp and ik_llama.cpp: the same weights, the programs taking turns, medians with minimum and maximum.

usage: compare.py CONFRERE DATA_DIR MODEL GGUF [--llama LLAMA_BENCH] [--ik LLAMA_BENCH] [--threads 1,2] [--rounds 5] [--load]

`to_gguf.py` writes GGUF from MODEL. Each round runs each program once, at each number of threads; a program's figure in a round is the median
of its own repetitions. ik_llama.cpp runs with -rtr 1 -fmoe 1 (weights repacked when loaded), llama.cpp with its defaults, which repack
too, and with --repack 0 where its bench has that. Prints a table, and one JSON line at the end. With --load, one core is kept busy by
another process while the programs run.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("confrere")
parser.add_argument("data_dir")
parser.add_argument("model")
parser.add_argument("gguf")
parser.add_argument("--llama", help="llama-bench of llama.cpp")
parser.add_argument("--ik", help="llama-bench of ik_llama.cpp")
parser.add_argument("--threads", default="1,2")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--prefill", type=int, default=512)
parser.add_argument("--decode", type=int, default=64)
parser.add_argument("--kernels", action="append", help="a set of kernels of ours; may be given several times")
parser.add_argument("--load", action="store_true", help="keep one core busy meanwhile")
args = parser.parse_args()


def run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def ours(threads, kernels):
    flags = ["--kernels", kernels] if kernels else []
    command = [args.confrere, "--data-dir", args.data_dir, "--json", "bench", "speed", args.model, "--threads", str(threads), "--runs", "3"]
    rows = run([*command, "--prefill", str(args.prefill), "--decode", str(args.decode), *flags])
    found = {row["phase"]: row["tokens_per_second"]["median"] for row in rows}
    return found | {"decode limit": next(row["limit"] for row in rows if row["phase"] == "decode")}


def theirs(bench, threads, flags):
    command = [bench, "-m", args.gguf, "-t", str(threads), "-p", str(args.prefill), "-n", str(args.decode), "-r", "3", "-o", "json", *flags]
    rows = run(command)
    return {"prefill" if row["n_prompt"] else "decode": statistics.median(row["samples_ts"]) for row in rows}


programs = {}
for kernels in args.kernels or [None]:
    programs[f"confrere {kernels}" if kernels else "confrere"] = lambda threads, kernels=kernels: ours(threads, kernels)
if args.ik:
    programs["ik_llama.cpp"] = lambda threads: theirs(args.ik, threads, ["-rtr", "1", "-fmoe", "1"])
if args.llama:
    programs["llama.cpp"] = lambda threads: theirs(args.llama, threads, [])
    if "--repack" in subprocess.run([args.llama, "--help"], capture_output=True, text=True).stdout:
        programs["llama.cpp --repack 0"] = lambda threads: theirs(args.llama, threads, ["--repack", "0"])

busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if args.load else None
samples = {}
try:
    for round in range(args.rounds):
        for threads in map(int, args.threads.split(",")):
            for name, program in programs.items():
                for phase, value in program(threads).items():
                    samples.setdefault((threads, phase, name), []).append(value)
                print(f"round {round + 1}, {threads} threads, {name}", file=sys.stderr)
finally:
    if busy:
        busy.kill()

print(f"{args.model}: tokens a second, median of {args.rounds} (minimum – maximum); one-minute load {os.getloadavg()[0]:.1f}")
for (threads, phase, name), values in sorted(samples.items()):
    print(f"{threads} threads  {phase:14}{name:26}{statistics.median(values):9.1f}  ({min(values):.1f} – {max(values):.1f})")
print(json.dumps([{"threads": t, "phase": p, "program": n, "samples": v} for (t, p, n), v in samples.items()]))
