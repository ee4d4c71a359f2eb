// The running top-k of rows that several workers share: a screen of the tile engine puts what it cannot decide through here. Only for
// *.isa.cpp of a level that can screen.
#pragma once
#include "cpu/encode.h"
#include "cpu/engine/tile.isa.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

constexpr int32_t kMinusInfinity = static_cast<int32_t>(0xff800000u);

FASTSAE_INLINE float from_bits32(int32_t bits) { return as_float(static_cast<uint32_t>(bits)); }
FASTSAE_INLINE int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }  // its own inverse

// A number t with at least k of the n values not below t, and with no more than `most` of them unless more are equal; with most = k the
// k-th largest. NaN counts as -inf. 0 < k <= n.
float kth_largest(const float* values, int64_t n, int64_t k, int64_t most) {
  const int64_t bottom = ordered(kMinusInfinity);
  constexpr int64_t kHeld = 1024;
  alignas(64) int32_t held[kHeld];
  const auto made = [&](int64_t i) {  // lanes beyond n have a key below all
    const Vec v = n - i >= kLanes ? load(values + i) : load_part(values + i, static_cast<int>(n - i));
    return choose(valid_of(n - i), ordered(choose(is_nan(v), broadcast(-__builtin_inff()), v)), all(INT32_MIN));
  };
  Ints high_v = all(INT32_MIN), low_v = all(INT32_MAX);
  for (int64_t i = 0; i < n; i += 16) {
    const Ints key = made(i);
    if (n <= kHeld) store(held + i, key);
    high_v = larger(high_v, key);
    low_v = choose(valid_of(n - i), smaller(low_v, key), low_v);
  }
  // Invariant: at least k keys >= low, fewer than k keys >= high.
  int64_t low = smallest(low_v), high = static_cast<int64_t>(largest(high_v)) + 1;
  while (high - low > 1) {
    const int64_t mid = low + (high - low) / 2;
    const Ints pivot = all(static_cast<int32_t>(mid));
    int64_t count = 0;
    if (n <= kHeld)
      for (int64_t i = 0; i < n; i += 16) count += __builtin_popcount(at_least(load(held + i), pivot));
    else
      for (int64_t i = 0; i < n; i += 16) count += __builtin_popcount(at_least(made(i), pivot));
    if (count >= k) {
      low = mid;
      if (count <= most) break;
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
    const Vec v = load(value + i);
    const Ints f = load(id + i);
    const Mask m = valid_of(n - i) & not_below(v, broadcast(tau));
    if (other != nullptr) compact(to_other + kept, m, load(other + i));
    compact(to_value + kept, m, v);
    kept += compact(to_id + kept, m, f);
  }
  return kept;
}

FASTSAE_INLINE void lock_row(uint8_t* lock) {
  while (__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE) != 0) pause();
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
      raise_tau(buffer.tau + row, kth_largest(buffer.room, kept + n, buffer.k, buffer.k));
      n = keep_above(load_tau(buffer.tau + row), hi, id, lo, n, hi, id, lo);
    }
  }
  u.n[row] = static_cast<int32_t>(n);
}

int64_t raise(const TopkBuffer& buffer, int64_t row, int64_t kept) {
  float* const score = buffer.score + row * buffer.kept_stride;
  int32_t* const feature = buffer.feature + row * buffer.kept_stride;
  if (kept >= buffer.k) raise_tau(buffer.tau + row, kth_largest(score, kept, buffer.k, buffer.k));
  buffer.fresh[row] = 0;
  return keep_above(load_tau(buffer.tau + row), score, feature, nullptr, kept, score, feature, nullptr);
}

// Scores closer together than the bound cannot be told apart by screening: a row for which a quarter of the features (and what any row
// needs at the start) had to be scored one by one is cheaper on the exact path. Whether to score what is open now.
FASTSAE_INLINE bool worth_scoring(const TopkBuffer& buffer, int64_t row) {
  const int64_t n = buffer.undecided.n[row];
  buffer.spent[row] += static_cast<int32_t>(n);
  if (buffer.spent[row] <= 4 * buffer.k + 256 + *buffer.seen / 4) return true;
  __atomic_store_n(buffer.exact + row, 1, __ATOMIC_RELAXED);
  raise_tau(buffer.tau + row, __builtin_inff());
  buffer.undecided.n[row] = 0;
  return false;
}

// Whether every row of the chunk is left to the exact path.
FASTSAE_INLINE bool all_exact(const TopkBuffer& buffer, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r)
    if (__atomic_load_n(buffer.exact + r, __ATOMIC_RELAXED) == 0) return false;
  return true;
}

// Exact products of entries [from, to) of `u` to scores; kAbsolute: to magnitudes, and features to 2 * feature + sign.
template <bool kAbsolute>
FASTSAE_INLINE void to_scores(const Undecided& u, const ScreenPanels& p, int64_t from, int64_t to) {
  for (int64_t i = from; i < to; ++i) {
    const int64_t at = u.id[i] - p.first;
    float score = u.hi[i];
    if (p.scale != nullptr) score = score * p.scale[at];
    score = score + p.bias[at];
    if (kAbsolute) u.id[i] = 2 * u.id[i] + (score < 0 ? 1 : 0);
    u.hi[i] = kAbsolute ? __builtin_fabsf(score) : score;
  }
}

// Exact products to scores, and those to the entries that all workers share.
template <bool kAbsolute = false>
FASTSAE_INLINE void merge_scores(const TopkBuffer& buffer, const ScreenPanels& p, int64_t row) {
  const Undecided& u = buffer.undecided;
  const int64_t base = row * u.stride, kept_base = row * buffer.kept_stride;
  const int64_t n = u.n[row];
  u.n[row] = 0;
  to_scores<kAbsolute>(u, p, base, base + n);
  float* const score = buffer.score + kept_base;
  int32_t* const feature = buffer.feature + kept_base;
  lock_row(buffer.lock + row);
  int64_t kept = buffer.kept[row];
  bool tied = false;  // as many again as the best k are not below the k-th: it would go on so
  if (kept + n > buffer.capacity) {
    kept = raise(buffer, row, kept);
    tied = kept > 2 * buffer.k + 128;
  }
  if (tied || kept + n > buffer.capacity) {
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

// After the screen of a block: the exact scores of what it left open, to what the workers share.
template <bool kAbsolute>
FASTSAE_INLINE void rescore(const ScreenRows& rows, const ScreenPanels& panels, const ScoreJob& job, const TopkBuffer& buffer) {
  const Undecided& u = buffer.undecided;
  with_scorer(job, u, [&](auto& scorer) {
    for (int64_t r = 0; r < rows.rows; ++r) {
      if (u.n[r] == 0) continue;
      reconsider(buffer, r);
      if (!worth_scoring(buffer, r)) continue;
      scorer.row(r);
      *buffer.scored += u.n[r];
    }
    scorer.finish();
  });
  for (int64_t r = 0; r < rows.rows; ++r)
    if (u.n[r] != 0) merge_scores<kAbsolute>(buffer, panels, r);
}

[[maybe_unused]] int64_t finish_topk(const TopkBuffer& buffer, int64_t row) {
  float* const score = buffer.score + row * buffer.kept_stride;
  int32_t* const feature = buffer.feature + row * buffer.kept_stride;
  const int64_t kept = buffer.kept[row];
  const float tau = kept > buffer.k ? kth_largest(score, kept, buffer.k, buffer.k) : -__builtin_inff();
  return keep_above(tau, score, feature, nullptr, kept, score, feature, nullptr);
}

}  // namespace
}  // namespace FASTSAE_ISA
}  // namespace fastsae
