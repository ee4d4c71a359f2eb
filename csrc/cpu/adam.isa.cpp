// Adam on one row: the loops. fastsae.h states the arithmetic.
//
// Cost: memory. A row of w, m and v comes in and goes out once (24 bytes an element), and what is read a second time, for a projection or a
// norm, is in the first-level cache. Stores are plain: the lines have just been read, so a store past the caches would save nothing.
#include "cpu/adam.h"

#include "isa.h"

#ifndef FASTSAE_SCREENS
#include "cpu/decode.h"
#include "vec.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

FASTSAE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FASTSAE_INLINE Vec load_n(const float* p, int n) { return n == kLanes ? load(p) : load_part(p, n); }
FASTSAE_INLINE void store_n(float* p, Vec a, int n) { n == kLanes ? store(p, a) : store_part(p, a, n); }

// Sums terms over a row; term(sum, i, n) adds those of n elements from i on.
template <class Term>
FASTSAE_INLINE float sum_row(int64_t size, const Term& term) {
  Vec total = zero();
  for (int64_t d = 0; d < size; d += kDotBlock) {
    Vec a[4] = {zero(), zero(), zero(), zero()};
    const int64_t end = least(d + kDotBlock, size);
    int64_t i = d;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes)
      for (int j = 0; j < 4; ++j) a[j] = term(a[j], i + j * kLanes, kLanes);
    for (int j = 0; i < end; i += kLanes, ++j) a[j] = term(a[j], i, static_cast<int>(least(kLanes, end - i)));
    total = add(total, add(add(a[0], a[1]), add(a[2], a[3])));
  }
  return reduce(total);
}

FASTSAE_INLINE float dot(const float* a, const float* b, int64_t size) {
  return sum_row(size, [&](Vec sum, int64_t i, int n) { return fma(load_n(a + i, n), load_n(b + i, n), sum); });
}

// The first n lanes, then zeros: what is computed beyond a row may be NaN.
FASTSAE_INLINE Vec only(Vec a, int n) {
  if (n == kLanes) return a;
  float kept[kLanes];
  store(static_cast<float*>(kept), a);
  return load_part(static_cast<const float*>(kept), n);
}

enum Source { kNone, kGiven, kProjected };

// Returns the new |w|^2.
template <Source kSource>
FASTSAE_INLINE float step_row(const AdamJob& job, const float* g, float* w, float* m, float* v, int64_t size) {
  const Vec factor = broadcast(job.factor), decay = broadcast(job.decay), lerp = broadcast(job.lerp), beta2 = broadcast(job.beta2),
            fresh2 = broadcast(job.fresh2), minus_s = broadcast(job.minus_s), e = broadcast(job.e);
  const Vec minus_along = kSource == kProjected ? broadcast(-dot(g, w, size)) : zero();
  return sum_row(size, [&](Vec sum, int64_t i, int n) {
    Vec wi = load_n(w + i, n), mi = load_n(m + i, n), vi = load_n(v + i, n);
    Vec gi = kSource == kNone ? zero() : load_n(g + i, n);
    if (kSource == kProjected) gi = fma(minus_along, wi, gi);
    gi = mul(gi, factor);
    mi = fma(lerp, sub(gi, mi), job.from_m ? mi : gi);
    vi = fma(mul(fresh2, gi), gi, mul(beta2, vi));
    wi = fma(mi, div(minus_s, add(root(vi), e)), mul(wi, decay));
    store_n(m + i, mi, n);
    store_n(v + i, vi, n);
    store_n(w + i, wi, n);
    wi = only(wi, n);
    return fma(wi, wi, sum);
  });
}

void step(const AdamJob& job, const float* g, float* w, float* m, float* v, int64_t size) {
  const float squares = g == nullptr   ? step_row<kNone>(job, g, w, m, v, size)
                        : !job.project ? step_row<kGiven>(job, g, w, m, v, size)
                                       : step_row<kProjected>(job, g, w, m, v, size);
  if (!job.normalise) return;
  // Memory would idle while the row is scaled in the cache: let the next one come in meanwhile.
  for (int64_t i = size; i < 2 * size; i += kLanes) {
    prefetch_far(w + i);
    prefetch_far(m + i);
    prefetch_far(v + i);
  }
  const float norm = __builtin_sqrtf(squares);
  if (norm < 1e-8f) return;
  const Vec scale = broadcast(1.0f / norm);
  for (int64_t i = 0; i < size; i += kLanes) {
    const int n = static_cast<int>(least(kLanes, size - i));
    store_n(w + i, mul(load_n(w + i, n), scale), n);
  }
}

float squares(const float* g, const float* w, int64_t size) {
  if (w == nullptr) return dot(g, g, size);
  const Vec minus_along = broadcast(-dot(g, w, size));
  return sum_row(size, [&](Vec sum, int64_t i, int n) {
    const Vec gi = only(fma(minus_along, load_n(w + i, n), load_n(g + i, n)), n);
    return fma(gi, gi, sum);
  });
}

}  // namespace

extern const AdamKernels adam_kernels;
const AdamKernels adam_kernels = {step, squares};

}  // namespace FASTSAE_ISA
}  // namespace fastsae
#endif
