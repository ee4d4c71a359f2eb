// Sixteen floats, whatever the registers: one zmm, two ymm, four of NEON (neon.isa.h), or what the compiler makes of a vector type. One
// width for all levels keeps one lane order, so AVX2, AVX-512 and NEON give the same bits.
//
// Only for *.isa.cpp. Everything here is in an unnamed namespace of the level, and nothing of the standard library is used but
// fixed-width integers: an inline function shared with baseline code could be compiled with AVX-512 here and be the copy the linker keeps.
#pragma once
#include <stddef.h>
#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "fastsae.h"
#include "isa.h"

#define FASTSAE_INLINE inline __attribute__((always_inline))

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

constexpr int kLanes = 16;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// ---- scalar conversions: round to nearest even, NaN stays NaN ----

FASTSAE_INLINE float as_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
FASTSAE_INLINE uint32_t as_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

FASTSAE_INLINE float widen(float x) { return x; }
FASTSAE_INLINE float widen(bf16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
FASTSAE_INLINE float widen(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return as_float(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));
  // Subnormals by way of an integer: as fp32 denormals they would be lost where MXCSR reads those as zero.
  if (magnitude < 0x400) return as_float(sign | as_bits(static_cast<float>(static_cast<int>(magnitude)) * 0x1p-24f));
  return as_float(sign | ((magnitude << 13) + 0x38000000));
}

FASTSAE_INLINE void narrow(float x, float* out) { *out = x; }
FASTSAE_INLINE void narrow(float x, bf16* out) {
  const uint32_t bits = as_bits(x);
  out->bits = x != x ? static_cast<uint16_t>((bits >> 16) | 0x40) : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
FASTSAE_INLINE void narrow(float x, f16* out) {
  const uint32_t bits = as_bits(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    out->bits = static_cast<uint16_t>(sign | 0x7e00 | ((magnitude >> 13) & 0x1ff));
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity
    out->bits = static_cast<uint16_t>(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 leaves the rounded subnormal in the low bits
    out->bits = static_cast<uint16_t>(sign | (as_bits(as_float(magnitude) + 0.5f) - 0x3f000000));
  } else {
    out->bits = static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
  }
}

// body(T{}) with the type of an element.
template <class Body>
FASTSAE_INLINE void with_type(Dtype t, const Body& body) {
  if (t == Dtype::f32)
    body(float{});
  else if (t == Dtype::bf16)
    body(bf16{});
  else
    body(f16{});
}

FASTSAE_INLINE float root(float x) {
#if defined(__AVX2__)
  return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x)));
#else
  return __builtin_sqrtf(x);
#endif
}

// ---- vectors ----
// load / store: 16 elements at any address. load_part / store_part: the first n (0..16), never touching the rest; lanes beyond n
// read as 0. stream: a store past the caches, `to` aligned to kLanes elements. gather: 16 elements of p at int32 offsets.
// add, sub, mul, div and root round as IEEE says, so that they are the same on every level; both: the bits that a and b share;
// sign: 1, -1, or 0 where a is 0 or NaN.

#if defined(__AVX512F__)

constexpr int kTile = 16;  // vectors of accumulators: 32 registers hold them and leave room for loads

struct Vec {
  __m512 x;
};

FASTSAE_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
FASTSAE_INLINE Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
FASTSAE_INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.x, b.x)}; }
FASTSAE_INLINE Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.x, b.x)}; }
FASTSAE_INLINE Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.x, b.x)}; }
FASTSAE_INLINE Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.x, b.x)}; }
FASTSAE_INLINE Vec root(Vec a) { return {_mm512_sqrt_ps(a.x)}; }
FASTSAE_INLINE Vec both(Vec a, Vec b) { return {_mm512_and_ps(a.x, b.x)}; }
FASTSAE_INLINE Vec sign(Vec a) {
  const __m512 plus = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.x, _mm512_setzero_ps(), _CMP_GT_OQ), _mm512_set1_ps(1.0f));
  return {_mm512_mask_mov_ps(plus, _mm512_cmp_ps_mask(a.x, _mm512_setzero_ps(), _CMP_LT_OQ), _mm512_set1_ps(-1.0f))};
}
FASTSAE_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
FASTSAE_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

