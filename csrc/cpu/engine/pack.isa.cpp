// Rows in their working form, exact scores (every level), and packing for the screen (levels that can). kernels.h states the jobs,
// fastsae.h the order of a score's sum, tile.isa.h the bound.
#include "cpu/engine/kernels.h"
#include "isa.h"
#include "vec.isa.h"
#ifdef FASTSAE_SCREENS
#include "cpu/engine/tile.isa.h"
#endif

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

FASTSAE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- rows in their working form ----

FASTSAE_INLINE float square_root(float x) {
#if defined(__AVX2__)
  return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x)));
#else
  return __builtin_sqrtf(x);
#endif
}

// The order of a score's sum.
FASTSAE_INLINE float sum_of_squares(const float* v, int64_t d) {
  Vec total = zero();
  for (int64_t d0 = 0; d0 < d; d0 += kScoreBlock) {
    const int64_t end = least(d0 + kScoreBlock, d);
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
    const int64_t width = least(kWide, job.rows - f0);
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
        const int64_t n = least(kLanes, width - f);
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
      const float norm = square_root(squares), least = job.eps * unit;  // both times `unit`
      const float divisor = norm < least ? least : norm;                // NaN stays NaN
      for (int64_t d = 0; d < job.d; ++d) to[d] = to[d] / divisor;
    }
  }
}

void load_job(const LoadJob& job) {
  if (job.t == Dtype::f32)
    load_as<float>(job);
  else if (job.t == Dtype::bf16)
    load_as<bf16>(job);
  else
    load_as<f16>(job);
}

// ---- exact scores ----

#if defined(__AVX512F__)
constexpr int kDotRows = 4, kDotFeatures = 4;
#elif defined(__AVX2__)
constexpr int kDotRows = 4, kDotFeatures = 3;
#else
constexpr int kDotRows = 2, kDotFeatures = 2;
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)

// Half of the lanes at a time: their accumulators fit the sixteen registers, those of both halves would not.
template <int R, int C, int kHalf>
FASTSAE_INLINE void dot_half(const float* const* x, const float* const* w, int64_t from, int64_t end, __m256 (&sum)[R * C]) {
#pragma GCC unroll 12
  for (int a = 0; a < R * C; ++a) sum[a] = _mm256_setzero_ps();
  for (int64_t i = from + 8 * kHalf; i + 8 <= end; i += kLanes) {
    __m256 wv[C];
#pragma GCC unroll 3
    for (int b = 0; b < C; ++b) wv[b] = _mm256_loadu_ps(w[b] + i);
#pragma GCC unroll 4
    for (int a = 0; a < R; ++a) {
      const __m256 xv = _mm256_loadu_ps(x[a] + i);
#pragma GCC unroll 3
      for (int b = 0; b < C; ++b) sum[a * C + b] = _mm256_fmadd_ps(xv, wv[b], sum[a * C + b]);
    }
  }
}

template <int R, int C>
FASTSAE_INLINE void dot_block(const float* const* x, const float* const* w, int64_t from, int64_t end, Vec (&sum)[R * C]) {
  __m256 half[R * C];
  const int64_t whole = from + (end - from) / kLanes * kLanes;
  dot_half<R, C, 0>(x, w, from, whole, half);
  for (int a = 0; a < R * C; ++a) sum[a].lo = half[a];
  dot_half<R, C, 1>(x, w, from, whole, half);
  for (int a = 0; a < R * C; ++a) sum[a].hi = half[a];
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
    const int64_t end = least(i + kScoreBlock, d);
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
  const int64_t size = kLanes * job.ld, width = (job.features + kLanes - 1) / kLanes * kLanes;
  float* sums[kColumnRows];
  for (int r = 0; r < job.rows; ++r) sums[r] = job.sums + r * size;
  for (int64_t d0 = 0; d0 < job.d; d0 += kScoreBlock) {
    const int64_t end = least(d0 + kScoreBlock, job.d);
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

#ifdef FASTSAE_SCREENS

// ---- packing ----

FASTSAE_INLINE __m512 signed_(__m512 v, const uint32_t* signs) {
  return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(v), _mm512_loadu_si512(signs)));
}

