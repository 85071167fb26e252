#!/usr/bin/env bash
# ./dev test with suites that fail, die and skip: what it counts, what it prints, how it ends. Nothing is installed or
# built. Prints one line for each check, and totals in Criterion's words.
# shellcheck disable=SC2016 # what is in quotes is for another shell
set -uo pipefail
dev=$(readlink -f "$(dirname "$0")/../../dev")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
good=0 bad=0

# says WHAT STATUS PATTERN SUITES ARGUMENT...: `./dev test ARGUMENT...`, where SUITES is the code of the suites and of what
# they call, ends with STATUS and prints a line with PATTERN.
says() {
    local said status=0
    said=$(bash -c '
        source "$1"
        setup_build() { :; }
        eval "$2"
        mapfile -t SUITES < <(declare -F | sed -n "s/declare -f suite_fake_/fake_/p")
        main test "${@:3}"' _ "$dev" "$4" "${@:5}" 2>&1) || status=$?
    if [ $status -eq "$2" ] && grep -qE -- "$3" <<<"$said"; then
        good=$((good + 1)) && echo "[PASS] $1"
    else
        bad=$((bad + 1)) && printf '[FAIL] %s, status %s:\n%s\n' "$1" $status "$said"
    fi
}

passes='suite_fake_passes() { count passed 2; }'
says "all is well" 0 '^2 passed, 0 failed, 0 skipped$' "$passes"
says "a failure" 1 '^2 passed, 1 failed, 0 skipped$' "$passes; suite_fake_fails() { count failed 1; }"
says "a skip, and why" 0 '^skipped 3: no such device$' "$passes; suite_fake_skips() { skip 3 'no such device'; }"
says "skips are in the totals" 0 '^2 passed, 0 failed, 3 skipped$' "$passes; suite_fake_skips() { skip 3 x; }"

says "both of two at once" 0 '^5 passed, 0 failed, 0 skipped$' \
    "suite_fake_two() { at_once 'sleep 0.1; count passed 4' 'count passed 1'; }"
says "what one of two says" 0 '^first$' "suite_fake_two() { at_once 'sleep 0.1; echo first; count passed 1' 'echo second'; }"

# Each of these dies, and what it counted before is kept; the suite after it runs.
dies() { says "$1" 1 '^5 passed, 1 failed, 0 skipped$' "suite_fake_dies() { count passed 3; $2; count passed 9; }; $passes"; }
dies "a command in the middle fails" 'false'
dies "a function fails" 'f() { false; echo on; }; f'
dies "a command in a substitution fails" 'x=$(false; echo on)'
dies "the middle of a pipe fails" 'echo | false | cat'
dies "what is set up fails" 'quietly "setting up" false'
dies "it gives up" 'fail "no more"'
dies "it returns early with an error" 'return 1'
dies "it exits as if all were well" 'exit 0'
dies "it is killed" 'kill -9 $BASHPID'
dies "one of two at once dies" 'at_once "sleep 0.1; false; count passed 9" true'
dies "the other of them" 'at_once true "f() { false; echo on; }; f"'
dies "a variable is not set" 'echo "$no_such_variable"'
says "it dies before it counts anything" 1 '^2 passed, 1 failed, 0 skipped$' "suite_fake_dies() { false; }; $passes"
says "it counts nothing" 1 '^2 passed, 1 failed, 0 skipped$' "suite_fake_empty() { :; }; $passes"
says "nothing passes" 1 '^0 passed, 0 failed, 1 skipped$' "suite_fake_skips() { skip 1 x; }"

# Runners, of which each is a program that prints what it counted, or dies; what follows in the suite runs all the same.
mkdir -p "$scratch/bin"
runner() {
    says "$1" "$2" "$3" "
        PATH=$scratch/bin:\$PATH venv=$scratch
        suite_fake_runner() {
            program() { printf '%s\n' '#!/usr/bin/env bash' \"\$1\" >$scratch/bin/\$2; chmod +x $scratch/bin/\$2; }
            $4
        }"
}
summary='=== 4 passed, 1 failed, 2 errors, 3 skipped in 1s ==='
runner "pytest's counts" 1 '^4 passed, 3 failed, 3 skipped$' "program 'echo $summary; exit 1' python; pytest_suite a"
runner "pytest dies at once" 1 '^1 passed, 1 failed, 0 skipped$' \
    "program 'kill -11 \$\$' python; pytest_suite a; program 'echo 1 passed' python; pytest_suite b"
runner "pytest cannot be started" 1 '^1 passed, 1 failed, 0 skipped$' \
    "program 'exit 1' python; pytest_suite a; count passed 1"
runner "cargo's counts" 1 '^7 passed, 2 failed, 0 skipped$' \
    "program 'echo test result: FAILED. 7 passed\; 2 failed\; 0 ignored; exit 101' cargo; cargo_suite test"
runner "cargo dies" 1 '^1 passed, 1 failed, 0 skipped$' "program 'exit 101' cargo; cargo_suite test; count passed 1"
bazel='case $1 in info) echo /nowhere ;; *) printf %s\\n "//a:b_test (cached) PASSED in 1s" "//a:c_test FAILED in 2s"; exit 3 ;; esac'
runner "bazel's counts" 1 '^1 passed, 1 failed, 0 skipped$' "program '$bazel' bazel; bazel_suite ''"
runner "bazel cannot build a program that is no test" 1 '^1 passed, 1 failed, 0 skipped$' \
    "program '${bazel/printf*3/echo //a:b_test PASSED in 1s; exit 1}' bazel; bazel_suite ''"

says "one suite is named" 0 '^2 passed, 0 failed, 0 skipped$' "$passes; suite_fake_dies() { false; }" fake_passes
says "no such suite" 1 'error: no such suite: fake_other \(there are fake_passes\)' "$passes" fake_other
says "PyTorch is left out aloud" 0 '^skipped 1: test_torch.py: --without-torch$' \
    "$passes; suite_fake_torch() { suite_torch; }" --without-torch

# JAX's newest on a newer Python than python3: found behind a name that leads nowhere, or missed aloud.
mkdir -p "$scratch"/{none,pyenv/versions/3.12.9/bin}
for name in none/python3 none/python3.12 none/python3.13; do
    printf '#!/bin/sh\nexit 127\n' >"$scratch/$name"
done
printf '#!/bin/sh\nexit 0\n' >"$scratch/pyenv/versions/3.12.9/bin/python"
chmod +x "$scratch"/none/* "$scratch/pyenv/versions/3.12.9/bin/python"
jax="PATH=$scratch/none:\$PATH XDG_DATA_HOME=/nowhere
    setup_jax() { echo \"\$1: \$python\"; }
    pytest_suite() { count passed 1; }
    suite_fake_jax() { suite_jax; }"
says "a newer Python" 0 "^newer-python: $scratch/pyenv/versions/3.12.9/bin/python\$" "$jax; PYENV_ROOT=$scratch/pyenv"
says "with it, three ages of JAX, and devices of the newest" 0 '^4 passed, 0 failed, 0 skipped$' "$jax; PYENV_ROOT=$scratch/pyenv"
says "no newer Python" 0 '^skipped 1: test_jax.py with JAX 0.12: no Python 3.12' "$jax; PYENV_ROOT=/nowhere"

echo "[====] Synthesis: Tested: $((good + bad)) | Passing: $good | Failing: $bad | Crashing: 0"
[ $bad -eq 0 ]
