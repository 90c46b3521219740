#!/usr/bin/env bash
# Two nodes of different processors run each other's experts: this machine's x86-64, and 64-bit Arm under emulation. The tokens must be
# those of one machine, and every result is computed again by the one that asked. Needs what aarch64.sh needs, and installs it likewise.
# Builds the whole program for Arm: some minutes.
set -eu
cd "$(dirname "$0")/../.."
target=aarch64-unknown-linux-gnu
root=$PWD
tests/tools/aarch64.sh --list >/dev/null
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
cargo build --release --locked -p node
cargo build --release --locked -p node --target "$target"
work=$(mktemp -d)
servers=()
cleanup() {
    for pid in "${servers[@]}"; do kill "$pid" 2>/dev/null || true; done
    wait # a node says goodbye before it ends
    rm -rf "$work"
}
trap cleanup EXIT
x86_program=("$root/target/release/confrere")
# With every extension, and as the Raspberry Pi 4, which has no dot products.
arm_program=(env "QEMU_CPU=${QEMU_CPU:-max}" qemu-aarch64 -L /usr/aarch64-linux-gnu "$root/target/$target/release/confrere")
x86() { "${x86_program[@]}" "$@"; }
arm() { "${arm_program[@]}" "$@"; }
field() { python3 -c "import json, sys; answer = json.load(open(sys.argv[1])); print(answer$2)" "$1"; }
words=(--raw --temperature 0 --max-tokens 24 --threads 1 --json)
x86 --data-dir "$work/x86" --quiet import models/confrere-18m --name m --precision q4 >/dev/null
id=$(x86 --data-dir "$work/x86" show m --json | sed -n 's/.*"id": *"\([0-9a-f]*\)".*/\1/p' | head -1)
x86 --data-dir "$work/x86" run m "fn main() {" "${words[@]}" >"$work/alone" 2>/dev/null

# serve NODE DATA: starts a node that runs experts for anybody; its address goes to $address.
serve() {
    local -n program="$1_program" # not the function: what is to be ended is the program, and no shell around it
    "${program[@]}" --data-dir "$work/$2" serve --listen 127.0.0.1:0 --threads 1 --execute-for any >"$work/$2.out" 2>"$work/$2.err" &
    servers+=($!)
    for _ in $(seq 300); do
        address=$(sed -n 's|\(/ip4/127.0.0.1/tcp/.*\)|\1|p' "$work/$2.out" | head -1)
        [ -z "$address" ] || return 0
        sleep 0.1
    done
    echo "$2 does not serve: $(cat "$work/$2.err")" >&2
    return 1
}

# ask NODE DATA: generates with the experts of the node at $address.
ask() {
    # A tokenizer is tried in a process of its own, and an emulated program cannot start itself: x86-64 has tried this one.
    mkdir -p "$work/$2" && cp "$work/x86/tokenizers" "$work/$2/"
    "$1" --data-dir "$work/$2" run "$id" "fn main() {" "${words[@]}" --peer "$address" --allow-unsigned --execute-at any --audit 1 \
        --timeout 60 >"$work/$2.json" 2>"$work/$2.log" || { cat "$work/$2.log" >&2; exit 1; }
    [ "$(field "$work/$2.json" "['tokens']")" = "$(field "$work/alone" "['tokens']")" ] || { echo "$2: OTHER TOKENS" >&2; exit 1; }
    [ "$(field "$work/$2.json" "['experts']['remote']")" -gt 0 ] || { echo "$2: nothing ran at the peer" >&2; exit 1; }
    [ "$(field "$work/$2.json" "['remote']['peers'][0]['audits']['different']")" = 0 ] || { echo "$2: a result differs" >&2; exit 1; }
    echo "$3: the same tokens; $(field "$work/$2.json" "['experts']['remote_uses']") results of the peer, audits $(field "$work/$2.json" "['remote']['peers'][0]['audits']")"
}

serve x86 x86
ask arm asking-arm "Arm generates, x86-64 runs experts"
cp -r "$work/x86" "$work/arm"
rm "$work/arm/key"
serve arm arm
ask x86 asking-x86 "x86-64 generates, Arm runs experts"
