// Exact products of rows and features, in the order of a score (fastsae.h). Every level.
#pragma once
#include "cpu/engine/kernels.h"
#include "vec.isa.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

#if defined(__AVX512F__) || defined(FASTSAE_NEON)
constexpr int kDotRows = 4, kDotFeatures = 4;
#elif defined(__AVX2__)
constexpr int kDotRows = 4, kDotFeatures = 3;
#else
constexpr int kDotRows = 2, kDotFeatures = 2;
#endif

#if defined(FASTSAE_PARTS)

// The lanes of one register at a time: their accumulators fit the registers, those of all lanes would not.
template <int R, int C, int kPart>
FASTSAE_INLINE void dot_part(const float* const* x, const float* const* w, int64_t from, int64_t end, Vec (&total)[R * C]) {
  constexpr int kWidth = kLanes / kParts;
  Part sum[R * C];
  Vec none = zero();
#pragma GCC unroll 16
  for (int a = 0; a < R * C; ++a) sum[a] = part(none, kPart);
  for (int64_t i = from + kWidth * kPart; i + kWidth <= end; i += kLanes) {
    Part wv[C];
#pragma GCC unroll 4
    for (int b = 0; b < C; ++b) wv[b] = load_one(w[b] + i);
#pragma GCC unroll 4
    for (int a = 0; a < R; ++a) {
      const Part xv = load_one(x[a] + i);
#pragma GCC unroll 4
      for (int b = 0; b < C; ++b) sum[a * C + b] = fma_one(xv, wv[b], sum[a * C + b]);
    }
  }
  for (int a = 0; a < R * C; ++a) part(total[a], kPart) = sum[a];
  if constexpr (kPart + 1 < kParts) dot_part<R, C, kPart + 1>(x, w, from, end, total);
}

template <int R, int C>
FASTSAE_INLINE void dot_block(const float* const* x, const float* const* w, int64_t from, int64_t end, Vec (&sum)[R * C]) {
  dot_part<R, C, 0>(x, w, from, from + (end - from) / kLanes * kLanes, sum);
}

#else

template <int R, int C>
FASTSAE_INLINE void dot_block(const float* const* x, const float* const* w, int64_t from, int64_t end, Vec (&sum)[R * C]) {
#pragma GCC unroll 16
  for (int a = 0; a < R * C; ++a) sum[a] = zero();
  for (int64_t i = from; i + kLanes <= end; i += kLanes) {
    Vec wv[C];
#pragma GCC unroll 4
    for (int b = 0; b < C; ++b) wv[b] = load(w[b] + i);
#pragma GCC unroll 4
    for (int a = 0; a < R; ++a) {
      const Vec xv = load(x[a] + i);
#pragma GCC unroll 4
      for (int b = 0; b < C; ++b) sum[a * C + b] = fma(xv, wv[b], sum[a * C + b]);
    }
  }
}

#endif

// R x C products at a time, each with its own accumulator of 16 lanes.
template <int R, int C>
FASTSAE_INLINE void dot_tile(const float* const* x, const float* const* w, int64_t d, Vec (&sum)[R * C]) {
  Vec total[R * C];
  int64_t i = 0;
  do {
    const int64_t end = at_most(i + kScoreBlock, d);
    const bool first = i == 0;
    dot_block<R, C>(x, w, i, end, sum);
    i += (end - i) / kLanes * kLanes;
    if (i < end) {
      const int n = static_cast<int>(end - i);
      for (int a = 0; a < R; ++a)
        for (int b = 0; b < C; ++b) sum[a * C + b] = fma(load_part(x[a] + i, n), load_part(w[b] + i, n), sum[a * C + b]);
      i = end;
    }
    if (first && i < d)
      for (int a = 0; a < R * C; ++a) total[a] = sum[a];
    else if (!first)
      for (int a = 0; a < R * C; ++a) sum[a] = total[a] = add(total[a], sum[a]);
  } while (i < d);
}

// Sixteen sums at once, in the order of reduce(): lanes fold 8, 4, 2, 1.
FASTSAE_INLINE Vec reduce16(Vec (&v)[16]) {
#if defined(__AVX512F__)
  __m512 a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i) {
    const __m512 x = v[2 * i].x, y = v[2 * i + 1].x;
    a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 x = a[2 * i], y = a[2 * i + 1];
    b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
  }
  for (int i = 0; i < 2; ++i) {
    const __m512 x = b[2 * i], y = b[2 * i + 1];
    c[i] = _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xee));
  }
  const __m512 d = _mm512_add_ps(_mm512_shuffle_ps(c[0], c[1], 0x88), _mm512_shuffle_ps(c[0], c[1], 0xdd));
  return {_mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), d)};
