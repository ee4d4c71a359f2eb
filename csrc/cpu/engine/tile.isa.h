// The tile engine: a block of packed feature panels against tiles of packed rows, and what a screen may conclude from it. Only for
// *.isa.cpp of a level that can screen.
//
// A screen is a class with
//   void panel(const ScreenPanels& p, int panel);           the features of the products to come
//   void row(int64_t row, Vec r0, Vec r1);            screened products of one row with features 0-15 and 16-31 of that panel
// and gets from Features an interval that contains the score of fastsae.h. It decides what the interval decides and hands the rest to the
// exact score (Scorer); nothing else may rest on a screened product.
#pragma once
#include "cpu/engine/kernels.h"
#include "cpu/engine/lanes.isa.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

constexpr int64_t kCacheBytes = int64_t{512} << 10;  // of panels, of a second-level cache of 1 MiB or more

// The features of one panel, as vectors of 16.
template <bool kScaled>
struct Features {
  Vec norm[2], loss[2], floor[2], scale[2], bias[2];
  int64_t first;
  uint32_t exist;  // one bit a feature

  FASTSAE_INLINE void set(const ScreenPanels& p, int panel) {
    for (int h = 0; h < 2; ++h) {
      const int64_t at = static_cast<int64_t>(panel) * kPanelWidth + 16 * h;
      norm[h] = load(p.norm + at);
      loss[h] = load(p.loss + at);
      floor[h] = load(p.floor + at);
      if (kScaled) scale[h] = load(p.scale + at);
      bias[h] = load(p.bias + at);
    }
    first = p.first + static_cast<int64_t>(panel) * kPanelWidth;
    const int64_t left = p.features - static_cast<int64_t>(panel) * kPanelWidth;
    exist = left >= kPanelWidth ? ~0u : (1u << left) - 1u;
  }
  FASTSAE_INLINE Vec slack(int h, Vec a, Vec c) const {
    return fma(a, norm[h], fma(c, loss[h], floor[h]));
  }
  // The bias is 0 where there is none: adding it only turns -0 into +0, which compare equal.
  FASTSAE_INLINE Vec score(int h, Vec r) const {
    if (kScaled) r = mul(r, scale[h]);
    return add(r, bias[h]);
  }
  FASTSAE_INLINE Vec upper(int h, Vec r, Vec e) const { return score(h, add(r, e)); }
  FASTSAE_INLINE Vec lower(int h, Vec r, Vec e) const { return score(h, sub(r, e)); }
};

// The same for magnitudes: of [low, high] the upper end is max(high, -low), the lower one max(low, -high), of which one may be below 0.
template <bool kScaled>
struct Magnitudes : Features<kScaled> {
  FASTSAE_INLINE Vec upper(int h, Vec r, Vec e) const {
    return larger_or_nan(Features<kScaled>::upper(h, r, e), negative(Features<kScaled>::lower(h, r, e)));
  }
  FASTSAE_INLINE Vec lower(int h, Vec r, Vec e) const {
    return larger_or_nan(Features<kScaled>::lower(h, r, e), negative(Features<kScaled>::upper(h, r, e)));
  }

};

// Appends the marked features of a panel to a row's undecided ones, with the ends of their intervals.
template <class F>
__attribute__((noinline)) void append(const Undecided& to, int64_t row, uint32_t mask, const F& f, Vec r0, Vec r1, Vec e0,
                                      Vec e1) {
  int64_t n = to.n[row];
  for (int h = 0; h < 2; ++h) {
    const Mask m = static_cast<Mask>(mask >> (16 * h));
    if (m == 0) continue;
    const Vec r = h == 0 ? r0 : r1, e = h == 0 ? e0 : e1;
    const int64_t at = row * to.stride + n;
    if (to.lo != nullptr) {
      compact(to.lo + at, m, f.lower(h, r, e));
      compact(to.hi + at, m, f.upper(h, r, e));
    }
    n += compact(to.id + at, m, ascending(static_cast<int32_t>(f.first + 16 * h)));
  }
  to.n[row] = static_cast<int32_t>(n);
}

