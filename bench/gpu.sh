#!/usr/bin/env bash
# Everything that wants a GPU, in two runs of under nine minutes each.
#
#   bench/gpu.sh tests       what has run on no GPU for longest first: KV that is pushed and repacked, then kernels and engine, then nodes
#   bench/gpu.sh figures     kernels, prefill, decode and hand-off. TMPDIR=/dev/shm keeps the 16 GB model off the disk
#
# PYTHON=… chooses the interpreter. The figures are appended to $RESULTS; by default that is gpu.md in $OUT, if that is set, else
# bench/results/DATE-gpu.md. Exits 1 if a test or a bench failed, or was cut short; it goes on all the same.
#
# The figures want 65 GB of the GPU's memory: 16 each for our weights and transformers', 11 for our KV, 19 for transformers' while it copies it.
# Decoding 64 sequences of 8,192 tokens wants 131, for our KV then takes 79: a smaller card is spared that.
set -u
cd "$(dirname "$0")/.."
case ${1:-} in
    tests | figures) part=$1 ;;
    *) sed -n '4,5s/^#  //p' bench/gpu.sh >&2 && exit 2 ;;
esac
python=${PYTHON:-python3}
results=${RESULTS:-${OUT:+$OUT/gpu.md}}
results=${results:-bench/results/$(date +%F)-gpu.md}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# Plugins that happen to be installed beside pytest warn, and warnings are errors here; xdist is used where there is one.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
$python -c 'import xdist' 2>/dev/null && parallel="-p xdist.plugin -n 12" || parallel=""
failed=0

# Within its time, and what is left of the nine minutes. An interrupted pytest still ends its processes, and says what it has seen.
run() {
    local began=$SECONDS seconds=$((510 - SECONDS))
    [ $seconds -lt 240 ] || seconds=240
    if [ $seconds -lt 10 ]; then
        failed=1
        echo "LEFT OUT, for no time is left: $*"
        return
    fi
    timeout --signal=INT --kill-after=15 $seconds "$@" || { failed=1; echo "FAILED: $*"; }
    echo "($((SECONDS - began)) s: $*)" && echo
}

pytest() {
    run $python -m pytest -q -p no:cacheprovider "$@"
}

tests() {
    pytest tests/kernels/gpu/test_repack.py tests/engine/test_kv_repack.py tests/engine/test_kv_staging.py
    pytest tests/transfer/test_transfer_process.py -k cuda
    pytest tests/engine/test_gpu_ranks.py
    pytest $parallel tests/kernels/gpu tests/engine --ignore tests/engine/test_gpu_ranks.py
    pytest tests/processes/test_gpu_pipeline.py -k "cuda:0-cuda:0 or killed or blocks or two_gpus"
}

decode() {
    run $python bench/engine.py --model L --device cuda --only decode "$@" --steps 16 --against-tokens 65536 --markdown "$results"
}

figures() {
    local gigabytes
    gigabytes=$($python -c 'import torch; print(torch.cuda.get_device_properties(0).total_memory // 10**9)') || exit 1
    if [ "$gigabytes" -ge 135 ]; then
        decode --batch 1 --batch 8 --batch 64 --context 1024 --context 8192
    else
        decode --batch 1 --batch 8 --context 1024 --context 8192
        decode --batch 64 --context 1024
        printf '\nLEFT OUT: decode, batch 64, context 8,192: it wants 131 GB of memory, and this GPU has %d\n' "$gigabytes" | tee -a "$results"
    fi
    run $python bench/engine.py --model L --device cuda --only prefill --prompt 4096 --prompt 16384 --chunk 2048 --markdown "$results"
    run $python bench/handoff.py --device cuda --model L --tokens 4096 --markdown "$results"
    run $python bench/kernels.py --markdown "$results"
}

$part
exit $failed
