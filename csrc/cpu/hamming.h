// What hamming.cpp (baseline: panels, selection, threads) asks of hamming.isa.cpp (one body per instruction set).
#pragma once
#include <stdint.h>

#include "isa.h"

namespace fastsae {

constexpr int64_t kGroup = 16;    // codes that lie side by side in a packed panel
constexpr int64_t kCodeRows = 4;  // codes of a that meet each loaded group

// panel[group, t, lane] = half t (32 bits) of code 16 * group + lane; lanes beyond the last code are 0.
struct CodePanel {
  const int64_t* codes;
  int64_t stride, count, words;
  int32_t* panel;
};

// out[i * out_stride + j] = bits that differ between row i of a and code j of the panel, i < rows, j < codes
struct DistanceJob {
  const int64_t* a;
  int64_t stride, rows, words;
  const int32_t* panel;
  int64_t codes;
  int32_t* out;
  int64_t out_stride;
  bool stream;  // rows of out are aligned to 64 bytes and out is larger than the caches: write past them
};

struct HammingKernels {
  void (*pack)(const CodePanel&);
  void (*distances)(const DistanceJob&);
  void (*distances_vpopcnt)(const DistanceJob&);  // null, or what is faster where the CPU has AVX512_VPOPCNTDQ
  // The positions i < n with distances[i] < limit, ascending, and their number; `found` holds n.
  int64_t (*below)(const int32_t* distances, int64_t n, int32_t limit, int32_t* found);
};

FASTSAE_DECLARE_TABLES(HammingKernels, hamming_kernels)

}  // namespace fastsae