// Walks the lines of `Prefetch`, a few at a time.
struct Prefetcher {
  const char* at;
  int64_t segments, lines, stride, line;
  explicit FASTSAE_INLINE Prefetcher(const Prefetch& a) : at(a.base), segments(a.segments), lines(a.lines), stride(a.stride), line(0) {}
  FASTSAE_INLINE void some(int n) {
    for (; n > 0 && segments > 0; --n) {
      prefetch_far(at + line * 64);
      if (++line == lines) {
        line = 0;
        at += stride;
        --segments;
      }
    }
  }
};

constexpr int64_t kStep = 32;  // words between two prefetches

// c[i][32] = integer products of MR rows and the 32 features of a panel, as fp32.
#if defined(FASTSAE_LEVEL_neon_i8mm)

// Two features by two rows and eight elements an instruction: words are taken in pairs, of rows as word_at has them. An odd last word
// meets zeros.
template <int MR>
void tile_int8(const uint32_t* x, const uint32_t* w, int64_t words, const int32_t* start, int, float* c, Prefetcher& prefetcher,
               int quota) {
  constexpr int kPairs = (MR + 1) / 2;
  const auto two = [](const uint32_t* p, int i) { return vcombine_u32(vld1_u32(p), i + 1 < MR ? vld1_u32(p + 2) : vdup_n_u32(0)); };
  for (int f = 0; f < kPanelWidth; f += 8) {
    int32x4_t s[4][kPairs];
#pragma GCC unroll 6
    for (int p = 0; p < kPairs; ++p) {
      const int32x2_t both = {start[2 * p], start[2 * p + 1 < MR ? 2 * p + 1 : 2 * p]};
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) s[j][p] = vcombine_s32(both, both);
    }
    for (int64_t d = 0; d < words;) {
      const int64_t stop = at_most(d + kStep, words);
      if (f == 0) prefetcher.some(quota);
      for (; d < stop; d += 2) {
        const bool odd = d + 1 == words;
        const uint32_t *const w0 = w + d * kPanelWidth + f, *const w1 = odd ? w0 : w0 + kPanelWidth, *const xd = x + d * MR;
        const uint32x4_t a0 = vld1q_u32(w0), b0 = vld1q_u32(w0 + 4), a1 = vld1q_u32(w1), b1 = vld1q_u32(w1 + 4);
        const uint32x4_t v[4] = {vzip1q_u32(a0, a1), vzip2q_u32(a0, a1), vzip1q_u32(b0, b1), vzip2q_u32(b0, b1)};
#pragma GCC unroll 6
        for (int p = 0; p < kPairs; ++p) {
          uint32x4_t rows;
          if (__builtin_expect(odd, 0))
            rows = uint32x4_t{xd[2 * p], 0, 2 * p + 1 < MR ? xd[2 * p + 1] : 0, 0};
          else
            rows = two(xd + 4 * p, 2 * p);
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) s[j][p] = vusmmlaq_s32(s[j][p], vreinterpretq_u8_u32(v[j]), vreinterpretq_s8_u32(rows));
        }
      }
    }
#pragma GCC unroll 6
    for (int p = 0; p < kPairs; ++p)
#pragma GCC unroll 2
      for (int j = 0; j < 4; j += 2) {
        float* const to = c + 2 * p * kPanelWidth + f + 2 * j;
        vst1q_f32(to, vcvtq_f32_s32(vuzp1q_s32(s[j][p], s[j + 1][p])));
        if (2 * p + 1 < MR) vst1q_f32(to + kPanelWidth, vcvtq_f32_s32(vuzp2q_s32(s[j][p], s[j + 1][p])));
      }
  }
}

#elif defined(FASTSAE_LEVEL_neon_dotprod)

// Eight features at a time: their accumulators fit the registers. Features lose their 128 again, SDOT takes signed numbers only.
template <int MR>
void tile_int8(const uint32_t* x, const uint32_t* w, int64_t words, const int32_t*, int, float* c, Prefetcher& prefetcher, int quota) {
  for (int f = 0; f < kPanelWidth; f += 8) {
    int32x4_t s0[MR], s1[MR];
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i) s0[i] = s1[i] = vdupq_n_s32(0);
    for (int64_t d = 0; d < words;) {
      const int64_t stop = at_most(d + kStep, words);
      if (f == 0) prefetcher.some(quota);
      for (; d < stop; ++d) {
        const auto feature = [&](int i) {
          return vreinterpretq_s8_u32(veorq_u32(vld1q_u32(w + d * kPanelWidth + f + i), vdupq_n_u32(0x80808080)));
        };
        const int8x16_t w0 = feature(0), w1 = feature(4);
        const uint32_t* const xd = x + d * MR;
#pragma GCC unroll 12
        for (int i = 0; i < MR; ++i) {
          const int8x16_t xi = vreinterpretq_s8_u32(vdupq_n_u32(xd[i]));
          s0[i] = vdotq_s32(s0[i], w0, xi);
          s1[i] = vdotq_s32(s1[i], w1, xi);
        }
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i) {
      vst1q_f32(c + i * kPanelWidth + f, vcvtq_f32_s32(s0[i]));
      vst1q_f32(c + i * kPanelWidth + f + 4, vcvtq_f32_s32(s1[i]));
    }
  }
}

