// Exact top-k of rows whose intervals are all known before the first score is computed: a row's tau then comes from all features, hardly
// more than its k best are scored, and workers share nothing. For batches and dictionaries of which the upper ends stay in a cache.
// Baseline code.
#pragma once
#include "cpu/engine/topk.h"

namespace fastsae {

constexpr int64_t kHighBytes = int64_t{256} << 10;  // of upper ends of a thread's rows, of a second-level cache of 1 MiB or more
constexpr int64_t kMostGroupTiles = 4;
constexpr int64_t kRowwiseBytes = int64_t{6} << 20, kSmallBytes = int64_t{1} << 20;  // of packed features
constexpr int64_t kFewRows = 48, kManyRows = 512;
constexpr int64_t kChunkHighBytes = int64_t{8} << 20;  // of a chunk's rows
constexpr int64_t kRanked = 256;                       // entries of which each is compared to all others; more are sorted

// Measured. A row's scores are computed apart from the screen of its features, so their weights come from further away than where a block
// is screened and scored at once: worth it until the dictionary is larger than a cache, or for few rows of a handle.
inline bool worth_rowwise(const Activations& x, const Weights& w, int64_t k) {
  const bool packed = w.packed != nullptr && w.list == nullptr;
  const int64_t words = packed_features(w.features) * w.d / 4;
  return by_rows(w) && w.eps == 0 && w.d >= 32 && w.features >= 2 * k && w.features >= 128 && x.rows >= (packed ? 1 : 12) &&
         (4 * words <= kRowwiseBytes || (packed && x.rows <= kFewRows && x.rows * w.features * 4 <= kChunkHighBytes));
}
// All features before the first row, rather than each block where it is used.
inline bool pack_first(const Activations& x, const Plan& plan) {
  const int64_t bytes = plan.blocks * plan.block * plan.words * 4;
  const bool enough = x.rows >= 4 * plan.threads;  // rows, not features, to divide among threads
  return enough && (bytes <= kSmallBytes || (bytes <= kRowwiseBytes && (plan.packed != nullptr || x.rows >= kManyRows)));
}

// What a worker needs to finish a row.
struct RowwiseWorker {
  RowwiseTopk top{};
  uint64_t *entries = nullptr, *best = nullptr;

  static int64_t bytes(int64_t features, int64_t k) {
    const int64_t n = packed_features(features) + 32;
    return 4 * Workspace::size<float>(n) + Workspace::size<uint64_t>(n) + Workspace::size<uint64_t>(k) + Workspace::size<int64_t>(1);
  }
  void take(Workspace& space, int64_t features, int64_t k) {
    const int64_t n = packed_features(features) + 32;
    top.open = {nullptr, space.take<float>(n), space.take<int32_t>(n), nullptr, 0};
    top.later = {nullptr, space.take<float>(n), space.take<int32_t>(n), nullptr, 0};
    top.scored = space.take<int64_t>(1);
    *top.scored = 0;
    top.k = k;
    entries = space.take<uint64_t>(n);
    best = space.take<uint64_t>(k);
  }
  // Row `row` of the chunk to row `base + row` of the output; how many of its scores stood to the end, or -1: it takes the exact path.
  int64_t finish(const EncodeKernels& screens, const ScreenPanels& panels, const ScoreJob& job, const TopkOutput& out, int64_t row,
                 int64_t base, uint8_t* survived) const {
    const int64_t n = screens.rescore_row(panels, job, top, row);
    if (n < 0) return n;
    if (n <= kRanked) {
      screens.rank_scores(top.open.hi, top.open.id, n, out.k, entries, best);
      out.write(base + row, best);
    } else {
      for (int64_t i = 0; i < n; ++i) entries[i] = entry(top.open.hi[i], top.open.id[i]);
      out.select(base + row, entries, n);
    }
    if (survived != nullptr)
      for (int64_t i = 0; i < n; ++i) survived[(base + row) * panels.features + top.open.id[i]] = 1;
    return n;
  }
};

// Scale and bias of the features in use, in order; the bias is 0 and the scale 1 where there is none.
inline void gather_terms(const Problem& p, int64_t all, float* scale, float* bias) {
  for (int64_t j = 0; j < all; ++j) {
    const bool exists = j < p.w.features;
    const int64_t f = exists && p.w.list != nullptr ? p.w.list[j] : j;
    scale[j] = exists && p.scale != nullptr ? p.scale[f] : 1.0f;
    bias[j] = exists && p.bias != nullptr ? p.bias[f] : 0.0f;
  }
}

// ---- a block of features at a time, packed where it is used, against all rows of the chunk ----

struct RowwiseDriver {
  const EngineKernels& kernels;
  const EncodeKernels& screens;
  const Problem& p;
  const TopkOutput& out;
  uint8_t* survived;
  float *high = nullptr, *low = nullptr, *scale = nullptr, *bias = nullptr;
  int32_t* list = nullptr;
  RowwiseWorker workers[kMostWorkers] = {};
  int threads = 0;

