// Where the k best features change along segments: screened ends say which features can be among them anywhere between, their lines are
// formed in fp64, and the changes are walked from one to the next.
#include <memory>
#include <numeric>

#include "cpu/engine/candidates.h"
#include "cpu/engine/topk_rowwise.h"

namespace fastsae {
namespace {

constexpr int kSeedPoints = 5, kPieces = 32;  // of a segment: where the first candidates are looked for, and what has floors of its own
constexpr double kLargest = 1e150;
constexpr double kBelow = 1e-300;  // a score of 0 has one magnitude, not two: its other line lies below all that are 0

double norm_of(const double* x, int64_t n) {
  double sums[8] = {};
  for (int64_t i = 0; i < n; i += 8)
    for (int l = 0; l < 8; ++l) sums[l] += x[i + l] * x[i + l];
  return std::sqrt(std::accumulate(sums, sums + 8, 0.0));
}

// A line p + t (q - p). `place`: which of equal ones comes first.
struct Line {
  double p, q, slope;
  int32_t feature;  // -1: none, a line of zeros
  int32_t place;

  double at(double t) const { return p + t * slope; }
};

// The k best lines of a segment and the others, and how they change places.
struct Walk {
  Line *best, *others;
  int64_t k, n;  // n others

  struct Pair {
    int64_t out, come;
    bool above;
  };
  // Of the best the least at t (of equals the last), of the others the largest (the first); whether that is above by more than roundings.
  Pair meeting(double t) const {
    Pair found{0, 0, false};
    double least = INFINITY, most = -INFINITY;
    for (int64_t i = 0; i < k; ++i)
      if (const double v = best[i].at(t); v < least || (v == least && best[i].place > best[found.out].place)) {
        least = v;
        found.out = i;
      }
    for (int64_t i = 0; i < n; ++i)
      if (const double v = others[i].at(t); v > most || (v == most && others[i].place < others[found.come].place)) {
        most = v;
        found.come = i;
      }
    const Line &a = best[found.out], &b = others[found.come];
    found.above = n > 0 && most - least > 0x1p-49 * (std::fabs(a.p) + std::fabs(a.slope) + std::fabs(b.p) + std::fabs(b.slope));
    return found;
  }
  // change(t, leaves, enters) for every change of a feature. The best of the others less the least of the best is convex in t, so that
  // Newton's iteration from the end comes down to the next change, and there is none where it is not positive at the end.
  template <class Change>
  bool run(const Change& change) const {
    double now = 0;
    for (Pair pair; (pair = meeting(1)).above;) {
      double t = 1;
      for (;;) {
        const Line &out = best[pair.out], &come = others[pair.come];
        const double steeper = come.slope - out.slope;
        t = std::min(std::max(steeper > 0 ? (out.p - come.p) / steeper : now, now), t);
        const Pair next = meeting(t);
        if (!next.above || (next.out == pair.out && next.come == pair.come)) break;
        pair = next;
      }
      if (!change(t, best[pair.out].feature, others[pair.come].feature)) return false;
      std::swap(best[pair.out], others[pair.come]);
      now = t;
    }
    // What is equal in q, or apart by a rounding, changes there.
    const auto better = [](const Line& a, const Line& b) { return a.q > b.q || (a.q == b.q && a.place < b.place); };
    std::sort(best, best + k, better);
    std::sort(others, others + n, better);
    for (int64_t i = 0; i < std::min(k, n) && better(others[i], best[k - 1 - i]); ++i)
      if (!change(1.0, best[k - 1 - i].feature, others[i].feature)) return false;
    return true;
  }
};

struct SegmentDriver : RowwiseDriver {
  const double* ends;  // [2 S, d]
  bool relu;
  int64_t capacity;
  double* t;
  int32_t *leaves, *enters;
  int64_t* counts;
  float b_size = 0;
  int32_t longest = 0;  // bits of the largest norm of a feature
  struct Own {
    double* x;           // [2][padded] ends less `subtract`
    float *rows, *lows;  // rows: of features, [kDenseWidth][padded]
    float *at_p, *at_q, *values;
    int32_t *id, *some;
    Line* lines;
  } own[kMostWorkers] = {};

