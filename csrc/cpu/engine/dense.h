// Top-k of rows by computing every score: for rows that screening does not serve. Baseline code.
#pragma once
#include "cpu/engine/driver.h"
#include "cpu/engine/order.h"

namespace fastsae {

// The best entries of one row among the features one worker sees, in any order: its own share, then what others left. An equal score enters
// as well, since its feature may be the lower one; a full list is cut to k.
struct Best {
  uint64_t* entries;
  int64_t n;
  float above;  // only scores that are not below this can still enter
  bool any;     // everything still enters

  // `row`: of the whole input.
  void add(const Problem& p, int64_t row, int64_t k, int64_t capacity, float* scores, int64_t first, int64_t count) {
    const int32_t* const list = p.w.list;
    const auto term = [&](const float* terms, int64_t j) { return terms[list != nullptr ? list[first + j] : first + j]; };
    if (p.scale != nullptr)
      for (int64_t j = 0; j < count; ++j) scores[j] *= term(p.scale, j);
    if (p.bias != nullptr)
      for (int64_t j = 0; j < count; ++j) scores[j] += term(p.bias, j);
    for (int64_t j0 = 0; j0 < count; j0 += 16) {
      const int64_t j1 = std::min(j0 + 16, count);
      int pass = any ? 1 : 0;
      for (int64_t j = j0; j < j1; ++j) pass |= static_cast<int>(!((p.absolute ? std::fabs(scores[j]) : scores[j]) < above));
      if (pass == 0) continue;
      for (int64_t j = j0; j < j1; ++j) {
        const float score = p.absolute ? std::fabs(scores[j]) : scores[j];
        if ((!any && score < above) || (p.exclude_self && first + j == row)) continue;
        if (n == capacity) {
          shrink(k);
          if (score < above) continue;
        }
        entries[n++] = entry(score, p.absolute ? 2 * (first + j) + (scores[j] < 0 ? 1 : 0) : first + j);
      }
    }
  }
  void shrink(int64_t k) {
    std::nth_element(entries, entries + k - 1, entries + n);
    n = k;
    const uint32_t worst = static_cast<uint32_t>(entries[k - 1] >> 32);
    any = false;
    above = score_of(worst);  // NaN: little but NaN enters, and those are put aside again at the next turn
    if (worst == 0) above = INFINITY;
  }
};

// Rows `list` (null: 0 .. count) of the chunk xc; row r of the chunk is row `base + r` of the output.
inline int64_t dense_topk(const Problem& p, const TopkOutput& out, const float* xc, int64_t base, const int32_t* list, int64_t count) {
  const Weights& w = p.w;
  const int64_t d = w.d, padded = padded_to(d), capacity = std::min(2 * out.k + 64, w.features);
  const bool plain = by_rows(w) && w.t == Dtype::f32 && w.eps == 0;
  // By rows: as many features as stay in the cache for all rows. By columns: wide, because each row of a strip is on another page.
  const bool direct =
      !by_rows(w) && w.stride_f == 1 && w.t == Dtype::f32 && w.eps == 0 && w.list == nullptr && d > 0 && count <= kColumnRows;
  const int64_t width = direct  ? std::clamp(round_to(w.features / (4 * p.threads), 64), int64_t{256}, kColumnWidth / count / 64 * 64)
                        : plain ? std::clamp(round_to((int64_t{32} << 10) / padded, 16), int64_t{16}, kDenseWidth)
                                : kDenseWidth;
  const int64_t units = ceil_div(w.features, width), stride = padded + 16;
  const int threads = static_cast<int>(std::min<int64_t>({useful_threads(p.threads, count * w.features * d / 8), units, kMostWorkers}));
  const int64_t at_once = std::clamp(kBufferBytes / (8 * capacity * threads), int64_t{1}, count);
  constexpr int64_t kGroup = 16;
  const int64_t lanes = count * kScoreLanes * width;  // of direct: sums, totals, scores
  const int64_t copies_each = direct ? 2 * lanes + count * width : plain ? 0 : kDenseWidth * stride;
  const int64_t bytes = Workspace::size<uint64_t>(threads * at_once * capacity) + Workspace::size<Best>(threads * at_once) +
                        Workspace::size<float>(threads * copies_each) + Workspace::size<uint64_t>(threads * threads * capacity);
  Workspace space(static_cast<size_t>(bytes));
  if (!space.ok()) return kNoMemory;
  note_workspace(p.stats, bytes);
  uint64_t* const entries = space.take<uint64_t>(threads * at_once * capacity);
  Best* const best = space.take<Best>(threads * at_once);
  float* const copies = space.take<float>(threads * copies_each);
  uint64_t* const merged = space.take<uint64_t>(threads * threads * capacity);

  for (int64_t r0 = 0; r0 < count; r0 += at_once) {
    const int64_t rows = std::min(at_once, count - r0);
    const auto row_of = [&](int64_t i) { return list != nullptr ? list[r0 + i] : r0 + i; };
    for (int64_t i = 0; i < threads * at_once; ++i) best[i] = {entries + i * capacity, 0, -INFINITY, true};
    for_each_unit_by_worker(threads, units, [&](int64_t unit, int worker) {
      const int64_t f0 = unit * width, n = std::min(width, w.features - f0);
      if (direct) {
        const float* x[kColumnRows];
        float* const sums = copies + worker * copies_each;
        float* const scores = sums + 2 * lanes;
        for (int64_t i = 0; i < rows; ++i) x[i] = xc + row_of(i) * padded;
        p.kernels.columns({.w = static_cast<const float*>(w.data) + f0,
                           .stride_d = w.stride_d,
                           .d = d,
                           .features = n,
                           .x = x,
                           .rows = static_cast<int>(rows),
                           .sums = sums,
                           .totals = sums + lanes,
                           .out = scores,
                           .ld = width});
        for (int64_t i = 0; i < rows; ++i) best[worker * at_once + i].add(p, base + row_of(i), out.k, capacity, scores + i * width, f0, n);
        return;
      }
      const float* features[kDenseWidth];
      if (plain) {
        for (int64_t j = 0; j < n; ++j)
          features[j] = static_cast<const float*>(w.data) + (w.list != nullptr ? w.list[f0 + j] : f0 + j) * w.stride_f;
      } else {
        float* const to = copies + worker * copies_each;
        load_features(p, f0, n, to, stride);
        for (int64_t j = 0; j < n; ++j) features[j] = to + j * stride;
      }
      for (int64_t g = 0; g < rows; g += kGroup) {
        const float* x[kGroup];
        float scores[kGroup * kDenseWidth];
        const int64_t height = std::min(kGroup, rows - g);
        for (int64_t i = 0; i < height; ++i) x[i] = xc + row_of(g + i) * padded;
        p.kernels.products(x, height, features, n, d, scores, kDenseWidth);
        for (int64_t i = 0; i < height; ++i)
          best[worker * at_once + g + i].add(p, base + row_of(g + i), out.k, capacity, scores + i * kDenseWidth, f0, n);
      }
    });
    for_each_unit_by_worker(threads, rows, [&](int64_t r, int worker) {
      uint64_t* const all = merged + worker * threads * capacity;
      int64_t n = 0;
      for (int t = 0; t < threads; ++t) {
        const Best& b = best[t * at_once + r];
        std::memcpy(all + n, b.entries, static_cast<size_t>(b.n) * sizeof(uint64_t));
        n += b.n;
      }
      out.select(base + row_of(r), all, n);
    });
  }
  return kOk;
}

inline int64_t dense_topk_all(const Problem& p, const TopkOutput& out) {
  const int64_t chunk = std::min(p.x.rows, kChunkRows), padded = padded_to(p.w.d);
  Workspace space(Workspace::size<float>(chunk * padded));
  if (!space.ok()) return kNoMemory;
  float* const xc = space.take<float>(chunk * padded);
  for (int64_t base = 0; base < p.x.rows; base += chunk) {
    const int64_t rows = std::min(chunk, p.x.rows - base);
    constexpr int64_t kRows = 16;
    for_each_unit(useful_threads(p.threads, rows * p.w.d), ceil_div(rows, kRows), [&](int64_t unit) {
      const int64_t r0 = unit * kRows;
      load_rows(p, base + r0, std::min(kRows, rows - r0), xc + r0 * padded);
    });
    const int64_t status = dense_topk(p, out, xc, base, nullptr, rows);
    if (status != kOk) return status;
  }
  return kOk;
}

// The rows of a chunk that screening left to the exact path, to `list`: how many. Counts them and the others.
inline int64_t collect_exact(const Problem& p, const uint8_t* exact, int64_t rows, int32_t* list) {
  int64_t count = 0;
  for (int64_t r = 0; r < rows; ++r)
    if (exact[r] != 0) list[count++] = static_cast<int32_t>(r);
  if (p.stats != nullptr) {
    __atomic_fetch_add(&p.stats->screened_rows, rows - count, __ATOMIC_RELAXED);
    __atomic_fetch_add(&p.stats->exact_rows, count, __ATOMIC_RELAXED);
  }
  return count;
}

}  // namespace fastsae
