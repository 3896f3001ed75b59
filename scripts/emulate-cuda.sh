#!/bin/bash
# Builds target/emulated-cuda/libcuda.so.1: the CUDA driver API with the kernels of kernels/*.cu compiled for this CPU.
#
#   scripts/emulate-cuda.sh              build
#   scripts/emulate-cuda.sh --asan       the same with AddressSanitizer, in target/emulated-cuda-asan
#   scripts/emulate-cuda.sh --selftest   build and run the emulator's own tests (with --asan: those too)
#   scripts/emulate-cuda.sh --env        print the variables under which a program finds the library: eval "$(... --env)"
#
# Only what changed is compiled, up to $JOBS (default: the cores) files at a time. docs/gpu-testing.md says what this proves.
set -euo pipefail
cd "$(dirname "$0")/.."

asan=0 selftest=0 print_env=0
for argument in "$@"; do
    case $argument in
        --asan) asan=1 ;;
        --selftest) selftest=1 ;;
        --env) print_env=1 ;;
        *) echo "usage: $0 [--asan] [--selftest] [--env]" >&2; exit 2 ;;
    esac
done

cxx=${CXX:-g++}
flags=(-std=c++17 -O2 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -fno-strict-aliasing -fno-omit-frame-pointer -fno-optimize-sibling-calls -Wall -Wextra -Wno-unknown-pragmas -Wno-psabi)
case $(uname -m) in
    x86_64) ! grep -qw avx2 /proc/cpuinfo || flags+=(-march=x86-64-v3) ;;
esac
# Uninitialised local variables hold a pattern, not what happens to be there.
if $cxx -ftrivial-auto-var-init=pattern -E -x c++ - </dev/null >/dev/null 2>&1; then flags+=(-ftrivial-auto-var-init=pattern); fi
out=${CARGO_TARGET_DIR:-target}/emulated-cuda
if ((asan)); then
    out+=-asan
    flags+=(-fsanitize=address,alignment,bounds)
fi
mkdir -p "$out/obj"
asan_environment() {
    echo "export LD_PRELOAD=$($cxx -print-file-name=libasan.so):$($cxx -print-file-name=libubsan.so)"
    # Rust's runtime leaks by design; a kernel's stack is a fiber's.
    echo "export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0:handle_segv=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1"
}
if ((print_env)); then
    echo "export LD_LIBRARY_PATH=$PWD/$out\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
    if ((asan)); then asan_environment; fi
    exit
fi

# Other flags or another compiler: everything anew.
stamp="$($cxx --version | head -1) ${flags[*]}"
if [[ ! -f $out/obj/flags || $(<"$out/obj/flags") != "$stamp" ]]; then
    rm -f "$out"/obj/*
    printf '%s' "$stamp" >"$out/obj/flags"
fi

# True if $1 (an object) is older than one of the files that its .d names.
stale() {
    [[ -f $1 && -f ${1%.o}.d ]] || return 0
    local file
    for file in $(sed 's/^[^:]*://; s/\\$//' "${1%.o}.d"); do
        [[ -f $file && ! $file -nt $1 ]] || return 0
    done
    return 1
}

jobs=${JOBS:-$(nproc)} failed=0 compiled=0
compile() { # source object
    if ! stale "$2"; then return; fi
    compiled=$((compiled + 1))
    while (($(jobs -rp | wc -l) >= jobs)); do wait -n || failed=1; done
    "$cxx" "${flags[@]}" -I kernels/include -MMD -MF "${2%.o}.d" -x c++ -c "$1" -o "$2" &
}

library=()
for source in kernels/emulator/*.cpp; do
    object=$out/obj/emulator_$(basename "$source" .cpp).o
    compile "$source" "$object"
    library+=("$object")
done
kernels=()
for source in kernels/*.cu kernels/probes/*.cu; do
    [[ -e $source ]] || continue
    object=$out/obj/kernel_$(basename "$source" .cu).o
    compile "$source" "$object"
    kernels+=("$object")
done
tests=()
if ((selftest)); then
    for source in kernels/emulator/selftest/*.cu kernels/emulator/selftest/*.cpp; do
        [[ -e $source ]] || continue
        object=$out/obj/selftest_$(basename "$source" | tr . _).o
        compile "$source" "$object"
        tests+=("$object")
    done
fi
while (($(jobs -rp | wc -l) > 0)); do wait -n || failed=1; done
((failed == 0)) || { echo "emulate-cuda: a file did not compile" >&2; exit 1; }

# Linked beside and moved into place, so that a program that runs keeps its library. Objects of removed files are not linked.
if ((compiled)) || [[ ! -f $out/libcuda.so.1 ]]; then
    "$cxx" "${flags[@]}" -shared -Wl,-soname,libcuda.so.1 -o "$out/libcuda.so.1.new" "${library[@]}" "${kernels[@]}" -ldl -pthread
    mv "$out/libcuda.so.1.new" "$out/libcuda.so.1"
    ln -sf libcuda.so.1 "$out/libcuda.so"
fi
echo "emulate-cuda: $out/libcuda.so.1 (${#kernels[@]} kernel files, $compiled compiled)"

if ((selftest)); then
    "$cxx" "${flags[@]}" -o "$out/selftest" "${library[@]}" "${tests[@]}" -ldl -pthread
    if ((asan)); then export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 UBSAN_OPTIONS=halt_on_error=1; fi
    "$out/selftest"
fi
