// The tile engine: a block of packed feature panels against tiles of rows, in bf16, and what a consumer may conclude from it.
// Only for *.isa.cpp of a level with AVX-512 BF16.
//
// A consumer is a class with
//   void panel(const Features& f);                          the features of the products to come
//   void row(int64_t row, __m512 r0, __m512 r1);            screened products of one row with features 0-15 and 16-31 of that panel
// and gets from bounds() an interval that contains the score of fastsae.h. It decides what the interval decides and hands the rest to the
// exact score; nothing else may rest on a screened product.
//
// ---- The bound, and why it holds ----
//
// x is a centred row (fp32 values are taken as they are), w a row of the weights, x^ and w^ their bf16 roundings (to nearest, denormals to
// zero: what VCVTNEPS2BF16 does), u = 2^-24. Norms are Euclidean. T = <x, w>, r* = the fp32 product of fastsae.h, r~ = the screened one.
//
// (1) |r* - T| <= g |x||w| + d0, g = 1.01 n u with n = the longest chain of additions: min(ceil(D/16), 256) in a lane, one for each
//     block of 4096, 4 to fold the lanes. Cauchy-Schwarz turns sum |x_d w_d| into |x||w|. 1.01 covers 1/(1 - n u).
// (2) |<x^, w^> - T| = |<x^ - x, w> + <x^, w^ - w>| <= |x^ - x||w| + |x^||w^ - w|.
// (3) |r~ - <x^, w^>| <= q |x^||w^| + d1. A product of two bf16 numbers has 16 bits and is exact in fp32. VDPBF16PS adds two of them to its
//     accumulator; whatever order and whatever rounding of the two sums (nearest, or towards zero) an implementation has, each addition
//     errs by at most 2u of its result: 2 * 256 additions in a block, one more a block and one to spare, each counted as 2u, times 1.01.
// (4) d0 + d1 <= U = (4 D + 128) 2^-126: each multiplication, addition or fused step that underflows, gradually or flushed to zero (MXCSR
// may
//     say so, VDPBF16PS always does), errs by at most 2^-126, and there are fewer than 4 D + 100 of them, those of (7) included.
// (5) |x^| <= X = |x| + |x^ - x|, and |w^| <= |w| + |w^ - w|. So |r* - r~| <= E with
//         E = |w| (|x^-x| + q X + g |x|)  +  |w^-w| (X + q X)  +  U.
// (6) Norms are computed in fp32: a sum of squares of D terms errs by less than (D + 64) 2u relatively, its root by less than that, and an
//     element below 2^-63 may vanish from it: the root is multiplied by 1 + (D + 64) 2u and sqrt(D) 2^-62 is added, so the computed norm
//     is never below the true one. w^ - w is exact in fp32 (both are multiples of the last place of w, and the difference is small).
// (7) The interval [fl(r~ - e), fl(r~ + e)] must contain r*. fl errs by u (|r~| + e) <= 2^-22 X (|w| + |w^-w|), which is added to the
//     factors; the computed e = fma(a, norm, fma(c, loss, U)) and the factors themselves err by a few u, covered by a factor 1 + 2^-20.
//         a = (|x^-x| + (q + 2^-22) X + g |x|) (1 + 2^-20),      c = X (1 + q + 2^-22) (1 + 2^-20).
// (8) score = fl(fl(r* scale) + bias) and both steps are monotone (falling, if scale < 0), so the ends of the interval, taken through the
//     same two steps, enclose the score: no further rounding terms. norm, loss and U carry the sign of the scale, which swaps the ends
//     where it must. An end that is NaN (inf * 0, inf - inf) decides nothing: hi is compared so that NaN passes, lo = NaN counts as -inf.
//     If r* scale + bias is NaN while the interval's ends are not, then hi is +inf: it passes as well.
// (9) No overflow unseen: rows with |x| not <= 1e18 take the exact path, features with |w| not <= 1e18 (NaN, inf, huge) get norm = inf and
//     hence an interval without ends; for all others no partial sum exceeds 1e18 * 1e18 * 1.01 < 2^127.
#pragma once
#include "cpu/encode.h"
#include "vec.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

constexpr float kUnit = 0x1p-24f;
constexpr float kHugeNorm = 1e18f;
constexpr int64_t kCacheBytes = int64_t{512} << 10;  // of panels, of a second-level cache of 1 MiB or more

FASTSAE_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
FASTSAE_INLINE float root(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }

// (6): an upper bound of the norm from the computed sum of squares; not below infinity for NaN and infinity.
FASTSAE_INLINE float norm_above(float squares, int64_t d) {
  if (!(squares <= 3e38f)) return __builtin_inff();
  return root(squares) * (1.0f + static_cast<float>(d + 64) * 2 * kUnit) + root(static_cast<float>(d)) * 0x1p-62f;
}

struct RowFactors {
  float a, c;
};
// (7) from |x| and |x^ - x|, both rounded up
FASTSAE_INLINE RowFactors row_factors(float norm, float loss, int64_t d) {
  const int64_t vectors = (d + 15) / 16, blocks = (d + kScoreBlock - 1) / kScoreBlock;
  const float g = 1.01f * static_cast<float>(at_most(vectors, kScoreBlock / 16) + blocks + 5) * kUnit;
  const float q = 1.01f * static_cast<float>(at_most(d + 1, kScreenBlock) + (d + kScreenBlock - 1) / kScreenBlock + 3) * 2 * kUnit;
  const float x = norm + loss;
  return {(loss + (q + 0x1p-22f) * x + g * norm) * (1 + 0x1p-20f), x * (1 + q + 0x1p-22f) * (1 + 0x1p-20f)};
}

