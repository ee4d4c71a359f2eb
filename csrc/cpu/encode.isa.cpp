// The screens of the encoders: what a screened product decides for a top-k, a threshold, a batch's top-k, a gate. Only where the level
// can screen; encode.h states the jobs, bound.h the bound.
#include "cpu/encode.h"

#include "isa.h"

#ifdef FASTSAE_SCREENS
#include "cpu/engine/tile.isa.h"
#include "cpu/engine/topk.isa.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

// F: Features, or Magnitudes to select by these.
template <class F>
struct TopkScreen {
  const TopkBuffer& buffer;
  const ScreenRows& rows;
  F f{};

  FASTSAE_INLINE void panel(const ScreenPanels& p, int panel) { f.set(p, panel); }

  FASTSAE_INLINE void row(int64_t row, Vec r0, Vec r1) {
    const Vec a = broadcast(rows.a[row]), c = broadcast(rows.c[row]);
    const Vec tau = broadcast(load_tau(buffer.tau + row));
    const Vec e0 = f.slack(0, a, c), e1 = f.slack(1, a, c);
    const Mask m0 = not_below(f.upper(0, r0, e0), tau);
    const Mask m1 = not_below(f.upper(1, r1, e1), tau);
    const uint32_t m = joined(m0, m1) & f.exist;
    if (__builtin_expect(m != 0, 0) && __atomic_load_n(buffer.exact + row, __ATOMIC_RELAXED) == 0)
      append(buffer.undecided, row, m, f, r0, r1, e0, e1);
  }
};

template <bool kScaled>
using ScoreScreen = TopkScreen<Features<kScaled>>;
template <bool kScaled>
using MagnitudeScreen = TopkScreen<Magnitudes<kScaled>>;

template <bool kAbsolute>
void screen_topk(const ScreenRows& rows, const ScreenPanels& panels, const Prefetch& next, const ScoreJob& job, const TopkBuffer& buffer) {
  if (all_exact(buffer, rows.rows)) return;
  *buffer.seen += panels.features;
  if constexpr (kAbsolute)
    run_scaled<MagnitudeScreen, ScreenFormat::int8>(rows, panels, next, buffer, rows);
  else
    run_scaled<ScoreScreen, ScreenFormat::int8>(rows, panels, next, buffer, rows);
  rescore<kAbsolute>(rows, panels, job, buffer);
}

// ---- a top-k of few rows against all features ----

template <class F>
struct RowwiseScreen {
  const RowwiseTopk& to;
  const ScreenRows& rows;
  F f{};
  int64_t at = 0, group = 0;

  FASTSAE_INLINE void panel(const ScreenPanels& p, int panel) {
    f.set(p, panel);
    at = static_cast<int64_t>(panel) * kPanelWidth;
    group = panel / to.panels * 16;
  }

  FASTSAE_INLINE void row(int64_t row, Vec r0, Vec r1) {
    const Vec a = broadcast(rows.a[row]), c = broadcast(rows.c[row]);
    const Vec e0 = f.slack(0, a, c), e1 = f.slack(1, a, c);
    float* const high = to.high + row * to.stride + at;
    store(high, f.upper(0, r0, e0));
    store(high + 16, f.upper(1, r1, e1));
    // The largest lower end so far; a NaN is passed over, and a feature that does not exist has none.
    float* const low = to.low + row * to.lows + group;
    Vec most = load(low);
    if (__builtin_expect(f.exist == ~0u, 1)) {
      most = larger(f.lower(1, r1, e1), larger(f.lower(0, r0, e0), most));
    } else {
      for (int h = 0; h < 2; ++h) {
        const Mask m = static_cast<Mask>(f.exist >> (16 * h));
        most = choose(m, larger(f.lower(h, h == 0 ? r0 : r1, h == 0 ? e0 : e1), most), most);
      }
    }
    store(low, most);
  }
};

template <bool kScaled>
using RowwiseScores = RowwiseScreen<Features<kScaled>>;
template <bool kScaled>
using RowwiseMagnitudes = RowwiseScreen<Magnitudes<kScaled>>;