// An unnormalised Hadamard transform of the 16 lanes: swapped partners, plus or minus the lane itself.
FASTSAE_INLINE __m512 mix_lanes(__m512 v) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const auto stage = [&](__m512 swapped, __mmask16 second) {
    return _mm512_fmadd_ps(v, _mm512_mask_sub_ps(one, second, _mm512_setzero_ps(), one), swapped);
  };
  v = stage(_mm512_permute_ps(v, 0xb1), 0xaaaa);
  v = stage(_mm512_permute_ps(v, 0x4e), 0xcccc);
  v = stage(_mm512_shuffle_f32x4(v, v, 0xb1), 0xf0f0);
  return stage(_mm512_shuffle_f32x4(v, v, 0x4e), 0xff00);
}

struct Sums {
  __m512 squares, largest;
};

// y = the rotated row, in blocks of 16 V elements; adds the squares of v, and the largest magnitude of y.
template <class T, int V>
FASTSAE_INLINE void rotate_blocks(const T* v, int64_t d, const uint32_t* signs, float* y, Sums& sums) {
  for (int64_t d0 = 0; d0 < d; d0 += 16 * V) {
    __m512 r[V];
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) {
      const int64_t at = d0 + 16 * i;
      const __m512 x = at + 16 <= d ? load(v + at).x : at < d ? load_part(v + at, static_cast<int>(d - at)).x : _mm512_setzero_ps();
      sums.squares = _mm512_fmadd_ps(x, x, sums.squares);
      r[i] = mix_lanes(signed_(x, signs + at));
    }
#pragma GCC unroll 4
    for (int half = 1; half < V; half *= 2)
#pragma GCC unroll 16
      for (int i = 0; i < V; ++i)
        if ((i & half) == 0) {
          const __m512 a = r[i], b = r[i + half];
          r[i] = _mm512_add_ps(a, b);
          r[i + half] = _mm512_sub_ps(a, b);
        }
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) {
      _mm512_storeu_ps(y + d0 + 16 * i, r[i]);
      sums.largest = _mm512_max_ps(sums.largest, _mm512_abs_ps(r[i]));
    }
  }
}

template <class T>
FASTSAE_INLINE Sums rotate(const T* v, int64_t d, int rotation, const uint32_t* signs, float* y) {
  Sums sums{_mm512_setzero_ps(), _mm512_setzero_ps()};
  if (rotation == 256) {
    rotate_blocks<T, 16>(v, d, signs, y, sums);
  } else if (rotation == 64) {
    rotate_blocks<T, 4>(v, d, signs, y, sums);
  } else if (rotation == 16) {
    rotate_blocks<T, 1>(v, d, signs, y, sums);
  } else {
    for (int64_t i = 0; i < d; i += 16) {
      const __m512 x = i + 16 <= d ? load(v + i).x : load_part(v + i, static_cast<int>(d - i)).x;
      sums.squares = _mm512_fmadd_ps(x, x, sums.squares);
      sums.largest = _mm512_max_ps(sums.largest, _mm512_abs_ps(x));
      _mm512_storeu_ps(y + i, x);
    }
  }
  return sums;
}

struct Rounded {
  float norm, loss, step;  // step: value of one integer step, of the rotated row
  bool usable;
};

constexpr float kTinyNorm = 0x1p-90f;

