// Hamming distances of packed codes: 16 codes side by side in 32-bit lanes, so that counts need no sum across lanes.
//
// avx512 counts with VPOPCNTD where the CPU has it, which no level promises: a function of its own, chosen at run
// time. Elsewhere bytes are counted: by CNT (NEON), through a table of nibbles (vpshufb; Mula 2008) or by halving (portable), and joined every kBytesHold
// halves.
#include "cpu/hamming.h"

#include "integers.h"
#include "isa.h"

#ifndef FASTSAE_ONLY_SCREENS
#include "vec.isa.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

constexpr int64_t kBytesHold = 30;  // a byte gains at most 8 for each half, and holds 255

// 16 lanes of 32 bits.
// count: the bits of every byte. join: total + the four bytes of each lane.
#if defined(__AVX512F__)

constexpr int kGroups = 4;      // groups that meet each broadcast row: 16 totals of 32 registers
constexpr int kByteGroups = 2;  // the same with bytes

struct Bits {
  __m512i x;
};

FASTSAE_INLINE Bits none() { return {_mm512_setzero_si512()}; }
FASTSAE_INLINE Bits load_bits(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
FASTSAE_INLINE Bits differ(Bits a, int32_t b) { return {_mm512_xor_si512(a.x, _mm512_set1_epi32(b))}; }
FASTSAE_INLINE Bits add_bytes(Bits a, Bits b) { return {_mm512_add_epi8(a.x, b.x)}; }
FASTSAE_INLINE Bits count(Bits a) {
  const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m512i low = _mm512_set1_epi8(15);
  return {_mm512_add_epi8(_mm512_shuffle_epi8(table, _mm512_and_si512(a.x, low)),
                          _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(a.x, 4), low)))};
}
FASTSAE_INLINE Bits join(Bits total, Bits bytes) {
  const __m512i pairs = _mm512_maddubs_epi16(bytes.x, _mm512_set1_epi8(1));
  return {_mm512_add_epi32(total.x, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
}
FASTSAE_INLINE void store_bits(int32_t* to, Bits a) { _mm512_storeu_si512(to, a.x); }
FASTSAE_INLINE void store_bits_part(int32_t* to, Bits a, int n) { _mm512_mask_storeu_epi32(to, first(n), a.x); }
FASTSAE_INLINE void stream_bits(int32_t* to, Bits a) { _mm512_stream_si512(reinterpret_cast<__m512i*>(to), a.x); }
FASTSAE_INLINE uint32_t lanes_below(const int32_t* p, int32_t limit) {
  return _mm512_cmplt_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(limit));
}

#elif defined(__AVX2__)

constexpr int kByteGroups = 1;  // 8 of 16 registers for the bytes of four rows

struct Bits {
  __m256i lo, hi;
};

FASTSAE_INLINE Bits none() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
FASTSAE_INLINE Bits load_bits(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
FASTSAE_INLINE Bits differ(Bits a, int32_t b) {
  const __m256i all = _mm256_set1_epi32(b);
  return {_mm256_xor_si256(a.lo, all), _mm256_xor_si256(a.hi, all)};
}
FASTSAE_INLINE Bits add_bytes(Bits a, Bits b) { return {_mm256_add_epi8(a.lo, b.lo), _mm256_add_epi8(a.hi, b.hi)}; }
FASTSAE_INLINE __m256i count(__m256i a) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m256i low = _mm256_set1_epi8(15);
  return _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(a, low)),
                         _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(a, 4), low)));
}
FASTSAE_INLINE Bits count(Bits a) { return {count(a.lo), count(a.hi)}; }
FASTSAE_INLINE __m256i join(__m256i total, __m256i bytes) {
  const __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi8(1));
  return _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
