// Adam and signum without a dense gradient: forms each feature's gradient row in a thread's scratch and hands it on. The loops are in
// adam.isa.cpp.
#include "cpu/adam.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/slots.h"
#include "integers.h"
#include "isa.h"
#include "parallel.h"

namespace fastsae {
namespace {

const AdamKernels* const kTables[kLevels] = FASTSAE_BASE_TABLES(adam_kernels);

constexpr int64_t kFeatures = 32;    // a unit of work, at most
constexpr int64_t kBlock = 24576;    // elements of its gradient
constexpr int64_t kColumns = 256;    // and of a hot feature
constexpr int64_t kElements = 8192;  // and where rows do not matter

// A gradient [features, d], dense or from slots. Element d of the dense one of feature f is at grad[f * stride_f + d * stride_d].
struct Source {
  const Slots* slots;  // null: grad is dense
  const float *values, *grad;
  int64_t stride_f, stride_d, features, d;
  int threads;

  Source(const Gradient& g, int64_t features, int64_t d, int threads)
      : slots(g.sparse ? &g.slots : nullptr),
        values(g.values),
        grad(g.data),
        stride_f(g.stride_f),
        stride_d(g.stride_d),
        features(features),
        d(d),
        threads(useful_threads(threads, ((slots != nullptr ? slots->n : 0) + features) * d)) {}

  size_t sorted_bytes() const { return slots == nullptr ? 0 : FeatureMajor::bytes(*slots, Dtype::f32, threads); }
  bool hot(const FeatureMajor& sorted, int64_t f) const { return threads > 1 && sorted.hot(f); }
  // Row f goes to first + f * ld.
  SumJob sums(const FeatureMajor& sorted, float* first, int64_t ld) const {
    return {sorted.values, sorted.rows, sorted.offsets, 0, slots->n, grad, d, nullptr, first, ld, false};
  }
  static auto sum() { return pick_decode_kernels().sum[static_cast<int>(Dtype::f32)][static_cast<int>(Index::i32)]; }
  void sum_hot(const SumJob& job, int64_t f) const {
    const auto run = sum();
    for_each_unit(threads, ceil_div(d, kColumns),
                  [&](int64_t unit) { run(job, f, f + 1, unit * kColumns, std::min((unit + 1) * kColumns, d)); });
  }
};

// Its rows, one feature at a time.
struct GradientRows : Source {
  using Source::Source;

  // Features whose rows are formed before they are used: so many that the slots ahead can be fetched, and so few that they stay in cache.
  int64_t height() const { return std::clamp<int64_t>(kBlock / std::max<int64_t>(d, 1), 1, kFeatures); }
  int64_t padded() const { return ceil_div(d, 16) * 16; }
  int64_t scratch() const { return slots == nullptr ? 0 : height() * padded(); }
  size_t bytes() const { return sorted_bytes() + Workspace::size<float>(threads * scratch()); }

  // body(f, g) once for every feature, with its row, or null where it has no slots; ahead(f), unless null, some time before it where there
  // are slots.
  template <class Ahead, class Body>
  void for_each(Workspace& space, const Ahead& ahead, const Body& body) const {
    const int64_t blocks = ceil_div(features, height());
    if (slots == nullptr) {
      for_each_unit(threads, blocks, [&](int64_t block) {
        for (int64_t f = block * height(); f < std::min((block + 1) * height(), features); ++f) body(f, grad + f * stride_f);
      });
      return;
    }
    const FeatureMajor sorted(*slots, Dtype::f32, values, space, threads);
    float* const rows = space.take<float>(threads * scratch());
    const auto run = sum();
    const auto into = [&](float* first, int64_t f) { return sums(sorted, first - f * padded(), padded()); };
    const auto here = [&](int64_t f) { return sorted.has_slot(f) && !hot(sorted, f); };
    for_each_unit_by_worker(threads, blocks, [&](int64_t block, int worker) {
      const int64_t begin = block * height(), end = std::min(begin + height(), features);
      float* const mine = rows + worker * scratch();
      const SumJob job = into(mine, begin);
      for (int64_t f = begin; f < end; ++f) {
        const int64_t first = f;
        if constexpr (std::is_null_pointer_v<Ahead>) {
          while (f < end && here(f)) ++f;
          if (first < f) run(job, first, f, 0, d);
        } else if (here(f)) {
          ahead(f);
          run(job, f, f + 1, 0, d);
        }
      }
      for (int64_t f = begin; f < end; ++f)
        if (!hot(sorted, f)) body(f, sorted.has_slot(f) ? mine + (f - begin) * padded() : nullptr);
    });
    for (int64_t f = 0; threads > 1 && f < features; ++f)
      if (hot(sorted, f)) {
        sum_hot(into(rows, f), f);
        body(f, rows);
      }
  }
};

// The same for transposed matrices: some features at a time, with their gradient side by side; one of the strides is 1. d > 0.
struct GradientColumns : Source {
  // kAside features and all of d at a time; otherwise kRun features, so that memory is read in long runs, and kRunTile elements.
  bool whole;

