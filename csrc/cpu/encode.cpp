// The encoders: exact selection, and what their drivers do with blocks of features. The driver is engine/driver.h, the screens
// encode.isa.cpp.
#include "cpu/encode.h"

#include <cfloat>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/engine/candidates.h"
#include "cpu/engine/topk.h"
#include "cpu/engine/topk_rowwise.h"

namespace fastsae {
namespace {

const EncodeKernels* const kTables[kLevels] = {nullptr, nullptr, nullptr, FASTSAE_AVX512_VNNI(encode_kernels),
                                               FASTSAE_AVX512_BF16(encode_kernels)};

}  // namespace

const EncodeKernels* encode_kernels() { return pick_if(kTables); }

namespace {

// ---- entries: any number a row ----

struct Kept {
  int32_t row;  // of the chunk
  int32_t feature;
  float value;
  uint32_t flags;
};

}  // namespace

struct Entries {
  struct Part {  // a chunk's entries, in order
    int64_t base;
    std::vector<Kept> kept;
  };
  std::vector<int64_t> crow;  // [rows + 1]
  std::vector<Part> parts;
};

void free_entries(Entries* entries) { delete entries; }
int64_t entries_count(const Entries& entries) { return entries.crow.back(); }
void copy_entries(const Entries& entries, float* values, int64_t* col, int64_t* crow, uint8_t* flags, int threads) {
  std::memcpy(crow, entries.crow.data(), entries.crow.size() * sizeof(int64_t));
  for (const Entries::Part& part : entries.parts) {
    const int64_t start = entries.crow[part.base], n = static_cast<int64_t>(part.kept.size());
    constexpr int64_t kPerFeature = 1 << 15;
    for_each_unit(useful_threads(threads, n), ceil_div(n, kPerFeature), [&](int64_t unit) {
      for (int64_t i = unit * kPerFeature; i < std::min((unit + 1) * kPerFeature, n); ++i) {
        values[start + i] = part.kept[i].value;
        col[start + i] = part.kept[i].feature;
        if (flags != nullptr) flags[start + i] = static_cast<uint8_t>(part.kept[i].flags);
      }
    });
  }
}

namespace {

// A range of a worker's entries: those of one block, by row, then feature.
struct Segment {
  int64_t first_feature;
  int worker;
  int64_t begin, end;
};

// Entries of blocks in the order of rows.
struct Sorter {
  std::vector<Kept> kept[kMostWorkers];
  std::vector<Segment> segments;
  std::mutex mutex;

  void finish(const Chunk& chunk, Entries& entries) {
    std::sort(segments.begin(), segments.end(), [](const Segment& a, const Segment& b) { return a.first_feature < b.first_feature; });
    std::vector<int64_t> cursor(static_cast<size_t>(chunk.rows) + 1, 0);
    for (const Segment& s : segments)
      for (int64_t i = s.begin; i < s.end; ++i) ++cursor[kept[s.worker][i].row + 1];
    const int64_t start = entries.crow.back();
    for (int64_t r = 0; r < chunk.rows; ++r) {
      cursor[r + 1] += cursor[r];
      entries.crow.push_back(start + cursor[r + 1]);
    }
    Entries::Part part{chunk.base, std::vector<Kept>(static_cast<size_t>(cursor[chunk.rows]))};
    for (const Segment& s : segments)
      for (int64_t i = s.begin; i < s.end; ++i) part.kept[cursor[kept[s.worker][i].row]++] = kept[s.worker][i];
    entries.parts.push_back(std::move(part));
    for (std::vector<Kept>& k : kept) k.clear();
    segments.clear();
  }
};

struct ThresholdDriver : Candidates {
  const Problem& p;
  ThresholdKind kind;
  const float* threshold;  // of the dictionary
  float half_band;
  Entries& entries;
  Sorter sorter;

  ThresholdDriver(const EngineKernels& kernels, const EncodeKernels* screens, const Problem& p, ThresholdKind kind, const float* threshold,
                  float half_band, Entries& entries)
      : Candidates{kernels, screens, p.stats, {}, {}}, p(p), kind(kind), threshold(threshold), half_band(half_band), entries(entries) {}

