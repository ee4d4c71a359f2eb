// Packing for the screen (levels that can), and the table of what the engine asks of a level. kernels.h states the jobs, bound.h the bound.
#include "cpu/engine/dot.isa.h"
#include "cpu/engine/rows.isa.h"
#include "isa.h"

#ifdef FASTSAE_SCREENS
#include "cpu/engine/lanes.isa.h"
#endif

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

#ifdef FASTSAE_SCREENS

// An unnormalised Hadamard transform of the 16 lanes: swapped partners, plus or minus the lane itself.
FASTSAE_INLINE Vec mix_lanes(Vec a) {
#if defined(__AVX512F__)
  __m512 v = a.x;
  const __m512 one = _mm512_set1_ps(1.0f);
  const auto stage = [&](__m512 swapped, __mmask16 second) {
    return _mm512_fmadd_ps(v, _mm512_mask_sub_ps(one, second, _mm512_setzero_ps(), one), swapped);
  };
  v = stage(_mm512_permute_ps(v, 0xb1), 0xaaaa);
  v = stage(_mm512_permute_ps(v, 0x4e), 0xcccc);
  v = stage(_mm512_shuffle_f32x4(v, v, 0xb1), 0xf0f0);
  return {stage(_mm512_shuffle_f32x4(v, v, 0x4e), 0xff00)};
#elif defined(__AVX2__)
  const __m256 one = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), two = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
  const __m256 four = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
  const auto mixed = [&](__m256 v) {
    v = _mm256_fmadd_ps(v, one, _mm256_permute_ps(v, 0xb1));
    v = _mm256_fmadd_ps(v, two, _mm256_permute_ps(v, 0x4e));
    return _mm256_fmadd_ps(v, four, _mm256_permute2f128_ps(v, v, 1));
  };
  const __m256 lo = mixed(a.lo), hi = mixed(a.hi);
  return {_mm256_add_ps(lo, hi), _mm256_sub_ps(lo, hi)};
#else
  const float32x4_t one = {1, -1, 1, -1}, two = {1, 1, -1, -1};
  const Vec v = each([&](int i) { return vfmaq_f32(vrev64q_f32(a.x[i]), a.x[i], one); });
  const Vec u = each([&](int i) { return vfmaq_f32(vextq_f32(v.x[i], v.x[i], 2), v.x[i], two); });
  const float32x4_t s = vaddq_f32(u.x[0], u.x[1]), t = vsubq_f32(u.x[0], u.x[1]);
  const float32x4_t p = vaddq_f32(u.x[2], u.x[3]), q = vsubq_f32(u.x[2], u.x[3]);
  return {{vaddq_f32(s, p), vaddq_f32(t, q), vsubq_f32(s, p), vsubq_f32(t, q)}};
#endif
}

struct Sums {
  Vec squares, largest;
};

// y = the rotated row, in blocks of 16 V elements; adds the squares of v, and the largest magnitude of y.
template <class T, int V>
FASTSAE_INLINE void rotate_blocks(const T* v, int64_t d, const uint32_t* signs, float* y, Sums& sums) {
  for (int64_t d0 = 0; d0 < d; d0 += 16 * V) {
    Vec r[V];
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) {
      const int64_t at = d0 + 16 * i;
      const Vec x = at + 16 <= d ? load(v + at) : at < d ? load_part(v + at, static_cast<int>(d - at)) : zero();
      sums.squares = fma(x, x, sums.squares);
      r[i] = mix_lanes(flip(x, signs + at));
    }
#pragma GCC unroll 4
    for (int half = 1; half < V; half *= 2)
#pragma GCC unroll 16
      for (int i = 0; i < V; ++i)
        if ((i & half) == 0) {
          const Vec a = r[i], b = r[i + half];
          r[i] = add(a, b);
          r[i + half] = sub(a, b);
        }
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) {
      store(y + d0 + 16 * i, r[i]);
      sums.largest = larger(sums.largest, magnitude(r[i]));
    }
  }
}

template <class T>
FASTSAE_INLINE Sums rotate(const T* v, int64_t d, int rotation, const uint32_t* signs, float* y) {
  Sums sums{zero(), zero()};
  if (rotation == 256) {
    rotate_blocks<T, 16>(v, d, signs, y, sums);
  } else if (rotation == 64) {
    rotate_blocks<T, 4>(v, d, signs, y, sums);
  } else if (rotation == 16) {
    rotate_blocks<T, 1>(v, d, signs, y, sums);
  } else {
    for (int64_t i = 0; i < d; i += 16) {
      const Vec x = i + 16 <= d ? load(v + i) : load_part(v + i, static_cast<int>(d - i));
      sums.squares = fma(x, x, sums.squares);
      sums.largest = larger(sums.largest, magnitude(x));
      store(y + i, x);
    }
  }
  return sums;
}

// Where word p of row i lies in a tile of `height` rows; USMMLA takes two words of a row at a time.
FASTSAE_INLINE int64_t word_at(int64_t p, int i, int height, [[maybe_unused]] int64_t words) {
#ifdef FASTSAE_LEVEL_neon_i8mm
  if ((p | 1) < words) return p / 2 * 2 * height + 2 * i + p % 2;
#endif
  return p * height + i;
}

