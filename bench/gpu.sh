#!/usr/bin/env bash
# Everything that wants a GPU, in one run of under nine minutes: the tests, then kernels, prefill, decode and hand-off figures.
#
#   bench/gpu.sh [tests|figures]    both by default. PYTHON=… chooses the interpreter, TMPDIR=/dev/shm keeps the 16 GB model off the disk
#
# The figures are appended to bench/results/DATE-gpu.md, or to $RESULTS. Exits 1 if a test or a bench failed; it goes on all the same.
set -u
cd "$(dirname "$0")/.."
part=${1:-all}
python=${PYTHON:-python3}
results=${RESULTS:-bench/results/$(date +%F)-gpu.md}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# Plugins that happen to be installed beside pytest warn, and warnings are errors here; xdist is used where there is one.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
$python -c 'import xdist' 2>/dev/null && parallel="-p xdist.plugin -n 12" || parallel=""
failed=0

run() {
    local began=$SECONDS
    "$@" || { failed=1; echo "FAILED: $*"; }
    echo "($((SECONDS - began)) s: $*)" && echo
}

tests() {
    run $python -m pytest -q -p no:cacheprovider $parallel tests/kernels/gpu tests/engine
    run $python -m pytest -q -p no:cacheprovider $parallel tests/transfer/test_transfer_process.py -k cuda
    run $python -m pytest -q -p no:cacheprovider tests/processes/test_gpu_pipeline.py -k "cuda:0-cuda:0 or killed or blocks or two_gpus"
}

figures() {
    run $python bench/engine.py --model L --device cuda --only decode --batch 1 --batch 8 --batch 64 --context 1024 --context 8192 \
        --steps 16 --against-tokens 65536 --markdown "$results"
    run $python bench/engine.py --model L --device cuda --only prefill --prompt 4096 --prompt 16384 --chunk 2048 --markdown "$results"
    run $python bench/handoff.py --device cuda --model L --tokens 4096 --markdown "$results"
    run $python bench/kernels.py --markdown "$results"
}

[ "$part" = figures ] || tests
[ "$part" = tests ] || figures
exit $failed
