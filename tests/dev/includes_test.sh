#!/usr/bin/env bash
# Includes run one way: kernels -> src -> abi, adapters -> abi; and in no circle. Prints each arrow that does not.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/../.."

# includes FOLDER...: "FILE INCLUDED" for each quoted include in the folders' C and CUDA sources.
includes() {
    # shellcheck disable=SC2016 # awk has variables of its own
    git ls-files --cached --others --exclude-standard -- "${@/%//*.[ch]}" "${@/%//*.cu}" "${@/%//*.cuh}" "${@/%//*.inc}" |
        xargs awk '/^#[ ]*include "/ { split($0, part, "\""); print FILENAME, part[2] }'
}

# strays FOLDER PATTERN: what the folder includes that does not match.
strays() { includes "$1" | awk -v allowed="$2" '$2 !~ allowed { print "  " $1 " includes " $2; found = 1 } END { exit found }'; }

bad=0
strays abi '^(abi/|dlattn)' || bad=1
strays src '^(src|abi)/' || bad=1
strays kernels '^(kernels/|src/(kernel|problem|dtype|element|philox|cuda_driver|tensor_map)\.h$|abi/)' || bad=1
strays adapters '^(abi|adapters)/|^dlattn' || bad=1
# tsort names the files of a circle. What a table includes twice under different macros is no circle.
includes abi src kernels | tsort >/dev/null || bad=1

if [ $bad -eq 0 ]; then echo "1 passed, 0 failed"; else echo "0 passed, 1 failed"; fi
exit $bad