void screen_rowwise(const ScreenRows& rows, const ScreenPanels& panels, const Prefetch& next, const RowwiseTopk& to) {
  const int64_t lows = ceil_div(panels.panels, to.panels) * 16;
  for (int64_t r = 0; r < rows.rows; ++r)
    for (int64_t i = 0; i < lows; i += 16) store(to.low + r * to.lows + i, broadcast(-__builtin_inff()));
  if (to.absolute)
    run_scaled<RowwiseMagnitudes, ScreenFormat::int8>(rows, panels, next, to, rows);
  else
    run_scaled<RowwiseScores, ScreenFormat::int8>(rows, panels, next, to, rows);
}

// Entries [from, to) of `open`, of one row: their scores over their upper ends; `absolute`: as to_scores has them.
template <class S>
FASTSAE_INLINE void score_entries(S& scorer, const ScreenPanels& p, const Undecided& open, int64_t row, int64_t from, int64_t to,
                                  bool absolute) {
  constexpr int64_t kAhead = 8;
  for (int64_t i = from; i < to; ++i) {
    if (i + kAhead < to) {
      const char* const later = reinterpret_cast<const char*>(scorer.feature(open.id[i + kAhead] + scorer.job.first));
      for (int line = 0; line < 4; ++line) prefetch(later + 64 * line);
    }
    scorer.add_entry(row, i);
  }
  scorer.finish();
  if (absolute)
    to_scores<true>(open, p, from, to);
  else
    to_scores<false>(open, p, from, to);
}

// How many features of a row have an upper end that is not below tau; they and their ends to `open`.
FASTSAE_INLINE int64_t reaching(float tau, const float* high, int64_t features, const Undecided& open) {
  int64_t n = 0;
  for (int64_t i = 0; i < features; i += 16) {
    const Mask valid = valid_of(features - i);
    const Vec v = load(high + i);
    const Mask m = valid & not_below(v, broadcast(tau));
    if (m == 0) continue;
    compact(open.hi + n, m, v);
    n += compact(open.id + n, m, ascending(static_cast<int32_t>(i)));
  }
  return n;
}

// Entries of `open` whose upper end is below `least` (or NaN) to `later`; the number of those that stay.
FASTSAE_INLINE int64_t postpone(float least, const Undecided& open, int64_t n, const Undecided& later) {
  int64_t kept = 0, rest = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const Mask valid = valid_of(n - i);
    const Vec v = load(open.hi + i);
    const Ints id = load(open.id + i);
    const Mask m = valid & at_least(v, broadcast(least));
    const Mask other = valid & static_cast<Mask>(~m);
    compact(open.hi + kept, m, v);
    kept += compact(open.id + kept, m, id);
    compact(later.hi + rest, other, v);
    rest += compact(later.id + rest, other, id);
  }
  return kept;
}

// The k best of a row's scores as entries of order.h, in order. Each goes where as many others are better.
void rank_scores(const float* scores, const int32_t* features, int64_t n, int64_t k, uint64_t* all, uint64_t* best) {
  for (int64_t i = 0; i < n; ++i) {
    const float score = scores[i] + 0.0f;  // -0 to +0
    const uint32_t bits = as_bits(score), key = static_cast<int32_t>(bits) < 0 ? bits : 0x7fffffff - bits;
    all[i] = static_cast<uint64_t>(score != score ? 0 : key) << 32 | static_cast<uint32_t>(features[i]);
  }
  for (int64_t i = 0; i < n; ++i) {
    int64_t better = 0;
    for (int64_t j = 0; j < n; ++j) better += all[j] < all[i];
    if (better < k) best[better] = all[i];
  }
}

