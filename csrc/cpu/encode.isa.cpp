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

  FASTSAE_INLINE void row(int64_t row, __m512 r0, __m512 r1) {
    const __m512 a = _mm512_set1_ps(rows.a[row]), c = _mm512_set1_ps(rows.c[row]);
    const __m512 tau = _mm512_set1_ps(load_tau(buffer.tau + row));
    const __m512 e0 = f.slack(0, a, c), e1 = f.slack(1, a, c);
    const __mmask16 m0 = _mm512_cmp_ps_mask(f.upper(0, r0, e0), tau, _CMP_NLT_UQ);
    const __mmask16 m1 = _mm512_cmp_ps_mask(f.upper(1, r1, e1), tau, _CMP_NLT_UQ);
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

  FASTSAE_INLINE void row(int64_t row, __m512 r0, __m512 r1) {
    const __m512 a = _mm512_set1_ps(rows.a[row]), c = _mm512_set1_ps(rows.c[row]);
    const __m512 e0 = f.slack(0, a, c), e1 = f.slack(1, a, c);
    float* const high = to.high + row * to.stride + at;
    _mm512_store_ps(high, f.upper(0, r0, e0));
    _mm512_store_ps(high + 16, f.upper(1, r1, e1));
    // The largest lower end so far; a NaN is passed over, and a feature that does not exist has none.
    float* const low = to.low + row * to.lows + group;
    __m512 most = _mm512_load_ps(low);
    if (__builtin_expect(f.exist == ~0u, 1)) {
      most = _mm512_max_ps(f.lower(1, r1, e1), _mm512_max_ps(f.lower(0, r0, e0), most));
    } else {
      for (int h = 0; h < 2; ++h) {
        const __mmask16 m = static_cast<__mmask16>(f.exist >> (16 * h));
        most = _mm512_mask_max_ps(most, m, f.lower(h, h == 0 ? r0 : r1, h == 0 ? e0 : e1), most);
      }
    }
    _mm512_store_ps(low, most);
  }
};

template <bool kScaled>
using RowwiseScores = RowwiseScreen<Features<kScaled>>;
template <bool kScaled>
using RowwiseMagnitudes = RowwiseScreen<Magnitudes<kScaled>>;

void screen_rowwise(const ScreenRows& rows, const ScreenPanels& panels, const Prefetch& next, const RowwiseTopk& to) {
  const int64_t lows = ceil_div(panels.panels, to.panels) * 16;
  for (int64_t r = 0; r < rows.rows; ++r)
    for (int64_t i = 0; i < lows; i += 16) _mm512_store_ps(to.low + r * to.lows + i, _mm512_set1_ps(-__builtin_inff()));
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
      for (int line = 0; line < 4; ++line) _mm_prefetch(later + 64 * line, _MM_HINT_T0);
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
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t n = 0;
  for (int64_t i = 0; i < features; i += 16) {
    const __mmask16 valid = features - i >= 16 ? static_cast<__mmask16>(0xffff) : first(static_cast<int>(features - i));
    const __m512 v = _mm512_load_ps(high + i);
    const __mmask16 m = _mm512_mask_cmp_ps_mask(valid, v, _mm512_set1_ps(tau), _CMP_NLT_UQ);
    if (m == 0) continue;
    _mm512_storeu_ps(open.hi + n, _mm512_maskz_compress_ps(m, v));
    _mm512_storeu_si512(open.id + n, _mm512_maskz_compress_epi32(m, _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int32_t>(i)))));
    n += __builtin_popcount(m);
  }
  return n;
}

// Entries of `open` whose upper end is below `least` (or NaN) to `later`; the number of those that stay.
FASTSAE_INLINE int64_t postpone(float least, const Undecided& open, int64_t n, const Undecided& later) {
  int64_t kept = 0, rest = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 valid = n - i >= 16 ? static_cast<__mmask16>(0xffff) : first(static_cast<int>(n - i));
    const __m512 v = _mm512_loadu_ps(open.hi + i);
    const __m512i id = _mm512_loadu_si512(open.id + i);
    const __mmask16 m = _mm512_mask_cmp_ps_mask(valid, v, _mm512_set1_ps(least), _CMP_GE_OQ);
    const __mmask16 other = valid & static_cast<__mmask16>(~m);
    _mm512_storeu_ps(open.hi + kept, _mm512_maskz_compress_ps(m, v));
    _mm512_storeu_si512(open.id + kept, _mm512_maskz_compress_epi32(m, id));
    _mm512_storeu_ps(later.hi + rest, _mm512_maskz_compress_ps(other, v));
    _mm512_storeu_si512(later.id + rest, _mm512_maskz_compress_epi32(other, id));
    kept += __builtin_popcount(m);
    rest += __builtin_popcount(other);
  }
  return kept;
}

