#!/usr/bin/env bash
# resources_test.sh CUOBJDUMP NVDISASM CUBIN...
# Reads what was compiled: no kernel uses static shared memory beside the dynamic one that the plan counts, none has a
# large stack, and the main loop of every tensor core kernel (straight code with 16 HMMA or QMMA or more, an
# HGMMA or QGMMA counting as four) keeps to registers but for a few scalars. A spilled accumulator would show as dozens of LDL and STL
# there; a kernel without a stack has none, and is not disassembled. And drivers before 580 load code whose ELF has ABI
# version 7, that of CUDA 12 (//third_party/ptxas). That of CUDA 13 is 8, which `later` code has, and that of Blackwell,
# which no driver before CUDA 12.8's runs.
set -euo pipefail
cuobjdump=$(realpath "$1") nvdisasm=$(realpath "$2")
shift 2
export cuobjdump nvdisasm

# resources CUBIN: of each kernel, its name, bytes of stack and of static shared memory.
resources() {
    "$cuobjdump" --dump-resource-usage "$1" | awk '
        /Function/ { name = $2; sub(":$", "", name) }
        /REG:/ { match($0, /STACK:[0-9]+/); stack = substr($0, RSTART + 6, RLENGTH - 6)
                 match($0, /SHARED:[0-9]+/); print name, stack, substr($0, RSTART + 7, RLENGTH - 7) }'
}

# with_stack RESOURCES CUBIN: the symbols' indices, with commas between, of the kernels that have a stack; fails if one has
# no symbol. readelf warns of NVIDIA's order of symbols.
with_stack() {
    readelf --symbols --wide "$2" 2>/dev/null | awk '
        NR == FNR { if ($2 > 0) missing[$1]; next }
        $4 == "FUNC" && $NF in missing { printf "%s%d", comma, $1; comma = ","; delete missing[$NF] }
        END { for (name in missing) exit 1 }' "$1" -
}

# loops CUBIN SYMBOLS: of each kernel with a main loop, its name, the loop's HMMA and its local accesses.
loops() {
    "$nvdisasm" -c -fun "$2" "$1" | awk '
        function block() { if (mma >= 16) { if (mma > most) most = mma; if (moved > worst) worst = moved } mma = moved = 0 }
        function kernel() { block(); if (most > 0) print name, most, worst; most = worst = 0 }
        /^\.text\./ { kernel(); name = substr($1, 7); sub(":$", "", name) }
        / BRA / { block() }
        / [HQ]MMA/ { mma++ }
        / [HQ]GMMA/ { mma += 4 }
        / (LDL|STL)[. ]/ { moved++ }
        END { kernel() }'
}

# check_cubin CUBIN: a line for each kernel in $temporary/kernels.
check_cubin() {
    local failed=0 cubin name stack static most moved symbols found="" resources
    cubin=$(basename "$1")
    resources=$temporary/$cubin
    if [[ $1 != *sm_1[0-9][0-9]* && $1 != *.later_* ]] && [ "$(od -An -tu1 -j8 -N1 "$1" | tr -d ' ')" -ne 7 ]; then
        echo "$cubin: not code of CUDA 12"
        failed=1
    fi
    resources "$1" >"$resources"
    cat "$resources" >>"$temporary/kernels"
    while read -r name stack static; do
        if [ "$static" -gt 1024 ] || [ "$stack" -gt 256 ]; then
            echo "$cubin $name: $static bytes of static shared memory, $stack bytes of stack"
            failed=1
        fi
    done <"$resources"
    symbols=$(with_stack "$resources" "$1")
    if [ -n "$symbols" ]; then
        found=$(loops "$1" "$symbols")
    fi
    while read -r name most moved; do
        [ -n "$name" ] || continue
        echo "$cubin $name: $moved local accesses beside $most HMMA"
        [ "$moved" -le 16 ] || failed=1
    done <<<"$found"
    return $failed
}
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
export temporary
export -f check_cubin resources with_stack loops

failed=0
printf '%s\0' "$@" | xargs -0 -P "$(nproc)" -I {} bash -euo pipefail -c "check_cubin {}" || failed=1
echo "$(wc -l <"$temporary/kernels") kernels"
[ "$failed" -eq 0 ] && [ -s "$temporary/kernels" ]