FASTSAE_INLINE Bits join(Bits total, Bits bytes) { return {join(total.lo, bytes.lo), join(total.hi, bytes.hi)}; }
FASTSAE_INLINE void store_bits(int32_t* to, Bits a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8), a.hi);
}
FASTSAE_INLINE void store_bits_part(int32_t* to, Bits a, int n) {
  _mm256_maskstore_epi32(to, first(n), a.lo);
  _mm256_maskstore_epi32(to + 8, first(n - 8), a.hi);
}
FASTSAE_INLINE void stream_bits(int32_t* to, Bits a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), a.lo);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to + 8), a.hi);
}
FASTSAE_INLINE uint32_t lanes_below(const int32_t* p, int32_t limit) {
  const Bits d = load_bits(p);
  const __m256i all = _mm256_set1_epi32(limit);
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(all, d.lo)))) |
         static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(all, d.hi)))) << 8;
}

#elif defined(FASTSAE_NEON)

constexpr int kByteGroups = 1;  // 16 of 32 registers for the bytes of four rows

struct Bits {
  uint32x4_t x[4];
};

template <class F>
FASTSAE_INLINE Bits each_bits(const F& f) {
  return {{f(0), f(1), f(2), f(3)}};
}
FASTSAE_INLINE Bits none() {
  return each_bits([](int) { return vdupq_n_u32(0); });
}
FASTSAE_INLINE Bits load_bits(const int32_t* p) {
  return each_bits([&](int i) { return vreinterpretq_u32_s32(vld1q_s32(p + 4 * i)); });
}
FASTSAE_INLINE Bits differ(Bits a, int32_t b) {
  return each_bits([&](int i) { return veorq_u32(a.x[i], vdupq_n_u32(static_cast<uint32_t>(b))); });
}
FASTSAE_INLINE Bits add_bytes(Bits a, Bits b) {
  return each_bits([&](int i) { return vaddq_u32(a.x[i], b.x[i]); });  // no byte overflows into the next
}
FASTSAE_INLINE Bits count(Bits a) {
  return each_bits([&](int i) { return vreinterpretq_u32_u8(vcntq_u8(vreinterpretq_u8_u32(a.x[i]))); });
}
FASTSAE_INLINE Bits join(Bits total, Bits bytes) {
  return each_bits([&](int i) { return vpadalq_u16(total.x[i], vpaddlq_u8(vreinterpretq_u8_u32(bytes.x[i]))); });
}
FASTSAE_INLINE void store_bits(int32_t* to, Bits a) {
  for (int i = 0; i < 4; ++i) vst1q_s32(to + 4 * i, vreinterpretq_s32_u32(a.x[i]));
}
FASTSAE_INLINE void store_bits_part(int32_t* to, Bits a, int n) {
  int32_t part[kGroup];
  store_bits(static_cast<int32_t*>(part), a);
  for (int i = 0; i < n; ++i) to[i] = part[i];
}
FASTSAE_INLINE void stream_bits(int32_t* to, Bits a) { store_bits(to, a); }
FASTSAE_INLINE uint32_t lanes_below(const int32_t* p, int32_t limit) {
  return mask([&](int i) { return vcltq_s32(vld1q_s32(p + 4 * i), vdupq_n_s32(limit)); });
}

#else

constexpr int kByteGroups = 1;

typedef uint32_t Words __attribute__((vector_size(64)));
struct Bits {
  Words x;
};

