// Hashes as the XOR of the keys of active neurons (keys.h).
#pragma once
#include "cpu/keys.h"
#include "vec.isa.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

// out[r] = XOR of keys[64 * w + j] over the bits j that are set in rows[r][w], w < words. R rows share each loaded key.
#if defined(__AVX512F__)
template <int R>
FASTSAE_INLINE void xor_keys(const uint64_t* const (&rows)[R], int64_t words, const int64_t* keys, int64_t (&out)[R]) {
  __m512i total[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) total[r] = _mm512_setzero_si512();
  for (int64_t w = 0; w < words; ++w) {
#pragma GCC unroll 8
    for (int part = 0; part < 8; ++part) {
      const __m512i key = _mm512_loadu_si512(keys + w * 64 + part * 8);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __mmask8 active = reinterpret_cast<const uint8_t*>(rows[r] + w)[part];  // a mask register is loaded from memory
        total[r] = _mm512_mask_xor_epi64(total[r], active, total[r], key);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const __m256i four = _mm256_xor_si256(_mm512_castsi512_si256(total[r]), _mm512_extracti64x4_epi64(total[r], 1));
    const __m128i two = _mm_xor_si128(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
    out[r] = _mm_cvtsi128_si64(_mm_xor_si128(two, _mm_unpackhi_epi64(two, two)));
  }
}
#elif defined(__AVX2__)
template <int R>
FASTSAE_INLINE void xor_keys(const uint64_t* const (&rows)[R], int64_t words, const int64_t* keys, int64_t (&out)[R]) {
  const __m256i bit = _mm256_setr_epi64x(1, 2, 4, 8);
  __m256i total[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) total[r] = _mm256_setzero_si256();
  for (int64_t w = 0; w < words; ++w) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      __m256i word = _mm256_set1_epi64x(static_cast<int64_t>(rows[r][w]));
#pragma GCC unroll 16
      for (int part = 0; part < 16; ++part, word = _mm256_srli_epi64(word, 4)) {
        const __m256i active = _mm256_cmpeq_epi64(_mm256_and_si256(word, bit), bit);
        const __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + w * 64 + part * 4));
        total[r] = _mm256_xor_si256(total[r], _mm256_and_si256(active, key));
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const __m128i two = _mm_xor_si128(_mm256_castsi256_si128(total[r]), _mm256_extracti128_si256(total[r], 1));
    out[r] = _mm_cvtsi128_si64(_mm_xor_si128(two, _mm_unpackhi_epi64(two, two)));
  }
}
#else
template <int R>
FASTSAE_INLINE void xor_keys(const uint64_t* const (&rows)[R], int64_t words, const int64_t* keys, int64_t (&out)[R]) {
  for (int r = 0; r < R; ++r) {
    out[r] = 0;
    for (int64_t w = 0; w < words; ++w)
      for (uint64_t word = rows[r][w]; word != 0; word &= word - 1) out[r] ^= keys[w * 64 + __builtin_ctzll(word)];
  }
}
#endif

}  // namespace
}  // namespace FASTSAE_ISA
}  // namespace fastsae