  int64_t most() const { return std::min(p.w.features, 4 * out.k + 256 + p.w.features / 4); }
  int64_t lines_of(int64_t n) const { return (out.absolute ? 2 : 1) * n + (relu ? out.k : 0); }
  int64_t bytes(const Plan& plan) const {
    return RowwiseDriver::bytes(plan) +
           plan.threads * (Workspace::size<double>(2 * plan.padded) + Workspace::size<float>(kDenseWidth * plan.padded) +
                           Workspace::size<float>(lows(plan)) + 3 * Workspace::size<float>(most() + 16) +
                           2 * Workspace::size<int32_t>(all() + 16) + Workspace::size<Line>(lines_of(most())));
  }
  void take(Workspace& space, const Plan& plan) {
    RowwiseDriver::take(space, plan);
    for (int i = 0; i < threads; ++i)
      own[i] = {.x = space.take<double>(2 * plan.padded),
                .rows = space.take<float>(kDenseWidth * plan.padded),
                .lows = space.take<float>(lows(plan)),
                .at_p = space.take<float>(most() + 16),
                .at_q = space.take<float>(most() + 16),
                .values = space.take<float>(most()),
                .id = space.take<int32_t>(all() + 16),
                .some = space.take<int32_t>(all() + 16),
                .lines = space.take<Line>(lines_of(most()))};
  }
  void block(const Chunk& chunk, const Block& b, int worker) {
    RowwiseDriver::block(chunk, b, worker);
    float norm = 0;
    for (int64_t j = 0; j < b.count; ++j) norm = std::max(norm, b.panels.norm[j]);
    const int32_t bits = std::bit_cast<int32_t>(norm);
    for (int32_t seen = __atomic_load_n(&longest, __ATOMIC_RELAXED);
         seen < bits && !__atomic_compare_exchange_n(&longest, &seen, bits, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);) {
    }
  }
  int64_t end(const Chunk& chunk) {
    for_each_unit_by_worker(threads, chunk.rows / 2,
                            [&](int64_t s, int worker) { counts[chunk.base / 2 + s] = segment(chunk, s, own[worker]); });
    return kOk;
  }

