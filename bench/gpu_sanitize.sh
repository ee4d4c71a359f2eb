#!/usr/bin/env bash
# Our kernels on a GPU under compute-sanitizer: memcheck, racecheck and synccheck of the CUDA C++ rows, then memcheck of the Triton rows
# (every fifth sample; FASTSAE_SANITIZE_EVERY). Only our kernels are watched, and each tool has its own share of the time.
# Usage: bench/gpu_sanitize.sh [folder for sanitize.log]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu}
mkdir -p "$out"
log=$out/sanitize.log
: > "$log"
python=${PYTHON:-python3}
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2> /dev/null)
if [ -z "$sanitizer" ]; then
  echo "gpu_sanitize.sh: compute-sanitizer was not found: nothing was checked" >&2
  exit 2
fi
failed=0
# Without torch's caching allocator every tensor is an allocation of its own, so that an access beyond it shows.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONUNBUFFERED=1
# check <tool> <most seconds> <names of kernels> <arguments of bench.gpu_check>
check() {
  local tool=$1 most=$2 names=$3 filters=() name
  shift 3
  for name in $names; do filters+=(--kernel-name "kernel_substring=$name"); done
  echo "== $tool $*" | tee -a "$log"
  timeout -k 15 "$most" "$sanitizer" --tool "$tool" --error-exitcode 9 --target-processes all "${filters[@]}" \
    "$python" -m bench.gpu_check "$@" 2>&1 | tee -a "$log" | tail -n 4
  local code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] || { echo "$tool $*: exit code $code (9: it found something; 124: over its $most s); $log" | tee -a "$log"; failed=1; }
}
seconds=${FASTSAE_SANITIZE_SECONDS:-60}
for tool in memcheck racecheck synccheck; do check "$tool" "$seconds" fastsae cuda; done
check memcheck "$((2 * seconds))" "$("$python" -m bench.gpu_check --names)" triton "${FASTSAE_SANITIZE_EVERY:-5}"
exit $failed
