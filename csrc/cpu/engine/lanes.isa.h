// What screens do with sixteen lanes beyond vec.isa.h: masks with a bit a lane, integers, compaction. Only for levels that screen.
//
// larger, smaller: a where it compares so, otherwise b: also where one of them is NaN. larger_or_nan: NaN where one of them is.
// not_below, not_above, not_at_most: true for NaN; above, at_least: false. fnma: c - a * b, rounded once. compact: the lanes of `m` side by
// side; may write 16 elements; their number.
#pragma once
#include "vec.isa.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

typedef uint16_t Mask;

#if defined(__AVX512F__)

struct Ints {
  __m512i x;
};

FASTSAE_INLINE Vec larger(Vec a, Vec b) { return {_mm512_max_ps(a.x, b.x)}; }
FASTSAE_INLINE Vec smaller(Vec a, Vec b) { return {_mm512_min_ps(a.x, b.x)}; }
FASTSAE_INLINE Vec magnitude(Vec a) { return {_mm512_abs_ps(a.x)}; }
FASTSAE_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.x, b.x, c.x)}; }
FASTSAE_INLINE Vec flip(Vec a, const uint32_t* signs) {
  return {_mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a.x), _mm512_loadu_si512(signs)))};
}
FASTSAE_INLINE float largest(Vec a) { return _mm512_reduce_max_ps(a.x); }

FASTSAE_INLINE Mask is_nan(Vec a) { return _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q); }
FASTSAE_INLINE Mask above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_GT_OQ); }
FASTSAE_INLINE Mask at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_GE_OQ); }
FASTSAE_INLINE Mask not_below(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_NLT_UQ); }
FASTSAE_INLINE Mask not_above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_NGT_UQ); }
FASTSAE_INLINE Mask not_at_most(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_NLE_UQ); }
FASTSAE_INLINE Vec choose(Mask m, Vec a, Vec b) { return {_mm512_mask_mov_ps(b.x, m, a.x)}; }
FASTSAE_INLINE Vec larger_or_nan(Vec a, Vec b) { return choose(is_nan(a), a, larger(a, b)); }
FASTSAE_INLINE int compact(float* to, Mask m, Vec a) {
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(m, a.x));
  return __builtin_popcount(m);
}

FASTSAE_INLINE Ints all(int32_t x) { return {_mm512_set1_epi32(x)}; }
FASTSAE_INLINE Ints load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
FASTSAE_INLINE void store(int32_t* to, Ints a) { _mm512_storeu_si512(to, a.x); }
FASTSAE_INLINE Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.x, b.x)}; }
FASTSAE_INLINE Ints larger(Ints a, Ints b) { return {_mm512_max_epi32(a.x, b.x)}; }
FASTSAE_INLINE Ints smaller(Ints a, Ints b) { return {_mm512_min_epi32(a.x, b.x)}; }
FASTSAE_INLINE Ints choose(Mask m, Ints a, Ints b) { return {_mm512_mask_mov_epi32(b.x, m, a.x)}; }
FASTSAE_INLINE Mask at_least(Ints a, Ints b) { return _mm512_cmpge_epi32_mask(a.x, b.x); }
FASTSAE_INLINE int32_t sum(Ints a) { return _mm512_reduce_add_epi32(a.x); }
FASTSAE_INLINE int32_t largest(Ints a) { return _mm512_reduce_max_epi32(a.x); }
FASTSAE_INLINE int32_t smallest(Ints a) { return _mm512_reduce_min_epi32(a.x); }
FASTSAE_INLINE Ints rounded(Vec a) { return {_mm512_cvtps_epi32(a.x)}; }
FASTSAE_INLINE Vec to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.x)}; }
FASTSAE_INLINE void store_bytes(uint8_t* to, Ints a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(a.x)); }
// As bits of floats: negative ones with all but the sign turned over, so that integers compare as the floats do. Its own inverse.
FASTSAE_INLINE Ints ordered(Vec a) {
  const __m512i bits = _mm512_castps_si512(a.x);
  return {_mm512_xor_si512(bits, _mm512_and_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(0x7fffffff)))};
}
FASTSAE_INLINE int compact(int32_t* to, Mask m, Ints a) {
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(m, a.x));
  return __builtin_popcount(m);
}
FASTSAE_INLINE void pause() { _mm_pause(); }

