// What adam.cpp (baseline: sorting, threads) asks of adam.isa.cpp (one body per instruction set).
#pragma once
#include <stdint.h>

namespace fastsae {

// The numbers of one step, as fastsae.h names them.
struct AdamJob {
  float factor, decay;
  float lerp;           // m = base + lerp * (g - m)
  bool from_m;          // base is m, otherwise g
  float beta2, fresh2;  // fresh2 = 1 - beta2
  float minus_s, e;
  bool project, normalise;
};

struct AdamKernels {
  // One row of n elements; g is null where the feature has no slots.
  void (*step)(const AdamJob&, const float* g, float* w, float* m, float* v, int64_t n);
  // |g|^2, of g without its component along w where w is given
  float (*squares)(const float* g, const float* w, int64_t n);
};

namespace portable {
extern const AdamKernels adam_kernels;
}
namespace avx2 {
extern const AdamKernels adam_kernels;
}
namespace avx512 {
extern const AdamKernels adam_kernels;
}

}  // namespace fastsae