FASTSAE_INLINE Vec from_bits(__m256i half, bf16) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))}; }
FASTSAE_INLINE Vec from_bits(__m256i half, f16) { return {_mm512_cvtph_ps(half)}; }
FASTSAE_INLINE __m256i to_bits(Vec a, bf16) {
  const __m512i bits = _mm512_castps_si512(a.x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, quiet));
}
FASTSAE_INLINE __m256i to_bits(Vec a, f16) { return _mm512_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

FASTSAE_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
FASTSAE_INLINE Vec load_part(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
FASTSAE_INLINE void store(float* to, Vec a) { _mm512_storeu_ps(to, a.x); }
FASTSAE_INLINE void store_part(float* to, Vec a, int n) { _mm512_mask_storeu_ps(to, first(n), a.x); }
FASTSAE_INLINE void stream(float* to, Vec a) { _mm512_stream_ps(to, a.x); }

template <class H>
FASTSAE_INLINE Vec load(const H* p) {
  return from_bits(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), H{});
}
template <class H>
FASTSAE_INLINE Vec load_part(const H* p, int n) {
  return from_bits(_mm256_maskz_loadu_epi16(first(n), p), H{});
}
template <class H>
FASTSAE_INLINE void store(H* to, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bits(a, H{}));
}
template <class H>
FASTSAE_INLINE void store_part(H* to, Vec a, int n) {
  _mm256_mask_storeu_epi16(to, first(n), to_bits(a, H{}));
}
template <class H>
FASTSAE_INLINE void stream(H* to, Vec a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), to_bits(a, H{}));
}

FASTSAE_INLINE Vec gather(const float* p, const int32_t* at) { return {_mm512_i32gather_ps(_mm512_loadu_si512(at), p, 4)}; }

// Lanes fold 8, 4, 2, 1.
FASTSAE_INLINE float reduce(Vec a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.x), _mm512_extractf32x8_ps(a.x, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

FASTSAE_INLINE void transpose(Vec (&r)[16]) {
  __m512 t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].x, r[2 * i + 1].x);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].x, r[2 * i + 1].x);
  }
  __m512 u[16];
  for (int i = 0; i < 4; ++i) {
    u[4 * i] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(u[i], u[4 + i], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(u[i], u[4 + i], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0xdd);
    r[i].x = _mm512_shuffle_f32x4(a, c, 0x88);
    r[4 + i].x = _mm512_shuffle_f32x4(b, d, 0x88);
    r[8 + i].x = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[12 + i].x = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

FASTSAE_INLINE void fence() { _mm_sfence(); }

#elif defined(__AVX2__)

constexpr int kTile = 6;  // 12 of 16 registers

struct Vec {
  __m256 lo, hi;
};

#define FASTSAE_PARTS 1
typedef __m256 Part;
constexpr int kParts = 2;
FASTSAE_INLINE Part& part(Vec& a, int i) { return i == 0 ? a.lo : a.hi; }
FASTSAE_INLINE Part load_one(const float* p) { return _mm256_loadu_ps(p); }
FASTSAE_INLINE Part fma_one(Part a, Part b, Part c) { return _mm256_fmadd_ps(a, b, c); }

FASTSAE_INLINE Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
FASTSAE_INLINE Vec broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
FASTSAE_INLINE Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
FASTSAE_INLINE Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
FASTSAE_INLINE Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
FASTSAE_INLINE Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
FASTSAE_INLINE Vec root(Vec a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
FASTSAE_INLINE Vec both(Vec a, Vec b) { return {_mm256_and_ps(a.lo, b.lo), _mm256_and_ps(a.hi, b.hi)}; }
FASTSAE_INLINE __m256 sign(__m256 a) {
  const __m256 plus = _mm256_and_ps(_mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_GT_OQ), _mm256_set1_ps(1.0f));
  return _mm256_or_ps(plus, _mm256_and_ps(_mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_LT_OQ), _mm256_set1_ps(-1.0f)));
}
FASTSAE_INLINE Vec sign(Vec a) { return {sign(a.lo), sign(a.hi)}; }
FASTSAE_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
FASTSAE_INLINE __m256i first(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }

FASTSAE_INLINE Vec from_bits(__m128i lo, __m128i hi, bf16) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(lo), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(hi), 16))};
}
FASTSAE_INLINE Vec from_bits(__m128i lo, __m128i hi, f16) { return {_mm256_cvtph_ps(lo), _mm256_cvtph_ps(hi)}; }
FASTSAE_INLINE __m128i to_bits(__m256 a, bf16) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i chosen = _mm256_blendv_epi8(rounded, quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1));
}
FASTSAE_INLINE __m128i to_bits(__m256 a, f16) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

