// The consumers of the encoders: what a screened product decides for a top-k, a threshold, a batch's top-k, a gate. Only where the level can
// screen; encode.h states the jobs, tile.h the bound.
#include "cpu/encode.h"

#ifdef FASTSAE_LEVEL_avx512_bf16
#include "cpu/tile.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

constexpr int32_t kMinusInfinity = static_cast<int32_t>(0xff800000u);

FASTSAE_INLINE float from_bits32(int32_t bits) { return as_float(static_cast<uint32_t>(bits)); }
FASTSAE_INLINE int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }  // its own inverse
FASTSAE_INLINE __m512i ordered(__m512i bits) {
  return _mm512_xor_si512(bits, _mm512_and_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(0x7fffffff)));
}

// A number t with at least k of the n values not below t: the k-th largest. NaN counts as -inf. 0 < k <= n.
float kth_largest(const float* values, int64_t n, int64_t k) {
  const int64_t bottom = ordered(kMinusInfinity);
  const auto key = [&](int64_t i) {
    const __mmask16 m = n - i >= 16 ? static_cast<__mmask16>(0xffff) : first(static_cast<int>(n - i));
    const __m512 v = _mm512_mask_loadu_ps(_mm512_set1_ps(-__builtin_inff()), m, values + i);
    return ordered(_mm512_castps_si512(_mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_ps(-__builtin_inff()))));
  };
  __m512i high_v = _mm512_set1_epi32(INT32_MIN), low_v = _mm512_set1_epi32(0x7fffffff);
  for (int64_t i = 0; i < n; i += 16) {
    high_v = _mm512_max_epi32(high_v, key(i));
    low_v = _mm512_min_epi32(low_v, key(i));
  }
  // Invariant: at least k keys >= low, fewer than k keys >= high. Padding lanes count as -inf, which only `low` may be.
  int64_t low = _mm512_reduce_min_epi32(low_v), high = static_cast<int64_t>(_mm512_reduce_max_epi32(high_v)) + 1;
  while (high - low > 1) {
    const int64_t mid = low + (high - low) / 2;
    const __m512i pivot = _mm512_set1_epi32(static_cast<int32_t>(mid));
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += 16) count += __builtin_popcount(_mm512_cmpge_epi32_mask(key(i), pivot));
    if (count >= k) {
      low = mid;
      if (count == k) break;
    } else {
      high = mid;
    }
  }
  return low <= bottom ? -__builtin_inff() : from_bits32(ordered(static_cast<int32_t>(low)));
}

FASTSAE_INLINE float load_tau(const int32_t* tau) { return from_bits32(__atomic_load_n(tau, __ATOMIC_RELAXED)); }