  void begin(const Chunk&) {}
  void block(const Chunk& chunk, const Block& b, int worker) {
    screen(chunk, b, worker, [&](const Undecided& open) { screens->screen_threshold(kind, b.rows, b.panels, b.next, open, nullptr); });
    score(chunk, b, worker);
    const Undecided& u = undecided[worker];
    std::vector<Kept>& kept = sorter.kept[worker];
    const int64_t begin = static_cast<int64_t>(kept.size());
    for (int64_t r = 0; r < chunk.rows; ++r) {
      for (int64_t i = r * u.stride; i < r * u.stride + u.n[r]; ++i) {
        const int64_t at = u.id[i] - b.first;
        const int32_t feature = p.w.list != nullptr ? p.w.list[u.id[i]] : u.id[i];
        float score = scored_as(b, at, u.hi[i]);
        if (kind == ThresholdKind::gate) {
          const float gate = u.hi[i] + b.panels.extra[at];
          if (!(gate <= 0) && !(score <= 0)) kept.push_back({static_cast<int32_t>(r), feature, plain(gate != gate ? gate : score), 1});
          continue;
        }
        const float theta = threshold[feature];
        const bool active = score > (theta < 0 ? 0.0f : theta) || score != score;
        const bool in_band = half_band >= 0 && std::fabs(score - theta) < half_band;
        if (active || in_band)
          kept.push_back({static_cast<int32_t>(r), feature, active ? plain(score) : 0.0f, (active ? 1u : 0u) | (in_band ? 2u : 0u)});
      }
      u.n[r] = 0;
    }
    const std::lock_guard<std::mutex> guard(sorter.mutex);
    sorter.segments.push_back({b.first, worker, begin, static_cast<int64_t>(kept.size())});
  }
  // One NaN for all: its sign and payload depend on how a sum was formed.
  static float plain(float score) { return score != score ? std::nanf("") : score; }
  int64_t end(const Chunk& chunk) {
    sorter.finish(chunk, entries);
    note();
    return kOk;
  }
};

// ---- the best of the whole batch ----

struct Pooled {
  uint32_t key;  // of the score: ascending from the best
  int32_t feature;
  int64_t row;
  bool operator<(const Pooled& o) const {
    if (key != o.key) return key < o.key;
    return row != o.row ? row < o.row : feature < o.feature;
  }
};

struct BatchTopkDriver : Candidates {
  const Problem& p;
  int64_t total;
  std::vector<Pooled> pool;  // positive scores and NaN, not below tau
  std::vector<float> room[kMostWorkers];
  std::mutex mutex;
  int64_t fresh = 0;
  int32_t tau = 0;  // bits of a float, 0 at first: only positive scores are asked for

  BatchTopkDriver(const EngineKernels& kernels, const EncodeKernels* screens, const Problem& p, int64_t total)
      : Candidates{kernels, screens, p.stats, {}, {}}, p(p), total(total) {}

