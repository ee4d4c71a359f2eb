// The bound of the screen: how far a screened product may lie from a score, proven, and the numbers that follow. Rows and features are
// packed with them (pack.isa.cpp), the driver signs them (driver.h), screens read them as Features (tile.isa.h).
//
// ---- The bound, and why it holds ----
//
// x is a row (centred or normalised, fp32, taken as it is), w a feature; u = 2^-24; norms are Euclidean. T = <x, w>, r* = the fp32 product
// of fastsae.h, r~ = the screened one. H is the rotation: signs, then unnormalised Hadamard transforms of blocks of n = 2^m elements, so
// <Hx, Hw> = n <x, w> and |Hx| = sqrt(n) |x|; bf16 has none (n = 1). x^ and w^ are the rounded rows as the instructions see them.
//
// (1) |r* - T| <= g |x||w| + d0, g = 1.01 k u with k = the longest chain of additions: min(ceil(D/16), 256) in a lane, one for each
//     block of 4096, 4 to fold the lanes. Cauchy-Schwarz turns sum |x_d w_d| into |x||w|. 1.01 covers 1/(1 - k u).
// (2) y = the computed Hx has |y - Hx| <= h sqrt(n) |x|, h = 1.01 m u: each of m stages rounds each element once, and conserves the
//     norm up to sqrt(2). So |x^ - Hx| <= |x^ - y| + h sqrt(n)|x|. Divided by sqrt(n) (exact: n is a power of four) this is the loss l(x);
//     likewise l(w). bf16: l(x) = |x^ - x|.
// (3) |<x^, w^>/n - T| = |<x^ - Hx, Hw> + <x^, w^ - Hw>| / n <= l(x)|w| + (|x| + l(x)) l(w).
// (4) |r~ - <x^, w^>/n| <= q |x^||w^|/n + d1.
//     int8: x^ = s qx, w^ = t qw with integers of at most 127. VPDPBUSD multiplies qw + 128 (unsigned) by qx (signed) and adds exactly; the
//     sum starts at -128 sum qx. 255 * 127 * D < 2^31 for D < 65536 (larger ones are not screened so). r~ = fl(fl(I) fl((s/n) t)) errs
//     by three roundings: q = 4 u. Without VNNI |qx| <= 64: VPMADDUBSW adds two products in 16 bits, exactly, as 2 * 255 * 64 < 2^15,
//     and VPMADDWD with ones adds two of those in 32. Longer rows have more steps there, |qx| <= (2^24 - 1) / D with D counted as packed:
//     VPMADDWD adds two products of 16 bits in 32, exactly, as 2 * 255 * 2^15 < 2^31; later sums are right modulo 2^32, and the last one,
//     |sum qx qw| <= 127 (2^24 - 1), and its start, |128 sum qx| <= 128 (2^24 - 1), lie within 2^31.
//     bf16: a product of two bf16 numbers has 16 bits and is exact in fp32. VDPBF16PS adds two of them to its accumulator; whatever
//     order and whatever rounding of the two sums (nearest, or towards zero) an implementation has, each addition errs by at most 2u of
//     its result: 2 * 256 additions in a block of 512, one more a block and one to spare, each counted as 2u, times 1.01.
//     exact (rows of at most 16 elements): the same operations as the score's, r~ = r*, and all of E is 0.
// (5) d0 + d1 <= U. In r* and in bf16 each multiplication, addition or fused step that underflows, gradually or flushed to zero (MXCSR may
//     say so, VDPBF16PS always does), errs by at most 2^-126, and there are fewer than 4 D + 100 of them, those of (8) included. In int8
//     (s/n) t may underflow as a whole: then |<x^, w^>|/n <= 2^31 2^-126. Hence U = (4 D + 128) 2^-126, plus 2^-94 for int8.
//     Where MXCSR reads denormal elements as zero, what they would add is less than what (7) adds to the norms.
// (6) |x^| <= sqrt(n) X with X = |x| + l(x), and |w^| <= sqrt(n) (|w| + l(w)). So |r* - r~| <= E with
//         E = |w| (l(x) + q X + g |x|)  +  l(w) (X + q X)  +  U.
// (7) Norms are computed in fp32: a sum of squares of D terms errs by less than (D + 64) 2u relatively, its root by less than that, and an
//     element below 2^-63 may vanish from it: the root is multiplied by 1 + (D + 72) 2u and sqrt(D) 2^-62 is added, so the computed norm
//     is never below the true one. w^ - w is exact for bf16 (both are multiples of the last place of w, and the difference is small) and
//     rounded once for int8, which the 72 covers.
// (8) The interval [fl(r~ - e), fl(r~ + e)] must contain r*. fl errs by u (|r~| + e) <= 2^-22 X (|w| + l(w)), which is added to the
//     factors; the computed e = fma(a, norm, fma(c, loss, U)) and the factors themselves err by a few u, covered by a factor 1 + 2^-20.
//         a = (l(x) + (q + 2^-22) X + g |x|) (1 + 2^-20),      c = X (1 + q + 2^-22) (1 + 2^-20).
// (9) score = fl(fl(r* scale) + bias) and both steps are monotone (falling, if scale < 0), so the ends of the interval, taken through the
//     same two steps, enclose the score: no further rounding terms. norm, loss and U carry the sign of the scale, which swaps the ends
//     where it must. An end that is NaN (inf * 0, inf - inf) decides nothing: hi is compared so that NaN passes, lo = NaN counts as -inf.
//     If r* scale + bias is NaN while the interval's ends are not, then hi is +inf: it passes as well (a strict threshold is finite).
// (10) No overflow unseen: rows with |x| not <= 1e18 take the exact path, features with |w| not <= 1e18 (NaN, inf, huge) get norm = inf
//     and hence an interval without ends; for all others no partial sum exceeds 16 * 1e18 * 1e18 * 1.01 < 2^127.
#pragma once
#include "integers.h"