// Never falls; what another worker sets in between stays if it is higher. Results do not depend on who was first: the last word is exact.
FASTSAE_INLINE void raise_tau(int32_t* tau, float to) {
  int32_t seen = __atomic_load_n(tau, __ATOMIC_RELAXED);
  while (from_bits32(seen) < to &&
         !__atomic_compare_exchange_n(tau, &seen, static_cast<int32_t>(as_bits(to)), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

// Copies the entries with !(value < tau), to the same place or another; their number. Writes up to 15 elements beyond them.
FASTSAE_INLINE int64_t keep_above(float tau, const float* value, const int32_t* id, const float* other, int64_t n, float* to_value,
                                  int32_t* to_id, float* to_other) {
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 valid = n - i >= 16 ? static_cast<__mmask16>(0xffff) : first(static_cast<int>(n - i));
    const __m512 v = _mm512_loadu_ps(value + i);
    const __m512i f = _mm512_loadu_si512(id + i);
    const __mmask16 m = _mm512_mask_cmp_ps_mask(valid, v, _mm512_set1_ps(tau), _CMP_NLT_UQ);
    if (other != nullptr) _mm512_storeu_ps(to_other + kept, _mm512_maskz_compress_ps(m, _mm512_loadu_ps(other + i)));
    _mm512_storeu_ps(to_value + kept, _mm512_maskz_compress_ps(m, v));
    _mm512_storeu_si512(to_id + kept, _mm512_maskz_compress_epi32(m, f));
    kept += __builtin_popcount(m);
  }
  return kept;
}

template <bool kScaled>
struct TopkConsumer {
  const TopkBuffer& buffer;
  const ScreenRows& rows;
  Features<kScaled> f;

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

FASTSAE_INLINE void lock_row(uint8_t* lock) {
  while (__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE) != 0) _mm_pause();
}
FASTSAE_INLINE void unlock_row(uint8_t* lock) { __atomic_store_n(lock, 0, __ATOMIC_RELEASE); }

constexpr int64_t kPatience = 4;  // tau is raised when k / kPatience scores are new

// What is left of a row's undecided features after another look at tau; with many of them, after a better tau.
FASTSAE_INLINE void reconsider(const TopkBuffer& buffer, int64_t row) {
  const Undecided& u = buffer.undecided;
  float* const lo = u.lo + row * u.stride;
  float* const hi = u.hi + row * u.stride;
  int32_t* const id = u.id + row * u.stride;
  int64_t n = keep_above(load_tau(buffer.tau + row), hi, id, lo, u.n[row], hi, id, lo);
  constexpr int64_t kMany = 8;
  if (n >= kMany) {
    lock_row(buffer.lock + row);
    const int64_t kept = buffer.kept[row];
    __builtin_memcpy(buffer.room, buffer.score + row * buffer.kept_stride, static_cast<size_t>(kept) * sizeof(float));
    unlock_row(buffer.lock + row);
    __builtin_memcpy(buffer.room + kept, lo, static_cast<size_t>(n) * sizeof(float));
    if (kept + n >= buffer.k) {
      raise_tau(buffer.tau + row, kth_largest(buffer.room, kept + n, buffer.k));
      n = keep_above(load_tau(buffer.tau + row), hi, id, lo, n, hi, id, lo);
    }
  }
  u.n[row] = static_cast<int32_t>(n);
}

int64_t raise(const TopkBuffer& buffer, int64_t row, int64_t kept) {
  float* const score = buffer.score + row * buffer.kept_stride;
  int32_t* const feature = buffer.feature + row * buffer.kept_stride;
  if (kept >= buffer.k) raise_tau(buffer.tau + row, kth_largest(score, kept, buffer.k));
  buffer.fresh[row] = 0;
  return keep_above(load_tau(buffer.tau + row), score, feature, nullptr, kept, score, feature, nullptr);
}

// Exact products to scores, and those to the entries that all workers share.
FASTSAE_INLINE void share(const TopkBuffer& buffer, const ScreenPanels& p, int64_t row) {
  const Undecided& u = buffer.undecided;
  const int64_t base = row * u.stride, kept_base = row * buffer.kept_stride;
  const int64_t n = u.n[row];
  u.n[row] = 0;
  for (int64_t i = base; i < base + n; ++i) {
    const int64_t at = u.id[i] - p.first;
    float score = u.hi[i];
    if (p.scale != nullptr) score = score * p.scale[at];
    u.hi[i] = score + p.bias[at];
  }
  float* const score = buffer.score + kept_base;
  int32_t* const feature = buffer.feature + kept_base;
  lock_row(buffer.lock + row);
  int64_t kept = buffer.kept[row];
  if (kept + n > buffer.capacity) kept = raise(buffer, row, kept);
  if (kept + n > buffer.capacity) {
    __atomic_store_n(buffer.exact + row, 1, __ATOMIC_RELAXED);
    raise_tau(buffer.tau + row, __builtin_inff());
    kept = 0;
  } else {
    kept += keep_above(load_tau(buffer.tau + row), u.hi + base, u.id + base, nullptr, n, score + kept, feature + kept, nullptr);
    buffer.fresh[row] += static_cast<int32_t>(n);
    if (buffer.fresh[row] > buffer.k / kPatience && kept >= buffer.k) kept = raise(buffer, row, kept);
  }
  buffer.kept[row] = static_cast<int32_t>(kept);
  unlock_row(buffer.lock + row);
}

void screen_topk(const ScreenRows& rows, const ScreenPanels& panels, const Ahead& next, const ScoreJob& job, const TopkBuffer& buffer) {
  if (panels.scale != nullptr) {
    TopkConsumer<true> consumer{buffer, rows, {}};
    run_block<Number::int8>(rows, panels, next, consumer);
  } else {
    TopkConsumer<false> consumer{buffer, rows, {}};
    run_block<Number::int8>(rows, panels, next, consumer);
  }
  const Undecided& u = buffer.undecided;
  with_scorer(job, u, [&](auto& scorer) {
    for (int64_t r = 0; r < rows.rows; ++r) {
      if (u.n[r] == 0) continue;
      reconsider(buffer, r);
      scorer.row(r);
      *buffer.scored += u.n[r];
    }
    scorer.finish();
  });
  for (int64_t r = 0; r < rows.rows; ++r)
    if (u.n[r] != 0) share(buffer, panels, r);
}

int64_t finish_topk(const TopkBuffer& buffer, int64_t row) {
  float* const score = buffer.score + row * buffer.kept_stride;
  int32_t* const feature = buffer.feature + row * buffer.kept_stride;
  const int64_t kept = buffer.kept[row];
  const float tau = kept > buffer.k ? kth_largest(score, kept, buffer.k) : -__builtin_inff();
  return keep_above(tau, score, feature, nullptr, kept, score, feature, nullptr);
}

// ---- cuts: a threshold a feature, one for all, a gate ----

// Undecided is what may exceed its cut: a feature's own (kEach), or one that all workers raise. kGate: a second bias, for the same product
// without the scale, must be able to exceed 0 as well.
template <bool kScaled, bool kEach, bool kGate>
struct CutConsumer {
  const Undecided& undecided;
  const ScreenRows& rows;
  const int32_t* cut;
  Features<kScaled> f;
  __m512 extra[2];

  FASTSAE_INLINE void panel(const ScreenPanels& p, int panel) {
    f.set(p, panel);
    for (int h = 0; h < 2; ++h) extra[h] = kEach || kGate ? _mm512_loadu_ps(p.extra + panel * kPanelWidth + 16 * h) : _mm512_setzero_ps();
  }

  FASTSAE_INLINE void row(int64_t row, __m512 r0, __m512 r1) {
    const __m512 a = _mm512_set1_ps(rows.a[row]), c = _mm512_set1_ps(rows.c[row]);
    const __m512 e0 = f.slack(0, a, c), e1 = f.slack(1, a, c);
    const __m512 least0 = kEach ? extra[0] : kGate ? _mm512_setzero_ps() : _mm512_set1_ps(load_tau(cut));
    const __m512 least1 = kEach ? extra[1] : least0;
    const auto passes = [](__m512 upper, __m512 least) {
      return kEach || kGate ? _mm512_cmp_ps_mask(upper, least, _CMP_NLE_UQ) : _mm512_cmp_ps_mask(upper, least, _CMP_NLT_UQ);
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

template <bool kScaled, bool kEach, bool kGate>
void screen_cut_as(const ScreenRows& rows, const ScreenPanels& panels, const Ahead& next, const Undecided& undecided, const int32_t* cut) {
  CutConsumer<kScaled, kEach, kGate> consumer{undecided, rows, cut, {}, {}};
  run_block<Number::int8>(rows, panels, next, consumer);
}

void screen_cut(Cut kind, const ScreenRows& rows, const ScreenPanels& panels, const Ahead& next, const Undecided& undecided,
                const int32_t* cut) {
  const bool scaled = panels.scale != nullptr;
  if (kind == Cut::gate)
    screen_cut_as<true, false, true>(rows, panels, next, undecided, cut);
  else if (kind == Cut::each)
    (scaled ? screen_cut_as<true, true, false> : screen_cut_as<false, true, false>)(rows, panels, next, undecided, cut);
  else
    (scaled ? screen_cut_as<true, false, false> : screen_cut_as<false, false, false>)(rows, panels, next, undecided, cut);
}

void keep_undecided(const Undecided& u, int64_t row, float tau) {
  const int64_t base = row * u.stride;
  u.n[row] = static_cast<int32_t>(
      keep_above(tau, u.hi + base, u.id + base, u.lo + base, u.n[row], u.hi + base, u.id + base, u.lo + base));
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
struct BoundsConsumer {
  const ScreenRows& rows;
  float* lo;
  float* hi;
  int64_t ld;
  Features<kScaled> f;

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

template <Number kNumber>
void bounds_as(const ScreenRows& rows, const ScreenPanels& panels, float* lo, float* hi, int64_t ld) {
  if (panels.scale != nullptr) {
    BoundsConsumer<true> consumer{rows, lo, hi, ld, {}};
    run_block<kNumber>(rows, panels, {nullptr, 0, 1, 0}, consumer);
  } else {
    BoundsConsumer<false> consumer{rows, lo, hi, ld, {}};
    run_block<kNumber>(rows, panels, {nullptr, 0, 1, 0}, consumer);
  }
}

void bounds(Number number, const ScreenRows& rows, const ScreenPanels& panels, float* lo, float* hi, int64_t ld) {
  (number == Number::int8 ? bounds_as<Number::int8> : bounds_as<Number::bf16>)(rows, panels, lo, hi, ld);
}

}  // namespace

extern const EncodeKernels encode_kernels;
const EncodeKernels encode_kernels = {screen_topk, finish_topk, screen_cut, keep_undecided, score_undecided, kth_largest, bounds};

}  // namespace FASTSAE_ISA
}  // namespace fastsae
#endif
