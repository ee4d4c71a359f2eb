// Exact top-k of rows: the order of scores, the dense way, and the driver that screens. Baseline code, for encode.cpp and match.cpp.
#pragma once
#include "cpu/encode.h"
#include "cpu/engine/driver.h"

namespace fastsae {

// Measured: with fewer rows, packing costs more than it saves; it is cheaper where columns have to be transposed anyway.
inline bool worth_screening(const Activations& x, const Weights& w) {
  const int64_t rows = w.packed != nullptr && w.list == nullptr ? 1 : 12;
  return x.rows >= rows && w.d >= 32 && w.features >= 2048;
}

struct Problem {
  const Activations& x;
  const Weights& w;
  const float* scale;
  const float* bias;
  int threads;
  EncodeStats* stats;
  bool absolute = false;      // ranked by magnitude; entries then number 2 * feature + (1 where the score is negative)
  bool exclude_self = false;  // feature i does not count for row i

  int64_t d() const { return w.d; }
  int64_t padded() const { return round_to(std::max<int64_t>(w.d, 1), 32); }
};

inline void note_workspace(EncodeStats* stats, int64_t bytes) {
  if (stats != nullptr) stats->workspace = std::max(stats->workspace, bytes);
}

// ---- order: a key a score, ascending from the best; equal scores have equal keys, all NaN one key below all others ----

inline uint32_t key_of(float score) {
  if (score != score) return 0;
  uint32_t bits;
  score += 0.0f;  // -0 to +0
  std::memcpy(&bits, &score, 4);
  return (bits & 0x80000000u) != 0 ? bits : 0x7fffffffu - bits;  // inf (0x7f800000) is 0x7fffff, so 0 is free for NaN
}
inline float score_of(uint32_t key) {
  if (key == 0) return std::nanf("");
  const uint32_t bits = (key & 0x80000000u) != 0 ? key : 0x7fffffffu - key;
  float score;
  std::memcpy(&score, &bits, 4);
  return score;
}
inline uint64_t entry(float score, int64_t feature) { return (uint64_t{key_of(score)} << 32) | static_cast<uint64_t>(feature); }

// ---- top-k ----

struct TopkOutput {
  int64_t k;
  bool relu;
  float* values;
  int64_t* indices;
  const int32_t* list;
  bool absolute = false;

