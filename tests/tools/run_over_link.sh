#!/usr/bin/env bash
# Inside linkhub's namespaces: serves the shipped model from m0 and runs it on an empty node in m1.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
binary=$root/target/release/confrere
work=$(mktemp -d)
trap '[ -z "${server:-}" ] || kill "$server" 2>/dev/null || true; wait; rm -rf "$work"' EXIT
"$binary" --data-dir "$work/a" --quiet import "$root/models/confrere-18m" --name shipped
ip netns exec m0 "$binary" --data-dir "$work/a" serve --listen /ip4/10.88.0.1/tcp/4747 >"$work/out" 2>/dev/null &
server=$!
until [ "$(cat "$work/out" 2>/dev/null | wc -l)" -ge 2 ]; do sleep 0.05; done
ticket=$(sed -n 2p "$work/out")
ip netns exec m1 "$binary" --data-dir "$work/b" join "$ticket"
for prompt in "Once upon a time" "Once upon a time" "pub fn new(name: &str) -> Self {"; do
    began=$(date +%s.%N)
    ip netns exec m1 "$binary" --data-dir "$work/b" run shipped "$prompt" --raw --temperature 0 --max-tokens 32
    echo "[$(awk "BEGIN {printf \"%.2f\", $(date +%s.%N) - $began}") s from start to end]"
done