  float load_tau() const {
    const int32_t bits = __atomic_load_n(&tau, __ATOMIC_RELAXED);
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  // Under the mutex.
  void raise_to(float value) {
    if (!(value > load_tau())) return;
    int32_t bits;
    std::memcpy(&bits, &value, 4);
    __atomic_store_n(&tau, bits, __ATOMIC_RELAXED);
  }
  // The pool down to its best `total`; tau is then the score of the worst of them.
  void shrink() {
    fresh = 0;
    if (total == 0 || static_cast<int64_t>(pool.size()) < total) return;
    std::nth_element(pool.begin(), pool.begin() + (total - 1), pool.end());
    pool.resize(static_cast<size_t>(total));
    const float worst = score_of(pool[static_cast<size_t>(total - 1)].key);
    raise_to(worst != worst ? INFINITY : worst);
  }

  void begin(const Chunk&) {}
  void block(const Chunk& chunk, const Block& b, int worker) {
    screen(chunk, b, worker,
           [&](const Undecided& still) { screens->screen_threshold(ThresholdKind::shared, b.rows, b.panels, b.next, still, &tau); });
    const Undecided& u = undecided[worker];
    // With many open ones, a better tau from the lower ends first.
    int64_t open = 0;
    for (int64_t r = 0; r < chunk.rows; ++r)
      if (full[worker][r] == 0) open += u.n[r];
    if (open > total / 4 + 64) {
      std::vector<float>& values = room[worker];
      values.clear();
      for (int64_t r = 0; r < chunk.rows; ++r)
        if (full[worker][r] == 0) values.insert(values.end(), u.lo + r * u.stride, u.lo + r * u.stride + u.n[r]);
      const std::lock_guard<std::mutex> guard(mutex);
      for (const Pooled& e : pool) values.push_back(score_of(e.key));
      if (static_cast<int64_t>(values.size()) >= total)
        raise_to(screens->kth_largest(values.data(), static_cast<int64_t>(values.size()), total, total));
    }
    if (open > 0) {
      const float now = load_tau();
      for (int64_t r = 0; r < chunk.rows; ++r)
        if (full[worker][r] == 0 && u.n[r] != 0) screens->keep_undecided(u, r, now);
    }
    score(chunk, b, worker);
    const std::lock_guard<std::mutex> guard(mutex);
    for (int64_t r = 0; r < chunk.rows; ++r) {
      for (int64_t i = r * u.stride; i < r * u.stride + u.n[r]; ++i) {
        const float score = scored_as(b, u.id[i] - b.first, u.hi[i]);
        if (score <= 0 || score < load_tau()) continue;
        pool.push_back({key_of(score), p.w.list != nullptr ? p.w.list[u.id[i]] : u.id[i], chunk.base + r});
        ++fresh;
        if (static_cast<int64_t>(pool.size()) >= 2 * total + 1024) shrink();
      }
      u.n[r] = 0;
    }
    if (fresh > total / 4) shrink();
  }
  int64_t end(const Chunk&) {
    note();
    return kOk;
  }

  float finish(Entries& entries) {
    shrink();
    float least = INFINITY;
    if (!pool.empty()) least = score_of(std::max_element(pool.begin(), pool.end())->key);
    std::sort(pool.begin(), pool.end(),
              [](const Pooled& a, const Pooled& b) { return a.row != b.row ? a.row < b.row : a.feature < b.feature; });
    Entries::Part part{0, {}};
    part.kept.reserve(pool.size());
    size_t i = 0;
    for (int64_t r = 0; r < p.x.rows; ++r) {
      for (; i < pool.size() && pool[i].row == r; ++i) part.kept.push_back({0, pool[i].feature, score_of(pool[i].key), 1});
      entries.crow.push_back(static_cast<int64_t>(i));
    }
    entries.parts.push_back(std::move(part));
    return least;
  }
};

struct BoundsDriver {
  const EncodeKernels& screens;
  ScreenFormat format;
  float* lo;
  float* hi;
  int64_t ld;

