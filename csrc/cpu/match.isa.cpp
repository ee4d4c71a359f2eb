// The screens of cosine matching: best of a row, and of rows and columns at once. Rows and columns are unit vectors; bound.h states the
// bound.
#include "cpu/match.h"

#include "isa.h"

#ifdef FASTSAE_SCREENS
#include "cpu/engine/tile.isa.h"
#include "cpu/engine/topk.isa.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

template <bool kAbsolute>
struct MatchScreen {
  const TopkBuffer& buffer;
  const ScreenRows& rows;
  Features<false> f{};

  FASTSAE_INLINE void panel(const ScreenPanels& p, int panel) { f.set(p, panel); }

  FASTSAE_INLINE void row(int64_t row, Vec r0, Vec r1) {
    const Vec a = broadcast(rows.a[row]), c = broadcast(rows.c[row]);
    const Vec tau = broadcast(load_tau(buffer.tau + row));
    const Vec e0 = f.slack(0, a, c), e1 = f.slack(1, a, c);
    if (kAbsolute) {  // a magnitude errs by no more than the number
      r0 = magnitude(r0);
      r1 = magnitude(r1);
    }
    uint32_t m =
        joined(not_below(add(r0, e0), tau), not_below(add(r1, e1), tau)) &
        f.exist;
    if (__builtin_expect(m != 0, 0)) {
      const int64_t self = buffer.self + row - f.first;
      if (self >= 0 && self < kPanelWidth) m &= ~(1u << self);
      if (m != 0 && __atomic_load_n(buffer.exact + row, __ATOMIC_RELAXED) == 0) append(buffer.undecided, row, m, f, r0, r1, e0, e1);
    }
  }
};

template <bool kAbsolute>
void screen_match(const ScreenRows& rows, const ScreenPanels& panels, const Prefetch& next, const ScoreJob& job, const TopkBuffer& buffer) {
  if (all_exact(buffer, rows.rows)) return;
  *buffer.seen += panels.features;
  MatchScreen<kAbsolute> screen{buffer, rows};
  run_block<ScreenFormat::int8>(rows, panels, next, screen);
  rescore<kAbsolute>(rows, panels, job, buffer);
}

struct PairScreen {
  const PairBuffer& buffer;
  const ScreenRows& rows;
  Features<false> f{};

  FASTSAE_INLINE void panel(const ScreenPanels& p, int panel) { f.set(p, panel); }

  FASTSAE_INLINE void row(int64_t row, Vec r0, Vec r1) {
    const Vec a = broadcast(rows.a[row]), c = broadcast(rows.c[row]);
    const Vec tau = broadcast(load_tau(buffer.rows.tau + row));
    const Vec low_tau = broadcast(-load_tau(buffer.low_tau + row));
    const Vec lowest = broadcast(-__builtin_inff());
    uint32_t m = 0;
    Vec e[2];
    for (int h = 0; h < 2; ++h) {
      const Vec r = h == 0 ? r0 : r1;
      e[h] = f.slack(h, a, c);
      const Vec hi = add(r, e[h]), lo = sub(r, e[h]);
      float* const at = buffer.column_lows + f.first + 16 * h;
      // Each list is sorted; the new one pushes what it beats down by one. A NaN counts as -inf.
      Vec v = larger(lo, lowest), last = v;
      const Vec column = load(buffer.column_tau + f.first + 16 * h);
      const Vec kth = larger(column, load(at + (buffer.k - 1) * buffer.columns));
      for (int64_t j = 0; j < buffer.k; ++j) {
        last = load(at + j * buffer.columns);
        store(at + j * buffer.columns, larger(v, last));
        v = smaller(v, last);
      }
      const Mask open = not_below(hi, smaller(tau, kth)) | not_above(lo, low_tau);
      m |= static_cast<uint32_t>(open) << (16 * h);
    }
    m &= f.exist;
    if (__builtin_expect(m != 0, 0)) append(buffer.rows.undecided, row, m, f, r0, r1, e[0], e[1]);
  }
};

// A pair may have been open only because the block was young: another look, with what its rows have shown.
void close_pairs(const PairBuffer& buffer, int64_t row) {
  const Undecided& u = buffer.rows.undecided;
  const TopkBuffer& best = buffer.rows;
  float* const lo = u.lo + row * u.stride;
  float* const hi = u.hi + row * u.stride;
  int32_t* const id = u.id + row * u.stride;
  const int64_t n = u.n[row];
  constexpr int64_t kMany = 8;
  if (n >= kMany && best.exact[row] == 0) {
    lock_row(best.lock + row);
    const int64_t kept = best.kept[row];
    __builtin_memcpy(best.room, best.score + row * best.kept_stride, static_cast<size_t>(kept) * sizeof(float));
    unlock_row(best.lock + row);
    __builtin_memcpy(best.room + kept, lo, static_cast<size_t>(n) * sizeof(float));
    if (kept + n >= best.k) raise_tau(best.tau + row, kth_largest(best.room, kept + n, best.k, best.k));
    float low = __builtin_inff();
    for (int64_t i = 0; i < n; ++i) low = hi[i] < low ? hi[i] : low;
    raise_tau(buffer.low_tau + row, -low);
  }
  const float tau = load_tau(best.tau + row), low_tau = -load_tau(buffer.low_tau + row);
  int64_t open = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float kth = buffer.column_lows[(buffer.k - 1) * buffer.columns + id[i]];
    const float column = buffer.column_tau[id[i]] > kth ? buffer.column_tau[id[i]] : kth;
    if (hi[i] < (tau < column ? tau : column) && lo[i] > low_tau) continue;
    lo[open] = lo[i];
    hi[open] = hi[i];
    id[open++] = id[i];
  }
  u.n[row] = static_cast<int32_t>(open);
}

void screen_pair(const ScreenRows& rows, const ScreenPanels& panels, const Prefetch& next, const PairBuffer& buffer) {
  PairScreen screen{buffer, rows};
  run_block<ScreenFormat::int8>(rows, panels, next, screen);
  for (int64_t r = 0; r < rows.rows; ++r)
    if (buffer.rows.undecided.n[r] != 0) close_pairs(buffer, r);
}

void merge_row(const TopkBuffer& buffer, const ScreenPanels& panels, int64_t row) { merge_scores(buffer, panels, row); }
void raise_low(int32_t* tau, float to) { raise_tau(tau, to); }

}  // namespace

const MatchKernels match_kernels = {screen_match<false>, screen_match<true>, screen_pair, merge_row, raise_low};

}  // namespace FASTSAE_ISA
}  // namespace fastsae
#endif
