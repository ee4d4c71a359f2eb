// What decode.cpp and adam.cpp share: the checks of the sparse side, and its transposition.
#pragma once
#include "cpu/decode.h"
#include "fastsae.h"
#include "workspace.h"

namespace fastsae {

constexpr int64_t kHot = 1024;  // a feature with more slots is split over columns, for balance

int64_t check(const Slots& slots);           // kOk, or the status of the first bad entry of crow, then of indices
const DecodeKernels& pick_decode_kernels();  // those of the current level

// The transposed latents: a stable counting sort of the slots by feature.
struct FeatureMajor {
  int64_t* offsets;  // [features + 1]: feature f owns slots offsets[f] .. offsets[f + 1] - 1
  int32_t* rows;     // [n]
  void* values;      // [n] of type t

  static size_t bytes(const Slots& slots, Dtype t, int threads);  // of the workspace, some of it scratch
  FeatureMajor(const Slots& slots, Dtype t, const void* values, Workspace& space, int threads);

  bool has_slot(int64_t f) const { return offsets[f + 1] > offsets[f]; }
  bool hot(int64_t f) const { return offsets[f + 1] - offsets[f] > kHot; }

 private:
  static int64_t parts(const Slots& slots, int threads);
};

}  // namespace fastsae
