// The encoders: exact selection, and what their consumers do with blocks of features. The driver is screen.h, the screens encode.isa.cpp.
#include "cpu/encode.h"

#include <mutex>
#include <vector>

#include "cpu/cuts.h"

namespace fastsae {
namespace {

const EncodeKernels* const kTables[kLevels] = {nullptr, nullptr, nullptr, FASTSAE_AVX512_BF16(encode_kernels)};

}  // namespace

const EncodeKernels* encode_kernels() {
  const EncodeKernels* found = nullptr;
  for (int level = 0; level <= static_cast<int>(current_level()); ++level)
    if (kTables[level] != nullptr) found = kTables[level];
  return found;
}

namespace {

struct Problem {
  const Activations& x;
  const Weights& w;
  const float* scale;
  const float* bias;
  int threads;
  EncodeStats* stats;

  int64_t d() const { return w.d; }
  int64_t padded() const { return round_to(std::max<int64_t>(w.d, 1), 32); }
};

void note_workspace(EncodeStats* stats, int64_t bytes) {
  if (stats != nullptr) stats->workspace = std::max(stats->workspace, bytes);
}

// ---- order: a key a score, ascending from the best; equal scores have equal keys, all NaN one key below all others ----

uint32_t key_of(float score) {
  if (score != score) return 0;
  uint32_t bits;
  score += 0.0f;  // -0 to +0
  std::memcpy(&bits, &score, 4);
  return (bits & 0x80000000u) != 0 ? bits : 0x7fffffffu - bits;  // inf (0x7f800000) is 0x7fffff, so 0 is free for NaN
}
float score_of(uint32_t key) {
  if (key == 0) return std::nanf("");
  const uint32_t bits = (key & 0x80000000u) != 0 ? key : 0x7fffffffu - key;
  float score;
  std::memcpy(&score, &bits, 4);
  return score;
}
uint64_t entry(float score, int64_t feature) { return (uint64_t{key_of(score)} << 32) | static_cast<uint64_t>(feature); }

// ---- top-k ----

struct TopkOutput {
  int64_t k;
  bool relu;
  float* values;
  int64_t* indices;
  const int32_t* list;