#else
  transpose(v);
  for (int n = 8; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) v[i] = add(v[i], v[i + n]);
  return v[0];
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// Four sums at once, in the same order.
FASTSAE_INLINE void reduce4(const Vec* v, float* out) {
  __m256 s[4];
  for (int i = 0; i < 4; ++i) s[i] = _mm256_add_ps(v[i].lo, v[i].hi);
  const auto fold4 = [](__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  };
  const __m256 a = fold4(s[0], s[1]), b = fold4(s[2], s[3]);
  const __m256 c = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  const __m256 d = _mm256_add_ps(_mm256_shuffle_ps(c, c, 0x88), _mm256_shuffle_ps(c, c, 0xdd));
  _mm_storeu_ps(out, _mm_unpacklo_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1)));
}
#endif

template <int R, int C>
FASTSAE_INLINE void store_tile(Vec (&sum)[R * C], float* out, int64_t ld) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (R * C % 4 == 0) {
    float flat[R * C];
    for (int i = 0; i < R * C; i += 4) reduce4(sum + i, flat + i);
    for (int a = 0; a < R; ++a)
      for (int b = 0; b < C; ++b) out[a * ld + b] = flat[a * C + b];
    return;
  }
#endif
  if constexpr (R * C == 16) {
    float flat[16];
    store(static_cast<float*>(flat), reduce16(sum));
    for (int a = 0; a < R; ++a)
      for (int b = 0; b < C; ++b) out[a * ld + b] = flat[a * C + b];
  } else {
    for (int a = 0; a < R; ++a)
      for (int b = 0; b < C; ++b) out[a * ld + b] = reduce(sum[a * C + b]);
  }
}

template <int R>
void products_of(const float* const* x, const float* const* w, int64_t features, int64_t d, float* out, int64_t ld) {
  int64_t f = 0;
  for (; f + kDotFeatures <= features; f += kDotFeatures) {
    Vec sum[R * kDotFeatures];
    dot_tile<R, kDotFeatures>(x, w + f, d, sum);
    store_tile<R, kDotFeatures>(sum, out + f, ld);
  }
  for (; f < features; ++f) {
    Vec sum[R];
    dot_tile<R, 1>(x, w + f, d, sum);
    store_tile<R, 1>(sum, out + f, ld);
  }
}

void products(const float* const* x, int64_t rows, const float* const* w, int64_t features, int64_t d, float* out, int64_t ld) {
  if (d == 0) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t f = 0; f < features; ++f) out[r * ld + f] = 0;
    return;
  }
  int64_t r = 0;
  for (; r + kDotRows <= rows; r += kDotRows) products_of<kDotRows>(x + r, w, features, d, out + r * ld, ld);
  for (; r < rows; ++r) products_of<1>(x + r, w, features, d, out + r * ld, ld);
}

// The sixteen lanes of a score are sixteen rows of accumulators here, a float a feature: the same additions in the same order. W is read
// along its rows, a few at a time so that an accumulator is loaded and stored once for them.
template <int N>
FASTSAE_INLINE void add_rows(const ColumnsJob& job, int64_t d, float* const* sums) {
  for (int64_t f = 0; f < job.features; f += kLanes) {
    const int64_t left = job.features - f;
    Vec w[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const float* const from = job.w + (d + i) * job.stride_d + f;
      w[i] = left >= kLanes ? load(from) : load_part(from, static_cast<int>(left));
    }
    for (int r = 0; r < job.rows; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        float* const at = sums[r] + ((d + i) % kLanes) * job.ld + f;
        store(at, fma(broadcast(job.x[r][d + i]), w[i], load(static_cast<const float*>(at))));
      }
  }
}

void column_products(const ColumnsJob& job) {
  const int64_t size = kLanes * job.ld, width = round_to(job.features, kLanes);
  float* sums[kColumnRows];
  for (int r = 0; r < job.rows; ++r) sums[r] = job.sums + r * size;
  for (int64_t d0 = 0; d0 < job.d; d0 += kScoreBlock) {
    const int64_t end = at_most(d0 + kScoreBlock, job.d);
    for (int64_t i = 0; i < job.rows * size; i += kLanes) store(job.sums + i, zero());
    int64_t d = d0;
    for (; d + 4 <= end; d += 4) add_rows<4>(job, d, sums);
    for (; d < end; ++d) add_rows<1>(job, d, sums);
    if (job.d <= kScoreBlock) break;
    for (int64_t i = 0; i < job.rows * size; i += kLanes) {
      const Vec part = load(static_cast<const float*>(job.sums) + i);
      store(job.totals + i, d0 == 0 ? part : add(load(static_cast<const float*>(job.totals) + i), part));
    }
  }
  const float* const totals = job.d <= kScoreBlock ? job.sums : job.totals;
  for (int64_t r = 0; r < job.rows; ++r)
    for (int64_t f = 0; f < width; f += kLanes) {
      Vec sum[kLanes];
      for (int l = 0; l < kLanes; ++l) sum[l] = load(totals + r * size + l * job.ld + f);
      for (int n = kLanes / 2; n > 0; n /= 2)
        for (int l = 0; l < n; ++l) sum[l] = add(sum[l], sum[l + n]);
      store(job.out + r * job.ld + f, sum[0]);
    }
}

}  // namespace
}  // namespace FASTSAE_ISA
}  // namespace fastsae