// The largest integers of a row and of a feature. Without VNNI two products meet in 16 bits: 2 * 255 * 64 < 2^15. Wide rows have as many
// steps as a sum of 32 bits has room for.
constexpr int kFeatureSteps = 127, kWideSum = (1 << 24) - 1;
#if defined(FASTSAE_LEVEL_avx2) || defined(FASTSAE_LEVEL_avx512)
constexpr int kRowSteps = 64;
constexpr int64_t kLongestSigns = 64;
#else
constexpr int kRowSteps = 127;
constexpr int64_t kLongestSigns = 512;
#endif
#ifdef FASTSAE_LEVEL_avx512
constexpr int64_t kLongestScores = 2048;
#else
constexpr int64_t kLongestScores = kLongestRow;
#endif
#ifdef FASTSAE_LEVEL_avx2
constexpr int64_t kLongestBytes = 2048;
#else
constexpr int64_t kLongestBytes = kLongestRow;
#endif

struct Rounded {
  float norm, loss, step;  // step: value of one integer step, of the rotated row
  bool usable;
};

constexpr float kTinyNorm = 0x1p-90f;

// One row to integers of at most `steps`, `words` words of four at `to` (room for 16 more), twice as many where wide, and their sum.
template <class T>
FASTSAE_INLINE Rounded round_int8(const T* v, int64_t d, int rotation, const uint32_t* signs, int steps, [[maybe_unused]] bool wide,
                                  float* y, uint8_t* to, int64_t words, int32_t* total) {
  const Sums sums = rotate(v, d, rotation, signs, y);
  const int64_t size = round_to(d, rotation);
  const float norm = norm_above(reduce(sums.squares), d);
  const float most = largest(sums.largest);
  const bool usable = norm <= kHugeNorm;
  const bool zero_row = !(most >= kTinyNorm);
  const float inverse = usable && !zero_row ? steps / most : 0.0f, step = usable && !zero_row ? most / steps : 0.0f;
  Vec lost = zero();
  Ints added = all(0);
  for (int64_t i = 0; i < words * 4; i += 16) {
    Vec x = zero();
    if (usable)
      x = i + 16 <= size ? load(y + i) : i < size ? load_part(y + i, static_cast<int>(size - i)) : x;
    const Ints q = rounded(mul(x, broadcast(inverse)));
    const Vec e = fnma(to_floats(q), broadcast(step), x);
    lost = fma(e, e, lost);
    added = add(added, q);
#ifdef FASTSAE_LEVEL_avx2
    if (wide) {
      store_pairs(to + 2 * i, q);
      continue;
    }
#endif
    store_bytes(to + i, q);
  }
  if (total != nullptr) *total = sum(added);
  const float stages = rotation == 256 ? 8 : rotation == 64 ? 6 : rotation == 16 ? 4 : 0;
  const float back = rotation == 256 ? 0.0625f : rotation == 64 ? 0.125f : rotation == 16 ? 0.25f : 1.0f;  // 1 / sqrt(n)
  const float loss = norm_above(reduce(lost), size) * back + 1.02f * stages * kUnit * norm;
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
  const int64_t words = words_of(ScreenFormat::int8, job.d, job.rotation), row_words = job.wide ? 2 * words : words;
  const int steps = job.wide ? static_cast<int>(kWideSum / (4 * words)) : kRowSteps;
  const float n = 1.0f / static_cast<float>(job.rotation);
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(job.scratch + round_to(job.d, job.rotation) + 16);
  for (int i = 0; i < job.height; ++i) {
    int32_t total = 0;
    const float* const x = job.xc + i * job.padded;
    const Rounded r = round_int8(x, job.d, job.rotation, job.signs, steps, job.wide, job.scratch, bytes, words, &total);
    set_row(job, i, ScreenFormat::int8, r.usable, r.norm, r.loss);
    job.unit[i] = r.usable ? r.step * n : 0;
    job.start[i] = r.usable ? -128 * total : 0;
    for (int64_t p = 0; p < row_words; ++p) {
      uint32_t word = 0;
      if (r.usable) __builtin_memcpy(&word, bytes + 4 * p, 4);
      job.words[word_at(p, i, job.height, words)] = word;
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
    for (int j = 0; j < 16; ++j) block[j] = load(reinterpret_cast<const float*>(rows + j * ld + p));  // bits in float registers
    transpose(block);
    const int n = static_cast<int>(at_most(16, words - p));
    for (int j = 0; j < n; ++j) store(reinterpret_cast<float*>(panel + (p + j) * kPanelWidth), block[j]);
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
      const Rounded r = round_int8(feature_row<T>(job, f), job.d, job.rotation, job.signs, kFeatureSteps, false, y, to, words, nullptr);
      for (int64_t p = 0; p < words; ++p) job.scratch[j * ld + p] ^= 0x80808080;  // plus 128
      set_feature(job, f, r.usable, r.norm, r.loss, r.step);
    }
    transpose_words(job.scratch, ld, words, job.data + g / 2 * words * kPanelWidth + g % 2 * 16);
  }
}

void pack_int8(const PackFeaturesJob& job) {
  with_type(job.t, [&](auto type) { pack_int8_as<decltype(type)>(job); });
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
  const int64_t words = words_of(ScreenFormat::bf16, job.d, 1);
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
  const int64_t words = words_of(ScreenFormat::bf16, job.d, 1), ld = round_to(words, 16) + 16;
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
  with_type(job.t, [&](auto type) { pack_bf16_as<decltype(type)>(job); });
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
  with_type(job.t, [&](auto type) { pack_exact_as<decltype(type)>(job); });
}

#endif

}  // namespace

const EngineKernels engine_kernels = {
    load_job,
    column_products,
    products,
#ifdef FASTSAE_SCREENS
    kLongestScores,
    kLongestSigns,
    kLongestBytes,
#else
    0,
    0,
    0,
#endif
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
