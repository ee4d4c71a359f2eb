// The order of a top-k, exact: a key a score, ascending from the best; equal scores have equal keys and go by their features, all NaN have
// one key below all others. Baseline code.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>

#include "fastsae.h"

namespace fastsae {

inline uint32_t key_of(float score) {
  if (score != score) return 0;
  const uint32_t bits = std::bit_cast<uint32_t>(score + 0.0f);  // -0 to +0
  return (bits & 0x80000000u) != 0 ? bits : 0x7fffffffu - bits;  // inf (0x7f800000) is 0x7fffff, so 0 is free for NaN
}
inline float score_of(uint32_t key) {
  if (key == 0) return std::nanf("");
  return std::bit_cast<float>((key & 0x80000000u) != 0 ? key : 0x7fffffffu - key);
}
inline uint64_t entry(float score, int64_t feature) { return (uint64_t{key_of(score)} << 32) | static_cast<uint64_t>(feature); }

struct TopkOutput {
  int64_t k;
  bool relu;
  float* values;
  int64_t* indices;
  const int32_t* list = nullptr;
  bool absolute = false;  // entries number 2 * feature + (1 where the score is negative)

  // The k best of n entries (all different) to the output row.
  void select(int64_t row, uint64_t* entries, int64_t n) const {
    if (k < n) std::nth_element(entries, entries + k, entries + n);
    std::sort(entries, entries + k);
    write(row, entries);
  }
  void write(int64_t row, const uint64_t* entries) const {
    for (int64_t i = 0; i < k; ++i) {
      float score = score_of(static_cast<uint32_t>(entries[i] >> 32));
      int64_t feature = static_cast<int64_t>(entries[i] & 0xffffffffu);
      if (absolute) {
        if ((feature & 1) != 0) score = -score;
        feature /= 2;
      }
      values[row * k + i] = relu && score < 0 ? 0.0f : score;
      indices[row * k + i] = list != nullptr ? list[feature] : feature;
    }
  }
};

}  // namespace fastsae