// The k best of a row's scores as entries of order.h, in order. Each goes where as many others are better.
void rank_scores(const float* scores, const int32_t* features, int64_t n, int64_t k, uint64_t* all, uint64_t* best) {
  const __m256i top = _mm256_set1_epi32(0x7fffffff);
  for (int64_t i = 0; i < n; i += 8) {
    const __m256 v = _mm256_add_ps(_mm256_loadu_ps(scores + i), _mm256_setzero_ps());  // -0 to +0
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i key = _mm256_mask_sub_epi32(bits, _mm256_cmpge_epi32_mask(bits, _mm256_setzero_si256()), top, bits);
    const __m256i high = _mm256_maskz_mov_epi32(_mm256_cmp_ps_mask(v, v, _CMP_ORD_Q), key);
    const __m512i id = _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(features + i)));
    const __mmask8 valid = n - i >= 8 ? static_cast<__mmask8>(0xff) : static_cast<__mmask8>((1u << (n - i)) - 1u);
    const __m512i made = _mm512_or_si512(_mm512_slli_epi64(_mm512_cvtepu32_epi64(high), 32), id);
    _mm512_storeu_si512(all + i, _mm512_mask_mov_epi64(_mm512_set1_epi64(-1), valid, made));
  }
  for (int64_t i = 0; i < n; ++i) {
    const __m512i own = _mm512_set1_epi64(static_cast<int64_t>(all[i]));
    int64_t better = 0;
    for (int64_t j = 0; j < n; j += 8) better += __builtin_popcount(_mm512_cmplt_epu64_mask(_mm512_loadu_si512(all + j), own));
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

// ---- thresholds: one a feature, one for all, a gate ----

// Undecided is what may exceed its threshold: its own (kPerFeature), or one that all workers raise. kGate: a second bias, for the same
// product without the scale, must be able to exceed 0 as well.
template <bool kScaled, bool kPerFeature, bool kGate>
struct ThresholdScreen {
  const Undecided& undecided;
  const ScreenRows& rows;
  const int32_t* tau;
  Features<kScaled> f{};
  __m512 extra[2] = {};

  FASTSAE_INLINE void panel(const ScreenPanels& p, int panel) {
    f.set(p, panel);
    for (int h = 0; h < 2; ++h)
      extra[h] = kPerFeature || kGate ? _mm512_loadu_ps(p.extra + panel * kPanelWidth + 16 * h) : _mm512_setzero_ps();
  }

  FASTSAE_INLINE void row(int64_t row, __m512 r0, __m512 r1) {
    const __m512 a = _mm512_set1_ps(rows.a[row]), c = _mm512_set1_ps(rows.c[row]);
    const __m512 e0 = f.slack(0, a, c), e1 = f.slack(1, a, c);
    const __m512 least0 = kPerFeature ? extra[0] : kGate ? _mm512_setzero_ps() : _mm512_set1_ps(load_tau(tau));
    const __m512 least1 = kPerFeature ? extra[1] : least0;
    const auto passes = [](__m512 upper, __m512 least) {
      return kPerFeature || kGate ? _mm512_cmp_ps_mask(upper, least, _CMP_NLE_UQ) : _mm512_cmp_ps_mask(upper, least, _CMP_NLT_UQ);
    };
    __mmask16 m0 = passes(f.upper(0, r0, e0), least0), m1 = passes(f.upper(1, r1, e1), least1);
    if (kGate) {  // the scale of a gated encoder is not negative, so e is the slack of the bare product too
      m0 = m0 & _mm512_cmp_ps_mask(_mm512_add_ps(_mm512_add_ps(r0, e0), extra[0]), _mm512_setzero_ps(), _CMP_NLE_UQ);
      m1 = m1 & _mm512_cmp_ps_mask(_mm512_add_ps(_mm512_add_ps(r1, e1), extra[1]), _mm512_setzero_ps(), _CMP_NLE_UQ);
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
  FASTSAE_INLINE void row(int64_t row, __m512 r0, __m512 r1) {
    const __m512 a = _mm512_set1_ps(rows.a[row]), c = _mm512_set1_ps(rows.c[row]);
    for (int h = 0; h < 2; ++h) {
      const __m512 r = h == 0 ? r0 : r1, e = f.slack(h, a, c);
      const __mmask16 m = static_cast<__mmask16>(f.exist >> (16 * h));
      _mm512_mask_storeu_ps(lo + row * ld + f.first + 16 * h, m, f.lower(h, r, e));
      _mm512_mask_storeu_ps(hi + row * ld + f.first + 16 * h, m, f.upper(h, r, e));
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
                                      kth_largest,        bounds,            screen_rowwise, rescore_row, rank_scores};

}  // namespace FASTSAE_ISA
}  // namespace fastsae
#endif
