// Top-k of rows whose intervals are all known before the first score is computed: a row's tau then comes from all features, hardly more
// than its k best are scored, and workers share nothing. For batches and dictionaries of which the upper ends stay in a cache. Baseline
// code.
#pragma once
#include <utility>

#include "cpu/encode.h"
#include "cpu/engine/dense.h"

namespace fastsae {

constexpr int64_t kHighBytes = int64_t{256} << 10;  // of upper ends of a thread's rows, of a second-level cache of 1 MiB or more
constexpr int64_t kMostGroupTiles = 4;
constexpr int64_t kRanked = 256;  // entries of which each is compared to all others; more are sorted

// What a worker needs to finish a row.
struct RowwiseWorker {
  RowwiseTopk top{};
  uint64_t *entries = nullptr, *best = nullptr;
  int64_t survivors = 0;

  static int64_t bytes(int64_t features, int64_t k) {
    const int64_t n = packed_features(features) + 32;
    return 4 * Workspace::size<float>(n) + Workspace::size<uint64_t>(n) + Workspace::size<uint64_t>(k) + Workspace::size<int64_t>(1);
  }
  // `given`: k, and where the ends go.
  void take(Workspace& space, int64_t features, const RowwiseTopk& given) {
    const int64_t n = packed_features(features) + 32;
    top = given;
    for (Undecided* of_a_row : {&top.open, &top.later})
      *of_a_row = {.lo = nullptr, .hi = space.take<float>(n), .id = space.take<int32_t>(n), .n = nullptr, .stride = 0};
    top.scored = space.take<int64_t>(1);
    *top.scored = 0;
    entries = space.take<uint64_t>(n);
    best = space.take<uint64_t>(top.k);
  }
  // Row `row` of the chunk to row `base + row` of the output, or to the exact path.
  void finish(const EncodeKernels& screens, const ScreenPanels& panels, const ScoreJob& job, const TopkOutput& out, int64_t row,
              int64_t base, uint8_t* exact) {
    if (exact[row] != 0) return;
    const int64_t n = screens.rescore_row(panels, job, top, row);
    if (n < 0) {
      exact[row] = 1;
      return;
    }
    if (n <= kRanked) {
      screens.rank_scores(top.open.hi, top.open.id, n, out.k, entries, best);
      out.write(base + row, best);
    } else {
      for (int64_t i = 0; i < n; ++i) entries[i] = entry(top.open.hi[i], top.open.id[i]);
      out.select(base + row, entries, n);
    }
    survivors += n;
  }
  void note(EncodeStats* stats) {
    if (stats == nullptr) return;
    stats->survivors += std::exchange(survivors, 0);
    stats->scored += std::exchange(*top.scored, 0);
  }
};

// ---- a block of features at a time, packed where it is used, against all rows of the chunk ----

struct RowwiseDriver {
  const EncodeKernels& screens;
  const Problem& p;
  const TopkOutput& out;
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
    gather(p.scale, p.w.list, 0, p.w.features, all(), 1, scale);
    gather(p.bias, p.w.list, 0, p.w.features, all(), 0, bias);
    for (int t = 0; t < threads; ++t)
      workers[t].take(space, p.w.features,
                      {.high = high,
                       .stride = all(),
                       .low = low,
                       .lows = lows(plan),
                       .panels = each(plan),
                       .k = out.k,
                       .absolute = out.absolute});
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
    // For scores, not for bounds: without what the latter need.
    const ScreenPanels of{.words = chunk.plan.words,
                          .panels = static_cast<int>(all() / kPanelWidth),
                          .features = w.features,
                          .scale = p.scale != nullptr ? scale : nullptr,
                          .bias = bias};
    const ScoreJob job{
        .xc = chunk.xc, .padded = chunk.plan.padded, .d = w.d, .w = w.data, .t = w.t, .stride_f = w.stride_f, .list = w.list};
    for_each_unit_by_worker(threads, chunk.rows,
                            [&](int64_t r, int worker) { workers[worker].finish(screens, of, job, out, r, chunk.base, chunk.exact); });
    for (int t = 0; t < threads; ++t) workers[t].note(p.stats);
    const int64_t count = collect_exact(p, chunk.exact, chunk.rows, list);
    return count > 0 ? dense_topk(p, out, chunk.xc, chunk.base, list, count) : kOk;
  }
};

// ---- a few rows at a time against all features, which are packed before ----

