#!/usr/bin/env bash
# Tests and times this crate on a GPU, from the folder that scripts/gpu-bundle.sh packed. Needs a driver; uses compute-sanitizer, python3 and torch where they are.
#
#   ./run.sh [--smoke] [--limit SECONDS] [PART...]
#
#   tests         every GPU test
#   conformance   the golden cases on the GPU
#   layer         the example layer on the GPU
#   memcheck, racecheck, initcheck, synccheck    the tests with few random cases, under that tool of compute-sanitizer
#   benches       the kernels' times beside their goals (bin/benches/cuda --help)
#   sweep         what a tuner can choose
#   peers         torch, Triton and others on the same work, turn about with ours
#
# Without PART: all of them in this order. --limit: begin nothing that would end later than that, so that a call of limited time still gives its table. --smoke: tiny sizes and
# a part of the tests, for the emulator. Logs and numbers go to $OUT (default: results/). The status is 0 when something ran and nothing failed; what could not run is said.
set -uo pipefail
cd "$(dirname "$0")" || exit 2
all=(tests conformance layer memcheck racecheck initcheck synccheck benches sweep peers)
parts=() smoke=0 limit=0
while (($#)); do
    case $1 in
        --smoke) smoke=1 ;;
        --limit) limit=${2:?--limit wants seconds}; shift ;;
        -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *)
            [[ " ${all[*]} " == *" $1 "* ]] || { echo "unknown part $1; known: ${all[*]}" >&2; exit 2; }
            parts+=("$1")
            ;;
    esac
    shift
done
((${#parts[@]})) || parts=("${all[@]}")
out=${OUT:-$PWD/results}
mkdir -p "$out/logs"
out=$(cd "$out" && pwd)
if [[ ! -d bin ]]; then tar -xzf bin.tar.gz || exit 2; fi
export RUST_BACKTRACE=1 MOE_KERNELS_REQUIRE=cuda

{
    cat VERSION
    nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu --format=csv 2>&1 ||
        echo 'nvidia-smi does not answer'
    uname -srm
    ldd --version 2>&1 | head -n 1
} | tee "$out/machine.txt"

rows=() bad=0 good=0
# row NAME VERDICT SECONDS NOTE: remembers and shows a line of the table.
row() {
    local line
    line=$(printf '%-40s %-9s %5s s  %s' "$@")
    rows+=("$line")
    echo "$line"
    case $2 in
        passed) good=$((good + 1)) ;;
        FAILED | 'TIME OUT') bad=1 ;;
    esac
}

# What a log says in a few words: how many tests, and which of them did not run.
note() {
    local passed missing
    passed=$(sed -n 's/^test result: [^.]*\. \([0-9]* passed; [0-9]* failed\).*/\1/p' "$1" | tail -n 1)
    missing=$(grep -c 'NOT RUN' "$1")
    ((missing == 0)) || missing="; $missing said NOT RUN: $(grep -m 1 -o 'NOT RUN.*' "$1" | cut -c 1-80)"
    [[ $missing != 0 ]] || missing=
    echo "$passed$missing"
}

# item NAME SECONDS COMMAND...: runs within the seconds and what is left of the limit; its output goes to logs/NAME.log.
item() {
    local name=$1 most=$2 start=$SECONDS status log
    shift 2
    log=$out/logs/${name//\//.}.log
    if ((limit > 0)); then
        local left=$((limit - SECONDS))
        ((left >= 5)) || { row "$name" 'NOT RUN' 0 "the limit of $limit s is reached"; return; }
        ((most < left)) || most=$left
    fi
    timeout --kill-after=10 "$most" "$@" >"$log" 2>&1
    status=$?
    case $status in
        0) row "$name" passed $((SECONDS - start)) "$(note "$log")" ;;
        124 | 137) row "$name" 'TIME OUT' $((SECONDS - start)) "after $most s; see $log" ;;
        *)
            row "$name" FAILED $((SECONDS - start)) "status $status; $(note "$log")"
            grep -hE '^(error|ERROR|=+ .*(Error|ERROR)|thread .* panicked)|FAILED' "$log" | head -n 5 | sed 's/^/    /'
            ;;
    esac
}

# Smoke: two executables that take a few seconds on the emulator.
test_executables() {
    if ((smoke)); then printf '%s\n' bin/tests/cuda_{permute,combine}; else printf '%s\n' bin/tests/*; fi
}

run_tests() {
    local test
    ((smoke == 0)) || export PROPTEST_CASES=1
    for test in $(test_executables); do item "tests/$(basename "$test")" 300 "$test" --test-threads=1; done
}

sanitizer() {
    local tool=$1 test program
    program=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1)
    [[ -n $program ]] || { row "$tool" 'NOT RUN' 0 'compute-sanitizer is not installed'; return; }
    export PROPTEST_CASES=2
    for test in $(test_executables); do
        item "$tool/$(basename "$test")" 150 "$program" --tool "$tool" --error-exitcode 9 --print-limit 20 "$test" --test-threads=1
    done
    unset PROPTEST_CASES
}

# has_backend EXAMPLE: whether it was built with one.
has_backend() {
    if bin/examples/"$1" --help 2>&1 | grep -A 8 -- --backend | grep -qw cuda; then return 0; fi
    row "$1" 'NOT RUN' 0 'this build knows no --backend cuda'
    return 1
}

run_conformance() {
    has_backend conformance || return
    local which=()
    ((smoke == 0)) || which=(--only fwd_mixtral)
    item conformance 240 bin/examples/conformance --backend cuda --cases tests/data/cases --out "$out/conformance" --check "${which[@]}"
}

run_layer() {
    has_backend layer || return
    local size=()
    ((smoke == 0)) || size=(--shape tiny --tokens 2 --repeats 1)
    item layer 240 bin/examples/layer --backend cuda "${size[@]}"
}

# bench NAME SECONDS ARGUMENT...: the table is shown as well.
bench() {
    local name=$1 most=$2
    shift 2
    ((smoke == 0)) || set -- "$@" --smoke
    item "$name" "$most" bin/benches/cuda "$@" --out "$out"
    cat "$out/logs/$name.log"
}

run_peers() {
    local python reason
    for python in python3 python; do command -v $python >/dev/null && break; done
    command -v "$python" >/dev/null || { row peers 'NOT RUN' 0 'python3 is not installed'; return; }
    reason=$("$python" peers/compare.py --can-run 2>&1) || { row peers 'NOT RUN' 0 "${reason##*$'\n'}"; return; }
    item peers 540 "$python" -u peers/compare.py --ours bin/benches/cuda --out "$out"
    cat "$out/logs/peers.log"
}

for part in "${parts[@]}"; do
    case $part in
        tests) run_tests ;;
        conformance) run_conformance ;;
        layer) run_layer ;;
        memcheck | racecheck | initcheck | synccheck) sanitizer "$part" ;;
        benches) bench benches 400 ;;
        sweep) bench sweep 400 --sweep --budget 0.3 ;;
        peers) run_peers ;;
    esac
done

# Whether clocks fell meanwhile.
nvidia-smi --query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu --format=csv >>"$out/machine.txt" 2>&1
echo
{
    head -n 1 VERSION
    printf '%s\n' "${rows[@]}"
    ((good > 0)) || echo 'NOTHING PASSED'
} | tee "$out/summary.txt"
grep -q 'NOT RUN' "$out/summary.txt" && echo 'Some things were NOT RUN: see above.'
((bad == 0 && good > 0))
