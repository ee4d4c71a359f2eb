#!/usr/bin/env bash
# One command for a CUDA machine that has torch, triton, nvcc, pybind11 and pytest: builds, verifies, benches, runs the sanitizers, in 9
# minutes. Results in $1 as they come: a kill keeps what was measured. Nothing is downloaded. FASTSAE_GPU_PARTS chooses the parts; a second
# run with FASTSAE_GPU_PARTS="build contract" runs the whole contract suite.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-build/gpu}" && cd "${1:-build/gpu}" && pwd)
parts=${FASTSAE_GPU_PARTS:-build verify bench sanitize}
python=${PYTHON:-python3}
begin=$SECONDS
limit=540
failed=0
export PYTHONUNBUFFERED=1 HYPOTHESIS_PROFILE=ci FASTSAE_CUDA_ARCHS=${FASTSAE_CUDA_ARCHS:-native}

left() { echo $((limit - (SECONDS - begin))); }
# step <most seconds> <log> <command...>: with what time is left at the most; its output is shown and kept in the log.
step() {
  local most=$1 log=$2
  shift 2
  [ "$most" -gt "$(left)" ] && most=$(left)
  if [ "$most" -lt 5 ]; then
    echo "== [$((SECONDS - begin)) s] NOT RUN, no time left: $*"
    failed=1
    return
  fi
  echo "== [$((SECONDS - begin)) s] $*"
  timeout -k 15 "$most" "$@" 2>&1 | tee "$out/$log"
  local code=${PIPESTATUS[0]}
  [ $code -eq 0 ] || { echo "== exit code $code ($log; 124: over its $most s)"; failed=1; }
}

if ! "$python" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
  echo "bench/gpu.sh: no CUDA device (torch.cuda.is_available() is False)" >&2
  exit 2
fi
pytest=("$python" -m pytest -q -p no:cacheprovider --maxfail=30)
"$python" -c "import xdist" 2> /dev/null && pytest+=(-n 8) # Triton compiles on the CPU
for part in $parts; do
  case $part in
    build)
      step 150 build.log "$python" -m pip install -q --no-deps --no-build-isolation --break-system-packages -e .
      step 60 info.log "$python" -m fastsae info
      ;;
    verify)
      step 75 tests.log "${pytest[@]}" tests/test_cuda.py tests/test_kernels.py tests/test_tiles.py -k gpu
      step 100 verify.log "${pytest[@]}" tests/test_contract.py -k "cuda: and (meets or batch)"
      ;;
    contract) # the whole contract suite on the GPU; not among the default parts, whose time it would take
      step 520 contract.log "${pytest[@]}" tests/test_contract.py -k "cuda:"
      ;;
    bench)
      minutes=$("$python" -c "print(max(1.0, min(4.5, ($(left) - 90) / 60)))")
      step 290 bench.log "$python" -m fastsae bench --device cuda --minutes "$minutes" --out "$out"
      ;;
    sanitize)
      step 80 sanitize.log bash bench/gpu_sanitize.sh "$out"
      ;;
    *)
      echo "bench/gpu.sh: unknown part $part (known: build verify bench sanitize contract)" >&2
      exit 2
      ;;
  esac
done
echo "== [$((SECONDS - begin)) s] results in $out, $([ $failed -eq 0 ] && echo "all parts passed" || echo "a part FAILED or was not run")"
exit $failed