namespace fastsae {

// How screening rounds: to 8-bit integers a row and a feature (after a rotation that spreads outliers), to bf16, or, where rows are so
// short that this costs more than the product, not at all.
enum class ScreenFormat : int { int8 = 0, bf16 = 1, exact = 2 };
constexpr int kScreenFormats = 3;
constexpr int64_t kLongestExact = 16;   // elements of an exact row: a score's sum then has one element a lane
constexpr int64_t kLongestRow = 65535;  // of a row that is screened otherwise
constexpr int64_t kScoreBlock = 4096;   // elements of a score summed before they join the total
constexpr int64_t kScreenBlock = 512;   // elements of a bf16 screening sum before they join the total

constexpr float kUnit = 0x1p-24f;
constexpr float kHugeNorm = 1e18f;

// Whether the sums of a row of d elements are bounded as the proof says.
static constexpr bool can_screen(ScreenFormat format, int64_t d) {
  return d > 0 && d <= (format == ScreenFormat::exact ? kLongestExact : kLongestRow);
}

// (5): what a screened product may lose to underflow.
static inline float underflow_of(ScreenFormat format, int64_t d) {
  if (format == ScreenFormat::exact) return 0;
  return static_cast<float>(4 * d + 128) * 0x1p-126f + (format == ScreenFormat::int8 ? 0x1p-94f : 0.0f);
}

// (7): an upper bound of the norm from the computed sum of squares; not below infinity for NaN and infinity.
static inline float norm_above(float squares, int64_t d) {
  if (!(squares <= 3e38f)) return __builtin_inff();
  return __builtin_sqrtf(squares) * (1.0f + static_cast<float>(d + 72) * 2 * kUnit) + __builtin_sqrtf(static_cast<float>(d)) * 0x1p-62f;
}

struct RowFactors {
  float a, c;
};
// (8) from |x| and l(x), both rounded up
static inline RowFactors row_factors(ScreenFormat format, float norm, float loss, int64_t d) {
  const int64_t vectors = ceil_div(d, 16), blocks = ceil_div(d, kScoreBlock);
  const float g = 1.01f * static_cast<float>(at_most(vectors, kScoreBlock / 16) + blocks + 5) * kUnit;
  const float additions = static_cast<float>(at_most(d + 1, kScreenBlock) + ceil_div(d, kScreenBlock) + 3);
  const float q = format == ScreenFormat::int8 ? 4 * kUnit : 1.01f * additions * 2 * kUnit;
  const float x = norm + loss;
  return {(loss + (q + 0x1p-22f) * x + g * norm) * (1 + 0x1p-20f), x * (1 + q + 0x1p-22f) * (1 + 0x1p-20f)};
}

}  // namespace fastsae