FASTSAE_INLINE Bits none() { return {Words{}}; }
FASTSAE_INLINE Bits load_bits(const int32_t* p) {
  Bits a;
  __builtin_memcpy(&a.x, p, 64);
  return a;
}
FASTSAE_INLINE Bits differ(Bits a, int32_t b) { return {a.x ^ static_cast<uint32_t>(b)}; }
FASTSAE_INLINE Bits add_bytes(Bits a, Bits b) { return {a.x + b.x}; }  // no byte overflows into the next
FASTSAE_INLINE Bits count(Bits a) {
  const Words pairs = a.x - ((a.x >> 1) & 0x55555555u);
  const Words nibbles = (pairs & 0x33333333u) + ((pairs >> 2) & 0x33333333u);
  return {(nibbles + (nibbles >> 4)) & 0x0f0f0f0fu};
}
FASTSAE_INLINE Bits join(Bits total, Bits bytes) {
  const Words pairs = (bytes.x & 0x00ff00ffu) + ((bytes.x >> 8) & 0x00ff00ffu);
  return {total.x + (pairs & 0xffffu) + (pairs >> 16)};
}
FASTSAE_INLINE void store_bits(int32_t* to, Bits a) { __builtin_memcpy(to, &a.x, 64); }
FASTSAE_INLINE void store_bits_part(int32_t* to, Bits a, int n) {
  for (int i = 0; i < n; ++i) to[i] = static_cast<int32_t>(a.x[i]);
}
FASTSAE_INLINE void stream_bits(int32_t* to, Bits a) { store_bits(to, a); }
FASTSAE_INLINE uint32_t lanes_below(const int32_t* p, int32_t limit) {
  uint32_t mask = 0;
  for (int i = 0; i < kGroup; ++i) mask |= static_cast<uint32_t>(p[i] < limit) << i;
  return mask;
}

#endif

FASTSAE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

typedef int32_t Half __attribute__((may_alias));  // half of an int64 word; which half comes first does not matter to a count

struct Rows {
  const Half* half[kCodeRows];
};

// Rows i .. i + 3; beyond the last one, the last one again, whose result is not stored.
FASTSAE_INLINE Rows rows_at(const DistanceJob& job, int64_t i) {
  Rows rows;
  for (int64_t r = 0; r < kCodeRows; ++r) rows.half[r] = reinterpret_cast<const Half*>(job.a + least(i + r, job.rows - 1) * job.stride);
  return rows;
}

template <int G>
FASTSAE_INLINE void store_tile(const DistanceJob& job, int64_t i, int64_t group, const Bits (&total)[kCodeRows][G]) {
  const int64_t rows = least(kCodeRows, job.rows - i);
  for (int64_t r = 0; r < rows; ++r) {
    int32_t* const to = job.out + (i + r) * job.out_stride + group * kGroup;
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const int64_t left = job.codes - (group + g) * kGroup;
      if (left < kGroup)
        store_bits_part(to + g * kGroup, total[r][g], static_cast<int>(left));
      else if (job.stream)
        stream_bits(to + g * kGroup, total[r][g]);
      else
        store_bits(to + g * kGroup, total[r][g]);
    }
  }
}

template <int G>
FASTSAE_INLINE void tile(const DistanceJob& job, const Rows& rows, int64_t i, int64_t group) {
  const int64_t halves = 2 * job.words;
  const int32_t* const panel = job.panel + group * halves * kGroup;
  Bits total[kCodeRows][G];
#pragma GCC unroll 4
  for (int r = 0; r < kCodeRows; ++r)
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) total[r][g] = none();
  for (int64_t t = 0; t < halves;) {
    const int64_t stop = least(t + kBytesHold, halves);
    Bits bytes[kCodeRows][G];
#pragma GCC unroll 4
    for (int r = 0; r < kCodeRows; ++r)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) bytes[r][g] = none();
    for (; t < stop; ++t) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const Bits codes = load_bits(panel + (g * halves + t) * kGroup);
#pragma GCC unroll 4
        for (int r = 0; r < kCodeRows; ++r) bytes[r][g] = add_bytes(bytes[r][g], count(differ(codes, rows.half[r][t])));
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kCodeRows; ++r)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) total[r][g] = join(total[r][g], bytes[r][g]);
  }
  store_tile<G>(job, i, group, total);
}

