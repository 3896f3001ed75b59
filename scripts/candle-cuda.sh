#!/usr/bin/env bash
# The candle integration with its feature `cuda`, on a machine without a CUDA toolkit and without a GPU.
#
#     scripts/candle-cuda.sh clippy          every target is type-checked against candle's CUDA backend
#     scripts/candle-cuda.sh test [ARG...]   its tests on the emulated driver of scripts/emulate-cuda.sh; ARGs go to `cargo test`
#
# candle-core's feature `cuda` wants nvcc for its own kernels (candle-kernels), and libcuda, libcublas, libcublasLt, libcurand, libnvrtc and libcudart for
# the linker. This makes a toolkit that stands in for them, in target/candle-cuda/toolkit:
#
#   bin/nvcc    answers what candle-kernels' build script asks; compiles nothing. The PTX of candle's own kernels is an empty module, so that an operation of candle that
#               launches one (cast, contiguous, matmul, ...) is an error: CUDA_ERROR_NOT_FOUND.
#   lib64/      libcuda is the emulated driver. Creating, seeding and destroying handles of cuBLAS and cuRAND works, which is what candle does when a device is opened.
#               Every other function of theirs, and what the emulated driver lacks, ends the process with its name.
#
# So what is tested is this repository's code on candle's devices, streams and storages; nothing of candle's kernels. On a machine with a GPU and a toolkit use
# cargo directly: `cargo test --release --features cuda --test cuda` in integrations/candle.
set -euo pipefail
cd "$(dirname "$0")/.."
command=${1:-}
case $command in
    clippy | test) shift ;;
    *) echo "usage: $0 clippy|test [ARG...]" >&2; exit 2 ;;
esac

manifest=integrations/candle/Cargo.toml
target=${CARGO_TARGET_DIR:-target}
mkdir -p "$target"
target=$(cd "$target" && pwd)
kit=$target/candle-cuda/toolkit
mkdir -p "$kit/bin" "$kit/lib64" "$kit/include"

# Written only when it changes: cargo looks at the times.
keep() { # FILE, contents on standard input
    local new
    new=$(mktemp "$1.XXXXXX")
    cat >"$new"
    if cmp -s "$new" "$1"; then rm "$new"; else chmod 755 "$new"; mv "$new" "$1"; fi
}

keep "$kit/bin/nvcc" <<'NVCC'
#!/usr/bin/env bash
# Stands in for nvcc in candle-kernels' build script; see scripts/candle-cuda.sh.
set -euo pipefail
output='' directory='' inputs=() kind=''
while (($#)); do
    case $1 in
        --version) printf 'nvcc: a stand-in\n\n\nCuda compilation tools, release 13.0, V13.0.0\n'; exit ;;
        --list-gpu-code) echo sm_80; exit ;;
        --ptx | --lib | -c) kind=$1 ;;
        -o) output=$2; shift ;;
        --output-directory) directory=$2; shift ;;
        --default-stream | -ccbin | -Xcompiler) shift ;;
        -*) ;;
        *) inputs+=("$1") ;;
    esac
    shift
done
case $kind in
    --ptx)
        name=$(basename "${inputs[0]}" .cu)
        printf '.version 7.0\n.target sm_80\n.address_size 64\n' >"$directory/$name.ptx"
        ;;
    -c) : >"$output" ;;
    --lib) # What src/ffi.rs declares, so that programs link.
        source=$(mktemp --suffix .c)
        trap 'rm -f "$source" "$source.o"' EXIT
        {
            printf '#include <stdio.h>\n#include <stdlib.h>\n'
            printf 'static void missing(const char* name) { fprintf(stderr, "%%s of candle-kernels is not there: scripts/candle-cuda.sh\\n", name); abort(); }\n'
            grep -oE 'pub fn [A-Za-z0-9_]+' src/ffi.rs | awk '{printf "void %s(void) { missing(\"%s\"); }\n", $3, $3}'
        } >"$source"
        cc -c -fPIC "$source" -o "$source.o"
        rm -f "$output"
        ar rcs "$output" "$source.o"
        ;;
    *) echo "the stand-in for nvcc does not know: $*" >&2; exit 1 ;;
