#!/usr/bin/env bash
# Builds the unit tests of protocol and inference for 64-bit Arm and runs them under emulation: the vectors, and the parity of all kernels.
# Needs rustup, gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user; as root, on Debian or Ubuntu, it installs what is missing.
# Arguments are handed to the tests: `aarch64.sh kernels::` runs those of the kernels alone.
set -eu
cd "$(dirname "$0")/../.."
target=aarch64-unknown-linux-gnu

if [ "$(uname -m)" = aarch64 ]; then
    echo "nothing to emulate: this is a 64-bit Arm already, and cargo test does the same"
    exit
fi
rustup target list --installed | grep -qx "$target" || rustup target add "$target"
if ! { command -v aarch64-linux-gnu-gcc && command -v qemu-aarch64 && [ -d /usr/aarch64-linux-gnu/include ]; } >/dev/null; then
    if [ "$(id -u)" != 0 ]; then
        echo "missing: gcc-aarch64-linux-gnu, libc6-dev-arm64-cross or qemu-user" >&2
        exit 1
    fi
    apt-get update -q
    apt-get install -y -q --no-install-recommends gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
fi

export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu"
arm_test() { cargo test --release --locked --target "$target" "$@"; }

# A processor with every extension …
QEMU_CPU=max arm_test -p protocol -p inference --lib -- "$@"
# … and the Raspberry Pi 4's, which has neither dot products nor arithmetic on halves.
QEMU_CPU=cortex-a72 arm_test -p inference --lib -- kernels::