#elif defined(__AVX2__)

struct Ints {
  __m256i lo, hi;
};

FASTSAE_INLINE Mask bits_of(__m256 lo, __m256 hi) {
  return static_cast<Mask>(_mm256_movemask_ps(lo) | _mm256_movemask_ps(hi) << 8);
}
FASTSAE_INLINE __m256i lanes_of(Mask m, int h) {
  const __m256i bits = _mm256_slli_epi32(_mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), 8 * h);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(m), bits), bits);
}

FASTSAE_INLINE Vec larger(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
FASTSAE_INLINE Vec smaller(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
FASTSAE_INLINE Vec magnitude(Vec a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
FASTSAE_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)}; }
FASTSAE_INLINE Vec flip(Vec a, const uint32_t* signs) {
  const float* const s = reinterpret_cast<const float*>(signs);
  return {_mm256_xor_ps(a.lo, _mm256_loadu_ps(s)), _mm256_xor_ps(a.hi, _mm256_loadu_ps(s + 8))};
}
FASTSAE_INLINE float largest(Vec a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

#define FASTSAE_COMPARE(name, how) \
  FASTSAE_INLINE Mask name(Vec a, Vec b) { return bits_of(_mm256_cmp_ps(a.lo, b.lo, how), _mm256_cmp_ps(a.hi, b.hi, how)); }
FASTSAE_COMPARE(above, _CMP_GT_OQ)
FASTSAE_COMPARE(at_least, _CMP_GE_OQ)
FASTSAE_COMPARE(not_below, _CMP_NLT_UQ)
FASTSAE_COMPARE(not_above, _CMP_NGT_UQ)
FASTSAE_COMPARE(not_at_most, _CMP_NLE_UQ)
FASTSAE_COMPARE(unordered, _CMP_UNORD_Q)
#undef FASTSAE_COMPARE
FASTSAE_INLINE Mask is_nan(Vec a) { return unordered(a, a); }
FASTSAE_INLINE Vec choose(Mask m, Vec a, Vec b) {
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_castsi256_ps(lanes_of(m, 0))),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_castsi256_ps(lanes_of(m, 1)))};
}
FASTSAE_INLINE Vec larger_or_nan(Vec a, Vec b) {
  const Vec most = larger(a, b);
  return {_mm256_blendv_ps(most.lo, a.lo, _mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q)),
          _mm256_blendv_ps(most.hi, a.hi, _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q))};
}

FASTSAE_INLINE Ints all(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
FASTSAE_INLINE Ints load(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
FASTSAE_INLINE void store(int32_t* to, Ints a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8), a.hi);
}
FASTSAE_INLINE Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
FASTSAE_INLINE Ints larger(Ints a, Ints b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
FASTSAE_INLINE Ints smaller(Ints a, Ints b) { return {_mm256_min_epi32(a.lo, b.lo), _mm256_min_epi32(a.hi, b.hi)}; }
FASTSAE_INLINE Ints choose(Mask m, Ints a, Ints b) {
  return {_mm256_blendv_epi8(b.lo, a.lo, lanes_of(m, 0)), _mm256_blendv_epi8(b.hi, a.hi, lanes_of(m, 1))};
}
FASTSAE_INLINE Mask at_least(Ints a, Ints b) {
  const __m256i lo = _mm256_cmpgt_epi32(b.lo, a.lo), hi = _mm256_cmpgt_epi32(b.hi, a.hi);
  return static_cast<Mask>(~bits_of(_mm256_castsi256_ps(lo), _mm256_castsi256_ps(hi)));
}
template <class F>
FASTSAE_INLINE int32_t folded(Ints a, const F& f) {
  __m128i four = f(f(_mm256_castsi256_si128(a.lo), _mm256_extracti128_si256(a.lo, 1)),
                   f(_mm256_castsi256_si128(a.hi), _mm256_extracti128_si256(a.hi, 1)));
  four = f(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(f(four, _mm_shuffle_epi32(four, 0xb1)));
}
FASTSAE_INLINE int32_t sum(Ints a) {
  return folded(a, [](__m128i p, __m128i q) { return _mm_add_epi32(p, q); });
}
FASTSAE_INLINE int32_t largest(Ints a) {
  return folded(a, [](__m128i p, __m128i q) { return _mm_max_epi32(p, q); });
}
FASTSAE_INLINE int32_t smallest(Ints a) {
  return folded(a, [](__m128i p, __m128i q) { return _mm_min_epi32(p, q); });
}
FASTSAE_INLINE Ints rounded(Vec a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
FASTSAE_INLINE Vec to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
FASTSAE_INLINE void store_bytes(uint8_t* to, Ints a) {
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
}
// Sixteen bits each, of four neighbours the first and third before the second and fourth.
FASTSAE_INLINE void store_pairs(uint8_t* to, Ints a) {
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(halves, 0xd8), 0xd8));
}
FASTSAE_INLINE __m256i ordered(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  return _mm256_xor_si256(bits, _mm256_and_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(0x7fffffff)));
}
FASTSAE_INLINE Ints ordered(Vec a) { return {ordered(a.lo), ordered(a.hi)}; }
FASTSAE_INLINE void pause() { _mm_pause(); }

