// The encoders, and the drivers of those that keep any number of entries a row. encode.isa.cpp has the screens.
#include "cpu/encode.h"

#include <cfloat>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "cpu/engine/candidates.h"
#include "cpu/engine/topk.h"
#include "cpu/engine/topk_rowwise.h"

namespace fastsae {
namespace {

const EncodeKernels* const kTables[kLevels] = FASTSAE_SCREEN_TABLES(encode_kernels);

}  // namespace

const EncodeKernels* encode_kernels() { return pick_if(kTables); }

namespace {

// ---- entries: any number a row ----

// Those of a block of features, by row, then feature; only rows that have some are named.
struct Segment {
  struct Run {
    int64_t row;  // of the chunk
    int32_t count;
  };
  int64_t first_feature;
  std::vector<Run> runs{};
  std::vector<float> values{};
  std::vector<int32_t> features{};
  std::vector<uint8_t> flags{};  // empty: 1 each
};

}  // namespace

struct Entries {
  struct Part {  // a chunk's
    int64_t base, rows;
    std::vector<Segment> segments;
  };
  std::vector<int64_t> crow{0};  // [rows + 1]
  std::vector<Part> parts;

  void add(Part part) {
    std::sort(part.segments.begin(), part.segments.end(),
              [](const Segment& a, const Segment& b) { return a.first_feature < b.first_feature; });
    crow.resize(static_cast<size_t>(part.base + part.rows) + 1);
    for (const Segment& s : part.segments)
      for (const Segment::Run& run : s.runs) crow[part.base + run.row + 1] += run.count;
    for (int64_t r = part.base; r < part.base + part.rows; ++r) crow[r + 1] += crow[r];
    parts.push_back(std::move(part));
  }
};

Entries* new_entries() { return new Entries; }
void free_entries(Entries* entries) { delete entries; }
int64_t entries_count(const Entries* entries) { return entries->crow.back(); }
int64_t copy_entries(const Entries* entries, float* values, int64_t* col, int64_t* crow, uint8_t* flags, int threads) {
  std::copy(entries->crow.begin(), entries->crow.end(), crow);
  std::vector<int64_t> next(entries->crow);  // of each row, where its next entry goes
  for (const Entries::Part& part : entries->parts) {
    const int64_t ranges = useful_threads(threads, crow[part.base + part.rows] - crow[part.base]);
    for_each_unit(threads, ranges, [&](int64_t range) {
      const int64_t r0 = part.rows * range / ranges, r1 = part.rows * (range + 1) / ranges;
      for (const Segment& s : part.segments) {
        int64_t i = 0;
        for (const Segment::Run& run : s.runs) {
          if (run.row >= r0 && run.row < r1) {
            const int64_t to = std::exchange(next[part.base + run.row], next[part.base + run.row] + run.count);
            std::copy_n(s.values.data() + i, run.count, values + to);
            std::copy_n(s.features.data() + i, run.count, col + to);
            if (flags != nullptr && s.flags.empty()) std::fill_n(flags + to, run.count, uint8_t{1});
            if (flags != nullptr && !s.flags.empty()) std::copy_n(s.flags.data() + i, run.count, flags + to);
          }
          i += run.count;
        }
      }
    });
  }
  return kOk;
}

namespace {

struct ThresholdDriver : Candidates {
  ThresholdKind kind;
  const float* threshold;  // of the dictionary
  float half_band;
  Entries& entries;
  std::vector<Segment> segments{};
  std::mutex mutex{};

