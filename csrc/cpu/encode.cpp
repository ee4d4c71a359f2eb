// encode_topk: chunks of rows, which thread does what, and the exact selection. The sums and the screen are in encode.isa.cpp.
#include "cpu/encode.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "fastsae.h"
#include "isa.h"
#include "parallel.h"
#include "workspace.h"

namespace fastsae {
namespace {

const EncodeKernels* const kTables[kLevels] = {
    &portable::encode_kernels,
    FASTSAE_AVX2(encode_kernels),
    FASTSAE_AVX512(encode_kernels),
    FASTSAE_AVX512_BF16(encode_kernels),
};

constexpr int64_t kChunkRows = 1024;
constexpr int64_t kLeastChunk = 64;
constexpr int64_t kBufferBytes = int64_t{64} << 20;
constexpr int64_t kPanelBytes = int64_t{256} << 10;  // packed panels at work, a thread: they and the next ones' weights share the L2 cache
constexpr int kMostPanels = 8;
constexpr int64_t kColumnBytes = int64_t{3} << 20;  // packed and transposed features of a strided W, a thread
constexpr int kMostWorkers = 256;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Problem {
  const float* x;
  int64_t rows, stride_row, stride_d;
  const Matrix& w;
  int64_t d, features;
  const float* bias;
  const float* b_pre;
  const float* scale;
  int64_t k;
  bool relu;
  float* values;
  int64_t* indices;
  int threads;
  EncodeStats* stats;
  uint8_t* survived;

  const float* weights() const { return static_cast<const float*>(w.data); }
  bool by_rows() const { return w.stride_d == 1 || d <= 1; }
  int64_t padded() const { return round_up(std::max<int64_t>(d, 1), 32); }
};

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

// The k best of n entries (all different) to the output row.
void select(const Problem& p, int64_t row, uint64_t* entries, int64_t n) {
  if (p.k < n) std::nth_element(entries, entries + p.k, entries + n);
  std::sort(entries, entries + p.k);
  for (int64_t i = 0; i < p.k; ++i) {
    const float score = score_of(static_cast<uint32_t>(entries[i] >> 32));
    p.values[row * p.k + i] = p.relu && score < 0 ? 0.0f : score;
    p.indices[row * p.k + i] = static_cast<int64_t>(entries[i] & 0xffffffffu);
  }
}

void note_workspace(const Problem& p, size_t bytes) {
  if (p.stats != nullptr) p.stats->workspace = std::max(p.stats->workspace, static_cast<int64_t>(bytes));
}

// ---- dense ----

// The best entries of one row among the features one worker sees, which come in ascending order: once a worker has k of them, an equal
// score that comes later cannot be among the best, so the list never holds more than its capacity, whatever the input.
struct Best {
  uint64_t* entries;
  int64_t n;
  float above;  // only scores greater than this, or NaN, can still enter
  bool any;     // everything still enters

