#!/usr/bin/env bash
# Makes include/moe_kernels.h from src/ffi; with --check, fails when the one in the repository is another.
#
# cbindgen is pinned, since its output changes between versions. It is taken from PATH, or else from target/tools, where it is built when it is missing (a minute).
set -euo pipefail
cd "$(dirname "$0")/.."

version=0.29.4
cbindgen=$(command -v cbindgen || true)
if [[ -z $cbindgen || $("$cbindgen" --version) != "cbindgen $version" ]]; then
    cbindgen=target/tools/bin/cbindgen
    if [[ ! -x $cbindgen || $("$cbindgen" --version) != "cbindgen $version" ]]; then
        # Not optimised: it runs for a second and would compile for three minutes.
        CARGO_TARGET_DIR=target/tools/build cargo install --quiet --debug --locked --force --root target/tools --version "$version" cbindgen
    fi
fi

header=include/moe_kernels.h
# cbindgen takes every public constant that it sees, so it sees src/ffi alone, as a crate of its own.
crate=$(mktemp -d)
trap 'rm -rf "$crate"' EXIT
mkdir "$crate/src"
cp -r src/ffi src/ffi.rs "$crate/src"
echo 'pub mod ffi;' >"$crate/src/lib.rs"
printf '[package]\nname = "ffi"\nversion = "0.0.0"\nedition = "2024"\n[workspace]\n' >"$crate/Cargo.toml"
made=$crate/made.h
"$cbindgen" --quiet --config cbindgen.toml --crate ffi "$crate" |
    python3 -c '
import re, sys
text = sys.stdin.read()
text = re.sub(r"(?m)^//\n// # Safety\n(?:// [^\n]*\n)+", "", text)  # says for Rust what the opening says for C
text = re.sub(r"(?m)^(#define [^\n]*\n)\n(?=// (?!moe_)[^\n]*\n#define)", r"\1", text)  # constants stand together
sys.stdout.write(text)' >"$made"

if [[ ${1:-} == --check ]]; then
    diff -u "$header" "$made" || { echo "error: $header is not what src/ffi gives; run scripts/make_header.sh"; exit 1; }
else
    mkdir -p include
    cp "$made" "$header"
    echo "$header: $(wc -l <"$header") lines"
fi
