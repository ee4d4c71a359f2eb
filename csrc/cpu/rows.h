// Exact top-k, a few rows at a time against all features: for dictionaries whose packed form stays in the cache. Features are packed once;
// then threads share nothing, and a row's tau comes from all of its intervals, so that hardly more than its k best are scored. Baseline code.
#pragma once
#include "cpu/rank.h"

namespace fastsae {

constexpr int64_t kHighBytes = int64_t{256} << 10;  // of upper ends, of a second-level cache of 1 MiB or more
constexpr int64_t kMostGroupTiles = 4;

// A weight matrix whose rows cannot be read in place would have to be copied as a whole.
inline bool fits_rows(const Weights& w, const Plan& plan) { return plan.screens && by_rows(w) && w.eps == 0; }

// Whether rows with outliers are among those of x, looking at a few.
inline int64_t rotation_for(const EngineKernels& kernels, const Activations& x, int64_t d, int64_t padded, int* rotation) {
  constexpr int64_t kLooked = 64;
  const int64_t looked = std::min(x.rows, kLooked);
  Workspace space(Workspace::size<float>(looked * padded) + Workspace::size<int32_t>(looked));
  if (!space.ok()) return kNoMemory;
  float* const rows = space.take<float>(looked * padded);
  int32_t* const list = space.take<int32_t>(looked);
  for (int64_t i = 0; i < looked; ++i) list[i] = static_cast<int32_t>(x.rows * i / looked);
  kernels.load({x.data, x.t, x.stride_row, x.stride_d, d, 0, looked, list, x.subtract, x.eps, rows, padded, padded});
  *rotation = worth_rotating(rows, looked, padded, d) ? rotation_of(d) : 1;
  return kOk;
}

inline int64_t rows_topk(const EngineKernels& kernels, const EncodeKernels& screens, const Problem& p, const TopkOutput& out, Plan plan,
                         uint8_t* survived) {
  const Activations& x = p.x;
  const Weights& w = p.w;
  const int64_t d = w.d, padded = plan.padded, all = packed_features(w.features);
  const int panels = static_cast<int>(all / kPanelWidth);
  const bool in_place = plan.packed != nullptr;
  if (!in_place) {
    const int64_t status = rotation_for(kernels, x, d, padded, &plan.rotation);
    if (status != kOk) return status;
    plan.words = words_of(plan.number, d, plan.rotation);
  }
  const int64_t words = plan.words, rotated = round_to(d, 256);
  const int threads = static_cast<int>(std::min<int64_t>({useful_threads(p.threads, x.rows * w.features * d / 8), x.rows, kMostWorkers}));
  // Rows of a unit: their upper ends stay in the cache, and each thread gets some.
  const int64_t tiles_fit = std::clamp<int64_t>(kHighBytes / (4 * all * kTileRows), 1, kMostGroupTiles);
  const int64_t units = std::max<int64_t>(ceil_div(x.rows, tiles_fit * kTileRows), threads), group = ceil_div(x.rows, units);
  // Lanes of lower ends, several times k of them: the k-th largest of their maxima is close to that of all.
  const int64_t each = std::max<int64_t>(1, panels / std::max<int64_t>(ceil_div(out.k, 2), 4)), groups = ceil_div(panels, each);
  const int64_t scratch_words = rotated + words + 64;
  const int64_t worker_bytes =
      Workspace::size<float>(group * padded) + Workspace::size<uint32_t>(group * words) + 4 * Workspace::size<float>(group) +
      Workspace::size<uint8_t>(group) + Workspace::size<int32_t>(group) + Workspace::size<float>(group * all) +
      Workspace::size<float>(group * groups * 16) + 4 * Workspace::size<float>(all + 32) + Workspace::size<uint64_t>(all) +
      Workspace::size<uint32_t>(scratch_words);
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
  // Terms of the features, with the sign of the scale.
  float* terms[5];
  for (float*& term : terms) term = space.take<float>(all);
  const float* const facts = reinterpret_cast<const float*>(packed + all * words);
  const float underflow = static_cast<float>(4 * d + 128) * 0x1p-126f + 0x1p-94f;
  for (int64_t j = 0; j < all; ++j) {
    const bool exists = j < w.features;
    const int64_t f = exists && w.list != nullptr ? w.list[j] : j;
    const float scale = exists && p.scale != nullptr ? p.scale[f] : 1.0f;
    terms[0][j] = std::copysign(facts[j], scale);
    terms[1][j] = std::copysign(facts[all + j], scale);
    terms[2][j] = std::copysign(underflow, scale);
    terms[3][j] = scale;
    terms[4][j] = exists && p.bias != nullptr ? p.bias[f] : 0.0f;
  }
  const ScreenPanels of{packed,   words,    panels,
                        0,        w.features, terms[0],
                        terms[1], terms[2], facts + 2 * all,
                        p.scale != nullptr ? terms[3] : nullptr, terms[4], nullptr};
  struct Own {
    float* xc;
    uint32_t* words;
    float *unit, *a, *c;
    int32_t* start;
    uint8_t* exact;
    int32_t* list;
    uint64_t* entries;
    float* scratch;
    RowsTopk top;
    int unscreened;
  };
  Own owns[kMostWorkers];
  for (int t = 0; t < threads; ++t) {
    Own& o = owns[t];
    o.xc = space.take<float>(group * padded);
    o.words = space.take<uint32_t>(group * words);
    o.unit = space.take<float>(group);
    o.a = space.take<float>(group);
    o.c = space.take<float>(group);
    o.start = space.take<int32_t>(group);
    o.exact = space.take<uint8_t>(group);
    o.list = space.take<int32_t>(group);
    o.top.high = space.take<float>(group * all);
    o.top.stride = all;
    o.top.low = space.take<float>(group * groups * 16);
    o.top.groups = groups;
    o.top.panels = each;
    o.top.open = {nullptr, space.take<float>(all + 32), space.take<int32_t>(all + 32), nullptr, 0};
    o.top.later = {nullptr, space.take<float>(all + 32), space.take<int32_t>(all + 32), nullptr, 0};
    o.top.k = out.k;
    o.entries = space.take<uint64_t>(all);
    o.scratch = reinterpret_cast<float*>(space.take<uint32_t>(scratch_words));
    o.unscreened = 0;
  }
  const Problem alone{x, w, p.scale, p.bias, 1, nullptr};
  std::atomic<int64_t> status{kOk}, scored_rows{0}, scored{0};
  for_each_unit_by_worker(threads, units, [&](int64_t index, int worker) {
    Own& o = owns[worker];
    const int64_t base = x.rows * index / units, rows = x.rows * (index + 1) / units - base;
    if (rows == 0) return;
    const int tiles = static_cast<int>(ceil_div(rows, kTileRows));
    std::memset(o.exact, 0, static_cast<size_t>(rows));
    kernels.load({x.data, x.t, x.stride_row, x.stride_d, d, base, rows, nullptr, x.subtract, x.eps, o.xc, padded, padded});
    int64_t failed = 0, done = 0;
    if (o.unscreened > 0) {
      --o.unscreened;
      failed = rows;
      for (int64_t r = 0; r < rows; ++r) o.list[r] = static_cast<int32_t>(r);
    } else {
      for (int t = 0; t < tiles; ++t) {
        const int64_t r0 = rows * t / tiles, r1 = rows * (t + 1) / tiles;
        kernels.pack_rows[static_cast<int>(plan.number)]({o.xc + r0 * padded, padded, d, static_cast<int>(r1 - r0), plan.rotation, signs,
                                                          o.words + r0 * words, o.unit + r0, o.start + r0, o.a + r0, o.c + r0, o.exact + r0,
                                                          o.scratch});
      }
      screens.screen_rows({o.words, rows, words, tiles, o.unit, o.start, o.a, o.c}, of, o.top);
      const ScoreJob job{o.xc, padded, d, w.data, w.t, w.stride_f, 0, w.list};
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t n = o.exact[r] != 0 ? -1 : screens.settle_row(of, job, o.top, r);
        if (n < 0) {
          o.list[failed++] = static_cast<int32_t>(r);
          continue;
        }
        for (int64_t i = 0; i < n; ++i) o.entries[i] = entry(o.top.open.hi[i], o.top.open.id[i]);
        if (survived != nullptr)
          for (int64_t i = 0; i < n; ++i) survived[(base + r) * w.features + o.top.open.id[i]] = 1;
        out.select(base + r, o.entries, n);
        done += n;
      }
      scored_rows += rows - failed;
      scored += done;
      constexpr int kRest = 15;
      if (failed * 2 > rows) o.unscreened = kRest;
    }
    if (failed == 0) return;
    if (survived != nullptr)
      for (int64_t i = 0; i < failed; ++i)
        std::memset(survived + (base + o.list[i]) * w.features, 1, static_cast<size_t>(w.features));
    const int64_t exact = dense_topk(kernels, alone, out, o.xc, base, o.list, failed);
    if (exact != kOk) status = exact;
  });
  if (p.stats != nullptr) {
    p.stats->screened_rows += scored_rows;
    p.stats->exact_rows += x.rows - scored_rows;
    p.stats->scored += scored;
    p.stats->survivors += scored;
  }
  return status;
}

}  // namespace fastsae