// The features of one panel, as vectors of 16.
template <bool kScaled>
struct Features {
  __m512 norm[2], loss[2], floor[2], scale[2], bias[2];
  int64_t first;
  uint32_t exist;  // one bit a feature

  FASTSAE_INLINE void set(const ScreenPanels& p, int panel) {
    for (int h = 0; h < 2; ++h) {
      const int64_t at = static_cast<int64_t>(panel) * kPanelWidth + 16 * h;
      norm[h] = _mm512_loadu_ps(p.norm + at);
      loss[h] = _mm512_loadu_ps(p.loss + at);
      floor[h] = _mm512_loadu_ps(p.floor + at);
      if (kScaled) scale[h] = _mm512_loadu_ps(p.scale + at);
      bias[h] = _mm512_loadu_ps(p.bias + at);
    }
    first = p.first + static_cast<int64_t>(panel) * kPanelWidth;
    const int64_t left = p.features - static_cast<int64_t>(panel) * kPanelWidth;
    exist = left >= kPanelWidth ? ~0u : (1u << left) - 1u;
  }
  FASTSAE_INLINE __m512 slack(int h, __m512 a, __m512 c) const {
    return _mm512_fmadd_ps(a, norm[h], _mm512_fmadd_ps(c, loss[h], floor[h]));
  }
  // The bias is 0 where there is none: adding it only turns -0 into +0, which compare equal.
  FASTSAE_INLINE __m512 score(int h, __m512 r) const {
    if (kScaled) r = _mm512_mul_ps(r, scale[h]);
    return _mm512_add_ps(r, bias[h]);
  }
  FASTSAE_INLINE __m512 upper(int h, __m512 r, __m512 e) const { return score(h, _mm512_add_ps(r, e)); }
  FASTSAE_INLINE __m512 lower(int h, __m512 r, __m512 e) const { return score(h, _mm512_sub_ps(r, e)); }
};

// Walks the lines of `Ahead`, a few at a time.
struct Prefetcher {
  const char* at;
  int64_t segments, lines, stride, line;
  explicit FASTSAE_INLINE Prefetcher(const Ahead& a) : at(a.base), segments(a.segments), lines(a.lines), stride(a.stride), line(0) {}
  FASTSAE_INLINE void some(int n) {
    for (; n > 0 && segments > 0; --n) {
      _mm_prefetch(at + line * 64, _MM_HINT_T1);
      if (++line == lines) {
        line = 0;
        at += stride;
        --segments;
      }
    }
  }
};

constexpr int64_t kStep = 32;  // pairs between two prefetches

// c[i][32] = <x^_i, w^_j> for MR rows and the 32 features of a panel.
template <int MR>
void screen_tile(const uint32_t* x, const uint32_t* w, int64_t d2, float* c, Prefetcher& ahead, int quota) {
  __m512 s0[MR], s1[MR];
  int64_t d = 0;
  do {
    const int64_t end = at_most(d + kScreenBlock / 2, d2);
    const bool first = d == 0;
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i) s0[i] = s1[i] = _mm512_setzero_ps();
    while (d < end) {
      const int64_t stop = at_most(d + kStep, end);
      ahead.some(quota);
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
  } while (d < d2);
}

using TileKernel = void (*)(const uint32_t*, const uint32_t*, int64_t, float*, Prefetcher&, int);
constexpr TileKernel kTileKernels[kTileRows + 1] = {
    nullptr,        screen_tile<1>, screen_tile<2>, screen_tile<3>,  screen_tile<4>,  screen_tile<5>,  screen_tile<6>,
    screen_tile<7>, screen_tile<8>, screen_tile<9>, screen_tile<10>, screen_tile<11>, screen_tile<12>,
};

// All rows against a block of panels. A block that fits the second-level cache stays there while a tile of rows is read once for all its
// panels; of a larger block, a panel stays there for all tiles.
template <class Consumer>
void run_block(const ScreenRows& x, const ScreenPanels& p, const Ahead& next, Consumer& consumer) {
  alignas(64) float c[kTileRows * kPanelWidth];
  Prefetcher ahead(next);
  const int64_t steps = (x.d2 + kStep - 1) / kStep * p.panels * x.tiles;
  const int quota = next.segments == 0 ? 0 : static_cast<int>(next.segments * next.lines / (steps > 0 ? steps : 1)) + 1;
  const auto one = [&](int t, int panel) {
    const int64_t r0 = x.rows * t / x.tiles, r1 = x.rows * (t + 1) / x.tiles;
    const int height = static_cast<int>(r1 - r0);
    kTileKernels[height](x.pairs + r0 * x.d2, p.data + panel * x.d2 * kPanelWidth, x.d2, c, ahead, quota);
    consumer.panel(p, panel);
    for (int i = 0; i < height; ++i) consumer.row(r0 + i, _mm512_load_ps(c + i * kPanelWidth), _mm512_load_ps(c + i * kPanelWidth + 16));
  };
  if (x.d2 * kPanelWidth * 4 * p.panels <= kCacheBytes) {
    for (int t = 0; t < x.tiles; ++t)
      for (int panel = 0; panel < p.panels; ++panel) one(t, panel);
  } else {
    for (int panel = 0; panel < p.panels; ++panel)
      for (int t = 0; t < x.tiles; ++t) one(t, panel);
  }
}

}  // namespace
}  // namespace FASTSAE_ISA
}  // namespace fastsae
