#!/usr/bin/env bash
# Imports the checkpoint DIR inside a cgroup of its largest tensor plus 256 MiB and prints the peak of anonymous memory.
# usage: import_memory.sh DIR   (root, a memory cgroup, a release build)
set -euo pipefail
dir=$1
binary=$(cd "$(dirname "$0")/../.." && pwd)/target/release/confrere
data=$(mktemp -d)
largest=$(python3 - "$dir" <<'PY'
import glob, json, struct, sys
sizes = []
for path in glob.glob(sys.argv[1] + "/*.safetensors"):
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    sizes += [t["data_offsets"][1] - t["data_offsets"][0] for n, t in header.items() if n != "__metadata__"]
print(max(sizes))
PY
)
limit=$((largest + 256 * 1024 * 1024))
if [ -d /sys/fs/cgroup/memory ]; then # cgroup v1
    group=/sys/fs/cgroup/memory/confrere-import-$$
    limit_file=memory.limit_in_bytes events_file=memory.oom_control
else
    group=/sys/fs/cgroup/confrere-import-$$
    limit_file=memory.max events_file=memory.events
fi
mkdir "$group"
trap 'rmdir "$group" 2>/dev/null || true; rm -rf "$data"' EXIT
echo "$limit" >"$group/$limit_file"
sh -c 'echo $$ >"$1/cgroup.procs"; exec "$2" --data-dir "$3" import "$4" --name synthetic' - "$group" "$binary" "$data" "$dir" &
pid=$!
peak=0
while kill -0 "$pid" 2>/dev/null; do
    now=$(awk '/^RssAnon/ {print $2}' "/proc/$pid/status" 2>/dev/null || true)
    if [ "${now:-0}" -gt "$peak" ]; then peak=$now; fi
    sleep 0.02
done
code=0
wait "$pid" || code=$?
echo "checkpoint $(du -sh "$dir" | cut -f1), largest tensor $((largest >> 20)) MiB, limit $((limit >> 20)) MiB"
echo "peak anonymous memory $((peak >> 10)) MiB, exit code $code, killed for memory: $(awk '/^oom_kill / {print $2}' "$group/$events_file")"
exit "$code"
