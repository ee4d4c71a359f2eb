// The sixteen floats of vec.isa.h, which includes this and says what each function does, in four registers of NEON.
#pragma once
#include <arm_neon.h>

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

constexpr int kTile = 6;  // 24 of 32 registers

struct Vec {
  float32x4_t x[4];
};

#define FASTSAE_PARTS 1
typedef float32x4_t Part;
constexpr int kParts = 4;
FASTSAE_INLINE Part& part(Vec& a, int i) { return a.x[i]; }
FASTSAE_INLINE Part load_one(const float* p) { return vld1q_f32(p); }
FASTSAE_INLINE Part fma_one(Part a, Part b, Part c) { return vfmaq_f32(c, a, b); }

template <class F>
FASTSAE_INLINE Vec each(const F& f) {
  return {{f(0), f(1), f(2), f(3)}};
}

FASTSAE_INLINE Vec broadcast(float x) {
  return each([&](int) { return vdupq_n_f32(x); });
}
FASTSAE_INLINE Vec zero() { return broadcast(0); }
FASTSAE_INLINE Vec add(Vec a, Vec b) {
  return each([&](int i) { return vaddq_f32(a.x[i], b.x[i]); });
}
FASTSAE_INLINE Vec sub(Vec a, Vec b) {
  return each([&](int i) { return vsubq_f32(a.x[i], b.x[i]); });
}
FASTSAE_INLINE Vec mul(Vec a, Vec b) {
  return each([&](int i) { return vmulq_f32(a.x[i], b.x[i]); });
}
FASTSAE_INLINE Vec div(Vec a, Vec b) {
  return each([&](int i) { return vdivq_f32(a.x[i], b.x[i]); });
}
FASTSAE_INLINE Vec root(Vec a) {
  return each([&](int i) { return vsqrtq_f32(a.x[i]); });
}
FASTSAE_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return each([&](int i) { return vfmaq_f32(c.x[i], a.x[i], b.x[i]); });
}
FASTSAE_INLINE Vec both(Vec a, Vec b) {
  return each([&](int i) { return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a.x[i]), vreinterpretq_u32_f32(b.x[i]))); });
}
FASTSAE_INLINE Vec sign(Vec a) {
  return each([&](int i) {
    const uint32x4_t plus = vandq_u32(vcgtzq_f32(a.x[i]), vreinterpretq_u32_f32(vdupq_n_f32(1.0f)));
    const uint32x4_t minus = vandq_u32(vcltzq_f32(a.x[i]), vreinterpretq_u32_f32(vdupq_n_f32(-1.0f)));
    return vreinterpretq_f32_u32(vorrq_u32(plus, minus));
  });
}

FASTSAE_INLINE float32x4_t from_bits(uint16x4_t half, bf16) { return vreinterpretq_f32_u32(vshll_n_u16(half, 16)); }
FASTSAE_INLINE float32x4_t from_bits(uint16x4_t half, f16) { return vcvt_f32_f16(vreinterpret_f16_u16(half)); }
FASTSAE_INLINE uint16x4_t to_bits(float32x4_t a, bf16) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a), high = vshrq_n_u32(bits, 16);
  const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), vandq_u32(high, vdupq_n_u32(1))), 16);
  return vmovn_u32(vbslq_u32(vceqq_f32(a, a), rounded, vorrq_u32(high, vdupq_n_u32(0x40))));
}
FASTSAE_INLINE uint16x4_t to_bits(float32x4_t a, f16) { return vreinterpret_u16_f16(vcvt_f16_f32(a)); }

FASTSAE_INLINE Vec load(const float* p) {
  return each([&](int i) { return vld1q_f32(p + 4 * i); });
}
template <class H>
FASTSAE_INLINE Vec load(const H* p) {
  return each([&](int i) { return from_bits(vld1_u16(&p->bits + 4 * i), H{}); });
}
FASTSAE_INLINE void store(float* to, Vec a) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) vst1q_f32(to + 4 * i, a.x[i]);
}
template <class H>
FASTSAE_INLINE void store(H* to, Vec a) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) vst1_u16(&to->bits + 4 * i, to_bits(a.x[i], H{}));
}
// There is no masked access: through a buffer.
template <class T>
FASTSAE_INLINE Vec load_part(const T* p, int n) {
  T part[kLanes] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return load(static_cast<const T*>(part));
}
template <class T>
FASTSAE_INLINE void store_part(T* to, Vec a, int n) {
  T part[kLanes];
  store(static_cast<T*>(part), a);
  for (int i = 0; i < n; ++i) to[i] = part[i];
}
template <class T>
FASTSAE_INLINE void stream(T* to, Vec a) {
  store(to, a);
}

FASTSAE_INLINE Vec gather(const float* p, const int32_t* at) {
  return each([&](int i) { return float32x4_t{p[at[4 * i]], p[at[4 * i + 1]], p[at[4 * i + 2]], p[at[4 * i + 3]]}; });
}

FASTSAE_INLINE float reduce(Vec a) {
  const float32x4_t four = vaddq_f32(vaddq_f32(a.x[0], a.x[2]), vaddq_f32(a.x[1], a.x[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

// Blocks of four by four, each transposed to the place of its mirror image.
FASTSAE_INLINE void transpose(Vec (&r)[16]) {
  Vec t[16];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const auto pairs = [](float32x4_t a, float32x4_t b, bool odd) {
        return vreinterpretq_f64_f32(odd ? vtrn2q_f32(a, b) : vtrn1q_f32(a, b));
      };
      const float32x4_t a = r[4 * i].x[j], b = r[4 * i + 1].x[j], c = r[4 * i + 2].x[j], d = r[4 * i + 3].x[j];
      t[4 * j].x[i] = vreinterpretq_f32_f64(vtrn1q_f64(pairs(a, b, false), pairs(c, d, false)));
      t[4 * j + 1].x[i] = vreinterpretq_f32_f64(vtrn1q_f64(pairs(a, b, true), pairs(c, d, true)));
      t[4 * j + 2].x[i] = vreinterpretq_f32_f64(vtrn2q_f64(pairs(a, b, false), pairs(c, d, false)));
      t[4 * j + 3].x[i] = vreinterpretq_f32_f64(vtrn2q_f64(pairs(a, b, true), pairs(c, d, true)));
    }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

FASTSAE_INLINE void fence() {}

// A bit for each lane of sixteen: of bytes, of f(0) to f(3).
FASTSAE_INLINE uint16_t mask_of(uint8x16_t on) {
  constexpr uint8_t kBits[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  const uint8x16_t bits = vandq_u8(on, vld1q_u8(kBits));
  return static_cast<uint16_t>(vaddv_u8(vget_low_u8(bits)) | vaddv_u8(vget_high_u8(bits)) << 8);
}
template <class F>
FASTSAE_INLINE uint16_t mask(const F& f) {
  const uint16x8_t low = vcombine_u16(vmovn_u32(f(0)), vmovn_u32(f(1))), high = vcombine_u16(vmovn_u32(f(2)), vmovn_u32(f(3)));
  return mask_of(vcombine_u8(vmovn_u16(low), vmovn_u16(high)));
}

}  // namespace
}  // namespace FASTSAE_ISA
}  // namespace fastsae