#else

struct Ints {
  int32x4_t x[4];
};

template <class F>
FASTSAE_INLINE Ints each_int(const F& f) {
  return {{f(0), f(1), f(2), f(3)}};
}
FASTSAE_INLINE uint32x4_t lanes_of(Mask m, int i) {
  constexpr uint32_t kBits[4] = {1, 2, 4, 8};
  return vtstq_u32(vdupq_n_u32(static_cast<uint32_t>(m) >> (4 * i)), vld1q_u32(kBits));
}
FASTSAE_INLINE Vec larger(Vec a, Vec b) {
  return each([&](int i) { return vbslq_f32(vcgtq_f32(a.x[i], b.x[i]), a.x[i], b.x[i]); });
}
FASTSAE_INLINE Vec smaller(Vec a, Vec b) {
  return each([&](int i) { return vbslq_f32(vcltq_f32(a.x[i], b.x[i]), a.x[i], b.x[i]); });
}
FASTSAE_INLINE Vec larger_or_nan(Vec a, Vec b) {
  return each([&](int i) { return vmaxq_f32(a.x[i], b.x[i]); });
}
FASTSAE_INLINE Vec magnitude(Vec a) {
  return each([&](int i) { return vabsq_f32(a.x[i]); });
}
FASTSAE_INLINE Vec fnma(Vec a, Vec b, Vec c) {
  return each([&](int i) { return vfmsq_f32(c.x[i], a.x[i], b.x[i]); });
}
FASTSAE_INLINE Vec flip(Vec a, const uint32_t* signs) {
  return each([&](int i) { return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(a.x[i]), vld1q_u32(signs + 4 * i))); });
}
FASTSAE_INLINE float largest(Vec a) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.x[0], a.x[1]), vmaxq_f32(a.x[2], a.x[3])));
}

FASTSAE_INLINE Mask above(Vec a, Vec b) {
  return mask([&](int i) { return vcgtq_f32(a.x[i], b.x[i]); });
}
FASTSAE_INLINE Mask at_least(Vec a, Vec b) {
  return mask([&](int i) { return vcgeq_f32(a.x[i], b.x[i]); });
}
FASTSAE_INLINE Mask is_nan(Vec a) {
  return mask([&](int i) { return vmvnq_u32(vceqq_f32(a.x[i], a.x[i])); });
}
FASTSAE_INLINE Mask not_below(Vec a, Vec b) { return static_cast<Mask>(~above(b, a)); }
FASTSAE_INLINE Mask not_above(Vec a, Vec b) { return static_cast<Mask>(~above(a, b)); }
FASTSAE_INLINE Mask not_at_most(Vec a, Vec b) { return static_cast<Mask>(~at_least(b, a)); }
FASTSAE_INLINE Vec choose(Mask m, Vec a, Vec b) {
  return each([&](int i) { return vbslq_f32(lanes_of(m, i), a.x[i], b.x[i]); });
}

