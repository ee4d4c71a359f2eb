// Signs to bits, bits to hashes. A sign is read from the bits of a float: 0 < bits <= infinity as integers, which is 0 for -0 and NaN and
// knows no rounding mode and no denormals-as-zero.
#include "cpu/signs.h"

#include "isa.h"

#ifndef FASTSAE_ONLY_SCREENS
#include "cpu/keys.isa.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

struct boolean {
  uint8_t bits;
};

constexpr uint32_t kInfinity = 0x7f800000;
template <class H>
constexpr uint16_t kHalfInfinity = 0x7f80;
template <>
constexpr uint16_t kHalfInfinity<f16> = 0x7c00;

// 64 elements to 64 bits.
#if defined(__AVX512F__)

FASTSAE_INLINE uint64_t pack64(const float* z) {
  const __m512i one = _mm512_set1_epi32(1), infinity = _mm512_set1_epi32(kInfinity);
  uint64_t word = 0;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i below = _mm512_sub_epi32(_mm512_loadu_si512(z + 16 * i), one);
    word |= static_cast<uint64_t>(_mm512_cmplt_epu32_mask(below, infinity)) << (16 * i);
  }
  return word;
}
template <class H>
FASTSAE_INLINE uint64_t pack64(const H* z) {
  const __m512i one = _mm512_set1_epi16(1), infinity = _mm512_set1_epi16(static_cast<int16_t>(kHalfInfinity<H>));
  const uint64_t low = _mm512_cmplt_epu16_mask(_mm512_sub_epi16(_mm512_loadu_si512(z), one), infinity);
  const uint64_t high = _mm512_cmplt_epu16_mask(_mm512_sub_epi16(_mm512_loadu_si512(z + 32), one), infinity);
  return low | high << 32;
}
FASTSAE_INLINE uint64_t pack64(const boolean* z) {
  const __m512i bytes = _mm512_loadu_si512(z);
  return _mm512_test_epi8_mask(bytes, bytes);
}

#elif defined(__AVX2__)

FASTSAE_INLINE __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
FASTSAE_INLINE uint64_t pack64(const float* z) {
  const __m256i zero = _mm256_setzero_si256(), beyond = _mm256_set1_epi32(kInfinity + 1);
  uint64_t word = 0;
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m256i bits = load32(z + 8 * i);
    const __m256i on = _mm256_and_si256(_mm256_cmpgt_epi32(bits, zero), _mm256_cmpgt_epi32(beyond, bits));
    word |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(on)))) << (8 * i);
  }
  return word;
}
template <class H>
FASTSAE_INLINE uint64_t pack64(const H* z) {
  const __m256i zero = _mm256_setzero_si256(), beyond = _mm256_set1_epi16(static_cast<int16_t>(kHalfInfinity<H> + 1));
  uint64_t word = 0;
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    __m256i on[2];
    for (int j = 0; j < 2; ++j) {
      const __m256i bits = load32(z + 32 * i + 16 * j);
      on[j] = _mm256_and_si256(_mm256_cmpgt_epi16(bits, zero), _mm256_cmpgt_epi16(beyond, bits));
    }
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(on[0], on[1]), 0xd8);  // packs works in halves of a register
    word |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(bytes))) << (32 * i);
  }
  return word;
}
FASTSAE_INLINE uint64_t pack64(const boolean* z) {
  const __m256i zero = _mm256_setzero_si256();
  const uint32_t low = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(load32(z), zero)));
  const uint32_t high = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(load32(z + 32), zero)));
  return ~(low | static_cast<uint64_t>(high) << 32);
}

#elif defined(FASTSAE_NEON)

// Sixteen elements each.
FASTSAE_INLINE uint16_t pack16(const float* z) {
  const uint32x4_t infinity = vdupq_n_u32(kInfinity);
  return mask([&](int i) { return vcltq_u32(vsubq_u32(vreinterpretq_u32_f32(vld1q_f32(z + 4 * i)), vdupq_n_u32(1)), infinity); });
}
template <class H>
FASTSAE_INLINE uint16_t pack16(const H* z) {
  const auto on = [&](int i) { return vmovn_u16(vcltq_u16(vsubq_u16(vld1q_u16(&z->bits + i), vdupq_n_u16(1)), vdupq_n_u16(kHalfInfinity<H>))); };
  return mask_of(vcombine_u8(on(0), on(8)));
}
FASTSAE_INLINE uint16_t pack16(const boolean* z) {
  const uint8x16_t bytes = vld1q_u8(&z->bits);
  return mask_of(vtstq_u8(bytes, bytes));
}
template <class T>
FASTSAE_INLINE uint64_t pack64(const T* z) {
  uint64_t word = 0;
  for (int i = 0; i < 64; i += 16) word |= static_cast<uint64_t>(pack16(z + i)) << i;
  return word;
}

#else

FASTSAE_INLINE bool on(float x) { return as_bits(x) - 1 < kInfinity; }
template <class H>
FASTSAE_INLINE bool on(H x) {
  return static_cast<uint16_t>(x.bits - 1) < kHalfInfinity<H>;
}
FASTSAE_INLINE bool on(boolean x) { return x.bits != 0; }
template <class T>
FASTSAE_INLINE uint64_t pack64(const T* z) {
  uint64_t word = 0;
  for (int i = 0; i < 64; ++i) word |= static_cast<uint64_t>(on(z[i])) << i;
  return word;
}

#endif

template <class T>
void pack(const void* row, int64_t n, const uint64_t* mask, uint64_t* words) {
  const T* const z = static_cast<const T*>(row);
  int64_t w = 0;
  for (; n - w * kWordBits >= kWordBits; ++w) words[w] = pack64(z + w * kWordBits);
  if (const int64_t left = n - w * kWordBits; left > 0) {
    T last[kWordBits] = {};
    for (int64_t i = 0; i < left; ++i) last[i] = z[w * kWordBits + i];
    words[w++] = pack64(static_cast<const T*>(last));
  }
  if (mask != nullptr)
    for (int64_t i = 0; i < w; ++i) words[i] &= mask[i];
}

template <int R>
FASTSAE_INLINE void hash_rows(const uint64_t* words, int64_t stride, int64_t n_words, const int64_t* keys, int64_t* out,
                              int64_t out_stride) {
  const uint64_t* rows[R];
  int64_t hashes[R];
  for (int r = 0; r < R; ++r) rows[r] = words + r * stride;
  xor_keys<R>(rows, n_words, keys, hashes);
  for (int r = 0; r < R; ++r) out[r * out_stride] = hashes[r];
}

void hash(const uint64_t* words, int64_t stride, int64_t rows, int64_t n_words, const int64_t* keys, int64_t* out, int64_t out_stride) {
  int64_t r = 0;
  for (; rows - r >= 4; r += 4) hash_rows<4>(words + r * stride, stride, n_words, keys, out + r * out_stride, out_stride);
  for (; r < rows; ++r) hash_rows<1>(words + r * stride, stride, n_words, keys, out + r * out_stride, out_stride);
}

}  // namespace

const SignsKernels signs_kernels = {{pack<float>, pack<bf16>, pack<f16>, pack<boolean>}, hash};

}  // namespace FASTSAE_ISA
}  // namespace fastsae
#endif