FASTSAE_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
FASTSAE_INLINE Vec load_part(const float* p, int n) { return {_mm256_maskload_ps(p, first(n)), _mm256_maskload_ps(p + 8, first(n - 8))}; }
FASTSAE_INLINE void store(float* to, Vec a) {
  _mm256_storeu_ps(to, a.lo);
  _mm256_storeu_ps(to + 8, a.hi);
}
FASTSAE_INLINE void store_part(float* to, Vec a, int n) {
  _mm256_maskstore_ps(to, first(n), a.lo);
  _mm256_maskstore_ps(to + 8, first(n - 8), a.hi);
}
FASTSAE_INLINE void stream(float* to, Vec a) {
  _mm256_stream_ps(to, a.lo);
  _mm256_stream_ps(to + 8, a.hi);
}

template <class H>
FASTSAE_INLINE Vec load(const H* p) {
  return from_bits(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)), H{});
}
template <class H>
FASTSAE_INLINE void store(H* to, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), to_bits(a.lo, H{}));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), to_bits(a.hi, H{}));
}
// AVX2 has no masked access to 16-bit elements: through a buffer.
template <class H>
FASTSAE_INLINE Vec load_part(const H* p, int n) {
  H part[16] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return load(static_cast<const H*>(part));
}
template <class H>
FASTSAE_INLINE void store_part(H* to, Vec a, int n) {
  H part[16];
  store(static_cast<H*>(part), a);
  for (int i = 0; i < n; ++i) to[i] = part[i];
}
template <class H>
FASTSAE_INLINE void stream(H* to, Vec a) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), to_bits(a.lo, H{}));
  _mm_stream_si128(reinterpret_cast<__m128i*>(to + 8), to_bits(a.hi, H{}));
}

FASTSAE_INLINE Vec gather(const float* p, const int32_t* at) {
  return {_mm256_i32gather_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)), 4),
          _mm256_i32gather_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 8)), 4)};
}