#elif defined(FASTSAE_LEVEL_avx2)

// Rows [FROM, FROM + N) of MR and 16 features, whose sums fit the registers. VPMADDUBSW adds two products in 16 bits, which kRowSteps leaves
// room for. Wide rows have a word for the bytes 0 and 2 of a feature's word, one for 1 and 3; VPMADDWD adds two products in 32 bits.
template <bool kWide, int MR, int FROM, int N>
FASTSAE_INLINE void tile_part(const uint32_t* x, const uint32_t* w, int64_t words, const int32_t* start, float* c, Prefetcher& prefetcher,
                              int quota) {
  __m256i s0[N], s1[N];
#pragma GCC unroll 6
  for (int i = 0; i < N; ++i) s0[i] = s1[i] = _mm256_set1_epi32(start[FROM + i]);
  const auto product = [](__m256i v, __m256i xi) {
    return kWide ? _mm256_madd_epi16(v, xi) : _mm256_madd_epi16(_mm256_maddubs_epi16(v, xi), _mm256_set1_epi16(1));
  };
  const auto add_rows = [&](const uint32_t* xd, __m256i w0, __m256i w1) {
#pragma GCC unroll 6
    for (int i = 0; i < N; ++i) {
      const __m256i xi = _mm256_set1_epi32(static_cast<int>(xd[i]));
      __m256i sum0 = _mm256_add_epi32(s0[i], product(w0, xi)), sum1 = _mm256_add_epi32(s1[i], product(w1, xi));
      if (kWide) asm("" : "+x"(sum0), "+x"(sum1));  // gcc 12 adds the two products of a word first, and spills them
      s0[i] = sum0;
      s1[i] = sum1;
    }
  };
  for (int64_t d = 0; d < words;) {
    const int64_t stop = at_most(d + kStep, words);
    prefetcher.some(quota);
    for (; d < stop; ++d) {
      const __m256i* const wd = reinterpret_cast<const __m256i*>(w + d * kPanelWidth);
      const __m256i w0 = _mm256_loadu_si256(wd), w1 = _mm256_loadu_si256(wd + 1);
      if constexpr (kWide) {
        const uint32_t* const xd = x + 2 * d * MR + FROM;
        add_rows(xd, _mm256_and_si256(w0, _mm256_set1_epi16(255)), _mm256_and_si256(w1, _mm256_set1_epi16(255)));
        add_rows(xd + MR, _mm256_srli_epi16(w0, 8), _mm256_srli_epi16(w1, 8));
      } else {
        add_rows(x + d * MR + FROM, w0, w1);
      }
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < N; ++i) {
    float* const to = c + (FROM + i) * kPanelWidth;
    _mm256_store_ps(to, _mm256_cvtepi32_ps(s0[i]));
    _mm256_store_ps(to + 8, _mm256_cvtepi32_ps(s1[i]));
  }
}

// Rows from FROM on, in as few parts of even heights as the registers allow.
template <bool kWide, int MR, int FROM = 0>
FASTSAE_INLINE void tile_parts(const uint32_t* x, const uint32_t* w, int64_t words, const int32_t* start, float* c, Prefetcher& prefetcher,
                               int quota) {
  constexpr int kLeft = MR - FROM, kParts = (kLeft + 5) / 6, N = (kLeft + kParts - 1) / kParts;
  tile_part<kWide, MR, FROM, N>(x, w, words, start, c, prefetcher, FROM == 0 ? quota : 0);
  if constexpr (N < kLeft) tile_parts<kWide, MR, FROM + N>(x, w, words, start, c, prefetcher, quota);
}

template <int MR, bool kWide = false>
void tile_int8(const uint32_t* x, const uint32_t* w, int64_t words, const int32_t* start, int, float* c, Prefetcher& prefetcher,
               int quota) {
  tile_parts<kWide, MR>(x, w, words, start, c, prefetcher, quota);
  tile_parts<kWide, MR>(x, w + 16, words, start, c + 16, prefetcher, 0);
}
template <int MR>
constexpr auto tile_wide = tile_int8<MR, true>;

#else

FASTSAE_INLINE void add_products(__m512i& sum, __m512i w, __m512i x) {
#ifdef FASTSAE_LEVEL_avx512
  sum = _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(w, x), _mm512_set1_epi16(1)));
