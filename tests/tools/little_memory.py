#!/usr/bin/env python3
"""Decodes a model that is larger than memory: Confrere beside llama.cpp on a mapped file, each in the same cgroup, each from a cold page cache.

usage (as root): little_memory.py CONFRERE DATA_DIR MODEL [--gguf FILE --llama LLAMA_BENCH] [--limit 8] [--ram 7GiB] [--tokens 128]

`bench synth` makes the model, `to_gguf.py` its GGUF. Both programs decode random tokens, so that routing is as the model's embeddings make
it. Prints tokens a second, what was read from the disk, and what the disk would allow: the bytes of missed experts over its speed, which is
measured first, on the model's own blobs in random order, past the page cache.
"""
import argparse
import json
import mmap
import os
import random
import subprocess
import sys
import threading
import time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("confrere")
parser.add_argument("data_dir")
parser.add_argument("model")
parser.add_argument("--gguf")
parser.add_argument("--llama", help="llama-bench of llama.cpp")
parser.add_argument("--llama-flags", default="", help="more flags for it")
parser.add_argument("--limit", type=float, default=8, help="GiB of the cgroup")
parser.add_argument("--ram", default="7GiB")
parser.add_argument("--tokens", type=int, default=64, help="of each of the runs")
parser.add_argument("--runs", type=int, default=3, help="one after another in the same process; the first finds nothing in memory")
parser.add_argument("--threads", type=int, default=2)
args = parser.parse_args()

old = os.path.isdir("/sys/fs/cgroup/memory")
group = "/sys/fs/cgroup/memory/confrere-little" if old else "/sys/fs/cgroup/confrere-little"
os.makedirs(group, exist_ok=True)


def knob(name, value=None):
    path = f"{group}/{name}"
    if value is None:
        return open(path).read()
    with open(path, "w") as file:
        file.write(str(value))


knob("memory.limit_in_bytes" if old else "memory.max", int(args.limit * 2**30))


def cold():
    """Empties the page cache; returns what is left of it, in MB."""
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")
    return int(next(line for line in open("/proc/meminfo") if line.startswith("Cached")).split()[1]) // 1000


def sectors():
    device = os.stat(args.data_dir).st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    for line in open("/proc/diskstats"):
        fields = line.split()
        if f"{fields[0]}:{fields[1]}" == name:
            return int(fields[5])
    return 0


def inside(command):
    """Runs a command in the cgroup, from a cold page cache; returns its JSON, bytes read from the disk, and the cache before, in MB."""
    left = cold()
    before = sectors()
    entering = ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh", *command]
    done = subprocess.run(entering, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout), (sectors() - before) * 512, left


def disk_speed(readers):
    """Bytes a second of reading experts' blobs in random order past the page cache."""
    about = subprocess.run([args.confrere, "--data-dir", args.data_dir, "--json", "show", args.model, "--blobs"], check=True, capture_output=True)
    blobs = [blob for blob in json.loads(about.stdout)["blobs"] if blob["name"].startswith("layer ")]
    chosen = random.Random(1).sample(blobs, min(600, len(blobs)))
    cold()

    def reader(mine):
        buffer = mmap.mmap(-1, -(-mine[0]["bytes"] // 4096) * 4096)
        for blob in mine:
            hash = blob["hash"].removeprefix("b3:")
            file = os.open(f"{args.data_dir}/store/blobs/{hash[:2]}/{hash}", os.O_RDONLY | os.O_DIRECT)
            os.readv(file, [buffer])
            os.close(file)

    start = time.perf_counter()
    threads = [threading.Thread(target=reader, args=(chosen[i::readers],)) for i in range(readers)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return sum(blob["bytes"] for blob in chosen) / (time.perf_counter() - start)


speed = max(disk_speed(1), disk_speed(2))
read_ahead = open("/sys/block/" + os.path.basename(os.path.realpath(f"/sys/dev/block/{os.major(os.stat(args.data_dir).st_dev)}:{os.minor(os.stat(args.data_dir).st_dev)}")) + "/queue/read_ahead_kb").read().strip()
print(f"{args.model}, {args.runs} × {args.tokens} tokens, {args.threads} threads, {args.limit:g} GiB; the disk reads experts at {speed / 1e9:.2f} GB/s, read-ahead {read_ahead} KiB")
command = [args.confrere, "--data-dir", args.data_dir, "--json", "--ram", args.ram, "bench", "speed", args.model, "--threads", str(args.threads)]
rows, read, left = inside([*command, "--prefill", "0", "--decode", str(args.tokens), "--depth", "1", "--runs", str(args.runs), "--cold"])
row = rows[0]
first, last = row["runs"][0], row["runs"][-1]
ours = last["tokens_per_second"]
allowed = args.tokens * speed / max(last["bytes_read"], 1)
print(f"Confrere   first run {first['tokens_per_second']:.2f} tokens/s, last {ours:.2f}: hits {100 * last['hits']:.1f}%, read {last['bytes_read'] / 1e9:.1f} GB,", end=" ")
print(f"{100 * ours / allowed:.0f}% of the {allowed:.1f} that the disk allows, {100 * ours / row['limit']:.0f}% of the {row['limit']:.1f} that memory allows; ", end="")
print(f"disk {read / 1e9:.1f} GB in all (page cache before: {left} MB)", flush=True)
if args.llama:
    command = [args.llama, "-m", args.gguf, "-t", str(args.threads), "-p", "0", "-n", str(args.tokens), "-r", str(args.runs), "-o", "json", *args.llama_flags.split()]
    rows, read, left = inside(command)
    samples = rows[0]["samples_ts"]
    print(f"llama.cpp  first run {samples[0]:.2f} tokens/s, last {samples[-1]:.2f}; disk {read / 1e9:.1f} GB in all (page cache before: {left} MB)")
    print(f"ratio      first {first['tokens_per_second'] / samples[0]:.2f}, last {ours / samples[-1]:.2f}", flush=True)
os.rmdir(group)
