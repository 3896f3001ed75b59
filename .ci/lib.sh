# Sourced by .ci/run: numbered steps that are timed, collected and summed up at the end.
# shellcheck shell=bash

passed=()
failed=()
not_run=()

# step TITLE COMMAND [ARG...]: runs the command (a function, usually) in a subshell that stops at its first error.
# A failure is remembered, not fatal: one run should show everything that is wrong.
step() {
    local title=$1 began=$SECONDS status
    shift
    printf '\n==== %s ====\n' "$title"
    # Not inside `if` or `||`: there bash would switch `set -e` off for the whole subshell.
    (
        set -euo pipefail
        "$@"
    )
    status=$?
    if ((status == 0)); then
        passed+=("$title")
        printf '==== passed in %d s: %s ====\n' $((SECONDS - began)) "$title"
    else
        failed+=("$title")
        printf '==== FAILED (status %d) after %d s: %s ====\n' "$status" $((SECONDS - began)) "$title"
    fi
}

# skip WHAT: something that this machine or this version cannot do, said now and again at the end.
skip() {
    not_run+=("$1")
    printf '\n==== NOT RUN: %s ====\n' "$1"
}

summary() {
    local line
    printf '\n==== %d minutes ====\n' $(((SECONDS + 30) / 60))
    for line in "${not_run[@]}"; do printf 'NOT RUN: %s\n' "$line"; done
    for line in "${failed[@]}"; do printf 'FAILED: %s\n' "$line"; done
    printf '%d passed, %d failed\n' ${#passed[@]} ${#failed[@]}
    ((${#failed[@]} == 0))
}

# retry COMMAND...: for what goes over the network.
retry() {
    local attempt
    for attempt in 1 2 3; do
        "$@" && return
        sleep $((attempt * 5))
    done
    return 1
}

# cpu_has FLAG...: whether /proc/cpuinfo lists all of them.
cpu_has() {
    local flags flag
    flags=" $(grep -m1 -E '^(flags|Features)' /proc/cpuinfo) "
    for flag; do
        [[ $flags == *" $flag "* ]] || return 1
    done
}

# The ISAs that this CPU must be able to run, judged from the kernel's list and not from the crate's own detection.
expected_isas() {
    local list=scalar
    if cpu_has avx2 fma f16c; then
        list+=,avx2
        if cpu_has avx512f; then list+=,avx512; fi
    fi
    if cpu_has asimd; then list+=,neon; fi
    printf '%s' "$list"
}

# test_executable NAME: the path of a test binary built by `cargo test` with default features: `lib` for the unit tests, else the stem
# of a file in tests/. It is an error if there is no such test.
test_executable() {
    cargo test --locked --no-run --lib --tests --message-format=json 2>/dev/null |
        python3 -c '
import json, sys
wanted, found = sys.argv[1], None
for line in sys.stdin:
    m = json.loads(line)
    if m.get("reason") == "compiler-artifact" and m["profile"]["test"] and m["executable"]:
        is_lib = "lib" in m["target"]["kind"]
        if wanted == ("lib" if is_lib else m["target"]["name"]):
            found = m["executable"]
if not found: sys.exit("no test named " + wanted)
print(found)' "$1"
}
