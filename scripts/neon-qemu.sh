#!/usr/bin/env bash
# cargo for AArch64 on an x86-64 Debian 12 machine: the code is compiled with Debian's cross tools and run by qemu's user emulation.
#
#   scripts/neon-qemu.sh [VAR=VALUE...] CARGO_SUBCOMMAND [ARG...]
#   scripts/neon-qemu.sh --install          only install what is missing (as root)
#
#   scripts/neon-qemu.sh MOE_KERNELS_REQUIRE=neon PROPTEST_CASES=16 test --lib --tests
#
# Rustup's cargo does the work, with Debian's rustc (package rustc-web, the one that has a standard library for arm64), so that no rustup
# target is needed. QEMU_CPU chooses the core: max (default: dotprod, i8mm, bf16, fp16), neoverse-n1, or cortex-a53 (plain NEON).
# Do not give qemu a `-L` prefix: with one, the first thread that a program starts hangs.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(rustc-web libstd-rust-web-dev:arm64 gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)
missing=()
for p in "${packages[@]}"; do
    dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$p")
done
if ((${#missing[@]})); then
    echo "neon-qemu: installing ${missing[*]}" >&2
    as_root() { if ((EUID == 0)); then "$@"; else sudo -n "$@"; fi; }
    as_root dpkg --add-architecture arm64
    as_root apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
fi
[[ ${1:-} == --install ]] && exit

while [[ ${1:-} =~ ^[A-Za-z_][A-Za-z0-9_]*= ]]; do
    export "${1?}"
    shift
done
export RUSTC=/usr/bin/rustc RUSTDOC=/usr/bin/rustdoc
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}-aarch64
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=qemu-aarch64
subcommand=${1:?what shall cargo do?}
shift
exec cargo "$subcommand" --target aarch64-unknown-linux-gnu "$@"
