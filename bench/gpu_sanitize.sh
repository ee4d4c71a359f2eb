#!/usr/bin/env bash
# The CUDA C++ rows on a GPU under compute-sanitizer: memcheck, racecheck, synccheck. Usage: bench/gpu_sanitize.sh [folder for logs]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu}
mkdir -p "$out"
python=${PYTHON:-python3}
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2> /dev/null)
if [ -z "$sanitizer" ]; then
  echo "gpu_sanitize.sh: compute-sanitizer was not found: nothing was checked" >&2
  exit 2
fi
failed=0
# Without torch's caching allocator every tensor is an allocation of its own, so that an access beyond it shows.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck synccheck; do
  "$sanitizer" --tool "$tool" --error-exitcode 9 --target-processes all "$python" -m bench.gpu_check > "$out/$tool.log" 2>&1
  code=$?
  tail -n 3 "$out/$tool.log"
  [ $code -eq 0 ] || { echo "$tool: exit code $code ($out/$tool.log)"; failed=1; }
done
exit $failed