  void add(const Problem& p, int64_t capacity, float* scores, int64_t first, int64_t count) {
    if (p.scale != nullptr)
      for (int64_t j = 0; j < count; ++j) scores[j] *= p.scale[first + j];
    if (p.bias != nullptr)
      for (int64_t j = 0; j < count; ++j) scores[j] += p.bias[first + j];
    for (int64_t j0 = 0; j0 < count; j0 += 16) {
      const int64_t j1 = std::min(j0 + 16, count);
      int pass = any ? 1 : 0;
      for (int64_t j = j0; j < j1; ++j) pass |= static_cast<int>(!(scores[j] <= above));
      if (pass == 0) continue;
      for (int64_t j = j0; j < j1; ++j) {
        if (!any && scores[j] <= above) continue;
        if (n == capacity) {
          shrink(p.k);
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
int64_t dense(const EncodeKernels& kernels, const Problem& p, const float* xc, int64_t base, const int32_t* list, int64_t count) {
  const int64_t padded = p.padded(), capacity = std::min(2 * p.k + 64, p.features);
  // By rows: as many features as stay in the cache for all rows. By columns: wide, because each row of a strip is on another page.
  const bool direct = !p.by_rows() && p.d > 0 && count <= kColumnRows;
  const int64_t width = direct ? std::clamp(round_up(p.features / (4 * p.threads), 64), int64_t{256}, kColumnWidth / count / 64 * 64)
                        : !p.by_rows() ? kDenseWidth
                                       : std::clamp(round_up((int64_t{32} << 10) / padded, 16), int64_t{16}, kDenseWidth);
  const int64_t units = ceil_div(p.features, width), stride = padded + 16;
  const int threads = static_cast<int>(std::min<int64_t>(useful_threads(p.threads, count * p.features * p.d / 8), units));
  const int64_t at_once = std::clamp(kBufferBytes / (8 * capacity * threads), int64_t{1}, count);
  constexpr int64_t kGroup = 16;
  const int64_t lanes = count * kScoreLanes * width;  // of direct: sums, totals, scores
  const int64_t columns_each = direct        ? 2 * lanes + count * width
                               : p.by_rows() ? 0
                                             : kDenseWidth * stride,
                columns_size = threads * columns_each;
  const size_t bytes = Workspace::size<uint64_t>(threads * at_once * capacity) + Workspace::size<Best>(threads * at_once) +
                       Workspace::size<float>(columns_size) + Workspace::size<uint64_t>(threads * threads * capacity);
  Workspace space(bytes);
  if (!space.ok()) return kNoMemory;
  note_workspace(p, bytes);
  uint64_t* const entries = space.take<uint64_t>(threads * at_once * capacity);
  Best* const best = space.take<Best>(threads * at_once);
  float* const columns = space.take<float>(columns_size);
  uint64_t* const merged = space.take<uint64_t>(threads * threads * capacity);

  for (int64_t r0 = 0; r0 < count; r0 += at_once) {
    const int64_t rows = std::min(at_once, count - r0);
    for (int64_t i = 0; i < threads * at_once; ++i) best[i] = {entries + i * capacity, 0, -INFINITY, true};
    for_each_unit_by_worker(threads, units, [&](int64_t unit, int worker) {
      const int64_t f0 = unit * width, n = std::min(width, p.features - f0);
      if (direct) {
        const float* x[kColumnRows];
        float* const sums = columns + worker * columns_each;
        float* const scores = sums + 2 * lanes;
        for (int64_t i = 0; i < rows; ++i) x[i] = xc + (list != nullptr ? list[r0 + i] : r0 + i) * padded;
        kernels.columns({p.weights() + f0, p.w.stride_d, p.d, n, x, static_cast<int>(rows), sums, sums + lanes, scores, width});
        for (int64_t i = 0; i < rows; ++i) best[worker * at_once + i].add(p, capacity, scores + i * width, f0, n);
        return;
      }
      const float* w[kDenseWidth];
      if (p.by_rows()) {
        for (int64_t j = 0; j < n; ++j) w[j] = p.weights() + (f0 + j) * p.w.stride_f;
      } else {
        float* const to = columns + worker * columns_each;
        kernels.transpose({p.weights() + f0, p.w.stride_d, p.d, n, to, padded, stride});
        for (int64_t j = 0; j < n; ++j) w[j] = to + j * stride;
      }
      for (int64_t g = 0; g < rows; g += kGroup) {
        const float* x[kGroup];
        float scores[kGroup * kDenseWidth];
        const int64_t height = std::min(kGroup, rows - g);
        for (int64_t i = 0; i < height; ++i) x[i] = xc + (list != nullptr ? list[r0 + g + i] : r0 + g + i) * padded;
        kernels.products(x, height, w, n, p.d, scores, kDenseWidth);
        for (int64_t i = 0; i < height; ++i) best[worker * at_once + g + i].add(p, capacity, scores + i * kDenseWidth, f0, n);
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
      select(p, base + (list != nullptr ? list[r0 + r] : r0 + r), all, n);
    });
  }
  return kOk;
}

// Rows [r0, r1) of a chunk.
void centre_rows(const EncodeKernels& kernels, const Problem& p, int64_t base, int64_t r0, int64_t r1, float* xc) {
  const int64_t padded = p.padded();
  kernels.centre({p.x + (base + r0) * p.stride_row, p.stride_row, p.stride_d, p.d, p.b_pre, xc + r0 * padded, padded}, r1 - r0);
}

int64_t dense_all(const EncodeKernels& kernels, const Problem& p) {
  const int64_t chunk = std::min(p.rows, kChunkRows);
  Workspace space(Workspace::size<float>(chunk * p.padded()));
  if (!space.ok()) return kNoMemory;
  float* const xc = space.take<float>(chunk * p.padded());
  for (int64_t base = 0; base < p.rows; base += chunk) {
    const int64_t rows = std::min(chunk, p.rows - base);
    constexpr int64_t kRows = 16;
    for_each_unit(useful_threads(p.threads, rows * p.d), ceil_div(rows, kRows),
                  [&](int64_t unit) { centre_rows(kernels, p, base, unit * kRows, std::min((unit + 1) * kRows, rows), xc); });
    const int64_t status = dense(kernels, p, xc, base, nullptr, rows);
    if (status != kOk) return status;
  }
  return kOk;
}

// ---- screened ----

int64_t screened(const EncodeKernels& kernels, const Problem& p) {
  const int64_t d = p.d, d2 = ceil_div(d, 2), padded = p.padded();
  const int64_t capacity = 4 * p.k + 256, stride = capacity + 16;
  const int64_t panel_words = d2 * kPanelWidth;
  // Columns: each row of a strided W costs a page walk a block, so blocks are as wide as the last-level cache has room for them.
  const int64_t panel_bytes = p.by_rows() ? kPanelBytes : kColumnBytes;
  const int panels = static_cast<int>(std::clamp<int64_t>(panel_bytes / (panel_words * (p.by_rows() ? 4 : 12)), 1, kMostPanels));
  const int64_t block = static_cast<int64_t>(panels) * kPanelWidth, blocks = ceil_div(p.features, block);
  const int threads = static_cast<int>(std::min<int64_t>({p.threads, blocks, kMostWorkers}));
  const int64_t undecided = block + 16;
  const int64_t fit = kBufferBytes / (12 * undecided * threads + 8 * stride);
  const int64_t chunk = std::min(p.rows, std::clamp(fit, kLeastChunk, kChunkRows));
  const int64_t scratch_words = 16 * (round_up(d2, 16) + 16), room = stride + undecided;
  const int64_t column_stride = padded + 16;  // not a power of two
  const int64_t meta = 5 * block;
  const size_t bytes = Workspace::size<float>(chunk * padded) + Workspace::size<uint32_t>(chunk * d2) + 2 * Workspace::size<float>(chunk) +
                       2 * Workspace::size<uint8_t>(chunk) + 4 * Workspace::size<int32_t>(chunk) +
                       2 * Workspace::size<float>(chunk * stride) +
                       threads * (3 * Workspace::size<float>(chunk * undecided) + Workspace::size<int32_t>(chunk) +
                                  Workspace::size<int64_t>(1) + Workspace::size<uint32_t>(panels * panel_words) +
                                  Workspace::size<uint32_t>(scratch_words) + Workspace::size<float>(meta) + Workspace::size<float>(room) +
                                  (p.by_rows() ? 0 : Workspace::size<float>(block * column_stride)) + Workspace::size<uint64_t>(capacity));
  Workspace space(bytes);
  if (!space.ok()) return kNoMemory;
  note_workspace(p, bytes);
  float* const xc = space.take<float>(chunk * padded);
  uint32_t* const pairs = space.take<uint32_t>(chunk * d2);
  float* const a = space.take<float>(chunk);
  float* const c = space.take<float>(chunk);
  int32_t* const list = space.take<int32_t>(chunk);
  TopkBuffer shared{};
  shared.score = space.take<float>(chunk * stride);
  shared.feature = space.take<int32_t>(chunk * stride);
  shared.kept = space.take<int32_t>(chunk);
  shared.fresh = space.take<int32_t>(chunk);
  shared.tau = space.take<int32_t>(chunk);
  shared.lock = space.take<uint8_t>(chunk);
  shared.exact = space.take<uint8_t>(chunk);
  shared.kept_stride = stride;
  shared.capacity = capacity;
  shared.k = p.k;
  shared.stride = undecided;
  uint8_t* const exact = shared.exact;
  struct Own {
    uint32_t* data;
    uint32_t* scratch;
    float* meta;
    float* columns;
    uint64_t* entries;
  };
  TopkBuffer buffers[kMostWorkers];
  Own own[kMostWorkers];
  for (int t = 0; t < threads; ++t) {
    TopkBuffer& b = buffers[t];
    b = shared;
    b.lo = space.take<float>(chunk * undecided);
    b.hi = space.take<float>(chunk * undecided);
    b.id = space.take<int32_t>(chunk * undecided);
    b.n = space.take<int32_t>(chunk);
    b.scored = space.take<int64_t>(1);
    b.room = space.take<float>(room);
    *b.scored = 0;
    std::memset(b.n, 0, static_cast<size_t>(chunk) * sizeof(int32_t));
    Own& o = own[t];
    o.data = space.take<uint32_t>(panels * panel_words);
    o.scratch = space.take<uint32_t>(scratch_words);
    o.meta = space.take<float>(meta);
    o.columns = p.by_rows() ? nullptr : space.take<float>(block * column_stride);
    o.entries = space.take<uint64_t>(capacity);
  }
  const float underflow = static_cast<float>(4 * d + 128) * 0x1p-126f, lowest = -INFINITY;

  for (int64_t base = 0; base < p.rows; base += chunk) {
    const int64_t rows = std::min(chunk, p.rows - base);
    const int tiles = static_cast<int>(ceil_div(rows, kTileRows));
    // 1. Rows: centred, and as pairs of bf16 with the factors of their bounds.
    for (uint8_t* flags : {exact, shared.lock}) std::memset(flags, 0, static_cast<size_t>(rows));
    for (int32_t* counts : {shared.kept, shared.fresh}) std::memset(counts, 0, static_cast<size_t>(rows) * sizeof(int32_t));
    for (int64_t r = 0; r < rows; ++r) std::memcpy(shared.tau + r, &lowest, 4);
    for_each_unit(useful_threads(threads, rows * d), tiles, [&](int64_t t) {
      const int64_t r0 = rows * t / tiles, r1 = rows * (t + 1) / tiles;
      centre_rows(kernels, p, base, r0, r1, xc);
      kernels.rows({xc + r0 * padded, padded, d, static_cast<int>(r1 - r0), pairs + r0 * d2, a + r0, c + r0, exact + r0});
    });
    // 2. Features, a block of panels at a time: packed into the cache of the thread that screens them against all rows, and scores what
    //    screening leaves undecided.
    const ScreenRows screen_rows{pairs, rows, d2, tiles, a, c};
    for_each_unit_by_worker(threads, blocks, [&](int64_t unit, int worker) {
      const Own& o = own[worker];
      const int64_t f0 = unit * block, n = std::min(block, p.features - f0);
      const int here = static_cast<int>(ceil_div(n, kPanelWidth));
      float* const norm = o.meta;
      float* const loss = norm + block;
      float* const floor = loss + block;
      float* const scale = floor + block;
      float* const bias = scale + block;
      ScoreJob job{xc, padded, p.weights() + f0 * p.w.stride_f, p.w.stride_f, d};
      if (!p.by_rows()) {
        kernels.transpose({job.w, p.w.stride_d, d, n, o.columns, padded, column_stride});
        job.w = o.columns;
        job.stride_f = column_stride;
      }
      kernels.panels({job.w, job.stride_f, d, n, here, o.data, norm, loss, o.scratch});
      for (int64_t j = 0; j < here * kPanelWidth; ++j) {
        const float s = p.scale != nullptr && j < n ? p.scale[f0 + j] : 1.0f;
        norm[j] = std::copysign(norm[j], s);
        loss[j] = std::copysign(loss[j], s);
        floor[j] = std::copysign(underflow, s);
        scale[j] = s;
        bias[j] = p.bias != nullptr && j < n ? p.bias[f0 + j] : 0.0f;
      }
      // Very likely the block that this thread gets next. Columns whose stride is a power of two evict each other from the second-level
      // cache, but only to the third.
      Ahead next{nullptr, 0, 1, 0};
      const int64_t g0 = (unit + threads) * block, m = std::min(block, p.features - g0);
      const char* const from = reinterpret_cast<const char*>(p.weights() + g0 * p.w.stride_f);
      if (m > 0) next = p.by_rows() ? Ahead{from, m, ceil_div(d, 16), p.w.stride_f * 4} : Ahead{from, d, ceil_div(m, 16), p.w.stride_d * 4};
      kernels.screen_topk(screen_rows, {o.data, here, f0, n, norm, loss, floor, p.scale != nullptr ? scale : nullptr, bias}, next, job,
                          buffers[worker]);
    });
    // 3. The selection among what is left, by exact scores.
    for_each_unit_by_worker(threads, rows, [&](int64_t r, int worker) {
      if (exact[r] != 0) return;
      uint64_t* const entries = own[worker].entries;
      const int64_t n = shared.kept[r] = static_cast<int32_t>(kernels.finish_topk(shared, r));
      for (int64_t i = 0; i < n; ++i) entries[i] = entry(shared.score[r * stride + i], shared.feature[r * stride + i]);
      select(p, base + r, entries, n);
    });
    // 4. Rows on which screening decided too little.
    int64_t count = 0;
    for (int64_t r = 0; r < rows; ++r)
      if (exact[r] != 0) list[count++] = static_cast<int32_t>(r);
    if (p.stats != nullptr) {
      p.stats->screened_rows += rows - count;
      p.stats->exact_rows += count;
      for (int64_t r = 0; r < rows; ++r)
        if (exact[r] == 0) p.stats->survivors += shared.kept[r];
    }
    if (p.survived != nullptr)
      for (int64_t r = 0; r < rows; ++r) {
        uint8_t* const row = p.survived + (base + r) * p.features;
        if (exact[r] != 0) {
          std::memset(row, 1, static_cast<size_t>(p.features));
          continue;
        }
        for (int64_t i = 0; i < shared.kept[r]; ++i) row[shared.feature[r * stride + i]] = 1;
      }
    if (count > 0) {
      const int64_t status = dense(kernels, p, xc, base, list, count);
      if (status != kOk) return status;
    }
  }
  if (p.stats != nullptr)
    for (int t = 0; t < threads; ++t) p.stats->scored += *buffers[t].scored;
  return kOk;
}

}  // namespace

int64_t encode_topk(const float* x, int64_t rows, int64_t stride_row, int64_t stride_d, const Matrix& w, int64_t features,
                    const float* bias, const float* b_pre, const float* scale, int64_t k, bool relu, float* values, int64_t* indices,
                    EncodePath path, int threads, EncodeStats* stats, uint8_t* survived) {
  if (stats != nullptr) *stats = {};
  if (rows == 0 || k == 0) return kOk;
  const EncodeKernels& kernels = pick(kTables);
  const Problem p{x, rows, stride_row, stride_d, w, w.d, features, bias, b_pre, scale, k, relu, values, indices, threads, stats, survived};
  const bool can = kernels.screen_topk != nullptr && w.d > 0 && w.d < (int64_t{1} << 20);
  // Measured: with fewer rows, packing costs more than it saves; it is cheaper where columns have to be transposed anyway.
  const bool pays = rows >= (p.by_rows() ? 8 : 4) && w.d >= 32 && features >= 2048 && features >= 32 * k;
  if (can && (path == EncodePath::screen || (path == EncodePath::automatic && pays))) return screened(kernels, p);
  return dense_all(kernels, p);
}

}  // namespace fastsae
