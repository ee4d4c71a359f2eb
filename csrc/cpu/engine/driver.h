// The driver of the tile engine (baseline code): chunks of rows, blocks of features, which thread does what. A driver gives the
// operation.
//
//   int64_t bytes(const Plan&), void take(Workspace&, const Plan&)     its own memory, for all workers
//   void begin(const Chunk&)                                           before the blocks of a chunk
//   void block(const Chunk&, const Block&, int worker)                 features [first, first + count) against the rows of the chunk
//   int64_t end(const Chunk&)                                          after them; a status
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#include "cpu/engine/kernels.h"
#include "fastsae.h"
#include "isa.h"
#include "parallel.h"
#include "workspace.h"

namespace fastsae {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t size_of(Dtype t) { return t == Dtype::f32 ? 4 : 2; }

const EngineKernels& engine_kernels();
// Sign bits of the rotation for [0, size): fixed, the same in every handle and call.
void rotation_signs(uint32_t* signs, int64_t size);

constexpr int64_t kChunkRows = 1024;
constexpr int64_t kLeastChunk = 64;
constexpr int64_t kBufferBytes = int64_t{64} << 20;
constexpr int64_t kPackedBytes = int64_t{256} << 10;   // packed panels at work, a thread
constexpr int64_t kRawBytes = int64_t{704} << 10;      // they and the features they are made of, where they are made in the call
constexpr int64_t kColumnBytes = int64_t{2560} << 10;  // the same for a strided W: each of its rows costs a page walk a block
constexpr int kMostPanels = 8;
constexpr int kMostWorkers = 256;

// Per-feature terms of a score, in the order of the dictionary. Null where there is none.
struct Terms {
  const float* scale;
  const float* bias;
  const float* extra;
};

struct Plan {
  ScreenFormat format;
  bool screens;
  bool copied;  // features are brought to fp32 rows block by block
  int rotation;
  int64_t words, words_most;
  int panels;
  int64_t block, blocks;
  int threads;
  int64_t chunk, padded, row_stride;
  const uint32_t* packed;  // all features, in this number and rotation; null: each block is packed where it is used
};

struct Chunk {
  const Plan& plan;
  int64_t base, rows;
  const float* xc;
  uint8_t* exact;  // rows whose screened products mean nothing
};

struct Block {
  int64_t first, count;
  ScreenRows rows;
  ScreenPanels panels;
  Prefetch next;
  ScoreJob job;
};

// Whether features can be read in place, a row after another.
inline bool by_rows(const Weights& w) { return w.stride_d == 1 || w.d <= 1; }

inline Plan make_plan(const EngineKernels& kernels, const Activations& x, const Weights& w, ScreenFormat format, bool screens, int threads,
                      int64_t bytes_a_row) {
  Plan p{};
  const int64_t d = w.d;
  p.format = format;
  p.screens = screens && kernels.pack_features[static_cast<int>(format)] != nullptr && d > 0 &&
              d <= (format == ScreenFormat::exact ? kShortRow : 65535);
  const bool plain = by_rows(w) && w.eps == 0;
  p.copied = !plain;
  p.rotation = format == ScreenFormat::int8 ? rotation_of(d) : 1;
  p.words = p.words_most = words_of(format, d, p.rotation);
  const int64_t panel_bytes = p.words_most * kPanelWidth * 4, raw = kPanelWidth * round_to(std::max<int64_t>(d, 1), 16);
  const bool packed = format == ScreenFormat::int8 && w.packed != nullptr && w.list == nullptr && plain;
  const int64_t fit = packed     ? kPackedBytes / panel_bytes
                      : p.copied ? kColumnBytes / (panel_bytes + raw * 4)
                                 : kRawBytes / (panel_bytes + raw * size_of(w.t));
  p.panels = p.screens ? static_cast<int>(std::clamp<int64_t>(fit, 1, kMostPanels)) : kMostPanels;
  p.block = static_cast<int64_t>(p.panels) * kPanelWidth;
  p.blocks = ceil_div(w.features, p.block);
  p.threads = static_cast<int>(std::min<int64_t>({threads, std::max<int64_t>(p.blocks, 1), kMostWorkers}));
  p.padded = round_to(std::max<int64_t>(d, 1), 32);
  p.row_stride = p.padded + 16;  // not a power of two
  const int64_t rows = kBufferBytes / std::max<int64_t>(bytes_a_row + 12 * (p.block + 16) * p.threads, 1);
  p.chunk = std::min(x.rows, std::clamp(rows, kLeastChunk, kChunkRows));
  p.packed = packed && p.screens ? w.packed : nullptr;
  return p;
}

// (5) of tile.isa.h: what a screened product may lose to underflow.
inline float underflow_of(ScreenFormat format, int64_t d) {
  if (format == ScreenFormat::exact) return 0;
  return static_cast<float>(4 * d + 128) * 0x1p-126f + (format == ScreenFormat::int8 ? 0x1p-94f : 0.0f);
}

// (9) of tile.isa.h: a feature's terms of the bound carry the sign of its scale.
inline void sign_bounds(const float* norms, const float* losses, float underflow, const float* scale, int64_t n, float* norm, float* loss,
                        float* floor) {
  for (int64_t j = 0; j < n; ++j) {
    norm[j] = std::copysign(norms[j], scale[j]);
    loss[j] = std::copysign(losses[j], scale[j]);
    floor[j] = std::copysign(underflow, scale[j]);
  }
}

// Whether some rows of a chunk have elements so large that 8-bit steps would be coarse for the others.
bool worth_rotating(const float* xc, int64_t rows, int64_t stride, int64_t d);

template <class Driver>
int64_t run_engine(const EngineKernels& kernels, const Activations& x, const Weights& w, const Terms& terms, Plan plan, int64_t* workspace,
                   Driver& driver) {
  const int format = static_cast<int>(plan.format);
  const int64_t d = w.d, chunk = plan.chunk, padded = plan.padded, block = plan.block;
  const int threads = plan.threads;
  const bool in_place = plan.packed != nullptr;
  const bool float_rows = plan.copied || (!plan.screens && w.t != Dtype::f32);
  const int64_t rotated = round_to(std::max<int64_t>(d, 1), 256);
  const int64_t scratch_words = 16 * (round_to(plan.words_most, 16) + 16) + rotated + plan.words_most + 64;
  const int64_t meta = 7 * block;
  int64_t bytes = Workspace::size<float>(chunk * padded) + Workspace::size<uint8_t>(chunk) + driver.bytes(plan);
  if (plan.screens)
    bytes += Workspace::size<uint32_t>(chunk * plan.words_most) + 4 * Workspace::size<float>(chunk) + Workspace::size<uint32_t>(rotated);
  bytes += threads * (Workspace::size<float>(meta) + (float_rows ? Workspace::size<float>(block * plan.row_stride) : 0) +
                      (plan.screens ? Workspace::size<uint32_t>(scratch_words) +
                                          (in_place ? 0 : Workspace::size<uint32_t>(plan.panels * plan.words_most * kPanelWidth))
                                    : 0));
  Workspace space(static_cast<size_t>(bytes));
  if (!space.ok()) return kNoMemory;
  if (workspace != nullptr) *workspace = std::max(*workspace, bytes);
  float* const xc = space.take<float>(chunk * padded);
  uint8_t* const exact = space.take<uint8_t>(chunk);
  uint32_t* words = nullptr;
  uint32_t* signs = nullptr;
  float *unit = nullptr, *a = nullptr, *c = nullptr;
  int32_t* start = nullptr;
  if (plan.screens) {
    words = space.take<uint32_t>(chunk * plan.words_most);
    unit = space.take<float>(chunk);
    start = space.take<int32_t>(chunk);
    a = space.take<float>(chunk);
    c = space.take<float>(chunk);
    signs = space.take<uint32_t>(rotated);
    rotation_signs(signs, rotated);
  }
  struct Own {
    float* meta;
    float* rows;
    uint32_t* scratch;
    uint32_t* data;
  };
  Own own[kMostWorkers];
  for (int t = 0; t < threads; ++t) {
    own[t].meta = space.take<float>(meta);
    own[t].rows = float_rows ? space.take<float>(block * plan.row_stride) : nullptr;
    own[t].scratch = plan.screens ? space.take<uint32_t>(scratch_words) : nullptr;
    own[t].data = plan.screens && !in_place ? space.take<uint32_t>(plan.panels * plan.words_most * kPanelWidth) : nullptr;
  }
  driver.take(space, plan);
  const float underflow = underflow_of(plan.format, d);
  const int64_t packed_count = packed_features(w.features);

  std::atomic<bool> failed{false};
  for (int64_t base = 0; base < x.rows; base += chunk) {
    const int64_t rows = std::min(chunk, x.rows - base);
    const int tiles = static_cast<int>(ceil_div(rows, kTileRows));
    std::memset(exact, 0, static_cast<size_t>(rows));
    // 1. Rows in their working form, and packed with the factors of their bounds.
    for_each_unit(useful_threads(threads, rows * d), tiles, [&](int64_t t) {
      const int64_t r0 = rows * t / tiles, r1 = rows * (t + 1) / tiles;
      kernels.load(
          {x.data, x.t, x.stride_row, x.stride_d, d, base + r0, r1 - r0, nullptr, x.subtract, x.eps, xc + r0 * padded, padded, padded});
    });
    if (plan.screens) {
      plan.rotation = plan.format == ScreenFormat::int8 && (in_place || worth_rotating(xc, rows, padded, d)) ? rotation_of(d) : 1;
      plan.words = words_of(plan.format, d, plan.rotation);
      for_each_unit_by_worker(useful_threads(threads, rows * d), tiles, [&](int64_t t, int worker) {
        const int64_t r0 = rows * t / tiles, r1 = rows * (t + 1) / tiles;
        kernels.pack_rows[format]({xc + r0 * padded, padded, d, static_cast<int>(r1 - r0), plan.rotation, signs, words + r0 * plan.words,
                                   unit + r0, start + r0, a + r0, c + r0, exact + r0, reinterpret_cast<float*>(own[worker].scratch)});
      });
    }
    const Chunk now{plan, base, rows, xc, exact};
    driver.begin(now);
    // 2. Features, a block at a time: packed into the cache of the thread that screens them against all rows, and scores what screening
    //    leaves undecided.
    for_each_unit_by_worker(threads, plan.blocks, [&](int64_t index, int worker) {
      const Own& o = own[worker];
      const int64_t f0 = index * block, n = std::min(block, w.features - f0);
      const int panels = static_cast<int>(ceil_div(n, kPanelWidth));
      float* const norm = o.meta;
      float* const loss = norm + block;
      float* const floor = loss + block;
      float* const step = floor + block;
      float* const scale = step + block;
      float* const bias = scale + block;
      float* const extra = bias + block;
      Block b{f0, n, {}, {}, {}, {xc, padded, d, w.data, w.t, w.stride_f, 0, w.list}};
      if (float_rows) {
        kernels.load({w.data, w.t, w.stride_f, w.stride_d, d, f0, n, w.list, nullptr, w.eps, o.rows, padded, plan.row_stride});
        b.job = {xc, padded, d, o.rows, Dtype::f32, plan.row_stride, -f0, nullptr};
      }
      for (int64_t j = 0; j < n; ++j) {
        const int64_t f = w.list != nullptr ? w.list[f0 + j] : f0 + j;
        scale[j] = terms.scale != nullptr ? terms.scale[f] : 1.0f;
        bias[j] = terms.bias != nullptr ? terms.bias[f] : 0.0f;
        extra[j] = terms.extra != nullptr ? terms.extra[f] : 0.0f;
      }
      const uint32_t* data = o.data;
      if (plan.screens) {
        const int64_t all = static_cast<int64_t>(panels) * kPanelWidth;
        for (int64_t j = n; j < all; ++j) {
          scale[j] = 1;
          bias[j] = extra[j] = 0;
        }
        if (in_place) {
          data = plan.packed + f0 * plan.words;
          const float* const facts = reinterpret_cast<const float*>(plan.packed + packed_count * plan.words);
          std::memcpy(norm, facts + f0, static_cast<size_t>(all) * sizeof(float));
          std::memcpy(loss, facts + packed_count + f0, static_cast<size_t>(all) * sizeof(float));
          std::memcpy(step, facts + 2 * packed_count + f0, static_cast<size_t>(all) * sizeof(float));
        } else {
          kernels.pack_features[format]({b.job.w, b.job.t, b.job.stride_f, d, b.job.first + f0, n, b.job.list, panels, plan.rotation, signs,
                                         o.data, norm, loss, step, o.scratch});
        }
        sign_bounds(norm, loss, underflow, scale, all, norm, loss, floor);
        // Very likely the block that this thread gets next. Columns whose stride is a power of two evict each other from the second-level
        // cache, but only to the third.
        const int64_t g0 = f0 + threads * block, m = std::min(block, w.features - g0);
        if (m > 0 && in_place) {
          b.next = {reinterpret_cast<const char*>(plan.packed + g0 * plan.words), 1,
                    ceil_div(m, kPanelWidth) * kPanelWidth * plan.words / 16, 0};
        } else if (m > 0 && w.list == nullptr) {
          const int64_t size = size_of(w.t);
          if (by_rows(w))
            b.next = {static_cast<const char*>(w.data) + g0 * w.stride_f * size, m, ceil_div(d * size, 64), w.stride_f * size};
          else if (w.stride_f == 1)
            b.next = {static_cast<const char*>(w.data) + g0 * size, d, ceil_div(m * size, 64), w.stride_d * size};
        }
        b.rows = {words, rows, plan.words, tiles, unit, start, a, c};
      }
      b.panels = {data, plan.words, panels, f0, n, norm, loss, floor, step, terms.scale != nullptr ? scale : nullptr, bias, extra};
      try {
        driver.block(now, b, worker);
      } catch (const std::bad_alloc&) {  // an exception must not leave a thread of the pool
        failed = true;
      }
    });
    if (failed) return kNoMemory;
    // 3. Selection.
    const int64_t status = driver.end(now);
    if (status != kOk) return status;
  }
  return kOk;
}

// Packs all features of a plan at once: `packed` holds packed_features(w.features) * (plan.words + 3) words.
int64_t pack_all(const EngineKernels& kernels, const Weights& w, const Plan& plan, uint32_t* packed, int threads);

constexpr int64_t kPackOnceBytes = int64_t{32} << 20;
constexpr int64_t kRangesAThread = 4;  // a slow thread leaves ranges to the others

// Runs one driver, or one for each range of rows: make(first row) returns a driver whose chunks count rows from there. Ranges are for
// too few blocks of features to occupy the threads, and for many chunks of features that are packed before: threads then meet once at the
// end, not three times a chunk, which on a machine that others use as well costs a turn of the scheduler each. Features are packed once
// where several chunks or ranges would each do it.
template <class Make>
int64_t run_by_rows(const EngineKernels& kernels, const Activations& x, const Weights& w, const Terms& terms, Plan plan, int threads,
                    int64_t* workspace, const Make& make) {
  const auto bytes = static_cast<int64_t>(packed_features(w.features) * (plan.words_most + 3) * 4);
  const bool once = plan.screens && plan.packed == nullptr && bytes <= kPackOnceBytes && x.rows > plan.chunk / 2;
  Workspace space(once ? static_cast<size_t>(bytes) : 64);
  if (!space.ok()) return kNoMemory;
  if (once) {
    uint32_t* const packed = space.take<uint32_t>(bytes / 4);
    const int64_t status = pack_all(kernels, w, plan, packed, threads);
    if (status != kOk) return status;
    plan.packed = packed;
    if (workspace != nullptr) *workspace += bytes;
  }
  const int64_t chunks = x.rows / std::max<int64_t>(plan.chunk, 1);
  const bool many = plan.packed != nullptr && chunks >= 2 * threads;
  const bool split = threads > 1 && (plan.blocks < 2 * threads || many);
  if (!split) {
    auto driver = make(0);
    return run_engine(kernels, x, w, terms, plan, workspace, *driver);
  }
  plan.threads = 1;
  const int64_t parts =
      many ? std::min<int64_t>(chunks, kRangesAThread * threads)
           : std::clamp<int64_t>(useful_threads(threads, x.rows * w.features * w.d), 1, std::max<int64_t>(x.rows / kTileRows, 1));
  std::atomic<int64_t> status{kOk};
  for_each_unit(threads, parts, [&](int64_t part) {
    const int64_t r0 = x.rows * part / parts, r1 = x.rows * (part + 1) / parts;
    Activations own = x;
    own.data = static_cast<const char*>(x.data) + r0 * x.stride_row * size_of(x.t);
    own.rows = r1 - r0;
    Plan mine = plan;
    mine.chunk = std::min(plan.chunk, own.rows);
    auto driver = make(r0);
    const int64_t done = run_engine(kernels, own, w, terms, mine, part == 0 ? workspace : nullptr, *driver);
    if (done != kOk) status = done;
  });
  return status;
}

}  // namespace fastsae
