// What adam.cpp (baseline: sorting, threads) asks of adam.isa.cpp (one body per instruction set).
#pragma once
#include <stdint.h>

#include "isa.h"

namespace fastsae {

enum Rule { kAdam, kSignum, kRules };

// The numbers of one step, as fastsae.h names them.
struct AdamJob {
  Rule rule;
  float factor;
  bool project, normalise;
  // kAdam
  float decay;
  float lerp;           // m = base + lerp * (g - m)
  bool from_m;          // base is m, otherwise g
  float beta2, fresh2;  // fresh2 = 1 - beta2
  float minus_s, e;
  // kSignum: m is z, v is not used
  float lr, to_x, average, to_y;  // of z in: x = lerp(y, z, to_x), lerp(x, z, average), y = lerp(x, z, to_y)
};

// Transposed matrices, with `project` or `normalise`: n <= kAside features side by side, element d of feature f at w[d * stride + f], d <
// size. Rows of a matrix may lie a power of two apart, where a cache holds few of them: what is read twice is kept in `local`.
constexpr int64_t kAside = 128;  // a multiple of 16
struct AdamColumns {
  const float* g;
  int64_t stride_g;
  float *w, *m, *v;
  int64_t stride;
  int n;
  int64_t size;
  const float* touched;  // [kAside], all bits set, or none where a feature has no slots and is not projected
  float* scratch;        // [kColumnScratch]
  float* local;          // [size, kAside]
};
constexpr int64_t kColumnScratch = 82 * kAside;  // 64 partial sums, 16 lanes of totals, two results

struct AdamKernels {
  // One row of n elements, or n elements side by side of rows that do not matter; g is null where there are no slots.
  void (*step[kRules])(const AdamJob&, const float* g, float* w, float* m, float* v, int64_t n);
  // |g|^2, of g without its component along w where w is given
  float (*squares)(const float* g, const float* w, int64_t n);
  // The same on columns, to the same bits; the squares of each feature into each[f].
  void (*step_columns[kRules])(const AdamJob&, const AdamColumns&);
  void (*squares_columns)(const AdamColumns&, bool project, float* each);
};

FASTSAE_DECLARE_TABLES(AdamKernels, adam_kernels)

}  // namespace fastsae