// Not a driver of run_engine, which divides features among threads: here a thread takes rows through all features to their end, so that
// their upper ends never leave its cache and the terms of features are gathered once a call.
inline int64_t rowwise_topk(const EncodeKernels& screens, const Problem& p, const TopkOutput& out, Plan plan) {
  const Weights& w = p.w;
  const int64_t rows_all = p.x.rows, d = w.d, padded = plan.padded, all = packed_features(w.features);
  const int panels = static_cast<int>(all / kPanelWidth);
  const bool in_place = plan.packed != nullptr;
  if (!in_place) {  // rotated where rows with outliers are among a few of x
    const int64_t looked = std::min<int64_t>(rows_all, 64);
    Workspace space(Workspace::size<float>(looked * padded));
    if (!space.ok()) return kNoMemory;
    float* const rows = space.take<float>(looked * padded);
    for (int64_t i = 0; i < looked; ++i) load_rows(p, rows_all * i / looked, 1, rows + i * padded);
    plan.rotation = worth_rotating(rows, looked, padded, d) ? rotation_of(d) : 1;
    plan.words = plan.words_most = words_of(plan.format, d, plan.rotation);
  }
  const int64_t words = plan.words;
  const int threads =
      static_cast<int>(std::min<int64_t>({useful_threads(p.threads, rows_all * w.features * d / 8), rows_all, kMostWorkers}));
  // Rows of a unit: their upper ends stay in the cache, and each thread gets some.
  const int64_t tiles_fit = std::clamp<int64_t>(kHighBytes / (4 * all * kTileRows), 1, kMostGroupTiles);
  const int64_t units = std::max<int64_t>(ceil_div(rows_all, tiles_fit * kTileRows), threads), group = ceil_div(rows_all, units);
  const int64_t each = std::max<int64_t>(1, panels / std::max<int64_t>(ceil_div(out.k, 2), 4)), lows = ceil_div(panels, each) * 16;
  const int64_t scratch = scratch_words(d, words, false), packed_words = all * (words + 3);
  const int64_t worker_bytes = Rows::bytes(plan, group) + Workspace::size<int32_t>(group) + Workspace::size<float>(group * all) +
                               Workspace::size<float>(group * lows) + Workspace::size<uint32_t>(scratch) +
                               RowwiseWorker::bytes(w.features, out.k);
  const int64_t bytes = Workspace::size<uint32_t>(signs_size(d)) + (in_place ? 0 : Workspace::size<uint32_t>(packed_words)) +
                        5 * Workspace::size<float>(all) + threads * worker_bytes;
  Workspace space(static_cast<size_t>(bytes));
  if (!space.ok()) return kNoMemory;
  note_workspace(p.stats, bytes);
  uint32_t* const signs = space.take<uint32_t>(signs_size(d));
  rotation_signs(signs, d);
  if (!in_place) {
    uint32_t* const fresh = space.take<uint32_t>(packed_words);
    const int64_t status = pack_all(p, plan, fresh);
    if (status != kOk) return status;
    plan.packed = fresh;
  }
  float *const norm = space.take<float>(all), *const loss = space.take<float>(all), *const floor = space.take<float>(all);
  float *const scale = space.take<float>(all), *const bias = space.take<float>(all);
  gather(p.scale, w.list, 0, w.features, all, 1, scale);
  gather(p.bias, w.list, 0, w.features, all, 0, bias);
  const float* const facts = reinterpret_cast<const float*>(plan.packed + all * words);
  sign_bounds(facts, facts + all, underflow_of(plan.format, d), scale, all, norm, loss, floor);
  const ScreenPanels of{.data = plan.packed,
                        .words = words,
                        .panels = panels,
                        .features = w.features,
                        .norm = norm,
                        .loss = loss,
                        .floor = floor,
                        .unit = facts + 2 * all,
                        .scale = p.scale != nullptr ? scale : nullptr,
                        .bias = bias};
  struct Own : RowwiseWorker {
    Rows rows;
    uint32_t* scratch = nullptr;
    int32_t* list = nullptr;
    int unscreened = 0;
  };
  Own owns[kMostWorkers];
  for (int t = 0; t < threads; ++t) {
    Own& o = owns[t];
    float *const high = space.take<float>(group * all), *const low = space.take<float>(group * lows);
    o.take(space, w.features,
           {.high = high, .stride = all, .low = low, .lows = lows, .panels = each, .k = out.k, .absolute = out.absolute});
    o.rows = Rows::take(space, plan, group);
    o.list = space.take<int32_t>(group);
    o.scratch = space.take<uint32_t>(scratch);
  }
  Problem alone = p;
  alone.threads = 1;
  alone.stats = nullptr;
  std::atomic<int64_t> status{kOk};
  for_each_unit_by_worker(threads, units, [&](int64_t index, int worker) {
    Own& o = owns[worker];
    uint8_t* const exact = o.rows.exact;
    const int64_t base = rows_all * index / units, rows = rows_all * (index + 1) / units - base;
    const bool screened = o.unscreened == 0;
    std::memset(exact, screened ? 0 : 1, static_cast<size_t>(rows));
    load_rows(p, base, rows, o.rows.xc);
    if (screened) {
      const int64_t tiles = ceil_div(rows, kTileRows);
      for (int64_t t = 0; t < tiles; ++t) o.rows.pack(p, plan, rows * t / tiles, rows * (t + 1) / tiles, signs, o.scratch);
      screens.screen_rowwise(o.rows.screened(plan, rows), of, {}, o.top);
      const ScoreJob job{.xc = o.rows.xc, .padded = padded, .d = d, .w = w.data, .t = w.t, .stride_f = w.stride_f, .list = w.list};
      for (int64_t r = 0; r < rows; ++r) o.finish(screens, of, job, out, r, base, exact);
    }
    const int64_t count = collect_exact(p, exact, rows, o.list);
    if (!screened)
      --o.unscreened;
    else if (count * 2 > rows)
      o.unscreened = kUnscreened;
    const int64_t done = count > 0 ? dense_topk(alone, out, o.rows.xc, base, o.list, count) : kOk;
    if (done != kOk) status = done;
  });
  for (int t = 0; t < threads; ++t) owns[t].note(p.stats);
  return status;
}

}  // namespace fastsae
