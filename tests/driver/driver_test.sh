#!/usr/bin/env bash
# Machines that have no usable driver: what a caller who asks for a GPU is told, and that the CPU works there. A real
# driver of the machine is hidden by another libcuda.so.1. Arguments: client, plugin, stub of libcuda.so.1.
set -uo pipefail
client=$PWD/$1 folder=$TEST_TMPDIR/driver good=0 bad=0
export DLATTN_LIBRARY=$PWD/$2 LD_LIBRARY_PATH=$folder
mkdir -p "$folder"

# says WHAT MESSAGE [VARIABLE=VALUE...]: the client, with these variables, is told MESSAGE.
says() {
    local said status=0
    said=$(env "${@:3}" "$client") || status=$?
    if [ $status -eq 0 ] && [[ $said == "device unavailable: CUDA device 0: $2"* ]] && [[ $said == *"devices: 1" ]]; then
        good=$((good + 1)) && echo "[PASS] $1"
    else
        bad=$((bad + 1)) && printf '[FAIL] %s, status %s:\n%s\n' "$1" $status "$said"
    fi
}

echo "not a library" >"$folder/libcuda.so.1"
says "no driver that can be opened" "no CUDA driver: $folder/libcuda.so.1: "
cp -L "$3" "$folder/libcuda.so.1"
says "driver too old" "the CUDA driver is too old: it serves CUDA 11.8, needed is 12.0 (driver 525 or newer)" \
    STUB_VERSION=11080
says "a driver without a function" "the CUDA driver has no function cuTensorMapEncodeTiled" \
    STUB_VERSION=12000 STUB_LACKS=cuTensorMapEncodeTiled
says "no device" "the CUDA driver finds no GPU: no CUDA-capable device is detected" STUB_VERSION=12000 STUB_INIT=100
says "no device, says a newer driver" "the CUDA driver finds no GPU: no CUDA-capable device is detected" \
    STUB_VERSION=14020 STUB_INIT=100
if [ -e /dev/nvidiactl ]; then
    echo "[SKIP] no driver at all: this machine has one"
else
    rm "$folder/libcuda.so.1"
    says "no driver at all" "no CUDA driver: libcuda.so.1: cannot open shared object file"
fi
echo "[====] Synthesis: Tested: $((good + bad)) | Passing: $good | Failing: $bad | Crashing: 0"
exit $bad