// Screening errs by much less than its bound. So the k features with the highest upper ends, and some more, are scored first: the k-th
// largest of their scores is close to that of all, and most others end below it.
int64_t rescore_row(const ScreenPanels& p, const ScoreJob& job, const RowwiseTopk& to, int64_t row) {
  const Undecided& open = to.open;
  const int64_t k = to.k, lows = to.lows, limit = 4 * k + 256 + p.features / 4;
  const float floor = k <= lows ? kth_largest(to.low + row * lows, lows, k, k + k / 8) : -__builtin_inff();
  const int64_t n = reaching(floor, to.high + row * to.stride, p.features, open);
  const int64_t some = k + k / 4 + 2;
  constexpr int64_t kWorth = 4096;  // elements of products that a second look at the bounds costs
  int64_t scored = n;
  if ((n - some) * job.d > kWorth) scored = postpone(kth_largest(open.hi, n, some, some + some / 8), open, n, to.later);
  if (scored > limit) return -1;
  with_scorer(job, open, [&](auto& scorer) {
    score_entries(scorer, p, open, row, 0, scored, to.absolute);
    if (scored == n) return;
    const float tau = scored >= k ? kth_largest(open.hi, scored, k, k) : floor;
    const int64_t more = keep_above(tau, to.later.hi, to.later.id, nullptr, n - scored, open.hi + scored, open.id + scored, nullptr);
    if (scored + more > limit) {
      scored = -1;
      return;
    }
    score_entries(scorer, p, open, row, scored, scored + more, to.absolute);
    scored += more;
  });
  if (scored < 0) return -1;
  *to.scored += scored;
  constexpr int64_t kRanked = 64;
  if (scored > kRanked && scored > k) {
    const float tau = kth_largest(open.hi, scored, k, k);
    scored = keep_above(tau, open.hi, open.id, nullptr, scored, open.hi, open.id, nullptr);
  }
  return scored;
}

// ---- features along a segment: upper ends p[f] at 0 and q[f] at 1, and between them, as a score is a line and its magnitude convex ----

FASTSAE_INLINE Vec between(const float* p, const float* q, int64_t i, float t) {
  const Vec a = load(p + i);
  return fma(broadcast(t), sub(load(q + i), a), a);
}

// lows[16 g ..]: of group g of `each` features (a multiple of 16) the largest upper end at t in each of 16 lanes.
void largest_along(const float* p, const float* q, int64_t features, int64_t each, float t, float* lows) {
  for (int64_t first = 0; first < features; first += each) {
    Vec most = broadcast(-__builtin_inff());
    for (int64_t i = first; i < at_most(first + each, features); i += 16)
      most = choose(valid_of(features - i), larger(between(p, q, i, t), most), most);
    store(lows + first / each * 16, most);
  }
}

// How many features reach floor[g] at t[g] for one g of `points` (0 and 1 among them); they to `ids`.
int64_t reaching_along(const float* p, const float* q, int64_t features, const float* t, const float* floor, int points, int32_t* ids) {
  float least = floor[0];
  for (int g = 1; g < points; ++g) least = floor[g] < least ? floor[g] : least;
  int64_t n = 0;
  for (int64_t i = 0; i < features; i += 16) {
    Mask m = static_cast<Mask>(not_below(load(p + i), broadcast(least)) | not_below(load(q + i), broadcast(least)));
    if (m == 0) continue;
    m = 0;
    for (int g = 0; g < points; ++g) m = static_cast<Mask>(m | not_below(between(p, q, i, t[g]), broadcast(floor[g])));
    n += compact(ids + n, static_cast<Mask>(m & valid_of(features - i)), ascending(static_cast<int32_t>(i)));
  }
  return n;
}

// ---- thresholds: one a feature, one for all, a gate ----

// Undecided is what may exceed its threshold: its own (kPerFeature), or one that all workers raise. kGate: a second bias, for the same
// product without the scale, must be able to exceed 0 as well.
template <bool kScaled, bool kPerFeature, bool kGate>
struct ThresholdScreen {
  const Undecided& undecided;
  const ScreenRows& rows;
  const int32_t* tau;
  Features<kScaled> f{};
  Vec extra[2] = {};

  FASTSAE_INLINE void panel(const ScreenPanels& p, int panel) {
    f.set(p, panel);
    for (int h = 0; h < 2; ++h)
      extra[h] = kPerFeature || kGate ? load(p.extra + panel * kPanelWidth + 16 * h) : zero();
  }

  FASTSAE_INLINE void row(int64_t row, Vec r0, Vec r1) {
    const Vec a = broadcast(rows.a[row]), c = broadcast(rows.c[row]);
    const Vec e0 = f.slack(0, a, c), e1 = f.slack(1, a, c);
    const Vec least0 = kPerFeature ? extra[0] : kGate ? zero() : broadcast(load_tau(tau));
    const Vec least1 = kPerFeature ? extra[1] : least0;
    const auto passes = [](Vec upper, Vec least) {
      return kPerFeature || kGate ? not_at_most(upper, least) : not_below(upper, least);
    };
    Mask m0 = passes(f.upper(0, r0, e0), least0), m1 = passes(f.upper(1, r1, e1), least1);
    if (kGate) {  // the scale of a gated encoder is not negative, so e is the slack of the bare product too
      m0 = m0 & not_at_most(add(add(r0, e0), extra[0]), zero());
      m1 = m1 & not_at_most(add(add(r1, e1), extra[1]), zero());
    }
    const uint32_t m = joined(m0, m1) & f.exist;
    if (__builtin_expect(m != 0, 0)) append(undecided, row, m, f, r0, r1, e0, e1);
  }
};

