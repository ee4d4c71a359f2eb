// Rows in their working form, as LoadJob of kernels.h says. Every level.
#pragma once
#include "cpu/engine/kernels.h"
#include "vec.isa.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

// The order of a score's sum.
FASTSAE_INLINE float sum_of_squares(const float* v, int64_t d) {
  Vec total = zero();
  for (int64_t d0 = 0; d0 < d; d0 += kScoreBlock) {
    const int64_t end = at_most(d0 + kScoreBlock, d);
    Vec part = zero();
    int64_t i = d0;
    for (; i + kLanes <= end; i += kLanes) part = fma(load(v + i), load(v + i), part);
    if (i < end) {
      const Vec last = load_part(v + i, static_cast<int>(end - i));
      part = fma(last, last, part);
    }
    total = d0 == 0 ? part : add(total, part);
  }
  return reduce(total);
}

// Rows of a transposed matrix often lie a multiple of a page apart, so their lines compete for the same few places in every cache: they are
// copied row by row, never more than a few rows ahead, to a small block that is transposed from there.
template <class T>
void load_columns(const LoadJob& job) {
  constexpr int64_t kWide = 256, kStride = kWide + 16, kAhead = 4;
  alignas(64) float block[kLanes * kStride];
  const T* const from = static_cast<const T*>(job.from);
  for (int64_t f0 = 0; f0 < job.rows; f0 += kWide) {
    const int64_t width = at_most(kWide, job.rows - f0);
    const auto line = [&](int64_t d) { return from + d * job.stride_d + job.first + f0; };
    for (int64_t d0 = 0; d0 < job.padded; d0 += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        float* const to = block + i * kStride;
        const int64_t d = d0 + i;
        if (d >= job.d) {
          for (int64_t f = 0; f < width; f += kLanes) store(to + f, zero());
          continue;
        }
        if (job.list != nullptr) {
          for (int64_t f = 0; f < width; ++f) to[f] = widen(from[d * job.stride_d + job.list[job.first + f0 + f]]);
          continue;
        }
        if (d + kAhead < job.d)
          for (int64_t f = 0; f < width; f += kLanes) prefetch(line(d + kAhead) + f);
        int64_t f = 0;
        for (; f + kLanes <= width; f += kLanes) store(to + f, load(line(d) + f));
        if (f < width) store(to + f, load_part(line(d) + f, static_cast<int>(width - f)));
      }
      for (int64_t f = 0; f < width; f += kLanes) {
        Vec v[kLanes];
        for (int i = 0; i < kLanes; ++i) v[i] = load(static_cast<const float*>(block) + i * kStride + f);
        transpose(v);
        const int64_t n = at_most(kLanes, width - f);
        for (int64_t i = 0; i < n; ++i) store(job.to + (f0 + f + i) * job.stride + d0, v[i]);
      }
    }
  }
}

template <class T>
void load_rows(const LoadJob& job) {
  const T* const from = static_cast<const T*>(job.from);
  for (int64_t r = 0; r < job.rows; ++r) {
    const T* const row = from + (job.list != nullptr ? job.list[job.first + r] : job.first + r) * job.stride_row;
    float* const to = job.to + r * job.stride;
    int64_t d = 0;
    if (job.stride_d == 1) {
      for (; d + kLanes <= job.d; d += kLanes) store(to + d, load(row + d));
      if (d < job.d) store(to + d, load_part(row + d, static_cast<int>(job.d - d)));  // padded is a multiple of kLanes
    } else {
      for (; d < job.d; ++d) to[d] = widen(row[d * job.stride_d]);
    }
    for (d = job.d; d < job.padded; ++d) to[d] = 0;
  }
}

template <class T>
void load_as(const LoadJob& job) {
  if (job.stride_row == 1 && job.stride_d != 1 && job.rows > 1)
    load_columns<T>(job);
  else
    load_rows<T>(job);
  for (int64_t r = 0; r < job.rows; ++r) {
    float* const to = job.to + r * job.stride;
    if (job.subtract != nullptr)
      for (int64_t d = 0; d < job.d; ++d) to[d] = to[d] - job.subtract[d];
    if (job.eps > 0) {
      float squares = sum_of_squares(to, job.d), unit = 1;
      if (!(squares >= 0x1p-80f && squares <= 0x1p126f)) {  // squares that are lost or infinite: by a power of two of the largest element
        float largest = 0;
        for (int64_t d = 0; d < job.d; ++d) {
          const float size = __builtin_fabsf(to[d]);
          largest = size > largest ? size : largest;
        }
        const uint32_t exponent = as_bits(largest) >> 23;
        if (exponent > 0 && exponent < 255) {  // a normal number
          unit = as_float((exponent < 254 ? 254 - exponent : 1) << 23);
          for (int64_t d = 0; d < job.d; ++d) to[d] = to[d] * unit;
          squares = sum_of_squares(to, job.d);
        }
      }
      const float norm = root(squares), least = job.eps * unit;  // both times `unit`
      const float divisor = norm < least ? least : norm;         // NaN stays NaN
      for (int64_t d = 0; d < job.d; ++d) to[d] = to[d] / divisor;
    }
  }
}

void load_job(const LoadJob& job) {
  with_type(job.t, [&](auto type) { load_as<decltype(type)>(job); });
}

}  // namespace
}  // namespace FASTSAE_ISA
}  // namespace fastsae
