#!/usr/bin/env bash
# Two hosts, each behind a NAT of its own, and a relay in between that both can reach; all in network namespaces (needs root,
# iproute2 and nftables). One host serves the shipped model, the other runs it. Says whether they met directly.
# With NATs that keep a port for a port they do; with "symmetric" ones, which choose a port for each destination, they cannot:
# then nothing must have been fetched.
set -euo pipefail
kind=${1:-cone}
root=$(cd "$(dirname "$0")/../.." && pwd)
binary=$root/target/release/confrere
work=$(mktemp -d)
n=cfnat$$
pids=()
cleanup() {
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    wait # a node says goodbye before it ends
    for name in pub nata natb a b; do ip netns del "$n$name" 2>/dev/null || true; done
    rm -rf "$work"
}
trap cleanup EXIT
case $kind in
    cone) masquerade="masquerade" ;;
    symmetric) masquerade="masquerade fully-random" ;;
    *) echo "usage: nat.sh [cone|symmetric]" >&2; exit 2 ;;
esac

for name in pub nata natb a b; do ip netns add "$n$name"; ip -n "$n$name" link set lo up; done
ip -n "${n}pub" link add br0 type bridge
ip -n "${n}pub" addr add 203.0.113.1/24 dev br0
ip -n "${n}pub" link set br0 up
side() { # NAT HOST number
    ip -n "${n}pub" link add "w$3" type veth peer name wan netns "$n$1"
    ip -n "${n}pub" link set "w$3" master br0 up
    ip -n "$n$1" addr add "203.0.113.$((10 + $3))/24" dev wan
    ip -n "$n$1" link set wan up
    ip -n "$n$1" link add lan type veth peer name eth0 netns "$n$2"
    ip -n "$n$1" addr add "10.$3.0.1/24" dev lan
    ip -n "$n$1" link set lan up
    ip -n "$n$2" addr add "10.$3.0.2/24" dev eth0
    ip -n "$n$2" link set eth0 up
    ip -n "$n$2" route add default via "10.$3.0.1"
    ip netns exec "$n$1" sysctl -q net.ipv4.ip_forward=1
    ip netns exec "$n$1" nft -f - <<NFT
table ip nat {
    chain out { type nat hook postrouting priority 100; oifname "wan" $masquerade; }
}
table ip filter {
    chain forward { type filter hook forward priority 0; policy drop; iifname "lan" accept; ct state established,related accept; }
    chain input { type filter hook input priority 0; policy accept; iifname "wan" ct state new drop; }
}
NFT
}
side nata a 1
side natb b 2

wait_for() { # FILE PATTERN
    for _ in $(seq 300); do grep -q "$2" "$1" 2>/dev/null && return; sleep 0.1; done
    echo "no \"$2\" after 30 s; the log says:"; tail -20 "$1"; exit 1
}
"$binary" --data-dir "$work/a" --quiet import "$root/models/confrere-18m" --name shipped >/dev/null
id=$("$binary" --data-dir "$work/a" show shipped --json | sed -n 's/.*"id": *"\([0-9a-f]*\)".*/\1/p' | head -1)
publisher=$("$binary" --data-dir "$work/a" id)
alone=$("$binary" --data-dir "$work/a" --quiet run shipped "Once upon a time" --raw --temperature 0 --max-tokens 16)
ip netns exec "${n}pub" "$binary" --data-dir "$work/r" serve --relay --listen /ip4/203.0.113.1/tcp/4747 \
    --listen /ip4/203.0.113.1/udp/4747/quic-v1 >"$work/relay.out" 2>"$work/relay.log" &
pids+=($!)
wait_for "$work/relay.out" /p2p/
relay=$(head -1 "$work/relay.out")
ip netns exec "${n}a" "$binary" -v --data-dir "$work/a" serve --peer "$relay" >"$work/a.out" 2>"$work/a.log" &
pids+=($!)
wait_for "$work/a.log" "can be called at"
sed -n 's/.*can be called at/A can be called at/p' "$work/a.log" | head -1
sleep 4 # until A has told the relay
"$binary" --data-dir "$work/b" publishers add "$publisher" >/dev/null
began=$(date +%s.%N)
status=0
together=$(ip netns exec "${n}b" "$binary" -v --data-dir "$work/b" run "$id" "Once upon a time" --raw --temperature 0 --max-tokens 16 \
    --timeout 20 --peer "$relay" 2>"$work/b.log") || status=$?
took=$(awk "BEGIN {printf \"%.1f\", $(date +%s.%N) - $began}")
[ -n "${KEEP_LOGS:-}" ] && cp "$work"/*.log "$KEEP_LOGS"
if [ "$status" = 0 ] && [ "$together" = "$alone" ]; then
    echo "$kind NATs: met directly, and the tokens are the same; $took s from start to end"
    grep -h "met through\|connected peer" "$work/b.log" | tail -3
elif [ "$status" = 4 ] && [ "$kind" = symmetric ]; then
    echo "$kind NATs: hole punching failed, as it must, and nothing went through the relay; $took s"
    tail -1 "$work/b.log"
else
    echo "$kind NATs: FAILED with exit code $status after $took s"
    grep -v "identify\|kad" "$work/b.log" | tail -25
    exit 1
fi
