// Sparse decode and its two gradients: argument checks, the sort, packing, and which thread does what. The sums are in decode.isa.cpp.
#include "cpu/decode.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "cpu/slots.h"
#include "fastsae.h"
#include "integers.h"
#include "isa.h"
#include "parallel.h"
#include "workspace.h"

namespace fastsae {
namespace {

const DecodeKernels* const kTables[kLevels] = FASTSAE_BASE_TABLES(decode_kernels);

constexpr int64_t kStreamBytes = int64_t{16} << 20;  // an output beyond this leaves the caches anyway
constexpr int64_t kScatterColumns = 64;

int64_t element_size(Dtype t) { return t == Dtype::f32 ? 4 : 2; }

void* at(void* p, int64_t elements, Dtype t) { return static_cast<char*>(p) + elements * element_size(t); }
const void* at(const void* p, int64_t elements, Dtype t) { return static_cast<const char*>(p) + elements * element_size(t); }

template <class I>
int64_t first_bad_index(const I* indices, int64_t n, int64_t features) {
  // Blocks without a branch inside; only a bad block is searched.
  const uint64_t limit = static_cast<uint64_t>(features);
  for (int64_t begin = 0; begin < n; begin += 256) {
    const int64_t end = std::min(begin + 256, n);
    bool bad = false;
    for (int64_t i = begin; i < end; ++i) bad |= static_cast<uint64_t>(static_cast<int64_t>(indices[i])) >= limit;
    if (!bad) continue;
    for (int64_t i = begin; i < end; ++i)
      if (static_cast<uint64_t>(static_cast<int64_t>(indices[i])) >= limit) return i;
  }
  return kOk;
}

// body(indices) with their type.
template <class Body>
auto with_indices(const Slots& s, const Body& body) {
  return s.index == Index::i32 ? body(static_cast<const int32_t*>(s.indices)) : body(static_cast<const int64_t*>(s.indices));
}

template <class Visit>
void for_each_slot(const Slots& s, const Visit& visit) {
  with_indices(s, [&](const auto* indices) {
    for (int64_t i = 0; i < s.n; ++i) visit(i, static_cast<int64_t>(indices[i]));
  });
}

// The row that owns slot i.
int64_t row_of(const Slots& s, int64_t i) {
  if (s.crow == nullptr) return i / s.k;
  return std::upper_bound(s.crow, s.crow + s.rows + 1, i) - s.crow - 1;
}

// body(r, s0, s1) for every maximal run of slots of one row within [s0, s1).
template <class Body>
void for_each_row_run(const Slots& s, int64_t s0, int64_t s1, const Body& body) {
  if (s0 >= s1) return;
  for (int64_t r = row_of(s, s0); s0 < s1; ++r) {
    const int64_t end = std::min(s1, s.crow != nullptr ? s.crow[r + 1] : (r + 1) * s.k);
    if (s0 < end) body(r, s0, end);
    s0 = std::max(s0, end);
  }
}

// Sums rows [0, rows) x columns [0, d), in units of some rows; of some columns too where rows are few.
void sum_all(const DecodeKernels& kernels, Dtype t, Index index, const SumJob& job, int64_t rows, int64_t d, int threads) {
  if (rows == 0 || d == 0) return;
  const auto run = kernels.sum[static_cast<int>(t)][static_cast<int>(index)];
  threads = useful_threads(threads, (job.n + rows) * d);
  if (threads <= 1) return run(job, 0, rows, 0, d);
  const int64_t slices = rows >= 4 * threads ? 1 : std::max<int64_t>(1, std::min(ceil_div(4 * threads, rows), d / 256));
  const int64_t width = ceil_div(ceil_div(d, slices), 64) * 64;
  const int64_t height = std::max<int64_t>(1, rows / (16 * threads));
  const int64_t across = ceil_div(d, width);
  for_each_unit(threads, ceil_div(rows, height) * across, [&](int64_t unit) {
    const int64_t r0 = unit / across * height, d0 = unit % across * width;
    run(job, r0, std::min(r0 + height, rows), d0, std::min(d0 + width, d));
  });
}

// A strided W, packed one panel of columns at a time. Features are renumbered to those in use, unless most of them are.
// Several panels are in work at once, each by one thread, as far as kPanelBytes allow; beyond that all threads share one panel, with
// two barriers a panel.
constexpr int64_t kPanelBytes = int64_t{64} << 20;
struct Panels {
  const DecodeKernels& kernels;
  const Matrix& w;
  Dtype t;
  int at_once;              // 1: shared by all threads
  int64_t packed_at_most;   // features
  int64_t count = 0;        // features packed
  int64_t* used = nullptr;  // [count] their numbers, ascending; null: all
  int32_t* slot = nullptr;  // [n] the packed feature of each slot
  char* memory = nullptr;   // [at_once, count, kPanel]