  int64_t all() const { return packed_features(p.w.features); }
  // Lanes of lower ends, several times k of them: the k-th largest of their maxima is close to that of all.
  int64_t each(const Plan& plan) const { return plan.blocks * 16 >= 6 * out.k ? plan.panels : 1; }
  int64_t lows(const Plan& plan) const { return ceil_div(all() / kPanelWidth, each(plan)) * 16; }

  int64_t bytes(const Plan& plan) const {
    return Workspace::size<float>(plan.chunk * all()) + Workspace::size<float>(plan.chunk * lows(plan)) +
           2 * Workspace::size<float>(all()) + Workspace::size<int32_t>(plan.chunk) +
           plan.threads * RowwiseWorker::bytes(p.w.features, out.k);
  }
  void take(Workspace& space, const Plan& plan) {
    threads = plan.threads;
    high = space.take<float>(plan.chunk * all());
    low = space.take<float>(plan.chunk * lows(plan));
    scale = space.take<float>(all());
    bias = space.take<float>(all());
    list = space.take<int32_t>(plan.chunk);
    gather_terms(p, all(), scale, bias);
    for (int t = 0; t < threads; ++t) {
      workers[t].take(space, p.w.features, out.k);
      workers[t].top.high = high;
      workers[t].top.stride = all();
      workers[t].top.low = low;
      workers[t].top.lows = lows(plan);
      workers[t].top.panels = each(plan);
    }
  }
  Plan within(Plan plan) const {
    plan.chunk = std::min(plan.chunk, std::max<int64_t>(kChunkHighBytes / (4 * all()), kTileRows));
    return plan;
  }
  void begin(const Chunk&) {}
  void block(const Chunk& chunk, const Block& b, int worker) {
    RowwiseTopk to = workers[worker].top;
    to.high = high + b.first;
    to.low = low + b.first / kPanelWidth / each(chunk.plan) * 16;
    screens.screen_rowwise(b.rows, b.panels, b.next, to);
  }
  int64_t end(const Chunk& chunk) {
    const Weights& w = p.w;
    const ScreenPanels of{nullptr, chunk.plan.words, static_cast<int>(all() / kPanelWidth), 0,    w.features, nullptr, nullptr,
                          nullptr, nullptr,          p.scale != nullptr ? scale : nullptr,  bias, nullptr};
    const ScoreJob job{chunk.xc, chunk.plan.padded, w.d, w.data, w.t, w.stride_f, 0, w.list};
    std::atomic<int64_t> survivors{0};
    for_each_unit_by_worker(threads, chunk.rows, [&](int64_t r, int worker) {
      const int64_t n = chunk.exact[r] != 0 ? -1 : workers[worker].finish(screens, of, job, out, r, chunk.base, survived);
      if (n < 0)
        chunk.exact[r] = 1;
      else
        survivors += n;
    });
    int64_t count = 0;
    for (int64_t r = 0; r < chunk.rows; ++r)
      if (chunk.exact[r] != 0) {
        list[count++] = static_cast<int32_t>(r);
        if (survived != nullptr) std::memset(survived + (chunk.base + r) * w.features, 1, static_cast<size_t>(w.features));
      }
    if (p.stats != nullptr) {
      p.stats->screened_rows += chunk.rows - count;
      p.stats->exact_rows += count;
      p.stats->survivors += survivors;
      for (int t = 0; t < threads; ++t) {
        p.stats->scored += *workers[t].top.scored;
        *workers[t].top.scored = 0;
      }
    }
    return count > 0 ? dense_topk(kernels, p, out, chunk.xc, chunk.base, list, count) : kOk;
  }
};

// ---- a few rows at a time against all features, which are packed before ----

// Whether rows with outliers are among those of x, looking at a few.
inline int64_t rotation_for(const EngineKernels& kernels, const Activations& x, int64_t d, int64_t padded, int* rotation) {
  constexpr int64_t kLooked = 64;
  const int64_t looked = std::min(x.rows, kLooked);
  Workspace space(Workspace::size<float>(looked * padded) + Workspace::size<int32_t>(looked));
  if (!space.ok()) return kNoMemory;
  float* const rows = space.take<float>(looked * padded);
  for (int64_t i = 0; i < looked; ++i)
    kernels.load(
        {x.data, x.t, x.stride_row, x.stride_d, d, x.rows * i / looked, 1, nullptr, x.subtract, x.eps, rows + i * padded, padded, padded});
  *rotation = worth_rotating(rows, looked, padded, d) ? rotation_of(d) : 1;
  return kOk;
}

inline int64_t rowwise_topk(const EngineKernels& kernels, const EncodeKernels& screens, const Problem& p, const TopkOutput& out, Plan plan,
                            uint8_t* survived) {
  const Activations& x = p.x;
  const Weights& w = p.w;
  const int64_t d = w.d, padded = plan.padded, all = packed_features(w.features);
  const int panels = static_cast<int>(all / kPanelWidth);
  const bool in_place = plan.packed != nullptr;
  if (!in_place) {
    const int64_t status = rotation_for(kernels, x, d, padded, &plan.rotation);
    if (status != kOk) return status;
    plan.words = words_of(plan.format, d, plan.rotation);
  }
  const int64_t words = plan.words, rotated = round_to(d, 256);
  const int threads = static_cast<int>(std::min<int64_t>({useful_threads(p.threads, x.rows * w.features * d / 8), x.rows, kMostWorkers}));
  // Rows of a unit: their upper ends stay in the cache, and each thread gets some.
  const int64_t tiles_fit = std::clamp<int64_t>(kHighBytes / (4 * all * kTileRows), 1, kMostGroupTiles);
  const int64_t units = std::max<int64_t>(ceil_div(x.rows, tiles_fit * kTileRows), threads), group = ceil_div(x.rows, units);
  const int64_t each = std::max<int64_t>(1, panels / std::max<int64_t>(ceil_div(out.k, 2), 4)), lows = ceil_div(panels, each) * 16;
  const int64_t scratch_words = rotated + words + 64;
  const int64_t worker_bytes = Workspace::size<float>(group * padded) + Workspace::size<uint32_t>(group * words) +
                               4 * Workspace::size<float>(group) + Workspace::size<uint8_t>(group) + Workspace::size<int32_t>(group) +
                               Workspace::size<float>(group * all) + Workspace::size<float>(group * lows) +
                               Workspace::size<uint32_t>(scratch_words) + RowwiseWorker::bytes(w.features, out.k);
  const int64_t packed_words = all * (words + 3);
  const int64_t bytes = Workspace::size<uint32_t>(rotated) + (in_place ? 0 : Workspace::size<uint32_t>(packed_words)) +
                        5 * Workspace::size<float>(all) + threads * worker_bytes;
  Workspace space(static_cast<size_t>(bytes));
  if (!space.ok()) return kNoMemory;
  note_workspace(p.stats, bytes);
  uint32_t* const signs = space.take<uint32_t>(rotated);
  rotation_signs(signs, rotated);
  const uint32_t* packed = plan.packed;
  if (!in_place) {
    uint32_t* const fresh = space.take<uint32_t>(packed_words);
    const int64_t status = pack_all(kernels, w, plan, fresh, p.threads);
    if (status != kOk) return status;
    packed = fresh;
  }
  float *const norm = space.take<float>(all), *const loss = space.take<float>(all), *const floor = space.take<float>(all);
  float *const scale = space.take<float>(all), *const bias = space.take<float>(all);
  gather_terms(p, all, scale, bias);
  const float* const facts = reinterpret_cast<const float*>(packed + all * words);
  sign_bounds(facts, facts + all, underflow_of(plan.format, d), scale, all, norm, loss, floor);
  const ScreenPanels of{packed, words,  panels, 0, w.features, norm, loss, floor, facts + 2 * all, p.scale != nullptr ? scale : nullptr,
                        bias,   nullptr};
  struct Own : RowwiseWorker {
    float* xc;
    uint32_t* words;
    float *unit, *a, *c, *scratch;
    int32_t *start, *list;
    uint8_t* exact;
    int unscreened;
  };
  Own owns[kMostWorkers];
  for (int t = 0; t < threads; ++t) {
    Own& o = owns[t];
    o.take(space, w.features, out.k);
    o.top.high = space.take<float>(group * all);
    o.top.stride = all;
    o.top.low = space.take<float>(group * lows);
    o.top.lows = lows;
    o.top.panels = each;
    o.xc = space.take<float>(group * padded);
    o.words = space.take<uint32_t>(group * words);
    o.unit = space.take<float>(group);
    o.a = space.take<float>(group);
    o.c = space.take<float>(group);
    o.start = space.take<int32_t>(group);
    o.exact = space.take<uint8_t>(group);
    o.list = space.take<int32_t>(group);
    o.scratch = reinterpret_cast<float*>(space.take<uint32_t>(scratch_words));
    o.unscreened = 0;
  }
  const Problem alone{x, w, p.scale, p.bias, 1, nullptr};
  std::atomic<int64_t> status{kOk}, screened_rows{0}, survivors{0};
  for_each_unit_by_worker(threads, units, [&](int64_t index, int worker) {
    Own& o = owns[worker];
    const int64_t base = x.rows * index / units, rows = x.rows * (index + 1) / units - base;
    const int tiles = static_cast<int>(ceil_div(rows, kTileRows));
    std::memset(o.exact, 0, static_cast<size_t>(rows));
    kernels.load({x.data, x.t, x.stride_row, x.stride_d, d, base, rows, nullptr, x.subtract, x.eps, o.xc, padded, padded});
    int64_t failed = 0, kept = 0;
    if (o.unscreened > 0) {  // the bounds decided too little for most rows before
      --o.unscreened;
      for (; failed < rows; ++failed) o.list[failed] = static_cast<int32_t>(failed);
    } else {
      for (int t = 0; t < tiles; ++t) {
        const int64_t r0 = rows * t / tiles, r1 = rows * (t + 1) / tiles;
        kernels.pack_rows[static_cast<int>(plan.format)]({o.xc + r0 * padded, padded, d, static_cast<int>(r1 - r0), plan.rotation, signs,
                                                          o.words + r0 * words, o.unit + r0, o.start + r0, o.a + r0, o.c + r0, o.exact + r0,
                                                          o.scratch});
      }
      screens.screen_rowwise({o.words, rows, words, tiles, o.unit, o.start, o.a, o.c}, of, {nullptr, 0, 1, 0}, o.top);
      const ScoreJob job{o.xc, padded, d, w.data, w.t, w.stride_f, 0, w.list};
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t n = o.exact[r] != 0 ? -1 : o.finish(screens, of, job, out, r, base, survived);
        if (n < 0)
          o.list[failed++] = static_cast<int32_t>(r);
        else
          kept += n;
      }
      screened_rows += rows - failed;
      survivors += kept;
      constexpr int kRest = 15;
      if (failed * 2 > rows) o.unscreened = kRest;
    }
    if (failed == 0) return;
    if (survived != nullptr)
      for (int64_t i = 0; i < failed; ++i) std::memset(survived + (base + o.list[i]) * w.features, 1, static_cast<size_t>(w.features));
    const int64_t exact = dense_topk(kernels, alone, out, o.xc, base, o.list, failed);
    if (exact != kOk) status = exact;
  });
  if (p.stats != nullptr) {
    p.stats->screened_rows += screened_rows;
    p.stats->exact_rows += x.rows - screened_rows;
    p.stats->survivors += survivors;
    for (int t = 0; t < threads; ++t) p.stats->scored += *owns[t].top.scored;
  }
  return status;
}

}  // namespace fastsae