  // The k best of n entries (all different) to the output row.
  void select(int64_t row, uint64_t* entries, int64_t n) const {
    if (k < n) std::nth_element(entries, entries + k, entries + n);
    std::sort(entries, entries + k);
    write(row, entries);
  }
  void write(int64_t row, const uint64_t* entries) const {
    for (int64_t i = 0; i < k; ++i) {
      float score = score_of(static_cast<uint32_t>(entries[i] >> 32));
      int64_t feature = static_cast<int64_t>(entries[i] & 0xffffffffu);
      if (absolute) {
        if ((feature & 1) != 0) score = -score;
        feature /= 2;
      }
      values[row * k + i] = relu && score < 0 ? 0.0f : score;
      indices[row * k + i] = list != nullptr ? list[feature] : feature;
    }
  }
};

// The best entries of one row among the features one worker sees, which come in ascending order: once a worker has k of them, an equal
// score that comes later cannot be among the best, so the list never holds more than its capacity, whatever the input.
struct Best {
  uint64_t* entries;
  int64_t n;
  float above;  // only scores greater than this, or NaN, can still enter
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
      for (int64_t j = j0; j < j1; ++j) pass |= static_cast<int>(!((p.absolute ? std::fabs(scores[j]) : scores[j]) <= above));
      if (pass == 0) continue;
      for (int64_t j = j0; j < j1; ++j) {
        const float score = p.absolute ? std::fabs(scores[j]) : scores[j];
        if ((!any && score <= above) || (p.exclude_self && first + j == row)) continue;
        if (n == capacity) {
          shrink(k);
          if (score <= above) continue;
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
    above = score_of(worst);  // NaN: nothing but NaN enters, and those are put aside again at the next turn
    if (worst == 0) above = INFINITY;
  }
};

// Rows `list` (null: 0 .. count) of the chunk xc; row r of the chunk is row `base + r` of the output.
inline int64_t dense_topk(const EngineKernels& kernels, const Problem& p, const TopkOutput& out, const float* xc, int64_t base,
                          const int32_t* list, int64_t count) {
  const Weights& w = p.w;
  const int64_t padded = p.padded(), capacity = std::min(2 * out.k + 64, w.features);
  const bool plain = by_rows(w) && w.t == Dtype::f32 && w.eps == 0;
  // By rows: as many features as stay in the cache for all rows. By columns: wide, because each row of a strip is on another page.
  const bool direct =
      !by_rows(w) && w.stride_f == 1 && w.t == Dtype::f32 && w.eps == 0 && w.list == nullptr && p.d() > 0 && count <= kColumnRows;
  const int64_t width = direct  ? std::clamp(round_to(w.features / (4 * p.threads), 64), int64_t{256}, kColumnWidth / count / 64 * 64)
                        : plain ? std::clamp(round_to((int64_t{32} << 10) / padded, 16), int64_t{16}, kDenseWidth)
                                : kDenseWidth;
  const int64_t units = ceil_div(w.features, width), stride = padded + 16;
  const int threads = static_cast<int>(std::min<int64_t>({useful_threads(p.threads, count * w.features * p.d() / 8), units, kMostWorkers}));
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
        kernels.columns(
            {static_cast<const float*>(w.data) + f0, w.stride_d, p.d(), n, x, static_cast<int>(rows), sums, sums + lanes, scores, width});
        for (int64_t i = 0; i < rows; ++i) best[worker * at_once + i].add(p, base + row_of(i), out.k, capacity, scores + i * width, f0, n);
        return;
      }
      const float* features[kDenseWidth];
      if (plain) {
        for (int64_t j = 0; j < n; ++j)
          features[j] = static_cast<const float*>(w.data) + (w.list != nullptr ? w.list[f0 + j] : f0 + j) * w.stride_f;
      } else {
        float* const to = copies + worker * copies_each;
        kernels.load({w.data, w.t, w.stride_f, w.stride_d, p.d(), f0, n, w.list, nullptr, w.eps, to, padded, stride});
        for (int64_t j = 0; j < n; ++j) features[j] = to + j * stride;
      }
      for (int64_t g = 0; g < rows; g += kGroup) {
        const float* x[kGroup];
        float scores[kGroup * kDenseWidth];
        const int64_t height = std::min(kGroup, rows - g);
        for (int64_t i = 0; i < height; ++i) x[i] = xc + row_of(g + i) * padded;
        kernels.products(x, height, features, n, p.d(), scores, kDenseWidth);
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

inline int64_t dense_topk_all(const EngineKernels& kernels, const Problem& p, const TopkOutput& out) {
  const int64_t chunk = std::min(p.x.rows, kChunkRows), padded = p.padded();
  Workspace space(Workspace::size<float>(chunk * padded));
  if (!space.ok()) return kNoMemory;
  float* const xc = space.take<float>(chunk * padded);
  for (int64_t base = 0; base < p.x.rows; base += chunk) {
    const int64_t rows = std::min(chunk, p.x.rows - base);
    constexpr int64_t kRows = 16;
    for_each_unit(useful_threads(p.threads, rows * p.d()), ceil_div(rows, kRows), [&](int64_t unit) {
      const int64_t r0 = unit * kRows, n = std::min(kRows, rows - r0);
      kernels.load({p.x.data, p.x.t, p.x.stride_row, p.x.stride_d, p.d(), base + r0, n, nullptr, p.x.subtract, p.x.eps, xc + r0 * padded,
                    padded, padded});
    });
    const int64_t status = dense_topk(kernels, p, out, xc, base, nullptr, rows);
    if (status != kOk) return status;
  }
  return kOk;
}

struct TopkDriver {
  const EngineKernels& kernels;
  const EncodeKernels& screens;
  void (*screen_topk)(const ScreenRows&, const ScreenPanels&, const Prefetch&, const ScoreJob&, const TopkBuffer&);
  const Problem& p;
  const TopkOutput& out;
  uint8_t* survived;
  TopkBuffer shared{};
  TopkBuffer buffers[kMostWorkers] = {};
  uint64_t* entries[kMostWorkers] = {};
  int32_t* list = nullptr;
  int threads = 0;

  int64_t capacity() const { return 4 * out.k + 256; }
  int64_t stride() const { return capacity() + 16; }

  int64_t bytes(const Plan& plan) const {
    const int64_t chunk = plan.chunk, undecided = plan.block + 16;
    return Workspace::size<int32_t>(chunk) * 4 + Workspace::size<uint8_t>(chunk) + 2 * Workspace::size<float>(chunk * stride()) +
           plan.threads *
               (3 * Workspace::size<float>(chunk * undecided) + 2 * Workspace::size<int32_t>(chunk) + 2 * Workspace::size<int64_t>(1) +
                Workspace::size<float>(stride() + undecided) + Workspace::size<uint64_t>(capacity()));
  }
  void take(Workspace& space, const Plan& plan) {
    const int64_t chunk = plan.chunk, undecided = plan.block + 16;
    threads = plan.threads;
    list = space.take<int32_t>(chunk);
    shared.score = space.take<float>(chunk * stride());
    shared.feature = space.take<int32_t>(chunk * stride());
    shared.kept = space.take<int32_t>(chunk);
    shared.fresh = space.take<int32_t>(chunk);
    shared.tau = space.take<int32_t>(chunk);
    shared.lock = space.take<uint8_t>(chunk);
    shared.kept_stride = stride();
    shared.capacity = capacity();
    shared.k = out.k;
    for (int t = 0; t < threads; ++t) {
      TopkBuffer& b = buffers[t];
      b = shared;
      b.undecided = {space.take<float>(chunk * undecided), space.take<float>(chunk * undecided), space.take<int32_t>(chunk * undecided),
                     space.take<int32_t>(chunk), undecided};
      b.scored = space.take<int64_t>(1);
      b.seen = space.take<int64_t>(1);
      b.spent = space.take<int32_t>(chunk);
      b.room = space.take<float>(stride() + undecided);
      entries[t] = space.take<uint64_t>(capacity());
      *b.scored = 0;
      std::memset(b.undecided.n, 0, static_cast<size_t>(chunk) * sizeof(int32_t));
    }
  }
  void begin(const Chunk& chunk) {
    const float lowest = -INFINITY;
    std::memset(shared.lock, 0, static_cast<size_t>(chunk.rows));
    for (int32_t* counts : {shared.kept, shared.fresh}) std::memset(counts, 0, static_cast<size_t>(chunk.rows) * sizeof(int32_t));
    for (int64_t r = 0; r < chunk.rows; ++r) std::memcpy(shared.tau + r, &lowest, 4);
    shared.exact = chunk.exact;
    for (int t = 0; t < threads; ++t) {
      buffers[t].exact = chunk.exact;
      *buffers[t].seen = 0;
      std::memset(buffers[t].spent, 0, static_cast<size_t>(chunk.rows) * sizeof(int32_t));
    }
  }
  void block(const Chunk& chunk, const Block& b, int worker) {
    buffers[worker].self = p.exclude_self ? chunk.base : -(int64_t{1} << 40);
    screen_topk(b.rows, b.panels, b.next, b.job, buffers[worker]);
  }
  int64_t end(const Chunk& chunk) {
    const uint8_t* const exact = chunk.exact;
    for_each_unit_by_worker(threads, chunk.rows, [&](int64_t r, int worker) {
      if (exact[r] != 0) return;
      const int64_t n = shared.kept[r] = static_cast<int32_t>(screens.finish_topk(shared, r));
      for (int64_t i = 0; i < n; ++i) entries[worker][i] = entry(shared.score[r * stride() + i], shared.feature[r * stride() + i]);
      out.select(chunk.base + r, entries[worker], n);
    });
    int64_t count = 0;
    for (int64_t r = 0; r < chunk.rows; ++r)
      if (exact[r] != 0) list[count++] = static_cast<int32_t>(r);
    if (p.stats != nullptr) {
      p.stats->screened_rows += chunk.rows - count;
      p.stats->exact_rows += count;
      for (int64_t r = 0; r < chunk.rows; ++r)
        if (exact[r] == 0) p.stats->survivors += shared.kept[r];
      for (int t = 0; t < threads; ++t) {
        p.stats->scored += *buffers[t].scored;
        *buffers[t].scored = 0;
      }
    }
    if (survived != nullptr)
      for (int64_t r = 0; r < chunk.rows; ++r) {
        uint8_t* const row = survived + (chunk.base + r) * p.w.features;
        if (exact[r] != 0) {
          std::memset(row, 1, static_cast<size_t>(p.w.features));
          continue;
        }
        for (int64_t i = 0; i < shared.kept[r]; ++i) row[shared.feature[r * stride() + i] >> (p.absolute ? 1 : 0)] = 1;
      }
    return count > 0 ? dense_topk(kernels, p, out, chunk.xc, chunk.base, list, count) : kOk;
  }
};

}  // namespace fastsae