  void block(const Chunk& chunk, const Block& b, int worker) {
    screen(chunk, b, worker, [&](const Undecided& open) { screens->screen_threshold(kind, b.rows, b.panels, b.next, open, nullptr); });
    score(chunk, b, worker);
    const Undecided& u = undecided[worker];
    Segment found{b.first};
    int64_t total = 0;
    const float half = half_band;
    // judge(product, place in the block, feature, value) returns the flags of an entry, 0: not kept. No branch: half of all may be kept.
    const auto keep = [&](const auto& judge) {
      for (int64_t r = 0; r < chunk.rows; ++r) {
        float *const hi = u.hi + r * u.stride, *const lo = u.lo + r * u.stride;
        int32_t *const id = u.id + r * u.stride, kept = 0;
        for (int32_t i = 0; i < u.n[r]; ++i) {
          const int32_t feature = p.w.list != nullptr ? p.w.list[id[i]] : id[i];
          const int flags = judge(hi[i], id[i] - b.first, feature, hi[kept]);
          id[kept] = feature;
          if (half >= 0) lo[kept] = static_cast<float>(flags);
          kept += static_cast<int32_t>(flags != 0);
        }
        u.n[r] = kept;
        total += kept;
      }
    };
    const auto above = [&](float score, float theta) {
      return static_cast<int>(score > (theta < 0 ? 0.0f : theta)) | static_cast<int>(score != score);
    };
    if (kind == ThresholdKind::gate)
      keep([&](float product, int64_t at, int32_t, float& value) {
        const float gate = product + b.panels.extra[at], score = scored_as(b, at, product);
        value = plain(gate != gate ? gate : score);
        return static_cast<int>(!(gate <= 0)) & static_cast<int>(!(score <= 0));
      });
    else if (half >= 0)
      keep([&](float product, int64_t at, int32_t feature, float& value) {
        const float score = scored_as(b, at, product), theta = threshold[feature];
        const int active = above(score, theta);
        value = active != 0 ? plain(score) : 0.0f;
        return active | static_cast<int>(std::fabs(score - theta) < half) << 1;
      });
    else
      keep([&](float product, int64_t at, int32_t feature, float& value) {
        const float score = scored_as(b, at, product);
        value = plain(score);
        return above(score, threshold[feature]);
      });
    found.values.reserve(static_cast<size_t>(total));
    found.features.reserve(static_cast<size_t>(total));
    if (half >= 0) found.flags.reserve(static_cast<size_t>(total));
    for (int64_t r = 0; r < chunk.rows; ++r) {
      const int32_t n = std::exchange(u.n[r], 0);
      if (n == 0) continue;
      const int64_t at = r * u.stride;
      found.runs.push_back({r, n});
      found.values.insert(found.values.end(), u.hi + at, u.hi + at + n);
      found.features.insert(found.features.end(), u.id + at, u.id + at + n);
      if (half >= 0) found.flags.insert(found.flags.end(), u.lo + at, u.lo + at + n);
    }
    const std::lock_guard<std::mutex> guard(mutex);
    segments.push_back(std::move(found));
  }
  // One NaN for all: its sign and payload depend on how a sum was formed.
  static float plain(float score) { return score != score ? std::nanf("") : score; }
  int64_t end(const Chunk& chunk) {
    entries.add({chunk.base, chunk.rows, std::exchange(segments, {})});
    return Candidates::end(chunk);
  }
};

// ---- the best of the whole batch ----

struct Pooled {
  uint32_t key;  // of the score: ascending from the best
  int32_t feature;
  int64_t row;
  bool operator<(const Pooled& o) const { return std::tie(key, row, feature) < std::tie(o.key, o.row, o.feature); }
};

struct BatchTopkDriver : Candidates {
  int64_t total;
  std::vector<Pooled> pool{};  // positive scores and NaN, not below tau
  std::vector<float> room[kMostWorkers] = {};
  std::mutex mutex{};
  int64_t fresh = 0;
  int32_t tau = 0;  // bits of a float, 0 at first: only positive scores are asked for