  Panels(const DecodeKernels& kernels, const Slots& s, const Matrix& w, Dtype t, int threads, bool one_each)
      : kernels(kernels), w(w), t(t), packed_at_most(s.n >= s.features / 2 ? s.features : s.n) {
    const int64_t at_most = std::min<int64_t>(threads, panels());
    at_once = one_each && at_most * panel_bytes() <= kPanelBytes ? static_cast<int>(at_most) : 1;
  }

  int64_t panels() const { return ceil_div(w.d, kPanel); }
  int64_t width(int64_t p) const { return std::min(kPanel, w.d - p * kPanel); }
  int64_t panel_bytes() const { return packed_at_most * kPanel * element_size(t); }
  char* panel(int worker) const { return memory + worker * panel_bytes(); }
  size_t bytes(const Slots& s) const {
    return Workspace::size<int32_t>(s.features) + Workspace::size<int64_t>(std::min(s.n, s.features)) + Workspace::size<int32_t>(s.n) +
           Workspace::size<char>(at_once * panel_bytes());
  }

  void prepare(const Slots& s, Workspace& space) {
    int32_t* const number = space.take<int32_t>(s.features);
    int64_t* const list = space.take<int64_t>(std::min(s.n, s.features));
    slot = space.take<int32_t>(s.n);
    memory = space.take<char>(at_once * panel_bytes());
    std::memset(number, 0, static_cast<size_t>(s.features) * sizeof(int32_t));
    for_each_slot(s, [&](int64_t, int64_t f) { number[f] = 1; });
    for (int64_t f = 0; f < s.features; ++f) {
      if (number[f] == 0) continue;
      list[count] = f;
      number[f] = static_cast<int32_t>(count++);
    }
    if (packed_at_most == s.features && count >= s.features / 4) {  // reading everything is faster than picking a part of it
      count = s.features;
      for_each_slot(s, [&](int64_t i, int64_t f) { slot[i] = static_cast<int32_t>(f); });
    } else {
      used = list;
      for_each_slot(s, [&](int64_t i, int64_t f) { slot[i] = number[f]; });
    }
  }

  void pack(int64_t p, char* to, int threads) const {
    const PackJob job{w.data, w.stride_f, w.stride_d, p * kPanel, width(p), used, to};
    constexpr int64_t kRows = 1024;
    for_each_unit(useful_threads(threads, count * kPanel), ceil_div(count, kRows),
                  [&](int64_t unit) { kernels.pack[static_cast<int>(t)](job, unit * kRows, std::min((unit + 1) * kRows, count)); });
  }