  int64_t bytes(const Plan&) const { return 0; }
  void take(Workspace&, const Plan&) {}
  void begin(const Chunk&) {}
  void block(const Chunk& chunk, const Block& b, int) {
    screens.bounds(format, b.rows, b.panels, lo + chunk.base * ld, hi + chunk.base * ld, ld);
  }
  int64_t end(const Chunk& chunk) {
    for (int64_t r = 0; r < chunk.rows; ++r)
      if (chunk.exact[r] != 0)
        for (int64_t f = 0; f < ld; ++f) {
          lo[(chunk.base + r) * ld + f] = -INFINITY;
          hi[(chunk.base + r) * ld + f] = INFINITY;
        }
    return kOk;
  }
};

template <class Make>
Entries* encode_entries(const Problem& p, const Terms& terms, EncodePath path, int64_t* status, const Make& make) {
  if (p.stats != nullptr) *p.stats = {};
  auto entries = std::make_unique<Entries>();
  entries->crow.push_back(0);
  const EngineKernels& kernels = engine_kernels();
  const EncodeKernels* const screens = encode_kernels();
  const bool screen = screens != nullptr && (path == EncodePath::screen || (path == EncodePath::automatic && worth_screening(p.x, p.w)));
  const Plan plan = make_plan(kernels, p.x, p.w, ScreenFormat::int8, screen, p.threads, 0);
  int64_t* const workspace = p.stats != nullptr ? &p.stats->workspace : nullptr;
  *status = make(kernels, screens, *entries,
                 [&](auto& driver) { return p.x.rows == 0 ? kOk : run_engine(kernels, p.x, p.w, terms, plan, workspace, driver); });
  return entries.release();
}

}  // namespace

int64_t encode_topk(const Activations& x, const Weights& w, const float* scale, const float* bias, int64_t k, bool relu, float* values,
                    int64_t* indices, EncodePath path, int threads, EncodeStats* stats, uint8_t* survived) {
  if (stats != nullptr) *stats = {};
  if (x.rows == 0 || k == 0) return kOk;
  const EngineKernels& kernels = engine_kernels();
  const EncodeKernels* const screens = encode_kernels();
  const Problem p{x, w, scale, bias, threads, stats};
  const TopkOutput out{k, relu, values, indices, w.list};
  const bool rowwise = path == EncodePath::rows || path == EncodePath::blocks || (path == EncodePath::automatic && worth_rowwise(x, w, k));
  const bool wanted =
      rowwise || path == EncodePath::screen || (path == EncodePath::automatic && worth_screening(x, w) && w.features >= 32 * k);
  const Plan plan = make_plan(kernels, x, w, ScreenFormat::int8, wanted && screens != nullptr, threads, 8 * (4 * k + 272));
  if (!plan.screens) return dense_topk_all(kernels, p, out);
  int64_t* const workspace = stats != nullptr ? &stats->workspace : nullptr;
  if (rowwise && !plan.copied) {
    if (path == EncodePath::rows || (path == EncodePath::automatic && pack_first(x, plan)))
      return rowwise_topk(kernels, *screens, p, out, plan, survived);
    const std::unique_ptr<RowwiseDriver> driver(new RowwiseDriver{kernels, *screens, p, out, survived});
    return run_engine(kernels, x, w, {scale, bias, nullptr}, driver->within(plan), workspace, *driver);
  }
  TopkDriver driver{kernels, *screens, screens->screen_topk, p, out, survived};
  return run_engine(kernels, x, w, {scale, bias, nullptr}, plan, workspace, driver);
}

Entries* encode_threshold(const Activations& x, const Weights& w, const float* scale, const float* bias, const float* threshold,
                          float half_band, EncodePath path, int threads, EncodeStats* stats, int64_t* status) {
  const Problem p{x, w, scale, bias, threads, stats};
  // What the screen may drop: not above the threshold and not in the band, with room for the rounding of their difference.
  int64_t highest = w.features;
  if (w.list != nullptr && w.features > 0) highest = w.list[w.features - 1] + 1;
  std::vector<float> least(static_cast<size_t>(highest));
  for (int64_t f = 0; f < highest; ++f) {
    const float theta = threshold[f];
    least[f] = theta < 0 ? 0.0f : theta;
    if (half_band >= 0) {
      const float below = theta - half_band - (std::fabs(theta) + half_band) * 0x1p-20f;
      least[f] = below < least[f] || below != below ? below : least[f];
    }
    least[f] = std::min(least[f], FLT_MAX);  // NaN stays; a NaN score has an infinite upper end, which must pass strictly
  }
  return encode_entries(p, {scale, bias, least.data()}, path, status, [&](auto& kernels, auto* screens, Entries& entries, const auto& run) {
    ThresholdDriver driver(kernels, screens, p, ThresholdKind::per_feature, threshold, half_band, entries);
    return run(driver);
  });
}

Entries* encode_gated(const Activations& x, const Weights& w, const float* b_gate, const float* stretch, const float* b_mag,
                      EncodePath path, int threads, EncodeStats* stats, int64_t* status) {
  const Problem p{x, w, stretch, b_mag, threads, stats};
  return encode_entries(p, {stretch, b_mag, b_gate}, path, status, [&](auto& kernels, auto* screens, Entries& entries, const auto& run) {
    ThresholdDriver driver(kernels, screens, p, ThresholdKind::gate, nullptr, -1, entries);
    return run(driver);
  });
}

Entries* encode_batch_topk(const Activations& x, const Weights& w, const float* scale, const float* bias, int64_t total, EncodePath path,
                           int threads, EncodeStats* stats, float* min_kept, int64_t* status) {
  const Problem p{x, w, scale, bias, threads, stats};
  return encode_entries(p, {scale, bias, nullptr}, path, status, [&](auto& kernels, auto* screens, Entries& entries, const auto& run) {
    BatchTopkDriver driver(kernels, screens, p, total);
    const int64_t done = total > 0 ? run(driver) : kOk;
    if (done == kOk) *min_kept = driver.finish(entries);
    return done;
  });
}

int64_t screen_bounds(const Activations& x, const Weights& w, const float* scale, const float* bias, bool bf16, float* lo, float* hi,
                      bool* screens, int threads) {
  const EngineKernels& kernels = engine_kernels();
  const EncodeKernels* const table = encode_kernels();
  const ScreenFormat format = bf16 ? ScreenFormat::bf16 : ScreenFormat::int8;
  const Plan plan = make_plan(kernels, x, w, format, table != nullptr, threads, 0);
  *screens = plan.screens;
  if (!plan.screens || x.rows == 0) return kOk;
  BoundsDriver driver{*table, format, lo, hi, w.features};
  return run_engine(kernels, x, w, {scale, bias, nullptr}, plan, nullptr, driver);
}

}  // namespace fastsae
