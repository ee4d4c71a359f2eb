// Adam and signum on one row: the loops. fastsae.h states the arithmetic.
//
// Cost: memory. A row of w, m and v comes in and goes out once (24 bytes an element), and what is read a second time, for a projection or a
// norm, is in the first-level cache. Stores are plain: the lines have just been read, so a store past the caches would save nothing.
#include "cpu/adam.h"

#include "integers.h"
#include "isa.h"

#ifndef FASTSAE_ONLY_SCREENS
#include "cpu/decode.h"
#include "vec.isa.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

FASTSAE_INLINE Vec load_n(const float* p, int n) { return n == kLanes ? load(p) : load_part(p, n); }
FASTSAE_INLINE void store_n(float* p, Vec a, int n) { n == kLanes ? store(p, a) : store_part(p, a, n); }

// Sums terms over a row; term(sum, i, n) adds those of n elements from i on.
template <class Term>
FASTSAE_INLINE float sum_row(int64_t size, const Term& term) {
  Vec total = zero();
  for (int64_t d = 0; d < size; d += kDotBlock) {
    Vec a[4] = {zero(), zero(), zero(), zero()};
    const int64_t end = at_most(d + kDotBlock, size);
    int64_t i = d;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes)
      for (int j = 0; j < 4; ++j) a[j] = term(a[j], i + j * kLanes, kLanes);
    for (int j = 0; i < end; i += kLanes, ++j) a[j] = term(a[j], i, static_cast<int>(at_most(kLanes, end - i)));
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

// What every element goes through, once its gradient stands.
template <Rule kRule>
struct Rates;

template <>
struct Rates<kAdam> {
  Vec factor, decay, lerp, beta2, fresh2, minus_s, e;
  bool from_m;

  FASTSAE_INLINE explicit Rates(const AdamJob& job)
      : factor(broadcast(job.factor)),
        decay(broadcast(job.decay)),
        lerp(broadcast(job.lerp)),
        beta2(broadcast(job.beta2)),
        fresh2(broadcast(job.fresh2)),
        minus_s(broadcast(job.minus_s)),
        e(broadcast(job.e)),
        from_m(job.from_m) {}

  // Stores the moments of n elements; returns their new weights.
  FASTSAE_INLINE Vec move(Vec gi, Vec wi, float* m, float* v, int n) const {
    Vec mi = load_n(m, n), vi = load_n(v, n);
    gi = mul(gi, factor);
    mi = fma(lerp, sub(gi, mi), from_m ? mi : gi);
    vi = fma(mul(fresh2, gi), gi, mul(beta2, vi));
    store_n(m, mi, n);
    store_n(v, vi, n);
    return fma(mi, div(minus_s, add(root(vi), e)), mul(wi, decay));
  }
};

// a + weight * (b - a), from the side that is nearer.
struct Blend {
  Vec weight;
  bool from_b;

  FASTSAE_INLINE explicit Blend(float s) : weight(broadcast(s)), from_b(!(__builtin_fabsf(s) < 0.5f)) {
    if (from_b) weight = broadcast(s - 1.0f);
  }
  FASTSAE_INLINE Vec operator()(Vec a, Vec b) const { return fma(weight, sub(b, a), from_b ? b : a); }
};

template <>
struct Rates<kSignum> {
  Vec lr;
  Blend to_x, average, to_y;

  FASTSAE_INLINE explicit Rates(const AdamJob& job) : lr(broadcast(job.lr)), to_x(job.to_x), average(job.average), to_y(job.to_y) {}

  FASTSAE_INLINE Vec move(Vec gi, Vec wi, float* z, float*, int n) const {
    Vec zi = load_n(z, n);
    const Vec x = to_x(wi, zi);
    zi = sub(zi, mul(lr, sign(gi)));
    store_n(z, zi, n);
    return to_y(average(x, zi), zi);
  }
};

enum Source { kNone, kGiven, kProjected };

// Returns the new |w|^2.
template <Rule kRule, Source kSource>
FASTSAE_INLINE float step_row(const AdamJob& job, const float* g, float* w, float* m, float* v, int64_t size) {
  const Rates<kRule> rates(job);
  const Vec minus_along = kSource == kProjected ? broadcast(-dot(g, w, size)) : zero();
  return sum_row(size, [&](Vec sum, int64_t i, int n) {
    Vec wi = load_n(w + i, n);
    Vec gi = kSource == kNone ? zero() : load_n(g + i, n);
    if (kSource == kProjected) gi = fma(minus_along, wi, gi);
    wi = rates.move(gi, wi, m + i, v + i, n);
    store_n(w + i, wi, n);
    wi = only(wi, n);
    return fma(wi, wi, sum);
  });
}

template <Rule kRule>
void step(const AdamJob& job, const float* g, float* w, float* m, float* v, int64_t size) {
  const float squares = g == nullptr   ? step_row<kRule, kNone>(job, g, w, m, v, size)
                        : !job.project ? step_row<kRule, kGiven>(job, g, w, m, v, size)
                                       : step_row<kRule, kProjected>(job, g, w, m, v, size);
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
    const int n = static_cast<int>(at_most(kLanes, size - i));
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

// ---- transposed ----

constexpr int kPartials = 4 * kLanes;  // elements d of a block with the same d mod kPartials share an accumulator of sum_row
constexpr int64_t kAhead = 4;          // rows of a transposed matrix, each on a page of its own

// body(f, n) for the features side by side, n of them at a time.
template <class Body>
FASTSAE_INLINE void across(int features, const Body& body) {
  int f = 0;
  for (; f + kLanes <= features; f += kLanes) body(f, kLanes);
  if (f < features) body(f, features - f);
}

// Sums over each feature what sum_row sums over its row, in the same order; term(d) returns what adds element d: add(sum, f, n).
template <class Term>
FASTSAE_INLINE void sum_columns(int64_t size, int features, float* parts, float* out, const Term& term) {
  float* const total = parts + kPartials * kAside;
  for (int i = 0; i < (kPartials + kLanes) * kAside; i += kLanes) store(parts + i, zero());
  for (int64_t d = 0; d < size; ++d) {
    float* const part = parts + d % kPartials * kAside;
    const auto add_to = term(d);
    across(features, [&](int f, int n) { store(part + f, add_to(load(static_cast<const float*>(part) + f), f, n)); });
    if ((d + 1) % kDotBlock != 0 && d + 1 != size) continue;
    for (int i = 0; i < kLanes * kAside; i += kLanes) {
      Vec a[4];
      for (int j = 0; j < 4; ++j) {
        float* const at = parts + j * kLanes * kAside + i;
        a[j] = load(static_cast<const float*>(at));
        store(at, zero());
      }
      store(total + i, add(load(static_cast<const float*>(total) + i), add(add(a[0], a[1]), add(a[2], a[3]))));
    }
  }
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half * kAside; i += kLanes)
      store(total + i, add(load(static_cast<const float*>(total) + i), load(static_cast<const float*>(total) + half * kAside + i)));
  for (int f = 0; f < kAside; f += kLanes) store(out + f, load(static_cast<const float*>(total) + f));
}

FASTSAE_INLINE void fetch_row(const float* p, int n) {
  for (int f = 0; f < n; f += kLanes) prefetch_far(p + f);
}

// minus_along[f] = -<g, w>; keeps w. (Here and below a job is taken by value: stores might change one that is pointed to.)
FASTSAE_INLINE void minus_dots(const AdamColumns c, float* minus_along) {
  sum_columns(c.size, c.n, c.scratch, minus_along, [=](int64_t d) {
    const float* const g = c.g + d * c.stride_g;
    const float* const w = c.w + d * c.stride;
    float* const local = c.local + d * kAside;
    fetch_row(w + kAhead * c.stride, c.n);
    return [=](Vec sum, int f, int n) {
      const Vec wi = load_n(w + f, n);
      store(local + f, wi);
      return fma(load_n(g + f, n), wi, sum);
    };
  });
  for (int f = 0; f < kAside; ++f) minus_along[f] = -minus_along[f];
}

// With kNormalise the weights stay in c.local, and `squares` are theirs.
template <Rule kRule, bool kProject, bool kNormalise>
FASTSAE_INLINE void move_columns(const AdamJob& job, const AdamColumns c, const float* minus_along, float* squares) {
  const Rates<kRule> rates(job);
  const auto row = [=](int64_t d) {
    const float* const g = c.g + d * c.stride_g;
    float* const w = c.w + d * c.stride;
    float* const m = c.m + d * c.stride;
    float* const v = c.v + d * c.stride;
    float* const local = c.local + d * kAside;
    if (!kProject) fetch_row(w + kAhead * c.stride, c.n);
    fetch_row(m + kAhead * c.stride, c.n);
    fetch_row(v + kAhead * c.stride, c.n);
    return [=](Vec sum, int f, int n) {
      const Vec wi = kProject ? load(static_cast<const float*>(local) + f) : load_n(static_cast<const float*>(w) + f, n);
      Vec gi = load_n(g + f, n);
      if (kProject) gi = both(fma(load(minus_along + f), wi, gi), load(c.touched + f));
      const Vec moved = rates.move(gi, wi, m + f, v + f, n);
      if (kNormalise)
        store(local + f, moved);
      else
        store_n(w + f, moved, n);
      return fma(moved, moved, sum);
    };
  };
  if (kNormalise) return sum_columns(c.size, c.n, c.scratch, squares, row);
  for (int64_t d = 0; d < c.size; ++d) {
    const auto element = row(d);
    across(c.n, [&](int f, int n) { element(zero(), f, n); });
  }
}

template <Rule kRule>
void step_columns(const AdamJob& job, const AdamColumns& c) {
  float* const minus_along = c.scratch + (kPartials + kLanes) * kAside;
  float* const scale = minus_along + kAside;
  if (job.project) minus_dots(c, minus_along);
  if (!job.normalise) return move_columns<kRule, true, false>(job, c, minus_along, scale);
  job.project ? move_columns<kRule, true, true>(job, c, minus_along, scale) : move_columns<kRule, false, true>(job, c, minus_along, scale);
  for (int f = 0; f < kAside; ++f) {
    const float norm = __builtin_sqrtf(scale[f]);
    scale[f] = norm < 1e-8f ? 1.0f : 1.0f / norm;
  }
  const float* const factor = scale;
  for (int64_t d = 0; d < c.size; ++d) {
    const float* const local = c.local + d * kAside;
    float* const w = c.w + d * c.stride;
    across(c.n, [=](int f, int n) { store_n(w + f, mul(load(local + f), load(factor + f)), n); });
  }
}

void squares_columns(const AdamColumns& given, bool project, float* each) {
  const AdamColumns c = given;
  float* const minus_along = c.scratch + (kPartials + kLanes) * kAside;
  float* const sums = minus_along + kAside;
  if (project) minus_dots(c, minus_along);
  const float* const along = minus_along;
  sum_columns(c.size, c.n, c.scratch, sums, [=](int64_t d) {
    const float* const g = c.g + d * c.stride_g;
    const float* const local = c.local + d * kAside;
    return [=](Vec sum, int f, int n) {
      Vec gi = load_n(g + f, n);
      if (project) gi = both(fma(load(along + f), load(local + f), gi), load(c.touched + f));
      return fma(gi, gi, sum);
    };
  });
  for (int f = 0; f < c.n; ++f) each[f] = sums[f];
}

}  // namespace

const AdamKernels adam_kernels = {
    {step<kAdam>, step<kSignum>},
    squares,
    {step_columns<kAdam>, step_columns<kSignum>},
    squares_columns,
};

}  // namespace FASTSAE_ISA
}  // namespace fastsae
#endif
