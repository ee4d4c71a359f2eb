#!/usr/bin/env bash
# One command for a CUDA machine that has torch, triton, nvcc, pybind11, setuptools and pytest: builds, verifies, benches, runs the
# sanitizers, in 9 minutes. Nothing is downloaded. In the folder $1: gpu.log with everything said, and the JSON and plot of the table, written
# as they come: a kill keeps what was measured. FASTSAE_GPU_PARTS chooses the parts; further runs:
#   FASTSAE_GPU_PARTS="build contract"   the whole contract suite
#   FASTSAE_GPU_PARTS="build tune"       times the tile shapes of kernels/_tile.py
#   FASTSAE_GPU_PARTS="build sanitize"   all sanitizers to their end
# FASTSAE_GPU_SECONDS is the time of all parts (540), PYTHON the interpreter, FASTSAE_COMMIT what is stored with the figures where there is
# no git. With sparsify on PYTHONPATH its rows are timed too.
set -uo pipefail
cd "$(dirname "$0")/.."
parts=${FASTSAE_GPU_PARTS:-build verify bench sanitize}
python=${PYTHON:-python3}
limit=${FASTSAE_GPU_SECONDS:-540}
begin=$SECONDS
failed=0
known="build verify contract bench tune sanitize"
for part in $parts; do
  [[ " $known " == *" $part "* ]] || { echo "bench/gpu.sh: unknown part $part (known: $known)" >&2; exit 2; }
done

# The module is built for this GPU alone.
arch=$("$python" -c "import torch; torch.cuda.is_available() or exit(1); print('%d%d' % torch.cuda.get_device_capability())" 2> /dev/null)
if [ -z "$arch" ]; then
  echo "bench/gpu.sh: no CUDA device ($python: torch is missing, or torch.cuda.is_available() is False)" >&2
  exit 2
fi
export PYTHONUNBUFFERED=1 HYPOTHESIS_PROFILE=ci FASTSAE_CUDA=1 FASTSAE_CUDA_ARCHS=${FASTSAE_CUDA_ARCHS:-$arch}
export PATH="$PATH:/usr/local/cuda/bin"
out=${1:-build/gpu}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
log=$out/gpu.log
: > "$log"

left() { echo $((limit - (SECONDS - begin))); }
say() { echo "== [$((SECONDS - begin)) s] $*" | tee -a "$log"; }
# step <most seconds> <command...>: with what time is left at the most.
step() {
  local most=$1
  shift
  [ "$most" -gt "$(left)" ] && most=$(left)
  if [ "$most" -lt 5 ]; then
    say "NOT RUN, no time left: $*"
    failed=1
    return 1
  fi
  say "$*"
  timeout -k 15 "$most" "$@" 2>&1 | tee -a "$log"
  local code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] && return 0
  say "exit code $code (124: over its $most s) of $*"
  failed=1
  return 1
}

# Where pip or a network-less editable install does not work: built in place, and imported from here.
in_place() {
  say "pip could not install the checkout: building in place"
  failed=0
  [ -e fastsae/kernels ] || ln -s ../kernels fastsae/kernels
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
  step 150 "$python" setup.py -q build_ext --inplace
}

pytest=("$python" -m pytest -q -p no:cacheprovider --maxfail=40)
# Triton compiles on the CPU, in every process.
cores=$(env -u OMP_NUM_THREADS nproc)
"$python" -c "import xdist" 2> /dev/null && pytest+=(-n "$((cores < 16 ? cores : 16))")
for part in $parts; do
  case $part in
    build)
      step 150 "$python" -m pip install -q --no-index --no-deps --no-build-isolation --break-system-packages -e . || in_place
      step 60 "$python" -m fastsae info
      ;;
    verify)
      step 90 "${pytest[@]}" tests/gpu/test_cuda.py tests/gpu/test_kernels.py tests/gpu/test_tiles*.py -k gpu
      step 100 "${pytest[@]}" tests/contract/test_contract.py -k "cuda: and meets and (float32 or bfloat16)"
      ;;
    contract) # not among the default parts, whose time it would take
      step 520 "${pytest[@]}" tests/contract/test_contract.py -k "cuda:"
      ;;
    bench) # what follows keeps its time
      reserve=20
      [[ " $parts " == *" sanitize "* ]] && reserve=100
      minutes=$("$python" -c "print(max(1.0, ($(left) - $reserve) / 60))")
      step "$(left)" "$python" -m fastsae bench --device cuda --minutes "$minutes" --out "$out"
      ;;
    tune)
      minutes=$("$python" -c "print(max(1.0, ($(left) - 30) / 60))")
      step "$(left)" "$python" -m bench.tune_gpu --minutes "$minutes" --out "$out"
      ;;
    sanitize)
      step "$(left)" bash bench/gpu_sanitize.sh "$out"
      ;;
  esac
done
say "results in $out, $([ $failed -eq 0 ] && echo "all parts passed" || echo "a part FAILED or was not run")"
exit $failed
