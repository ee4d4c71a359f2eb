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
FASTSAE_INLINE Mask first(int n) { return static_cast<Mask>((1u << n) - 1u); }

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
// There is no instruction for it: lane by lane, of which few are marked.
template <class T, class V>
FASTSAE_INLINE int compact(T* to, Mask m, V a) {
  T each[kLanes];
  store(static_cast<T*>(each), a);
  int n = 0;
  for (unsigned left = m; left != 0; left &= left - 1) to[n++] = each[__builtin_ctz(left)];
  return n;
}
FASTSAE_INLINE void pause() { __asm__ volatile("yield"); }

#endif

FASTSAE_INLINE Vec negative(Vec a) { return sub(zero(), a); }
FASTSAE_INLINE Ints ascending(int32_t from) {
  constexpr int32_t kNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return add(load(static_cast<const int32_t*>(kNumbers)), all(from));
}
// The lanes of 16 that lie below n.
FASTSAE_INLINE Mask valid_of(int64_t n) { return n >= kLanes ? static_cast<Mask>(0xffff) : first(static_cast<int>(n)); }
FASTSAE_INLINE uint32_t joined(Mask m0, Mask m1) { return m0 | static_cast<uint32_t>(m1) << 16; }

}  // namespace
}  // namespace FASTSAE_ISA
}  // namespace fastsae