  static constexpr int64_t kColumnTile = 64, kRun = 2048, kRunTile = 32;

  GradientColumns(const Gradient& g, int64_t features, int64_t d, bool whole, int threads)
      : Source(g, features, d, threads), whole(whole) {}

  bool as_it_is() const { return slots == nullptr && stride_f == 1; }
  int64_t aside() const { return whole ? kAside : kRun; }
  int64_t ld() const { return whole ? kAside : kRun + 16; }  // not a power of two: the tile's columns are written side by side
  int64_t tile_width() const { return whole ? kColumnTile : kRunTile; }
  int64_t width() const { return whole ? d : kRunTile; }
  int64_t scratch() const {
    if (whole) return kColumnScratch + kAside * (1 + kColumnTile + 2 * d);
    return as_it_is() ? 0 : kRunTile * (kRun + ld());
  }
  // A hot feature's row is summed by all threads before the others' are; their number is known once the slots are sorted.
  int64_t hot_at_most() const { return threads > 1 && slots != nullptr ? std::min(slots->n / kHot, features) : 0; }
  size_t bytes() const {
    return sorted_bytes() + Workspace::size<float>(threads * scratch()) + Workspace::size<float>(hot_at_most() * d) +
           Workspace::size<int64_t>(hot_at_most());
  }