#else
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));  // gcc 12 spills every accumulator around the intrinsic: half the speed
#endif
}

template <int MR>
void tile_int8(const uint32_t* x, const uint32_t* w, int64_t words, const int32_t* start, int, float* c, Prefetcher& prefetcher,
               int quota) {
  __m512i s0[MR], s1[MR];
#pragma GCC unroll 12
  for (int i = 0; i < MR; ++i) s0[i] = s1[i] = _mm512_set1_epi32(start[i]);
  for (int64_t d = 0; d < words;) {
    const int64_t stop = at_most(d + kStep, words);
    prefetcher.some(quota);
    for (; d < stop; ++d) {
      const __m512i w0 = _mm512_loadu_si512(w + d * kPanelWidth), w1 = _mm512_loadu_si512(w + d * kPanelWidth + 16);
      const uint32_t* const xd = x + d * MR;
#pragma GCC unroll 12
      for (int i = 0; i < MR; ++i) {
        const __m512i xi = _mm512_set1_epi32(static_cast<int>(xd[i]));
        add_products(s0[i], w0, xi);
        add_products(s1[i], w1, xi);
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < MR; ++i) {
    _mm512_store_ps(c + i * kPanelWidth, _mm512_cvtepi32_ps(s0[i]));
    _mm512_store_ps(c + i * kPanelWidth + 16, _mm512_cvtepi32_ps(s1[i]));
  }
}

#endif

#ifdef FASTSAE_LEVEL_avx512_bf16
#define FASTSAE_BF16(...) __VA_ARGS__

// c[i][32] = <x^_i, w^_j> in bf16.
template <int MR>
void tile_bf16(const uint32_t* x, const uint32_t* w, int64_t words, const int32_t*, int, float* c, Prefetcher& prefetcher, int quota) {
  __m512 s0[MR], s1[MR];
  int64_t d = 0;
  do {
    const int64_t end = at_most(d + kScreenBlock / 2, words);
    const bool first = d == 0;
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i) s0[i] = s1[i] = _mm512_setzero_ps();
    while (d < end) {
      const int64_t stop = at_most(d + kStep, end);
      prefetcher.some(quota);
      for (; d < stop; ++d) {
        const __m512bh w0 = (__m512bh)_mm512_loadu_si512(w + d * kPanelWidth), w1 = (__m512bh)_mm512_loadu_si512(w + d * kPanelWidth + 16);
        const uint32_t* const xd = x + d * MR;
#pragma GCC unroll 12
        for (int i = 0; i < MR; ++i) {
          const __m512bh xi = (__m512bh)_mm512_set1_epi32(static_cast<int>(xd[i]));
          s0[i] = _mm512_dpbf16_ps(s0[i], xi, w0);
          s1[i] = _mm512_dpbf16_ps(s1[i], xi, w1);
        }
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i) {
      float* const to = c + i * kPanelWidth;
      if (!first) {
        s0[i] = _mm512_add_ps(_mm512_load_ps(to), s0[i]);
        s1[i] = _mm512_add_ps(_mm512_load_ps(to + 16), s1[i]);
      }
      _mm512_store_ps(to, s0[i]);
      _mm512_store_ps(to + 16, s1[i]);
    }
  } while (d < words);
}

#else
#define FASTSAE_BF16(...) \
  {                       \
  }
#endif

// c[i][32] = the exact products, for rows of at most kLongestExact elements: one a lane, folded 8, 4, 2, 1 as a score is.
template <int kLength>
FASTSAE_INLINE void short_products(const float* x, const float* w, int64_t d, int height, float* c) {
  for (int h = 0; h < 2; ++h) {
    Vec wv[kLength];
    for (int l = 0; l < kLength; ++l) wv[l] = l < d ? load(w + l * kPanelWidth + 16 * h) : zero();
    for (int i = 0; i < height; ++i) {
      Vec p[kLength];
#pragma GCC unroll 16
      for (int l = 0; l < kLength; ++l) p[l] = l < d ? mul(broadcast(x[l * height + i]), wv[l]) : zero();
#pragma GCC unroll 4
      for (int n = kLength / 2; n > 0; n /= 2)
#pragma GCC unroll 8
        for (int l = 0; l < n; ++l) p[l] = add(p[l], p[l + n]);
      store(c + i * kPanelWidth + 16 * h, p[0]);
    }
  }
}

template <int>
void tile_exact(const uint32_t* x, const uint32_t* w, int64_t words, const int32_t*, int height, float* c, Prefetcher&, int) {
  const float* const xf = reinterpret_cast<const float*>(x);
  const float* const wf = reinterpret_cast<const float*>(w);
  if (words <= 2)
    short_products<2>(xf, wf, words, height, c);
  else if (words <= 4)
    short_products<4>(xf, wf, words, height, c);
  else if (words <= 8)
    short_products<8>(xf, wf, words, height, c);
  else
    short_products<16>(xf, wf, words, height, c);
}

using TileKernel = void (*)(const uint32_t*, const uint32_t*, int64_t, const int32_t*, int, float*, Prefetcher&, int);
#define FASTSAE_TILES(tile) \
  {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>, tile<7>, tile<8>, tile<9>, tile<10>, tile<11>, tile<12>}
constexpr TileKernel kTileKernels[kScreenFormats][kTileRows + 1] = {FASTSAE_TILES(tile_int8), FASTSAE_BF16(FASTSAE_TILES(tile_bf16)),
                                                                    FASTSAE_TILES(tile_exact)};
#ifdef FASTSAE_LEVEL_avx2
constexpr TileKernel kWideKernels[kTileRows + 1] = FASTSAE_TILES(tile_wide);
#else
constexpr const TileKernel (&kWideKernels)[kTileRows + 1] = kTileKernels[0];  // rows have 8 bits
#endif
#undef FASTSAE_TILES

// All rows against a block of panels. A block that fits the second-level cache stays there while a tile of rows is read once for all its
// panels; of a larger block, a panel stays there for all tiles.
template <ScreenFormat kFormat, class Screen>
void run_block(const ScreenRows& x, const ScreenPanels& p, const Prefetch& next, Screen& screen) {
  alignas(64) float c[kTileRows * kPanelWidth];
  Prefetcher prefetcher(next);
  const TileKernel* const kernels = x.words > p.words ? kWideKernels : kTileKernels[static_cast<int>(kFormat)];
  const int64_t steps = ceil_div(p.words, kStep) * p.panels * x.tiles;
  const int quota = next.segments == 0 ? 0 : static_cast<int>(next.segments * next.lines / (steps > 0 ? steps : 1)) + 1;
  const auto one = [&](int t, int panel) {
    const int64_t r0 = x.rows * t / x.tiles, r1 = x.rows * (t + 1) / x.tiles;
    const int height = static_cast<int>(r1 - r0);
    kernels[height](x.data + r0 * x.words, p.data + panel * p.words * kPanelWidth, p.words, x.start + r0, height, c, prefetcher, quota);
    screen.panel(p, panel);
    Vec unit0 = zero(), unit1 = unit0;
    if (kFormat == ScreenFormat::int8) {
      unit0 = load(p.unit + panel * kPanelWidth);
      unit1 = load(p.unit + panel * kPanelWidth + 16);
    }
    for (int i = 0; i < height; ++i) {
      Vec r0v = load(c + i * kPanelWidth), r1v = load(c + i * kPanelWidth + 16);
      if (kFormat == ScreenFormat::int8) {
        const Vec step = broadcast(x.unit[r0 + i]);
        r0v = mul(r0v, mul(step, unit0));
        r1v = mul(r1v, mul(step, unit1));
      }
      screen.row(r0 + i, r0v, r1v);
    }
  };
  if (p.words * kPanelWidth * 4 * p.panels <= kCacheBytes) {
    for (int t = 0; t < x.tiles; ++t)
      for (int panel = 0; panel < p.panels; ++panel) one(t, panel);
  } else {
    for (int panel = 0; panel < p.panels; ++panel)
      for (int t = 0; t < x.tiles; ++t) one(t, panel);
  }
}

// The same with the screen that takes a scale into account, or not: S{args...}.
template <template <bool> class S, ScreenFormat kFormat, class... Args>
FASTSAE_INLINE void run_scaled(const ScreenRows& x, const ScreenPanels& p, const Prefetch& next, const Args&... args) {
  const auto run = [&](auto screen) { run_block<kFormat>(x, p, next, screen); };
  if (p.scale != nullptr)
    run(S<true>{args...});
  else
    run(S<false>{args...});
}

// The exact products of a block's undecided features, while its weights are in the cache, written over `hi`.
template <class T>
struct Scorer {
  const ScoreJob& job;
  const Undecided& at;
  static constexpr int kAtOnce = 4;
  const float* x[kAtOnce] = {};
  const T* w[kAtOnce] = {};
  int64_t place[kAtOnce] = {};
  int held = 0;

  FASTSAE_INLINE Scorer(const ScoreJob& job, const Undecided& at) : job(job), at(at) {}

  // Independent products, mostly of one row: one chain alone would wait for its own last addition.
  template <bool kSameRow>
  FASTSAE_INLINE void score() {
    constexpr int N = kAtOnce;
    Vec sum[N], total[N];
    int64_t i = 0;
    do {
      const int64_t end = at_most(i + kScoreBlock, job.d);
      const bool first = i == 0;
#pragma GCC unroll 8
      for (int a = 0; a < N; ++a) sum[a] = zero();
      for (; i + kLanes <= end; i += kLanes) {
        const Vec one = load(x[0] + i);
#pragma GCC unroll 8
        for (int a = 0; a < N; ++a) sum[a] = fma(kSameRow ? one : load(x[a] + i), load(w[a] + i), sum[a]);
      }
      if (i < end) {
        const int n = static_cast<int>(end - i);
        for (int a = 0; a < N; ++a) sum[a] = fma(load_part(x[a] + i, n), load_part(w[a] + i, n), sum[a]);
        i = end;
      }
      for (int a = 0; a < N; ++a) total[a] = first ? sum[a] : add(total[a], sum[a]);
    } while (i < job.d);
    for (int a = 0; a < N; ++a) at.hi[place[a]] = reduce(total[a]);
  }

  FASTSAE_INLINE const T* feature(int64_t id) const {
    return static_cast<const T*>(job.w) + (job.list != nullptr ? job.list[id] : id) * job.stride_f;
  }

  FASTSAE_INLINE void add_entry(int64_t row, int64_t position) {
    place[held] = position;
    x[held] = job.xc + row * job.padded;
    w[held] = feature(at.id[position] + job.first);
    if (++held == kAtOnce) {
      if (x[0] == x[kAtOnce - 1])
        score<true>();
      else
        score<false>();
      held = 0;
    }
  }

  // Entries [0, n) of a row.
  FASTSAE_INLINE void row(int64_t row) {
    const int64_t base = row * at.stride, n = at.n[row];
    for (int64_t i = 0; i < n; ++i) {
      if (i + 2 * kAtOnce < n) {
        const char* const later = reinterpret_cast<const char*>(feature(at.id[base + i + 2 * kAtOnce] + job.first));
        for (int line = 0; line < 4; ++line) prefetch(later + 64 * line);
      }
      add_entry(row, base + i);
    }
  }

  FASTSAE_INLINE void finish() {
    if (held == 0) return;
    for (int a = held; a < kAtOnce; ++a) {  // the last one again, to the same place
      place[a] = place[held - 1];
      x[a] = x[held - 1];
      w[a] = w[held - 1];
    }
    score<false>();
    held = 0;
  }
};

// Calls body(scorer) with the scorer of the weights' type.
template <class Body>
FASTSAE_INLINE void with_scorer(const ScoreJob& job, const Undecided& at, const Body& body) {
  with_type(job.t, [&](auto type) {
    Scorer<decltype(type)> scorer(job, at);
    body(scorer);
  });
}

}  // namespace
}  // namespace FASTSAE_ISA
}  // namespace fastsae