  // each(i, w) for features id[i], as fp32 rows, up to kDenseWidth at a time.
  template <class Each>
  void features(const Own& o, int64_t padded, const int32_t* id, int64_t n, const Each& each) const {
    const float* w[kDenseWidth];
    const bool in_place = p.w.t == Dtype::f32;
    Problem some = p;
    some.w.list = id;
    for (int64_t first = 0; first < n; first += kDenseWidth) {
      const int64_t count = std::min(kDenseWidth, n - first);
      if (!in_place) load_features(some, first, count, o.rows, padded);
      for (int64_t i = 0; i < count; ++i)
        w[i] = in_place ? static_cast<const float*>(p.w.data) + id[first + i] * p.w.stride_f : o.rows + i * padded;
      each(first, count, w);
    }
  }
  // Scores at both ends to at_p and at_q; magnitudes where they count.
  void score(const Chunk& chunk, const Own& o, int64_t row, const int32_t* id, int64_t n) const {
    const int64_t padded = chunk.plan.padded;
    const float* const x[2] = {chunk.xc + row * padded, chunk.xc + (row + 1) * padded};
    features(o, padded, id, n, [&](int64_t first, int64_t count, const float* const* w) {
      float products[2 * kDenseWidth];
      p.kernels.products(x, 2, w, count, p.w.d, products, kDenseWidth);
      for (int e = 0; e < 2; ++e)
        for (int64_t i = 0; i < count; ++i)
          (e == 0 ? o.at_p : o.at_q)[first + i] = products[e * kDenseWidth + i] + (p.bias != nullptr ? p.bias[id[first + i]] : 0.0f);
    });
  }
  // The lines of features `id` behind the `n_lines` at `lines`; their number then, -1 where one is too large.
  int32_t add_lines(const Own& o, int64_t padded, const int32_t* id, int64_t n, Line* lines, int32_t n_lines) const {
    const int64_t d = p.w.d;
    bool sound = true;
    features(o, padded, id, n, [&](int64_t first, int64_t count, const float* const* w) {
      for (int64_t i = 0; i < count; ++i) {
        double sums[2][8] = {};
        for (int64_t j = 0; j < d; j += 8)
          for (int64_t l = 0; l < std::min<int64_t>(8, d - j); ++l)
            for (int e = 0; e < 2; ++e) sums[e][l] += o.x[e * padded + j + l] * static_cast<double>(w[i][j + l]);
        const int32_t feature = id[first + i];
        double at[2];
        for (int e = 0; e < 2; ++e)
          at[e] = std::accumulate(sums[e], sums[e] + 8, 0.0) + (p.bias != nullptr ? static_cast<double>(p.bias[feature]) : 0.0);
        sound = sound && std::fabs(at[0]) < kLargest && std::fabs(at[1]) < kLargest;
        for (int sign = 0; sign < (out.absolute ? 2 : 1); ++sign) {
          lines[n_lines] = {at[0], at[1], at[1] - at[0], feature, n_lines};
          ++n_lines;
          for (double& v : at) v = v == 0 ? -kBelow : -v;
        }
      }
    });
    return sound ? n_lines : -1;
  }
  // How far a screened end may lie beyond the line, at most: what brought the end to fp32, the fp32 score, and arithmetic between ends;
  // twice, which covers that of ends wider than scores.
  double slack(const Chunk& chunk, const Own& o, int64_t row, int end) const {
    const int64_t d = chunk.plan.padded;
    const double* const x = o.x + end * d;
    const float* const xc = chunk.xc + row * d;
    double moved = 0;
    for (int64_t i = 0; i < p.w.d; ++i) moved += (x[i] - static_cast<double>(xc[i])) * (x[i] - static_cast<double>(xc[i]));
    const double each = std::sqrt(moved) * 1.001 + static_cast<double>(d + 16) * static_cast<double>(kUnit) * norm_of(x, d);
    return 2 * (static_cast<double>(std::bit_cast<float>(longest)) * each + 4 * static_cast<double>(kUnit) * static_cast<double>(b_size) +
                static_cast<double>(4 * d + 128) * 0x1p-126);
  }
  // The features that can be among the k best somewhere, to o.some; -1: the screen leaves too many.
  int64_t candidates(const Chunk& chunk, const Own& o, int64_t row, float loss) const {
    const int64_t k = out.k, features = p.w.features;
    const float *const high_p = high + row * all(), *const high_q = high_p + all();
    float points[kPieces + 1], floor[kPieces + 1], least[kPieces];
    // 1. Those that are probably among the best, and their scores.
    const int64_t group = each(chunk.plan) * kPanelWidth, lanes = ceil_div(features, group) * 16;
    if (lanes < k) return -1;
    for (int g = 0; g < kSeedPoints; ++g) {
      points[g] = static_cast<float>(g) / (kSeedPoints - 1);
      screens.largest_along(high_p, high_q, features, group, points[g], o.lows);
      floor[g] = screens.kth_largest(o.lows, lanes, k, k + k / 8);
    }
    int64_t n = screens.reaching_along(high_p, high_q, features, points, floor, kSeedPoints, o.id);
    if (n < k || n > most()) return -1;
    score(chunk, o, row, o.id, n);
    // 2. The k-th largest of what each is at least in a piece: no feature that is below there is among the best.
    for (int g = 0; g < kPieces; ++g) {
      const float t0 = static_cast<float>(g) / kPieces, t1 = static_cast<float>(g + 1) / kPieces;
      for (int64_t i = 0; i < n; ++i) {
        const float slope = o.at_q[i] - o.at_p[i], v0 = o.at_p[i] + t0 * slope, v1 = o.at_p[i] + t1 * slope;
        o.values[i] = !out.absolute ? std::min(v0, v1) : (v0 < 0) == (v1 < 0) ? std::min(std::fabs(v0), std::fabs(v1)) : 0.0f;
      }
      least[g] = screens.kth_largest(o.values, n, k, k);
      if (relu) least[g] = std::max(least[g], 0.0f);
    }
    for (int g = 0; g <= kPieces; ++g) {
      points[g] = static_cast<float>(g) / kPieces;
      floor[g] = std::min(least[std::max(g - 1, 0)], least[std::min(g, kPieces - 1)]) - loss;
    }
    // 3. Those that reach it: by their upper ends, then by their scores.
    n = screens.reaching_along(high_p, high_q, features, points, floor, kPieces + 1, o.id);
    if (n > most()) return -1;
    score(chunk, o, row, o.id, n);
    if (out.absolute)
      for (int64_t i = 0; i < n; ++i) {
        o.at_p[i] = std::fabs(o.at_p[i]);
        o.at_q[i] = std::fabs(o.at_q[i]);
      }
    n = screens.reaching_along(o.at_p, o.at_q, n, points, floor, kPieces + 1, o.some);
    for (int64_t i = 0; i < n; ++i) o.some[i] = o.id[o.some[i]];
    return n;
  }
  // Changes of segment s of the chunk; -1: undecided, which does not depend on the screen.
  int64_t segment(const Chunk& chunk, int64_t s, const Own& o) const {
    const int64_t d = chunk.plan.padded, k = out.k, row = 2 * s, at = chunk.base / 2 + s;
    if (chunk.exact[row] != 0 || chunk.exact[row + 1] != 0) return -1;
    for (int e = 0; e < 2; ++e)
      for (int64_t i = 0; i < d; ++i)
        o.x[e * d + i] =
            i >= p.w.d ? 0.0 : ends[(2 * at + e) * p.w.d + i] - (p.x.subtract != nullptr ? static_cast<double>(p.x.subtract[i]) : 0.0);
    const float loss = static_cast<float>(slack(chunk, o, row, 0) + slack(chunk, o, row + 1, 1));
    if (!(loss < 1e30f)) return -1;
    int64_t n = candidates(chunk, o, row, loss);
    Line* lines = o.lines;
    std::unique_ptr<Line[]> of_all;
    if (n < 0) {  // all features
      n = p.w.features;
      std::iota(o.some, o.some + n, 0);
      of_all.reset(new (std::nothrow) Line[static_cast<size_t>(lines_of(n))]);
      lines = of_all.get();
      if (lines == nullptr) return -1;
    }
    // Their lines, the best at p first.
    int32_t count = 0;
    for (; relu && count < k; ++count) lines[count] = {0, 0, 0, -1, count};
    count = add_lines(o, d, o.some, n, lines, count);
    if (count < k) return -1;
    std::nth_element(lines, lines + k - 1, lines + count,
                     [](const Line& a, const Line& b) { return a.p > b.p || (a.p == b.p && a.place < b.place); });
    int64_t changes = 0, base = at * capacity;
    const bool whole = Walk{lines, lines + k, k, count - k}.run([&](double where, int32_t out_now, int32_t come_now) {
      if (out_now == come_now) return true;  // of a magnitude its other line
      if (changes == capacity) return false;
      t[base + changes] = where;
      leaves[base + changes] = out_now;
      enters[base + changes++] = come_now;
      return true;
    });
    return whole ? changes : -1;
  }
};

}  // namespace

int64_t topk_changes(const Activations& x, const Weights& w, const float* bias, const double* ends, int64_t k, bool relu, bool absolute,
                     int64_t capacity, double* t, int32_t* leaves, int32_t* enters, int64_t* counts, int threads) {
  const EncodeKernels* const screens = encode_kernels();
  const Problem p{.kernels = engine_kernels(), .x = x, .w = w, .bias = bias, .threads = threads, .absolute = absolute};
  if (screens == nullptr) return kUnsupported;
  Plan plan = make_plan(p, {.path = EncodePath::blocks, .rowwise_k = k});
  if (plan.path != EncodePath::blocks) return kUnsupported;
  // Upper ends of a chunk may leave the caches: they are read once, while every chunk reads all features again.
  plan.chunk = std::min(x.rows, std::clamp<int64_t>(kBufferBytes / (4 * packed_features(w.features)) / 2 * 2, 2, kChunkRows));
  const TopkOutput out{.k = k, .relu = relu, .values = nullptr, .indices = nullptr, .absolute = absolute};
  const std::unique_ptr<SegmentDriver> driver(new SegmentDriver{{*screens, p, out}, ends, relu, capacity, t, leaves, enters, counts});
  if (absolute && k == w.features) std::fill_n(counts, x.rows / 2, 0);  // all of them everywhere
  if (x.rows == 0 || (absolute && k == w.features)) return kOk;
  for (int64_t f = 0; bias != nullptr && f < w.features; ++f) driver->b_size = std::max(driver->b_size, std::fabs(bias[f]));
  return run_engine(p, plan, *driver);
}

}  // namespace fastsae
