#!/usr/bin/env bash
# Runs fuzz targets, each for so many seconds: `fuzz/run.sh SECONDS [TARGET...]`; all of them by default. Needs a nightly toolchain and cargo-fuzz.
#
# What a target finds is written to fuzz/artifacts/TARGET; `cargo +nightly fuzz run TARGET FILE` runs it again. What it learns stays in fuzz/corpus/TARGET.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:?seconds for each target}
shift
(($#)) || set -- capi routing permutation readers

# The capi target offers sizes that no allocator can give; the library has to see that as C would, not the sanitizer. detect_leaks stays on.
export ASAN_OPTIONS=allocator_may_return_null=1

# The readers start from real files: header and all, or with the header's length left to the target (see calls/readers.rs).
seed_readers() {
    python3 - fuzz/corpus/readers <<'PY'
import glob, os, sys
to = sys.argv[1]
os.makedirs(to, exist_ok=True)
for i, path in enumerate(sorted(glob.glob("tests/data/cases/*.safetensors"))):
    data = open(path, "rb").read()
    if len(data) > 16384:
        continue
    length = int.from_bytes(data[:8], "little")
    for mode in (0, 1):
        open(f"{to}/seed-{i}-{mode}", "wb").write(bytes([mode]) + data)
        open(f"{to}/seed-{i}-{mode}h", "wb").write(bytes([0x80 | mode]) + length.to_bytes(2, "little") + data[8:])
PY
}

for target; do
    [[ $target == readers ]] && seed_readers
    echo "-- $target, $seconds s"
    cargo +nightly fuzz run "$target" -- -max_total_time="$seconds" -max_len=8192 -rss_limit_mb=4096 -malloc_limit_mb=100000000 -print_final_stats=1 2>&1 |
        grep -vE '^#|NEW_FUNC|^INFO' || exit 1
done