// One row to 8-bit integers, `words` words of four at `to` (room for 16 more), and the sum of the integers.
template <class T>
FASTSAE_INLINE Rounded round_int8(const T* v, int64_t d, int rotation, const uint32_t* signs, float* y, uint8_t* to, int64_t words,
                                  int32_t* total) {
  const Sums sums = rotate(v, d, rotation, signs, y);
  const int64_t size = round_to(d, rotation);
  const float norm = norm_above(reduce({sums.squares}), d);
  const float largest = _mm512_reduce_max_ps(sums.largest);
  const bool usable = norm <= kHugeNorm;
  const bool zero_row = !(largest >= kTinyNorm);
  const float inverse = usable && !zero_row ? 127.0f / largest : 0.0f, step = usable && !zero_row ? largest / 127.0f : 0.0f;
  __m512 lost = _mm512_setzero_ps();
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < words * 4; i += 16) {
    __m512 x = _mm512_setzero_ps();
    if (usable)
      x = i + 16 <= size ? _mm512_loadu_ps(y + i) : i < size ? _mm512_maskz_loadu_ps(first(static_cast<int>(size - i)), y + i) : x;
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(inverse)));
    const __m512 e = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(q), _mm512_set1_ps(step), x);
    lost = _mm512_fmadd_ps(e, e, lost);
    sum = _mm512_add_epi32(sum, q);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtepi32_epi8(q));
  }
  if (total != nullptr) *total = _mm512_reduce_add_epi32(sum);
  const float stages = rotation == 256 ? 8 : rotation == 64 ? 6 : rotation == 16 ? 4 : 0;
  const float back = rotation == 256 ? 0.0625f : rotation == 64 ? 0.125f : rotation == 16 ? 0.25f : 1.0f;  // 1 / sqrt(n)
  const float loss = norm_above(reduce({lost}), size) * back + 1.02f * stages * kUnit * norm;
  return {norm, loss, step, usable && loss <= kHugeNorm};
}

FASTSAE_INLINE void set_row(const PackRowsJob& job, int i, ScreenFormat format, bool usable, float norm, float loss) {
  if (usable) {
    const RowFactors factors = row_factors(format, norm, loss, job.d);
    job.a[i] = factors.a;
    job.c[i] = factors.c;
  } else {
    job.a[i] = job.c[i] = __builtin_inff();  // an interval without ends
    job.exact[i] = 1;
  }
}

void pack_rows_int8(const PackRowsJob& job) {
  const int64_t words = words_of(ScreenFormat::int8, job.d, job.rotation);
  const float n = 1.0f / static_cast<float>(job.rotation);
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(job.scratch + round_to(job.d, job.rotation) + 16);
  for (int i = 0; i < job.height; ++i) {
    int32_t total = 0;
    const Rounded r = round_int8(job.xc + i * job.padded, job.d, job.rotation, job.signs, job.scratch, bytes, words, &total);
    const bool usable = r.usable && job.d < 65536;
    set_row(job, i, ScreenFormat::int8, usable, r.norm, r.loss);
    job.unit[i] = usable ? r.step * n : 0;
    job.start[i] = usable ? -128 * total : 0;
    for (int64_t p = 0; p < words; ++p) {
      uint32_t word = 0;
      if (usable) __builtin_memcpy(&word, bytes + 4 * p, 4);
      job.words[p * job.height + i] = word;
    }
  }
}

FASTSAE_INLINE void set_feature(const PackFeaturesJob& job, int64_t f, bool usable, float norm, float loss, float unit) {
  job.norm[f] = usable ? norm : __builtin_inff();
  job.loss[f] = usable ? loss : __builtin_inff();
  if (job.unit != nullptr) job.unit[f] = usable ? unit : 0.0f;
}

// Blocks of 16 features x 16 words, from rows of `ld` words to a panel's columns.
FASTSAE_INLINE void transpose_words(const uint32_t* rows, int64_t ld, int64_t words, uint32_t* panel) {
  for (int64_t p = 0; p < words; p += 16) {
    Vec block[16];
    for (int j = 0; j < 16; ++j) block[j].x = _mm512_castsi512_ps(_mm512_loadu_si512(rows + j * ld + p));
    transpose(block);
    const int n = static_cast<int>(at_most(16, words - p));
    for (int j = 0; j < n; ++j) _mm512_store_si512(panel + (p + j) * kPanelWidth, _mm512_castps_si512(block[j].x));
  }
}

