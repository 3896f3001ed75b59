#!/usr/bin/env bash
# Packs what a machine with an NVIDIA GPU, a driver and nothing else needs to test this crate: the GPU tests' executables and `run.sh`.
#
#     scripts/gpu-bundle.sh [FOLDER]       default: target/gpu-bundle
#
# There: ./run.sh runs the tests, then the same under compute-sanitizer's tools where it is on the PATH, and prints one table. The kernels travel inside the
# executables, as PTX. Nothing in here has been run on a GPU by this project yet.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-target/gpu-bundle}
# Not cuda_host: it needs the source tree and a C compiler, and a mock instead of a GPU.
tests=(cuda_moe cuda_moe_steps cuda_norm cuda_routing cuda_permute cuda_combine cuda_grouped_gemm cuda_grouped_gemm_safe cuda_grouped_gemm_sm90)

rm -rf "$out"
mkdir -p "$out/bin"
for name in "${tests[@]}"; do
    [[ -f tests/$name.rs || -d tests/$name ]] || { echo "no tests/$name.rs: left out" >&2; continue; }
    # The compiler says where it put the executable.
    executable=$(cargo test --release --features cuda --test "$name" --no-run --message-format=json 2>/dev/null |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
    [[ -n $executable ]] || { echo "tests/$name.rs does not build" >&2; exit 1; }
    strip -o "$out/bin/$name" "$executable"
done
cp -r kernels/ptx "$out/ptx"

cat > "$out/run.sh" <<'RUN'
#!/usr/bin/env bash
# Runs every test, then every test under each tool of compute-sanitizer where that is installed. Prints one line for each, and fails if one failed.
set -uo pipefail
cd "$(dirname "$0")"
mkdir -p logs
export MOE_KERNELS_REQUIRE=cuda RUST_BACKTRACE=1
nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader 2>/dev/null || echo "nvidia-smi does not answer"
bad=0
line() { # NAME TOOL COMMAND...
    local name=$1 tool=$2 start=$SECONDS verdict=passed
    shift 2
    "$@" > "logs/$name.$tool.log" 2>&1 || { verdict=FAILED; bad=1; }
    printf '%-28s %-12s %-7s %5d s\n' "$name" "$tool" "$verdict" $((SECONDS - start))
}
for test in bin/*; do line "$(basename "$test")" plain "$test" --test-threads=1; done
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
        for test in bin/*; do
            line "$(basename "$test")" "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 "$test" --test-threads=1
        done
    done
else
    echo "compute-sanitizer is not on the PATH: NOT RUN"
fi
[[ $bad == 0 ]] || echo "see logs/"
exit $bad
RUN
chmod +x "$out/run.sh"
du -sh "$out"
