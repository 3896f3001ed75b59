#!/usr/bin/env bash
# Packs what a machine with an NVIDIA GPU, a driver and nothing else needs to test and time this crate: executables, PTX, cases, the peers' scripts and `run.sh`.
#
#   scripts/gpu-bundle.sh [--profile release|dev] [FOLDER]       default: release, target/gpu-bundle
#
# There: `./run.sh` unpacks and runs everything, `./run.sh tests benches` a part, `./run.sh --help` tells more. The kernels travel inside the executables; the PTX beside them is for
# reading.
# `--profile dev` packs what `cargo test --all-features` builds anyway: for a trial on the emulator, not for timing.
set -euo pipefail
cd "$(dirname "$0")/.."

profile=release out=target/gpu-bundle
while (($#)); do
    case $1 in
        --profile) profile=${2:?--profile wants release or dev}; shift 2 ;;
        -*) echo "usage: $0 [--profile release|dev] [FOLDER]" >&2; exit 2 ;;
        *) out=$1; shift ;;
    esac
done
# The bundle must fit what a machine lent for a test takes.
most_bytes=$((60 * 1024 * 1024))
# Ubuntu 22.04's C library; most GPU machines have a later one.
newest_glibc=2.35

# Not cuda_host: it needs the source tree and a C compiler, and a mock instead of a GPU.
tests=()
for file in tests/cuda_* tests/capi_cuda*; do
    name=$(basename "$file" .rs)
    [[ $name == cuda_host ]] || tests+=("$name")
done
examples=(conformance layer)
# Without `build-ptx` what runs on the GPU is the committed PTX, which users get.
features=(--features cuda,capi)
[[ $profile != dev ]] || features=(--all-features)

# build COMMAND...: compiles; prints the path of each executable of the targets asked for.
build() {
    local log
    log=$(mktemp)
    if ! cargo "$@" --locked --profile "$profile" "${features[@]}" --message-format=json >"$log"; then
        echo "error: cargo $1 failed" >&2
        return 1
    fi
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' "$log"
    rm -f "$log"
}

# pack FOLDER NAME...: reads paths on standard input; each name must be among them.
pack() {
    local folder=$out/bin/$1 path name wanted
    shift
    mkdir -p "$folder"
    while IFS= read -r path; do
        # Cargo appends a hash.
        name=$(basename "$path" | sed 's/-[0-9a-f]\{16\}$//')
        for wanted; do
            [[ $name != "$wanted" ]] || strip -o "$folder/$name" "$path"
        done
    done
    for wanted; do
        [[ -f $folder/$wanted ]] || { echo "error: $wanted was not built" >&2; return 1; }
    done
}

rm -rf "$out"
mkdir -p "$out/tests/data"
mapfile -t arguments < <(printf -- '--test\n%s\n' "${tests[@]}")
# Separate variables: a failure inside a pipeline's head would go unseen.
paths=$(build test --no-run "${arguments[@]}")
pack tests "${tests[@]}" <<<"$paths"
mapfile -t arguments < <(printf -- '--example\n%s\n' "${examples[@]}")
paths=$(build build --bench cuda "${arguments[@]}")
pack examples "${examples[@]}" <<<"$paths"
pack benches cuda <<<"$paths"

cp -r kernels/ptx kernels/MANIFEST "$out"
cp -r tests/data/cases "$out/tests/data/cases"
mkdir -p "$out/peers"
cp benches/peers/gpu/*.py "$out/peers"
install -m 755 scripts/gpu-bundle-run.sh "$out/run.sh"
{
    git describe --always --dirty --abbrev=12 2>/dev/null || echo 'not a git checkout'
    rustc --version
    echo "profile $profile"
} >"$out/VERSION"

# What the executables ask of the C library.
needed=$(objdump -T "$out"/bin/*/* | grep -oE 'GLIBC_[0-9.]+' | sort -uV | tail -n 1)
echo "newest symbols: $needed"
if [[ $(printf '%s\n' "${needed#GLIBC_}" "$newest_glibc" | sort -V | tail -n 1) != "$newest_glibc" ]]; then
    echo "error: the executables need $needed, newer than $newest_glibc: build on an older system" >&2
    exit 1
fi
libraries=$(objdump -p "$out"/bin/*/* | sed -n 's/^ *NEEDED *//p' | sort -u | tr '\n' ' ')
echo "libraries: $libraries"
for library in $libraries; do
    case $library in
        libc.so.6 | libm.so.6 | libgcc_s.so.1 | libpthread.so.0 | libdl.so.2 | ld-linux-*) ;;
        *) echo "error: $library is not on every machine" >&2; exit 1 ;;
    esac
done

# Each executable holds all PTX as text: 100 MiB that pack to a fifth. run.sh unpacks them.
unpacked=$(du -sm "$out" | cut -f 1)
tar -C "$out" -czf "$out/bin.tar.gz" bin ptx
rm -r "$out/bin" "$out/ptx"
bytes=$(find "$out" -type f -printf '%s\n' | awk '{ n += $1 } END { print n }')
echo "$out: $((bytes / 1024 / 1024)) MiB, $unpacked MiB unpacked; $(<"$out/VERSION" tr '\n' ';')"
((bytes < most_bytes)) || { echo "error: more than $((most_bytes / 1024 / 1024)) MiB" >&2; exit 1; }