template <class T>
FASTSAE_INLINE const T* feature_row(const PackFeaturesJob& job, int64_t f) {
  return static_cast<const T*>(job.w) + (job.list != nullptr ? job.list[job.first + f] : job.first + f) * job.stride_f;
}

template <class T>
void pack_int8_as(const PackFeaturesJob& job) {
  const int64_t words = words_of(ScreenFormat::int8, job.d, job.rotation), ld = round_to(words, 16) + 16;
  float* const y = reinterpret_cast<float*>(job.scratch + 16 * ld);
  for (int64_t g = 0; g < static_cast<int64_t>(job.panels) * 2; ++g) {
    for (int64_t j = 0; j < 16; ++j) {
      const int64_t f = g * 16 + j;
      uint8_t* const to = reinterpret_cast<uint8_t*>(job.scratch + j * ld);
      if (f >= job.features) {
        for (int64_t p = 0; p < words; ++p) job.scratch[j * ld + p] = 0;
        set_feature(job, f, true, 0, 0, 0);
        continue;
      }
      const Rounded r = round_int8(feature_row<T>(job, f), job.d, job.rotation, job.signs, y, to, words, nullptr);
      for (int64_t i = 0; i < words * 4; i += 64)  // plus 128
        _mm512_storeu_si512(to + i, _mm512_xor_si512(_mm512_loadu_si512(to + i), _mm512_set1_epi8(static_cast<char>(0x80))));
      set_feature(job, f, r.usable, r.norm, r.loss, r.step);
    }
    transpose_words(job.scratch, ld, words, job.data + g / 2 * words * kPanelWidth + g % 2 * 16);
  }
}

void pack_int8(const PackFeaturesJob& job) {
  if (job.t == Dtype::f32)
    pack_int8_as<float>(job);
  else if (job.t == Dtype::bf16)
    pack_int8_as<bf16>(job);
  else
    pack_int8_as<f16>(job);
}

// 32 elements to 16 pairs, in order; adds their squares and the squares of what rounding took away.
#ifdef FASTSAE_LEVEL_avx512_bf16

FASTSAE_INLINE __m512i round_pairs(__m512 v0, __m512 v1, __m512& squares, __m512& lost) {
  const __m512i p = (__m512i)_mm512_cvtne2ps_pbh(v1, v0);
  const __m512 h0 = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(p)), 16));
  const __m512 h1 = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(p, 1)), 16));
  const __m512 e0 = _mm512_sub_ps(v0, h0), e1 = _mm512_sub_ps(v1, h1);
  squares = _mm512_fmadd_ps(v1, v1, _mm512_fmadd_ps(v0, v0, squares));
  lost = _mm512_fmadd_ps(e1, e1, _mm512_fmadd_ps(e0, e0, lost));
  return p;
}

void pack_rows_bf16(const PackRowsJob& job) {
  const int64_t words = (job.d + 1) / 2;
  for (int i = 0; i < job.height; ++i) {
    const float* const x = job.xc + i * job.padded;
    __m512 squares = _mm512_setzero_ps(), lost = squares;
    for (int64_t p = 0; p < words; p += 16) {
      alignas(64) uint32_t out[16];
      _mm512_store_si512(out, round_pairs(_mm512_loadu_ps(x + 2 * p), _mm512_loadu_ps(x + 2 * p + 16), squares, lost));
      const int64_t n = at_most(16, words - p);
      for (int64_t j = 0; j < n; ++j) job.words[(p + j) * job.height + i] = out[j];
    }
    const float norm = norm_above(reduce({squares}), job.d), loss = norm_above(reduce({lost}), job.d);
    const bool usable = norm <= kHugeNorm && loss <= kHugeNorm;
    set_row(job, i, ScreenFormat::bf16, usable, norm, loss);
    job.unit[i] = 1;
    job.start[i] = 0;
    if (!usable)
      for (int64_t p = 0; p < words; ++p) job.words[p * job.height + i] = 0;
  }
}

