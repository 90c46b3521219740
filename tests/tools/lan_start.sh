#!/usr/bin/env bash
# How long a node with nothing but one address takes until it generates: on an emulated LAN (namespaces, veth and tbf at
# 1 Gbit/s; needs root and iproute2), where the address is of a node that only knows who has the model. Fails beyond 5 s.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
binary=$root/target/release/confrere
work=$(mktemp -d)
n=cflan$$
pids=()
cleanup() {
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    wait # a node says goodbye before it ends
    for name in hub a b c; do ip netns del "$n$name" 2>/dev/null || true; done
    rm -rf "$work"
}
trap cleanup EXIT
ip netns add "${n}hub"
ip -n "${n}hub" link add br0 type bridge
ip -n "${n}hub" link set br0 up
number=0
for name in a b c; do
    number=$((number + 1))
    ip netns add "$n$name"
    ip -n "$n$name" link set lo up
    ip -n "${n}hub" link add "to_$name" type veth peer name eth0 netns "$n$name"
    ip -n "${n}hub" link set "to_$name" master br0 up
    ip -n "$n$name" addr add "10.77.0.$number/24" dev eth0
    ip -n "$n$name" link set eth0 up
    ip netns exec "${n}hub" tc qdisc add dev "to_$name" root tbf rate 1gbit burst 256kb latency 50ms
    ip netns exec "$n$name" tc qdisc add dev eth0 root tbf rate 1gbit burst 256kb latency 50ms
done
lines() { for _ in $(seq 300); do [ "$(wc -l <"$1")" -ge 2 ] && return; sleep 0.1; done; echo "$1 stays empty"; exit 1; }
"$binary" --data-dir "$work/a" --quiet import "$root/models/confrere-18m" --name shipped >/dev/null
id=$("$binary" --data-dir "$work/a" show shipped --json | sed -n 's/.*"id": *"\([0-9a-f]*\)".*/\1/p' | head -1)
publisher=$("$binary" --data-dir "$work/a" id)
: >"$work/b.out"; : >"$work/a.out"
ip netns exec "${n}b" "$binary" --data-dir "$work/b" serve --listen /ip4/10.77.0.2/tcp/4747 >"$work/b.out" 2>/dev/null &
pids+=($!)
lines "$work/b.out"
known=$(head -1 "$work/b.out")
ip netns exec "${n}a" "$binary" --data-dir "$work/a" serve --listen /ip4/10.77.0.1/tcp/4747 --peer "$known" >"$work/a.out" 2>/dev/null &
pids+=($!)
lines "$work/a.out"
sleep 2 # until A has told B
worst=0
for run in 1 2 3; do
    rm -rf "$work/c"
    "$binary" --data-dir "$work/c" publishers add "$publisher" >/dev/null
    began=$(date +%s.%N)
    ip netns exec "${n}c" "$binary" --data-dir "$work/c" --quiet run "$id" "Once upon a time" --raw --temperature 0 --max-tokens 1 \
        --peer "$known" >/dev/null
    took=$(awk "BEGIN {printf \"%.2f\", $(date +%s.%N) - $began}")
    echo "run $run: first token of the shipped model $took s after the start, with nothing and one address"
    worst=$(awk "BEGIN {print ($took > $worst) ? $took : $worst}")
done
awk "BEGIN {exit !($worst <= 5)}" || { echo "that is more than 5 s"; exit 1; }
