#!/usr/bin/env bash
# Builds csrc/ with AddressSanitizer and UBSan, one object a level as setup.py does, and runs driver.cpp. Usage: tests/native/sanitize.sh [build folder]
# CXX, ARCH, CHECKS and RUN name another compiler, its CPU, what is built in place of the sanitizers, and what runs the driver.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-build/sanitize}
mkdir -p "$out"
cxx=${CXX:-g++}
flags="-std=c++20 -O1 ${CHECKS:--g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer} -ffp-contract=off -Icsrc -Wno-psabi -Wno-maybe-uninitialized"
built=""
arch=${ARCH:-$(uname -m)}
if [ "$arch" = x86_64 ]; then
  avx2="-mavx2 -mfma -mf16c"
  avx512="$avx2 -mavx512f -mavx512bw -mavx512dq -mavx512vl"
  levels=(portable avx2 avx512 avx512_vnni avx512_bf16)
  level_flags=("" "$avx2" "$avx512" "$avx512 -mavx512vnni" "$avx512 -mavx512vnni -mavx512bf16")
elif [ "$arch" = aarch64 ]; then
  levels=(portable neon neon_dotprod neon_i8mm)
  level_flags=("" "" "-march=armv8.2-a+dotprod" "-march=armv8.2-a+dotprod+i8mm")
else
  levels=(portable)
  level_flags=("")
fi
objects=()
for i in "${!levels[@]}"; do
  level=${levels[$i]}
  built="$built -DFASTSAE_BUILT_$level=1"
  for source in $(find csrc -name "*.isa.cpp"); do
    object=$out/$(basename "$source" .cpp).$level.o
    # shellcheck disable=SC2086 # flags are lists of words
    $cxx $flags ${level_flags[$i]} -DFASTSAE_ISA="$level" -DFASTSAE_LEVEL_"$level"=1 -c "$source" -o "$object" &
    objects+=("$object")
    if [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; then wait -n; fi
  done
done
for job in $(jobs -p); do wait "$job"; done
baseline=$(find csrc -name '*.cpp' ! -name '*.isa.cpp' ! -name bind.cpp)
# -fopenmp: the driver has no torch that brings an OpenMP runtime.
# shellcheck disable=SC2086
$cxx $flags $built -fopenmp $baseline tests/native/driver.cpp "${objects[@]}" -Wl,--no-as-needed -lgomp -ldl -o "$out/driver"
${RUN:-} "$out/driver"