FASTSAE_INLINE Ints all(int32_t x) {
  return each_int([&](int) { return vdupq_n_s32(x); });
}
FASTSAE_INLINE Ints load(const int32_t* p) {
  return each_int([&](int i) { return vld1q_s32(p + 4 * i); });
}
FASTSAE_INLINE void store(int32_t* to, Ints a) {
  for (int i = 0; i < 4; ++i) vst1q_s32(to + 4 * i, a.x[i]);
}
FASTSAE_INLINE Ints add(Ints a, Ints b) {
  return each_int([&](int i) { return vaddq_s32(a.x[i], b.x[i]); });
}
FASTSAE_INLINE Ints larger(Ints a, Ints b) {
  return each_int([&](int i) { return vmaxq_s32(a.x[i], b.x[i]); });
}
FASTSAE_INLINE Ints smaller(Ints a, Ints b) {
  return each_int([&](int i) { return vminq_s32(a.x[i], b.x[i]); });
}
FASTSAE_INLINE Ints choose(Mask m, Ints a, Ints b) {
  return each_int([&](int i) { return vbslq_s32(lanes_of(m, i), a.x[i], b.x[i]); });
}
FASTSAE_INLINE Mask at_least(Ints a, Ints b) {
  return mask([&](int i) { return vcgeq_s32(a.x[i], b.x[i]); });
}
FASTSAE_INLINE int32_t sum(Ints a) { return vaddvq_s32(vaddq_s32(vaddq_s32(a.x[0], a.x[1]), vaddq_s32(a.x[2], a.x[3]))); }
FASTSAE_INLINE int32_t largest(Ints a) { return vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.x[0], a.x[1]), vmaxq_s32(a.x[2], a.x[3]))); }
FASTSAE_INLINE int32_t smallest(Ints a) { return vminvq_s32(vminq_s32(vminq_s32(a.x[0], a.x[1]), vminq_s32(a.x[2], a.x[3]))); }
FASTSAE_INLINE Ints rounded(Vec a) {
  return each_int([&](int i) { return vcvtnq_s32_f32(a.x[i]); });
}
FASTSAE_INLINE Vec to_floats(Ints a) {
  return each([&](int i) { return vcvtq_f32_s32(a.x[i]); });
}
FASTSAE_INLINE void store_bytes(uint8_t* to, Ints a) {
  const int16x8_t low = vcombine_s16(vmovn_s32(a.x[0]), vmovn_s32(a.x[1])), high = vcombine_s16(vmovn_s32(a.x[2]), vmovn_s32(a.x[3]));
  vst1q_u8(to, vreinterpretq_u8_s8(vcombine_s8(vmovn_s16(low), vmovn_s16(high))));
}
FASTSAE_INLINE Ints ordered(Vec a) {
  return each_int([&](int i) {
    const int32x4_t bits = vreinterpretq_s32_f32(a.x[i]);
    return veorq_s32(bits, vandq_s32(vshrq_n_s32(bits, 31), vdupq_n_s32(0x7fffffff)));
  });
}
FASTSAE_INLINE void pause() { __asm__ volatile("yield"); }

#endif

#if !defined(__AVX512F__)
// There is no instruction for it: lane by lane, of which few are marked.
template <class T, class V>
FASTSAE_INLINE int compact(T* to, Mask m, V a) {
  T each[kLanes];
  store(static_cast<T*>(each), a);
  int n = 0;
  for (unsigned left = m; left != 0; left &= left - 1) to[n++] = each[__builtin_ctz(left)];
  return n;
}
#endif

FASTSAE_INLINE Vec negative(Vec a) { return sub(zero(), a); }
FASTSAE_INLINE Ints ascending(int32_t from) {
  constexpr int32_t kNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return add(load(static_cast<const int32_t*>(kNumbers)), all(from));
}
// The lanes of 16 that lie below n.
FASTSAE_INLINE Mask valid_of(int64_t n) { return n >= kLanes ? static_cast<Mask>(0xffff) : static_cast<Mask>((1u << n) - 1u); }
FASTSAE_INLINE uint32_t joined(Mask m0, Mask m1) { return m0 | static_cast<uint32_t>(m1) << 16; }

}  // namespace
}  // namespace FASTSAE_ISA
}  // namespace fastsae