template <bool kScaled, bool kPerFeature, bool kGate>
void screen_threshold_as(const ScreenRows& rows, const ScreenPanels& panels, const Prefetch& next, const Undecided& undecided,
                         const int32_t* tau) {
  ThresholdScreen<kScaled, kPerFeature, kGate> screen{undecided, rows, tau};
  run_block<ScreenFormat::int8>(rows, panels, next, screen);
}

void screen_threshold(ThresholdKind kind, const ScreenRows& rows, const ScreenPanels& panels, const Prefetch& next,
                      const Undecided& undecided, const int32_t* tau) {
  const bool scaled = panels.scale != nullptr;
  if (kind == ThresholdKind::gate)
    screen_threshold_as<true, false, true>(rows, panels, next, undecided, tau);
  else if (kind == ThresholdKind::per_feature)
    (scaled ? screen_threshold_as<true, true, false> : screen_threshold_as<false, true, false>)(rows, panels, next, undecided, tau);
  else
    (scaled ? screen_threshold_as<true, false, false> : screen_threshold_as<false, false, false>)(rows, panels, next, undecided, tau);
}

void keep_undecided(const Undecided& u, int64_t row, float tau) {
  const int64_t base = row * u.stride;
  u.n[row] = static_cast<int32_t>(keep_above(tau, u.hi + base, u.id + base, u.lo + base, u.n[row], u.hi + base, u.id + base, u.lo + base));
}

void score_undecided(const ScoreJob& job, const Undecided& u, int64_t rows, const uint8_t* skip) {
  with_scorer(job, u, [&](auto& scorer) {
    for (int64_t r = 0; r < rows; ++r)
      if (u.n[r] != 0 && skip[r] == 0) scorer.row(r);
    scorer.finish();
  });
}

// ---- every interval, for tests ----

template <bool kScaled>
struct BoundsScreen {
  const ScreenRows& rows;
  float* lo;
  float* hi;
  int64_t ld;
  Features<kScaled> f{};

  FASTSAE_INLINE void panel(const ScreenPanels& p, int panel) { f.set(p, panel); }
  FASTSAE_INLINE void row(int64_t row, Vec r0, Vec r1) {
    const Vec a = broadcast(rows.a[row]), c = broadcast(rows.c[row]);
    for (int h = 0; h < 2; ++h) {
      const Vec r = h == 0 ? r0 : r1, e = f.slack(h, a, c);
      const int n = __builtin_popcount(f.exist >> (16 * h) & 0xffff);
      store_part(lo + row * ld + f.first + 16 * h, f.lower(h, r, e), n);
      store_part(hi + row * ld + f.first + 16 * h, f.upper(h, r, e), n);
    }
  }
};

template <ScreenFormat kFormat>
void bounds_as(const ScreenRows& rows, const ScreenPanels& panels, float* lo, float* hi, int64_t ld) {
  run_scaled<BoundsScreen, kFormat>(rows, panels, {}, rows, lo, hi, ld);
}

void bounds(ScreenFormat format, const ScreenRows& rows, const ScreenPanels& panels, float* lo, float* hi, int64_t ld) {
  constexpr void (*kBounds[kScreenFormats])(const ScreenRows&, const ScreenPanels&, float*, float*, int64_t) = {
      bounds_as<ScreenFormat::int8>, FASTSAE_BF16(bounds_as<ScreenFormat::bf16>), bounds_as<ScreenFormat::exact>};
  kBounds[static_cast<int>(format)](rows, panels, lo, hi, ld);
}

}  // namespace

const EncodeKernels encode_kernels = {screen_topk<false>, screen_topk<true>, finish_topk, screen_threshold, keep_undecided, score_undecided,
                                      kth_largest,        bounds,            screen_rowwise, rescore_row, rank_scores,
                                      largest_along,      reaching_along};

}  // namespace FASTSAE_ISA
}  // namespace fastsae
#endif