  // The k best of n entries (all different) to the output row.
  void select(int64_t row, uint64_t* entries, int64_t n) const {
    if (k < n) std::nth_element(entries, entries + k, entries + n);
    std::sort(entries, entries + k);
    for (int64_t i = 0; i < k; ++i) {
      const float score = score_of(static_cast<uint32_t>(entries[i] >> 32));
      const int64_t feature = static_cast<int64_t>(entries[i] & 0xffffffffu);
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

  void add(const Problem& p, int64_t k, int64_t capacity, float* scores, int64_t first, int64_t count) {
    const int32_t* const list = p.w.list;
    const auto term = [&](const float* terms, int64_t j) { return terms[list != nullptr ? list[first + j] : first + j]; };
    if (p.scale != nullptr)
      for (int64_t j = 0; j < count; ++j) scores[j] *= term(p.scale, j);
    if (p.bias != nullptr)
      for (int64_t j = 0; j < count; ++j) scores[j] += term(p.bias, j);
    for (int64_t j0 = 0; j0 < count; j0 += 16) {
      const int64_t j1 = std::min(j0 + 16, count);
      int pass = any ? 1 : 0;
      for (int64_t j = j0; j < j1; ++j) pass |= static_cast<int>(!(scores[j] <= above));
      if (pass == 0) continue;
      for (int64_t j = j0; j < j1; ++j) {
        if (!any && scores[j] <= above) continue;
        if (n == capacity) {
          shrink(k);
          if (scores[j] <= above) continue;
        }
        entries[n++] = entry(scores[j], first + j);
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
int64_t dense_topk(const EngineKernels& kernels, const Problem& p, const TopkOutput& out, const float* xc, int64_t base, const int32_t* list,
                   int64_t count) {
  const Weights& w = p.w;
  const int64_t padded = p.padded(), capacity = std::min(2 * out.k + 64, w.features);
  const bool plain = by_rows(w) && w.t == Dtype::f32 && w.eps == 0;
  // By rows: as many features as stay in the cache for all rows. By columns: wide, because each row of a strip is on another page.
  const bool direct = !by_rows(w) && w.stride_f == 1 && w.t == Dtype::f32 && w.eps == 0 && w.list == nullptr && p.d() > 0 && count <= kColumnRows;
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
        kernels.columns({static_cast<const float*>(w.data) + f0, w.stride_d, p.d(), n, x, static_cast<int>(rows), sums, sums + lanes, scores, width});
        for (int64_t i = 0; i < rows; ++i) best[worker * at_once + i].add(p, out.k, capacity, scores + i * width, f0, n);
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
        for (int64_t i = 0; i < height; ++i) best[worker * at_once + g + i].add(p, out.k, capacity, scores + i * kDenseWidth, f0, n);
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

int64_t dense_topk_all(const EngineKernels& kernels, const Problem& p, const TopkOutput& out) {
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

struct TopkConsumer {
  const EngineKernels& kernels;
  const EncodeKernels& screens;
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
           plan.threads * (3 * Workspace::size<float>(chunk * undecided) + Workspace::size<int32_t>(chunk) + Workspace::size<int64_t>(1) +
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
    for (int t = 0; t < threads; ++t) buffers[t].exact = chunk.exact;
  }
  void block(const Chunk&, const Block& b, int worker) { screens.screen_topk(b.rows, b.panels, b.next, b.job, buffers[worker]); }
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
        for (int64_t i = 0; i < shared.kept[r]; ++i) row[shared.feature[r * stride() + i]] = 1;
      }
    return count > 0 ? dense_topk(kernels, p, out, chunk.xc, chunk.base, list, count) : kOk;
  }
};

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
  int64_t rows = 0;
  std::vector<int64_t> crow;  // [rows + 1]
  std::vector<Part> parts;
};

void free_entries(Entries* entries) { delete entries; }
int64_t entries_count(const Entries& entries) { return entries.crow.back(); }
void copy_entries(const Entries& entries, float* values, int64_t* col, int64_t* crow, uint8_t* flags, int threads) {
  std::memcpy(crow, entries.crow.data(), entries.crow.size() * sizeof(int64_t));
  for (const Entries::Part& part : entries.parts) {
    const int64_t start = entries.crow[part.base], n = static_cast<int64_t>(part.kept.size());
    constexpr int64_t kEach = 1 << 15;
    for_each_unit(useful_threads(threads, n), ceil_div(n, kEach), [&](int64_t unit) {
      for (int64_t i = unit * kEach; i < std::min((unit + 1) * kEach, n); ++i) {
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

  void clear() {
    for (std::vector<Kept>& k : kept) k.clear();
    segments.clear();
  }
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
    clear();
  }
};

struct ThresholdConsumer : Cuts {
  const Problem& p;
  Cut kind;
  const float* threshold;  // of the dictionary
  float half_band;
  Entries& entries;
  Sorter sorter;

  ThresholdConsumer(const EngineKernels& kernels, const EncodeKernels* screens, const Problem& p, Cut kind, const float* threshold,
                    float half_band, Entries& entries)
      : Cuts{kernels, screens, p.stats, {}, {}}, p(p), kind(kind), threshold(threshold), half_band(half_band), entries(entries) {}

  void begin(const Chunk&) {}
  void block(const Chunk& chunk, const Block& b, int worker) {
    screen(chunk, b, worker, [&](const Undecided& open) { screens->screen_cut(kind, b.rows, b.panels, b.next, open, nullptr); });
    score(chunk, b, worker);
    const Undecided& u = undecided[worker];
    std::vector<Kept>& kept = sorter.kept[worker];
    const int64_t begin = static_cast<int64_t>(kept.size());
    for (int64_t r = 0; r < chunk.rows; ++r) {
      for (int64_t i = r * u.stride; i < r * u.stride + u.n[r]; ++i) {
        const int64_t at = u.id[i] - b.first;
        const int32_t feature = b.job.list != nullptr || p.w.list != nullptr ? p.w.list[u.id[i]] : u.id[i];
        float score = scored_as(b, at, u.hi[i]);
        if (kind == Cut::gate) {
          const float gate = u.hi[i] + b.panels.extra[at];
          if (!(gate <= 0) && !(score <= 0)) kept.push_back({static_cast<int32_t>(r), feature, gate != gate ? gate : score, 1});
          continue;
        }
        const float theta = threshold[feature];
        const bool active = score > (theta < 0 ? 0.0f : theta) || score != score;
        const bool in_band = half_band >= 0 && std::fabs(score - theta) < half_band;
        if (active || in_band)
          kept.push_back({static_cast<int32_t>(r), feature, active ? score : 0.0f, (active ? 1u : 0u) | (in_band ? 2u : 0u)});
      }
      u.n[r] = 0;
    }
    const std::lock_guard<std::mutex> guard(sorter.mutex);
    sorter.segments.push_back({b.first, worker, begin, static_cast<int64_t>(kept.size())});
  }
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

struct BatchConsumer : Cuts {
  const Problem& p;
  int64_t total;
  std::vector<Pooled> pool;  // positive scores and NaN, not below tau
  std::vector<float> room[kMostWorkers];
  std::mutex mutex;
  int64_t fresh = 0;
  int32_t tau = 0;  // bits of a float, 0 at first: only positive scores are asked for

  BatchConsumer(const EngineKernels& kernels, const EncodeKernels* screens, const Problem& p, int64_t total)
      : Cuts{kernels, screens, p.stats, {}, {}}, p(p), total(total) {}

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
    screen(chunk, b, worker, [&](const Undecided& still) { screens->screen_cut(Cut::all, b.rows, b.panels, b.next, still, &tau); });
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
        raise_to(screens->kth_largest(values.data(), static_cast<int64_t>(values.size()), total));
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
    std::sort(pool.begin(), pool.end(), [](const Pooled& a, const Pooled& b) { return a.row != b.row ? a.row < b.row : a.feature < b.feature; });
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

struct BoundsConsumer {
  const EncodeKernels& screens;
  Number number;
  float* lo;
  float* hi;
  int64_t ld;

  int64_t bytes(const Plan&) const { return 0; }
  void take(Workspace&, const Plan&) {}
  void begin(const Chunk&) {}
  void block(const Chunk& chunk, const Block& b, int) {
    screens.bounds(number, b.rows, b.panels, lo + chunk.base * ld, hi + chunk.base * ld, ld);
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

// Measured: with fewer rows, packing costs more than it saves; it is cheaper where columns have to be transposed anyway.
bool pays(const Activations& x, const Weights& w) {
  const int64_t rows = w.packed != nullptr && w.list == nullptr ? 1 : by_rows(w) ? 16 : 4;
  return x.rows >= rows && w.d >= 32 && w.features >= 2048;
}

template <class Make>
Entries* encode_entries(const Problem& p, const Terms& terms, EncodePath path, int64_t* status, const Make& make) {
  if (p.stats != nullptr) *p.stats = {};
  Entries* const entries = new Entries;
  entries->rows = p.x.rows;
  entries->crow.push_back(0);
  const EngineKernels& kernels = engine_kernels();
  const EncodeKernels* const screens = encode_kernels();
  const bool screen = screens != nullptr && (path == EncodePath::screen || (path == EncodePath::automatic && pays(p.x, p.w)));
  const Plan plan = make_plan(kernels, p.x, p.w, Number::int8, screen, p.threads, 0);
  int64_t* const workspace = p.stats != nullptr ? &p.stats->workspace : nullptr;
  *status = make(kernels, screens, *entries, [&](auto& consumer) {
    return p.x.rows == 0 ? kOk : run_engine(kernels, p.x, p.w, terms, plan, workspace, consumer);
  });
  return entries;
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
  const bool wanted = path == EncodePath::screen || (path == EncodePath::automatic && pays(x, w) && w.features >= 32 * k);
  const Plan plan = make_plan(kernels, x, w, Number::int8, wanted && screens != nullptr, threads, 8 * (4 * k + 272));
  if (!plan.screens) return dense_topk_all(kernels, p, out);
  TopkConsumer consumer{kernels, *screens, p, out, survived};
  return run_engine(kernels, x, w, {scale, bias, nullptr}, plan, stats != nullptr ? &stats->workspace : nullptr, consumer);
}

Entries* encode_threshold(const Activations& x, const Weights& w, const float* scale, const float* bias, const float* threshold,
                          float half_band, EncodePath path, int threads, EncodeStats* stats, int64_t* status) {
  const Problem p{x, w, scale, bias, threads, stats};
  // What the screen may drop: not above the threshold and not in the band, with room for the rounding of their difference.
  int64_t highest = w.features;
  if (w.list != nullptr && w.features > 0) highest = w.list[w.features - 1] + 1;
  std::vector<float> cut(static_cast<size_t>(highest));
  for (int64_t f = 0; f < highest; ++f) {
    const float theta = threshold[f];
    cut[f] = theta < 0 ? 0.0f : theta;
    if (half_band >= 0) {
      const float below = theta - half_band - (std::fabs(theta) + half_band) * 0x1p-20f;
      cut[f] = below < cut[f] || below != below ? below : cut[f];
    }
  }
  return encode_entries(p, {scale, bias, cut.data()}, path, status, [&](auto& kernels, auto* screens, Entries& entries, const auto& run) {
    ThresholdConsumer consumer(kernels, screens, p, Cut::each, threshold, half_band, entries);
    return run(consumer);
  });
}

Entries* encode_gated(const Activations& x, const Weights& w, const float* b_gate, const float* stretch, const float* b_mag,
                      EncodePath path, int threads, EncodeStats* stats, int64_t* status) {
  const Problem p{x, w, stretch, b_mag, threads, stats};
  return encode_entries(p, {stretch, b_mag, b_gate}, path, status, [&](auto& kernels, auto* screens, Entries& entries, const auto& run) {
    ThresholdConsumer consumer(kernels, screens, p, Cut::gate, nullptr, -1, entries);
    return run(consumer);
  });
}

Entries* encode_batch_topk(const Activations& x, const Weights& w, const float* scale, const float* bias, int64_t total, EncodePath path,
                           int threads, EncodeStats* stats, float* min_kept, int64_t* status) {
  const Problem p{x, w, scale, bias, threads, stats};
  return encode_entries(p, {scale, bias, nullptr}, path, status, [&](auto& kernels, auto* screens, Entries& entries, const auto& run) {
    BatchConsumer consumer(kernels, screens, p, total);
    const int64_t done = total > 0 ? run(consumer) : kOk;
    if (done == kOk) *min_kept = consumer.finish(entries);
    return done;
  });
}

int64_t screen_bounds(const Activations& x, const Weights& w, const float* scale, const float* bias, bool bf16, float* lo, float* hi,
                      bool* screens, int threads) {
  const EngineKernels& kernels = engine_kernels();
  const EncodeKernels* const table = encode_kernels();
  const Number number = bf16 ? Number::bf16 : Number::int8;
  const Plan plan = make_plan(kernels, x, w, number, table != nullptr, threads, 0);
  *screens = plan.screens;
  if (!plan.screens || x.rows == 0) return kOk;
  BoundsConsumer consumer{*table, number, lo, hi, w.features};
  return run_engine(kernels, x, w, {scale, bias, nullptr}, plan, nullptr, consumer);
}

}  // namespace fastsae
