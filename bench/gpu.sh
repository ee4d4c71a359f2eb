#!/usr/bin/env bash
# One command for a CUDA machine that has torch, triton and pybind11: builds, verifies, tests, benches; results as JSON in $1.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results}
mkdir -p "$out"
failed=0
step() { echo "== $*"; "$@" || failed=1; }
step python3 -m pip install -q --no-deps --no-build-isolation -e . --break-system-packages
step python3 -m fastsae info
step python3 -m fastsae verify --json > "$out/verify-gpu.json"
tail -c 300 "$out/verify-gpu.json"
step timeout 240 python3 -m pytest -q -p no:cacheprovider tests/test_contract.py tests/test_kernels.py -k "cuda or gpu"
step timeout 200 python3 -m fastsae bench --device cuda --out "$out"
exit $failed
