// Adam without a dense gradient: forms each feature's gradient row in a thread's scratch and hands it on. The loops are in adam.isa.cpp.
#include "cpu/adam.h"

#include <algorithm>
#include <cmath>

#include "cpu/slots.h"
#include "isa.h"
#include "parallel.h"

namespace fastsae {
namespace {

const AdamKernels* const kTables[kLevels] = {
    &portable::adam_kernels,
    FASTSAE_AVX2(adam_kernels),
    FASTSAE_AVX512(adam_kernels),
    nullptr,
};

constexpr int64_t kFeatures = 32;    // a unit of work, at most
constexpr int64_t kBlock = 24576;    // elements of its gradient
constexpr int64_t kColumns = 256;    // and of a hot feature
constexpr int64_t kElements = 8192;  // and where rows do not matter

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The rows of a gradient, dense or from slots, one feature at a time.
struct GradientRows {
  const Slots* slots;  // null: grad is dense
  const float *values, *grad;
  int64_t features, d;
  int threads;

  GradientRows(const Slots* slots, const float* values, const float* grad, int64_t features, int64_t d, int threads)
      : slots(slots),
        values(values),
        grad(grad),
        features(features),
        d(d),
        threads(useful_threads(threads, ((slots != nullptr ? slots->n : 0) + features) * d)) {}

  // Features whose rows are formed before they are used: so many that the slots ahead can be fetched, and so few that they stay in cache.
  int64_t height() const { return std::clamp<int64_t>(kBlock / std::max<int64_t>(d, 1), 1, kFeatures); }
  int64_t padded() const { return ceil_div(d, 16) * 16; }
  int64_t scratch() const { return slots == nullptr ? 0 : height() * padded(); }
  size_t bytes() const {
    return slots == nullptr ? 0 : FeatureMajor::bytes(*slots, Dtype::f32) + Workspace::size<float>(threads * scratch());
  }

  // body(f, g) once for every feature, with its row, or null where it has no slots; ahead(f) some time before it where there are slots.
  template <class Ahead, class Body>
  void for_each(Workspace& space, const Ahead& ahead, const Body& body) const {
    const int64_t blocks = ceil_div(features, height());
    if (slots == nullptr) {
      for_each_unit(threads, blocks, [&](int64_t block) {
        for (int64_t f = block * height(); f < std::min((block + 1) * height(), features); ++f) body(f, grad + f * d);
      });
      return;
    }
    const FeatureMajor sorted(*slots, Dtype::f32, values, space);
    float* const rows = space.take<float>(threads * scratch());
    const auto sum = pick_decode_kernels().sum[static_cast<int>(Dtype::f32)][static_cast<int>(Index::i32)];
    const auto into = [&](float* first, int64_t f) {
      return SumJob{sorted.values, sorted.rows, sorted.offsets, 0, slots->n, grad, d, nullptr, first - f * padded(), padded(), false};
    };
    const auto hot = [&](int64_t f) { return threads > 1 && sorted.hot(f); };
    const auto here = [&](int64_t f) { return sorted.has_slot(f) && !hot(f); };
    for_each_unit_by_worker(threads, blocks, [&](int64_t block, int worker) {
      const int64_t begin = block * height(), end = std::min(begin + height(), features);
      float* const mine = rows + worker * scratch();
      const SumJob job = into(mine, begin);
      for (int64_t f = begin; f < end; ++f)
        if (here(f)) ahead(f);
      for (int64_t f = begin; f < end; ++f) {
        const int64_t first = f;
        while (f < end && here(f)) ++f;
        if (first < f) sum(job, first, f, 0, d);
      }
      for (int64_t f = begin; f < end; ++f)
        if (!hot(f)) body(f, sorted.has_slot(f) ? mine + (f - begin) * padded() : nullptr);
    });
    if (threads > 1)
      for (int64_t f = 0; f < features; ++f)
        if (hot(f)) {
          const SumJob job = into(rows, f);
          for_each_unit(threads, ceil_div(d, kColumns),
                        [&](int64_t unit) { sum(job, f, f + 1, unit * kColumns, std::min((unit + 1) * kColumns, d)); });
          body(f, rows);
        }
  }
};

}  // namespace

int64_t adam(const Slots* slots, const float* values, const float* grad, const float* factor, float* w, float* m, float* v,
             int64_t features, int64_t d, const AdamOptions& o, int threads) {
  const int64_t status = slots != nullptr ? check(*slots) : kOk;
  if (status != kOk) return status;
  AdamJob job;
  job.factor = factor != nullptr ? *factor : 1.0f;
  job.decay = static_cast<float>(1 - o.lr * o.weight_decay);
  job.from_m = 1 - o.beta1 < 0.5;
  job.lerp = static_cast<float>(job.from_m ? 1 - o.beta1 : -o.beta1);
  job.beta2 = static_cast<float>(o.beta2);
  job.fresh2 = static_cast<float>(1 - o.beta2);
  const double r = std::sqrt(1 - std::pow(o.beta2, static_cast<double>(o.step)));
  job.minus_s = static_cast<float>(-o.lr * r / (1 - std::pow(o.beta1, static_cast<double>(o.step))));
  job.e = static_cast<float>(o.eps * r);
  job.project = o.project;
  job.normalise = o.normalise;
  const auto step = pick(kTables).step;
  if (slots == nullptr && !o.project && !o.normalise) {  // a bias is one row: split it all the same
    const int64_t n = features * d;
    for_each_unit(useful_threads(threads, n), ceil_div(n, kElements), [&](int64_t unit) {
      const int64_t i = unit * kElements;
      step(job, grad + i, w + i, m + i, v + i, std::min(kElements, n - i));
    });
    return kOk;
  }
  const GradientRows rows(slots, values, grad, features, d, threads);
  Workspace space(rows.bytes());
  if (!space.ok()) return kNoMemory;
  const auto ahead = [](int64_t) {};  // every row is read, in order: the hardware knows
  rows.for_each(space, ahead, [&](int64_t f, const float* g) { step(job, g, w + f * d, m + f * d, v + f * d, d); });
  return kOk;
}

int64_t grad_squares(const Slots* slots, const float* values, const float* grad, const float* w, int64_t features, int64_t d, bool project,
                     float* total, int threads) {
  const int64_t status = slots != nullptr ? check(*slots) : kOk;
  if (status != kOk) return status;
  const auto squares = pick(kTables).squares;
  const GradientRows rows(slots, values, grad, features, d, threads);
  Workspace space(rows.bytes() + Workspace::size<float>(features));
  if (!space.ok()) return kNoMemory;
  float* const each = space.take<float>(features);
  const auto ahead = [&](int64_t f) {
    for (int64_t i = 0; project && i < d; i += 16) __builtin_prefetch(w + f * d + i, 0, 2);
  };
  rows.for_each(space, ahead,
                [&](int64_t f, const float* g) { each[f] = g == nullptr ? 0 : squares(g, project ? w + f * d : nullptr, d); });
  double sum = 0;
  for (int64_t f = 0; f < features; ++f) sum += each[f];
  *total = static_cast<float>(sum);
  return kOk;
}

}  // namespace fastsae
