#!/usr/bin/env bash
# The halves of the adapters that need a GPU, on a machine that has PyTorch and JAX and nothing of this repository:
# `./dev gpu-adapters` packs what they need beside this file, as .gpu/adapters/run.sh [cpu]. Prints one line for each check
# and the end of the log of a suite that failed; the exit status is the number of those. CALLS.csv, in $OUT or here, gets
# what one call costs through each adapter.
set -uo pipefail
cd "$(dirname "$(readlink -f "$0")")" || exit 1
calls=${OUT:-.}/adapters.calls.csv
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$work/site" wheels/*.whl || exit 1
python3 -m tarfile -e programs.tar.xz "$work" || exit 1

export PYTHONPATH=$work/site PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
export DLATTN_LIBRARY=$work/site/dlattn/libdlattn.so.1 DLATTN_TVM_LIBRARY=$work/libdlattn_tvm.so
DLATTN_COMMIT=$(cat commit)
export DLATTN_COMMIT
# NVIDIA's libraries, which candle's programs were linked without: those that came with PyTorch.
nvidia=$(python3 -c 'import os, torch; print(os.path.join(os.path.dirname(os.path.dirname(torch.__file__)), "nvidia"))')
libraries=$(find "$nvidia" -name 'lib*.so*' -printf '%h\n' | sort -u | tr '\n' ':')

# start NAME SECONDS COMMAND...: runs a suite beside the others; finish waits for all and tells how they went.
names=() failed=0
start() {
    names+=("$1")
    (
        SECONDS=0
        timeout "$2" "${@:3}" >"$work/$1.log" 2>&1
        echo "$? $SECONDS" >"$work/$1.status"
    ) &
}

finish() {
    local name status seconds
    wait
    for name in "${names[@]}"; do
        read -r status seconds <"$work/$name.status"
        grep -E '^(ok|FAIL|SKIPPED)\b| (PASSED|FAILED|ERROR|SKIPPED)\b|^test .* \.\.\. ' "$work/$name.log" | cut -c1-150
        [ "$status" -eq 0 ] || { failed=$((failed + 1)) && tail -n 60 "$work/$name.log" | cut -c1-300; }
        printf '%s %s, status %s, %s s\n' "$([ "$status" -eq 0 ] && echo ok || echo FAIL)" "$name" "$status" "$seconds"
    done
    names=()
}

candle=(env "LD_LIBRARY_PATH=$libraries" RUST_BACKTRACE=0
    LD_PRELOAD=libcuda.so.1:libcudart.so.13:libcublas.so.13:libcublasLt.so.13:libcurand.so.10:libnvrtc.so.13)
export CANDLE_CALL="${candle[*]} $work/call"
pytest=(python3 -m pytest -p no:cacheprovider -v --tb=short)
clients="torch python3 adapters/python/examples/attention_torch.py
jax python3 adapters/python/examples/attention_jax.py
tvm python3 adapters/tvm/attention.py
candle ${candle[*]} $work/attention"
start jax 60 python3 adapters/python/tests/gpu_check.py jax
start torch 60 python3 adapters/python/tests/gpu_check.py torch
start torch-compile 60 python3 adapters/python/tests/gpu_check.py compile
start provider 60 python3 adapters/python/tests/gpu_check.py provider
start cupy 60 python3 adapters/python/tests/gpu_check.py cupy
start tvm-ffi 60 python3 adapters/tvm/tvm_cuda.py
start candle 60 "${candle[@]}" "$work/candle" --test-threads=1
# One file under all of them, bit by bit.
DLATTN_CLIENTS_DEVICE=cuda DLATTN_CLIENTS=$clients start same-binary-gpu 60 "${pytest[@]}" -k same_bits adapters/same_binary_test.py
finish

# What `./dev test` cannot run where PyTorch is not, or with another JAX.
if [ "${1-}" = cpu ]; then
    DLATTN_CLIENTS="c $work/attention-c
numpy python3 adapters/python/examples/attention.py
$clients" start same-binary-cpu 80 "${pytest[@]}" adapters/same_binary_test.py
    start torch-cpu 80 env CUDA_VISIBLE_DEVICES= "${pytest[@]}" adapters/python/tests/test_torch.py
    start jax-cpu 80 env JAX_PLATFORMS=cpu "${pytest[@]}" adapters/python/tests/test_jax.py
    finish
fi

# Calls on the CPU are timed on one core, so that no thread of another helps; a GPU's queue may be fed by several.
threads=(env OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 DLATTN_NUM_THREADS=1)
for device in cuda cpu; do
    [ $device = cuda ] || threads+=(taskset -c "${CORE-1}")
    for frameworks in "torch tvm-ffi" jax candle; do
        read -ra words <<<"$frameworks"
        timeout 20 "${threads[@]}" python3 bench/calls.py --device $device "$calls" "${words[@]}" ||
            { failed=$((failed + 1)) && echo "FAIL calls $device $frameworks"; }
    done
done
echo "$failed suites failed"
exit "$failed"
