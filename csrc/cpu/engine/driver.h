// The loops of the tile engine (baseline code): chunks of rows, blocks of features, which thread does what. A driver gives the operation;
// its screen (a class of *.isa.cpp, tile.isa.h) decides what a screened product decides.
//
//   int64_t bytes(const Plan&), void take(Workspace&, const Plan&)     its own memory, for all workers
//   void begin(const Chunk&)                                           before the blocks of a chunk
//   void block(const Chunk&, const Block&, int worker)                 features [first, first + count) against the rows of the chunk
//   int64_t end(const Chunk&)                                          after them; a status
#pragma once
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>

#include "cpu/engine/plan.h"
#include "isa.h"
#include "parallel.h"

namespace fastsae {

// Sign bits of the rotation, fixed, the same in every handle and call; signs_size of them.
void rotation_signs(uint32_t* signs, int64_t d);
inline int64_t signs_size(int64_t d) { return round_to(std::max<int64_t>(d, 1), 256); }

// Words of scratch memory to pack rows, or features as well.
inline int64_t scratch_words(int64_t d, int64_t words, bool features) {
  return signs_size(d) + 2 * words + 64 + (features ? 16 * (round_to(words, 16) + 16) : 0);
}

// Whether some rows of a chunk have elements so large that 8-bit steps would be coarse for the others.
bool worth_rotating(const float* xc, int64_t rows, int64_t stride, int64_t d);

// Packs all features of a plan at once: `packed` holds packed_features(w.features) * (plan.words + 3) words.
int64_t pack_all(const Problem& p, const Plan& plan, uint32_t* packed);

// Rows, or features in use, from `first` on in their working form.
inline void load_rows(const Problem& p, int64_t first, int64_t rows, float* to) {
  const int64_t padded = padded_to(p.w.d);
  p.kernels.load({.from = p.x.data,
                  .t = p.x.t,
                  .stride_row = p.x.stride_row,
                  .stride_d = p.x.stride_d,
                  .d = p.w.d,
                  .first = first,
                  .rows = rows,
                  .subtract = p.x.subtract,
                  .eps = p.x.eps,
                  .to = to,
                  .padded = padded,
                  .stride = padded});
}
inline void load_features(const Problem& p, int64_t first, int64_t features, float* to, int64_t stride) {
  p.kernels.load({.from = p.w.data,
                  .t = p.w.t,
                  .stride_row = p.w.stride_f,
                  .stride_d = p.w.stride_d,
                  .d = p.w.d,
                  .first = first,
                  .rows = features,
                  .list = p.w.list,
                  .eps = p.w.eps,
                  .to = to,
                  .padded = padded_to(p.w.d),
                  .stride = stride});
}

// Rows at work: in their working form and, where they are screened, packed with the factors of their bounds.
struct Rows {
  float* xc;
  uint8_t* exact;  // rows whose screened products mean nothing
  uint32_t* words = nullptr;
  float *unit = nullptr, *a = nullptr, *c = nullptr;
  int32_t* start = nullptr;

