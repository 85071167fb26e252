#!/usr/bin/env bash
# The GPU's tests on a machine with a driver and nothing of this repository: `./dev gpu-bundle` packs them beside this
# file, as .gpu/tests/run.sh.
#   run.sh [PROGRAM...] [OPTION...]  every program, or those named, Criterion's with these options, such as
#                                    run.sh logits_test memory_test --filter '*/*huge*'; the exit status is the number of
#                                    those that failed
#   run.sh sanitize                  compute-sanitizer's four tools at once over every row of the table, some two minutes; of
#                                    merge two, over its own test
set -uo pipefail
cd "$(dirname "$(readlink -f "$0")")/root" || exit 1
export LD_LIBRARY_PATH=../lib DLATTN_LIBRARY=$PWD/libdlattn.so.1 failed=0

reduced=./tests/gpu/reduced_test
if [ "${1-}" = sanitize ]; then
    logs=$(mktemp -d)
    trap 'rm -rf "$logs"' EXIT
    # start NAME TOOL-WITH-OPTIONS PROGRAM ARGUMENT...
    start() {
        local tool
        names+=("$1")
        read -ra tool <<<"$2"
        { timeout 150 compute-sanitizer --tool "${tool[@]}" --error-exitcode 1 "${@:3}" && touch "$logs/$1.ok"; } \
            >"$logs/$1" 2>&1 &
    }
    names=()
    start memcheck "memcheck --padding 1024" $reduced # or one tensor would begin where another ends
    start memcheck-wild "memcheck --padding 1024" $reduced wild
    start initcheck initcheck $reduced
    start synccheck synccheck $reduced
    for row in $($reduced rows); do # by far the slowest
        start "racecheck-$row" racecheck $reduced few "$row"
    done
    for tool in "memcheck --padding 1024" racecheck; do
        start "${tool%% *}-merge" "$tool --target-processes all" ./tests/gpu/gpu_parts_test -j1 --filter parts/merge
    done
    start wrong "memcheck --padding 1024" $reduced wrong
    wait
    # It must see a read past the end of a key.
    rm -f "$logs/wrong.ok"
    grep -q 'Invalid __global__ read' "$logs/wrong" && touch "$logs/wrong.ok"
    for name in "${names[@]}"; do
        [ -e "$logs/$name.ok" ] || { failed=$((failed + 1)) && head -n 40 "$logs/$name"; }
        echo "$name: $([ -e "$logs/$name.ok" ] && echo ok || echo FAILED), $(tail -n 1 "$logs/$name")"
    done
    grep ': .* cases' "$logs/memcheck"
    exit $failed
fi

mapfile -t programs <../programs
chosen=()
while [ $# -gt 0 ] && [ "${1:0:1}" != - ]; do
    before=${#chosen[@]}
    for program in "${programs[@]}"; do
        [ "$(basename "$program")" = "$1" ] && chosen+=("$program")
    done
    [ "$before" -lt ${#chosen[@]} ] || { echo "no program $1, there are: ${programs[*]##*/}" >&2 && exit 1; }
    shift
done
[ ${#chosen[@]} -gt 0 ] || chosen=("${programs[@]}")
for program in "${chosen[@]}"; do
    echo "== $program"
    SECONDS=0
    "./$program" "$@" || failed=$((failed + 1))
    echo "== $program: $SECONDS s"
done
exit $failed