template <class T>
void pack_bf16_as(const PackFeaturesJob& job) {
  const int64_t words = (job.d + 1) / 2, ld = round_to(words, 16) + 16;
  for (int64_t g = 0; g < static_cast<int64_t>(job.panels) * 2; ++g) {
    for (int64_t j = 0; j < 16; ++j) {
      const int64_t f = g * 16 + j;
      uint32_t* const to = job.scratch + j * ld;
      if (f >= job.features) {
        for (int64_t p = 0; p < words; ++p) to[p] = 0;
        set_feature(job, f, true, 0, 0, 0);
        continue;
      }
      const T* const w = feature_row<T>(job, f);
      __m512 squares = _mm512_setzero_ps(), lost = squares;
      int64_t d = 0;
      for (; d + 32 <= job.d; d += 32) _mm512_storeu_si512(to + d / 2, round_pairs(load(w + d).x, load(w + d + 16).x, squares, lost));
      if (d < job.d) {
        const int n = static_cast<int>(job.d - d);
        const __m512 v0 = load_part(w + d, n < 16 ? n : 16).x;
        const __m512 v1 = n > 16 ? load_part(w + d + 16, n - 16).x : _mm512_setzero_ps();
        _mm512_storeu_si512(to + d / 2, round_pairs(v0, v1, squares, lost));
      }
      const float norm = norm_above(reduce({squares}), job.d), loss = norm_above(reduce({lost}), job.d);
      set_feature(job, f, norm <= kHugeNorm && loss <= kHugeNorm, norm, loss, 1);
    }
    transpose_words(job.scratch, ld, words, job.data + g / 2 * words * kPanelWidth + g % 2 * 16);
  }
}

void pack_bf16(const PackFeaturesJob& job) {
  if (job.t == Dtype::f32)
    pack_bf16_as<float>(job);
  else if (job.t == Dtype::bf16)
    pack_bf16_as<bf16>(job);
  else
    pack_bf16_as<f16>(job);
}

#endif

void pack_rows_exact(const PackRowsJob& job) {
  for (int i = 0; i < job.height; ++i) {
    job.a[i] = job.c[i] = 0;
    job.unit[i] = 1;
    job.start[i] = 0;
    for (int64_t p = 0; p < job.d; ++p) job.words[p * job.height + i] = as_bits(job.xc[i * job.padded + p]);
  }
}

template <class T>
void pack_exact_as(const PackFeaturesJob& job) {
  for (int64_t f = 0; f < static_cast<int64_t>(job.panels) * kPanelWidth; ++f) {
    uint32_t* const to = job.data + f / kPanelWidth * job.d * kPanelWidth + f % kPanelWidth;
    for (int64_t p = 0; p < job.d; ++p) to[p * kPanelWidth] = f < job.features ? as_bits(widen(feature_row<T>(job, f)[p])) : 0;
    set_feature(job, f, true, 0, 0, 1);
  }
}

void pack_exact(const PackFeaturesJob& job) {
  if (job.t == Dtype::f32)
    pack_exact_as<float>(job);
  else if (job.t == Dtype::bf16)
    pack_exact_as<bf16>(job);
  else
    pack_exact_as<f16>(job);
}

#endif

}  // namespace

extern const EngineKernels engine_kernels;
const EngineKernels engine_kernels = {
    load_job,
    column_products,
    products,
#if defined(FASTSAE_LEVEL_avx512_bf16)
    {pack_rows_int8, pack_rows_bf16, pack_rows_exact},
    {pack_int8, pack_bf16, pack_exact},
#elif defined(FASTSAE_SCREENS)
    {pack_rows_int8, nullptr, pack_rows_exact},
    {pack_int8, nullptr, pack_exact},
#else
    {nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr},
#endif
};

}  // namespace FASTSAE_ISA
}  // namespace fastsae