void distances(const DistanceJob& job) {
  const int64_t groups = ceil_div(job.codes, kGroup);
  for (int64_t i = 0; i < job.rows; i += kCodeRows) {
    const Rows rows = rows_at(job, i);
    int64_t group = 0;
    for (; groups - group >= kByteGroups; group += kByteGroups) tile<kByteGroups>(job, rows, i, group);
    for (; group < groups; ++group) tile<1>(job, rows, i, group);
  }
  if (job.stream) fence();
}

#if defined(__AVX512F__)

#define FASTSAE_VPOPCNT __attribute__((target("avx512vpopcntdq")))

template <int G>
FASTSAE_VPOPCNT void tile_vpopcnt(const DistanceJob& job, const Rows& rows, int64_t i, int64_t group) {
  const int64_t halves = 2 * job.words;
  const int32_t* const panel = job.panel + group * halves * kGroup;
  Bits total[kCodeRows][G];
#pragma GCC unroll 4
  for (int r = 0; r < kCodeRows; ++r)
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) total[r][g] = none();
  for (int64_t t = 0; t < halves; ++t) {
    Bits codes[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) codes[g] = load_bits(panel + (g * halves + t) * kGroup);
#pragma GCC unroll 4
    for (int r = 0; r < kCodeRows; ++r)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) total[r][g].x = _mm512_add_epi32(total[r][g].x, _mm512_popcnt_epi32(differ(codes[g], rows.half[r][t]).x));
  }
  store_tile<G>(job, i, group, total);
}

FASTSAE_VPOPCNT void distances_vpopcnt(const DistanceJob& job) {
  const int64_t groups = ceil_div(job.codes, kGroup);
  for (int64_t i = 0; i < job.rows; i += kCodeRows) {
    const Rows rows = rows_at(job, i);
    int64_t group = 0;
    for (; groups - group >= kGroups; group += kGroups) tile_vpopcnt<kGroups>(job, rows, i, group);
    for (; group < groups; ++group) tile_vpopcnt<1>(job, rows, i, group);
  }
  if (job.stream) fence();
}

constexpr auto kVpopcnt = distances_vpopcnt;
#else
constexpr void (*kVpopcnt)(const DistanceJob&) = nullptr;
#endif

void pack(const CodePanel& job) {
  const int64_t halves = 2 * job.words;
  for (int64_t group = 0; group * kGroup < job.count; ++group) {
    int32_t* const to = job.panel + group * halves * kGroup;
    const int64_t lanes = least(kGroup, job.count - group * kGroup);
    int64_t t = 0;
    for (; lanes == kGroup && halves - t >= kLanes; t += kLanes) {
      Vec block[kLanes];  // bits in float registers: loads, shuffles and stores keep them
      for (int64_t lane = 0; lane < kGroup; ++lane)
        block[lane] = load(reinterpret_cast<const float*>(job.codes + (group * kGroup + lane) * job.stride) + t);
      transpose(block);
      for (int64_t s = 0; s < kLanes; ++s) store(reinterpret_cast<float*>(to + (t + s) * kGroup), block[s]);
    }
    for (; t < halves; ++t)
      for (int64_t lane = 0; lane < kGroup; ++lane)
        to[t * kGroup + lane] = lane < lanes ? reinterpret_cast<const Half*>(job.codes + (group * kGroup + lane) * job.stride)[t] : 0;
  }
}

int64_t below(const int32_t* distances, int64_t n, int32_t limit, int32_t* found) {
  int64_t count = 0, i = 0;
  for (; n - i >= kGroup; i += kGroup)
    for (uint32_t mask = lanes_below(distances + i, limit); mask != 0; mask &= mask - 1)
      found[count++] = static_cast<int32_t>(i) + __builtin_ctz(mask);
  for (; i < n; ++i)
    if (distances[i] < limit) found[count++] = static_cast<int32_t>(i);
  return count;
}

}  // namespace

const HammingKernels hamming_kernels = {pack, distances, kVpopcnt, below};

}  // namespace FASTSAE_ISA
}  // namespace fastsae
#endif
