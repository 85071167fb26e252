#!/usr/bin/env bash
# resources_test.sh CUOBJDUMP NVDISASM FATBIN...
# Reads what was compiled: no kernel uses static shared memory beside the dynamic one that the plan counts, none has a
# large stack, and the main loop of every tensor core kernel (straight code with 16 HMMA or QMMA or more, an HGMMA or QGMMA
# counting as four) keeps to registers but for a few scalars. A spilled accumulator would show as dozens of LDL and STL there. And
# drivers before 580 load code whose ELF has ABI version 7, that of CUDA 12 (//third_party/ptxas); that of CUDA 13 is 8,
# and that of Blackwell, which no driver before CUDA 12.8's runs.
set -euo pipefail
cuobjdump=$1 nvdisasm=$2
shift 2
failed=0 kernels=0
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT

for image in "$@"; do
    while read -r arch name stack static; do
        kernels=$((kernels + 1))
        if [ "$static" -gt 1024 ] || [ "$stack" -gt 256 ]; then
            echo "$arch $name: $static bytes of static shared memory, $stack bytes of stack"
            failed=1
        fi
    done < <("$cuobjdump" --dump-resource-usage "$image" | awk '
        /^arch =/ { arch = $3 }
        /Function/ { name = $2; sub(":$", "", name) }
        /REG:/ { match($0, /STACK:[0-9]+/); stack = substr($0, RSTART + 6, RLENGTH - 6)
                 match($0, /SHARED:[0-9]+/); print arch, name, stack, substr($0, RSTART + 7, RLENGTH - 7) }')

    path=$(realpath "$image")
    (cd "$temporary" && rm -f ./*.cubin && "$OLDPWD/$cuobjdump" --extract-elf all "$path" >/dev/null)
    for cubin in "$temporary"/*.cubin; do
        if [[ $cubin != *.sm_1[0-9][0-9]* ]] && [ "$(od -An -tu1 -j8 -N1 "$cubin" | tr -d ' ')" -ne 7 ]; then
            echo "$(basename "$cubin"): not code of CUDA 12"
            failed=1
        fi
        while read -r name most moved; do
            echo "$(basename "$cubin") $name: $moved local accesses beside $most products"
            if [ "$moved" -gt 16 ]; then
                failed=1
            fi
        done < <("$nvdisasm" -c "$cubin" | awk '
            function block() { if (mma >= 16) { if (mma > most) most = mma; if (moved > worst) worst = moved } mma = moved = 0 }
            function kernel() { block(); if (most > 0) print name, most, worst; most = worst = 0 }
            /^\.text\./ { kernel(); name = substr($1, 7); sub(":$", "", name) }
            / BRA / { block() }
            / [HQ]MMA/ { mma++ }
            / [HQ]GMMA/ { mma += 4 }
            / (LDL|STL)[. ]/ { moved++ }
            END { kernel() }')
    done
done
echo "$kernels kernels"
[ "$failed" -eq 0 ] && [ "$kernels" -gt 0 ]
