#!/usr/bin/env bash
# Fails when `unsafe` appears in src/ outside the rooms that may hold it. The compiler refuses it too (`unsafe_code = "deny"`), but an
# `#[allow]` is easily added; this list is where adding a room has to be argued.
set -euo pipefail
cd "$(dirname "$0")/.."

# One extended regular expression per room.
rooms=(
    'src/cpu/simd/.*'                       # intrinsics, and the wrappers that enable a CPU feature
    'src/cpu/grouped_gemm/.*'               # tiles over raw pointers; several threads write one output
    'src/cpu/(shared|out_rows)\.rs'         # the shims through which threads write disjoint parts of one buffer
    'src/cuda/launch\.rs'                   # every call of the CUDA driver
    'src/cuda/raw\.rs'                      # the entry points of a launch: unsafe functions that pass the caller's promise on
    'src/cuda/(stages|grouped_gemm/stage|moe/forward)\.rs' # launches of plans whose operands were checked just before
    'src/cpu/(permute|combine|losses)\.rs'  # their callers, each with the reason why its parts are disjoint
    'src/ffi(\.rs|/.*)'                     # memory and handles that C describes
)

allowed="^($(IFS='|'; echo "${rooms[*]}"))\$"
bad=0
while IFS= read -r file; do
    if [[ ! $file =~ $allowed ]]; then
        # Comments and documentation may use the word; `deny(unsafe_code)` is what we want.
        if grep -nE '\bunsafe\b|allow\(unsafe_code\)' "$file" | grep -vE '^[0-9]+: *//|deny\(unsafe_code\)'; then
            echo "^^^ $file is not a room for unsafe code (see CONTRIBUTING.md)" >&2
            bad=1
        fi
    fi
done < <(git ls-files --cached --others --exclude-standard 'src/*.rs' 'src/**/*.rs' | sort -u)
exit $bad