  static int64_t bytes(const Plan& plan, int64_t rows) {
    return Workspace::size<float>(rows * plan.padded) + Workspace::size<uint8_t>(rows) +
           (plan.screens ? Workspace::size<uint32_t>(rows * plan.row_words(plan.words_most)) + 4 * Workspace::size<float>(rows) : 0);
  }
  static Rows take(Workspace& space, const Plan& plan, int64_t rows) {
    Rows taken{.xc = space.take<float>(rows * plan.padded), .exact = space.take<uint8_t>(rows)};
    if (!plan.screens) return taken;
    taken.words = space.take<uint32_t>(rows * plan.row_words(plan.words_most));
    for (float** factors : {&taken.unit, &taken.a, &taken.c}) *factors = space.take<float>(rows);
    taken.start = space.take<int32_t>(rows);
    return taken;
  }
  // Rows [from, to), a tile.
  void pack(const Problem& p, const Plan& plan, int64_t from, int64_t to, const uint32_t* signs, uint32_t* scratch) const {
    p.kernels.pack_rows[static_cast<int>(plan.format)]({.xc = xc + from * plan.padded,
                                                        .padded = plan.padded,
                                                        .d = p.w.d,
                                                        .height = static_cast<int>(to - from),
                                                        .rotation = plan.rotation,
                                                        .wide = plan.wide,
                                                        .signs = signs,
                                                        .words = words + from * plan.row_words(plan.words),
                                                        .unit = unit + from,
                                                        .start = start + from,
                                                        .a = a + from,
                                                        .c = c + from,
                                                        .exact = exact + from,
                                                        .scratch = reinterpret_cast<float*>(scratch)});
  }
  ScreenRows screened(const Plan& plan, int64_t rows) const {
    const int tiles = static_cast<int>(ceil_div(rows, kTileRows));
    const int64_t each = plan.row_words(plan.words);
    return {.data = words, .rows = rows, .words = each, .tiles = tiles, .unit = unit, .start = start, .a = a, .c = c};
  }
};

struct Chunk {
  const Plan& plan;
  int64_t base, rows;
  const float* xc;
  uint8_t* exact;  // rows whose screened products mean nothing
};

struct Block {
  int64_t first, count;
  ScreenPanels panels;
  ScoreJob job;
  ScreenRows rows{};
  Prefetch next{};
};

// A worker's undecided features of a block.
inline int64_t undecided_bytes(int64_t rows, int64_t stride) {
  return 3 * Workspace::size<float>(rows * stride) + Workspace::size<int32_t>(rows);
}
inline Undecided take_undecided(Workspace& space, int64_t rows, int64_t stride) {
  const Undecided taken{.lo = space.take<float>(rows * stride),
                        .hi = space.take<float>(rows * stride),
                        .id = space.take<int32_t>(rows * stride),
                        .n = space.take<int32_t>(rows),
                        .stride = stride};
  std::memset(taken.n, 0, static_cast<size_t>(rows) * sizeof(int32_t));
  return taken;
}

// A term of features [first, first + count) in use, then up to `all` of them `none`, as all are where there is no such term.
inline void gather(const float* terms, const int32_t* list, int64_t first, int64_t count, int64_t all, float none, float* to) {
  if (terms == nullptr) count = 0;
  for (int64_t j = 0; j < count; ++j) to[j] = terms[list != nullptr ? list[first + j] : first + j];
  std::fill(to + count, to + all, none);
}

// (9) of bound.h: a feature's terms of the bound carry the sign of its scale.
inline void sign_bounds(const float* norms, const float* losses, float underflow, const float* scale, int64_t n, float* norm, float* loss,
                        float* floor) {
  for (int64_t j = 0; j < n; ++j) {
    norm[j] = std::copysign(norms[j], scale[j]);
    loss[j] = std::copysign(losses[j], scale[j]);
    floor[j] = std::copysign(underflow, scale[j]);
  }
}

// What a worker of run_engine needs for a block of features.
struct BlockMemory {
  float* terms;       // 7 a feature: those of the bound, of packing and of the score
  float* rows;        // fp32 rows, where features are not used as they are
  uint32_t* scratch;  // the rest where the plan screens
  uint32_t* data;     // packed here, unless there is a handle
};

// Block `index` of a chunk, packed where the plan screens and no handle is given.
inline Block make_block(const Problem& p, const Plan& plan, const Rows& at_work, int64_t rows, const uint32_t* signs, const BlockMemory& o,
                        int64_t index) {
  const Weights& w = p.w;
  const int64_t d = w.d, block = plan.block, f0 = index * block, n = std::min(block, w.features - f0), all = round_to(n, kPanelWidth);
  const int panels = static_cast<int>(all / kPanelWidth);
  float *const norm = o.terms, *const loss = norm + block, *const floor = loss + block, *const step = floor + block;
  float *const scale = step + block, *const bias = scale + block, *const extra = bias + block;
  Block b{.first = f0,
          .count = n,
          .panels = {.data = o.data,
                     .words = plan.words,
                     .panels = panels,
                     .first = f0,
                     .features = n,
                     .norm = norm,
                     .loss = loss,
                     .floor = floor,
                     .unit = step,
                     .scale = p.scale != nullptr ? scale : nullptr,
                     .bias = bias,
                     .extra = extra},
          .job = {.xc = at_work.xc, .padded = plan.padded, .d = d, .w = w.data, .t = w.t, .stride_f = w.stride_f, .list = w.list}};
  if (o.rows != nullptr) {
    load_features(p, f0, n, o.rows, plan.row_stride);
    b.job.w = o.rows;
    b.job.t = Dtype::f32;
    b.job.stride_f = plan.row_stride;
    b.job.first = -f0;
    b.job.list = nullptr;
  }
  gather(p.scale, w.list, f0, n, all, 1, scale);
  gather(p.bias, w.list, f0, n, all, 0, bias);
  gather(p.extra, w.list, f0, n, all, 0, extra);
  if (!plan.screens) return b;
  const bool in_place = plan.packed != nullptr;
  if (in_place) {
    b.panels.data = plan.packed + f0 * plan.words;
    const int64_t count = packed_features(w.features);
    const float* const facts = reinterpret_cast<const float*>(plan.packed + count * plan.words) + f0;
    std::copy_n(facts, all, norm);
    std::copy_n(facts + count, all, loss);
    std::copy_n(facts + 2 * count, all, step);
  } else {
    p.kernels.pack_features[static_cast<int>(plan.format)]({.w = b.job.w,
                                                            .t = b.job.t,
                                                            .stride_f = b.job.stride_f,
                                                            .d = d,
                                                            .first = b.job.first + f0,
                                                            .features = n,
                                                            .list = b.job.list,
                                                            .panels = panels,
                                                            .rotation = plan.rotation,
                                                            .signs = signs,
                                                            .data = o.data,
                                                            .norm = norm,
                                                            .loss = loss,
                                                            .unit = step,
                                                            .scratch = o.scratch});
  }
  sign_bounds(norm, loss, underflow_of(plan.format, d), scale, all, norm, loss, floor);
  b.rows = at_work.screened(plan, rows);
  // Very likely the block that this thread gets next. Columns whose stride is a power of two evict each other from the second-level cache,
  // but only to the third.
  const int64_t g0 = f0 + block, m = std::min(block, w.features - g0), size = size_of(w.t);
  if (m <= 0) return b;
  if (in_place)
    b.next = {reinterpret_cast<const char*>(plan.packed + g0 * plan.words), 1, round_to(m, kPanelWidth) * plan.words / 16, 0};
  else if (w.list == nullptr && by_rows(w))
    b.next = {static_cast<const char*>(w.data) + g0 * w.stride_f * size, m, ceil_div(d * size, 64), w.stride_f * size};
  else if (w.list == nullptr && w.stride_f == 1)
    b.next = {static_cast<const char*>(w.data) + g0 * size, d, ceil_div(m * size, 64), w.stride_d * size};
  return b;
}

template <class Driver>
int64_t run_engine(const Problem& p, Plan plan, Driver& driver) {
  const int64_t d = p.w.d, chunk = plan.chunk, terms = 7 * plan.block;
  const int threads = plan.threads;
  const bool float_rows = plan.copied || (!plan.screens && p.w.t != Dtype::f32);
  // Nothing of what is not needed: a size of 0 takes no memory.
  const int64_t signs_taken = plan.screens ? signs_size(d) : 0, rows_taken = float_rows ? plan.block * plan.row_stride : 0;
  const int64_t scratch_taken = plan.screens ? scratch_words(d, plan.words_most, true) : 0;
  const int64_t data_taken = plan.screens && plan.packed == nullptr ? plan.block * plan.words_most : 0;
  const int64_t bytes = Rows::bytes(plan, chunk) + driver.bytes(plan) + Workspace::size<uint32_t>(signs_taken) +
                        threads * (Workspace::size<float>(terms) + Workspace::size<float>(rows_taken) +
                                   Workspace::size<uint32_t>(scratch_taken) + Workspace::size<uint32_t>(data_taken));
  Workspace space(static_cast<size_t>(bytes));
  if (!space.ok()) return kNoMemory;
  note_workspace(p.stats, bytes);
  const Rows at_work = Rows::take(space, plan, chunk);
  uint32_t* const signs = space.take<uint32_t>(signs_taken);
  if (plan.screens) rotation_signs(signs, d);
  BlockMemory own[kMostWorkers];
  for (int t = 0; t < threads; ++t)
    own[t] = {.terms = space.take<float>(terms),
              .rows = float_rows ? space.take<float>(rows_taken) : nullptr,
              .scratch = space.take<uint32_t>(scratch_taken),
              .data = space.take<uint32_t>(data_taken)};
  driver.take(space, plan);

  std::atomic<bool> failed{false};
  for (int64_t base = 0; base < p.x.rows; base += chunk) {
    const int64_t rows = std::min(chunk, p.x.rows - base), tiles = ceil_div(rows, kTileRows);
    std::memset(at_work.exact, 0, static_cast<size_t>(rows));
    // 1. Rows in their working form, and packed with the factors of their bounds.
    const auto each_tile = [&](const auto& body) {
      for_each_unit_by_worker(useful_threads(threads, rows * d), tiles,
                              [&](int64_t t, int worker) { body(rows * t / tiles, rows * (t + 1) / tiles, worker); });
    };
    each_tile([&](int64_t r0, int64_t r1, int) { load_rows(p, base + r0, r1 - r0, at_work.xc + r0 * plan.padded); });
    if (plan.screens) {
      const bool rotated =
          plan.format == ScreenFormat::int8 && (plan.packed != nullptr || worth_rotating(at_work.xc, rows, plan.padded, d));
      plan.rotation = rotated ? rotation_of(d) : 1;
      plan.words = words_of(plan.format, d, plan.rotation);
      each_tile([&](int64_t r0, int64_t r1, int worker) { at_work.pack(p, plan, r0, r1, signs, own[worker].scratch); });
    }
    const Chunk now{plan, base, rows, at_work.xc, at_work.exact};
    driver.begin(now);
    // 2. Features, a block at a time: packed into the cache of the thread that screens them against all rows, and scores what screening
    //    leaves undecided.
    for_each_unit_by_worker(threads, plan.blocks, [&](int64_t index, int worker) {
      const Block b = make_block(p, plan, at_work, rows, signs, own[worker], index);
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

constexpr int kUnscreened = 15;  // blocks, or groups of rows, that a worker does not screen after one where that decided too little

constexpr int64_t kPackOnceBytes = int64_t{32} << 20;
constexpr int64_t kRangesAThread = 4;  // a slow thread leaves ranges to the others

// Runs one driver, or one for each range of rows: make(first row) returns a driver whose chunks count rows from there. Ranges are for
// too few blocks of features to occupy the threads, and for many chunks of features that are packed before: threads then meet once at the
// end, not three times a chunk, which on a machine that others use as well costs a turn of the scheduler each. Features are packed once
// where several chunks or ranges would each do it.
template <class Make>
int64_t run_by_rows(const Problem& p, Plan plan, const Make& make) {
  const int64_t rows = p.x.rows, words = packed_features(p.w.features) * (plan.words_most + 3), bytes = 4 * words;
  const bool once = plan.screens && plan.packed == nullptr && bytes <= kPackOnceBytes && rows > plan.chunk / 2;
  Workspace space(once ? static_cast<size_t>(bytes) : 64);
  if (!space.ok()) return kNoMemory;
  if (once) {
    uint32_t* const packed = space.take<uint32_t>(words);
    const int64_t status = pack_all(p, plan, packed);
    if (status != kOk) return status;
    plan.packed = packed;
    if (p.stats != nullptr) p.stats->workspace += bytes;
  }
  const int64_t chunks = rows / std::max<int64_t>(plan.chunk, 1);
  const bool many = plan.packed != nullptr && chunks >= 2 * p.threads;
  if (p.threads <= 1 || (plan.blocks >= 2 * p.threads && !many)) return run_engine(p, plan, *make(0));
  plan.threads = 1;
  const int64_t parts =
      many ? std::min<int64_t>(chunks, kRangesAThread * p.threads)
           : std::clamp<int64_t>(useful_threads(p.threads, rows * p.w.features * p.w.d), 1, std::max<int64_t>(rows / kTileRows, 1));
  std::atomic<int64_t> status{kOk};
  for_each_unit(p.threads, parts, [&](int64_t part) {
    const int64_t r0 = rows * part / parts;
    Problem own = p;
    own.x.data = static_cast<const char*>(p.x.data) + r0 * p.x.stride_row * size_of(p.x.t);
    own.x.rows = rows * (part + 1) / parts - r0;
    if (part != 0) own.stats = nullptr;  // all need as much memory
    Plan mine = plan;
    mine.chunk = std::min(plan.chunk, own.x.rows);
    const int64_t done = run_engine(own, mine, *make(r0));
    if (done != kOk) status = done;
  });
  return status;
}

}  // namespace fastsae