FASTSAE_INLINE float reduce(Vec a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

FASTSAE_INLINE void transpose8(__m256 (&r)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
    r[4 + i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
  }
}

FASTSAE_INLINE void transpose(Vec (&r)[16]) {
  __m256 a[8], b[8], c[8], d[8];
  for (int i = 0; i < 8; ++i) a[i] = r[i].lo, b[i] = r[i].hi, c[i] = r[8 + i].lo, d[i] = r[8 + i].hi;
  transpose8(a), transpose8(b), transpose8(c), transpose8(d);
  for (int i = 0; i < 8; ++i) r[i].lo = a[i], r[i].hi = c[i], r[8 + i].lo = b[i], r[8 + i].hi = d[i];
}

FASTSAE_INLINE void fence() { _mm_sfence(); }

#elif !defined(FASTSAE_NEON)

constexpr int kTile = 4;

typedef float Lanes __attribute__((vector_size(64)));
struct Vec {
  Lanes x;
};

FASTSAE_INLINE Vec zero() { return {Lanes{}}; }
FASTSAE_INLINE Vec broadcast(float x) { return {x - Lanes{}}; }  // a sum would lose the sign of -0
FASTSAE_INLINE Vec add(Vec a, Vec b) { return {a.x + b.x}; }
FASTSAE_INLINE Vec sub(Vec a, Vec b) { return {a.x - b.x}; }
FASTSAE_INLINE Vec mul(Vec a, Vec b) { return {a.x * b.x}; }
FASTSAE_INLINE Vec div(Vec a, Vec b) { return {a.x / b.x}; }
FASTSAE_INLINE Vec root(Vec a) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r.x[i] = __builtin_sqrtf(a.x[i]);
  return r;
}
FASTSAE_INLINE Vec both(Vec a, Vec b) {
  typedef uint32_t Words __attribute__((vector_size(64)));
  return {reinterpret_cast<Lanes>(reinterpret_cast<Words>(a.x) & reinterpret_cast<Words>(b.x))};
}
FASTSAE_INLINE Vec sign(Vec a) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r.x[i] = static_cast<float>((a.x[i] > 0) - (a.x[i] < 0));
  return r;
}
FASTSAE_INLINE Vec fma(Vec a, Vec b, Vec c) {
#ifdef __FP_FAST_FMAF  // aarch64 and other baselines with the instruction; elsewhere a software fma would cost a hundred times more
  Vec r;
  for (int i = 0; i < kLanes; ++i) r.x[i] = __builtin_fmaf(a.x[i], b.x[i], c.x[i]);
  return r;
#else
  return {a.x * b.x + c.x};
#endif
}

FASTSAE_INLINE Vec load(const float* p) {
  Vec a;
  __builtin_memcpy(&a.x, p, 64);
  return a;
}
FASTSAE_INLINE void store(float* to, Vec a) { __builtin_memcpy(to, &a.x, 64); }

template <class H>
FASTSAE_INLINE Vec load(const H* p) {
  float wide[kLanes];
  for (int i = 0; i < kLanes; ++i) wide[i] = widen(p[i]);
  return load(static_cast<const float*>(wide));
}
template <class T>
FASTSAE_INLINE Vec load_part(const T* p, int n) {
  float wide[kLanes] = {};
  for (int i = 0; i < n; ++i) wide[i] = widen(p[i]);
  return load(static_cast<const float*>(wide));
}
template <class T>
FASTSAE_INLINE void store_part(T* to, Vec a, int n) {
  float wide[kLanes];
  store(static_cast<float*>(wide), a);
  for (int i = 0; i < n; ++i) narrow(wide[i], to + i);
}
template <class H>
FASTSAE_INLINE void store(H* to, Vec a) {
  store_part(to, a, kLanes);
}
template <class T>
FASTSAE_INLINE void stream(T* to, Vec a) {
  store(to, a);
}

FASTSAE_INLINE Vec gather(const float* p, const int32_t* at) {
  float each[kLanes];
  for (int i = 0; i < kLanes; ++i) each[i] = p[at[i]];
  return load(static_cast<const float*>(each));
}

FASTSAE_INLINE float reduce(Vec a) {
  float f[kLanes];
  store(static_cast<float*>(f), a);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) f[i] += f[i + half];
  return f[0];
}

FASTSAE_INLINE void transpose(Vec (&r)[16]) {
  float a[16][16];
  for (int i = 0; i < 16; ++i) store(static_cast<float*>(a[i]), r[i]);
  for (int i = 0; i < 16; ++i) {
    float column[16];
    for (int j = 0; j < 16; ++j) column[j] = a[j][i];
    r[i] = load(static_cast<const float*>(column));
  }
}

FASTSAE_INLINE void fence() {}

#endif

}  // namespace
}  // namespace FASTSAE_ISA
}  // namespace fastsae

#ifdef FASTSAE_NEON
#include "neon.isa.h"
#endif

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

FASTSAE_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
FASTSAE_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }  // not into the first-level cache

}  // namespace
}  // namespace FASTSAE_ISA
}  // namespace fastsae
