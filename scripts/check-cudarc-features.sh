#!/usr/bin/env bash
# Proves that feature `cuda` builds beside other users of cudarc: Cargo merges everybody's features of one cudarc, and some sets do not compile.
#
#     scripts/check-cudarc-features.sh [NAME...]     alone, candle, cubecl, pinned; all of them by default
#
# Each case is a crate that depends on this one with `cuda` and on cudarc with the features that the other project asks for. `cargo check` compiles
# both; nothing is linked, so neither driver nor toolkit is needed.
#
# Where the sets come from, to be read again when one of them moves:
#   candle   candle-core 0.11.1, [dependencies.cudarc] 0.19.10
#   cubecl   cubecl-cuda 0.12.0-pre.1, [dependencies.cudarc] 0.19.6 (burn's backend)
#   pinned   a project that names its CUDA version, 12.8 here
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

declare -A features=(
    [alone]=''
    [candle]='"std", "cublas", "cublaslt", "curand", "driver", "nvrtc", "f16", "f8", "cuda-version-from-build-system", "dynamic-linking"'
    [cubecl]='"std", "driver", "nvrtc", "nccl", "fallback-dynamic-loading", "cuda-version-from-build-system", "fallback-latest"'
    [pinned]='"std", "driver", "dynamic-loading", "cuda-12080"'
)

[[ $# -gt 0 ]] || set -- alone candle cubecl pinned
for name in "$@"; do
    [[ -v features[$name] ]] || { echo "no such case: $name" >&2; exit 2; }
    mkdir -p "$work/$name/src"
    cat > "$work/$name/Cargo.toml" <<TOML
[package]
name = "beside-$name"
version = "0.0.0"
edition = "2024"
[dependencies]
moe-kernels = { path = "$root", features = ["cuda"] }
cudarc = { version = "0.19.10", default-features = false, features = [${features[$name]}] }
[workspace]
TOML
    # The two see one another's types: their cudarc is the same.
    cat > "$work/$name/src/lib.rs" <<'RUST'
pub fn open(context: std::sync::Arc<cudarc::driver::CudaContext>) -> moe_kernels::Result<moe_kernels::cuda::Cuda> {
    moe_kernels::cuda::Cuda::with_context(context)
}
RUST
    # The versions of this crate's own lock file, so that what is checked is what its CI builds.
    cp "$root/Cargo.lock" "$work/$name/"
    CARGO_TARGET_DIR="$root/target/cudarc-features" cargo check --quiet --manifest-path "$work/$name/Cargo.toml"
    copies=$(cargo tree --quiet --manifest-path "$work/$name/Cargo.toml" -i cudarc --depth 0 | grep -c '^cudarc')
    [[ $copies == 1 ]] || { echo "$name: $copies versions of cudarc" >&2; exit 1; }
    echo "$name: builds"
done