esac
NVCC

# cudarc and cudaforge look here and nowhere else.
export CUDA_HOME=$kit NVCC=$kit/bin/nvcc PATH=$kit/bin:$PATH CUDA_COMPUTE_CAP=80
unset CUDA_PATH CUDA_ROOT CUDA_TOOLKIT_ROOT_DIR CUDNN_LIB CUDARC_CUDA_VERSION NVCC_CCBIN

if [[ $command == clippy ]]; then
    cargo clippy --locked --manifest-path $manifest --features cuda --all-targets "$@" -- -D warnings
    exit
fi

# The emulated driver where every script has it.
env -u CARGO_TARGET_DIR scripts/emulate-cuda.sh
driver=$PWD/target/emulated-cuda
ln -sf "$driver/libcuda.so.1" "$kit/lib64/libcuda.so"

# What cudarc declares of each library, and what the emulated driver has of the driver's.
cudarc=$(cargo metadata --locked --format-version 1 --manifest-path $manifest --features cuda | python3 -c '
import json, os, sys
print(*(os.path.dirname(p["manifest_path"]) for p in json.load(sys.stdin)["packages"] if p["name"] == "cudarc"))')
declared() { # LIBRARY PREFIX
    grep -hoE "pub unsafe fn $2[A-Za-z0-9_]+" "$cudarc/src/$1/sys/mod.rs" | awk '{print $4}' | sort -u
}
library() { # NAME, on standard input the functions that end the process; further sources as arguments
    local name=$1 source=$kit/$1.c
    shift
    {
        printf '#include <stdio.h>\n#include <stdlib.h>\n'
        printf 'static void missing(const char* name) { fprintf(stderr, "%%s is not there: scripts/candle-cuda.sh\\n", name); abort(); }\n'
        awk '{printf "void %s(void) { missing(\"%s\"); }\n", $1, $1}'
        printf '%s\n' "$@"
    } | keep "$source"
    [[ $kit/lib64/lib$name.so -nt $source ]] || cc -shared -fPIC -Wl,-soname,"lib$name.so" "$source" -o "$kit/lib64/lib$name.so"
}
{
    declared cublas cublas | grep -vxE 'cublas(Create|Destroy|SetStream)_v2'
    comm -23 <(declared driver cu) <(nm -D --defined-only "$driver/libcuda.so.1" | awk '$2 == "T" {print $3}' | sort -u)
} | library cublas \
    'int cublasCreate_v2(void** handle) { *handle = &missing; return 0; }' \
    'int cublasDestroy_v2(void* handle) { return handle == &missing ? 0 : 1; }' \
    'int cublasSetStream_v2(void* handle, void* stream) { (void)stream; return handle == &missing ? 0 : 1; }'
declared curand curand | grep -vxE 'curand(CreateGenerator|DestroyGenerator|SetStream|SetPseudoRandomGeneratorSeed)' | library curand \
    'int curandCreateGenerator(void** generator, int kind) { (void)kind; *generator = &missing; return 0; }' \
    'int curandDestroyGenerator(void* generator) { return generator == &missing ? 0 : 101; }' \
    'int curandSetStream(void* generator, void* stream) { (void)stream; return generator == &missing ? 0 : 101; }' \
    'int curandSetPseudoRandomGeneratorSeed(void* generator, unsigned long long seed) { (void)seed; return generator == &missing ? 0 : 101; }'
declared cublaslt cublasLt | library cublasLt
declared nvrtc nvrtc | library nvrtc
library cudart </dev/null

export LD_LIBRARY_PATH=$driver:$kit/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
# Alone: the other tests do without a GPU, and candle-transformers takes long to compile.
cargo test --locked --release --manifest-path $manifest --no-default-features --features cuda --test cuda "$@"