  // body(f0, d0, part): features [f0, f0 + part.n), elements [d0, d0 + part.size); their gradient, and scratch memory, are in `part`
  template <class Body>
  void for_each(Workspace& space, const Body& body) const {
    float* const memory = space.take<float>(threads * scratch());
    const int64_t parts = ceil_div(d, width()), units = ceil_div(features, aside()) * parts;
    const auto scatter = pick_decode_kernels().scatter[static_cast<int>(Dtype::f32)];
    const auto form = [&](int64_t unit, int worker, const FeatureMajor* sorted, const auto& rows_of) {
      float* const own = memory + worker * scratch();
      float* const tile = own;
      float* const beside = tile + aside() * tile_width();
      float* const local = beside + ld() * width();
      float* const touched = local + kAside * d;
      // A thread's units are features side by side, so that no two threads work within a page.
      const int64_t f0 = unit / parts * aside(), n = std::min(aside(), features - f0);
      const int64_t d0 = unit % parts * width(), d1 = std::min(d0 + width(), d);
      for (int64_t i = 0; whole && i < kAside; ++i) {
        const uint32_t bits = i < n && (sorted == nullptr || sorted->has_slot(f0 + i)) ? ~uint32_t{0} : 0;
        std::memcpy(touched + i, &bits, sizeof bits);
      }
      const float* g = beside;
      int64_t stride_g = ld();
      if (as_it_is() && !whole) {
        g = grad + f0 + d0 * stride_d;
        stride_g = stride_d;
      } else if (as_it_is()) {
        for (int64_t c = d0; c < d1; ++c) std::copy(grad + f0 + c * stride_d, grad + f0 + n + c * stride_d, beside + c * stride_g);
      } else {
        for (int64_t c = d0; c < d1; c += tile_width()) {
          const int64_t end = std::min(c + tile_width(), d1);
          const auto [from, ld] = rows_of(f0, n, c, end, tile);
          scatter({from, ld, n, end - c, beside + (c - d0) * stride_g, 1, stride_g, false});
        }
      }
      body(f0, d0, AdamColumns{g, stride_g, nullptr, nullptr, nullptr, 0, static_cast<int>(n), d1 - d0, touched, touched + kAside, local});
    };
    struct Rows {
      const float* from;
      int64_t ld;
    };
    if (slots == nullptr) {
      for_each_unit_by_worker(threads, units, [&](int64_t unit, int worker) {
        form(unit, worker, nullptr,
             [&](int64_t f0, int64_t, int64_t c, int64_t, float*) { return Rows{grad + f0 * stride_f + c, stride_f}; });
      });
      return;
    }
    const FeatureMajor sorted(*slots, Dtype::f32, values, space, threads);
    float* const hot_rows = space.take<float>(hot_at_most() * d);
    int64_t* const hot_list = space.take<int64_t>(hot_at_most());
    int64_t found = 0;
    for (int64_t f = 0; threads > 1 && f < features; ++f)
      if (hot(sorted, f)) {
        sum_hot(sums(sorted, hot_rows + (found - f) * d, d), f);
        hot_list[found++] = f;
      }
    const auto sum_cold = sum();
    for_each_unit_by_worker(threads, units, [&](int64_t unit, int worker) {
      const int64_t before = std::lower_bound(hot_list, hot_list + found, unit / parts * aside()) - hot_list;
      form(unit, worker, &sorted, [&](int64_t f0, int64_t n, int64_t c, int64_t end, float* tile) {
        const int64_t wide = tile_width();
        const SumJob job = sums(sorted, tile - f0 * wide - c, wide);
        const float* row = hot_rows + before * d;
        for (int64_t f = f0; f < f0 + n;) {
          const int64_t first = f;
          while (f < f0 + n && !hot(sorted, f)) ++f;
          if (first < f) sum_cold(job, first, f, c, end);
          for (; f < f0 + n && hot(sorted, f); ++f, row += d) std::copy(row + c, row + end, tile + (f - f0) * wide);
        }
        return Rows{tile, wide};
      });
    });
  }
};

// One step by the rule of `job`.
int64_t move(const Gradient& grad, const AdamMatrices& a, const AdamJob& job, int threads) {
  const int64_t status = grad.sparse ? check(grad.slots) : kOk;
  if (status != kOk) return status;
  const AdamKernels& kernels = pick(kTables);
  const auto step = kernels.step[job.rule];
  const bool rows_matter = job.project || job.normalise, transposed = a.stride_d != 1 && a.d > 0;
  const bool dense = (transposed ? a.stride_d : a.stride_f) == (transposed ? a.features : a.d);
  if (!grad.sparse && !rows_matter && dense && grad.stride_f == a.stride_f && grad.stride_d == a.stride_d) {
    const int64_t n = a.features * a.d;  // a bias is one row: split it all the same
    for_each_unit(useful_threads(threads, n), ceil_div(n, kElements), [&](int64_t unit) {
      const int64_t i = unit * kElements;
      step(job, grad.data + i, a.w + i, a.m + i, a.v + i, std::min(kElements, n - i));
    });
    return kOk;
  }
  if (transposed) {
    const GradientColumns columns(grad, a.features, a.d, rows_matter, threads);
    Workspace space(columns.bytes());
    if (!space.ok()) return kNoMemory;
    columns.for_each(space, [&](int64_t f, int64_t d, AdamColumns part) {
      const int64_t at = f + d * a.stride_d;
      part.w = a.w + at, part.m = a.m + at, part.v = a.v + at, part.stride = a.stride_d;
      if (rows_matter) return kernels.step_columns[job.rule](job, part);
      for (int64_t c = 0; c < part.size; ++c) {
        const int64_t to = c * part.stride;
        step(job, part.g + c * part.stride_g, part.w + to, part.m + to, part.v + to, part.n);
      }
    });
    return kOk;
  }
  const GradientRows rows(grad, a.features, a.d, threads);
  Workspace space(rows.bytes());
  if (!space.ok()) return kNoMemory;
  // Nothing ahead: every row is read, in order, and the hardware knows.
  rows.for_each(space, nullptr, [&](int64_t f, const float* g) {
    const int64_t at = f * a.stride_f;
    step(job, g, a.w + at, a.m + at, a.v + at, a.d);
  });
  return kOk;
}

}  // namespace

int64_t adam(const Gradient& grad, const float* factor, const AdamMatrices& a, const AdamOptions& o, int threads) {
  AdamJob job{};
  job.rule = kAdam;
  job.project = o.project;
  job.normalise = o.normalise;
  job.factor = factor != nullptr ? *factor : 1.0f;
  job.decay = static_cast<float>(1 - o.lr * o.weight_decay);
  job.from_m = 1 - o.beta1 < 0.5;
  job.lerp = static_cast<float>(job.from_m ? 1 - o.beta1 : -o.beta1);
  job.beta2 = static_cast<float>(o.beta2);
  job.fresh2 = static_cast<float>(1 - o.beta2);
  const double r = std::sqrt(1 - std::pow(o.beta2, static_cast<double>(o.step)));
  job.minus_s = static_cast<float>(-o.lr * r / (1 - std::pow(o.beta1, static_cast<double>(o.step))));
  job.e = static_cast<float>(o.eps * r);
  return move(grad, a, job, threads);
}

int64_t signum(const Gradient& grad, const AdamMatrices& given, const SignumOptions& o, int threads) {
  AdamJob job{};
  job.rule = kSignum;
  job.project = o.project;
  job.normalise = o.normalise;
  job.lr = static_cast<float>(o.lr);
  job.to_x = static_cast<float>(1 - 1 / o.momentum);
  job.average = static_cast<float>(o.average);
  job.to_y = static_cast<float>(1 - o.momentum);
  AdamMatrices a = given;
  a.v = a.m;  // prefetched with the others, and nothing else
  return move(grad, a, job, threads);
}

int64_t grad_squares(const Gradient& grad, const AdamMatrices& a, bool project, float* total, int threads) {
  const int64_t status = grad.sparse ? check(grad.slots) : kOk;
  if (status != kOk) return status;
  const AdamKernels& kernels = pick(kTables);
  // Without projection rows that are formed here, or lie as rows, are summed as they are, whatever way w lies.
  const bool columns_matter = a.d > 0 && (project ? a.stride_d != 1 : !grad.sparse && grad.stride_d != 1);
  double sum = 0;
  const auto add_up = [&](Workspace& space, const auto& fill) {
    float* const each = space.take<float>(a.features);
    fill(each);
    for (int64_t f = 0; f < a.features; ++f) sum += each[f];
    *total = static_cast<float>(sum);
    return kOk;
  };
  if (columns_matter) {
    const GradientColumns columns(grad, a.features, a.d, true, threads);
    Workspace space(columns.bytes() + Workspace::size<float>(a.features));
    if (!space.ok()) return kNoMemory;
    return add_up(space, [&](float* each) {
      columns.for_each(space, [&](int64_t f, int64_t, AdamColumns part) {
        part.w = a.w + f, part.stride = a.stride_d;
        kernels.squares_columns(part, project, each + f);
      });
    });
  }
  const GradientRows rows(grad, a.features, a.d, threads);
  Workspace space(rows.bytes() + Workspace::size<float>(a.features));
  if (!space.ok()) return kNoMemory;
  const auto ahead = [&](int64_t f) {
    for (int64_t i = 0; i < a.d; i += 16) __builtin_prefetch(a.w + f * a.stride_f + i, 0, 2);
  };
  return add_up(space, [&](float* each) {
    if (!project)
      return rows.for_each(space, nullptr,
                           [&](int64_t f, const float* g) { each[f] = g == nullptr ? 0 : kernels.squares(g, nullptr, a.d); });
    rows.for_each(space, ahead,
                  [&](int64_t f, const float* g) { each[f] = g == nullptr ? 0 : kernels.squares(g, a.w + f * a.stride_f, a.d); });
  });
}

}  // namespace fastsae