  // body(panel number, packed panel, threads left for it)
  template <class Body>
  void for_each(int threads, const Body& body) const {
    const int inside = at_once > 1 ? 1 : threads;
    for_each_unit_by_worker(at_once, panels(), [&](int64_t p, int worker) {
      pack(p, panel(worker), inside);
      body(p, panel(worker), inside);
    });
  }
};

}  // namespace

int64_t check(const Slots& s) {
  if (s.crow != nullptr) {
    if (s.crow[0] != 0) return crow_error(0);
    for (int64_t r = 0; r < s.rows; ++r)
      if (s.crow[r + 1] < s.crow[r] || s.crow[r + 1] > s.n) return crow_error(r + 1);
    if (s.crow[s.rows] != s.n) return crow_error(s.rows);
  }
  return with_indices(s, [&](const auto* indices) { return first_bad_index(indices, s.n, s.features); });
}

const DecodeKernels& pick_decode_kernels() { return pick(kTables); }

// Ranges of slots that are sorted at the same time: each counts every feature, so slots must outnumber the counts.
int64_t FeatureMajor::parts(const Slots& slots, int threads) {
  constexpr int64_t kGrain = 32768;
  const int64_t paid = std::min(slots.n / kGrain, 2 * slots.n / std::max<int64_t>(slots.features, 1));
  return std::clamp<int64_t>(paid, 1, threads);
}

size_t FeatureMajor::bytes(const Slots& slots, Dtype t, int threads) {
  return Workspace::size<int64_t>(slots.features + 1) + Workspace::size<int64_t>(parts(slots, threads) * (slots.features + 1)) +
         Workspace::size<int32_t>(slots.n) + Workspace::size<char>(slots.n * element_size(t));
}

FeatureMajor::FeatureMajor(const Slots& slots, Dtype t, const void* from, Workspace& space, int threads)
    : offsets(space.take<int64_t>(slots.features + 1)),
      rows(space.take<int32_t>(slots.n)),
      values(space.take<char>(slots.n * element_size(t))) {
  const int64_t features = slots.features, count = parts(slots, threads);
  int64_t* const cursors = space.take<int64_t>(count * (features + 1));  // [count, features], and a total of each range of features
  int64_t* const totals = cursors + count * features;
  const auto bound = [&](int64_t part, int64_t of) { return of / count * part + of % count * part / count; };
  const auto for_each_part = [&](const auto& body) {
    for_each_unit(threads, count, [&](int64_t part) {
      with_indices(slots, [&](const auto* indices) { body(part, cursors + part * features, indices); });
    });
  };
  for_each_part([&](int64_t part, int64_t* own, const auto* indices) {
    std::memset(own, 0, static_cast<size_t>(features) * sizeof(int64_t));
    for (int64_t i = bound(part, slots.n); i < bound(part + 1, slots.n); ++i) ++own[indices[i]];
  });
  // Counts become first places: of a feature the slots of an earlier part come first.
  if (count == 1) {
    int64_t next = 0;
    for (int64_t f = 0; f < features; ++f) {
      const int64_t n = cursors[f];
      offsets[f] = cursors[f] = next;
      next += n;
    }
  } else {
    for_each_unit(threads, count, [&](int64_t range) {
      int64_t total = 0;
      for (int64_t part = 0; part < count; ++part)
        for (int64_t f = bound(range, features); f < bound(range + 1, features); ++f) total += cursors[part * features + f];
      totals[range] = total;
    });
    for_each_unit(threads, count, [&](int64_t range) {
      int64_t next = std::accumulate(totals, totals + range, int64_t{0});
      for (int64_t f = bound(range, features); f < bound(range + 1, features); ++f) {
        offsets[f] = next;
        for (int64_t part = 0; part < count; ++part) {
          const int64_t n = cursors[part * features + f];
          cursors[part * features + f] = next;
          next += n;
        }
      }
    });
  }
  offsets[features] = slots.n;
  const auto place = [&](auto* to, const auto* each) {
    for_each_part([&](int64_t part, int64_t* own, const auto* indices) {
      for_each_row_run(slots, bound(part, slots.n), bound(part + 1, slots.n), [&](int64_t r, int64_t a, int64_t b) {
        for (int64_t i = a; i < b; ++i) {
          const int64_t p = own[indices[i]]++;
          rows[p] = static_cast<int32_t>(r);
          to[p] = each[i];
        }
      });
    });
  };
  if (t == Dtype::f32)
    place(static_cast<uint32_t*>(values), static_cast<const uint32_t*>(from));
  else
    place(static_cast<uint16_t*>(values), static_cast<const uint16_t*>(from));
}

int64_t decode(const Slots& slots, Dtype t, const void* values, const Matrix& w, const float* bias, void* y, int threads) {
  const int64_t status = check(slots);
  if (status != kOk) return status;
  const DecodeKernels& kernels = pick_decode_kernels();
  const SumJob job{values, slots.indices, slots.crow, slots.k, slots.n, w.data, w.stride_f, bias, y, w.d, false};
  if (w.stride_d == 1 || w.d <= 1 || slots.n == 0) {
    sum_all(kernels, t, slots.index, job, slots.rows, w.d, threads);
    return kOk;
  }

  Panels panels(kernels, slots, w, t, useful_threads(threads, slots.n * w.d), true);
  Workspace space(panels.bytes(slots));
  if (!space.ok()) return kNoMemory;
  panels.prepare(slots, space);
  panels.for_each(threads, [&](int64_t p, const char* panel, int inside) {
    SumJob part = job;
    part.indices = panels.slot;
    part.table = panel;
    part.table_stride = kPanel;
    part.bias = bias != nullptr ? bias + p * kPanel : nullptr;
    part.out = at(y, p * kPanel, t);
    sum_all(kernels, t, Index::i32, part, slots.rows, panels.width(p), inside);
  });
  return kOk;
}

int64_t decode_dvalues(const Slots& slots, Dtype t, const void* grad, const Matrix& w, void* dvalues, int threads) {
  const int64_t status = check(slots);
  if (status != kOk) return status;
  if (slots.n == 0) return kOk;
  const DecodeKernels& kernels = pick_decode_kernels();
  const int type = static_cast<int>(t);
  threads = useful_threads(threads, slots.n * w.d);
  const auto slot_units = [&](int inside, const auto& body) {
    const int64_t step = inside <= 1 ? slots.n : std::max<int64_t>(16, slots.n / (16 * inside));
    for_each_unit(inside, ceil_div(slots.n, step), [&](int64_t unit) { body(unit * step, std::min((unit + 1) * step, slots.n)); });
  };
  if (w.stride_d == 1 || w.d <= 1) {
    const DotJob job{grad, slots.indices, w.data, w.stride_f, w.d, slots.n, dvalues};
    const auto run = kernels.dot[type][static_cast<int>(slots.index)];
    slot_units(threads, [&](int64_t s0, int64_t s1) {
      for_each_row_run(slots, s0, s1, [&](int64_t r, int64_t a, int64_t b) { run(job, r, a, b); });
    });
    return kOk;
  }

  // Panels in work at once leave their sums side by side, one array a panel; a single panel adds up as it goes.
  const int64_t sums_bytes = ceil_div(w.d, kPanel) * slots.n * static_cast<int64_t>(sizeof(float));
  Panels panels(kernels, slots, w, t, threads, sums_bytes <= kPanelBytes);
  const int64_t arrays = panels.at_once > 1 ? panels.panels() : 2;
  Workspace space(panels.bytes(slots) + Workspace::size<float>(arrays * slots.n));
  if (!space.ok()) return kNoMemory;
  panels.prepare(slots, space);
  float* const sums = space.take<float>(arrays * slots.n);
  const auto dot_panel = [&](int64_t p, const char* panel, float* to, int64_t s0, int64_t s1) {
    const PanelDotJob job{at(grad, p * kPanel, t), w.d, panels.width(p), panels.slot, panel, to};
    for_each_row_run(slots, s0, s1, [&](int64_t r, int64_t a, int64_t b) { kernels.panel_dot[type](job, r, a, b); });
  };
  constexpr int64_t kPanelsInBlock = kDotBlock / kPanel;
  if (panels.at_once > 1) {
    panels.for_each(threads, [&](int64_t p, const char* panel, int) {
      std::memset(sums + p * slots.n, 0, static_cast<size_t>(slots.n) * sizeof(float));
      dot_panel(p, panel, sums + p * slots.n, 0, slots.n);
    });
    slot_units(threads, [&](int64_t s0, int64_t s1) {
      constexpr int64_t kAtOnce = 256;
      float block[kAtOnce], total[kAtOnce];
      for (int64_t s = s0; s < s1; s += kAtOnce) {
        const int64_t n = std::min(kAtOnce, s1 - s);
        for (int64_t p = 0; p < arrays; ++p) {
          const float* const panel = sums + p * slots.n + s;
          for (int64_t i = 0; i < n; ++i) {
            if (p % kPanelsInBlock == 0) {
              total[i] = p == 0 ? 0.0f : total[i] + block[i];
              block[i] = 0.0f;
            }
            block[i] += panel[i];
          }
        }
        kernels.round[type](block, total, at(dvalues, s, t), n);
      }
    });
    return kOk;
  }
  float* const block = sums;
  float* const total = sums + slots.n;
  panels.for_each(threads, [&](int64_t p, const char* panel, int inside) {
    slot_units(inside, [&](int64_t s0, int64_t s1) {
      if (p % kPanelsInBlock == 0)
        for (int64_t s = s0; s < s1; ++s) {
          total[s] = p == 0 ? 0.0f : total[s] + block[s];
          block[s] = 0.0f;
        }
      dot_panel(p, panel, block, s0, s1);
      if (p + 1 == panels.panels()) kernels.round[type](block + s0, total + s0, at(dvalues, s0, t), s1 - s0);
    });
  });
  return kOk;
}

int64_t decode_dweight(const Slots& slots, Dtype t, const void* values, const void* grad, const Matrix& out, int threads) {
  const int64_t status = check(slots);
  if (status != kOk) return status;
  const int64_t features = slots.features, d = out.d;
  if (features == 0 || d == 0) return kOk;
  const DecodeKernels& kernels = pick_decode_kernels();

  Workspace space(FeatureMajor::bytes(slots, t, threads));
  if (!space.ok()) return kNoMemory;
  const FeatureMajor sorted(slots, t, values, space, threads);

  SumJob job{sorted.values, sorted.rows, sorted.offsets, 0, slots.n, grad, d, nullptr, out.data, out.stride_f, false};
  job.stream = features * d * element_size(t) >= kStreamBytes;
  const auto run = kernels.sum[static_cast<int>(t)][static_cast<int>(Index::i32)];
  threads = useful_threads(threads, (slots.n + features) * d);
  const auto hot = [&](int64_t f) { return threads > 1 && sorted.hot(f); };

  if (out.stride_d == 1 || d == 1) {
    constexpr int64_t kFeatures = 32, kColumns = 256;
    for_each_unit(threads, ceil_div(features, kFeatures), [&](int64_t unit) {
      const int64_t end = std::min((unit + 1) * kFeatures, features);
      for (int64_t f = unit * kFeatures; f < end; ++f) {
        const int64_t first = f;
        while (f < end && !hot(f)) ++f;
        if (first < f) run(job, first, f, 0, d);
      }
    });
    if (threads > 1)
      for (int64_t f = 0; f < features; ++f)
        if (hot(f))
          for_each_unit(threads, ceil_div(d, kColumns),
                        [&](int64_t unit) { run(job, f, f + 1, unit * kColumns, std::min((unit + 1) * kColumns, d)); });
    return kOk;
  }

  // Through a tile that is transposed on the way out, so that stores are whole lines of `out` whatever way it lies.
  const int64_t across = ceil_div(d, kScatterColumns);
  const int64_t per_unit = std::max<int64_t>(1, ceil_div(across, 4 * threads));
  const int64_t parts = ceil_div(across, per_unit);
  for_each_unit(threads, ceil_div(features, kScatterRows) * parts, [&](int64_t unit) {
    alignas(64) float tile[kScatterRows * kScatterColumns];
    const int64_t f0 = unit / parts * kScatterRows, f1 = std::min(f0 + kScatterRows, features);
    const int64_t first = unit % parts * per_unit, last = std::min(first + per_unit, across);
    for (int64_t c = first; c < last; ++c) {
      const int64_t d0 = c * kScatterColumns, d1 = std::min(d0 + kScatterColumns, d);
      SumJob part = job;
      part.out_stride = kScatterColumns;
      part.stream = false;
      part.out = at(static_cast<void*>(tile), -(f0 * kScatterColumns) - d0, t);
      run(part, f0, f1, d0, d1);
      void* const to = at(out.data, f0 * out.stride_f + d0 * out.stride_d, t);
      kernels.scatter[static_cast<int>(t)]({tile, kScatterColumns, f1 - f0, d1 - d0, to, out.stride_f, out.stride_d, job.stream});
    }
  });
  return kOk;
}

}  // namespace fastsae