  float load_tau() const { return std::bit_cast<float>(__atomic_load_n(&tau, __ATOMIC_RELAXED)); }
  // Under the mutex.
  void raise_to(float value) {
    if (value > load_tau()) __atomic_store_n(&tau, std::bit_cast<int32_t>(value), __ATOMIC_RELAXED);
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
  float finish(Entries& entries) {
    shrink();
    float least = INFINITY;
    if (!pool.empty()) least = score_of(std::max_element(pool.begin(), pool.end())->key);
    std::sort(pool.begin(), pool.end(),
              [](const Pooled& a, const Pooled& b) { return std::tie(a.row, a.feature) < std::tie(b.row, b.feature); });
    Segment all{0};
    for (const Pooled& e : pool) {
      if (all.runs.empty() || all.runs.back().row != e.row) all.runs.push_back({e.row, 0});
      ++all.runs.back().count;
      all.values.push_back(score_of(e.key));
      all.features.push_back(e.feature);
    }
    entries.add({0, p.x.rows, {std::move(all)}});
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

// With fewer rows packing costs more than it saves; measured.
PlanRequest encode_request(const Weights& w, EncodePath path) {
  return {.path = path, .least_rows = has_handle(w) ? 1 : 12, .least_d = 32, .least_features = 2048};
}

template <class Driver>
int64_t run_entries(const Problem& p, EncodePath path, Driver& driver) {
  if (p.stats != nullptr) *p.stats = {};
  return p.x.rows == 0 ? kOk : run_engine(p, make_plan(p, encode_request(p.w, path)), driver);
}

}  // namespace

int64_t encode_topk(const Activations& x, const Weights& w, const float* scale, const float* bias, int64_t k, bool relu, bool absolute,
                    float* values, int64_t* indices, EncodePath path, EncodeStats* stats, int threads) {
  if (stats != nullptr) *stats = {};
  if (x.rows == 0 || k == 0) return kOk;
  const EncodeKernels* const screens = encode_kernels();
  const Problem p{.kernels = engine_kernels(),
                  .x = x,
                  .w = w,
                  .scale = scale,
                  .bias = bias,
                  .threads = threads,
                  .stats = stats,
                  .absolute = absolute};
  const TopkOutput out{.k = k, .relu = relu, .values = values, .indices = indices, .list = w.list, .absolute = absolute};
  PlanRequest request = encode_request(w, path);
  request.least_features = std::max(request.least_features, 32 * k);
  request.rowwise_k = k;
  request.bytes_a_row = topk_bytes_a_row(k);
  const Plan plan = make_plan(p, request);
  if (plan.path == EncodePath::dense) return dense_topk_all(p, out);
  if (plan.path == EncodePath::rows) return rowwise_topk(*screens, p, out, plan);
  if (plan.path == EncodePath::blocks) return run_engine(p, plan, *std::unique_ptr<RowwiseDriver>(new RowwiseDriver{*screens, p, out}));
  TopkDriver driver{*screens, absolute ? screens->screen_topk_absolute : screens->screen_topk, p, out};
  return run_engine(p, plan, driver);
}

int64_t encode_threshold(const Activations& x, const Weights& w, const float* scale, const float* bias, const float* threshold,
                         float half_band, Entries* entries, EncodePath path, EncodeStats* stats, int threads) {
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
  const Problem p{
      .kernels = engine_kernels(), .x = x, .w = w, .scale = scale, .bias = bias, .extra = least.data(), .threads = threads, .stats = stats};
  ThresholdDriver driver{{p, encode_kernels()}, ThresholdKind::per_feature, threshold, half_band, *entries};
  return run_entries(p, path, driver);
}

int64_t encode_gated(const Activations& x, const Weights& w, const float* b_gate, const float* stretch, const float* b_mag,
                     Entries* entries, EncodePath path, EncodeStats* stats, int threads) {
  const Problem p{
      .kernels = engine_kernels(), .x = x, .w = w, .scale = stretch, .bias = b_mag, .extra = b_gate, .threads = threads, .stats = stats};
  ThresholdDriver driver{{p, encode_kernels()}, ThresholdKind::gate, nullptr, -1, *entries};
  return run_entries(p, path, driver);
}

int64_t encode_batch_topk(const Activations& x, const Weights& w, const float* scale, const float* bias, int64_t total, float* min_kept,
                          Entries* entries, EncodePath path, EncodeStats* stats, int threads) {
  const Problem p{.kernels = engine_kernels(), .x = x, .w = w, .scale = scale, .bias = bias, .threads = threads, .stats = stats};
  if (stats != nullptr) *stats = {};
  BatchTopkDriver driver{{p, encode_kernels()}, total};
  const int64_t status = total > 0 ? run_entries(p, path, driver) : kOk;
  if (status == kOk) *min_kept = driver.finish(*entries);
  return status;
}

int64_t screen_bounds(const Activations& x, const Weights& w, const float* scale, const float* bias, bool bf16, float* lo, float* hi,
                      int threads) {
  const Problem p{.kernels = engine_kernels(), .x = x, .w = w, .scale = scale, .bias = bias, .threads = threads};
  const Plan plan = make_plan(p, {.format = bf16 ? ScreenFormat::bf16 : ScreenFormat::int8});
  if (!plan.screens) return kUnsupported;
  if (x.rows == 0) return kOk;
  BoundsDriver driver{*encode_kernels(), plan.format, lo, hi, w.features};
  return run_engine(p, plan, driver);
}

}  // namespace fastsae
